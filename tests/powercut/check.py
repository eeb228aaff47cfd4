"""Many cuts of one recorded log: what remains is made real, an engine recovers on it, the invariants are checked.

As a program (`python -m tests.powercut.check`) it takes a JSON request on its command line and prints a JSON report:
the test starts one for each processor.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from balenapy.engine.containers import Containers
from balenapy.engine.engine import Engine
from balenapy.stores.containers import ContainerStore
from tests.powercut import fuse
from tests.powercut.disk import Disk, Op, Remains
from tests.powercut.invariants import Found, inspect

NOTHING: dict[str, Any] = {"references": {}, "images": [], "containers": {}}
SYNCS = {
    "all": frozenset(("fsync", "syncfs")),
    "syncfs": frozenset(("syncfs",)),
    "fsync": frozenset(("fsync",)),
    "": frozenset(),
}


@dataclass
class Report:
    """What came of some cuts."""

    cuts: int = 0
    failed: int = 0  # cuts with violations
    layers: int = 0
    files: int = 0
    violations: list[str] = field(default_factory=list)  # each with its seed, operation and journey
    journeys: Counter[str] = field(default_factory=Counter)

    def add(self, other: Report) -> None:
        self.cuts += other.cuts
        self.failed += other.failed
        self.layers += other.layers
        self.files += other.files
        self.violations += other.violations
        self.journeys += other.journeys


class Story:
    """Which states a client may see at each position of a log."""

    def __init__(self, log: list[Op]) -> None:
        marks = [(position, json.loads(op[1])) for position, op in enumerate(log) if op[0] == "mark"]
        self._positions = [position for position, _ in marks]
        self._journeys = [mark["journey"] for _, mark in marks]
        self._told = [mark["told"] or NOTHING for _, mark in marks]

    def at(self, position: int) -> tuple[str, list[dict[str, Any]]]:
        """The journey under way, and the states that may be found: before it and after it."""
        number = bisect_right(self._positions, position) - 1
        if number < 0:
            return "", [NOTHING]
        allowed = [self._told[number]]
        if self._journeys[number] and number + 1 < len(self._told):
            allowed.append(self._told[number + 1])
        return self._journeys[number], allowed


def check_log(log: list[Op], seed: int, cuts: int, *, first: int = 0, without: str = "") -> Report:
    """Cut at `cuts` random operations from `first` on; `without` some syncs, as if the engine did not call them."""
    story, report = Story(log), Report()
    ignored = SYNCS[without]
    positions = Counter(random.Random(seed).choices(range(first, len(log)), k=cuts))
    disk = Disk()
    for position, op in enumerate(log):
        for number in range(positions[position]):
            one = f"{seed}/{position}/{number}"
            journey, allowed = story.at(position)
            remains = disk.cut(random.Random(one))
            report.cuts += 1
            report.journeys[journey.partition(" ")[0]] += 1
            violations = check_cut(remains, allowed, report)
            report.failed += bool(violations)
            for violation in violations:
                report.violations.append(f"cut {one} during {journey!r}: {violation}")
        if op[0] not in ignored:
            disk.apply(op)
    return report


def check_cut(remains: Remains, allowed: list[dict[str, Any]], report: Report) -> list[str]:
    """Recover on what remains and look."""
    found = look(remains)
    if isinstance(found, str):
        return [found]
    report.layers += found.layers
    report.files += found.files
    violations = found.violations
    if found.state not in allowed:
        violations.append(f"state {found.state}, allowed {allowed}")
    return violations


def look(remains: Remains) -> Found | str:
    """What an engine makes of it, or why it does not start."""
    with tempfile.TemporaryDirectory(prefix="bptcut") as directory:
        root = Path(directory)
        remains.write_to(root)
        try:
            trio.run(recover, root)
        except Exception as error:
            return f"no start: {type(error).__name__}: {error}"
        try:
            return inspect(root / "data")
        except (sqlite3.Error, OSError, KeyError, ValueError) as error:
            return f"cannot be looked at: {type(error).__name__}: {error}"


async def recover(root: Path) -> None:
    """Start, load the containers, collect, empty the trash; then end as a SIGKILL would."""
    from tests.engine.image_engine import image_engine, settle

    async with image_engine(root) as engine:
        _recover_containers(engine)
        await settle(engine)
        engine.db._is_stale = False  # no standby copy at the end: it would only take time


def _recover_containers(engine: Engine) -> None:
    """`Containers.recover`, without what else containers need."""
    containers = Containers.__new__(Containers)
    containers._engine, containers.store = engine, ContainerStore(engine.db)
    containers.recover()


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def check_in_parallel(log: Path, seeds: Iterable[int], cuts: int, *, first: int = 0, without: str = "") -> Report:
    """One process for each seed."""
    processes = []
    total = Report()
    scratch = tempfile.mkdtemp(
        prefix="bptcut", dir=_memory()
    )  # ours, so that nothing stays of a process that is killed
    try:
        for seed in seeds:
            request = {"log": str(log), "seed": seed, "cuts": cuts, "first": first, "without": without}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.powercut.check", json.dumps(request)],
                    stdout=subprocess.PIPE,
                    env={**os.environ, "TMPDIR": scratch},
                    cwd=Path(__file__).parent.parent.parent,
                )
            )
        for process in processes:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, "a checking process failed"
            report = json.loads(output)
            total.add(Report(**{**report, "journeys": Counter(report["journeys"])}))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
        shutil.rmtree(scratch)
    return total


def main() -> None:
    logging.disable()
    request = json.loads(sys.argv[1])
    log = fuse.read_log(Path(request.pop("log")))
    report = check_log(log, request.pop("seed"), request.pop("cuts"), **request)
    print(json.dumps(vars(report)))


if __name__ == "__main__":
    main()
