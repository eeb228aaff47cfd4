"""Every durable step of the store may be the last: whatever was cut, the store is whole after the next start."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.engine.engine import Engine
from tests.compat.images import file, make_tar
from tests.crash.store_process import StoreProcess, store_process
from tests.deltas_fixture import add_delta, native_delta
from tests.engine.archives import archive, docker_members, load_bytes
from tests.engine.image_engine import image_engine, on_disk, pull, rows, settle, stopped_container
from tests.images_fixture import ImageFixture, layered
from tests.powercut.journeys import blob, third_image
from tests.registry.fake import FakeRegistry, fake_registry

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

Tree = dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def process() -> Iterator[StoreProcess]:
    with store_process() as process:
        yield process


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        yield registry


def other_image() -> ImageFixture:
    """Shares two layers with `layered`."""
    return ImageFixture((*layered().tars[:2], make_tar([file("new", os.urandom(700_000))])))


def tree(path: Path) -> Tree:
    """All files below a path: mode and content."""
    found: Tree = {}
    for directory, _, names in os.walk(path):
        for name in names:
            file = Path(directory, name)
            mode = file.lstat().st_mode
            content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() and not file.is_symlink() else ""
            found[str(file.relative_to(path))] = (mode, content)
    return found


async def files_of(engine: Engine, name: str) -> Tree:
    async with engine.snapshots.view(engine.images.resolve(name).chain_id) as path:
        return tree(path)


def state_of(engine: Engine) -> dict[str, str]:
    """What a client sees: each name and its image."""
    return {
        name: summary["Id"]
        for summary in engine.images.summaries(everything=True)
        for name in [*(summary["RepoTags"] or ()), *(summary["RepoDigests"] or ())]
    }


async def check_invariants(engine: Engine) -> None:
    """What holds after every start, whatever happened before."""
    await settle(engine)
    disk = on_disk(engine)
    assert disk["trash"] == []
    named = {layer.path.name for layer in engine.snapshots.layers()}
    named |= {active.path.name for active in engine.snapshots.active()}
    assert sorted(named) == disk["snapshots"], "a directory without a row, or a row without a directory"
    for layer in engine.snapshots.layers():
        assert layer.parent == "" or engine.snapshots.find(layer.parent) is not None
        assert layer.diff.is_dir()
        assert layer.tar_split.stat().st_size > 0
    staged = {digest.replace(":", "-") for digest in engine.images.content.sizes()}
    assert set(disk["ingest"]) <= staged, "staged bytes without a row"
    for image in engine.images.all():
        layers = engine.snapshots.chain(image.chain_id)
        assert len(layers) == len(image.config.diff_ids)
        assert image.size_bytes == sum(layer.size_bytes for layer in layers)


def every_step(
    process: StoreProcess, tmp_path: Path, prepare: Any, check: Any, action: str, **arguments: Any
) -> list[str]:
    """Run `action` once for each of its steps, dying there; `check` each time. Returns the names of the steps."""
    number = 0
    while True:
        number += 1
        root = tmp_path / str(number)
        trio.run(prepare, root)
        died, steps = process.run(root, action, die_at=number, **arguments)
        trio.run(check, root, died)
        if not died:
            assert len(steps) == number - 1
            return steps


@pytest.mark.slow
@pytest.mark.parametrize("slow_link", [False, True])
def test_a_pull_may_die_at_every_step(
    process: StoreProcess, registry: FakeRegistry, tmp_path: Path, slow_link: bool
) -> None:
    name = f"{registry.host}/team/app:1"
    old, new = layered(), other_image()
    expected: dict[str, Tree] = {}

    async def prepare(root: Path) -> None:
        registry.add("team/app", "1", old)
        async with image_engine(root) as engine:
            await pull(engine, name)
            expected[old.image_id] = await files_of(engine, name)
        registry.add("team/app", "1", new)

    async def check(root: Path, died: bool) -> None:
        async with image_engine(root) as engine:
            await check_invariants(engine)
            state = state_of(engine)
            assert state[name] in ((old.image_id, new.image_id) if died else (new.image_id,))
            if state[name] == old.image_id:
                assert await files_of(engine, name) == expected[old.image_id]
                assert len(state) == 2
            await pull(engine, name)
            await check_invariants(engine)
            assert state_of(engine)[name] == new.image_id
            files = await files_of(engine, name)
            assert expected.setdefault(new.image_id, files) == files
            assert on_disk(engine)["ingest"] == []
            assert rows(engine)["ingest"] == rows(engine)["lease"] == 0

    steps = every_step(process, tmp_path, prepare, check, "pull", name=name, slow_link=slow_link)
    print(f"pull died at each of {len(steps)} steps: {', '.join(steps)}")
    assert {"begin pull", "commit layer", "add image"} <= set(steps)
    assert ("sync_file" in steps) is slow_link


@pytest.mark.slow
@pytest.mark.parametrize("slow_link", [False, True])
def test_a_pull_by_delta_may_die_at_every_step(
    process: StoreProcess, registry: FakeRegistry, tmp_path: Path, slow_link: bool
) -> None:
    old = third_image()
    new = ImageFixture((make_tar([file("big", blob(150_000, 3)), file("more", blob(700_000, 5))]),))
    delta = native_delta(old, new)
    registry.has_referrers = True
    registry.add("team/app", "1", old)
    registry.add("team/app", "2", new)
    add_delta(registry, "team/app", delta)
    name = f"{registry.host}/team/app:2"

    async def prepare(root: Path) -> None:
        async with image_engine(root) as engine:
            await pull(engine, f"{registry.host}/team/app:1")
        registry.requests.clear()

    async def check(root: Path, died: bool) -> None:
        async with image_engine(root) as engine:
            await check_invariants(engine)
            assert set(state_of(engine).values()) in ({old.image_id, new.image_id}, {old.image_id} if died else set())
            await pull(engine, name)
            await check_invariants(engine)
            assert state_of(engine)[name] == new.image_id
            (layer,) = engine.snapshots.chain(engine.images.resolve(name).chain_id)
            await engine.workers.run("pack", {"directory": str(layer.path), "diff_id": layer.diff_id})
            assert on_disk(engine)["ingest"] == []
            assert rows(engine)["ingest"] == rows(engine)["lease"] == 0
        assert not registry.seen(f"blobs/{new.layers[0].digest}"), "it came in full"

    steps = every_step(process, tmp_path, prepare, check, "pull", name=name, slow_link=slow_link)
    print(f"pull by delta died at each of {len(steps)} steps: {', '.join(steps)}")
    assert {"begin pull", "commit layer", "add image"} <= set(steps)
    assert ("sync_file" in steps) is slow_link


@pytest.mark.slow
def test_a_first_pull_may_die_at_every_step(process: StoreProcess, registry: FakeRegistry, tmp_path: Path) -> None:
    name = f"{registry.host}/team/app:1"
    image = layered()
    registry.add("team/app", "1", image)

    async def prepare(root: Path) -> None:
        await trio.Path(root).mkdir()

    async def check(root: Path, died: bool) -> None:
        async with image_engine(root) as engine:
            await check_invariants(engine)
            assert set(state_of(engine).values()) in ({image.image_id}, set() if died else {image.image_id})
            await pull(engine, name)
            await check_invariants(engine)
            assert (await files_of(engine, name))["keep"][1] == hashlib.sha256(b"kept\n").hexdigest()
            assert rows(engine)["lease"] == 0

    steps = every_step(process, tmp_path, prepare, check, "pull", name=name)
    print(f"pull died at each of {len(steps)} steps: {', '.join(steps)}")


@pytest.mark.slow
def test_a_deletion_may_die_at_every_step(process: StoreProcess, registry: FakeRegistry, tmp_path: Path) -> None:
    registry.add("team/app", "1", layered())
    registry.add("team/app", "2", other_image())
    first, second = f"{registry.host}/team/app:1", f"{registry.host}/team/app:2"
    expected: Tree = {}

    async def prepare(root: Path) -> None:
        async with image_engine(root) as engine:
            await pull(engine, first)
            await pull(engine, second)
            expected.update(await files_of(engine, second))

    async def check(root: Path, died: bool) -> None:
        async with image_engine(root) as engine:
            await check_invariants(engine)
            state = state_of(engine)
            assert state.keys() & {first, second} in ({second}, {first, second} if died else {second})
            assert await files_of(engine, second) == expected
            if first in state:
                await engine.images.remove(first)
                await check_invariants(engine)
            assert len(on_disk(engine)["snapshots"]) == 3

    steps = every_step(process, tmp_path, prepare, check, "remove", name=first)
    print(f"deletion died at each of {len(steps)} steps: {', '.join(steps)}")
    assert {"remove image", "collect", "move_to_trash", "remove_tree"} <= set(steps)


@pytest.mark.slow
def test_a_tag_may_die_at_every_step(process: StoreProcess, registry: FakeRegistry, tmp_path: Path) -> None:
    registry.add("team/app", "1", layered())
    name = f"{registry.host}/team/app:1"

    async def prepare(root: Path) -> None:
        async with image_engine(root) as engine:
            await pull(engine, name)

    async def check(root: Path, died: bool) -> None:
        async with image_engine(root) as engine:
            await check_invariants(engine)
            assert name in state_of(engine)
            assert died or "new:1" in state_of(engine)

    every_step(process, tmp_path, prepare, check, "tag", name=name, repository="new", tag="1")


@pytest.mark.slow
def test_a_containers_layer_may_die_at_every_step(
    process: StoreProcess, registry: FakeRegistry, tmp_path: Path
) -> None:
    registry.add("team/app", "1", layered())
    name = f"{registry.host}/team/app:1"

    async def prepare(root: Path) -> None:
        async with image_engine(root) as engine:
            await pull(engine, name)

    async def check(root: Path, died: bool) -> None:
        async with image_engine(root) as engine:
            await check_invariants(engine)
            active = list(engine.snapshots.active())
            assert len(active) <= died
            for snapshot in active:
                assert snapshot.init.is_dir()
                assert engine.snapshots.mounts(snapshot.key).upper.is_dir()
                await engine.snapshots.remove(snapshot.key)
            await check_invariants(engine)
            assert len(on_disk(engine)["snapshots"]) == 4

    steps = every_step(process, tmp_path, prepare, check, "container", name=name, key="c" * 64)
    assert {"prepare snapshot", "remove snapshot"} <= set(steps)


@pytest.mark.slow
def test_a_load_may_die_at_every_step(process: StoreProcess, tmp_path: Path) -> None:
    """Two images, one of them under a tag that moves: both are there, or everything is as before."""
    old, new, other = layered("docker"), other_image(), ImageFixture(layered().tars[1:3])
    archives = {}
    for name, members in (
        ("old", docker_members(old, ["app:1"])),
        ("new", [*renamed(docker_members(new, ["app:1"]), "new"), *renamed(docker_members(other, ["other:1"]), "x")]),
    ):
        manifests = [json.loads(data)[0] for member, data in members if member == "manifest.json"]
        rest = [member for member in members if member[0] != "manifest.json"]
        archives[name] = tmp_path / f"{name}.tar"
        archives[name].write_bytes(archive([*rest, ("manifest.json", json.dumps(manifests).encode())]))
    expected: dict[str, Tree] = {}

    async def prepare(root: Path) -> None:
        async with image_engine(root) as engine:
            await load_bytes(engine, archives["old"].read_bytes())
            expected[old.image_id] = await files_of(engine, "app:1")

    async def check(root: Path, died: bool) -> None:
        async with image_engine(root) as engine:
            await check_invariants(engine)
            state = state_of(engine)
            loaded = {"app:1": new.image_id, "other:1": other.image_id}
            kept = {name: image_id for name, image_id in state.items() if name != "<none>:<none>"}
            kept.pop("<none>@<none>", None)
            assert kept in ([{"app:1": old.image_id}, loaded] if died else [loaded])
            if kept != loaded:
                assert await files_of(engine, "app:1") == expected[old.image_id]
            await load_bytes(engine, archives["new"].read_bytes())
            await check_invariants(engine)
            assert {state_of(engine)[name] for name in loaded} == set(loaded.values())
            for name, image in (("app:1", new), ("other:1", other)):
                files = await files_of(engine, name)
                assert expected.setdefault(image.image_id, files) == files
            assert rows(engine)["lease"] == 0

    steps = every_step(process, tmp_path, prepare, check, "load", archive=str(archives["new"]))
    print(f"load died at each of {len(steps)} steps: {', '.join(steps)}")
    assert {"unpack layer", "sync_filesystem", "add images", "move_to_trash"} <= set(steps)


def renamed(members: list[tuple[str, bytes]], prefix: str) -> list[tuple[str, bytes]]:
    """The members of an archive below a directory, so that two fit into one."""
    manifest = json.loads(members[-1][1])
    for entry in manifest:
        entry["Config"] = f"{prefix}/{entry['Config']}"
        entry["Layers"] = [f"{prefix}/{name}" for name in entry["Layers"]]
    return [
        *((f"{prefix}/{name}", data) for name, data in members[:-1]),
        (members[-1][0], json.dumps(manifest).encode()),
    ]


@pytest.mark.slow
def test_a_commit_may_die_at_every_step(process: StoreProcess, tmp_path: Path) -> None:
    image, key = layered("docker"), "c" * 64

    async def prepare(root: Path) -> None:
        async with image_engine(root) as engine:
            await load_bytes(engine, archive(docker_members(image)))
            await stopped_container(engine, "app:1", key)

    async def check(root: Path, died: bool) -> None:
        async with image_engine(root) as engine:
            await check_invariants(engine)
            assert engine.snapshots.get(key).diff.joinpath("made").read_bytes() == b"made\n"
            state = state_of(engine)
            assert died or "committed:1" in state
            committed = [each for each in engine.images.all() if each.parent == image.image_id]
            assert len(committed) <= 1
            for each in committed:  # tagging comes last: it may have no name
                async with engine.snapshots.view(each.chain_id) as path:
                    assert tree(path)["made"][1] == hashlib.sha256(b"made\n").hexdigest()
                assert each.references in (["docker.io/library/committed:1"], [])
                await engine.images.remove(each.image_id, force=True)
            await check_invariants(engine)
            assert len(on_disk(engine)["snapshots"]) == 5

    steps = every_step(process, tmp_path, prepare, check, "commit", name="app:1", key=key)
    print(f"commit died at each of {len(steps)} steps: {', '.join(steps)}")
    assert {"unpack layer", "sync_filesystem", "add images", "tag image"} <= set(steps)
