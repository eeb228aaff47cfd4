"""dockerode 5: the client of balena's own tools; the scenario itself is `dockerode/scenario.js`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.engine_process import EngineProcess

pytestmark = pytest.mark.root

DIRECTORY = Path(__file__).parent / "dockerode"
SCENARIOS = ["system", "images", "run", "attach", "exec", "logs", "life", "statuses", "events", "ports", "volumes"]
SCENARIOS += ["networks", "files", "builds"]
LEAST_ASSERTIONS = 60


@pytest.fixture(scope="session")
def dockerode() -> Path:
    """The directory with the scenario and, beside it, the packages of the lock file."""
    if shutil.which("node") is None:
        pytest.skip("no node on this machine")
    installed = DIRECTORY / "node_modules" / ".package-lock.json"
    lock = DIRECTORY / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=DIRECTORY, check=True)
        os.utime(installed)
    return DIRECTORY


def run(directory: Path, engine: EngineProcess, image: str, *scenarios: str) -> list[str]:
    """What the scenarios say, a line for each assertion."""
    registry = image.split("/", 1)[0]
    done = subprocess.run(
        ["node", "scenario.js", str(engine.socket), image, registry, *scenarios],
        cwd=directory,
        env=engine.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.stdout.splitlines()


def test_scenarios_of_dockerode(dockerode: Path, engine: EngineProcess, busybox: str) -> None:
    lines = run(dockerode, engine, busybox, *SCENARIOS)
    passed = [line for line in lines if line.startswith("ok ")]

    assert [line for line in lines if not line.startswith("ok ")] == []
    assert {line.split()[1].rstrip(":") for line in passed} == set(SCENARIOS)
    assert len(passed) >= LEAST_ASSERTIONS
