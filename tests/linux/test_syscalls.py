"""Mounts and confined opens, on the real kernel."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from balenapy.linux import syscalls

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def make_layers(base: Path, count: int) -> list[Path]:
    layers = []
    for number in range(count):
        layer = base / f"{number:064x}" / "diff"
        layer.mkdir(parents=True)
        (layer / f"file{number}").write_text(str(number))
        (layer / "same").write_text(str(number))
        layers.append(layer)
    return layers


@root_only
@pytest.mark.parametrize("count", [1, 2, 127])
def test_an_overlay_of_many_layers_shows_all_of_them(tmp_path: Path, count: int) -> None:
    layers = make_layers(tmp_path, count)
    target = tmp_path / "rootfs"
    upper, work = tmp_path / "up,per", tmp_path / "wo:rk"
    for path in (target, upper, work):
        path.mkdir()
    syscalls.mount_overlay(target, layers, upper, work)
    try:
        names = sorted(os.listdir(target))
        top = (target / "same").read_text()
        (target / "new").write_text("x")
    finally:
        syscalls.umount2(target)

    assert sorted([f"file{n}" for n in range(count)] + ["same"]) == names
    assert top == "0"
    assert (upper / "new").read_text() == "x"
    assert not syscalls.is_mount_point(target)


@root_only
@pytest.mark.parametrize("count", [1, 3])
def test_an_overlay_without_upper_is_read_only(tmp_path: Path, count: int) -> None:
    layers = make_layers(tmp_path, count)
    target = tmp_path / "view"
    target.mkdir()
    syscalls.mount_overlay(target, layers)
    try:
        assert syscalls.is_mount_point(target)
        with pytest.raises(OSError) as caught:
            (target / "new").write_text("x")
    finally:
        syscalls.umount2(target)

    assert caught.value.errno == errno.EROFS


@root_only
def test_unmounting_what_is_not_mounted_is_no_error(tmp_path: Path) -> None:
    assert not syscalls.unmount_if_mounted(tmp_path)
    assert not syscalls.unmount_if_mounted(tmp_path / "gone")


def by_openat2(root: Path, path: str, flags: int, mode: int = 0) -> int:
    return syscalls.open_in_root(root, path, flags, mode)


def by_steps(root: Path, path: str, flags: int, mode: int = 0) -> int:
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        return syscalls.open_in_root_by_steps(root_fd, os.fsencode(path), flags, mode)
    finally:
        os.close(root_fd)


@pytest.mark.parametrize("way", [by_openat2, by_steps])
@pytest.mark.parametrize(
    "path",
    ["etc/passwd", "/etc/passwd", "../../etc/passwd", "a/../etc/passwd", "abs/passwd", "up/etc/passwd"],
)
def test_no_path_leads_out_of_the_root(tmp_path: Path, way, path: str) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "a").mkdir()
    (root / "etc/passwd").write_text("inside")
    (root / "abs").symlink_to("/etc")
    (root / "up").symlink_to("../../../../..")
    fd = way(root, path, os.O_RDONLY)
    with open(fd) as file:
        assert file.read() == "inside"


@pytest.mark.parametrize("way", [by_openat2, by_steps])
def test_loops_and_missing_names_are_told_by_errno(tmp_path: Path, way) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    for path, number in (("loop", errno.ELOOP), ("gone", errno.ENOENT), ("file/x", errno.ENOTDIR)):
        with pytest.raises(OSError) as caught:
            way(tmp_path, path, os.O_RDONLY)
        assert number == caught.value.errno


@pytest.mark.parametrize("way", [by_openat2, by_steps])
def test_a_file_can_be_created_and_the_root_itself_opened(tmp_path: Path, way) -> None:  # type: ignore[no-untyped-def]
    os.close(way(tmp_path, "/new", os.O_WRONLY | os.O_CREAT, 0o600))
    fd = way(tmp_path, "/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.listdir(fd) == ["new"]
    finally:
        os.close(fd)
