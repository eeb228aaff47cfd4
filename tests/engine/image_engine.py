"""An engine of its image parts alone: real stores, workers and registry client, on a private data root."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from balenapy.config import Config
from balenapy.core.container import Container, ContainerConfig, Status
from balenapy.core.deltaplan import parse_request
from balenapy.core.reference import parse_pull_reference
from balenapy.engine.engine import Engine, Limiters
from balenapy.engine.events import EventBus
from balenapy.engine.images import Images
from balenapy.engine.pull import Pulls
from balenapy.engine.push import Pushes
from balenapy.engine.workers import Workers
from balenapy.registry.client import Registry
from balenapy.stores.db import Database
from balenapy.stores.snapshots import Snapshots


@dataclass
class FakeContainers:
    """Only who uses an image, and by which ID."""

    records: list[Container] = field(default_factory=list)

    def find(self, name: str) -> Container:
        return next(container for container in self.records if container.id == name)

    def using_image(self, image_id: str) -> list[Container]:
        return [container for container in self.records if container.image_id == image_id]


async def no_wait(_seconds: float) -> None:
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def image_engine(root: Path, **settings: Any) -> AsyncIterator[Engine]:
    """Start on `root` (recovery included), stop at the end of the block. Retries do not wait."""
    config = replace(Config(), data_root=root / "data", exec_root=root / "exec", **settings)
    config.data_root.mkdir(parents=True, exist_ok=True)
    config.exec_root.mkdir(parents=True, exist_ok=True)
    db = Database.open(config.data_root / "meta.db")
    try:
        async with trio.open_nursery() as nursery:
            engine = Engine(config, db, Limiters(trio.CapacityLimiter(4), trio.CapacityLimiter(1)), nursery)
            engine.events = EventBus()
            engine.workers = Workers(engine)
            engine.registry = Registry(config)
            engine.snapshots = Snapshots(db, config.data_root, config.exec_root, engine.limiters.files)
            engine.images = Images(engine)
            engine.pulls = Pulls(engine)
            engine.pulls.sleep = no_wait
            engine.pushes = Pushes(engine)
            engine.pushes.sleep = no_wait
            engine.containers = FakeContainers()  # type: ignore[assignment]
            engine.snapshots.recover()
            engine.images.recover()
            yield engine
            nursery.cancel_scope.cancel()
    finally:
        db.close()


async def pull(engine: Engine, image: str, tag: str = "", auth: str = "", **headers: str) -> list[bytes]:
    """Pull; the lines of its stream. Headers are `mode`, `base`, `source` (From), `codecs`, `max_bytes`."""
    names = {"mode": "", "base": "-Base", "source": "-From", "codecs": "-Codecs", "max_bytes": "-Max-Bytes"}
    given = {f"X-Balena-Delta{names[name]}": value for name, value in headers.items()}
    lines: list[bytes] = []

    async def write(line: bytes) -> None:
        lines.append(line)
        await trio.lowlevel.checkpoint()

    deltas = parse_request(lambda name: given.get(name, ""), engine.config.delta_mode)
    await engine.pulls.pull(parse_pull_reference(image, tag), auth, None, write, deltas)
    return lines


async def stopped_container(engine: Engine, image: str, key: str) -> Container:
    """A container of an image that has run and made `/made`."""
    record = engine.images.resolve(image)
    if key not in {active.key for active in engine.snapshots.active()}:
        active = await engine.snapshots.prepare(key, record.chain_id)
        (active.diff / "made").write_bytes(b"made\n")
    container = Container(id=key, name="box", created_ns=1, image_id=record.image_id, config=ContainerConfig(cmd=["x"]))
    container.state.status = Status.EXITED
    return container


async def settle(engine: Engine) -> None:
    """Do what the background would: collect, empty the trash."""
    await engine.images.collector.collect()
    await engine.snapshots.trash.empty()


def on_disk(engine: Engine) -> dict[str, list[str]]:
    """Names below the data root that pulls may leave."""
    root = engine.config.data_root
    return {name: sorted(os.listdir(root / name)) for name in ("snapshots", "ingest", "trash")}


def rows(engine: Engine) -> dict[str, int]:
    """How many rows each table of images has."""
    tables = ("document", "image", "reference", "snapshot", "ingest", "lease", "lease_item")
    return {table: int(str(engine.db.query(f"SELECT count(*) FROM {table}")[0][0])) for table in tables}


NOTHING_ON_DISK: dict[str, list[str]] = {"snapshots": [], "ingest": [], "trash": []}
NO_ROWS = dict.fromkeys(("document", "image", "reference", "snapshot", "ingest", "lease", "lease_item"), 0)
