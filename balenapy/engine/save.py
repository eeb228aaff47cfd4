"""Save: images become one archive, streamed; see core/imagearchive for what is in it.

Layers are rebuilt from their files and tar-splits by a worker each, one after the other, straight into the answer.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import trio

from balenapy.core import tarwriter
from balenapy.core.imagearchive import Member, SavedImage, plan_archive
from balenapy.core.reference import Reference, parse_reference
from balenapy.core.tarstream import DIRECTORY, REGULAR, SYMLINK
from balenapy.engine.assembly import CHUNK_BYTES
from balenapy.errors import InvalidParameter, NotFound, SystemFailure

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.stores.images import ImageRecord

Write = Callable[[bytes], Awaitable[None]]

_FULL_ID = re.compile(r"[0-9a-f]{64}")
# As Go's archive/tar has it: the type of the file is in the mode too.
_FILE_MODE, _DIRECTORY_MODE, _LINK_MODE = 0o100644, 0o40755, 0o120777
GATHER_BYTES = 64 << 10
_LENGTH_BYTES = 8


def choose_images(engine: Engine, names: Sequence[str]) -> list[SavedImage]:
    """The images that were asked for, each with the tags it was asked for by.

    A repository without a tag stands for all its tags.

    Raises: NotFound; SystemFailure for a bad reference (500 there too).
    Source: moby image/tarexport/save.go, parseNames.
    """
    chosen: dict[str, tuple[ImageRecord, list[Reference]]] = {}
    for name in names:
        image, tags = _choose(engine, name)
        chosen.setdefault(image.image_id, (image, []))
        for tag in tags:
            named = engine.images.get(_image_of(engine, tag))
            known = chosen.setdefault(named.image_id, (named, []))[1]
            if tag not in known:
                known.append(tag)
    return [SavedImage(image.config, tuple(tags), image.parent) for image, tags in chosen.values()]


def _choose(engine: Engine, name: str) -> tuple[ImageRecord, list[Reference]]:
    if _FULL_ID.fullmatch(name):
        return engine.images.resolve(name), []
    try:
        reference = parse_reference(name)
    except InvalidParameter as error:
        raise SystemFailure(error.message) from error
    if reference.familiar_name() == "sha256":
        return engine.images.resolve(name), []
    if reference.is_name_only:
        tags = [
            record.reference
            for record in engine.images.store.references()
            if record.reference.name == reference.name and record.reference.tag is not None
        ]
        if tags:
            return engine.images.get(_image_of(engine, tags[0])), sorted(tags, key=Reference.canonical)
        try:
            return engine.images.resolve(name), []
        except NotFound:
            raise NotFound(f"No such image: {name}") from None
    record = engine.images.store.find_reference(reference)
    if record is None:
        raise NotFound("reference does not exist")
    return engine.images.get(record.image_id), [reference] if reference.digest is None else []


def _image_of(engine: Engine, tag: Reference) -> str:
    record = engine.images.store.find_reference(tag)
    assert record is not None
    return record.image_id


async def save(engine: Engine, images: Sequence[SavedImage], write: Write) -> None:
    """Write the archive.

    Raises: SystemFailure, DataLoss: before the first byte when a layer is not there; in the middle when it turns out
        that a layer's files were changed, and then the archive has no end.
    """
    async with AsyncExitStack() as stack:
        for image in images:
            await stack.enter_async_context(engine.snapshots.pinned(image.config.chain_id))
        out = _Gathered(write)
        for member in plan_archive(images):
            await _write_member(engine, member, out)
        await out.put(tarwriter.END)
        await out.flush()
    for image in images:
        image_id = str(image.config.image_id)
        found = engine.images.store.find(image_id)
        if found is not None:
            engine.images.publish(found, "save", image_id)


async def _write_member(engine: Engine, member: Member, out: _Gathered) -> None:
    if member.chain_id:
        await _write_layer(engine, member, out)
    elif member.link:
        await out.put(_header(member, SYMLINK, _LINK_MODE))
    elif not member.data:
        await out.put(_header(member, DIRECTORY, _DIRECTORY_MODE))
    else:
        await out.put(_header(member, REGULAR, _FILE_MODE, len(member.data)))
        await out.put(member.data + tarwriter.padding(len(member.data)))


def _header(member: Member, kind: bytes, mode: int, size: int = 0) -> bytes:
    return tarwriter.encode_header(
        member.name.encode(),
        kind,
        size=size,
        mode=mode,
        mtime_s=member.created_ns // 10**9,
        link=member.link.encode(),
        owner=b"root",
    )


async def _write_layer(engine: Engine, member: Member, out: _Gathered) -> None:
    layer = engine.snapshots.chain(member.chain_id)[0]

    async def drain(stream: trio.abc.ReceiveStream) -> None:
        head = b""
        while len(head) < _LENGTH_BYTES:
            data = await stream.receive_some(_LENGTH_BYTES - len(head))
            if not data:
                return  # the worker has something to say about it
            head += data
        size = left = int.from_bytes(head, "big")
        await out.put(_header(member, REGULAR, _FILE_MODE, size))
        while data := await stream.receive_some(CHUNK_BYTES):
            left -= len(data)
            await out.put(data)
        if left:
            raise SystemFailure(f"layer {layer.diff_id} ended {left} bytes too early")
        await out.put(tarwriter.padding(size))

    arguments = {"directory": str(layer.path), "diff_id": layer.diff_id, "size_first": True}
    await engine.workers.run("pack", arguments, drain=drain)


class _Gathered:
    """Small pieces leave together."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._pieces: list[bytes] = []
        self._size = 0

    async def put(self, data: bytes | bytearray) -> None:
        self._pieces.append(bytes(data))
        self._size += len(data)
        if self._size >= GATHER_BYTES:
            await self.flush()

    async def flush(self) -> None:
        data = b"".join(self._pieces)
        self._pieces, self._size = [], 0
        if data:
            await self._write(data)
