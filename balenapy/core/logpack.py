"""conmon's lines made shorter, and back exactly: what repeats in a piece of log is written once.

A line costs conmon 45 bytes of time and stream before its text. The lines of one read (8 KiB) bear the same time,
others share all but its last digits. `pack` replaces such a string by a byte that occurs nowhere in the piece, one
string after the other; `unpack` takes the replacements back in reverse order. A byte that was nowhere stands for the
string only, so whatever the text is, what comes out is what went in; and all of it is `bytes.replace`, at memory speed.

    number of strings, then for each: byte, length, string; then the piece, its last newline moved to the front
"""

from __future__ import annotations

from balenapy.core.conmonlog import STAMP_END, TIME_SIZE

UNPACKED_MAX_BYTES = 1 << 20  # a piece has a few KiB; more is damage that the checksum did not find
_HEAD_SIZE = len(b"2026-11-23T14:08:39.000000000+00:00 stdout F ")
# Bytes that log text seldom has, most seldom first.
_MARKS = bytes([*range(1, 9), *range(14, 32), 127, *range(0xF5, 0x100), *range(0x80, 0xF5)])


def pack(text: bytes) -> bytes | None:
    """Whole lines, the last one ended too -> the shorter form; None when it would not be shorter."""
    piece = b"\n" + text[:-1]
    strings: list[bytes] = []
    last = text.rfind(b"\n", 0, len(text) - 1) + 1
    first_head, last_head = text[:_HEAD_SIZE], text[last : last + _HEAD_SIZE]
    candidates = [b"\n" + first_head]
    if last_head != first_head:
        candidates.append(b"\n" + last_head)
    shared = common_prefix(first_head[:TIME_SIZE], last_head[:TIME_SIZE])
    if len(shared) >= 8:
        candidates.append(b"\n" + shared)
    for head in {first_head[STAMP_END:], last_head[STAMP_END:]}:
        candidates.append(head)
    packed = bytearray(1)
    for string in candidates:
        saved = piece.count(string) * (len(string) - 1) - len(string) - 2
        if saved <= 0 or not string:
            continue
        mark = next((one for one in _MARKS if one not in piece), None)
        if mark is None:
            break
        piece = piece.replace(string, bytes((mark,)))
        packed += bytes((mark, len(string))) + string
        strings.append(string)
    if not strings:
        return None
    packed[0] = len(strings)
    packed += piece
    return bytes(packed) if len(packed) < len(text) else None


def unpack(packed: bytes) -> bytes:
    """The inverse. Raises: ValueError for what `pack` cannot have made."""
    if not packed:
        raise ValueError("empty")
    pairs = []
    offset = 1
    for _ in range(packed[0]):
        if offset + 2 > len(packed):
            raise ValueError("cut off")
        end = offset + 2 + packed[offset + 1]
        pairs.append((packed[offset : offset + 1], packed[offset + 2 : end]))
        offset = end
    piece = packed[offset:]
    for mark, string in reversed(pairs):
        if len(piece) + piece.count(mark) * len(string) > UNPACKED_MAX_BYTES:
            raise ValueError("too long")
        piece = piece.replace(mark, string)
    if piece[:1] != b"\n":
        raise ValueError("no lines")
    return piece[1:] + b"\n"


def common_prefix(one: bytes, other: bytes) -> bytes:
    if one == other:
        return one
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:index]
    return min(one, other, key=len)
