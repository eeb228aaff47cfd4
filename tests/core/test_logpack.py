from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balenapy.core.checksum import crc32c
from balenapy.core.conmonlog import STDERR, STDOUT, LogPart, format_line
from balenapy.core.logpack import pack, unpack

TIME_NS = 1_700_000_000_123_456_789

texts = st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"_"))
conmon_lines = st.builds(
    lambda ago, stream, ends, text: format_line(LogPart(TIME_NS + ago, stream, ends, text)),
    st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 10**12)),
    st.sampled_from([STDOUT, STDERR]),
    st.booleans(),
    texts,
)


@settings(max_examples=1000)
@given(lines=st.lists(st.one_of(conmon_lines, texts.map(lambda text: text + b"\n")), min_size=1, max_size=60))
def test_what_is_packed_comes_back_exactly_and_is_shorter(lines: list[bytes]) -> None:
    text = b"".join(lines)
    packed = pack(text)

    assert packed is None or (unpack(packed) == text and len(packed) < len(text))


def test_lines_of_one_moment_cost_next_to_nothing() -> None:
    text = b"".join(format_line(LogPart(TIME_NS, STDOUT, True, b"x" * 99)) for _ in range(28))
    packed = pack(text)

    assert packed is not None
    assert len(packed) < 28 * 100 + 60


def test_lines_one_after_the_other_cost_their_digits() -> None:
    text = b"".join(format_line(LogPart(TIME_NS + 1000 * n, STDOUT, True, b"x" * 99)) for n in range(28))
    packed = pack(text)

    assert packed is not None
    assert len(packed) < 28 * 108 + 80


def test_a_piece_that_has_every_byte_stays_as_it_is() -> None:
    every = bytes(range(256)).replace(b"\n", b"")
    text = b"".join(format_line(LogPart(TIME_NS, STDOUT, True, every)) for _ in range(5))

    assert pack(text) is None


@settings(max_examples=500)
@given(data=st.binary(max_size=300))
def test_any_bytes_unpack_or_are_refused(data: bytes) -> None:
    try:
        unpack(data)
    except ValueError:
        pass


def test_a_bomb_is_refused() -> None:
    grow = [(b"a", b"z" * 255), (b"b", b"a" * 255), (b"c", b"b" * 255)]  # the last is undone first
    bomb = bytes((3,)) + b"".join(mark + bytes((255,)) + string for mark, string in grow) + b"c" * 4000
    with pytest.raises(ValueError, match="too long"):
        unpack(bomb)


def test_the_checksum_is_castagnolis() -> None:
    # RFC 3720, B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"6789", crc32c(b"12345")) == crc32c(b"123456789") == 0xE3069283
