"""The first section of a native delta: what the target tar is made of, as chunks of columns.

Theory
------
A chunk tells of some hundred items. An item is a member of the tar, bytes that belong to no member, or zeros. What
is said of all items of a chunk stands column by column, since the numbers of one column resemble each other:

    chunk := length, then for each column: length, bytes

A number column begins with PLAIN, and is varints, or with RUNS, and is pairs (number, how often): most of a layer's
members do what the one before did. A bytes column is cut by the numbers in `VALUE_SIZE`. The columns are listed here
once and read in the order in which an item asks for them; FORMAT.md tells which item asks for what.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, groupby, repeat

from delta.errors import Malformed
from delta.headers import FIELDS
from delta.sections import MAX_CHUNK_BYTES, SectionReader, numbers, put, take

# Number columns.
ITEM, REF, REF_LAYER, BLOCKS, MASK, NEW_MASK, KIND, SOURCE_LAYER, SOURCE, SIZE, COUNT, FRAME, VALUE_SIZE = range(13)
CODE = 13
NUMBER_COLUMNS = 14
# Bytes columns: one for each field of a header, one for blocks given whole.
RAW_VALUES = len(FIELDS)
BYTES_COLUMNS = len(FIELDS) + 1

MEMBER, RAW_ITEM, ZEROS = range(3)
# How a member's content comes. EXPECTED: that of the reference, or none if there is no reference or it has none.
# MOVED: as BSDIFF, the old file's addresses foretold (`addresses.py`).
EXPECTED, EMPTY, COPY, BSDIFF_REF, BSDIFF, FRAMED, LITERAL_CONTENT, MOVED_REF, MOVED = range(9)
PLAIN, RUNS = range(2)


def _number_column(values: list[int]) -> bytes:
    """A column in the shorter of its two forms; an empty one has none."""
    if not values:
        return b""
    plain, runs = bytearray((PLAIN,)), bytearray((RUNS,))
    for value in values:
        put(plain, value)
    for value, run in groupby(values):
        put(runs, value)
        put(runs, sum(1 for _ in run))
    return bytes(min(runs, plain, key=len))


def _read_column(data: bytes) -> Iterator[int]:
    """The numbers of a column. Runs are not laid out: a few bytes may tell of any number of them."""
    if not data:
        return iter(())
    if data[0] == PLAIN:
        return numbers(data[1:])
    if data[0] != RUNS:
        raise Malformed(f"native delta: no column form {data[0]}")
    pairs = numbers(data[1:])
    return chain.from_iterable(repeat(value, count) for value, count in zip(pairs, pairs))  # noqa: B905


class ChunkWriter:
    """Collects columns and writes a chunk whenever enough has come together."""

    def __init__(self) -> None:
        self.out = bytearray()
        self._clear()

    def _clear(self) -> None:
        self._numbers: list[list[int]] = [[] for _ in range(NUMBER_COLUMNS)]
        self._bytes = [bytearray() for _ in range(BYTES_COLUMNS)]
        self._held = 0

    def number(self, column: int, value: int) -> None:
        self._numbers[column].append(value)
        self._held += (value.bit_length() + 6) // 7 or 1

    def value(self, column: int, data: bytes) -> None:
        self.number(VALUE_SIZE, len(data))
        self._bytes[column] += data
        self._held += len(data)

    def end_item(self) -> None:
        """Between two items. A single one adds less than 1/3 of MAX_CHUNK_BYTES (128 raw blocks and little else)."""
        if self._held > MAX_CHUNK_BYTES // 2:
            self.flush()

    def flush(self) -> None:
        if not self._numbers[ITEM]:
            return
        chunk = bytearray()
        columns: list[bytes | bytearray] = [*map(_number_column, self._numbers), *self._bytes]
        for column in columns:
            put(chunk, len(column))
            chunk += column
        put(self.out, len(chunk))
        self.out += chunk
        self._clear()


def _exhausted() -> Iterator[int]:
    for _ in "x":
        raise Malformed("native delta: a column has too few numbers")
    yield 0


class Chunk:
    """The columns of one chunk, each read from its front."""

    def __init__(self, data: bytes) -> None:
        columns, position = [], 0
        for _ in range(NUMBER_COLUMNS + BYTES_COLUMNS):
            size, position = take(data, position)
            if size > len(data) - position:
                raise Malformed("native delta: a column is cut")
            columns.append(data[position : position + size])
            position += size
        if position != len(data):
            raise Malformed("native delta: a chunk is longer than its columns")
        self.items = _read_column(columns[ITEM])
        self.numbers = [chain(_read_column(column), _exhausted()) for column in columns[:NUMBER_COLUMNS]]
        self._bytes = columns[NUMBER_COLUMNS:]
        self._positions = [0] * BYTES_COLUMNS

    def value(self, column: int) -> bytes:
        """The next value of a bytes column."""
        size = next(self.numbers[VALUE_SIZE])
        start = self._positions[column]
        end = self._positions[column] = start + size
        if end > len(self._bytes[column]):
            raise Malformed("native delta: a column has too few bytes")
        return self._bytes[column][start:end]


def read_chunks(section: SectionReader) -> Iterator[Chunk]:
    """The chunks up to the section's end."""
    while section.left:
        size = shift = 0
        while True:
            byte = section.read(1)[0]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 21:
                raise Malformed("native delta: a chunk is too large")
        if size > MAX_CHUNK_BYTES:
            raise Malformed(f"native delta: a chunk of {size} bytes")
        yield Chunk(section.read(size))
