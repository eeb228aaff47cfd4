"""New layers and images out of what is streamed to us: load, import, commit.

    each layer: bytes -> worker -> unseen directory, synced; which layer it is, its digest tells
    sidecars beside them, synced once
    one transaction: all layers, all images, all names

Nothing is seen before that transaction and everything after it, so no lease is needed; what is cut leaves directories
without rows, which the next start removes.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core.digest import Digest
from balenapy.core.manifest import DOCKER_CONFIG, ImageConfig
from balenapy.core.reference import Reference
from balenapy.core.sidecar import LAYER_FILE, ImageSidecar, LayerSidecar, SidecarDocument
from balenapy.engine.nurseries import one_error
from balenapy.errors import EngineError
from balenapy.linux import durable
from balenapy.stores.content import file_error
from balenapy.stores.images import ImageRecord, ReferenceRecord
from balenapy.stores.snapshots import Layer, has_layer

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.engine.workers import WorkerFamily, Workers

log = logging.getLogger(__name__)

PLAIN_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
CHUNK_BYTES = 256 << 10

Feed = Callable[[trio.abc.SendStream], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A layer in an unseen directory: which one it is, not yet where in a stack."""

    path: Path
    diff_id: Digest
    blob: Digest  # of the bytes as they came, maybe compressed
    blob_size: int
    size_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image to be: every diff_id of its config is unpacked, known, or in its place already."""

    config: ImageConfig
    references: tuple[Reference, ...] = ()
    parent: str = ""  # image_id
    tagged_ns: int = 0


class Assembly:
    """Layers that are coming and images made of them. What was not committed is gone after the block."""

    def __init__(self, engine: Engine, workers: Workers | WorkerFamily | None = None) -> None:
        self._engine = engine
        self._workers = workers or engine.workers
        self._snapshots = engine.snapshots
        self._stack = AsyncExitStack()
        self._directories: list[Path] = []  # in which something is being made
        self._unpacked: list[Unpacked] = []  # whose directories are ours
        self._sources: dict[Digest, Path] = {}  # diff_id -> a directory that holds the layer
        self.layers: dict[str, Unpacked] = {}  # chain_id -> what was committed

    async def __aenter__(self) -> Assembly:
        await self._stack.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in (*self._directories, *(unpacked.path for unpacked in self._unpacked)):
            await self._snapshots.discard(path)
        await self._stack.aclose()

    # --- layers

    async def unpack(self, feed: Feed) -> Unpacked:
        """Unpack what `feed` writes: a layer's tar, compressed or not.

        Raises: InvalidParameter for what is no tar; NoSpace and other errors of the disk.
        """
        durable.step("unpack layer")
        path = await self._snapshots.new_directory()
        try:
            report = await self._workers.run("unpack", {"directory": str(path)}, feed=feed)
        except BaseException:
            await self._snapshots.discard(path)
            raise
        return self.take(path, report)

    async def new_directory(self) -> Path:
        """A directory that a worker makes a layer in; ours from now on, `take` tells what it has become."""
        path = await self._snapshots.new_directory()
        self._directories.append(path)
        return path

    def take(self, path: Path, report: Mapping[str, Any]) -> Unpacked:
        """Have what a worker made of one of our directories."""
        unpacked = Unpacked(
            path,
            Digest.parse(report["diff_id"]),
            Digest.parse(report.get("digest", report["diff_id"])),
            int(report.get("size", 0)),
            int(report["size_bytes"]),
            int(report["disk_bytes"]),
        )
        if path in self._directories:
            self._directories.remove(path)
        self._unpacked.append(unpacked)
        self._sources.setdefault(unpacked.diff_id, path)
        return unpacked

    async def repack(self, arguments: Mapping[str, object]) -> Unpacked:
        """Unpack what the worker `pack` makes with these arguments."""
        send, receive = trio.open_memory_channel[bytes](0)
        packed = trio.Event()

        async def drain(stream: trio.abc.ReceiveStream) -> None:
            while data := await stream.receive_some(CHUNK_BYTES):
                await send.send(bytes(data))
            send.close()

        async def feed(stdin: trio.abc.SendStream) -> None:
            async for data in receive:
                await stdin.send_all(data)
            await packed.wait()  # an end that comes because packing failed is not the end of a tar

        async def pack() -> None:
            await self._workers.run("pack", arguments, drain=drain)
            packed.set()

        async with one_error(), trio.open_nursery() as nursery:
            nursery.start_soon(pack)
            return await self.unpack(feed)
        raise AssertionError("one_error swallows nothing")

    async def adopt(self, diff: Path, epoch_s: int | None = None) -> Unpacked:
        """Make a layer of a container's writable layer as it lies there: it is moved, not copied, and read once.

        Nothing is mounted on it any more, and the container goes.
        """
        path = await self._snapshots.new_directory()

        def move() -> None:
            (path / "diff").rmdir()
            diff.rename(path / "diff")

        async def make() -> dict[str, Any]:
            try:
                await trio.to_thread.run_sync(move, limiter=self._engine.limiters.files)
            except OSError as error:
                raise file_error(f"cannot move {diff}", error) from error
            return await self._workers.run("pack", {"directory": str(path), "fresh": True, "epoch": epoch_s})

        return await self._fresh(path, make)

    async def make(self, verb: str, arguments: Mapping[str, object]) -> Unpacked:
        """Make a layer by a worker that fills a snapshot directory: `place`, `squash`."""
        path = await self._snapshots.new_directory()

        async def make() -> dict[str, Any]:
            return await self._workers.run(verb, {**arguments, "directory": str(path)})

        return await self._fresh(path, make)

    async def _fresh(self, path: Path, make: Callable[[], Awaitable[dict[str, Any]]]) -> Unpacked:
        durable.step("make layer")
        try:
            report = await make()
        except BaseException:
            await self._snapshots.discard(path)
            raise
        diff_id = Digest.parse(report["diff_id"])
        unpacked = Unpacked(
            path, diff_id, diff_id, int(report["tar_size"]), int(report["size_bytes"]), int(report["disk_bytes"])
        )
        self._unpacked.append(unpacked)
        self._sources.setdefault(diff_id, path)
        return unpacked

    async def know(self, layer: Layer) -> Digest:
        """Count on a committed layer, wherever it stands: its bytes need not be read again."""
        await self._stack.enter_async_context(self._snapshots.pinned(layer.chain_id))
        diff_id = Digest.parse(layer.diff_id)
        self._sources.setdefault(diff_id, layer.path)
        return diff_id

    async def keep(self, chain_id: str) -> None:
        """Keep a stack that is there as long as we are at work. Raises: SystemFailure, when it is not."""
        await self._stack.enter_async_context(self._snapshots.pinned(chain_id))

    def source(self, diff_id: Digest) -> Path:
        """A directory that holds a layer which came or is known."""
        return self._sources[diff_id]

    async def hold(self, chain_id: str) -> None:
        """Keep a stack from being collected until the end of the block. Raises: SystemFailure, when it is not there."""
        if chain_id:
            await self._stack.enter_async_context(self._snapshots.pinned(chain_id))

    # --- images

    async def commit(self, images: Sequence[NewImage], *, described: bool = True) -> list[ImageRecord]:
        """Make the images and all that they need visible.

        Args:
            described: sidecars are written, so that images and layers can be told without the database. They are
                synced, which a build does once, at its end.
        Raises: EngineError; nothing was changed then.
        Cancellation: all or nothing.
        """
        placed: dict[str, Layer] = {}
        blobs: dict[str, Unpacked] = {}
        for image in images:
            parent = ""
            for chain, diff_id in zip(image.config.chain_ids, image.config.diff_ids, strict=True):
                chain_id = str(chain)
                if chain_id not in placed and not await self._keep(chain_id):
                    unpacked = await self._directory_of(diff_id, placed)
                    blobs[chain_id] = unpacked
                    placed[chain_id] = Layer(
                        unpacked.path,
                        chain_id,
                        parent,
                        str(diff_id),
                        unpacked.size_bytes,
                        unpacked.disk_bytes,
                    )
                parent = chain_id
        if described:
            await self._describe(images, placed, blobs)
        self.layers.update(blobs)
        return await self._insert(images, placed)

    async def _keep(self, chain_id: str) -> bool:
        """Whether a layer is in its place already; then it stays at least as long as we need it."""
        if self._snapshots.find(chain_id) is None:
            return False
        try:
            await self._stack.enter_async_context(self._snapshots.pinned(chain_id))
        except EngineError:  # collected, or found to be damaged, just now
            return False
        return True

    async def _directory_of(self, diff_id: Digest, placed: Mapping[str, Layer]) -> Unpacked:
        """A directory with this layer that has no place yet; the same layer elsewhere in a stack needs one more."""
        taken = {layer.path for layer in placed.values()}
        for unpacked in self._unpacked:
            if unpacked.diff_id == diff_id and unpacked.path not in taken:
                return unpacked
        source = self._sources[diff_id]
        return await self.repack({"directory": str(source), "diff_id": str(diff_id)})

    async def _describe(
        self, images: Sequence[NewImage], placed: Mapping[str, Layer], blobs: Mapping[str, Unpacked]
    ) -> None:
        """Write the sidecars of new images and their new layers."""
        layers = {chain_id: (layer, blobs[chain_id]) for chain_id, layer in placed.items()}
        await self.describe(images, layers)

    async def describe(self, images: Sequence[NewImage], layers: Mapping[str, tuple[Layer, Unpacked]]) -> None:
        """Write sidecars: of these layers, and of images, which may have layers of before."""
        files: list[tuple[Path, bytes]] = []
        for chain_id, (layer, unpacked) in layers.items():
            sidecar = LayerSidecar(
                Digest.parse(chain_id),
                Digest.parse(layer.parent) if layer.parent else None,
                unpacked.diff_id,
                unpacked.blob,
                unpacked.blob_size,
                PLAIN_LAYER,
            )
            files.append((layer.path / LAYER_FILE, sidecar.encode()))
        for image in images:
            made = layers.get(image.config.chain_id)
            top = made[0] if made is not None else self._snapshots.find(image.config.chain_id)
            if top is None:
                continue
            document = SidecarDocument(image.config.image_id, DOCKER_CONFIG, image.config.raw)
            names = tuple((reference, "", "") for reference in image.references)
            description = ImageSidecar(image.config.image_id, (document,), names)
            # One that exists beside a layer of before knows a manifest too.
            if made is not None or not (top.path / description.file_name).exists():
                files.append((top.path / description.file_name, description.encode()))

        def write() -> None:
            for path, data in files:
                path.write_bytes(data)
            durable.sync_filesystem(files[0][0].parent)

        if files:
            try:
                await trio.to_thread.run_sync(write, limiter=self._engine.limiters.files)
            except OSError as error:
                raise file_error("cannot write the image's description", error) from error

    async def _insert(self, images: Sequence[NewImage], placed: Mapping[str, Layer]) -> list[ImageRecord]:
        """The transaction."""
        store = self._engine.images.store
        records, named = [], []
        for image in images:
            image_id = str(image.config.image_id)
            size_bytes = sum(
                placed[str(chain_id)].size_bytes if str(chain_id) in placed else self._size_of(str(chain_id))
                for chain_id in image.config.chain_ids
            )
            records.append(ImageRecord(image_id, image.config, image.parent, size_bytes, image.tagged_ns))
            named.append([ReferenceRecord(reference, image_id) for reference in image.references])

        def insert(connection: sqlite3.Connection) -> list[Layer]:
            durable.step("add images")
            # Somebody may have pulled one of the layers meanwhile; then ours goes.
            new = [layer for layer in placed.values() if not has_layer(connection, layer.chain_id)]
            for layer in new:
                self._snapshots.insert(connection, layer)
            for record, references in zip(records, named, strict=True):
                store.insert(connection, record, references)
            return new

        def apply(new: list[Layer]) -> None:
            for layer in new:
                self._snapshots.inserted(layer)
            paths = {layer.path for layer in new}
            self._unpacked = [unpacked for unpacked in self._unpacked if unpacked.path not in paths]
            for record, references in zip(records, named, strict=True):
                store.inserted(record, references)

        await self._engine.db.change(insert, apply)
        return [store.find(record.image_id) or record for record in records]

    def _size_of(self, chain_id: str) -> int:
        layer = self._snapshots.find(chain_id)
        return layer.size_bytes if layer is not None else 0
