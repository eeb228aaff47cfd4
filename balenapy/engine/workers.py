"""Worker processes: start one, feed it, bound it, read its report.

A worker is `python -m balenapy.worker VERB '<json arguments>'`: data on stdin, one JSON report on stdout,
then it ends. It never outlives us: cancelling `run` kills and reaps it, and the kernel kills it when the daemon dies
(PR_SET_PDEATHSIG, set by the worker). What it wrote so far is the caller's to throw away.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

import balenapy
from balenapy.core.membudget import WORKERS_MAX
from balenapy.errors import KINDS, SystemFailure
from balenapy.linux.cgroups import Cgroups
from balenapy.linux.process import memory_file

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

Feed = Callable[[trio.abc.SendStream], Awaitable[None]]
Drain = Callable[[trio.abc.ReceiveStream], Awaitable[None]]
Progress = Callable[[int], None]

SORTS = ((False, False), (False, True), (True, False), (True, True))  # (is fed, is drained)
PIPE_BYTES = 1 << 20
PROGRESS = b"progress "  # begins the lines of a worker that tells how far it is
REPORT_MAX_BYTES = 16 << 20  # a report is a few hundred bytes; a list of changed paths may be long
STDERR_MAX_BYTES = 16 << 10  # the last words of a worker that crashed
REAP_TIMEOUT_S = 10  # a killed process may sit in one uninterruptible write; longer is worth a log line


class Workers:
    """Runs workers, at most two at once of each sort; others wait their turn.

    The sorts are told by the pipes a worker has. One that is fed runs as fast as its source, maybe a slow network,
    and one that is drained as fast as its reader: each sort has places of its own, so that a volume is never kept
    waiting by a download, nor a pull by a client that reads slowly, and a load never by itself (it feeds one worker
    what another decompresses).
    """

    def __init__(self, engine: Engine) -> None:
        at_once = engine.limits.workers
        self._places = {sort: trio.CapacityLimiter(at_once) for sort in SORTS}
        self._apart = trio.CapacityLimiter(1)
        self._python = python_command()
        self.running = 0  # those that wait for their turn included
        self._memory = MemoryBound.find(engine.config.cgroup_parent, engine.limits.worker_bytes)

    async def run(
        self,
        verb: str,
        args: Mapping[str, object],
        *,
        feed: Feed | None = None,
        drain: Drain | None = None,
        progress: Progress | None = None,
        apart: bool = False,
    ) -> dict[str, Any]:
        """Run one verb to its end and return its report.

        Args:
            feed: writes the worker's stdin and may close it; it is closed when `feed` returns. If the worker
                ends first, `feed` is cancelled. An error that `feed` raises kills the worker and is raised here.
            drain: reads what the worker puts out, to its end; the worker finds the descriptor in its argument
                `output`. Errors as for `feed`.
            progress: called with how far the worker is, for verbs that tell.
            apart: it may take hours (a scrub): nobody waits for its place, and only its like wait with it.

        Raises: EngineError of the kind the worker reported; SystemFailure when it died without a report.
        Cancellation: the worker is killed and reaped; what it wrote stays where its arguments pointed.
        """
        self.running += 1
        try:
            return await self._run_in_turn(verb, args, feed, drain, progress, apart=apart)
        finally:
            self.running -= 1

    async def _run_in_turn(
        self,
        verb: str,
        args: Mapping[str, object],
        feed: Feed | None,
        drain: Drain | None,
        progress: Progress | None,
        *,
        apart: bool,
    ) -> dict[str, Any]:
        async with self._apart if apart else self._places[feed is not None, drain is not None]:
            return await self.run_by(self._start, verb, args, feed=feed, drain=drain, progress=progress)

    @asynccontextmanager
    async def family(self) -> AsyncIterator[WorkerFamily]:
        """Several workers one after the other, for which Python starts only once."""
        family = WorkerFamily(self, self._python)
        try:
            yield family
        finally:
            await family.end()

    @asynccontextmanager
    async def place(self, *, fed: bool, drained: bool) -> AsyncIterator[None]:
        """A place among the workers of that sort."""
        async with self._places[fed, drained]:
            yield

    async def _start(
        self, verb: str, args: Mapping[str, object], environment: Mapping[str, str], pipes: _Pipes
    ) -> _Process:
        return _Started([*self._python, verb], args, environment, pipes)

    async def run_by(
        self,
        start: Start,
        verb: str,
        args: Mapping[str, object],
        *,
        feed: Feed | None,
        drain: Drain | None,
        progress: Progress | None,
    ) -> dict[str, Any]:
        """`run`, by a process that `start` makes; the caller has a place for it."""
        with self._memory.share() as environment, _Pipes(output=drain is not None) as pipes:
            process = await start(verb, args, environment, pipes)
            return await self._run_process(_Worker(verb, process, pipes, progress), feed, drain)

    async def _run_process(self, worker: _Worker, feed: Feed | None, drain: Drain | None) -> dict[str, Any]:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.read_report)
                nursery.start_soon(worker.read_stderr)
                if feed is None:
                    await worker.stdin.aclose()
                else:
                    nursery.start_soon(worker.run_feed, feed)
                if drain is not None:
                    nursery.start_soon(worker.run_drain, drain)
                await worker.wait()
        finally:
            await worker.kill_and_reap()
        return worker.result()


@dataclass(slots=True)
class MemoryBound:
    """How much memory a worker may take, and the cgroups in which that includes the files it writes.

    A worker makes its cgroup and joins it (worker/process), which is off our event loop; we remove it. The names are
    few and always the same, so the next daemon can remove those that a killed one left behind.
    """

    limit_bytes: int
    parent: Path | None  # where cgroups are made; None: there is no memory controller
    limit_file: str
    _free: list[int]
    _worked: bool | None = None  # whether a worker ever got its cgroup

    @classmethod
    def find(cls, cgroup_parent: str, limit: int) -> MemoryBound:
        """Read what the machine has."""
        hierarchy = Cgroups.read().controller_mount("memory")
        names = list(range(len(SORTS) * WORKERS_MAX + 1))
        if hierarchy is None:
            return cls(limit, None, "", names)
        parent = hierarchy.mount / cgroup_parent.strip("/")
        for number in names:
            try:
                _cgroup(parent, number).rmdir()
            except OSError:
                continue  # none, or of another daemon
        return cls(limit, parent, "memory.limit_in_bytes" if hierarchy.version == 1 else "memory.max", names)

    @contextmanager
    def share(self) -> Iterator[dict[str, str]]:
        """The environment that tells one worker its bounds; its cgroup is removed in the end."""
        environment = {"BALENAPY_MEMORY": str(self.limit_bytes * 3 // 4)}  # so that it fails before the kernel kills
        if self.parent is None:
            yield environment
            self._note(False)
            return
        number = self._free.pop(0)
        directory = _cgroup(self.parent, number)
        environment["BALENAPY_CGROUP"] = str(directory)
        environment["BALENAPY_CGROUP_LIMIT"] = f"{self.limit_file}={self.limit_bytes}"
        try:
            yield environment
        finally:
            self._free.append(number)
            try:
                directory.rmdir()
            except FileNotFoundError:
                self._note(False)
            except OSError as error:
                log.debug("worker's cgroup stays path=%s error=%s", directory, error)
            else:
                self._note(True)

    def _note(self, worked: bool) -> None:
        if self._worked is None and not worked:
            log.info("workers have no memory cgroup: the page cache of what they write is not bounded")
        self._worked = self._worked or worked


def _cgroup(parent: Path, number: int) -> Path:
    return parent / f"balenapy-worker-{number}"


class _Pipes:
    """The pipes of a process that is about to start: its ends are closed when it has them, ours belong to `_Worker`."""

    def __init__(self, *, output: bool) -> None:
        self.theirs: list[int] = []  # stdin, stdout, stderr[, output]
        self.ours: list[int] = []
        for number in range(4 if output else 3):
            reading, writing = os.pipe()
            self.theirs.append(writing if number else reading)
            self.ours.append(reading if number else writing)
        if output:
            _widen(self.ours[3])

    def __enter__(self) -> _Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_theirs()
        while self.ours:
            os.close(self.ours.pop())

    def close_theirs(self) -> None:
        while self.theirs:
            os.close(self.theirs.pop())

    def take_ours(self) -> list[trio.lowlevel.FdStream]:
        streams = [trio.lowlevel.FdStream(fd) for fd in self.ours]
        self.ours.clear()
        return streams


class _Started:
    """A worker with a Python of its own."""

    def __init__(
        self, command: list[str], args: Mapping[str, object], environment: Mapping[str, str], pipes: _Pipes
    ) -> None:
        stdin, stdout, stderr, *rest = pipes.theirs
        if rest:
            args = {**args, "output": rest[0]}
        try:
            # Not trio.open_process: it forks in a thread, and PR_SET_PDEATHSIG fires when that *thread* ends
            # (prctl(2)), which for Trio's threads is ten idle seconds later. CPython uses vfork here: 1-2 ms.
            self._process = subprocess.Popen(
                [*command, json.dumps(args)],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=rest,
                cwd="/",
                env={"PATH": os.defpath, "BALENAPY_PARENT": str(os.getpid()), **environment},
            )
        except OSError as error:
            raise SystemFailure(f"cannot start a worker: {error}") from error
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def kill(self) -> None:
        self._process.kill()

    def reap(self) -> int | None:
        """Its exit code, negative for a signal. It has ended."""
        return self._process.wait()


class _Forked:
    """A worker that was forked by a parent of its own, which reaps it: how it ended is not known here."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self) -> int | None:
        return None


_Process = _Started | _Forked
Start = Callable[[str, Mapping[str, object], Mapping[str, str], "_Pipes"], Awaitable[_Process]]


class WorkerFamily:
    """Workers forked by one process that has imported what they need; see worker/parent. It starts with the first.

    A Python takes 50 to 150 ms to start, a fork three.
    """

    def __init__(self, workers: Workers, python: list[str]) -> None:
        self._workers = workers
        self._command = python
        self._lock = trio.Lock()
        self._parent: subprocess.Popen[bytes] | None = None
        self._socket: trio.socket.SocketType | None = None

    def start(self) -> None:
        """Start the parent, if it does not run; it gets ready while others work. Raises: SystemFailure."""
        if self._parent is not None:
            return
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            try:
                self._parent = subprocess.Popen(
                    [*self._command, "parent", str(there.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[there.fileno()],
                    cwd="/",
                    env={"PATH": os.defpath, "BALENAPY_PARENT": str(os.getpid())},
                )
            except OSError as error:
                here.close()
                raise SystemFailure(f"cannot start a worker: {error}") from error
        self._socket = trio.socket.from_stdlib_socket(here)

    async def run(
        self,
        verb: str,
        args: Mapping[str, object],
        *,
        feed: Feed | None = None,
        drain: Drain | None = None,
    ) -> dict[str, Any]:
        """As `Workers.run`, in a place there."""
        self.start()
        async with self._workers.place(fed=feed is not None, drained=drain is not None):
            return await self._workers.run_by(self._fork, verb, args, feed=feed, drain=drain, progress=None)

    async def _fork(
        self, verb: str, args: Mapping[str, object], environment: Mapping[str, str], pipes: _Pipes
    ) -> _Process:
        assert self._socket is not None
        data = json.dumps({"verb": verb, "arguments": args, "environment": dict(environment)}).encode()
        # Between question and answer nobody is cancelled: the answer would come to the next.
        with trio.CancelScope(shield=True):
            async with self._lock:
                request = memory_file("request", data)
                try:
                    return await self._ask([request, *pipes.theirs])
                except OSError as error:
                    raise SystemFailure(f"cannot start a worker: {error}") from error
                finally:
                    os.close(request)
        raise AssertionError("the scope swallows nothing")

    async def _ask(self, fds: list[int]) -> _Forked:
        assert self._socket is not None
        rights = array("i", fds)
        await self._socket.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        data, ancillary, _, _ = await self._socket.recvmsg(32, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
        if not data or not ancillary:
            raise SystemFailure("worker parent has ended")
        received = array("i")
        received.frombytes(ancillary[0][2][:4])
        return _Forked(int(data), received[0])

    async def end(self) -> None:
        """End the parent. It reaps what it forked, all of which has ended, and leaves."""
        if self._parent is None or self._socket is None:
            return
        self._socket.close()
        pidfd = os.pidfd_open(self._parent.pid)
        try:
            with trio.move_on_after(REAP_TIMEOUT_S, shield=True) as scope:
                await trio.lowlevel.wait_readable(pidfd)
            if scope.cancelled_caught:
                log.error("parent of workers does not end pid=%d", self._parent.pid)
                self._parent.kill()
            self._parent.wait()
        finally:
            os.close(pidfd)


class _Worker:
    """One process, with its pipes."""

    def __init__(self, verb: str, process: _Process, pipes: _Pipes, progress: Progress | None = None) -> None:
        self.verb = verb
        self._progress = progress
        self._process = process
        self._code: int | None = None
        pipes.close_theirs()
        stdin, self._stdout, self._stderr, *rest = pipes.take_ours()
        self.stdin = _FeedStream(stdin)
        self._output: trio.lowlevel.FdStream | None = rest[0] if rest else None
        self._pidfd = process.pidfd
        self._feed_scope = trio.CancelScope()
        self._our_error: Exception | None = None  # of feed or drain: the first
        self._report = bytearray()
        self._last_words = bytearray()

    async def run_feed(self, feed: Feed) -> None:
        """Let `feed` write."""
        with self._feed_scope:
            await self._guard(feed, self.stdin)
        with trio.CancelScope(shield=True):
            await self.stdin.aclose()

    async def run_drain(self, drain: Drain) -> None:
        """Let `drain` read; when it stops before the end, so does the worker."""
        assert self._output is not None
        await self._guard(drain, self._output)
        with trio.CancelScope(shield=True):
            await self._output.aclose()

    async def _guard(self, work: Callable[[Any], Awaitable[None]], stream: object) -> None:
        """Keep what `work` raises, so that the nursery does not wrap it in a group."""
        try:
            await work(stream)
        except Exception as error:
            self._our_error = self._our_error or error
            self._process.kill()

    async def read_report(self) -> None:
        async for data in self._stdout:
            self._report += data
            self._take_progress()
            if len(self._report) > REPORT_MAX_BYTES:
                self._process.kill()
                return

    def _take_progress(self) -> None:
        """Lines before the report say how far the worker is."""
        while self._report.startswith(PROGRESS) and (end := self._report.find(b"\n")) > 0:
            if self._progress is not None:
                self._progress(int(self._report[len(PROGRESS) : end]))
            del self._report[: end + 1]

    async def read_stderr(self) -> None:
        async for data in self._stderr:
            self._last_words += data
            del self._last_words[:-STDERR_MAX_BYTES]

    async def wait(self) -> None:
        """Return when the process has ended; a feed that still wants to write is ended too."""
        await trio.lowlevel.wait_readable(self._pidfd)
        self._feed_scope.cancel()

    async def kill_and_reap(self) -> None:
        self._process.kill()  # does nothing to one that has ended
        with trio.move_on_after(REAP_TIMEOUT_S, shield=True) as scope:
            await trio.lowlevel.wait_readable(self._pidfd)
        if scope.cancelled_caught:
            log.error("worker does not die verb=%s pid=%d", self.verb, self._process.pid)
        else:
            self._code = self._process.reap()
        os.close(self._pidfd)
        with trio.CancelScope(shield=True):
            for stream in (self.stdin, self._stdout, self._stderr, self._output):
                if stream is not None:
                    await trio.aclose_forcefully(stream)

    def result(self) -> dict[str, Any]:
        """The report, or the error it tells of.

        A worker that reported an error is believed before its feed: a full disk ends both, and it names the cause.
        """
        report: object = None
        try:
            report = json.loads(self._report)
        except ValueError:
            pass
        if isinstance(report, dict) and isinstance(error := report.get("error"), dict):
            kind = KINDS.get(str(error.get("kind")), SystemFailure)
            raise kind(str(error.get("message", "")))
        if self._our_error is not None:
            raise self._our_error
        if isinstance(report, dict) and self._code in (0, None):
            return report
        code = self._code
        if code is None:
            end = "ended without a report"
        else:
            end = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        words = self._last_words.decode(errors="replace").strip()
        if words:
            log.error("worker failed verb=%s code=%s stderr=%s", self.verb, code, words)
        last_line = words.rpartition("\n")[2]
        raise SystemFailure(f"worker {self.verb} {end}" + (f": {last_line}" if last_line else ""))


class _FeedStream(trio.abc.SendStream):
    """The worker's stdin. When the worker no longer reads, writing waits to be cancelled.

    The worker has ended or is about to: `wait` sees that, cancels the feed, and the report says why it ended.
    So a feed never has to tell its own broken connection from ours.
    """

    def __init__(self, stream: trio.lowlevel.FdStream) -> None:
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError:
            await trio.sleep_forever()

    async def wait_send_all_might_not_block(self) -> None:
        try:
            await self._stream.wait_send_all_might_not_block()
        except trio.BrokenResourceError:
            await trio.sleep_forever()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _widen(pipe: int) -> None:
    """Fewer turns of the event loop for each megabyte that goes through."""
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:  # the user's share of pipe memory is used up
        pass


def python_command() -> list[str]:
    """The command line up to the verb.

    Without `site` (-S) the interpreter starts in a third of the time; the directories it would have found are
    named instead.
    """
    directories = [str(Path(balenapy.__file__).parent.parent)]
    for package in ("zstandard", "bsdiff4"):  # found, not imported
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            directories.append(str(Path(spec.origin).parent.parent))
    directories = list(dict.fromkeys(directories))
    start = f"import sys; sys.path += {directories!r}; from balenapy.worker.__main__ import main; main()"
    return [sys.executable, "-I", "-S", "-c", start]
