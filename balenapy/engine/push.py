"""Push: an image goes to its repository.

    each layer, some at once: known to be there (HEAD) | mounted from another repository | rebuilt by a worker from
        its files and tar-split, compressed, uploaded as it comes
    config, manifest
    one transaction: the reference by digest, the manifest, and which blobs the repository has

A layer compresses to the same bytes each time, so its blob has one digest for ever: an upload that was cut goes on
where the registry's part ends, and once the digest is known (from a pull or a push to anywhere) every registry is
asked for it before anything is sent.

The request owns the push: when the client is gone everything is cancelled, and what stays is an upload the registry
forgets by itself.

Sources: moby 18.09 distribution/{push,push_v2}.go.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from balenapy.core import progress, wire
from balenapy.core.digest import Digest
from balenapy.core.manifest import DOCKER_CONFIG, DOCKER_LAYER, SCHEMA2, Descriptor, encode_manifest
from balenapy.core.reference import Reference
from balenapy.engine.assembly import CHUNK_BYTES
from balenapy.engine.lines import Lines, Write, write_during
from balenapy.engine.nurseries import one_error
from balenapy.errors import InvalidParameter, SystemFailure
from balenapy.registry.auth import AuthConfig, auth_config, decode_registry_auth
from balenapy.registry.errors import RegistryError, plain_error
from balenapy.registry.http import RetryBudget
from balenapy.stores import blobs
from balenapy.stores.blobs import BlobRecord
from balenapy.stores.images import Document, ImageRecord, ReferenceRecord, digest_reference
from balenapy.stores.snapshots import Layer

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.registry.client import Session, Upload

log = logging.getLogger(__name__)

ASKED_MAX = 4  # digests a repository is asked for before a layer is uploaded
MOUNTS_MAX = 2  # repositories a mount is tried from
RETRY_STEP_S = 5  # moby distribution/xfer/upload.go: attempt n waits n * 5 s


def credentials(header: str, body: bytes) -> AuthConfig:
    """Those of `X-Registry-Auth`, or of the body, where clients had them before there was a header.

    Raises: InvalidParameter, when there is neither.
    """
    if header:
        return decode_registry_auth(header)
    try:
        return auth_config(wire.parse_json(body))
    except wire.MalformedJSON as error:
        raise InvalidParameter(f"Bad parameters and missing X-Registry-Auth: {error.message}") from error


class Pushes:
    """All pushes that are under way."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.slots = trio.CapacityLimiter(max(1, engine.config.max_concurrent_uploads))
        self.sleep: Callable[[float], Awaitable[None]] = trio.sleep  # tests do not wait

    async def push(self, reference: Reference, auth: AuthConfig | None, write: Write) -> None:
        """Push one tag, or all tags of the repository when there is none.

        Args:
            write: takes the lines of progress; the first comes before anything can fail.
        Raises: EngineError, with dockerd's words.
        """
        lines = Lines(write)
        lines.message(f"The push refers to repository [{reference.name}]")
        await write_during(lines, lambda: self._push_all(reference, auth, lines))

    async def _push_all(self, reference: Reference, auth: AuthConfig | None, lines: Lines) -> None:
        engine = self._engine
        here = [record for record in engine.images.store.references() if record.reference.name == reference.name]
        if not here:
            raise SystemFailure(f"An image does not exist locally with the tag: {reference.familiar_name()}")
        if reference.digest is not None:
            raise SystemFailure("cannot push a digest reference")
        wanted = [
            record
            for record in sorted(here, key=lambda record: record.reference.canonical())
            if record.reference.digest is None and reference.tag in (None, record.reference.tag)
        ]
        if not wanted:
            raise SystemFailure(
                f"tag does not exist: {reference.familiar()}"
                if reference.tag is not None
                else f"no tags to push for {reference.familiar_name()}"
            )
        images = [(record.reference, engine.images.get(record.image_id)) for record in wanted]
        diff_ids = {str(diff_id) for _, image in images for diff_id in image.config.diff_ids}
        known = await engine.db.transaction(lambda connection: blobs.known(connection, diff_ids))
        sources = _mount_sources(reference, known)
        async with engine.registry.session(
            reference, auth, actions="pull,push", also_pull=sources, translate=plain_error
        ) as session:
            for tag, image in images:
                await _Push(self, engine, session, tag, image, known, lines).run()
        engine.events.publish(
            "image",
            "push",
            reference.familiar(),
            {**(images[-1][1].labels or {}), "name": reference.familiar_name()},
        )


def _mount_sources(reference: Reference, known: dict[str, list[BlobRecord]]) -> list[str]:
    """Paths of other repositories on the same registry that have layers of ours."""
    prefix = f"{reference.domain}/"
    found = {
        record.repository.removeprefix(prefix): None
        for records in known.values()
        for record in records
        if record.repository.startswith(prefix) and record.repository != reference.name
    }
    return list(found)[:MOUNTS_MAX]


class _Push:
    """One tag."""

    def __init__(
        self,
        pushes: Pushes,
        engine: Engine,
        session: Session,
        tag: Reference,
        image: ImageRecord,
        known: dict[str, list[BlobRecord]],
        lines: Lines,
    ) -> None:
        self._pushes = pushes
        self._engine = engine
        self._session = session
        self._tag = tag
        self._image = image
        self._known = known
        self._lines = lines
        self._stored: dict[str, Descriptor] = {}  # diff_id -> the blob in the repository

    async def run(self) -> None:
        config = self._image.config
        async with self._engine.snapshots.pinned(config.chain_id):
            layers = {layer.diff_id: layer for layer in self._engine.snapshots.chain(config.chain_id)}
            for diff_id in reversed(config.diff_ids):
                self._lines.step(diff_id.short, "Preparing")
            async with one_error(), trio.open_nursery() as nursery:
                for layer in layers.values():
                    nursery.start_soon(self._push_layer, layer)
        await self._push_config()
        raw = encode_manifest(
            Descriptor(DOCKER_CONFIG, config.image_id, len(config.raw)),
            [self._stored[str(diff_id)] for diff_id in config.diff_ids],
        )
        assert self._tag.tag is not None
        digest = await self._session.put_manifest(raw, SCHEMA2, self._tag.tag)
        await self._remember(raw, digest)
        self._lines.message(f"{self._tag.tag}: digest: {digest} size: {len(raw)}")
        result = {"Tag": self._tag.tag, "Digest": str(digest), "Size": len(raw)}
        self._lines.put(progress.aux(result, with_progress=True))

    async def _remember(self, raw: bytes, digest: Digest) -> None:
        """The image has a name by digest now, and the repository these blobs."""
        if self._engine.images.store.find(self._image.image_id) is None:  # deleted meanwhile
            return
        name = ReferenceRecord(digest_reference(self._tag, digest), self._image.image_id, str(digest), str(digest))
        stored = [
            BlobRecord(diff_id, self._tag.name, str(blob.digest), blob.size_bytes)
            for diff_id, blob in self._stored.items()
        ]
        await self._engine.images.store.add(
            self._image,
            [name],
            [Document(str(digest), SCHEMA2, raw)],
            partial(_note_blobs, stored=stored),
        )

    async def _push_config(self) -> None:
        config = self._image.config
        if await self._session.blob_size(config.image_id) is None:
            upload = await self._session.begin_upload()
            await upload.finish(config.image_id, config.raw)

    # --- layers

    async def _push_layer(self, layer: Layer) -> None:
        id = Digest.parse(layer.diff_id).short
        slots = self._pushes.slots
        if slots.available_tokens == 0:
            self._lines.step(id, "Waiting")
        async with slots:
            records = self._ordered(layer)
            for digest in list(dict.fromkeys(record.digest for record in records))[:ASKED_MAX]:
                size_bytes = await self._session.blob_size(Digest.parse(digest))
                if size_bytes is not None:
                    self._keep(layer, Digest.parse(digest), size_bytes)
                    self._lines.step(id, "Layer already exists")
                    return
            upload = await self._mount(layer, records)
            if layer.diff_id in self._stored:
                return
            uploading = _LayerUpload(self._pushes, self._engine, self._session, layer, self._lines)
            self._keep(layer, *await uploading.run(upload))
            self._lines.step(id, "Pushed")

    def _ordered(self, layer: Layer) -> list[BlobRecord]:
        """What is known of a layer: this repository's first, then this registry's."""

        def distance(record: BlobRecord) -> int:
            if record.repository == self._tag.name:
                return 0
            return 1 if record.repository.startswith(f"{self._tag.domain}/") else 2

        return sorted(self._known.get(layer.diff_id, ()), key=distance)

    async def _mount(self, layer: Layer, records: Sequence[BlobRecord]) -> Upload | None:
        """Have it taken over from another repository; or else the upload that the registry offered instead."""
        prefix = f"{self._tag.domain}/"
        upload: Upload | None = None
        tried = 0
        for record in records:
            if record.repository == self._tag.name or not record.repository.startswith(prefix):
                continue
            path = record.repository.removeprefix(prefix)
            if upload is not None:
                await upload.cancel()
            upload = await self._session.mount(Digest.parse(record.digest), path)
            if upload is None:
                self._keep(layer, Digest.parse(record.digest), record.size_bytes)
                self._lines.step(Digest.parse(layer.diff_id).short, f"Mounted from {path}")
                return None
            tried += 1
            if tried == MOUNTS_MAX:
                break
        return upload

    def _keep(self, layer: Layer, digest: Digest, size_bytes: int) -> None:
        self._stored[layer.diff_id] = Descriptor(DOCKER_LAYER, digest, size_bytes)
        record = BlobRecord(layer.diff_id, self._tag.name, str(digest), size_bytes)
        if record not in self._known.setdefault(layer.diff_id, []):
            self._known[layer.diff_id].insert(0, record)  # for the next tag


def _note_blobs(connection: sqlite3.Connection, *, stored: Sequence[BlobRecord]) -> None:
    blobs.note(connection, stored)


@dataclass(slots=True, eq=False)
class _LayerUpload:
    """One layer that goes up, over as many connections as it takes."""

    pushes: Pushes
    engine: Engine
    session: Session
    layer: Layer
    lines: Lines
    _packed: tuple[Digest, int] | None = None  # the blob's digest and length, once it was made to its end

    async def run(self, upload: Upload | None) -> tuple[Digest, int]:
        """Upload it; the blob's digest and length."""
        budget = RetryBudget(max(1, self.engine.config.max_upload_attempts))
        id = Digest.parse(self.layer.diff_id).short
        offset = attempt = 0
        while True:
            try:
                if upload is None:
                    offset = 0
                    if self._packed is not None and await self.session.blob_size(self._packed[0]) is not None:
                        return self._packed  # it was the last answer that got lost
                    upload = await self.session.begin_upload()
                if self._packed is None or offset < self._packed[1]:
                    self._packed = await self._send(upload, offset)
                await upload.finish(self._packed[0])
                return self._packed
            except RegistryError as error:
                attempt += 1
                if budget.next_delay(error) is None:
                    raise
                log.warning("upload interrupted layer=%s attempt=%d error=%s", id, attempt, error.message)
            for left in range(RETRY_STEP_S * attempt, 0, -1):
                self.lines.step(id, f"Retrying in {left} second{'s' if left != 1 else ''}")
                await self.pushes.sleep(1)
            upload, offset = await self._where(upload)

    async def _where(self, upload: Upload | None) -> tuple[Upload | None, int]:
        """How much of an upload the registry has; it may have none of it any more."""
        if upload is None:
            return None, 0
        try:
            offset = await upload.offset()
        except RegistryError as error:
            log.info("upload begins anew layer=%s error=%s", self.layer.diff_id, error.message)
            return None, 0
        log.info("upload goes on layer=%s at=%d", self.layer.diff_id, offset)
        return upload, offset

    async def _send(self, upload: Upload, offset: int) -> tuple[Digest, int]:
        """Make the blob and send what of it the registry has not."""
        send, receive = trio.open_memory_channel[bytes](0)
        report: dict[str, str] = {}

        async def drain(stream: trio.abc.ReceiveStream) -> None:
            skip = offset
            while data := await stream.receive_some(CHUNK_BYTES):
                if skip >= len(data):
                    skip -= len(data)
                    continue
                await send.send(bytes(data[skip:]))
                skip = 0

        async def pack() -> None:
            arguments = {
                "directory": str(self.layer.path),
                "diff_id": self.layer.diff_id,
                "compression": "gzip",
                "progress": True,
            }
            report.update(await self.engine.workers.run("pack", arguments, drain=drain, progress=self._advance))
            send.close()  # only now: an end that comes because packing failed is not the blob's

        async with one_error(), trio.open_nursery() as nursery:
            nursery.start_soon(pack)
            await upload.send(receive)
        return Digest.parse(report["digest"]), int(report["size"])

    def _advance(self, tar_bytes: int) -> None:
        id = Digest.parse(self.layer.diff_id).short
        self.lines.advance(id, "Pushing", tar_bytes, self.layer.size_bytes)
