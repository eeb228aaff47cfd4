"""balena's delta images: pulled, loaded, made; with balena-engine's words and librsync's own tool as the referee."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.engine.deltaimage import DeltaOrder, create
from balenapy.engine.engine import Engine
from balenapy.engine.load import load
from balenapy.errors import EngineError, InvalidParameter, NotFound
from tests.compat.images import digest
from tests.deltas_fixture import balena_delta, delta_tar
from tests.engine.image_engine import image_engine, on_disk, pull, rows, settle
from tests.engine.test_deltas import GROUND, NEW, OLD, application, last_event, messages, parsed
from tests.images_fixture import ImageFixture
from tests.registry.fake import FakeRegistry, fake_registry
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

# balena-engine makes them of schema 2 images.
OLD2, NEW2 = replace(OLD, family="docker"), replace(NEW, family="docker")
DELTA = balena_delta(OLD2, NEW2)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        registry.add("team/app", "1", OLD2)
        registry.add("deltas/one", "latest", DELTA)
        yield registry


@trio_test
async def test_a_pulled_delta_image_is_its_target_under_the_name_of_the_delta(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    name = f"{registry.host}/deltas/one:latest"
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        registry.requests.clear()

        lines = await pull(engine, name)

        image = engine.images.resolve(name)
        assert image.image_id == NEW2.image_id
        assert image.references == sorted((name, f"{registry.host}/deltas/one@{DELTA.manifest.digest}"))
        assert messages(lines)[-2:] == [
            f"Digest: {DELTA.manifest.digest}",
            f"Status: Downloaded newer image for {name}",
        ]
        shorts = [layer.digest[7:19] for layer in DELTA.layers]
        told = [(line["id"], line["status"]) for line in parsed(lines) if line.get("id") in shorts]
        assert (shorts[0], "Already exists") in told
        changed = [status for id, status in told if id == shorts[1]]
        assert (changed[0], changed[-1]) == ("Pulling fs layer", "Pull complete")
        totals = [line["progressDetail"] for line in parsed(lines) if line.get("id") == "Total"]
        assert totals[-1] == {"current": len(DELTA.layers[1].data), "total": len(DELTA.layers[1].data)}
        assert len(registry.seen("GET .*/blobs/")) == 2
        async with engine.snapshots.view(image.chain_id) as files:
            assert (files / "app/version").read_text() == "2\n"
        event = await last_event(engine)
        assert (event.action, event.actor_id, event.attributes["delta.base"]) == ("pull", name, OLD2.image_id)
        inspected = engine.images.inspect(name)
        assert inspected["Id"] == NEW2.image_id
        assert inspected["Size"] == inspected["VirtualSize"] >= 40
        # Nothing of the delta image remains, and it is not pulled twice.
        assert {record.image_id for record in engine.images.all()} == {OLD2.image_id, NEW2.image_id}
        await settle(engine)
        assert on_disk(engine)["ingest"] == on_disk(engine)["trash"] == []
        assert rows(engine)["snapshot"] == 3
        registry.requests.clear()
        assert messages(await pull(engine, name))[-1] == f"Status: Image is up to date for {name}"
        assert len(registry.seen("GET .*/blobs/")) == 1


@trio_test
async def test_a_delta_image_without_its_base_is_an_error_that_names_it(tmp_path: Path, registry: FakeRegistry) -> None:
    async with image_engine(tmp_path) as engine:
        with pytest.raises(EngineError, match=f'^loading delta base image "{OLD2.image_id}": '):
            await pull(engine, f"{registry.host}/deltas/one:latest")
        await settle(engine)
        assert all(count == 0 for count in rows(engine).values())


@trio_test
async def test_a_target_that_is_here_only_gets_the_name(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "2", NEW2)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:2")  # and its base is not
        registry.requests.clear()

        await pull(engine, f"{registry.host}/deltas/one:latest")

        assert engine.images.resolve(f"{registry.host}/deltas/one").image_id == NEW2.image_id
        assert len(registry.seen("GET .*/blobs/")) == 1


@trio_test
async def test_a_target_can_be_pushed_to_where_its_delta_came_from(tmp_path: Path, registry: FakeRegistry) -> None:
    name = f"{registry.host}/deltas/one:latest"
    async with image_engine(tmp_path / "device") as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        await pull(engine, name)
        await push(engine, name)
    async with image_engine(tmp_path / "other") as engine:
        await pull(engine, name)
        assert engine.images.resolve(name).image_id == NEW2.image_id


@trio_test
async def test_a_damaged_file_of_a_target_is_mended_by_its_delta(tmp_path: Path, registry: FakeRegistry) -> None:
    name = f"{registry.host}/deltas/one:latest"
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        await pull(engine, name)
        top = engine.snapshots.chain(engine.images.resolve(name).chain_id)[0]
        damaged, whole = top.diff / "app/data", top.diff / "app/program"
        before, inode = damaged.read_bytes(), whole.stat().st_ino
        damaged.write_bytes(b"x" * len(before))

        await pull(engine, name)

        assert damaged.read_bytes() == before
        assert whole.stat().st_ino == inode
        assert engine.images.resolve(name).image_id == NEW2.image_id
        await settle(engine)
        assert on_disk(engine)["ingest"] == []


@trio_test
async def test_what_librsync_makes_is_applied(tmp_path: Path, registry: FakeRegistry) -> None:
    """With balena-engine's settings: block 512, strong sum 32, BLAKE2."""
    if shutil.which("rdiff") is None:
        pytest.skip("Debian's rdiff is not installed")
    delta = rdiff(tmp_path, b"".join(OLD2.tars), NEW2.tars[1])
    made = replace(DELTA, tars=(DELTA.tars[0], delta_tar(delta, "whatever/its/name")))
    registry.add("deltas/rdiff", "latest", made)
    async with image_engine(tmp_path / "engine") as engine:
        await pull(engine, f"{registry.host}/team/app:1")

        await pull(engine, f"{registry.host}/deltas/rdiff:latest")

        assert engine.images.resolve(f"{registry.host}/deltas/rdiff").image_id == NEW2.image_id


def rdiff(folder: Path, base: bytes, target: bytes) -> bytes:
    """The delta that librsync's tool makes."""
    (folder / "base").write_bytes(base)
    (folder / "target").write_bytes(target)
    options = ["-b", "512", "-S", "32", "-H", "blake2"]
    for arguments in ([*options, "signature", "base", "signature"], ["delta", "signature", "target", "delta"]):
        subprocess.run(["rdiff", *arguments], cwd=folder, check=True)
    return (folder / "delta").read_bytes()


def spoiled(how: str) -> ImageFixture:
    """A delta image whose second layer is no good."""
    good = DELTA.tars[1]
    size = int(good[124:135], 8)
    content = good[512 : 512 + size]
    far = (1 << 40).to_bytes(8, "big") + (9).to_bytes(8, "big")
    tars = {
        "empty": bytes(1024),
        "cut": delta_tar(content[: len(content) // 2]),
        "not a delta": delta_tar(b"hello"),
        "beyond the base": delta_tar(b"rs\x026\x54" + far + b"\0"),
        "huge": delta_tar(b"rs\x026" + b"\x44" + (1 << 60).to_bytes(8, "big") + b"x"),
        "another target": delta_tar(b"rs\x026\0"),
    }
    return replace(DELTA, tars=(DELTA.tars[0], tars[how]))


@trio_test
async def test_spoiled_delta_images_leave_nothing(tmp_path: Path, registry: FakeRegistry) -> None:
    words = {
        "empty": "unexpected EOF, invalid delta tar archive",
        "cut": "librsync delta: ends",
        "not a delta": "librsync delta: magic",
        "beyond the base": "librsync delta: copies 9 bytes at",
        "huge": "librsync delta: ends",
        "another target": "what came out is sha256:",
    }
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        before = rows(engine)
        for how, why in words.items():
            registry.add("deltas/bad", "latest", spoiled(how))
            with pytest.raises(EngineError, match=why):
                await pull(engine, f"{registry.host}/deltas/bad:latest")
            await settle(engine)
            assert rows(engine) == before, how
            assert on_disk(engine)["ingest"] == on_disk(engine)["trash"] == [], how
            assert len(on_disk(engine)["snapshots"]) == 2, how


# --- loading


def archive(image: ImageFixture, tag: str = "") -> bytes:
    """As `docker save` writes it."""
    out = io.BytesIO()
    config = image.config_blob
    names = [f"{digest(tar)[7:]}{number}/layer.tar" for number, tar in enumerate(image.tars)]
    manifest = [{"Config": f"{config.digest[7:]}.json", "RepoTags": [tag] if tag else None, "Layers": names}]
    files = {f"{config.digest[7:]}.json": config.data, "manifest.json": json.dumps(manifest).encode()}
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in {**files, **dict(zip(names, image.tars, strict=True))}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


async def load_archive(engine: Engine, data: bytes) -> list[dict[str, Any]]:
    lines: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        yield data

    async def write(line: bytes) -> None:
        lines.append(line)
        await trio.lowlevel.checkpoint()

    await load(engine, body(), quiet=True, write=write)
    return parsed(lines)


@trio_test
async def test_a_loaded_delta_image_is_its_target(tmp_path: Path, registry: FakeRegistry) -> None:
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")

        lines = await load_archive(engine, archive(DELTA, "loaded:1"))

        assert lines[-1] == {"stream": "Loaded image: loaded:1\n"}
        assert engine.images.resolve("loaded:1").image_id == NEW2.image_id
        async with engine.snapshots.view(engine.images.resolve("loaded:1").chain_id) as files:
            assert (files / "app/version").read_text() == "2\n"
        await settle(engine)
        assert rows(engine)["snapshot"] == len(on_disk(engine)["snapshots"]) == 3
        again = await load_archive(engine, archive(DELTA, "loaded:2"))
        assert {"stream": "Target image already exists locally, no need to load it.\n"} in again
        assert engine.images.resolve("loaded:2").image_id == NEW2.image_id


@trio_test
async def test_a_delta_image_that_cannot_be_loaded_leaves_nothing(tmp_path: Path, registry: FakeRegistry) -> None:
    async with image_engine(tmp_path) as engine:
        with pytest.raises(EngineError, match=r"^loading delta base image"):
            await load_archive(engine, archive(DELTA))
        await pull(engine, f"{registry.host}/team/app:1")
        before = rows(engine)
        for how in ("empty", "cut", "another target"):
            with pytest.raises(EngineError):
                await load_archive(engine, archive(spoiled(how), "bad:1"))
        await settle(engine)
        assert rows(engine) == before
        assert len(on_disk(engine)["snapshots"]) == 2


# --- making


async def make(engine: Engine, base: str, target: str, tag: str = "") -> list[dict[str, Any]]:
    lines: list[bytes] = []

    async def write(line: bytes) -> None:
        lines.append(line)
        await trio.lowlevel.checkpoint()

    await create(engine, DeltaOrder(engine, base, target, tag), write)
    return parsed(lines)


@trio_test
async def test_a_made_delta_image_is_told_of_pushed_and_applied(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "2", NEW2)
    old, new = f"{registry.host}/team/app:1", f"{registry.host}/team/app:2"
    async with image_engine(tmp_path / "maker") as engine:
        await pull(engine, old)
        await pull(engine, new, mode="off")

        lines = await make(engine, old, new, f"{registry.host}/deltas/made")

        made = engine.images.resolve(f"{registry.host}/deltas/made")
        statuses = [line["status"] for line in lines if line.get("id") == old]
        assert statuses[0] == "Fingerprinting" and statuses[-1] == "Fingerprint complete"
        common, changed = (digest(tar)[7:19] for tar in NEW2.tars)
        assert [line["status"] for line in lines if line.get("id") == common] == ["Waiting", "Skipping common layer"]
        told = [line["status"] for line in lines if line.get("id") == changed]
        assert told[0] == "Waiting" and told[-1] == "Delta complete" and "Computing delta" in told
        sizes, created, tagged = (line["status"] for line in lines[-3:])
        assert sizes.startswith("Normal size: ") and ", Delta size: " in sizes and sizes.endswith("x improvement")
        assert created == f"Created delta: {made.image_id}"
        assert tagged == f"Successfully tagged {registry.host}/deltas/made:latest\n"
        assert made.labels is not None
        assert made.labels["io.resin.delta.base"] == OLD2.image_id
        assert digest(made.labels["io.resin.delta.config"].encode()) == NEW2.image_id
        assert made.config.diff_ids[0].hex == "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
        assert (await last_event(engine)).action == "tag"
        layers = list(reversed(engine.snapshots.chain(made.chain_id)))
        report = await engine.workers.run("pack", {"directory": str(layers[1].path)})
        assert report["diff_id"] == str(made.config.diff_ids[1])
        delta = (layers[1].diff / "delta").read_bytes()
        status = (layers[1].diff / "delta").stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_mtime) == (0o600, 0, 0)
        referee(tmp_path, b"".join(OLD2.tars), delta, NEW2.tars[1])
        reference = made.references[0]
        await settle(engine)
        await push(engine, reference)
    async with image_engine(tmp_path / "device") as engine:
        await pull(engine, old)

        await pull(engine, reference)

        assert engine.images.resolve(reference).image_id == NEW2.image_id


def referee(folder: Path, base: bytes, delta: bytes, target: bytes) -> None:
    """librsync's own tool must give the target."""
    if shutil.which("rdiff") is None:
        print("Debian's rdiff is not installed: it has not been asked")
        return
    (folder / "base").write_bytes(base)
    (folder / "delta").write_bytes(delta)
    subprocess.run(["rdiff", "patch", "base", "delta", "new"], cwd=folder, check=True)
    assert (folder / "new").read_bytes() == target


async def push(engine: Engine, name: str) -> None:
    from balenapy.core.reference import parse_reference

    lines: list[bytes] = []

    async def write(line: bytes) -> None:
        lines.append(line)
        await trio.lowlevel.checkpoint()

    await engine.pushes.push(parse_reference(name), None, write)
    assert not any("error" in line for line in parsed(lines))


@trio_test
async def test_a_delta_to_the_same_image_is_all_common(tmp_path: Path, registry: FakeRegistry) -> None:
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")

        lines = await make(engine, OLD2.image_id, OLD2.image_id)

        created = lines[-1]["status"].removeprefix("Created delta: ")
        image = engine.images.resolve(created)
        assert len(image.config.diff_ids) == 2
        assert image.size_bytes == 0


@trio_test
async def test_what_cannot_be_made_is_told_before_the_stream(tmp_path: Path, registry: FakeRegistry) -> None:
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        here = OLD2.image_id
        for base, target, tag, kind, why in (
            ("absent", here, "", NotFound, "No such image: absent:latest"),
            (here, "absent:1", "", NotFound, "No such image: absent:1"),
            ("", here, "", InvalidParameter, "invalid reference format"),
            (here, here, f"x@{here}", InvalidParameter, "build tag cannot contain a digest"),
            (here, here, "UPPER", InvalidParameter, "must be lowercase"),
        ):
            with pytest.raises(kind, match=why):
                await make(engine, base, target, tag)
        assert len(engine.images.all()) == 1


def test_the_layers_of_these_images_share_their_ground() -> None:
    assert OLD2.tars[0] == NEW2.tars[0] == GROUND
    assert DELTA.tars[0] == bytes(1024)
    assert application(1) != application(2)
