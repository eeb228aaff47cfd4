"""Load: an archive in a request's body becomes images; see core/imagearchive for the layouts.

The archive is read once, in whatever order its members come, and nothing of it is put aside: a member that may be a
layer goes straight to a worker that unpacks it, documents are kept in memory, and what belongs together is known at
the end. A layer that no image wants is thrown away then.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from balenapy.core import imagearchive, progress
from balenapy.core.digest import Digest
from balenapy.core.imagearchive import ArchivedImage, Contents, InvalidArchive
from balenapy.core.tarstream import LINK, REGULAR, SYMLINK, Entry, NeedData, TarReader
from balenapy.engine.assembly import CHUNK_BYTES, Assembly, NewImage, Unpacked
from balenapy.engine.deltaimage import apply_loaded
from balenapy.engine.nurseries import one_error
from balenapy.engine.pull import require_room
from balenapy.errors import InvalidParameter

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.stores.snapshots import Layer

log = logging.getLogger(__name__)

Write = Callable[[bytes], Awaitable[None]]
Read = Callable[[], Awaitable[bytes]]  # b"" at the end

_CONTENT_NAME = re.compile(r"([0-9a-f]{64})(?:\.tar)?")


async def load(engine: Engine, body: AsyncIterator[bytes], *, quiet: bool, write: Write) -> None:
    """Load the images of an archive.

    Args:
        write: takes the lines of the answer; the first only comes when something was loaded.
    Raises: EngineError; nothing was loaded then.
    Cancellation: all of the archive's images are loaded, or none.
    """
    async with one_error(), trio.open_nursery() as nursery:
        read = await open_plain(engine, nursery, body)
        async with Assembly(engine) as work:
            loading = _Loading(engine, work, _Archive(read), None if quiet else write)
            came = await loading.run()
            images = [await apply_loaded(engine, work, image) for image in came]
            lines = []
            for delta, image in zip(came, images, strict=True):
                if image is not delta and engine.images.store.find(str(image.config.image_id)) is not None:
                    lines.append(progress.stream("Target image already exists locally, no need to load it.\n"))
                lines += _lines_of(engine, image)
            await work.commit([NewImage(image.config, image.tags, image.parent) for image in images])
        for image in images:
            engine.images.publish(engine.images.get(image_id := str(image.config.image_id)), "load", image_id)
        engine.images.collector.wake()
        for line in lines:
            await write(line)


def _lines_of(engine: Engine, image: ArchivedImage) -> list[bytes]:
    """What is said of an image, found out before it is there."""
    image_id = str(image.config.image_id)
    lines = []
    for tag in image.tags:
        former = engine.images.store.find_reference(tag)
        if former is not None and former.image_id != image_id:
            lines.append(
                progress.stream(
                    f"The image {tag.familiar()} already exists, "
                    f"renaming the old one with ID {former.image_id} to empty string\n"
                )
            )
        lines.append(progress.stream(f"Loaded image: {tag.familiar()}\n"))
    return lines or [progress.stream(f"Loaded image ID: {image_id}\n")]


async def open_plain(engine: Engine, nursery: trio.Nursery, body: AsyncIterator[bytes]) -> Read:
    """Read a body; one that is compressed goes through a worker. Its errors are raised in the nursery."""
    head = b""
    async for data in body:
        head += data
        if len(head) >= imagearchive.HEAD_BYTES:
            break
    waiting = [head] if head else []

    async def read_body() -> bytes:
        if waiting:
            return waiting.pop()
        async for data in body:
            if data:
                return data
        return b""

    if not imagearchive.is_packed(head):
        return read_body

    send, receive = trio.open_memory_channel[bytes](0)

    async def feed(stdin: trio.abc.SendStream) -> None:
        while data := await read_body():
            await stdin.send_all(data)

    async def drain(stream: trio.abc.ReceiveStream) -> None:
        while data := await stream.receive_some(CHUNK_BYTES):
            await send.send(bytes(data))

    async def inflate() -> None:
        await engine.workers.run("inflate", {}, feed=feed, drain=drain)
        send.close()  # only now: an end that comes because the worker failed is not the end of the archive

    nursery.start_soon(inflate)

    async def read_inflated() -> bytes:
        try:
            return await receive.receive()
        except trio.EndOfChannel:
            return b""

    return read_inflated


class _Archive:
    """The members of a tar that arrives, in order."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._reader = TarReader()
        self._left = 0  # of the present member's content
        self._ended = False

    async def next_entry(self) -> Entry | None:
        """Go on to the next member, over what is left of the present one; None at the end of the input."""
        while self._left:
            await self.content()
        while True:
            event = self._reader.next_event()
            if isinstance(event, Entry):
                self._left = event.size
                return event
            if isinstance(event, NeedData) and not await self._feed():
                return None

    async def content(self) -> bytes | memoryview:
        """Some more of the present member's content; b"" after the last. Good until the next call."""
        while self._left:
            event = self._reader.next_event()
            if isinstance(event, memoryview):
                self._left -= len(event)
                return event
            await self._feed()
        return b""

    async def _feed(self) -> bool:
        if self._ended:
            return False
        data = await self._read()
        self._ended = not data
        self._reader.feed(data)
        return True


class _Loading:
    """One archive, on its way."""

    def __init__(self, engine: Engine, work: Assembly, archive: _Archive, write: Write | None) -> None:
        self._engine = engine
        self._work = work
        self._archive = archive
        self._write = write
        self._documents: dict[str, bytes] = {}
        self._document_bytes = 0
        self._layers: dict[str, Digest] = {}
        self._links: dict[str, str] = {}
        self._failures: dict[str, str] = {}

    async def run(self) -> list[ArchivedImage]:
        """Read to the end, and say which images there are."""
        while (entry := await self._archive.next_entry()) is not None:
            name = imagearchive.clean_name(entry.name.decode("utf-8", "replace"))
            self._forget(name)  # a name that comes twice is the later member
            if entry.type in (SYMLINK, LINK):
                target = entry.link.decode("utf-8", "replace")
                self._links[name] = imagearchive.link_target(name, target, symbolic=entry.type == SYMLINK)
            elif entry.type == REGULAR:
                await self._take(name, entry.size)
        contents = Contents(self._documents, self._layers, self._links, self._failures)
        return imagearchive.read_images(contents, self._engine.pulls.platform)

    def _forget(self, name: str) -> None:
        self._documents.pop(name, None)
        self._layers.pop(name, None)
        self._links.pop(name, None)

    async def _take(self, name: str, size: int) -> None:
        known = self._known_layer(name)
        if known is not None:
            self._layers[name] = await self._work.know(known)
            return
        head = bytearray()
        while len(head) < min(size, imagearchive.HEAD_BYTES):
            head += await self._archive.content()
        if imagearchive.is_document(name, bytes(head[: imagearchive.HEAD_BYTES]), size):
            while data := await self._archive.content():
                head += data
            self._document_bytes += size
            if self._document_bytes > imagearchive.DOCUMENTS_MAX_BYTES:
                raise InvalidArchive(f"archive holds more than {imagearchive.DOCUMENTS_MAX_BYTES} bytes of documents")
            self._documents[name] = bytes(head)
        else:
            await self._unpack(name, size, bytes(head))

    def _known_layer(self, name: str) -> Layer | None:
        """A layer that the member is, by its name: some archives call layers by their digests."""
        match = _CONTENT_NAME.fullmatch(posixpath.basename(name))
        if match is None:
            return None
        diff_id = f"sha256:{match[1]}"
        return next((layer for layer in self._engine.snapshots.layers() if layer.diff_id == diff_id), None)

    async def _unpack(self, name: str, size: int, head: bytes) -> None:
        async def feed(stdin: trio.abc.SendStream) -> None:
            await stdin.send_all(head)
            while data := await self._archive.content():
                await stdin.send_all(data)

        new = {layer.diff_id for layer in self._engine.snapshots.layers()}
        # Compressed, it may need more: then the disk says so, and everything is rolled back.
        await require_room(self._engine, f"cannot load {name}", lambda: size)
        try:
            unpacked = await self._work.unpack(feed)
        except InvalidParameter as error:
            # Not a layer: what else there is in an archive is nobody's business unless an image names it.
            self._failures[name] = error.message
            return
        self._layers[name] = unpacked.diff_id
        if str(unpacked.diff_id) not in new:
            await self._tell(unpacked)

    async def _tell(self, unpacked: Unpacked) -> None:
        """Which layer it is shows at its end, so this is all there is to say."""
        if self._write is not None:
            size = unpacked.blob_size
            await self._write(progress.advance(unpacked.diff_id.short, "Loading layer", size, size))
