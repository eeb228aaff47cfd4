"""What every worker does to itself, and how it says what became of its work."""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from balenapy.errors import KINDS, EngineError, InvalidParameter, SystemFailure
from balenapy.linux import syscalls

NICE = 10
IO_CLASS, IO_LEVEL = 2, 7  # best effort, last; not "idle", which may never get its turn
# Enough for zstd's widest window (128 MiB) or xz's highest setting, and as much again.
MEMORY_BYTES = 384 << 20

Report = dict[str, Any]


def bind_to_parent() -> None:
    """Have the kernel kill us when the daemon ends; end at once if it has ended already."""
    syscalls.set_parent_death_signal(signal.SIGKILL)
    parent = os.environ.get("BALENAPY_PARENT")
    if parent is not None and os.getppid() != int(parent):
        os._exit(1)


def yield_to_others() -> None:
    """Take the processor and the disk only when containers do not want them. Best effort."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        syscalls.set_io_priority(IO_CLASS, IO_LEVEL)
    except OSError:
        pass


def bound_memory() -> None:
    """A hostile stream ends in our MemoryError, not in the machine's OOM killer.

    The engine may name a memory cgroup as well: it bounds the page cache too, so that a large layer does not push the
    pages of running containers out. Where there is none, or it will not have us, we do without.
    """
    limit = int(os.environ.get("BALENAPY_MEMORY", MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cgroup = os.environ.get("BALENAPY_CGROUP")
    if cgroup is not None:
        _join_cgroup(cgroup, os.environ["BALENAPY_CGROUP_LIMIT"])


def _join_cgroup(directory: str, limit: str) -> None:
    """`limit` is `file=value`: cgroup v1 and v2 name the file differently."""
    try:
        os.makedirs(directory, exist_ok=True)
        name, _, value = limit.partition("=")
        for file, text in ((name, value), ("cgroup.procs", "0")):
            fd = os.open(f"{directory}/{file}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
    except OSError:
        try:
            os.rmdir(directory)
        except OSError:
            pass


def enter(directory: str) -> None:
    """Make `directory` the root: from here on no name leads out of it; nor does the network, where the kernel allows.

    Everything that will be needed is imported by now, and nothing can be imported any more: a layer may
    well bring a /usr/lib/python3.11 of its own.
    """
    os.chroot(directory)
    os.chdir("/")
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
    except OSError:
        pass  # a kernel without, or a container around us
    sys.path.clear()
    sys.meta_path.clear()


def apart(work: Callable[[], Report]) -> Report:
    """Do something in a child of ours that may `enter` a root of its own, and give what it gives.

    Raises: what it raised of our errors; SystemFailure when it died.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            syscalls.set_parent_death_signal(signal.SIGKILL)
            os.close(reading)
            write_all(writing, json.dumps(_outcome(work)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    try:
        report: Report = json.loads(data)
    except ValueError:
        raise SystemFailure("worker ended without a word") from None
    if "error" in report:
        raise KINDS.get(report["error"]["kind"], SystemFailure)(report["error"]["message"])
    return report


def report_outcome(command: list[str], verbs: Mapping[str, str]) -> int:
    """Run the verb, write its report or its error to stdout; returns the exit code."""
    report = _outcome(lambda: _run(command, verbs))
    write_all(1, json.dumps(report).encode() + b"\n")
    return 1 if "error" in report else 0


def _outcome(work: Callable[[], Report]) -> Report:
    """What it gives, or its error."""
    try:
        return work()
    except EngineError as error:
        return _failure(_kind(error), error.message)
    except OSError as error:
        return _failure("SystemFailure", describe(error))
    except MemoryError:
        limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
        return _failure("SystemFailure", f"more than {limit >> 20} MiB of memory would be needed")
    except Exception as error:
        sys.excepthook(*sys.exc_info())
        return _failure("SystemFailure", f"{type(error).__name__}: {error}")


def _run(command: list[str], verbs: Mapping[str, str]) -> Report:
    if len(command) != 2 or command[0] not in verbs:
        raise InvalidParameter(f"usage: balenapy.worker {'|'.join(sorted(verbs))} '<json arguments>'")
    try:
        arguments = json.loads(command[1])
    except ValueError as error:
        raise InvalidParameter(f"arguments are not JSON: {error}") from error
    report: Report = importlib.import_module(verbs[command[0]]).run(arguments)
    return report


def _kind(error: EngineError) -> str:
    """The kind that `balenapy.errors` knows; subclasses do not cross the process border."""
    for base in type(error).__mro__:
        if base.__module__ == "balenapy.errors":
            return base.__name__
    return "SystemFailure"


def _failure(kind: str, message: str) -> Report:
    return {"error": {"kind": kind, "message": message}}


def write_all(fd: int, data: bytes | memoryview) -> None:
    """write(2) until all is written: it may take less, before a signal or a full disk."""
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, memoryview(data)[written:])


def describe(error: OSError) -> str:
    """An OSError in the words Go programs use: `/usr/bin/x: no space left on device`."""
    text = os.strerror(error.errno or errno.EIO)
    text = text[:1].lower() + text[1:]
    name = error.filename
    if isinstance(name, bytes):
        name = show(name)
    return f"{name}: {text}" if isinstance(name, str) and name else text


def failed(action: str, path: bytes, error: OSError) -> SystemFailure:
    """The error to raise when `action` on `path` (below the root we are in) failed."""
    return SystemFailure(f"{action} /{show(path)}: {describe(OSError(error.errno, ''))}")


def show(name: bytes) -> str:
    """A name as text, whatever its bytes."""
    return name.decode(errors="backslashreplace")
