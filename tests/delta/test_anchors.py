"""The hasty matching: whatever it finds lies in both files, and makes the new one."""

from __future__ import annotations

import random
from itertools import pairwise

from delta.anchors import find_regions
from delta.maker import hasty_bsdiff
from delta.native import moved_regions
from tests.delta.randomtars import content, edited


def rebuilt(old: bytes, new: bytes) -> bytes:
    """The new file out of bsdiff's three streams."""
    found = hasty_bsdiff(old, new)
    out, diff, extra = bytearray(), 0, 0
    regions = list(moved_regions(found.triples, len(found.triples), len(new)))
    assert sum(length for _, _, length in regions) == len(found.diff)
    position = 0
    for add, after, seek in found.triples:
        assert 0 <= position <= len(old) - add
        out += bytes(
            (a + b) & 0xFF
            for a, b in zip(old[position : position + add], found.diff[diff : diff + add], strict=True)
        )
        out += found.extra[extra : extra + after]
        position, diff, extra = position + add + seek, diff + add, extra + after
    return bytes(out)


def test_regions_lie_in_both_files_and_make_the_new_one() -> None:
    pairs = 0
    for seed in range(600):
        rng = random.Random(seed)
        old = b"".join(content(rng) for _ in range(rng.randrange(5)))
        new = edited(rng, old) if rng.random() < 0.8 else content(rng) + old[rng.randrange(len(old) + 1) :]
        regions = find_regions(old, new)

        for source, start, length in regions:
            assert length > 0
            assert 0 <= source <= len(old) - length
            assert 0 <= start <= len(new) - length
        assert all(one[1] + one[2] <= other[1] for one, other in pairwise(regions))
        if new:
            assert rebuilt(old, new) == new
            pairs += 1
    print(f"{pairs} random pairs of files by hasty matching, 0 mismatches")


def test_moved_parts_are_found() -> None:
    rng = random.Random(3)
    parts = [rng.randbytes(rng.randrange(2000, 20_000)) for _ in range(12)]
    old = b"".join(parts)
    rng.shuffle(parts)
    new = b"".join(part + rng.randbytes(rng.randrange(99)) for part in parts)

    found = sum(length for _, _, length in find_regions(old, new))

    assert found > 0.97 * len(old)
