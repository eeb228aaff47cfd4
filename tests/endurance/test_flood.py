"""A container that has gone mad costs its neighbours, the API and the machine nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.endurance.figures import figures_of, spread
from tests.engine_process import running_engine

pytestmark = pytest.mark.root

SECONDS = float(os.environ.get("FLOOD_SECONDS", "3"))
LINE = "a line of ninety-nine characters, more or less, as a program that has gone mad would write it all"
NUMBERED = "i=0; while [ $i -lt 100 ]; do echo n$i; i=$((i+1)); usleep 30000; done; sleep 1000"


@pytest.mark.parametrize("mode", ["blocking", "non-blocking"])
def test_a_flood_leaves_api_memory_disk_and_neighbours_alone(tmp_path: Path, busybox: str, mode: str) -> None:
    with running_engine(tmp_path, program="balenapy") as engine:
        engine.docker("pull", "-q", busybox)
        run = ["run", "-d", "--network", "none"]
        engine.docker(*run, "--name", "near", busybox, "sh", "-c", NUMBERED)
        engine.docker(*run, "--name", "flood", "--log-opt", f"mode={mode}", busybox, "yes", LINE)
        before = figures_of(engine.pid)
        took, memory = [], []
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            begun = time.perf_counter()
            assert engine.request("GET", "/_ping").status == 200
            took.append((time.perf_counter() - begun) * 1000)
            memory.append(figures_of(engine.pid).pss_bytes)
            time.sleep(0.03)
        spent = figures_of(engine.pid) - before
        containers = engine.data_root / "containers"
        size = sum(path.stat().st_blocks * 512 for path in containers.rglob("*") if path.is_file())
        spool = sum(path.stat().st_blocks * 512 for path in (engine.exec_root / "containers").glob("*/log"))
        engine.docker("logs", "--tail", "3", "flood")  # who reads is overtaken, and told so; it ends all the same
        engine.docker("kill", "flood")
        tail = engine.docker("logs", "--tail", "3", "flood").stdout.splitlines()
        near = engine.docker("logs", "near").stdout.splitlines()
        print(f"{mode}: pings {len(took)}, ms {spread(took)}; grew {(max(memory) - memory[0]) / 1e6:.1f} MB; "
              f"written {spent.written_bytes / 1e6:.1f} MB; on disk {size / 1e6:.1f} MB; near {len(near)}")  # fmt: skip

    assert sorted(took)[len(took) * 95 // 100] <= 250
    assert max(memory) - memory[0] < 8e6
    assert size < 3e6  # two rings of 1 MiB
    assert spool <= 18 << 20
    assert near == [f"n{number}" for number in range(len(near))]
    assert len(near) > SECONDS * 4
    assert tail[:2] == [LINE] * 2
    assert LINE.startswith(tail[2])  # killed in the middle of a line, maybe


def test_what_was_dropped_without_blocking_is_told_to_the_byte(tmp_path: Path, busybox: str) -> None:
    """Every line is shown, or counted as dropped or overwritten: nothing goes without a word."""
    with running_engine(tmp_path, program="balenapy") as engine:
        engine.docker("pull", "-q", busybox)
        options = ["--log-opt", "mode=non-blocking", "--log-opt", "max-size=64m"]
        engine.docker("run", "--network", "none", "--name", "fast", *options, "-d", busybox, "seq", "-w", "1000000")
        assert engine.docker("wait", "fast").stdout == "0\n"
        done = engine.docker("logs", "fast")
        shown = [int(line) for line in done.stdout.splitlines()]
        dropped = sum(int(line.split()[1]) for line in done.stderr.splitlines() if "were dropped" in line)
        print(f"shown {len(shown)} of 1000000, told as dropped {dropped} bytes")

    assert shown == sorted(set(shown))
    assert shown[-1] == 1_000_000
    # conmon's 45 bytes before each line, and a line it has cut in two counts twice.
    assert abs((1_000_000 - len(shown)) * 53 - dropped) <= dropped / 50
    assert not [line for line in done.stderr.splitlines() if "damaged" in line]
