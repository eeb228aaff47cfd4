"""Deltas between images of `tests/images_fixture`, and how a registry holds them.

Made with the makers of `delta/` and dressed here by FORMAT.md section 8, so that the reader is not tested with the
writer's own idea of the documents.
"""

from __future__ import annotations

import http.client
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from delta import librsync, tardiff
from delta.maker import LayerMaker, Settings
from delta.match import BaseIndex
from tests.compat.images import compact, digest
from tests.delta.randomtars import opened, opened_base
from tests.images_fixture import CREATED, INDEX_TYPES, MANIFEST_TYPES, Blob, ImageFixture, _call, _push_blob
from tests.registry.fake import FakeRegistry

ARTIFACT_TYPE = "application/vnd.balenapy.image.delta.v1"
CONFIG_TYPE = "application/vnd.balenapy.image.delta.config.v1+json"
LAYER_TYPE = "application/vnd.balenapy.layer.delta.v1"
BASE, TARGET = "vnd.balenapy.delta.base", "vnd.balenapy.delta.target"
TAR_DIFF_TYPE = "application/vnd.tar-diff"
OCI_INDEX = INDEX_TYPES["oci"]


@dataclass(frozen=True)
class DeltaFixture:
    """A delta of an image: the blobs of its layers and the manifest that names them. Lie by `replace`."""

    layers: tuple[Blob, ...]
    annotations: Mapping[str, str]
    subject: Mapping[str, Any] | None = None
    artifact_type: str = ARTIFACT_TYPE
    config: Blob = field(default_factory=lambda: Blob(CONFIG_TYPE, b"{}"))

    @property
    def manifest(self) -> Blob:
        document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPES["oci"],
            "artifactType": self.artifact_type,
            "config": self.config.descriptor,
            "layers": [layer.descriptor for layer in self.layers],
            "annotations": dict(self.annotations),
        }
        if self.subject is not None:
            document["subject"] = dict(self.subject)
        return Blob(MANIFEST_TYPES["oci"], compact(document))

    @property
    def entry(self) -> dict[str, Any]:
        """As an index names it."""
        return {
            **self.manifest.descriptor,
            "artifactType": self.artifact_type,
            "annotations": dict(self.annotations),
        }

    @property
    def size(self) -> int:
        return sum(len(layer.data) for layer in self.layers)


def native_layer(base: Sequence[bytes], target: bytes, settings: Settings | None = None) -> bytes:
    """The native delta of one layer."""
    with opened_base(base) as tars, opened(target) as (tar,):
        diff_ids = [digest(layer) for layer in base]
        return LayerMaker(BaseIndex(tars), diff_ids, tar, settings or Settings(fast=True)).make().data


def native_delta(old: ImageFixture, new: ImageFixture) -> DeltaFixture:
    """From one image to another."""
    changed = [tar for tar in new.tars if tar not in old.tars]
    return DeltaFixture(
        tuple(Blob(LAYER_TYPE, native_layer(old.tars, tar)) for tar in changed),
        {BASE: old.image_id, TARGET: new.image_id},
        new.manifest.descriptor,
    )


@dataclass(frozen=True)
class AnnotatedBlob(Blob):
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def descriptor(self) -> dict[str, Any]:
        return {**super().descriptor, "annotations": dict(self.annotations)}


def tar_diff(old: ImageFixture, new: ImageFixture) -> DeltaFixture:
    """The tar-diff of one layer to another, of images with one layer each."""
    (source,), (target,) = old.tars, new.tars
    out = io.BytesIO()
    with opened_base([source]) as base, opened(target) as (tar,):
        tardiff.make(BaseIndex(base), tar, out.write)
    ends = {"io.github.containers.delta.from": digest(source), "io.github.containers.delta.to": digest(target)}
    return DeltaFixture(
        (AnnotatedBlob(TAR_DIFF_TYPE, out.getvalue(), ends),),
        {"io.github.containers.delta.target": new.manifest.digest},
        None,
        "",
        Blob("application/vnd.oci.empty.v1+json", b"{}"),
    )


def index_of(deltas: Sequence[DeltaFixture]) -> bytes:
    return compact({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [delta.entry for delta in deltas]})


def balena_delta(old: ImageFixture, new: ImageFixture) -> ImageFixture:
    """The image that balena-engine makes of a pair: librsync deltas from the whole of the old image."""
    whole = b"".join(old.tars)
    tars = []
    for tar, below in zip(new.tars, range(len(new.tars)), strict=True):
        if old.tars[: below + 1] == new.tars[: below + 1]:
            tars.append(bytes(1024))
            continue
        out = io.BytesIO()
        signature = librsync.parse_signature(b"".join(librsync.make_signature(io.BytesIO(whole).read)))
        librsync.delta_from_signature(signature, tar, out.write)
        tars.append(delta_tar(out.getvalue()))
    labels = {"io.resin.delta.base": old.image_id, "io.resin.delta.config": new.config_blob.data.decode()}
    return replace(new, tars=tuple(tars), config={"Labels": labels}, architecture="", os="")


def delta_tar(delta: bytes, name: str = "delta") -> bytes:
    """The layer of a delta image."""
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(delta), 0o600
        tar.addfile(info, io.BytesIO(delta))
    return out.getvalue()


# -- in registries


def add_delta(registry: FakeRegistry, repository: str, delta: DeltaFixture) -> None:
    """Hold a delta; the fake knows by its subject what it refers to."""
    for blob in (*delta.layers, delta.config):
        registry.add_blob(blob.data)
    registry.add_manifest(repository, delta.manifest.digest, delta.manifest.media_type, delta.manifest.data)


def push_delta(registry: str, repository: str, delta: DeltaFixture, tag: str) -> None:
    """Put a delta into a registry without the referrers interface, under the tag that stands in for it."""
    connection = http.client.HTTPConnection(registry, timeout=30)
    try:
        for blob in (*delta.layers, delta.config):
            _push_blob(connection, {}, registry, repository, blob)
        documents = ((delta.manifest.digest, delta.manifest), (tag, Blob(OCI_INDEX, index_of([delta]))))
        for name, document in documents:
            path, headers = f"/v2/{repository}/manifests/{name}", {"Content-Type": document.media_type}
            status, _ = _call(connection, "PUT", path, document.data, headers)
            assert status == 201, f"{path}: {status}"
    finally:
        connection.close()


def referrers_tag(image: ImageFixture) -> str:
    return image.manifest.digest.replace(":", "-")


__all__ = ["CREATED", "DeltaFixture", "add_delta", "balena_delta", "native_delta", "push_delta", "referrers_tag"]
