"""Verb `squash`: several layers become one that means the same on top of what is below them.

Arguments: {"directory": a snapshot directory, whose `diff/` becomes the layer; "layers": the `diff/` of each layer,
bottom first; "lower": those of the layers below, top first; "epoch"}. The report is that of `pack`.

Each layer is laid over the former as overlayfs would, except that its marks stay: a whiteout and an opaque directory
are kept where there is something below for them to hide.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Any

from balenapy.core.buildtree import Kind
from balenapy.linux import syscalls
from balenapy.worker import pack, process
from balenapy.worker.copy import copy_content
from balenapy.worker.extract import OVERLAY_OPAQUE
from balenapy.worker.sources import DirectoryTree, empty

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OWN_XATTRS = "trusted.overlay."


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    directory, below = arguments["directory"], -1
    layers = [os.open(path, _DIRECTORY) for path in arguments["layers"]]
    merged = os.path.join(directory, "merged")
    if arguments["lower"]:
        os.mkdir(merged, 0o700)
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount_overlay(merged, arguments["lower"])
        below = os.open(merged, _DIRECTORY)
    process.apart(lambda: _squash(os.path.join(directory, "diff"), layers, below))
    if below >= 0:
        os.close(below)
        syscalls.umount2(merged, 0)
        os.rmdir(merged)
    return pack.run({"directory": directory, "fresh": True, "epoch": arguments.get("epoch")})


def _squash(target: str, layers: Sequence[int], below: int) -> dict[str, Any]:
    process.enter(target)
    os.umask(0)
    for fd in layers:
        Overlay(fd, DirectoryTree(below) if below >= 0 else None).run()
    return {}


class Overlay:
    """Lays one layer over what is in our root."""

    def __init__(self, fd: int, below: DirectoryTree | None) -> None:
        self._fd = fd
        self._here = DirectoryTree("/")
        self._below = below
        self._links: dict[tuple[int, int], bytes] = {}

    def run(self) -> None:
        """Raises: SystemFailure."""
        times: list[tuple[bytes, int]] = []
        pending = [b""]
        while pending:
            path = pending.pop()
            try:
                if path:
                    status = os.lstat(path, dir_fd=self._fd)
                    if not self._put(path, status):
                        continue
                    times.append((path, status.st_mtime_ns))
                pending += [path + b"/" + name if path else name for name in self._names(path)]
            except OSError as error:
                raise process.failed("squash", path, error) from error
        for path, mtime_ns in times:
            os.utime(path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)

    def _names(self, path: bytes) -> list[bytes]:
        fd = os.open(path or b".", _READ | os.O_DIRECTORY, dir_fd=self._fd)
        try:
            return sorted(map(os.fsencode, os.listdir(fd)), reverse=True)
        finally:
            os.close(fd)

    def _put(self, path: bytes, status: os.stat_result) -> bool:
        """Put one name; True for a directory."""
        kind = stat.S_IFMT(status.st_mode)
        mode = stat.S_IMODE(status.st_mode)
        here = self._here.status(os.fsdecode(path))
        is_directory = kind == stat.S_IFDIR
        hidden = here is not None and stat.S_ISCHR(here.st_mode) and here.st_rdev == 0
        if here is not None and not (is_directory and stat.S_ISDIR(here.st_mode)):
            self._here.remove(os.fsdecode(path))
            here = None
        if kind == stat.S_IFCHR and status.st_rdev == 0:
            if self._below is not None and self._below.kind(os.fsdecode(path)) is not None:
                os.mknod(path, stat.S_IFCHR, 0)
            return False
        if is_directory:
            self._put_directory(path, exists=here is not None, hides=hidden or self._is_opaque(path))
        elif status.st_nlink > 1 and self._link(path, status):
            return False
        elif kind == stat.S_IFREG:
            self._put_file(path, status.st_size)
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(path, dir_fd=self._fd), path)
        else:
            os.mknod(path, status.st_mode, status.st_rdev)
        os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)
        if is_directory or kind == stat.S_IFREG:
            self._copy_xattrs(path)
        if kind != stat.S_IFLNK:
            os.chmod(path, mode)
        if not is_directory:
            os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns), follow_symlinks=False)
        return is_directory

    def _link(self, path: bytes, status: os.stat_result) -> bool:
        """Whether another name of the file is here already."""
        first = self._links.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            os.link(first, path, follow_symlinks=False)
        return first is not path

    def _put_directory(self, path: bytes, *, exists: bool, hides: bool) -> None:
        """`hides`: what is below went before, or goes with this directory."""
        if exists and hides:
            empty(path)
        if not exists:
            os.mkdir(path)
        if hides and self._below is not None and self._below.kind(os.fsdecode(path)) is Kind.DIRECTORY:
            os.setxattr(path, OVERLAY_OPAQUE, b"y")

    def _is_opaque(self, path: bytes) -> bool:
        fd = os.open(path, _READ | os.O_DIRECTORY, dir_fd=self._fd)
        try:
            return os.getxattr(fd, OVERLAY_OPAQUE) == b"y"
        except OSError:
            return False
        finally:
            os.close(fd)

    def _put_file(self, path: bytes, size: int) -> None:
        source = os.open(path, _READ, dir_fd=self._fd)
        try:
            target = os.open(path, _CREATE, 0o600)
            try:
                copy_content(source, target, size)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _copy_xattrs(self, path: bytes) -> None:
        fd = os.open(path, _READ, dir_fd=self._fd)
        try:
            for name in os.listxattr(fd):
                if not name.startswith(_OWN_XATTRS):
                    os.setxattr(path, name, os.getxattr(fd, name))
        finally:
            os.close(fd)
