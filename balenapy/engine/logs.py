"""Container logs: the spool in memory is moved into the ring file in batches; `logs` reads the ring.

While a container runs, the watcher tells that conmon wrote. One task for all containers then waits `BATCH_S`, so that
the flash sees few and larger writes, unless somebody follows that log or much is waiting, and drains. Reading drains
first. What a power cut costs is what came in the last `BATCH_S` and what the kernel had not written back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote_plus

import trio

from balenapy.config import parse_size
from balenapy.core.conmonlog import STDERR, STDOUT
from balenapy.core.ringlog import Entry, Joiner, Ring
from balenapy.core.stdcopy import Stream, frame
from balenapy.errors import Conflict, DataLoss, InvalidParameter, SystemFailure, Unsupported
from balenapy.linux.conmon import SPOOL_MAX_BYTES, Bundle
from balenapy.stores.ringfile import DEFAULT_SIZE_BYTES, FILE_NAME, MAX_SIZE_BYTES, SpoolDrain, open_ring

if TYPE_CHECKING:
    from balenapy.core.container import Container
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

BATCH_S = 1.0  # the flash sees what came in that time as one write
URGENT_BYTES = 256 << 10  # waiting in a spool: do not wait for the rest of `BATCH_S`
FLOOD_S = 0.02  # how soon a spool that was urgent is looked at again: conmon fills it at up to 100 MB/s
CHUNK_BYTES = 64 << 10  # of output at a time
RING_DRIVERS = ("", "json-file", "local")

Write = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class LogOptions:
    stdout: bool = True
    stderr: bool = True
    since_ns: int = 0
    until_ns: int = 0
    tail: int = -1  # entries; -1: all
    timestamps: bool = False
    details: bool = False
    follow: bool = False


def ring_size(options: Mapping[str, str]) -> int:
    """`max-size` times `max-file` of the log options, within bounds.

    Raises: InvalidParameter.
    """
    try:
        size = parse_size(options["max-size"]) if options.get("max-size", "-1") != "-1" else DEFAULT_SIZE_BYTES
        files = int(options.get("max-file", "1"))
    except ValueError as error:
        raise InvalidParameter(str(error)) from error
    return min(max(size * max(files, 1), 1), MAX_SIZE_BYTES)


class _RunningLog:
    """The log of one run."""

    def __init__(self, container: Container, drain: SpoolDrain) -> None:
        self.container = container
        self.drain = drain
        self.lock = trio.Lock()
        self.news = trio.Event()  # set and replaced when something was taken over
        self.followers = 0
        self.ended = False
        self.watch = -1


class Logs:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[str, _RunningLog] = {}
        self._dirty: dict[str, _RunningLog] = {}
        self._wake = trio.Event()
        self._urgent = trio.Event()

    # -- the life of a run; called by the supervisor --

    def conmon_options(self, container: Container) -> list[str]:
        """How conmon is to log. Raises: SystemFailure, InvalidParameter."""
        driver = container.host_config.log_config.type
        if driver in RING_DRIVERS:
            try:
                ring_size(container.host_config.log_config.config or {})
            except InvalidParameter as error:  # found only now, as in moby: not the fault of this request
                raise SystemFailure(f"failed to initialize logging driver: {error.message}") from error
            return ["--log-path", "k8s-file:log", "--log-size-max", str(SPOOL_MAX_BYTES)]
        if driver == "none":
            return ["--log-path", "none"]
        if driver == "journald":
            if not Path("/run/systemd/journal/socket").exists():
                raise SystemFailure("failed to initialize logging driver: journald is not enabled on this host")
            tag = _tag(container, "{{.ID}}")
            return ["--log-path", "journald", "--name", container.name, "--log-tag", tag]
        raise SystemFailure(
            f"failed to initialize logging driver: logger: no log driver named '{driver}' is registered"
        )

    def begin_run(self, container: Container, bundle: Bundle, *, adopt: bool = False) -> None:
        """Begin to take over what conmon writes. Before the container's process starts, or after an adoption."""
        if container.host_config.log_config.type not in RING_DRIVERS:
            return
        path = self.path(container)
        size = ring_size(container.host_config.log_config.config or {})
        running = _RunningLog(container, SpoolDrain(bundle.spool, path, size, adopt=adopt))
        # In the loop's thread: the spool lies in memory.
        running.drain.open()
        self._running[container.id] = running

    def changed(self, container_id: str) -> None:
        """The watcher saw that conmon wrote."""
        running = self._running.get(container_id)
        if running is None:
            return
        self._dirty[container_id] = running
        self._wake.set()
        if running.followers or running.drain.waiting_bytes > URGENT_BYTES:
            self._urgent.set()

    async def end_run(self, container: Container) -> None:
        """Take over the rest; followers end when they have read it. Idempotent."""
        running = self._running.get(container.id)
        if running is None:
            return
        async with running.lock:
            if not running.drain.is_idle:
                await trio.to_thread.run_sync(running.drain.end_run, limiter=self._engine.limiters.files)
            running.drain.close()
        self._running.pop(container.id, None)
        self._dirty.pop(container.id, None)
        running.ended = True
        running.news.set()

    async def serve(self) -> None:
        """Drain what the watcher tells of, until cancelled."""
        while True:
            await self._wake.wait()
            with trio.move_on_after(BATCH_S):
                await self._urgent.wait()
            self._wake, self._urgent = trio.Event(), trio.Event()
            dirty, self._dirty = self._dirty, {}
            flooded = False
            for running in dirty.values():
                try:
                    if await self._drain(running) >= URGENT_BYTES:
                        self._dirty[running.container.id] = running
                        flooded = True
                except Exception:
                    log.exception("log cannot be drained container=%s", running.container.short_id)
            if flooded:
                await trio.sleep(FLOOD_S)
                self._wake.set()
                self._urgent.set()

    async def flush(self) -> None:
        """Take over everything: before the daemon ends."""
        for running in list(self._running.values()):
            await self._drain(running)

    async def _drain(self, running: _RunningLog) -> int:
        """Take over what is there now, at most a spool full, so that others get their turn; returns its bytes."""
        taken = 0
        async with running.lock:
            while not running.ended and taken < SPOOL_MAX_BYTES:
                count = await trio.to_thread.run_sync(running.drain.drain_some, limiter=self._engine.limiters.files)
                if not count:
                    break
                taken += count
        if taken:
            running.news.set()
            running.news = trio.Event()
        return taken

    def path(self, container: Container) -> Path:
        """The ring file; it is made with the first output."""
        return self._engine.config.data_root / "containers" / container.id / FILE_NAME

    # -- reading --

    def check_readable(self, container: Container) -> None:
        """Raises: Unsupported, Conflict."""
        if container.host_config.log_config.type not in RING_DRIVERS:
            raise Unsupported("configured logging driver does not support reading")
        if container.state.status.value in ("dead", "removing"):
            raise Conflict("can not get logs from container which is dead or marked for removal")

    async def read(self, container: Container, options: LogOptions, write: Write) -> None:
        """Write the log as the API shows it; with `follow` until the run ends.

        An error after the beginning is told in the stream, as a frame of stream 3.
        """
        self.check_readable(container)
        running = self._running.get(container.id)
        try:
            if running is not None:
                running.followers += options.follow
                await self._drain(running)
            reader = _Reader(self.path(container), container, options)
            try:
                await self._copy(reader, running, options, write)
            finally:
                reader.close()
        except (DataLoss, SystemFailure) as error:
            await write(frame(Stream.SYSTEM, f"Error grabbing logs: {error.message}\n".encode()))
        finally:
            if running is not None:
                running.followers -= options.follow

    async def _copy(self, reader: _Reader, running: _RunningLog | None, options: LogOptions, write: Write) -> None:
        limiter = self._engine.limiters.files
        while True:
            # Taken before reading: what arrives meanwhile sets this event.
            news = running.news if running is not None else None
            ended = running is None or running.ended
            while data := await trio.to_thread.run_sync(reader.read_some, limiter=limiter):
                await write(data)
            if news is None or ended or reader.finished or not options.follow:
                if rest := reader.rest(run_ended=ended):
                    await write(rest)
                return
            await news.wait()


class _Reader:
    """Reads a ring from the wanted place on and makes bytes for the client. Blocks; for a thread."""

    def __init__(self, path: Path, container: Container, options: LogOptions) -> None:
        self._path = path
        self._tail = options.tail
        self._tty = container.config.tty
        self._streams = {STDOUT: options.stdout, STDERR: options.stderr}
        self._since = _stamp(options.since_ns)
        self._until = _stamp(options.until_ns)
        self._timestamps = options.timestamps
        self._details = _details(container) + b" " if options.details else b""
        self._fd = -1
        self._ring: Ring | None = None
        self._joiner = Joiner()
        self._number = 0  # of the block to read next; 0: not begun
        self._seq = 0  # of the last record read
        self._newest = 0
        self.finished = False  # an entry after `until` was met

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_some(self) -> bytes:
        """The next piece of output; b"" when there is no more for now."""
        if self.finished or not self._open():
            return b""
        assert self._ring is not None
        if self._number == 0:
            return self._begin(self._ring)
        output = bytearray()
        while len(output) < CHUNK_BYTES and not self.finished:
            entries, more = self._next_entries(self._ring)
            self._add(output, entries)
            if not more:
                break
        return bytes(output)

    def rest(self, *, run_ended: bool) -> bytes:
        """A last line without end, of a run that has no more to say (its end may not be marked: a power cut)."""
        output = bytearray()
        if run_ended:
            self._add(output, self._joiner.flush())
        return bytes(output)

    def _open(self) -> bool:
        if self._ring is None:
            opened = open_ring(self._path)
            if opened is None:
                return False
            self._fd, self._ring = opened
        return True

    def _begin(self, ring: Ring) -> bytes:
        """The backlog: all of it piece by piece, or its last entries at once."""
        tail = self._tail
        self._newest = ring.newest_number()
        if self._newest == 0:
            return b""
        if tail < 0:
            self._number = ring.oldest_number(self._newest)
            return self.read_some()
        self._number, self._seq = ring.start_of_tail(tail)
        last: deque[Entry] = deque(maxlen=tail)
        more = True
        while more:
            entries, more = self._next_entries(ring)
            last.extend(entries)
        output = bytearray()
        self._add(output, last)
        return bytes(output)

    def _next_entries(self, ring: Ring) -> tuple[list[Entry], bool]:
        """Those of one block, and whether there is another block behind it."""
        oldest = ring.oldest_number(self._newest)
        if self._number < oldest:  # the writer overtook us
            log.debug("log reader lost blocks path=%s count=%d", self._path, oldest - self._number)
            self._number = oldest
        # Looked up before the block is read: only a block that had a successor then is complete in what we read.
        if self._number >= self._newest:
            self._newest = ring.newest_after(self._newest)
        complete = self._number < self._newest
        entries: list[Entry] = []
        for record in ring.read_block(self._number, self._seq):
            self._seq = record.seq
            entries.extend(self._joiner.feed(record))
        self._number += complete
        return entries, complete

    def _add(self, output: bytearray, entries: Iterable[Entry]) -> None:
        """What of these the client wants, in its form."""
        since, until, streams = self._since, self._until, self._streams
        for stamp, stream, text in entries:
            # Times of one form, so that their bytes compare as they do.
            if since and stamp < since:
                continue
            if until and stamp > until:
                self.finished = True
                return
            if not streams[stream]:
                continue
            if self._details:
                text = self._details + text
            if self._timestamps:
                text = stamp[:29] + b"Z " + text
            output += text if self._tty else frame(stream, text)


def _stamp(time_ns: int) -> bytes:
    """A time as conmon writes it in UTC, which is what we run it in; b"" for none."""
    if not time_ns:
        return b""
    second, rest = divmod(time_ns, 10**9)
    return b"%s.%09d+00:00" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode(), rest)


def _details(container: Container) -> bytes:
    """What the log options `labels`, `env`, `env-regex` and `tag` name. Source: moby ExtraAttributes, jsonfilelog."""
    options = container.host_config.log_config.config or {}
    labels = container.config.labels or {}
    found = {name: labels[name] for name in options.get("labels", "").split(",") if name in labels}
    environment = dict(entry.partition("=")[::2] for entry in container.config.env or () if "=" in entry)
    found |= {name: environment[name] for name in options.get("env", "").split(",") if name in environment}
    if pattern := options.get("env-regex"):
        with contextlib.suppress(re.error):
            found |= {name: value for name, value in environment.items() if re.search(pattern, name)}
    if tag := _tag(container, ""):
        found["tag"] = tag
    return ",".join(f"{quote_plus(key)}={quote_plus(value)}" for key, value in sorted(found.items())).encode()


def _tag(container: Container, default: str) -> str:
    """The log option `tag` with its `{{.Field}}`s filled in; a field that nobody knows stays as it is."""
    template = (container.host_config.log_config.config or {}).get("tag") or default
    fields = {
        "ID": container.short_id,
        "FullID": container.id,
        "Name": container.name,
        "ImageID": container.image_id.rpartition(":")[2][:12],
        "ImageFullID": container.image_id,
        "ImageName": container.config.image,
        "DaemonName": "balena-engine",
    }
    return re.sub(r"\{\{\s*\.(\w+)\s*\}\}", lambda match: fields.get(match[1], match[0]), template)
