"""A bit that flips in the database, so that SQLite sees nothing wrong, costs one object and not the engine."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from balenapy.core.container import Container
from balenapy.core.network import Network
from balenapy.core.volume import Volume
from balenapy.engine.engine import Engine
from balenapy.stores.containers import ContainerStore
from balenapy.stores.networks import NetworkStore
from balenapy.stores.trash import Trash
from balenapy.stores.volumes import VolumeStore
from tests.engine.image_engine import image_engine, pull, settle
from tests.images_fixture import busybox, layered
from tests.registry.fake import FakeRegistry, fake_registry

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

FLIPS = int(os.environ.get("FLIPS", "150"))  # by hand: 20000


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        registry.add("team/app", "1", layered())
        registry.add("team/other", "1", busybox())
        yield registry


async def load(engine: Engine) -> tuple[ContainerStore, NetworkStore, VolumeStore]:
    trash = Trash(engine.config.data_root / "trash", engine.limiters.files)
    volumes = VolumeStore(engine.db, engine.config.data_root, trash, engine.limiters.files)
    return ContainerStore(engine.db), NetworkStore(engine.db), volumes


async def populate(root: Path, registry: FakeRegistry) -> None:
    async with image_engine(root) as engine:
        for name in ("app", "other"):
            await pull(engine, f"{registry.host}/team/{name}:1")
        containers, networks, volumes = await load(engine)
        for number in range(4):
            image = engine.images.all()[number % 2]
            key = f"{number:x}" * 64
            container = Container(id=key, name=f"name{number}", image_id=image.image_id)
            await engine.snapshots.prepare(key, image.chain_id)
            await containers.insert(container)
        await networks.save(Network(id="9" * 64, name="net"))
        await volumes.insert(Volume("vol", created_ns=1))
        await settle(engine)


async def use(root: Path) -> tuple[int, list[str]]:
    """Start, look at everything, collect. Returns how much is there, and what the engine says is damaged."""
    async with image_engine(root) as engine:
        containers, networks, volumes = await load(engine)
        count = len(containers.all()) + len(networks.all()) + len(volumes.all())
        images = engine.images.summaries(everything=True)
        for image in images:
            engine.images.inspect(image["Id"])
            engine.images.history(image["Id"])
        engine.images.disk_usage()
        engine.images.ingests()
        warnings = engine.images.warnings()
        if not engine.snapshots.unclaimed:
            await settle(engine)
        return count + len(images), warnings


def test_a_flipped_bit_costs_one_object_at_most(tmp_path: Path, registry: FakeRegistry) -> None:
    trio.run(populate, tmp_path / "whole", registry)
    whole = tmp_path / "whole"
    data = (whole / "data/meta.db").read_bytes()
    everything, warnings = trio.run(use, whole)
    assert (everything, warnings) == (8, [])
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    chooser = random.Random(seed)
    outcomes: Counter[str] = Counter()
    used = [at for at in range(100, len(data)) if data[at]]
    for _ in range(FLIPS):
        at, bit = chooser.choice(used), chooser.randrange(8)
        root = tmp_path / "flipped"
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "-al", whole, root], check=True)  # linked, but for the database
        database = root / "data/meta.db"
        database.unlink()
        database.write_bytes(data[:at] + bytes((data[at] ^ 1 << bit,)) + data[at + 1 :])
        try:
            count, warnings = trio.run(use, root)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: byte {at} bit {bit}") from error
        assert count >= everything - 2, f"seed {seed}: byte {at} bit {bit}: {count} of {everything}, {warnings}"
        outcomes["told" if warnings else "unnoticed" if count == everything else "lost"] += 1
    print(f"\n{FLIPS} flipped bits, seed {seed}: {dict(outcomes)}")
