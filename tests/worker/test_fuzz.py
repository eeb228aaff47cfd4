"""Ten thousand archives that want to do harm, each unpacked in a root of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.root


def test_whatever_an_archive_says_all_stays_inside_and_no_byte_is_lost() -> None:
    """What is held for each is in `fuzz_extract`."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.fuzz_extract", "1", "10000"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    outcomes = json.loads(done.stdout)["outcomes"]
    print(f"extract fuzz: {done.stdout.strip()}")
    assert sum(outcomes.values()) == 10_000
    assert outcomes["unpacked"] > 3000
    assert outcomes.get("a file is reached no more", 0) < 100
