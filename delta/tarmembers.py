"""Where the members of a tar lie: runs of header blocks, content, padding. Never what they mean.

Theory
------
Both sides of a delta must cut a tar in the same places, so the rules are few and strict (FORMAT.md has them too):

- A member is zero or more extension members (type `x`, `g`, `L`, `K`: a header block and its content, padded to
  512 bytes) and then one main header block. All these blocks together are the member's *header*.
- A header block counts only if its checksum field, an octal number, is the sum of its bytes.
- The size field is octal, or base-256 when its first bit is set. A PAX record `size` of an `x` member before
  replaces it. Types 1 to 6 have no content whatever their size says.
- The member's content follows and is padded with zero bytes to a multiple of 512.
- The first thing that breaks a rule (a zero block, a cut, padding that is not zero, a sparse file, a header of more
  than MAX_HEADER_BLOCKS) ends the list; everything from the last member's end is `tail`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
MAX_HEADER_BLOCKS = 128  # a long name or link, and xattrs as PAX records: 64 KiB
_EXTENSIONS = b"xgLK"
_NO_CONTENT = b"123456"
_SPARSE = b"S"
_ZERO_BLOCK = bytes(BLOCK)

ReadAt = Callable[[int, int], bytes]  # (offset, length) -> that range, shorter at the end


class Member(NamedTuple):
    """One member: its header is [start, content), its content [content, content + size)."""

    start: int
    content: int
    size: int

    @property
    def end(self) -> int:
        """After the padding."""
        return self.content + padded(self.size)


def padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def checksum(block: bytes | bytearray) -> int:
    """The sum that the checksum field must hold: that field itself counts as spaces."""
    return sum(block) - sum(block[148:156]) + 8 * 0x20


def parse_number(field: bytes) -> int | None:
    """A numeric field, or None if it is none (or negative)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        return value if not field[0] & 0x40 and value < 1 << 63 else None
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    if not digits.isdigit():  # int() takes signs and underscores
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _pax_size(records: bytes) -> tuple[bool, int | None]:
    """(well formed and no sparse file, the last `size`)."""
    size = None
    while records:
        length, space, _ = records.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length[:6]) <= len(records):
            return False, None
        key, equals, value = records[len(length) + 1 : int(length[:6])].partition(b"=")
        if not equals or key.startswith(b"GNU.sparse"):
            return False, None
        if key == b"size":
            digits = value.rstrip(b"\n")
            if not digits.isdigit() or len(digits) > 18:
                return False, None
            size = int(digits)
        records = records[int(length[:6]) :]
    return True, size


def scan(read: ReadAt, total: int) -> Iterator[Member]:
    """The members of a tar of `total` bytes, in order; what is left over begins at the last one's end."""
    start = position = 0
    size_override: int | None = None
    while position + BLOCK <= total:
        block = read(position, BLOCK)
        stored = parse_number(block[148:156]) if len(block) == BLOCK else None
        if stored is None or block == _ZERO_BLOCK or stored != checksum(block):
            return
        size = parse_number(block[124:136])
        kind = block[156:157]
        if size is None or kind == _SPARSE:
            return
        position += BLOCK
        if kind and kind in _EXTENSIONS:
            if (position - start + padded(size)) // BLOCK >= MAX_HEADER_BLOCKS or position + padded(size) > total:
                return
            if kind == b"x":
                fine, override = _pax_size(read(position, size))
                if not fine:
                    return
                size_override = override if override is not None else size_override
            position += padded(size)
            continue
        if kind and kind in _NO_CONTENT:
            size = 0
        elif size_override is not None:
            size = size_override
        member = Member(start, position, size)
        if (position - start) // BLOCK > MAX_HEADER_BLOCKS or member.end > total:
            return
        padding = padded(size) - size
        if padding and read(position + size, padding).strip(b"\0"):
            return
        yield member
        start = position = member.end
        size_override = None
