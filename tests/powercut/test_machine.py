"""Real power cuts: a virtual machine is killed at random instants and booted again.

`make test-powercut` installs QEMU, fetches a kernel and sets POWERCUT_ROUNDS, the number of cuts; where the machine is
emulated five take two minutes and more. `POWERCUT_SEED` asks for the instants of an earlier round.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.powercut.machine import Machine, why_not

ROUNDS = int(os.environ.get("POWERCUT_ROUNDS", "0"))
reason = why_not() if ROUNDS else "takes minutes: make test-powercut"
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=reason)]

NOTHING: dict[str, Any] = {"names": {}, "containers": []}


def test_a_machine_whose_power_is_cut_at_random_instants_has_whole_images(tmp_path: Path) -> None:
    """After each boot the store is whole, and clients see the state before or after the journey that was cut."""
    seed = int(os.environ.get("POWERCUT_SEED") or random.randrange(1 << 32))
    choose = random.Random(seed)
    begun = time.monotonic()
    machine = Machine.build(tmp_path)
    print(f"seed {seed}, {machine.accelerator}, images made in {time.monotonic() - begun:.0f} s")
    allowed, journey = [NOTHING], "nothing"
    cut_in: Counter[str] = Counter()
    layers = files = finished = 0
    for number in range(ROUNDS + 1):
        with machine.boot(f"guest={seed}-{number}") as guest:
            booted = time.monotonic()
            found = guest.read()
            assert found is not None
            assert "found" in found, f"{found}\n{guest.last_words('')}"
            assert found["violations"] == [], f"cut {number} of seed {seed} during {journey}"
            assert found["found"] in allowed, f"cut {number} of seed {seed} during {journey}"
            layers, files = layers + found["layers"], files + found["files"]
            if number == ROUNDS:
                break
            allowed, journey = [found["found"]], "nothing"
            until = None
            while (said := guest.read(until=until)) is not None:
                assert "violations" not in said, f"{said} during {journey} of seed {seed}"
                if until is None:  # it is at work
                    # Emulation may be slow, and the machine busy: several journeys long, however long they take.
                    pace_s = time.monotonic() - booted
                    until = time.monotonic() + choose.uniform(0.1, max(4.0, pace_s / 2))
                if "begin" in said:
                    allowed, journey = [allowed[-1], said["after"]], said["begin"]
                else:
                    allowed, journey = [said["told"]], "nothing"
                    finished += 1
        cut_in[journey.partition(" ")[0]] += 1
    print(
        f"{ROUNDS} power cuts ({', '.join(f'{name} {count}' for name, count in cut_in.items())}) after {finished} "
        f"journeys, {layers} layers with {files} files hashed, {time.monotonic() - begun:.0f} s: 0 violations"
    )
