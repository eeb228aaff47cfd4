"""Verb `copy`: the content of a directory, into another directory, below two roots that it never leaves.

Arguments: {"source_root", "source", "destination_root", "destination", "if_empty": false}. Paths are resolved as if
each root were `/` (openat2 RESOLVE_IN_ROOT); below them everything goes by directory descriptors and single names, so
that neither links in an image nor a container that writes at the same time lead outside.

Kept: owner, mode, times, xattrs, hard links, holes; the destination takes those of the source directory. Sockets are
left out, as by dockerd. The destination's file system is synced before the report: {"copied", "entries", "size_bytes"}.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from balenapy.errors import InvalidParameter, NotFound
from balenapy.linux import syscalls
from balenapy.worker.process import failed, write_all

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_COPY_BYTES = 1 << 20
_RANGE_BYTES = 64 << 20
_NO_COPY_RANGE = frozenset((errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM))


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    names = ("source_root", "source", "destination_root", "destination")
    paths = [arguments.get(name) for name in names]
    if not all(isinstance(path, str) and path for path in paths):
        raise InvalidParameter(f"copy: needs {', '.join(names)}")
    source_root, source, destination_root, destination = (os.fsencode(str(path)) for path in paths)
    copier = Copier(
        _open_directory(source_root, source, "source"),
        _open_directory(destination_root, destination, "destination"),
    )
    if arguments.get("if_empty") and os.listdir(copier.destination):
        return {"copied": False, "entries": 0, "size_bytes": 0}
    copier.run()
    if copier.entries:
        syscalls.syncfs(copier.destination)
    return {"copied": True, "entries": copier.entries, "size_bytes": copier.size_bytes}


def _open_directory(root: bytes, path: bytes, role: str) -> int:
    try:
        return syscalls.open_in_root(root, path, _DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"copy: {role} {os.fsdecode(path)}: {os.strerror(error.errno or 0).lower()}") from error


class Copier:
    """One copy, from the directory behind one descriptor into that behind another."""

    def __init__(self, source: int, destination: int) -> None:
        self.destination = destination
        self.entries = 0
        self.size_bytes = 0
        self._source = source
        self._links: dict[tuple[int, int], bytes] = {}  # files with several names -> the name they have here

    def run(self) -> None:
        """Copy everything. Raises: SystemFailure."""
        os.umask(0)
        # Directories are opened again by their path from the top: any number of them needs two descriptors.
        pending: list[tuple[bytes, bool]] = [(b"", False)]
        while pending:
            path, filled = pending.pop()
            try:
                source = syscalls.open_in_root(self._source, path, _DIRECTORY | os.O_NOFOLLOW)
                try:
                    destination = syscalls.open_in_root(self.destination, path, _DIRECTORY | os.O_NOFOLLOW)
                    try:
                        if filled:
                            self._copy_metadata(source, destination, os.fstat(source))
                            continue
                        pending.append((path, True))  # its times, when nothing is made in it any more
                        for name in os.listdir(source):
                            child = os.fsencode(name)
                            child_path = path + b"/" + child if path else child
                            if self._copy_entry(child, child_path, source, destination):
                                pending.append((child_path, False))
                    finally:
                        os.close(destination)
                finally:
                    os.close(source)
            except OSError as error:
                raise failed("copy", path, error) from error

    def _copy_entry(self, name: bytes, path: bytes, source: int, destination: int) -> bool:
        """Copy one name; True for a directory, which is still empty then."""
        try:
            status = os.lstat(name, dir_fd=source)
        except FileNotFoundError:
            return False  # removed meanwhile
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFSOCK:
            return False
        self.entries += 1
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=destination)
            return True
        if status.st_nlink > 1:
            first = self._links.setdefault((status.st_dev, status.st_ino), path)
            if first is not path:
                self._link(first, name, destination)
                return False
        if kind == stat.S_IFREG:
            self._copy_file(name, source, destination)
            return False
        if kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=destination)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=destination)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=destination, follow_symlinks=False)
        if kind != stat.S_IFLNK:
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=destination)
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=destination, follow_symlinks=False)
        return False

    def _link(self, first: bytes, name: bytes, destination: int) -> None:
        """By way of a descriptor: in a volume that is in use, `first` could be a link to somewhere by now."""
        fd = syscalls.open_in_root(self.destination, first, os.O_PATH | os.O_NOFOLLOW)
        try:
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=destination, follow_symlinks=True)
        finally:
            os.close(fd)

    def _copy_file(self, name: bytes, source_directory: int, destination_directory: int) -> None:
        source = os.open(name, _READ, dir_fd=source_directory)
        try:
            status = os.fstat(source)
            destination = os.open(name, _CREATE, 0o600, dir_fd=destination_directory)
            try:
                copy_content(source, destination, status.st_size)
                self._copy_metadata(source, destination, status)
            finally:
                os.close(destination)
        finally:
            os.close(source)
        self.size_bytes += status.st_size

    @staticmethod
    def _copy_metadata(source: int, destination: int, status: os.stat_result) -> None:
        os.fchown(destination, status.st_uid, status.st_gid)
        for name in os.listxattr(source):
            try:
                os.setxattr(destination, name, os.getxattr(source, name))
            except OSError as error:
                # A file system without this kind, or one that will not have it set.
                if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.ENODATA):
                    raise
        os.fchmod(destination, stat.S_IMODE(status.st_mode))
        os.utime(destination, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_content(source: int, destination: int, size: int) -> None:
    """Copy the data between the holes; the kernel shares blocks where it can."""
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # a hole up to the end
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            copied = _copy_range(source, destination, at, end - at)
            if not copied:
                end = size = at  # the source was cut short meanwhile
            at += copied
    os.ftruncate(destination, size)


def _copy_range(source: int, destination: int, at: int, length: int) -> int:
    try:
        return os.copy_file_range(source, destination, min(length, _RANGE_BYTES), at, at)
    except OSError as error:
        if error.errno not in _NO_COPY_RANGE:
            raise
    data = os.pread(source, min(length, _COPY_BYTES), at)
    os.lseek(destination, at, os.SEEK_SET)
    write_all(destination, data)
    return len(data)
