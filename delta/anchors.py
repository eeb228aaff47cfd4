"""Where the parts of a new file lie in an old one, about, without sorting the old one: bsdiff's matching for the hasty.

Theory
------
bsdiff sorts all suffixes of the old file: a second for a megabyte or so, and sixteen times its size in memory. Most
of a new version is the old one with small differences, at a distance that stays the same for long. So: stay at the
distance for as long as nearly all bytes are equal. Where they are not, look for blocks of the old file in the new
bytes: one that goes on better than the distance there was is an anchor for the next. Without one stay for as long as
half of the bytes are equal, as bsdiff does.

What it misses makes a delta larger, never wrong: any regions do.
"""

from __future__ import annotations

BLOCK_BYTES = 16
STEP_BYTES = 64  # compared at once where bytes differ
STRIDE_BYTES = 1 << 13  # where none do
LEAST_SORTS = 5  # of bytes in a block that counts: runs and fillings are everywhere
BETTER_BYTES = 8  # a new distance has so many equal bytes more, as in bsdiff

Region = tuple[int, int, int]  # (old position, new position, bytes)


def find_regions(old: bytes, new: bytes) -> list[Region]:
    """Regions of both files that are mostly alike, ascending and apart in the new one."""
    blocks = {old[at : at + BLOCK_BYTES]: at for at in range(0, len(old) - BLOCK_BYTES + 1, BLOCK_BYTES)}
    found: list[Region] = []
    ahead, start, position = 0, 0, 0  # the old position less the new one; of the region that is open, and its end
    is_open = True
    while position < len(new):
        size = min(STRIDE_BYTES, len(new) - position)
        if is_open and old[position + ahead : position + ahead + size] == new[position : position + size]:
            position += size
            continue
        for at in range(position, position + size, STEP_BYTES):
            step = new[at : at + STEP_BYTES]
            equal = _equal(old, at + ahead, step)
            if not is_open and 2 * equal >= len(step):
                start, is_open = at, True
            if 8 * equal >= 7 * len(step):
                continue
            anchor = _find_anchor(old, new, blocks, at, ahead if is_open else None)
            if anchor is not None:
                source, found_at = anchor
                floor = at if is_open else (found[-1][1] + found[-1][2] if found else 0)
                back = _alike_before(old, new, source, found_at, floor)
                end = min(found_at - back, len(old) - ahead)
                if is_open and end > start:
                    found.append((start + ahead, start, end - start))
                ahead, start, is_open = source - found_at, found_at - back, True
                position = found_at + BLOCK_BYTES
                break
            if is_open and 2 * equal < len(step):
                end = at
                while end < at + len(step) and end + ahead < len(old) and old[end + ahead] == new[end]:
                    end += 1
                if end > start:
                    found.append((start + ahead, start, end - start))
                is_open = False
        else:
            position += size
    end = min(len(new), len(old) - ahead)
    if is_open and end > start:
        found.append((start + ahead, start, end - start))
    return found


def _equal(old: bytes, source: int, step: bytes) -> int:
    """How many bytes of a step are the same in the old file."""
    other = old[source : source + len(step)] if source >= 0 else b""
    if len(other) < len(step):
        return 0
    difference = int.from_bytes(step, "little") ^ int.from_bytes(other, "little")
    return difference.to_bytes(len(step), "little").count(0)


def _find_anchor(
    old: bytes, new: bytes, blocks: dict[bytes, int], position: int, ahead: int | None
) -> tuple[int, int] | None:
    """(old, new) position of the first block in a step of the new file that goes on better than it does now."""
    for at in range(position, min(position + STEP_BYTES, len(new) - BLOCK_BYTES + 1)):
        block = new[at : at + BLOCK_BYTES]
        source = blocks.get(block)
        if source is None or source - at == ahead or len(set(block)) < LEAST_SORTS:
            continue
        step = new[at : at + STEP_BYTES]
        equal = _equal(old, source, step)
        now = _equal(old, at + ahead, step) if ahead is not None else len(step) // 2
        if equal >= now + BETTER_BYTES:
            return source, at
    return None


def _alike_before(old: bytes, new: bytes, source: int, position: int, floor: int) -> int:
    """How far two places are alike before them, not beyond `floor` in the new file."""
    back, most = 0, min(source, position - floor)
    while back < most:
        size = min(BLOCK_BYTES, most - back)
        if 2 * _equal(old, source - back - size, new[position - back - size : position - back]) < size:
            break
        back += size
    while back < most and old[source - back - 1] == new[position - back - 1]:
        back += 1
    return back
