"""librsync's two formats: signatures and deltas. The base is read at random offsets, everything else streams.

Theory
------
Numbers are big-endian. A signature is `u32 magic, u32 block_len, u32 strong_len` and for each block of the base
`u32 weak, strong_len bytes`. The weak sum can be rolled along byte by byte; the strong one is BLAKE2b or MD4, cut.
A delta is `u32 0x72730236` and commands up to END: literals, and copies of (position, length) from the base.

    patch(delta(base, new), base) == new        however the matches were found

Since a delta says nothing about how it was found, whoever has the base at hand need not roll a sum through it:
`DeltaWriter` takes literals and copies from any matcher. `delta_from_signature` is the classical way.

Source: librsync 2.3 (command.c, prototab.c, rollsum.h); balena-engine writes block 512, strong 32, BLAKE2.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from delta.errors import Malformed, WrongBase

MAGIC_DELTA = 0x72730236
MAGIC_MD4 = 0x72730136
MAGIC_BLAKE2 = 0x72730137
BLOCK_BYTES = 512  # balena-engine
STRONG_BYTES = 32
MAX_BLOCK_BYTES = 1 << 24  # a signature with larger blocks is no signature anybody made
PIECE_BYTES = 1 << 18  # what `patch` hands out at most at once
LITERAL_FLUSH_BYTES = 1 << 24  # as the later balena-engine does; bounds the writer's memory

_END = 0x00
_LITERAL_1 = 0x41
_COPY_1_1 = 0x45
_FIRST_RESERVED = 0x55
_CHAR_OFFSET = 31  # rollsum.h ROLLSUM_CHAR_OFFSET

Read = Callable[[int], bytes]  # up to n bytes, b"" at the end
ReadAt = Callable[[int, int], bytes]  # (offset, length) -> exactly that range of the base
Write = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Literal:
    """`size` bytes that follow in the delta."""

    size: int


@dataclass(frozen=True, slots=True)
class Copy:
    """`size` bytes of the base from `position`."""

    position: int
    size: int


@dataclass(frozen=True, slots=True)
class Signature:
    """Sums of the blocks of a base, in order."""

    block_bytes: int
    strong_bytes: int
    magic: int
    blocks: tuple[tuple[int, bytes], ...]  # (weak, strong)


def read_exactly(read: Read, size: int, what: str) -> bytes:
    """`size` bytes of a stream that may give less at once.

    Raises:
        Malformed: the stream ends before.
    """
    data = read(size)
    if len(data) == size:
        return data
    parts = [data]
    missing = size - len(data)
    while missing > 0 and data:
        data = read(missing)
        parts.append(data)
        missing -= len(data)
    if missing:
        raise Malformed(f"{what}: ends {missing} bytes too early")
    return b"".join(parts)


# Signatures


def weak_sum(block: bytes) -> int:
    """The rolling sum of a whole block."""
    s1 = s2 = 0
    for byte in block:
        s1 += byte + _CHAR_OFFSET
        s2 += s1
    return (s2 & 0xFFFF) << 16 | (s1 & 0xFFFF)


def strong_sum(block: bytes, size: int) -> bytes:
    return hashlib.blake2b(block, digest_size=32).digest()[:size]


def make_signature(
    read: Read, block_bytes: int = BLOCK_BYTES, strong_bytes: int = STRONG_BYTES
) -> Iterator[bytes]:
    """The signature file of a stream, BLAKE2, its last short block included."""
    if not 0 < block_bytes <= MAX_BLOCK_BYTES or not 0 < strong_bytes <= 32:
        raise Malformed(f"no such signature: block {block_bytes}, strong sum {strong_bytes}")
    yield struct.pack(">III", MAGIC_BLAKE2, block_bytes, strong_bytes)
    pending = b""
    while True:
        data = read(PIECE_BYTES)
        pending += data
        whole = len(pending) if not data else len(pending) - len(pending) % block_bytes
        out = []
        for start in range(0, whole, block_bytes):
            block = pending[start : min(start + block_bytes, whole)]
            out.append(struct.pack(">I", weak_sum(block)) + strong_sum(block, strong_bytes))
        if out:
            yield b"".join(out)
        pending = pending[whole:]
        if not data:
            return


def parse_signature(data: bytes) -> Signature:
    """A signature file as a value.

    Raises:
        Malformed: wrong magic, lengths out of bounds, or a block that is cut.
    """
    if len(data) < 12:
        raise Malformed(f"signature: {len(data)} bytes are less than its header")
    magic, block_bytes, strong_bytes = struct.unpack_from(">III", data)
    if magic not in (MAGIC_BLAKE2, MAGIC_MD4):
        raise Malformed(f"signature: magic {magic:#010x}")
    longest = 32 if magic == MAGIC_BLAKE2 else 16
    if not 0 < block_bytes <= MAX_BLOCK_BYTES or not 0 < strong_bytes <= longest:
        raise Malformed(f"signature: block {block_bytes}, strong sum {strong_bytes}")
    entry = struct.Struct(f">I{strong_bytes}s")
    if (len(data) - 12) % entry.size:
        raise Malformed("signature: the last block's sums are cut")
    return Signature(block_bytes, strong_bytes, magic, tuple(entry.iter_unpack(memoryview(data)[12:])))


# Reading deltas


def read_delta(read: Read) -> Iterator[Literal | Copy | bytes]:
    """The commands of a delta; after a `Literal` its bytes follow in pieces of at most PIECE_BYTES.

    Raises:
        Malformed: wrong magic, a reserved command, or the stream ends before END.
    """
    (magic,) = struct.unpack(">I", read_exactly(read, 4, "librsync delta"))
    if magic != MAGIC_DELTA:
        raise Malformed(f"librsync delta: magic {magic:#010x}")
    while True:
        op = read_exactly(read, 1, "librsync delta")[0]
        if op == _END:
            return
        if op >= _FIRST_RESERVED:
            raise Malformed(f"librsync delta: bogus command {op:#04x}")
        if op >= _COPY_1_1:
            position_width, size_width = 1 << (op - _COPY_1_1) // 4, 1 << (op - _COPY_1_1) % 4
            both = read_exactly(read, position_width + size_width, "librsync delta")
            size = int.from_bytes(both[position_width:], "big")
            yield Copy(int.from_bytes(both[:position_width], "big"), size)
            continue
        size = op
        if op >= _LITERAL_1:
            size = int.from_bytes(read_exactly(read, 1 << (op - _LITERAL_1), "librsync delta"), "big")
        yield Literal(size)
        while size:
            piece = read_exactly(read, min(size, PIECE_BYTES), "librsync delta")
            size -= len(piece)
            yield piece


def patch(read: Read, base: ReadAt, base_bytes: int, max_bytes: int | None = None) -> Iterator[bytes]:
    """The new file, in pieces of at most PIECE_BYTES.

    A copy that reaches beyond the base is an error; librsync's own tool gives a short file then.

    Raises:
        Malformed: see `read_delta`, or more than `max_bytes` come out.
        WrongBase: a copy reaches beyond the base.
    """
    total = 0
    for command in read_delta(read):
        match command:
            case bytes():
                yield command
                continue
            case Copy(position, size) if position + size > base_bytes:
                raise WrongBase(
                    f"librsync delta: copies {size} bytes at {position} of a base of {base_bytes} bytes"
                )
        total += command.size
        if max_bytes is not None and total > max_bytes:
            raise Malformed(f"librsync delta: makes more than {max_bytes} bytes")
        if isinstance(command, Copy):
            position, left = command.position, command.size
            while left:
                piece = base(position, min(left, PIECE_BYTES))
                if not piece or len(piece) > left:
                    raise WrongBase(f"librsync delta: the base has no bytes at {position}")
                position += len(piece)
                left -= len(piece)
                yield piece


# Writing deltas


def _width(value: int) -> int:
    """Index of the smallest of 1, 2, 4, 8 bytes that holds a value."""
    return 0 if value < 1 << 8 else 1 if value < 1 << 16 else 2 if value < 1 << 32 else 3


class DeltaWriter:
    """Writes commands, neighbours merged, numbers as short as they go. `close` writes the end."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._literal: list[bytes] = []
        self._literal_bytes = 0
        self._position = self._size = 0
        write(struct.pack(">I", MAGIC_DELTA))

    def literal(self, data: bytes) -> None:
        if not data:
            return
        self._flush_copy()
        while data:
            piece = data[: LITERAL_FLUSH_BYTES - self._literal_bytes]
            self._literal.append(piece)
            self._literal_bytes += len(piece)
            if self._literal_bytes == LITERAL_FLUSH_BYTES:
                self._flush_literal()
            data = data[len(piece) :]

    def copy(self, position: int, size: int) -> None:
        if not size:
            return
        self._flush_literal()
        if self._size and self._position + self._size == position:
            self._size += size
            return
        self._flush_copy()
        self._position, self._size = position, size

    def close(self) -> None:
        self._flush_literal()
        self._flush_copy()
        self._write(b"\0")

    def _flush_literal(self) -> None:
        if self._literal_bytes:
            width = _width(self._literal_bytes)
            self._write(bytes((_LITERAL_1 + width,)) + self._literal_bytes.to_bytes(1 << width, "big"))
            for piece in self._literal:
                self._write(piece)
        self._literal, self._literal_bytes = [], 0

    def _flush_copy(self) -> None:
        if self._size:
            p, s = _width(self._position), _width(self._size)
            op = bytes((_COPY_1_1 + 4 * p + s,))
            self._write(op + self._position.to_bytes(1 << p, "big") + self._size.to_bytes(1 << s, "big"))
        self._size = 0


def delta_from_signature(signature: Signature, new: bytes, write: Write) -> None:
    """The classical delta: roll the weak sum through `new`. Slow in Python; for when the base is not at hand.

    Raises:
        Malformed: the signature is of MD4, which OpenSSL no longer offers.
    """
    if signature.magic != MAGIC_BLAKE2:
        raise Malformed("signature: only BLAKE2 can be matched")
    block = signature.block_bytes
    index = {weak: (n, strong) for n, (weak, strong) in enumerate(signature.blocks)}
    writer = DeltaWriter(write)
    start = position = 0
    weak: tuple[int, int] | None = None
    while position + block <= len(new):
        if weak is None:
            whole = weak_sum(new[position : position + block])
            weak = whole & 0xFFFF, whole >> 16
        s1, s2 = weak
        found = index.get(s2 << 16 | s1)
        if found and found[1] == strong_sum(new[position : position + block], signature.strong_bytes):
            writer.literal(new[start:position])
            writer.copy(found[0] * block, block)
            position += block
            start, weak = position, None
            continue
        if position + block < len(new):
            out, into = new[position], new[position + block]
            s1 = (s1 - out + into) & 0xFFFF
            s2 = (s2 - block * (out + _CHAR_OFFSET) + s1) & 0xFFFF
            weak = s1, s2
        position += 1
    # The base's last block may be short; it can match only at the very end.
    tail = new[start:]
    if tail and len(tail) < block and signature.blocks:
        last_weak, last_strong = signature.blocks[-1]
        if weak_sum(tail) == last_weak and strong_sum(tail, signature.strong_bytes) == last_strong:
            writer.copy((len(signature.blocks) - 1) * block, len(tail))
            tail = b""
    writer.literal(tail)
    writer.close()
