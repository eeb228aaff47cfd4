from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.detachkeys import KeyFilter, parse_keys
from balenapy.errors import InvalidParameter


@pytest.mark.parametrize(
    ("text", "keys"),
    [("", b"\x10\x11"), ("a", b"a"), ("ctrl-a,a", b"\x01a"), ("ctrl-@", b"\0"), ("DEL,ctrl-_", b"\x7f\x1f")],
)
def test_keys_are_read(text: str, keys: bytes) -> None:
    assert parse_keys(text) == keys


@pytest.mark.parametrize("text", ["ctrl-1", "ab", "ctrl-", "a,,b", "ctrl-aa"])
def test_what_is_no_key_is_named(text: str) -> None:
    with pytest.raises(InvalidParameter):
        parse_keys(text)


@given(st.lists(st.binary(max_size=5).map(lambda data: data.replace(b"q", b"z"))))
def test_input_without_the_sequence_passes_whole(pieces: list[bytes]) -> None:
    keys = KeyFilter(b"pq")
    passed = b"".join(map(keys.feed, pieces)) + keys.feed(b"x")

    assert passed == b"".join(pieces) + b"x"
    assert not keys.detached


@given(st.binary(max_size=20), st.integers(1, 5))
def test_the_sequence_is_found_in_any_cut_and_swallowed(before: bytes, size: int) -> None:
    before = before.replace(b"\x10", b"-")
    text = before + b"\x10\x10\x11ignored"
    keys = KeyFilter(b"\x10\x11")
    passed = b""
    for start in range(0, len(text), size):
        if not keys.detached:
            passed += keys.feed(text[start : start + size])

    assert keys.detached
    assert passed == before + b"\x10"


def test_a_single_key_detaches() -> None:
    keys = KeyFilter(b"a")
    assert keys.feed(b"xyaz") == b"xy"
    assert keys.detached
