"""A disk that forgets: what a file system may hold after a power cut, by the log of what was done to it.

The log is what `fuse.py` records of the real stores and workers. `Disk` follows it and keeps apart what is certain
(synced) and what is pending. A cut takes what is certain and, of what is pending, anything a real disk might hold:

- content: each 4 KiB block of a file is as after any of its pending writes, independently of other blocks (so writes
  are reordered), the last of them torn at a 512 byte sector now and then; the length is any that the file had; a
  length without its blocks reads as zeros (the zero-byte file).
- names: none, a prefix in order (a journal), or any set that respects the order of changes to one and the same name.
  A rename is one change: journals make it so.
- attributes: any prefix of the changes to one file.

What makes certain: `fsync` of a file its content and attributes, never its name; `fsync` of a directory the names in
it; `syncfs` everything. That is less than ext4 gives, which also commits names with the first `fsync` of anything.
"""

from __future__ import annotations

import os
import random
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = 4096
SECTOR = 512
ROOT = 1

Op = tuple[Any, ...]
# ("inode", ino, mode, uid, gid, rdev, target)       a new inode, not named yet
# ("link", parent, name, ino) ("unlink", parent, name) ("rename", parent, name, new parent, new name)
# ("write", ino, offset, data) ("truncate", ino, size)
# ("attr", ino, mode | None, uid | None, gid | None) ("xattr", ino, name, value | None)
# ("fsync", ino) ("syncfs",) ("mark", text)


@dataclass(slots=True)
class Inode:
    """What is certain of one inode, and the changes to it that are not."""

    mode: int
    uid: int
    gid: int
    rdev: int = 0
    target: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    pending_data: list[Op] = field(default_factory=list)
    pending_attributes: list[Op] = field(default_factory=list)

    def apply_data(self, op: Op) -> None:
        if op[0] == "write":
            _, _, offset, data = op
            if len(self.data) < offset:
                self.data.extend(bytes(offset - len(self.data)))
            self.data[offset : offset + len(data)] = data
        else:
            _resize(self.data, op[2])

    def apply_attribute(self, op: Op) -> None:
        if op[0] == "attr":
            _, _, mode, uid, gid = op
            self.mode = self.mode if mode is None else stat.S_IFMT(self.mode) | stat.S_IMODE(mode)
            self.uid = self.uid if uid is None else uid
            self.gid = self.gid if gid is None else gid
        elif op[3] is None:
            self.xattrs.pop(op[2], None)
        else:
            self.xattrs[op[2]] = op[3]


class File(NamedTuple):
    """One inode after a cut."""

    mode: int
    uid: int
    gid: int
    rdev: int
    target: bytes
    data: bytes
    xattrs: dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Remains:
    """What a disk holds after a cut: a tree of names and the inodes they lead to."""

    names: dict[int, dict[bytes, int]]
    files: dict[int, File]

    def write_to(self, target: Path) -> None:
        """Make it real below an existing, empty directory."""
        made: dict[int, bytes] = {}
        pending = [(ROOT, os.fsencode(target))]
        while pending:
            ino, directory = pending.pop()
            for name, child in self.names.get(ino, {}).items():
                path = os.path.join(directory, name)
                if child in made:
                    if not stat.S_ISDIR(self.files[child].mode):
                        os.link(made[child], path, follow_symlinks=False)
                    continue
                made[child] = path
                self._make(path, self.files[child])
                if stat.S_ISDIR(self.files[child].mode):
                    pending.append((child, path))

    @staticmethod
    def _make(path: bytes, file: File) -> None:
        if stat.S_ISDIR(file.mode):
            os.mkdir(path)
        elif stat.S_ISLNK(file.mode):
            os.symlink(file.target, path)
        elif stat.S_ISREG(file.mode):
            with open(path, "xb", buffering=0) as out:
                if file.data:
                    out.write(file.data)
        else:
            os.mknod(path, file.mode, file.rdev)
        if file.uid or file.gid:
            os.lchown(path, file.uid, file.gid)
        if not stat.S_ISLNK(file.mode):
            os.chmod(path, stat.S_IMODE(file.mode))
            for name, value in file.xattrs.items():
                os.setxattr(path, name, value)


class Disk:
    """Follows a log; `cut` says what may remain at any moment and changes nothing."""

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {ROOT: Inode(stat.S_IFDIR | 0o755, 0, 0)}
        self.names: dict[int, dict[bytes, int]] = {ROOT: {}}
        self.pending_names: list[Op] = []

    def apply(self, op: Op) -> None:
        kind = op[0]
        if kind in ("write", "truncate"):
            self.inodes[op[1]].pending_data.append(op)
        elif kind in ("link", "unlink", "rename"):
            self.pending_names.append(op)
        elif kind in ("attr", "xattr"):
            self.inodes[op[1]].pending_attributes.append(op)
        elif kind == "inode":
            _, ino, mode, uid, gid, rdev, target = op
            self.inodes[ino] = Inode(mode, uid, gid, rdev, target)
        elif kind == "fsync":
            self._sync_inode(self.inodes[op[1]])
            self._sync_names(op[1])
        elif kind == "syncfs":
            for inode in self.inodes.values():
                self._sync_inode(inode)
            for change in self.pending_names:
                _rename(self.names, change)
            self.pending_names.clear()

    @staticmethod
    def _sync_inode(inode: Inode) -> None:
        for op in inode.pending_data:
            inode.apply_data(op)
        for op in inode.pending_attributes:
            inode.apply_attribute(op)
        inode.pending_data.clear()
        inode.pending_attributes.clear()

    def _sync_names(self, directory: int) -> None:
        if not stat.S_ISDIR(self.inodes[directory].mode):
            return
        wanted = {n for n, op in enumerate(self.pending_names) if any(at == directory for at, _ in _entries(op))}
        wanted = _with_former(self.pending_names, wanted)
        for n in sorted(wanted):
            _rename(self.names, self.pending_names[n])
        self.pending_names = [op for n, op in enumerate(self.pending_names) if n not in wanted]

    # --- the cut

    def cut(self, choose: random.Random) -> Remains:
        """One of the many things that may remain."""
        names = {ino: dict(entries) for ino, entries in self.names.items()}
        for op in self._choose_names(choose):
            _rename(names, op)
        files: dict[int, File] = {}
        reached: dict[int, dict[bytes, int]] = {}
        pending = [ROOT]
        style = choose.choice(("nothing", "everything", "each", "each", "each"))
        while pending:
            directory = pending.pop()
            if directory in reached:
                continue
            reached[directory] = names.get(directory, {})
            for ino in reached[directory].values():
                if ino not in files:
                    files[ino] = _remains(self.inodes[ino], style, choose)
                    if stat.S_ISDIR(files[ino].mode):
                        pending.append(ino)
        return Remains(reached, files)

    def _choose_names(self, choose: random.Random) -> list[Op]:
        pending = self.pending_names
        style = choose.choice(("none", "all", "prefix", "any", "any"))
        if style == "none" or not pending:
            return []
        if style == "all":
            return pending
        if style == "prefix":
            return pending[: choose.randrange(len(pending) + 1)]
        share = choose.random()
        kept = _with_former(pending, {n for n in range(len(pending)) if choose.random() < share})
        return [pending[n] for n in sorted(kept)]


def _entries(op: Op) -> tuple[tuple[int, bytes], ...]:
    return ((op[1], op[2]), (op[3], op[4])) if op[0] == "rename" else ((op[1], op[2]),)


def _with_former(ops: list[Op], wanted: set[int]) -> set[int]:
    """With all that happened before to the same names."""
    touched: set[tuple[int, bytes]] = set()
    closed = set()
    for n in range(len(ops) - 1, -1, -1):
        entries = _entries(ops[n])
        if n in wanted or any(entry in touched for entry in entries):
            closed.add(n)
            touched.update(entries)
    return closed


def _rename(names: dict[int, dict[bytes, int]], op: Op) -> None:
    if op[0] == "link":
        names.setdefault(op[1], {})[op[2]] = op[3]
    elif op[0] == "unlink":
        names.setdefault(op[1], {}).pop(op[2], None)
    else:
        ino = names.setdefault(op[1], {}).pop(op[2], None)
        if ino is not None:
            names.setdefault(op[3], {})[op[4]] = ino


def _remains(inode: Inode, style: str, choose: random.Random) -> File:
    changed = Inode(inode.mode, inode.uid, inode.gid, xattrs=dict(inode.xattrs))
    count = len(inode.pending_attributes)
    count = {"nothing": 0, "everything": count}.get(style, choose.randrange(count + 1))
    for op in inode.pending_attributes[:count]:
        changed.apply_attribute(op)
    data = _content(inode, style, choose)
    return File(changed.mode, changed.uid, changed.gid, inode.rdev, inode.target, data, changed.xattrs)


def _content(inode: Inode, style: str, choose: random.Random) -> bytes:
    pending = inode.pending_data
    if not pending or style == "nothing":
        return bytes(inode.data)
    if style == "everything" or (how := choose.choice(("nothing", "everything", "length", "blocks", "blocks"))) == (
        "everything"
    ):
        whole = Inode(0, 0, 0, data=bytearray(inode.data))
        for op in pending:
            whole.apply_data(op)
        return bytes(whole.data)
    if how == "nothing":
        return bytes(inode.data)
    sizes = [len(inode.data)]
    blocks: dict[int, list[tuple[int, bytes | None]]] = {}  # block -> (offset in it, bytes | None: zeros to its end)
    for op in pending:
        if op[0] == "truncate":
            for number in range(op[2] // BLOCK, max(sizes) // BLOCK + 1):
                blocks.setdefault(number, []).append((max(0, op[2] - number * BLOCK), None))
            sizes.append(op[2])
            continue
        _, _, offset, data = op
        end = offset + len(data)
        for number in range(offset // BLOCK, (end + BLOCK - 1) // BLOCK):
            first, last = max(offset, number * BLOCK), min(end, (number + 1) * BLOCK)
            blocks.setdefault(number, []).append((first - number * BLOCK, data[first - offset : last - offset]))
        sizes.append(max(sizes[-1], end))
    if how == "length":  # the new length came to the disk, the blocks did not
        result = bytearray(inode.data)
        _resize(result, sizes[-1])
        return bytes(result)
    result = bytearray(inode.data)
    _resize(result, max(sizes))
    for number, changes in blocks.items():
        block = bytearray(result[number * BLOCK : (number + 1) * BLOCK])
        block.extend(bytes(BLOCK - len(block)))
        count = choose.randrange(len(changes) + 1)
        for position, (offset, piece) in enumerate(changes[:count]):
            before = bytes(block)
            block[offset:] = bytes(BLOCK - offset) if piece is None else piece + block[offset + len(piece) :]
            if position == count - 1 and choose.random() < 0.25:
                torn = SECTOR * choose.randrange(BLOCK // SECTOR + 1)
                if choose.random() < 0.5:
                    block[torn:] = before[torn:]
                else:
                    block[:torn] = before[:torn]
        result[number * BLOCK : (number + 1) * BLOCK] = block
    _resize(result, choose.choice((choose.choice(sizes), sizes[-1])))
    return bytes(result)


def _resize(data: bytearray, size: int) -> None:
    if size < len(data):
        del data[size:]
    else:
        data.extend(bytes(size - len(data)))
