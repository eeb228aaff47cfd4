"""Deltas in pulls: where they are found, and how one layer is made of one (ARCHITECTURE, journey b).

`core/deltaplan` decides; here are the questions to registries and folders that it decides by, and the work:

    search:  the images here -> bases; referrers of the target, else `_deltaindex` -> offers; -> a plan
    apply:   the delta's blob -> ingest, resumable as any; worker `patch`: base layers + delta -> unseen directory

A delta has no say in the result: the layer's diff_id is the target's. So whatever goes wrong with one is no more than a
reason to fetch the layer itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import trio

from balenapy.core import deltaplan
from balenapy.core.container import Status
from balenapy.core.deltaimage import DeltaImage
from balenapy.core.deltaplan import Base, DeltaPlan, DeltaRequest, LayerPlace, Offers, Way
from balenapy.core.digest import Digest
from balenapy.core.manifest import (
    DOCUMENT_MAX_BYTES,
    OCI_INDEX,
    Descriptor,
    ImageConfig,
    Index,
    InvalidDocument,
    Manifest,
    parse_artifact,
    parse_document,
)
from balenapy.core.reference import Reference, parse_reference
from balenapy.engine.download import Download, Progress, WrongBlob
from balenapy.errors import DataLoss, EngineError, SystemFailure
from balenapy.registry.errors import RegistryError
from balenapy.stores.deltastore import DeltaStore
from balenapy.stores.images import digest_reference

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.registry.auth import AuthConfig
    from balenapy.registry.client import Session

log = logging.getLogger(__name__)

# What says that a registry has no such route or document: 404 as the specification has it, the others in the wild.
_ABSENT = (400, 404, 405, 501)
NO_DELTAS = "the registry has no deltas of it"
SEARCH_TIMEOUT_S = 30.0  # a registry that does not answer this will be asked for the layers themselves
WRONG_DELTA = "delta verification failed for digest"  # begins what the worker says of a blob that is not what it claims


class DeltaNotSent(SystemFailure):
    """The registry is there, but does not send a delta to its end, however often it is asked."""

    retryable = True


class DeltaSource(Protocol):
    """A place where deltas lie."""

    async def referrers(self, target: Digest) -> Index | None:
        """What refers to a manifest; None when nobody knows."""

    async def delta_index(self) -> Index | None:
        """The repository's `_deltaindex`."""

    async def manifest(self, entry: Descriptor) -> bytes:
        """The manifest of an entry of either, verified."""

    def blob(self, digest: Digest) -> Path | None:
        """The file of a blob; None when it has to be downloaded."""

    @property
    def session(self) -> Session: ...


class InRegistry:
    """A repository."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def session(self) -> Session:
        return self._session

    async def referrers(self, target: Digest) -> Index | None:
        kind = quote(deltaplan.ARTIFACT_TYPE, safe="")
        raw = await self._session.document(f"referrers/{target}?artifactType={kind}", _ABSENT)
        if raw is None:  # no such interface: the tag that stands in for it
            raw = await self._session.document(f"manifests/{target.algorithm}-{target.hex}", _ABSENT)
        return _index(raw)

    async def delta_index(self) -> Index | None:
        return _index(await self._session.document(f"manifests/{deltaplan.DELTA_INDEX_TAG}", _ABSENT))

    async def manifest(self, entry: Descriptor) -> bytes:
        raw, _, _ = await self._session.manifest(digest_reference(self._session.reference, entry.digest))
        return raw

    def blob(self, digest: Digest) -> Path | None:
        return None


class InLayout:
    """An OCI layout in a folder: deltas on a stick."""

    def __init__(self, path: Path, session: Session, limiter: trio.CapacityLimiter) -> None:
        self._path = path
        self._session = session
        self._limiter = limiter

    @property
    def session(self) -> Session:
        return self._session

    async def referrers(self, target: Digest) -> Index | None:
        """The deltas of the folder that are not for another manifest."""
        index = await self.delta_index()
        if index is None:
            return None
        entries = []
        for entry in deltaplan.native_entries(index):
            try:
                artifact = parse_artifact(await self.manifest(entry))
            except EngineError as error:
                log.warning("delta cannot be read folder=%s error=%s", self._path, error.message)
                continue
            if artifact.subject not in (None, target):
                continue
            entries.append(replace(entry, annotations=artifact.annotations, artifact_type=artifact.artifact_type))
        return replace(index, manifests=tuple(entries))

    async def delta_index(self) -> Index | None:
        return _index(await self._read(self._path / "index.json"))

    async def manifest(self, entry: Descriptor) -> bytes:
        raw = await self._read(self.blob(entry.digest))
        if not entry.digest.matches(raw):
            raise DataLoss(f"manifest verification failed for digest {entry.digest}")
        return raw

    def blob(self, digest: Digest) -> Path:
        return self._path / "blobs" / digest.algorithm / digest.hex

    async def _read(self, path: Path) -> bytes:
        def read() -> bytes:
            with path.open("rb") as file:
                return file.read(DOCUMENT_MAX_BYTES + 1)

        try:
            return await trio.to_thread.run_sync(read, limiter=self._limiter)
        except OSError as error:
            raise InvalidDocument(f"{path}: {os.strerror(error.errno or 0).lower()}") from error


def _index(raw: bytes | None) -> Index | None:
    """Raises: InvalidDocument."""
    if raw is None:
        return None
    document = parse_document(raw, OCI_INDEX)
    return document if isinstance(document, Index) else None


@asynccontextmanager
async def open_source(
    engine: Engine, request: DeltaRequest, session: Session, auth: AuthConfig | None
) -> AsyncIterator[DeltaSource]:
    """Where this pull's deltas lie. Credentials go to the target's registry only."""
    if request.layout:
        yield InLayout(Path(request.layout), session, engine.limiters.files)
        return
    if not request.source:
        yield InRegistry(session)
        return
    reference = parse_reference(request.source)
    own = auth if reference.domain == session.reference.domain else None
    async with engine.registry.session(reference.without_tag(), own) as other:
        yield InRegistry(other)


# --- the search


class DeltaSearch:
    """Looks for deltas of one pull's target. Failing to find one is never an error."""

    def __init__(self, engine: Engine, request: DeltaRequest, source: DeltaSource, reference: Reference) -> None:
        self._engine = engine
        self._request = request
        self._source = source
        self._reference = reference
        self._why = NO_DELTAS

    async def plan(self, manifest: Manifest, config: ImageConfig, missing: Sequence[int]) -> DeltaPlan:
        """The cheapest way for each missing layer."""
        if self._request.mode == deltaplan.OFF or not missing:
            return DeltaPlan()
        diff_ids = [str(diff_id) for diff_id in config.diff_ids]
        stored = await stored_bases(self._engine)
        offers = self._copies(diff_ids)
        for base in stored:
            for place, chain_id in zip(base.places, base.chain_ids, strict=True):
                way = Way(deltaplan.COPY, place.diff_id, chain_id, None, (place,))
                deltaplan.merge(offers, {place.diff_id: [way]})
        if any(diff_ids[position] not in offers for position in missing):
            bases = self._bases(stored)
            if bases:
                deltaplan.merge(offers, await self._offers(manifest, config, bases))
        return deltaplan.choose(manifest, diff_ids, missing, offers, self._request, self._why)

    def _copies(self, diff_ids: Sequence[str]) -> Offers:
        """Layers that are here already, in another stack."""
        checks = self._engine.images.checks
        return {
            layer.diff_id: [Way(deltaplan.COPY, layer.diff_id, layer.chain_id)]
            for layer in self._engine.snapshots.layers()
            if layer.diff_id in diff_ids and checks.damage(layer.chain_id) is None
        }

    def _bases(self, stored: Sequence[Base]) -> list[Base]:
        """Whole images, the likeliest first; those of another store last."""
        images = self._engine.images
        if self._request.bases:
            records = []
            for name in self._request.bases:
                try:
                    records.append(images.resolve(name))
                except EngineError:
                    self._why = f"base {name} is not here"
        else:
            records = sorted(images.store.images(), key=lambda image: self._rank(image.image_id))
            self._why = "there is no image here to start from"
        bases = [_base(record.image_id, record.config) for record in records if self._is_whole(record.config)]
        bases += [base for base in stored if not self._request.bases or base.image_id in self._request.bases]
        if bases:
            self._why = NO_DELTAS
        return bases

    def _rank(self, image_id: str) -> int:
        named = [record.reference.name for record in self._engine.images.store.references_of(image_id)]
        if self._reference.name in named:
            return 0
        used = self._engine.containers.using_image(image_id)
        return 1 if any(container.state.status is Status.RUNNING for container in used) else 2

    def _is_whole(self, config: ImageConfig) -> bool:
        snapshots, checks = self._engine.snapshots, self._engine.images.checks
        names = [str(chain_id) for chain_id in config.chain_ids]
        return bool(names) and all(snapshots.find(name) and checks.damage(name) is None for name in names)

    async def _offers(self, manifest: Manifest, config: ImageConfig, bases: Sequence[Base]) -> Offers:
        for find in (self._native, self._tar_diffs):
            try:
                with trio.fail_after(SEARCH_TIMEOUT_S):
                    offers = await find(manifest, config, bases)
            except EngineError as error:
                self._why = error.message
                log.info("no deltas reference=%s error=%s", self._reference.canonical(), error.message)
                continue
            except trio.TooSlowError:
                self._why = f"the registry did not say within {SEARCH_TIMEOUT_S:.0f} s which deltas there are"
                log.warning("no deltas reference=%s: %s", self._reference.canonical(), self._why)
                break
            if offers:
                return offers
        return {}

    async def _native(self, manifest: Manifest, config: ImageConfig, bases: Sequence[Base]) -> Offers:
        index = await self._source.referrers(manifest.digest)
        entries = deltaplan.native_entries(index) if index is not None else []
        offers: Offers = {}
        if entries:
            self._why = f"none of its {len(entries)} deltas fits an image that is here"
        for entry in deltaplan.entries_for(entries, bases):
            artifact = parse_artifact(await self._source.manifest(entry))
            target, diff_ids = str(config.image_id), [str(diff_id) for diff_id in config.diff_ids]
            ways = deltaplan.native_ways(artifact, manifest.digest, target, diff_ids, bases, self._request)
            deltaplan.merge(offers, ways)
        return offers

    async def _tar_diffs(self, manifest: Manifest, config: ImageConfig, bases: Sequence[Base]) -> Offers:
        index = await self._source.delta_index()
        offers: Offers = {}
        for entry in deltaplan.tar_diff_entries(index, manifest.digest) if index is not None else ():
            artifact = parse_artifact(await self._source.manifest(entry))
            deltaplan.merge(offers, deltaplan.tar_diff_ways(artifact, bases, self._request))
        return offers


def _base(image_id: str, config: ImageConfig) -> Base:
    return Base(image_id, tuple(map(str, config.diff_ids)), tuple(map(str, config.chain_ids)))


async def stored_bases(engine: Engine) -> list[Base]:
    """The images of the store that `--delta-data-root` names."""
    root = engine.config.delta_data_root
    if not root:
        return []
    images = await trio.to_thread.run_sync(DeltaStore(Path(root)).images, limiter=engine.limiters.files)
    return [replace(_base(str(image.config.image_id), image.config), places=image.places) for image in images]


async def base_of(engine: Engine, delta: DeltaImage) -> Base | None:
    """The image that a delta image starts from: one of ours, else of the other store.

    Raises: SystemFailure, with balena-engine's words, when it is not here.
    """
    if not delta.base:
        return None
    image = engine.images.store.find(delta.base)
    if image is None:
        for base in await stored_bases(engine):
            if base.image_id == delta.base:
                return base
        raise SystemFailure(f'loading delta base image "{delta.base}": No such image: {delta.base}')
    engine.snapshots.chain(image.chain_id)
    return _base(image.image_id, image.config)


# --- the work


class LayerDelta:
    """One layer that comes as a delta."""

    def __init__(
        self,
        engine: Engine,
        source: DeltaSource,
        way: Way,
        diff_id: Digest,
        *,
        slots: trio.CapacityLimiter,
        turns: trio.CapacityLimiter,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        """
        Args:
            slots: of downloads. turns: of patching: one at a time, so that its memory is what was announced.
        """
        self.way = way
        self._engine = engine
        self._source = source
        self._diff_id = diff_id
        self._slots = slots
        self._turns = turns
        self._sleep = sleep

    async def apply(
        self, directory: Path, progress: Progress, queued: trio.Event, only: list[str] | None = None
    ) -> dict[str, Any]:
        """Make the layer's directory, all or some paths of it; the worker's report.

        Args:
            queued: set when it has its place among those who wait for a download slot, or needs none.

        Raises: EngineError, whatever is wrong with the delta, its base or the way to it.
        Cancellation: what was downloaded stays staged.
        """
        blob = self.way.blob
        if blob is None:
            queued.set()
            return await self._patch(directory, None, progress, only)
        file = self._source.blob(blob.digest)
        if file is not None:
            queued.set()
            progress.received(blob.size_bytes)
            return await self._patch(directory, file, progress, only)
        locks, content = self._engine.locks, self._engine.images.content
        if locks.is_held(f"blob/{blob.digest}"):
            queued.set()
        async with locks(f"blob/{blob.digest}"):
            queued.set()
            if content.staged_bytes(blob.digest):
                try:
                    return await self._download_and_patch(directory, blob, progress, only)
                except WrongBlob as error:
                    log.warning("staged delta is wrong, fetching again: %s", error.message)
                    await content.drop(blob.digest)
            return await self._download_and_patch(directory, blob, progress, only)

    async def _download_and_patch(
        self, directory: Path, blob: Descriptor, progress: Progress, only: list[str] | None
    ) -> dict[str, Any]:
        content = self._engine.images.content
        ingest = await content.open(blob.digest, blob.size_bytes)
        try:
            if self._slots.available_tokens == 0:
                progress.step("Waiting")
            async with self._slots:
                attempts = self._engine.config.max_download_attempts
                download = Download(self._source.session, blob, progress, attempts=attempts, sleep=self._sleep)
                try:
                    await download.run(ingest)
                except RegistryError as error:
                    if error.retryable and (download.answered or not error.no_answer):
                        raise DeltaNotSent(error.message) from error
                    raise
            return await self._patch(directory, ingest.path, progress, only)
        except DataLoss as error:
            if error.message.startswith(WRONG_DELTA):
                raise WrongBlob(error.message) from error
            raise
        finally:
            await ingest.aclose()

    async def _patch(
        self, directory: Path, file: Path | None, progress: Progress, only: list[str] | None
    ) -> dict[str, Any]:
        way = self.way
        base = layer_arguments(self._engine, way.base_chain, way.places)
        arguments: dict[str, object] = {
            "directory": str(directory),
            "format": way.format,
            "base": base[-1:] if way.format == deltaplan.COPY else base,
            "diff_id": str(self._diff_id),
            "memory": self._engine.config.delta_memory,
        }
        if only is not None:
            arguments["only"] = only
        if file is not None and way.blob is not None:
            arguments |= {"delta": str(file), "digest": str(way.blob.digest)}
        total = way.size_bytes

        def tell(used: int) -> None:
            progress.advance("Extracting", used, total)

        async with self._turns:
            report = await self._engine.workers.run("patch", arguments, progress=tell)
        if total:
            progress.advance("Extracting", total, total)
        log.info(
            "delta applied diff_id=%s format=%s bytes=%d peak_bytes=%d",
            self._diff_id.short,
            way.format,
            total,
            report["peak_bytes"],
        )
        return report


def layer_arguments(engine: Engine, chain_id: str, places: Sequence[LayerPlace]) -> list[dict[str, str]]:
    """The layers of a base as the worker is told of them, lowest first."""
    if places:
        return [{"directory": one.directory, "split": one.split, "diff_id": one.diff_id} for one in places]
    layers = reversed(engine.snapshots.chain(chain_id))
    return [{"directory": str(layer.path), "diff_id": layer.diff_id} for layer in layers]


@asynccontextmanager
async def bases_kept(engine: Engine, plan: DeltaPlan) -> AsyncIterator[None]:
    """Keep the layers that a plan reads, whatever is deleted meanwhile.

    Raises: SystemFailure, when one is gone already.
    """
    chains = sorted({way.base_chain for way in plan.ways.values() if not way.places})
    async with AsyncExitStack() as stack:
        for chain_id in chains:
            await stack.enter_async_context(engine.snapshots.pinned(chain_id))
        yield
    if chains:
        engine.images.collector.wake()  # of an image that was deleted meanwhile they were the last to want them
