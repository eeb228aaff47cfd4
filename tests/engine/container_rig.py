"""An engine for container records: real database, snapshots, images, volumes and events; nothing runs.

What runs is played by `Supervisors` below: it notes what it was asked, and ends what it shall kill.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import trio

from balenapy.config import Config
from balenapy.core import creation, lifecycle
from balenapy.core.container import Container, Status
from balenapy.core.filters import NO_FILTERS
from balenapy.core.manifest import parse_image_config
from balenapy.core.reference import parse_reference
from balenapy.engine.containers import Containers
from balenapy.engine.engine import Engine, Limiters
from balenapy.engine.events import Event, EventBus
from balenapy.engine.images import Images
from balenapy.engine.volumes import Volumes
from balenapy.linux.cgroups import Cgroups
from balenapy.stores.db import Database
from balenapy.stores.images import ImageRecord, ReferenceRecord
from balenapy.stores.snapshots import Snapshots


class Supervisors:
    """Containers "run" by a change of their state."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, container: Container, *, now_ns: int | None = None) -> None:
        lifecycle.move(container.state, Status.RUNNING)
        container.state.pid = 4711
        container.state.ever_started = True
        container.state.started_ns = now_ns or time.time_ns()

    def stop(self, container: Container, exit_code: int = 0) -> None:
        lifecycle.move(container.state, Status.EXITED)
        container.state.pid = 0
        container.state.exit_code = exit_code
        container.state.finished_ns = time.time_ns()

    async def kill_for_removal(self, container: Container) -> None:
        self.calls.append(f"kill {container.name}")
        await trio.lowlevel.checkpoint()
        self.stop(container, 137)

    async def remove_process(self, container: Container) -> None:
        self.calls.append(f"remove_process {container.name}")
        await trio.lowlevel.checkpoint()

    def tell_removed(self, container: Container) -> None:
        self.calls.append(f"tell_removed {container.name}")


class Runtime:
    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []
        self.error: Exception | None = None

    async def update(self, cid: str, resources: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        self.updates.append(resources)


class Rig:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.containers = engine.containers
        self.supervisors = cast(Supervisors, engine.supervisors)
        self.runtime = cast(Any, engine.runtimes).runtime
        self.events: list[Event] = []
        publish = engine.events.publish

        def record(*arguments: Any, **keywords: Any) -> None:
            publish(*arguments, **keywords)
            self.events.append(engine.events._kept[-1])

        cast(Any, engine.events).publish = record

    @property
    def actions(self) -> list[str]:
        return [f"{event.type} {event.action}" for event in self.events]

    async def add_image(self, name: str = "busybox:latest", parent: str = "", **config: Any) -> ImageRecord:
        """An image without layers whose config is as given (Go's keys)."""
        document = {
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": []},
            "comment": f"{name} {parent}",
        }
        parsed = parse_image_config(json.dumps(document).encode())
        image = ImageRecord(str(parsed.image_id), parsed, parent)
        references = [ReferenceRecord(parse_reference(name).with_default_tag(), image.image_id)] if name else []
        await self.engine.images.store.add(image, references)
        return image

    async def create(self, name: str = "", **body: Any) -> Container:
        """Create by a request body; `Image: busybox` and a command unless it says otherwise."""
        container, _ = await self.create_with_warnings(name, **body)
        return container

    async def create_with_warnings(self, name: str = "", **body: Any) -> tuple[Container, list[str]]:
        request = creation.parse_create({"Image": "busybox", "Cmd": ["sleep", "1000"], **body})
        return await self.containers.create(request, name)

    def rows(self) -> dict[str, int]:
        """How many rows each table of interest has, and how many volumes there are."""
        counts = {
            table: cast(int, self.engine.db.query(f"SELECT count(*) FROM {table}")[0][0])
            for table in ("container", "container_state", "snapshot")
        }
        return counts | {"volume": len(self.engine.volumes.matching(NO_FILTERS))}


@asynccontextmanager
async def open_rig(root: Path, **config: Any) -> AsyncIterator[Rig]:
    settings = Config(data_root=root / "data", exec_root=root / "exec", **config)
    for directory in (settings.data_root, settings.exec_root):
        directory.mkdir(exist_ok=True)
    db = Database.open(settings.data_root / "meta.db")
    try:
        async with trio.open_nursery() as nursery:
            limiters = Limiters(trio.CapacityLimiter(4), trio.CapacityLimiter(1))
            engine = Engine(settings, db, limiters, nursery)
            fakes = cast(Any, engine)
            engine.events = EventBus()
            runtime = Runtime()
            fakes.runtimes = SimpleNamespace(
                cgroups=Cgroups.read(), paths={"runc": "/usr/bin/runc"}, runtime=runtime, get=lambda _: runtime
            )
            engine.snapshots = Snapshots(db, settings.data_root, settings.exec_root, limiters.files)
            engine.images = Images(engine)
            engine.volumes = Volumes(engine)
            fakes.networks = SimpleNamespace(find=lambda name: None)
            fakes.logs = SimpleNamespace(path=lambda container: settings.data_root / container.id / "log")
            fakes.execs = SimpleNamespace(ids_of=lambda container: [])
            fakes.supervisors = Supervisors()
            engine.containers = Containers(engine)
            yield Rig(engine)
            nursery.cancel_scope.cancel()
    finally:
        db.close()
