"""Frames that carry stdout and stderr over one connection.

Eight bytes of header: the stream, three zero bytes, the length of the payload in big-endian; then the payload.
Source: moby pkg/stdcopy.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

from balenapy.errors import EngineError

HEADER_SIZE = 8
PAYLOAD_MAX_BYTES = 16 << 20  # a reader's bound; the engine sends at most some tens of kilobytes a frame
FRAME_HEADER = Struct(">BxxxI")


class Stream(IntEnum):
    STDIN = 0
    STDOUT = 1
    STDERR = 2
    SYSTEM = 3  # an error of the engine, as text


class MalformedFrame(EngineError):
    """The bytes are no frame: the sender is at fault."""


def frame(stream: int, payload: bytes) -> bytes:
    """One frame."""
    return FRAME_HEADER.pack(stream, len(payload)) + payload


class FrameReader:
    """`feed` bytes as they come, then `next_frame` until it says None."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_frame(self) -> tuple[Stream, bytes] | None:
        """Raises: MalformedFrame."""
        buffer = self._buffer
        if len(buffer) < HEADER_SIZE:
            return None
        stream, length = FRAME_HEADER.unpack_from(buffer)
        if stream > Stream.SYSTEM:
            raise MalformedFrame(f"Unrecognized input header: {stream}")
        if length > PAYLOAD_MAX_BYTES:
            raise MalformedFrame(f"frame of {length} bytes")
        end = HEADER_SIZE + length
        if len(buffer) < end:
            return None
        payload = bytes(buffer[HEADER_SIZE:end])
        del buffer[:end]
        return Stream(stream), payload

    @property
    def has_rest(self) -> bool:
        """Whether the input ended inside a frame."""
        return bool(self._buffer)
