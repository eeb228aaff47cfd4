"""What was not synced is lost, reordered or torn, at thousands of moments; after each the store is whole.

The journeys run once on a recording file system (`fuse.py`), and are then cut at random operations (`disk.py`). A
failure prints `cut seed/operation/number`; `POWERCUT_SEED` runs a seed again, `POWERCUT_CUTS` more cuts.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import trio

from tests.powercut import check, fuse
from tests.powercut.disk import Disk, Remains
from tests.powercut.invariants import Found
from tests.powercut.journeys import Session, every_journey, fill_registry
from tests.registry.fake import fake_registry

reason = fuse.is_usable()
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=reason)]

CUTS = int(os.environ.get("POWERCUT_CUTS", "2000"))
SECOND_CUTS = 6  # recoveries that are cut themselves
PROCESSES = max(2, min(4, os.cpu_count() or 1))


Log = tuple[Path, int]  # a recorded log, and the position from which on it may be cut


def record(directory: Path, *, slow_link: bool, remains: Remains | None = None, number: int = 0) -> Log:
    """Run every journey on a disk that starts empty, or with what a cut left (then recovery is a journey too)."""
    log = directory / "log"
    root = directory / "disk"
    root.mkdir()
    told = None
    with fuse.recorded(root, log):
        if remains is not None:
            found = check.look(remains)
            assert isinstance(found, Found), found
            told = found.state
            remains.write_to(root)
            descriptor = os.open(root, os.O_RDONLY)
            fuse.say_syncfs(descriptor)
            os.close(descriptor)
        with fake_registry() as registry, fuse.syncfs_also_said():
            fill_registry(registry)
            session = Session(root, registry, watched=True, told=told, name=f"-{number}" if number else "")
            trio.run(lambda: every_journey(session, slow_link=slow_link))
    operations = fuse.read_log(log)
    return log, next(position for position, op in enumerate(operations) if op[0] == "mark")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> list[Log]:
    return [
        record(tmp_path_factory.mktemp("fast"), slow_link=False),
        record(tmp_path_factory.mktemp("slow"), slow_link=True),
    ]


def seeds() -> list[int]:
    seed = int(os.environ.get("POWERCUT_SEED") or random.randrange(1 << 32))
    return [seed + number for number in range(PROCESSES)]


def show(what: str, total: check.Report, begun: float) -> None:
    print(
        f"{what}: {total.cuts} cuts, {total.layers} layers with {total.files} files hashed in "
        f"{time.monotonic() - begun:.0f} s: {len(total.violations)} violations"
    )
    print(", ".join(f"{journey or 'idle'} {count}" for journey, count in total.journeys.most_common()))


def test_two_thousand_power_cuts_lose_nothing_that_was_promised(logs: list[Log]) -> None:
    """Each layer, image, reference and container is as before or as after the journey that was cut."""
    begun = time.monotonic()
    total = check.Report()
    numbers = seeds()
    print(f"seed {numbers[0]}")
    for log, first in logs:
        total.add(check.check_in_parallel(log, numbers, -(-CUTS // len(logs) // PROCESSES), first=first))
    show("unsynced data lost", total, begun)
    assert total.violations == []
    assert total.cuts >= CUTS


def test_a_recovery_may_be_cut_as_well(logs: list[Log], tmp_path: Path) -> None:
    """What a cut leaves is recovered on a recording disk, used, and cut again."""
    begun = time.monotonic()
    total = check.Report()
    numbers = seeds()
    print(f"seed {numbers[0]}")
    choose = random.Random(numbers[0])
    for number in range(1, SECOND_CUTS + 1):
        log, first = choose.choice(logs)
        operations = fuse.read_log(log)
        disk = Disk()
        for op in operations[: choose.randrange(first, len(operations))]:
            disk.apply(op)
        directory = tmp_path / str(number)
        directory.mkdir()
        slow_link = choose.random() < 0.5
        again, begin = record(directory, slow_link=slow_link, remains=disk.cut(choose), number=number)
        total.add(check.check_in_parallel(again, numbers, 30, first=begin))
    show("second cuts", total, begun)
    assert total.violations == []


@pytest.mark.parametrize("without", ["all", "syncfs", "fsync"])
def test_the_proof_notices_an_engine_that_does_not_sync(logs: list[Log], without: str) -> None:
    """The same cuts, with the engine's syncs left out of the log: the check must fail."""
    numbers = seeds()
    log, first = logs[1]
    total = check.check_in_parallel(log, numbers, 60, first=first, without=without)
    print(f"seed {numbers[0]}: without {without}: violations after {total.failed} of {total.cuts} cuts, such as:")
    for violation in total.violations[:3]:
        print(violation[:300])
    assert total.failed > total.cuts // 20
