"""Packing: the exact tar of an unpacked layer, or a new and repeatable one of a directory."""

from __future__ import annotations

import gzip
import io
import os
import socket
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.core import tars
from tests.worker.conftest import Worker, sha256
from tests.worker.test_unpack import is_opaque, is_whiteout, snapshot

pytestmark = pytest.mark.root

TAR = (
    tars.directory(b"d/") + tars.file(b"d/f", b"hello" * 1000) + tars.symlink(b"l", b"d/f") + tars.link(b"h", b"d/f")
    + tars.file(b"d/f", b"hello again") + tars.file(b".wh.gone") + tars.END + bytes(8192)
)  # fmt: skip


def names(tar: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return archive.getnames()


# -- exact --


def test_compressed_anew_it_is_still_the_layer(worker: Worker) -> None:
    worker.unpack(TAR)

    blob = worker.pack(compression="gzip")

    assert gzip.decompress(blob) == TAR
    assert worker.report["diff_id"] == sha256(TAR)
    assert worker.report["tar_size"] == len(TAR)


def test_without_output_it_only_measures(worker: Worker) -> None:
    unpacked = worker.unpack(TAR)

    report = worker.run("pack", directory=str(worker.snapshot), diff_id=sha256(TAR))

    assert report["size_bytes"] == unpacked["size_bytes"] == 5 * 1000 + len("hello again") + len("d/f")
    assert (report["diff_id"], report["tar_size"]) == (sha256(TAR), len(TAR))


def test_a_file_that_was_changed_or_removed_is_data_loss_by_name(worker: Worker) -> None:
    worker.unpack(TAR)
    path = worker.diff / "d/f"

    path.write_bytes(b"HELLO again")
    changed = worker.run("pack", directory=str(worker.snapshot))["error"]
    path.unlink()
    removed = worker.run("pack", directory=str(worker.snapshot))["error"]
    path.symlink_to("/etc/passwd")
    linked = worker.run("pack", directory=str(worker.snapshot))["error"]

    assert changed == {"kind": "DataLoss", "message": "d/f was changed after it was unpacked"}
    assert removed == {"kind": "DataLoss", "message": "d/f is gone: the layer's tar cannot be rebuilt"}
    assert linked == removed


def test_another_diff_id_than_expected_is_data_loss(worker: Worker) -> None:
    worker.unpack(TAR)

    error = worker.run("pack", directory=str(worker.snapshot), diff_id="sha256:0")["error"]

    assert error["kind"] == "DataLoss"


def test_a_damaged_tar_split_is_data_loss(worker: Worker) -> None:
    worker.unpack(TAR)
    path = worker.snapshot / "tar-split.zst"
    whole = path.read_bytes()
    for damaged in (whole[:-5], b"", b"nonsense" * 10):
        path.write_bytes(damaged)
        assert worker.run("pack", directory=str(worker.snapshot))["error"]["kind"] == "DataLoss"


def test_a_reader_that_goes_away_is_an_error(worker: Worker) -> None:
    worker.unpack(tars.file(b"big", bytes(3_000_000)) + tars.END)
    reading, writing = os.pipe()
    os.close(reading)

    error = worker.run("pack", directory=str(worker.snapshot), output=writing)["error"]
    os.close(writing)

    assert "broken pipe" in error["message"]


# -- fresh --


def fill(directory: Path) -> None:
    """A container's changes, as overlayfs leaves them."""
    (directory / "etc").mkdir(parents=True)
    (directory / "etc/conf").write_text("changed")
    os.chown(directory / "etc/conf", 1, 70_000_000)
    os.mknod(directory / "etc/removed", stat.S_IFCHR, 0)
    (directory / "var").mkdir(mode=0o711)
    os.setxattr(directory / "var", "trusted.overlay.opaque", b"y")
    os.setxattr(directory / "var", "trusted.overlay.origin", b"whatever")
    (directory / "var/new").write_bytes(os.urandom(5000))
    os.link(directory / "var/new", directory / "var/same")
    os.setxattr(directory / "var/new", "user.note", b"\0kept")
    (directory / "var/link").symlink_to("new")
    os.mkfifo(directory / "var/fifo")
    os.mknod(directory / "var/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (directory / ("ü" * 60)).touch()
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(str(directory / "var/sock"))
    for number, path in enumerate(sorted(directory.rglob("*"))):
        os.utime(path, (number, 1_600_000_000 + number), follow_symlinks=False)


def test_a_fresh_tar_unpacks_to_the_same_layer(worker: Worker, tmp_path: Path) -> None:
    fill(worker.diff)

    tar = worker.pack(fresh=True)
    report = dict(worker.report)
    (tmp_path / "copy").mkdir()
    copy = Worker(tmp_path / "copy")
    copy.unpack(tar)

    (worker.diff / "var/sock").unlink()
    os.removexattr(worker.diff / "var", "trusted.overlay.origin")
    os.utime(worker.diff / "var", (1, (copy.diff / "var").stat().st_mtime))
    os.utime(copy.diff / "etc/removed", (1, (worker.diff / "etc/removed").lstat().st_mtime))  # as dockerd: not set
    assert snapshot(copy.diff) == snapshot(worker.diff)
    assert is_whiteout(copy.diff / "etc/removed")
    assert is_opaque(copy.diff / "var")
    assert report["size_bytes"] == len("changed") + 5000 + len("new")
    assert report["entries"] == len(names(tar))


def test_a_fresh_tar_is_sorted_repeatable_and_can_be_rebuilt(worker: Worker) -> None:
    fill(worker.diff)

    first = worker.pack(fresh=True)
    again = worker.pack(fresh=True)
    exact = worker.pack()

    assert first == again == exact
    found = names(first)
    opaque = "var/.wh..wh..opq"  # goes first, before what it must not hide
    assert found.index(opaque) == found.index("var") + 1
    found.remove(opaque)
    assert found == sorted(found, key=lambda name: name.replace(".wh.", "").encode().split(b"/"))
    listed = subprocess.run(["tar", "-tf", "-"], input=first, capture_output=True, check=True).stdout
    assert len(listed.splitlines()) == len(found) + 1


def test_a_container_that_changed_nothing_is_an_empty_tar(worker: Worker) -> None:
    worker.diff.mkdir()

    assert worker.pack(fresh=True) == tars.END
    assert worker.report["diff_id"] == "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"


def test_a_file_whose_content_overlayfs_keeps_elsewhere_is_refused(worker: Worker) -> None:
    worker.diff.mkdir()
    (worker.diff / "moved").mkdir()
    os.setxattr(worker.diff / "moved", "trusted.overlay.redirect", b"/elsewhere")

    error = worker.run("pack", directory=str(worker.snapshot), fresh=True)["error"]

    assert error["kind"] == "Unsupported"
    assert "redirect_dir=off" in error["message"]


def test_links_in_the_directory_are_not_followed(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    worker.diff.mkdir()
    (worker.diff / "l").symlink_to(tmp_path)
    (worker.diff / "f").symlink_to(tmp_path / "secret")

    tar = worker.pack(fresh=True)

    assert names(tar) == ["f", "l"]
    assert b"secret\0" not in tar.replace(os.fsencode(tmp_path / "secret"), b"")
