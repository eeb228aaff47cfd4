"""Ingests: blobs that are arriving, staged so that a pull goes on where it was cut.

The bytes are appended to `ingest/<algorithm>-<hex>` as they come, and read again from there by whoever unpacks
them, while the rest still arrives. The row says how many of them are certain to be on disk. After a crash of ours
alone the kernel still has all of the file (same boot id); after a power cut only `length` bytes count.

How much syncing: none in the first STAGE_AFTER_S seconds, and a blob that is complete by then is unlinked before
its layer is synced, so over a fast link the kernel never writes it. Over a slow one it is synced as it grows.
A staged prefix is never trusted: it is hashed with the rest, and the digest decides.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from balenapy.core.digest import Digest
from balenapy.errors import EngineError, SystemFailure
from balenapy.linux import durable
from balenapy.stores.db import Database
from balenapy.stores.db import NoSpace as NoSpace

log = logging.getLogger(__name__)

R = TypeVar("R")

STAGE_AFTER_S = 20.0
SYNC_BYTES = 1 << 20  # at most this much is fetched twice after a power cut ...
SYNC_INTERVAL_S = 1.0  # ... or what arrived in this time, if that is more
SYNC_IDLE_S = 30.0  # a trickle is synced this often
WRITE_BYTES = 256 << 10  # what one thread call writes or reads
INGEST_TTL_NS = 24 * 3600 * 10**9


def file_error(what: str, error: OSError) -> EngineError:
    """An error of writing files as one of ours, with the words clients look for."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{what}: no space left on device")
    return SystemFailure(f"{what}: {(error.strerror or str(error)).lower()}")


@dataclass(slots=True)
class IngestRecord:
    """A row. `length` bytes are durable."""

    digest: str
    size_bytes: int
    length: int
    boot_id: str
    expires_ns: int

    @property
    def file_name(self) -> str:
        return self.digest.replace(":", "-", 1)


class Content:
    """All ingests."""

    def __init__(self, db: Database, data_root: Path, limiter: trio.CapacityLimiter, boot_id: str) -> None:
        """Load the rows. Blocks: for start."""
        self._db = db
        self._root = data_root / "ingest"
        self._limiter = limiter
        self._boot_id = boot_id
        self._records: dict[str, IngestRecord] = {}
        self._open: dict[str, Ingest] = {}
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for digest, size_bytes, length, boot, expires_ns in db.query(
            "SELECT digest, size_bytes, length, boot_id, expires_ns FROM ingest"
        ):
            try:
                parsed = Digest.parse(str(digest))
                record = IngestRecord(
                    str(parsed), int(str(size_bytes)), int(str(length)), str(boot), int(str(expires_ns))
                )
                if record.size_bytes < 0 or record.length < 0:
                    raise ValueError("it has a negative length")
            except (EngineError, ValueError) as error:  # no more than a part of a download
                log.error("ingest cannot be read digest=%s error=%s", digest, error)
                continue
            self._records[str(digest)] = record

    def recover(self) -> None:
        """Delete files without a row. Blocks: for start."""
        known = {record.file_name for record in self._records.values()}
        for path in self._root.iterdir():
            if path.name not in known:
                log.info("abandoned ingest path=%s", path)
                durable.remove_tree(path)

    def find(self, digest: Digest) -> IngestRecord | None:
        return self._records.get(str(digest))

    def sizes(self) -> dict[str, int]:
        """Bytes on disk of each ingest, for accounting. A stat for each, no walk."""
        return {digest: self.staged_bytes(Digest.parse(digest)) for digest in self._records}

    def usage(self) -> list[tuple[IngestRecord, int]]:
        """Every ingest with what it takes on disk."""
        return [(record, self.staged_bytes(Digest.parse(record.digest))) for record in self._records.values()]

    def staged_bytes(self, digest: Digest) -> int:
        """How much of a blob need not be fetched again."""
        record = self._records.get(str(digest))
        if record is None:
            return 0
        try:
            held = os.stat(self._root / record.file_name).st_size
        except OSError:
            return 0
        return min(held if record.boot_id == self._boot_id else min(held, record.length), record.size_bytes)

    # --- rows

    def insert(self, connection: sqlite3.Connection, digest: Digest, size_bytes: int, now_ns: int) -> None:
        """Begin an ingest, or keep one that exists longer. Inside a transaction; `loaded` follows it."""
        connection.execute(
            "INSERT INTO ingest(digest, size_bytes, length, boot_id, expires_ns) VALUES(?, ?, 0, ?, ?) "
            "ON CONFLICT(digest) DO UPDATE SET expires_ns = excluded.expires_ns",
            (str(digest), size_bytes, self._boot_id, now_ns + INGEST_TTL_NS),
        )

    def inserted(self, digest: Digest, size_bytes: int, now_ns: int) -> None:
        """Follow `insert` in memory."""
        record = self._records.get(str(digest))
        if record is None:
            self._records[str(digest)] = IngestRecord(str(digest), size_bytes, 0, self._boot_id, now_ns + INGEST_TTL_NS)
        else:
            record.expires_ns = now_ns + INGEST_TTL_NS

    def is_open(self, digest: Digest) -> bool:
        """Whether somebody writes or reads it at the moment."""
        return str(digest) in self._open

    @staticmethod
    def delete(connection: sqlite3.Connection, digest: Digest) -> None:
        """Drop the row. Inside a transaction; `deleted` follows it."""
        connection.execute("DELETE FROM ingest WHERE digest = ?", (str(digest),))

    async def deleted(self, digest: Digest) -> None:
        """Follow `delete`: the record and the file. Clean-up, done although the caller is cancelled."""
        if self.is_open(digest):  # somebody has begun it anew meanwhile
            return
        record = self._records.pop(str(digest), None)
        if record is None:
            return
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(_unlink, self._root / record.file_name, limiter=self._limiter)
            except OSError as error:  # the row is gone: the next start finds the file again
                log.error("cannot delete staged bytes digest=%s error=%s", digest, error)

    async def drop(self, digest: Digest) -> None:
        """Delete an ingest: its bytes are wrong, or nobody wants them.

        The file goes before its row: on a full disk there is no room for a transaction while it is there, and a
        row without a file says no more than that nothing is staged.

        Raises: SystemFailure, when the disk refuses either.
        """
        record = self._records.get(str(digest))
        with trio.CancelScope(shield=True):
            if record is not None and not self.is_open(digest):
                await self.run_file(f"cannot delete staged {digest}", partial(_unlink, self._root / record.file_name))
            await self._db.transaction(lambda connection: self.delete(connection, digest))
            await self.deleted(digest)

    async def drop_idle(self, now_ns: int | None = None) -> int:
        """Delete the ingests nobody writes; with `now_ns` only those that have expired.

        Returns: the bytes this gives back.
        """
        freed = 0
        for record in list(self._records.values()):
            digest = Digest.parse(record.digest)
            if self.is_open(digest) or (now_ns is not None and now_ns < record.expires_ns):
                continue
            freed += self.staged_bytes(digest)
            await self.drop(digest)
        return freed

    # --- writing

    async def open(self, digest: Digest, size_bytes: int) -> Ingest:
        """Open the ingest of a blob to go on writing it. The caller holds the blob's lock.

        What a power cut may have left beyond the durable length is cut off.
        Cancellation: nothing is open; the file may exist.
        """
        now_ns = time.time_ns()
        record = self._records.get(str(digest))
        if record is None:
            await self._db.change(
                lambda connection: self.insert(connection, digest, size_bytes, now_ns),
                lambda _: self.inserted(digest, size_bytes, now_ns),
            )
            record = self._records[str(digest)]
        path = self._root / record.file_name
        length = self.staged_bytes(digest)
        try:
            fd = await trio.to_thread.run_sync(partial(_open_to_append, path, length), limiter=self._limiter)
        except OSError as error:
            raise file_error(f"cannot stage {digest}", error) from error
        ingest = Ingest(self, record, path, fd, length, size_bytes)
        self._open[str(digest)] = ingest
        return ingest

    def closed(self, digest: str) -> None:
        self._open.pop(digest, None)

    async def run_file(self, what: str, fn: Callable[[], R]) -> R:
        """Run a blocking call on an ingest's file."""
        try:
            return await trio.to_thread.run_sync(fn, limiter=self._limiter)
        except OSError as error:
            raise file_error(what, error) from error

    async def note_length(self, record: IngestRecord, length: int) -> None:
        """Say in the row that so many bytes are durable."""

        def update(connection: sqlite3.Connection) -> None:
            durable.step("note length")
            connection.execute(
                "UPDATE ingest SET length = ?, boot_id = ? WHERE digest = ?", (length, self._boot_id, record.digest)
            )

        def apply(_: None) -> None:
            record.length, record.boot_id = length, self._boot_id

        await self._db.change(update, apply, volatile=True)


class Ingest:
    """One open ingest: a writer appends, and any number of readers follow it from the start.

    `offset` is how many bytes readers can have; the writer may hold some more in memory.
    """

    def __init__(
        self, content: Content, record: IngestRecord, path: Path, fd: int, length: int, size_bytes: int
    ) -> None:
        self._content = content
        self._record = record
        self._path = path
        self._fd = fd
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._recent, self._recent_at = b"", -1
        self._grown = trio.Event()
        self._opened = self._last_sync = trio.current_time()
        self._synced = record.length if length else 0
        self._linked = True
        self.size_bytes = size_bytes
        self.offset = length
        self.is_complete = length >= size_bytes

    @property
    def path(self) -> Path:
        """The file, for who reads it whole when it is complete."""
        return self._path

    @property
    def received(self) -> int:
        """Bytes that arrived, those still in memory included: where the next request begins."""
        return self.offset + self._pending_bytes

    async def write(self, data: bytes) -> None:
        """Append. What exceeds the blob's size is refused: the sender does not keep to its manifest.

        Raises: SystemFailure, NoSpace.
        """
        if self.received + len(data) > self.size_bytes:
            raise SystemFailure(f"blob {self._record.digest} is longer than the {self.size_bytes} bytes announced")
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes >= WRITE_BYTES or self.received == self.size_bytes:
            await self.flush()
        await self._sync_when_due()

    async def flush(self) -> None:
        """Give readers all that arrived."""
        if self._pending:
            data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
            position = self.offset
            await self._content.run_file(
                f"cannot stage {self._record.digest}", partial(_write_all, self._fd, data, position)
            )
            self._pending, self._pending_bytes = [], 0
            self._recent, self._recent_at = data, position
            self.offset += len(data)
        self.is_complete = self.offset >= self.size_bytes
        self._wake()

    async def _sync_when_due(self) -> None:
        now = trio.current_time()
        if self.is_complete or now - self._opened < STAGE_AFTER_S:
            return
        unsynced = self.received - self._synced
        waited = now - self._last_sync
        if (unsynced >= SYNC_BYTES and waited >= SYNC_INTERVAL_S) or (unsynced and waited >= SYNC_IDLE_S):
            await self.sync()

    async def sync(self) -> None:
        """Make what arrived durable, and say so in the row."""
        await self.flush()
        length, first = self.offset, self._record.length == 0
        await self._content.run_file(
            f"cannot stage {self._record.digest}", partial(_sync, self._fd, self._path.parent if first else None)
        )
        await self._content.note_length(self._record, length)
        self._synced, self._last_sync = length, trio.current_time()

    async def read(self, position: int) -> bytes:
        """Some bytes from there on, waiting until there are any; b"" at the end of the blob.

        A reader that keeps up gets what was written last from memory.
        """
        while position >= self.offset:
            if self.is_complete:
                return b""
            await self._grown.wait()
        if position == self._recent_at:
            return self._recent
        data = await self._content.run_file(
            f"cannot read staged {self._record.digest}",
            partial(os.pread, self._fd, min(WRITE_BYTES, self.offset - position), position),
        )
        if not data:
            raise SystemFailure(f"staged {self._record.digest} is shorter than it was")
        return data

    async def hash(self, algorithm: str) -> str:
        """Digest of all bytes, as hex."""
        return await self._content.run_file(
            f"cannot read staged {self._record.digest}", partial(_hash, self._fd, algorithm)
        )

    async def unlink_if_fresh(self) -> None:
        """Unlink a complete blob that was never synced, before its layer is: the kernel then need not write it."""
        if self._linked and self.is_complete and self._synced == 0:
            self._linked = False
            await self._content.run_file("cannot unlink", partial(_unlink, self._path))

    async def aclose(self) -> None:
        """Close the file; what arrived stays for the next attempt. Clean-up: never cancelled half-way."""
        with trio.CancelScope(shield=True):
            try:
                if self._linked:
                    await self.flush()
            except EngineError as error:
                log.warning("a part of an ingest is lost digest=%s error=%s", self._record.digest, error.message)
            finally:
                os.close(self._fd)
                self._content.closed(self._record.digest)

    def _wake(self) -> None:
        grown, self._grown = self._grown, trio.Event()
        grown.set()


def _open_to_append(path: Path, length: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, length)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_all(fd: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, position)
        position += count
        view = view[count:]


def _hash(fd: int, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    position = 0
    while data := os.pread(fd, WRITE_BYTES, position):
        digest.update(data)
        position += len(data)
    return digest.hexdigest()


def _sync(fd: int, directory: Path | None) -> None:
    durable.sync_file(fd)
    if directory is not None:
        durable.sync_directory(directory)
    # It has been read by its layer's worker, or will be once: the cache is better used by applications.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _unlink(path: Path) -> None:
    durable.step("unlink")
    path.unlink(missing_ok=True)
