"""Images of a few layers, as OCI layouts and in registries."""

from __future__ import annotations

import gzip
from pathlib import Path

from delta.artifact import entries_of
from delta.oci import LayoutWriter, blob_path, compact, sha256
from delta.registry import MANIFEST, Document, Repository, parse_reference


def write_layout(path: Path, layers: list[bytes], *, created: str = "", architecture: str = "arm64") -> str:
    """The digest of the manifest."""
    writer = LayoutWriter(path)
    diff_ids = [sha256(each) for each in layers]
    config = compact(
        {"architecture": architecture, "os": "linux", "created": created, "rootfs": {"diff_ids": diff_ids}}
    )
    blobs = [gzip.compress(each, mtime=0) for each in layers]
    manifest = compact(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": writer.blob(config),
                "size": len(config),
            },
            "layers": [
                {
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": writer.blob(blob),
                    "size": len(blob),
                }
                for blob in blobs
            ],
        }
    )
    writer.manifest(manifest, {"platform": {"os": "linux", "architecture": architecture}})
    writer.close()
    return sha256(manifest)


def push_layout(path: Path, reference: str, **how: bool) -> str:
    """Put the image of a layout into a registry under its tag; the digest of its manifest."""
    parsed = parse_reference(reference)
    repository = Repository(parsed, actions="pull,push", **how)
    (entry,) = entries_of(path)
    document = Document(blob_path(path, entry["digest"]).read_bytes(), MANIFEST)
    manifest = document.parsed()
    for descriptor in (manifest["config"], *manifest["layers"]):
        with blob_path(path, descriptor["digest"]).open("rb") as file:
            repository.put_blob(descriptor["digest"], file)
    repository.put_manifest(parsed.tag, document)
    return document.digest
