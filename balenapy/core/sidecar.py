"""What stands beside a layer's files, so that layers and images can be told when the database is lost.

    layer.json             which layer this is, and which blob it came from
    image-<hex>.json       in the directory of its top layer: an image's documents and the names it was pulled by

They are written before the layer is unpacked and made durable with it, at no cost. Nothing here is believed: digests
decide. As everything read from disk they may be damaged, so reading is total: a value or `InvalidSidecar`.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from balenapy.core.digest import Digest
from balenapy.core.reference import Reference, parse_reference
from balenapy.errors import DataLoss, EngineError

LAYER_FILE = "layer.json"
SIDECAR_MAX_BYTES = 24 << 20  # three documents of 4 MiB, in base64


class InvalidSidecar(DataLoss):
    """The file is damaged or not ours."""


@dataclass(frozen=True, slots=True)
class LayerSidecar:
    """One committed layer."""

    chain_id: Digest
    parent: Digest | None
    diff_id: Digest
    blob: Digest
    blob_size: int
    media_type: str

    def encode(self) -> bytes:
        return _dump(
            {
                "chain_id": str(self.chain_id),
                "parent": str(self.parent or ""),
                "diff_id": str(self.diff_id),
                "blob": str(self.blob),
                "blob_size": self.blob_size,
                "media_type": self.media_type,
            }
        )


@dataclass(frozen=True, slots=True)
class SidecarDocument:
    digest: Digest
    media_type: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class ImageSidecar:
    """One image: its config first among the documents, and its names with the manifests they stand for."""

    image_id: Digest
    documents: tuple[SidecarDocument, ...]
    references: tuple[tuple[Reference, str, str], ...]  # name, digest of what it names, digest of the manifest

    @property
    def file_name(self) -> str:
        return f"image-{self.image_id.hex}.json"

    def encode(self) -> bytes:
        return _dump(
            {
                "image_id": str(self.image_id),
                "documents": [
                    {
                        "digest": str(document.digest),
                        "media_type": document.media_type,
                        "bytes": base64.b64encode(document.raw).decode(),
                    }
                    for document in self.documents
                ],
                "references": [
                    {"name": name.canonical(), "manifest": manifest, "image_manifest": image_manifest}
                    for name, manifest, image_manifest in self.references
                ],
            }
        )


def decode_layer(data: bytes) -> LayerSidecar:
    """Raises: InvalidSidecar."""
    value = _load(data)
    parent = _text(value, "parent")
    size = value.get("blob_size")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 63:
        raise InvalidSidecar("blob_size is not a length")
    return LayerSidecar(
        _digest(_text(value, "chain_id")),
        _digest(parent) if parent else None,
        _digest(_text(value, "diff_id")),
        _digest(_text(value, "blob")),
        size,
        _text(value, "media_type"),
    )


def decode_image(data: bytes) -> ImageSidecar:
    """Documents are held against their digests. Raises: InvalidSidecar."""
    value = _load(data)
    documents = []
    for entry in _objects(value, "documents"):
        try:
            raw = base64.b64decode(_text(entry, "bytes"), validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidSidecar(f"a document is not base64: {error}") from error
        document = SidecarDocument(_digest(_text(entry, "digest")), _text(entry, "media_type"), raw)
        if not document.digest.matches(raw):
            raise InvalidSidecar(f"document {document.digest} is damaged")
        documents.append(document)
    image_id = _digest(_text(value, "image_id"))
    if not documents or documents[0].digest != image_id:
        raise InvalidSidecar("the image's config is missing")
    references = []
    for entry in _objects(value, "references"):
        try:
            name = parse_reference(_text(entry, "name"))
        except EngineError as error:
            raise InvalidSidecar(error.message) from error
        references.append((name, _text(entry, "manifest"), _text(entry, "image_manifest")))
    return ImageSidecar(image_id, tuple(documents), tuple(references))


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _load(data: bytes) -> dict[str, Any]:
    if len(data) > SIDECAR_MAX_BYTES:
        raise InvalidSidecar("too long")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidSidecar(str(error)) from error
    if not isinstance(value, dict):
        raise InvalidSidecar("not an object")
    return value


def _text(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise InvalidSidecar(f"{key} is not a string")
    return text


def _objects(value: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = value.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidSidecar(f"{key} is not a list of objects")
    return entries


def _digest(text: str) -> Digest:
    try:
        return Digest.parse(text)
    except EngineError as error:
        raise InvalidSidecar(error.message) from error
