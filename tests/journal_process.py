"""A systemd-journald of our own, in a mount namespace with a /run of its own; nothing of it is left afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

JOURNALD = Path("/lib/systemd/systemd-journald")
SCRIPT = """
mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal /run/log/journal && exec "$0"
"""


@dataclass(frozen=True)
class Journal:
    socket: Path
    journalctl: tuple[str, ...]


def can_run() -> bool:
    return os.geteuid() == 0 and JOURNALD.exists() and shutil.which("journalctl") is not None


@contextlib.contextmanager
def running_journal() -> Iterator[Journal]:
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", SCRIPT, str(JOURNALD)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        run = Path(f"/proc/{process.pid}/root/run")
        socket = run / "systemd/journal/socket"
        deadline = time.monotonic() + 30
        while not (_is_there(socket) and _is_there(run / "systemd/journal/stdout")):
            assert process.poll() is None, "systemd-journald ended at once"
            assert time.monotonic() < deadline, "systemd-journald does not listen"
            time.sleep(0.05)
        yield Journal(socket, ("journalctl", f"--directory={run}/log/journal"))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_there(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.exists()
    return False
