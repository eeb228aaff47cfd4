"""Verb `changes`: what a container's writable layer changes in the files below it.

Arguments: {"upper": the writable layer, "lower": a view of everything below it}.
Report: {"changes": [[kind, path], …]} with 0 for modified, 1 for added, 2 for deleted, in the order of a walk.

A directory is named when something in it was added or deleted, or it differs itself; one that is the same as below
although overlayfs has copied it up is not. One that was removed and made anew (opaque) is modified, and what it had
before is deleted.

Source: moby pkg/archive/changes.go `changes`, changes_linux.go overlayDeletedFile.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from balenapy.errors import InvalidParameter
from balenapy.linux import syscalls
from balenapy.worker import process
from balenapy.worker.extract import OVERLAY_OPAQUE

MODIFIED, ADDED, DELETED = 0, 1, 2
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    upper, lower = arguments.get("upper"), arguments.get("lower")
    if not isinstance(upper, str) or not isinstance(lower, str):
        raise InvalidParameter("changes: needs upper and lower")
    below = os.open(lower, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    process.enter(upper)
    walk = Walk(below)
    walk.run()
    return {"changes": walk.found}


class Walk:
    """One walk over a writable layer, whose root is ours."""

    def __init__(self, below: int) -> None:
        self.found: list[tuple[int, str]] = []
        self._below = below
        self._named: set[bytes] = set()  # directories that are in the list, or need not be

    def run(self) -> None:
        pending = [b""]
        while pending:
            path = pending.pop()
            try:
                if path and not self._look_at(path):
                    continue
                names = sorted(map(os.fsencode, os.listdir(b"/" + path)), reverse=True)
            except FileNotFoundError:
                continue  # removed meanwhile
            except OSError as error:
                raise process.failed("look at", path, error) from error
            pending += [path + b"/" + name if path else name for name in names]

    def _look_at(self, path: bytes) -> bool:
        """Say what changed at one path; True for a directory."""
        status = os.lstat(b"/" + path)
        is_directory = stat.S_ISDIR(status.st_mode)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            kind = DELETED
        else:
            before = self._before(path)
            if before is None:
                kind = ADDED
            elif is_directory and stat.S_ISDIR(before.st_mode) and _is_opaque(path):
                self._named.add(path)
                self._add(MODIFIED, path)
                self._hidden(path)
                return True
            elif is_directory and stat.S_ISDIR(before.st_mode) and _is_same(status, before):
                return True
            else:
                kind = MODIFIED
        if is_directory:
            self._named.add(path)
        parent = path.rpartition(b"/")[0]
        if kind != MODIFIED and parent and parent not in self._named:
            self._named.add(parent)
            self._add(MODIFIED, parent)
        self._add(kind, path)
        return is_directory

    def _hidden(self, path: bytes) -> None:
        """Name what an opaque directory hides."""
        fd = syscalls.open_in_root(self._below, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            names = sorted(map(os.fsencode, os.listdir(fd)))
        finally:
            os.close(fd)
        here = set(map(os.fsencode, os.listdir(b"/" + path)))
        for name in names:
            if name not in here:
                self._add(DELETED, path + b"/" + name)

    def _before(self, path: bytes) -> os.stat_result | None:
        try:
            fd = syscalls.open_in_root(self._below, path, _LOOK)
        except OSError:
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _add(self, kind: int, path: bytes) -> None:
        self.found.append((kind, "/" + path.decode("utf-8", "replace")))


def _is_opaque(path: bytes) -> bool:
    try:
        return os.getxattr(b"/" + path, OVERLAY_OPAQUE) == b"y"
    except OSError:
        return False


def _is_same(status: os.stat_result, before: os.stat_result) -> bool:
    same_time = status.st_mtime_ns == before.st_mtime_ns or (
        status.st_mtime_ns // 10**9 == before.st_mtime_ns // 10**9
        # Layers keep whole seconds.
        and 0 in (status.st_mtime_ns % 10**9, before.st_mtime_ns % 10**9)
    )
    return (status.st_size, status.st_mode) == (before.st_size, before.st_mode) and same_time
