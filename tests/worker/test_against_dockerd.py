"""The same layers given to dockerd from Debian: the same directory comes out, the same size, or an error from both.

Where we mean to differ it says so; a difference that is gone fails as well.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.core import tars
from tests.engine_process import DOCKER, EngineProcess, running_engine
from tests.worker.conftest import Worker
from tests.worker.test_unpack import snapshot

pytestmark = [pytest.mark.root, pytest.mark.slow]

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)

SAME = {
    "of every kind": tars.directory(b"d", 0o750, uid=3) + tars.file(b"d/f", b"x" * 100, mode=0o4755, uid=5)
    + tars.symlink(b"d/l", b"../e") + tars.link(b"h", b"d/f", mode=0o600, mtime=5) + tars.header(b"p", b"6", mode=0o622)
    + tars.header(b"c", b"3", major=1, minor=3, mode=0o666) + tars.header(b"b", b"4", major=8, minor=1),
    "root as dot": tars.directory(b"./", 0o700, uid=4) + tars.file(b"./x", b"1"),
    "root as slash": tars.directory(b"/", 0o711, uid=4) + tars.file(b"/x", b"1"),
    "implied parents": tars.file(b"a/b/c", b"1"),
    "whiteouts": tars.directory(b"etc") + tars.file(b"etc/.wh.p", uid=3)
    + tars.directory(b"v") + tars.file(b"v/.wh..wh..opq"),
    "opaque through a link": tars.directory(b"t") + tars.symlink(b"l", b"t") + tars.file(b"l/.wh..wh..opq"),
    "a file whose name ends in a slash": tars.header(b"x/", b"0"),
    "a capability": tars.pax((b"SCHILY.xattr.security.capability", CAPABILITY)) + tars.file(b"ping", b"x", uid=1),
    "an xattr": tars.pax((b"SCHILY.xattr.user.a", b"\0x")) + tars.file(b"d", b"1"),
    "an xattr nobody knows": tars.pax((b"SCHILY.xattr.nonsense", b"x")) + tars.file(b"d", b"1"),
    "times": tars.pax((b"mtime", b"-5")) + tars.header(b"x") + tars.pax((b"mtime", b"1234.56789"), (b"atime", b"1.5"))
    + tars.header(b"y") + tars.directory(b"d", mtime=7) + tars.file(b"d/f", b"1", mtime=8),
    "setgid": tars.directory(b"g", 0o2775, gid=9) + tars.file(b"g/f", b"1") + tars.directory(b"g/d")
    + tars.symlink(b"g/l", b"f"),
    "absolute names": tars.file(b"/../x", b"1") + tars.file(b"t", b"1") + tars.link(b"y", b"/t"),
    "through a link": tars.directory(b"t") + tars.symlink(b"l", b"/t") + tars.file(b"l/f", b"1"),
    "a hard link to a link": tars.symlink(b"s", b"a") + tars.link(b"s2", b"s", mode=0o777, uid=7),
}  # fmt: skip
REFUSED_BY_BOTH = {
    "a whiteout of the parent": tars.directory(b"a") + tars.file(b"a/.wh..."),
    "a whiteout of nothing": tars.file(b"a/.wh."),
    "a hard link to the host": tars.link(b"x", b"../../etc/passwd"),
    "sparse": tars.header(b"f", b"S", magic=b"ustar  \0"),
    "contiguous": tars.header(b"f", b"7"),
    "a file as parent": tars.file(b"f", b"x") + tars.file(b"f/g", b"y"),
    "a block of zeros": tars.header(b"a") + bytes(512) + tars.header(b"b"),
    "a zero length link": tars.symlink(b"a", b""),
    "no tar": b"junk" * 300,
}
REFUSED_BY_US = {"a name above the root": tars.file(b"../x", b"1")}  # dockerd puts it into the root
REFUSED_BY_DOCKERD = {
    # Its tar-split cannot tell them apart.
    "a path twice": tars.file(b"a", b"11") + tars.file(b"a", b"2"),
    "a directory twice": tars.directory(b"d", 0o700) + tars.file(b"d/f", b"1") + tars.directory(b"d", 0o511),
    "a whiteout of the layer's own file": tars.file(b"a", b"1") + tars.file(b".wh.a"),
}
DIFFERENT = {
    "aufs' own files": tars.file(b".wh..wh.aufs"),  # dockerd makes whiteouts of them
    "a directory after its whiteout": tars.file(b".wh.a") + tars.directory(b"a"),  # not opaque: what was below shows
    "an xattr of overlayfs": tars.pax((b"SCHILY.xattr.trusted.overlay.redirect", b"/x")) + tars.directory(b"d"),
}


def by_dockerd(peer: EngineProcess, tar: Path) -> tuple[Path, int] | None:
    """Import it; (the layer's directory, the image's size), None when it is refused."""
    (layers,) = (path for path in peer.data_root.rglob("overlay2") if path.is_dir() and path.parent.name != "image")
    before = set(os.listdir(layers))
    assert DOCKER is not None
    command = [DOCKER, "-H", f"unix://{peer.socket}"]
    done = subprocess.run([*command, "import", tar], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    (added,) = set(os.listdir(layers)) - before - {"l"}
    inspect = [*command, "image", "inspect", "-f", "{{.Size}}", done.stdout.strip()]
    size = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    return layers / added / "diff", int(size)


def look(directory: Path) -> dict[str, tuple[object, ...]]:
    """A tree, without the times that are those of the moment."""
    return {
        name: (*facts[:3], facts[3] if int(str(facts[3])) < 1_700_000_000 * 10**9 else None, *facts[4:])
        for name, facts in snapshot(directory).items()
    }


@pytest.mark.skipif(shutil.which("dockerd") is None or DOCKER is None, reason="no dockerd here")
def test_layers_come_out_as_dockerd_makes_them(tmp_path: Path) -> None:
    wrong: dict[str, object] = {}
    groups = (
        (SAME, "same"), (REFUSED_BY_BOTH, "refused by both"), (REFUSED_BY_US, "refused by us"),
        (REFUSED_BY_DOCKERD, "refused by dockerd"), (DIFFERENT, "different"),
    )  # fmt: skip
    with running_engine(tmp_path / "peer", program="dockerd") as peer:
        for group, expected in groups:
            for name, body in group.items():
                tar = tmp_path / "layer.tar"
                tar.write_bytes(body + tars.END)
                (directory := tmp_path / name).mkdir()
                worker = Worker(directory)
                report = worker.run("unpack", tar.read_bytes(), directory=str(worker.snapshot))
                theirs = by_dockerd(peer, tar)
                found: object
                if theirs is None:
                    found = "refused by both" if "error" in report else "refused by dockerd"
                elif "error" in report:
                    found = "refused by us"
                else:
                    diff, size = theirs
                    roots = [(path.stat().st_mode, path.stat().st_uid) for path in (worker.diff, diff)]
                    same = look(worker.diff) == look(diff) and size == report["size_bytes"] and roots[0] == roots[1]
                    found = "same" if same else "different"
                if found != expected:
                    wrong[name] = (found, report)

    assert wrong == {}
