"""The journal of this machine: entries go to its socket, and come back from `journalctl`."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from balenapy.errors import SystemFailure
from balenapy.linux.process import Child

SOCKET = Path("/run/systemd/journal/socket")
JOURNALCTL: tuple[str, ...] = ("journalctl",)
LINE_MAX_BYTES = 1 << 20
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def is_available() -> bool:
    return SOCKET.exists()


class JournalSocket:
    """Sends entries (core/journal.py); waits while the journal has no room."""

    def __init__(self) -> None:
        self._socket = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    async def send(self, datagram: bytes) -> None:
        """Raises: SystemFailure when there is no journal."""
        try:
            await self._socket.sendto(datagram, str(SOCKET))
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise SystemFailure(f"cannot log to the journal: {error.strerror}") from error
            await self._send_as_file(datagram)

    async def _send_as_file(self, datagram: bytes) -> None:
        """What is too long for a datagram goes as a descriptor."""
        fd = os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            view = memoryview(datagram)
            while view:
                view = view[os.write(fd, view) :]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)  # the journal takes no other
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little"))]
            await self._socket.sendmsg([], rights, 0, str(SOCKET))
        except OSError as error:
            raise SystemFailure(f"cannot log to the journal: {error.strerror}") from error
        finally:
            os.close(fd)

    def close(self) -> None:
        self._socket.close()


@asynccontextmanager
async def open_lines(arguments: Sequence[str]) -> AsyncIterator[Lines]:
    """The lines that `journalctl -o json` prints with these arguments; it is ended with the block.

    Raises: SystemFailure when there is no journalctl.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    argv = [*JOURNALCTL, "--output=json", "--all", "--quiet", "--no-pager", *arguments]
    try:
        try:
            child = Child(argv, stdout=write_end)
        finally:
            os.close(write_end)
    except BaseException:
        os.close(read_end)
        raise
    async with child, trio.lowlevel.FdStream(read_end) as stream:
        yield Lines(stream)


class Lines:
    """The lines of a stream, one after the other."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._held = bytearray()

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> bytes:
        while (end := self._held.find(b"\n")) < 0:
            data = await self._stream.receive_some(64 << 10)
            if not data:
                raise StopAsyncIteration
            self._held += data
            if len(self._held) > LINE_MAX_BYTES and b"\n" not in data:
                self._held.clear()
        line = bytes(self._held[:end])
        del self._held[: end + 1]
        return line
