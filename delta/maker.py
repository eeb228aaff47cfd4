"""The maker of the native format: matches the target's files with the base's and takes the smallest coding of each.

Theory
------
A member's header is coded against the header of the member of the base that is likest by path (`match.py`). Its
content, if no file of the base is equal, is coded in four ways against one file of the base, or in one without:

    bsdiff      what of the old file is added to, plus what is new; streams pooled over the layer, then LZMA
    moved       the same, with the addresses of a program foretold (`addresses.py`)
    frames      zstd with the old file as prefix; each file by itself
    literal     pooled over the layer, then LZMA

and the one with the least bytes is taken. What pooling gains is not known file by file: bsdiff and literals are
judged by a quick compression and a factor found on real layers.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import zstandard
from bsdiff4 import core

from delta import program, sections
from delta.addresses import Layout, Relocation, find_layout, least_region
from delta.anchors import find_regions
from delta.base import LayerTar
from delta.errors import OverBudget
from delta.headers import FIRST_MASK, MAX_MASKS, RAW, SAME, ZERO_BLOCK, is_extension, mask_of
from delta.match import BaseIndex, Known, Place, survey
from delta.native import (
    COPIED,
    DEFAULT_BUDGET_BYTES,
    MAX_MOVED_TRIPLES,
    OWN_BYTES,
    base_check,
    encode_control,
    moved_regions,
)
from delta.program import ChunkWriter
from delta.sections import Head, zigzag
from delta.tarmembers import BLOCK, padded, parse_number

Triple = tuple[int, int, int]

FRAME_PLAIN_BYTES = 2 << 20
FRAME_PREFIX_BYTES = 4 << 20
FRAME_TABLES_BYTES = 80  # what a frame spends on tables
MIN_FRAMED_COST = 48
MIN_DEVICE_BYTES = OWN_BYTES + (2 << 20)
MAX_FRAME_FILES = 4096
LARGE_BYTES = 4 << 20
REWRITTEN_PART = 16
# Foretelling addresses takes a second for some 15 MB when the delta is applied; it must save one byte in so many.
MOVED_PART = 2000
# bsdiff's suffix array takes some 16 bytes a byte of the old file.
MAX_BSDIFF_BYTES = 160 << 20
FAST_BSDIFF_BYTES = 1 << 18
MAX_HASTY_BYTES = 1 << 30
_READ_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
_ZERO_RUN = re.compile(rb"\0{8,}")
# Where nothing differs for so long, a triple of its own is smaller than the zeros, and quicker on both sides.
# It may begin only where a run does: every shorter run would be gone through from each of its bytes.
_LONG_ZERO_RUN = re.compile(rb"(?<!\0)\0{32768,}")
MIN_LAST_ZEROS = 64  # at a file's end: its length need not be told
# (lc, lp, pb) worth trying, by section.
PROPERTIES = {
    sections.META: ((3, 0, 0), (0, 0, 0)),
    sections.CONTROL: ((3, 0, 0), (0, 0, 0)),
    sections.DIFF: ((3, 0, 0),),
    sections.EXTRA: ((3, 0, 0), (0, 2, 2)),
    sections.LITERAL: ((3, 0, 0),),
}


class FrameLimits(NamedTuple):
    """The most bytes of one frame."""

    plain: int  # of the new file
    prefix: int  # of the old one


@dataclass(frozen=True, slots=True)
class Settings:
    """How much work the maker puts in."""

    fast: bool = False
    jobs: int = 1
    codecs: frozenset[str] = frozenset(("bsdiff", "zstd"))
    device_bytes: int = DEFAULT_BUDGET_BYTES  # of memory, for whoever applies it

    @property
    def frames(self) -> FrameLimits:
        """A quarter of the device's memory is for frames, which take twice what they make and are made from."""
        return FrameLimits(
            min(FRAME_PLAIN_BYTES, self.device_bytes // 24), min(FRAME_PREFIX_BYTES, self.device_bytes // 12)
        )


class Bsdiff(NamedTuple):
    triples: list[Triple]
    diff: bytes
    extra: bytes


@dataclass(frozen=True, slots=True)
class Moved:
    """What a reader needs to know of a program to foretell its addresses."""

    layout: Layout
    least: int  # regions of the map

    def numbers(self) -> list[int]:
        return [*self.layout.numbers(), self.least]


class Range(NamedTuple):
    """A part of a member of the base."""

    place: Place
    offset: int
    length: int


@dataclass(slots=True)
class Content:
    """How one member's content is coded, and how many bytes that is about."""

    how: str  # empty, same, bsdiff, moved, framed, literal
    source: Place | None = None
    bsdiff: Bsdiff | None = None
    moved: Moved | None = None
    cost_bytes: int = 0
    triples: int = 0  # of bsdiff, once its streams are pooled
    frames: list[list[int]] = field(default_factory=list)  # the numbers of frames that begin with this file


class _Changed(NamedTuple):
    """Content that is nowhere in the base, and the file that it is likest."""

    source: Place | None


class Line(NamedTuple):
    """What the maker did with a file: for a table."""

    path: bytes
    size: int
    how: str
    source: bytes
    cost_bytes: int


@dataclass(frozen=True, slots=True)
class Made:
    """A delta of one layer."""

    data: bytes
    lines: tuple[Line, ...]


# Contents


def bsdiff(old: bytes, new: bytes) -> Bsdiff:
    """bsdiff's three streams, the control as numbers."""
    control, diff, extra = core.diff(old, new)
    triples = []
    for add, after, seek in struct.iter_unpack("<QQQ", control):
        triples.append((add, after, seek if seek < 1 << 63 else -(seek - (1 << 63))))
    return Bsdiff(_without_nothing(triples), diff, extra)


def hasty_bsdiff(old: bytes, new: bytes) -> Bsdiff:
    """The same streams, the matches found by anchors."""
    regions = find_regions(old, new)
    if not regions or regions[0][:2] != (0, 0):
        regions.insert(0, (0, 0, 0))
    triples, diff, extra = [], [], []
    for (source, start, length), (next_source, next_start, _) in pairwise([*regions, (0, len(new), 0)]):
        end = start + length
        triples.append((length, next_start - end, next_source - source - length))
        extra.append(new[end:next_start])
        for at in range(0, length, _PIECE_BYTES):
            size = min(_PIECE_BYTES, length - at)
            diff.append(subtracted(new[start + at : start + at + size], old[source + at : source + at + size]))
    add, after, _ = triples[-1]
    triples[-1] = (add, after, 0)
    return Bsdiff(triples, b"".join(diff), b"".join(extra))


def _without_nothing(triples: list[Triple]) -> list[Triple]:
    """A triple that adds nothing is one with the triple before it."""
    out: list[Triple] = []
    for add, after, seek in triples:
        if out and not add:
            before = out.pop()
            out.append((before[0], before[1] + after, before[2] + seek))
        else:
            out.append((add, after, seek))
    return out or [(0, 0, 0)]


def elided(found: Bsdiff, size: int) -> Bsdiff:
    """The same with long runs of zeros taken out of the diff."""
    triples: list[Triple] = []
    diff = bytearray()
    at = made = 0
    for index, (add, after, seek) in enumerate(found.triples):
        last = index == len(found.triples) - 1
        if last:
            add = size - made - after
        given = found.diff[at : at + add]
        at, made = at + add, made + add + after
        done = 0
        for run in _LONG_ZERO_RUN.finditer(given):
            if run.start() > done:
                triples.append((run.start() - done, 0, 0))
                diff += given[done : run.start()]
            triples.append((run.end() - run.start() | COPIED, 0, 0))
            done = run.end()
        rest = given[done:]
        kept = len(rest.rstrip(b"\0")) if last else len(rest)
        if len(rest) - kept >= MIN_LAST_ZEROS:
            if kept:
                triples.append((kept, 0, 0))
            triples.append((len(rest) - kept | COPIED, after, seek))
        elif done and not rest:
            triples[-1] = (triples[-1][0], after, seek)
        else:
            kept = len(rest)
            triples.append((kept, after, seek))
        diff += rest[:kept]
    return Bsdiff(triples, bytes(diff), found.extra)


def foretold(found: Bsdiff, old: bytes, new: bytes) -> tuple[Bsdiff, Moved] | None:
    """bsdiff's result against the old file as its addresses are foretold; None if it is no program that we know."""
    layout = find_layout(old, new)
    if layout is None:
        return None
    regions = list(moved_regions(found.triples, len(found.triples), len(new)))
    moved = Moved(layout, least_region(length for _, _, length in regions))
    relocation = Relocation(layout, regions, moved.least)
    diff = bytearray()
    for position, made, length in regions:
        for start in range(0, length, _PIECE_BYTES):
            size = min(_PIECE_BYTES, length - start)
            expected = relocation.relocate(
                lambda at, n: old[at : at + n], len(old), position + start, size, made - position
            )
            diff += subtracted(new[made + start : made + start + size], expected)
    return Bsdiff(found.triples, bytes(diff), found.extra), moved


def subtracted(new: bytes, old: bytes) -> bytes:
    """Byte by byte, mod 256. All at once, in numbers as long as the pieces: a loop would be too slow."""
    high = int.from_bytes(b"\x80" * len(new), "little")
    low = int.from_bytes(b"\x7f" * len(new), "little")
    x, y = int.from_bytes(new, "little"), int.from_bytes(old, "little")
    return ((x | high) - (y & low) ^ (x ^ y ^ high) & high).to_bytes(len(new), "little")


def compress_frame(prefix: bytes, plain: bytes, level: int) -> bytes:
    """A zstd frame without magic, with a prefix its matches may reach into."""
    log = max(10, sections.window_log_for(len(plain) + len(prefix)))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=len(plain),
        dict_size=len(prefix),
        window_log=log,
        hash_log=min(24, log + 1),
        chain_log=min(24, log + 1),
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=0,
    )
    dictionary = None
    if len(prefix) >= 8:
        dictionary = zstandard.ZstdCompressionDict(prefix, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdCompressor(compression_params=parameters, dict_data=dictionary).compress(plain)


def frame_parts(old_bytes: int, new_bytes: int, limits: FrameLimits) -> Iterator[tuple[int, int, int, int]]:
    """A large file as parts: (start, size, where the old bytes about the same place begin, how many)."""
    for start in range(0, new_bytes, limits.plain):
        size = min(limits.plain, new_bytes - start)
        length = min(old_bytes, limits.prefix)
        middle = (start + size // 2) * old_bytes // new_bytes
        yield start, size, min(max(0, middle - length // 2), old_bytes - length), length


def _quick(data: bytes) -> int:
    """About what bytes take when they are compressed in company, where a long run of zeros is next to nothing."""
    data = _ZERO_RUN.sub(b"\0\0\0\0", data)
    if len(data) < 1 << 16:
        return max(0, len(zlib.compress(data, 9, -15)) - 4)
    return len(zstandard.ZstdCompressor(level=9).compress(data))


def _bsdiff_cost(found: Bsdiff) -> int:
    return _quick(found.diff) + _quick(found.extra) + _quick(encode_control(found.triples[:-1])) + 6


def choose(old: bytes | None, new: bytes, source: Place | None, settings: Settings) -> Content:
    """The smallest coding of a file."""
    literal_cost = _quick(new)
    best = Content("literal", None, cost_bytes=literal_cost)
    if old is None or not old:
        return best
    if "bsdiff" in settings.codecs and max(len(old), len(new)) <= MAX_HASTY_BYTES:
        hasty = max(len(old), len(new)) > (FAST_BSDIFF_BYTES if settings.fast else MAX_BSDIFF_BYTES)
        whole = hasty_bsdiff(old, new) if hasty else bsdiff(old, new)
        found = elided(whole, len(new))
        cost = _bsdiff_cost(found)
        if cost < best.cost_bytes:
            best = Content("bsdiff", source, bsdiff=found, cost_bytes=cost)
        better = foretold(whole, old, new)
        if better:
            found = elided(better[0], len(new))
            cost = _bsdiff_cost(found) + len(better[1].numbers())
            if cost < best.cost_bytes - len(new) // MOVED_PART and len(found.triples) <= MAX_MOVED_TRIPLES:
                best = Content("moved", source, bsdiff=found, moved=better[1], cost_bytes=cost)
    # Frames of a large file take long, and only a file that was rewritten is smaller by them.
    rewritten = len(new) < LARGE_BYTES or best.cost_bytes > len(new) // REWRITTEN_PART
    if "zstd" in settings.codecs and best.cost_bytes > MIN_FRAMED_COST and rewritten:
        level = 9 if settings.fast else 19
        cost = 0
        for start, size, offset, length in frame_parts(len(old), len(new), settings.frames):
            cost += len(compress_frame(old[offset : offset + length], new[start : start + size], level))
        # In company, a small file's frame needs no tables of its own.
        cost -= min(FRAME_TABLES_BYTES, cost // 3)
        if cost < best.cost_bytes * 0.95:
            best = Content("framed", source, cost_bytes=cost)
    return best


class _Frames:
    """Gathers the files that frames make, in order: small ones together, large ones in parts."""

    def __init__(self, index: BaseIndex, level: int, limits: FrameLimits) -> None:
        self._index, self._level, self._limits = index, level, limits
        self.stream = bytearray()
        self._owner: Content | None = None
        self.largest_bytes = 0
        self._source = Place(0, 0)
        self._ranges: list[Range] = []
        self._plain: list[bytes] = []
        self._plain_bytes = self._prefix_bytes = 0

    def add(self, content: Content, source: Place, new: bytes) -> None:
        """Take a file in."""
        old_bytes = self._index.at(source).member.size
        limits = self._limits
        if len(new) > limits.plain or old_bytes > limits.prefix:
            self.flush()
            for start, size, offset, length in frame_parts(old_bytes, len(new), limits):
                self._take(content, Range(source, offset, length), new[start : start + size])
                self.flush()
            return
        full = self._plain_bytes + len(new) > limits.plain or self._prefix_bytes + old_bytes > limits.prefix
        if full or len(self._plain) == MAX_FRAME_FILES:
            self.flush()
        self._take(content, Range(source, 0, old_bytes), new)

    def _take(self, content: Content, part: Range, new: bytes) -> None:
        if not self._plain:
            self._owner = content
        self._ranges.append(part)
        self._plain.append(new)
        self._plain_bytes += len(new)
        self._prefix_bytes += part.length

    def flush(self) -> None:
        if not self._plain or self._owner is None:
            return
        prefix = b"".join([self._index.base.read(*part.place, part.offset, part.length) for part in self._ranges])
        data = compress_frame(prefix, b"".join(self._plain), self._level)
        numbers = [len(data), self._plain_bytes, len(self._ranges)]
        layer, ordinal = self._source
        for place, offset, length in self._ranges:
            partial = (offset, length) != (0, self._index.at(place).member.size)
            flags = (place.layer != layer) | partial << 1
            if place.layer != layer:
                numbers += zigzag(place.ordinal) << 2 | flags, place.layer
            else:
                numbers.append(zigzag(place.ordinal - ordinal) << 2 | flags)
            layer, ordinal = place
            if partial:
                numbers += offset, length
        self._source = Place(layer, ordinal)
        self._owner.frames.append(numbers)
        self.stream += data
        self.largest_bytes = max(self.largest_bytes, self._plain_bytes + self._prefix_bytes)
        self._ranges, self._plain = [], []
        self._plain_bytes = self._prefix_bytes = 0


# A layer


class LayerMaker:
    """Makes the delta of one target layer from a whole base."""

    def __init__(self, index: BaseIndex, base_diff_ids: Sequence[str], target: LayerTar, settings: Settings) -> None:
        if settings.device_bytes < MIN_DEVICE_BYTES:
            raise OverBudget(f"a device needs {MIN_DEVICE_BYTES} bytes of memory, not {settings.device_bytes}")
        self._index, self._target, self._settings = index, target, settings
        self._base_diff_ids = base_diff_ids
        self._chunks = ChunkWriter()
        self._triples: list[Triple] = []
        self._streams = [bytearray() for _ in range(sections.SECTIONS)]
        self._masks: dict[int, int] = {}
        self._layer, self._ordinal = 0, -1
        self._source = Place(0, 0)
        self._previous_main = self._previous_extension = ZERO_BLOCK
        self._lines: list[Line] = []

    def make(self, progress: Callable[[int], object] = lambda _: None) -> Made:
        """The delta's bytes. `progress` is told the bytes of the target done."""
        digest = hashlib.sha256()
        for offset in range(0, self._target.total, _READ_BYTES):
            digest.update(self._target.pread(offset, _READ_BYTES))
        frames = _Frames(self._index, 9 if self._settings.fast else 19, self._settings.frames)
        members = []
        for known, reference, content in self._contents():
            members.append((known, reference, content))
            if content.how == "literal":
                self._streams[sections.LITERAL] += self._target.pread(known.member.content, known.member.size)
            elif content.how == "framed" and content.source:
                frames.add(content, content.source, self._target.pread(known.member.content, known.member.size))
            elif content.bsdiff:
                self._pool(content)
            progress(known.member.end)
        frames.flush()
        self._streams[sections.FRAMES] = frames.stream
        # Only now: the numbers of a frame stand at its first file, and are known when its last file is.
        for known, reference, content in members:
            self._member(known, reference, content)
        self._rest(self._target.members_end)
        self._chunks.flush()
        self._streams[sections.META] = self._chunks.out
        self._streams[sections.CONTROL] = bytearray(encode_control(self._triples))
        room = self._settings.device_bytes - OWN_BYTES - 2 * frames.largest_bytes
        # The frames are compressed; nothing is gained by a window over them.
        sizes = [len(stream) if number in PROPERTIES else 0 for number, stream in enumerate(self._streams)]
        packed = []
        for number, (stream, log) in enumerate(zip(self._streams, sections.window_logs(sizes, room), strict=True)):
            packed.append(sections.pack(bytes(stream), PROPERTIES.get(number, ()), log, self._settings.fast))
            stream.clear()
        head = Head(
            self._target.total,
            digest.digest(),
            self._index.base.layers,
            base_check(self._base_diff_ids),
            frames.largest_bytes,
            tuple(section for section, _ in packed),
        )
        return Made(head.encode() + b"".join(data for _, data in packed), tuple(self._lines))

    def _contents(self) -> Iterator[tuple[Known, Place | None, Content]]:
        """Members with their reference and content, in order; with several jobs, a few are worked out ahead."""
        if self._settings.jobs == 1:
            for known in survey(self._target):
                reference, content = self._match(known)
                yield known, reference, content if isinstance(content, Content) else self._choose(known, content.source)
            return
        with ThreadPoolExecutor(self._settings.jobs) as pool:
            ahead: list[tuple[Known, Place | None, Future[Content] | Content, int]] = []
            held = 0
            for known in survey(self._target):
                reference, content = self._match(known)
                if isinstance(content, Content):
                    ahead.append((known, reference, content, 0))
                else:
                    weight = known.member.size + (self._index.at(content.source).member.size if content.source else 0)
                    ahead.append((known, reference, pool.submit(self._choose, known, content.source), weight))
                    held += weight
                # Two large files at once would take twice the memory.
                while ahead and (held > 16 << 20 or len(ahead) > 256):
                    first = ahead.pop(0)
                    held -= first[3]
                    yield first[0], first[1], _done(first[2])
            for first in ahead:
                yield first[0], first[1], _done(first[2])

    def _match(self, known: Known) -> tuple[Place | None, Content | _Changed]:
        """What a member's header is likest, and what its content is; or what is to be compared with it."""
        index = self._index
        reference = index.find_like(known)
        if not known.content:
            return reference, Content("empty")
        if reference and index.at(reference).content == known.content:
            return reference, Content("same", reference)
        same = index.find_content(known.content)
        if same:
            return reference, Content("same", same)
        source = reference if reference and index.at(reference).content else None
        return reference, _Changed(source or index.find_named(known))

    def _choose(self, known: Known, source: Place | None) -> Content:
        new = self._target.pread(known.member.content, known.member.size)
        old = None
        if source:
            old = self._index.base.read(*source, 0, self._index.at(source).member.size)
        return choose(old, new, source, self._settings)

    def _rest(self, position: int) -> None:
        """What follows the last member: zeros, or anything."""
        chunks = self._chunks
        while position < self._target.total:
            data = self._target.pread(position, _READ_BYTES)
            zeros = len(data) - len(data.lstrip(b"\0"))
            if zeros:
                chunks.number(program.ITEM, program.ZEROS)
                chunks.number(program.SIZE, zeros)
            if zeros < len(data):
                chunks.number(program.ITEM, program.RAW_ITEM)
                chunks.number(program.SIZE, len(data) - zeros)
                self._streams[sections.LITERAL] += data[zeros:]
            position += len(data)
            chunks.end_item()

    def _member(self, known: Known, reference: Place | None, content: Content) -> None:
        chunks, member, source = self._chunks, known.member, content.source
        chunks.number(program.ITEM, program.MEMBER)
        base_header = b""
        if reference is None:
            chunks.number(program.REF, 0)
        else:
            base_header = self._index.base.header(*reference)
            if reference.layer != self._layer:
                chunks.number(program.REF, 2 + (zigzag(reference.ordinal) << 1 | 1))
                chunks.number(program.REF_LAYER, reference.layer)
            elif reference.ordinal == self._ordinal + 1:
                chunks.number(program.REF, 1)
            else:
                chunks.number(program.REF, 2 + (zigzag(reference.ordinal - self._ordinal - 1) << 1))
            self._layer, self._ordinal = reference
        own = source == reference
        if content.how == "empty":
            kind = program.EMPTY if reference and self._index.at(reference).content else program.EXPECTED
        elif content.how == "same":
            kind = program.EXPECTED if own else program.COPY
        elif content.how == "bsdiff":
            kind = program.BSDIFF_REF if own else program.BSDIFF
        elif content.how == "moved":
            kind = program.MOVED_REF if own else program.MOVED
        else:
            kind = program.FRAMED if content.how == "framed" else program.LITERAL_CONTENT
        chunks.number(program.KIND, kind)
        if kind in (program.COPY, program.BSDIFF, program.MOVED):
            assert source is not None
            if source.layer != self._source.layer:
                chunks.number(program.SOURCE, zigzag(source.ordinal) << 1 | 1)
                chunks.number(program.SOURCE_LAYER, source.layer)
            else:
                chunks.number(program.SOURCE, zigzag(source.ordinal - self._source.ordinal) << 1)
            self._source = source
        if content.how in ("literal", "framed"):
            chunks.number(program.SIZE, member.size)
        elif content.how in ("bsdiff", "moved"):
            assert source is not None
            chunks.number(program.SIZE, zigzag(member.size - self._index.at(source).member.size))
        self._header(self._target.pread(member.start, member.content - member.start), base_header, member.size)
        if content.how in ("bsdiff", "moved"):
            chunks.number(program.COUNT, content.triples)
        for number in content.moved.numbers() if content.moved else ():
            chunks.number(program.CODE, number)
        for numbers in content.frames:
            for number in numbers:
                chunks.number(program.FRAME, number)
        if member.size:
            origin = self._index.at(source).path if source else b""
            self._lines.append(Line(known.path, member.size, content.how, origin, content.cost_bytes))
        chunks.end_item()

    def _pool(self, content: Content) -> None:
        """Move a file's bsdiff to the layer's streams."""
        assert content.bsdiff is not None
        *triples, (add, after, _) = content.bsdiff.triples
        self._triples += triples
        self._triples.append((add & COPIED, after, 0))  # the rest is what the size leaves
        self._streams[sections.DIFF] += content.bsdiff.diff
        self._streams[sections.EXTRA] += content.bsdiff.extra
        content.triples, content.bsdiff = len(content.bsdiff.triples), None

    def _header(self, header: bytes, base: bytes, size: int) -> None:
        chunks = self._chunks
        count = len(header) // BLOCK
        chunks.number(program.BLOCKS, 0 if count == (len(base) // BLOCK or 1) else count)
        data_blocks = 0  # of the extension member before, still to come
        for index in range(count):
            block = header[index * BLOCK : (index + 1) * BLOCK]
            main = index == count - 1
            if main:
                against = base[-BLOCK:] or ZERO_BLOCK
            else:
                against = base[index * BLOCK : (index + 1) * BLOCK] if (index + 1) * BLOCK < len(base) else ZERO_BLOCK
            if block == against:
                chunks.number(program.MASK, SAME)
            elif data_blocks:
                chunks.number(program.MASK, RAW)
                chunks.value(program.RAW_VALUES, block.rstrip(b"\0"))
            else:
                self._coded_block(block, against, main, size)
            if data_blocks:
                data_blocks -= 1
            elif not main and is_extension(block):
                data_blocks = padded(parse_number(block[124:136]) or 0) // BLOCK
            if main:
                self._previous_main = block

    def _coded_block(self, block: bytes, against: bytes, main: bool, size: int) -> None:
        chunks = self._chunks
        previous = self._previous_main if main else self._previous_extension
        mask, values = mask_of(block, against, previous, size if main else 0)
        number = self._masks.get(mask, len(self._masks))
        if number == MAX_MASKS:  # an odd tar: give the block as it is
            chunks.number(program.MASK, RAW)
            chunks.value(program.RAW_VALUES, block.rstrip(b"\0"))
            return
        chunks.number(program.MASK, FIRST_MASK + number)
        if number == len(self._masks):
            self._masks[mask] = number
            chunks.number(program.NEW_MASK, mask)
        for which, value in values:
            chunks.value(which, value)
        if not main:
            self._previous_extension = block


def _done(content: Future[Content] | Content) -> Content:
    return content.result() if isinstance(content, Future) else content
