"""Damage below the data root: the engine starts, says what is damaged, keeps the rest, and heals by pulling."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from balenapy.engine.engine import Engine
from balenapy.errors import DataLoss
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


async def prepare(root: Path, registry: FakeRegistry) -> tuple[str, str]:
    names = f"{registry.host}/team/app:1", f"{registry.host}/team/other:1"
    async with image_engine(root) as engine:
        for name in names:
            await pull(engine, name)
        await settle(engine)
    return names


async def content(engine: Engine, name: str) -> list[str]:
    async with engine.snapshots.view(engine.images.resolve(name).chain_id) as files:
        return sorted(os.listdir(files))


@pytest.mark.parametrize("position", [0, 1, 3])
@trio_test
async def test_a_lost_layer_is_told_and_healed_by_pulling(
    tmp_path: Path, registry: FakeRegistry, position: int
) -> None:
    name, other = await prepare(tmp_path, registry)
    async with image_engine(tmp_path) as engine:
        layer = engine.snapshots.chain(engine.images.resolve(name).chain_id)[position]
        whole = await content(engine, name)
    shutil.rmtree(layer.diff)

    async with image_engine(tmp_path) as engine:
        image = engine.images.resolve(name)
        why = f"layer {layer.diff_id} is damaged"
        assert engine.images.corrupt() == {image.image_id: why}
        assert engine.images.warnings() == [f"WARNING: image {image.image_id} is damaged: {why}"]
        event = engine.events._kept[-1]
        assert (event.type, event.action, event.actor_id) == ("image", "corrupt", image.image_id)
        with pytest.raises(DataLoss) as caught:
            await content(engine, name)
        assert caught.value.message == f"layer is damaged, pull its image again: {layer.chain_id}"
        assert await content(engine, other)
        engine.images.inspect(name)
        engine.images.history(name)
        engine.images.disk_usage()
        await settle(engine)
        assert os.listdir(tmp_path / "data/quarantine") == [layer.path.name]
        assert rows(engine)["snapshot"] == 5

    async with image_engine(tmp_path) as engine:
        assert list(engine.images.corrupt()) == [image.image_id]
        registry.requests.clear()
        await pull(engine, name)
        assert engine.images.corrupt() == {}
        assert await content(engine, name) == whole
        fetched = [request.path for request in registry.seen("GET .*/blobs/")]
        assert len(fetched) == 2, "the config and the one layer"
        await settle(engine)
        assert rows(engine)["snapshot"] == 5
        assert len(on_disk(engine)["snapshots"]) == 5


@trio_test
async def test_a_damaged_image_can_be_deleted(tmp_path: Path, registry: FakeRegistry) -> None:
    name, other = await prepare(tmp_path, registry)
    async with image_engine(tmp_path) as engine:
        layer = engine.snapshots.chain(engine.images.resolve(name).chain_id)[1]
    shutil.rmtree(layer.path)
    async with image_engine(tmp_path) as engine:
        answer = await engine.images.remove(name)
        assert len(answer) == 7, "two names, the image, four layers"
        await settle(engine)
        assert engine.images.corrupt() == {}
        assert rows(engine)["snapshot"] == len(on_disk(engine)["snapshots"]) == 1
        assert await content(engine, other)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\0" * 500])
@trio_test
async def test_a_damaged_config_is_told_and_healed_by_pulling(
    tmp_path: Path, registry: FakeRegistry, damage: bytes
) -> None:
    name, other = await prepare(tmp_path, registry)
    async with image_engine(tmp_path) as engine:
        image = engine.images.resolve(name)
        engine.db.query("UPDATE document SET bytes = ? WHERE digest = ?", (damage, image.image_id))
    async with image_engine(tmp_path) as engine:
        assert list(engine.images.corrupt()) == [image.image_id]
        assert await content(engine, other)
        await pull(engine, name)
        assert engine.images.corrupt() == {}
    async with image_engine(tmp_path) as engine:
        assert engine.images.corrupt() == {}
        assert await content(engine, name)
