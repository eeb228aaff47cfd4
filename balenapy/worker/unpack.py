"""Verb `unpack`: a layer blob on stdin becomes a snapshot directory.

    directory/diff/            the layer as an upper directory of overlayfs; we are chrooted here
    directory/tar-split.zst    what else is needed to give back the tar (core/tarsplit)
    directory/displaced/       only if the tar has a path twice: contents that lost their path

With `only`, a list of paths, nothing else of the layer is made (to mend one that is damaged), and no tar-split.

All of it is synced before the report goes out: {"digest", "size", "diff_id", "size_bytes", "disk_bytes",
"entries"}. The digest is not known before, so nothing may look at the directory until somebody has compared it.

Two threads: one reads, hashes and decompresses, the other parses, hashes and writes. The libraries they sit in
release the interpreter lock, so both cores work.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

from balenapy.core.tarstream import End, Entry, NeedData, TarReader
from balenapy.errors import Conflict, InvalidParameter
from balenapy.linux import syscalls
from balenapy.worker import process
from balenapy.worker.decompress import HEAD_BYTES, Decoder, open_decoder
from balenapy.worker.extract import Extractor, meaning
from balenapy.worker.splitfile import SplitWriter

READ_BYTES = 128 << 10
CHUNKS_AHEAD = 8  # of 256 KiB
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    directory = arguments.get("directory")
    if not isinstance(directory, str) or not directory.startswith("/"):
        raise InvalidParameter("unpack: `directory` must be an absolute path")
    source = Source(0)
    source.begin()
    report = unpack(Ahead(source.pieces(), CHUNKS_AHEAD), directory, arguments.get("only"))
    return {"digest": f"sha256:{source.hash.hexdigest()}", "size": source.size, **report}


def unpack(source: Ahead, directory: str, only: list[str] | None) -> dict[str, Any]:
    """Make a layer's directory of its tar, or some paths of it; the part of the report that tells of the tar."""
    diff = os.path.join(directory, "diff")
    try:
        os.mkdir(diff, 0o755)
    except FileExistsError:
        if os.listdir(diff):
            raise Conflict(f"unpack: {diff} is not empty") from None
    split = SplitWriter(directory) if only is None else NoSplit()
    displaced = Displaced(directory)
    process.enter(diff)
    os.umask(0)
    source.start()
    extractor = Extractor(displaced.fd) if only is None else Chosen(frozenset(map(os.fsencode, only)))
    unpacker = Unpacker(source, split, extractor)
    unpacker.run()
    split.close()
    displaced.close()
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    syscalls.syncfs(root)  # the unit of work's one sync; linux/durable would be in the daemon, and no layer
    extractor.forget_pages()
    return {
        "diff_id": f"sha256:{unpacker.hash.hexdigest()}",
        "size_bytes": unpacker.extractor.size_bytes,
        "disk_bytes": unpacker.extractor.disk_bytes,
        "entries": unpacker.entries,
    }


class Ahead:
    """Pieces that a thread of its own makes, so many ahead of who takes them."""

    def __init__(self, pieces: Iterator[bytes], ahead: int) -> None:
        self._pieces = pieces
        self._ahead: SimpleQueue[bytes | BaseException | None] = SimpleQueue()
        self._room = threading.Semaphore(ahead)

    def start(self) -> None:
        threading.Thread(target=self._pump, daemon=True).start()

    def next(self) -> bytes:
        """The next piece; b"" after the last. Raises what making it raised."""
        piece = self._ahead.get()
        if isinstance(piece, BaseException):
            raise piece
        if piece is None:
            return b""
        self._room.release()
        return piece

    def _pump(self) -> None:
        try:
            for piece in self._pieces:
                self._room.acquire()
                self._ahead.put(piece)
        except BaseException as error:
            self._ahead.put(error)
        else:
            self._ahead.put(None)


class Source:
    """stdin, hashed and decompressed, as bounded pieces."""

    def __init__(self, fd: int) -> None:
        self.hash = hashlib.sha256()
        self.size = 0
        self._fd = fd
        self._head = b""
        self._decoder: Decoder

    def begin(self) -> None:
        """Read enough to know the format, and import what it needs: afterwards imports are closed."""
        try:
            import fcntl

            fcntl.fcntl(self._fd, _F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:
            pass  # not a pipe, or no more than the default is allowed
        while len(self._head) < HEAD_BYTES and (data := os.read(self._fd, READ_BYTES)):
            self._head += data
        self._decoder = open_decoder(self._head)

    def pieces(self) -> Iterator[bytes]:
        data = self._head
        self._head = b""
        while data:
            self.hash.update(data)
            self.size += len(data)
            yield from self._decoder.feed(data)
            data = os.read(self._fd, READ_BYTES)
        self._decoder.close()


class NoSplit:
    """Takes the place of a tar-split that nobody wants."""

    def segment(self, raw: bytes | memoryview) -> None:
        pass

    def file(self, size: int, crc: int, path: bytes) -> None:
        pass

    def close(self) -> None:
        pass


class Chosen(Extractor):
    """Makes what is at some paths, and nothing else."""

    def __init__(self, paths: frozenset[bytes]) -> None:
        super().__init__()
        self._paths = paths

    def begin(self, entry: Entry) -> int:
        path, _ = meaning(entry)
        return super().begin(entry) if path in self._paths else -1


class Displaced:
    """The directory for displaced contents; there is none at the end when nothing was displaced."""

    def __init__(self, directory: str) -> None:
        path = os.path.join(directory, "displaced")
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if os.listdir(path):
                raise Conflict(f"unpack: {path} is not empty") from None
        self._parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        try:
            os.rmdir("displaced", dir_fd=self._parent)
        except OSError:
            pass  # there is something in it
        os.close(self.fd)
        os.close(self._parent)


class Unpacker:
    """Feeds the tar reader, and gives each event to the hash, the tar-split and the extractor."""

    def __init__(self, source: Ahead, split: SplitWriter | NoSplit, extractor: Extractor) -> None:
        self.hash = hashlib.sha256()
        self.extractor = extractor
        self.entries = 0
        self._source = source
        self._split = split

    def run(self) -> None:
        """Take the source to its end. Raises: InvalidTar, SystemFailure."""
        reader = TarReader()
        next_event, begin, finish = reader.next_event, self.extractor.begin, self.extractor.finish
        split = self._split
        entry: Entry | None = None
        fd = -1
        left = crc = 0
        ended = False
        while True:
            event = next_event()
            if isinstance(event, memoryview):
                if fd < 0:
                    split.segment(event)  # content of what is no file, or what follows the end
                    continue
                try:
                    process.write_all(fd, event)
                except OSError as error:
                    raise process.failed("write", self.extractor.path, error) from error
                crc = zlib.crc32(event, crc)
                left -= len(event)
                if not left:
                    assert entry is not None
                    finish(fd, entry)
                    fd = -1
                    split.file(entry.size, crc, self.extractor.path)
            elif isinstance(event, Entry):
                entry = event
                split.segment(event.raw)
                fd = begin(event)
                left = event.size
                crc = 0
            elif isinstance(event, NeedData):
                if ended:
                    break
                data = self._source.next()
                self.hash.update(data)
                reader.feed(data)
                ended = not data
            elif isinstance(event, End):
                split.segment(event.raw)
        self.entries = reader.entries
        self.extractor.finish_all()
