"""Images in every form a registry may carry them: OCI or schema 2, gzip, zstd or plain layers, indexes.

`tests/compat/images.py` makes the tars (and the usual busybox); this makes documents and blobs of them and pushes
them over plain HTTP, or hands them to the fake registry (`tests/registry/fake.py`).
"""

from __future__ import annotations

import base64
import functools
import gzip
import http.client
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import zstandard

from tests.compat.images import PATH, busybox_layer, compact, device, digest, directory, file, link, make_tar

Compression = Literal["gzip", "zstd", "plain"]
Family = Literal["oci", "docker"]

MANIFEST_TYPES = {
    "oci": "application/vnd.oci.image.manifest.v1+json",
    "docker": "application/vnd.docker.distribution.manifest.v2+json",
}
INDEX_TYPES = {
    "oci": "application/vnd.oci.image.index.v1+json",
    "docker": "application/vnd.docker.distribution.manifest.list.v2+json",
}
CONFIG_TYPES = {
    "oci": "application/vnd.oci.image.config.v1+json",
    "docker": "application/vnd.docker.container.image.v1+json",
}
LAYER_TYPES = {
    ("oci", "gzip"): "application/vnd.oci.image.layer.v1.tar+gzip",
    ("oci", "zstd"): "application/vnd.oci.image.layer.v1.tar+zstd",
    ("oci", "plain"): "application/vnd.oci.image.layer.v1.tar",
    ("docker", "gzip"): "application/vnd.docker.image.rootfs.diff.tar.gzip",
    ("docker", "zstd"): "application/vnd.docker.image.rootfs.diff.tar.zstd",
    ("docker", "plain"): "application/vnd.docker.image.rootfs.diff.tar",
}
CREATED = "2024-01-02T03:04:05.678Z"


def compress(tar: bytes, compression: Compression) -> bytes:
    if compression == "gzip":
        return gzip.compress(tar, mtime=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor().compress(tar)
    return tar


@dataclass(frozen=True)
class Blob:
    """Bytes with the media type their descriptor gives them."""

    media_type: str
    data: bytes

    @property
    def digest(self) -> str:
        return digest(self.data)

    @property
    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "size": len(self.data), "digest": self.digest}


@dataclass(frozen=True)
class ImageFixture:
    """One image: its layers' tars and how they are dressed. Honest; lie by editing `manifest` or `blobs`."""

    tars: tuple[bytes, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    family: Family = "docker"
    compressions: tuple[Compression, ...] = ("gzip",)  # the last one goes on for the layers above
    architecture: str = "amd64"
    variant: str = ""
    os: str = "linux"

    @property
    def config_blob(self) -> Blob:
        document = {
            "architecture": self.architecture,
            **({"variant": self.variant} if self.variant else {}),
            "config": dict(self.config),
            "created": CREATED,
            "history": [{"created": CREATED, "created_by": f"layer {n}"} for n, _ in enumerate(self.tars)],
            "os": self.os,
            "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar in self.tars]},
        }
        return Blob(CONFIG_TYPES[self.family], compact(document))

    @functools.cached_property
    def layers(self) -> tuple[Blob, ...]:
        last = len(self.compressions) - 1
        how = [self.compressions[min(n, last)] for n, _ in enumerate(self.tars)]
        return tuple(
            Blob(LAYER_TYPES[self.family, kind], compress(tar, kind)) for tar, kind in zip(self.tars, how, strict=True)
        )

    @property
    def image_id(self) -> str:
        return self.config_blob.digest

    @property
    def manifest(self) -> Blob:
        media_type = MANIFEST_TYPES[self.family]
        document = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": self.config_blob.descriptor,
            "layers": [layer.descriptor for layer in self.layers],
        }
        return Blob(media_type, compact(document))

    @property
    def manifests(self) -> tuple[Blob, ...]:
        """What is put under its digest; the last one is what the tag names."""
        return (self.manifest,)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return (self.config_blob, *self.layers)


@dataclass(frozen=True)
class IndexFixture:
    """Images for several platforms under one tag."""

    images: tuple[ImageFixture, ...]
    family: Family = "oci"

    @property
    def manifest(self) -> Blob:
        media_type = INDEX_TYPES[self.family]
        entries = [
            {
                **image.manifest.descriptor,
                "platform": {
                    "architecture": image.architecture,
                    "os": image.os,
                    **({"variant": image.variant} if image.variant else {}),
                },
            }
            for image in self.images
        ]
        return Blob(media_type, compact({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}))

    @property
    def manifests(self) -> tuple[Blob, ...]:
        return (*(image.manifest for image in self.images), self.manifest)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return tuple(blob for image in self.images for blob in image.blobs)


# -- ready-made images


@functools.cache
def busybox(
    family: Family = "docker",
    compression: Compression = "gzip",
    *,
    architecture: str = "amd64",
    variant: str = "",
) -> ImageFixture:
    """A shell that runs: one layer."""
    return ImageFixture(
        (busybox_layer().tar,),
        {"Env": [PATH], "Cmd": ["sh"]},
        family,
        (compression,),
        architecture,
        variant,
    )


def layered(family: Family = "oci") -> ImageFixture:
    """Four layers: a base, changes, whiteouts, an opaque directory; gzip, zstd, plain, gzip.

    Merged: `/keep` says `kept`, `/changed` says `new`; `/gone` and `/dir/a` do not exist; `/dir` holds `b` alone,
    `/link` is a symbolic link to `keep`, `/hard` is the same file as `/keep`.
    """
    base = make_tar(
        [
            file("keep", b"kept\n"),
            file("changed", b"old\n", 0o600),
            file("gone", b"gone\n"),
            directory("dir"),
            file("dir/a", b"a\n"),
            directory("dir/sub"),
            file("dir/sub/deep", b"deep\n"),
            link("link", "keep"),
            link("hard", "keep", tarfile.LNKTYPE),
        ]
    )
    change = make_tar([file("changed", b"new\n", 0o755, 1000, 1000), file(".wh.gone")])
    opaque = make_tar([directory("dir"), file("dir/.wh..wh..opq"), file("dir/b", b"b\n")])
    more = make_tar([directory("empty"), device("null", 1, 3)])
    return ImageFixture((base, change, opaque, more), {"Cmd": ["true"]}, family, ("gzip", "zstd", "plain", "gzip"))


def multi_platform(family: Family = "oci") -> IndexFixture:
    """arm v5, v6, v7, arm64 and amd64; each says in `/platform` which it is."""

    def single(architecture: str, variant: str = "") -> ImageFixture:
        tar = make_tar([file("platform", f"{architecture}/{variant}\n".encode())])
        return ImageFixture((tar,), {"Cmd": ["true"]}, family, architecture=architecture, variant=variant)

    return IndexFixture(
        (
            single("arm", "v5"),
            single("arm", "v6"),
            single("arm", "v7"),
            single("arm64", "v8"),
            single("amd64"),
        ),
        family,
    )


# -- pushing


def push(
    registry: str,
    repository: str,
    tag: str,
    image: ImageFixture | IndexFixture,
    *,
    credentials: tuple[str, str] | None = None,
) -> str:
    """Put an image into a registry (`host:port`, plain HTTP, anonymous or basic); the digest of what the tag names."""
    headers: dict[str, str] = {}
    if credentials:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(credentials).encode()).decode()
    connection = http.client.HTTPConnection(registry, timeout=30)
    try:
        for blob in image.blobs:
            _push_blob(connection, headers, registry, repository, blob)
        for document in image.manifests:
            name = tag if document == image.manifest else document.digest
            status, _ = _call(
                connection,
                "PUT",
                f"/v2/{repository}/manifests/{name}",
                document.data,
                {**headers, "Content-Type": document.media_type},
            )
            assert status == 201, f"manifest {repository}:{name}: {status}"
    finally:
        connection.close()
    return image.manifest.digest


def _push_blob(
    connection: http.client.HTTPConnection,
    headers: Mapping[str, str],
    registry: str,
    repository: str,
    blob: Blob,
) -> None:
    status, _ = _call(connection, "HEAD", f"/v2/{repository}/blobs/{blob.digest}", b"", headers)
    if status == 200:
        return
    status, answer = _call(connection, "POST", f"/v2/{repository}/blobs/uploads/", b"", headers)
    assert status == 202, f"upload to {repository}: {status}"
    location = answer["Location"].split(registry, 1)[-1]
    upload = f"{location}{'&' if '?' in location else '?'}digest={blob.digest}"
    status, _ = _call(connection, "PUT", upload, blob.data, {**headers, "Content-Type": "application/octet-stream"})
    assert status == 201, f"blob {blob.digest}: {status}"


def _call(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes, headers: Mapping[str, str]
) -> tuple[int, http.client.HTTPMessage]:
    connection.request(method, path, body, dict(headers))
    answer = connection.getresponse()
    answer.read()
    return answer.status, answer.headers


def tars_of(entries: Sequence[Sequence[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]]]) -> tuple[bytes, ...]:
    """One tar for each list of entries, for images made on the spot."""
    return tuple(make_tar(layer) for layer in entries)
