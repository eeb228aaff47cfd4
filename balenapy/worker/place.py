"""Verb `place`: files are put on top of an image, and what that changed becomes a layer.

Arguments:
    directory    a snapshot directory: `diff/` becomes the layer, its `tar-split.zst` is made beside it
    lower        the image's layers, top first
    destination  absolute; a slash at its end means a directory
    sources      [{"root": a directory, "paths": [...], "unpack": archives are unpacked, with their own owners,
                 "keep_owner": files keep theirs}], in order; none: only the destination is made, a directory
    owner        `user[:group]` of the others, names as the image knows them; "": root
    epoch        as for `pack`

The image is mounted with `diff/` on top, in a mount namespace of ours; a child chrooted in there does the work. Links
in the image lead about in the image. The report is that of `pack`, with the layer synced.

Source: moby builder/dockerfile/{copy,copy_unix,internals,internals_linux}.go, pkg/archive/archive.go CopyWithTar.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from balenapy.core.buildtree import Kind, follow, to_bytes
from balenapy.core.tarstream import DIRECTORY, LINK, REGULAR, SYMLINK, Entry, InvalidTar, NeedData, TarReader
from balenapy.errors import EngineError, NotFound, SystemFailure
from balenapy.linux import syscalls
from balenapy.worker import pack, process
from balenapy.worker.context import unpack
from balenapy.worker.copy import copy_content
from balenapy.worker.decompress import HEAD_BYTES, open_decoder
from balenapy.worker.extract import Extractor, clean
from balenapy.worker.sources import DirectoryTree, empty
from balenapy.worker.unpack import Source

IMPLIED_MODE = 0o755
CAPABILITY = "security.capability"
PROCESSING = "Error processing tar file(exit status 1): "
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    directory = arguments["directory"]
    merged, work = os.path.join(directory, "merged"), os.path.join(directory, "work")
    lower = [*arguments["lower"]] or [os.path.join(directory, "empty")]
    for path in (merged, work, *([] if arguments["lower"] else lower)):
        os.mkdir(path, 0o700)
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount_overlay(merged, lower, os.path.join(directory, "diff"), work)
    sources = [_Sources(os.open(each.pop("root"), _DIRECTORY), **each) for each in arguments["sources"]]
    if any(each.unpack for each in sources):
        import bz2  # noqa: F401  (what archives may need: where we go nothing can be imported)
        import fcntl  # noqa: F401
        import lzma  # noqa: F401

        import zstandard  # noqa: F401
    process.apart(lambda: _place(merged, sources, arguments))
    for each in sources:
        os.close(each.fd)
    syscalls.umount2(merged, 0)
    for path in (merged, *([] if arguments["lower"] else lower)):
        os.rmdir(path)
    empty(os.fsencode(work))  # overlayfs leaves things in its own
    os.rmdir(work)
    return pack.run({"directory": directory, "fresh": True, "epoch": arguments.get("epoch")})


@dataclass(frozen=True, slots=True)
class _Sources:
    fd: int
    paths: list[str]
    unpack: bool
    keep_owner: bool


def _place(merged: str, sources: Sequence[_Sources], arguments: Mapping[str, Any]) -> dict[str, Any]:
    process.enter(merged)
    os.umask(0)
    placer = Placer(arguments["destination"], arguments["owner"])
    if not sources:
        placer.make_destination()
    for each in sources:
        for path in each.paths:
            placer.place(DirectoryTree(each.fd), path, unpack_archives=each.unpack, keep_owner=each.keep_owner)
    return {}


class Placer:
    """Puts sources at one destination, below the root we are in."""

    def __init__(self, destination: str, owner: str) -> None:
        """Raises: SystemFailure, for an owner that the image does not know."""
        self._tree = DirectoryTree("/")
        self._destination = destination
        self._owner = find_owner(self._tree, owner) if owner else (0, 0)
        self._keep_owner = False

    def make_destination(self) -> None:
        """Make it a directory, if it is none: WORKDIR. Raises: SystemFailure."""
        path = to_bytes(follow(self._tree, self._destination.lstrip("/")))
        try:
            self._make_directories(path, (0, 0))
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTDIR):
                raise SystemFailure(f"Cannot mkdir: {self._destination} is not a directory") from error
            raise process.failed("mkdir", path, error) from error

    def place(self, tree: DirectoryTree, path: str, *, unpack_archives: bool, keep_owner: bool) -> None:
        """Copy one source. Raises: SystemFailure."""
        self._keep_owner = keep_owner
        source = follow(tree, path)
        target = follow(self._tree, self._destination.lstrip("/"))
        what = "failed to copy directory"
        try:
            if tree.kind(source) is Kind.DIRECTORY:
                self._make_directories(to_bytes(target), self._owner)
                self._copy_directory(tree.fd, to_bytes(source), to_bytes(target))
                return
            if unpack_archives and self._unpack(tree.fd, to_bytes(source), to_bytes(target)):
                return
            if self._destination.endswith("/") or self._tree.kind(target) is Kind.DIRECTORY:
                name = path.rstrip("/").rpartition("/")[2]
                target = f"{target}/{name}" if target else name
            what = "failed to create new directory"
            self._make_directories(to_bytes(target).rpartition(b"/")[0], self._owner)
            what = "failed to copy file"
            self._copy_entry(tree.fd, to_bytes(source), to_bytes(target), {})
        except NotADirectoryError as error:
            where = process.show(error.filename if isinstance(error.filename, bytes) else to_bytes(target))
            raise SystemFailure(f"failed to copy files: {what}: mkdir /{where}: not a directory") from error
        except OSError as error:
            raise SystemFailure(f"failed to copy files: {what}: {process.describe(error)}") from error
        except SystemFailure as error:
            raise SystemFailure(f"failed to copy files: {error.message}") from error

    # --- copying

    def _copy_directory(self, fd: int, source: bytes, target: bytes) -> None:
        """What is in the source, into the target, which keeps its own owner, mode and times."""
        links: dict[tuple[int, int], bytes] = {}
        times: list[tuple[bytes, int]] = []
        pending = [(source, target)]
        while pending:
            source, target = pending.pop()
            for name in _names(fd, source):
                inner, outer = _join(source, name), _join(target, name)
                if self._copy_entry(fd, inner, outer, links):
                    times.append((outer, os.lstat(inner, dir_fd=fd).st_mtime_ns))
                    pending.append((inner, outer))
        for path, mtime_ns in times:
            _set_time(path, mtime_ns)

    def _copy_entry(self, fd: int, source: bytes, target: bytes, links: dict[tuple[int, int], bytes]) -> bool:
        """Copy one name; True for a directory, whose content and times are still to come."""
        status = os.lstat(source, dir_fd=fd)
        kind = stat.S_IFMT(status.st_mode)
        mode = stat.S_IMODE(status.st_mode)
        if kind == stat.S_IFSOCK:
            return False
        self._make_room(target, kind)
        if kind == stat.S_IFDIR:
            try:
                os.mkdir(target, mode)
            except FileExistsError:
                pass
            os.chown(target, *self._owner_of(status))
            os.chmod(target, mode)
            return True
        if status.st_nlink > 1:
            first = links.setdefault((status.st_dev, status.st_ino), target)
            if first is not target:
                os.link(first, target, follow_symlinks=False)
                return False
        if kind == stat.S_IFREG:
            self._copy_file(fd, source, target, status)
            return False
        if kind == stat.S_IFLNK:
            os.symlink(os.readlink(source, dir_fd=fd), target)
        else:
            os.mknod(target, status.st_mode, status.st_rdev)
            os.chmod(target, mode)
        os.chown(target, *self._owner_of(status), follow_symlinks=False)
        _set_time(target, status.st_mtime_ns)
        return False

    def _copy_file(self, fd: int, source: bytes, target: bytes, status: os.stat_result) -> None:
        reading = os.open(source, _READ, dir_fd=fd)
        try:
            writing = os.open(target, _CREATE, 0o600)
            try:
                copy_content(reading, writing, status.st_size)
                if self._keep_owner:
                    os.fchown(writing, status.st_uid, status.st_gid)
                    _copy_capability(reading, writing)
                os.fchmod(writing, stat.S_IMODE(status.st_mode))
                if not self._keep_owner:
                    # Last: it takes setuid bits and file capabilities away, as there.
                    os.fchown(writing, *self._owner)
                whole = status.st_mtime_ns // 1_000_000_000
                os.utime(writing, (whole, whole))
            finally:
                os.close(writing)
        finally:
            os.close(reading)

    def _owner_of(self, status: os.stat_result) -> tuple[int, int]:
        return (status.st_uid, status.st_gid) if self._keep_owner else self._owner

    def _make_room(self, target: bytes, kind: int) -> None:
        """Take away what is in the way: everything but a directory for a directory."""
        try:
            present = os.lstat(target)
        except FileNotFoundError:
            return
        if not (stat.S_ISDIR(present.st_mode) and kind == stat.S_IFDIR):
            self._tree.remove(os.fsdecode(target))

    def _make_directories(self, path: bytes, owner: tuple[int, int]) -> None:
        at = -1
        while path and at != len(path):
            at = path.find(b"/", at + 1)
            at = len(path) if at < 0 else at
            part = path[:at]
            try:
                os.mkdir(part, IMPLIED_MODE)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(part).st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, "", part) from None
            else:
                os.chown(part, *owner)

    # --- archives

    def _unpack(self, fd: int, source: bytes, target: bytes) -> bool:
        """Unpack a source that is an archive; False when it is none."""
        if not is_archive(os.open(source, _READ, dir_fd=fd)):
            return False
        self._make_directories(target, (0, 0))
        process.apart(lambda: _unpack_into(os.open(source, _READ, dir_fd=fd), target))
        return True


def _unpack_into(archive: int, directory: bytes) -> dict[str, Any]:
    reader = Source(archive)
    reader.begin()
    os.chroot(directory or b"/")
    os.chdir("/")
    unpack(reader, Extractor(whiteouts=False), begin=_begin)
    return {}


def _begin(extractor: Extractor, entry: Entry) -> int:
    """Make an entry of an archive. A name that climbs above the root is put below it, as there; so are its words."""
    name, link = _within(entry.name), _within(entry.link) if entry.type == LINK else entry.link
    try:
        return extractor.begin(entry._replace(name=name or b".", link=link))
    except InvalidTar as error:
        raise SystemFailure(f"{PROCESSING}{error.message}") from error
    except SystemFailure as error:
        cause = error.__cause__
        if not isinstance(cause, OSError):
            raise
        shown = process.show(name)
        actions = {REGULAR: "open", DIRECTORY: "mkdir", SYMLINK: f"symlink {process.show(link)}"}
        actions[LINK] = f"link /{process.show(link)}"
        action = actions.get(entry.type, "mknod")
        why = process.describe(OSError(cause.errno, ""))
        raise SystemFailure(f"{PROCESSING}{action} /{shown}: {why}") from error


def _within(name: bytes) -> bytes:
    return clean(b"/" + name)


def is_archive(fd: int) -> bool:
    """Whether a file, packed or not, begins with the header of a tar's entry. Closes it."""
    with open(fd, "rb") as file:
        head = file.read(HEAD_BYTES)
        reader = TarReader()
        try:
            decoder = open_decoder(head)
            while head:
                for piece in decoder.feed(head):
                    reader.feed(piece)
                    event = reader.next_event()
                    if not isinstance(event, NeedData):
                        return isinstance(event, Entry)
                head = file.read(HEAD_BYTES)
        except EngineError:
            return False
    return False


# --- owners


def find_owner(tree: DirectoryTree, text: str) -> tuple[int, int]:
    """Read `user[:group]`, by numbers or by the names that the files in there know; one word is both.

    Raises: SystemFailure. Source: moby builder/dockerfile/internals_linux.go parseChownFlag.
    """
    parts = text.split(":")
    prefix = "unable to convert uid/gid chown string to host mapping: "
    if len(parts) > 2:
        raise SystemFailure(f"{prefix}invalid chown string format: {text}")
    user, group = parts[0], parts[-1]
    try:
        uid = _find(tree, user, "etc/passwd", ("user", "uid"))
        return uid, _find(tree, group, "etc/group", ("group", "gid"))
    except NotFound as error:
        raise SystemFailure(f"{prefix}{error.message}") from error


def _find(tree: DirectoryTree, name: str, path: str, words: tuple[str, str]) -> int:
    kind, number = words
    if name.isascii() and name.isdigit():
        return int(name[:10])
    path = follow(tree, path)
    content = tree.content(path)
    if content is None:
        raise NotFound(f"can't find {number} for {kind} {name}: open /{path}: no such file or directory")
    for line in content.decode(errors="replace").split("\n"):
        fields = line.strip().split(":")
        if fields[0] == name and len(fields) > 2 and fields[2].isdigit():
            return int(fields[2])
    raise NotFound(f"can't find {number} for {kind} {name}: no such {kind}: {name}")


# --- small things


def _names(fd: int, path: bytes) -> list[bytes]:
    opened = os.open(path or b".", _READ | os.O_DIRECTORY, dir_fd=fd)
    try:
        return sorted(map(os.fsencode, os.listdir(opened)))
    finally:
        os.close(opened)


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def _copy_capability(source: int, target: int) -> None:
    try:
        value = os.getxattr(source, CAPABILITY)
    except OSError:  # it has none
        return
    os.setxattr(target, CAPABILITY, value)


def _set_time(path: bytes, mtime_ns: int) -> None:
    """In whole seconds, as a tar has it."""
    whole = mtime_ns // 1_000_000_000
    os.utime(path, (whole, whole), follow_symlinks=False)


