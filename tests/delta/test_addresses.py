"""Foretelling addresses: it is right where the linker is, never depends on where it is cut, and takes any numbers."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from delta.addresses import Layout, Relocation, Segment, find_layout, least_region, read_layout
from delta.errors import DeltaError, Malformed
from delta.maker import bsdiff, foretold, subtracted
from delta.native import moved_regions
from tests.delta.inverse import apply, make
from tests.delta.programs import grown, link, random_program
from tests.delta.randomtars import Entry, opened_base
from tests.delta.test_native import plain_tar


def relocation_of(old: bytes, new: bytes) -> tuple[Relocation, list[tuple[int, int, int]]]:
    layout = find_layout(old, new)
    assert layout is not None
    found = bsdiff(old, new)
    regions = list(moved_regions(found.triples, len(found.triples), len(new)))
    return Relocation(layout, regions, least_region(length for _, _, length in regions)), regions


def test_a_program_that_grew_is_foretold() -> None:
    saved = []
    for seed in range(30):
        rng = random.Random(seed)
        program = random_program(rng, 60)
        old, new = link(program), link(grown(rng, program))
        found = bsdiff(old, new)
        better = foretold(found, old, new)

        assert better is not None
        saved.append((len(found.diff) - found.diff.count(0)) / max(1, len(better[0].diff) - better[0].diff.count(0)))
    assert sorted(saved)[15] > 4, "differences left of a linker's changes"


def test_where_it_is_cut_makes_no_difference() -> None:
    rng = random.Random(5)
    program = random_program(rng, 80)
    old, new = link(program), link(grown(rng, program))
    relocation, regions = relocation_of(old, new)
    position, made, length = max(regions, key=lambda region: region[2])

    def relocated(start: int, size: int) -> bytes:
        return relocation.relocate(lambda at, n: old[at : at + n], len(old), start, size, made - position)

    whole = relocated(position, length)
    assert whole != old[position : position + length]
    for _ in range(50):
        cuts = sorted({0, length, *(rng.randrange(length) for _ in range(rng.randrange(40)))})
        pieces = [relocated(position + a, b - a) for a, b in pairwise(cuts)]
        assert b"".join(pieces) == whole


def test_programs_survive_the_format() -> None:
    for seed in range(10):
        rng = random.Random(seed)
        program = random_program(rng, 60)
        old = plain_tar(Entry("bin/x", data=link(program)))
        new = plain_tar(Entry("bin/x", data=link(grown(rng, program))))
        with opened_base([old]) as base:
            made = make(base, new)
            assert [line.how for line in made.lines] == ["moved"]
            assert apply(base, made.data) == new


def test_what_is_no_program_is_left_alone() -> None:
    rng = random.Random(1)
    good = link(random_program(rng))
    for other in (b"", b"\x7fELF", good[:100], good[:18] + b"\x3e\0" + good[20:], good[:32] + b"\xff" * 32 + good[64:]):
        assert find_layout(good, other) is None or len(other) > 64
        assert find_layout(other, good) is None or len(other) > 64


def test_any_numbers_give_bytes_or_an_error() -> None:
    """A hostile layout, map and shift: the same size comes out, or our error."""
    rng = random.Random(9)
    old = link(random_program(rng, 40)) + rng.randbytes(4000)
    refused = 0
    for _ in range(3000):
        numbers = [1, rng.randrange(1, 4)]
        numbers += [rng.getrandbits(rng.choice((4, 12, 20, 47, 60))) for _ in range(4 * numbers[1] + 3)]
        if rng.random() < 0.1:
            numbers[rng.randrange(2)] = rng.randrange(30)
        regions = [
            (rng.getrandbits(rng.choice((10, 14, 33))), rng.getrandbits(rng.choice((10, 14, 45))), rng.randrange(300))
            for _ in range(20)
        ]
        try:
            relocation = Relocation(read_layout(iter([*numbers, *[0] * 80])), regions, 64)
        except DeltaError:
            refused += 1
            continue
        start = rng.randrange(len(old))
        size = rng.randrange(len(old) - start + 1)
        shift = rng.choice((0, 4, -8, 16, 1, rng.randrange(-(1 << 40), 1 << 40) * 8))
        assert len(relocation.relocate(lambda at, n: old[at : at + n], len(old), start, size, shift)) == size
    assert 0 < refused < 3000


def test_layouts_survive_their_numbers() -> None:
    old, new = (Segment(0, 0x400000), Segment(0x1000, 0x401000)), (Segment(0, 0x400000), Segment(0x1200, 9))
    layout = Layout(old, new, 64, 4096, 1 << 40)
    assert read_layout(iter(layout.numbers())) == layout
    with pytest.raises(Malformed):
        read_layout(iter([2, *layout.numbers()[1:]]))


def test_subtraction_is_bsdiffs() -> None:
    rng = random.Random(3)
    new, old = rng.randbytes(5000), rng.randbytes(5000)
    assert subtracted(new, old) == bytes((a - b) & 0xFF for a, b in zip(new, old, strict=True))
    assert subtracted(b"", b"") == b""
