"""An engine whose containers really run: conmon, the OCI runtime, overlay mounts, control groups.

Networks are played (`none`, made by the runtime); an image of busybox is put into the stores by hand. The rig can die
and be opened again on the same directories, as a daemon does. Whatever happens in the block, nothing is left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from balenapy.config import Config
from balenapy.core import creation
from balenapy.core.container import Container
from balenapy.core.execconfig import ExecConfig
from balenapy.core.logview import LogOptions
from balenapy.core.manifest import parse_image_config
from balenapy.core.reference import parse_reference
from balenapy.core.stdcopy import FrameReader
from balenapy.engine.attach import AttachOptions
from balenapy.engine.containers import Containers
from balenapy.engine.engine import Engine, Limiters
from balenapy.engine.events import Event, EventBus
from balenapy.engine.exec import Execs
from balenapy.engine.images import Images
from balenapy.engine.logs import Logs
from balenapy.engine.networks import NetworkAttachment
from balenapy.engine.supervisor import Supervisors
from balenapy.engine.volumes import Volumes
from balenapy.linux import syscalls
from balenapy.linux.process import ProcessHandle
from balenapy.linux.runtime import Runtimes
from balenapy.stores.db import Database
from balenapy.stores.images import ImageRecord, ReferenceRecord
from balenapy.stores.snapshots import Layer, Snapshots
from tests.real_container import make_rootfs

CGROUP_PARENT = f"/bptengine{os.getpid()}"  # a rig kills what is in it
CHAIN_ID = "sha256:" + "ab" * 32  # of one layer: also its diff_id


class Networks:
    """Every container has an empty namespace of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.attached: set[str] = set()
        self.error: Exception | None = None

    async def attach(self, container: Container) -> NetworkAttachment:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        self.attached.add(container.id)
        self._engine.events.publish("network", "connect", "n")
        return NetworkAttachment("", "", "", "")

    async def detach(self, container: Container) -> None:
        await trio.lowlevel.checkpoint()
        if container.id in self.attached:
            self.attached.discard(container.id)
            self._engine.events.publish("network", "disconnect", "n")

    def find(self, name: str) -> None:
        return None


class Rig:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.supervisors = engine.supervisors
        self.execs = engine.execs
        self.logs = engine.logs
        self.networks = cast(Networks, engine.networks)
        self.events: list[Event] = []
        publish = engine.events.publish

        def record(*arguments: Any, **keywords: Any) -> None:
            publish(*arguments, **keywords)
            self.events.append(engine.events._kept[-1])

        cast(Any, engine.events).publish = record

    @property
    def actions(self) -> list[str]:
        return [event.action for event in self.events]

    def event(self, action: str) -> Event:
        return next(event for event in self.events if event.action == action)

    async def create(self, *command: str, name: str = "", **body: Any) -> Container:
        host_config = {"CgroupParent": CGROUP_PARENT, **body.pop("HostConfig", {})}
        request = creation.parse_create(
            {"Image": "busybox", "Cmd": list(command), "HostConfig": host_config, **body}
        )
        container, _ = await self.engine.containers.create(request, name)
        return container

    async def run(self, *command: str, **body: Any) -> Container:
        container = await self.create(*command, **body)
        await self.supervisors.start(container)
        return container

    async def wait(self, container: Container, condition: str = "not-running") -> int:
        with trio.fail_after(20):
            code, _ = await self.supervisors.wait(container, condition).result()
        return code

    async def settled(self, container: Container) -> None:
        """Wait until cleaning up after its exit has ended."""
        active = self.supervisors._active.get(container.id)
        if active is not None:
            with trio.fail_after(20):
                await active.done.wait()

    async def output(self, container: Container, **options: Any) -> bytes:
        """What `logs` writes."""
        found = bytearray()

        async def write(data: bytes) -> None:
            await trio.lowlevel.checkpoint()
            found.extend(data)

        with trio.fail_after(20):
            await self.logs.read(container, LogOptions(**options), write)
        return bytes(found)

    async def exec(self, container: Container, *command: str, stdin: bytes = b"", **config: Any) -> tuple[str, bytes]:
        """Run attached to its end; returns the exec's id and the bytes a client gets."""
        wanted = ExecConfig(cmd=list(command), attach_stdout=True, attach_stderr=True, **config)
        created = self.execs.create(container, wanted, container.id)
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await self.execs.serve(self.execs.check_start(created.id), theirs, tty=wanted.tty)
                await theirs.aclose()

            nursery.start_soon(serve)
            with trio.fail_after(20):
                if stdin:
                    await ours.send_all(stdin)
                await ours.send_eof()
                received = b"".join([bytes(chunk) async for chunk in ours])
        with trio.fail_after(20):
            await created.ended.wait()
        return created.id, received

    def leftovers(self) -> dict[str, Any]:
        """What no container that is gone or stopped should leave behind."""
        config = self.engine.config
        cgroups = self.engine.runtimes.cgroups.at(CGROUP_PARENT)
        found = {
            "mounts": syscalls.mount_points(config.exec_root),
            "bundles": _names(config.exec_root / "containers"),
            "execs": _names(config.exec_root / "execs"),
            "state": [name for one in ("runc", "other") for name in _names(config.exec_root / "runtimes" / one)],
            "cgroups": [str(d) for one in cgroups.directories() if one.is_dir() for d in one.iterdir() if d.is_dir()],
            "networks": sorted(self.networks.attached),
            "supervisors": list(self.supervisors._active),
            "waiters": list(self.supervisors._waiters),
        }
        return {key: value for key, value in found.items() if value}


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def frames(data: bytes) -> dict[int, bytes]:
    """The payloads of stdcopy frames by stream."""
    reader = FrameReader()
    reader.feed(data)
    found: dict[int, bytes] = {}
    while (one := reader.next_frame()) is not None:
        found[int(one[0])] = found.get(int(one[0]), b"") + one[1]
    assert not reader.has_rest
    return found


def attach_options(container: Container, **options: Any) -> AttachOptions:
    wanted: dict[str, Any] = {"stdin": True, "stdout": True, "stderr": True, "stream": True} | options
    return AttachOptions(multiplexed=not container.config.tty, **wanted)


async def _add_image(engine: Engine) -> None:
    if engine.images.all():
        return
    path = await engine.snapshots.new_directory()
    shutil.rmtree(path / "diff")
    make_rootfs(path / "diff")
    await engine.snapshots.commit(Layer(path, CHAIN_ID, "", CHAIN_ID, 2_000_000, 2_000_000))
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [CHAIN_ID]},
    }
    parsed = parse_image_config(json.dumps(document).encode())
    image = ImageRecord(str(parsed.image_id), parsed)
    reference = ReferenceRecord(parse_reference("busybox:latest"), image.image_id)
    await engine.images.store.add(image, [reference])


@asynccontextmanager
async def open_engine(root: Path, exec_root: Path, **settings: Any) -> AsyncIterator[Rig]:
    """One life of an engine. Leaving the block is a crash: containers go on."""
    config = Config(data_root=root / "data", exec_root=exec_root, **settings)
    for directory in (config.data_root, config.exec_root):
        directory.mkdir(exist_ok=True)
    db = Database.open(config.data_root / "meta.db")
    try:
        async with trio.open_nursery() as nursery:
            limiters = Limiters(trio.CapacityLimiter(4), trio.CapacityLimiter(1))
            engine = Engine(config, db, limiters, nursery)
            engine.events = EventBus()
            engine.runtimes = Runtimes(config)
            engine.snapshots = Snapshots(db, config.data_root, config.exec_root, limiters.files)
            engine.images = Images(engine)
            engine.volumes = Volumes(engine)
            engine.networks = cast(Any, Networks(engine))
            engine.logs = Logs(engine)
            engine.containers = Containers(engine)
            engine.supervisors = Supervisors(engine)
            engine.execs = Execs(engine)
            cast(Any, engine).workers = SimpleNamespace()
            await engine.runtimes.probe()
            await _add_image(engine)
            await engine.supervisors.recover()
            yield Rig(engine)
            nursery.cancel_scope.cancel()
    finally:
        _close_descriptors(engine)
        db.close()


def _close_descriptors(engine: Engine) -> None:
    """What the end of a process does."""
    for active in engine.supervisors._active.values():
        if active.run is not None:
            active.run.close()
    engine.logs.close()
    for hub in engine.supervisors.attachments._hubs.values():
        hub.end()


@asynccontextmanager
async def open_rig(root: Path, **settings: Any) -> AsyncIterator[Rig]:
    """An engine of its own; afterwards every container is ended and everything is gone."""
    with tempfile.TemporaryDirectory(prefix="bpt", dir="/dev/shm") as exec_root:
        try:
            async with open_engine(root, Path(exec_root), **settings) as rig:
                yield rig
        finally:
            with trio.CancelScope(shield=True):
                await _end_everything(root, Path(exec_root), **settings)


async def _end_everything(root: Path, exec_root: Path, **settings: Any) -> None:
    async with open_engine(root, exec_root, **settings) as rig:
        for container in rig.engine.containers.all():
            await rig.engine.containers.remove(container.id, force=True, remove_volumes=True)
        left = rig.leftovers()
        for point in left.get("mounts", []):
            syscalls.umount2(point)
        rig.engine.runtimes.cgroups.at(CGROUP_PARENT).kill_and_remove()
    assert left == {}


async def kill_process(pid: int) -> None:
    """Kill it and, where it is ours (we are the subreaper of every engine here), reap it."""
    handle = ProcessHandle.open(pid)
    assert handle is not None
    with handle:
        handle.send_signal(signal.SIGKILL)
        await handle.wait()
        handle.reap()
