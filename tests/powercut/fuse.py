"""A file system in memory, mounted by FUSE, that writes down every change and every sync.

It speaks the kernel's protocol (linux/fuse.h, 7.31) over /dev/fuse in one thread of a process of its own: no library,
and the process under test can wait for it without a deadlock. It is faithful, not fast.

The kernel does not pass `syncfs` to FUSE. Whoever calls it says so by an extended attribute (`say_syncfs`, and
`syncfs_also_said` for this process), which is not kept; `mark` puts a remark into the log in the same way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from balenapy.linux import syscalls
from tests.powercut.disk import ROOT, Op

SYNCFS = "user.powercut.syncfs"
MARK = "user.powercut.mark"
FAIL = "user.powercut.fail"
MAX_WRITE = 128 << 10
VALID_S = 1 << 20  # all changes come through this mount, the kernel may keep what it knows
_HEAD = struct.Struct("<IIQQIIII")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_SET_SIZE, _SET_MODE, _SET_UID, _SET_GID = 8, 1, 2, 4
_SET_ATIME, _SET_MTIME, _SET_ATIME_NOW, _SET_MTIME_NOW = 16, 32, 128, 256
_RENAME_NOREPLACE = 1
# setattr symlink mknod mkdir unlink rmdir rename link write fsync setxattr removexattr fsyncdir create fallocate
# rename2
_CHANGES = frozenset((4, 6, 8, 9, 10, 11, 12, 13, 16, 20, 21, 24, 30, 35, 43, 45))


def say_syncfs(fd: int) -> None:
    os.setxattr(fd, SYNCFS, b"1")


def mark(root: Path, text: str) -> None:
    """Write a remark into the log of the file system mounted at `root`."""
    os.setxattr(root, MARK, text.encode())


def fail(root: Path, after: int, error: int, times: int) -> None:
    """Let `after` more changes and syncs succeed, then refuse `times` of them; 0 times: all work again."""
    os.setxattr(root, FAIL, f"{after} {error} {times}".encode())


@contextlib.contextmanager
def syncfs_also_said() -> Iterator[None]:
    """`syscalls.syncfs` of this process is recorded."""
    real = syscalls.syncfs

    def syncfs(fd: int) -> None:
        real(fd)
        say_syncfs(fd)

    syscalls.syncfs = syncfs
    try:
        yield
    finally:
        syscalls.syncfs = real


@contextlib.contextmanager
def recorded(root: Path, log: Path) -> Iterator[None]:
    """Mount an empty recording file system at `root`; afterwards its log is in the file `log`."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
        syscalls.mount("powercut", root, "fuse.powercut", syscalls.MS_NOATIME, options)
        try:
            server = subprocess.Popen(
                [sys.executable, "-m", "tests.powercut.fuse", str(device), str(log)],
                pass_fds=[device],
                cwd=Path(__file__).parent.parent.parent,
                start_new_session=True,  # an interrupt from the keyboard ends it by the unmount
            )
        except BaseException:
            syscalls.umount2(root)
            raise
    finally:
        os.close(device)
    try:
        yield
    finally:
        # With the last user gone the kernel ends the session and the server writes its log.
        syscalls.umount2(root)
        try:
            code = server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
            raise AssertionError("the recording file system is still in use") from None
        assert code == 0, "the recording file system failed"


def read_log(log: Path) -> list[Op]:
    return list(pickle.loads(log.read_bytes()))


def is_usable() -> str:
    """Why it cannot be used here; "" if it can."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        subprocess.run(["modprobe", "fuse"], check=False, capture_output=True)
        try:
            os.close(os.open("/dev/fuse", os.O_RDWR))
        except OSError:
            return f"no FUSE here: {error}"
    return ""


@dataclass(slots=True)
class Node:
    mode: int
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    target: bytes = b""
    links: int = 1
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, int] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    mtime_ns: int = 0
    atime_ns: int = 0


class Refused(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Server:
    """Answers the kernel until the file system is unmounted."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._nodes: dict[int, Node] = {ROOT: Node(stat.S_IFDIR | 0o755, links=2)}
        self._next = ROOT
        self.log: list[Op] = []
        self._until_failure = self._failures = self._error = 0
        self._handlers: dict[int, Callable[[int, memoryview, int, int], bytes]] = {
            1: self._lookup,
            3: self._getattr,
            4: self._setattr,
            5: self._readlink,
            6: self._symlink,
            8: self._mknod,
            9: self._mkdir,
            10: self._unlink,
            11: self._rmdir,
            12: self._rename,
            13: self._link,
            14: self._open,
            15: self._read,
            16: self._write,
            17: self._statfs,
            18: self._nothing,
            20: self._fsync,
            21: self._setxattr,
            22: self._getxattr,
            23: self._listxattr,
            24: self._removexattr,
            25: self._nothing,
            26: self._init,
            27: self._open,
            28: self._readdir,
            29: self._nothing,
            30: self._fsync,
            35: self._create,
            43: self._fallocate,
            45: self._rename2,
        }

    def run(self) -> None:
        while True:
            try:
                request = os.read(self._device, MAX_WRITE + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                raise
            _, opcode, unique, ino, uid, gid, _, _ = _HEAD.unpack_from(request)
            if opcode in (2, 42):  # forget: no answer
                continue
            if opcode == 38:
                self._answer(unique, 0, b"")
                return
            handler = self._handlers.get(opcode)
            try:
                if handler is None:
                    raise Refused(errno.ENOSYS)
                if opcode in _CHANGES:
                    self._fail_if_due(request)
                self._answer(unique, 0, handler(ino, memoryview(request)[_HEAD.size :], uid, gid))
            except Refused as refused:
                self._answer(unique, refused.number, b"")

    def _fail_if_due(self, request: bytes) -> None:
        if not self._failures or b"user.powercut.fail\0" in request:
            return
        if self._until_failure:
            self._until_failure -= 1
            return
        self._failures -= 1
        raise Refused(self._error)

    def _answer(self, unique: int, number: int, body: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):  # the caller was interrupted and does not wait
            os.write(self._device, struct.pack("<IiQ", 16 + len(body), -number, unique) + body)

    # --- shapes

    def _attributes(self, ino: int) -> bytes:
        node = self._nodes[ino]
        seconds, nanoseconds = divmod(node.mtime_ns, 10**9)
        size = len(node.target) if stat.S_ISLNK(node.mode) else len(node.data)
        blocks = (size + 4095) // 4096 * 8
        atime = node.atime_ns // 10**9
        times = (atime, seconds, seconds, node.atime_ns % 10**9, nanoseconds, nanoseconds)
        return _ATTR.pack(ino, size, blocks, *times, node.mode, node.links, node.uid, node.gid, node.rdev, 4096, 0)

    def _entry(self, ino: int) -> bytes:
        return struct.pack("<QQQQII", ino, 0, VALID_S, VALID_S, 0, 0) + self._attributes(ino)

    def _child(self, ino: int, name: bytes) -> int:
        try:
            return self._nodes[ino].names[name]
        except KeyError:
            raise Refused(errno.ENOENT) from None

    def _new(self, parent: int, name: bytes, node: Node) -> int:
        if name in self._nodes[parent].names:
            raise Refused(errno.EEXIST)
        if self._nodes[parent].mode & stat.S_ISGID:
            node.gid = self._nodes[parent].gid
        self._next += 1
        ino = self._next
        node.mtime_ns = time.time_ns()
        self._nodes[ino] = node
        self.log.append(("inode", ino, node.mode, node.uid, node.gid, node.rdev, node.target))
        self._name(parent, name, ino)
        return ino

    def _name(self, parent: int, name: bytes, ino: int) -> None:
        self._nodes[parent].names[name] = ino
        self.log.append(("link", parent, name, ino))

    # --- requests

    def _init(self, _ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        _, minor, readahead, _ = struct.unpack_from("<IIII", body)
        big_writes = 0x20
        return struct.pack(
            "<IIIIHHIIHHI", 7, min(minor, 31), readahead, big_writes, 16, 12, MAX_WRITE, 1, 32, 0, 0
        ) + bytes(28)

    def _lookup(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        return self._entry(self._child(ino, _name(body)))

    def _getattr(self, ino: int, _body: memoryview, _uid: int, _gid: int) -> bytes:
        return struct.pack("<QII", VALID_S, 0, 0) + self._attributes(ino)

    def _setattr(self, ino: int, body: memoryview, uid: int, gid: int) -> bytes:
        valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, owner, group, _ = struct.unpack_from(
            "<IIQQQQQQIIIIIIII", body
        )
        node = self._nodes[ino]
        now = time.time_ns()
        if valid & _SET_SIZE:
            self._truncate(ino, size)
        if valid & (_SET_MODE | _SET_UID | _SET_GID):
            if valid & _SET_MODE:
                node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
            node.uid = owner if valid & _SET_UID else node.uid
            node.gid = group if valid & _SET_GID else node.gid
            self.log.append(
                (
                    "attr",
                    ino,
                    mode if valid & _SET_MODE else None,
                    owner if valid & _SET_UID else None,
                    group if valid & _SET_GID else None,
                )
            )
        if valid & _SET_MTIME:
            node.mtime_ns = now if valid & _SET_MTIME_NOW else mtime * 10**9 + mtime_ns
        if valid & _SET_ATIME:
            node.atime_ns = now if valid & _SET_ATIME_NOW else atime * 10**9 + atime_ns
        return self._getattr(ino, body, uid, gid)

    def _truncate(self, ino: int, size: int) -> None:
        data = self._nodes[ino].data
        if size != len(data):
            if size < len(data):
                del data[size:]
            else:
                data.extend(bytes(size - len(data)))
            self.log.append(("truncate", ino, size))

    def _readlink(self, ino: int, _body: memoryview, _uid: int, _gid: int) -> bytes:
        return self._nodes[ino].target

    def _symlink(self, ino: int, body: memoryview, uid: int, gid: int) -> bytes:
        name, target, _ = bytes(body).split(b"\0", 2)
        return self._entry(self._new(ino, name, Node(stat.S_IFLNK | 0o777, uid, gid, target=target)))

    def _mknod(self, ino: int, body: memoryview, uid: int, gid: int) -> bytes:
        mode, rdev = struct.unpack_from("<II", body)
        return self._entry(self._new(ino, _name(body[16:]), Node(mode, uid, gid, rdev)))

    def _mkdir(self, ino: int, body: memoryview, uid: int, gid: int) -> bytes:
        (mode,) = struct.unpack_from("<I", body)
        node = Node(stat.S_IFDIR | stat.S_IMODE(mode), uid, gid, links=2)
        made = self._new(ino, _name(body[8:]), node)
        self._nodes[ino].links += 1
        return self._entry(made)

    def _create(self, ino: int, body: memoryview, uid: int, gid: int) -> bytes:
        _, mode = struct.unpack_from("<II", body)
        made = self._new(ino, _name(body[16:]), Node(stat.S_IFREG | stat.S_IMODE(mode), uid, gid))
        return self._entry(made) + struct.pack("<QII", 0, 0, 0)

    def _unlink(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        name = _name(body)
        self._nodes[self._child(ino, name)].links -= 1
        del self._nodes[ino].names[name]
        self.log.append(("unlink", ino, name))
        return b""

    def _rmdir(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        name = _name(body)
        node = self._nodes[self._child(ino, name)]
        if node.names:
            raise Refused(errno.ENOTEMPTY)
        node.links = 0
        del self._nodes[ino].names[name]
        self._nodes[ino].links -= 1
        self.log.append(("unlink", ino, name))
        return b""

    def _rename(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        (target,) = struct.unpack_from("<Q", body)
        return self._move(ino, target, bytes(body[8:]), 0)

    def _rename2(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        target, flags = struct.unpack_from("<QI", body)
        return self._move(ino, target, bytes(body[16:]), flags)

    def _move(self, ino: int, target: int, names: bytes, flags: int) -> bytes:
        old, new, _ = names.split(b"\0", 2)
        moved = self._child(ino, old)
        there = self._nodes[target].names.get(new)
        if there is not None:
            if flags & _RENAME_NOREPLACE:
                raise Refused(errno.EEXIST)
            if self._nodes[there].names:
                raise Refused(errno.ENOTEMPTY)
            self._nodes[there].links -= 1
        if flags & ~_RENAME_NOREPLACE:
            raise Refused(errno.EINVAL)
        if stat.S_ISDIR(self._nodes[moved].mode):
            self._nodes[ino].links -= 1
            self._nodes[target].links += 1
        del self._nodes[ino].names[old]
        self._nodes[target].names[new] = moved
        self.log.append(("rename", ino, old, target, new))
        return b""

    def _link(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        (linked,) = struct.unpack_from("<Q", body)
        name = _name(body[8:])
        if name in self._nodes[ino].names:
            raise Refused(errno.EEXIST)
        self._nodes[linked].links += 1
        self._name(ino, name, linked)
        return self._entry(linked)

    def _open(self, _ino: int, _body: memoryview, _uid: int, _gid: int) -> bytes:
        return struct.pack("<QII", 0, 0, 0)

    def _read(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        return bytes(self._nodes[ino].data[offset : offset + size])

    def _write(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        piece = bytes(body[40 : 40 + size])
        data = self._nodes[ino].data
        if len(data) < offset:
            data.extend(bytes(offset - len(data)))
        data[offset : offset + size] = piece
        self._nodes[ino].mtime_ns = time.time_ns()
        self.log.append(("write", ino, offset, piece))
        return struct.pack("<II", size, 0)

    def _fallocate(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        _, offset, length, mode = struct.unpack_from("<QQQI", body)
        if mode:
            raise Refused(errno.EOPNOTSUPP)
        self._truncate(ino, max(len(self._nodes[ino].data), offset + length))
        return b""

    def _statfs(self, _ino: int, _body: memoryview, _uid: int, _gid: int) -> bytes:
        plenty = 1 << 24
        return struct.pack("<QQQQQIIII", plenty, plenty, plenty, plenty, plenty, 4096, 255, 4096, 0) + bytes(24)

    def _nothing(self, _ino: int, _body: memoryview, _uid: int, _gid: int) -> bytes:
        return b""

    def _fsync(self, ino: int, _body: memoryview, _uid: int, _gid: int) -> bytes:
        self.log.append(("fsync", ino))
        return b""

    def _setxattr(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        (size,) = struct.unpack_from("<I", body)
        name, rest = bytes(body[8:]).split(b"\0", 1)
        value = rest[:size]
        if name == SYNCFS.encode():
            self.log.append(("syncfs",))
        elif name == MARK.encode():
            self.log.append(("mark", value.decode()))
        elif name == FAIL.encode():
            self._until_failure, self._error, self._failures = map(int, value.split())
        else:
            self._nodes[ino].xattrs[name] = value
            self.log.append(("xattr", ino, name, value))
        return b""

    def _getxattr(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        value = self._nodes[ino].xattrs.get(_name(body[8:]))
        if value is None:
            raise Refused(errno.ENODATA)
        return _sized(value, body)

    def _listxattr(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        return _sized(b"".join(name + b"\0" for name in self._nodes[ino].xattrs), body)

    def _removexattr(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        name = _name(body)
        if self._nodes[ino].xattrs.pop(name, None) is None:
            raise Refused(errno.ENODATA)
        self.log.append(("xattr", ino, name, None))
        return b""

    def _readdir(self, ino: int, body: memoryview, _uid: int, _gid: int) -> bytes:
        # Offsets are inode numbers: they stay right while entries go (rmtree reads and unlinks in turns).
        _, offset, size = struct.unpack_from("<QQI", body)
        result = b""
        for position, child, name in self._numbered(ino):
            if position <= offset:
                continue
            kind = stat.S_IFMT(self._nodes[child].mode) >> 12
            record = struct.pack("<QQII", child, position, len(name), kind) + name
            record += bytes(-len(record) % 8)
            if len(result) + len(record) > size:
                break
            result += record
        return result

    def _numbered(self, ino: int) -> Iterator[tuple[int, int, bytes]]:
        """Hard links of one inode in one directory differ in the last bits, by name."""
        of_inode: dict[int, list[bytes]] = {}
        for name, child in self._nodes[ino].names.items():
            of_inode.setdefault(child, []).append(name)
        for child in sorted(of_inode):
            for n, name in enumerate(sorted(of_inode[child])):
                yield (child << 8) | (n + 1), child, name


def _name(body: memoryview) -> bytes:
    return bytes(body).split(b"\0", 1)[0]


def _sized(value: bytes, body: memoryview) -> bytes:
    (size,) = struct.unpack_from("<I", body)
    if size == 0:
        return struct.pack("<II", len(value), 0)
    if len(value) > size:
        raise Refused(errno.ERANGE)
    return value


def main() -> None:
    server = Server(int(sys.argv[1]))
    server.run()
    Path(sys.argv[2]).write_bytes(pickle.dumps(server.log))


if __name__ == "__main__":
    main()
