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
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import trio

import balenapy
from balenapy import errors
from balenapy.errors import EngineError, SystemFailure
from balenapy.linux.cgroups import Cgroups

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

Feed = Callable[[trio.abc.SendStream], Awaitable[None]]
Drain = Callable[[trio.abc.ReceiveStream], Awaitable[None]]
Progress = Callable[[int], None]

SORTS = ((False, False), (False, True), (True, False), (True, True))  # (is fed, is drained)
PIPE_BYTES = 1 << 20
PROGRESS = b"progress "  # begins the lines of a worker that tells how far it is
MAX_AT_ONCE = 2  # of each sort: each takes a core and tens of megabytes
MEMORY_SHARE = 4  # a worker may have a quarter of the machine's, within these bounds:
MEMORY_MIN_BYTES, MEMORY_MAX_BYTES = 128 << 20, 512 << 20
REPORT_MAX_BYTES = 16 << 20  # a report is a few hundred bytes; a list of changed paths may be long
STDERR_MAX_BYTES = 16 << 10  # the last words of a worker that crashed
REAP_TIMEOUT_S = 10  # a killed process may sit in one uninterruptible write; longer is worth a log line

KINDS: dict[str, type[EngineError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, EngineError)
}


class Workers:
    """Runs workers, at most two at once of each sort; others wait their turn.

    The sorts are told by the pipes a worker has. One that is fed runs as fast as its source, maybe a slow network,
    and one that is drained as fast as its reader: each sort has places of its own, so that a volume is never kept
    waiting by a download, nor a pull by a client that reads slowly, and a load never by itself (it feeds one worker
    what another decompresses).
    """

    def __init__(self, engine: Engine) -> None:
        at_once = min(MAX_AT_ONCE, os.cpu_count() or 1)
        self._places = {sort: trio.CapacityLimiter(at_once) for sort in SORTS}
        self._apart = trio.CapacityLimiter(1)
        self._python = python_command()
        self._memory = MemoryBound.find(engine.config.cgroup_parent)

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
        async with self._apart if apart else self._places[feed is not None, drain is not None]:
            return await self._run(verb, args, feed, drain, progress)

    async def _run(
        self,
        verb: str,
        args: Mapping[str, object],
        feed: Feed | None,
        drain: Drain | None,
        progress: Progress | None,
    ) -> dict[str, Any]:
        with self._memory.share() as environment:
            return await self._run_within(environment, [*self._python, verb], args, feed, drain, progress)

    async def _run_within(
        self,
        environment: Mapping[str, str],
        command: list[str],
        args: Mapping[str, object],
        feed: Feed | None,
        drain: Drain | None,
        progress: Progress | None,
    ) -> dict[str, Any]:
        worker = _Worker(command, args, environment, output=drain is not None, progress=progress)
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
    def find(cls, cgroup_parent: str) -> MemoryBound:
        """Read what the machine has."""
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = max(MEMORY_MIN_BYTES, min(MEMORY_MAX_BYTES, total // MEMORY_SHARE))
        hierarchy = Cgroups.read().controller_mount("memory")
        names = list(range(len(SORTS) * MAX_AT_ONCE + 1))
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


class _Worker:
    """One process, with its pipes."""

    def __init__(
        self,
        command: list[str],
        args: Mapping[str, object],
        environment: Mapping[str, str],
        *,
        output: bool,
        progress: Progress | None = None,
    ) -> None:
        self.verb = command[-1]
        self._progress = progress
        self._output: trio.lowlevel.FdStream | None = None
        pass_fds: tuple[int, ...] = ()
        if output:
            reading, writing = os.pipe()
            _widen(reading)
            self._output = trio.lowlevel.FdStream(reading)
            pass_fds = (writing,)
            args = {**args, "output": writing}
        try:
            # Not trio.open_process: it forks in a thread, and PR_SET_PDEATHSIG fires when that *thread* ends
            # (prctl(2)), which for Trio's threads is ten idle seconds later. CPython uses vfork here: 1-2 ms.
            self._process = subprocess.Popen(
                [*command, json.dumps(args)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=pass_fds,
                cwd="/",
                env={"PATH": os.defpath, "BALENAPY_PARENT": str(os.getpid()), **environment},
            )
        except OSError as error:
            raise SystemFailure(f"cannot start a worker: {error}") from error
        finally:
            for fd in pass_fds:
                os.close(fd)
        self.stdin = _FeedStream(_take(self._process.stdin))
        self._stdout = _take(self._process.stdout)
        self._stderr = _take(self._process.stderr)
        self._pidfd = os.pidfd_open(self._process.pid)
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
        if self._process.returncode is None:
            self._process.kill()
            with trio.move_on_after(REAP_TIMEOUT_S, shield=True) as scope:
                await trio.lowlevel.wait_readable(self._pidfd)
            if scope.cancelled_caught:
                log.error("worker does not die verb=%s pid=%d", self.verb, self._process.pid)
            else:
                self._process.wait()
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
        if isinstance(report, dict) and self._process.returncode == 0:
            return report
        code = self._process.returncode
        end = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        words = self._last_words.decode(errors="replace").strip()
        if words:
            log.error("worker failed verb=%s code=%d stderr=%s", self.verb, code, words)
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


def _take(pipe: IO[bytes] | None) -> trio.lowlevel.FdStream:
    """Take the descriptor out of a file object that `subprocess` made."""
    assert pipe is not None
    fd = os.dup(pipe.fileno())
    pipe.close()
    return trio.lowlevel.FdStream(fd)


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
