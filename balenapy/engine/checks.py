"""Verification of layers: what their files hold is compared with what was unpacked, and what is damaged is mended.

A layer is not read again after it was committed, so a medium that loses bits is noticed here: when somebody asks
(`POST /images/fsck`), by the background scrub, and by pulling an image that is here already, which promises to heal
it and therefore reads all of it. What is found is kept in memory and told in `/info`; the next pull of any image with
that layer mends it.

Mending (engine/pull): the layer is fetched again and only the bad paths are unpacked, beside the layer, verified as
ever, then each changes places with the damaged one (worker/mend); what was damaged is put into quarantine.
When that does not help, because the tar-split is damaged or too much is, all of the layer is replaced
in one transaction. Containers that run keep what they have open until they start again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from balenapy.errors import EngineError, NotFound
from balenapy.stores.images import ImageRecord
from balenapy.stores.snapshots import Layer

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

NAMED = 10  # bad paths in one line of the log
FIRST_SCRUB_S = 600.0  # after a start there is other work


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """What was found in one layer."""

    layer: Layer
    files: int
    bytes: int
    bad: tuple[tuple[str, str], ...] = ()  # (path, why); undecodable bytes of a path as surrogates
    whole: bool = False  # paths do not help: all of it has to be replaced
    sidecar: bool = False  # the description beside the files is damaged

    @property
    def is_damaged(self) -> bool:
        return bool(self.bad) or self.whole or self.sidecar

    @property
    def paths(self) -> list[str]:
        """The bad paths with the directories above them, whose times have changed with the damage."""
        found = {path for path, _ in self.bad}
        for path in list(found):
            while path := path.rpartition("/")[0]:
                found.add(path)
        return sorted(found)

    def summary(self) -> str:
        told = [f"{shown(path)} {why}".strip() for path, why in self.bad[:3]] or ["its description is damaged"]
        more = f" and {len(self.bad) - 3} more" if len(self.bad) > 3 else ""
        return "; ".join(told) + more

    def json(self, images: list[str]) -> dict[str, Any]:
        return {
            "Layer": self.layer.chain_id,
            "DiffId": self.layer.diff_id,
            "Images": images,
            "Files": self.files,
            "Bytes": self.bytes,
            "Bad": [{"Path": shown(path), "Why": why} for path, why in self.bad]
            + ([{"Path": "", "Why": "its description is damaged"}] if self.sidecar else []),
        }


def shown(path: str) -> str:
    """A path as text for people and JSON."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


class Checks:
    """Verifies layers, and remembers what was found."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._damaged: dict[str, LayerCheck] = {}

    def damage(self, chain_id: str) -> LayerCheck | None:
        """What is known to be wrong with a layer that is there."""
        found = self._damaged.get(chain_id)
        if found is None or self._engine.snapshots.find(chain_id) != found.layer:  # deleted or replaced meanwhile
            self._damaged.pop(chain_id, None)
            return None
        return found

    def damaged(self) -> dict[str, LayerCheck]:
        """All damage that is known, by chain_id."""
        return {chain_id: found for chain_id in list(self._damaged) if (found := self.damage(chain_id)) is not None}

    def healed(self, chain_id: str) -> None:
        self._damaged.pop(chain_id, None)

    async def check(
        self, layers: Iterable[Layer], *, deep: bool = False, idle: bool = False, rate: int = 0
    ) -> list[LayerCheck]:
        """Verify layers; one that is deleted meanwhile is left out.

        Args:
            deep: read from the medium, and hold the whole tar against its diff_id. idle: only when nobody else
                wants the disk. rate: bytes a second at most, 0 for no bound.
        Raises: EngineError, when the worker fails.
        """
        async with self._engine.snapshots.pinned_layers(layers) as present:
            if not present:
                return []
            arguments = {
                "layers": [
                    {
                        "directory": str(layer.path),
                        "diff_id": layer.diff_id,
                        "chain_id": layer.chain_id,
                        "sidecars": self._sidecars(layer),
                    }
                    for layer in present
                ],
                "deep": deep,
                "idle": idle,
                "rate": rate,
            }
            report = await self._engine.workers.run("verify", arguments, apart=idle)
        found = []
        for layer, told in zip(present, report["layers"], strict=True):
            bad = tuple((path, why) for path, why in told["bad"])
            sidecar = told["sidecar"] == "damaged" or (told["sidecar"] == "missing" and self._came_from_registry(layer))
            check = LayerCheck(layer, told["files"], told["bytes"], bad, told["whole"], sidecar)
            found.append(check)
            self._remember(check)
        return found

    def _remember(self, check: LayerCheck) -> None:
        chain_id = check.layer.chain_id
        if not check.is_damaged:
            self._damaged.pop(chain_id, None)
            return
        known = self._damaged.get(chain_id)
        self._damaged[chain_id] = check
        if known is not None and known.bad == check.bad:
            return
        for path, why in check.bad[:NAMED]:
            log.error("layer is damaged chain_id=%s path=%r why=%s", chain_id, shown(path), why)
        if len(check.bad) > NAMED or not check.bad:
            log.error("layer is damaged chain_id=%s paths=%d", chain_id, len(check.bad))
        for image in self.images_with(chain_id):
            self._engine.images.publish(image, "corrupt", image.image_id)

    def _came_from_registry(self, layer: Layer) -> bool:
        """Then it had a description, and it can be had again."""
        return any(map(self._is_known_by_manifest, self.images_with(layer.chain_id)))

    def _is_known_by_manifest(self, image: ImageRecord) -> bool:
        return any(record.manifest for record in self._engine.images.store.references_of(image.image_id))

    def _sidecars(self, layer: Layer) -> list[str]:
        """The descriptions of images that a pull has put beside their top layer."""
        return [
            f"image-{image.image_id.partition(':')[2]}.json"
            for image in self._engine.images.all()
            if image.chain_id == layer.chain_id and self._is_known_by_manifest(image)
        ]

    def images_with(self, chain_id: str) -> list[ImageRecord]:
        """The images that have this layer."""
        return [
            image
            for image in self._engine.images.all()
            if any(str(each) == chain_id for each in image.config.chain_ids)
        ]

    def layers_of(self, images: Iterable[ImageRecord]) -> list[Layer]:
        """The layers that are there, each once, bottom first."""
        found: dict[str, Layer] = {}
        for image in images:
            for chain_id in map(str, image.config.chain_ids):
                layer = self._engine.snapshots.find(chain_id)
                if layer is not None:
                    found[chain_id] = layer
        return list(found.values())

    # --- the background scrub

    async def serve(self) -> None:
        """Verify and mend all layers once in `scrub_interval_h`, until cancelled. Off by default."""
        done_at = trio.current_time() + FIRST_SCRUB_S
        while True:
            interval_s = self._engine.config.scrub_interval_h * 3600.0
            await trio.sleep_until(done_at if interval_s else done_at + 3600.0)  # it may be switched on by a reload
            if interval_s:
                try:
                    await self.scrub()
                except Exception:  # a background job must not end the daemon
                    log.exception("scrub failed")
            done_at = trio.current_time() + interval_s

    async def scrub(self) -> int:
        """Verify every layer, one after the other, and mend what is damaged. Returns how many stay damaged."""
        began, count, volume = time.monotonic(), 0, 0
        for layer in list(self._engine.snapshots.layers()):
            for check in await self.check([layer], deep=True, idle=True, rate=self._engine.config.scrub_rate):
                count, volume = count + 1, volume + check.bytes
        for chain_id in self.damaged():
            if self.damage(chain_id) is not None:  # an image before it may have mended it
                await self._mend_quietly(chain_id)
        left = len(self.damaged())
        log.info("scrubbed layers=%d bytes=%d damaged=%d after_s=%.0f", count, volume, left, time.monotonic() - began)
        return left

    async def _mend_quietly(self, chain_id: str) -> None:
        for image in self.images_with(chain_id):
            try:
                await self.mend(image, "")
                return
            except EngineError as error:
                log.error("cannot mend image_id=%s error=%s", image.image_id, error.message)

    # --- mending

    async def mend(self, image: ImageRecord, auth: str) -> None:
        """Fetch again what is damaged of an image or missing, from where it was pulled.

        Raises: EngineError, when there is nowhere to fetch it from or that fails.
        Cancellation: each path is the damaged one or the mended one.
        """
        sources = [record for record in self._engine.images.store.references_of(image.image_id) if record.manifest]
        if not sources:
            raise NotFound(f"image {image.image_id} was not pulled: there is no registry to mend it from")
        failure: EngineError | None = None
        for record in sorted(sources, key=lambda record: record.reference.digest is None):
            try:
                await self._engine.pulls.mend(record, auth)
                return
            except EngineError as error:
                failure = error
        assert failure is not None
        raise failure
