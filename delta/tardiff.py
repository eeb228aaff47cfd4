"""The tar-diff format: reader and maker. Its base is a file system, its target one layer tar.

Theory
------
`tardf1\\n\\0`, then a zstd stream of operations: `u8 op, varint size`, and `size` bytes of data where the op has any.

    0 DATA     emit the data
    1 OPEN     the data is the path of the file that the following operations read; position 0
    2 COPY     emit `size` bytes of the file
    3 ADD      emit `size` bytes of the file, each with a byte of the data added
    4 SEEK     the position in the file becomes `size`

Paths name regular files of the merged base image. They are cleaned before use (`..` cannot leave the root), which is
all that the format promises. There is no length and no digest: the caller compares what comes out with a diff_id.

Source: file-format.md of containers/tar-diff; the second version of the format (a dictionary operation) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import IO, Protocol, cast

import zstandard
from bsdiff4 import core

from delta.base import LayerTar, TarBase
from delta.errors import Malformed, OverBudget, Unsupported, WrongBase
from delta.maker import MAX_BSDIFF_BYTES, bsdiff
from delta.match import BaseIndex, Place, survey
from delta.sections import put

MAGIC = b"tardf1\n\0"
DATA, OPEN, COPY, ADD, SEEK = range(5)
PIECE_BYTES = 1 << 18
MAX_PATH_BYTES = 4096
OWN_BYTES = 4 << 20  # pieces of output, of the delta and of the base
DEFAULT_BUDGET_BYTES = 48 << 20
MAX_ADD_BYTES = 4 << 20  # other readers hold an ADD in memory
_INPUT_BYTES = 1 << 16

Read = Callable[[int], bytes]


class Files(Protocol):
    """The regular files of a merged base image, by cleaned path. Raises WrongBase when there is no such file."""

    def size(self, path: bytes) -> int: ...

    def read(self, path: bytes, offset: int, length: int) -> bytes:
        """Exactly that range."""


def clean_path(path: bytes) -> bytes:
    """A path relative to the root, without `.`, `..` and doubled slashes."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


# Reading


class _Input:
    """The plain stream of operations, with small reads served from a piece."""

    def __init__(self, read: Read, budget_bytes: int) -> None:
        window = 1 << max(10, (budget_bytes - OWN_BYTES).bit_length() - 1)
        decompressor = zstandard.ZstdDecompressor(max_window_size=min(window, 1 << 30))
        source = cast(IO[bytes], _Source(read))
        self._stream = decompressor.stream_reader(source, read_size=_INPUT_BYTES, read_across_frames=True)
        self._pending, self._at = b"", 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, at least one unless the stream has ended."""
        if self._at == len(self._pending):
            try:
                self._pending, self._at = self._stream.read(PIECE_BYTES), 0
            except zstandard.ZstdError as error:
                if "memory" in str(error):
                    raise OverBudget("tar-diff: its window is over the budget") from None
                raise Malformed(f"tar-diff: damaged: {error}") from None
        data = self._pending[self._at : self._at + size]
        self._at += len(data)
        return data

    def exactly(self, size: int) -> bytes:
        parts = []
        while size:
            data = self.read(size)
            if not data:
                raise Malformed(f"tar-diff: ends {size} bytes too early")
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def number(self) -> int:
        value = shift = 0
        while shift < 63:
            byte = self.exactly(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise Malformed("tar-diff: a number is too large")


class _Source:
    def __init__(self, read: Read) -> None:
        self._read = read

    def read(self, size: int = -1) -> bytes:
        return self._read(_INPUT_BYTES if size < 0 else min(size, _INPUT_BYTES))


def apply(
    read: Read, files: Files, *, max_bytes: int | None = None, budget_bytes: int = DEFAULT_BUDGET_BYTES
) -> Iterator[bytes]:
    """The target tar in pieces. Whether it is the target, its digest tells: the format has none.

    Raises:
        Malformed: not a tar-diff, or more than `max_bytes` come out. Unsupported: of a later version.
        WrongBase: the base has no such file or range. OverBudget: its window is over `budget_bytes`.
    """
    magic = b""
    while len(magic) < len(MAGIC) and (more := read(len(MAGIC) - len(magic))):
        magic += more
    if magic != MAGIC:
        if magic[:5] == MAGIC[:5] and magic[6:] == MAGIC[6:]:
            raise Unsupported(f"tar-diff: version {magic[5:6].decode('latin-1')!r}")
        raise Malformed("tar-diff: wrong magic")
    stream = _Input(read, budget_bytes)
    path: bytes | None = None
    total = position = size_of_file = 0
    while head := stream.read(1):
        op, size = head[0], stream.number()
        if op == OPEN:
            if size > MAX_PATH_BYTES:
                raise Malformed(f"tar-diff: a path of {size} bytes")
            path = clean_path(stream.exactly(size))
            if not path:
                raise Malformed("tar-diff: an empty path")
            position, size_of_file = 0, files.size(path)
            continue
        if op == SEEK:
            position = size
            continue
        if op not in (DATA, COPY, ADD):
            raise Malformed(f"tar-diff: no operation {op}")
        total += size
        if max_bytes is not None and total > max_bytes:
            raise Malformed(f"tar-diff: makes more than {max_bytes} bytes")
        if op != DATA:
            if path is None:
                raise Malformed("tar-diff: reads before it opens a file")
            if position + size > size_of_file:
                raise WrongBase(f"tar-diff: reads {size} bytes at {position} of {size_of_file}")
        while size:
            if op == DATA:
                piece = stream.read(min(size, PIECE_BYTES))
                if not piece:
                    raise Malformed(f"tar-diff: ends {size} bytes too early")
            else:
                assert path is not None
                piece = files.read(path, position, min(size, PIECE_BYTES))
                position += len(piece)
                if op == ADD:
                    piece = _added(piece, stream.exactly(len(piece)))
            size -= len(piece)
            yield piece


def _added(old: bytes, diff: bytes) -> bytes:
    control = len(old).to_bytes(8, "little") + bytes(16)
    return core.patch(old, len(old), control, diff, b"")  # type: ignore[no-any-return]


# The base as files


class MergedFiles:
    """The regular files one sees when a base's layers are unpacked over each other."""

    def __init__(self, index: BaseIndex) -> None:
        self._base: TarBase = index.base
        self.places: dict[bytes, Place] = {}
        for layer, members in enumerate(index.known):
            folders = _folders(self.places)  # a path that is none of these has nothing below it
            for ordinal, known in enumerate(members):
                path = clean_path(known.path)
                folder, _, name = path.rpartition(b"/")
                if name == b".wh..wh..opq":
                    self._remove_below(folder, folders, layer)
                    continue
                if name.startswith(b".wh."):
                    path = (folder + b"/" if folder else b"") + name[4:]
                self.places.pop(path, None)
                if known.kind != b"5":
                    self._remove_below(path, folders, layer)
                if known.kind in (b"0", b"\0", b"") and not name.startswith(b".wh."):
                    self.places[path] = Place(layer, ordinal)

    def _remove_below(self, folder: bytes, folders: set[bytes], layer: int) -> None:
        """Forget what lower layers have below a path."""
        if folder in folders or not folder:
            below = folder + b"/" if folder else b""
            for path in [path for path in self.places if path.startswith(below)]:
                if self.places[path].layer < layer:
                    del self.places[path]

    def _place(self, path: bytes) -> Place:
        place = self.places.get(path)
        if place is None:
            raise WrongBase(f"tar-diff: the base has no file {path.decode(errors='replace')}")
        return place

    def size(self, path: bytes) -> int:
        return self._base.size(*self._place(path))

    def read(self, path: bytes, offset: int, length: int) -> bytes:
        return self._base.read(*self._place(path), offset, length)


def _folders(paths: Iterable[bytes]) -> set[bytes]:
    """All proper prefixes of paths."""
    out: set[bytes] = set()
    for path in paths:
        while (path := path.rpartition(b"/")[0]) and path not in out:
            out.add(path)
    return out


# Making


class _Writer:
    """Operations, neighbouring data merged, needless seeks left out."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._data = bytearray()
        self._path: bytes | None = None
        self._position = 0

    def _op(self, op: int, size: int, data: bytes = b"") -> None:
        head = bytearray((op,))
        put(head, size)
        self._write(bytes(head) + data)

    def flush(self) -> None:
        if self._data:
            self._op(DATA, len(self._data), bytes(self._data))
            self._data.clear()

    def data(self, data: bytes) -> None:
        self._data += data
        if len(self._data) >= 1 << 22:
            self.flush()

    def _go(self, path: bytes, position: int) -> None:
        self.flush()
        if path != self._path:
            self._op(OPEN, len(path), path)
            self._path, self._position = path, 0
        if position != self._position:
            self._op(SEEK, position)

    def copy(self, path: bytes, position: int, size: int) -> None:
        self._go(path, position)
        self._op(COPY, size)
        self._position = position + size

    def add(self, path: bytes, position: int, diff: bytes) -> None:
        for at in range(0, len(diff), MAX_ADD_BYTES):
            part = diff[at : at + MAX_ADD_BYTES]
            self._go(path, position + at)
            if part.strip(b"\0"):
                self._op(ADD, len(part), part)
            else:
                self._op(COPY, len(part))
            self._position = position + at + len(part)


def make(index: BaseIndex, target: LayerTar, write: Callable[[bytes], object], level: int = 19) -> None:
    """Write the tar-diff of one target layer."""
    write(MAGIC)
    parameters = zstandard.ZstdCompressionParameters.from_level(level, window_log=23)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    out = _Writer(lambda data: write(compressor.compress(data)))
    paths: dict[Place, bytes] = {place: path for path, place in MergedFiles(index).places.items()}
    by_content = {index.at(place).content: place for place in paths if index.at(place).content}
    position = 0
    for known in survey(target):
        member = known.member
        out.data(target.pread(position, member.content - position))
        position = member.content + member.size
        if not member.size:
            continue
        same = by_content.get(known.content)
        if same:
            out.copy(paths[same], 0, member.size)
            continue
        source = index.find_like(known)
        if source is None or source not in paths or not index.at(source).content:
            source = index.find_named(known)
        new = target.pread(member.content, member.size)
        old_size = index.at(source).member.size if source else 0
        if source is None or source not in paths or not old_size or max(old_size, len(new)) > MAX_BSDIFF_BYTES:
            out.data(new)
            continue
        found = bsdiff(index.base.read(*source, 0, old_size), new)
        old = diffed = extra = 0
        for add, after, seek in found.triples:
            out.add(paths[source], old, found.diff[diffed : diffed + add])
            out.data(found.extra[extra : extra + after])
            diffed, extra, old = diffed + add, extra + after, old + add + seek
    while rest := target.pread(position, PIECE_BYTES):
        out.data(rest)
        position += len(rest)
    out.flush()
    write(compressor.flush())
