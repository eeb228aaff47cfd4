"""Images and the references that name them.

An image is its config document: the image_id is the digest of those bytes, kept as they came. A reference is a
canonical name with a tag or a digest. Documents (configs, manifests, indexes) are small and are rows.

Records are in memory; a change is one transaction, and the records follow in the order of the commits.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from balenapy.core.digest import Digest
from balenapy.core.manifest import ImageConfig, parse_image_config
from balenapy.core.reference import Reference, parse_reference
from balenapy.errors import EngineError, SystemFailure
from balenapy.linux import durable
from balenapy.stores.db import Database
from balenapy.stores.snapshots import has_layer

log = logging.getLogger(__name__)

CONFIG_MEDIA_TYPE = "application/vnd.docker.container.image.v1+json"


@dataclass(frozen=True, slots=True)
class Document:
    """A registry document: exact bytes and what they are."""

    digest: str
    media_type: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class ReferenceRecord:
    """A name of an image, and the digests of the documents it was pulled or pushed by ("" for local images).

    `manifest` is what the registry calls it: an index, or the manifest itself; `image_manifest` the manifest.
    """

    reference: Reference
    image_id: str
    manifest: str = ""
    image_manifest: str = ""


@dataclass(slots=True)
class ImageRecord:
    """An image. `references` are canonical names, sorted: tags and digests."""

    image_id: str
    config: ImageConfig
    parent: str = ""  # image_id, of local builds and commits
    size_bytes: int = 0
    last_tagged_ns: int = 0
    references: list[str] = field(default_factory=list)

    @property
    def chain_id(self) -> str:
        """Names the snapshot of its whole stack; "" without layers."""
        return self.config.chain_id

    @property
    def created_ns(self) -> int:
        """When it was built; Go's zero time when the config does not say."""
        return self.config.created_ns or 0

    @property
    def short_id(self) -> str:
        return self.image_id.partition(":")[2][:12]

    @property
    def labels(self) -> dict[str, str] | None:
        return self.config.config.get("Labels")


class ImageStore:
    """Images, references and documents."""

    def __init__(self, db: Database) -> None:
        """Load the rows. Blocks: for start. An image that cannot be read is logged, left alone and not listed."""
        self._db = db
        self._images: dict[str, ImageRecord] = {}
        self._references: dict[str, ReferenceRecord] = {}
        self.unreadable: dict[str, str] = {}  # image_id -> why
        self._load()

    def _load(self) -> None:
        rows = self._db.query(
            "SELECT image_id, parent, size_bytes, last_tagged_ns, bytes, chain_id "
            "FROM image LEFT JOIN document ON document.digest = image.image_id"
        )
        strayed: list[tuple[str, str]] = []
        for image_id, parent, size_bytes, last_tagged_ns, raw, chain_id in rows:
            try:
                if not isinstance(raw, bytes):
                    raise SystemFailure("its config is missing")
                config = parse_image_config(raw)
                if str(config.image_id) != image_id:
                    raise SystemFailure("its config does not match its digest")
            except EngineError as error:
                log.error("image cannot be read image_id=%s error=%s", image_id, error.message)
                self.unreadable[str(image_id)] = error.message
                continue
            if chain_id != config.chain_id:
                log.error("image row names other layers, corrected image_id=%s chain_id=%s", image_id, chain_id)
                strayed.append((config.chain_id, str(image_id)))
            self._images[str(image_id)] = ImageRecord(
                str(image_id), config, str(parent), _number(size_bytes), _number(last_tagged_ns)
            )
        if strayed:
            self._db.transaction_nowait(
                lambda connection: connection.executemany("UPDATE image SET chain_id = ? WHERE image_id = ?", strayed)
            )
        rows = self._db.query("SELECT name, image_id, manifest, image_manifest FROM reference")
        for name, image_id, manifest, image_manifest in rows:
            try:
                reference = parse_reference(str(name))
                record = ReferenceRecord(reference, str(image_id), str(manifest), str(image_manifest))
            except EngineError as error:
                self._db.found_damaged("reference", name, error.message)
                continue
            if record.image_id in self._images:
                self._name(record)
            else:
                self._db.found_damaged("reference", name, f"it names no image: {image_id}")

    # --- reading

    def find(self, image_id: str) -> ImageRecord | None:
        return self._images.get(image_id)

    def find_reference(self, reference: Reference) -> ReferenceRecord | None:
        """Look up a reference that has a tag or a digest; with both, the digest counts."""
        if reference.digest is not None and reference.tag is not None:
            reference = reference.without_tag().with_digest(reference.digest)
        return self._references.get(reference.canonical())

    def images(self) -> Iterator[ImageRecord]:
        return iter(self._images.values())

    def references(self) -> Iterator[ReferenceRecord]:
        return iter(self._references.values())

    def references_of(self, image_id: str) -> list[ReferenceRecord]:
        """The names of an image, sorted by their canonical form."""
        image = self._images.get(image_id)
        return [self._references[name] for name in image.references] if image is not None else []

    def children(self, image_id: str) -> list[ImageRecord]:
        """Images built or committed from this one."""
        return [image for image in self._images.values() if image.parent == image_id]

    def ancestry(self, image_id: str) -> list[str]:
        """An image and those it was built from, as far as they are here."""
        found: list[str] = []
        while image_id in self._images and image_id not in found:
            found.append(image_id)
            image_id = self._images[image_id].parent
        return found

    def with_prefix(self, hex_prefix: str) -> list[ImageRecord]:
        """Images whose ID begins like this (without `sha256:`)."""
        return [image for image_id, image in self._images.items() if image_id.partition(":")[2].startswith(hex_prefix)]

    async def document(self, digest: str) -> Document | None:
        """Read a manifest or an index."""

        def read(connection: sqlite3.Connection) -> Document | None:
            row = connection.execute("SELECT media_type, bytes FROM document WHERE digest = ?", (digest,)).fetchone()
            return Document(digest, row[0], row[1]) if row else None

        return await self._db.transaction(read)

    # --- changing

    async def add(
        self,
        image: ImageRecord,
        references: Iterable[ReferenceRecord] = (),
        documents: Iterable[Document] = (),
        also: Callable[[sqlite3.Connection], None] | None = None,
    ) -> None:
        """Add an image (one that exists is kept as it is) and point references at it, in one transaction.

        Raises: SystemFailure, when its top layer has no row.
        """
        named, papers = list(references), list(documents)

        def insert(connection: sqlite3.Connection) -> None:
            durable.step("add image")
            self.insert(connection, image, named, papers)
            if also is not None:
                also(connection)

        await self._db.change(insert, lambda _: self.inserted(image, named))

    def insert(
        self,
        connection: sqlite3.Connection,
        image: ImageRecord,
        references: Iterable[ReferenceRecord] = (),
        documents: Iterable[Document] = (),
    ) -> None:
        """`add` inside a transaction; `inserted` follows it."""
        chain_id = image.chain_id
        if chain_id and not has_layer(connection, chain_id):
            raise SystemFailure(f"layer does not exist: {chain_id}")
        insert_documents(connection, [Document(image.image_id, CONFIG_MEDIA_TYPE, image.config.raw), *documents])
        connection.execute(
            "INSERT OR IGNORE INTO image(image_id, chain_id, parent, size_bytes, last_tagged_ns) VALUES(?, ?, ?, ?, ?)",
            (image.image_id, chain_id, image.parent, image.size_bytes, image.last_tagged_ns),
        )
        for record in references:
            _insert_reference(connection, record)

    def inserted(self, image: ImageRecord, references: Iterable[ReferenceRecord] = ()) -> None:
        """Follow `insert` in memory."""
        if image.image_id not in self._images:
            self.unreadable.pop(image.image_id, None)
            image.references.clear()
            self._images[image.image_id] = image
        for record in references:
            self._name(record)

    async def tag(self, record: ReferenceRecord, now_ns: int) -> bool:
        """Point a reference at an image that exists, silently taking it from another.

        Returns: False, when the image is gone by now.
        """

        def insert(connection: sqlite3.Connection) -> bool:
            durable.step("tag image")
            updated = connection.execute(
                "UPDATE image SET last_tagged_ns = ? WHERE image_id = ?", (now_ns, record.image_id)
            )
            if updated.rowcount == 0:
                return False
            _insert_reference(connection, record)
            return True

        def apply(done: bool) -> None:
            if done:
                self._images[record.image_id].last_tagged_ns = now_ns
                self._name(record)

        return await self._db.change(insert, apply)

    async def set_parent(self, image_id: str, parent: str) -> None:
        """Say from which image one was built: a build found it by its history."""

        def update(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE image SET parent = ? WHERE image_id = ?", (parent, image_id))

        def apply(_: None) -> None:
            image = self._images.get(image_id)
            if image is not None:
                image.parent = parent

        await self._db.change(update, apply)

    async def remove(self, names: Iterable[Reference], image_ids: Iterable[str] = ()) -> None:
        """Delete references and images (with the references they still have) in one transaction.

        Their layers and documents go with the next collection.
        """
        gone = [name.canonical() for name in names]
        ids = list(image_ids)

        def delete(connection: sqlite3.Connection) -> None:
            durable.step("remove image")
            connection.executemany("DELETE FROM reference WHERE name = ?", [(name,) for name in gone])
            connection.executemany("DELETE FROM reference WHERE image_id = ?", [(image_id,) for image_id in ids])
            connection.executemany("DELETE FROM image WHERE image_id = ?", [(image_id,) for image_id in ids])

        def apply(_: None) -> None:
            for name in gone:
                self._unname(name)
            for image_id in ids:
                image = self._images.pop(image_id, None)
                for name in image.references if image is not None else ():
                    self._references.pop(name, None)

        await self._db.change(delete, apply)

    def _name(self, record: ReferenceRecord) -> None:
        name = record.reference.canonical()
        self._unname(name)
        self._references[name] = record
        image = self._images[record.image_id]
        image.references.append(name)
        image.references.sort()

    def _unname(self, name: str) -> None:
        former = self._references.pop(name, None)
        if former is not None and former.image_id in self._images:
            self._images[former.image_id].references.remove(name)


def _number(value: object) -> int:
    """A column that is told only; 0 when it is damaged."""
    return value if isinstance(value, int) else 0


def insert_documents(connection: sqlite3.Connection, documents: Iterable[Document]) -> None:
    """Write documents. One that exists has the same bytes, for it has the same digest, unless it was damaged."""
    connection.executemany(
        "INSERT INTO document(digest, media_type, bytes) VALUES(?, ?, ?) ON CONFLICT(digest) DO UPDATE "
        "SET media_type = excluded.media_type, bytes = excluded.bytes WHERE bytes IS NOT excluded.bytes",
        [(document.digest, document.media_type, document.raw) for document in documents],
    )


def _insert_reference(connection: sqlite3.Connection, record: ReferenceRecord) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO reference(name, image_id, manifest, image_manifest) VALUES(?, ?, ?, ?)",
        (record.reference.canonical(), record.image_id, record.manifest, record.image_manifest),
    )


def digest_reference(reference: Reference, digest: Digest) -> Reference:
    """`repo@digest` of a reference, whatever tag it has."""
    return reference.without_tag().with_digest(digest)
