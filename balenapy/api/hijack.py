"""The application's side of a request: streamed bodies, whole answers, raw streams.

Docker clients attach with or without `Upgrade: tcp` and get `101 UPGRADED` or `200 OK`, in both cases followed by raw
bytes both ways and half-close. Three messages of our own carry that between application and server
(`api/server.py` holds the other half):

    application -> server   http.hijack.accept {head}   the head, as exact bytes; the connection is raw from here
                            http.hijack.send {data}     http.hijack.send_eof
                            http.engine.whole {status, headers, body}   a whole answer in one packet
    server -> application   http.hijack.receive {data}  empty data: the client shut down its sending side

What a handler sees is a `trio.abc.HalfCloseableStream`; attach and exec are tested with `memory_stream_pair`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers.request import TrioBody

from balenapy.api.response import REASON, Response, StreamResponse
from balenapy.errors import InvalidParameter

if TYPE_CHECKING:
    from balenapy.api.app import App, Request

log = logging.getLogger(__name__)

RAW_STREAM = b"application/vnd.docker.raw-stream"
# An answer that comes before the end of an upload: this much is read and thrown away so that the connection can be
# used again. Source: net/http maxPostHandlerReadBytes.
DRAIN_BYTES = 256 << 10
DRAIN_S = 0.5  # net/http rstAvoidanceDelay

Send = Callable[[Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]
Serve = Callable[[trio.abc.HalfCloseableStream], Awaitable[None]]


class StreamedBody(TrioBody):
    """A request body that is never held: the client waits until the handler takes the next piece.

    Read it once: `async for chunk in body`, `await body.read(limit)`, or `await body` for something small.
    """

    def __init__(self, expected_content_length: int | None, max_content_length: int | None) -> None:
        self.is_chunked = False  # set by the connection: a body of unknown length is coming
        self._abandoned = False
        self._drained_bytes = 0
        self._is_expected = False
        self._ended = True

    def expect(self) -> None:
        """A body is coming. Most requests have none, and need none of this."""
        self._send, self._receive = trio.open_memory_channel[bytes](0)
        self._is_expected = True
        self._ended = False
        self._settled = trio.Event()  # ended, or too long to drain

    async def put(self, data: bytes) -> None:
        """Hand a piece to the handler, or throw it away when nobody will read it."""
        if not self._abandoned:
            try:
                await self._send.send(data)
                return
            except trio.BrokenResourceError:
                self._abandoned = True
        self._drained_bytes += len(data)
        if self._drained_bytes > DRAIN_BYTES:
            self._settled.set()
            await trio.sleep_forever()  # let the client's buffers fill; the connection is about to be closed

    def set_complete(self) -> None:
        self._send.close()
        self._ended = True
        self._settled.set()

    def abandon(self) -> None:
        """Nobody will read the rest."""
        self._abandoned = True
        if not self._ended:
            self._receive.close()

    @property
    def is_complete(self) -> bool:
        """Whether the end of the body arrived from the client."""
        return self._ended

    async def wait_settled(self) -> None:
        """Until the end arrived, or so much that waiting for it is pointless."""
        if not self._ended:
            await self._settled.wait()

    def __aiter__(self) -> StreamedBody:
        return self

    async def __anext__(self) -> bytes:
        if not self._is_expected:
            raise StopAsyncIteration
        try:
            return await self._receive.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise StopAsyncIteration from None

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises: InvalidParameter when it is longer than the limit."""
        data = bytearray()
        async for chunk in self:
            data += chunk
            if len(data) > limit_bytes:
                raise InvalidParameter("http: request body too large")
        return bytes(data)

    def __await__(self) -> Generator[Any, None, bytes]:
        return self.read(1 << 40).__await__()

    # Quart's synchronous feeding is not used; test clients of Quart would need it.
    def append(self, data: bytes) -> None:
        raise NotImplementedError("use put")


@dataclass(slots=True, eq=False)
class Hijack:
    """What a handler returns, once every check has passed, to get the connection as a raw stream.

    The head is sent before `serve` runs. `serve` is cancelled when the connection breaks; `receive_some` returning
    `b""` says the client shut down its sending side: the end of stdin where stdin is attached, a client that left
    where it is not. The connection is closed when `serve` returns. What it raises is logged; errors a client should
    see are its own business (text in the stream).

    Attributes:
        upgrade: the request had an Upgrade header (of any value): 101 instead of 200.
        engine_headers: whether the head carries Api-Version and so on (exec start: yes, attach: no).
    """

    serve: Serve
    upgrade: bool = False
    engine_headers: bool = False
    raw_head: bytes = field(default=b"", repr=False)  # instead of all that

    @classmethod
    def refused(cls, status: int, message: str) -> Hijack:
        """Attach's way of saying no: a raw head, the text, `\\r\\n`, and the connection closes."""
        head = b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\n\r\n" % (status, REASON.get(status, b""), RAW_STREAM)
        return cls.raw_answer(head + message.encode() + b"\r\n")

    @classmethod
    def raw_answer(cls, answer: bytes) -> Hijack:
        """Exact bytes, after which the connection closes."""

        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            await trio.lowlevel.checkpoint()

        return cls(serve, raw_head=answer)

    def head(self, engine_headers: Mapping[str, str]) -> bytes:
        if self.raw_head:
            return self.raw_head
        if self.upgrade:
            lines = [b"HTTP/1.1 101 UPGRADED", b"Content-Type: " + RAW_STREAM]
            lines += [b"Connection: Upgrade", b"Upgrade: tcp"]
        else:
            lines = [b"HTTP/1.1 200 OK", b"Content-Type: " + RAW_STREAM]
        if self.engine_headers:
            lines += [f"{name}: {value}".encode("latin-1") for name, value in sorted(engine_headers.items())]
        return b"\r\n".join([*lines, b"", b""])


class RawStream(trio.abc.HalfCloseableStream):
    """The three hijack messages as a stream."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._feed, self._fed = trio.open_memory_channel[bytes](0)
        self._rest = memoryview(b"")

    async def feed(self, data: bytes) -> None:
        """Called with each `http.hijack.receive`."""
        if not data:
            self._feed.close()
            return
        try:
            await self._feed.send(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the application reads no more

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if data:
            await self._send({"type": "http.hijack.send", "data": bytes(data)})
        else:
            await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await self._send({"type": "http.hijack.send_eof"})

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._rest:
            try:
                self._rest = memoryview(await self._fed.receive())
            except trio.EndOfChannel:
                return b""
        taken, self._rest = self._rest[:max_bytes], self._rest[len(self._rest[:max_bytes]) :]
        return bytes(taken)

    async def aclose(self) -> None:
        self._fed.close()
        await trio.lowlevel.checkpoint()


class _Writer:
    """`BodyWriter` of a StreamResponse; `start` makes the message that has the head, when it is sent."""

    def __init__(self, send: Send, start: Callable[[], Mapping[str, Any]]) -> None:
        self._send = send
        self._start: Callable[[], Mapping[str, Any]] | None = start

    @property
    def started(self) -> bool:
        return self._start is None

    async def start(self) -> None:
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(start())

    async def __call__(self, data: bytes) -> None:
        await self.start()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


class EngineHTTPConnection(TrioASGIHTTPConnection):
    """One request: a task that takes what the client sends, and the handler."""

    app: App

    async def __call__(self, receive: Receive, send: Send) -> None:
        request: Request = self._create_request_from_scope(send)  # type: ignore[assignment]
        body = request.body
        body.is_chunked = "Transfer-Encoding" in request.headers
        if not body.is_chunked and not request.content_length:
            await self._respond(request, receive, send)
            return
        body.expect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_body, body, receive)
            await self._respond(request, receive, send)
            nursery.cancel_scope.cancel()

    async def _take_body(self, body: StreamedBody, receive: Receive) -> None:
        while not body.is_complete:
            message = await receive()
            if message["body"]:
                await body.put(message["body"])
            if not message["more_body"]:
                body.set_complete()

    async def _take_raw(self, raw: RawStream, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.hijack.receive":
                await raw.feed(message["data"])

    async def _respond(self, request: Request, receive: Receive, send: Send) -> None:
        answer, engine_headers = await self.app.answer(request)
        if isinstance(answer, Hijack):
            await self._hijack(request, answer, engine_headers, receive, send)
            return
        if isinstance(answer, StreamResponse):
            refusal = await self._stream(request, answer, engine_headers, send)
            if refusal is None:
                return
            answer = refusal
        fields = answer.head(engine_headers)
        if not await self._drain(request):
            fields.append((b"Connection", b"close"))
        await send({"type": "http.engine.whole", "status": answer.status, "headers": fields, "body": answer.body})

    async def _stream(
        self, request: Request, answer: StreamResponse, engine_headers: Mapping[str, str], send: Send
    ) -> Response | None:
        """Run `produce`; return the error answer if it failed before the head was sent."""

        def start() -> Mapping[str, Any]:
            return {"type": "http.response.start", "status": answer.status, "headers": answer.head(engine_headers)}

        writer = _Writer(send, start)
        if answer.head_first:
            await writer.start()
        try:
            await answer.produce(writer)
            await writer.start()
        except Exception as raised:
            if not writer.started:
                return self.app.error(request, raised)
            # The stream is cut without its final chunk, which is how a client sees that it is not whole.
            log.error("stream failed path=%s", request.path, exc_info=raised)
            await send({"type": "http.engine.abort"})
            return None
        await self._drain(request)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None

    async def _hijack(
        self, request: Request, answer: Hijack, engine_headers: Mapping[str, str], receive: Receive, send: Send
    ) -> None:
        request.body.abandon()
        # The protocol must be past the request before the connection can become raw.
        await request.body.wait_settled()
        if not request.body.is_complete:
            await send({"type": "http.engine.abort"})
            return
        raw = RawStream(send)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_raw, raw, receive)
            await send({"type": "http.hijack.accept", "head": answer.head(engine_headers)})
            try:
                await answer.serve(raw)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            except Exception:
                log.exception("raw stream failed path=%s", request.path)
            nursery.cancel_scope.cancel()

    async def _drain(self, request: Request) -> bool:
        """Throw away the rest of the body, within bounds; say whether its end was reached."""
        if request.body.is_complete:
            return True
        request.body.abandon()
        with trio.move_on_after(DRAIN_S):
            await request.body.wait_settled()
        return request.body.is_complete
