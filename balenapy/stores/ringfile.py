"""A container's ring log as a file, and the taking over of conmon's spool into it. Everything here blocks.

The format is core/ringlog.py's; what conmon writes is core/conmonlog.py's. The file is made, at its full size, when
the first byte of output arrives: a container that says nothing takes no space.
"""

from __future__ import annotations

import errno
import logging
import os
from functools import partial
from pathlib import Path

from balenapy.core import ringlog
from balenapy.core.ringlog import Geometry, Ring, SpoolPosition, Writer
from balenapy.errors import DataLoss
from balenapy.linux import syscalls

log = logging.getLogger(__name__)

DEFAULT_SIZE_BYTES = 1 << 20
MAX_SIZE_BYTES = 64 << 20
BATCH_BYTES = 256 << 10
PUNCH_BYTES = 64 << 10  # memory given back at once
FILE_NAME = "ring.log"


def open_ring(path: Path) -> tuple[int, Ring] | None:
    """For reading: the descriptor, which is the caller's to close, and the ring. None when there is none.

    Raises: DataLoss.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return fd, Ring(partial(_pread, fd))
    except BaseException:
        os.close(fd)
        raise


def _pread(fd: int, offset: int, size: int) -> bytes:
    return os.pread(fd, size, offset)


class SpoolDrain:
    """Moves what conmon wrote into the ring. One at a time may work on a container's."""

    def __init__(self, spool: Path, ring: Path, size_bytes: int, *, adopt: bool) -> None:
        """
        Args:
            adopt: the run began under an engine that died: what it took over already is not taken again.
        """
        self._spool_path = spool
        self._ring_path = ring
        self._size_bytes = size_bytes
        self._adopt = adopt
        self._spool_fd = -1
        self._inode = 0
        self._taken = 0  # bytes of the spool, up to the end of a line
        self._punched = 0
        self._ring_fd = -1
        self._writer: Writer | None = None
        self.failed = False

    @property
    def waiting_bytes(self) -> int:
        """How much of the spool was not taken over yet; cheap."""
        try:
            status = os.stat(self._spool_path)
        except FileNotFoundError:
            return 0
        if status.st_ino != self._inode:
            return status.st_size
        return max(0, status.st_size - self._taken)

    def drain_some(self) -> int:
        """Take over one batch; returns the bytes of spool it took, 0 when there is no more for now."""
        if self._spool_fd < 0 and not self._open_spool():
            return 0
        data = os.pread(self._spool_fd, BATCH_BYTES, self._taken)
        end = data.rfind(b"\n") + 1
        if not end:
            # conmon renames a new file over the old one when that is full; the old one is complete then.
            if len(data) == BATCH_BYTES:
                end = len(data)  # no line is that long: this is damage
            elif self._is_replaced() and self._open_spool():
                return self.drain_some()
            else:
                return 0
        self._store(data[:end])
        self._give_memory_back()
        return end

    def open(self) -> None:
        """Hold the spool before anything is written: conmon may replace it at any time from then on."""
        if self._spool_fd < 0:
            self._open_spool()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to take over and nothing to mark."""
        return self._writer is None and self._spool_fd >= 0 and self.waiting_bytes == 0

    def end_run(self) -> None:
        """Take over the rest and mark the end: a line without end is not continued by the next run."""
        while self.drain_some():
            pass
        if self._writer is not None and not self.failed:
            self._writer.append_run_end()
            self._write()

    def close(self) -> None:
        for fd in (self._spool_fd, self._ring_fd):
            if fd >= 0:
                os.close(fd)
        self._spool_fd = self._ring_fd = -1

    def _open_spool(self) -> bool:
        try:
            fd = os.open(self._spool_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        if self._spool_fd >= 0:
            os.close(self._spool_fd)
        self._spool_fd = fd
        self._inode = os.fstat(fd).st_ino
        self._taken = self._punched = 0
        if self._adopt:
            self._adopt = False
            self._go_back_to_checkpoint()
        return True

    def _is_replaced(self) -> bool:
        try:
            return os.stat(self._spool_path).st_ino != self._inode
        except FileNotFoundError:
            return False

    def _go_back_to_checkpoint(self) -> None:
        """After a crash: what lies behind the last checkpoint was half written and comes from the spool again."""
        if not self._ring_path.exists() or not self._open_ring():
            return
        ring = Ring(partial(_pread, self._ring_fd))
        found = ring.last_checkpoint()
        if found is None or found[0].inode != self._inode:
            return  # that spool is gone: what was written is all there is
        position, behind = found
        self._taken = self._punched = position.offset
        assert self._writer is not None
        self._writer.rewind(behind, ring.end())
        self._write()

    def _store(self, data: bytes) -> None:
        start, self._taken = self._taken, self._taken + len(data)
        if self.failed or (self._writer is None and not self._open_ring()):
            return
        assert self._writer is not None
        if start == 0:
            self._writer.append_checkpoint(SpoolPosition(self._inode, 0))
        self._writer.append_text(data)
        self._writer.append_checkpoint(SpoolPosition(self._inode, self._taken))
        self._write()

    def _open_ring(self) -> bool:
        """Open or make the file. A full disk costs the log, not the container."""
        try:
            self._ring_fd = os.open(self._ring_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._writer = self._writer_of_file()
            except DataLoss as error:
                aside = self._ring_path.with_name(f"{FILE_NAME}.broken")
                log.error("%s path=%s renamed_to=%s", error.message, self._ring_path, aside.name)
                os.close(self._ring_fd)
                os.rename(self._ring_path, aside)
                self._ring_fd = os.open(self._ring_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                self._writer = self._writer_of_file()
        except OSError as error:
            self._fail(error)
        return not self.failed

    def _writer_of_file(self) -> Writer:
        fd = self._ring_fd
        size = os.fstat(fd).st_size
        if size < ringlog.HEADER_SIZE:
            # First, so that a file that a power cut left short is still a ring.
            header = Geometry.for_size(self._size_bytes).header()
            os.pwrite(fd, header + bytes(ringlog.HEADER_SIZE - len(header)), 0)
        ring = Ring(partial(_pread, fd))
        if size < ring.geometry.file_size:
            try:
                os.posix_fallocate(fd, 0, ring.geometry.file_size)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                os.ftruncate(fd, ring.geometry.file_size)
        return Writer(ring.geometry, ring.end())

    def _write(self) -> None:
        assert self._writer is not None
        try:
            for offset, data in self._writer.take():
                os.pwrite(self._ring_fd, data, offset)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failed = True
        log.error("log cannot be written, output is dropped path=%s error=%s", self._ring_path, error.strerror)

    def _give_memory_back(self) -> None:
        """The spool lies in memory; conmon only appends to it."""
        end = self._taken & ~0xFFF
        if end - self._punched >= PUNCH_BYTES:
            try:
                syscalls.punch_hole(self._spool_fd, self._punched, end - self._punched)
            except OSError:
                pass  # a file system that cannot; conmon's limit bounds it then
            self._punched = end
