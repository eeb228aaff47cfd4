"""Compressed bytes in, plain bytes out, in bounded pieces; the format is told by its first bytes.

Each decoder has `feed(data)`, giving pieces of at most CHUNK_BYTES however much the input expands to, and `close()`,
which raises when the input stopped inside a stream. Several streams one after the other (gzip members, zstd and xz
frames) count as one, as in every command line tool and in Go's readers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from balenapy.errors import InvalidParameter

CHUNK_BYTES = 256 << 10
HEAD_BYTES = 512  # enough to tell the format
MAX_WINDOW_BYTES = 128 << 20  # zstd: what its command line takes without being asked (--long=27); xz -9 needs 65 MiB

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK_MAX = 128 << 10
_DICTIONARY_ID_BYTES = (0, 1, 2, 4)
_CONTENT_SIZE_BYTES = (0, 2, 4, 8)


class InvalidCompression(InvalidParameter):
    """The bytes are not of the format that they begin like."""


class Decoder(Protocol):
    """Bytes in, bytes out."""

    def feed(self, data: bytes) -> Iterator[bytes]: ...

    def close(self) -> None: ...


def open_decoder(head: bytes) -> Decoder:
    """Choose by content, as dockerd does (pkg/archive DetectCompression); imports what the format needs."""
    if head[257:262] == b"ustar":
        return Plain()
    if head.startswith(b"\x1f\x8b\x08"):
        return Gzip()
    if head.startswith(_ZSTD_MAGIC) or _is_skippable(head):
        return Zstd()
    if head.startswith(b"BZh"):
        import bz2

        return Sequence("bzip2", b"BZh", bz2.BZ2Decompressor, (OSError, ValueError))
    if head.startswith(b"\xfd7zXZ\0"):
        import lzma

        return Sequence(
            "xz",
            b"\xfd7zXZ\0",
            lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_WINDOW_BYTES),
            (lzma.LZMAError,),
        )
    return Plain()


class Plain:
    """Not compressed."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def close(self) -> None:
        pass


class Gzip:
    """One or more gzip members; zeros after the last are padding (as gzip(1) has it), other bytes an error."""

    def __init__(self) -> None:
        self._member: Any = zlib.decompressobj(31)
        self._begun = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._member is None:
                data = data.lstrip(b"\0")
                if not data:
                    return
                if data[0] != 0x1F:
                    raise InvalidCompression("gzip: invalid header")
                self._member = zlib.decompressobj(31)
            member = self._member
            try:
                piece = member.decompress(data, CHUNK_BYTES)
            except zlib.error as error:
                raise InvalidCompression(f"gzip: {error}") from error
            if piece:
                yield piece
            if member.eof:
                data = member.unused_data
                self._member = None
                continue
            data = member.unconsumed_tail
            # A full piece: there may be more to come out, even when all input has gone in.
            if not data and len(piece) < CHUNK_BYTES:
                return

    def close(self) -> None:
        if self._member is not None:
            raise InvalidCompression("unexpected EOF")


class Zstd:
    """zstd frames, fed to the library block by block.

    The library gives all output of an input at once, and four bytes may stand for 128 KiB; and it does not say that
    an input stopped inside a frame. Both are cured by following the frame format (RFC 8878, 3.1), which takes three
    bytes a block.
    """

    def __init__(self) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._library = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame: Any = None
        self._checksum = 0  # bytes of it after the last block
        self._last_block = False
        self._skip = 0  # bytes of a skippable frame still to pass over
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        buffer = self._pending + data if self._pending else data
        view = memoryview(buffer)
        at = 0
        while True:
            if self._skip:
                step = min(self._skip, len(buffer) - at)
                self._skip -= step
            else:
                step = self._next_step(buffer, at)
                if step and self._frame is not None:
                    try:
                        piece = self._frame.decompress(view[at : at + step])
                    except self._error as error:
                        raise InvalidCompression(f"zstd: {error}") from error
                    if piece:
                        yield piece
                    if self._last_block:
                        self._last_block = False
                        self._frame = None
            if not step:
                break
            at += step
        self._pending = buffer[at:]

    def _next_step(self, buffer: bytes, at: int) -> int:
        """Length of the next whole thing (frame header, block) at this place; 0: not all of it is here."""
        here = len(buffer) - at
        if self._frame is None:
            if here < 8:
                return 0
            if _is_skippable(buffer[at : at + 4]):
                self._skip = int.from_bytes(buffer[at + 4 : at + 8], "little")
                return 8
            if buffer[at : at + 4] != _ZSTD_MAGIC:
                raise InvalidCompression("zstd: magic number mismatch")
            descriptor = buffer[at + 4]
            single_segment = descriptor >> 5 & 1
            content_size = _CONTENT_SIZE_BYTES[descriptor >> 6] or single_segment
            length = 5 + (1 - single_segment) + _DICTIONARY_ID_BYTES[descriptor & 3] + content_size
            if here < length:
                return 0
            self._checksum = 4 * (descriptor >> 2 & 1)
            self._frame = self._library.decompressobj(write_size=_ZSTD_BLOCK_MAX)
            return length
        if here < 3:
            return 0
        header = int.from_bytes(buffer[at : at + 3], "little")
        kind, size = header >> 1 & 3, header >> 3
        if kind == 3 or size > _ZSTD_BLOCK_MAX:
            raise InvalidCompression("zstd: data corruption detected")
        length = 3 + (1 if kind == 1 else size)
        if header & 1:
            length += self._checksum
            self._last_block = here >= length
        return length if here >= length else 0

    def close(self) -> None:
        if self._frame is not None or self._pending or self._skip:
            raise InvalidCompression("unexpected EOF")


class Sequence:
    """Streams of a standard library decompressor, one after the other."""

    def __init__(self, name: str, magic: bytes, make: Callable[[], Any], errors: tuple[type[Exception], ...]) -> None:
        self._name = name
        self._magic = magic
        self._make = make
        self._errors = errors
        self._stream: Any = make()
        self._between = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._stream is None:
                data = (self._between + data).lstrip(b"\0")
                self._between = b""
                if len(data) < len(self._magic):
                    self._between = data
                    return
                if not data.startswith(self._magic):
                    raise InvalidCompression(f"{self._name}: invalid header")
                self._stream = self._make()
            try:
                piece = self._stream.decompress(data, CHUNK_BYTES)
            except self._errors as error:
                raise InvalidCompression(f"{self._name}: {error}") from error
            if piece:
                yield piece
            data = b""
            if self._stream.eof:
                data = self._stream.unused_data
                self._stream = None
            elif self._stream.needs_input:
                return

    def close(self) -> None:
        if self._stream is not None or self._between:
            raise InvalidCompression("unexpected EOF")


def _is_skippable(head: bytes) -> bool:
    return len(head) >= 4 and head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18"
