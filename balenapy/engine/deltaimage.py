"""balena's delta images: made of two images that are here, and applied when they are loaded (a pull does so itself)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from balenapy.core import deltaimage
from balenapy.core.deltaimage import common_layers, delta_image, encode_config
from balenapy.core.digest import sha256_digest
from balenapy.core.imagearchive import ArchivedImage, InvalidArchive
from balenapy.core.manifest import parse_image_config
from balenapy.core.reference import Reference, parse_reference
from balenapy.core.wire import rfc3339nano
from balenapy.engine.assembly import Assembly, NewImage, Unpacked
from balenapy.engine.deltas import base_of, layer_arguments
from balenapy.engine.lines import Lines, write_during
from balenapy.errors import InvalidParameter

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.stores.images import ImageRecord

log = logging.getLogger(__name__)

Write = Callable[[bytes], Awaitable[None]]
LAYERS_DIFFER = "layers from manifest don't match image configuration"


class DeltaOrder:
    """What `POST /images/delta` is asked for, looked up before anything is answered."""

    def __init__(self, engine: Engine, base: str, target: str, tag: str) -> None:
        """Raises: NotFound, InvalidParameter."""
        self.base_name = base
        self.base = engine.images.resolve(base)
        self.target = engine.images.resolve(target)
        self.tag: Reference | None = None
        if tag:
            self.tag = parse_reference(tag)
            if self.tag.digest is not None:
                raise InvalidParameter("build tag cannot contain a digest")
            self.tag = self.tag.with_default_tag()


async def create(engine: Engine, order: DeltaOrder, write: Write) -> None:
    """Make the delta image, telling of it in balena-engine's words.

    Raises: EngineError; nothing is left then.
    Cancellation: the image is there or not.
    """
    lines = Lines(write)

    async def work() -> None:
        image = await _make(engine, order, lines)
        lines.message(f"Created delta: {image.image_id}")
        if order.tag is not None:
            await engine.images.tag(image.image_id, order.tag.familiar(), "")
            lines.message(f"Successfully tagged {order.tag.familiar()}\n")

    await write_during(lines, work)


async def _make(engine: Engine, order: DeltaOrder, lines: Lines) -> ImageRecord:
    base, target = order.base.config, order.target.config
    common = common_layers(base, target)
    async with Assembly(engine) as work:
        for image in (order.base, order.target):
            if image.chain_id:
                await work.keep(image.chain_id)
        sources = list(reversed(engine.snapshots.chain(order.target.chain_id)))
        changed = sources[common:]
        unpacked: list[Unpacked] = []
        lines.advance(order.base_name, "Fingerprinting", 0, order.base.size_bytes)
        if changed:
            unpacked = await _make_layers(engine, order, work, common, lines)
        else:
            _tell_begin(order, common, lines)
        if common:
            await work.unpack(_feed_empty)
        diff_ids = [sha256_digest(deltaimage.EMPTY_LAYER)] * common + [layer.diff_id for layer in unpacked]
        config = parse_image_config(encode_config(order.base.image_id, target, diff_ids, rfc3339nano(time.time_ns())))
        normal = sum(layer.size_bytes for layer in sources)
        made = sum(layer.size_bytes for layer in unpacked)
        (record,) = await work.commit([NewImage(config)])
    lines.message(deltaimage.improvement(normal, made))
    return record


def _tell_begin(order: DeltaOrder, common: int, lines: Lines) -> None:
    """The base is read: say so, and what becomes of each layer."""
    lines.step(order.base_name, "Fingerprint complete")
    for diff_id in order.target.config.diff_ids:
        lines.step(diff_id.short, "Waiting")
    for diff_id in order.target.config.diff_ids[:common]:
        lines.step(diff_id.short, "Skipping common layer")


async def _make_layers(
    engine: Engine, order: DeltaOrder, work: Assembly, common: int, lines: Lines
) -> list[Unpacked]:
    """The layers that the base has not, as deltas."""
    snapshots = engine.snapshots
    base = list(reversed(snapshots.chain(order.base.chain_id)))
    sources = list(reversed(snapshots.chain(order.target.chain_id)))[common:]
    directories = [await work.new_directory() for _ in sources]
    step = 0

    def tell(number: int) -> None:
        nonlocal step
        now, thousandths = divmod(number, 1000)
        while step < now:  # the one before is done
            if step == 0:
                _tell_begin(order, common, lines)
            else:
                lines.step(sources[step - 1].diff_id.removeprefix("sha256:")[:12], "Delta complete")
            step += 1
        if now == 0:
            size = order.base.size_bytes
            lines.advance(order.base_name, "Fingerprinting", size * thousandths // 1000, size)
        elif now <= len(sources):
            layer = sources[now - 1]
            done = layer.size_bytes * thousandths // 1000
            lines.advance(layer.diff_id.removeprefix("sha256:")[:12], "Computing delta", done, layer.size_bytes)

    arguments = {
        "base": [str(layer.path) for layer in base],
        "layers": [
            {"source": str(layer.path), "directory": str(path)}
            for layer, path in zip(sources, directories, strict=True)
        ],
    }
    report = await engine.workers.run("makedelta", arguments, progress=tell)
    tell(1000 * (len(sources) + 1))
    return [work.take(path, made) for path, made in zip(directories, report["layers"], strict=True)]


async def _feed_empty(stdin: trio.abc.SendStream) -> None:
    await stdin.send_all(deltaimage.EMPTY_LAYER)


# --- loading


async def apply_loaded(engine: Engine, work: Assembly, image: ArchivedImage) -> ArchivedImage:
    """The target of a delta image that came in an archive; any other image as it is.

    Raises: SystemFailure, with balena-engine's words, when the base is not here.
    """
    delta = delta_image(image.config)
    if delta is None:
        return image
    target = delta.target
    if len(target.diff_ids) != len(image.config.diff_ids):
        raise InvalidArchive(LAYERS_DIFFER)
    base = await base_of(engine, delta)
    if base is not None:
        if not base.places:
            await work.keep(base.chain_id)
        arguments = layer_arguments(engine, base.chain_id, base.places)
        for chain_id, diff_id, came in zip(
            target.chain_ids, target.diff_ids, image.config.diff_ids, strict=True
        ):
            here = engine.snapshots.find(str(chain_id))
            if here is not None:
                await work.know(here)
                continue
            path = await work.new_directory()
            file = await trio.to_thread.run_sync(_first_file, work.source(came), limiter=engine.limiters.files)
            async with engine.pulls.patching:
                report = await engine.workers.run(
                    "patch",
                    {
                        "directory": str(path),
                        "format": "librsync-file",
                        "delta": str(file),
                        "base": arguments,
                        "diff_id": str(diff_id),
                        "memory": engine.config.delta_memory,
                    },
                )
            work.take(path, report)
    return replace(image, config=target, parent="")


def _first_file(layer: Path) -> Path:
    """The delta in a layer that was unpacked: its only file, whatever its name."""
    for folder, _, names in os.walk(layer / "diff"):
        for name in sorted(names):
            return Path(folder, name)
    raise InvalidArchive("unexpected EOF, invalid delta tar archive")
