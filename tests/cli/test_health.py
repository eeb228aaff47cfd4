from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine_process import running_engine

COMMAND = [sys.executable, "-m", "balenapy.cli.main", "healthcheck"]


@pytest.mark.root
def test_an_engine_that_answers_is_healthy_and_a_stopped_one_is_not(tmp_path: Path) -> None:
    with running_engine(tmp_path, program="balenapy") as engine:
        command = [*COMMAND, "-H", f"unix://{engine.socket}"]
        assert subprocess.run(command, check=False).returncode == 0
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("unhealthy: ")


def test_an_engine_that_hangs_is_not_healthy(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        begun = time.monotonic()
        command = [*COMMAND, f"--host=unix://{tmp_path}/s", "--timeout", "0.3"]
        done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 1
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("wrong", [["--nonsense"], ["-H"], ["--timeout=x"]])
def test_wrong_arguments_are_told(wrong: list[str]) -> None:
    assert subprocess.run([*COMMAND, *wrong], capture_output=True, check=False).returncode == 125


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from balenapy.cli.main import main; main(['healthcheck', '-H', 'unix:///nonexistent/s']); "
        "print(sorted({'h11', 'trio', 'json', 'ssl', 'balenapy.cli.client'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
