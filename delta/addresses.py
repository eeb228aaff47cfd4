"""What an old program's instructions and pointers become when the code around them has moved.

Theory
------
Between two versions of a program most instructions are the same, but those that name an address (a call, a page of
data, a pointer in a table) change whenever anything before or behind them grew. bsdiff finds the code and leaves a
small difference at each of these places. They can be foretold: its control triples say where every part of the old
file went, so where an address pointed to in the old file says where it points to in the new one.

    map        old address -> how far what is there has moved; constant between the starts of the moved regions
    relocate   old bytes, and how far they move -> what they are expected to be in the new file

The difference is then taken against what was expected. A wrong guess costs what it did before; nothing here can make
a wrong file. `relocate` is a function of the old file, the map and one shift: where a reader cuts its pieces makes no
difference.

So far for 64-bit ARM: B and BL; ADRP with the ADD, load or store that adds the rest of the address; and pointers,
which are aligned words outside of the code that hold an address of the file.

Source: FORMAT.md, section 8; Arm Architecture Reference Manual, C4.1.
"""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from delta.errors import Malformed
from delta.sections import unzigzag, zigzag

ARM64 = 1
MAX_SEGMENTS = 16
MAX_REGIONS = 1 << 14
MIN_REGION_BYTES = 64
PAIR_WORDS = 8  # how far behind an ADRP the rest of its address is looked for
_AROUND = 4 * PAIR_WORDS
_SMALLEST_POINTER = 4096
_LIMIT = 1 << 48

_BRANCH = re.compile(rb"[\x14-\x17\x94-\x97]")  # the highest byte of B and BL
_PAGE = re.compile(rb"[\x90\xb0\xd0\xf0]")  # of ADRP

ReadOld = Callable[[int, int], bytes]


class Segment(NamedTuple):
    """From an offset in a file on, what lies at an offset has the address offset + bias."""

    start: int
    bias: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where code lies in the old file, and which addresses the two files have."""

    old: tuple[Segment, ...]
    new: tuple[Segment, ...]  # as many
    code_start: int
    code_end: int
    end: int  # addresses from that of the first segment up to this one are of the old file

    def numbers(self) -> list[int]:
        out = [ARM64, len(self.old)]
        before = Segment(0, 0)
        for old, new in zip(self.old, self.new, strict=True):
            out += [old.start - before.start, zigzag(old.bias - before.bias)]
            out += [zigzag(new.start - old.start), zigzag(new.bias - old.bias)]
            before = old
        return [*out, self.code_start // 4, (self.code_end - self.code_start) // 4, self.end - self.begin]

    @property
    def begin(self) -> int:
        return self.old[0].start + self.old[0].bias


def read_layout(numbers: Iterator[int]) -> Layout:
    """The inverse of `Layout.numbers`.

    Raises:
        Malformed: a number is out of bounds.
    """
    machine, count = next(numbers), next(numbers)
    if machine != ARM64 or not 1 <= count <= MAX_SEGMENTS:
        raise Malformed(f"native delta: no layout of machine {machine} and {count} segments")
    old, new = [], []
    start = bias = 0
    for _ in range(count):
        start += next(numbers)
        bias += unzigzag(next(numbers))
        old.append(Segment(start, bias))
        new.append(Segment(start + unzigzag(next(numbers)), bias + unzigzag(next(numbers))))
    code_start = 4 * next(numbers)
    layout = Layout(
        tuple(old), tuple(new), code_start, code_start + 4 * next(numbers), old[0].start + old[0].bias + next(numbers)
    )
    bounds = [abs(each) for segment in (*old, *new) for each in segment]
    starts = [segment.start for segment in new]
    if max(*bounds, layout.code_end, abs(layout.end)) >= _LIMIT or starts != sorted(starts):
        raise Malformed("native delta: a layout is out of bounds")
    return layout


def _bias(segments: tuple[Segment, ...], offset: int) -> int:
    for segment in reversed(segments):
        if offset >= segment.start:
            return segment.bias
    return segments[0].bias


def least_region(lengths: Iterable[int]) -> int:
    """How long a moved region must be to be in the map, so that the map is small: a power of two."""
    lengths = [length for length in lengths if length >= MIN_REGION_BYTES]
    least = MIN_REGION_BYTES
    while len(lengths) > MAX_REGIONS:
        least *= 2
        lengths = [length for length in lengths if length >= least]
    return least


class Relocation:
    """The map of a pair of files, and the old file as it is expected.

    Args:
        regions: (old offset, new offset, bytes) of the parts of the old file that the new one has.
        least: of fewer bytes they do not count.
    """

    def __init__(self, layout: Layout, regions: Iterable[tuple[int, int, int]], least: int) -> None:
        self._layout = layout
        moved = []
        for old, new, length in regions:
            if length >= least:
                address = old + _bias(layout.old, old)
                moved.append((address, new + _bias(layout.new, new) - address))
                if len(moved) > MAX_REGIONS:
                    raise Malformed(f"native delta: a map of more than {MAX_REGIONS} regions")
        moved.sort(key=lambda region: region[0])  # of equal ones the last counts
        self._starts = array("q", [-_LIMIT * 4, *(start for start, _ in moved)])
        self._shifts = array("q", [0, *(shift for _, shift in moved)])
        bias = _bias(layout.old, layout.code_start)
        self._bias = bias
        index = [segment.bias for segment in layout.old].index(bias)
        self._rebias = layout.new[index].bias - bias

    def relocate(self, read: ReadOld, old_bytes: int, position: int, size: int, shift: int) -> bytes:
        """A range of the old file as it is expected `shift` bytes further on in the new one."""
        if shift % 4:
            return read(position, size)
        begin = max(0, (position & ~7) - _AROUND)
        end = min(old_bytes, (position + size + 7 & ~7) + _AROUND)
        data = read(begin, end - begin)
        out = bytearray(data)
        layout = self._layout
        start, stop = max(layout.code_start, begin), min(layout.code_end, end - end % 4)
        if start < stop:
            out[start - begin : stop - begin] = self._code(data[start - begin : stop - begin], start, shift)
        if shift % 8 == 0:
            for low, high in ((begin, min(end, layout.code_start)), (max(begin, layout.code_end), end)):
                low, high = low + 7 & ~7, high & ~7
                if low < high:
                    self._pointers(out, low - begin, high - begin)
        return bytes(out[position - begin : position - begin + size])

    def _pointers(self, out: bytearray, low: int, high: int) -> None:
        begin, end = max(self._layout.begin, _SMALLEST_POINTER), self._layout.end
        starts, shifts = self._starts, self._shifts
        words = array("Q", bytes(out[low:high]))
        moved = False
        for index in [index for index, word in enumerate(words) if begin <= word < end]:
            word = words[index]
            shift = shifts[bisect_right(starts, word) - 1]
            if shift:
                words[index] = word + shift & 0xFFFF_FFFF_FFFF_FFFF
                moved = True
        if moved:
            out[low:high] = words.tobytes()

    def _code(self, data: bytes, start: int, shift: int) -> bytes:
        words = array("I", data)
        tops = data[3::4]
        starts, shifts = self._starts, self._shifts
        begin, end = self._layout.begin, self._layout.end
        address = start + self._bias  # of the first word
        shift += self._rebias  # of the instructions' addresses
        for found in _BRANCH.finditer(tops):
            index = found.start()
            word = words[index]
            target = address + 4 * (index + ((word & 0x3FF_FFFF ^ 0x200_0000) - 0x200_0000))
            if begin <= target < end:
                moved = shifts[bisect_right(starts, target) - 1] - shift
                if moved:
                    words[index] = word & 0xFC00_0000 | word + (moved >> 2) & 0x3FF_FFFF
        old = array("I", data)
        for found in _PAGE.finditer(tops):
            index = found.start()
            word = old[index]
            register = word & 31
            pages = (word >> 5 & 0x7FFFF) << 2 | word >> 29 & 3
            target = (address + 4 * index & ~0xFFF) + ((pages ^ 0x10_0000) - 0x10_0000 << 12)
            rest, scale = 0, 0
            for other_index in range(index + 1, min(index + 1 + PAIR_WORDS, len(old))):
                other = old[other_index]
                if other >> 5 & 31 == register:
                    if other & 0xFFC0_0000 == 0x9100_0000:  # ADD, immediate
                        rest = other_index
                        break
                    if other & 0x3B00_0000 == 0x3900_0000:  # load or store, unsigned offset
                        rest = other_index
                        # Of 128 bits when it is of a vector and the second highest bit of opc is set.
                        scale = 4 if other & 0x0480_0000 == 0x0480_0000 else other >> 30
                        break
            if rest:
                target += (old[rest] >> 10 & 0xFFF) << scale
            if not begin <= target < end:
                continue
            target += shifts[bisect_right(starts, target) - 1]
            pages = (target >> 12) - (address + 4 * index + shift >> 12)
            words[index] = word & 0x9F00_001F | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
            if rest:
                words[rest] = old[rest] & 0xFFC0_03FF | (target & 0xFFF) >> scale << 10
        return words.tobytes()


# Making

_ELF64_LITTLE = b"\x7fELF\x02\x01\x01"
_ARM64_MACHINE = 183
_LOAD, _EXECUTABLE_SECTION, _HAS_BITS = 1, 4, 1


def find_layout(old: bytes, new: bytes) -> Layout | None:
    """The layout of two programs, None if they are none that we know."""
    try:
        segments, new_segments = _segments(old), _segments(new)
        code = _code_range(old)
    except (struct.error, ValueError, OverflowError):
        return None
    if code is None or not segments or len(segments) != len(new_segments) or len(segments) > MAX_SEGMENTS:
        return None
    end = max(segment.start + segment.bias + size for segment, size in segments)
    layout = Layout(
        tuple(segment for segment, _ in segments), tuple(segment for segment, _ in new_segments), *code, end
    )
    try:
        readable = read_layout(iter(layout.numbers())) == layout
    except Malformed:
        return None
    return layout if readable else None


def _header(data: bytes) -> tuple[int, ...]:
    if not data.startswith(_ELF64_LITTLE):
        raise ValueError("no ELF file of 64 bits")
    header = struct.unpack_from("<HHIQQQIHHHHHH", data, 16)
    if header[1] != _ARM64_MACHINE:
        raise ValueError("of another machine")
    return header


def _segments(data: bytes) -> list[tuple[Segment, int]]:
    """Loaded segments in order, with their sizes in memory."""
    header = _header(data)
    found = []
    for index in range(header[9]):
        kind, _, offset, address, _, _, memory, _ = struct.unpack_from("<IIQQQQQQ", data, header[4] + index * header[8])
        if kind == _LOAD:
            found.append((Segment(offset, address - offset), memory))
    if any(first[0].start > second[0].start for first, second in pairwise(found)):
        raise ValueError("segments out of order")
    return found


def _code_range(data: bytes) -> tuple[int, int] | None:
    """From the first to the last section of code, or all of what is executable."""
    header = _header(data)
    ranges = []
    for index in range(header[11]):
        _, kind, flags, _, offset, size, *_ = struct.unpack_from("<IIQQQQIIQQ", data, header[5] + index * header[10])
        if kind == _HAS_BITS and flags & _EXECUTABLE_SECTION:
            ranges.append((offset, offset + size))
    if not ranges:
        for index in range(header[9]):
            kind, flags, offset, _, _, size, *_ = struct.unpack_from("<IIQQQQQQ", data, header[4] + index * header[8])
            if kind == _LOAD and flags & 1:
                ranges.append((offset, offset + size))
    if not ranges:
        return None
    start, end = min(start for start, _ in ranges), max(end for _, end in ranges)
    return start & ~3, end & ~3
