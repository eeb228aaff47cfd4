"""conmon: the small process that holds a container's stdio, its log and its exit code, and outlives us.

conmon (2.1.6 here) forks twice, listens on `attach`, opens the `ctl` fifo, runs `runtime create`, and then says on the
sync pipe, as one JSON line, either `{"data": PID}` or `{"data": -1, "message": "stderr of the runtime"}`. It ends
after the container's first process, having written what was left of the output and the exit code. What
we rely on (sources of conmon 2.1: conn_sock.c, ctr_stdio.c, ctr_logging.c, ctrl.c; each is tested):

- `attach` is a SOCK_SEQPACKET socket. From conmon: one byte (2 stdout, 3 stderr) and at most 8 KiB. To conmon: bytes
  of stdin, at most 32 KiB a message. conmon writes with a blocking send, so whoever connects must read.
  It exists before the runtime runs: connect between `create` and the runtime's `start` and nothing is missed.
- When a client closes or shuts down its side, conmon closes the container's stdin, unless --leave-stdin-open.
- The log is k8s-file lines (core/conmonlog.py). At --log-size-max conmon begins a new file and renames it over the
  old one; a reader that holds the old one open loses nothing of it.
- An OOM in the container's memory cgroup makes an empty file `oom` in conmon's directory.

conmon runs in the bundle directory and gets relative paths wherever it takes a path apart or puts it in a
socket address: paths may be longer than 108 bytes or hold a colon.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from balenapy.errors import SystemFailure
from balenapy.linux.process import STDERR_MAX_BYTES, TOOL_ENV, Child, ProcessHandle

SYNC_MAX_BYTES = 64 << 10  # conmon sends at most 8 KiB of the runtime's stderr, escaped
MESSAGE_MAX_BYTES = 8193  # the stream byte and conmon's STDIO_BUF_SIZE
STDIN_MAX_BYTES = 16 << 10  # half of conmon's CONN_SOCK_BUF_SIZE: a longer message would be cut
SPOOL_MAX_BYTES = 16 << 20  # what conmon keeps of the log, in memory, while nobody takes it over

END_TIMEOUT_S = 5

STDOUT, STDERR = 1, 2  # as in stdcopy frames
_STREAMS = {2: STDOUT, 3: STDERR}  # conmon's stdpipe_t
_WIN_RESIZE_EVENT = 1
_REOPEN_LOGS_EVENT = 2


class RuntimeRefused(SystemFailure):
    """The OCI runtime did not create the container or run the process; the message is its own."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The directory of one run of a container, on tmpfs."""

    path: Path

    @property
    def rootfs(self) -> Path:
        return self.path / "rootfs"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def spool(self) -> Path:
        return self.path / "log"

    @property
    def oom(self) -> Path:
        return self.path / "oom"

    def conmon_pid(self) -> int | None:
        """From the file that conmon's first process writes before it ends."""
        return _read_pid(self.path / "conmon.pid")

    def container_pid(self) -> int | None:
        return _read_pid(self.path / "pid")


@dataclass(frozen=True, slots=True)
class Created:
    """A container that waits for the runtime's `start`."""

    pid: int
    conmon: ProcessHandle


def conmon_argv(
    program: str,
    cid: str,
    runtime: Sequence[str],
    exit_dir: Path,
    *,
    tty: bool,
    stdin: bool,
    keep_stdin: bool,
    log: Sequence[str] = ("--log-path", "k8s-file:log", "--log-size-max", str(SPOOL_MAX_BYTES)),
) -> list[str]:
    """The command line, to be run in the bundle directory.

    Args:
        runtime: path of the runtime and its global options.
        exit_dir: where the exit code is written, as a file `exit`; it survives a reboot if the directory does.
        keep_stdin: the container's stdin stays open when an attached client goes.
    """
    argv = [program, "--api-version", "1", "--cid", cid, "--cuuid", cid, "--runtime", runtime[0]]
    for option in runtime[1:]:
        argv += ["--runtime-arg", option]
    argv += ["--bundle", ".", "--container-pidfile", "pid", "--conmon-pidfile", "conmon.pid"]
    argv += ["--persist-dir", str(exit_dir), "--full-attach", "--no-sync-log", *log]
    if tty:
        argv.append("--terminal")
    if stdin:
        argv.append("--stdin")
    if keep_stdin:
        argv.append("--leave-stdin-open")
    return argv


async def create(argv: Sequence[str], bundle: Bundle) -> Created:
    """Run conmon and wait until it has created the container.

    Raises: RuntimeRefused with the runtime's words; SystemFailure when conmon itself failed. conmon is then gone.
    Cancellation: conmon may be left running, and the container created: `bundle.conmon_pid()` tells.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    stderr = os.memfd_create("stderr", os.MFD_CLOEXEC)
    # TMPDIR: where conmon makes the socket over which the runtime sends the terminal.
    env = {"PATH": TOOL_ENV["PATH"], "TZ": "UTC0", "TMPDIR": ".", "_OCI_SYNCPIPE": str(write_end)}
    try:
        try:
            child = Child(argv, stderr=stderr, env=env, cwd=bundle.path, pass_fds=(write_end,))
        finally:
            os.close(write_end)
        async with child, trio.lowlevel.FdStream(os.dup(read_end)) as sync:
            code = await child.wait()  # of its first process: the pid file is written
            line = await _read_line(sync) if code == 0 else b""
        words = os.pread(stderr, STDERR_MAX_BYTES, 0).decode(errors="replace").strip()
    finally:
        os.close(read_end)
        os.close(stderr)
    conmon_pid = bundle.conmon_pid()
    conmon = ProcessHandle.open(conmon_pid) if conmon_pid is not None else None
    pid, message = parse_sync(line)
    if pid > 0 and conmon is not None:
        return Created(pid, conmon)
    if conmon is not None:
        await _see_off(conmon)
    if not line:
        raise SystemFailure(f"conmon ended without a word about {bundle.path.name}" + (f": {words}" if words else ""))
    if pid < 0:
        raise RuntimeRefused(runtime_message(message))
    raise SystemFailure(f"conmon of {bundle.path.name} is gone")


async def _see_off(conmon: ProcessHandle) -> None:
    """It ends by itself after a failure, and is our child then if we are a subreaper."""
    with conmon:
        with trio.move_on_after(END_TIMEOUT_S):
            await conmon.wait()
        conmon.reap()


async def _read_line(stream: trio.lowlevel.FdStream) -> bytes:
    line = bytearray()
    while b"\n" not in line and len(line) < SYNC_MAX_BYTES:
        data = await stream.receive_some(8192)
        if not data:
            break
        line += data
    return bytes(line)


def parse_sync(line: bytes) -> tuple[int, str]:
    """One line of the sync pipe -> (pid or a negative number, message)."""
    try:
        found = json.loads(line.decode(errors="replace"), strict=False)
        return int(found["data"]), str(found.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return -1, line.decode(errors="replace")


def runtime_message(stderr: str) -> str:
    """What went wrong, out of the log lines a runtime wrote: `msg` of the last error, or all of it."""
    found = ""
    for line in stderr.splitlines():
        try:
            entry = json.loads(line, strict=False)
            if entry.get("level", "error") in ("error", "fatal"):
                found = str(entry["msg"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return (found or stderr).strip()


def read_exit_code(exit_dir: Path) -> int | None:
    """What conmon wrote as the container ended; None when it did not get to it."""
    try:
        return int((exit_dir / "exit").read_text())
    except (FileNotFoundError, ValueError):
        return None


def clear_exit_code(exit_dir: Path) -> None:
    """Before a start: the code of the run before must not be taken for that of the new one."""
    for name in ("exit", "oom"):
        (exit_dir / name).unlink(missing_ok=True)


class AttachSocket:
    """A connection to the stdio of a running container."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock

    @classmethod
    async def connect(cls, bundle: Bundle) -> AttachSocket:
        """Raises: SystemFailure when conmon is gone."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            directory = os.open(bundle.path, os.O_PATH | os.O_CLOEXEC)
            try:
                await sock.connect(f"/proc/self/fd/{directory}/attach")  # a socket address holds 107 bytes
            finally:
                os.close(directory)
        except OSError as error:
            sock.close()
            raise SystemFailure(f"cannot attach to {bundle.path.name}: {error.strerror}") from error
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def receive(self) -> tuple[int, bytes]:
        """The next piece of output as (STDOUT or STDERR, bytes); no bytes at the end of the run."""
        try:
            message = await self._socket.recv(MESSAGE_MAX_BYTES)
        except ConnectionError:
            message = b""
        if len(message) < 2:
            return STDOUT, b""
        return _STREAMS.get(message[0], STDOUT), message[1:]

    async def send(self, data: bytes) -> None:
        """Write to the container's stdin. What nobody reads any more is dropped."""
        for start in range(0, len(data), STDIN_MAX_BYTES):
            try:
                await self._socket.send(data[start : start + STDIN_MAX_BYTES])
            except (ConnectionError, BrokenPipeError):
                return

    def send_eof(self) -> None:
        """Close the container's stdin, unless it was started with `keep_stdin`. Output goes on."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def close(self) -> None:
        self._socket.close()


def resize(bundle: Bundle, height: int, width: int) -> bool:
    """Set the size of the container's terminal. False when it has none any more."""
    return _control(bundle, f"{_WIN_RESIZE_EVENT} {min(height, 1000)} {min(width, 1000)}\n")


def begin_new_spool(bundle: Bundle) -> bool:
    """Have conmon begin a new log file, as it does at its limit."""
    return _control(bundle, f"{_REOPEN_LOGS_EVENT} 0 0\n")


def _control(bundle: Bundle, line: str) -> bool:
    try:
        fd = os.open(bundle.path / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO):  # no reader: conmon is gone
            return False
        raise SystemFailure(f"cannot control {bundle.path.name}: {error.strerror}") from error
    try:
        os.write(fd, line.encode())
    except BlockingIOError:
        return False  # conmon hangs; the next size will do
    finally:
        os.close(fd)
    return True


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def find_conmon() -> str:
    """The program's path. Raises: SystemFailure."""
    for directory in TOOL_ENV["PATH"].split(":"):
        for name in ("conmon", "balena-engine-conmon"):
            path = f"{directory}/{name}"
            if directory and os.access(path, os.X_OK):
                return path
    for path in ("/usr/libexec/podman/conmon", "/usr/lib/podman/conmon"):
        if os.access(path, os.X_OK):
            return path
    raise SystemFailure("conmon is not installed")
