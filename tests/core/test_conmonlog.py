from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.conmonlog import STDERR, STDOUT, LineReader, LogPart, format_line, parse_time

parts = st.lists(
    st.builds(
        LogPart,
        st.integers(0, 4 * 10**18),
        st.sampled_from([STDOUT, STDERR]),
        st.booleans(),
        st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"")),
    ),
    max_size=12,
)


@given(parts, st.integers(1, 100))
def test_lines_are_read_however_the_file_is_cut(expected: list[LogPart], size: int) -> None:
    text = b"".join(map(format_line, expected))
    reader = LineReader()
    found = []
    for start in range(0, len(text), size):
        found += reader.feed(text[start : start + size])

    assert found == expected
    assert reader.damaged == 0
    assert reader.consumed_bytes == len(text)


@given(st.binary(max_size=300))
def test_any_bytes_are_lines_or_counted_as_damage(data: bytes) -> None:
    reader = LineReader()
    found = list(reader.feed(data))

    assert len(found) + reader.damaged == data.count(b"\n")
    assert reader.consumed_bytes == data.rfind(b"\n") + 1


def test_an_offset_from_utc_is_taken_off() -> None:
    utc = parse_time(b"2026-11-23T14:08:39.094557432+00:00")
    assert utc == 1795442919094557432
    assert parse_time(b"2026-11-23T16:08:39.094557432+02:00") == utc
    assert parse_time(b"2026-11-23T08:38:39.094557432-05:30") == utc


def test_what_conmon_wrote_is_read() -> None:
    reader = LineReader()
    text = b"2026-11-23T14:08:39.094557432+00:00 stdout P part\n2026-11-23T14:08:39.095309458+00:00 stderr F err\nxx\n"
    assert list(reader.feed(text)) == [
        LogPart(1795442919094557432, STDOUT, False, b"part"),
        LogPart(1795442919095309458, STDERR, True, b"err"),
    ]
    assert reader.damaged == 1
