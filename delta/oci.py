"""Images in OCI layout folders and docker-archives: their config and their layers as uncompressed tars."""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, cast

import zstandard

from delta.base import LayerTar
from delta.errors import Malformed, WrongResult

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
_MANIFESTS = (MANIFEST, "application/vnd.docker.distribution.manifest.v2+json")
_INDEXES = (INDEX, "application/vnd.docker.distribution.manifest.list.v2+json")
_READ_BYTES = 1 << 20
_MAX_DOCUMENT_BYTES = 4 << 20


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Image:
    """An image on disk. `manifest` is the manifest's bytes, b"" in a docker-archive, which has none."""

    path: Path
    manifest: bytes
    config: bytes
    diff_ids: tuple[str, ...]
    layers: tuple[str, ...]  # blob digests in a layout, member names in an archive

    @property
    def config_digest(self) -> str:
        return sha256(self.config)

    def open_blob(self, layer: int) -> AbstractContextManager[IO[bytes]]:
        if self.path.is_dir():
            return blob_path(self.path, self.layers[layer]).open("rb")
        return _open_member(self.path, self.layers[layer])

    def blob_bytes(self, layer: int) -> int:
        with self.open_blob(layer) as blob:
            return blob.seek(0, 2)


@contextmanager
def _open_member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    try:
        with tarfile.open(archive, "r:") as tar, cast(IO[bytes], tar.extractfile(name)) as file:
            yield file
    except (tarfile.TarError, KeyError, AttributeError) as error:
        raise Malformed(f"{archive}: {name}: {error}") from None


def blob_path(layout: Path, digest: str) -> Path:
    algorithm, _, digits = digest.partition(":")
    if algorithm != "sha256" or len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
        raise Malformed(f"{layout}: no digest: {digest!r}")
    return layout / "blobs" / algorithm / digits


def read_blob(layout: Path, digest: str) -> bytes:
    """A small blob, checked."""
    path = blob_path(layout, digest)
    with path.open("rb") as file:
        data = file.read(_MAX_DOCUMENT_BYTES)
    if sha256(data) != digest:
        raise Malformed(f"{layout}: blob {digest} is damaged")
    return data


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what}: {error}") from None
    if not isinstance(document, dict):
        raise Malformed(f"{what}: not an object")
    return document


def open_image(path: Path, platform: str | None = None) -> Image:
    """The image in a folder or archive.

    Args:
        platform: os/architecture[/variant], to choose in an index of several.

    Raises:
        Malformed: there is none, or several and no platform.
    """
    try:
        return _open_layout(path, platform) if path.is_dir() else _open_archive(path)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise Malformed(f"{path}: not an image: {error!r}") from None


def _open_layout(path: Path, platform: str | None) -> Image:
    descriptors = parse_json((path / "index.json").read_bytes(), f"{path}/index.json")["manifests"]
    for _ in range(4):
        chosen = [each for each in descriptors if platform is None or _platform(each).startswith(platform)]
        chosen = [each for each in chosen or descriptors if not each.get("artifactType")]
        if len(chosen) != 1:
            raise Malformed(f"{path}: {len(chosen)} images, choose one with --platform")
        manifest = read_blob(path, chosen[0]["digest"])
        document = parse_json(manifest, f"{path}: manifest")
        if chosen[0]["mediaType"] not in _INDEXES:
            config = read_blob(path, document["config"]["digest"])
            diff_ids = tuple(parse_json(config, f"{path}: config")["rootfs"]["diff_ids"])
            layers = tuple(layer["digest"] for layer in document["layers"])
            return _checked(Image(path, manifest, config, diff_ids, layers))
        descriptors = document["manifests"]
    raise Malformed(f"{path}: indexes within indexes")


def _platform(descriptor: dict[str, Any]) -> str:
    platform = descriptor.get("platform", {})
    return "/".join(platform[key] for key in ("os", "architecture", "variant") if key in platform)


def _open_archive(path: Path) -> Image:
    with _open_member(path, "manifest.json") as file:
        (entry, *more) = json.loads(file.read(_MAX_DOCUMENT_BYTES))
    if more:
        raise Malformed(f"{path}: {len(more) + 1} images")
    with _open_member(path, entry["Config"]) as file:
        config = file.read(_MAX_DOCUMENT_BYTES)
    diff_ids = tuple(parse_json(config, f"{path}: config")["rootfs"]["diff_ids"])
    return _checked(Image(path, b"", config, diff_ids, tuple(entry["Layers"])))


def _checked(image: Image) -> Image:
    if len(image.layers) != len(image.diff_ids):
        raise Malformed(f"{image.path}: {len(image.layers)} layers, {len(image.diff_ids)} diff_ids")
    return image


def _plain(blob: IO[bytes]) -> IO[bytes]:
    magic = blob.read(4)
    blob.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return cast(IO[bytes], gzip.GzipFile(fileobj=blob))
    if magic == b"\x28\xb5\x2f\xfd":
        return cast(IO[bytes], zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(blob))
    return blob


@contextmanager
def open_layer(image: Image, layer: int) -> Iterator[LayerTar]:
    """A layer's tar, uncompressed into an unnamed file, checked against its diff_id.

    Raises:
        WrongResult: it has another digest.
    """
    with TemporaryFile(prefix="balenapy-delta-") as plain:
        digest = hashlib.sha256()
        with image.open_blob(layer) as blob:
            source = _plain(blob)
            try:
                while data := source.read(_READ_BYTES):
                    digest.update(data)
                    plain.write(data)
            except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
                raise Malformed(f"{image.path}: layer {layer}: {error}") from None
        plain.flush()
        if "sha256:" + digest.hexdigest() != image.diff_ids[layer]:
            raise WrongResult(f"{image.path}: layer {layer} is not {image.diff_ids[layer]}")
        yield LayerTar(plain.fileno())


class LayoutWriter:
    """Writes an OCI layout: blobs as they come, the index at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True, exist_ok=True)

    def blob(self, data: bytes) -> str:
        digest = sha256(data)
        blob_path(self.path, digest).write_bytes(data)
        return digest

    def close(self, manifests: Sequence[dict[str, Any]]) -> None:
        (self.path / "oci-layout").write_bytes(b'{"imageLayoutVersion":"1.0.0"}')
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests)}
        (self.path / "index.json").write_bytes(compact(index))
