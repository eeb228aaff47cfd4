"""Listeners and connections: the server's side of a request, over Hypercorn's three floors.

    EngineConnection (sockets) -> EngineH11 (protocol) -> EngineStream (one request, ASGI messages) -> application

Hypercorn swaps the connection object for WebSockets (`H11WSConnection`) and lets `Data` events through; raw streams
do the same with `RawConnection`. h11 makes it clean: after a request with an Upgrade header the peer is in
MIGHT_SWITCH_PROTOCOL, `next_event()` says PAUSED, the reader parks on `can_read`, and early stdin waits in
`trailing_data`. Nothing is patched: every difference is a subclass here or in `api/hijack.py`.

A connection's nursery holds the reader and the request's task. The reader keeps reading while the handler runs, so a
client that leaves cancels its handler at once. Nothing here shields: at shutdown a client that stopped reading is cut.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Data, EndData, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Request as RequestEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from balenapy.api.response import REASON, Headers
from balenapy.errors import SystemFailure

if TYPE_CHECKING:
    import ssl

    from balenapy.api.app import App
    from balenapy.config import Config

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 1 << 20  # X-Registry-Auth and X-Registry-Config are long; net/http DefaultMaxHeaderBytes
BACKLOG = 128
SOCKET_MODE = 0o660
SOCKET_GROUPS = ("balena-engine", "docker")
HANDSHAKE_S = 10.0
KEEPALIVE_S = 15  # net.ListenConfig's default
LINGER_S = 0.5  # how long a peer that is still sending may take to read our last answer


# --- one request ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hijacked(StreamEvent):
    """The application took the connection; `head` is what the client reads first."""

    stream_id: int
    head: bytes


@dataclass(frozen=True)
class Whole(StreamEvent):
    """A whole answer, to be sent in one packet."""

    stream_id: int
    status_code: int
    headers: Headers
    body: bytes


class EngineStream(HTTPStream):
    """One request as ASGI messages, with the four of our own (`api/hijack.py`)."""

    app_put: AppPut
    hijacked = False

    async def handle(self, event: StreamEvent) -> None:
        if isinstance(event, Data):
            if not self.closed:
                await self.app_put({"type": "http.hijack.receive", "data": event.data})
        elif isinstance(event, StreamClosed):
            # The answer is complete: the application ends by itself.
            self.closed = True
        else:
            await super().handle(event)

    def abort(self) -> None:
        """The client is gone: so is the handler."""
        self.closed = True
        if hasattr(self, "app_put"):
            self.app_put.cancel()

    async def app_send(self, message: Any) -> None:
        if message is None:
            if self.closed:
                return
            if self.hijacked:
                await self.send(StreamClosed(stream_id=self.stream_id))
            elif self.state is ASGIHTTPState.RESPONSE:
                # The application died half way: no end of message, so that the client sees a broken answer.
                await self.send(StreamClosed(stream_id=self.stream_id))
            else:
                await super().app_send(None)
            return
        match message["type"]:
            case "http.engine.whole":
                self.state = ASGIHTTPState.CLOSED
                body = b"" if self.scope["method"] == "HEAD" else message["body"]
                await self.send(Whole(self.stream_id, message["status"], message["headers"], body))
                await self.send(StreamClosed(stream_id=self.stream_id))
            case "http.engine.abort":
                await self.send(StreamClosed(stream_id=self.stream_id))
            case "http.hijack.accept":
                self.hijacked = True
                await self.send(Hijacked(self.stream_id, message["head"]))
            case "http.hijack.send":
                await self.send(Data(stream_id=self.stream_id, data=message["data"]))
            case "http.hijack.send_eof":
                await self.send(EndData(stream_id=self.stream_id))
            case _:
                await super().app_send(message)


class AppPut:
    """Messages to one application task; `cancel` ends it. Ignores messages once the application is done."""

    def __init__(self, send: trio.MemorySendChannel[Any], scope: trio.CancelScope) -> None:
        self._send = send
        self.cancel = scope.cancel

    async def __call__(self, message: Any) -> None:
        try:
            await self._send.send(message)
        except trio.BrokenResourceError:
            pass


class EngineTaskGroup(TaskGroup):
    """Hypercorn's, with an application that can be cancelled alone and never leaves a blocked sender behind."""

    _nursery: trio.Nursery

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> AppPut:
        send_channel, receive_channel = trio.open_memory_channel[Any](config.max_app_queue_size)
        cancel_scope = trio.CancelScope()
        self._nursery.start_soon(_run_app, app, scope, receive_channel, send, cancel_scope)
        return AppPut(send_channel, cancel_scope)


async def _run_app(
    app: Any,
    scope: Any,
    receive: trio.MemoryReceiveChannel[Any],
    send: Callable[[Any], Awaitable[None]],
    cancel_scope: trio.CancelScope,
) -> None:
    with cancel_scope, receive:
        try:
            await app(scope, receive.receive, send, trio.to_thread.run_sync, trio.from_thread.run)
        except Exception:
            # A wall: a bug ends this request, not the engine. Cancellation passes.
            log.exception("request failed path=%s", scope.get("path"))
        await send(None)


# --- the protocol -----------------------------------------------------------------------------------------------


class RawConnection:
    """The face of h11's connection for a connection that no longer speaks HTTP (as `H11WSConnection`)."""

    our_state = None  # prevents recycling
    their_state = None
    they_are_waiting_for_100_continue = False
    trailing_data = (b"", False)

    def __init__(self, early: bytes, ended: bool) -> None:
        self._buffer = bytearray(early)
        self._ended = ended

    def receive_data(self, data: bytes) -> None:
        if data:
            self._buffer += data
        else:
            self._ended = True

    def next_event(self) -> Data | type[h11.NEED_DATA]:
        """What arrived, then one empty `Data` for the end of input, then NEED_DATA."""
        if self._buffer:
            data, self._buffer = bytes(self._buffer), bytearray()
            return Data(stream_id=STREAM_ID, data=data)
        if self._ended:
            self._ended = False
            return Data(stream_id=STREAM_ID, data=b"")
        return h11.NEED_DATA

    def send(self, event: Any) -> bytes:
        raise h11.LocalProtocolError("the connection is raw")


class EngineH11(H11Protocol):
    """HTTP/1.1 only, with reason phrases, whole answers in one packet, and hijacking."""

    stream: EngineStream | None
    shut_down: Callable[[], Awaitable[None]]  # of our sending side; set by EngineConnection

    @property
    def is_raw(self) -> bool:
        return isinstance(self.connection, RawConnection)

    async def handle(self, event: Event) -> None:
        if isinstance(event, Closed):
            if self.stream is not None:
                self.stream.abort()
                self.stream = None
            await self.can_read.set()
        else:
            await super().handle(event)

    async def stream_send(self, event: StreamEvent) -> None:
        match event:
            case Whole():
                await self._send_whole(event)
            case Hijacked():
                assert isinstance(self.connection, h11.Connection)
                early, ended = self.connection.trailing_data
                self.connection = cast(Any, RawConnection(early, ended))
                await self.send(RawData(event.head))
                await self.can_read.set()
            case EndData():
                await self.shut_down()
            case Response() if event.status_code >= 200:
                head = h11.Response(
                    status_code=event.status_code,
                    headers=event.headers,
                    reason=REASON.get(event.status_code, b""),
                )
                await self._send_h11_event(head)
            case _:
                await super().stream_send(event)

    async def _send_whole(self, event: Whole) -> None:
        connection = self.connection
        head = h11.Response(
            status_code=event.status_code,
            headers=event.headers,
            reason=REASON.get(event.status_code, b""),
        )
        try:
            data = connection.send(head)
            if event.body:
                data += connection.send(h11.Data(data=event.body)) or b""
            data += connection.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError:
            if connection.their_state is not h11.ERROR:
                raise
        else:
            await self.send(RawData(data))

    async def _create_stream(self, request: h11.Request) -> None:
        if not request.http_version.startswith(b"1."):
            await self._send_error_response(505)
            await self.send(Closed())
            return
        self.stream = EngineStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            RequestEvent(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )

    async def _send_error_response(self, status_code: int) -> None:
        reason = REASON.get(status_code, b"")
        fields = [(b"Content-Type", b"text/plain; charset=utf-8"), (b"Connection", b"close")]
        await self._send_whole(Whole(STREAM_ID, status_code, fields, b"%d %s" % (status_code, reason)))

    async def _check_protocol(self, event: h11.Request) -> None:
        """No h2c and no HTTP/2: the docker CLI's `/session` asks for h2c and is content without."""


# --- the connection ---------------------------------------------------------------------------------------------


class EngineConnection(TCPServer):
    """One client. Ends with the client, with a raw stream, or by cancellation; never by shielding."""

    protocol: EngineH11  # type: ignore[assignment]

    def __init__(self, app: Any, config: HypercornConfig, context: WorkerContext, stream: Any) -> None:
        super().__init__(app, config, context, ConnectionState({}), stream)
        self._is_ssl = isinstance(stream, trio.SSLStream)
        self._closing = False
        self._reader = trio.CancelScope()

    async def run(self) -> None:
        try:
            if self._is_ssl:
                with trio.fail_after(HANDSHAKE_S):
                    await self.stream.do_handshake()
            async with EngineTaskGroup() as task_group:
                self.protocol = EngineH11(
                    self.app,
                    self.config,
                    self.context,
                    task_group,
                    cast(ConnectionState, self.state),
                    self._is_ssl,
                    None,
                    None,
                    self.protocol_send,
                )
                self.protocol.shut_down = self._shut_down
                with self._reader:
                    await self._read_data()
        except (trio.BrokenResourceError, trio.TooSlowError):
            pass  # no TLS with this one
        finally:
            await trio.aclose_forcefully(self.stream)

    def close_if_idle(self) -> None:
        if not hasattr(self, "protocol") or self.protocol.stream is None:
            self._reader.cancel()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            async with self.send_lock:
                try:
                    await self.stream.send_all(event.data)
                    return
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                except trio.Cancelled:
                    # An unknown part was sent: nothing more can be said on this connection.
                    await trio.aclose_forcefully(self.stream)
                    raise
            await self.protocol.handle(Closed())
        elif isinstance(event, Closed):
            await self._close()

    async def _read_data(self) -> None:
        while True:
            try:
                data = await self.stream.receive_some(MAX_RECV)
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                break
            if not self._closing:
                await self.protocol.handle(RawData(bytes(data)))
            if not data:
                if self.protocol.is_raw:
                    return  # half-closed: the raw stream lives until its owner ends it
                break
        await self.protocol.handle(Closed())

    async def _shut_down(self) -> None:
        """End our sending side; TLS has no such thing, there the end is the end of all."""
        if self._is_ssl:
            return
        async with self.send_lock:
            try:
                await self.stream.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the reader notices too

    async def _close(self) -> None:
        """Say the end; what the peer still sends is read and thrown away for a moment.

        Closing at once would answer it with a reset, and that can overtake our last words (net/http lingers too).
        """
        self._closing = True
        await self._shut_down()
        self._reader.deadline = trio.current_time() + (0 if self._is_ssl else LINGER_S)


# --- the server -------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Listener:
    """A listening socket; `path` is the file it made, to be removed with it."""

    accepting: trio.abc.Listener[Any]
    path: str = ""


class Server:
    """Serves streams; knows the connections that are open."""

    def __init__(self, app: App) -> None:
        self._app = ASGIWrapper(cast(Any, app))
        self._config = HypercornConfig()
        self._config.include_server_header = False
        self._config.include_date_header = False  # our heads carry their own
        self._config.h11_max_incomplete_size = MAX_HEAD_BYTES
        self._config.errorlog = log
        self._context = WorkerContext(None)
        self._connections: set[EngineConnection] = set()

    async def serve_stream(self, stream: Any) -> None:
        """Serve one connection to its end, whatever it does."""
        connection = EngineConnection(self._app, self._config, self._context, stream)
        self._connections.add(connection)
        try:
            await connection.run()
        except Exception:
            # A wall: one bad connection never ends the engine.
            log.exception("connection failed")
        finally:
            self._connections.discard(connection)

    async def finish(self) -> None:
        """Let every connection end after the request it is at."""
        await self._context.terminated.set()
        for connection in list(self._connections):
            connection.close_if_idle()


async def serve(
    app: App,
    listeners: Sequence[Listener],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled, or until the listeners are closed and the last busy connection has ended.

    Cancellation: every connection is closed at once; handlers are cancelled.
    """
    server = Server(app)
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            for listener in listeners:
                accepting.start_soon(_accept, listener.accepting, server.serve_stream, connections)
            task_status.started()
        await server.finish()


async def _accept(
    listener: trio.abc.Listener[Any], handle: Callable[[Any], Awaitable[None]], connections: trio.Nursery
) -> None:
    try:
        await trio.serve_listeners(handle, [listener], handler_nursery=connections)
    except* trio.ClosedResourceError:
        pass  # `stop_accepting`


def open_listeners(config: Config, passed: Sequence[tuple[str, socket.socket]] = ()) -> list[Listener]:
    """Listen on every host of the configuration; `passed` are the service manager's (name, socket) pairs.

    Raises: SystemFailure; nothing is left listening then.
    """
    listeners: list[Listener] = []
    try:
        for host in config.hosts:
            scheme, _, rest = host.partition("://")
            if scheme == "unix":
                listeners.append(unix_listener(rest, config.group))
            elif scheme == "fd":
                listeners += _passed_listeners(rest, passed)
            else:
                listeners += tcp_listeners(rest, _tls_context(config))
    except OSError as error:
        close_listeners(listeners)
        raise SystemFailure(f"cannot listen on {host}: {error.strerror or error}") from error
    except BaseException:
        close_listeners(listeners)
        raise
    return listeners


def open_monitor_listeners(address: str) -> list[Listener]:
    """Listen for those who only look (api/monitor.py); nowhere for "".

    Raises: SystemFailure.
    """
    if not address:
        return []
    try:
        if address.startswith("unix://"):
            return [unix_listener(address.removeprefix("unix://"))]
        name = address.rpartition(":")[0].strip("[]")
        if name != "localhost" and not name.startswith("127.") and name != "::1":
            log.warning("metrics-addr=%s: whoever reaches it can read names, figures and logs of containers", address)
        return tcp_listeners(address)
    except OSError as error:
        raise SystemFailure(f"cannot listen on metrics-addr {address}: {error.strerror or error}") from error


def unix_listener(path: str, group: str = "") -> Listener:
    """Listen on a path, mode 0660, for `group`. A stale socket is replaced, a live one is not.

    Raises: SystemFailure, OSError.
    """
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    group_id = _group_id(group)
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The file must never be there with wider permissions, not even for a moment.
        before = os.umask(0o777 & ~SOCKET_MODE)
        try:
            listening.bind(path)
        finally:
            os.umask(before)
        if group_id is not None and os.geteuid() == 0:
            os.chown(path, 0, group_id)
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return Listener(_socket_listener(listening), path)


def tcp_listeners(address: str, tls: ssl.SSLContext | None = None) -> list[Listener]:
    """Listen on every address `host:port` stands for."""
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners = []
    try:
        for family, kind, protocol, _, where in found:
            listening = socket.socket(family, kind, protocol)
            try:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                # Inherited by connections: a client that vanished ends its request some day.
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
                if family == socket.AF_INET6:
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listening.bind(where)
                listening.listen(BACKLOG)
            except BaseException:
                listening.close()
                raise
            listeners.append(Listener(_socket_listener(listening, tls)))
    except BaseException:
        close_listeners(listeners)
        raise
    return listeners


def stop_accepting(listeners: Sequence[Listener]) -> None:
    """Take no new connections; `serve` ends when the present ones are done."""
    for listener in listeners:
        _socket_of(listener).close()


def close_listeners(listeners: Sequence[Listener]) -> None:
    stop_accepting(listeners)
    for listener in listeners:
        if listener.path:
            try:
                os.unlink(listener.path)
            except FileNotFoundError:
                pass


def _socket_listener(listening: socket.socket, tls: ssl.SSLContext | None = None) -> trio.abc.Listener[Any]:
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    return trio.SSLListener(listener, tls, https_compatible=True) if tls is not None else listener


def _socket_of(listener: Listener) -> trio.socket.SocketType:
    accepting = listener.accepting
    if isinstance(accepting, trio.SSLListener):
        accepting = accepting.transport_listener
    assert isinstance(accepting, trio.SocketListener)
    return accepting.socket


def _passed_listeners(name: str, passed: Sequence[tuple[str, socket.socket]]) -> list[Listener]:
    wanted = [sock for passed_name, sock in passed if name in ("", "*", passed_name, str(sock.fileno()))]
    if not wanted:
        raise SystemFailure("no sockets found via socket activation: make sure the service was started by systemd")
    return [Listener(_socket_listener(sock)) for sock in wanted]


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SystemFailure(f"cannot listen on {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            os.unlink(path)
            return
    raise SystemFailure(f"cannot listen on {path}: another process is listening there")


def _group_id(name: str) -> int | None:
    """The group that may use the socket: the one asked for, else `balena-engine` or `docker` where it exists."""
    import grp

    if name.isdigit():
        return int(name)
    for candidate in (name,) if name else SOCKET_GROUPS:
        try:
            return grp.getgrnam(candidate).gr_gid
        except KeyError:
            pass
    if name:
        raise SystemFailure(f"group {name} not found")
    return None


def _tls_context(config: Config) -> ssl.SSLContext | None:
    if not (config.tls or config.tls_verify):
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    assert config.tls_cert is not None
    context.load_cert_chain(config.tls_cert, config.tls_key)
    if config.tls_verify:
        context.load_verify_locations(config.tls_ca_cert)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
