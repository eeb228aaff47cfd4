"""Tar headers coded against headers that both sides have: 512 bytes become one small number, mostly.

Theory
------
A header block is sixteen fields at fixed places. Each field of a new block is one of

    BASE      the same field of the block it is compared with (zeros when there is none)
    PREVIOUS  the same field of the block before it of the same sort (main or extension) in the new tar
    VALUE     given: its bytes without trailing zeros
    COMPUTED  what the rest implies; of the size field: the content's length, of the checksum field: the checksum

so a block is a *mask*, two bits a field, and a few values. A layer has hardly ten different masks: they are numbered
as they first appear. Two numbers are not masks: SAME, the block equals the one it is compared with, and RAW, the
block is given whole, which is how the content of extension members goes. All is bytes: nothing of a header's
meaning is needed to give it back, and no header is too odd.
"""

from __future__ import annotations

from collections.abc import Callable

from delta.errors import Malformed
from delta.tarmembers import BLOCK, checksum

# name, mode, uid, gid, size, mtime, checksum, type, link name, magic + version, user, group, major, minor, prefix, rest
FIELDS = (100, 8, 8, 8, 12, 12, 8, 1, 100, 8, 32, 32, 8, 8, 155, 12)
SIZE_FIELD, CHECKSUM_FIELD = 4, 6
BASE, PREVIOUS, VALUE, COMPUTED = range(4)
SAME, RAW, FIRST_MASK = 0, 1, 2
MAX_MASKS = 4096

_BOUNDS: list[tuple[int, int]] = []
for _width in FIELDS:
    _start = _BOUNDS[-1][1] if _BOUNDS else 0
    _BOUNDS.append((_start, _start + _width))
ZERO_BLOCK = bytes(BLOCK)
_EXTENSIONS = (0x78, 0x67, 0x4C, 0x4B)  # x g L K


def size_field(size: int) -> bytes:
    return b"%011o\0" % size if size < 1 << 33 else b""


def checksum_field(block: bytes | bytearray) -> bytes:
    return b"%06o\0 " % checksum(block)


def is_extension(block: bytes | bytearray) -> bool:
    return block[156] in _EXTENSIONS


def mask_of(block: bytes, base: bytes, previous: bytes, size: int) -> tuple[int, list[tuple[int, bytes]]]:
    """The mask of a block and the values it needs, (field, bytes) in order of the fields."""
    mask, values = 0, []
    computed = {SIZE_FIELD: size_field(size), CHECKSUM_FIELD: checksum_field(block)}
    for field, (start, end) in enumerate(_BOUNDS):
        given = block[start:end]
        if given == computed.get(field):
            action = COMPUTED
        elif given == base[start:end]:
            action = BASE
        elif given == previous[start:end]:
            action = PREVIOUS
        else:
            action = VALUE
            values.append((field, given.rstrip(b"\0")))
        mask |= action << 2 * field
    return mask, values


class Mask:
    """What a mask does, laid out for quick execution. The copied ranges are merged."""

    __slots__ = ("checksum", "previous", "size", "values")

    def __init__(self, mask: int) -> None:
        actions = [mask >> 2 * field & 3 for field in range(len(FIELDS))]
        self.previous: list[slice] = []
        self.values: list[int] = []
        for field, action in enumerate(actions):
            start, end = _BOUNDS[field]
            if action == PREVIOUS:
                if self.previous and self.previous[-1].stop == start:
                    start = self.previous.pop().start
                self.previous.append(slice(start, end))
            elif action == VALUE:
                self.values.append(field)
            elif action == COMPUTED and field not in (SIZE_FIELD, CHECKSUM_FIELD):
                raise Malformed(f"native delta: nothing computes field {field} of a header")
        self.size = actions[SIZE_FIELD] == COMPUTED
        self.checksum = actions[CHECKSUM_FIELD] == COMPUTED

    def block(self, base: bytes, previous: bytes, size: int, value: Callable[[int], bytes]) -> bytes:
        """The block; `value` gives the next value of a field."""
        out = bytearray(base)
        for part in self.previous:
            out[part] = previous[part]
        for field in self.values:
            start, end = _BOUNDS[field]
            given = value(field)
            if len(given) > end - start:
                raise Malformed(f"native delta: {len(given)} bytes for field {field} of a header")
            out[start:end] = given.ljust(end - start, b"\0")
        if self.size:
            given = size_field(size)
            if not given:
                raise Malformed(f"native delta: a size field cannot hold {size}")
            out[124:136] = given
        if self.checksum:
            out[148:156] = checksum_field(out)
        return bytes(out)
