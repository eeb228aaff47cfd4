"""Verb `mend`: put paths of a fresh directory in the place of damaged ones, each at once.

Arguments: `directory`, the snapshot; `fresh`, a directory beside it that `unpack` made with `only`; `paths`.

Each path changes places with its fresh one (RENAME_EXCHANGE), so that at no instant it is missing, and the damaged
things stand in `fresh` afterwards. A directory that is there stays and takes the fresh one's owner, mode and
marks only. Synced when the report is out: {"mended"}.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from balenapy.errors import InvalidParameter
from balenapy.linux import syscalls
from balenapy.worker import process

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    directory, fresh, paths = (arguments.get(name) for name in ("directory", "fresh", "paths"))
    if not isinstance(directory, str) or not isinstance(fresh, str) or not isinstance(paths, list):
        raise InvalidParameter("mend: `directory`, `fresh` and `paths` are needed")
    old_root = os.open(os.path.join(directory, "diff"), _DIRECTORY)
    new_root = os.open(os.path.join(fresh, "diff"), _DIRECTORY)
    mended = 0
    for path in sorted(map(os.fsencode, paths)):  # a directory before what is in it
        try:
            mended += _mend(old_root, new_root, path)
        except OSError as error:
            raise process.failed("mend", path, error) from error
    syscalls.syncfs(old_root)
    return {"mended": mended}


def _mend(old_root: int, new_root: int, path: bytes) -> bool:
    parent, _, name = path.rpartition(b"/")
    try:
        source = syscalls.open_in_root(new_root, parent or b".", _DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        try:
            new = os.lstat(name, dir_fd=source)
        except FileNotFoundError:
            return False  # came with its directory
        target = syscalls.open_in_root(old_root, parent or b".", _DIRECTORY)
        try:
            _put(source, target, name, new)
        finally:
            os.close(target)
    finally:
        os.close(source)
    return True


def _put(source: int, target: int, name: bytes, new: os.stat_result) -> None:
    before = os.fstat(target)
    try:
        old = os.lstat(name, dir_fd=target)
    except FileNotFoundError:
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
    else:
        if stat.S_ISDIR(old.st_mode) and stat.S_ISDIR(new.st_mode):
            _copy_marks(source, target, name, new)
            return
        try:
            syscalls.exchange(name, name, source, target)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)  # a file system that cannot swap
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


def _copy_marks(source: int, target: int, name: bytes, new: os.stat_result) -> None:
    fresh = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=source)
    fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=target)
    try:
        os.fchown(fd, new.st_uid, new.st_gid)
        for key in os.listxattr(fresh):
            os.setxattr(fd, key, os.getxattr(fresh, key))
        os.fchmod(fd, stat.S_IMODE(new.st_mode))
        os.utime(fd, ns=(new.st_atime_ns, new.st_mtime_ns))
    finally:
        os.close(fd)
        os.close(fresh)
