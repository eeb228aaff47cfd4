"""The tar of an unpacked layer, read at any offset: what deltas are applied to.

Theory
------
A tar-split's records in order are the tar: bytes that stand in no file, and files. Their lengths give every offset:

    tar      |  run of segments  |  file  |  run  |  file  | ...        `_starts`: where each begins
    store    |  the run's bytes  |  path  |  run  |  path  | ...        `_places`: where it is in the store

so a range of the tar is pieces of runs, which are kept in memory, and pieces of files, which are read from the layer's
directory. Headers of tars are mostly zeros and much alike: the store is compressed in blocks, a thirtieth of
the 512 bytes and more that an entry has. What is held of a layer of 20,000 files is some 2 MB.

A layer is looked at when the delta first asks for something of it: most deltas read one or two of a base's layers. What
is read is not checked here; the digest of what is made of it is.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
import struct
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import zstandard

from balenapy.core import tarsplit
from balenapy.errors import DataLoss
from balenapy.linux import syscalls
from balenapy.worker import process
from balenapy.worker.extract import OVERLAY_OPAQUE
from balenapy.worker.splitfile import NAME, read_records
from delta.errors import WrongBase
from delta.tarmembers import Member, scan

STORE_BLOCK_BYTES = 32 << 10
STORE_CACHED_BLOCKS = 8  # of each layer
FOREIGN_LINE_BYTES = 16 << 20
_FILE = struct.Struct("<QII")  # size, CRC-32, length of the path that follows
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME  # reading a base writes nothing to the card
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Store:
    """Bytes that are appended and read again at any place, compressed in blocks."""

    def __init__(self) -> None:
        self.size = 0
        self._blocks: list[bytes] = []
        self._tail = bytearray()
        self._cached: dict[int, bytes] = {}
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()

    def append(self, data: bytes) -> None:
        self._tail += data
        self.size += len(data)
        while len(self._tail) >= STORE_BLOCK_BYTES:
            self._blocks.append(self._compressor.compress(self._tail[:STORE_BLOCK_BYTES]))
            del self._tail[:STORE_BLOCK_BYTES]

    def read(self, position: int, length: int) -> bytes:
        """A range that is there."""
        number, at = divmod(position, STORE_BLOCK_BYTES)
        data = self._block(number)[at : at + length]
        if len(data) == length:
            return data
        parts = [data]
        missing = length - len(data)
        while missing:
            number += 1
            parts.append(self._block(number)[:missing])
            missing -= len(parts[-1])
        return b"".join(parts)

    def _block(self, number: int) -> bytes:
        if number == len(self._blocks):
            return bytes(self._tail)
        block = self._cached.get(number)
        if block is None:
            block = self._decompressor.decompress(self._blocks[number])
            if len(self._cached) >= STORE_CACHED_BLOCKS:
                del self._cached[next(iter(self._cached))]
            self._cached[number] = block
        return block


class UnpackedTar:
    """One layer. Opened before the process is confined, looked at afterwards."""

    def __init__(self, directory: str, split: str = "") -> None:
        """
        Args:
            split: the tar-split of another engine, a file; `directory` is then that of the layer's files.
        Raises: DataLoss, when it is not there.
        """
        self._foreign = bool(split)
        try:
            self._split = os.open(split or os.path.join(directory, NAME), os.O_RDONLY | os.O_CLOEXEC)
            self._root = os.open(directory if split else os.path.join(directory, "diff"), _DIRECTORY)
        except OSError as error:
            raise DataLoss(f"base layer: {process.describe(error)}") from error
        try:
            self._displaced = os.open(os.path.join(directory, "displaced"), _DIRECTORY)
        except FileNotFoundError:
            self._displaced = -1
        self._store: Store | None = None
        self._starts = array("q")
        self._places = array("q")
        self._total = 0
        self._members: array[int] | None = None
        self._open: tuple[int, int] = (-1, -1)  # (piece, descriptor) of the file that was read last

    @property
    def total(self) -> int:
        """The tar's length."""
        self._index()
        return self._total

    def _index(self) -> Store:
        """Read the tar-split. Raises: DataLoss."""
        if self._store is not None:
            return self._store
        store = Store()
        total = run_bytes = 0
        records = foreign_records(self._split) if self._foreign else read_records(self._split)
        for record in records:
            if isinstance(record, tarsplit.File):
                if not run_bytes:
                    self._starts.append(total)
                    self._places.append(store.size)
                self._starts.append(total)
                self._places.append(store.size)
                store.append(_FILE.pack(record.size, record.crc, len(record.path)) + record.path)
                total += record.size
                run_bytes = 0
            elif record.raw:
                if not run_bytes:
                    self._starts.append(total)
                    self._places.append(store.size)
                run_bytes += len(record.raw)
                store.append(record.raw)
                total += len(record.raw)
        self._store, self._total = store, total
        return store

    def pread(self, offset: int, length: int) -> bytes:
        """That range of the tar; less at its end.

        Raises: DataLoss, when a file of the layer is gone or shorter than it was.
        """
        store = self._index()
        length = min(length, self._total - offset)
        if length <= 0:
            return b""
        piece = bisect_right(self._starts, offset) - 1
        parts = []
        while True:
            start = self._starts[piece]
            end = self._starts[piece + 1] if piece + 1 < len(self._starts) else self._total
            take = min(length, end - offset)
            if take:
                if piece & 1:
                    parts.append(self._read_file(store, piece, offset - start, take))
                else:
                    parts.append(store.read(self._places[piece] + offset - start, take))
                length -= take
                offset += take
            if not length:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            piece += 1

    def _read_file(self, store: Store, piece: int, offset: int, length: int) -> bytes:
        if self._open[0] != piece:
            if self._open[1] >= 0:
                os.close(self._open[1])
            self._open = -1, -1
            self._open = piece, self._open_file(store, self._places[piece])
        data = os.pread(self._open[1], length, offset)
        while len(data) < length:
            more = os.pread(self._open[1], length - len(data), offset + len(data))
            if not more:
                raise DataLoss("base layer: a file is shorter than it was")
            data += more
        return data

    def _open_file(self, store: Store, place: int) -> int:
        size, crc, path_length = _FILE.unpack(store.read(place, _FILE.size))
        path = store.read(place + _FILE.size, path_length)
        try:
            if self._displaced >= 0:
                try:
                    return os.open(tarsplit.displaced_name(size, crc), _READ, dir_fd=self._displaced)
                except FileNotFoundError:
                    pass
            # Its root is not ours: no link of the layer and no `..` may lead out of it.
            return syscalls.open_in_root(self._root, path, _READ)
        except OSError as error:
            raise DataLoss(f"base layer: {process.show(path)}: {process.describe(OSError(error.errno, ''))}") from error

    # --- members, as deltas count them

    def __len__(self) -> int:
        return len(self._places_of_members()) // 3

    def member(self, ordinal: int) -> Member:
        places = self._places_of_members()
        return Member(*places[3 * ordinal : 3 * ordinal + 3])

    def members(self) -> list[Member]:
        return [self.member(ordinal) for ordinal in range(len(self))]

    def _places_of_members(self) -> array[int]:
        if self._members is None:
            found = array("q")
            for member in scan(self.pread, self.total):
                found.extend(member)
            self._members = found
        return self._members


def foreign_records(fd: int) -> Iterator[tarsplit.Record]:
    """The records of a `tar-split.json.gz` of dockerd or balena-engine; closes it. Its checksums are left aside.

    Raises: DataLoss.
    """
    try:
        for line in _lines(fd):
            entry = json.loads(line)
            if entry["type"] == 2:
                yield tarsplit.Segment(base64.b64decode(entry.get("payload") or ""))
            elif entry.get("size"):
                raw = entry.get("name_raw")
                path = base64.b64decode(raw) if raw else str(entry["name"]).encode()
                yield tarsplit.File(int(entry["size"]), 0, path)
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise DataLoss(f"base layer: tar-split.json.gz: {error}") from error
    finally:
        os.close(fd)


def _lines(fd: int) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(31)
    pending = b""
    while data := os.read(fd, 64 << 10):
        while data:
            pending += decompressor.decompress(data, 1 << 20)
            data = decompressor.unconsumed_tail
            *lines, pending = pending.split(b"\n")
            yield from filter(None, lines)
            if len(pending) > FOREIGN_LINE_BYTES:
                raise DataLoss("base layer: tar-split.json.gz: a line is too long")
    if not decompressor.eof:
        raise DataLoss("base layer: tar-split.json.gz ends too early")
    if pending:
        yield pending


class LayerFiles:
    """The regular files one sees when layers lie over each other, by path: the base of tar-diffs."""

    def __init__(self, directories: Sequence[str]) -> None:
        """Directories of files, lowest layer first. Raises: DataLoss, when one is not there."""
        try:
            self._roots = [os.open(directory, _DIRECTORY) for directory in directories]
        except OSError as error:
            raise DataLoss(f"base layer: {process.describe(error)}") from error
        self._open: tuple[bytes, int] = (b"", -1)

    def size(self, path: bytes) -> int:
        return os.fstat(self._descriptor(path)).st_size

    def read(self, path: bytes, offset: int, length: int) -> bytes:
        """Exactly that range. Raises: WrongBase."""
        data = os.pread(self._descriptor(path), length, offset)
        if len(data) != length:
            raise WrongBase(f"tar-diff: {process.show(path)} has no {length} bytes at {offset}")
        return data

    def _descriptor(self, path: bytes) -> int:
        if self._open[0] != path:
            if self._open[1] >= 0:
                os.close(self._open[1])
            self._open = b"", -1
            try:
                fd = self._open_file(path)
            except (OSError, ValueError) as error:
                raise WrongBase(f"tar-diff: the base has no file {process.show(path)}") from error
            self._open = path, fd
        return self._open[1]

    def _open_file(self, path: bytes) -> int:
        """Raises: OSError, ValueError."""
        for root in reversed(self._roots):
            if self._is_file(root, path):
                return syscalls.open_in_root(root, path, _READ)
            if self._hides(root, path):
                break
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    @staticmethod
    def _is_file(root: int, path: bytes) -> bool:
        """Paths come from the delta: nothing but a file is opened, since opening a device may do something."""
        try:
            fd = syscalls.open_in_root(root, path, os.O_PATH | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return False
            raise
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode)
        finally:
            os.close(fd)

    @staticmethod
    def _hides(root: int, path: bytes) -> bool:
        """Whether a layer that has no such file keeps lower ones from showing theirs."""
        end = 0
        while end >= 0:
            end = path.find(b"/", end + 1)
            try:
                fd = syscalls.open_in_root(root, path if end < 0 else path[:end], _DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:
                return False
            except OSError:
                return True  # a whiteout, or something that is no directory
            try:
                if os.getxattr(fd, OVERLAY_OPAQUE) == b"y":
                    return True
            except OSError:
                pass  # it has none
            finally:
                os.close(fd)
        return True  # a directory where the file would be
