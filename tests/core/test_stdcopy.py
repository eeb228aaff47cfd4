from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.stdcopy import FrameReader, MalformedFrame, Stream, frame

frames = st.lists(st.tuples(st.sampled_from(Stream), st.binary(max_size=100)), max_size=10)


@given(frames, st.integers(1, 20))
def test_what_was_framed_is_read_again_however_it_is_cut(parts: list[tuple[Stream, bytes]], size: int) -> None:
    text = b"".join(frame(stream, data) for stream, data in parts)
    reader = FrameReader()
    found = []
    for start in range(0, len(text), size):
        reader.feed(text[start : start + size])
        while (one := reader.next_frame()) is not None:
            found.append(one)

    assert found == parts
    assert not reader.has_rest


def test_a_frame_is_a_header_of_eight_bytes_and_the_payload() -> None:
    assert frame(Stream.STDERR, b"ab") == b"\x02\0\0\0\0\0\0\x02ab"


@given(st.binary(max_size=50))
def test_any_bytes_are_frames_or_our_error(data: bytes) -> None:
    reader = FrameReader()
    reader.feed(data)
    try:
        while reader.next_frame() is not None:
            pass
    except MalformedFrame:
        pass


def test_an_unknown_stream_is_the_senders_fault() -> None:
    reader = FrameReader()
    reader.feed(b"HTTP/1.1")
    with pytest.raises(MalformedFrame, match="Unrecognized input header: 72"):
        reader.next_frame()
