"""Ten thousand damaged inputs, shared by all readers of foreign bytes; `python -m tests.fuzz` gives them a million."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.__main__ import run
from tests.fuzz.targets import targets

INPUTS = 10_000
TARGETS = targets()


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_bytes_are_read_or_refused_and_nothing_else(
    name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bounds of memory and time that the target states."""
    monkeypatch.chdir(str(tmp_path))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    outcomes = run(name, TARGETS[name], seed, -(-INPUTS // len(TARGETS)))
    print(f"{name}: {outcomes}")
    assert outcomes["refused"]
    assert outcomes["accepted"]
