"""Atomic writes, the trash and the steps they announce."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from balenapy.linux import durable


def test_a_written_file_is_whole_and_no_temporary_stays(tmp_path: Path) -> None:
    durable.write_file(tmp_path / "a", b"one", 0o640)
    durable.write_file(tmp_path / "a", b"two", 0o640)

    assert (tmp_path / "a").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_every_step_is_announced_before_it_happens(tmp_path: Path) -> None:
    seen = []
    durable.listen(lambda name: seen.append((name, os.listdir(tmp_path) != [])))
    try:
        durable.write_file(tmp_path / "a", b"one")
    finally:
        durable.listen(None)

    assert seen == [("write_file", False), ("sync_file", True), ("replace", True), ("sync_directory", True)]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    durable.write_file(tmp_path / "a", b"one")

    def fail(name: str) -> None:
        if name == "replace":
            raise OSError("no")

    durable.listen(fail)
    try:
        with pytest.raises(OSError):
            durable.write_file(tmp_path / "a", b"two")
    finally:
        durable.listen(None)

    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_trash_takes_a_name_twice_and_what_is_gone_is_fine(tmp_path: Path) -> None:
    trash = tmp_path / "trash"
    trash.mkdir()
    for _ in range(2):
        (tmp_path / "d").mkdir()
        assert durable.move_to_trash(tmp_path / "d", trash)

    assert not durable.move_to_trash(tmp_path / "d", trash)
    assert len(os.listdir(trash)) == 2


def test_hard_links_count_once_in_a_tree(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 5000)
    os.link(tmp_path / "a", tmp_path / "d/b")
    (tmp_path / "l").symlink_to("/")

    apparent, disk = durable.tree_size(tmp_path)
    assert apparent == 5000
    assert 8192 <= disk <= 20000
