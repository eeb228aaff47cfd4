from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balenapy.core.conmonlog import STDERR, STDOUT, LogPart, format_line
from balenapy.core.logview import ENTRY_MAX_BYTES, Entry, Joiner
from balenapy.core.ringlog import (
    CHECKPOINT,
    RUN_END,
    TEXT,
    Geometry,
    Record,
    Ring,
    SpoolPosition,
    Writer,
)
from balenapy.errors import DataLoss

SMALL = Geometry(4, 512)
TIME_NS = 1_700_000_000_000_000_000


class MemoryFile:
    def __init__(self, geometry: Geometry) -> None:
        self.data = bytearray(geometry.file_size)
        header = geometry.header()
        self.data[: len(header)] = header

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])

    def write(self, writer: Writer, limit: int | None = None) -> None:
        """Do what the writer wants; with `limit`, die after that many bytes."""
        for offset, piece in writer.take():
            if limit is not None:
                piece, limit = piece[:limit], limit - len(piece[:limit])
            self.data[offset : offset + len(piece)] = piece


def line(number: int, stream: int = STDOUT, ends: bool = True, text: bytes = b"") -> bytes:
    return format_line(LogPart(TIME_NS + number, stream, ends, text or b"line %d" % number))


def all_records(ring: Ring) -> list[Record]:
    newest = ring.newest_number()
    numbers = range(ring.oldest_number(newest), newest + 1) if newest else ()
    return [record for number in numbers for record in ring.read_block(number)]


def text_of(ring: Ring) -> bytes:
    return b"".join(record.data for record in all_records(ring) if record.kind == TEXT)


# Lines that fit into a block of the small ring.
lines = st.lists(
    st.builds(
        line,
        st.integers(0, 10**9),
        st.sampled_from([STDOUT, STDERR]),
        st.booleans(),
        st.binary(min_size=1, max_size=380).map(lambda data: data.replace(b"\n", b"_")),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(batches=st.lists(lines, max_size=6))
def test_the_newest_lines_come_back_in_order_and_intact(batches: list[list[bytes]]) -> None:
    file = MemoryFile(SMALL)
    for batch in batches:
        writer = Writer(SMALL, Ring(file.read).end())  # opened anew for every batch
        writer.append_text(b"".join(batch))
        writer.append_checkpoint(SpoolPosition(1, 2))
        file.write(writer)

    ring = Ring(file.read)
    seqs = [record.seq for record in all_records(ring)]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs))) if seqs else True
    written = b"".join(one for batch in batches for one in batch)
    read = text_of(ring)
    assert written.endswith(read)
    assert not read or read.count(b"\n") <= written.count(b"\n")
    if len(written) + 60 * len(batches) < 1000:
        assert read == written


@settings(max_examples=300, deadline=None)
@given(first=lines, second=lines, limit=st.integers(0, 4000))
def test_a_write_cut_at_any_byte_costs_only_what_was_not_written(
    first: list[bytes], second: list[bytes], limit: int
) -> None:
    file = MemoryFile(SMALL)
    writer = Writer(SMALL)
    writer.append_text(b"".join(first))
    writer.append_checkpoint(SpoolPosition(5, 10))
    file.write(writer)
    writer.append_text(b"".join(second))
    file.write(writer, limit)

    ring = Ring(file.read)
    seqs = [record.seq for record in all_records(ring)]
    assert seqs == sorted(set(seqs))
    assert (b"".join(first) + b"".join(second)).find(text_of(ring)) >= 0

    checkpoint = ring.last_checkpoint()
    if checkpoint is not None:
        position, behind = checkpoint
        assert position == SpoolPosition(5, 10)
        again = Writer(SMALL, ring.end())
        again.rewind(behind, ring.end())
        file.write(again)
        again.append_text(line(1, text=b"again"))
        file.write(again)
        after = all_records(Ring(file.read))
        assert after[-1].data == line(1, text=b"again")
        assert after[-1].seq == behind.seq
        assert after[-2].kind == CHECKPOINT


def test_every_byte_flipped_costs_at_most_the_record_it_touches() -> None:
    file = MemoryFile(SMALL)
    writer = Writer(SMALL)
    for number in range(40):
        writer.append_text(line(number))
    file.write(writer)
    whole = {record.seq for record in all_records(Ring(file.read))}
    for offset in range(4096, len(file.data)):
        file.data[offset] ^= 0x55
        found = {record.seq for record in all_records(Ring(file.read))}
        file.data[offset] ^= 0x55
        assert found <= whole
        assert len(whole - found) <= 1, offset


def test_a_line_too_long_for_a_block_is_cut_off() -> None:
    file = MemoryFile(SMALL)
    writer = Writer(SMALL)
    writer.append_text(line(1) + line(2, text=b"x" * 2000) + line(3))
    file.write(writer)

    found = text_of(Ring(file.read))
    assert found.startswith(line(1) + line(2, text=b"x" * 2000)[:400])
    assert found.endswith(line(3))
    assert len(found) < 700


def test_a_damaged_header_is_told() -> None:
    header = bytearray(SMALL.header())
    header[20] ^= 1
    with pytest.raises(DataLoss, match="damaged"):
        Geometry.parse(bytes(header))
    with pytest.raises(DataLoss, match="not a ring log"):
        Geometry.parse(b"")


def test_the_last_lines_are_found_without_reading_everything() -> None:
    geometry = Geometry(16, 512)
    file = MemoryFile(geometry)
    writer = Writer(geometry)
    writer.append_text(b"".join(map(line, range(300))))
    file.write(writer)
    ring = Ring(file.read)

    assert ring.start_of_tail(3) >= ring.newest_number() - 1
    assert ring.start_of_tail(10_000) == ring.oldest_number(ring.newest_number())
    assert ring.newest_after(1) == ring.newest_number()


def test_pieces_are_joined_into_lines_and_long_lines_are_cut() -> None:
    joiner = Joiner()

    def feed(number: int, stream: int, ends: bool, text: bytes) -> list[tuple[int, int, bytes]]:
        data = format_line(LogPart(TIME_NS + number, stream, ends, text))
        return shown(joiner.feed(Record(1, 0, TEXT, data, 0)))

    def shown(entries: list[Entry]) -> list[tuple[int, int, bytes]]:
        return [(int(stamp[26:29]), stream, data) for stamp, stream, data in entries]

    assert feed(1, STDOUT, False, b"a") == []
    assert feed(2, STDERR, True, b"x") == [(2, STDERR, b"x\n")]
    assert feed(3, STDOUT, True, b"b") == [(3, STDOUT, b"ab\n")]
    assert feed(4, STDOUT, False, b"y" * 10_000) == []
    assert feed(5, STDOUT, False, b"y" * 10_000) == [(5, STDOUT, b"y" * ENTRY_MAX_BYTES)]
    assert feed(6, STDOUT, True, b"") == [(5, STDOUT, b"y" * (20_000 - ENTRY_MAX_BYTES) + b"\n")]
    assert feed(7, STDOUT, False, b"last") == []
    assert joiner.feed(Record(1, 0, CHECKPOINT, b"", 0)) == []
    assert shown(joiner.feed(Record(1, 0, RUN_END, b"", 0))) == [(7, STDOUT, b"last")]
    assert joiner.flush() == []


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=SMALL.file_size))
def test_any_bytes_are_read_without_an_error_of_another_kind(data: bytes) -> None:
    def read(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    ring = Ring(read, SMALL)
    joiner = Joiner()
    for record in all_records(ring):
        joiner.feed(record)
    joiner.feed(Record(1, 0, TEXT, data, 0))
    ring.end()
    ring.last_checkpoint()
    ring.start_of_tail(3)
    with pytest.raises(DataLoss):
        Ring(read)
