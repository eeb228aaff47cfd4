"""Damage below the data root: the engine starts, says what is damaged, keeps the rest, and heals by pulling."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from balenapy.engine.engine import Engine
from balenapy.engine.rebuild import rebuild
from balenapy.errors import DataLoss
from balenapy.stores.db import Origin
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


async def names_and_trees(engine: Engine) -> dict[str, tuple[str, list[str]]]:
    return {
        name: (row["Id"], await content(engine, row["Id"]))
        for row in engine.images.summaries(everything=True)
        for name in [*(row["RepoTags"] or ()), *(row["RepoDigests"] or ())]
    }


@trio_test
async def test_without_any_database_all_images_are_found_again(tmp_path: Path, registry: FakeRegistry) -> None:
    await prepare(tmp_path, registry)
    async with image_engine(tmp_path) as engine:
        before = await names_and_trees(engine)
    for path in (tmp_path / "data").glob("meta.db*"):
        path.unlink()
    async with image_engine(tmp_path) as engine:
        assert engine.images.all() == []
        await rebuild(engine)
        assert await names_and_trees(engine) == before
        await settle(engine)
        assert rows(engine)["snapshot"] == 5
        assert rows(engine)["lease"] == 0
    async with image_engine(tmp_path) as engine:
        assert engine.db.origin is Origin.KEPT
        assert await names_and_trees(engine) == before
        assert not (tmp_path / "data/quarantine").exists()


@trio_test
async def test_what_the_copy_does_not_have_is_found_again(tmp_path: Path, registry: FakeRegistry) -> None:
    """The copy is of before the second pull; a tag made before it is kept."""
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        await engine.images.tag(f"{registry.host}/team/app:1", "mine", "1")
    standby = tmp_path / "data/meta.db.standby"
    copy = standby.read_bytes()
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/other:1")
        before = await names_and_trees(engine)
        await engine.snapshots.prepare("c" * 64, "")
    standby.write_bytes(copy)
    (tmp_path / "data/meta.db").write_bytes(b"rubbish" * 1000)
    async with image_engine(tmp_path) as engine:
        assert engine.db.origin is Origin.STANDBY
        assert await content(engine, "mine:1")
        await rebuild(engine)
        assert await names_and_trees(engine) == before
        assert len(os.listdir(tmp_path / "data/quarantine")) == 1, "a container's files are never deleted"


@trio_test
async def test_a_restart_before_the_end_of_rebuilding_loses_nothing(tmp_path: Path, registry: FakeRegistry) -> None:
    await prepare(tmp_path, registry)
    async with image_engine(tmp_path) as engine:
        before = await names_and_trees(engine)
    for path in (tmp_path / "data").glob("meta.db*"):
        path.unlink()
    async with image_engine(tmp_path):
        pass
    async with image_engine(tmp_path) as engine:
        await settle(engine)
        await rebuild(engine)
        assert await names_and_trees(engine) == before


@pytest.mark.parametrize("damage", ["content", "sidecar", "tar-split"])
@trio_test
async def test_only_verified_layers_are_taken_back(tmp_path: Path, registry: FakeRegistry, damage: str) -> None:
    name, other = await prepare(tmp_path, registry)
    async with image_engine(tmp_path) as engine:
        bottom = engine.snapshots.chain(engine.images.resolve(name).chain_id)[-1]
    if damage == "content":
        (bottom.diff / "keep").write_text("KEPT\n")
    elif damage == "sidecar":
        (bottom.path / "layer.json").write_text("{")
    else:
        bottom.tar_split.write_bytes(bottom.tar_split.read_bytes()[:20])
    for path in (tmp_path / "data").glob("meta.db*"):
        path.unlink()
    async with image_engine(tmp_path) as engine:
        await rebuild(engine)
        assert [row["RepoTags"] for row in engine.images.summaries()] == [[other]]
        assert len(os.listdir(tmp_path / "data/quarantine")) == 4
        await pull(engine, name)
        assert await content(engine, name)
