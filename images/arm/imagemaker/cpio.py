"""cpio archives in the kernel's `newc` form: names, modes, no times; the same bytes for the same files."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field


@dataclass(slots=True)
class Archive:
    out: bytearray = field(default_factory=bytearray)
    made: set[str] = field(default_factory=set)
    inode: int = 1

    def directory(self, name: str) -> None:
        """With what is above it."""
        parts = name.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            if path and path not in self.made:
                self._entry(path, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._parents(name)
        if name.strip("/") not in self.made:
            self._entry(name.strip("/"), stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        self._parents(name)
        if name.strip("/") not in self.made:
            self._entry(name.strip("/"), stat.S_IFLNK | 0o777, target.encode())

    def node(self, name: str, major: int, minor: int) -> None:
        self._parents(name)
        self._entry(name.strip("/"), stat.S_IFCHR | 0o600, b"", major, minor)

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"")
        self.out += bytes(-len(self.out) % 512)
        return bytes(self.out)

    def _parents(self, name: str) -> None:
        above = name.strip("/").rpartition("/")[0]
        if above:
            self.directory(above)

    def _entry(self, name: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        self.made.add(name)
        encoded = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        numbers = (self.inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(encoded), 0)
        self.inode += 1
        self.out += b"070701" + b"".join(b"%08x" % number for number in numbers) + encoded
        self.out += bytes(-len(self.out) % 4)
        self.out += data
        self.out += bytes(-len(self.out) % 4)
