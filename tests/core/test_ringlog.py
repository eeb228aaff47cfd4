from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balenapy.core.ringlog import (
    CHECKPOINT,
    ENTRY_MAX_BYTES,
    LINE_END,
    RUN_END,
    STDERR,
    STDOUT,
    Entry,
    Geometry,
    Joiner,
    Record,
    Ring,
    SpoolPosition,
    Writer,
)
from balenapy.errors import DataLoss

SMALL = Geometry(4, 512)


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


def all_records(ring: Ring) -> list[Record]:
    newest = ring.newest_number()
    return [
        record
        for number in range(ring.oldest_number(newest), newest + 1)
        if newest
        for record in ring.read_block(number)
    ]


def all_entries(ring: Ring) -> list[Entry]:
    joiner = Joiner()
    found = [entry for record in all_records(ring) for entry in joiner.feed(record)]
    return found + list(joiner.flush(0))


lines = st.lists(st.tuples(st.sampled_from([STDOUT, STDERR]), st.booleans(), st.binary(max_size=700)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(batches=st.lists(lines, max_size=6))
def test_the_newest_records_come_back_in_order_and_intact(batches: list[list[tuple[int, bool, bytes]]]) -> None:
    file = MemoryFile(SMALL)
    written: list[tuple[int, int, bytes]] = []
    for batch in batches:
        writer = Writer(SMALL, Ring(file.read).end())  # opened anew for every batch
        for stream, ends, data in batch:
            writer.append(7, stream | (LINE_END if ends else 0), data)
        file.write(writer)
        written += [(stream, ends, data) for stream, ends, data in batch]

    records = all_records(Ring(file.read))

    assert [r.seq for r in records] == list(range(records[0].seq, records[0].seq + len(records))) if records else True
    # Joined over each stream, what is read is a tail of what was written.
    for stream in (STDOUT, STDERR):
        text = b"".join(data + (b"\n" if ends else b"") for s, ends, data in written if s == stream)
        read = b"".join(r.data + (b"\n" if r.ends_line else b"") for r in records if r.stream == stream)
        assert text.endswith(read)
        if sum(len(d) + 40 for _, _, d in written) < 1000:
            assert read == text


@settings(max_examples=200, deadline=None)
@given(first=lines, second=lines, limit=st.integers(0, 4000))
def test_a_write_cut_at_any_byte_costs_only_what_was_not_written(
    first: list[tuple[int, bool, bytes]], second: list[tuple[int, bool, bytes]], limit: int
) -> None:
    file = MemoryFile(SMALL)
    writer = Writer(SMALL)
    for stream, _, data in first:
        writer.append(1, stream | LINE_END, data)
    writer.append_checkpoint(SpoolPosition(5, 10), 1)
    file.write(writer)
    for stream, _, data in second:
        writer.append(2, stream | LINE_END, data)
    file.write(writer, limit)

    ring = Ring(file.read)
    records = all_records(ring)
    seqs = [record.seq for record in records]
    assert seqs == sorted(set(seqs))

    checkpoint = ring.last_checkpoint()
    if checkpoint is not None:
        position, behind = checkpoint
        assert position == SpoolPosition(5, 10)
        again = Writer(SMALL, ring.end())
        again.rewind(behind, ring.end())
        file.write(again)
        again.append(3, STDOUT | LINE_END, b"again")
        file.write(again)
        after = all_records(Ring(file.read))
        assert after[-1].data == b"again"
        assert after[-1].seq == behind.seq
        assert after[-2].kind == CHECKPOINT


@pytest.mark.parametrize("step", [1])
def test_every_byte_flipped_costs_at_most_the_records_it_touches(step: int) -> None:
    file = MemoryFile(SMALL)
    writer = Writer(SMALL)
    for number in range(40):
        writer.append(number, STDOUT | LINE_END, b"line %d" % number)
    file.write(writer)
    whole = all_records(Ring(file.read))
    for offset in range(4096, len(file.data), step):
        file.data[offset] ^= 0x55
        found = all_records(Ring(file.read))
        file.data[offset] ^= 0x55
        missing = {r.seq for r in whole} - {r.seq for r in found}
        assert len(missing) <= 1, offset
        assert {r.seq for r in found} <= {r.seq for r in whole}


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
    for number in range(300):
        writer.append(number, STDOUT | LINE_END, b"line %d" % number)
    file.write(writer)
    ring = Ring(file.read)

    number, _ = ring.start_of_tail(3)

    assert number == ring.newest_number()
    assert ring.start_of_tail(10_000)[0] == ring.oldest_number(ring.newest_number())


def test_pieces_are_joined_into_lines_and_long_lines_are_cut() -> None:
    joiner = Joiner()

    def feed(kind: int, data: bytes, time_ns: int = 0) -> list[Entry]:
        return list(joiner.feed(Record(1, time_ns, kind, data, 0)))

    assert feed(STDOUT, b"a", 1) == []
    assert feed(STDERR | LINE_END, b"x", 2) == [Entry(2, STDERR, b"x\n")]
    assert feed(STDOUT | LINE_END, b"b", 3) == [Entry(3, STDOUT, b"ab\n")]
    assert feed(STDOUT, b"y" * 10_000, 4) == []
    assert feed(STDOUT, b"y" * 10_000, 5) == [Entry(5, STDOUT, b"y" * ENTRY_MAX_BYTES)]
    assert feed(STDOUT | LINE_END, b"", 6) == [Entry(5, STDOUT, b"y" * (20_000 - ENTRY_MAX_BYTES) + b"\n")]
    assert feed(STDOUT, b"last", 7) == []
    assert feed(RUN_END, b"", 8) == [Entry(8, STDOUT, b"last")]


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=SMALL.file_size))
def test_any_bytes_are_read_without_an_error_of_another_kind(data: bytes) -> None:
    def read(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    ring = Ring(read, SMALL)
    all_records(ring)
    ring.end()
    ring.last_checkpoint()
    with pytest.raises(DataLoss):
        Ring(read)
