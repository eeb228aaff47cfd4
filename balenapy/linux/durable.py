"""All syncing, replacing and trashing of files. Nothing else calls `fsync`, `syncfs` or `replace`.

A unit of work is: write everything under names nobody looks at, sync once, make it visible by one database
transaction. Deleting is the reverse: the transaction, then the files by way of the trash. What survives a
power cut is decided by the order of the steps here and by nothing else, therefore every one of them passes
`step`: a test counts them and lets a process die before the k-th, for every k.

Functions here block; call them in a thread of the `files` limiter. They raise `OSError`.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from balenapy.linux import syscalls

DEEPEST = 50  # levels of directories that are open at once while a tree is removed

_hook: Callable[[str], None] | None = None


def step(name: str) -> None:
    """Say that a durable step is about to happen. Costs nothing unless a test listens."""
    if _hook is not None:
        _hook(name)


def listen(hook: Callable[[str], None] | None) -> None:
    """Have `hook(name)` called before every durable step; None ends that. For tests."""
    global _hook
    _hook = hook


def sync_file(fd: int) -> None:
    """Make the bytes (and the length) of one file durable."""
    step("sync_file")
    os.fdatasync(fd)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    step("sync_directory")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_filesystem(path: Path) -> None:
    """Make everything under `path`'s file system durable: one flush, however many files."""
    step("sync_filesystem")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a small file atomically: after a power cut it has the old content or the new."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    step("write_file")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            os.fchmod(fd, mode)
            sync_file(fd)
        finally:
            os.close(fd)
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace(source: Path, target: Path) -> None:
    """Rename over `target` and make the new name durable."""
    step("replace")
    os.replace(source, target)
    sync_directory(target.parent)


def move_to_trash(path: Path, trash: Path) -> bool:
    """Rename a file or directory into the trash under a random name; False when it is gone already.

    Not synced: after a power cut it may stand at its old place again, where no row names it, and goes again.
    """
    step("move_to_trash")
    try:
        os.rename(path, trash / f"{path.name[:100]}.{secrets.token_hex(8)}")
    except FileNotFoundError:
        return False
    return True


def remove_tree(path: Path) -> None:
    """Remove a file or a tree, never following a link; what vanishes meanwhile is fine."""
    step("remove_tree")
    try:
        is_directory = not path.is_symlink() and path.is_dir()
        if is_directory:
            _empty_directory(path)
            path.rmdir()
        else:
            path.unlink()
    except FileNotFoundError:
        return


def _empty_directory(path: Path) -> None:
    """Not `shutil.rmtree`: a container or a layer may nest deeper than Python recurses or we have descriptors.

    What lies deeper than DEEPEST is moved up to the top, and its turn comes there.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    top = os.open(path, flags)

    def empty(directory: int, depth: int) -> None:
        found = True
        while found:  # until a scan finds nothing: what is moved here meanwhile may be missed by the one that runs
            found = False
            with os.scandir(directory) as entries:
                for entry in entries:
                    found = True
                    try:
                        if not entry.is_dir(follow_symlinks=False):
                            os.unlink(entry.name, dir_fd=directory)
                        elif depth == DEEPEST:
                            name = f".{secrets.token_hex(8)}"
                            os.rename(entry.name, name, src_dir_fd=directory, dst_dir_fd=top)
                        else:
                            child = os.open(entry.name, flags, dir_fd=directory)
                            try:
                                empty(child, depth + 1)
                            finally:
                                os.close(child)
                            os.rmdir(entry.name, dir_fd=directory)
                    except FileNotFoundError:
                        continue

    try:
        empty(top, 0)
    finally:
        os.close(top)


def tree_size(path: Path) -> tuple[int, int]:
    """Sum a tree, following no links: (bytes of regular files, bytes taken on disk). Hard links count once."""
    seen: set[tuple[int, int]] = set()
    apparent = disk = 0
    pending = [os.fspath(path)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif status.st_nlink > 1:
                        if (status.st_dev, status.st_ino) in seen:
                            continue
                        seen.add((status.st_dev, status.st_ino))
                    disk += status.st_blocks * 512
                    if entry.is_file(follow_symlinks=False):
                        apparent += status.st_size
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # nested deeper than a path reaches: not counted
                raise
    return apparent, disk


def free_bytes(path: Path) -> int:
    """What a process of ours can still write on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
