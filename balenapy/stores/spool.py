"""The spool: what conmon wrote of a run's output and nobody has taken over yet. A file, or several, in memory.

conmon appends, and at its limit renames a new file over the old one (linux/conmon.py). Whoever holds the old one open
loses nothing of it: `look` opens every new one, and is called whenever the watcher saw something. It gives each a
second name as well, `log-NUMBER`, until all of it is taken: an engine that dies leaves to the next what conmon has
replaced meanwhile. Memory is given back as the reader goes on (hole punching).
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from balenapy.linux import syscalls

BATCH_BYTES = 256 << 10
PUNCH_BYTES = 64 << 10  # memory given back at once


@dataclass(slots=True)
class _File:
    fd: int
    inode: int
    name: Path  # of ours
    taken: int = 0  # bytes, up to the end of a line
    punched: int = 0

    @property
    def waiting(self) -> int:
        return max(0, os.fstat(self.fd).st_size - self.taken)


class Spool:
    """Reads conmon's files in order. One may read while another looks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: list[_File] = []  # oldest first
        self._lock = threading.Lock()  # of the list: `look` is called in the loop's thread
        self._number = 0
        for name in sorted(path.parent.glob(f"{path.name}-[0-9]*"), key=lambda one: int(one.name.rpartition("-")[2])):
            self._number = int(name.name.rpartition("-")[2])
            self._add(name, name)

    def look(self) -> int:
        """Hold what conmon has begun since; returns how many bytes wait to be taken."""
        with self._lock:
            try:
                inode = os.stat(self._path).st_ino
                if not self._files or self._files[-1].inode != inode:
                    self._number += 1
                    name = self._path.with_name(f"{self._path.name}-{self._number}")
                    os.link(self._path, name)
                    self._add(self._path, name)
            except FileNotFoundError:
                pass
            return sum(file.waiting for file in self._files)

    def _add(self, path: Path, name: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._files.append(_File(fd, os.fstat(fd).st_ino, name))

    @property
    def is_open(self) -> bool:
        return bool(self._files)

    @property
    def position(self) -> tuple[int, int]:
        """(inode, offset) of the next byte to be taken; (0, 0) when there is no file."""
        return (self._files[0].inode, self._files[0].taken) if self._files else (0, 0)

    def go_to(self, inode: int, offset: int) -> bool:
        """Take from there on: what is before was taken by an engine that died. False when that file is gone."""
        index = next((index for index, file in enumerate(self._files) if file.inode == inode), -1)
        if index < 0:
            return False
        with self._lock:
            for done in self._files[:index]:
                done.name.unlink(missing_ok=True)
                os.close(done.fd)
            del self._files[:index]
        self._files[0].taken = self._files[0].punched = offset
        return True

    def read(self, limit: int = BATCH_BYTES) -> bytes:
        """The next whole lines, at most `limit` bytes; b"" when there are none for now. They still wait."""
        while True:
            self.look()
            if not self._files:
                return b""
            file = self._files[0]
            data = os.pread(file.fd, limit, file.taken)
            end = data.rfind(b"\n") + 1
            if end:
                return data[:end]
            if len(data) == limit:
                return data  # no line is that long: this is damage
            # Once there is a newer file the old one is complete.
            if len(self._files) == 1:
                return b""
            with self._lock:
                done = self._files.pop(0)
                done.name.unlink(missing_ok=True)
                os.close(done.fd)

    def take(self, count: int) -> None:
        """So many bytes of what `read` gave are safe elsewhere."""
        file = self._files[0]
        file.taken += count
        end = file.taken & ~0xFFF
        if end - file.punched >= PUNCH_BYTES:
            try:
                syscalls.punch_hole(file.fd, file.punched, end - file.punched)
            except OSError:
                pass  # a file system that cannot; conmon's limit bounds it then
            file.punched = end

    def drop(self, keep: int) -> int:
        """Throw away the oldest lines until about `keep` bytes wait; returns the bytes that are lost."""
        lost = 0
        excess = self.look() - keep
        while excess > 0 and (lines := self.read()):
            cut = len(lines) if len(lines) <= excess else lines.find(b"\n", excess) + 1 or len(lines)
            self.take(cut)
            lost += cut
            excess -= cut
        return lost

    def end(self) -> None:
        """The run is over and all of it is taken."""
        with self._lock:
            for file in self._files:
                file.name.unlink(missing_ok=True)

    def close(self) -> None:
        with self._lock:
            for file in self._files:
                os.close(file.fd)
            self._files.clear()
