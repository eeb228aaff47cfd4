"""Attached clients: the stdio of a running container, shared by all who want it.

A `Hub` belongs to one run of a container and holds the only connection to its conmon; clients may join it before the
run. The pump reads that connection and gives each client what it asked for, through a bounded queue: conmon
writes with blocking sends, so a reader that stops would stop the container. A client that does not take its
output holds the others up for `STALL_S` and is then cut off.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from balenapy.core.detachkeys import DEFAULT_KEYS, KeyFilter
from balenapy.core.stdcopy import frame
from balenapy.errors import SystemFailure
from balenapy.linux.conmon import STDOUT, AttachSocket, Bundle

if TYPE_CHECKING:
    from balenapy.core.container import Container
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

QUEUE_MAX_BYTES = 1 << 20  # moby's BytesPipe blocks its writer there
STALL_S = 10.0
STDIN_CHUNK_BYTES = 16 << 10
SEND_MAX_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class AttachOptions:
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    stream: bool = False
    logs: bool = False
    detach_keys: bytes = DEFAULT_KEYS
    multiplexed: bool = True  # stdcopy frames; a terminal or a WebSocket has raw bytes


class Client:
    """One attached client's outgoing queue."""

    def __init__(self, options: AttachOptions, *, stall_s: float = STALL_S) -> None:
        self._options = options
        self.stall_s = stall_s
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._filled = trio.Event()
        self._emptied = trio.Event()
        self.ended = False

    def put_nowait(self, stream: int, data: bytes) -> bool:
        """False when there is no room (nothing was taken then)."""
        if self.ended or not (self._options.stdout if stream == STDOUT else self._options.stderr):
            return True
        if self._size >= QUEUE_MAX_BYTES:
            return False
        piece = frame(stream, data) if self._options.multiplexed else data
        self._pieces.append(piece)
        self._size += len(piece)
        self._filled.set()
        return True

    def say(self, text: str) -> None:
        """Words of the engine's own, on stdout whatever was asked for."""
        data = text.encode()
        self._pieces.append(frame(STDOUT, data) if self._options.multiplexed else data)
        self._filled.set()

    async def wait_for_room(self) -> None:
        while self._size >= QUEUE_MAX_BYTES and not self.ended:
            self._emptied = trio.Event()
            await self._emptied.wait()

    def end(self) -> None:
        """No more output will come; what is queued is still sent."""
        self.ended = True
        self._filled.set()
        self._emptied.set()

    def cut(self) -> None:
        """Give the client up with what it did not take."""
        self._pieces.clear()
        self._size = 0
        self.end()

    async def send_to(self, stream: trio.abc.SendStream) -> None:
        """Send until the output has ended."""
        while True:
            await self._filled.wait()
            if not self._pieces:
                if self.ended:
                    return
                self._filled = trio.Event()
                continue
            joined = bytearray()
            while self._pieces and len(joined) < SEND_MAX_BYTES:
                joined += self._pieces.popleft()
            await stream.send_all(bytes(joined))
            self._size -= min(self._size, len(joined))
            self._emptied.set()


class Hub:
    """The stdio of one run."""

    def __init__(self) -> None:
        self.clients: list[Client] = []
        self.ready = trio.Event()  # connected, or the run ended without
        self.over = False
        self._socket: AttachSocket | None = None
        # A second connection, closed again, would be the end of the container's stdin (see linux/conmon.py).
        self._connecting = trio.Lock()

    @property
    def connected(self) -> bool:
        return self._socket is not None

    async def connect(self, bundle: Bundle, nursery: trio.Nursery) -> None:
        """Connect, unless that was done, and begin to distribute output. Raises: SystemFailure: the run is over."""
        async with self._connecting:
            if self._socket is None and not self.over:
                self._socket = await AttachSocket.connect(bundle)
                self.ready.set()
                nursery.start_soon(self.pump)

    async def pump(self) -> None:
        """Distribute output until the run has no more. It runs in the engine's nursery: an error ends only the hub."""
        assert self._socket is not None
        try:
            while True:
                stream, data = await self._socket.receive()
                if not data:
                    return
                for client in list(self.clients):
                    if not client.put_nowait(stream, data):
                        await self._wait_for(client, stream, data)
        except (OSError, trio.ClosedResourceError):
            log.exception("attach ended early")
        finally:
            self.end()

    async def _wait_for(self, client: Client, stream: int, data: bytes) -> None:
        with trio.move_on_after(client.stall_s):
            await client.wait_for_room()
        if not client.put_nowait(stream, data):
            log.warning("attached client does not take its output and is cut off")
            client.cut()

    def end(self) -> None:
        """The run is over, or never came to be."""
        self.over = True
        for client in self.clients:
            client.end()
        self.ready.set()
        if self._socket is not None:
            self._socket.close()

    async def write_stdin(self, data: bytes) -> None:
        if self._socket is not None and not self.over:
            try:
                await self._socket.send(data)
            except (trio.ClosedResourceError, OSError):
                pass  # the run ended meanwhile

    def close_stdin(self) -> None:
        if self._socket is not None and not self.over:
            self._socket.send_eof()


class Attachments:
    """The hubs of all containers; part of the supervisors."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._hubs: dict[str, Hub] = {}

    # -- the life of a run --

    async def begin_run(self, container: Container, bundle: Bundle) -> None:
        """Connect those who wait already: between the runtime's create and start. Raises: SystemFailure."""
        hub = self._hubs.get(container.id)
        if hub is not None and hub.clients:
            await hub.connect(bundle, self._engine.nursery)

    def end_run(self, container: Container) -> None:
        """conmon has ended: who attaches from now on waits for the next run. What conmon sent is still delivered."""
        hub = self._hubs.pop(container.id, None)
        if hub is not None and not hub.connected:
            hub.end()

    async def _join(self, container: Container, client: Client) -> Hub:
        hub = self._hubs.get(container.id)
        if hub is None or hub.over:
            hub = self._hubs[container.id] = Hub()
        hub.clients.append(client)
        bundle = self._engine.supervisors.bundle_of(container)
        if bundle is not None:
            try:
                await hub.connect(bundle, self._engine.nursery)
            except SystemFailure as error:
                log.debug("attach came too late container=%s error=%s", container.short_id, error.message)
                self.end_run(container)
        return hub

    def _leave(self, container: Container, hub: Hub, client: Client) -> None:
        hub.clients.remove(client)
        client.cut()
        if not hub.clients and not hub.connected and self._hubs.get(container.id) is hub:
            del self._hubs[container.id]

    # -- clients --

    async def serve(self, container: Container, options: AttachOptions, stream: trio.abc.HalfCloseableStream) -> None:
        """Be the stdio of a container for one client, until its output ends or the client leaves or detaches."""
        if options.logs:
            await self._replay(container, options, stream)
        self._engine.events.container(container, "attach")
        if not options.stream or not (options.stdin or options.stdout or options.stderr):
            return
        client = Client(options)
        hub = await self._join(container, client)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_input, container, options, stream, hub, nursery.cancel_scope)
                await client.send_to(stream)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client left
        finally:
            self._leave(container, hub, client)
        if container.config.stdin_once and not container.config.tty:
            await self._engine.supervisors.wait_until_stopped(container)

    @asynccontextmanager
    async def output(self, container: Container) -> AsyncIterator[Client]:
        """A client of the engine's own, from before the start: its frames are all that the container writes.

        The container waits for it, however long it takes.
        """
        client = Client(AttachOptions(stdout=True, stderr=True, stream=True), stall_s=math.inf)
        hub = await self._join(container, client)
        try:
            yield client
        finally:
            self._leave(container, hub, client)

    async def _replay(self, container: Container, options: AttachOptions, stream: trio.abc.SendStream) -> None:
        from balenapy.core.logview import LogOptions

        wanted = LogOptions(stdout=options.stdout, stderr=options.stderr)
        await self._engine.logs.read(container, wanted, stream.send_all)

    async def _serve_input(
        self,
        container: Container,
        options: AttachOptions,
        stream: trio.abc.ReceiveStream,
        hub: Hub,
        attached: trio.CancelScope,
    ) -> None:
        """Stdin to the container. Returns when only the input has ended; cancels `attached` when the client left."""
        config = container.config
        wants_input = options.stdin and config.open_stdin
        keys = KeyFilter(options.detach_keys) if config.tty and wants_input else None
        if wants_input:
            await hub.ready.wait()
        try:
            while data := bytes(await stream.receive_some(STDIN_CHUNK_BYTES)):
                if not wants_input:
                    continue
                if keys is not None:
                    data = keys.feed(data)
                if data:
                    await hub.write_stdin(data)
                if keys is not None and keys.detached:
                    self._engine.events.container(container, "detach")
                    attached.cancel()
                    return
        except trio.BrokenResourceError:
            attached.cancel()
            return
        if wants_input and config.stdin_once and not config.tty:
            hub.close_stdin()
            return
        if wants_input:
            attached.cancel()  # the end of input ends the attach; the process keeps its stdin
            return
        # No input was to come: the CLI shuts down its sending side nevertheless, so this does not say that it left.
