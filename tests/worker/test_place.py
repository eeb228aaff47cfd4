"""Placing files on an image: where they go, whose they are, what is kept of them."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from balenapy.errors import EngineError
from tests.worker.test_squash import run, shown

pytestmark = pytest.mark.root


class Ground:
    """An image of one layer, a directory of sources, and what was placed."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "image"
        self.sources = directory / "sources"
        self.snapshot = directory / "snapshot"
        (self.image / "etc").mkdir(parents=True)
        (self.image / "etc" / "passwd").write_text("root:x:0:0::/:\nbob:x:7:8::/:\n")
        (self.image / "etc" / "group").write_text("root:x:0:\nstaff:x:9:\n")
        self.sources.mkdir()

    def place(self, destination: str, *paths: str, owner: str = "", **options: Any) -> dict[str, tuple[Any, ...]]:
        """Place, and give what the layer holds."""
        (self.snapshot / "diff").mkdir(parents=True)
        source = {"root": str(self.sources), "paths": paths, "unpack": False, "keep_owner": False, **options}
        run(
            "place",
            {
                "directory": str(self.snapshot),
                "lower": [str(self.image)],
                "destination": destination,
                "sources": [source] if paths else [],
                "owner": owner,
            },
        )
        assert sorted(os.listdir(self.snapshot)) == ["diff", "tar-split.zst"]
        return shown(self.snapshot / "diff")


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


def test_a_file_goes_under_a_name_or_into_a_directory(ground: Ground, tmp_path: Path) -> None:
    (ground.sources / "f").write_text("x")
    assert list(ground.place("/new/name", "f")) == ["new", "new/name"]
    again = Ground(tmp_path / "2")
    (again.sources / "f").write_text("x")
    assert list(again.place("/new/", "f")) == ["new", "new/f"]
    third = Ground(tmp_path / "3")
    (third.sources / "f").write_text("x")
    assert list(third.place("/etc", "f")) == ["etc", "etc/f"]


def test_links_of_the_image_lead_about_in_the_image(ground: Ground, tmp_path: Path) -> None:
    (ground.image / "out").symlink_to("../../../../../../etc/deep")
    (ground.image / "host").symlink_to(tmp_path)
    (ground.sources / "f").write_text("x")
    assert list(ground.place("/out/f", "f")) == ["etc", "etc/deep", "etc/deep/f"]
    second = Ground(tmp_path / "second")
    (second.image / "host").symlink_to(tmp_path / "elsewhere")
    (second.sources / "f").write_text("x")
    placed = second.place("/host/f", "f")
    assert f"{str(tmp_path)[1:]}/elsewhere/f" in placed
    assert not (tmp_path / "elsewhere").exists()


def test_links_of_a_source_lead_about_in_the_source(ground: Ground) -> None:
    (ground.sources / "real").write_text("content")
    (ground.sources / "l").symlink_to("/../real")
    (ground.sources / "d").mkdir()
    (ground.sources / "d" / "inner").symlink_to("/etc/shadow")
    placed = ground.place("/x/", "l", "d")
    assert placed["x/l"][2] == b"content"
    assert placed["x/inner"][3] == "/etc/shadow"  # within a directory a link is copied as it is


def test_owners_and_modes(ground: Ground, tmp_path: Path) -> None:
    program = ground.sources / "program"
    program.write_text("x")
    os.chown(program, 55, 55)
    program.chmod(0o4755)
    mode, owner, *_ = ground.place("/p", "program", owner="bob:staff")["p"]
    assert (oct(mode), owner) == ("0o100755", 7)  # a change of owner takes the bit
    kept = Ground(tmp_path / "kept")
    kept.sources = ground.sources
    mode, owner, *_ = kept.place("/p", "program", keep_owner=True)["p"]
    assert (oct(mode), owner) == ("0o104755", 55)


def test_a_directory_is_made_for_workdir(ground: Ground) -> None:
    assert {path: oct(what[0]) for path, what in ground.place("/a/b").items()} == {"a": "0o40755", "a/b": "0o40755"}


def test_archives_are_unpacked_and_do_not_climb_out(ground: Ground, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("f", "../../../climbs"):
            entry = tarfile.TarInfo(name)
            entry.uid = 12
            tar.addfile(entry)
    (ground.sources / "t").write_bytes(buffer.getvalue())
    placed = ground.place("/in/", "t", unpack=True)
    assert {path: what[1] for path, what in placed.items()} == {"in": 0, "in/climbs": 12, "in/f": 12}
    assert not (tmp_path / "climbs").exists()


@pytest.mark.parametrize(
    ("destination", "owner", "message"),
    [
        ("/etc/passwd/x/", "", "failed to create new directory: mkdir /etc/passwd: not a directory"),
        ("/x", "zz", "can't find uid for user zz: no such user: zz"),
        ("/x", "bob:zz", "can't find gid for group zz: no such group: zz"),
        ("/x", "a:b:c", "invalid chown string format: a:b:c"),
    ],
)
def test_what_cannot_be_is_said(ground: Ground, destination: str, owner: str, message: str) -> None:
    (ground.sources / "f").write_text("x")
    with pytest.raises((AssertionError, EngineError)) as caught:
        ground.place(destination, "f", owner=owner)
    assert message in str(caught.value)
