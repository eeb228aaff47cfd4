"""Image archives made on the spot, and an engine's answers to them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import trio

from balenapy.engine.engine import Engine
from balenapy.engine.load import load
from balenapy.engine.save import choose_images, save
from balenapy.errors import EngineError
from tests.images_fixture import ImageFixture

Member = tuple[str, bytes]


class Body:
    """A request's body, in pieces of some size; it may stall for ever somewhere."""

    def __init__(self, data: bytes, piece: int = 64 << 10, *, stall_at: int = -1) -> None:
        self._data, self._piece, self._at, self._stall_at = data, piece, 0, stall_at
        self.stalled = trio.Event()

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if 0 <= self._stall_at <= self._at:
            self.stalled.set()
            await trio.sleep_forever()
        data = self._data[self._at : self._at + self._piece]
        self._at += len(data)
        if not data:
            raise StopAsyncIteration
        return data


def archive(members: Iterable[Member | tarfile.TarInfo]) -> bytes:
    """A tar of these files, in this order; a TarInfo is a link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            entry = tarfile.TarInfo(member[0])
            entry.size = len(member[1])
            tar.addfile(entry, io.BytesIO(member[1]))
    return out.getvalue()


def docker_members(
    image: ImageFixture, tags: Sequence[str] | None = ("app:1",), layers: Sequence[bytes] | None = None
) -> list[Member]:
    """Config, layers, manifest.json: as skopeo and old engines have them."""
    config = image.config_blob
    blobs = list(image.tars if layers is None else layers)
    names = [f"layer{number}.tar" for number, _ in enumerate(blobs)]
    manifest = [{"Config": "config.json", "RepoTags": tags, "Layers": names}]
    return [
        ("config.json", config.data),
        *zip(names, blobs, strict=True),
        ("manifest.json", json.dumps(manifest).encode()),
    ]


def layout_members(image: ImageFixture, annotations: Mapping[str, str]) -> list[Member]:
    """An OCI image layout."""
    blobs = {blob.digest: blob.data for blob in (*image.blobs, image.manifest)}
    index = {"schemaVersion": 2, "manifests": [{**image.manifest.descriptor, "annotations": dict(annotations)}]}
    members = [(f"blobs/sha256/{digest.partition(':')[2]}", data) for digest, data in blobs.items()]
    return [
        *members,
        ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
        ("index.json", json.dumps(index).encode()),
    ]


async def load_bytes(engine: Engine, data: bytes, *, quiet: bool = True, piece: int = 64 << 10) -> list[Any]:
    """Load; the objects of the answer. An error is raised."""
    lines: list[Any] = []

    async def write(line: bytes) -> None:
        await trio.lowlevel.checkpoint()
        lines.append(json.loads(line))

    await load(engine, Body(data, piece), quiet=quiet, write=write)
    return lines


async def load_error(engine: Engine, data: bytes) -> str:
    """Load what cannot be loaded; the words."""
    try:
        lines = await load_bytes(engine, data)
    except EngineError as error:
        return error.message
    raise AssertionError(f"loaded: {lines}")


async def save_bytes(engine: Engine, *names: str) -> bytes:
    pieces: list[bytes] = []

    async def write(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        pieces.append(data)

    await save(engine, choose_images(engine, names), write)
    return b"".join(pieces)


def members_of(data: bytes) -> dict[str, bytes | str]:
    """Content of each file of a tar, target of each link."""
    found: dict[str, bytes | str] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.isreg() else None
            found[entry.name] = content.read() if content is not None else entry.linkname
    return found
