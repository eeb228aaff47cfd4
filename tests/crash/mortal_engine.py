"""The daemon, killed by SIGKILL just before a chosen durable step, or just after a chosen transaction.

`python -m tests.crash.mortal_engine DIRECTORY FLAGS...`: while there is a file DIRECTORY/die_at, steps are counted and
their names written to DIRECTORY/steps; the process kills itself at the number that the file holds (0: never).
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def arm(directory: Path) -> None:
    """Listen to the steps of this process from now on."""
    from balenapy.linux import durable
    from balenapy.stores.db import Database

    order = directory / "die_at"
    steps = os.open(directory / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    lock = threading.Lock()
    count, counted_for = 0, (-1, -1)

    def step(name: str) -> None:
        nonlocal count, counted_for
        with lock:
            try:
                status = order.stat()
            except FileNotFoundError:
                return
            if counted_for != (status.st_ino, status.st_mtime_ns):  # a new order begins a new count
                count, counted_for = 0, (status.st_ino, status.st_mtime_ns)
            count += 1
            os.write(steps, f"{name}\n".encode())
            if count == int(order.read_text()):
                os.kill(os.getpid(), signal.SIGKILL)

    run = Database._run

    def run_and_tell(self: Database, fn: Callable[[sqlite3.Connection], Any]) -> Any:
        result = run(self, fn)
        step("committed")
        return result

    durable.listen(step)
    Database._run = run_and_tell  # type: ignore[method-assign]


def main() -> int:
    directory = Path(sys.argv.pop(1))
    from balenapy import config, lean

    parsed = config.parse(sys.argv[1:])
    lean.load("trio")
    from balenapy import daemon

    arm(directory)
    return daemon.run(parsed)


if __name__ == "__main__":
    sys.exit(main())
