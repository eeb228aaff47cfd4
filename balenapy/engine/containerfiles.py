"""A container's files as a whole: what it changed, all of them as a tar, an image of them."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core.container import Container, ContainerConfig, Status
from balenapy.core.creation import fill_from_image
from balenapy.core.imageconfig import Child, child_config
from balenapy.core.instructions import apply_changes
from balenapy.core.manifest import parse_image_config
from balenapy.core.reference import parse_reference
from balenapy.engine.assembly import CHUNK_BYTES, Assembly, NewImage
from balenapy.errors import Conflict, EngineError

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

Write = Callable[[bytes], Awaitable[None]]

UNPAUSE_TIMEOUT_S = 10


async def container_changes(engine: Engine, name: str) -> list[dict[str, Any]] | None:
    """`GET /containers/{name}/changes`; None when there are none. Raises: NotFound, SystemFailure."""
    container = engine.containers.find(name)
    upper = engine.snapshots.get(container.id).diff
    async with engine.snapshots.view_container(container.id, changes=False) as lower:
        report = await engine.workers.run("changes", {"upper": str(upper), "lower": str(lower)})
    return [{"Path": path, "Kind": kind} for kind, path in report["changes"]] or None


def check_export(engine: Engine, name: str) -> Container:
    """The container, if its files can be had. Raises: NotFound, Conflict."""
    container = engine.containers.find(name)
    if container.state.status is Status.DEAD:
        raise Conflict(f"You cannot export container {container.id} which is Dead")
    if container.state.status is Status.REMOVING:
        raise Conflict(f"You cannot export container {container.id} which is being removed")
    return container


async def export_container(engine: Engine, container: Container, write: Write) -> None:
    """Write a tar of all its files, without volumes.

    Raises: EngineError; the tar has no end then.
    """

    async def drain(stream: trio.abc.ReceiveStream) -> None:
        while data := await stream.receive_some(CHUNK_BYTES):
            await write(bytes(data))

    async with _files_of(engine, container) as root:
        await engine.workers.run("pack", {"root": str(root)}, drain=drain)
    engine.events.container(container, "export")


@asynccontextmanager
async def _files_of(engine: Engine, container: Container) -> AsyncIterator[Path]:
    """Its root: where it is mounted while it runs, for overlayfs allows one mount that writes; else a view."""
    bundle = engine.supervisors.bundle_of(container) if container.state.running else None
    if bundle is not None:
        yield bundle.rootfs
        return
    async with engine.snapshots.view_container(container.id, changes=True) as path:
        yield path


@dataclass(frozen=True, slots=True)
class CommitRequest:
    """What `POST /commit` asks for; `config` instead of the container's own."""

    container: str
    repository: str = ""
    tag: str = ""
    comment: str = ""
    author: str = ""
    pause: bool = True
    changes: Sequence[str] = ()
    config: ContainerConfig | None = None


async def commit_container(engine: Engine, request: CommitRequest) -> str:
    """Make an image of a container; its ID.

    Tagging comes last: when that fails, the image stays without a name.

    Raises: NotFound, Conflict, InvalidParameter; SystemFailure for a bad name.
    Cancellation: the image is there or not; the container runs on.
    Source: moby daemon/commit.go.
    """
    container = engine.containers.find(request.container)
    if container.state.status is Status.DEAD:
        raise Conflict(f"You cannot commit container {container.id} which is Dead")
    if container.state.status is Status.REMOVING:
        raise Conflict(f"You cannot commit container {container.id} which is being removed")
    async with _paused(engine, container, request.pause):
        config = apply_changes(request.config or container.config, request.changes)
        fill_from_image(config, container.config)
        image_id = await _make_image(engine, container, config, request)
        reference = ""
        if request.repository:
            await engine.images.tag(image_id, request.repository, request.tag)
            name = parse_reference(request.repository)
            reference = (name.without_tag().with_tag(request.tag) if request.tag else name).familiar()
        engine.events.container(container, "commit", comment=request.comment, imageID=image_id, imageRef=reference)
    return image_id


@asynccontextmanager
async def _paused(engine: Engine, container: Container, wanted: bool) -> AsyncIterator[None]:
    """Keep a running container from writing meanwhile. One that cannot be paused is committed as it runs."""
    paused = wanted and container.state.status is Status.RUNNING and await _pause(engine, container)
    try:
        yield
    finally:
        if paused:
            with trio.move_on_after(UNPAUSE_TIMEOUT_S, shield=True):
                await _unpause(engine, container)


async def _pause(engine: Engine, container: Container) -> bool:
    try:
        await engine.supervisors.pause(container)
    except EngineError as error:  # it has just ended, or its cgroups have no freezer
        log.info("cannot pause container=%s error=%s", container.short_id, error.message)
        return False
    return True


async def _unpause(engine: Engine, container: Container) -> None:
    try:
        await engine.supervisors.unpause(container)
    except EngineError as error:  # it was killed, or somebody was faster
        log.info("cannot unpause container=%s error=%s", container.short_id, error.message)


async def _make_image(engine: Engine, container: Container, config: ContainerConfig, request: CommitRequest) -> str:
    parent = engine.images.get(container.image_id) if container.image_id else None
    active = engine.snapshots.get(container.id)
    async with Assembly(engine) as work:
        unpacked = await work.repack({"root": str(active.diff)})
        engine.snapshots.get(container.id)  # removed meanwhile, what was packed may be half of it
        child = Child(
            unpacked.diff_id,
            container.id,
            replace(container.config),
            config,
            request.author,
            request.comment,
            time.time_ns(),
        )
        raw = child_config(parent.config if parent is not None else None, child, engine.pulls.platform)
        image = NewImage(parse_image_config(raw), parent=parent.image_id if parent is not None else "")
        await work.commit([image])
    return str(image.config.image_id)
