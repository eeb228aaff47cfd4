"""Processes: run a tool to its end, and follow a process that is not ours by pidfd.

A tool dies with us: cancelling kills and reaps it. Its input and its stderr go through memory files, so that one task
suffices and no pipe can fill up; its stdout comes through a pipe and is bounded.

A process that outlives us (conmon, an adopted container) is named by pid and start time: pids are used again,
the pair is not. `ProcessHandle.open` checks the pair after it has the pidfd, which then stays true.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import trio

from balenapy.errors import SystemFailure

STDOUT_MAX_BYTES = 4 << 20
STDERR_MAX_BYTES = 16 << 10  # the last words of a tool
REAP_TIMEOUT_S = 10  # a killed process may sit in one uninterruptible call

_SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TOOL_ENV: Mapping[str, str] = {"PATH": os.environ.get("PATH", "") + ":" + _SBIN, "LC_ALL": "C.UTF-8", "TZ": "UTC0"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a tool ended. `code` is negative for a signal, as in `subprocess`."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def last_words(self) -> str:
        """What the tool said on stderr, for an error message."""
        return self.stderr.decode(errors="replace").strip()


class Child:
    """A child process that does not outlive the `async with` block it is used in."""

    pids: ClassVar[set[int]] = set()  # of all that are not reaped yet

    def __init__(
        self,
        argv: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        env: Mapping[str, str] = TOOL_ENV,
        cwd: str | Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        # Not trio.open_process: it makes a thread for a vfork that holds the interpreter lock anyway (1-2 ms).
        try:
            self._process = subprocess.Popen(
                argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, pass_fds=pass_fds
            )
        except OSError as error:
            raise SystemFailure(f"cannot run {argv[0]}: {error.strerror}") from error
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self.pids.add(self.pid)

    async def wait(self) -> int:
        """Its exit code, negative for a signal."""
        if self._process.returncode is None:
            await trio.lowlevel.wait_readable(self._pidfd)
        return self._process.wait()

    async def __aenter__(self) -> Child:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            with trio.move_on_after(REAP_TIMEOUT_S, shield=True) as scope:
                await trio.lowlevel.wait_readable(self._pidfd)
            if not scope.cancelled_caught:
                self._process.wait()
        self.pids.discard(self.pid)
        os.close(self._pidfd)


async def run_tool(
    argv: Sequence[str],
    *,
    input: bytes = b"",
    env: Mapping[str, str] = TOOL_ENV,
    cwd: str | Path | None = None,
    pass_fds: Sequence[int] = (),
    check: bool = True,
    max_output_bytes: int = STDOUT_MAX_BYTES,
) -> Outcome:
    """Run a program that leaves nothing running behind, and return how it ended.

    Args:
        check: raise when the exit code is not 0.
        max_output_bytes: a tool that prints more is killed.

    Raises: SystemFailure: it cannot be run, prints too much, or (with `check`) failed; with its last words.
    Cancellation: the tool is killed and reaped; what it did so far stays done.
    """
    stdin = subprocess.DEVNULL
    errors = os.memfd_create("stderr", os.MFD_CLOEXEC)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        if input:
            stdin = memory_file("stdin", input)
        try:
            child = Child(argv, stdin=stdin, stdout=write_end, stderr=errors, env=env, cwd=cwd, pass_fds=pass_fds)
        finally:
            os.close(write_end)
            if stdin != subprocess.DEVNULL:
                os.close(stdin)
        async with child:
            stdout = bytearray()
            async with trio.lowlevel.FdStream(os.dup(read_end)) as stream:
                async for data in stream:
                    stdout += data
                    if len(stdout) > max_output_bytes:
                        raise SystemFailure(f"{argv[0]} printed more than {max_output_bytes} bytes")
            code = await child.wait()
        size = os.fstat(errors).st_size
        stderr = os.pread(errors, STDERR_MAX_BYTES, max(0, size - STDERR_MAX_BYTES))
    finally:
        os.close(read_end)
        os.close(errors)
    outcome = Outcome(code, bytes(stdout), stderr)
    if check and code != 0:
        end = f"was killed by signal {-code}" if code < 0 else f"exit status {code}"
        words = f": {outcome.last_words}" if outcome.last_words else ""
        raise SystemFailure(f"{Path(argv[0]).name}: {end}{words}")
    return outcome


def memory_file(name: str, data: bytes) -> int:
    """A descriptor from which `data` can be read, whatever its length."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None when there is no such process.

    Field 22 of /proc/PID/stat, proc(5); the name in field 2 may hold blanks and brackets.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])


class ProcessHandle:
    """A process that may not be our child: wait for its end and signal it without meeting a reused pid."""

    def __init__(self, pid: int, pidfd: int, started: int) -> None:
        self.pid = pid
        self.start_time = started
        self._pidfd = pidfd

    @classmethod
    def open(cls, pid: int, expected_start_time: int | None = None) -> ProcessHandle | None:
        """None when there is no such process, or another one has got its pid."""
        if pid <= 0:
            return None
        try:
            pidfd = os.pidfd_open(pid)
        except (ProcessLookupError, ValueError):
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:  # a thread of some other process has that number now
                return None
            raise
        started = start_time(pid)
        if started is None or (expected_start_time is not None and started != expected_start_time):
            os.close(pidfd)
            return None
        return cls(pid, pidfd, started)

    def fileno(self) -> int:
        return self._pidfd

    @property
    def ended(self) -> bool:
        """Whether it is gone or a zombie."""
        try:
            signal.pidfd_send_signal(self._pidfd, 0)
        except ProcessLookupError:
            return True
        state = _state(self.pid)
        return state in (None, "Z", "X")

    async def wait(self) -> None:
        """Return when it has ended. A process that is not our child may not be reaped yet."""
        await trio.lowlevel.wait_readable(self._pidfd)

    def send_signal(self, number: int) -> bool:
        """False when it is gone."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def reap(self) -> int | None:
        """Its exit code (128 + n for a signal) if it was our child and has ended; else None."""
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return None
        if result is None:
            return None
        if result.si_code == os.CLD_EXITED:
            return int(result.si_status)
        return 128 + int(result.si_status)

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __enter__(self) -> ProcessHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _state(pid: int) -> str | None:
    """The letter of /proc/PID/stat: R, S, D, Z...; None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return None


def command_line(pid: int) -> list[str]:
    """The arguments a process was started with; empty when it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [os.fsdecode(part) for part in file.read().split(b"\0")[:-1]]
    except (FileNotFoundError, ProcessLookupError):
        return []


def child_pids(pid: int) -> list[int]:
    """The children of a process; empty where the kernel does not list them (CONFIG_PROC_CHILDREN)."""
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += [int(word) for word in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def strays(program: str) -> list[ProcessHandle]:
    """Children that came to us because their parent ended without them, and that bear the name of a program.

    A runtime whose exec fails leaves such a one. Until it is reaped the first process of its pid namespace cannot end.
    """
    found = []
    for pid in child_pids(os.getpid()):
        if pid in Child.pids:
            continue
        try:
            with open(f"/proc/{pid}/comm", "rb") as file:
                name = os.fsdecode(file.read()).strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith(program) and (handle := ProcessHandle.open(pid)) is not None:
            found.append(handle)
    return found


def boot_id() -> str:
    """Differs after every boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
