"""balena-supervisor's update by delta image, with the packages it uses; the scenario is `supervisor/scenario.js`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compat.images import directory, file, make_tar
from tests.deltas_fixture import balena_delta
from tests.engine_process import EngineProcess
from tests.images_fixture import ImageFixture, busybox
from tests.registry.fake import fake_registry

pytestmark = pytest.mark.root

DIRECTORY = Path(__file__).parent / "supervisor"
ASSERTIONS = 16


@pytest.fixture(scope="session")
def packages() -> Path:
    """The directory with the scenario and, beside it, the packages of the lock file."""
    if shutil.which("node") is None:
        pytest.skip("no node on this machine")
    installed = DIRECTORY / "node_modules" / ".package-lock.json"
    lock = DIRECTORY / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=DIRECTORY, check=True)
        os.utime(installed)
    return DIRECTORY


def release(version: int) -> ImageFixture:
    content = make_tar([directory("app"), file("app/version", f"{version}\n".encode()), file("app/data", b"d" * 9000)])
    return ImageFixture((*busybox().tars, content), {"Cmd": ["sh"]})


def test_an_update_by_delta_image(packages: Path, engine: EngineProcess) -> None:
    if engine.is_reference:
        pytest.skip("dockerd knows no delta images")
    old, new = release(1), release(2)
    orphan = balena_delta(replace(old, config={"Cmd": ["another"]}), new)
    with fake_registry(auth="token") as registry:
        registry.add("fleet/app", "1", old)
        registry.add("deltas/1-2", "latest", balena_delta(old, new))
        registry.add("deltas/orphan", "latest", orphan)
        given = {
            "base": f"{registry.host}/fleet/app:1",
            "delta": f"{registry.host}/deltas/1-2:latest",
            "target": f"{registry.host}/fleet/app:2",
            "targetId": new.image_id,
            "orphan": f"{registry.host}/deltas/orphan:latest",
            "token": registry.new_token("repository:deltas/1-2:pull repository:deltas/orphan:pull"),
            "username": registry.username,
            "password": registry.password,
        }
        try:
            done = subprocess.run(
                ["node", "scenario.js", str(engine.socket), json.dumps(given)],
                cwd=packages,
                env=engine.environment,
                capture_output=True,
                text=True,
                timeout=180,
                check=False,
            )
        finally:
            for image in engine.request("GET", "/images/json?all=1").json:
                if image["Id"] in (old.image_id, new.image_id):
                    engine.request("DELETE", f"/images/{image['Id']}?force=1")

    lines = done.stdout.splitlines()
    print(done.stdout)
    assert lines, done.stderr
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert len(lines) == ASSERTIONS
