"""With containers that say nothing the engine writes nothing and sleeps."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.endurance.figures import figures_of, wakeups_of
from tests.engine_process import running_engine, wait_until

pytestmark = pytest.mark.root

SECONDS = float(os.environ.get("IDLE_SECONDS", "12"))
SETTLE_S = 14.0  # Trio's spare threads go after ten; what was logged is durable after eight


def test_idle_is_silent(tmp_path: Path, busybox: str) -> None:
    with running_engine(tmp_path, program="balenapy") as engine:
        engine.docker("pull", "-q", busybox)
        for number in range(3):
            engine.docker("run", "-d", "--name", f"quiet{number}", busybox, "sh", "-c", "echo up; exec sleep 100000")
        time.sleep(SETTLE_S)
        wait_until(lambda: figures_of(engine.pid).threads <= 2, 40, "no spare threads")
        before, awake = figures_of(engine.pid), wakeups_of(engine.pid)
        time.sleep(SECONDS)
        spent = figures_of(engine.pid) - before
        # The end of a spare thread is its one wakeup.
        wakeups = sum(count - awake.get(thread, 0) for thread, count in wakeups_of(engine.pid).items())
        print(f"{SECONDS:.0f} s: {spent.written_bytes} bytes written, {wakeups} wakeups, {spent.cpu_ticks} ticks")

    assert spent.written_bytes == 0
    if "BALENAPY_SHARED_MACHINE" not in os.environ:  # else others change the firewall, which an engine watches
        assert wakeups <= max(1, SECONDS / 60)
    assert spent.threads <= 0
