"""Verb `verify`: hold the files of layers against their tar-splits, and say which are damaged.

Arguments:
    layers   [{"directory", "diff_id", "chain_id", "sidecars"}], of committed snapshots; `sidecars`: files that belong
             beside layer.json
    deep     read from the medium, not from the page cache, and rebuild the tar's digest as well
    idle     take the disk only when nobody else wants it, and leave nothing in the page cache
    rate     bytes a second at most; 0: no bound

Report: {"layers": [{"files", "bytes", "bad": [[path, why], ...], "whole", "sidecar"}]}, in the order of the arguments.

`bad` names paths below the layer's root; all names of a damaged hard link are in it. `whole`: naming paths does not
help (the tar-split itself is damaged, or too much is), all of the layer has to be replaced; `bad` then says
why. `sidecar`: "damaged" or "missing", of the description beside the files; layers that were made here may have none.

What is compared: that every name is there, its type, owner, mode, link target, device number, size and contents
(CRC-32, kept since unpacking). Not times, and of the extended attributes only overlayfs's opaque mark.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
import zlib
from collections.abc import Iterator
from typing import Any

from balenapy.core import tarsplit
from balenapy.core.sidecar import LAYER_FILE, SIDECAR_MAX_BYTES, decode_image, decode_layer
from balenapy.core.tarsplit import File
from balenapy.core.tarstream import (
    BLOCK_DEVICE,
    CHAR,
    DIRECTORY,
    FIFO,
    LINK,
    NEED_DATA,
    REGULAR,
    SYMLINK,
    Entry,
    TarReader,
)
from balenapy.errors import DataLoss, EngineError, InvalidParameter
from balenapy.linux import syscalls
from balenapy.worker import process
from balenapy.worker.extract import HIDDEN, OVERLAY_OPAQUE, WHITEOUT_OPAQUE, clean, meaning
from balenapy.worker.splitfile import NAME, read_records

READ_BYTES = 256 << 10
MAX_BAD = 256  # more of them, or longer names, and the layer is replaced as a whole
MAX_BAD_BYTES = 48 << 10  # they travel on a command line
IDLE_CLASS, IDLE_LEVEL = 3, 7
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
_FORMATS = {
    REGULAR: (stat.S_IFREG, "a file"),
    DIRECTORY: (stat.S_IFDIR, "a directory"),
    SYMLINK: (stat.S_IFLNK, "a symbolic link"),
    CHAR: (stat.S_IFCHR, "a character device"),
    BLOCK_DEVICE: (stat.S_IFBLK, "a block device"),
    FIFO: (stat.S_IFIFO, "a FIFO"),
    HIDDEN: (stat.S_IFCHR, "a whiteout"),
}


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    layers = arguments.get("layers")
    if not isinstance(layers, list):
        raise InvalidParameter("verify: `layers` must be a list")
    deep, idle = bool(arguments.get("deep")), bool(arguments.get("idle"))
    if idle:
        try:
            syscalls.set_io_priority(IDLE_CLASS, IDLE_LEVEL)
        except OSError:
            pass
    reading = Reading(int(arguments.get("rate") or 0), uncached=deep, forget=deep or idle)
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    reports = []
    for layer in layers:
        directory = str(layer["directory"])
        sidecar = _sidecar_damage(directory, str(layer["chain_id"])) or _image_damage(directory, layer.get("sidecars"))
        reports.append({**_verify(directory, str(layer["diff_id"]), deep, reading), "sidecar": sidecar})
        os.fchdir(root)  # out of the layer's root again
        os.chroot(".")
    return {"layers": reports}


def _verify(directory: str, diff_id: str, deep: bool, reading: Reading) -> dict[str, Any]:
    """One layer. Leaves the process in the layer's root."""
    check = Check(reading)
    try:
        records = os.open(os.path.join(directory, NAME), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        check.ruin(f"{NAME}: {_text(error)}")
    else:
        try:
            displaced = os.open(os.path.join(directory, "displaced"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            displaced = -1
        try:
            process.enter(os.path.join(directory, "diff"))
        except OSError as error:
            os.close(records)
            check.ruin(f"diff: {_text(error)}")
        else:
            try:
                check.run(read_records(records), displaced, diff_id if deep else None)
            except (DataLoss, InvalidParameter) as error:  # the records are at fault, not the files
                check.ruin(error.message)
            except OSError as error:
                check.ruin(f"{NAME}: {process.describe(error)}")
        finally:
            if displaced >= 0:
                os.close(displaced)
    return check.report()


def _sidecar_damage(directory: str, chain_id: str) -> str:
    """ "missing", "damaged" or ""."""
    try:
        with open(os.path.join(directory, LAYER_FILE), "rb") as file:
            found = decode_layer(file.read(SIDECAR_MAX_BYTES + 1))
    except FileNotFoundError:
        return "missing"
    except (EngineError, OSError):
        return "damaged"
    return "" if str(found.chain_id) == chain_id else "damaged"


def _image_damage(directory: str, names: list[str] | None) -> str:
    """Whether the descriptions of the images that end with this layer are there and whole."""
    for name in names or ():
        try:
            with open(os.path.join(directory, name), "rb") as file:
                if decode_image(file.read(SIDECAR_MAX_BYTES + 1)).file_name != name:
                    return "damaged"
        except (EngineError, OSError):
            return "damaged"
    return ""


class Reading:
    """How files are read: at what pace, and what becomes of the page cache."""

    def __init__(self, rate: int, *, uncached: bool, forget: bool) -> None:
        self._rate = rate
        self._uncached = uncached
        self._forget = forget
        self._began = time.monotonic()
        self._bytes = 0

    def pieces(self, fd: int) -> Iterator[bytes]:
        """The content of an open file; closes it. Raises: OSError."""
        try:
            if self._uncached:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            while piece := os.read(fd, READ_BYTES):
                yield piece
                if self._rate:
                    self._bytes += len(piece)
                    early = self._began + self._bytes / self._rate - time.monotonic()
                    if early > 0.05:
                        time.sleep(early)
            if self._forget:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class Node:
    """What a name, or several by hard links, has to be."""

    __slots__ = ("device", "gid", "kind", "link", "mode", "opaque", "size", "uid")

    def __init__(self, entry: Entry, kind: bytes) -> None:
        self.kind = kind
        self.size = entry.size
        self.link = entry.link
        self.device = os.makedev(entry.major, entry.minor) if kind in (CHAR, BLOCK_DEVICE) else 0
        self.opaque = False
        self.own(entry)

    def own(self, entry: Entry) -> None:
        """dockerd gives a file what the last of its names says."""
        self.mode, self.uid, self.gid = entry.mode & 0o7777, entry.uid, entry.gid


class Check:
    """One layer's verification. We are in its root."""

    def __init__(self, reading: Reading) -> None:
        self.files = self.bytes = 0
        self._reading = reading
        self._bad: dict[bytes, str] = {}
        self._nodes: dict[bytes, Node] = {}
        self._links: set[bytes] = set()  # names of symbolic links
        self._whole = False
        self._why: list[str] = []

    def ruin(self, why: str) -> None:
        """The layer has to be replaced as a whole."""
        self._whole = True
        self._why.append(why)

    def report(self) -> dict[str, Any]:
        bad = sorted(self._bad.items())
        if len(bad) > MAX_BAD or sum(len(path) for path in self._bad) > MAX_BAD_BYTES:
            self._whole = True
        told = [["", why] for why in self._why] + [[os.fsdecode(path), why] for path, why in bad[:MAX_BAD]]
        return {"files": self.files, "bytes": self.bytes, "bad": told, "whole": self._whole}

    def run(self, records: Iterator[tarsplit.Record], displaced: int, diff_id: str | None) -> None:
        """Go through the tar as it was. Raises: DataLoss, InvalidTar, when the records make no tar."""
        kept = frozenset(os.listdir(displaced)) if displaced >= 0 else frozenset[str]()
        digest = hashlib.sha256() if diff_id is not None else None
        reader = TarReader()
        entry: Entry | None = None
        for record in records:
            if isinstance(record, File):
                if entry is None or entry.size != record.size or entry.type != REGULAR:
                    raise DataLoss(f"{NAME} does not fit itself at {process.show(record.path)}")
                pieces = self._content(record, displaced if self._displaced_name(record) in kept else -1)
            else:
                pieces = iter((record.raw,))
            for piece in pieces:
                if digest is not None:
                    digest.update(piece)
                reader.feed(piece)
                while (event := reader.next_event()) is not NEED_DATA:
                    if isinstance(event, Entry):
                        entry = event
                        self._expect(event)
        self._compare()
        if digest is not None and not self._bad and not self._whole and f"sha256:{digest.hexdigest()}" != diff_id:
            self.ruin(f"the layer gives sha256:{digest.hexdigest()}")

    @staticmethod
    def _displaced_name(file: File) -> str:
        return tarsplit.displaced_name(file.size, file.crc)

    def _content(self, file: File, displaced: int) -> Iterator[bytes]:
        """Compare a file's content; gives as many bytes as the tar has, whatever is there."""
        self.files += 1
        crc = size = 0
        why = ""
        try:
            if displaced >= 0:
                fd = os.open(self._displaced_name(file), _READ, dir_fd=displaced)
            else:
                fd = os.open(file.path, _READ)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                os.close(fd)
                why = "is not a file"
            elif status.st_size != file.size:
                os.close(fd)
                why = f"has {status.st_size} bytes instead of {file.size}"
            else:
                for piece in self._reading.pieces(fd):
                    crc = zlib.crc32(piece, crc)
                    size += len(piece)
                    yield piece
                if crc != file.crc:
                    why = "has other contents"
        except OSError as error:
            why = "is missing" if error.errno in _GONE else f"cannot be read: {_text(error)}"
        self.bytes += size
        for left in range(file.size - size, 0, -READ_BYTES):
            yield bytes(min(left, READ_BYTES))
        if why:
            if displaced >= 0:
                self.ruin(f"a displaced content of {process.show(file.path)} {why}")
            else:
                self._bad.setdefault(file.path, why)

    # --- names

    def _expect(self, entry: Entry) -> None:
        """Note what this entry makes of the tree, as worker/extract does it."""
        path, kind = meaning(entry)
        if not path:
            return
        if kind == WHITEOUT_OPAQUE:
            node = self._nodes.get(path)
            if node is not None and node.kind == DIRECTORY:
                node.opaque = True
        elif kind == HIDDEN:
            if path not in self._nodes:
                self._nodes[path] = Node(entry, kind)
        elif kind == LINK:
            target = self._nodes.get(clean(entry.link))
            if target is None:
                # Reached by another name than its own: only that it is there can be told.
                self._drop(path)
                return
            target.own(entry)
            self._drop(path)
            self._nodes[path] = target
            if target.kind == SYMLINK:
                self._links.add(path)
        else:
            before = self._nodes.get(path)
            if kind == DIRECTORY and before is not None and before.kind == DIRECTORY:
                before.own(entry)
                return
            self._drop(path)
            self._nodes[path] = Node(entry, kind)
            if kind == SYMLINK:
                self._links.add(path)

    def _drop(self, path: bytes) -> None:
        """Something else comes to this name; what was below it goes."""
        before = self._nodes.pop(path, None)
        self._links.discard(path)
        if before is not None and before.kind == DIRECTORY:
            for name in [name for name in self._nodes if name.startswith(path + b"/")]:
                del self._nodes[name]
                self._links.discard(name)

    def _compare(self) -> None:
        names: dict[int, list[bytes]] = {}
        # What is reached through a link of the same layer has two names, and a later entry may have meant the same
        # file by the other one: then only contents tell.
        certain = not (self._links and any(map(self._is_behind_link, self._nodes)))
        for path, node in self._nodes.items():
            names.setdefault(id(node), []).append(path)
            if certain and path not in self._bad:
                why = _difference(path, node)
                if why:
                    self._bad[path] = why
        for group in names.values():
            if len(group) > 1 and (found := [path for path in group if path in self._bad]):
                for path in group:
                    self._bad.setdefault(path, f"is the same file as {process.show(found[0])}")

    def _is_behind_link(self, path: bytes) -> bool:
        while (at := path.rfind(b"/")) > 0:
            path = path[:at]
            if path in self._links:
                return True
        return False


def _difference(path: bytes, node: Node) -> str:
    """What is wrong with a name; "" for nothing."""
    try:
        status = os.lstat(path)
    except OSError as error:
        return "is missing" if error.errno in _GONE else f"cannot be read: {_text(error)}"
    kind, text = _FORMATS[node.kind]
    if stat.S_IFMT(status.st_mode) != kind:
        return f"is not {text}"
    if node.kind == REGULAR and status.st_size != node.size:
        return f"has {status.st_size} bytes instead of {node.size}"
    if node.kind == SYMLINK and os.readlink(path) != node.link:
        return "points elsewhere"
    if kind in (stat.S_IFCHR, stat.S_IFBLK) and status.st_rdev != node.device:
        return "is another device"
    if (status.st_uid, status.st_gid) != (node.uid, node.gid):
        return f"belongs to {status.st_uid}:{status.st_gid} instead of {node.uid}:{node.gid}"
    if node.kind not in (SYMLINK, HIDDEN) and stat.S_IMODE(status.st_mode) != node.mode:
        return f"has mode {stat.S_IMODE(status.st_mode):o} instead of {node.mode:o}"
    if node.opaque and not _is_opaque(path):
        return "lets lower layers shine through"
    return ""


def _text(error: OSError) -> str:
    return process.describe(OSError(error.errno, ""))


def _is_opaque(path: bytes) -> bool:
    try:
        return os.getxattr(path, OVERLAY_OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False
