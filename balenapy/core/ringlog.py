"""The ring file: a container's newest output in one preallocated file that never grows.

    header (4 KiB, written once)   magic, version, block size, block count, checksum
    block 0 .. count-1             each: a head, then records; what follows the last record is rubbish

Blocks are numbered for ever, from 1; block n lies at place n % count. Entering block n overwrites block n - count, the
oldest. A head holds the number, and the sequence number and time of the first record behind it, so that the newest
block, or the one that holds a sequence number, is found by reading heads alone. A record lies within one block. It has
a sequence number, a time, a kind, its length and a CRC-32 over all of that and the data, and begins with a mark by
which a reader that met damage finds the next sound one. A record is believed when its CRC fits and its number is above
the one before: the leavings of an older lap have smaller ones.

Records are of three sorts: *text*, some whole lines as conmon writes them (core/conmonlog.py), at most `TEXT_MAX_BYTES`
unless one line is longer, which bounds what damage costs; a *checkpoint*, which says up to which byte of which spool
file everything is in the ring; and the *end* of a run. The text is copied as it is and parsed when it is read, so that
taking over output costs next to nothing however fast a container writes. A batch is text and a checkpoint behind it:
after a crash the writer goes back to the last checkpoint (`Writer.rewind`) if that spool still exists, takes the rest
from it once more, and so loses nothing and doubles nothing.

Caveats: order is that of sequence numbers; times may go backwards (no clock at boot). CRC-32 is zlib's: Python has no
fast CRC-32C.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from balenapy.core.conmonlog import STDERR, STDOUT, TIME_SIZE, count_lines, parse_time, split_line
from balenapy.errors import DataLoss

HEADER_SIZE = 4096
BLOCK_SIZE = 16 << 10
MIN_BLOCKS = 4
VERSION = 1
ENTRY_MAX_BYTES = 16 << 10  # docker splits longer lines: `logs` shows entries of at most this size

TEXT_MAX_BYTES = 4096

TEXT = 1
CHECKPOINT = 2
RUN_END = 3

_MAGIC = b"balenapy ring\n\0\0"
_FILE_HEADER = Struct("<16sIIIQ")  # magic, version, block size, block count, created; then CRC-32
_CRC = Struct("<I")
_BLOCK_MAGIC = b"BLK1"
_HEAD = Struct("<I4sQQQ")  # CRC-32 of the rest, magic, number, first sequence number, time of the first record
_RECORD_MAGIC = b"\xb1\x06"
_RECORD = Struct("<I2sBxHxxQQ")  # CRC-32 of the rest and the data, magic, kind, length, sequence number, time
_POSITION = Struct("<QQ")  # inode, offset

Read = Callable[[int, int], bytes]  # (offset, size) -> bytes of the file, fewer at its end


@dataclass(frozen=True, slots=True)
class Geometry:
    block_count: int
    block_size: int = BLOCK_SIZE
    created_ns: int = 0

    @classmethod
    def for_size(cls, size_bytes: int, created_ns: int = 0) -> Geometry:
        """The largest ring within `size_bytes`, but never below the smallest possible."""
        return cls(max(MIN_BLOCKS, (size_bytes - HEADER_SIZE) // BLOCK_SIZE), BLOCK_SIZE, created_ns)

    @property
    def file_size(self) -> int:
        return HEADER_SIZE + self.block_count * self.block_size

    def offset(self, number: int) -> int:
        return HEADER_SIZE + number % self.block_count * self.block_size

    def header(self) -> bytes:
        """The file's first bytes."""
        packed = _FILE_HEADER.pack(_MAGIC, VERSION, self.block_size, self.block_count, self.created_ns)
        return packed + _CRC.pack(zlib.crc32(packed))

    @classmethod
    def parse(cls, header: bytes) -> Geometry:
        """Raises: DataLoss when this is no ring, a damaged one, or one of a later version."""
        size = _FILE_HEADER.size
        if len(header) < size + _CRC.size or header[:16] != _MAGIC:
            raise DataLoss("not a ring log")
        if _CRC.unpack_from(header, size)[0] != zlib.crc32(header[:size]):
            raise DataLoss("the header of the ring log is damaged")
        _, version, block_size, block_count, created_ns = _FILE_HEADER.unpack_from(header)
        if version != VERSION:
            raise DataLoss(f"ring log of version {version}, this engine knows {VERSION}")
        if not 512 <= block_size <= 1 << 16 or not 2 <= block_count <= 1 << 24:
            raise DataLoss("the header of the ring log is damaged")
        return cls(block_count, block_size, created_ns)


@dataclass(frozen=True, slots=True)
class Record:
    seq: int
    time_ns: int
    kind: int
    data: bytes
    end: int  # offset in its block of what lies behind it


@dataclass(frozen=True, slots=True)
class SpoolPosition:
    """Up to where a spool file was taken over."""

    inode: int
    offset: int


@dataclass(frozen=True, slots=True)
class Position:
    """Where the next record goes."""

    number: int  # of the block; 0: nothing was written yet
    offset: int  # in the block
    seq: int


@dataclass(frozen=True, slots=True)
class Head:
    number: int
    first_seq: int
    time_ns: int


# --- reading --------------------------------------------------------------------------------------------------


def parse_head(block: bytes) -> Head | None:
    if len(block) < _HEAD.size:
        return None
    crc, magic, number, first_seq, time_ns = _HEAD.unpack_from(block)
    if magic != _BLOCK_MAGIC or crc != zlib.crc32(block[4 : _HEAD.size]):
        return None
    return Head(number, first_seq, time_ns)


def scan_block(block: bytes, after_seq: int) -> list[Record]:
    """The sound records with a number above `after_seq`."""
    records: list[Record] = []
    offset = _HEAD.size
    last_seq = after_seq
    unpack, size, limit = _RECORD.unpack_from, _RECORD.size, len(block) - _RECORD.size
    while offset <= limit:
        crc, magic, kind, length, seq, time_ns = unpack(block, offset)
        stop = offset + size + length
        if (
            magic == _RECORD_MAGIC
            and stop <= len(block)
            and seq > last_seq
            and crc == zlib.crc32(block[offset + 4 : stop])
        ):
            records.append(Record(seq, time_ns, kind, block[offset + size : stop], stop))
            last_seq = seq
            offset = stop
            continue
        found = block.find(_RECORD_MAGIC, offset + 5)
        if found < 0:
            break
        offset = found - 4
    return records


class Ring:
    """Reads a ring. What a writer changes under a read shows as damage, never as an error."""

    def __init__(self, read: Read, geometry: Geometry | None = None) -> None:
        """Raises: DataLoss."""
        self._read = read
        self.geometry = geometry or Geometry.parse(read(0, HEADER_SIZE))

    def heads(self) -> dict[int, Head]:
        """By block number; the newest lap only. A block whose head is damaged is missing."""
        geometry = self.geometry
        found = {}
        for index in range(geometry.block_count):
            head = parse_head(self._read(HEADER_SIZE + index * geometry.block_size, _HEAD.size))
            if head is not None and head.number % geometry.block_count == index:
                found[head.number] = head
        newest = max(found, default=0)
        # The newest block of all may be the one whose head is damaged.
        block = self._read(geometry.offset(newest + 1), geometry.block_size)
        if parse_head(block) is None:
            before = self.read_block(newest) if newest else []
            records = scan_block(block, before[-1].seq if before else 0)
            if records and (newest or records[0].seq == 1):
                newest += 1
                found[newest] = Head(newest, records[0].seq, records[0].time_ns)
        return {number: head for number, head in sorted(found.items()) if number > newest - geometry.block_count}

    def newest_number(self) -> int:
        """0 when nothing was written yet."""
        return max(self.heads(), default=0)

    def newest_after(self, number: int) -> int:
        """The newest block now, when `number` was it before: cheaper than `newest_number`."""
        while True:
            head = parse_head(self._read(self.geometry.offset(number + 1), _HEAD.size))
            if head is None or head.number <= number:
                return number
            if head.number > number + 1:  # a lap later
                return self.newest_number()
            number += 1

    def oldest_number(self, newest: int) -> int:
        return max(1, newest - self.geometry.block_count + 1)

    def read_block(self, number: int, after_seq: int = 0) -> list[Record]:
        """The records of a block with numbers above `after_seq`; none when a newer block lies there by now."""
        block = self._read(self.geometry.offset(number), self.geometry.block_size)
        head = parse_head(block)
        if head is not None:
            if head.number != number:
                return []
            after_seq = max(after_seq, head.first_seq - 1)
        return scan_block(block, after_seq)

    def end(self) -> Position:
        """Where a writer goes on."""
        heads = self.heads()
        number = max(heads, default=0)
        if number == 0:
            return Position(0, self.geometry.block_size, 1)
        block = self._read(self.geometry.offset(number), self.geometry.block_size)
        records = scan_block(block, heads[number].first_seq - 1)
        if not records:
            return Position(number, _HEAD.size, heads[number].first_seq)
        return Position(number, records[-1].end, records[-1].seq + 1)

    def last_checkpoint(self) -> tuple[SpoolPosition, Position] | None:
        """The last checkpoint and where the record behind it goes."""
        newest = self.newest_number()
        for number in range(newest, self.oldest_number(newest) - 1, -1):
            block = self._read(self.geometry.offset(number), self.geometry.block_size)
            head = parse_head(block)
            if head is None or head.number != number:
                continue
            for record in reversed(scan_block(block, head.first_seq - 1)):
                if record.kind == CHECKPOINT and len(record.data) == _POSITION.size:
                    position = SpoolPosition(*_POSITION.unpack(record.data))
                    return position, Position(number, record.end, record.seq + 1)
        return None

    def start_of_tail(self, entries: int) -> tuple[int, int]:
        """Where to begin in order to see at least the last `entries` lines: (block number, sequence number before)."""
        newest = self.newest_number()
        if newest == 0:
            return 1, 0
        oldest = self.oldest_number(newest)
        seen = 0
        for number in range(newest, oldest - 1, -1):
            seen += sum(count_lines(record.data) for record in self.read_block(number) if record.kind == TEXT)
            # One line may begin in an earlier block, and a last one may not be ended.
            if seen > entries + 1:
                return number, 0
        return oldest, 0


# --- joining --------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """What `logs` shows as one: a line with its newline, or a part of a long one, or a last one without."""

    stamp: bytes  # as conmon wrote it: RFC 3339 with nanoseconds and an offset
    stream: int
    data: bytes


class Joiner:
    """Records -> entries, as the reference engine's copier cuts them. Pieces of a line are joined first."""

    def __init__(self) -> None:
        self._held: dict[int, bytearray] = {STDOUT: bytearray(), STDERR: bytearray()}
        self._stamps: dict[int, bytes] = {}  # of a line that is longer than one entry: all its parts bear it
        self._last = b""

    def feed(self, record: Record) -> list[Entry]:
        if record.kind == TEXT:
            entries: list[Entry] = []
            for line in record.data.split(b"\n"):
                parts = split_line(line)
                if parts is not None:
                    self._add(entries, *parts)
            return entries
        return self.flush() if record.kind == RUN_END else []

    def flush(self) -> list[Entry]:
        """What is left of lines that were never ended."""
        entries = []
        for stream, held in self._held.items():
            if held:
                entries.append(Entry(self._stamps.get(stream, self._last), stream, bytes(held)))
                held.clear()
        self._stamps.clear()
        return entries

    def _add(self, entries: list[Entry], stamp: bytes, stream: int, ends_line: bool, data: bytes) -> None:
        held = self._held[stream]
        if ends_line and not held and len(data) < ENTRY_MAX_BYTES and not self._stamps:
            entries.append(Entry(stamp, stream, data + b"\n"))
            return
        self._last = stamp
        held += data
        while len(held) >= ENTRY_MAX_BYTES:
            entries.append(Entry(self._stamps.setdefault(stream, stamp), stream, bytes(held[:ENTRY_MAX_BYTES])))
            del held[:ENTRY_MAX_BYTES]
        if ends_line:
            entries.append(Entry(self._stamps.pop(stream, stamp), stream, bytes(held) + b"\n"))
            held.clear()


# --- writing --------------------------------------------------------------------------------------------------


class Writer:
    """Decides where bytes go. `take` hands over what is to be written, in this order, in one go."""

    def __init__(self, geometry: Geometry, position: Position | None = None) -> None:
        self.geometry = geometry
        at = position or Position(0, geometry.block_size, 1)
        self._number, self._offset, self._seq = at.number, at.offset, at.seq
        self._writes: list[tuple[int, bytes]] = []
        self._buffer = bytearray()
        self._buffer_offset = geometry.offset(at.number) + at.offset
        self._last_ns = 0

    @property
    def position(self) -> Position:
        return Position(self._number, self._offset, self._seq)

    def append_text(self, data: bytes) -> None:
        """Whole lines, each with its newline. A line that fits into no block is cut off."""
        size, block_size = _RECORD.size, self.geometry.block_size
        longest = block_size - _HEAD.size - size
        start, end = 0, len(data)
        while start < end:
            room = block_size - self._offset - size
            stop = data.rfind(b"\n", start, start + max(0, min(room, TEXT_MAX_BYTES))) + 1
            if stop <= start:  # the next line is longer than that
                stop = data.find(b"\n", start) + 1 or end
                if stop - start > room:
                    if self._offset > _HEAD.size or self._number == 0:
                        self._enter_block(self._time_of(data, start))
                        continue
                    self._append(self._time_of(data, start), TEXT, data[start : start + longest])
                    start = stop
                    continue
            self._append(self._time_of(data, start), TEXT, data[start:stop])
            start = stop

    def append_checkpoint(self, position: SpoolPosition) -> None:
        self._append_mark(CHECKPOINT, _POSITION.pack(position.inode, position.offset))

    def append_run_end(self) -> None:
        """What follows belongs to another run: a line without end is not continued there."""
        self._append_mark(RUN_END, b"")

    def take(self) -> list[tuple[int, bytes]]:
        """(offset in the file, bytes) of all that was appended since."""
        self._cut()
        writes, self._writes = self._writes, []
        return writes

    def rewind(self, to: Position, end: Position) -> None:
        """Forget what was appended behind `to`, up to `end`."""
        geometry = self.geometry
        self._writes, self._buffer = [], bytearray()
        last = end.offset if end.number == to.number else geometry.block_size
        if last > to.offset:
            self._writes.append((geometry.offset(to.number) + to.offset, bytes(last - to.offset)))
        for number in range(to.number + 1, end.number + 1):
            self._writes.append((geometry.offset(number), bytes(geometry.block_size)))
        self._number, self._offset, self._seq = to.number, to.offset, to.seq
        self._buffer_offset = geometry.offset(to.number) + to.offset

    def _time_of(self, data: bytes, start: int) -> int:
        found = parse_time(data[start : start + TIME_SIZE])
        if found is not None:
            self._last_ns = found
        return self._last_ns

    def _append_mark(self, kind: int, data: bytes) -> None:
        if self.geometry.block_size - self._offset < _RECORD.size + len(data):
            self._enter_block(self._last_ns)
        self._append(self._last_ns, kind, data)

    def _append(self, time_ns: int, kind: int, data: bytes) -> None:
        rest = _RECORD.pack(0, _RECORD_MAGIC, kind, len(data), self._seq, time_ns)[4:]
        self._buffer += _CRC.pack(zlib.crc32(data, zlib.crc32(rest)))
        self._buffer += rest
        self._buffer += data
        self._offset += _RECORD.size + len(data)
        self._seq += 1

    def _enter_block(self, time_ns: int) -> None:
        self._cut()
        self._number += 1
        self._offset = _HEAD.size
        self._buffer_offset = self.geometry.offset(self._number)
        rest = _HEAD.pack(0, _BLOCK_MAGIC, self._number, self._seq, time_ns)[4:]
        self._buffer += _CRC.pack(zlib.crc32(rest)) + rest

    def _cut(self) -> None:
        if self._buffer:
            self._writes.append((self._buffer_offset, bytes(self._buffer)))
            self._buffer_offset += len(self._buffer)
            self._buffer = bytearray()
