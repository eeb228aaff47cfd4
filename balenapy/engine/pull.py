"""Pull: a reference becomes an image (ARCHITECTURE, journey a).

    resolve the reference at the registry: manifest, config; in memory, digests checked
    transaction A: a lease, the documents, a row for each blob that is to come
    each missing layer, some at once: blob -> ingest -> worker -> unseen directory, synced; digests compared
    transaction B, bottom layer first: the snapshot's row, held by the lease; the ingest's row goes
    transaction C: the image's row and its references; the lease goes

The request owns the pull: when the client is gone everything is cancelled, and what stays is a staged prefix and
finished layers under the lease, both for the next attempt. Two pulls of one layer meet at a lock on its chain_id,
and the second finds it done; meanwhile it shows the progress of the first.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from balenapy.config import Reserve
from balenapy.core import deltaplan, progress
from balenapy.core.deltaimage import DeltaImage, delta_image
from balenapy.core.deltaplan import DeltaPlan, DeltaRequest, Way
from balenapy.core.digest import Digest
from balenapy.core.manifest import (
    GZIP_LAYERS,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    check_layers,
    choose_platform,
    parse_document,
    parse_image_config,
    platform_of_machine,
)
from balenapy.core.reference import Reference
from balenapy.core.sidecar import LAYER_FILE, ImageSidecar, LayerSidecar, SidecarDocument
from balenapy.engine.deltas import (
    DeltaNotSent,
    DeltaSearch,
    DeltaSource,
    InRegistry,
    LayerDelta,
    base_of,
    bases_kept,
    open_source,
)
from balenapy.engine.download import Download, WrongBlob
from balenapy.engine.lines import Lines, Write, write_during
from balenapy.engine.nurseries import one_error
from balenapy.errors import DataLoss, EngineError, Forbidden, NotFound, SystemFailure
from balenapy.linux import durable
from balenapy.registry.auth import AuthConfig, decode_registry_auth
from balenapy.registry.errors import RegistryError
from balenapy.stores import blobs, leases
from balenapy.stores.blobs import BlobRecord
from balenapy.stores.content import Ingest, NoSpace, file_error
from balenapy.stores.images import Document, ImageRecord, ReferenceRecord, digest_reference, insert_documents
from balenapy.stores.snapshots import Layer, has_layer

if TYPE_CHECKING:
    from balenapy.engine.checks import LayerCheck
    from balenapy.engine.engine import Engine
    from balenapy.registry.client import Session

log = logging.getLogger(__name__)

BLAME_BYTES = 4 << 20  # so much more is fetched to know whether a blob that cannot be unpacked is what it claims
PULLED = "Pull complete"
NO_DELTAS = DeltaRequest(deltaplan.OFF)
NO_SPACE = "no space left on device"
PLENTY = 4  # times twice the packed size: with more than that free nobody is asked what it really is
ZSTD_HEAD_BYTES = 18


class Pulls:
    """All pulls that are under way."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._slots = trio.CapacityLimiter(max(1, min(engine.config.max_concurrent_downloads, engine.limits.downloads)))
        self.patching = trio.CapacityLimiter(1)
        self._transfers: dict[str, _Transfer] = {}  # by chain_id
        self._working: Counter[str] = Counter()  # leases of pulls that are under way
        self._under_way: dict[Lines, str] = {}  # and what each of them pulls
        self.delta_layers = self.delta_bytes = self.delta_saved_bytes = 0  # since the daemon began
        self.platform = platform_of_machine(os.uname().machine, bits=struct.calcsize("P") * 8)
        self.sleep: Callable[[float], Awaitable[None]] = trio.sleep  # tests do not wait

    async def pull(
        self,
        reference: Reference,
        auth: str | AuthConfig,
        platform: Platform | None,
        write: Write,
        deltas: DeltaRequest = NO_DELTAS,
    ) -> None:
        """Pull one reference, or all tags when it has neither tag nor digest.

        Args:
            auth: the request's X-Registry-Auth, or what it says. platform: None for this machine's.
            write: takes the lines of progress. Before the first one an error can still be an HTTP status.
        Raises: EngineError, with dockerd's words.
        Cancellation: the set of images and references is as before or as after; what is staged stays.
        """
        if reference.path in ("scratch", "library/scratch"):
            raise Forbidden("'scratch' is a reserved name")
        lines = Lines(write)
        if deltas.mode == deltaplan.REQUIRE:
            lines.hold()  # whether there is a delta is known after the first line

        async def work() -> None:
            newer = await self._pull_wanted(reference, auth, platform or self.platform, lines, deltas)
            lines.release()
            done = "Downloaded newer image for" if newer else "Image is up to date for"
            lines.message(f"Status: {done} {reference.familiar()}")

        self._under_way[lines] = reference.familiar()
        try:
            await write_during(lines, work)
        finally:
            del self._under_way[lines]

    async def _pull_wanted(
        self, reference: Reference, auth: str | AuthConfig, platform: Platform, lines: Lines, deltas: DeltaRequest
    ) -> bool:
        engine = self._engine
        credentials = auth if isinstance(auth, AuthConfig) else decode_registry_auth(auth) if auth else None
        newer = False
        came: list[tuple[Way, int]] = []
        async with (
            engine.registry.session(reference, credentials) as session,
            open_source(engine, deltas, session, credentials) as source,
        ):
            wanted = [reference]
            if reference.is_name_only:
                wanted = [reference.with_tag(tag) for tag in await session.tags()]
            for one in wanted:
                pull = _Pull(engine, self, session, one, platform, lines, deltas, source)
                newer |= await pull.run()
                came += pull.came_as_deltas
        self._count(came)
        found = engine.images.store.find_reference(wanted[-1]) if wanted else None
        labels = engine.images.get(found.image_id).labels if found is not None else None
        told = {**(labels or {}), "name": reference.familiar_name(), **deltaplan.event_attributes(came)}
        engine.events.publish("image", "pull", reference.familiar(), told)
        return newer

    def _count(self, came: Sequence[tuple[Way, int]]) -> None:
        self.delta_layers += len(came)
        self.delta_bytes += sum(way.size_bytes for way, _ in came)
        # Of a delta image nobody knows what the layers would have taken.
        self.delta_saved_bytes += sum(size - way.size_bytes for way, size in came if way.format != deltaplan.LIBRSYNC)

    def progress(self) -> list[dict[str, Any]]:
        """The pulls under way, each with the last that was told of its layers."""
        return [
            {
                "Reference": reference,
                "Layers": [
                    {"Id": id, "Status": status, "Current": current, "Total": total}
                    for id, (status, current, total) in lines.last.items()
                ],
            }
            for lines, reference in self._under_way.items()
        ]

    async def mend(self, record: ReferenceRecord, auth: str) -> None:
        """Fetch what is damaged or missing of an image that was pulled by this reference.

        Raises: EngineError. Cancellation: each damaged path or layer is as before or whole.
        """
        digest = Digest.parse(record.image_manifest or record.manifest)
        reference = digest_reference(record.reference, digest)
        credentials: AuthConfig | None = decode_registry_auth(auth) if auth else None
        async with self._engine.registry.session(reference, credentials) as session:
            lines = Lines(_nowhere)  # nobody writes them; their number is bounded by that of the layers
            source = InRegistry(session)
            pull = _Pull(self._engine, self, session, reference, self.platform, lines, NO_DELTAS, source)
            await pull.mend(record.image_id)

    async def drop_idle_leases(self) -> None:
        """Drop the leases of pulls that nobody continues at the moment (prune, a full disk)."""
        working = set(self._working)

        def drop(connection: sqlite3.Connection) -> None:
            for lease in leases.read(connection):
                if lease.name.startswith("pull/") and lease.name not in working:
                    leases.drop(connection, lease.name)

        await self._engine.db.transaction(drop)

    @asynccontextmanager
    async def working(self, lease: str) -> AsyncIterator[None]:
        """Say that somebody works under this lease."""
        self._working[lease] += 1
        try:
            yield
        finally:
            self._working[lease] -= 1
            self._working += Counter()

    def works_alone(self, lease: str) -> bool:
        return self._working[lease] <= 1

    @asynccontextmanager
    async def transfer(self, chain_id: str, watcher: _Watcher) -> AsyncIterator[_Transfer]:
        """Wait for our turn at a layer, watching whoever has it now; then the others watch us."""
        transfer = self._transfers.setdefault(chain_id, _Transfer())
        transfer.watchers.append(watcher)
        try:
            if transfer.status:
                watcher.show(transfer)
            async with self._engine.locks(f"chain/{chain_id}"):
                yield transfer
        finally:
            transfer.watchers.remove(watcher)
            if not transfer.watchers:
                self._transfers.pop(chain_id, None)

    @property
    def slots(self) -> trio.CapacityLimiter:
        return self._slots


async def _nowhere(_line: bytes) -> None:
    """Takes lines for which there is no client."""
    await trio.lowlevel.checkpoint()


# --- progress


@dataclass(slots=True, eq=False)
class _Watcher:
    """One layer of one pull, as its client sees it. `size_bytes` is what its plan says will be fetched."""

    lines: Lines
    id: str
    total: _Total
    key: str
    size_bytes: int

    def show(self, transfer: _Transfer) -> None:
        if transfer.status:
            self.lines.step(self.id, transfer.status)

    def step(self, status: str) -> None:
        self.lines.step(self.id, status)

    def advance(self, status: str, current: int, total: int) -> None:
        self.lines.advance(self.id, status, current, total)

    def received(self, count: int) -> None:
        # Somebody else may fetch the layer, and in another way.
        self.total.note(self.key, min(count, self.size_bytes))

    def complete(self) -> None:
        self.total.note(self.key, self.size_bytes)

    def expect(self, size_bytes: int) -> None:
        """So much will be fetched instead."""
        self.size_bytes = size_bytes
        self.total.expect(self.key, size_bytes)


@dataclass(slots=True, eq=False)
class _Transfer:
    """One layer that is on its way, and everybody who watches."""

    watchers: list[_Watcher] = field(default_factory=list)
    status: str = ""

    def step(self, status: str) -> None:
        self.status = status
        for watcher in self.watchers:
            watcher.step(status)

    def advance(self, status: str, current: int, total: int) -> None:
        self.status = status
        for watcher in self.watchers:
            watcher.advance(status, current, total)

    def received(self, count: int) -> None:
        for watcher in self.watchers:
            watcher.received(count)

    def complete(self) -> None:
        for watcher in self.watchers:
            watcher.complete()


class _Total:
    """balena's line about all layers together: the compressed bytes that have arrived."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._expected: dict[str, int] = {}
        self._received: dict[str, int] = {}

    def expect(self, key: str, size_bytes: int) -> None:
        """So much will come of this one; nothing has yet."""
        self._expected[key] = size_bytes
        self._received.pop(key, None)

    def note(self, key: str, count: int) -> None:
        if self._received.get(key) != count:
            self._received[key] = count
            total = sum(self._expected.values())
            self._lines.advance(progress.TOTAL_ID, "", sum(self._received.values()), total)


# --- one reference


@dataclass(frozen=True, slots=True)
class _Resolved:
    """What the registry says of a reference."""

    digest: Digest  # of the document the reference names: an index or a manifest
    manifest: Manifest
    documents: tuple[Document, ...]


class _Pull:
    """One reference that has a tag or a digest."""

    def __init__(
        self,
        engine: Engine,
        pulls: Pulls,
        session: Session,
        reference: Reference,
        platform: Platform,
        lines: Lines,
        deltas: DeltaRequest,
        source: DeltaSource,
    ) -> None:
        self._engine = engine
        self._pulls = pulls
        self._session = session
        self._deltas = deltas
        self._source = source
        self.came_as_deltas: list[tuple[Way, int]] = []  # and the size of the blob that was not fetched
        self._reference = reference
        self._platform = platform
        self._lines = lines
        self._images = engine.images.store
        self._content = engine.images.content
        self._lease = f"pull/{reference.canonical()}"

    async def run(self) -> bool:
        """Pull; returns whether the reference names another image than before."""
        resolved = await self._resolve()
        image_id = str(resolved.manifest.config.digest)
        async with self._pulls.working(self._lease):
            image = await self._find_whole(image_id)
            if image is None:
                config, delta = await self._fetch_target(resolved.manifest)
                if delta is not None:
                    image = await self._find_whole(str(config.image_id))
                image = image or await self._fetch_image(resolved, config, delta)
            newer = await self._commit(resolved, image)
        self._lines.release()
        self._lines.message(f"Digest: {resolved.digest}")
        return newer

    async def mend(self, image_id: str) -> None:
        """Bring again what an image lacks; its references stay as they are."""
        resolved = await self._resolve()
        async with self._pulls.working(self._lease):
            config, delta = await self._fetch_target(resolved.manifest)
            if str(config.image_id) != image_id:
                raise SystemFailure(f"{self._reference.canonical()} is not {image_id}")
            await self._fetch_image(resolved, config, delta)
            await self._engine.images.leases.drop(self._lease)

    async def _find_whole(self, image_id: str) -> ImageRecord | None:
        """An image that is here already, if nothing of it turns out to be damaged."""
        image = self._images.find(image_id)
        if image is not None:
            await self._verify(image)
        return image if image is not None and self._is_whole(image) else None

    async def _verify(self, image: ImageRecord) -> None:
        """Pulling an image that is here promises that it is whole afterwards: all of it is read."""
        checks = self._engine.images.checks
        try:
            await checks.check(checks.layers_of([image]), deep=True)
        except EngineError as error:
            log.error("cannot verify image_id=%s error=%s", image.image_id, error.message)

    def _is_whole(self, image: ImageRecord) -> bool:
        """Whether all its layers are there and nothing is known to be wrong with them."""
        return all(self._has(str(chain_id)) for chain_id in image.config.chain_ids)

    async def _resolve(self) -> _Resolved:
        """Find the manifest for the platform. The first line goes out when the registry has answered."""
        raw, media_type, digest = await self._session.manifest(self._reference)
        document = parse_document(raw, media_type)
        documents = [Document(str(document.digest), document.media_type, raw)]
        tag = self._reference.tag if self._reference.digest is None else str(self._reference.digest)
        if isinstance(document, Index):
            entry = choose_platform(document, self._platform)
            self._lines.message(f"Pulling from {self._reference.path}", tag or "")
            raw, media_type, _ = await self._session.manifest(digest_reference(self._reference, entry.digest))
            document = parse_document(raw, media_type or entry.media_type)
            if isinstance(document, Index):
                raise SystemFailure("unsupported manifest format")
            documents.append(Document(str(document.digest), document.media_type, raw))
        else:
            self._lines.message(f"Pulling from {self._reference.path}", tag or "")
        for layer in document.layers:
            if layer.is_foreign:
                raise SystemFailure(f"unknown blob: foreign layer {layer.digest} ({layer.media_type}) is not supported")
        return _Resolved(digest, document, tuple(documents))

    async def _fetch_target(self, manifest: Manifest) -> tuple[ImageConfig, DeltaImage | None]:
        """Fetch the config and hold it against the manifest. Of a delta image it is that of its target."""
        config = parse_image_config(await self._session.config(manifest.config))
        delta = delta_image(config)
        if delta is not None:
            config = delta.target
        check_layers(manifest, config)
        if config.os != "linux":
            raise SystemFailure(f'image operating system "{config.os}" cannot be used on this platform')
        return config, delta

    # --- layers

    async def _fetch_image(
        self, resolved: _Resolved, config: ImageConfig, delta: DeltaImage | None
    ) -> ImageRecord:
        """Bring all layers here."""
        async with AsyncExitStack() as stack:
            plan = await self._plan(resolved.manifest, config, delta, stack)
            self._lines.release()
            return await self._fetch_layers(resolved, config, plan, must=delta is not None)

    async def _plan(
        self, manifest: Manifest, config: ImageConfig, delta: DeltaImage | None, stack: AsyncExitStack
    ) -> DeltaPlan:
        """Say how each missing layer comes, and keep what that needs until the stack is closed.

        Raises: NotFound, when it must be by delta and there is none.
        """
        missing = [n for n, chain_id in enumerate(config.chain_ids) if not self._has(str(chain_id))]
        if delta is not None:
            base = await base_of(self._engine, delta)
            if not self._deltas.allows(deltaplan.CODECS_OF[deltaplan.LIBRSYNC]):
                raise SystemFailure("this is a delta image, and its codec librsync is not allowed")
            plan = delta.ways(manifest, base, missing)
        else:
            search = DeltaSearch(self._engine, self._deltas, self._source, self._reference)
            plan = await search.plan(manifest, config, missing)
        try:
            await stack.enter_async_context(bases_kept(self._engine, plan))
        except EngineError as error:  # deleted just now
            plan = DeltaPlan(why_none=error.message)
        if missing and not plan.ways and self._deltas.mode == deltaplan.REQUIRE:
            raise NotFound(f"no applicable delta for {self._reference.familiar()}: {plan.why_none}")
        return plan

    async def _fetch_layers(
        self, resolved: _Resolved, config: ImageConfig, plan: DeltaPlan, *, must: bool
    ) -> ImageRecord:
        """Bring them as planned.

        Args:
            must: there is no other way than the plan's.
        """
        layers = resolved.manifest.layers
        chain_ids = [str(chain_id) for chain_id in config.chain_ids]
        blobs = self._blobs_to_fetch(layers, plan)
        try:
            missing = [n for n, chain_id in enumerate(chain_ids) if not self._has(chain_id)]
            staged = [blobs[n] for n in missing if n in blobs]
            peak_bytes = await self._check_space([layers[n] for n in missing], staged, plan)
            missing = sorted(await self._begin(resolved, config, chain_ids, blobs))
            total = _Total(self._lines)
            sizes = {n: plan.ways[n].size_bytes if n in plan.ways else layers[n].size_bytes for n in missing}
            for position, size_bytes in sizes.items():
                total.expect(str(position), size_bytes)
            for position, layer in enumerate(layers):
                self._lines.step(layer.digest.short, "Pulling fs layer" if position in sizes else "Already exists")
            if plan.ways and not must:
                self._announce(plan, peak_bytes)
            sidecar = self._sidecar(resolved, config)
            if layers and len(layers) - 1 not in sizes:
                await self._add_sidecar(sidecar, config.chain_id)
            done = [trio.Event() for _ in layers]
            async with one_error(), trio.open_nursery() as nursery:
                for position, layer in enumerate(layers):
                    if position not in sizes:
                        done[position].set()
                        continue
                    way = plan.ways.get(position)
                    task = _LayerPull(
                        self,
                        layer,
                        parent=chain_ids[position - 1] if position else "",
                        chain_id=chain_ids[position],
                        diff_id=config.diff_ids[position],
                        watcher=_Watcher(self._lines, layer.digest.short, total, str(position), sizes[position]),
                        ready=done[position - 1] if position else None,
                        done=done[position],
                        image=sidecar if position == len(layers) - 1 else None,
                        delta=self._layer_delta(way, config.diff_ids[position]) if way is not None else None,
                        must=must or self._deltas.mode == deltaplan.REQUIRE,
                    )
                    nursery.start_soon(task.run)
                    await task.queued.wait()  # the bottom layer first: the others wait for it at the end
        except EngineError as error:
            # What a registry or the way to it refuses today may go on tomorrow; a lie or a full disk does not.
            if not (error.retryable or isinstance(error, RegistryError)):
                if isinstance(error, NoSpace):  # below are transactions, which need some
                    await self._engine.snapshots.trash.empty()
                await self._give_up([blob.digest for blob in (*layers, *blobs.values())])
            raise
        size_bytes = self._engine.snapshots.size_bytes(config.chain_id)
        return ImageRecord(str(config.image_id), config, size_bytes=size_bytes)

    def _layer_delta(self, way: Way, diff_id: Digest) -> LayerDelta:
        pulls = self._pulls
        return LayerDelta(
            self._engine, self._source, way, diff_id, slots=pulls.slots, turns=pulls.patching, sleep=pulls.sleep
        )

    def _blobs_to_fetch(self, layers: Sequence[Descriptor], plan: DeltaPlan) -> dict[int, Descriptor]:
        """What is staged for each layer that may be missing: its own blob, its delta's, or nothing."""
        blobs = {}
        for position, layer in enumerate(layers):
            way = plan.ways.get(position)
            blob = way.blob if way is not None else layer
            if blob is not None and (way is None or self._source.blob(blob.digest) is None):
                blobs[position] = blob
        return blobs

    def _announce(self, plan: DeltaPlan, peak_bytes: int) -> None:
        memory = self._engine.config.delta_memory
        self._lines.put(progress.aux(plan.aux(peak_disk_bytes=peak_bytes, peak_memory_bytes=memory)))
        log.info(
            "delta plan reference=%s layers=%d bytes=%d instead_of=%d peak_disk=%d peak_memory=%d",
            self._reference.canonical(),
            len(plan.ways),
            plan.fetched_bytes,
            plan.full_bytes,
            peak_bytes,
            memory,
        )

    def _sidecar(self, resolved: _Resolved, config: ImageConfig) -> ImageSidecar:
        """What will stand beside the top layer's files."""
        documents = [Document(str(config.image_id), resolved.manifest.config.media_type, config.raw)]
        documents += resolved.documents
        return ImageSidecar(
            config.image_id,
            tuple(
                SidecarDocument(Digest.parse(document.digest), document.media_type, document.raw)
                for document in documents
            ),
            tuple((name, str(resolved.digest), str(resolved.manifest.digest)) for name in self._names(resolved)),
        )

    async def _add_sidecar(self, sidecar: ImageSidecar, chain_id: str) -> None:
        """Put it beside a layer that is there already."""
        top = self._engine.snapshots.find(chain_id)
        if top is None:
            return
        try:
            await trio.to_thread.run_sync(
                durable.write_file, top.path / sidecar.file_name, sidecar.encode(), limiter=self._engine.limiters.files
            )
        except OSError as error:
            raise file_error("cannot write the image's description", error) from error

    def _names(self, resolved: _Resolved) -> list[Reference]:
        """What the image will be called: the tag and the digest, or the digest it was asked by."""
        canonical = digest_reference(self._reference, resolved.digest)
        return [self._reference, canonical] if self._reference.digest is None else [canonical]

    def _has(self, chain_id: str) -> bool:
        found = self._engine.snapshots.find(chain_id)
        return found is not None and self._engine.images.checks.damage(chain_id) is None

    async def _begin(
        self, resolved: _Resolved, config: ImageConfig, chain_ids: list[str], blobs: Mapping[int, Descriptor]
    ) -> set[int]:
        """Transaction A: hold what is here, announce what is to come. Returns the positions of missing layers."""
        now_ns = time.time_ns()
        documents = [
            *resolved.documents,
            Document(str(config.image_id), resolved.manifest.config.media_type, config.raw),
        ]

        checks = self._engine.images.checks
        damaged = {position for position, chain_id in enumerate(chain_ids) if checks.damage(chain_id) is not None}

        def begin(connection: sqlite3.Connection) -> set[int]:
            durable.step("begin pull")
            known = [has_layer(connection, chain_id) for chain_id in chain_ids]
            items = [("document", document.digest) for document in documents]
            items += [("chain", chain_id) for chain_id, here in zip(chain_ids, known, strict=True) if here]
            leases.hold(connection, self._lease, now_ns, items)
            insert_documents(connection, documents)
            missing = {position for position, here in enumerate(known) if not here} | damaged
            for position in missing & blobs.keys():
                self._content.insert(connection, blobs[position].digest, blobs[position].size_bytes, now_ns)
            return missing

        def apply(missing: set[int]) -> None:
            for position in missing & blobs.keys():
                self._content.inserted(blobs[position].digest, blobs[position].size_bytes, now_ns)

        return await self._engine.db.change(begin, apply)

    async def _check_space(
        self, missing: Sequence[Descriptor], blobs: Sequence[Descriptor], plan: DeltaPlan
    ) -> int:
        """Refuse a pull that cannot fit, before its first blob byte; the bytes it will take at most.

        Args:
            missing: the layers. blobs: what is staged for them.
        Raises: NoSpace.
        """
        if not missing:
            return 0
        estimates = {layer.digest: extracted_estimate(layer) for layer in missing}
        told = plan.base_of_image  # the layers of a delta image do not tell the size of what comes of them
        if told:
            estimates = dict.fromkeys(estimates, self._engine.snapshots.size_bytes(told) // len(estimates))
        free = await free_bytes(self._engine)
        needed = self._peak_bytes(missing, blobs, estimates)
        if self._peak_bytes(missing, blobs, {digest: size * PLENTY for digest, size in estimates.items()}) <= free:
            return needed
        # It may be tight: now it is worth asking. What unfinished pulls have left makes room first.
        for layer in () if told else missing:
            estimates[layer.digest] = await self._extracted_bytes(layer) or estimates[layer.digest]
        await require_room(
            self._engine,
            f"cannot pull {self._reference.familiar()}",
            lambda: self._peak_bytes(missing, blobs, estimates),
        )
        return self._peak_bytes(missing, blobs, estimates)

    def _peak_bytes(
        self, missing: Sequence[Descriptor], blobs: Sequence[Descriptor], extracted: dict[Digest, int]
    ) -> int:
        """All layers extracted, and the largest blobs staged that can be at once."""
        staged = sorted((blob.size_bytes - self._content.staged_bytes(blob.digest) for blob in blobs), reverse=True)
        at_once = max(1, min(self._engine.config.max_concurrent_downloads, self._engine.limits.downloads))
        return sum(extracted[layer.digest] for layer in missing) + sum(staged[:at_once])

    async def _extracted_bytes(self, layer: Descriptor) -> int | None:
        """The length of a layer's tar as its blob tells it; None when it does not.

        Gzip: in its last four bytes (RFC 1952); zstd: in its head, if the writer knew it (RFC 8878). A length below
        the blob's own is that of one member or frame of several, or modulo 4 GiB.
        """
        found = b""
        try:
            if layer.media_type.endswith("gzip") and layer.size_bytes >= 4:
                offset = layer.size_bytes - 4
                async with self._session.blob(layer.digest, offset, size_bytes=layer.size_bytes) as blob:
                    if blob.range_honoured:
                        async for chunk in blob:
                            found += chunk
                length = int.from_bytes(found, "little") if len(found) == 4 else 0
            elif layer.media_type.endswith("zstd"):
                async with self._session.blob(layer.digest, 0, size_bytes=layer.size_bytes) as blob:
                    async for chunk in blob:
                        found += chunk
                        if len(found) >= ZSTD_HEAD_BYTES:
                            break
                length = zstd_content_size(found) or 0
            else:
                return None
        except EngineError as error:
            log.info("cannot ask for a layer's size digest=%s error=%s", layer.digest, error.message)
            return None
        return length if length >= layer.size_bytes else None

    async def _give_up(self, digests: list[Digest]) -> None:
        """Drop what this pull has left, unless another one works under the same lease: going on makes no sense."""
        if not self._pulls.works_alone(self._lease):
            return
        images = self._engine.images
        with trio.CancelScope(shield=True):
            try:
                for digest in set(digests):
                    if not self._content.is_open(digest):
                        await self._content.drop(digest)
                await images.leases.drop(self._lease)
            except EngineError as error:  # it expires
                log.error("cannot roll back at once pull=%s error=%s", self._lease, error.message)
        images.collector.wake()

    # --- the end

    async def _commit(self, resolved: _Resolved, image: ImageRecord) -> bool:
        """Transaction C: image and references appear together, the lease goes."""
        canonical = digest_reference(self._reference, resolved.digest)
        former = self._images.find_reference(self._reference)
        names = [self._reference, canonical] if self._reference.digest is None else [canonical]
        records = [
            ReferenceRecord(name, image.image_id, str(resolved.digest), str(resolved.manifest.digest)) for name in names
        ]

        def end_lease(connection: sqlite3.Connection) -> None:
            blobs.note(connection, self._blobs(resolved.manifest, image.config))
            if self._pulls.works_alone(self._lease):
                leases.drop(connection, self._lease)

        await self._images.add(image, records, resolved.documents, end_lease)
        if former is not None and former.image_id != image.image_id:
            self._engine.images.collector.wake()
        return former is None or former.image_id != image.image_id

    def _blobs(self, manifest: Manifest, config: ImageConfig) -> list[BlobRecord]:
        """What a push of these layers need not upload."""
        if manifest.config.digest != config.image_id:  # a delta image: its blobs are not the layers
            return []
        if len(manifest.layers) != len(config.diff_ids):  # of an image that was here: nobody has compared them
            return []
        return [
            BlobRecord(str(diff_id), self._reference.name, str(layer.digest), layer.size_bytes)
            for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
            if layer.media_type in GZIP_LAYERS
        ]

    # --- for the layers

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def pulls(self) -> Pulls:
        return self._pulls

    @property
    def session(self) -> Session:
        return self._session

    @property
    def lease(self) -> str:
        return self._lease


# --- one layer


class _LayerPull:
    """One layer, from the registry to a committed snapshot."""

    def __init__(
        self,
        pull: _Pull,
        layer: Descriptor,
        *,
        parent: str,
        chain_id: str,
        diff_id: Digest,
        watcher: _Watcher,
        ready: trio.Event | None,
        done: trio.Event,
        image: ImageSidecar | None,
        delta: LayerDelta | None,
        must: bool,
    ) -> None:
        """
        Args:
            ready: when the layer below is committed. done: to be set when this one is.
            must: what cannot come by delta does not come at all.
        """
        self._pull = pull
        self._engine = pull.engine
        self._content = pull.engine.images.content
        self._snapshots = pull.engine.snapshots
        self._layer = layer
        self._parent = parent
        self._chain_id = chain_id
        self._diff_id = diff_id
        self._watcher = watcher
        self._ready = ready
        self._done = done
        self._image = image
        self._delta = delta
        self._must = must
        self.queued = trio.Event()  # it has its place among those who wait for a download slot, or needs none yet

    async def run(self) -> None:
        """Fetch, unpack, verify, wait for the layer below, commit.

        Cancellation: nothing is left but the staged prefix.
        """
        if self._engine.locks.is_held(f"chain/{self._chain_id}"):  # by another pull
            self.queued.set()
        async with self._pull.pulls.transfer(self._chain_id, self._watcher) as transfer:
            if await self._is_done_already():
                self._watcher.complete()
                if transfer.status != PULLED:
                    self._watcher.step(PULLED)
            else:
                damage = self._engine.images.checks.damage(self._chain_id)
                if damage is None or not await self._mend(damage, transfer):
                    await self._obtain(transfer)
                transfer.complete()
                transfer.step(PULLED)
        self.queued.set()
        self._done.set()

    async def _obtain(self, transfer: _Transfer) -> None:
        """All of it; in the place of a damaged one, if that is there."""
        unpacked = await self._bring(transfer)
        try:
            if self._ready is not None:
                await self._ready.wait()
            await self._commit(unpacked)
        except BaseException:
            await self._snapshots.discard(unpacked.path)
            raise

    async def _mend(self, damage: LayerCheck, transfer: _Transfer) -> bool:
        """Put fresh files in the place of the bad ones; False when only all of the layer will do.

        Cancellation: each path is the damaged one or the fresh one.
        """
        layer = damage.layer
        if damage.whole:
            return False
        if damage.sidecar:
            await trio.to_thread.run_sync(self._rewrite_sidecars, layer.path, limiter=self._engine.limiters.files)
            self.queued.set()
        if damage.bad:
            fresh = await self._bring(transfer, damage.paths)
            try:
                arguments = {"directory": str(layer.path), "fresh": str(fresh.path), "paths": damage.paths}
                await self._engine.workers.run("mend", arguments)
            except EngineError as error:
                log.error("cannot mend chain_id=%s error=%s", self._chain_id, error.message)
            finally:
                await self._snapshots.put_aside(fresh.path)  # it holds the damaged files now
        checked = await self._engine.images.checks.check([layer], deep=True)
        if any(check.is_damaged for check in checked):
            log.warning("mending single paths was not enough chain_id=%s", self._chain_id)
            return False
        log.warning("mended chain_id=%s paths=%d", self._chain_id, len(damage.bad))
        await self._content.drop(self._layer.digest)
        return True

    def _rewrite_sidecars(self, path: Path) -> None:
        for name, data in self._sidecars().items():
            durable.write_file(path / name, data)

    async def _is_done_already(self) -> bool:
        """Whether another pull has committed it meanwhile; then it is held by our lease too."""
        if self._snapshots.find(self._chain_id) is None or self._engine.images.checks.damage(self._chain_id):
            return False

        def hold(connection: sqlite3.Connection) -> bool:
            here = has_layer(connection, self._chain_id)
            if here:
                leases.hold(connection, self._pull.lease, time.time_ns(), [("chain", self._chain_id)])
            return here

        return await self._engine.db.transaction(hold)

    async def _bring(self, transfer: _Transfer, only: list[str] | None = None) -> Layer:
        """Fetch and unpack, all or some paths.

        A staged prefix that turns out wrong is thrown away and all of it fetched again.
        """
        if self._delta is not None and (self._must or only is None):
            unpacked = await self._apply_delta(self._delta, transfer, only)
            if unpacked is not None:
                return unpacked
        slots = self._pull.pulls.slots
        if self._engine.locks.is_held(f"blob/{self._layer.digest}"):
            self.queued.set()
        async with self._engine.locks(f"blob/{self._layer.digest}"):
            self.queued.set()
            if slots.available_tokens == 0:
                self._watcher.step("Waiting")
            async with slots:
                if self._content.staged_bytes(self._layer.digest):
                    try:
                        return await self._fetch_and_unpack(transfer, only)
                    except WrongBlob as error:
                        log.warning("staged bytes are wrong, fetching again: %s", error.message)
                        await self._content.drop(self._layer.digest)
                return await self._fetch_and_unpack(transfer, only)

    async def _apply_delta(self, delta: LayerDelta, transfer: _Transfer, only: list[str] | None) -> Layer | None:
        """Make the layer out of its delta; None when that did not work and the layer itself is to be fetched."""
        path = await self._snapshots.new_directory(self._sidecars())
        try:
            report = await delta.apply(path, transfer, self.queued, only)
            self._pull.came_as_deltas.append((delta.way, self._layer.size_bytes))
            return self._unpacked(path, report)
        except EngineError as error:
            await self._snapshots.discard(path)
            if error.message.endswith(NO_SPACE):
                raise NoSpace(f"failed to register layer: {error.message}") from error
            # Whoever lost the connection goes on with the delta next time, not with what is much larger.
            if self._must or (error.retryable and not isinstance(error, DeltaNotSent)):
                raise
            log.warning("no delta after all diff_id=%s error=%s", self._diff_id.short, error.message)
            self._watcher.lines.message(f"Delta of {self._layer.digest.short} cannot be used: {error.message}")
            if delta.way.blob is not None:
                await self._content.drop(delta.way.blob.digest)
            self._watcher.expect(self._layer.size_bytes)
            return None
        except BaseException:
            await self._snapshots.discard(path)
            raise

    async def _fetch_and_unpack(self, transfer: _Transfer, only: list[str] | None) -> Layer:
        """One go: the download and the worker side by side."""
        layer = self._layer
        ingest = await self._content.open(layer.digest, layer.size_bytes)
        try:
            path = await self._snapshots.new_directory(self._sidecars())
            try:
                return self._verified(path, await self._work(ingest, path, transfer, only))
            except BaseException:
                await self._snapshots.discard(path)
                raise
        finally:
            await ingest.aclose()

    async def _work(
        self, ingest: Ingest, path: Path, transfer: _Transfer, only: list[str] | None
    ) -> dict[str, Any]:
        """Run download and worker; the worker's report.

        Raises: WrongBlob, NoSpace, EngineError.
        """
        report: dict[str, Any] = {}
        failure: EngineError | None = None
        async with one_error(), trio.open_nursery() as nursery:
            pulls = self._pull.pulls
            attempts = self._engine.config.max_download_attempts
            download = Download(self._pull.session, self._layer, transfer, attempts=attempts, sleep=pulls.sleep)
            nursery.start_soon(download.run, ingest)
            try:
                report = await self._unpack(ingest, path, transfer, only)
            except EngineError as error:
                if error.message.endswith(NO_SPACE):
                    raise NoSpace(f"failed to register layer: {error.message}") from error
                # The bytes may be at fault, which is known when all have come.
                failure = error
                if ingest.size_bytes - ingest.received > BLAME_BYTES:
                    nursery.cancel_scope.cancel()
        if failure is None:
            return report
        if ingest.is_complete and await ingest.hash(self._layer.digest.algorithm) != self._layer.digest.hex:
            raise WrongBlob(f"filesystem layer verification failed for digest {self._layer.digest}") from failure
        raise SystemFailure(f"failed to register layer: {failure.message}") from failure

    def _sidecars(self) -> dict[str, bytes]:
        """What stands beside the layer's files, so that it can be told without the database."""
        layer = LayerSidecar(
            Digest.parse(self._chain_id),
            Digest.parse(self._parent) if self._parent else None,
            self._diff_id,
            self._layer.digest,
            self._layer.size_bytes,
            self._layer.media_type,
        )
        return {LAYER_FILE: layer.encode(), **({self._image.file_name: self._image.encode()} if self._image else {})}

    async def _unpack(
        self, ingest: Ingest, path: Path, transfer: _Transfer, only: list[str] | None
    ) -> dict[str, Any]:
        total = self._layer.size_bytes

        async def feed(stdin: trio.abc.SendStream) -> None:
            position = 0
            while data := await ingest.read(position):
                await stdin.send_all(data)
                position += len(data)
                if position == total or ingest.is_complete:
                    transfer.advance("Extracting", position, total)
            await ingest.unlink_if_fresh()

        arguments: dict[str, object] = {"directory": str(path)}
        if only is not None:
            arguments["only"] = only
        return await self._engine.workers.run("unpack", arguments, feed=feed)

    def _verified(self, path: Path, report: dict[str, Any]) -> Layer:
        """Compare what arrived with what was announced.

        Raises: WrongBlob, when the blob is not what its digest says; DataLoss, when its content is not the layer.
        """
        if report["digest"] != str(self._layer.digest) or report["size"] != self._layer.size_bytes:
            raise WrongBlob(f"filesystem layer verification failed for digest {self._layer.digest}")
        if report["diff_id"] != str(self._diff_id):
            raise DataLoss(
                f"layers from manifest don't match image configuration: layer {self._layer.digest} "
                f'is "{report["diff_id"]}", expected "{self._diff_id}"'
            )
        return self._unpacked(path, report)

    def _unpacked(self, path: Path, report: dict[str, Any]) -> Layer:
        size_bytes = int(report["size_bytes"])
        return Layer(
            path,
            self._chain_id,
            self._parent,
            str(self._diff_id),
            size_bytes,
            int(report.get("disk_bytes", size_bytes)),
        )

    async def _commit(self, unpacked: Layer) -> None:
        """Transaction B."""
        staged = [self._layer.digest]
        if self._delta is not None and self._delta.way.blob is not None:
            staged.append(self._delta.way.blob.digest)
        idle = [digest for digest in staged if not self._content.is_open(digest)]

        def also(connection: sqlite3.Connection) -> None:
            leases.hold(connection, self._pull.lease, time.time_ns(), [("chain", self._chain_id)])
            for digest in idle:
                self._content.delete(connection, digest)

        if self._snapshots.find(self._chain_id) is None:
            await self._snapshots.commit(unpacked, also)
        else:
            await self._snapshots.replace(unpacked, also)
            log.warning("layer was replaced chain_id=%s", self._chain_id)
        for digest in staged:
            await self._content.deleted(digest)


# --- space


async def require_room(engine: Engine, what: str, needed: Callable[[], int]) -> None:
    """Refuse what cannot fit; what unfinished pulls have left makes room first.

    Args:
        what: how the message begins. needed: bytes; asked again when room was made.
    Raises: NoSpace.
    """
    if needed() <= await free_bytes(engine):
        return
    await engine.images.drop_unfinished()
    await engine.images.collector.collect()
    await engine.snapshots.trash.empty()
    still, free = needed(), await free_bytes(engine)
    if still > free:
        raise NoSpace(
            f"{what}: {progress.human_size(still)} needed, {progress.human_size(max(0, free))} free: {NO_SPACE}"
        )


async def free_bytes(engine: Engine) -> int:
    """What a pull or load may fill of the data root's disk."""
    return await trio.to_thread.run_sync(
        usable_bytes, engine.config.data_root, engine.config.pull_reserve, limiter=engine.limiters.files
    )


def usable_bytes(root: Path, reserve: Reserve | None) -> int:
    """Free bytes less a reserve, so that the device goes on working: 5 % of the disk, at most 64 MiB, or as told."""
    status = os.statvfs(root)
    total = status.f_blocks * status.f_frsize
    if reserve is None:
        kept = min(total // 20, 64 << 20)
    else:
        kept = reserve.size_bytes or int(total * reserve.percent / 100)
    return status.f_bavail * status.f_frsize - kept


def zstd_content_size(head: bytes) -> int | None:
    """What the first frame's header says (RFC 8878, 3.1.1.1); None when it does not, or is not there."""
    if len(head) < ZSTD_HEAD_BYTES or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = head[4]
    is_single = bool(descriptor & 0x20)
    width = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
    at = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(head[at : at + width], "little")
    return (size + 256 if width == 2 else size) if width else None


def extracted_estimate(layer: Descriptor) -> int:
    """What a layer takes when unpacked, if nobody says: twice its blob, or the blob itself when it is not packed."""
    packed = layer.media_type.endswith(("gzip", "zstd"))
    return layer.size_bytes * 2 if packed else layer.size_bytes
