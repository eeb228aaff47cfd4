"""Starts, stops, logs, execs and pulls for a while: memory, descriptors, threads and tasks stay where they were."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.compat import images
from tests.endurance.figures import Figures, figures_of
from tests.engine_process import EngineProcess, running_engine, wait_until

pytestmark = pytest.mark.root

SECONDS = float(os.environ.get("SOAK_SECONDS", "15"))
GROWTH_BYTES = 3_000_000


def _round(engine: EngineProcess, registry: str, image: str, number: int) -> None:
    reference = f"{registry}/soak:{number % 2}"
    name = f"soak{number}"
    engine.docker("pull", "-q", reference)
    script = "seq 2000; trap 'exit 0' TERM; while :; do sleep 1; done"
    engine.docker("run", "-d", "--name", name, image, "sh", "-c", script)
    engine.docker("exec", name, "true")
    wait_until(lambda: engine.docker("logs", "--tail", "1", name).stdout == "2000\n", 30)
    with engine.docker_process("logs", "-f", name) as follower:
        assert follower.stdout is not None
        follower.stdout.readline()
    engine.docker("stats", "--no-stream", name)
    engine.docker("stop", "-t", "5", name)
    engine.docker("start", name)
    engine.docker("rm", "-f", name)
    engine.docker("rmi", reference)


def _at_rest(engine: EngineProcess) -> Figures:
    """When the spare threads are gone and logs are on disk."""
    wait_until(lambda: engine.request("GET", "/v1.39/containers/json?all=1").json == [], 30)
    wait_until(lambda: figures_of(engine.pid).threads <= 2, 40, "no spare threads")
    return figures_of(engine.pid)


def test_nothing_grows(tmp_path: Path, registry: str, busybox: str) -> None:
    for number in range(2):
        images.push(registry, "soak", str(number), images.busybox_image())
    with running_engine(tmp_path, program="balenapy") as engine:
        engine.docker("pull", "-q", busybox)
        rounds = 0
        for _ in range(2):  # what the first rounds load stays
            _round(engine, registry, busybox, rounds)
            rounds += 1
        before, tasks = _at_rest(engine), _tasks(engine)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            _round(engine, registry, busybox, rounds)
            rounds += 1
        after = _at_rest(engine)
        grew = after - before
        memory = f"{before.pss_bytes / 1e6:.1f} -> {after.pss_bytes / 1e6:.1f} MB"
        counts = f"descriptors {grew.descriptors:+}, threads {grew.threads:+}, tasks {_tasks(engine) - tasks:+}"
        print(f"{rounds} rounds: memory {memory}, {counts}")

        assert grew.pss_bytes < GROWTH_BYTES
        assert grew.descriptors <= 0
        assert grew.threads <= 0
        wait_until(lambda: _tasks(engine) <= tasks, 30, "no more tasks than before")


def _tasks(engine: EngineProcess) -> int:
    return int(engine.request("GET", "/info").json["NGoroutines"])
