"""Named network namespaces: made, entered for one call, removed. Functions here block; call them in the netns thread.

A namespace is kept alive by a bind mount of its handle onto a file, so it outlives the daemon, and processes are put
into it by path. The kernel moves *threads* between namespaces: a call enters, works, and returns home before it
lets go of the thread. A thread that cannot return home must not be used again, so it dies with `_Stranded`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from balenapy.core.netplan import Step
from balenapy.errors import SystemFailure
from balenapy.linux import syscalls
from balenapy.linux.process import TOOL_ENV

log = logging.getLogger(__name__)

T = TypeVar("T")

# Of this thread: /proc/self would name the main thread's.
_OWN = "/proc/thread-self/ns/net"
_SIOCSIFFLAGS = 0x8914
_IFF_UP_RUNNING = 0x1 | 0x40
_TOOL_TIMEOUT_S = 30


def create(path: Path, steps: Iterable[Step] = ()) -> None:
    """Make a namespace at `path` with loopback up, and run these steps in it.

    IPv6 is off inside until an endpoint brings an IPv6 address (libnetwork createNetworkNamespace), which also spares
    duplicate address detection. Nothing is left behind on failure.

    Raises: SystemFailure.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    remove(path)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o444))
        with _returning_home():
            syscalls.unshare(syscalls.CLONE_NEWNET)
            syscalls.bind_mount(_OWN, path)
            _write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")
            _loopback_up()
            run_steps(steps)
    except BaseException as error:
        remove(path)
        if isinstance(error, OSError):
            raise SystemFailure(f"cannot create network namespace {path}: {error}") from error
        raise


def call_inside(path: Path, fn: Callable[[], T]) -> T:
    """Run `fn()` in the namespace at `path` and return its result.

    Raises: SystemFailure when the namespace cannot be entered; whatever `fn` raises.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SystemFailure(f"cannot open network namespace {path}: {error.strerror}") from error
    try:
        with _returning_home():
            try:
                syscalls.setns(fd, syscalls.CLONE_NEWNET)
            except OSError as error:
                raise SystemFailure(f"cannot enter network namespace {path}: {error.strerror}") from error
            return fn()
    finally:
        os.close(fd)


def open_socket(path: Path, family: int, kind: int, address: tuple[str, int], protocol: int = 0) -> socket.socket:
    """A bound socket that lives in the namespace at `path`; usable from any thread afterwards.

    Raises: SystemFailure, OSError of bind.
    """

    def make() -> socket.socket:
        opened = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            if kind == socket.SOCK_STREAM and address[1]:
                # Connections of a listener that was there before may linger for a minute.
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
        except OSError:
            opened.close()
            raise
        return opened

    return call_inside(path, make)


def run_steps_inside(path: Path, steps: Iterable[Step]) -> None:
    """Run these steps in the namespace at `path`. Raises: SystemFailure."""
    call_inside(path, lambda: run_steps(steps))


def delete_links_with(path: Path, addresses: Iterable[str]) -> None:
    """Delete the links that have these addresses in the namespace at `path`. Raises: SystemFailure."""

    def delete() -> None:
        found = json.loads(_run_here(("ip", "-json", "address", "show")) or "[]")
        wanted = set(addresses)
        names = [
            link["ifname"] for link in found if any(one.get("local") in wanted for one in link.get("addr_info", ()))
        ]
        _run_batch("".join(f"link delete dev {name}\n" for name in names))

    call_inside(path, delete)


def apply_rules_inside(path: Path, ruleset: str) -> None:
    """Run one nft transaction in the namespace at `path`. Raises: SystemFailure."""
    call_inside(path, lambda: _run_here(("nft", "-f", "-"), ruleset))


def remove(path: Path) -> None:
    """Let the namespace go; its links vanish with it, a moment later. Again is fine."""
    try:
        syscalls.unmount_if_mounted(path)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SystemFailure(f"cannot remove network namespace {path}: {error}") from error


def names(directory: Path) -> list[str]:
    """The namespaces kept in a directory."""
    try:
        return sorted(entry.name for entry in os.scandir(directory))
    except FileNotFoundError:
        return []


def exists(path: Path) -> bool:
    """Whether a namespace is there: the file exists and something is mounted on it."""
    try:
        # A namespace handle lives on the nsfs, an empty file does not.
        return os.stat(path).st_dev != os.stat(path.parent).st_dev
    except FileNotFoundError:
        return False


def home_handle() -> str:
    """The namespace of the daemon, as a path that is right in every thread of it and in its children."""
    return f"/proc/{os.getpid()}/ns/net"


def run_steps(steps: Iterable[Step]) -> None:
    """Run `ip -batch`, and set switches, in the calling thread's namespace: a child is born where its thread is.

    Raises: SystemFailure, with the words of ip and the line it failed at.
    """
    batch = ""
    for step in steps:
        if isinstance(step, str):
            batch += step
            continue
        _run_batch(batch)
        batch = ""
        try:
            _write(f"/proc/sys/net/{step.name}", step.value)
        except OSError as error:
            raise SystemFailure(f"cannot set net/{step.name}: {error.strerror}") from error
    _run_batch(batch)


def _run_batch(batch: str) -> None:
    if batch:
        _run_here(("ip", "-batch", "-"), batch)


def _run_here(argv: tuple[str, ...], input: str = "") -> str:
    try:
        done = subprocess.run(
            argv,
            input=input.encode(),
            capture_output=True,
            env=TOOL_ENV,
            timeout=_TOOL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemFailure(f"cannot run {argv[0]}: {error}") from error
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().replace("\n", "; ")
        raise SystemFailure(f"{argv[0]}: {words or f'exit status {done.returncode}'}")
    return done.stdout.decode(errors="replace")


class _Stranded(BaseException):
    """The thread is in a namespace it cannot leave. Not an error anybody may handle."""


@contextmanager
def _returning_home() -> Iterator[None]:
    home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            yield
        finally:
            try:
                syscalls.setns(home, syscalls.CLONE_NEWNET)
            except OSError as error:
                log.critical("cannot return from a network namespace error=%s", error)
                raise _Stranded from error
    finally:
        os.close(home)


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except FileNotFoundError:  # a kernel without IPv6
        pass


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP_RUNNING))
