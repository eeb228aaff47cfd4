"""The reader of the native format: a delta and a base in, the target tar out, in order and in bounded memory.

Theory
------
The delta is read at offsets (it lies in a file), the base through `Base`, the target is handed out in pieces. What
is held at any time: one decompressor with its window for each section, one chunk of columns, one piece of at most
PIECE_BYTES of output with the part of the base it is made from, and, for a zstd frame, its prefix and its content.
The head says how much that is; a reader refuses what is over its budget before it takes any.

No number of the delta is used before it was checked against what it counts: sizes against the target's size and the
section's rest, positions against the member of the base. The whole is checked against the target's digest at the
end: whoever writes what comes out must not use it before this generator has returned.

Source: FORMAT.md.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence

import zstandard
from bsdiff4 import core

from delta import addresses, program, sections
from delta.addresses import Relocation
from delta.base import Base
from delta.errors import Malformed, OverBudget, WrongBase, WrongResult
from delta.headers import FIRST_MASK, MAX_MASKS, RAW, SAME, ZERO_BLOCK, Mask
from delta.program import Chunk, read_chunks
from delta.sections import Head, ReadAt, SectionReader, decode_head, unzigzag
from delta.tarmembers import BLOCK, MAX_HEADER_BLOCKS, padded

PIECE_BYTES = 1 << 19
CONTROL_CHUNK = 4096  # control triples
COPIED = 1 << 31  # in a control triple's first number: no byte of the section diff belongs to it
MAX_MOVED_TRIPLES = 1 << 17  # of one file whose addresses are foretold: they are held
DEFAULT_BUDGET_BYTES = 48 << 20
# Beside the head's `memory_bytes`: a chunk decoded, pieces of output and of the base.
OWN_BYTES = 8 << 20
_ZEROS = bytes(PIECE_BYTES)
_OF_SOURCE = (program.COPY, program.BSDIFF, program.BSDIFF_REF, program.MOVED, program.MOVED_REF)
_SIGN = 1 << 63  # bsdiff's integers are sign and magnitude


def base_check(diff_ids: Sequence[str]) -> bytes:
    """Eight bytes that tell two lists of base layers apart: of the SHA-256 of their diff_ids, a line each."""
    return hashlib.sha256("".join(f"{each}\n" for each in diff_ids).encode()).digest()[:8]


def read_head(read_at: ReadAt) -> tuple[Head, int]:
    """The head of a delta and where its sections start."""
    return decode_head(read_at(0, sections.MAX_HEAD_BYTES))


def open_sections(
    read_at: ReadAt, base: Base, budget_bytes: int, check: bytes | None = None, max_bytes: int | None = None
) -> tuple[Head, list[SectionReader]]:
    """A delta's head, checked, and readers of its sections; see `apply`."""
    head, start = read_head(read_at)
    if head.memory_bytes + OWN_BYTES > budget_bytes:
        raise OverBudget(f"native delta: needs {head.memory_bytes + OWN_BYTES} bytes of {budget_bytes}")
    if head.base_layers != base.layers or (check is not None and check != head.base_check):
        raise WrongBase("native delta: made for another base")
    if max_bytes is not None and head.target_bytes > max_bytes:
        raise Malformed(f"native delta: makes {head.target_bytes} bytes of at most {max_bytes}")
    readers = []
    for name, section in zip(sections.SECTION_NAMES, head.sections, strict=True):
        readers.append(SectionReader(name, read_at, start, section))
        start += section.stored_bytes
    return head, readers


def apply(
    read_at: ReadAt,
    base: Base,
    *,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    check: bytes | None = None,
    max_bytes: int | None = None,
    hashed: bool = True,
) -> Iterator[bytes]:
    """The target tar in pieces of some 512 KiB; only when it ends without an error is it the target.

    Args:
        check: `base_check` of the base, when the caller knows its diff_ids.
        max_bytes: no target is larger than this.
        hashed: hold what comes out against the target's digest; False when the caller does so itself.

    Raises:
        Malformed, Unsupported: the delta is not one. OverBudget: it needs more memory than `budget_bytes`.
        WrongBase: it is for another base. WrongResult: what came out has another digest.
    """
    head, readers = open_sections(read_at, base, budget_bytes, check, max_bytes)
    digest = hashlib.sha256()
    pending: list[bytes] = []
    held = made = 0
    for piece in Player(head, readers, base).play():
        held += len(piece)
        pending.append(piece)
        if held >= PIECE_BYTES:
            made += held
            whole = b"".join(pending)
            if hashed:
                digest.update(whole)
            yield whole
            pending, held = [], 0
    whole = b"".join(pending)
    digest.update(whole)
    if made + len(whole) != head.target_bytes or (hashed and digest.digest() != head.target_sha256):
        raise WrongResult("native delta: what came out is not the target")
    if whole:
        yield whole


_Range = tuple[int, int, int, int]  # (old position, bytes added to it, bytes after it, how far on they are in the new)


class Player:
    """Plays the program of one delta."""

    def __init__(self, head: Head, readers: Sequence[SectionReader], base: Base) -> None:
        self._base, self._frame_bytes = base, head.frame_bytes
        self._meta, control, self._diff, self._extra, self._literal, self._frames = readers
        self._control = _Control(control)
        self._left = head.target_bytes
        self.told = 0, 0, (0, 0)  # content kind, size and origin of the last member
        self._masks: list[Mask] = []
        self._layer, self._ordinal = 0, -1  # of the last reference
        self._source: tuple[int, int] = (0, 0)
        self._previous_main = self._previous_extension = ZERO_BLOCK
        self._framed_bytes, self._framed_at = b"", 0
        self._framed_source: tuple[int, int] = (0, 0)

    def play(self) -> Iterator[bytes]:
        for chunk in read_chunks(self._meta):
            for item in chunk.items:
                if item == program.MEMBER:
                    yield from self._member(chunk)
                    continue
                size = self._claim(next(chunk.numbers[program.SIZE]))
                if item == program.RAW_ITEM and size:
                    yield from self._literals(size)
                elif item == program.ZEROS and size:
                    while size:
                        piece = _ZEROS[:size]
                        size -= len(piece)
                        yield piece
                else:  # every item makes something, or a run of them would never end
                    raise Malformed(f"native delta: no item {item} of {size} bytes")

    def _claim(self, size: int) -> int:
        """Count bytes of the target before they are made."""
        if size > self._left:
            raise Malformed("native delta: makes more than the target")
        self._left -= size
        return size

    def _member(self, chunk: Chunk) -> Iterator[bytes]:
        numbers = chunk.numbers
        reference = next(numbers[program.REF])
        if reference:
            if reference > 1:
                moved = reference - 2
                if moved & 1:
                    self._layer, self._ordinal = next(numbers[program.REF_LAYER]), -1
                self._ordinal += unzigzag(moved >> 1)
            self._ordinal += 1
            header = self._base.header(self._layer, self._ordinal)
        else:
            header = b""
        kind = next(numbers[program.KIND])
        size = old_size = 0
        origin = self._layer, self._ordinal
        if kind == program.EXPECTED:
            size = self._base.size(*origin) if reference else 0
        elif kind in (program.LITERAL_CONTENT, program.FRAMED):
            size = next(numbers[program.SIZE])
        elif kind in _OF_SOURCE:
            if kind not in (program.BSDIFF_REF, program.MOVED_REF):
                layer, ordinal = self._source
                step = next(numbers[program.SOURCE])
                if step & 1:
                    layer, ordinal = next(numbers[program.SOURCE_LAYER]), 0
                origin = self._source = layer, ordinal + unzigzag(step >> 1)
            elif not reference:
                raise Malformed("native delta: content of a reference that is not there")
            size = old_size = self._base.size(*origin)
            if kind != program.COPY:
                size += unzigzag(next(numbers[program.SIZE]))
                if size < 0:
                    raise Malformed("native delta: a negative size")
        elif kind != program.EMPTY:
            raise Malformed(f"native delta: no content kind {kind}")
        self.told = kind, size, origin
        yield self._header(chunk, header, size)
        self._claim(padded(size))
        if kind in (program.EXPECTED, program.COPY):
            for offset in range(0, size, PIECE_BYTES):
                yield self._base.read(*origin, offset, min(PIECE_BYTES, size - offset))
        elif kind == program.LITERAL_CONTENT:
            yield from self._literals(size)
        elif kind == program.FRAMED:
            yield from self._framed(chunk, size)
        elif old_size or size:
            count = next(numbers[program.COUNT])
            if kind in (program.MOVED, program.MOVED_REF):
                yield from self._moved(numbers[program.CODE], origin, old_size, size, count)
            else:
                yield from self._bsdiff(origin, old_size, size, self._control.triples(count), count)
        if size % BLOCK:
            yield _ZEROS[: BLOCK - size % BLOCK]

    def _header(self, chunk: Chunk, base: bytes, size: int) -> bytes:
        numbers = chunk.numbers
        count = next(numbers[program.BLOCKS]) or len(base) // BLOCK or 1
        if count > MAX_HEADER_BLOCKS:
            raise Malformed(f"native delta: a header of {count} blocks")
        self._claim(count * BLOCK)
        blocks = []
        for index in range(count):
            main = index == count - 1
            if main:
                against = base[-BLOCK:] or ZERO_BLOCK
            else:
                against = base[index * BLOCK : (index + 1) * BLOCK] if (index + 1) * BLOCK < len(base) else ZERO_BLOCK
            number = next(numbers[program.MASK])
            if number == SAME:
                block = against
            elif number == RAW:
                block = chunk.value(program.RAW_VALUES)
                if len(block) > BLOCK:
                    raise Malformed(f"native delta: a header block of {len(block)} bytes")
                block = block.ljust(BLOCK, b"\0")
            else:
                number -= FIRST_MASK
                if number == len(self._masks) < MAX_MASKS:
                    self._masks.append(Mask(next(numbers[program.NEW_MASK])))
                if number >= len(self._masks):
                    raise Malformed(f"native delta: no mask {number}")
                previous = self._previous_main if main else self._previous_extension
                block = self._masks[number].block(against, previous, size if main else 0, chunk.value)
                if not main:
                    self._previous_extension = block
            if main:
                self._previous_main = block
            blocks.append(block)
        return b"".join(blocks)

    def _literals(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self._literal.read(min(size, PIECE_BYTES))
            size -= len(piece)
            yield piece

    def _framed(self, chunk: Chunk, size: int) -> Iterator[bytes]:
        """The next bytes of what the frames make; one frame may make several files."""
        while size:
            if self._framed_at == len(self._framed_bytes):
                self._framed_bytes, self._framed_at = self._frame(chunk), 0
            piece = self._framed_bytes[self._framed_at : self._framed_at + min(size, PIECE_BYTES)]
            self._framed_at += len(piece)
            size -= len(piece)
            yield piece
            if self._framed_at == len(self._framed_bytes):
                self._framed_bytes, self._framed_at = b"", 0

    def _frame(self, chunk: Chunk) -> bytes:
        column = chunk.numbers[program.FRAME]
        stored, plain, ranges = next(column), next(column), next(column)
        if not plain or plain > self._frame_bytes or stored > plain + 1024:
            raise Malformed("native delta: a frame is larger than the head says")
        prefix = []
        room = self._frame_bytes - plain
        layer, ordinal = self._framed_source
        for _ in range(ranges):
            step = next(column)
            if step & 1:
                layer, ordinal = next(column), 0
            ordinal += unzigzag(step >> 2)
            offset, length = (next(column), next(column)) if step & 2 else (0, self._base.size(layer, ordinal))
            if not 0 < length <= room:
                raise Malformed("native delta: a frame's prefix is larger than the head says")
            room -= length
            prefix.append(self._base.read(layer, ordinal, offset, length))
        self._framed_source = layer, ordinal
        frame = self._frames.read(stored)
        data = b"".join(prefix)
        # Too little to be a dictionary: zstd takes eight bytes or more.
        dictionary = zstandard.ZstdCompressionDict(data, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        decompressor = zstandard.ZstdDecompressor(
            dict_data=dictionary if len(data) >= 8 else None,
            max_window_size=1 << 27,
            format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        )
        try:
            # A frame that tells its size would be given that much memory, whatever the limit.
            told = zstandard.get_frame_parameters(frame, format=zstandard.FORMAT_ZSTD1_MAGICLESS).content_size
            if told != zstandard.CONTENTSIZE_UNKNOWN:
                raise Malformed("native delta: a frame tells its size")
            out = decompressor.decompress(frame, max_output_size=plain)
        except zstandard.ZstdError as error:
            raise Malformed(f"native delta: a frame is damaged: {error}") from None
        if len(out) != plain:
            raise Malformed("native delta: a frame makes too little")
        return out

    def _moved(
        self, column: Iterator[int], origin: tuple[int, int], old_size: int, size: int, count: int
    ) -> Iterator[bytes]:
        """A program: where its parts went is read first, for what its addresses become."""
        layout, least = addresses.read_layout(column), next(column)
        if count > MAX_MOVED_TRIPLES:
            raise Malformed(f"native delta: {count} control triples of one file")
        held = array("I"), array("I"), array("i")
        for triple in self._control.triples(count):
            for values, value in zip(held, triple, strict=True):
                values.append(value)

        relocation = Relocation(layout, moved_regions(zip(*held, strict=True), count, size), least)
        yield from self._bsdiff(origin, old_size, size, zip(*held, strict=True), count, relocation)

    def _bsdiff(
        self,
        origin: tuple[int, int],
        old_size: int,
        size: int,
        triples: Iterable[tuple[int, int, int]],
        count: int,
        relocation: Relocation | None = None,
    ) -> Iterator[bytes]:
        position = made = 0  # in the old file, in the new one
        ranges: list[_Range] = []
        room = PIECE_BYTES
        last = count - 1
        for index, (add, extra, seek) in enumerate(triples):
            copied = add & COPIED
            add &= ~COPIED
            if index == last:
                add, seek = size - made - extra, 0
            shift = made - position
            made += add + extra
            if add < 0 or made > size or not 0 <= position <= old_size - add:
                raise Malformed("native delta: a control triple reaches beyond its file")
            end = position + add
            if copied:
                if ranges:
                    yield self._bsdiff_piece(origin, old_size, ranges, relocation)
                    ranges, room = [], PIECE_BYTES
                for start in range(position, end, PIECE_BYTES):
                    length = min(PIECE_BYTES, end - start)
                    if relocation:
                        yield relocation.relocate(self._reader(origin), old_size, start, length, shift)
                    else:
                        yield self._base.read(*origin, start, length)
                position, add = end, 0
            if add + extra < room:
                ranges.append((position, add, extra, shift))
                room -= add + extra
            else:
                while add or extra:
                    adding = min(add, room)
                    after = min(extra, room - adding) if adding == add else 0
                    ranges.append((position, adding, after, shift))
                    position += adding
                    add, extra, room = add - adding, extra - after, room - adding - after
                    if not room:
                        yield self._bsdiff_piece(origin, old_size, ranges, relocation)
                        ranges, room = [], PIECE_BYTES
            position = end + seek
        if made != size:
            raise Malformed("native delta: control triples make too little")
        if ranges:
            yield self._bsdiff_piece(origin, old_size, ranges, relocation)

    def _bsdiff_piece(
        self, origin: tuple[int, int], old_size: int, ranges: list[_Range], relocation: Relocation | None
    ) -> bytes:
        """At most PIECE_BYTES of a file, out of ranges that were checked."""
        adding = sum(add for _, add, _, _ in ranges)
        extra = self._extra.read(sum(after for _, _, after, _ in ranges))
        if not adding:
            return extra
        diff = self._diff.read(adding)
        lowest = min(position for position, add, _, _ in ranges if add)
        highest = max(position + add for position, add, _, _ in ranges if add)
        if relocation:
            return self._moved_piece(origin, old_size, ranges, relocation, diff, extra)
        if len(ranges) == 1 and not extra and not diff.strip(b"\0"):
            return self._base.read(*origin, lowest, adding)
        control: list[int] = []
        if highest - lowest <= 4 * PIECE_BYTES:
            old = self._base.read(*origin, lowest, highest - lowest)
            at = 0
            for position, add, after, _ in ranges:
                if add:  # the seek before it belongs to the triple before it
                    seek = position - lowest - at
                    control += (0, 0, seek if seek >= 0 else -seek | _SIGN) if seek else ()
                    at = position - lowest + add
                control += (add, after, 0)
        else:
            # Far apart: the old bytes put side by side, so that memory stays bounded.
            old = b"".join([self._base.read(*origin, position, add) for position, add, _, _ in ranges if add])
            for _, add, after, _ in ranges:
                control += (add, after, 0)
        return _patched(old, control, diff, extra)

    def _reader(self, origin: tuple[int, int]) -> addresses.ReadOld:
        return lambda offset, length: self._base.read(*origin, offset, length)

    def _moved_piece(
        self,
        origin: tuple[int, int],
        old_size: int,
        ranges: list[_Range],
        relocation: Relocation,
        diff: bytes,
        extra: bytes,
    ) -> bytes:
        read = self._reader(origin)
        old: list[bytes] = []
        control: list[int] = []
        for position, add, after, shift in ranges:
            old.append(relocation.relocate(read, old_size, position, add, shift))
            control += (add, after, 0)
        return _patched(b"".join(old), control, diff, extra)


def moved_regions(triples: Iterable[tuple[int, int, int]], count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(old position, new position, bytes) of what triples take from the old file, whether or not they make sense.

    What goes on where the triple before ended is of one region with it.
    """
    position = made = 0
    start, moved_to = 0, 0
    for index, (add, extra, seek) in enumerate(triples):
        add &= ~COPIED
        if index == count - 1:
            add = size - made - extra
        position, made = position + add, made + add
        if extra or seek or index == count - 1:
            if start >= 0:
                yield start, moved_to, position - start
            position, made = position + seek, made + extra
            start, moved_to = position, made


def _patched(old: bytes, control: list[int], diff: bytes, extra: bytes) -> bytes:
    packed = struct.pack(f"<{len(control)}Q", *control)
    return core.patch(old, len(diff) + len(extra), packed, diff, extra)  # type: ignore[no-any-return]


class _Control:
    """The control triples of all files: chunks of byte planes."""

    def __init__(self, section: SectionReader) -> None:
        self._section = section
        self._triples: Iterator[tuple[int, int, int]] = iter(())

    def triples(self, count: int) -> Iterator[tuple[int, int, int]]:
        """The next `count` triples."""
        while count:
            for triple in self._triples:
                yield triple
                count -= 1
                if not count:
                    return
            if not count:
                return
            number = min(CONTROL_CHUNK, self._section.left // 12)
            if not number:
                raise Malformed("native delta: too few control triples")
            self._triples = iter(decode_control(self._section.read(12 * number)))


def decode_control(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The triples of one chunk: three columns of 32 bits, each as four planes, the lowest byte first."""
    number = len(data) // 12
    columns = []
    for column, sort in enumerate("IIi"):
        plain = bytearray(4 * number)
        for plane in range(4):
            start = (4 * column + plane) * number
            plain[plane::4] = data[start : start + number]
        columns.append(array(sort, bytes(plain)))  # little-endian machines only, as are all that run this
    return zip(*columns, strict=True)


def encode_control(triples: Sequence[tuple[int, int, int]]) -> bytes:
    """The inverse, all chunks."""
    out = bytearray()
    for start in range(0, len(triples), CONTROL_CHUNK):
        for sort, column in zip("IIi", zip(*triples[start : start + CONTROL_CHUNK], strict=True), strict=True):
            plain = array(sort, column).tobytes()
            for plane in range(4):
                out += plain[plane::4]
    return bytes(out)
