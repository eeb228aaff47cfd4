"""A client's end of one connection: bytes in, bytes out, over memory streams or a real socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
import trio.testing

from balenapy.api import server
from balenapy.api.app import App

CHUNK = 1 << 16


@dataclass
class Answer:
    status: int
    reason: str
    fields: list[tuple[str, str]]  # in order, as spelled
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.fields)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.fields]


class Client:
    """Speaks HTTP/1.1 one byte string at a time; `stream` is there for whoever wants less."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._received = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def request(self, method: str, target: str, body: bytes = b"", **headers: str) -> Answer:
        await self.send(request_bytes(method, target, body, **headers))
        return await self.answer(method)

    async def answer(self, method: str = "GET") -> Answer:
        head = await self.head()
        return Answer(head.status, head.reason, head.fields, await self._body(method, head))

    async def head(self) -> Answer:
        text = (await self.receive_until(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text[:-4].split("\r\n")
        version, status, reason = first.split(" ", 2)
        assert version == "HTTP/1.1"
        fields = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
        return Answer(int(status), reason, fields, b"")

    async def _body(self, method: str, head: Answer) -> bytes:
        if method == "HEAD" or head.status in (204, 304) or head.status < 200:
            return b""
        if head.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while chunk := await self.chunk():
                body += chunk
            return body
        if "Content-Length" in head.headers:
            return await self.receive_exactly(int(head.headers["Content-Length"]))
        return await self.receive_to_end()

    async def chunk(self) -> bytes:
        length = int((await self.receive_until(b"\r\n"))[:-2], 16)
        data = await self.receive_exactly(length)
        assert await self.receive_exactly(2) == b"\r\n"
        return data

    async def receive_until(self, delimiter: bytes) -> bytes:
        while delimiter not in self._received:
            await self._more()
        data, delimiter, self._received = self._received.partition(delimiter)
        return data + delimiter

    async def receive_exactly(self, count: int) -> bytes:
        while len(self._received) < count:
            await self._more()
        data, self._received = self._received[:count], self._received[count:]
        return data

    async def receive_to_end(self) -> bytes:
        while data := await self.stream.receive_some(CHUNK):
            self._received += data
        data, self._received = self._received, b""
        return data

    async def _more(self) -> None:
        data = await self.stream.receive_some(CHUNK)
        assert data, f"the connection ended after {self._received!r}"
        self._received += data


def request_bytes(method: str, target: str, body: bytes = b"", **headers: str) -> bytes:
    fields = {"Host": "docker", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body or method in ("POST", "PUT"):
        fields.setdefault("Content-Length", str(len(body)))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + body


@asynccontextmanager
async def connected(app: App) -> AsyncIterator[Client]:
    """A client over memory streams; the connection's task ends with the block."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.Server(app).serve_stream, theirs)
        yield Client(ours)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def served(app: App, directory: Path) -> AsyncIterator[str]:
    """A real Unix socket; the path. The block ends only when the server does."""
    listener = server.unix_listener(str(directory / "engine.sock"))
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, app, [listener])
            yield listener.path
            nursery.cancel_scope.cancel()
    finally:
        server.close_listeners([listener])


@asynccontextmanager
async def client_of(path: str) -> AsyncIterator[Client]:
    async with await trio.open_unix_socket(path) as stream:
        yield Client(stream)
