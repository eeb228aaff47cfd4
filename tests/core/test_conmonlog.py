from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.conmonlog import STDERR, STDOUT, LogPart, count_lines, format_line, parse_line, parse_time

parts = st.builds(
    LogPart,
    st.integers(0, 4 * 10**18),
    st.sampled_from([STDOUT, STDERR]),
    st.booleans(),
    st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"")),
)


@given(parts)
def test_a_line_is_read_as_it_was_written(part: LogPart) -> None:
    line = format_line(part)

    assert parse_line(line[:-1]) == part
    assert count_lines(line) == part.ends_line


@given(st.lists(parts))
def test_the_lines_that_end_are_counted(found: list[LogPart]) -> None:
    assert count_lines(b"".join(map(format_line, found))) == sum(part.ends_line for part in found)


@given(st.binary(max_size=120))
def test_any_bytes_are_a_line_or_none(data: bytes) -> None:
    part = parse_line(data)
    assert part is None or part.data == data[45:]
    assert count_lines(data) <= data.count(b" F ")


def test_an_offset_from_utc_is_taken_off() -> None:
    utc = parse_time(b"2026-11-23T14:08:39.094557432+00:00")
    assert utc == 1795442919094557432
    assert parse_time(b"2026-11-23T16:08:39.094557432+02:00") == utc
    assert parse_time(b"2026-11-23T08:38:39.094557432-05:30") == utc


def test_what_conmon_wrote_is_read() -> None:
    line = b"2026-11-23T14:08:39.094557432+00:00 stdout P part"
    assert parse_line(line) == LogPart(1795442919094557432, STDOUT, False, b"part")
    line = b"2026-11-23T14:08:39.095309458+00:00 stderr F "
    assert parse_line(line) == LogPart(1795442919095309458, STDERR, True, b"")
    assert parse_line(b"xx") is None
    assert parse_line(b"2026-13-23T14:08:39.095309458+00:00 stderr F x") is None
