"""Damage inside the files of layers is found, named and mended, by fetching no more than the layer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from balenapy.engine.engine import Engine
from balenapy.engine.fsck import fsck
from balenapy.stores.snapshots import Layer
from tests.engine.image_engine import image_engine, on_disk, pull, rows, settle
from tests.images_fixture import busybox, layered
from tests.registry.fake import FakeRegistry, fake_registry
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        registry.add("team/app", "1", layered())
        registry.add("team/other", "1", busybox())
        yield registry


async def run(engine: Engine, *names: str, deep: bool = False, repair: bool = False) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []

    async def write(line: bytes) -> None:
        lines.append(json.loads(line))

    images = [engine.images.resolve(name) for name in names] or None
    await fsck(engine, images, deep=deep, repair=repair, auth="", write=write)
    return lines


def bad(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(each["Path"], each["Why"]) for line in lines for each in line.get("Bad", ())]


def a_file(layer: Layer) -> Path:
    return next(path for path in sorted(layer.diff.rglob("*")) if path.is_file() and path.stat().st_size > 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    with path.open("r+b") as file:
        file.write(data)


def zero(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))


def truncate(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES: list[Callable[[Path], None]] = [flip, zero, truncate, Path.unlink]


@pytest.mark.parametrize("deep", [False, True])
@trio_test
async def test_whole_images_are_found_whole(tmp_path: Path, registry: FakeRegistry, deep: bool) -> None:
    async with image_engine(tmp_path) as engine:
        for name in ("app", "other"):
            await pull(engine, f"{registry.host}/team/{name}:1")
        lines = await run(engine, deep=deep)
        assert bad(lines) == []
        assert lines[-1]["Layers"] == 5
        assert lines[-1]["Damaged"] == 0
        assert lines[-1]["Bytes"] > 1_000_000


@pytest.mark.parametrize("damage", DAMAGES)
@trio_test
async def test_a_damaged_file_is_named_and_replaced_alone(
    tmp_path: Path, registry: FakeRegistry, damage: Callable[[Path], None]
) -> None:
    name = f"{registry.host}/team/app:1"
    async with image_engine(tmp_path) as engine:
        await pull(engine, name)
        image = engine.images.resolve(name)
        layer = engine.snapshots.chain(image.chain_id)[-1]
        victim = a_file(layer)
        content, path = victim.read_bytes(), str(victim.relative_to(layer.diff))
        others = {each: each.stat().st_ino for each in layer.diff.rglob("*") if each.is_file() and each != victim}
        damage(victim)

        lines = await run(engine, name)
        assert [each for each, _ in bad(lines)] == [path]
        assert lines[-1]["Damaged"] == 1
        assert list(engine.images.corrupt()) == [image.image_id]
        assert path in engine.images.warnings()[0]
        event = engine.events._kept[-1]
        assert (event.action, event.actor_id) == ("corrupt", image.image_id)

        registry.requests.clear()
        lines = await run(engine, name, repair=True)
        assert [line["Repaired"] for line in lines if "Image" in line] == [True]
        assert lines[-1]["Damaged"] == 0
        assert victim.read_bytes() == content
        assert {each: each.stat().st_ino for each in others} == others, "nothing else was touched"
        assert len(registry.seen("GET .*/blobs/")) == 2, "the config and the one layer"
        assert engine.images.corrupt() == {}
        assert bad(await run(engine, deep=True)) == []
        await settle(engine)
        assert (rows(engine)["ingest"], rows(engine)["lease"]) == (0, 0)
        assert on_disk(engine)["ingest"] == []


@pytest.mark.parametrize(
    "what", ["files", "tar-split", "layer.json", "no layer.json", "image", "no image", "all files", "diff"]
)
@trio_test
async def test_pulling_again_always_heals(tmp_path: Path, registry: FakeRegistry, what: str) -> None:
    """Nobody has looked before: the pull notices by itself."""
    name = f"{registry.host}/team/app:1"
    async with image_engine(tmp_path) as engine:
        await pull(engine, name)
        chain = engine.snapshots.chain(engine.images.resolve(name).chain_id)
        for layer in chain:
            if what == "files" and any(path.is_file() for path in layer.diff.rglob("*")):
                flip(a_file(layer))
            elif what == "tar-split":
                flip(layer.tar_split)
            elif what == "layer.json":
                zero(layer.path / "layer.json")
            elif what == "no layer.json":
                (layer.path / "layer.json").unlink()
            elif "image" in what:
                for path in layer.path.glob("image-*.json"):
                    flip(path) if what == "image" else path.unlink()
            elif what == "all files":
                shutil.rmtree(layer.diff)
                layer.diff.mkdir()
            elif what == "diff":
                shutil.rmtree(layer.diff)
        lines = await pull(engine, name)
        assert b"Image is up to date" in lines[-1]
        assert bad(await run(engine, deep=True)) == []
        assert engine.images.corrupt() == {}
        await settle(engine)
        assert rows(engine)["snapshot"] == len(chain)
        assert len(on_disk(engine)["snapshots"]) == len(chain)
    async with image_engine(tmp_path) as engine:
        assert bad(await run(engine, deep=True)) == []


@trio_test
async def test_what_cannot_be_fetched_stays_as_it_is(tmp_path: Path, registry: FakeRegistry) -> None:
    name, other = f"{registry.host}/team/app:1", f"{registry.host}/team/other:1"
    async with image_engine(tmp_path, max_download_attempts=1) as engine:
        await pull(engine, name)
        await pull(engine, other)
        layer = engine.snapshots.chain(engine.images.resolve(name).chain_id)[-1]
        truncate(a_file(layer))
        registry.fault("blobs/", status=500, times=100)
        lines = await run(engine, repair=True)
        assert lines[-1]["Damaged"] == 1
        assert [line["Repaired"] for line in lines if "Image" in line] == [False]
        assert engine.snapshots.find(layer.chain_id) == layer
        registry.faults.clear()
        assert (await run(engine, repair=True))[-1]["Damaged"] == 0


@trio_test
async def test_the_scrub_finds_and_mends(tmp_path: Path, registry: FakeRegistry) -> None:
    name = f"{registry.host}/team/app:1"
    async with image_engine(tmp_path, scrub_rate=0) as engine:
        await pull(engine, name)
        flip(a_file(engine.snapshots.chain(engine.images.resolve(name).chain_id)[-1]))
        assert await engine.images.checks.scrub() == 0
        assert bad(await run(engine, deep=True)) == []
