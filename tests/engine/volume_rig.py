"""An engine with nothing but volumes: real database, directories and workers; the image is a directory of the test."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import trio

from balenapy.config import Config
from balenapy.core.container import Container, ContainerConfig, HostConfig, State, Status
from balenapy.core.wire import EMPTY
from balenapy.engine.engine import Engine, Limiters
from balenapy.engine.volumes import Volumes
from balenapy.engine.workers import Workers
from balenapy.linux import syscalls
from balenapy.stores.db import Database
from balenapy.stores.trash import Trash
from tests.engine.network_rig import RecordedEvents, Records

CHAIN = "sha256:" + "1" * 64


class DirectoryImage:
    """Snapshots that know one image: a directory."""

    def __init__(self, root: Path, trash: Trash) -> None:
        self.root = root
        self.trash = trash

    @contextlib.asynccontextmanager
    async def view(self, chain_id: str) -> AsyncIterator[Path]:
        assert chain_id == CHAIN
        yield self.root


class Rig:
    def __init__(self, engine: Engine, image: Path) -> None:
        self.engine = engine
        self.image = image  # what the containers' image holds
        self.volumes = engine.volumes
        self.records = cast(Records, engine.containers)
        self.events = cast(RecordedEvents, engine.events)

    async def create(self, name: str = "", volumes: tuple[str, ...] = (), **host: Any) -> Container:
        """A container as create makes it."""
        container = Container(
            id=secrets.token_hex(32),
            name=name or f"c{secrets.token_hex(3)}",
            config=ContainerConfig(volumes=dict.fromkeys(volumes, EMPTY)),
            host_config=HostConfig(**host),
        )
        container.mounts = await self.volumes.prepare(container.id, container.config, container.host_config, CHAIN)
        self.records.by_id[container.id] = container
        return container

    async def start(self, container: Container) -> list[Any]:
        mounts = await self.volumes.mount(container)
        container.state = State(status=Status.RUNNING)
        return mounts

    async def stop(self, container: Container) -> None:
        container.state = State(status=Status.EXITED)
        await self.volumes.unmount(container)

    async def remove(self, container: Container, *, volumes: bool = False) -> None:
        if not volumes:
            await self.volumes.leave_behind(container)
        del self.records.by_id[container.id]
        await self.volumes.release(container, remove_anonymous=volumes)

    def data(self, name: str) -> Path:
        return self.engine.config.data_root / "volumes" / name / "_data"

    def again(self) -> Rig:
        """What a new daemon finds after this one was killed."""
        self.engine.volumes = Volumes(self.engine)
        return Rig(self.engine, self.image)


@contextlib.asynccontextmanager
async def volume_rig(tmp_path: Path) -> AsyncIterator[Rig]:
    config = Config(data_root=tmp_path / "data", exec_root=tmp_path / "exec")
    config.data_root.mkdir(exist_ok=True)
    image = tmp_path / "image"
    image.mkdir(exist_ok=True)
    db = Database.open(config.data_root / "meta.db")
    try:
        async with trio.open_nursery() as nursery:
            limiters = Limiters(files=trio.CapacityLimiter(4), netns=trio.CapacityLimiter(1))
            engine = Engine(config, db, limiters, nursery)
            engine.events = cast(Any, RecordedEvents())
            engine.containers = cast(Any, Records())
            engine.snapshots = cast(Any, DirectoryImage(image, Trash(config.data_root / "trash", limiters.files)))
            engine.workers = Workers(engine)
            engine.volumes = Volumes(engine)
            yield Rig(engine, image)
            nursery.cancel_scope.cancel()
    finally:
        db.close()
        for point in syscalls.mount_points(config.data_root):
            syscalls.unmount_if_mounted(point)
