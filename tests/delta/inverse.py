"""The property of every format: what the maker writes, the reader turns back into the target.

    python -m tests.delta.inverse [COUNT [FIRST_SEED]]
"""

from __future__ import annotations

import sys
import time
from collections import Counter

from delta import native
from delta.base import TarBase
from delta.maker import LayerMaker, Made, Settings
from delta.match import BaseIndex
from tests.delta.randomtars import opened, opened_base, random_pair

SETTINGS = (Settings(), Settings(fast=True), Settings(codecs=frozenset(("zstd",))))


def make(base: TarBase, target: bytes, settings: Settings = SETTINGS[0]) -> Made:
    diff_ids = [str(layer) for layer in range(base.layers)]
    with opened(target) as (tar,):
        return LayerMaker(BaseIndex(base), diff_ids, tar, settings).make()


def apply(base: TarBase, delta: bytes, budget_bytes: int = native.DEFAULT_BUDGET_BYTES) -> bytes:
    check = native.base_check([str(layer) for layer in range(base.layers)])
    return b"".join(
        native.apply(lambda at, n: delta[at : at + n], base, budget_bytes=budget_bytes, check=check)
    )


def check(seed: int, ways: Counter[str]) -> None:
    """One pair; raises AssertionError with its seed."""
    layers, target = random_pair(seed)
    with opened_base(layers) as base:
        made = make(base, target, SETTINGS[seed % len(SETTINGS)])
        ways.update(line.how for line in made.lines)
        ways["bytes of tars"] += len(target)
        ways["bytes of deltas"] += len(made.data)
        assert apply(base, made.data) == target, f"seed {seed}"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    ways: Counter[str] = Counter()
    started = time.monotonic()
    for seed in range(first, first + count):
        check(seed, ways)
    print(f"{count} pairs from seed {first}, 0 mismatches, {time.monotonic() - started:.0f} s: {dict(ways)}")


if __name__ == "__main__":
    main()
