"""What is done to the stores while the disk is watched: every journey that leaves something behind.

`Session` runs them on a data root one after the other, with the real stores, workers and registry client, and marks in
the disk's log when each begins and what a client may expect from its end on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from balenapy.core import lifecycle
from balenapy.core.container import Container, Status
from balenapy.engine.containers import _InitLayer
from balenapy.engine.engine import Engine
from balenapy.errors import Conflict
from balenapy.stores import content
from balenapy.stores.containers import ContainerStore
from tests.compat.images import file, make_tar
from tests.deltas_fixture import DeltaFixture, add_delta, native_delta
from tests.engine.image_engine import image_engine, pull, settle
from tests.images_fixture import ImageFixture, layered
from tests.powercut import fuse
from tests.registry.fake import FakeRegistry

NOW_NS = 1_700_000_000 * 10**9

# The worker as it is, but its syncfs reaches the log (FUSE does not pass it on).
_SAY_SYNCFS = """
import os
from balenapy.linux import syscalls
real = syscalls.syncfs
def syncfs(fd):
    real(fd)
    os.setxattr(fd, "user.powercut.syncfs", b"1")
syscalls.syncfs = syncfs
"""


def say_syncfs(engine: Engine) -> None:
    """Have the workers of this engine tell the recording file system of their syncfs."""
    command = engine.workers._python
    engine.workers._python = [*command[:-1], command[-1].replace("; from", f"\n{_SAY_SYNCFS}\nfrom")]


def blob(size: int, seed: int) -> bytes:
    """Bytes that do not compress, no block like another."""
    return random.Random(seed).randbytes(size)


def first_image() -> ImageFixture:
    return layered()


def second_image() -> ImageFixture:
    """Shares two layers with the first; its own has files around the size of a block."""
    files = [file(f"f{size}", blob(size, size)) for size in (0, 1, 511, 512, 4095, 4096, 4097, 20_000)]
    return ImageFixture((*first_image().tars[:2], make_tar(files)))


def third_image() -> ImageFixture:
    """One plain layer that is staged in many pieces on a slow link."""
    return ImageFixture((make_tar([file("big", blob(150_000, 3))]),), compressions=("plain",))


def fourth_image() -> ImageFixture:
    """The third one with more in it; it comes as a delta, which is staged in several pieces."""
    return ImageFixture((make_tar([file("big", blob(150_000, 3)), file("more", blob(200_000, 4))]),))


@functools.cache
def delta_to_fourth() -> DeltaFixture:
    return native_delta(third_image(), fourth_image())


class Session:
    """One engine's life on a data root; `open` may be called again, as after a stop."""

    def __init__(
        self, root: Path, registry: FakeRegistry, *, watched: bool, told: dict[str, Any] | None = None, name: str = ""
    ) -> None:
        """`told` is what clients know of this data root already; `name` tells our containers from those there."""
        self.root = root
        self.registry = registry
        self.suffix = name
        self._watched = watched
        self._told = told or {}
        self.engine: Engine
        self.containers: ContainerStore

    def name(self, image: str) -> str:
        return f"{self.registry.host}/team/app:{image}"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Session]:
        """Start (recovery included) and, at the end of the block, stop."""
        await self._mark("start")
        async with image_engine(self.root) as engine:
            if self._watched:
                say_syncfs(engine)
            self.engine, self.containers = engine, ContainerStore(engine.db)
            yield self
        await self._mark("stopped")

    @asynccontextmanager
    async def journey(self, name: str) -> AsyncIterator[None]:
        await self._mark(name)
        yield
        self._told = self.state()
        await self._mark("")

    async def _mark(self, journey: str) -> None:
        """Say what is under way ("" for nothing), and what clients were told until now."""
        if self._watched:
            text = json.dumps({"journey": journey, "told": self._told})
            await trio.to_thread.run_sync(fuse.mark, self.root, text)

    def state(self) -> dict[str, Any]:
        """As `invariants.Found.state`."""
        return {
            "references": {
                record.reference.canonical(): record.image_id
                for record in sorted(self.engine.images.store.references(), key=lambda one: one.reference.canonical())
            },
            "images": sorted(image.image_id for image in self.engine.images.all()),
            "containers": {one.name: one.state.status.value for one in sorted(self.containers.all(), key=_by_name)},
        }

    # --- journeys

    async def pull(self, image: str, mode: str = "auto") -> None:
        async with self.journey(f"pull {image}"):
            await pull(self.engine, self.name(image), mode=mode)

    async def tag(self, image: str, name: str, tag: str) -> None:
        async with self.journey(f"tag {name}:{tag}"):
            await self.engine.images.tag(self.name(image), name, tag)

    async def remove(self, name: str) -> None:
        async with self.journey(f"remove {name}"):
            with contextlib.suppress(Conflict):  # a container from before the cut has it
                await self.engine.images.remove(name)
        async with self.journey("collect"):
            await settle(self.engine)

    async def run_container(self, image: str, name: str) -> Container:
        """Create, start and exit: what the stores are told of it, in its order."""
        record = self.engine.images.resolve(self.name(image))
        container = Container(
            id=(name.encode().hex() * 64)[:64],
            name=name,
            created_ns=NOW_NS,
            path="true",
            image_id=record.image_id,
            chain_id=record.chain_id,
        )
        async with self.journey(f"create {name}"):
            layers = [layer.diff for layer in self.engine.snapshots.chain(record.chain_id)]
            await self.engine.snapshots.prepare(
                container.id,
                record.chain_id,
                fill=_InitLayer(layers).fill,
                also=lambda connection: self.containers.write(connection, container),
            )
            self.containers.adopt(container)
        for step, status in (("start", Status.RUNNING), ("exit", Status.EXITED)):
            async with self.journey(f"{step} {name}"):
                lifecycle.move(container.state, status)
                await self.containers.update_state(container)
        return container

    async def remove_container(self, container: Container) -> None:
        async with self.journey(f"remove {container.name}"):
            await self.engine.snapshots.remove(
                container.id, also=lambda connection: self.containers.erase(connection, container.id)
            )
            self.containers.forget(container.id)
            await self.engine.snapshots.trash.empty()

    async def fail_to_pull(self, image: str) -> None:
        """A pull that is cancelled when a part has been staged, as when its client leaves."""
        async with self.journey(f"cancelled pull {image}"), trio.open_nursery() as nursery:

            async def pull_until_cancelled() -> None:
                await pull(self.engine, self.name(image))
                nursery.cancel_scope.cancel()  # its layer was there already

            nursery.start_soon(pull_until_cancelled)
            with trio.fail_after(20):
                while not any(self.engine.images.content.sizes().values()):  # noqa: ASYNC110 - nobody tells us
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


def _by_name(container: Container) -> str:
    return container.name


def fill_registry(registry: FakeRegistry) -> None:
    registry.has_referrers = True
    images = (first_image(), second_image(), third_image(), fourth_image())
    for tag, image in zip("1234", images, strict=True):
        registry.add("team/app", tag, image)
    add_delta(registry, "team/app", delta_to_fourth())


async def every_journey(session: Session, *, slow_link: bool) -> None:
    """All of them; on a slow link blobs are staged durably."""
    with _staging(slow_link):
        async with session.open():
            await session.pull("1")
            await session.pull("2")
            await session.tag("1", "local", "1")
            container = await session.run_container("2", f"first{session.suffix}")
            session.registry.fault("blobs/" + third_image().layers[0].digest, stall_at=100_000)
            await session.fail_to_pull("3")
        async with session.open():
            container = session.containers.find(container.id) or container
            session.registry.add("team/app", "1", second_image())
            await session.pull("1")  # the tag moves
            await session.pull("3")  # goes on where it was
            session.registry.fault("blobs/" + delta_to_fourth().layers[0].digest, stall_at=40_000)
            await session.fail_to_pull("4")
            other = await session.run_container("1", f"second{session.suffix}")
            await session.remove_container(container)
            await session.remove("local:1")
            await session.remove(session.name("2"))
        async with session.open():
            await session.remove_container(session.containers.find(other.id) or other)
            await session.remove(session.name("1"))
            await session.pull("2")
            await session.pull("4", mode="require")  # by delta, where it was
            async with session.journey("prune"):
                await session.engine.images.collector.collect()


class _staging:
    """Blobs are staged in pieces that fit our small images; on a slow link durably, from the first byte."""

    NAMES = ("WRITE_BYTES", "STAGE_AFTER_S", "SYNC_BYTES", "SYNC_INTERVAL_S")
    VALUES = (16 << 10, -1.0, 30_000, -1.0)

    def __init__(self, slow_link: bool) -> None:
        self._slow_link = slow_link
        self._before = [getattr(content, name) for name in self.NAMES]

    def __enter__(self) -> None:
        for name, value in zip(self.NAMES, self.VALUES, strict=True):
            if self._slow_link or name == "WRITE_BYTES":
                setattr(content, name, value)

    def __exit__(self, *_: object) -> None:
        for name, value in zip(self.NAMES, self._before, strict=True):
            setattr(content, name, value)
