"""Damage is found by the path, and mending replaces that path and nothing else. That a whole layer, however
strange, shows no damage is held by every test that unpacks (conftest)."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.compat.images import directory, file, link, make_tar
from tests.worker.conftest import Worker, sha256

CONTENT = os.urandom(300_000)


def tar() -> bytes:
    return make_tar(
        [
            directory("usr"),
            directory("usr/bin"),
            file("usr/bin/tool", CONTENT, 0o755),
            file("usr/bin/other", b"other\n"),
            file("usr/empty", b""),
            link("usr/link", "bin/tool"),
            file("usr/.wh.hidden", b""),
        ]
    )


def hard_links() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("a")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"12345"))
        for name in ("b", "c"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, "a"
            archive.addfile(info)
    return out.getvalue()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def replaced_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


TOOL = "usr/bin/tool"


@pytest.mark.parametrize(
    ("path", "damage", "bad"),
    [
        (TOOL, flip, [[TOOL, "has other contents"]]),
        (TOOL, lambda path: path.write_bytes(bytes(len(CONTENT))), [[TOOL, "has other contents"]]),
        (TOOL, lambda path: path.write_bytes(b""), [[TOOL, "has 0 bytes instead of 300000"]]),
        (TOOL, Path.unlink, [[TOOL, "is missing"]]),
        (TOOL, lambda path: path.chmod(0o644), [[TOOL, "has mode 644 instead of 755"]]),
        (TOOL, lambda path: os.chown(path, 7, 8), [[TOOL, "belongs to 7:8 instead of 0:0"]]),
        (TOOL, replaced_by_directory, [[TOOL, "is not a file"]]),
        ("usr/empty", lambda path: path.write_bytes(b"x"), [["usr/empty", "has 1 bytes instead of 0"]]),
        ("usr/link", Path.unlink, [["usr/link", "is missing"]]),
        ("usr/hidden", Path.unlink, [["usr/hidden", "is missing"]]),
        ("usr/bin", lambda path: path.chmod(0o700), [["usr/bin", "has mode 700 instead of 755"]]),
        (
            "usr/bin",
            shutil.rmtree,
            [["usr/bin", "is missing"], ["usr/bin/other", "is missing"], [TOOL, "is missing"]],
        ),
    ],
)
def test_damage_is_named_and_mended(
    worker: Worker, path: str, damage: Callable[[Path], None], bad: list[list[str]]
) -> None:
    data = tar()
    worker.unpack(data)
    before = tree(worker.diff)
    damage(worker.diff / path)

    assert worker.damage(sha256(data), deep=False) == bad
    assert not worker.report["whole"]

    mend(worker, data, [path for path, _ in bad])
    assert worker.damage(sha256(data)) == []
    assert tree(worker.diff) == before
    assert worker.pack() == data


def mend(worker: Worker, data: bytes, paths: list[str]) -> None:
    fresh = worker.directory / "fresh"
    fresh.mkdir()
    paths = sorted({*paths, *(str(parent) for path in paths for parent in Path(path).parents)} - {"."})
    report = worker.run("unpack", data, directory=str(fresh), only=paths)
    assert report["diff_id"] == sha256(data)
    assert not (fresh / "tar-split.zst").exists()
    report = worker.run("mend", directory=str(worker.snapshot), fresh=str(fresh), paths=paths)
    assert "error" not in report, report


def tree(root: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        times = () if path == root or stat.S_ISCHR(status.st_mode) else (status.st_mtime_ns,)
        found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, status.st_nlink, *times)
    return found


def test_all_names_of_a_damaged_hard_link_are_named(worker: Worker) -> None:
    data = hard_links()
    worker.unpack(data)
    flip(worker.diff / "b")
    assert [path for path, _ in worker.damage(sha256(data))] == ["a", "b", "c"]
    mend(worker, data, ["a", "b", "c"])
    assert worker.damage(sha256(data)) == []
    assert (worker.diff / "c").stat().st_nlink == 3


@pytest.mark.parametrize("cut", [0, 10, 60, -1])
def test_a_damaged_tar_split_costs_the_whole_layer(worker: Worker, cut: int) -> None:
    data = tar()
    worker.unpack(data)
    split = worker.snapshot / "tar-split.zst"
    split.write_bytes(split.read_bytes()[:cut])
    assert worker.damage(sha256(data), deep=False)[0][0] == ""
    assert worker.report["whole"]


def test_every_flipped_bit_of_a_tar_split_is_found(worker: Worker) -> None:
    """Or it is one that the decoder does not look at: what comes out is the same."""
    data = tar()
    worker.unpack(data)
    split = worker.snapshot / "tar-split.zst"
    whole, meant = split.read_bytes(), inflated(split)
    for at in range(0, len(whole), 7):
        split.write_bytes(whole[:at] + bytes((whole[at] ^ 1 << at % 8,)) + whole[at + 1 :])
        assert worker.damage(sha256(data), deep=False) or inflated(split) == meant, at


def inflated(path: Path) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(path.read_bytes()) as reader:
        return reader.read()


def test_several_layers_in_one_go(worker: Worker) -> None:
    """The worker leaves one layer's root for the next."""
    data = tar()
    worker.unpack(data)
    layer = {"directory": str(worker.snapshot), "diff_id": sha256(data), "chain_id": ""}
    absent = layer | {"directory": str(worker.directory / "absent")}
    report = worker.run("verify", layers=[layer, absent, layer], rate=100_000_000, idle=True)["layers"]
    assert [found["whole"] for found in report] == [False, True, False]
    assert [found["bytes"] for found in report] == [300_006, 0, 300_006]
