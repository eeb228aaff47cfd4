"""Pull against a registry that may misbehave, with real workers and overlay mounts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.core.reference import parse_pull_reference
from balenapy.engine.engine import Engine
from balenapy.errors import DataLoss, EngineError, Forbidden, NotFound, SystemFailure
from tests.engine.image_engine import (
    NO_ROWS,
    NOTHING_ON_DISK,
    image_engine,
    on_disk,
    pull,
    rows,
    settle,
)
from tests.images_fixture import Blob, ImageFixture, busybox, layered, multi_platform
from tests.registry.fake import FakeRegistry, fake_registry
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        yield registry


def parsed(lines: list[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def statuses(lines: list[bytes], id: str = "") -> list[str]:
    return [line["status"] for line in parsed(lines) if line.get("id", "") == id and "status" in line]


@trio_test
async def test_a_pulled_image_can_be_listed_and_its_files_read(tmp_path: Path, registry: FakeRegistry) -> None:
    image = layered()
    registry.add("team/app", "1", image)
    async with image_engine(tmp_path) as engine:
        name = f"{registry.host}/team/app:1"
        lines = await pull(engine, name)

        found = engine.images.resolve(name)
        assert found.image_id == image.image_id
        async with engine.snapshots.view(found.chain_id) as files:
            assert (files / "keep").read_text() == "kept\n"
            assert (files / "changed").read_text() == "new\n"
            assert not (files / "gone").exists()
            assert os.listdir(files / "dir") == ["b"]
        assert parsed(lines)[0] == {"status": "Pulling from team/app", "id": "1"}
        assert statuses(lines)[-2:] == [
            f"Digest: {image.manifest.digest}",
            f"Status: Downloaded newer image for {name}",
        ]
        for layer in image.layers:
            short = layer.digest[7:19]
            assert statuses(lines, short)[0] == "Pulling fs layer"
            assert statuses(lines, short)[-1] == "Pull complete"
        totals = [line["progressDetail"] for line in parsed(lines) if line.get("id") == "Total"]
        size = sum(len(layer.data) for layer in image.layers)
        assert totals[-1] == {"current": size, "total": size}
        (summary,) = engine.images.summaries()
        assert summary["RepoTags"] == [name]
        assert summary["RepoDigests"] == [f"{registry.host}/team/app@{image.manifest.digest}"]
        await settle(engine)
        assert rows(engine) == NO_ROWS | {"document": 2, "image": 1, "reference": 2, "snapshot": 4}
        assert on_disk(engine) == {"snapshots": on_disk(engine)["snapshots"], "ingest": [], "trash": []}
        assert len(on_disk(engine)["snapshots"]) == 4


@trio_test
async def test_an_image_is_there_after_a_restart(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", busybox())
    name = f"{registry.host}/team/app:1"
    async with image_engine(tmp_path) as engine:
        await pull(engine, name)
        before = engine.images.inspect(name)
    async with image_engine(tmp_path) as engine:
        assert engine.images.inspect(name) == before
        assert statuses(await pull(engine, name))[-1] == f"Status: Image is up to date for {name}"
        async with engine.snapshots.view(engine.images.resolve(name).chain_id) as files:
            assert (files / "bin/busybox").exists()


@trio_test
async def test_an_index_gives_the_image_of_this_platform(tmp_path: Path, registry: FakeRegistry) -> None:
    index = multi_platform()
    registry.add("team/app", "1", index)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app", "1")
        image = engine.images.resolve(f"{registry.host}/team/app:1")
        assert image.config.architecture == engine.pulls.platform.architecture
        assert f"{registry.host}/team/app@{index.manifest.digest}" in image.references


@trio_test
async def test_layers_that_are_here_are_not_fetched(tmp_path: Path, registry: FakeRegistry) -> None:
    base = layered()
    more = replace(base, tars=(*base.tars, busybox().tars[0]))
    registry.add("team/app", "1", base)
    registry.add("team/app", "2", more)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        registry.requests.clear()
        lines = await pull(engine, f"{registry.host}/team/app:2")

        shown = [statuses(lines, layer.digest[7:19])[0] for layer in more.layers]
        assert shown == ["Already exists"] * 4 + ["Pulling fs layer"]
        fetched = [request.path.rpartition("/")[2] for request in registry.seen("GET .*/blobs/")]
        assert fetched == [more.config_blob.digest, more.layers[-1].digest]


@trio_test
async def test_layers_are_fetched_from_the_bottom(tmp_path: Path, registry: FakeRegistry) -> None:
    image = layered()
    registry.add("team/app", "1", image)
    async with image_engine(tmp_path, max_concurrent_downloads=1) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        fetched = [request.path.rpartition("/")[2] for request in registry.seen("GET .*/blobs/")]
        assert fetched == [image.config_blob.digest, *(layer.digest for layer in image.layers)]


@trio_test
async def test_all_tags_are_pulled_when_none_is_given(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", layered())
    registry.add("team/app", "2", busybox())
    async with image_engine(tmp_path) as engine:
        lines = await pull(engine, f"{registry.host}/team/app")

        tags = sorted(tag for summary in engine.images.summaries() for tag in summary["RepoTags"])
        assert tags == [f"{registry.host}/team/app:1", f"{registry.host}/team/app:2"]
        assert statuses(lines)[-1] == f"Status: Downloaded newer image for {registry.host}/team/app"


@trio_test
async def test_the_pull_event_names_the_reference_as_asked(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", ImageFixture(busybox().tars, {"Labels": {"a": "b"}}))
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        event = engine.events._kept[-1]
        assert (event.type, event.action, event.actor_id) == ("image", "pull", f"{registry.host}/team/app:1")
        assert event.attributes == {"a": "b", "name": f"{registry.host}/team/app"}


async def fails(engine: Engine, name: str, kind: type[EngineError]) -> tuple[str, list[bytes]]:
    """Pull what must fail with exactly this kind; the message, and the lines before it."""
    lines: list[bytes] = []

    async def write(line: bytes) -> None:
        lines.append(line)

    with pytest.raises(kind) as caught:
        await engine.pulls.pull(parse_pull_reference(name, ""), "", None, write)
    return caught.value.message, lines


async def assert_nothing_left(engine: Engine) -> None:
    await settle(engine)
    assert rows(engine) == NO_ROWS
    assert on_disk(engine) == NOTHING_ON_DISK


@trio_test
async def test_what_does_not_exist_fails_before_the_first_line(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", busybox())
    async with image_engine(tmp_path) as engine:
        message, lines = await fails(engine, f"{registry.host}/team/app:2", NotFound)
        assert message == f"manifest for {registry.host}/team/app:2 not found"
        assert lines == []
        message, lines = await fails(engine, "scratch", Forbidden)
        assert message == "'scratch' is a reserved name"
        await assert_nothing_left(engine)


@trio_test
async def test_a_layer_whose_digest_lies_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    image = busybox()
    layer = image.layers[0]
    registry.add("team/app", "1", image)
    other = layered().layers[0].data
    registry.blobs[layer.digest] = other + b"\0" * (len(layer.data) - len(other))
    async with image_engine(tmp_path) as engine:
        message, lines = await fails(engine, f"{registry.host}/team/app:1", DataLoss)
        assert message == f"filesystem layer verification failed for digest {layer.digest}"
        assert parsed(lines)[0]["status"] == "Pulling from team/app"
        await assert_nothing_left(engine)


@trio_test
async def test_rubbish_instead_of_a_layer_is_blamed_on_its_digest(tmp_path: Path, registry: FakeRegistry) -> None:
    image = busybox()
    layer = image.layers[0]
    registry.add("team/app", "1", image)
    registry.blobs[layer.digest] = os.urandom(len(layer.data))
    async with image_engine(tmp_path) as engine:
        message, _ = await fails(engine, f"{registry.host}/team/app:1", DataLoss)
        assert message == f"filesystem layer verification failed for digest {layer.digest}"
        await assert_nothing_left(engine)


@trio_test
async def test_a_blob_shorter_than_its_manifest_says_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    image = busybox()
    layer = image.layers[0]
    registry.add("team/app", "1", image)
    registry.blobs[layer.digest] = layer.data[:-1]
    async with image_engine(tmp_path) as engine:
        message, _ = await fails(engine, f"{registry.host}/team/app:1", DataLoss)
        size = len(layer.data)
        assert message == (
            f"filesystem layer verification failed for digest {layer.digest}: "
            f"the registry has {size - 1} bytes of {size}"
        )
        await assert_nothing_left(engine)


@trio_test
async def test_a_blob_longer_than_its_manifest_says_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    image = busybox()
    layer = image.layers[0]
    registry.add("team/app", "1", image)
    registry.blobs[layer.digest] = layer.data + b"more"
    async with image_engine(tmp_path) as engine:
        await fails(engine, f"{registry.host}/team/app:1", DataLoss)
        await assert_nothing_left(engine)


@trio_test
async def test_a_layer_that_is_not_the_configs_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    class Liar(ImageFixture):
        @property
        def config_blob(self) -> Blob:
            return layered_once.config_blob

    layered_once = ImageFixture((layered().tars[0],))
    liar = Liar(busybox().tars)
    registry.add("team/app", "1", liar)
    async with image_engine(tmp_path) as engine:
        message, _ = await fails(engine, f"{registry.host}/team/app:1", DataLoss)
        assert message.startswith("layers from manifest don't match image configuration")
        await assert_nothing_left(engine)


@trio_test
async def test_a_layer_that_is_no_archive_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", ImageFixture((os.urandom(5000),)))
    async with image_engine(tmp_path) as engine:
        message, _ = await fails(engine, f"{registry.host}/team/app:1", SystemFailure)
        assert message.startswith("failed to register layer: ")
        await assert_nothing_left(engine)


@trio_test
async def test_a_config_whose_digest_lies_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    image = busybox()
    registry.add("team/app", "1", image)
    registry.blobs[image.config_blob.digest] = image.config_blob.data.replace(b"amd64", b"arm64")
    async with image_engine(tmp_path) as engine:
        message, _ = await fails(engine, f"{registry.host}/team/app:1", DataLoss)
        assert message == f"image config verification failed for digest {image.config_blob.digest}"
        await assert_nothing_left(engine)


@trio_test
async def test_a_foreign_layer_is_refused_by_name(tmp_path: Path, registry: FakeRegistry) -> None:
    image = busybox()
    document = json.loads(image.manifest.data)
    document["layers"][0]["mediaType"] = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    registry.add("team/app", "1", image)
    registry.add_manifest("team/app", "1", image.manifest.media_type, json.dumps(document).encode())
    async with image_engine(tmp_path) as engine:
        message, _ = await fails(engine, f"{registry.host}/team/app:1", SystemFailure)
        assert "foreign layer" in message
        assert image.layers[0].digest in message
        await assert_nothing_left(engine)


@trio_test
async def test_a_failed_pull_leaves_the_former_image(tmp_path: Path, registry: FakeRegistry) -> None:
    name = f"{registry.host}/team/app:1"
    async with image_engine(tmp_path) as engine:
        registry.add("team/app", "1", layered())
        await pull(engine, name)
        before = engine.images.inspect(name), rows(engine), on_disk(engine)

        image = busybox()
        registry.add("team/app", "1", image)
        registry.blobs[image.layers[0].digest] = os.urandom(len(image.layers[0].data))
        await fails(engine, name, DataLoss)
        await settle(engine)
        assert (engine.images.inspect(name), rows(engine), on_disk(engine)) == before


def big_image(megabytes: int = 3) -> ImageFixture:
    """One layer that does not compress."""
    from tests.compat.images import file, make_tar

    content = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(megabytes * 32768))
    return ImageFixture((make_tar([file("data", content)]),))


@trio_test
async def test_a_cut_download_goes_on_where_it_was_cut(tmp_path: Path, registry: FakeRegistry) -> None:
    image = big_image()
    layer = image.layers[0]
    registry.add("team/app", "1", image)
    registry.fault(f"blobs/{layer.digest}", cut_at=500_000, times=5)
    async with image_engine(tmp_path) as engine:
        lines = await pull(engine, f"{registry.host}/team/app:1")

        assert "Retrying in 1 second" in statuses(lines, layer.digest[7:19])
        asked = [request.headers.get("Range") for request in registry.seen(f"GET .*blobs/{layer.digest}")]
        starts = [int(text[6:-1]) for text in asked if text]
        assert starts == [500_000 * count for count in range(1, 6)]


@trio_test
async def test_a_failed_pull_resumes_in_the_next_one(tmp_path: Path, registry: FakeRegistry) -> None:
    image = big_image()
    layer = image.layers[0]
    registry.add("team/app", "1", image)
    registry.add("other/app", "2", image)
    async with image_engine(tmp_path, max_download_attempts=2) as engine:
        registry.fault(f"blobs/{layer.digest}", cut_at=1_000_000)
        registry.fault(f"blobs/{layer.digest}", status=503)
        message, _ = await fails(engine, f"{registry.host}/team/app:1", SystemFailure)
        assert "503" in message
        await settle(engine)
        staged = rows(engine)
        assert (staged["image"], staged["reference"], staged["ingest"], staged["lease"]) == (0, 0, 1, 1)
        assert len(on_disk(engine)["ingest"]) == 1
        assert on_disk(engine)["snapshots"] == []
    async with image_engine(tmp_path) as engine:
        registry.requests.clear()
        await pull(engine, f"{registry.host}/other/app:2")
        (request,) = registry.seen(f"GET .*blobs/{layer.digest}")
        assert int(request.headers["Range"][6:-1]) == 1_000_000
        assert on_disk(engine)["ingest"] == []


@trio_test
async def test_a_registry_that_ignores_range_still_ends_well(tmp_path: Path, registry: FakeRegistry) -> None:
    image = big_image()
    layer = image.layers[0]
    registry.add("team/app", "1", image)
    registry.fault(f"blobs/{layer.digest}", cut_at=500_000)
    registry.fault(f"blobs/{layer.digest}", ignore_range=True)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        assert engine.images.resolve(f"{registry.host}/team/app:1").image_id == image.image_id


@trio_test
async def test_a_wrong_staged_prefix_is_fetched_again(tmp_path: Path, registry: FakeRegistry) -> None:
    image = big_image()
    layer = image.layers[0]
    registry.add("team/app", "1", image)
    async with image_engine(tmp_path, max_download_attempts=1) as engine:
        registry.fault(f"blobs/{layer.digest}", cut_at=1_000_000)
        await fails(engine, f"{registry.host}/team/app:1", SystemFailure)
        (name,) = on_disk(engine)["ingest"]
        staged = engine.config.data_root / "ingest" / name
        staged.write_bytes(b"\0" * staged.stat().st_size)
        await pull(engine, f"{registry.host}/team/app:1")
        assert engine.images.resolve(f"{registry.host}/team/app:1").image_id == image.image_id
        assert on_disk(engine)["ingest"] == []


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what other processes bring about."""
    with trio.fail_after(20):
        while True:
            if holds():
                return
            await trio.sleep(0.01)


async def until_staged(engine: Engine, digest: str, size: int) -> None:
    await until(lambda: engine.images.content.sizes().get(digest, 0) >= size)


@trio_test
async def test_a_cancelled_pull_leaves_only_its_staged_prefix(tmp_path: Path, registry: FakeRegistry) -> None:
    image = big_image()
    layer = image.layers[0]
    registry.add("team/app", "1", image)
    registry.fault(f"blobs/{layer.digest}", stall_at=1_500_000)
    async with image_engine(tmp_path) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, engine, f"{registry.host}/team/app:1")
            await until_staged(engine, layer.digest, 1_000_000)
            started = trio.current_time()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - started < 1
        await settle(engine)
        assert rows(engine) == NO_ROWS | {"ingest": 1, "lease": 1, "lease_item": 2, "document": 2}
        assert on_disk(engine)["snapshots"] == []
        assert engine.images.content.sizes()[layer.digest] > 1_000_000
        assert await engine.images.drop_unfinished() > 1_000_000
        await assert_nothing_left(engine)


@trio_test
async def test_two_pulls_of_one_reference_share_the_work(tmp_path: Path, registry: FakeRegistry) -> None:
    image = layered()
    registry.add("team/app", "1", image)
    for layer in image.layers:
        registry.fault(f"blobs/{layer.digest}", drip_bytes=64)
    async with image_engine(tmp_path) as engine:
        outputs: list[list[bytes]] = []

        async def one() -> None:
            outputs.append(await pull(engine, f"{registry.host}/team/app:1"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
        for layer in image.layers:
            assert len(registry.seen(f"GET .*blobs/{layer.digest}")) == 1
        ends = sorted(statuses(lines)[-1] for lines in outputs)
        assert ends[0].startswith("Status: Downloaded newer image")
        for lines in outputs:
            for layer in image.layers:
                assert statuses(lines, layer.digest[7:19])[-1] in ("Pull complete", "Already exists")
        await settle(engine)
        assert rows(engine)["lease"] == 0


@trio_test
async def test_a_second_pull_goes_on_when_the_first_is_cancelled(tmp_path: Path, registry: FakeRegistry) -> None:
    image = big_image()
    layer = image.layers[0]
    registry.add("team/app", "1", image)
    registry.fault(f"blobs/{layer.digest}", stall_at=1_000_000)
    async with image_engine(tmp_path) as engine:
        first = trio.CancelScope()
        joined: list[bytes] = []

        async def begin() -> None:
            with first:
                await pull(engine, f"{registry.host}/team/app:1")

        async def join() -> None:
            joined.extend(await pull(engine, f"{registry.host}/team/app:1"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)
            await until_staged(engine, layer.digest, 500_000)
            nursery.start_soon(join)
            await until(lambda: any(len(one.watchers) == 2 for one in engine.pulls._transfers.values()))
            first.cancel()
        assert engine.images.resolve(f"{registry.host}/team/app:1").image_id == image.image_id
        asked = [request.headers.get("Range") for request in registry.seen(f"GET .*blobs/{layer.digest}")]
        assert asked[0] is None
        assert len(asked) == 2
        assert int((asked[1] or "")[6:-1]) > 500_000


@trio_test
async def test_an_image_with_one_layer_twice_is_pulled_once(tmp_path: Path, registry: FakeRegistry) -> None:
    tar = layered().tars[0]
    image = ImageFixture((tar, layered().tars[1], tar))
    registry.add("team/app", "1", image)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        await settle(engine)
        assert rows(engine)["snapshot"] == 3
        assert on_disk(engine)["ingest"] == []
