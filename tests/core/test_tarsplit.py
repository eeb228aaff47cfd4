"""tar-split: what is kept beside a layer gives back its tar to the byte."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balenapy.core import tarsplit
from balenapy.core.tarsplit import File, InvalidSplit, Record, Segment, SplitReader, join
from balenapy.errors import DataLoss
from tests.core import tars
from tests.core.test_tarstream import archives, read

records_strategy = st.lists(
    st.one_of(
        st.builds(Segment, st.binary(max_size=700)),
        st.builds(File, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=300)),
    ),
    max_size=20,
)


def encode(records: Iterable[Record]) -> bytes:
    return tarsplit.MAGIC + b"".join(
        tarsplit.encode_segment(record.raw) if isinstance(record, Segment) else tarsplit.encode_file(*record)
        for record in records
    )


def decode(data: bytes, step: int = 1 << 20) -> list[Record]:
    reader = SplitReader()
    records = [record for at in range(0, len(data), step) for record in reader.feed(data[at : at + step])]
    reader.close()
    return records


def split(data: bytes) -> tuple[list[Record], dict[bytes, bytes]]:
    """The records of a tar, and the contents that they leave out (by number: a path may occur twice)."""
    entries, everything = read(data)
    assert everything == data
    records: list[Record] = []
    contents = {}
    at = 0
    for number, (entry, content) in enumerate(entries):
        records.append(Segment(entry.raw))
        at += len(entry.raw) + len(content)
        if content:
            path = b"%d" % number
            contents[path] = content
            records.append(File(len(content), zlib.crc32(content), path))
    records.append(Segment(data[at:]))
    return records, contents


@given(records_strategy, st.integers(1, 800))
@settings(max_examples=60, deadline=None)
def test_reading_is_the_inverse_of_writing_for_any_cut(records: list[Record], step: int) -> None:
    assert decode(encode(records), step) == records


@given(archives(), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_join_is_the_inverse_of_split(data: bytes, piece: int) -> None:
    records, contents = split(data)

    def open_content(file: File) -> Iterator[bytes]:
        content = contents[file.path]
        for at in range(0, len(content), piece):
            yield content[at : at + piece]

    assert b"".join(join(decode(encode(records)), open_content)) == data


@pytest.mark.parametrize("content", [b"hell", b"hello!", b"jello", b""], ids=["short", "long", "changed", "empty"])
def test_a_file_that_was_changed_is_named(content: bytes) -> None:
    records = [Segment(b"head"), File(5, zlib.crc32(b"hello"), b"etc/motd")]

    with pytest.raises(DataLoss, match="etc/motd was changed after it was unpacked"):
        b"".join(join(records, lambda _: [content]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        tarsplit.MAGIC[:-1],
        b"something else entirely, longer than the magic",
        encode([Segment(b"abc")])[:-1],
        tarsplit.MAGIC + b"\x03\0\0\0\0",
        tarsplit.MAGIC + b"\x02\x01\0\0\0x",
        tarsplit.MAGIC + b"\x01\xff\xff\xff\xff",
    ],
)
def test_what_is_no_tar_split_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidSplit):
        decode(data)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_are_read_or_refused(data: bytes) -> None:
    for candidate in (data, tarsplit.MAGIC + data):
        try:
            records = decode(candidate, 7)
        except InvalidSplit:
            continue
        assert encode(records) == candidate


def test_the_reader_of_tars_gives_what_split_needs() -> None:
    """`TarReader` loses no byte of a tar with everything in it."""
    data = (
        tars.pax((b"mtime", b"1.5")) + tars.file(b"a", b"1" * 513) + tars.directory(b"d")
        + tars.file(b"a", b"2") + tars.END + bytes(9000) + b"more"
    )  # fmt: skip
    records, contents = split(data)

    assert [record for record in records if isinstance(record, File)] == [
        File(513, zlib.crc32(b"1" * 513), b"0"),
        File(1, zlib.crc32(b"2"), b"2"),
    ]
    assert b"".join(join(records, lambda file: [contents[file.path]])) == data
