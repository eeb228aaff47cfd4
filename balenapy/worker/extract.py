"""Entries of a tar become files below the directory we are in: what dockerd's pkg/archive makes of them.

The process is chrooted, so no name leads outside, and a symbolic link that an archive brings is followed inside only,
as dockerd does. What is checked here is therefore not safety of the host but sense: a name that climbs above the
root is refused by its name instead of being put somewhere.

Order of things done to one file: create, write, owner, xattrs, mode, times. chown(2) clears setuid bits and file
capabilities, so it comes first; times come last because everything before changes them. Directories get their
times at the very end, when nothing is made in them any more.

Source: moby pkg/archive/archive.go Unpack and createTarFile, archive_linux.go overlayWhiteoutConverter (20.10).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import zlib
from collections.abc import Callable
from typing import TypeVar

from balenapy.core.tarsplit import displaced_name
from balenapy.core.tarstream import (
    BLOCK_DEVICE,
    CHAR,
    DIRECTORY,
    FIFO,
    LINK,
    REGULAR,
    SYMLINK,
    Entry,
    InvalidTar,
)
from balenapy.worker.process import failed, show

T = TypeVar("T")

WHITEOUT = b".wh."
WHITEOUT_META = b".wh..wh."  # aufs' own files; only the opaque mark means something
WHITEOUT_OPAQUE = b".wh..wh..opq"
HIDDEN = b"W"  # as a type of `meaning`
OVERLAY_OPAQUE = b"trusted.overlay.opaque"
# A layer must not tell overlayfs where to find its files (redirect, metacopy, origin).
_OWN_XATTRS = b"trusted.overlay."

IMPLIED_DIRECTORY_MODE = 0o755
MAX_ID = 0xFFFFFFFE  # the next one means "leave it"
_MAX_TIME_NS = (1 << 63) - 1  # Go's time.Time as nanoseconds; beyond, dockerd uses the epoch
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
_PENDING = struct.Struct("<qqH")
LARGE_BYTES = 1 << 20
LARGE_FILES = 4096


class Extractor:
    """Makes one entry after the other.

    Args:
        displaced: descriptor of a directory that takes contents which a later entry of the same archive replaces,
            so that the tar can be rebuilt; None: they are removed.
        whiteouts: turn `.wh.` names into what overlayfs means by them.
    """

    def __init__(self, displaced: int | None = None, *, whiteouts: bool = True) -> None:
        self.size_bytes = 0  # as dockerd counts a layer: file contents and link targets, hard links once
        self.disk_bytes = 0  # about what it takes: whole blocks, one for a directory
        self.large: list[bytes] = []  # paths of files of a megabyte and more, the first few thousand
        self._displaced = displaced
        self._whiteouts = whiteouts
        self._times = bytearray()  # of directories, packed: a layer may have a million
        # New files are ours and have the mode they are created with, unless a directory passes on its group or ACL.
        root = os.stat(".")
        self._block = os.statvfs(".").f_frsize
        self._inherits = bool(root.st_mode & stat.S_ISGID) or _has_default_acl(b".")

    def begin(self, entry: Entry) -> int:
        """Make what `entry` says; for a regular file that has content, give a descriptor to write it to.

        Returns: the descriptor, for `write` and `finish`; -1 when content, if any, goes nowhere.
        Raises: InvalidTar, SystemFailure.
        """
        kind = entry.type
        path = self.path = clean(entry.name)
        if not path:
            # dockerd leaves "." alone; "/" gets owner, mode and times.
            if kind == DIRECTORY and entry.name.startswith(b"/"):
                self._finish_directory(b".", entry, True)
            return -1
        if self._whiteouts and b".wh." in path and self._whiteout(path, entry):
            return -1
        try:
            if kind == REGULAR:
                return self._create_file(path, entry)
            if kind == DIRECTORY:
                self._create_directory(path, entry)
            elif kind == SYMLINK:
                self._make(path, lambda: os.symlink(entry.link, path))
                self._finish_symlink(path, entry)
                self.size_bytes += len(entry.link)
            elif kind == LINK:
                self._create_link(path, entry)
            elif kind in (CHAR, BLOCK_DEVICE, FIFO):
                self._create_node(path, entry, kind)
            else:
                raise InvalidTar(f"unhandled tar header type {entry.type[0]}: {show(entry.name)}")
        except OSError as error:
            raise failed("extract", path, error) from error
        except (ValueError, OverflowError) as error:  # a NUL in a name, an owner or a device beyond 32 bits
            raise InvalidTar(f"archive/tar: invalid tar header: {show(entry.name)}: {error}") from error
        return -1

    def finish(self, fd: int, entry: Entry) -> None:
        """Give the file its owner, xattrs, mode and times, and close it."""
        try:
            mode = entry.mode
            special = mode & _SPECIAL_BITS
            if entry.uid or entry.gid or self._inherits:
                os.fchown(fd, _owner(entry.uid, entry), _owner(entry.gid, entry))
                special |= self._inherits
            if entry.xattrs:
                self._set_xattrs(fd, entry)
                special = 1  # an ACL changes the mode
            if special:
                os.fchmod(fd, mode & 0o7777)
            os.utime(fd, ns=_times(entry))
        except OSError as error:
            raise failed("extract", self.path, error) from error
        finally:
            os.close(fd)
        self.size_bytes += entry.size
        self.disk_bytes += entry.size + -entry.size % self._block
        if entry.size >= LARGE_BYTES and len(self.large) < LARGE_FILES:
            self.large.append(self.path)

    def forget_pages(self) -> None:
        """Give back the page cache of large files, once they are synced: it belongs to the applications."""
        for path in self.large:
            try:
                if not stat.S_ISREG(os.lstat(path).st_mode):
                    continue  # replaced by a later entry; a device must not be opened
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def finish_all(self) -> None:
        """Set the times of directories: nothing is made in them any more."""
        at = 0
        packed = self._times
        while at < len(packed):
            atime_ns, mtime_ns, length = _PENDING.unpack_from(packed, at)
            at += _PENDING.size
            path = bytes(packed[at : at + length])
            at += length
            try:
                # It may have been replaced by something that is not a directory.
                if stat.S_ISDIR(os.lstat(path).st_mode):
                    os.utime(path, ns=(atime_ns, mtime_ns), follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise failed("set times of", path, error) from error
        self._times = bytearray()

    def _create_file(self, path: bytes, entry: Entry) -> int:
        try:
            fd = os.open(path, _CREATE, entry.mode & 0o777)
        except (FileNotFoundError, FileExistsError):
            fd = self._make(path, lambda: os.open(path, _CREATE, entry.mode & 0o777))
        if entry.size:
            return fd
        self.finish(fd, entry)
        return -1

    def _create_directory(self, path: bytes, entry: Entry) -> None:
        mode = entry.mode & 0o777
        existed = False
        try:
            os.mkdir(path, mode)
        except FileNotFoundError:
            self._make(path, lambda: os.mkdir(path, mode))
        except FileExistsError:
            before = os.lstat(path)
            existed = stat.S_ISDIR(before.st_mode)
            if not existed:
                self._make(path, lambda: os.mkdir(path, mode))
                if self._whiteouts and stat.S_ISCHR(before.st_mode) and before.st_rdev == 0:
                    # The archive first removed what lay below and then made it anew: so nothing shines through.
                    os.setxattr(path, OVERLAY_OPAQUE, b"y")
        self._finish_directory(path, entry, existed)

    def _finish_directory(self, path: bytes, entry: Entry, existed: bool) -> None:
        mode = entry.mode & 0o7777
        exact = existed or self._inherits or mode & _SPECIAL_BITS or entry.xattrs
        if exact or entry.uid or entry.gid:
            os.chown(path, _owner(entry.uid, entry), _owner(entry.gid, entry), follow_symlinks=False)
        if entry.xattrs:
            self._set_xattrs(path, entry)
        if exact:
            os.chmod(path, mode)
        if mode & stat.S_ISGID or b"system.posix_acl_default" in entry.xattrs:
            self._inherits = True
        if not existed:
            self.disk_bytes += self._block
        atime_ns, mtime_ns = _times(entry)
        self._times += _PENDING.pack(atime_ns, mtime_ns, len(path))
        self._times += path

    def _finish_symlink(self, path: bytes, entry: Entry) -> None:
        if entry.uid or entry.gid or self._inherits:
            os.chown(path, _owner(entry.uid, entry), _owner(entry.gid, entry), follow_symlinks=False)
        if entry.xattrs:
            self._set_xattrs(path, entry)
        os.utime(path, ns=_times(entry), follow_symlinks=False)

    def _create_link(self, path: bytes, entry: Entry) -> None:
        target = clean(entry.link)
        if not target:
            raise InvalidTar(f"invalid hardlink {show(entry.name)!r} -> {show(entry.link)!r}")
        self._make(path, lambda: os.link(target, path, follow_symlinks=False))
        if stat.S_ISLNK(os.lstat(path).st_mode):
            os.chown(path, _owner(entry.uid, entry), _owner(entry.gid, entry), follow_symlinks=False)
            return
        # dockerd gives the file what the last of its names says.
        os.chown(path, _owner(entry.uid, entry), _owner(entry.gid, entry), follow_symlinks=False)
        if entry.xattrs:
            self._set_xattrs(path, entry)
        os.chmod(path, entry.mode & 0o7777)
        os.utime(path, ns=_times(entry), follow_symlinks=False)

    def _create_node(self, path: bytes, entry: Entry, kind: bytes) -> None:
        mode = entry.mode & 0o7777
        if kind == FIFO:
            self._make(path, lambda: os.mkfifo(path, mode))
        else:
            file_type = stat.S_IFCHR if kind == CHAR else stat.S_IFBLK
            device = os.makedev(entry.major, entry.minor)
            self._make(path, lambda: os.mknod(path, file_type | mode, device))
        os.chown(path, _owner(entry.uid, entry), _owner(entry.gid, entry), follow_symlinks=False)
        if entry.xattrs:
            self._set_xattrs(path, entry)
        os.chmod(path, mode)
        os.utime(path, ns=_times(entry), follow_symlinks=False)

    def _whiteout(self, path: bytes, entry: Entry) -> bool:
        """Do what a `.wh.` name means; False when this path has none in its last component."""
        if WHITEOUT_META in path:
            if path.rpartition(b"/")[2] == WHITEOUT_OPAQUE:
                parent = path.rpartition(b"/")[0]
                try:
                    self._make(path, lambda: os.setxattr(parent or b".", OVERLAY_OPAQUE, b"y"))
                except OSError as error:
                    raise failed("mark opaque", parent, error) from error
                return True
            if any(part.startswith(WHITEOUT_META) for part in path.split(b"/")):
                return True  # .wh..wh.plnk and such: aufs' own
        parent, slash, base = path.rpartition(b"/")
        if not base.startswith(WHITEOUT):
            return False
        hidden = base[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise InvalidTar(f"invalid whiteout {show(entry.name)!r}")
        target = parent + slash + hidden
        try:
            try:
                self._make(target, lambda: os.mknod(target, stat.S_IFCHR, 0), replace=False)
            except FileExistsError:
                # "Files present in the same layer can only be hidden by later layers" (OCI image spec): what is
                # there stays and hides the lower one by itself, a directory only when it is opaque.
                if stat.S_ISDIR(os.lstat(target).st_mode):
                    os.setxattr(target, OVERLAY_OPAQUE, b"y", follow_symlinks=False)
                return True
            if entry.uid or entry.gid or self._inherits:
                owner = _owner(entry.uid, entry), _owner(entry.gid, entry)
                os.chown(target, *owner, follow_symlinks=False)
        except OSError as error:
            raise failed("whiteout", target, error) from error
        return True

    def _set_xattrs(self, where: int | bytes, entry: Entry) -> None:
        for name, value in entry.xattrs.items():
            if name.startswith(_OWN_XATTRS):
                continue
            try:
                if isinstance(where, int):
                    os.setxattr(where, name, value)
                else:
                    os.setxattr(where, name, value, follow_symlinks=False)
            except OSError as error:
                # Not every file system has every kind; dockerd goes on as well.
                if error.errno not in (errno.ENOTSUP, errno.EPERM):
                    raise failed(f"set xattr {show(name)} of", self.path, error) from error

    def _make(self, path: bytes, action: Callable[[], T], *, replace: bool = True) -> T:
        """Do `action`, which makes `path`; before that make its parents or take away what is there, as needed."""
        parents_made = displaced = False
        while True:
            try:
                return action()
            except FileNotFoundError:
                if parents_made:
                    raise
                self._make_parents(path)
                parents_made = True
            except FileExistsError:
                if displaced or not replace:
                    raise
                self._displace(path)
                displaced = True

    def _make_parents(self, path: bytes) -> None:
        at = path.find(b"/")
        while at > 0:
            try:
                os.mkdir(path[:at], IMPLIED_DIRECTORY_MODE)
            except FileExistsError:
                pass
            at = path.find(b"/", at + 1)

    def _displace(self, path: bytes) -> None:
        """Take away what a former entry made; its contents are kept when a tar-split needs them."""
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            self._displace_file(path, status, None)
            return
        # Directories are emptied by moving what is in them up: any depth, few descriptors, no recursion.
        shelf = self._displaced
        if shelf is None:
            shelf = os.open(os.path.dirname(path) or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._empty_directory(path, shelf)
        finally:
            if shelf != self._displaced:
                os.close(shelf)

    def _empty_directory(self, path: bytes, shelf: int) -> None:
        number = 0
        first = b".displaced-%d-0" % os.getpid()
        os.rename(path, first, dst_dir_fd=shelf)
        pending = [first]
        while pending:
            directory = pending.pop()
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=shelf)
            try:
                for name in os.listdir(fd):
                    status = os.lstat(name, dir_fd=fd)
                    if stat.S_ISDIR(status.st_mode):
                        number += 1
                        moved = b".displaced-%d-%d" % (os.getpid(), number)
                        os.rename(name, moved, src_dir_fd=fd, dst_dir_fd=shelf)
                        pending.append(moved)
                    else:
                        self._displace_file(os.fsencode(name), status, fd)
            finally:
                os.close(fd)
            os.rmdir(directory, dir_fd=shelf)

    def _displace_file(self, name: bytes, status: os.stat_result, dir_fd: int | None) -> None:
        if status.st_nlink == 1 and (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            self.size_bytes -= status.st_size
        if self._displaced is None or not stat.S_ISREG(status.st_mode) or not status.st_size:
            os.unlink(name, dir_fd=dir_fd)
            return
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            crc = 0
            while piece := os.read(fd, 1 << 20):
                crc = zlib.crc32(piece, crc)
        finally:
            os.close(fd)
        keep = displaced_name(status.st_size, crc)
        try:
            os.stat(keep, dir_fd=self._displaced)
        except FileNotFoundError:
            os.rename(name, keep, src_dir_fd=dir_fd, dst_dir_fd=self._displaced)
        else:
            # This content is kept already. Not renamed over it: between two names of one file rename(2) does nothing.
            os.unlink(name, dir_fd=dir_fd)


def clean(name: bytes) -> bytes:
    """The path below the root that a name in a tar means: Go's filepath.Clean, without a leading slash.

    Raises: InvalidTar, when it climbs above the root.
    """
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if parts:
                parts.pop()
            elif not name.startswith(b"/"):  # "/.." is "/"
                raise InvalidTar(f"{show(name)!r} is outside of the archive's root")
        elif part and part != b".":
            parts.append(part)
    return b"/".join(parts)


def meaning(entry: Entry) -> tuple[bytes, bytes]:
    """The path an entry is about, and its type: whiteouts are about what they hide. ("", …) for none."""
    path = clean(entry.name)
    if b".wh." in path:
        parent, slash, base = path.rpartition(b"/")
        if base == WHITEOUT_OPAQUE:
            return parent, WHITEOUT_OPAQUE
        if any(part.startswith(WHITEOUT_META) for part in path.split(b"/")):
            return b"", entry.type
        if base.startswith(WHITEOUT):
            return parent + slash + base[len(WHITEOUT) :], HIDDEN
    return path, entry.type


def _owner(number: int, entry: Entry) -> int:
    if not 0 <= number <= MAX_ID:
        raise InvalidTar(f"archive/tar: invalid tar header: {show(entry.name)}: owner {number}")
    return number


def _times(entry: Entry) -> tuple[int, int]:
    """(access, modification) in ns: the first never before the second, both within what dockerd sets."""
    mtime = entry.mtime_ns if 0 <= entry.mtime_ns <= _MAX_TIME_NS else 0
    atime = entry.atime_ns
    return (mtime if atime is None or not mtime <= atime <= _MAX_TIME_NS else atime), mtime


def _has_default_acl(path: bytes) -> bool:
    try:
        return bool(os.getxattr(path, b"system.posix_acl_default"))
    except OSError:
        return False
