"""Pulls by delta against a registry that may misbehave, with real workers."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from balenapy.engine.engine import Engine
from tests.compat.images import directory, file, make_tar
from tests.deltas_fixture import (
    add_delta,
    native_delta,
)
from tests.engine.image_engine import image_engine, on_disk, pull, rows, settle
from tests.images_fixture import ImageFixture
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
    registry.add("team/app", "1", OLD)
    registry.add("team/app", "2", NEW)
    delta = native_delta(OLD, NEW)
    add_delta(registry, "team/app", delta)
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
        event = engine.events.replay()[-1] if hasattr(engine.events, "replay") else None
        assert event is None or event
        await settle(engine)
        assert on_disk(engine)["ingest"] == on_disk(engine)["trash"] == []
        assert len(on_disk(engine)["snapshots"]) == 3
        assert rows(engine)["lease"] == 0
