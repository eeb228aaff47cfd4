"""The context of a build: a tar that comes as the request's body, and which of its files COPY means.

A small context stays in memory, where its hashes are made: a build that finds all in the cache starts no process. It
becomes files when a step needs them, and a larger one at once, in a worker.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from balenapy.core.buildtree import FoundDockerfile, MemoryTree, take_dockerfile
from balenapy.core.copysources import Source, find_sources
from balenapy.core.imagearchive import is_packed
from balenapy.core.tarstream import End, Entry, NeedData, TarReader
from balenapy.errors import EngineError, InvalidParameter

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.engine.workers import WorkerFamily

SMALL_BYTES = 1 << 20
SUMS_FILE = "sums.json"

Body = AsyncIterator[bytes]


class Context:
    """The files of one build. `close` gives them up."""

    def __init__(self, engine: Engine, family: WorkerFamily) -> None:
        self._engine = engine
        self._family = family
        self._tree: MemoryTree | None = None
        self._tar = b""  # what the tree was made of
        self._dockerfile = ""
        self._directory: Path | None = None

    async def take(self, body: Body, dockerfile: str) -> FoundDockerfile:
        """Read the body to its end.

        Args:
            dockerfile: its path in there; "": none is wanted.
        Raises: InvalidTar and other errors of the stream; errors of the disk.
        """
        self._dockerfile = dockerfile
        head = bytearray()
        async for data in body:
            head += data
            if len(head) > SMALL_BYTES:
                break
        else:
            tree = read_small(bytes(head))
            if tree is not None:
                self._tree, self._tar = tree, bytes(head)
                return take_dockerfile(tree, dockerfile) if dockerfile else FoundDockerfile("", None)
        return await self._unpack(bytes(head), body)

    async def _unpack(self, head: bytes, body: Body | None = None) -> FoundDockerfile:
        async def feed(stdin: trio.abc.SendStream) -> None:
            await stdin.send_all(head)
            if body is not None:
                async for data in body:
                    await stdin.send_all(data)

        directory = await self._engine.snapshots.new_directory()
        self._directory = directory
        arguments = {"directory": str(directory), "dockerfile": self._dockerfile}
        report = await self._family.run("context", arguments, feed=feed)
        content = report["dockerfile"]
        return FoundDockerfile(
            report["name"], None if content is None else base64.b64decode(content), report["problem"]
        )

    async def find(self, patterns: Sequence[str]) -> list[Source]:
        """What the words of a COPY mean. Raises: as `find_sources`; InvalidParameter, when there is no context."""
        if self._tree is not None:
            return [source for pattern in patterns for source in find_sources(self._tree, pattern)]
        if self._directory is None:
            raise InvalidParameter("missing build context")
        return await find_in_directory(
            self._family, self._directory / "diff", patterns, self._directory / SUMS_FILE
        )

    async def root(self) -> Path:
        """Where its files are. Raises: errors of the disk."""
        if self._directory is None:
            await self._unpack(self._tar)
            self._tar = b""
        assert self._directory is not None
        return self._directory / "diff"

    async def close(self) -> None:
        if self._directory is not None:
            await self._engine.snapshots.discard(self._directory)


async def find_in_directory(
    family: WorkerFamily,
    root: Path,
    patterns: Sequence[str],
    sums: Path | None = None,
    *,
    host_names: bool = False,
) -> list[Source]:
    """The same for a directory of files; see worker/sources."""
    arguments = {
        "root": str(root),
        "patterns": list(patterns),
        "sums": None if sums is None else str(sums),
        "host_names": host_names,
    }
    report = await family.run("sources", arguments)
    return [Source(path, digest) for found in report["sources"] for path, digest in found]


def read_small(data: bytes) -> MemoryTree | None:
    """A tree made of a whole tar; None for one that wants real files, or is packed or broken: a worker will say why."""
    if is_packed(data):
        return None
    reader, tree = TarReader(), MemoryTree()
    if data:
        reader.feed(data)
    reader.feed(b"")
    entry: Entry | None = None
    content = bytearray()
    try:
        while True:
            event = reader.next_event()
            if isinstance(event, Entry):
                entry = event
                content.clear()
            elif isinstance(event, memoryview):
                content += event
            if entry is not None and len(content) == entry.size:
                if not tree.add(entry, bytes(content)):
                    return None
                entry = None
            elif isinstance(event, End):
                return tree
            elif isinstance(event, NeedData):
                return None
    except EngineError:
        return None
