"""Container images in the data partition from the start: the engine, run here on a directory, pulls or loads them.

The engine's data root does not depend on the machine, and layers of another architecture are files like any others. So
what the device finds is what its own engine would have made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from imagemaker.program import Failed, say
from imagemaker.rootfs import HERE, REPOSITORY
from imagemaker.targets import MIB, Target

sys.path.insert(0, str(HERE / "root/usr/lib/balenapy-os"))
from engineapi import Connection

DATA_ROOT = "balena-engine"  # below the data partition
START_TIMEOUT_S = 60
LOAD_TIMEOUT_S = 3600


def interpreter() -> str:
    """The repository's own, else the one this runs on (the engine's packages must be there)."""
    own = REPOSITORY / ".venv/bin/python"
    return str(own) if own.exists() else sys.executable


def data_tree(target: Target, images: Sequence[str], work: Path) -> Path:
    """A directory with an engine's data root that has the images.

    Raises: Failed.
    """
    tree, run_dir = work / "data-tree", work / "preload-run"
    (tree / DATA_ROOT).mkdir(parents=True, mode=0o710)
    run_dir.mkdir()
    socket = run_dir / "s"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DOCKER_HOST": f"unix://{socket}"}
    insecure = [word for name in os.environ.get("BALENAPY_PRELOAD_INSECURE", "").split(",") if name
                for word in ("--insecure-registry", name)]  # fmt: skip
    log = run_dir / "log"
    log.touch()
    (run_dir / "daemon.json").write_text("{}")
    daemon = subprocess.Popen(
        [interpreter(), "-m", "balenapy", "-H", f"unix://{socket}", "--data-root", tree / DATA_ROOT,
         "--exec-root", run_dir / "exec", "--pidfile", run_dir / "pid", "--bridge=none", "--iptables=false",
         "--ip-forward=false", "--config-file", run_dir / "daemon.json", *insecure],
        env=environment, stdout=subprocess.DEVNULL, stderr=os.open(log, os.O_WRONLY | os.O_APPEND),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not socket.exists():
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"preload: the engine does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        for name in images:
            say(f"preload {name}")
            if Path(name).is_file():
                load(socket, Path(name))
                continue
            platform = "linux/arm64" if target.architecture == "arm64" else "linux/arm/v7"
            command = [interpreter(), "-m", "balenapy.cli.main", "pull", "--platform", platform, name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Failed(f"preload {name}: {done.stdout[-500:]}{done.stderr[-1000:]}")
    finally:
        daemon.terminate()
        daemon.wait(60)
    shutil.rmtree(run_dir, ignore_errors=True)
    return tree


def load(socket: Path, archive: Path) -> None:
    """Raises: Failed, with what the engine says."""
    connection = Connection(LOAD_TIMEOUT_S, str(socket))
    try:
        with archive.open("rb") as file:
            connection.request("POST", "/images/load?quiet=1", file, {"Content-Type": "application/x-tar"})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
    finally:
        connection.close()
    if answer.status != 200 or '"error"' in text:
        raise Failed(f"preload {archive}: {text[-1000:]}")


def mib(tree: Path) -> int:
    """Room for the tree: its bytes, and what ext4 needs beside them."""
    total = sum(path.lstat().st_size + 4096 for path in tree.rglob("*") if not path.is_dir()) + 4096
    return int(total * 1.15 / MIB) + 32

