"""A container's ring log as a file, and the taking over of conmon's spool into it. Everything here blocks.

The format is core/ringlog.py's; what conmon writes is core/conmonlog.py's. The file is made, at its full size, when
the first byte of output arrives: a container that says nothing takes no space.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from balenapy.core import ringlog
from balenapy.core.ringlog import Geometry, Ring, SpoolPosition, Writer
from balenapy.errors import DataLoss
from balenapy.linux import durable
from balenapy.stores.spool import BATCH_BYTES, Spool

log = logging.getLogger(__name__)

DEFAULT_SIZE_BYTES = 1 << 20
MAX_SIZE_BYTES = 64 << 20
MIN_SIZE_BYTES = Geometry.for_size(0).file_size
FILE_NAME = "ring.log"
COMPRESSION_LEVEL = 9

Grant = Callable[[int], int]  # the size wanted -> the size that a new ring may have


def open_ring(path: Path) -> tuple[int, Ring] | None:
    """For reading: the descriptor, which is the caller's to close, and the ring. None when there is none.

    Raises: DataLoss.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return fd, Ring(partial(_pread, fd), decompress=decompress)
    except BaseException:
        os.close(fd)
        raise


def compress(data: bytes) -> bytes:
    """zstd is loaded only when a container logs with it, or such a log is read."""
    import zstandard

    return zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=False).compress(data)


def decompress(data: bytes) -> bytes:
    """Raises: ValueError."""
    import zstandard

    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=ringlog.COMPRESSED_MAX_BYTES << 3)
        return decompressor.decompress(data, max_output_size=ringlog.COMPRESSED_MAX_BYTES)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _pread(fd: int, offset: int, size: int) -> bytes:
    return os.pread(fd, size, offset)


class SpoolDrain:
    """Moves what conmon wrote into the ring. One at a time may work on a container's."""

    def __init__(
        self,
        spool: Path,
        ring: Path,
        size_bytes: int,
        *,
        adopt: bool,
        compressed: bool = False,
        keep_bytes: int = 0,
        grant: Grant | None = None,
    ) -> None:
        """
        Args:
            adopt: the run began under an engine that died: what it took over already is not taken again.
            compressed: text is stored compressed.
            keep_bytes: more than that does not wait in memory, the oldest is dropped; 0: everything is kept.
            grant: asked for the size of a ring that is made.
        """
        self._spool = Spool(spool)
        self._ring_path = ring
        self._size_bytes = size_bytes
        self._grant = grant
        self._adopt = adopt
        self._compress = compress if compressed else None
        self._keep_bytes = keep_bytes
        self._batch_bytes = BATCH_BYTES
        self._ring_fd = -1
        self._writer: Writer | None = None
        self._unsynced = False
        self.failed = False
        self.lost_bytes = 0

    def look(self) -> int:
        """Hold what conmon has begun since; how many bytes wait. Cheap, and may be called in another thread."""
        return self._spool.look()

    @property
    def waiting_bytes(self) -> int:
        return self._spool.look()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to take over and nothing to mark."""
        return self._writer is None and self._spool.is_open and self.waiting_bytes == 0

    @property
    def needs_sync(self) -> bool:
        """Whether something was written that a power cut would take."""
        return self._unsynced

    def drain_some(self) -> int:
        """Take over one batch; returns the bytes of spool it took, 0 when there is no more for now."""
        self._begin()
        lost = self._spool.drop(self._keep_bytes) if self._keep_bytes else 0
        data = self._spool.read(self._batch_bytes)
        if not data and not lost:
            return 0
        self.lost_bytes += lost
        self._store(SpoolPosition(*self._spool.position), data, lost)
        if data:
            self._spool.take(len(data))
        return lost + len(data)

    def end_run(self) -> None:
        """Take over the rest and mark the end: a line without end is not continued by the next run."""
        while self.drain_some():
            pass
        self._spool.end()
        if self._writer is not None and not self.failed:
            self._writer.append_run_end()
            self._write()

    def sync(self) -> None:
        """What was taken over survives a power cut."""
        if self._unsynced and self._ring_fd >= 0:
            self._unsynced = False
            try:
                if os.fstat(self._ring_fd).st_nlink:  # else it is removed already
                    durable.sync_file(self._ring_fd)
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        self._spool.close()
        if self._ring_fd >= 0:
            os.close(self._ring_fd)
            self._ring_fd = -1

    def _begin(self) -> None:
        """After a crash: what lies behind the last checkpoint was half written and comes from the spool again."""
        self._spool.look()
        if not self._adopt or not self._spool.is_open:
            return
        self._adopt = False
        if not self._ring_path.exists() or not self._open_ring():
            return
        ring = Ring(partial(_pread, self._ring_fd))
        found = ring.last_checkpoint()
        if found is None:
            return
        position, behind = found
        if not self._spool.go_to(position.inode, position.offset):
            return  # that spool is gone: what was written is all there is
        assert self._writer is not None
        self._writer.rewind(behind, ring.end())
        self._write()

    def _store(self, start: SpoolPosition, data: bytes, lost: int) -> None:
        if self.failed or (self._writer is None and not self._open_ring()):
            return
        assert self._writer is not None
        if lost:
            self._writer.append_lost(lost)
        if start.offset == 0:
            self._writer.append_checkpoint(start)
        self._writer.append_text(data)
        self._writer.append_checkpoint(SpoolPosition(start.inode, start.offset + len(data)))
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
            # Half of the ring: a batch must not overwrite the checkpoint before it.
            geometry = self._writer.geometry
            self._batch_bytes = min(BATCH_BYTES, geometry.block_count * geometry.block_size // 2)
        except OSError as error:
            self._fail(error)
        return not self.failed

    def _writer_of_file(self) -> Writer:
        fd = self._ring_fd
        size = os.fstat(fd).st_size
        if size < ringlog.HEADER_SIZE:
            wanted = self._size_bytes if self._grant is None else self._grant(self._size_bytes)
            # First, so that a file that a power cut left short is still a ring.
            header = Geometry.for_size(wanted, time.time_ns()).header()
            os.pwrite(fd, header + bytes(ringlog.HEADER_SIZE - len(header)), 0)
        ring = Ring(partial(_pread, fd), decompress=decompress)
        if size < ring.geometry.file_size:
            try:
                os.posix_fallocate(fd, 0, ring.geometry.file_size)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                os.ftruncate(fd, ring.geometry.file_size)
        return Writer(ring.geometry, ring.end(), self._compress)

    def _write(self) -> None:
        assert self._writer is not None
        try:
            for offset, data in self._writer.take():
                os.pwrite(self._ring_fd, data, offset)
                self._unsynced = True
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failed = True
        log.error("log cannot be written, output is dropped path=%s error=%s", self._ring_path, error.strerror)
