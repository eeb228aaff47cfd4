"""Verb `archive`: look at, read or write a part of a container's files.

    view          see `rootview`
    path          inside the container, cleaned (core/containerpath)
    container     what the client called it, for messages
    action        stat: report {"name", "size", "mode", "mtime_ns", "link_target"}
                  read: one line of JSON with the same, then a tar, to the descriptor `output`;
                        "encoding": "", "gzip" or "deflate" for the tar
                  write: a tar, compressed or not, on stdin goes into the directory `path`
    keep_types    write: a directory does not replace a file, nor a file a directory
    owner         write: whoever this is in the container owns everything ("": as the tar says)
    readonly_root write: nothing may be written outside of a mount

An archive that is refused midway leaves what was extracted so far, as with dockerd.

Source: moby daemon/archive.go, pkg/archive (Tar, Unpack).
"""

from __future__ import annotations

import json
import os
import posixpath
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from balenapy.core.containerpath import PathStat, base_name, follows_last, go_file_mode
from balenapy.core.tarstream import DIRECTORY, Entry
from balenapy.errors import EngineError, InvalidParameter, NotFound, SystemFailure
from balenapy.linux import durable
from balenapy.worker import process, rootview
from balenapy.worker.extract import Extractor, clean
from balenapy.worker.pack import Packer, Sink
from balenapy.worker.unpack import CHUNKS_AHEAD, Ahead, NoSplit, Source, Unpacker

PASSWD_MAX_BYTES = 4 << 20


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    actions = {"stat": _stat, "read": _read, "write": _write}
    action, path = arguments.get("action"), arguments.get("path")
    if action not in actions or not isinstance(path, str) or not path.startswith("/"):
        raise InvalidParameter("archive: needs an action and an absolute path")
    try:
        return actions[action](arguments, path)
    except ValueError as error:  # a NUL in the path
        raise SystemFailure(f"lstat {path!r}: invalid argument") from error


def _stat(arguments: dict[str, Any], path: str) -> dict[str, Any]:
    rootview.enter(arguments["view"])
    return _stat_path(arguments, path)


def _stat_path(arguments: dict[str, Any], path: str) -> dict[str, Any]:
    """Raises: NotFound, SystemFailure."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise _not_found(arguments) from None
    except OSError as error:
        raise SystemFailure(f"lstat {path}: {process.describe(OSError(error.errno, ''))}") from error
    target = posixpath.realpath(path) if stat.S_ISLNK(status.st_mode) else ""
    told = PathStat(base_name(path), status.st_size, go_file_mode(status.st_mode), status.st_mtime_ns, target)
    return told._asdict()


def _not_found(arguments: dict[str, Any]) -> NotFound:
    return NotFound(f"Could not find the file {arguments['asked']} in container {arguments['container']}")


# --- read -----------------------------------------------------------------------------------------------------


def _read(arguments: dict[str, Any], path: str) -> dict[str, Any]:
    output = arguments.get("output")
    if not isinstance(output, int):
        raise InvalidParameter("archive: `output` must be a descriptor")
    sink = Sink(output, arguments.get("encoding") or "none")
    rootview.enter(arguments["view"])
    told = _stat_path(arguments, path)
    process.write_all(output, json.dumps(told).encode() + b"\n")
    if follows_last(path):
        start = posixpath.realpath(path)
    else:
        parent, _, base = path.rpartition("/")
        start = posixpath.join(posixpath.realpath(parent or "/"), base)
    sink.start()
    packer = TreePacker(sink, os.fsencode(start.strip("/")), os.fsencode(base_name(path)))
    packer.run()
    sink.close()
    return {"entries": packer.entries}


class TreePacker(Packer):
    """Packs one file or tree under the name that was asked for."""

    def __init__(self, sink: Sink, start: bytes, name: bytes) -> None:
        super().__init__(sink, None, start=start, layer=False)
        self._cut = len(start)
        # The root's entries are `/`, `/etc/`: what is asked for is `/`, and no slash comes twice.
        self._prefix = b"" if name == b"/" else name

    def _name(self, path: bytes) -> bytes:
        rest = path[self._cut :]
        return self._prefix + (b"/" + rest if rest and not rest.startswith(b"/") else rest)


# --- write ----------------------------------------------------------------------------------------------------


def _write(arguments: dict[str, Any], path: str) -> dict[str, Any]:
    owner_spec = str(arguments.get("owner") or "")
    find_owner = _owner_finder() if owner_spec else None
    source = Source(0)
    source.begin()
    view = arguments["view"]
    rootview.enter(view)
    directory = posixpath.realpath(path)
    try:
        status = os.lstat(directory)
    except FileNotFoundError:
        raise _not_found(arguments) from None
    except NotADirectoryError as error:
        raise SystemFailure(f"lstat {path}: not a directory") from error
    if not stat.S_ISDIR(status.st_mode):
        raise SystemFailure("extraction point is not a directory")
    _check_writable(directory, view["mounts"], readonly_root=bool(arguments.get("readonly_root")))
    owner = find_owner(owner_spec) if find_owner is not None else None
    os.chdir(directory)
    os.umask(0)
    pieces = Ahead(source.pieces(), CHUNKS_AHEAD)
    pieces.start()
    extractor = TreeExtractor(directory, keep_types=bool(arguments.get("keep_types")), owner=owner)
    unpacker = Unpacker(pieces, NoSplit(), extractor)
    try:
        unpacker.run()
    except EngineError as error:  # moby extracts in a helper process, and does not classify what that says
        raise SystemFailure(f"Error processing tar file(exit status 1): {error.message}") from error
    return {"entries": unpacker.entries, "size_bytes": extractor.size_bytes}


def _check_writable(directory: str, mounts: list[dict[str, Any]], *, readonly_root: bool) -> None:
    """Raises: SystemFailure."""
    deepest, writable = "", not readonly_root
    for mount in mounts:
        place = posixpath.realpath(mount["destination"])
        if (directory == place or directory.startswith(place.rstrip("/") + "/")) and len(place) > len(deepest):
            deepest, writable = place, bool(mount["writable"])
    if not writable:
        raise SystemFailure(
            "mounted volume is marked read-only" if deepest else "container rootfs is marked read-only"
        )


def _owner_finder() -> Callable[[str], tuple[int, int]]:
    """Imported before we go below, where nothing can be; and only for who needs it: it takes as long as the rest."""
    from balenapy.core.ociconfig import find_user

    def find(spec: str) -> tuple[int, int]:
        user = find_user(spec, _text("/etc/passwd"), _text("/etc/group"))
        return user.uid, user.gid

    return find


def _text(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            return file.read(PASSWD_MAX_BYTES).decode(errors="replace")
    except OSError:
        return ""


class TreeExtractor(Extractor):
    """Extracts into a tree that is in use: what is there may be of a lower layer, or a mount."""

    def __init__(self, directory: str, *, keep_types: bool, owner: tuple[int, int] | None) -> None:
        super().__init__(whiteouts=False)
        self._inherits = True  # any directory that is there may pass on its group or its ACL
        self._directory = directory
        self._keep_types = keep_types
        self._owner = owner

    def begin(self, entry: Entry) -> int:
        path = clean(entry.name)
        if self._keep_types and path:
            self._check_type(path, entry)
        return super().begin(self._owned(entry))

    def finish(self, fd: int, entry: Entry) -> None:
        super().finish(fd, self._owned(entry))

    def _owned(self, entry: Entry) -> Entry:
        if self._owner is None:
            return entry
        uid, gid = self._owner
        return entry._replace(uid=uid, gid=gid)

    def _check_type(self, path: bytes, entry: Entry) -> None:
        try:
            there = stat.S_ISDIR(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return
        shown = json.dumps(posixpath.join(self._directory, process.show(path)))
        into = json.dumps(self._directory)
        if there and entry.type != DIRECTORY:
            raise SystemFailure(f"cannot overwrite directory {shown} with non-directory {into}")
        if not there and entry.type == DIRECTORY:
            raise SystemFailure(f"cannot overwrite non-directory {shown} with directory {into}")

    def _displace(self, path: bytes) -> None:
        # Nothing is kept of it, and a directory of a lower layer cannot be renamed.
        durable.remove_tree(Path(os.fsdecode(path)))
