"""The container of a native delta: a few streams, each compressed by itself, and the numbers inside them.

Theory
------
    MAGIC, head, sections back to back

The head is varints and fixed bytes (FORMAT.md); it tells of each section how it is compressed, how long it is, and
the window it needs, so that a reader knows its memory before it takes any. A section is read front to back through
a decompressor of its own; the delta itself is read at offsets, from a file.

The first section is cut into chunks of columns: all numbers of one kind of a few hundred members stand together.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, cast

import zstandard

from delta.errors import Malformed, OverBudget, Unsupported

MAGIC = b"BPDELTA1"
STORED, LZMA, ZSTD = range(3)
META, CONTROL, DIFF, EXTRA, LITERAL, FRAMES = range(6)
SECTIONS = 6
SECTION_NAMES = ("meta", "control", "diff", "extra", "literal", "frames")
MIN_WINDOW_LOG, MAX_WINDOW_LOG = 12, 23  # 4 KiB to 8 MiB
MAX_HEAD_BYTES = 4096
MAX_CHUNK_BYTES = 1 << 18
MANY_PROPERTIES_BYTES = 1 << 20  # beyond, trying several takes too long for the percent it brings
_INPUT_BYTES = 1 << 15

ReadAt = Callable[[int, int], bytes]


# Numbers


def put(out: bytearray, value: int) -> None:
    """A number as a varint: seven bits a byte, the lowest first."""
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def zigzag(value: int) -> int:
    return value << 1 if value >= 0 else (-value << 1) - 1


def unzigzag(value: int) -> int:
    return -((value + 1) >> 1) if value & 1 else value >> 1


def take(data: bytes, position: int) -> tuple[int, int]:
    """A varint of at most 63 bits at a position, and the position after it."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 56:
            raise Malformed("native delta: a number is cut or too large")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def numbers(data: bytes) -> Iterator[int]:
    """All varints of a column."""
    if data.isascii():  # every byte is a number: the common case, at the speed of C
        return iter(data)
    out = []
    value = shift = 0
    for byte in data:
        if byte < 0x80:
            out.append(value | byte << shift)
            value = shift = 0
        else:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 56:
                raise Malformed("native delta: a number is too large")
    if shift:
        raise Malformed("native delta: a number is cut")
    return iter(out)


# Head


@dataclass(frozen=True, slots=True)
class Section:
    """How a section is stored."""

    codec: int
    stored_bytes: int
    plain_bytes: int
    window_log: int  # 0: stored
    properties: int  # LZMA: lc + 9 * (lp + 5 * pb)


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before the sections."""

    target_bytes: int
    target_sha256: bytes
    base_layers: int
    base_check: bytes  # 8 bytes, see `base_check`
    frame_bytes: int  # the most memory one zstd frame takes: its prefix and its content
    sections: tuple[Section, ...]

    def encode(self) -> bytes:
        out = bytearray(MAGIC)
        put(out, self.target_bytes)
        out += self.target_sha256
        put(out, self.base_layers)
        out += self.base_check
        put(out, self.frame_bytes)
        for section in self.sections:
            put(out, section.codec)
            put(out, section.stored_bytes)
            if section.codec != STORED:
                put(out, section.plain_bytes)
                put(out, section.window_log)
            if section.codec == LZMA:
                put(out, section.properties)
        return bytes(out)

    @property
    def memory_bytes(self) -> int:
        """What a reader's decompressors and frames need at most, beside its pieces."""
        windows = sum(1 << section.window_log for section in self.sections if section.codec != STORED)
        return windows + 2 * self.frame_bytes


def decode_head(data: bytes) -> tuple[Head, int]:
    """The head at the beginning of a delta, and where the sections start.

    Raises:
        Malformed, Unsupported: not a delta, or of another version.
    """
    if data[: len(MAGIC)] != MAGIC:
        if data.startswith(MAGIC[:-1]):
            raise Unsupported("native delta: of a later version")
        raise Malformed("native delta: wrong magic")
    target_bytes, at = take(data, len(MAGIC))
    target_sha256, at = data[at : at + 32], at + 32
    base_layers, at = take(data, at)
    base_check, at = data[at : at + 8], at + 8
    frame_bytes, at = take(data, at)
    sections = []
    for name in SECTION_NAMES:
        codec, at = take(data, at)
        stored, at = take(data, at)
        plain, window_log, properties = stored, 0, 0
        if codec > ZSTD:
            raise Unsupported(f"native delta: codec {codec} of section {name}")
        if codec != STORED:
            plain, at = take(data, at)
            window_log, at = take(data, at)
            if not MIN_WINDOW_LOG <= window_log <= MAX_WINDOW_LOG:
                raise Malformed(f"native delta: section {name} wants a window of 2^{window_log} bytes")
        if codec == LZMA:
            properties, at = take(data, at)
            if properties >= 9 * 5 * 5 or properties % 9 + properties // 9 % 5 > 4:
                raise Malformed(f"native delta: LZMA properties {properties} of section {name}")
        sections.append(Section(codec, stored, plain, window_log, properties))
    return Head(target_bytes, target_sha256, base_layers, base_check, frame_bytes, tuple(sections)), at


# Compressing


def lzma_filters(section: Section) -> list[dict[str, int]]:
    return [
        {
            "id": lzma.FILTER_LZMA2,
            "dict_size": 1 << section.window_log,
            "lc": section.properties % 9,
            "lp": section.properties // 9 % 5,
            "pb": section.properties // 45,
        }
    ]


def window_log_for(size: int) -> int:
    return min(MAX_WINDOW_LOG, max(MIN_WINDOW_LOG, (size - 1).bit_length()))


def window_logs(sizes: Sequence[int], budget_bytes: int) -> list[int]:
    """Windows for sections of these sizes that fit into a budget together: the largest give way.

    Raises:
        OverBudget: they cannot.
    """
    logs = [window_log_for(size) for size in sizes]
    while sum(1 << log for log in logs) > budget_bytes:
        largest = max(range(len(logs)), key=logs.__getitem__)
        if logs[largest] == MIN_WINDOW_LOG:
            raise OverBudget(f"no windows fit into {budget_bytes} bytes of a device's memory")
        logs[largest] -= 1
    return logs


def compress_lzma(data: bytes, properties: tuple[int, int, int], preset: int, log: int) -> tuple[Section, bytes]:
    lc, lp, pb = properties
    section = Section(LZMA, 0, len(data), log, lc + 9 * (lp + 5 * pb))
    (filters,) = lzma_filters(section)
    packed = lzma.compress(data, lzma.FORMAT_RAW, filters=[{**filters, "preset": preset}])
    return Section(LZMA, len(packed), len(data), log, section.properties), packed


def pack(
    data: bytes, properties: tuple[tuple[int, int, int], ...], window_log: int, fast: bool = False
) -> tuple[Section, bytes]:
    """The smallest of several ways to store a section. `window_log` is enough for it, or all there is."""
    choices = [(Section(STORED, len(data), len(data), 0, 0), data)]
    if len(data) > 8:
        # Matches of up to 273 bytes are worth their time in a diff: 15 % on executables.
        preset = 6 if fast and len(data) > 1 << 20 else 9 | lzma.PRESET_EXTREME
        tried = properties[:1] if len(data) > MANY_PROPERTIES_BYTES else properties
        choices += [compress_lzma(data, each, preset, window_log) for each in tried]
    return min(choices, key=lambda choice: len(choice[1]))


# Reading


class _Bounded:
    """A section's stored bytes as a file: never a byte of the next section."""

    def __init__(self, read_at: ReadAt, start: int, size: int) -> None:
        self._read_at, self._position, self._end = read_at, start, start + size

    def read(self, size: int = -1) -> bytes:
        left = self._end - self._position
        want = left if size < 0 else min(size, left)
        data = self._read_at(self._position, min(want, _INPUT_BYTES)) if want else b""
        self._position += len(data)
        return data


class SectionReader:
    """A section's plain bytes, front to back. Opened when first read."""

    def __init__(self, name: str, read_at: ReadAt, start: int, section: Section) -> None:
        self._name, self._section = name, section
        self._source = _Bounded(read_at, start, section.stored_bytes)
        self.left = section.plain_bytes
        self._lzma: lzma.LZMADecompressor | None = None
        self._zstd: zstandard.ZstdDecompressionReader | None = None
        self._pending = b""

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes.

        Raises:
            Malformed: the section has less, or is damaged.
        """
        if size > self.left:
            raise Malformed(f"native delta: section {self._name} ends {size - self.left} bytes too early")
        self.left -= size
        if size <= len(self._pending):
            data, self._pending = self._pending[:size], self._pending[size:]
            return data
        parts, missing = [self._pending], size - len(self._pending)
        self._pending = b""
        while missing:
            # Small reads are served from one larger piece.
            piece = self._more(max(missing, _INPUT_BYTES))
            if not piece:
                raise Malformed(f"native delta: section {self._name} is cut")
            parts.append(piece[:missing])
            self._pending = piece[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def _more(self, most: int) -> bytes:
        try:
            if self._section.codec == STORED:
                return self._source.read(most)
            if self._section.codec == ZSTD:
                if self._zstd is None:
                    decompressor = zstandard.ZstdDecompressor(
                        max_window_size=1 << self._section.window_log, format=zstandard.FORMAT_ZSTD1_MAGICLESS
                    )
                    self._zstd = decompressor.stream_reader(cast(IO[bytes], self._source), read_size=_INPUT_BYTES)
                return self._zstd.read(most)
            if self._lzma is None:
                self._lzma = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=lzma_filters(self._section))
            while not self._lzma.eof:
                given = self._source.read(_INPUT_BYTES) if self._lzma.needs_input else b""
                if self._lzma.needs_input and not given:
                    return b""
                data = self._lzma.decompress(given, most)
                if data:
                    return data
            return b""
        except (lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
            raise Malformed(f"native delta: section {self._name} is damaged: {error}") from None
