"""The ring file: a container's newest output in one preallocated file that never grows.

    header (4 KiB, written once)   magic, version, block size, block count, checksum
    block 0 .. count-1             each: a head, then records; what follows the last record is rubbish

Blocks are numbered for ever, from 1; block n lies at place n % count. Entering block n overwrites block n - count, the
oldest. A head holds the number, and the sequence number and time of the first record behind it, so that the newest
block, or the one that holds a sequence number, is found by reading heads alone. A record lies within one block: what
does not fit is split, and the part in front does not end its line. Each record has a sequence number, a time, a kind,
its length and a CRC-32 over all of that and the data, and begins with a mark by which a reader that met damage
finds the next sound one. A record is believed when its CRC fits and its number is above the one before: the leavings
of an older lap have smaller ones.

Records are of three sorts: a piece of stdout or stderr (ending its line or not); a *checkpoint*, which says up to which
byte of which spool file everything is in the ring; and the *end* of a run. A batch is records and a checkpoint behind
them: after a crash the writer goes back to the last checkpoint (`Writer.rewind`) if that spool still exists, takes the
rest from it once more, and so loses nothing and doubles nothing.

Caveats: order is that of sequence numbers; times may go backwards (no clock at boot). CRC-32 is zlib's: Python has no
fast CRC-32C.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct

from balenapy.errors import DataLoss

HEADER_SIZE = 4096
BLOCK_SIZE = 16 << 10
MIN_BLOCKS = 4
VERSION = 1
ENTRY_MAX_BYTES = 16 << 10  # docker splits longer lines; logs shows entries of at most this size

STDOUT, STDERR = 1, 2
LINE_END = 0x04  # the piece was followed by a newline, which is not stored
_STREAM_MASK = 0x03
CHECKPOINT = 0x10
RUN_END = 0x20

_MAGIC = b"balenapy ring\n\0\0"
_FILE_HEADER = Struct("<16sIIIQ")  # magic, version, block size, block count, created; then CRC-32
_CRC = Struct("<I")
_BLOCK_MAGIC = b"BLK1"
_HEAD = Struct("<I4sQQQ")  # CRC-32 of the rest, magic, number, first sequence number, time of the first record
_RECORD_MAGIC = b"\xb1\x06"
_RECORD = Struct("<I2sBxHxxQQ")  # CRC-32 of the rest and the data, magic, kind, length, sequence number, time
_POSITION = Struct("<QQ")  # inode, offset

_PAYLOAD_MIN = 64  # do not begin a record in a block's last bytes for less

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
        if not 512 <= block_size <= 1 << 20 or not 2 <= block_count <= 1 << 24:
            raise DataLoss("the header of the ring log is damaged")
        return cls(block_count, block_size, created_ns)


@dataclass(frozen=True, slots=True)
class Record:
    seq: int
    time_ns: int
    kind: int
    data: bytes
    end: int  # offset in its block of what lies behind it

    @property
    def stream(self) -> int:
        """STDOUT, STDERR, or 0 for a checkpoint or an end."""
        return self.kind & _STREAM_MASK

    @property
    def ends_line(self) -> bool:
        return bool(self.kind & LINE_END)


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
            for record in self.read_block(number):
                seen += record.stream != 0 and record.ends_line
            # One line may begin in an earlier block, and a last one may not be ended.
            if seen > entries + 1:
                return number, 0
        return oldest, 0


# --- joining --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """What `logs` shows as one: a line with its newline, or a part of a long one, or a last one without."""

    time_ns: int
    stream: int
    data: bytes


class Joiner:
    """Pieces of lines -> entries, as the reference engine's copier cuts them."""

    def __init__(self) -> None:
        self._parts: dict[int, bytearray] = {STDOUT: bytearray(), STDERR: bytearray()}
        self._times: dict[int, int] = {}  # of a line that was longer than one entry: all its parts bear it

    def feed(self, record: Record) -> Iterator[Entry]:
        stream = record.stream
        if stream == 0:
            if record.kind == RUN_END:
                yield from self.flush(record.time_ns)
            return
        if stream not in self._parts:
            return
        held = self._parts[stream]
        if not held and record.ends_line and len(record.data) < ENTRY_MAX_BYTES and stream not in self._times:
            yield Entry(record.time_ns, stream, record.data + b"\n")
            return
        held += record.data
        while len(held) >= ENTRY_MAX_BYTES:
            time_ns = self._times.setdefault(stream, record.time_ns)
            yield Entry(time_ns, stream, bytes(held[:ENTRY_MAX_BYTES]))
            del held[:ENTRY_MAX_BYTES]
        if record.ends_line:
            yield Entry(self._times.pop(stream, record.time_ns), stream, bytes(held) + b"\n")
            held.clear()

    def flush(self, time_ns: int) -> Iterator[Entry]:
        """What is left of lines that were never ended."""
        for stream, held in self._parts.items():
            if held:
                yield Entry(self._times.get(stream, time_ns), stream, bytes(held))
                held.clear()
        self._times.clear()


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

    @property
    def position(self) -> Position:
        return Position(self._number, self._offset, self._seq)

    def append(self, time_ns: int, kind: int, data: bytes) -> None:
        """One record, split where a block ends."""
        size, block_size = _RECORD.size, self.geometry.block_size
        while True:
            room = block_size - self._offset - size
            if len(data) > room and room < min(_PAYLOAD_MIN, len(data)):
                self._enter_block(time_ns)
                continue
            piece = data[:room]
            last = len(piece) == len(data)
            piece_kind = kind if last else kind & ~LINE_END
            rest = _RECORD.pack(0, _RECORD_MAGIC, piece_kind, len(piece), self._seq, time_ns)[4:]
            self._buffer += _CRC.pack(zlib.crc32(piece, zlib.crc32(rest)))
            self._buffer += rest
            self._buffer += piece
            self._offset += size + len(piece)
            self._seq += 1
            if last:
                return
            data = data[room:]

    def append_checkpoint(self, position: SpoolPosition, time_ns: int) -> None:
        self.append(time_ns, CHECKPOINT, _POSITION.pack(position.inode, position.offset))

    def append_run_end(self, time_ns: int) -> None:
        """What follows belongs to another run: a line without end is not continued there."""
        self.append(time_ns, RUN_END, b"")

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
