"""Unpacking layers: what dockerd makes of a tar, and every tar that wants to do harm."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import subprocess
import tarfile
import threading
import zlib
from pathlib import Path

import pytest
import zstandard

from tests.core import tars
from tests.worker.conftest import Worker

pytestmark = pytest.mark.root

NOW = 1_600_000_000_000_000_000  # the mtime that tars.header writes


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def snapshot(directory: Path) -> dict[str, tuple[object, ...]]:
    """Everything about a tree that a layer can say."""
    found: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, str] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(directory))
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        xattrs = tuple(
            (attribute, os.getxattr(path, attribute, follow_symlinks=False))
            for attribute in sorted(os.listxattr(path, follow_symlinks=False))
        )
        found[name] = (
            status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev,
            inodes.setdefault(status.st_ino, name), content, xattrs,
        )  # fmt: skip
    return found


# -- ordinary layers --


def test_an_ordinary_layer_is_what_gnu_tar_makes_of_it(worker: Worker, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "usr/bin").mkdir(parents=True)
    (source / "usr/bin/tool").write_bytes(os.urandom(300_000))
    os.chown(source / "usr/bin/tool", 12, 34)
    (source / "usr/bin/tool").chmod(0o4755)
    os.link(source / "usr/bin/tool", source / "usr/bin/tool2")
    os.setxattr(source / "usr/bin/tool", "user.color", b"red\0green")
    (source / "etc").mkdir(mode=0o750)
    (source / "etc/empty").touch()
    (source / "etc" / ("long" * 50)).write_text("x")
    (source / "etc/link").symlink_to("../usr/bin/tool")
    (source / "etc/dangling").symlink_to("/nowhere/" + "far/" * 40)
    os.lchown(source / "etc/link", 5, 6)
    os.mkfifo(source / "etc/fifo", 0o622)
    os.mknod(source / "etc/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(source / "etc/disk", stat.S_IFBLK | 0o660, os.makedev(259, 7))
    (source / "tmp").mkdir()
    (source / "tmp").chmod(0o1777)
    (source / "sgid").mkdir()
    os.chown(source / "sgid", 0, 77)
    (source / "sgid").chmod(0o2775)
    (source / "sgid/plain").write_text("of root, not of group 77")
    os.chown(source / "sgid/plain", 0, 0)
    for number, path in enumerate(sorted(source.rglob("*"))):
        os.utime(path, ns=(NOW, NOW + number * 1_111_111_111), follow_symlinks=False)
    os.utime(source / "etc", (1, 1))
    for form in ("pax", "gnu"):
        tar = subprocess.run(
            ["tar", f"--format={form}", *(["--xattrs"] if form == "pax" else []), "-C", source, "-c", "."],
            check=True, capture_output=True,
        ).stdout  # fmt: skip
        target = Worker(tmp_path / form if (tmp_path / form).mkdir() is None else tmp_path)
        expected = tmp_path / f"expected-{form}"
        expected.mkdir()
        subprocess.run(["tar", "--xattrs", "-C", expected, "-xp"], input=tar, check=True)

        report = target.unpack(tar)

        assert snapshot(target.diff) == snapshot(expected)
        links = sum(len(os.readlink(path)) for path in source.rglob("*") if path.is_symlink())
        assert report["size_bytes"] == 300_000 + 1 + 24 + links
        assert report["disk_bytes"] >= 300_000
        assert report["entries"] == len(list(source.rglob("*"))) + 1
        assert not (target.snapshot / "displaced").exists()


@pytest.mark.parametrize(
    "compress",
    [
        lambda data: data,
        gzip.compress,
        lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + bytes(100),
        lambda data: zstandard.ZstdCompressor().compress(data),
        lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data[:700])
        + struct.pack("<II", 0x184D2A53, 3) + b"abc"
        + zstandard.ZstdCompressor(level=19, write_content_size=False).compress(data[700:]),
        bz2.compress,
        lambda data: bz2.compress(data[:99]) + bz2.compress(data[99:]),
        lzma.compress,
    ],
    ids=["plain", "gzip", "gzip members", "zstd", "zstd frames", "bzip2", "bzip2 streams", "xz"],
)  # fmt: skip
def test_compression_is_told_by_content(worker: Worker, compress: object) -> None:
    tar = tars.file(b"a", os.urandom(2000)) + tars.file(b"zeros", bytes(3_000_000)) + tars.END

    worker.unpack(tar, compress(tar))  # type: ignore[operator]

    assert sorted(os.listdir(worker.diff)) == ["a", "zeros"]


def test_times_of_directories_are_those_of_the_archive(worker: Worker) -> None:
    worker.unpack(
        tars.directory(b"d", mtime=1000) + tars.directory(b"d/e", mtime=2000) + tars.file(b"d/e/f", b"x", mtime=3000)
        + tars.directory(b"d/e/g", mtime=4000) + tars.END
    )  # fmt: skip

    assert [(worker.diff / name).stat().st_mtime for name in ("d", "d/e", "d/e/f", "d/e/g")] == [
        1000,
        2000,
        3000,
        4000,
    ]


def test_times_beyond_what_dockerd_sets_are_the_epoch(worker: Worker) -> None:
    worker.unpack(
        tars.pax((b"mtime", b"-5")) + tars.header(b"before")
        + tars.pax((b"mtime", b"99999999999")) + tars.header(b"after") + tars.END
    )  # fmt: skip

    assert (worker.diff / "before").stat().st_mtime == 0
    assert (worker.diff / "after").stat().st_mtime == 0


def test_parents_that_the_archive_does_not_name_are_made(worker: Worker) -> None:
    worker.unpack(tars.file(b"a/b/c/f", b"x") + tars.symlink(b"l/i/n/k", b"x") + tars.END)

    assert mode(worker.diff / "a/b") == 0o755
    assert (worker.diff / "a/b/c/f").read_bytes() == b"x"


def test_owner_is_set_before_mode_so_that_setuid_and_capabilities_stay(worker: Worker) -> None:
    capability = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw+ep
    worker.unpack(
        tars.pax((b"SCHILY.xattr.security.capability", capability))
        + tars.file(b"ping", b"x", mode=0o6755, uid=7, gid=8) + tars.END
    )  # fmt: skip

    assert mode(worker.diff / "ping") == 0o6755
    assert (worker.diff / "ping").stat().st_uid == 7
    assert os.getxattr(worker.diff / "ping", "security.capability") == capability


def test_group_and_acl_of_a_directory_do_not_leak_into_what_is_made_in_it(worker: Worker) -> None:
    everything = 0xFFFFFFFF
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, permissions, everything) for tag, permissions in ((1, 7), (4, 7), (32, 7))
    )
    worker.unpack(
        tars.directory(b"g", 0o2770, gid=99) + tars.file(b"g/f", b"x", mode=0o640) + tars.directory(b"g/d", 0o700)
        + tars.pax((b"SCHILY.xattr.system.posix_acl_default", acl)) + tars.directory(b"a")
        + tars.file(b"a/f", b"x", mode=0o600) + tars.END
    )  # fmt: skip

    for name, permissions in (("g/f", 0o640), ("g/d", 0o700), ("a/f", 0o600)):
        assert ((worker.diff / name).stat().st_gid, mode(worker.diff / name)) == (0, permissions)


def test_the_root_entry_dot_is_left_alone_and_slash_is_applied_as_by_dockerd(worker: Worker) -> None:
    worker.unpack(tars.directory(b"./", 0o700, uid=5) + tars.END)
    assert (mode(worker.diff), worker.diff.stat().st_uid) == (0o755, 0)

    (worker.snapshot / "tar-split.zst").unlink()
    worker.unpack(tars.directory(b"/", 0o711, uid=5, mtime=77) + tars.END)
    assert (mode(worker.diff), worker.diff.stat().st_uid, worker.diff.stat().st_mtime) == (0o711, 5, 77)


def test_absolute_names_lie_below_the_root(worker: Worker) -> None:
    worker.unpack(tars.file(b"/etc/x", b"1") + tars.link(b"/y", b"/etc/x") + tars.file(b"/../z", b"2") + tars.END)

    assert (worker.diff / "etc/x").stat().st_nlink == 2
    assert (worker.diff / "z").read_bytes() == b"2"


def test_names_are_bytes(worker: Worker) -> None:
    worker.unpack(tars.file(b"\xff\xfe", b"1") + tars.file("ü".encode(), b"2") + tars.file(b"a\nb", b"3") + tars.END)

    assert set(os.listdir(os.fsencode(worker.diff))) == {b"\xff\xfe", "ü".encode(), b"a\nb"}


def test_what_follows_the_end_belongs_to_the_diff_id(worker: Worker) -> None:
    worker.unpack(tars.file(b"a", b"1") + tars.END + bytes(9728) + b"junk" + tars.file(b"b", b"2"))

    assert os.listdir(worker.diff) == ["a"]


def test_the_page_cache_of_large_files_is_given_back(worker: Worker) -> None:
    layer = tars.file(b"large", os.urandom(3 << 20)) + tars.file(b"small", b"x" * 5000) + tars.END
    report = worker.run("unpack", layer, directory=str(worker.snapshot))

    assert "error" not in report
    assert resident_bytes(worker.diff / "large") == 0
    assert resident_bytes(worker.diff / "small") > 0


def resident_bytes(path: Path) -> int:
    """What of a file is in the page cache (util-linux)."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_an_empty_layer(worker: Worker) -> None:
    report = worker.unpack(tars.END)

    assert report["diff_id"] == "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
    assert (report["entries"], report["size_bytes"]) == (0, 0)


def test_the_worker_reads_as_fast_as_it_is_fed(worker: Worker) -> None:
    """Bytes that arrive one by one make the same layer."""
    tar = tars.pax((b"path", b"p" * 150)) + tars.file(b"p", b"x" * 5) + tars.file(b"q", b"y" * 600) + tars.END
    reading, writing = os.pipe()

    def trickle() -> None:
        with open(writing, "wb", buffering=0) as pipe:
            for byte in gzip.compress(tar):
                pipe.write(bytes((byte,)))

    feeder = threading.Thread(target=trickle)
    feeder.start()
    from balenapy.engine.workers import python_command

    done = subprocess.run(
        [*python_command(), "unpack", f'{{"directory": "{worker.snapshot}"}}'],
        stdin=reading, capture_output=True, check=True,
    )  # fmt: skip
    feeder.join()
    os.close(reading)

    assert b'"entries": 2' in done.stdout
    assert worker.pack() == tar


# -- whiteouts --


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(path: Path) -> bool:
    try:
        return os.getxattr(path, "trusted.overlay.opaque") == b"y"
    except OSError:
        return False


def test_whiteouts_become_what_overlayfs_reads(worker: Worker) -> None:
    report = worker.unpack(
        tars.file(b"etc/.wh.passwd") + tars.file(b".wh.top") + tars.directory(b"var")
        + tars.file(b"var/.wh..wh..opq") + tars.file(b"new/dir/.wh..wh..opq") + tars.END
    )  # fmt: skip

    assert is_whiteout(worker.diff / "etc/passwd")
    assert is_whiteout(worker.diff / "top")
    assert is_opaque(worker.diff / "var")
    assert is_opaque(worker.diff / "new/dir")
    assert not is_opaque(worker.diff / "new")
    assert [str(p.relative_to(worker.diff)) for p in worker.diff.rglob("*") if ".wh." in p.name] == []
    assert report["size_bytes"] == 0


def test_content_of_a_whiteout_is_kept_for_the_tar_only(worker: Worker) -> None:
    worker.unpack(tars.file(b".wh.x", b"why not" * 1000) + tars.END)

    assert is_whiteout(worker.diff / "x")


def test_a_whiteout_hides_only_what_is_below(worker: Worker) -> None:
    """The OCI image spec: a layer's own files are not hidden by its whiteouts, whatever the order."""
    worker.unpack(
        tars.file(b"a", b"kept") + tars.file(b".wh.a") + tars.directory(b"d") + tars.file(b"d/f", b"kept")
        + tars.file(b".wh.d") + tars.file(b".wh.b") + tars.file(b"b", b"new") + tars.file(b".wh.e")
        + tars.directory(b"e") + tars.END
    )  # fmt: skip

    assert (worker.diff / "a").read_bytes() == b"kept"
    assert (worker.diff / "d/f").read_bytes() == b"kept"
    assert is_opaque(worker.diff / "d")
    assert (worker.diff / "b").read_bytes() == b"new"
    assert is_opaque(worker.diff / "e")


@pytest.mark.parametrize("name", [b".wh.", b".wh..", b".wh...", b"a/.wh.", b"a/.wh..", b"a/.wh...", b"a/b/.wh.../"])
def test_a_whiteout_of_no_name_or_of_a_parent_is_refused(worker: Worker, name: bytes) -> None:
    assert "invalid whiteout" in worker.refuse(tars.directory(b"a") + tars.file(name) + tars.END)


def test_files_of_aufs_itself_are_left_out(worker: Worker) -> None:
    worker.unpack(
        tars.file(b".wh..wh.aufs") + tars.directory(b".wh..wh.plnk") + tars.file(b".wh..wh.plnk/1.2", b"x")
        + tars.directory(b".wh..wh.orph") + tars.END
    )  # fmt: skip

    assert os.listdir(worker.diff) == []


def test_a_layer_cannot_tell_overlayfs_where_its_files_are(worker: Worker) -> None:
    worker.unpack(
        tars.pax(
            (b"SCHILY.xattr.trusted.overlay.redirect", b"/secret"),
            (b"SCHILY.xattr.trusted.overlay.opaque", b"y"),
            (b"SCHILY.xattr.user.ok", b"1"),
        )
        + tars.directory(b"d") + tars.END
    )  # fmt: skip

    assert os.listxattr(worker.diff / "d") == ["user.ok"]


# -- entries that replace entries --


def test_a_path_that_occurs_twice_has_its_last_content_and_loses_none(worker: Worker) -> None:
    report = worker.unpack(tars.file(b"a", b"first" * 200) + tars.file(b"a", b"second") + tars.file(b"a") + tars.END)

    assert (worker.diff / "a").read_bytes() == b""
    assert len(os.listdir(worker.snapshot / "displaced")) == 2
    assert report["size_bytes"] == 0


def test_files_directories_and_links_replace_each_other(worker: Worker) -> None:
    worker.unpack(
        tars.file(b"file-dir", b"1") + tars.directory(b"file-dir") + tars.file(b"file-dir/x", b"2")
        + tars.directory(b"dir-file") + tars.file(b"dir-file/a/b/c", b"3") + tars.symlink(b"dir-file/a/l", b"/")
        + tars.directory(b"dir-file/a/empty") + tars.file(b"dir-file", b"4")
        + tars.symlink(b"link-dir", b"/etc") + tars.directory(b"link-dir") + tars.file(b"link-dir/y", b"5")
        + tars.symlink(b"link-file", b"file-dir/x") + tars.file(b"link-file", b"6")
        + tars.file(b"file-link", b"7") + tars.symlink(b"file-link", b"link-file")
        + tars.header(b"fifo", b"6") + tars.file(b"fifo", b"8")
        + tars.directory(b"dir-link") + tars.file(b"dir-link/z", b"9") + tars.symlink(b"dir-link", b"file-dir")
        + tars.END
    )  # fmt: skip

    assert (worker.diff / "file-dir/x").read_bytes() == b"2"
    assert (worker.diff / "dir-file").read_bytes() == b"4"
    assert (worker.diff / "link-dir/y").read_bytes() == b"5"
    assert (worker.diff / "link-file").read_bytes() == b"6"
    assert os.readlink(worker.diff / "file-link") == "link-file"
    assert (worker.diff / "fifo").read_bytes() == b"8"
    assert os.readlink(worker.diff / "dir-link") == "file-dir"
    assert {path.name for path in worker.diff.iterdir()} == {
        "file-dir", "dir-file", "link-dir", "link-file", "file-link", "fifo", "dir-link",
    }  # fmt: skip


def test_a_directory_twice_is_merged_and_has_the_last_mode(worker: Worker) -> None:
    worker.unpack(
        tars.directory(b"d", 0o700, uid=3) + tars.file(b"d/f", b"x") + tars.directory(b"d", 0o511, mtime=9) + tars.END
    )

    assert (worker.diff / "d/f").exists()
    status = (worker.diff / "d").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime) == (0o511, 0, 9)


def test_replacing_one_name_of_a_file_leaves_its_other_names_alone(worker: Worker) -> None:
    worker.unpack(
        tars.file(b"a", b"shared") + tars.link(b"b", b"a") + tars.link(b"c", b"a")
        + tars.file(b"a", b"other") + tars.file(b"b", b"else") + tars.END
    )  # fmt: skip

    assert (worker.diff / "c").read_bytes() == b"shared"
    assert (worker.diff / "a").read_bytes() == b"other"


def test_the_last_name_of_a_file_says_its_mode(worker: Worker) -> None:
    worker.unpack(
        tars.file(b"a", b"x", mode=0o600) + tars.link(b"b", b"a", mode=0o4711, uid=9, mtime=5)
        + tars.symlink(b"s", b"a") + tars.link(b"s2", b"s", mode=0o777) + tars.END
    )  # fmt: skip

    status = (worker.diff / "a").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime) == (0o4711, 9, 5)
    assert (worker.diff / "s2").is_symlink()


def test_replacing_a_directory_deeper_than_a_path_may_be_long(worker: Worker) -> None:
    """Nested through links to a depth that no path, recursion or number of descriptors reaches."""
    step = b"/".join([b"d"] * 1100)
    tar = tars.gnu_long(b"L", step) + tars.directory(b"d")
    for number in range(2):
        tar += tars.gnu_long(b"K", (b"l%d/" % (number - 1) if number else b"") + step) + tars.symlink(
            b"l%d" % number, b"x"
        )
        tar += tars.gnu_long(b"L", b"l%d/" % number + step) + tars.directory(b"d")
    tar += tars.gnu_long(b"L", b"l1/" + step + b"/f") + tars.file(b"f", b"deep")

    worker.unpack(tar + tars.file(b"d", b"flat") + tars.END)

    assert (worker.diff / "d").read_bytes() == b"flat"
    assert os.listdir(worker.snapshot / "displaced") == ["4-" + f"{zlib.crc32(b'deep'):08x}"]


# -- attempts to get out --


@pytest.fixture
def outside(worker: Worker) -> Path:
    """A file beside the snapshot that must stay as it is."""
    path = worker.directory / "outside"
    path.write_text("untouched")
    return path


@pytest.mark.parametrize("name", [b"../x", b"a/../../x", b"..", b"./../x", b"a/b/../../../x", b"../" * 60 + b"tmp/x"])
def test_a_name_above_the_root_is_refused_by_name(worker: Worker, outside: Path, name: bytes) -> None:
    before = sorted(os.listdir(worker.directory))

    message = worker.refuse(tars.gnu_long(b"L", name) + tars.file(b"x", b"evil") + tars.END)

    assert f"'{name.decode()}' is outside of the archive's root" in message
    assert sorted(os.listdir(worker.directory)) == before
    assert os.listdir(worker.diff) == []


def test_writing_through_a_link_stays_inside(worker: Worker, outside: Path, tmp_path: Path) -> None:
    target = os.fsencode(tmp_path)
    worker.unpack(
        tars.directory(target) + tars.symlink(b"abs", target) + tars.symlink(b"up", b"../" * 40 + target)
        + tars.file(b"abs/outside", b"evil") + tars.file(b"up/outside2", b"evil") + tars.END
    )  # fmt: skip

    assert outside.read_text() == "untouched"
    assert not (tmp_path / "outside2").exists()
    assert (Path(f"{worker.diff}{tmp_path}") / "outside").read_text() == "evil"


def test_writing_through_a_link_to_nowhere_is_refused(worker: Worker, outside: Path) -> None:
    message = worker.refuse(
        tars.symlink(b"l", os.fsencode(outside.parent)) + tars.file(b"l/outside", b"evil") + tars.END
    )

    assert message.endswith("no such file or directory")
    assert outside.read_text() == "untouched"


def test_a_file_over_a_link_replaces_the_link(worker: Worker, outside: Path) -> None:
    worker.unpack(
        tars.symlink(b"l", b"../../outside") + tars.file(b"l", b"evil") + tars.file(b"t", b"kept")
        + tars.symlink(b"m", b"t") + tars.file(b"m", b"new") + tars.END
    )  # fmt: skip

    assert outside.read_text() == "untouched"
    assert (worker.diff / "l").read_text() == "evil"
    assert (worker.diff / "t").read_text() == "kept"


@pytest.mark.parametrize("target", [b"../outside", b"a/../../outside", b"", b".", b"/"])
def test_a_hard_link_to_what_is_outside_is_refused(worker: Worker, outside: Path, target: bytes) -> None:
    worker.refuse(tars.link(b"x", target) + tars.END)

    assert outside.stat().st_nlink == 1
    assert not (worker.diff / "x").exists()


def test_a_hard_link_by_absolute_name_or_through_a_link_stays_inside(worker: Worker, outside: Path) -> None:
    message = worker.refuse(tars.symlink(b"up", b"../..") + tars.link(b"x", os.fsencode(outside)) + tars.END)
    assert message.endswith("no such file or directory")

    other = Worker(worker.directory / "other" if (worker.directory / "other").mkdir() is None else worker.directory)
    message = other.refuse(tars.symlink(b"up", b"../../..") + tars.link(b"x", b"up/outside") + tars.END)
    assert message.endswith("no such file or directory")
    assert outside.stat().st_nlink == 1


def test_a_hard_link_to_a_link_is_the_link_and_not_what_it_names(worker: Worker, outside: Path) -> None:
    worker.unpack(
        tars.symlink(b"l", os.fsencode(outside)) + tars.link(b"x", b"l") + tars.file(b"x", b"evil") + tars.END
    )

    assert outside.read_text() == "untouched"
    assert (worker.diff / "x").read_text() == "evil"
    assert (worker.diff / "l").is_symlink()


def test_an_opaque_mark_or_whiteout_through_a_link_stays_inside(worker: Worker) -> None:
    victim = worker.directory / "victim"
    victim.mkdir()
    (victim / "file").touch()

    worker.refuse(tars.symlink(b"l", os.fsencode(victim)) + tars.file(b"l/.wh.file") + tars.END)
    other = Worker(victim)
    other.refuse(tars.symlink(b"l", os.fsencode(victim)) + tars.file(b"l/.wh..wh..opq") + tars.END)

    assert (victim / "file").is_file()
    assert not is_opaque(victim)


def test_directory_times_are_not_set_through_a_link_that_came_later(worker: Worker, outside: Path) -> None:
    before = outside.parent.stat().st_mtime_ns
    worker.unpack(
        tars.directory(b"d", mtime=5) + tars.directory(b"real", mtime=7) + tars.symlink(b"d", b"real")
        + tars.directory(b"g", mtime=5) + tars.file(b"g", b"now a file", mtime=9) + tars.END
    )  # fmt: skip

    assert (worker.diff / "real").stat().st_mtime == 7
    assert (worker.diff / "g").stat().st_mtime == 9
    assert before <= outside.parent.stat().st_mtime_ns


def test_a_python_library_in_the_layer_is_not_imported(worker: Worker) -> None:
    """After the chroot the layer is what the interpreter would find at its own paths."""
    import encodings

    home = os.path.dirname(os.path.dirname(encodings.__file__))
    evil = b"open('/pwned', 'w')"
    tar = b"".join(
        tars.gnu_long(b"L", os.fsencode(f"{home}/{name}")) + tars.file(b"x", evil)
        for name in ("encodings/idna.py", "encodings/utf_7.py", "linecache.py", "traceback.py", "tokenize.py")
    )

    worker.unpack(tar + tars.END)
    assert not (worker.diff / "pwned").exists()

    other = Worker(worker.directory / "other" if (worker.directory / "other").mkdir() is None else worker.directory)
    other.refuse(tar + b"\x01" * 512)
    assert not (other.diff / "pwned").exists()


# -- lies --


def test_ten_gigabytes_announced_and_not_sent(worker: Worker) -> None:
    before = os.statvfs(worker.directory).f_bavail

    assert worker.refuse(tars.header(b"big", size=10 << 30) + b"x" * 1000) == "unexpected EOF"

    assert before - os.statvfs(worker.directory).f_bavail < (1 << 30) // 4096


@pytest.mark.parametrize("size", [10, 600, 1300, 2023])
def test_a_tar_cut_short(worker: Worker, size: int) -> None:
    tar = tars.directory(b"d") + tars.file(b"d/f", b"x" * 1000)

    assert worker.refuse(tar[:size]) == "unexpected EOF"


@pytest.mark.parametrize(
    "compress", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress, bz2.compress, lzma.compress],
    ids=["gzip", "zstd", "bzip2", "xz"],
)  # fmt: skip
def test_a_compressed_stream_cut_short_or_followed_by_garbage(worker: Worker, compress: object) -> None:
    blob = compress(tars.file(b"a", os.urandom(5000)) + tars.END)  # type: ignore[operator]

    assert worker.refuse(blob[:-1]) == "unexpected EOF"

    for number, damaged in enumerate((blob + b"garbage after the end", blob[:-900] + b"\xff" * 300 + blob[-600:])):
        (directory := worker.directory / str(number)).mkdir()
        Worker(directory).refuse(damaged)


def test_pax_header_of_a_gigabyte(worker: Worker) -> None:
    assert "extended header is too long" in worker.refuse(tars.header(b"x", b"x", size=1 << 30) + b"9" * 10_000)


def test_names_longer_than_the_kernel_takes(worker: Worker) -> None:
    assert worker.refuse(tars.gnu_long(b"L", b"n" * 300) + tars.file(b"n") + tars.END).endswith("file name too long")


def test_a_name_with_a_zero_byte_in_a_long_name_ends_there(worker: Worker) -> None:
    worker.unpack(tars.gnu_long(b"L", b"short\0and more") + tars.file(b"n", b"1") + tars.END)

    assert os.listdir(worker.diff) == ["short"]


@pytest.mark.parametrize(
    ("tar", "message"),
    [
        (tars.pax((b"uid", b"4294967295")) + tars.header(b"f"), "owner 4294967295"),
        (tars.pax((b"gid", b"-1")) + tars.file(b"f", b"x"), "owner -1"),
        (tars.header(b"f", b"7", size=0), "unhandled tar header type 55"),
        (tars.header(b"f", b"V"), "unhandled tar header type 86"),
        (tars.header(b"f", b"S", magic=b"ustar  \0"), "sparse files are not supported: f"),
        (tars.header(b"f", b"3", fields={329: b"\x80" + b"\x7f" * 7}), "f"),
        (tars.pax((b"SCHILY.xattr.user.", b"v")) + tars.header(b"f"), "set xattr user. of /f"),
        (tars.pax((b"SCHILY.xattr.nonsense\n", b"v")) + tars.header(b"f"), ""),
        (tars.pax((b"SCHILY.xattr.user.big", b"v" * 70_000)) + tars.header(b"f"), "argument list too long"),
        (tars.symlink(b"f", b""), "no such file or directory"),
        (tars.gnu_long(b"K", b"a" * 5000) + tars.symlink(b"g", b"a"), "file name too long"),
        (tars.link(b"f", b"missing"), "no such file or directory"),
        (tars.directory(b"d") + tars.link(b"f", b"d"), "operation not permitted"),
        (tars.file(b"f", b"x") + tars.file(b"f/g", b"y"), "not a directory"),
        (b"not a tar at all " * 100, "invalid tar header"),
        (b"\x1f\x8b\x08garbage garbage garbage", "gzip: "),
        (b"\x28\xb5\x2f\xfd\xff\xff\xff\xff\xff" + bytes(600), "zstd: "),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_a_clear_error(worker: Worker, tar: bytes, message: str) -> None:
    if message:
        assert message in worker.refuse(tar + tars.END)
    else:
        worker.unpack(tar + tars.END)  # an xattr the file system does not know is left out, as by dockerd


def test_a_wide_zstd_window_is_refused_before_the_memory_is_taken(worker: Worker) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, write_content_size=False)
    blob = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = blob.compress(tars.file(b"a", b"x")) + blob.flush()

    assert worker.refuse(data).startswith("zstd: ")


def test_a_bomb_is_unpacked_in_bounded_memory(worker: Worker) -> None:
    """500 MB of zeros in little more than 15 kB; the worker may use 384 MiB at all."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    blob = compressor.compress(tars.header(b".wh.x", size=500_000_000))
    for _ in range(500):
        blob += compressor.compress(bytes(1_000_000))
    blob += compressor.compress(bytes(-500_000_000 % 512) + tars.END) + compressor.flush()
    assert len(blob) < 20_000

    report = worker.run("unpack", blob, directory=str(worker.snapshot))

    assert report["entries"] == 1
    assert (worker.snapshot / "tar-split.zst").stat().st_size < 200_000


def test_very_many_entries_take_little_memory(worker: Worker) -> None:
    """10,000 directories, each of whose times waits for the end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(10_000):
            info = tarfile.TarInfo(f"{number % 300}/{number}")
            info.type = tarfile.DIRTYPE
            info.mtime = 5
            tar.addfile(info)

    report = worker.run("unpack", buffer.getvalue(), directory=str(worker.snapshot))

    assert report["entries"] == 10_000
    assert (worker.diff / "7/9907").stat().st_mtime == 5


def test_a_full_disk_says_so_in_the_words_clients_know(worker: Worker, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", small], check=True)
    try:
        message = Worker(small).refuse(tars.file(b"f", bytes(range(256)) * 20_000) + tars.END)
    finally:
        subprocess.run(["umount", "-l", small], check=True)

    assert message == "write /f: no space left on device"


# -- the frame --


def test_the_directory_must_be_there_and_empty(worker: Worker) -> None:
    assert worker.run("unpack")["error"]["kind"] == "InvalidParameter"
    assert worker.run("unpack", directory="relative")["error"]["kind"] == "InvalidParameter"
    assert worker.run("unpack", directory=str(worker.directory / "no"))["error"]["message"].endswith(
        "no such file or directory"
    )
    worker.diff.mkdir()
    (worker.diff / "x").touch()
    assert worker.run("unpack", tars.END, directory=str(worker.snapshot))["error"]["kind"] == "Conflict"


def test_verbs_and_arguments_are_checked(worker: Worker) -> None:
    assert worker.run("nonsense")["error"]["kind"] == "InvalidParameter"
