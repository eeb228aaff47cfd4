"""The command line, on images of a few files."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from delta.oci import compact, open_image, sha256
from tests.delta.command import output_of, run
from tests.delta.layouts import write_layout
from tests.delta.make_vectors import vectors


def write_archive(path: Path, layers: list[bytes], more: dict[str, str] | None = None) -> None:
    config = compact({**(more or {}), "rootfs": {"diff_ids": [sha256(each) for each in layers]}})
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    files = {"config.json": config, **dict(zip(names, layers, strict=True))}
    files["manifest.json"] = json.dumps([{"Config": "config.json", "Layers": names}]).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path, bytes]:
    layers, target = vectors()["contents"]
    write_layout(tmp_path / "old", layers)
    write_layout(tmp_path / "new", [layers[0], target])
    return tmp_path / "old", tmp_path / "new", target


def test_an_update_is_made_applied_verified_and_shown(images: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    old, new, target = images
    delta, out = tmp_path / "delta", tmp_path / "out"

    assert run("make", str(old), str(new), "-o", str(delta)) == 0
    assert run("apply", str(delta), str(old), "-o", str(out)) == 0
    printed = output_of("verify", delta, old) + output_of("inspect", delta)

    (tar,) = out.iterdir()
    assert tar.name == sha256(target).removeprefix("sha256:") + ".tar"
    assert tar.read_bytes() == target
    assert sha256(vectors()["contents"][0][0]) + ": in the base" in printed
    assert "memory to apply" in printed


def test_every_file_of_a_delta_is_told_of(images: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    old, new, target = images
    delta = tmp_path / "delta"
    assert run("make", old, new, "-o", delta) == 0

    lines = output_of("inspect", delta, old).splitlines()

    moved = "srv/moved: same content as etc/conf-2 in layer 0"
    assert any(line.startswith("copied") and moved in line for line in lines)
    assert any(line.startswith(("patched", "new")) and "bin/tool-1.3: " in line for line in lines)
    with tarfile.open(fileobj=io.BytesIO(target)) as tar:
        names = [member.name for member in tar if member.size]
    assert all(any(f" {name}: " in line for line in lines) for name in names)


def test_an_update_by_tar_diff(images: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    old, new, target = images
    delta, out = tmp_path / "delta", tmp_path / "out"

    assert run("make", "--format", "tar-diff", str(old), str(new), "-o", str(delta)) == 0
    assert run("apply", str(delta), str(old), "-o", str(out)) == 0
    assert run("verify", str(delta), str(old)) == 0

    assert [path.read_bytes() for path in out.iterdir()] == [target]


def test_an_update_by_balenas_delta_image(images: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    old, new, target = images
    delta, out = tmp_path / "delta", tmp_path / "out"

    assert run("make", "--format", "balena", old, new, "-o", delta) == 0
    assert run("apply", delta, old, "-o", out) == 0

    assert [path.read_bytes() for path in out.iterdir()] == [target]
    assert "in the base" in output_of("verify", delta, old)
    assert run("verify", delta, new) == 1
    image = open_image(delta)
    labels = json.loads(image.config)["config"]["Labels"]
    assert labels["io.resin.delta.base"] == open_image(old).config_digest
    assert sha256(labels["io.resin.delta.config"].encode()) == open_image(new).config_digest
    assert image.diff_ids[0] == "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"


def test_archives_serve_as_images(tmp_path: Path) -> None:
    layers, target = vectors()["contents"]
    write_archive(tmp_path / "old.tar", layers)
    write_archive(tmp_path / "new.tar", [target])
    arguments = [str(tmp_path / "old.tar"), str(tmp_path / "new.tar"), "-o", str(tmp_path / "delta")]

    assert run("make", *arguments) == 0
    assert run("verify", str(tmp_path / "delta"), str(tmp_path / "old.tar")) == 0


def test_failures_say_why(
    images: tuple[Path, Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, _ = images
    delta = tmp_path / "delta"
    run("make", str(old), str(new), "-o", str(delta))
    for arguments, reason in (
        (["verify", str(delta), str(new)], "not the base"),
        (["verify", str(old), str(new)], "no delta"),
        (["make", "127.0.0.1:1/app:1", str(new), "-o", str(delta)], "Connection refused"),
        (["make", "No Reference", str(new), "-o", str(delta)], "neither a file nor a reference"),
        (["make", str(new), "-o", str(delta)], "name OLD and NEW"),
        (["push", str(delta), "127.0.0.1:1/app"], "Connection refused"),
        (["inspect", str(tmp_path / "none")], "No such file"),
        (["verify", str(delta), str(old), "--device-memory", "1"], "needs"),
    ):
        capsys.readouterr()
        assert run(*arguments) == 1
        assert reason in capsys.readouterr().err


def test_a_damaged_blob_leaves_no_layer(images: tuple[Path, Path, bytes], tmp_path: Path) -> None:
    old, new, _ = images
    delta, out = tmp_path / "delta", tmp_path / "out"
    run("make", str(old), str(new), "-o", str(delta))
    for blob in (delta / "blobs/sha256").iterdir():
        data = blob.read_bytes()
        if data.startswith(b"BPDELTA1"):
            blob.write_bytes(data[:-20] + bytes(20))

    assert run("apply", str(delta), str(old), "-o", str(out)) == 1
    assert list(out.iterdir()) == []


def test_librsync_deltas_of_files(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "new").write_bytes(b"x" + bytes(range(256)) * 41)
    files = {name: str(tmp_path / name) for name in ("old", "new", "delta", "back")}

    assert run("make", "--format", "librsync", files["old"], files["new"], "-o", files["delta"]) == 0
    assert run("apply", files["delta"], files["old"], "-o", files["back"]) == 0

    assert (tmp_path / "back").read_bytes() == (tmp_path / "new").read_bytes()
