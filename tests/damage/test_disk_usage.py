"""After a crash in the middle of anything, what the engine says it takes on disk is what it takes."""

from __future__ import annotations

import http.client
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest

from tests.compat.images import file, make_tar
from tests.engine_process import EngineProcess, running_engine, wait_until
from tests.images_fixture import ImageFixture, busybox
from tests.registry.fake import fake_registry

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


def taken(engine: EngineProcess) -> int:
    return int(subprocess.check_output(["du", "-s", "-B1", engine.data_root]).split()[0])


def told(engine: EngineProcess) -> int:
    answer = engine.request("GET", "/system/df?disk=1")
    assert answer.status == 200, answer.body
    return sum(answer.json["Disk"].values())


def settled(engine: EngineProcess) -> bool:
    return not os.listdir(engine.data_root / "trash")


def test_disk_use_is_told_after_crashes(tmp_path: Path) -> None:
    chooser = random.Random(7)
    tars = [make_tar([file(f"d/{n}-{m}", os.urandom(chooser.randrange(60_000))) for m in range(100)]) for n in range(4)]
    with fake_registry() as registry, running_engine(tmp_path) as engine:
        registry.add("team/box", "1", busybox())
        registry.add("team/big", "1", ImageFixture(tuple(tars)))
        engine.request("POST", f"/images/create?fromImage={registry.host}/team/box:1")
        body = {"Image": f"{registry.host}/team/box:1", "Cmd": ["dd", "if=/dev/urandom", "of=/x", "bs=1M", "count=3"]}
        engine.request("POST", "/containers/create?name=box", body)
        engine.request("POST", "/containers/box/start")
        engine.request("POST", "/containers/box/wait")
        for cut_at in (50_000, 1_500_000, 2_900_000):
            registry.faults.clear()
            registry.fault("GET .*blobs/", stall_at=cut_at, times=100)
            path = f"/images/create?fromImage={registry.host}/team/big:1"
            puller = threading.Thread(target=_pull_in_vain, args=(engine, path))
            puller.start()
            wait_until(lambda: any((engine.data_root / "ingest").iterdir()), what="something is staged")
            engine.kill()
            puller.join()
            engine.start()
            wait_until(lambda: settled(engine), what="the trash is empty")
            assert told(engine) == pytest.approx(taken(engine), rel=0.01)
        registry.faults.clear()
        engine.request("POST", path)
        engine.kill()
        engine.start()
        wait_until(lambda: settled(engine), what="the trash is empty")
        assert told(engine) == pytest.approx(taken(engine), rel=0.01)


def _pull_in_vain(engine: EngineProcess, path: str) -> None:
    try:
        engine.request("POST", path)
    except (OSError, http.client.HTTPException):  # the engine is killed meanwhile
        pass
