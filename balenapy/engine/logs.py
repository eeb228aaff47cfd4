"""Container logs: conmon's output waits in memory (the spool) and is moved on in batches; `logs` reads it back.

With the default driver a batch goes into the container's ring file, when `log-flush-size` bytes wait, when
`log-flush-interval` has passed since the oldest of them, when somebody reads or follows, at the end of the run and of
the daemon; what went there is made durable within the same interval, so that is what a power cut may cost. A crash of
the daemon costs nothing: the spool is not ours. journald and syslog (engine/logsinks.py) get batches at once.

The watcher tells that conmon wrote, so a silent container wakes nobody. One task moves the batches of all containers,
each in turn and at most a spool's worth, so that one that floods does not cost the others theirs.

A container in blocking mode (the default) waits when too much waits for us: conmon is stopped until there is room, and
its pipe fills. In `mode=non-blocking` the oldest output is dropped instead, which the log tells.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote_plus

import trio

from balenapy.config import parse_size
from balenapy.core.logview import LogOptions, LogView
from balenapy.core.stdcopy import Stream, frame
from balenapy.errors import Conflict, DataLoss, EngineError, InvalidParameter, SystemFailure, Unsupported
from balenapy.linux.conmon import Bundle
from balenapy.linux.process import ProcessHandle
from balenapy.stores.ringfile import (
    DEFAULT_SIZE_BYTES,
    FILE_NAME,
    MAX_SIZE_BYTES,
    MIN_SIZE_BYTES,
    SpoolDrain,
    open_ring,
)

if TYPE_CHECKING:
    from balenapy.core.container import Container
    from balenapy.engine.engine import Engine
    from balenapy.engine.logsinks import SinkDrain

log = logging.getLogger(__name__)

FLOOD_S = 0.02  # how soon a spool that was urgent is looked at again: conmon fills it at up to 100 MB/s
STOP_SHARE = 2  # half a spool waits: conmon is stopped, in blocking mode
RESUME_SHARE = 16
KEEP_BYTES = 4 << 20  # the least that non-blocking mode keeps: what may come between two looks
BUFFER_BYTES = 1 << 20  # moby defaultBufferSize
SINK_END_S = 5.0  # how long the end of a run waits for a driver that does not take its last lines
RING_DRIVERS = ("", "json-file", "local")
SINK_DRIVERS = ("journald", "syslog")

Write = Callable[[bytes], Awaitable[None]]


def ring_size(options: Mapping[str, str]) -> int:
    """`max-size` times `max-file` of the log options, within bounds.

    Raises: InvalidParameter. Source: moby daemon/logger/jsonfilelog.
    """
    try:
        files = int(options.get("max-file", "1"))
    except ValueError as error:
        raise InvalidParameter(f'strconv.Atoi: parsing "{options["max-file"]}": invalid syntax') from error
    if files < 1:
        raise InvalidParameter("max-file cannot be less than 1")
    given = options.get("max-size", "-1")
    if given == "-1":
        return DEFAULT_SIZE_BYTES  # without a size the number of files says nothing
    return min(max(_size_option(given) * files, 1), MAX_SIZE_BYTES)


def keep_bytes(options: Mapping[str, str]) -> int:
    """How much may wait in non-blocking mode; 0 in blocking mode. Raises: InvalidParameter."""
    if options.get("mode") != "non-blocking":
        return 0
    return max(KEEP_BYTES, _size_option(options.get("max-buffer-size", str(BUFFER_BYTES))))


def is_compressed(options: Mapping[str, str]) -> bool:
    """Raises: InvalidParameter."""
    given = options.get("compress", "false")
    if given in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if given in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise InvalidParameter(f'strconv.ParseBool: parsing "{given}": invalid syntax')


def _size_option(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise InvalidParameter(str(error)) from error


class _RunningLog:
    """The log of one run: a drain and who waits for it."""

    def __init__(
        self,
        container: Container,
        drain: SpoolDrain | SinkDrain,
        conmon: ProcessHandle | None,
        spool_bytes: int,
    ) -> None:
        """
        Args:
            conmon: is stopped when too much waits; None: it is not.
            spool_bytes: at which conmon begins a new spool.
        """
        self.container = container
        self.drain = drain
        self.lock = trio.Lock()
        self.news = trio.Event()  # set and replaced when something was taken over
        self.wake = trio.Event()  # and these two of a sink's task: there is something to do
        self.scope = trio.CancelScope()
        self.followers = 0
        self.ended = False
        self.urgent = False
        self.since = inf  # trio time of the oldest output that is not durable
        self._conmon = conmon
        self._spool_bytes = spool_bytes
        self._stopped = False

    def look(self) -> int:
        """How much waits; conmon is stopped when that is too much, and goes on when it is little."""
        waiting = self.drain.look()
        too_much = waiting > self._spool_bytes // (RESUME_SHARE if self._stopped else STOP_SHARE)
        if self._conmon is not None and self._stopped is not too_much:
            self._stopped = too_much
            log.debug("conmon stopped=%s container=%s waiting=%d", self._stopped, self.container.short_id, waiting)
            self._conmon.send_signal(signal.SIGSTOP if self._stopped else signal.SIGCONT)
        return waiting

    def let_go(self) -> None:
        """Whatever happens to the log, conmon is not left stopped."""
        if self._stopped and self._conmon is not None:
            self._conmon.send_signal(signal.SIGCONT)
        self._stopped, self._conmon = False, None

    def tell(self) -> None:
        self.news.set()
        self.news = trio.Event()


class Logs:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[str, _RunningLog] = {}
        self._sinks: dict[str, SinkDrain] = {}  # of starts under way
        self._sent: dict[str, object] = {}  # by container: the sink of its last run, which knows how much it was given
        self._pending: dict[_RunningLog, None] = {}  # output that waits, or is not durable yet
        self._wake = trio.Event()
        self._urgent = trio.Event()
        self._granting = threading.Lock()

    # -- the life of a run; called by the supervisor --

    async def prepare_run(self, container: Container, bundle: Bundle) -> list[str]:
        """Make the driver ready; returns how conmon is to log.

        Raises: SystemFailure, when the driver cannot be had: found only now, as in moby.
        """
        driver = container.host_config.log_config.type
        options = container.host_config.log_config.config or {}
        if driver == "none":
            return ["--log-path", "none"]
        try:
            keep_bytes(options)
            if driver in RING_DRIVERS:
                ring_size(options)
                is_compressed(options)
            elif driver in SINK_DRIVERS:
                self._sinks[container.id] = await self._open_sink(container, bundle)
            else:
                raise InvalidParameter(f"logger: no log driver named '{driver}' is registered")
        except EngineError as error:
            raise SystemFailure(f"failed to initialize logging driver: {error.message}") from error
        return ["--log-path", "k8s-file:log", "--log-size-max", str(self._spool_bytes)]

    async def _open_sink(self, container: Container, bundle: Bundle) -> SinkDrain:
        from balenapy.engine import logsinks  # costs memory only where it is used

        options = container.host_config.log_config.config or {}
        tag = log_tag(container, "{{.ID}}")
        return await logsinks.open_drain(container, bundle, tag, extra(container), keep_bytes(options))

    async def begin_run(
        self, container: Container, bundle: Bundle, conmon: ProcessHandle | None, *, adopt: bool = False
    ) -> None:
        """Begin to take over what conmon writes. Before the container's process starts, or after an adoption."""
        driver = container.host_config.log_config.type
        options = container.host_config.log_config.config or {}
        if adopt and conmon is not None:
            conmon.send_signal(signal.SIGCONT)  # the engine before us may have stopped it
        drain: SpoolDrain | SinkDrain
        if driver in RING_DRIVERS:
            drain = SpoolDrain(
                bundle.spool,
                self.path(container),
                ring_size(options),
                adopt=adopt,
                compressed=is_compressed(options),
                keep_bytes=keep_bytes(options),
                grant=self._grant,
            )
        elif driver in SINK_DRIVERS:
            found = self._sinks.pop(container.id, None)
            if found is None:
                try:
                    found = await self._open_sink(container, bundle)
                except EngineError as error:  # it runs already: its output waits
                    log.error("log driver cannot be had container=%s error=%s", container.short_id, error.message)
                    return
            drain = found
        else:
            return
        drain.look()  # conmon may replace the spool at any time from now on
        if options.get("mode") == "non-blocking":
            conmon = None
        running = self._running[container.id] = _RunningLog(container, drain, conmon, self._spool_bytes)
        if not isinstance(drain, SpoolDrain):
            # A task of its own: who takes nothing holds nobody else up.
            self._engine.nursery.start_soon(self._serve_sink, running, name=f"log driver of {container.short_id}")

    def changed(self, container_id: str) -> None:
        """The watcher saw that conmon wrote."""
        running = self._running.get(container_id)
        if running is None:
            return
        waiting = running.look()
        if not isinstance(running.drain, SpoolDrain):
            running.wake.set()
            return
        self._mark(running)
        if running.followers or waiting > self._engine.config.log_flush_size:
            running.urgent = True
            self._urgent.set()

    async def _serve_sink(self, running: _RunningLog) -> None:
        with running.scope:
            while True:
                running.wake = trio.Event()
                try:
                    while await self._drain(running):
                        pass
                except Exception:  # the wall around one container
                    log.exception("log driver failed container=%s", running.container.short_id)
                await running.wake.wait()

    def _mark(self, running: _RunningLog) -> None:
        running.since = min(running.since, trio.current_time())
        self._pending[running] = None
        self._wake.set()

    async def end_run(self, container: Container) -> None:
        """Take over the rest; followers end when they have read it. Idempotent."""
        if (sink := self._sinks.pop(container.id, None)) is not None:
            sink.close()
        running = self._running.get(container.id)
        if running is None:
            return
        drain, limiter = running.drain, self._engine.limiters.files
        running.scope.cancel()
        async with running.lock:
            if running.ended:
                return
            if not isinstance(drain, SpoolDrain):
                with trio.move_on_after(SINK_END_S) as scope:
                    await drain.end_run()
                if scope.cancelled_caught:
                    log.error("log driver did not take the last lines container=%s", container.short_id)
                self._sent[container.id] = drain.sink
            elif not drain.is_idle:
                await trio.to_thread.run_sync(drain.end_run, limiter=limiter)
            running.let_go()
            running.ended = True
            self._running.pop(container.id, None)
            if isinstance(drain, SpoolDrain) and drain.needs_sync:
                self._mark(running)  # closed when it is durable; another run opens it anew
            else:
                drain.close()
                self._pending.pop(running, None)
        running.news.set()

    async def serve(self) -> None:
        """Move on what the watcher tells of, until cancelled."""
        while True:
            await self._wake.wait()
            due_s = min((running.since for running in self._pending), default=inf) + self._interval_s
            with trio.move_on_at(due_s):
                await self._urgent.wait()
            self._urgent = trio.Event()
            flooded = False
            for running in list(self._pending):
                try:
                    flooded |= await self._move_on(running)
                except Exception:
                    log.exception("log cannot be drained container=%s", running.container.short_id)
                    self._pending.pop(running, None)
            if not self._pending:
                self._wake = trio.Event()
            if flooded:
                await trio.sleep(FLOOD_S)
                self._urgent.set()

    @property
    def _spool_bytes(self) -> int:
        return self._engine.limits.spool_bytes

    @property
    def _interval_s(self) -> float:
        return self._engine.config.log_flush_interval_s

    async def _move_on(self, running: _RunningLog) -> bool:
        """Drain and sync one log if it is time to; returns whether more is surely there already."""
        due = running.since + self._interval_s <= trio.current_time()
        if not due and not running.urgent:
            return False
        running.urgent = False
        since = trio.current_time()
        flooded = False
        if not running.ended:
            flooded = await self._drain(running) >= self._engine.config.log_flush_size
            running.urgent = flooded
        if due:
            await self._make_durable(running)
            running.since = since if flooded else inf
            if running.ended:
                running.drain.close()
        if running.since == inf:
            self._pending.pop(running, None)
            if not running.ended and running.drain.look():  # came while we were at it
                self._mark(running)
        return flooded

    async def _make_durable(self, running: _RunningLog) -> None:
        if isinstance(running.drain, SpoolDrain) and running.drain.needs_sync:
            async with running.lock:
                await trio.to_thread.run_sync(running.drain.sync, limiter=self._engine.limiters.files)

    async def flush(self) -> None:
        """Take over everything, and make it durable: before the daemon ends."""
        for running in {**self._pending, **dict.fromkeys(self._running.values())}:
            try:
                if not running.ended:
                    await self._drain(running)
                await self._make_durable(running)
            except EngineError as error:
                log.error("log cannot be flushed container=%s error=%s", running.container.short_id, error.message)

    async def forget(self, container: Container) -> None:
        """It is removed: what is not durable yet need not be."""
        self._sent.pop(container.id, None)
        for running in [one for one in self._pending if one.container.id == container.id and one.ended]:
            async with running.lock:
                self._pending.pop(running, None)
                running.drain.close()

    def close(self) -> None:
        """Let go of every file, as the end of the process does."""
        for running in {**self._pending, **dict.fromkeys(self._running.values())}:
            running.let_go()
            running.drain.close()
        self._pending.clear()
        self._running.clear()

    async def _drain(self, running: _RunningLog) -> int:
        """Take over what is there now, at most a spool full, so that others get their turn; returns its bytes."""
        taken = 0
        drain = running.drain
        async with running.lock:
            while not running.ended and taken < self._spool_bytes:
                if isinstance(drain, SpoolDrain):
                    count = await trio.to_thread.run_sync(drain.drain_some, limiter=self._engine.limiters.files)
                else:
                    count = await drain.drain_some()
                if not count:
                    break
                taken += count
                running.look()
        if taken:
            running.tell()
        return taken

    def path(self, container: Container) -> Path:
        """The ring file; it is made with the first output."""
        return self._engine.config.data_root / "containers" / container.id / FILE_NAME

    def _grant(self, wanted: int) -> int:
        """How large a ring that is to be made may be, within the budget of all. Blocks."""
        budget = self._engine.config.log_budget
        if not budget:
            return wanted
        with self._granting:
            granted = max(MIN_SIZE_BYTES, min(wanted, budget - self.total_bytes()))
        if granted < wanted:
            log.warning("log-budget is used up: a log gets bytes=%d instead of %d", granted, wanted)
        return granted

    def total_bytes(self) -> int:
        """What all rings take. Blocks."""
        total = 0
        for path in (self._engine.config.data_root / "containers").glob(f"*/{FILE_NAME}"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    # -- what is shown of ourselves --

    def waiting_bytes(self) -> int:
        """Output in memory that is not taken over yet."""
        return sum(running.drain.look() for running in self._running.values())

    def lost_bytes(self) -> int:
        """Output of the present runs that was dropped."""
        return sum(running.drain.lost_bytes for running in self._running.values())

    # -- reading --

    def check_readable(self, container: Container) -> None:
        """Raises: Unsupported, Conflict."""
        if container.host_config.log_config.type not in (*RING_DRIVERS, "journald"):
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
            if container.host_config.log_config.type == "journald":
                from balenapy.engine import logsinks

                given = self._sent.get(container.id)
                await logsinks.read_journal(container, options, extra_text(container), running, given, write)
            else:
                await self._read_ring(container, options, running, write)
        except (DataLoss, SystemFailure) as error:
            await write(frame(Stream.SYSTEM, f"Error grabbing logs: {error.message}\n".encode()))
        finally:
            if running is not None:
                running.followers -= options.follow

    async def _read_ring(
        self, container: Container, options: LogOptions, running: _RunningLog | None, write: Write
    ) -> None:
        limiter = self._engine.limiters.files
        reader = RingReader(self.path(container), container, options)
        try:
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
        finally:
            reader.close()


class RingReader:
    """A container's ring file, opened when there is one. Blocks; for a thread."""

    def __init__(self, path: Path, container: Container, options: LogOptions) -> None:
        self._path = path
        details = extra_text(container) if options.details else b""
        self._make = partial(LogView, options=options, tty=container.config.tty, details=details)
        self._fd = -1
        self._view: LogView | None = None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def finished(self) -> bool:
        return self._view is not None and self._view.finished

    def read_some(self) -> bytes:
        """The next piece of output; b"" when there is no more for now."""
        if self._view is None:
            opened = open_ring(self._path)
            if opened is None:
                return b""
            self._fd = opened[0]
            self._view = self._make(opened[1])
        return self._view.read_some()

    def rest(self, *, run_ended: bool) -> bytes:
        return self._view.rest(run_ended=run_ended) if self._view is not None else b""


def extra(container: Container) -> dict[str, str]:
    """What the log options `labels`, `env` and `env-regex` name. Source: moby daemon/logger ExtraAttributes."""
    options = container.host_config.log_config.config or {}
    labels = container.config.labels or {}
    found = {name: labels[name] for name in options.get("labels", "").split(",") if name in labels}
    environment = dict(entry.partition("=")[::2] for entry in container.config.env or () if "=" in entry)
    found |= {name: environment[name] for name in options.get("env", "").split(",") if name in environment}
    if pattern := options.get("env-regex"):
        with contextlib.suppress(re.error):
            found |= {name: value for name, value in environment.items() if re.search(pattern, name)}
    return found


def extra_text(container: Container) -> bytes:
    """The same with the tag, as `logs --details` shows it. Source: moby jsonfilelog."""
    found = extra(container)
    if tag := log_tag(container, ""):
        found["tag"] = tag
    return ",".join(f"{quote_plus(key)}={quote_plus(value)}" for key, value in sorted(found.items())).encode()


def log_tag(container: Container, default: str) -> str:
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
