"""The ring file: a container's newest output in one preallocated file that never grows.

    header (4 KiB, written once)   magic, version, block size, block count, time of creation, checksum
    block 0 .. count-1             each: a head, then records; what follows the last record is rubbish

Blocks are numbered for ever, from 1; block n lies at place n % count. Entering block n overwrites block n - count, the
oldest. A head holds the number, the sequence number and time of the first record behind it, the latest time of all
records before it, and how many lines those had. All but the time grow with the number, whatever the clock did, so the
newest block, the one that holds a sequence number and the first that may hold something later than a moment are found
by bisection over heads. A record lies within one block. It has a sequence number, a time, a kind, its length and a
CRC-32C over all of that and the data, and begins with a mark by which a reader that met damage finds the next sound
one. A record is believed when its CRC fits and its number is above the one before: the leavings of an older lap have
smaller ones. A number that is missing was lost, and is shown as a gap.

Records are of these sorts: *text*, some whole lines as conmon writes them (core/conmonlog.py), at most `TEXT_MAX_BYTES`
unless one line is longer, which bounds what damage costs; *packed*, the same made shorter (core/logpack.py);
*compressed*, up to `COMPRESSED_MAX_BYTES` of lines in one zstd frame; *lost*, a number of bytes that were dropped on
the way; a *checkpoint*, which says up to which byte of which spool file everything is in the ring; and the *end* of a
run. Lines are parsed only when they are read, so that taking over output costs next to nothing however fast a container
writes. A batch is text and a checkpoint behind it: after a crash the writer goes back to the last checkpoint
(`Writer.rewind`) if that spool still exists, takes the rest from it once more, and so neither loses nor doubles any.

Caveat: order is that of sequence numbers; times may go backwards (no clock at boot).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from struct import Struct

from balenapy.core.checksum import crc32c
from balenapy.core.conmonlog import STAMP_END, TIME_SIZE, count_lines, parse_time
from balenapy.core.logpack import common_prefix, pack, unpack
from balenapy.errors import DataLoss

HEADER_SIZE = 4096
BLOCK_SIZE = 16 << 10
MIN_BLOCKS = 4
VERSION = 2

TEXT_MAX_BYTES = 4096
COMPRESSED_MAX_BYTES = 64 << 10
COMPRESSED_MIN_BYTES = 512  # less than this gains nothing

TEXT = 1
CHECKPOINT = 2
RUN_END = 3
PACKED = 4
COMPRESSED = 5
LOST = 6

_MAGIC = b"balenapy ring\n\0\0"
_FILE_HEADER = Struct("<16sIIIQ")  # magic, version, block size, block count, created; then the CRC
_CRC = Struct("<I")
_BLOCK_MAGIC = b"BLK2"
_HEAD = Struct("<I4sQQQQQ")  # CRC of the rest, magic, number, first sequence number, its time, latest and lines before
_RECORD_MAGIC = b"\xb1\x06"
_RECORD = Struct("<I2sBxHxxQQ")  # CRC of the rest and the data, magic, kind, length, sequence number, time
_POSITION = Struct("<QQ")  # inode, offset
_COUNT = Struct("<Q")

Read = Callable[[int, int], bytes]  # (offset, size) -> bytes of the file, fewer at its end
Codec = Callable[[bytes], bytes]  # compresses, or decompresses at most COMPRESSED_MAX_BYTES (raising ValueError)


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
        return packed + _CRC.pack(crc32c(packed))

    @classmethod
    def parse(cls, header: bytes) -> Geometry:
        """Raises: DataLoss when this is no ring, a damaged one, or one of another version."""
        size = _FILE_HEADER.size
        if len(header) < size + _CRC.size or header[:16] != _MAGIC:
            raise DataLoss("not a ring log")
        _, version, block_size, block_count, created_ns = _FILE_HEADER.unpack_from(header)
        if version != VERSION:
            raise DataLoss(f"ring log of version {version}, this engine knows {VERSION}")
        if _CRC.unpack_from(header, size)[0] != crc32c(header[:size]):
            raise DataLoss("the header of the ring log is damaged")
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

    @property
    def lost_bytes(self) -> int:
        """Of a record of that kind: how much was dropped."""
        return int(_COUNT.unpack_from(self.data)[0]) if len(self.data) >= _COUNT.size else 0


@dataclass(frozen=True, slots=True)
class SpoolPosition:
    """Up to where a spool file was taken over."""

    inode: int
    offset: int


@dataclass(frozen=True, slots=True)
class Position:
    """Where the next record goes, and what the next head will tell of all before it."""

    number: int  # of the block; 0: nothing was written yet
    offset: int  # in the block
    seq: int
    latest_ns: int = 0
    lines: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    number: int
    first_seq: int
    time_ns: int  # of the first record
    latest_ns: int  # of all records in the blocks before
    lines: int  # of all records in the blocks before


# --- reading --------------------------------------------------------------------------------------------------


def parse_head(block: bytes) -> Head | None:
    if len(block) < _HEAD.size:
        return None
    crc, magic, number, first_seq, time_ns, latest_ns, lines = _HEAD.unpack_from(block)
    if magic != _BLOCK_MAGIC or crc != crc32c(block[4 : _HEAD.size]):
        return None
    return Head(number, first_seq, time_ns, latest_ns, lines)


def scan_block(block: bytes, after_seq: int) -> list[Record]:
    """The sound records with a number above `after_seq`, as they were written."""
    records: list[Record] = []
    offset = _HEAD.size
    last_seq = after_seq
    unpack_from, size, limit = _RECORD.unpack_from, _RECORD.size, len(block) - _RECORD.size
    while offset <= limit:
        crc, magic, kind, length, seq, time_ns = unpack_from(block, offset)
        stop = offset + size + length
        if (
            magic == _RECORD_MAGIC
            and stop <= len(block)
            and seq > last_seq
            and crc == crc32c(block[offset + 4 : stop])
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


class _Damaged(Exception):
    """A head that bisection needs cannot be had."""


class Ring:
    """Reads a ring. What a writer changes under a read shows as damage, never as an error."""

    def __init__(self, read: Read, geometry: Geometry | None = None, decompress: Codec | None = None) -> None:
        """Raises: DataLoss."""
        self._read = read
        self._decompress = decompress
        self.geometry = geometry or Geometry.parse(read(0, HEADER_SIZE))

    def head(self, number: int) -> Head | None:
        """That of a block; None when it is damaged or of another block by now."""
        found = parse_head(self._read(self.geometry.offset(number), _HEAD.size))
        return found if found is not None and found.number == number else None

    def newest_number(self) -> int:
        """0 when nothing was written yet."""
        try:
            return self._bisect_newest()
        except _Damaged:
            return max(self._all_heads(), default=0)

    def _bisect_newest(self) -> int:
        """Raises: _Damaged."""
        count = self.geometry.block_count

        def number_at(place: int) -> int:  # 0: never written
            raw = self._read(self.geometry.offset(place + 1), _HEAD.size)
            found = parse_head(raw)
            if found is None:
                if any(raw):
                    raise _Damaged
                return 0
            if (found.number - 1) % count != place:
                raise _Damaged
            return found.number

        first = number_at(0)
        if first == 0:
            raise _Damaged  # empty, or zeroed by `Writer.rewind`
        low, high = 0, count  # place `low` is of the newest lap, `high` is not
        while high - low > 1:
            middle = (low + high) // 2
            found = number_at(middle)
            if found == first + middle:
                low = middle
            elif found < first:
                high = middle
            else:
                raise _Damaged
        if high < count and number_at(high) == 0 and any(self._read(self.geometry.offset(high + 1), 512)):
            raise _Damaged  # zeros where a head was, with records behind it
        return first + low

    def _all_heads(self) -> dict[int, Head]:
        """By block number; the newest lap only. A block whose head is damaged is missing, unless it is the newest."""
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
            known = found.get(newest, Head(0, 1, 0, 0, 0))
            after_seq = known.first_seq - 1
            # Above all before it, or these are the leavings of an older lap.
            before = scan_block(self._read(geometry.offset(newest), geometry.block_size), after_seq) if newest else []
            records = scan_block(block, before[-1].seq if before else after_seq)
            if records and (newest or records[0].seq == 1):
                newest += 1
                latest_ns = max(known.latest_ns, records[0].time_ns)
                found[newest] = Head(newest, records[0].seq, records[0].time_ns, latest_ns, known.lines)
        return {number: head for number, head in sorted(found.items()) if number > newest - geometry.block_count}

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
        """The records of a block with numbers above `after_seq`, texts in the long form.

        No records when a newer block lies there by now. A text that cannot be made long again is missing, as damage.
        """
        block = self._read(self.geometry.offset(number), self.geometry.block_size)
        head = parse_head(block)
        if head is not None:
            if head.number != number:
                return []
            after_seq = max(after_seq, head.first_seq - 1)
        records = []
        for record in scan_block(block, after_seq):
            if record.kind in (PACKED, COMPRESSED):
                try:
                    text = unpack(record.data) if record.kind == PACKED else self._long(record.data)
                except ValueError:
                    continue
                record = replace(record, kind=TEXT, data=text)
            records.append(record)
        return records

    def _long(self, data: bytes) -> bytes:
        if self._decompress is None:
            raise ValueError("nothing here decompresses")
        return self._decompress(data)

    def end(self) -> Position:
        """Where a writer goes on."""
        number = self.newest_number()
        if number == 0:
            return Position(0, self.geometry.block_size, 1)
        head = self.head(number) or self._all_heads().get(number) or Head(number, 1, 0, 0, 0)
        records = scan_block(self._read(self.geometry.offset(number), self.geometry.block_size), head.first_seq - 1)
        latest_ns, lines = head.latest_ns, head.lines
        for record in self.read_block(number):
            latest_ns = max(latest_ns, record.time_ns)
            if record.kind == TEXT:
                latest_ns = max(latest_ns, _latest_of(record.data))
                lines += record.data.count(b"\n")
        if not records:
            return Position(number, _HEAD.size, head.first_seq, latest_ns, lines)
        return Position(number, records[-1].end, records[-1].seq + 1, latest_ns, lines)

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
                    latest_ns = max(head.latest_ns, record.time_ns)
                    return position, Position(number, record.end, record.seq + 1, latest_ns, head.lines)
        return None

    def start_of_tail(self, entries: int) -> int:
        """The block in which to begin in order to see at least the last `entries` lines. Reads those blocks only."""
        newest = self.newest_number()
        oldest = self.oldest_number(newest)
        seen = 0
        for number in range(newest, oldest - 1, -1):
            seen += sum(count_lines(record.data) for record in self.read_block(number) if record.kind == TEXT)
            # One line may begin in an earlier block, and a last one may not be ended.
            if seen > entries + 1:
                return number
        return max(1, oldest)

    def start_of_time(self, time_ns: int, newest: int) -> int:
        """The first block that may hold something of that time or later; by bisection."""
        oldest = self.oldest_number(newest)
        low, high = oldest, newest
        while low < high:
            middle = (low + high) // 2
            head = self.head(middle + 1)  # tells of all up to `middle`
            if head is None:
                return low  # too early does no harm
            if head.latest_ns >= time_ns:
                high = middle
            else:
                low = middle + 1
        return low


# --- writing --------------------------------------------------------------------------------------------------


def _latest_of(lines: bytes) -> int:
    """The latest time of some of conmon's lines, or a little more; 0 when they have none."""
    stamp = lines[:TIME_SIZE]
    last = lines[lines.rfind(b"\n", 0, -1) + 1 :][:TIME_SIZE]
    shared = common_prefix(stamp, last)[:STAMP_END]
    if len(shared) >= 20 and lines.count(b"\n" + shared) + 1 == lines.count(b"\n"):
        latest = shared.ljust(STAMP_END, b"9") + stamp[STAMP_END:]
    else:
        latest = max(line[:TIME_SIZE] for line in lines.split(b"\n"))
    return parse_time(latest) or 0


class Writer:
    """Decides where bytes go. `take` hands over what is to be written, in this order, in one go."""

    def __init__(self, geometry: Geometry, position: Position | None = None, compress: Codec | None = None) -> None:
        self.geometry = geometry
        self._compress = compress
        at = position or Position(0, geometry.block_size, 1)
        self._number, self._offset, self._seq = at.number, at.offset, at.seq
        self._latest_ns, self._lines = at.latest_ns, at.lines
        self._writes: list[tuple[int, bytes]] = []
        self._buffer = bytearray()
        self._buffer_offset = geometry.offset(at.number) + at.offset
        self._last_ns = 0

    @property
    def position(self) -> Position:
        return Position(self._number, self._offset, self._seq, self._latest_ns, self._lines)

    def append_text(self, data: bytes) -> None:
        """Whole lines, each with its newline. A line that fits into no block is cut off."""
        size, block_size = _RECORD.size, self.geometry.block_size
        longest = block_size - _HEAD.size - size
        start, end = 0, len(data)
        while start < end:
            if self._compress is not None and end - start >= COMPRESSED_MIN_BYTES:
                taken = self._append_compressed(data, start)
                if taken:
                    start += taken
                    continue
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
            self._append_lines(data[start:stop])
            start = stop

    def _append_lines(self, lines: bytes) -> None:
        """Those that fit as they are."""
        time_ns = self._time_of(lines, 0)
        packed = pack(lines)
        if packed is None:
            self._append(time_ns, TEXT, lines)
        else:
            self._append(time_ns, PACKED, packed)
        self._note(lines)

    def _append_compressed(self, data: bytes, start: int) -> int:
        """As many lines as fit into this block in one compressed record; returns their bytes, 0 when none do."""
        assert self._compress is not None
        if self._number == 0:
            self._enter_block(self._time_of(data, start))
        limit = COMPRESSED_MAX_BYTES
        while limit >= COMPRESSED_MIN_BYTES:
            stop = data.rfind(b"\n", start, start + limit) + 1
            if stop <= start:
                return 0
            lines = data[start:stop]
            compressed = self._compress(lines)
            if len(compressed) >= len(lines):
                return 0
            room = self.geometry.block_size - self._offset - _RECORD.size
            if len(compressed) <= room:
                self._append(self._time_of(lines, 0), COMPRESSED, compressed)
                self._note(lines)
                return len(lines)
            if room < self.geometry.block_size // 8:
                self._enter_block(self._time_of(lines, 0))
                continue
            limit = min(limit // 2, len(lines) // 2)
        return 0

    def _note(self, lines: bytes) -> None:
        self._latest_ns = max(self._latest_ns, _latest_of(lines))
        self._lines += lines.count(b"\n")

    def append_lost(self, count: int) -> None:
        """So many bytes of what conmon wrote were dropped."""
        self._append_mark(LOST, _COUNT.pack(count))

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
        self._latest_ns, self._lines = max(to.latest_ns, end.latest_ns), max(to.lines, end.lines)
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
        self._buffer += _CRC.pack(crc32c(data, crc32c(rest)))
        self._buffer += rest
        self._buffer += data
        self._offset += _RECORD.size + len(data)
        self._seq += 1

    def _enter_block(self, time_ns: int) -> None:
        self._cut()
        self._number += 1
        self._offset = _HEAD.size
        self._buffer_offset = self.geometry.offset(self._number)
        rest = _HEAD.pack(0, _BLOCK_MAGIC, self._number, self._seq, time_ns, self._latest_ns, self._lines)[4:]
        self._buffer += _CRC.pack(crc32c(rest)) + rest

    def _cut(self) -> None:
        if self._buffer:
            self._writes.append((self._buffer_offset, bytes(self._buffer)))
            self._buffer_offset += len(self._buffer)
            self._buffer = bytearray()
