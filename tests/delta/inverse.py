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
from tests.delta.randomtars import opened, opened_base, random_pairs

SETTINGS = (
    Settings(),
    Settings(fast=True),
    Settings(codecs=frozenset(("zstd",))),
    Settings(codecs=frozenset(("bsdiff",))),
    Settings(jobs=2),
)
TARGETS = len(SETTINGS)  # of each base


def make(base: TarBase, target: bytes, settings: Settings = SETTINGS[0], index: BaseIndex | None = None) -> Made:
    diff_ids = [str(layer) for layer in range(base.layers)]
    with opened(target) as (tar,):
        return LayerMaker(index or BaseIndex(base), diff_ids, tar, settings).make()


def apply(base: TarBase, delta: bytes, budget_bytes: int = native.DEFAULT_BUDGET_BYTES) -> bytes:
    check = native.base_check([str(layer) for layer in range(base.layers)])
    return b"".join(
        native.apply(lambda at, n: delta[at : at + n], base, budget_bytes=budget_bytes, check=check)
    )


def check(seed: int, ways: Counter[str]) -> None:
    """TARGETS pairs that share a base; raises AssertionError with its seed."""
    layers, targets = random_pairs(seed, TARGETS)
    with opened_base(layers) as base:
        index = BaseIndex(base)
        for target, settings in zip(targets, SETTINGS, strict=True):
            made = make(base, target, settings, index)
            ways.update(line.how for line in made.lines)
            ways["bytes of tars"] += len(target)
            ways["bytes of deltas"] += len(made.data)
            assert apply(base, made.data) == target, f"seed {seed}, {settings}"


def run(count: int, first: int = 0) -> str:
    """Check so many pairs; what was tried, in words."""
    ways: Counter[str] = Counter()
    started = time.monotonic()
    bases = -(-count // TARGETS)
    for seed in range(first, first + bases):
        check(seed, ways)
    took_s = time.monotonic() - started
    assert {"same", "bsdiff", "moved", "framed", "literal"} <= set(ways) or count < 1000
    return f"{bases * TARGETS} random pairs from seed {first}, 0 mismatches, {took_s:.0f} s: {dict(ways)}"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    print(run(count, int(sys.argv[2]) if len(sys.argv) > 2 else 0))


if __name__ == "__main__":
    main()
