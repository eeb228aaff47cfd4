"""WebSocket attach: the handshake on a hijacked connection, and frames as a byte stream.

The same raw connection as attach's serves for it, so that attach code sees one kind of stream. wsproto does the
frames and is imported when the first WebSocket comes.
Source: golang.org/x/net/websocket hybi.go, whose answers clients of the engine we replace know.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

import trio

from balenapy.api.hijack import Hijack, Serve

if TYPE_CHECKING:
    from wsproto.connection import Connection
    from wsproto.events import Event

    from balenapy.api.app import Request

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
MAX_MESSAGE_BYTES = 1 << 20


def websocket(request: Request, serve: Serve) -> Hijack:
    """Switch to WebSocket and run `serve` on what the frames carry: binary out, binary or text in.

    The stream has no half-close: `send_eof` says goodbye, and a client's goodbye is the end of its input.
    """
    headers = request.headers
    if headers.get("Upgrade", "").lower() != "websocket" or "upgrade" not in headers.get("Connection", "").lower():
        return _refused("", "not websocket protocol")
    key = headers.get("Sec-WebSocket-Key", "")
    if not key:
        return _refused("", "mismatch challenge/response")
    if headers.get("Sec-WebSocket-Version") != "13":
        return _refused("Sec-WebSocket-Version: 13\r\n", "missing or bad WebSocket Version")
    accept = base64.b64encode(hashlib.sha1((key + GUID).encode("latin-1")).digest())
    lines = [
        b"HTTP/1.1 101 Switching Protocols",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Accept: " + accept,
    ]
    if offered := headers.get("Sec-WebSocket-Protocol", ""):
        lines.append(b"Sec-WebSocket-Protocol: " + offered.split(",")[0].strip().encode("latin-1"))

    async def serve_frames(raw: trio.abc.HalfCloseableStream) -> None:
        stream = WebSocketStream(raw)
        await serve(stream)
        await stream.send_eof()

    return Hijack(serve_frames, raw_head=b"\r\n".join([*lines, b"", b""]))


def _refused(header: str, message: str) -> Hijack:
    return Hijack.raw_answer(f"HTTP/1.1 400 Bad Request\r\n{header}\r\n{message}".encode())


class WebSocketStream(trio.abc.HalfCloseableStream):
    """The payloads of a WebSocket's messages as a byte stream."""

    def __init__(self, raw: trio.abc.HalfCloseableStream) -> None:
        from wsproto import ConnectionType
        from wsproto.connection import Connection

        self._raw = raw
        self._connection: Connection = Connection(ConnectionType.SERVER)
        self._rest = b""
        self._said_goodbye = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        from wsproto.events import BytesMessage

        if data and not self._said_goodbye:
            await self._send(BytesMessage(data=bytes(data)))

    async def wait_send_all_might_not_block(self) -> None:
        await self._raw.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        from wsproto.events import CloseConnection

        if not self._said_goodbye:
            await self._send(CloseConnection(code=1000))
            self._said_goodbye = True

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while not self._rest:
            data = await self._raw.receive_some()
            if not data or not await self._receive(data):
                break
        taken = self._rest if max_bytes is None else self._rest[:max_bytes]
        self._rest = self._rest[len(taken) :]
        return taken

    async def _receive(self, data: bytes | bytearray) -> bool:
        """Take frames; say whether more may come."""
        from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
        from wsproto.utilities import RemoteProtocolError

        self._connection.receive_data(bytes(data))
        try:
            for event in self._connection.events():
                match event:
                    case TextMessage():
                        self._rest += event.data.encode()
                    case BytesMessage():
                        self._rest += event.data
                    case Ping():
                        await self._send(event.response())
                    case CloseConnection():
                        if not self._said_goodbye:
                            self._said_goodbye = True
                            await self._send(event.response())
                        return False
        except RemoteProtocolError:
            return False
        return True

    async def _send(self, event: Event) -> None:
        await self._raw.send_all(self._connection.send(event))

    async def aclose(self) -> None:
        await self._raw.aclose()
