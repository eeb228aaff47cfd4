"""Pulls by delta against a registry that may misbehave, with real workers."""

from __future__ import annotations

import base64
import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.engine import deltas
from balenapy.engine.engine import Engine
from balenapy.engine.events import Event
from balenapy.errors import EngineError, NotFound
from balenapy.registry.client import Session
from balenapy.registry.errors import RegistryError
from tests.compat.images import compact, digest, directory, file, make_tar
from tests.deltas_fixture import (
    BASE,
    OCI_INDEX,
    DeltaFixture,
    add_delta,
    balena_delta,
    index_of,
    native_delta,
    native_layer,
    referrers_tag,
    tar_diff,
)
from tests.engine.image_engine import image_engine, on_disk, pull, rows, settle
from tests.images_fixture import Blob, ImageFixture
from tests.registry.fake import FakeRegistry, fake_registry
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        registry.has_referrers = True
        yield registry


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def application(version: int) -> bytes:
    """A layer of which little changes from one version to the next."""
    program = bytearray(noise(1, 200_000))
    program[1000 * version : 1000 * version + 40] = noise(version, 40)
    return make_tar(
        [
            directory("app"),
            file("app/program", bytes(program), 0o755),
            file("app/data", noise(2, 50_000)),
            file("app/version", f"{version}\n".encode()),
        ]
    )


GROUND = make_tar([directory("etc"), file("etc/ground", noise(3, 30_000))])
OLD = ImageFixture((GROUND, application(1)), {"Cmd": ["/app/program"]}, "oci")
NEW = ImageFixture((GROUND, application(2)), {"Cmd": ["/app/program"]}, "oci")


def parsed(lines: list[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def aux(lines: list[bytes]) -> dict[str, Any] | None:
    found = [line["aux"]["Delta"] for line in parsed(lines) if "aux" in line]
    assert len(found) <= 1
    return found[0] if found else None


def blobs_fetched(registry: FakeRegistry) -> list[str]:
    return [request.path.rpartition("/")[2] for request in registry.seen(r"GET .*/blobs/")]


async def last_event(engine: Engine) -> Event:
    async with engine.events.open(since_ns=0, until_ns=1 << 62) as events:
        found = []
        with pytest.raises(trio.WouldBlock):
            while True:
                found.append(events.receive_nowait())
    return found[-1]


def messages(lines: list[bytes]) -> list[str]:
    return [line["status"] for line in parsed(lines) if "id" not in line and "status" in line]


def hold(registry: FakeRegistry) -> DeltaFixture:
    """Both images and the delta between them."""
    registry.add("team/app", "1", OLD)
    registry.add("team/app", "2", NEW)
    delta = native_delta(OLD, NEW)
    add_delta(registry, "team/app", delta)
    return delta


async def everything(engine: Engine, name: str) -> Any:
    """What the API and the store say of an image, but for random directory names."""
    image = engine.images.resolve(name)
    inspected = engine.images.inspect(name)
    del inspected["GraphDriver"]
    layers = [(layer.diff_id, layer.size_bytes, layer.disk_bytes) for layer in engine.snapshots.chain(image.chain_id)]
    sidecars = [
        {path.name: path.read_bytes() for path in sorted(layer.path.glob("*.json"))}
        for layer in engine.snapshots.chain(image.chain_id)
    ]
    packed = []
    for layer in engine.snapshots.chain(image.chain_id):
        packed.append(await engine.workers.run("pack", {"directory": str(layer.path), "diff_id": layer.diff_id}))
    return inspected, engine.images.history(name), layers, sidecars, packed


@trio_test
async def test_an_image_pulled_by_delta_is_the_image_pulled_in_full(tmp_path: Path, registry: FakeRegistry) -> None:
    delta = hold(registry)
    name = f"{registry.host}/team/app:2"
    async with image_engine(tmp_path / "full") as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        await pull(engine, name, mode="off")
        in_full = await everything(engine, name)
    async with image_engine(tmp_path / "delta") as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        registry.requests.clear()

        lines = await pull(engine, name)

        assert blobs_fetched(registry) == [NEW.config_blob.digest, delta.layers[0].digest]
        assert await everything(engine, name) == in_full
        told = aux(lines)
        assert told is not None
        assert told["PeakDiskBytes"] > len(NEW.tars[1])
        assert told["PeakMemoryBytes"] == engine.config.delta_memory
        assert {key: told[key] for key in ("Base", "Codec", "DeltaBytes", "FullBytes", "Layers")} == {
            "Base": OLD.image_id,
            "Codec": "native",
            "DeltaBytes": delta.size,
            "FullBytes": len(NEW.layers[1].data),
            "Layers": 1,
        }
        totals = [line["progressDetail"] for line in parsed(lines) if line.get("id") == "Total"]
        assert totals[-1] == {"current": delta.size, "total": delta.size}
        assert (await last_event(engine)).attributes == {
            "name": f"{registry.host}/team/app",
            "delta.base": OLD.image_id,
            "delta.bytes": str(delta.size),
            "delta.saved": str(len(NEW.layers[1].data) - delta.size),
        }
        await settle(engine)
        assert on_disk(engine)["ingest"] == on_disk(engine)["trash"] == []
        assert len(on_disk(engine)["snapshots"]) == 3
        assert rows(engine)["lease"] == 0


# --- where deltas are found


@trio_test
async def test_a_registry_without_referrers_is_asked_for_the_tag_that_stands_in(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    delta = hold(registry)
    registry.has_referrers = False
    registry.add_manifest("team/app", referrers_tag(NEW), OCI_INDEX, index_of([delta]))
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")

        lines = await pull(engine, f"{registry.host}/team/app:2")

        told = aux(lines)
        assert told is not None and told["Codec"] == "native"


@trio_test
async def test_a_tar_diff_is_found_by_the_delta_index(tmp_path: Path, registry: FakeRegistry) -> None:
    old, new = (replace(image, tars=image.tars[1:]) for image in (OLD, NEW))
    registry.add("team/app", "1", old)
    registry.add("team/app", "2", new)
    delta = tar_diff(old, new)
    add_delta(registry, "team/app", delta)
    registry.add_manifest("team/app", "_deltaindex", OCI_INDEX, index_of([delta]))
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        registry.requests.clear()

        lines = await pull(engine, f"{registry.host}/team/app:2")

        told = aux(lines)
        assert told is not None and told["Codec"] == "tar-diff"
        assert blobs_fetched(registry) == [new.config_blob.digest, delta.layers[0].digest]
        assert engine.images.resolve(f"{registry.host}/team/app:2").image_id == new.image_id


@trio_test
async def test_deltas_are_found_in_a_folder(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", OLD)
    registry.add("team/app", "2", NEW)
    delta = native_delta(OLD, NEW)
    folder = tmp_path / "stick"
    for blob in (*delta.layers, delta.config, delta.manifest):
        path = folder / "blobs" / blob.digest.replace(":", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob.data)
    bare = {key: value for key, value in delta.entry.items() if key != "annotations"}
    # One to another target lies beside it; it would be smaller.
    other = replace(delta, layers=(Blob(delta.layers[0].media_type, b"x"),), subject=OLD.manifest.descriptor)
    (folder / "blobs" / other.manifest.digest.replace(":", "/")).write_bytes(other.manifest.data)
    entries = [bare, {**bare, **other.manifest.descriptor}]
    (folder / "index.json").write_bytes(compact({"schemaVersion": 2, "manifests": entries}))
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        registry.requests.clear()

        lines = await pull(engine, f"{registry.host}/team/app:2", source=f"oci-layout:{folder}", mode="require")

        assert aux(lines) is not None
        assert blobs_fetched(registry) == [NEW.config_blob.digest]
        with pytest.raises(NotFound, match=r"no applicable delta for .*/nowhere/index.json: no such file"):
            await engine.images.remove(f"{registry.host}/team/app:2", force=True, prune_parents=True)
            await settle(engine)
            await pull(engine, f"{registry.host}/team/app:2", source="/nowhere", mode="require")


@trio_test
async def test_deltas_are_found_in_another_repository(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", OLD)
    registry.add("team/app", "2", NEW)
    delta = native_delta(OLD, NEW)
    add_delta(registry, "team/deltas", delta)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")

        lines = await pull(engine, f"{registry.host}/team/app:2", source=f"{registry.host}/team/deltas")

        assert aux(lines) is not None
        assert len(registry.seen("GET /v2/team/deltas/blobs/" + delta.layers[0].digest)) == 1


@trio_test
async def test_the_cheapest_of_several_deltas_is_taken(tmp_path: Path, registry: FakeRegistry) -> None:
    far = ImageFixture((GROUND, make_tar([file("other", noise(9, 100_000))])), {}, "oci")
    registry.add("team/other", "1", far)
    cheap = hold(registry)
    dear = native_delta(far, NEW)
    add_delta(registry, "team/app", dear)
    assert cheap.size < dear.size < len(NEW.layers[1].data)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/other:1")
        await pull(engine, f"{registry.host}/team/app:1")

        with_both = aux(await pull(engine, f"{registry.host}/team/app:2"))

        assert with_both is not None and with_both["Base"] == OLD.image_id
        await engine.images.remove(f"{registry.host}/team/app:2", force=True, prune_parents=True)
        await settle(engine)
        told = aux(await pull(engine, f"{registry.host}/team/app:2", base=far.image_id))
        assert told is not None and told["Base"] == far.image_id


@trio_test
async def test_a_layer_that_stands_in_another_stack_is_not_fetched(tmp_path: Path, registry: FakeRegistry) -> None:
    moved = ImageFixture((make_tar([file("new-ground", b"x")]), OLD.tars[1]), {}, "oci")
    registry.add("team/app", "1", OLD)
    registry.add("team/app", "2", moved)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        registry.requests.clear()

        lines = await pull(engine, f"{registry.host}/team/app:2")

        assert blobs_fetched(registry) == [moved.config_blob.digest, moved.layers[0].digest]
        told = aux(lines)
        assert told is not None and (told["Codec"], told["DeltaBytes"]) == ("copy", 0)
        image = engine.images.resolve(f"{registry.host}/team/app:2")
        assert [layer.diff_id for layer in reversed(engine.snapshots.chain(image.chain_id))] == [
            digest(tar) for tar in moved.tars
        ]


@trio_test
async def test_deltas_of_a_registry_that_wants_tokens_are_found(tmp_path: Path) -> None:
    with fake_registry(auth="token") as registry:
        registry.has_referrers = registry.anonymous_tokens = True
        delta = hold(registry)
        async with image_engine(tmp_path) as engine:
            await pull(engine, f"{registry.host}/team/app:1")

            told = aux(await pull(engine, f"{registry.host}/team/app:2"))

            assert told is not None and told["DeltaBytes"] == delta.size
            assert all(request.headers["Authorization"].startswith("Bearer ") for request in registry.seen("referrers"))


@trio_test
async def test_credentials_go_to_the_registry_of_the_image_only(tmp_path: Path, registry: FakeRegistry) -> None:
    auth = base64.urlsafe_b64encode(b'{"username":"user","password":"secret"}').decode()
    with fake_registry(auth="basic") as own:
        own.add("team/app", "1", OLD)
        own.add("team/app", "2", NEW)
        # The other registry is told apart by its domain; both are on this machine.
        elsewhere = registry.host.replace("127.0.0.1", "localhost")
        add_delta(registry, "team/deltas", native_delta(OLD, NEW))
        async with image_engine(tmp_path) as engine:
            await pull(engine, f"{own.host}/team/app:1", auth=auth)

            told = aux(await pull(engine, f"{own.host}/team/app:2", auth=auth, source=f"{elsewhere}/team/deltas"))

            assert told is not None
            assert registry.requests
            assert not any("Authorization" in request.headers for request in registry.requests)


@trio_test
async def test_a_registry_that_does_not_answer_about_deltas_is_not_waited_for(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "SEARCH_TIMEOUT_S", 0.2)
    hold(registry)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        registry.fault("/referrers/", stall_at=10, times=10)

        with trio.fail_after(60):
            lines = await pull(engine, f"{registry.host}/team/app:2")

        assert aux(lines) is None
        assert engine.images.resolve(f"{registry.host}/team/app:2").image_id == NEW.image_id


# --- what is asked for


@trio_test
async def test_nothing_is_looked_for_when_deltas_are_off_or_nothing_is_here(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    hold(registry)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        assert registry.seen("referrers") == []
        await pull(engine, f"{registry.host}/team/app:2", mode="off")
        assert registry.seen("referrers|_deltaindex") == []


INAPPLICABLE: list[tuple[dict[str, str], str]] = [
    ({"base": "team/absent:1"}, "base team/absent:1 is not here"),
    ({"codecs": "librsync"}, "none of its 1 deltas fits an image that is here"),
    ({"codecs": "bsdiff"}, "none of its 1 deltas fits an image that is here"),
    ({"max_bytes": "100"}, r"the cheapest plan needs \d+ bytes of at most 100"),
    ({"source": "HOST/team/nothing"}, "the registry has no deltas of it"),
]


@trio_test
async def test_without_an_applicable_delta_a_pull_that_requires_one_fails_before_any_blob(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    hold(registry)
    name = f"{registry.host}/team/app:2"
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        before = rows(engine)
        for headers, why in INAPPLICABLE:
            given = {key: value.replace("HOST", registry.host) for key, value in headers.items()}
            registry.requests.clear()
            lines: list[bytes] = []

            with pytest.raises(NotFound, match=f"^no applicable delta for {name}: {why}$"):
                lines += await pull(engine, name, mode="require", **given)

            assert lines == []
            assert blobs_fetched(registry) == [NEW.config_blob.digest]
            assert rows(engine) == before
            assert on_disk(engine)["ingest"] == on_disk(engine)["trash"] == []
        # The same without insisting comes in full.
        assert aux(await pull(engine, name, codecs="librsync")) is None


@trio_test
async def test_requiring_a_delta_of_what_is_here_is_no_error(tmp_path: Path, registry: FakeRegistry) -> None:
    hold(registry)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")

        lines = await pull(engine, f"{registry.host}/team/app:1", mode="require")

        assert messages(lines)[-1] == f"Status: Image is up to date for {registry.host}/team/app:1"
        assert parsed(lines)[0]["status"] == "Pulling from team/app"


# --- deltas that are no good


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 0x55,)) + data[at + 1 :]


def huge(data: bytes) -> bytes:
    """The head claims a target of 2^60 bytes and the greatest frame memory."""
    return data[:8] + b"\xff" * 8 + b"\x0f" + data[10:]


SPOILED = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "head": lambda data: flipped(data, 3),
    "target": lambda data: flipped(data, 14),
    "middle": lambda data: flipped(data, len(data) // 2),
    "end": lambda data: flipped(data, len(data) - 2),
    "huge": huge,
    "another layer": lambda data: native_layer(OLD.tars, application(3)),
    "another base": lambda data: native_layer([GROUND], NEW.tars[1]),
    "another version": lambda data: b"BPDELTA9" + data[8:],
    "not a delta": lambda data: NEW.layers[1].data[:1000],
}


async def forget(engine: Engine, name: str) -> None:
    await engine.images.remove(name, force=True, prune_parents=True)
    await settle(engine)


@trio_test
async def test_spoiled_deltas_are_given_up_once_and_the_layer_fetched(tmp_path: Path, registry: FakeRegistry) -> None:
    good = native_delta(OLD, NEW)
    registry.add("team/app", "1", OLD)
    name = f"{registry.host}/team/app:2"
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        before = rows(engine)
        for how, spoil in SPOILED.items():
            blob = Blob(good.layers[0].media_type, spoil(good.layers[0].data))
            registry.manifests = {key: held for key, held in registry.manifests.items() if key[1] == "1"}
            registry.add("team/app", "2", NEW)
            add_delta(registry, "team/app", replace(good, layers=(blob,)))
            with pytest.raises(EngineError):
                await pull(engine, name, mode="require")
            await settle(engine)
            assert rows(engine) == before
            assert on_disk(engine)["ingest"] == on_disk(engine)["trash"] == []
            assert len(on_disk(engine)["snapshots"]) == 2
            registry.requests.clear()

            lines = await pull(engine, name)

            assert engine.images.resolve(name).image_id == NEW.image_id
            (told,) = [text for text in messages(lines) if "cannot be used" in text]
            assert told.startswith(f"Delta of {NEW.layers[1].digest[7:19]} cannot be used: ")
            assert len(registry.seen(f"GET .*/blobs/{blob.digest}")) == (0 if how == "empty" else 1)
            assert len(registry.seen(f"GET .*/blobs/{NEW.layers[1].digest}")) == 1
            totals = [line["progressDetail"] for line in parsed(lines) if line.get("id") == "Total"]
            size = len(NEW.layers[1].data)
            assert totals[-1] == {"current": size, "total": size}
            assert "delta.base" not in (await last_event(engine)).attributes
            await settle(engine)
            assert on_disk(engine)["ingest"] == on_disk(engine)["trash"] == []
            assert len(on_disk(engine)["snapshots"]) == 3, how
            await forget(engine, name)
    print(f"{len(SPOILED)} spoiled deltas, each given up once")


@trio_test
async def test_a_delta_that_the_registry_does_not_give_is_no_obstacle(tmp_path: Path, registry: FakeRegistry) -> None:
    delta = hold(registry)
    name = f"{registry.host}/team/app:2"
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        faults: list[dict[str, Any]] = [{"status": 404}, {"body": b"other bytes"}, {"status": 403}]
        faults += [{"status": 503}, {"cut_at": 0}, {"cut_at": 0, "reset": True}]  # and that for ever
        for fault in faults:
            registry.fault(f"blobs/{delta.layers[0].digest}", times=1000, **fault)

            lines = await pull(engine, name)

            assert engine.images.resolve(name).image_id == NEW.image_id
            assert len([text for text in messages(lines) if "cannot be used" in text]) == 1
            registry.faults.clear()
            await forget(engine, name)


@trio_test
async def test_lists_of_deltas_that_are_none_are_no_obstacle(tmp_path: Path, registry: FakeRegistry) -> None:
    hold(registry)
    name = f"{registry.host}/team/app:2"
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        for spoiled in (b"", b"[]", b"{", b"{}", b'{"schemaVersion":2,"manifests":7}'):
            registry.fault("/referrers/", body=spoiled)

            lines = await pull(engine, name)

            assert aux(lines) is None
            assert engine.images.resolve(name).image_id == NEW.image_id
            await forget(engine, name)


@trio_test
async def test_a_delta_that_says_nothing_true_of_its_base_does_no_harm(tmp_path: Path, registry: FakeRegistry) -> None:
    other = ImageFixture((GROUND, make_tar([file("x", noise(8, 5000))])), {}, "oci")
    registry.add("team/app", "2", NEW)
    registry.add("team/other", "1", other)
    lying = replace(native_delta(OLD, NEW), annotations={BASE: other.image_id})
    add_delta(registry, "team/app", lying)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/other:1")

        lines = await pull(engine, f"{registry.host}/team/app:2")

        assert any("made for another base" in text for text in messages(lines))
        assert engine.images.resolve(f"{registry.host}/team/app:2").image_id == NEW.image_id


# --- interruptions, and others at work


@trio_test
async def test_a_cut_delta_goes_on_where_it_was(tmp_path: Path, registry: FakeRegistry) -> None:
    delta = hold(registry)
    size = delta.size
    name = f"{registry.host}/team/app:2"
    async with image_engine(tmp_path, max_download_attempts=1) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        registry.fault(delta.layers[0].digest, cut_at=size // 2)
        with pytest.raises(EngineError):
            await pull(engine, name, mode="require")
        assert blobs_fetched(registry).count(NEW.layers[1].digest) == 0
        registry.requests.clear()

        lines = await pull(engine, name)

        (request,) = registry.seen(f"GET .*/blobs/{delta.layers[0].digest}")
        assert request.headers["Range"] == f"bytes={size // 2}-"
        assert aux(lines) is not None
        assert engine.images.resolve(name).image_id == NEW.image_id
        await settle(engine)
        assert on_disk(engine)["ingest"] == []


@trio_test
async def test_a_registry_that_is_gone_in_the_middle_of_a_delta_is_not_asked_for_more(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    delta = hold(registry)
    name = f"{registry.host}/team/app:2"
    async with image_engine(tmp_path, max_download_attempts=2) as engine:
        await pull(engine, f"{registry.host}/team/app:1")

        def gone(*_: object, **__: object) -> Any:
            raise RegistryError("dial tcp: connection refused", retryable=True)

        registry.fault(delta.layers[0].digest, cut_at=delta.size // 2)
        opened = engine.pulls.sleep

        async def lose_the_registry(_seconds: float) -> None:
            Session.blob = gone  # type: ignore[method-assign, assignment]
            await opened(0)

        engine.pulls.sleep = lose_the_registry
        blob = Session.blob
        try:
            with pytest.raises(EngineError, match="connection refused"):
                await pull(engine, name)
        finally:
            Session.blob = blob  # type: ignore[method-assign]
        assert on_disk(engine)["ingest"] == [delta.layers[0].digest.replace(":", "-")]
        registry.requests.clear()
        assert aux(await pull(engine, name)) is not None
        assert blobs_fetched(registry).count(NEW.layers[1].digest) == 0


@trio_test
async def test_a_cancelled_delta_leaves_only_what_it_has_staged(tmp_path: Path, registry: FakeRegistry) -> None:
    delta = hold(registry)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        registry.fault(delta.layers[0].digest, stall_at=100)
        with trio.move_on_after(20) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pull, engine, f"{registry.host}/team/app:2")
                while not (staged := on_disk(engine)["ingest"]) or len(on_disk(engine)["snapshots"]) < 3:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        assert not scope.cancelled_caught
        assert staged == [delta.layers[0].digest.replace(":", "-")]
        await settle(engine)
        assert len(on_disk(engine)["snapshots"]) == 2
        await pull(engine, f"{registry.host}/team/app:2")
        await settle(engine)
        assert on_disk(engine)["ingest"] == []


@trio_test
async def test_the_base_may_be_deleted_while_a_delta_of_it_is_on_its_way(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    delta = hold(registry)
    name = f"{registry.host}/team/app:2"
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        old_top = engine.images.resolve(f"{registry.host}/team/app:1").chain_id
        registry.fault(delta.layers[0].digest, cut_at=100)
        deleted = trio.Event()

        async def wait_for_deletion(_seconds: float) -> None:
            await deleted.wait()

        engine.pulls.sleep = wait_for_deletion
        lines: list[bytes] = []

        async def run() -> None:
            lines.extend(await pull(engine, name))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                while not registry.seen(delta.layers[0].digest):  # noqa: ASYNC110
                    await trio.sleep(0.01)
                await engine.images.remove(f"{registry.host}/team/app:1", force=True, prune_parents=True)
                await settle(engine)
                assert engine.snapshots.find(old_top) is not None
                deleted.set()

        assert not any("cannot be used" in text for text in messages(lines))
        assert engine.images.resolve(name).image_id == NEW.image_id
        await settle(engine)
        assert engine.snapshots.find(old_top) is None
        assert len(on_disk(engine)["snapshots"]) == 2


@trio_test
async def test_two_pulls_of_one_image_share_its_delta(tmp_path: Path, registry: FakeRegistry) -> None:
    delta = hold(registry)
    registry.add("team/app", "latest", NEW)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        registry.requests.clear()
        results: list[list[bytes]] = []

        async def run(tag: str, **headers: str) -> None:
            results.append(await pull(engine, f"{registry.host}/team/app", tag, **headers))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "2")
            nursery.start_soon(run, "latest")
            nursery.start_soon(lambda: run("2", mode="off"))

        every = [[line["progressDetail"] for line in parsed(lines) if line.get("id") == "Total"] for lines in results]
        assert any(every)  # who came when all was done has nothing to count
        for totals in filter(None, every):
            assert all(total.get("current", 0) <= total["total"] for total in totals)
            assert totals[-1]["current"] == totals[-1]["total"]
        fetched = blobs_fetched(registry)
        assert fetched.count(delta.layers[0].digest) + fetched.count(NEW.layers[1].digest) == 1


@trio_test
async def test_a_base_that_is_damaged_is_no_base(tmp_path: Path, registry: FakeRegistry) -> None:
    hold(registry)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        top = engine.snapshots.chain(engine.images.resolve(f"{registry.host}/team/app:1").chain_id)[0]
        program = top.diff / "app/program"
        data = bytearray(program.read_bytes())
        data[77_777] ^= 1
        program.write_bytes(bytes(data))

        lines = await pull(engine, f"{registry.host}/team/app:2")

        assert any("what came out is" in text for text in messages(lines))
        assert engine.images.resolve(f"{registry.host}/team/app:2").image_id == NEW.image_id
        (program.parent / "program").unlink()
        await engine.images.remove(f"{registry.host}/team/app:2", force=True, prune_parents=True)
        await settle(engine)
        lines = await pull(engine, f"{registry.host}/team/app:2")
        assert any("base layer: app/program: no such file or directory" in text for text in messages(lines))


# --- bases in another store


@trio_test
async def test_the_base_may_be_in_another_store(tmp_path: Path, registry: FakeRegistry) -> None:
    delta = hold(registry)
    registry.add("deltas/one", "latest", balena_delta(OLD, NEW))
    async with image_engine(tmp_path / "host") as host:
        await pull(host, f"{registry.host}/team/app:1")
    store = str(tmp_path / "host/data")
    async with image_engine(tmp_path / "device", delta_data_root=store) as engine:
        registry.requests.clear()

        told = aux(await pull(engine, f"{registry.host}/team/app:2", mode="require"))

        # What both have is copied, the rest comes as a delta, and nothing of the store is listed.
        assert told is not None and told["Codec"].split(",") == ["copy", "native"]
        assert blobs_fetched(registry) == [NEW.config_blob.digest, delta.layers[0].digest]
        assert [image.image_id for image in engine.images.all()] == [NEW.image_id]
        await everything(engine, f"{registry.host}/team/app:2")
    async with image_engine(tmp_path / "another", delta_data_root=store) as engine:
        await pull(engine, f"{registry.host}/deltas/one:latest")
        assert engine.images.resolve(f"{registry.host}/deltas/one").image_id == NEW.image_id
        await everything(engine, f"{registry.host}/deltas/one:latest")


@trio_test
async def test_another_store_that_is_damaged_or_absent_is_no_obstacle(tmp_path: Path, registry: FakeRegistry) -> None:
    hold(registry)
    async with image_engine(tmp_path / "host") as host:
        await pull(host, f"{registry.host}/team/app:1")
    store = tmp_path / "host/data"
    name = f"{registry.host}/team/app:2"
    for number, spoiled in enumerate((b"{}", b"")):
        for path in store.glob("snapshots/*/image-*.json"):
            path.write_bytes(spoiled)
        async with image_engine(tmp_path / str(number), delta_data_root=str(store)) as engine:
            await pull(engine, name)
            assert engine.images.resolve(name).image_id == NEW.image_id
    async with image_engine(tmp_path / "third", delta_data_root="/nowhere") as engine:
        await pull(engine, name)
        assert engine.images.resolve(name).image_id == NEW.image_id
