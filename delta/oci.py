"""Images in OCI layout folders, docker-archives and registries: their config and their layers as uncompressed tars."""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Protocol, cast

import zstandard

from delta.base import LayerTar
from delta.errors import Malformed, WrongResult
from delta.registry import (
    INDEX,
    INDEXES,
    MANIFEST,
    MANIFESTS,
    MAX_DOCUMENT_BYTES,
    Document,
    Progress,
    Repository,
)

_READ_BYTES = 1 << 20


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


class Blobs(Protocol):
    """Where the layers of an image lie, by the names that its `layers` have."""

    def open(self, name: str, size: int) -> AbstractContextManager[IO[bytes]]: ...


@dataclass(frozen=True, slots=True)
class Image:
    """An image and where it lies. In a docker-archive there is no manifest: its bytes are empty."""

    name: str
    manifest: Document
    config: bytes
    diff_ids: tuple[str, ...]
    layers: tuple[str, ...]  # blob digests, or member names in an archive
    layer_bytes: tuple[int, ...]  # as they lie there
    blobs: Blobs

    @property
    def config_digest(self) -> str:
        return sha256(self.config)

    def open_blob(self, layer: int) -> AbstractContextManager[IO[bytes]]:
        return self.blobs.open(self.layers[layer], self.layer_bytes[layer])


def blob_path(layout: Path, digest: str) -> Path:
    algorithm, _, digits = digest.partition(":")
    if algorithm != "sha256" or len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
        raise Malformed(f"{layout}: no digest: {digest!r}")
    return layout / "blobs" / algorithm / digits


def read_blob(layout: Path, digest: str) -> bytes:
    """A small blob, checked."""
    path = blob_path(layout, digest)
    with path.open("rb") as file:
        data = file.read(MAX_DOCUMENT_BYTES)
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
        if path.is_dir():
            index = Document((path / "index.json").read_bytes(), INDEX)
            return _image(str(path), index, _Layout(path), platform)
        return _open_archive(path)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise Malformed(f"{path}: not an image: {error!r}") from None


def fetch_image(
    repository: Repository, reference: str, folder: Path, platform: str | None = None, progress: Progress | None = None
) -> Image:
    """The image of a tag or digest. Layers are fetched when they are opened, once, into a folder."""
    name = f"{repository}{'@' if reference.startswith('sha256:') else ':'}{reference}"
    try:
        blobs = _Fetched(repository, folder, progress)
        return _image(name, repository.manifest(reference), blobs, platform)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise Malformed(f"{name}: not an image: {error!r}") from None


# Where an image may lie


class _Source(Blobs, Protocol):
    """Documents by their descriptors, checked."""

    def document(self, descriptor: dict[str, Any]) -> bytes: ...


class _Layout:
    def __init__(self, path: Path) -> None:
        self._path = path

    def document(self, descriptor: dict[str, Any]) -> bytes:
        return read_blob(self._path, descriptor["digest"])

    def open(self, name: str, size: int) -> AbstractContextManager[IO[bytes]]:
        return blob_path(self._path, name).open("rb")


class _Fetched:
    def __init__(self, repository: Repository, folder: Path, progress: Progress | None) -> None:
        self._repository, self._folder = repository, folder
        self._progress = progress or (lambda done, total: None)

    def document(self, descriptor: dict[str, Any]) -> bytes:
        if descriptor.get("mediaType") in (*MANIFESTS, *INDEXES):
            return self._repository.manifest(descriptor["digest"]).data
        return self._repository.read_blob(descriptor["digest"], int(descriptor["size"]))

    def open(self, name: str, size: int) -> AbstractContextManager[IO[bytes]]:
        path = blob_path(self._folder, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            with part.open("wb") as out:
                self._repository.fetch_blob(name, size, out, self._progress)
            part.replace(path)
        return path.open("rb")


class _Archive:
    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str, size: int) -> AbstractContextManager[IO[bytes]]:
        return _open_member(self._path, name)


@contextmanager
def _open_member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    try:
        with tarfile.open(archive, "r:") as tar, cast(IO[bytes], tar.extractfile(name)) as file:
            yield file
    except (tarfile.TarError, KeyError, AttributeError) as error:
        raise Malformed(f"{archive}: {name}: {error}") from None


def _image(name: str, document: Document, source: _Source, platform: str | None) -> Image:
    for _ in range(4):
        parsed = document.parsed()
        if document.media_type in INDEXES or (document.media_type not in MANIFESTS and "manifests" in parsed):
            descriptor = _chosen(name, parsed["manifests"], platform)
            document = Document(source.document(descriptor), str(descriptor["mediaType"]))
            continue
        media_type = str(parsed.get("mediaType") or document.media_type)
        config = source.document(parsed["config"])
        diff_ids = tuple(map(str, parse_json(config, f"{name}: config")["rootfs"]["diff_ids"]))
        layers = tuple(str(layer["digest"]) for layer in parsed["layers"])
        sizes = tuple(int(layer["size"]) for layer in parsed["layers"])
        return _checked(Image(name, Document(document.data, media_type), config, diff_ids, layers, sizes, source))
    raise Malformed(f"{name}: indexes within indexes")


def _chosen(name: str, descriptors: list[dict[str, Any]], platform: str | None) -> dict[str, Any]:
    """The only image of a platform. What is no image (deltas, attestations) does not count."""
    images = [each for each in descriptors if not each.get("artifactType") and _platform(each) != "unknown/unknown"]
    chosen = [each for each in images if platform is None or f"{_platform(each)}/".startswith(f"{platform}/")]
    # A single image need not say its platform.
    if not chosen and len(images) == 1 and not _platform(images[0]):
        chosen = images
    if len(chosen) != 1:
        there = ", ".join(filter(None, map(_platform, images))) or "none with a platform"
        raise Malformed(f"{name}: {len(chosen)} images, choose one with --platform ({there})")
    return chosen[0]


def _platform(descriptor: dict[str, Any]) -> str:
    platform = descriptor.get("platform", {})
    return "/".join(platform[key] for key in ("os", "architecture", "variant") if platform.get(key))


def _open_archive(path: Path) -> Image:
    with _open_member(path, "manifest.json") as file:
        (entry, *more) = json.loads(file.read(MAX_DOCUMENT_BYTES))
    if more:
        raise Malformed(f"{path}: {len(more) + 1} images")
    with _open_member(path, entry["Config"]) as file:
        config = file.read(MAX_DOCUMENT_BYTES)
    diff_ids = tuple(parse_json(config, f"{path}: config")["rootfs"]["diff_ids"])
    layers, sizes = tuple(map(str, entry["Layers"])), []
    for name in layers:
        with _open_member(path, name) as file:
            sizes.append(file.seek(0, 2))
    return _checked(Image(str(path), Document(b"", ""), config, diff_ids, layers, tuple(sizes), _Archive(path)))


def _checked(image: Image) -> Image:
    if len(image.layers) != len(image.diff_ids):
        raise Malformed(f"{image.name}: {len(image.layers)} layers, {len(image.diff_ids)} diff_ids")
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
                raise Malformed(f"{image.name}: layer {layer}: {error}") from None
        plain.flush()
        if "sha256:" + digest.hexdigest() != image.diff_ids[layer]:
            raise WrongResult(f"{image.name}: layer {layer} is not {image.diff_ids[layer]}")
        yield LayerTar(plain.fileno())


class LayoutWriter:
    """Writes an OCI layout: blobs as they come, the index at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifests: list[dict[str, Any]] = []
        (path / "blobs/sha256").mkdir(parents=True, exist_ok=True)

    def blob(self, data: bytes) -> str:
        digest = sha256(data)
        blob_path(self.path, digest).write_bytes(data)
        return digest

    def manifest(self, data: bytes, more: dict[str, Any]) -> None:
        """A manifest that the index names; `more` goes into its descriptor."""
        entry = {"mediaType": MANIFEST, "digest": self.blob(data), "size": len(data), **more}
        if entry not in self._manifests:
            self._manifests.append(entry)

    def close(self) -> None:
        (self.path / "oci-layout").write_bytes(b'{"imageLayoutVersion":"1.0.0"}')
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self._manifests}
        (self.path / "index.json").write_bytes(compact(index))
