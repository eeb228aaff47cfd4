"""`docker cp`: look at, read and write files of a container, running or not. The work is a worker's (worker/archive).

A running container is looked at where it is mounted. One that does not run is mounted for the call, by the worker and
for the worker alone: to read, below a scratch layer, so that nothing of the container is held or changed; to write, on
its own layer. overlayfs allows one mount that writes, so its lock is held meanwhile, for as long as the client keeps
sending: a start waits for that, a removal ends it.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core import lifecycle
from balenapy.core.containerpath import PathStat, clean_path
from balenapy.errors import Conflict, InvalidParameter, Unavailable

if TYPE_CHECKING:
    from pathlib import Path

    from balenapy.core.container import Container
    from balenapy.engine.engine import Engine

READ_BYTES = 256 << 10
STALL_S = 60.0  # without a byte from a client on whom others wait
STAT_MAX_BYTES = 64 << 10  # the line before a tar: two paths
UNMOUNT_TIMEOUT_S = 10

Write = Callable[[bytes], Awaitable[None]]


def check_path(path: str) -> None:
    """Before the container is looked for. Raises: InvalidParameter."""
    if not path:
        raise InvalidParameter("bad parameter: pathcannot be empty")  # sic


async def stat_path(engine: Engine, name: str, path: str) -> PathStat:
    """Raises: InvalidParameter, NotFound, SystemFailure."""
    check_path(path)
    container = engine.containers.find(name)
    async with _view_to_read(engine, container) as view:
        report = await engine.workers.run("archive", _arguments("stat", name, path, view))
    return PathStat(**report)


async def read_archive(
    engine: Engine, name: str, path: str, encoding: str, begin: Callable[[PathStat], None], write: Write
) -> None:
    """Write a tar of a file or directory, compressed if `encoding` says so; `begin` is called before its first byte.

    Raises: InvalidParameter, NotFound, SystemFailure; after `begin`, the tar has no end then.
    """
    check_path(path)
    container = engine.containers.find(name)

    async def drain(stream: trio.abc.ReceiveStream) -> None:
        head = b""
        while b"\n" not in head:
            data = await stream.receive_some(READ_BYTES)
            if not data or len(head) > STAT_MAX_BYTES:
                return  # the report says why
            head += data
        line, _, rest = head.partition(b"\n")
        begin(PathStat(**json.loads(line)))
        engine.events.container(container, "archive-path")
        await write(rest)
        while data := await stream.receive_some(READ_BYTES):
            await write(bytes(data))

    async with _view_to_read(engine, container) as view:
        arguments = _arguments("read", name, path, view) | {"encoding": encoding}
        await engine.workers.run("archive", arguments, drain=drain)


async def write_archive(
    engine: Engine,
    name: str,
    path: str,
    body: AsyncIterable[bytes],
    *,
    keep_types: bool = False,
    give_to_user: bool = False,
) -> None:
    """Extract a tar, compressed or not, into a directory.

    Args:
        keep_types: refuse to replace a directory by something else, or something else by a directory.
        give_to_user: everything belongs to the container's user then, whatever the tar says.

    Raises: InvalidParameter, NotFound, SystemFailure; Conflict when the container is removed meanwhile, Unavailable
        when the client stalls. What was extracted before stays.
    Cancellation: the same.
    """
    check_path(path)
    container = engine.containers.find(name)

    async def feed(stream: trio.abc.SendStream) -> None:
        pieces = aiter(body)
        while True:
            try:
                with trio.fail_after(STALL_S):
                    data = await anext(pieces)
            except StopAsyncIteration:
                return
            except trio.TooSlowError:
                raise Unavailable(f"nothing more of the archive came for {STALL_S:.0f} s") from None
            await stream.send_all(data)

    async with _view_to_write(engine, container) as view:
        arguments = _arguments("write", name, path, view) | {
            "keep_types": keep_types,
            "owner": container.config.user if give_to_user else "",
            "readonly_root": container.host_config.readonly_rootfs,
        }
        await engine.workers.run("archive", arguments, feed=feed)
    engine.events.container(container, "extract-to-dir")


def _arguments(action: str, name: str, path: str, view: dict[str, Any]) -> dict[str, Any]:
    return {"action": action, "container": name, "asked": path, "path": clean_path(path), "view": view}


@asynccontextmanager
async def _view_to_read(engine: Engine, container: Container) -> AsyncIterator[dict[str, Any]]:
    """How a worker gets to see the container's files (worker/rootview)."""
    rootfs = _rootfs(engine, container)
    if rootfs is not None:
        yield {"rootfs": str(rootfs), "mounts": _mounts(container)}
    elif engine.volumes.needs_mount(container):
        async with _view_to_write(engine, container) as view:
            yield view
    else:
        active = engine.snapshots.get(container.id)
        async with engine.snapshots.pinned(active.parent):
            dirs = engine.snapshots.mounts(container.id)
            overlay = {"lower": list(map(str, (dirs.upper, *dirs.lower))), "upper": "", "work": ""}
            yield {"overlay": overlay | {"at": str(engine.config.exec_root)}, "mounts": _mounts(container)}


@asynccontextmanager
async def _view_to_write(engine: Engine, container: Container) -> AsyncIterator[dict[str, Any]]:
    """The same, with what is written kept. Raises: Conflict, when the container is removed meanwhile."""
    with engine.containers.until_removed(container) as scope:
        async with _mounted_to_write(engine, container) as view:
            yield view
    if scope.cancelled_caught:
        raise Conflict(f"container {container.id} is being removed")


@asynccontextmanager
async def _mounted_to_write(engine: Engine, container: Container) -> AsyncIterator[dict[str, Any]]:
    rootfs = _rootfs(engine, container)
    if rootfs is not None:
        yield {"rootfs": str(rootfs), "mounts": _mounts(container)}
        return
    async with engine.locks(f"container/{container.id}"):
        rootfs = _rootfs(engine, container)  # it may have been started while we waited
        if rootfs is not None:
            yield {"rootfs": str(rootfs), "mounts": _mounts(container)}
            return
        if lifecycle.being_removed(container.state) or engine.containers.store.find(container.id) is None:
            raise Conflict(f"container {container.id} is being removed")
        await engine.supervisors.wait_until_unmounted(container)
        await engine.volumes.mount(container)
        try:
            active = engine.snapshots.get(container.id)
            dirs = engine.snapshots.mounts(container.id)
            overlay = {
                "lower": list(map(str, dirs.lower)),
                "upper": str(dirs.upper),
                "work": str(dirs.work),
                "at": str(active.path),
            }
            async with engine.snapshots.pinned(active.parent):
                yield {"overlay": overlay, "mounts": _mounts(container)}
        finally:
            with trio.move_on_after(UNMOUNT_TIMEOUT_S, shield=True):
                await engine.volumes.unmount(container)


def _rootfs(engine: Engine, container: Container) -> Path | None:
    bundle = engine.supervisors.bundle_of(container) if container.state.running else None
    return bundle.rootfs if bundle is not None else None


def _mounts(container: Container) -> list[dict[str, Any]]:
    """Binds and volumes, and the network's files unless something else is mounted there."""
    mounts = {
        point.destination: {"source": point.source, "destination": point.destination, "writable": point.rw}
        for point in container.mounts
        if point.type in ("bind", "volume")
    }
    sandbox = container.sandbox
    for destination, source in (
        ("/etc/resolv.conf", sandbox.resolv_conf_path),
        ("/etc/hostname", sandbox.hostname_path),
        ("/etc/hosts", sandbox.hosts_path),
    ):
        if source and os.path.exists(source):
            writable = not container.host_config.readonly_rootfs
            mounts.setdefault(destination, {"source": source, "destination": destination, "writable": writable})
    return list(mounts.values())
