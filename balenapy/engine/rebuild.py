"""After the database was lost: find layers and images again by what stands beside the layers' files.

Layers are verified whole (their tar is made again and hashed), so this takes as long as reading them; it runs in the
background while the engine serves what it knows. What cannot be verified is put aside.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from balenapy.core.manifest import parse_image_config
from balenapy.core.sidecar import (
    LAYER_FILE,
    SIDECAR_MAX_BYTES,
    InvalidSidecar,
    LayerSidecar,
    decode_image,
    decode_layer,
)
from balenapy.errors import EngineError
from balenapy.linux import durable
from balenapy.stores import leases
from balenapy.stores.images import Document, ImageRecord, ReferenceRecord
from balenapy.stores.snapshots import Layer

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

LEASE = "rebuild"


async def rebuild(engine: Engine) -> None:
    """Take back every layer that no row names, then the images that are complete. Ends soon when there are none."""
    paths = engine.snapshots.unclaimed
    if not paths:
        return
    try:
        log.warning("rebuilding from what stands beside the layers directories=%d", len(paths))
        layers = await _rebuild_layers(engine, paths)
        images = await _rebuild_images(engine)
        log.warning("rebuilt layers=%d images=%d", layers, images)
        await engine.images.leases.drop(LEASE)
        await engine.snapshots.claimed()
        engine.images.collector.wake()
    except Exception:  # a background job must not end the daemon
        log.exception("rebuilding failed")


async def _rebuild_layers(engine: Engine, paths: tuple[Path, ...]) -> int:
    waiting: dict[Path, LayerSidecar] = {}
    for path in paths:
        try:
            waiting[path] = decode_layer(await _read(engine, path / LAYER_FILE))
        except (InvalidSidecar, OSError) as error:
            log.error("layer cannot be told path=%s error=%s", path, error)
            await _put_aside(engine, path)
    taken = 0
    while waiting:
        ready = [path for path, layer in waiting.items() if layer.parent is None or _has(engine, str(layer.parent))]
        if not ready:
            break
        for path in ready:
            taken += await _take(engine, path, waiting.pop(path))
    for path, layer in waiting.items():
        log.error("layer lacks the one below path=%s parent=%s", path, layer.parent)
        await _put_aside(engine, path)
    return taken


def _has(engine: Engine, chain_id: str) -> bool:
    return engine.snapshots.find(chain_id) is not None


async def _take(engine: Engine, path: Path, layer: LayerSidecar) -> bool:
    """Verify one directory and make it a layer."""
    chain_id = str(layer.chain_id)
    if _has(engine, chain_id):  # pulled again meanwhile, or found twice
        await engine.snapshots.trash.discard(path)
        return False
    try:
        report = await engine.workers.run("pack", {"directory": str(path), "diff_id": str(layer.diff_id)})
        _, disk_bytes = await trio.to_thread.run_sync(durable.tree_size, path, limiter=engine.limiters.files)
        found = Layer(
            path,
            chain_id,
            str(layer.parent or ""),
            str(layer.diff_id),
            int(report["size_bytes"]),
            disk_bytes,
        )

        def hold(connection: sqlite3.Connection) -> None:
            leases.hold(connection, LEASE, time.time_ns(), [("chain", chain_id)])

        await engine.snapshots.commit(found, hold)
    except EngineError as error:
        log.error("layer is damaged path=%s error=%s", path, error.message)
        await _put_aside(engine, path)
        return False
    return True


async def _rebuild_images(engine: Engine) -> int:
    """Add the images whose layers are all there. Names that are taken meanwhile stay where they are."""
    found = 0
    for layer in list(engine.snapshots.layers()):
        for path in sorted(layer.path.glob("image-*.json")):
            try:
                found += await _take_image(engine, path)
            except (EngineError, OSError) as error:
                log.error("image cannot be told path=%s error=%s", path, error)
    return found


async def _take_image(engine: Engine, path: Path) -> bool:
    sidecar = decode_image(await _read(engine, path))
    image_id = str(sidecar.image_id)
    config = parse_image_config(sidecar.documents[0].raw)
    store = engine.images.store
    if store.find(image_id) is not None or not all(_has(engine, str(chain_id)) for chain_id in config.chain_ids):
        return False
    await store.add(
        ImageRecord(image_id, config, size_bytes=engine.snapshots.size_bytes(config.chain_id)),
        [
            ReferenceRecord(name, image_id, manifest, image_manifest)
            for name, manifest, image_manifest in sidecar.references
            if store.find_reference(name) is None
        ],
        [Document(str(document.digest), document.media_type, document.raw) for document in sidecar.documents[1:]],
    )
    return True


async def _read(engine: Engine, path: Path) -> bytes:
    def read() -> bytes:
        with path.open("rb") as file:
            return file.read(SIDECAR_MAX_BYTES + 1)

    return await trio.to_thread.run_sync(read, limiter=engine.limiters.files)


async def _put_aside(engine: Engine, path: Path) -> None:
    await trio.to_thread.run_sync(engine.snapshots.put_aside_nowait, path, limiter=engine.limiters.files)
