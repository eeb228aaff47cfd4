from __future__ import annotations

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balenapy.core.conmonlog import STDERR, STDOUT, LogPart, format_line
from balenapy.core.logview import LogOptions, LogView
from balenapy.core.ringlog import COMPRESSED_MAX_BYTES, Geometry, Ring, SpoolPosition, Writer
from tests.core.test_ringlog import MemoryFile

TIME_NS = 1_700_000_000_000_000_000


def text(number: int) -> bytes:
    return b"line %d" % number


def line(number: int, time_ns: int = 0, stream: int = STDOUT, ends: bool = True) -> bytes:
    return format_line(LogPart(time_ns or TIME_NS + number, stream, ends, text(number)))


def written(geometry: Geometry, *lines: bytes) -> MemoryFile:
    file = MemoryFile(geometry)
    writer = Writer(geometry)
    for one in lines:
        writer.append_text(one)
    file.write(writer)
    return file


def shown(file: MemoryFile, **options: object) -> list[bytes]:
    view = LogView(Ring(file.read), LogOptions(**options), tty=True)  # type: ignore[arg-type]
    output = b""
    while data := view.read_some():
        output += data
    return (output + view.rest(run_ended=True)).splitlines()


class CountingFile(MemoryFile):
    reads = 0

    def read(self, offset: int, size: int) -> bytes:
        self.reads += size
        return super().read(offset, size)


@settings(max_examples=300)
@given(
    count=st.integers(1, 400),
    steps=st.lists(st.tuples(st.integers(0, 400), st.integers(-(10**12), 10**12)), max_size=3),
    data=st.data(),
)
def test_since_until_and_tail_show_what_filtering_all_of_it_would(
    count: int, steps: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Also where the clock was set, forward or back, once or several times."""
    geometry = Geometry(8, 512)
    times = [
        TIME_NS + 10**9 * number + sum(step for at, step in steps if at <= number) for number in range(count)
    ]
    file = written(geometry, *(line(number, times[number]) for number in range(count)))
    everything = shown(file)
    first = count - len(everything)
    assert everything == [text(number) for number in range(first, count)]

    since = data.draw(st.sampled_from(times)) + data.draw(st.integers(-1, 1))
    assert shown(file, since_ns=since) == [text(n) for n in range(first, count) if times[n] >= since]
    tail = data.draw(st.integers(0, 420))
    assert shown(file, tail=tail) == everything[max(0, len(everything) - tail) :]
    until = data.draw(st.sampled_from(times))
    stop = next((n for n in range(first, count) if times[n] > until), count)
    assert shown(file, until_ns=until) == [text(n) for n in range(first, stop)]


def test_the_wanted_place_is_found_by_bisection() -> None:
    geometry = Geometry(4096)
    file = CountingFile(geometry)
    writer = Writer(geometry)
    for start in range(0, 300_000, 1000):
        writer.append_text(b"".join(line(n) for n in range(start, start + 1000)))
        file.write(writer)
    blocks = Ring(file.read).newest_number()
    assert blocks > 250

    for options in ({"tail": 5}, {"since_ns": TIME_NS + 299_990}):
        file.reads = 0
        assert shown(file, **options)[-1] == text(299_999)
        assert file.reads < 8 * geometry.block_size, options
    file.reads = 0
    shown(file, since_ns=TIME_NS + 150_000, until_ns=TIME_NS + 150_010)
    assert file.reads < 8 * geometry.block_size


def test_damage_is_shown_where_it_is() -> None:
    file = MemoryFile(Geometry(4, 4096))
    writer = Writer(file_geometry := Geometry(4, 4096))
    for number in range(3):
        writer.append_text(line(number))
    file.write(writer)
    at = file.data.find(text(1))
    file.data[at] ^= 1

    assert shown(file) == [text(0), b"[balenapy: 1 damaged record of this log cannot be shown]", text(2)]
    assert file_geometry.file_size == len(file.data)
    assert shown(file, stderr=False) == [text(0), text(2)]


def test_what_was_dropped_is_told() -> None:
    file = MemoryFile(Geometry(4, 4096))
    writer = Writer(Geometry(4, 4096))
    writer.append_text(line(0))
    writer.append_lost(1234)
    writer.append_text(line(1))
    writer.append_lost(5)
    file.write(writer)

    dropped = b"[balenapy: %d bytes of output were dropped, they came too fast to be logged]"
    assert shown(file) == [text(0), dropped % 1234, text(1), dropped % 5]


def test_a_slow_reader_is_told_what_it_missed() -> None:
    geometry = Geometry(4, 512)
    file = MemoryFile(geometry)
    writer = Writer(geometry)
    writer.append_text(b"".join(map(line, range(10))))
    file.write(writer)
    view = LogView(Ring(file.read), LogOptions(follow=True), tty=True)
    first = b""
    while data := view.read_some():
        first += data
    for number in range(10, 500):
        writer.append_text(line(number))
    file.write(writer)
    rest = b""
    while data := view.read_some():
        rest += data

    lines = rest.splitlines()
    oldest = int(lines[1].split()[1])
    assert first.splitlines() == [text(number) for number in range(10)]
    assert lines[0] == b"[balenapy: %d lines were overwritten before they were read]" % (oldest - 10)
    assert lines[1:] == [text(number) for number in range(oldest, 500)]


@settings(max_examples=200)
@given(bites=st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_a_reader_that_is_overtaken_tells_every_line_it_does_not_show(bites: list[int]) -> None:
    geometry = Geometry(4, 512)
    file = MemoryFile(geometry)
    writer = Writer(geometry)
    view = LogView(Ring(file.read), LogOptions(follow=True), tty=True)
    writer.append_text(line(0))
    file.write(writer)
    output, number = view.read_some(), 1
    for bite in bites:
        writer.append_text(b"".join(line(n) for n in range(number, number + bite)))
        writer.append_checkpoint(SpoolPosition(1, number))
        file.write(writer)
        number += bite
        output += view.read_some()
    while data := view.read_some():
        output += data

    expected = 0
    for one in output.splitlines():
        if one.startswith(b"["):
            assert one.endswith(b"lines were overwritten before they were read]")
            expected += int(one.split()[1])
        else:
            assert one == text(expected)
            expected += 1
    assert expected == number


def test_compressed_text_holds_more_and_costs_one_record_when_damaged() -> None:
    geometry = Geometry(8, 4096)

    def compress(data: bytes) -> bytes:
        return zlib.compress(data)

    def decompress(data: bytes) -> bytes:
        try:
            return zlib.decompressobj().decompress(data, COMPRESSED_MAX_BYTES)
        except zlib.error as error:
            raise ValueError(str(error)) from error

    file = MemoryFile(geometry)
    writer = Writer(geometry, compress=compress)
    for start in range(0, 8000, 500):
        writer.append_text(b"".join(line(n) for n in range(start, start + 500)))
    file.write(writer)

    def shown_of(file: MemoryFile) -> list[bytes]:
        view = LogView(Ring(file.read, decompress=decompress), LogOptions(), tty=True)
        output = b""
        while data := view.read_some():
            output += data
        return output.splitlines()

    lines = shown_of(file)
    assert lines == [text(number) for number in range(8000 - len(lines), 8000)]
    assert len(lines) * 50 > 4 * geometry.file_size
    without = shown(file)
    assert all(b"damaged" in one for one in without)
    file.data[geometry.offset(Ring(file.read).newest_number() - 1) + 300] ^= 1
    damaged = shown_of(file)
    assert len(lines) - 1500 < len(damaged) < len(lines)
    assert sum(b"damaged record" in one for one in damaged) == 1


@pytest.mark.parametrize("block", range(4))
def test_a_damaged_head_costs_no_line(block: int) -> None:
    geometry = Geometry(4, 512)
    file = written(geometry, *(line(number) for number in range(200)))
    whole = shown(file)
    file.data[4096 + 512 * block + 9] ^= 1

    assert shown(file) == whole
    end = Ring(file.read).end()
    writer = Writer(geometry, end)
    writer.append_text(line(200, stream=STDERR))
    file.write(writer)
    assert shown(file)[-1] == text(200)
