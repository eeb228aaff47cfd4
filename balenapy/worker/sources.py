"""Verb `sources`: which files of a directory COPY and ADD mean, and what they hash to.

Arguments: {"root": a directory, where we are chrooted; "patterns": [...]; "sums": a file with the hashes of a context's
entries, else they are made of the files as they are; "host_names": owners are called as this machine calls them, which
the reference engine does; else only root has a name}. Report: {"sources": [[[path, hash], ...] for each pattern]}.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from balenapy.core.buildtree import Kind, header_sum, to_bytes, to_text
from balenapy.core.copysources import find_sources
from balenapy.core.tarstream import BLOCK_DEVICE, CHAR, DIRECTORY, FIFO, REGULAR, SYMLINK
from balenapy.errors import InvalidParameter
from balenapy.worker import process

READ_BYTES = 256 << 10
CONTENT_MAX_BYTES = 8 << 20  # of a Dockerfile, an /etc/passwd; ours
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LETTERS = {
    stat.S_IFREG: REGULAR,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHAR,
    stat.S_IFBLK: BLOCK_DEVICE,
    stat.S_IFIFO: FIFO,
}


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    root, patterns, sums = arguments.get("root"), arguments.get("patterns"), None
    if not isinstance(root, str) or not isinstance(patterns, list):
        raise InvalidParameter("sources: needs root and patterns")
    if arguments.get("sums") is not None:
        with open(arguments["sums"], "rb") as file:
            sums = json.load(file)
    names = OwnerNames.of_host() if arguments.get("host_names") else OwnerNames()
    process.enter(root)
    tree = DirectoryTree("/", sums, names)
    return {
        "sources": [[[source.path, source.hash] for source in find_sources(tree, pattern)] for pattern in patterns]
    }


@dataclass(frozen=True, slots=True)
class OwnerNames:
    """What owners are called in a hash."""

    users: Mapping[int, bytes] = field(default_factory=lambda: {0: b"root"})
    groups: Mapping[int, bytes] = field(default_factory=lambda: {0: b"root"})

    @classmethod
    def of_host(cls) -> OwnerNames:
        return cls(_names_in("/etc/passwd"), _names_in("/etc/group"))


def _names_in(path: str) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    try:
        with open(path, "rb") as file:
            for line in file:
                fields = line.strip().split(b":")
                if len(fields) > 2 and fields[2].isdigit():
                    found.setdefault(int(fields[2]), fields[0])
    except FileNotFoundError:
        pass
    return found


class DirectoryTree:
    """A directory as `copysources` sees it. Nobody changes it meanwhile.

    Args:
        root: where it is, or a descriptor of it.
        sums: hashes that are known; None: they are made.
        names: for hashes that are made.
    """

    def __init__(
        self, root: str | int, sums: Mapping[str, str] | None = None, names: OwnerNames | None = None
    ) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self.fd = os.open(root, flags) if isinstance(root, str) else root
        self._sums = sums
        self._names = names or OwnerNames()

    def status(self, path: str) -> os.stat_result | None:
        try:
            return os.lstat(to_bytes(path) or b".", dir_fd=self.fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise process.failed("look at", to_bytes(path), error) from error

    def kind(self, path: str) -> Kind | None:
        status = self.status(path)
        if status is None:
            return None
        if stat.S_ISDIR(status.st_mode):
            return Kind.DIRECTORY
        return Kind.LINK if stat.S_ISLNK(status.st_mode) else Kind.FILE

    def target(self, path: str) -> str:
        return to_text(os.readlink(to_bytes(path), dir_fd=self.fd))

    def names(self, path: str) -> list[str]:
        fd = os.open(to_bytes(path) or b".", _READ | os.O_DIRECTORY, dir_fd=self.fd)
        try:
            return [to_text(os.fsencode(name)) for name in os.listdir(fd)]
        finally:
            os.close(fd)

    def sum(self, path: str) -> str:
        if self._sums is not None:
            return self._sums.get(path, path)
        status = self.status(path)
        return path if status is None else self._make_sum(path, status)

    def _make_sum(self, path: str, status: os.stat_result) -> str:
        """As moby's archive.FileInfoHeader sees a file."""
        kind = stat.S_IFMT(status.st_mode)
        name = to_bytes(path)
        device = kind in (stat.S_IFCHR, stat.S_IFBLK)
        is_file = kind == stat.S_IFREG
        digest = header_sum(
            name + b"/" if kind == stat.S_IFDIR else name,
            _LETTERS.get(kind, REGULAR),
            mode=status.st_mode,
            uid=status.st_uid,
            gid=status.st_gid,
            size=status.st_size if is_file else 0,
            link=to_bytes(self.target(path)) if kind == stat.S_IFLNK else b"",
            uname=self._names.users.get(status.st_uid, b""),
            gname=self._names.groups.get(status.st_gid, b""),
            major=os.major(status.st_rdev) if device else 0,
            minor=os.minor(status.st_rdev) if device else 0,
            xattrs=self._capability(name) if is_file else None,
        )
        if is_file:
            fd = os.open(name, _READ, dir_fd=self.fd)
            try:
                while piece := os.read(fd, READ_BYTES):
                    digest.update(piece)
            finally:
                os.close(fd)
        return digest.hexdigest()

    def _capability(self, name: bytes) -> dict[bytes, bytes]:
        fd = os.open(name, _READ, dir_fd=self.fd)
        try:
            return {b"security.capability": os.getxattr(fd, "security.capability")}
        except OSError:
            return {}
        finally:
            os.close(fd)

    def content(self, path: str) -> bytes | None:
        status = self.status(path)
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        if status.st_size > CONTENT_MAX_BYTES:
            raise InvalidParameter(f"{path} is longer than {CONTENT_MAX_BYTES >> 20} MiB")
        with open(os.open(to_bytes(path), _READ, dir_fd=self.fd), "rb") as file:
            return file.read()

    def remove(self, path: str) -> None:
        status = self.status(path)
        if status is None:
            return
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(to_bytes(path), dir_fd=self.fd)
            return
        empty(to_bytes(path), self.fd)
        os.rmdir(to_bytes(path), dir_fd=self.fd)


def empty(path: bytes, dir_fd: int | None = None) -> None:
    """Remove all that is in a directory; links are not followed."""
    for _, directories, files, fd in os.fwalk(path, topdown=False, dir_fd=dir_fd):
        for name in files:
            os.unlink(name, dir_fd=fd)
        for name in directories:
            if stat.S_ISLNK(os.lstat(name, dir_fd=fd).st_mode):
                os.unlink(name, dir_fd=fd)
            else:
                os.rmdir(name, dir_fd=fd)
