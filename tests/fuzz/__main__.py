"""`python -m tests.fuzz [COUNT [SEED [TARGET]]]`: COUNT inputs (a million), shared by the targets.

Prints one line of JSON: how many inputs were accepted and refused. A failure names the seed and number of its input,
and leaves the input in the file `fuzz-<target>-<number>`.
"""

from __future__ import annotations

import json
import random
import sys
import time
import tracemalloc
from pathlib import Path

from tests.fuzz.targets import Target, targets

MEASURED = 25  # one of so many inputs is read under tracemalloc, which is slow
TOO_LONG_S = 5.0


def run(name: str, target: Target, seed: int, count: int) -> dict[str, int]:
    """Give a target its inputs; the outcomes. Raises: AssertionError with the input's number."""
    outcomes = {"accepted": 0, "refused": 0}
    for number in range(count):
        choose = random.Random(f"{seed}/{name}/{number}")
        data = target.mutate(choose.choice(target.seeds), target.words, choose)
        measured = number % MEASURED == 0
        begun = time.monotonic()
        if measured:
            tracemalloc.start()
        try:
            target.read(data, choose)
            outcomes["accepted"] += 1
        except target.refusals:
            outcomes["refused"] += 1
        except Exception as error:
            path = Path(f"fuzz-{name.replace(' ', '-')}-{number}")
            path.write_bytes(data)
            raise AssertionError(f"{name} {seed}/{number}: {type(error).__name__}: {error}; input in {path}") from error
        finally:
            peak = tracemalloc.get_traced_memory()[1] if measured else 0
            tracemalloc.stop()
        assert peak <= target.memory_bytes + 4 * len(data), f"{name} {seed}/{number}: {peak} bytes of memory"
        assert time.monotonic() - begun < TOO_LONG_S, f"{name} {seed}/{number}: took too long"
    return outcomes


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    chosen = {name: target for name, target in targets().items() if len(sys.argv) < 4 or name == sys.argv[3]}
    print(f"seed {seed}", file=sys.stderr)
    begun = time.monotonic()
    each = -(-count // len(chosen))
    outcomes = {name: run(name, target, seed, each) for name, target in chosen.items()}
    seconds = round(time.monotonic() - begun, 1)
    print(json.dumps({"seed": seed, "inputs": each * len(chosen), "seconds": seconds, "outcomes": outcomes}))


if __name__ == "__main__":
    main()
