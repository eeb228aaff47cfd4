"""The daemon is killed again and again while containers log: no line is lost, none comes twice."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.engine_process import running_engine

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("LOG_KILLS", "5"))
CONTAINERS = 5
NUMBERED = "i=0; while true; do echo line-$i; i=$((i+1)); [ $((i % 40)) = 0 ] && usleep 100000; done"


def test_no_line_is_lost_or_doubled_by_killing_the_daemon(tmp_path: Path, busybox: str) -> None:
    chance = random.Random(7)
    with running_engine(tmp_path, "--log-flush-interval", "0.5", "--log-budget", "0", program="balenapy") as engine:
        engine.docker("pull", "-q", busybox)
        names = [f"c{number}" for number in range(CONTAINERS)]
        for number, name in enumerate(names):
            options = ["--log-opt", "max-size=16m"] + (["--log-opt", "compress=true"] if number % 2 else [])
            engine.docker("run", "-d", "--network", "none", "--name", name, *options, busybox, "sh", "-c", NUMBERED)
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.05, 1.0))
            engine.kill()
            time.sleep(chance.uniform(0.0, 0.5))
            engine.start()
        lines = 0
        for name in names:
            engine.docker("kill", name)
            done = engine.docker("logs", name)
            found = done.stdout.splitlines()
            assert found == [f"line-{number}" for number in range(len(found))], name
            assert done.stderr == ""
            lines += len(found)
        print(f"{KILLS} kills, {CONTAINERS} containers, {lines} lines, none lost, none doubled")
    assert lines > CONTAINERS * KILLS * 20
