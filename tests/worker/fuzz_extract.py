"""`python -m tests.worker.fuzz_extract SEED COUNT`: random archives, unpacked in a root of their own, joined again.

Runs in a mount namespace and ends with it. For every archive: nothing but an EngineError comes out; what was joined is
what went in, or is refused as changed; and what lies beside the root is as it was.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any, cast

from balenapy.core import tarsplit
from balenapy.errors import DataLoss, EngineError
from balenapy.linux import syscalls
from balenapy.worker.extract import Extractor
from balenapy.worker.pack import Contents
from balenapy.worker.unpack import Unpacker
from tests.core import tars

SHELF = "/mnt"  # a tmpfs over it, in our namespace only
NAMES = [
    b"a", b"b", b"a/b", b"a/b/c", b"b/c", b"./a", b"/a", b"a/", b"a//b", b"a/../b", b"a/b/../../c", b".", b"/", b"",
    b".wh.a", b".wh.b", b"a/.wh.b", b".wh..wh..opq", b"a/.wh..wh..opq", b".wh..wh.plnk/x", b"c", b"c/d", b"d/e/f/g/h",
    b"a\xff", b"l", b"l/outside", b"l/a",
]  # fmt: skip
HOSTILE_NAMES = [b"../outside", b"..", b"a/../../outside", b".wh.", b".wh..", b"a/.wh..."]
TARGETS = [b"a", b"b", b"a/b", b"/a", b"c", b"l", b"b/c", b"/", b".", b"x" * 90, b"..", b"../a"]
HOSTILE_TARGETS = [
    b"../outside", b"../../../../mnt/outside", b"/mnt", b"/mnt/outside", b"nowhere", b"", b"/proc/self/root",
    b"../jail",
]  # fmt: skip
SIZES = (0, 0, 1, 5, 511, 512, 513, 3000)


class Split:
    """Collects records instead of writing them."""

    def __init__(self) -> None:
        self.records: list[tarsplit.Record] = []

    def segment(self, raw: bytes | memoryview) -> None:
        self.records.append(tarsplit.Segment(bytes(raw)))

    def file(self, size: int, crc: int, path: bytes) -> None:
        self.records.append(tarsplit.File(size, crc, path))


class Pieces:
    """The archive in pieces, as a worker's source gives it."""

    def __init__(self, data: bytes, step: int) -> None:
        self._pieces = [data[at : at + step] for at in range(0, len(data), step)]

    def next(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


def choose(random_: random.Random, usual: list[bytes], hostile: list[bytes]) -> bytes:
    return random_.choice(hostile if random_.random() < 0.06 else usual)


def make_archive(random_: random.Random) -> bytes:
    data = b""
    for _ in range(random_.randint(1, 9)):
        name = choose(random_, NAMES, HOSTILE_NAMES)
        if random_.random() < 0.03:
            name = b"/".join(random_.choice(NAMES) for _ in range(3))
        kind = random_.choice(b"00000000000000005555555511122222346g" if random_.random() < 0.99 else b"7V")
        mode = random_.choice((0o644, 0o755, 0o4755, 0o2770, 0o1777, 0, 0o7777))
        ids = {"uid": random_.choice((0, 0, 0, 5, 65534)), "gid": random_.choice((0, 0, 0, 7))}
        if random_.random() < 0.1:
            data += tars.pax(
                random_.choice((
                    (b"SCHILY.xattr.user.a", b"b"), (b"SCHILY.xattr.trusted.overlay.redirect", b"/x"), (b"path", name),
                    (b"mtime", b"-1"), (b"uid", b"4294967295"), (b"SCHILY.xattr.security.capability", b"bad"),
                    (b"linkpath", choose(random_, TARGETS, HOSTILE_TARGETS)), (b"size", b"3"),
                ))
            )  # fmt: skip
        if kind == ord("0"):
            data += tars.file(name, random_.randbytes(random_.choice(SIZES)), mode=mode, **ids)
        else:
            target = choose(random_, TARGETS, HOSTILE_TARGETS)
            data += tars.header(name, bytes((kind,)), mode=mode, link=target, major=random_.choice((0, 1)), **ids)
    data += random_.choice((tars.END, tars.END, tars.END + b"trailer", b"", b"\0" * 512))
    if random_.random() < 0.1:
        data = data[: random_.randrange(len(data) + 1)]
    return data


def unpack(data: bytes, step: int) -> str:
    """Unpack in /mnt/jail, join again; what became of it."""
    os.mkdir(f"{SHELF}/jail")
    os.mkdir(f"{SHELF}/displaced")
    displaced = os.open(f"{SHELF}/displaced", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chroot(f"{SHELF}/jail")
        os.chdir("/")
        split = Split()
        unpacker = Unpacker(cast(Any, Pieces(data, step)), cast(Any, split), Extractor(displaced))
        try:
            unpacker.run()
        except EngineError as error:
            return type(error).__name__
        contents = Contents(f"/proc/self/fd/{displaced}")  # nothing of the kind in here: none displaced
        if os.listdir(displaced):
            contents._displaced = frozenset(os.listdir(displaced))
            contents._displaced_fd = displaced
        try:
            joined = b"".join(tarsplit.join(split.records, contents.open))
        except DataLoss:
            return "a file is reached no more"
        assert joined == data
        return "unpacked"
    finally:
        os.close(displaced)


def main(seed: int, count: int) -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("tmpfs", SHELF, "tmpfs")
    os.umask(0)
    outer = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    with open(f"{SHELF}/outside", "w") as file:
        file.write("untouched")
    root_before = sorted(os.listdir("/"))
    random_ = random.Random(seed)
    outcomes: dict[str, int] = {}
    started = time.monotonic()
    for number in range(count):
        data = make_archive(random_)
        try:
            outcome = unpack(data, random_.choice((1 << 20, 700, 100)))
        except BaseException:
            print(f"number {number}: {data!r}", file=sys.stderr)
            raise
        finally:
            os.fchdir(outer)  # root may leave a chroot that it has a descriptor beyond
            os.chroot(".")
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert sorted(os.listdir(SHELF)) == ["displaced", "jail", "outside"], (number, data)
        status = os.lstat(f"{SHELF}/outside")
        assert (status.st_nlink, status.st_uid, status.st_size) == (1, 0, len("untouched")), (number, data)
        remove(f"{SHELF}/jail")
        remove(f"{SHELF}/displaced")
    assert sorted(os.listdir("/")) == root_before
    print(json.dumps({"outcomes": outcomes, "seconds": time.monotonic() - started}))


def remove(path: str) -> None:
    """Faster than a process: trees are small."""
    for directory, directories, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(os.path.join(directory, name))
        for name in directories:
            child = os.path.join(directory, name)
            if os.path.islink(child):
                os.unlink(child)
            else:
                os.rmdir(child)
    os.rmdir(path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
