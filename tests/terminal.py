"""A program on a pseudo terminal of its own, driven by what it prints (for `docker run -it`)."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType


class Terminal:
    """Use as a context manager: at the end the program is killed and reaped, the terminal closed."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], rows: int = 24, columns: int = 80) -> None:
        self._master, slave = pty.openpty()
        self.resize(rows, columns)
        # setsid makes the slave the controlling terminal (-c), so that SIGWINCH and ^C arrive.
        self._process = subprocess.Popen(
            ["setsid", "-c", "-w", *argv], stdin=slave, stdout=slave, stderr=slave, env=dict(env)
        )
        os.close(slave)
        self.output = ""
        self._consumed = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._master)
        self._process.kill()
        self._process.wait()

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, pattern: str, timeout_s: float = 10.0) -> re.Match[str]:
        """Wait until what was printed since the last match holds `pattern`."""
        deadline = time.monotonic() + timeout_s
        while True:
            match = re.compile(pattern, re.MULTILINE).search(self.output, self._consumed)
            if match:
                self._consumed = match.end()
                return match
            if not self._read(deadline):
                raise AssertionError(f"{pattern!r} not seen; the terminal shows: {self.output!r}")

    def wait(self, timeout_s: float = 10.0) -> int:
        """Read until the program ends; its exit status."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        return self._process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the last user of the terminal is gone
            return False
        self.output += data.decode(errors="replace")
        return bool(data)
