"""Copying between two roots: everything is kept, nothing leads out."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.worker.conftest import Worker
from tests.worker.test_unpack import snapshot

pytestmark = pytest.mark.root


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The root of an image with a directory /data."""
    data = tmp_path / "image/data"
    (data / "sub/empty").mkdir(parents=True)
    (data / "sub/file").write_bytes(os.urandom(100_000))
    os.chown(data / "sub/file", 3, 4)
    (data / "sub/file").chmod(0o4711)
    os.setxattr(data / "sub/file", "user.note", b"x\0y")
    os.setxattr(data / "sub/file", "security.capability", struct.pack("<IIIII", 0x02000000, 1 << 13, 0, 0, 0))
    os.link(data / "sub/file", data / "same")
    (data / "link").symlink_to("/etc/shadow")
    os.link(data / "link", data / "link2", follow_symlinks=False)
    os.lchown(data / "link", 9, 9)
    os.mkfifo(data / "fifo", 0o640)
    os.mknod(data / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with open(data / "holes", "wb") as file:
        file.seek(50 << 20)
        file.write(b"end")
        file.truncate(60 << 20)
    os.chown(data, 7, 8)
    data.chmod(0o2750)
    for number, path in enumerate(sorted(data.rglob("*"))):
        os.utime(path, ns=(5, 1_500_000_000_123_456_789 + number), follow_symlinks=False)
    os.utime(data, ns=(6, 1_400_000_000_000_000_001))
    return tmp_path / "image"


def copy(worker: Worker, image: Path, source: str = "/data", **more: object) -> dict[str, Any]:
    destination = worker.directory / "volume"
    destination.mkdir(exist_ok=True)
    return worker.run(
        "copy",
        source_root=str(image),
        source=source,
        destination_root=str(destination),
        destination="/",
        **more,
    )


def test_everything_about_a_tree_is_kept(worker: Worker, image: Path) -> None:
    report = copy(worker, image)

    volume = worker.directory / "volume"
    assert snapshot(volume) == snapshot(image / "data")
    root, expected = volume.stat(), (image / "data").stat()
    assert (root.st_mode, root.st_uid, root.st_gid, root.st_mtime_ns) == (
        expected.st_mode, expected.st_uid, expected.st_gid, expected.st_mtime_ns,
    )  # fmt: skip
    assert (volume / "holes").stat().st_blocks < 1000
    assert report == {"copied": True, "entries": 9, "size_bytes": 100_000 + (60 << 20)}


def test_a_volume_with_something_in_it_is_left_alone(worker: Worker, image: Path) -> None:
    (worker.directory / "volume").mkdir()
    (worker.directory / "volume/mine").touch()

    assert copy(worker, image, if_empty=True) == {"copied": False, "entries": 0, "size_bytes": 0}
    assert os.listdir(worker.directory / "volume") == ["mine"]


def test_links_in_the_image_lead_to_the_image(worker: Worker, image: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/host").touch()
    (image / "absolute").symlink_to("/data")
    (image / "upwards").symlink_to("../../../data")

    for number, name in enumerate(("/absolute", "/upwards", "/data/../../data")):
        (tmp_path / str(number)).mkdir()
        other = Worker(tmp_path / str(number))
        assert copy(other, image, name)["entries"] == 9
        assert not (other.directory / "volume/host").exists()


def test_a_source_that_is_no_directory_is_not_found(worker: Worker, image: Path) -> None:
    for name in ("/nothing", "/data/same", "/data/link"):
        assert copy(worker, image, name)["error"]["kind"] == "NotFound"


def test_sockets_are_left_out_and_names_are_bytes(worker: Worker, image: Path) -> None:
    (image / "odd").mkdir()
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(str(image / "odd/sock"))
    (image / "odd" / os.fsdecode(b"\xff\n")).write_text("x")

    copy(worker, image, "/odd")

    assert os.listdir(os.fsencode(worker.directory / "volume")) == [b"\xff\n"]


def test_a_full_disk_says_so(worker: Worker, image: Path) -> None:
    import subprocess

    (worker.directory / "volume").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", worker.directory / "volume"], check=True)
    try:
        error = copy(worker, image)["error"]
    finally:
        subprocess.run(["umount", "-l", worker.directory / "volume"], check=True)

    assert error["message"].endswith("no space left on device")


def test_arguments_are_checked(worker: Worker) -> None:
    assert worker.run("copy", source="/x")["error"]["kind"] == "InvalidParameter"
