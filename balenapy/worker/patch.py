"""Verb `patch`: a delta and the layers it starts from become a snapshot directory, as `unpack` makes it of a blob.

Arguments:
    directory  the snapshot directory to be
    delta      the delta's file, complete; its `digest`, if given, is checked before anything of it is used
    format     native, tar-diff, librsync (the stored layer of a delta image: a tar whose first entry is the delta),
               librsync-file (the delta alone), or copy (no delta: the only base layer's own tar)
    base       [{"directory", "diff_id", "split"}, …]: all layers of the base image, lowest first; the one layer for a
               copy. With `split` (a tar-split of another engine) the directory is that of the layer's files
    diff_id    what must come out
    memory     bytes that applying may take, beside the interpreter's
    only       as of `unpack`

Report: that of `unpack` without the blob's digest and size, and {"peak_bytes"} of memory. A line `progress BYTES` now
and then, as if the delta's bytes were used up in proportion to the tar's.

The base is read through its files and tar-splits (worker/layertar), never copied. Nothing that the delta says is used
before it was checked; that the result is right, its digest says, and the engine compares that too.
"""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

from balenapy.core.tarstream import End, Entry, NeedData, TarReader
from balenapy.errors import DataLoss, InvalidParameter
from balenapy.worker import process
from balenapy.worker.decompress import HEAD_BYTES, open_decoder
from balenapy.worker.layertar import LayerFiles, UnpackedTar
from balenapy.worker.unpack import Ahead, unpack
from delta import librsync, native, tardiff
from delta.base import Stream, TarBase
from delta.errors import DeltaError, Malformed

READ_BYTES = 256 << 10
PIECES_AHEAD = 3  # of 512 KiB
TELL_BYTES = 1 << 20

Pieces = Iterator[bytes | memoryview]


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    directory = arguments.get("directory")
    if not isinstance(directory, str) or not directory.startswith("/"):
        raise InvalidParameter("patch: `directory` must be an absolute path")
    patching = Patching(arguments)
    report = unpack(Ahead(patching.pieces(), PIECES_AHEAD), directory, arguments.get("only"))
    if report["diff_id"] != arguments.get("diff_id"):
        raise DataLoss(f"delta: what came out is {report['diff_id']}, not {arguments.get('diff_id')}")
    return {**report, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}


class Patching:
    """One delta and its base. Everything is opened, and imported, before the process is confined."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._memory = int(arguments.get("memory") or native.DEFAULT_BUDGET_BYTES)
        self._digest = str(arguments.get("digest") or "")
        self._diff_id = str(arguments.get("diff_id"))
        layers = arguments.get("base") or ()
        self._base = [str(layer["diff_id"]) for layer in layers]
        ways: dict[str, Callable[[], Pieces]] = {
            "native": self._native,
            "tar-diff": self._tar_diff,
            "librsync": self._librsync,
            "librsync-file": self._librsync_file,
            "copy": self._copy,
        }
        self._format = str(arguments.get("format"))
        if self._format not in ways:
            raise InvalidParameter(f"patch: no format {self._format}")
        self._way = ways[self._format]
        self._tars: list[UnpackedTar] = []
        self._files: LayerFiles | None = None
        if self._format == "tar-diff":
            self._files = LayerFiles([_files_of(layer) for layer in layers])
        else:
            self._tars = [UnpackedTar(str(layer["directory"]), str(layer.get("split") or "")) for layer in layers]
        self._fd = -1
        self.size = 0
        self._target_bytes = 0
        self._position = 0
        if self._format != "copy":
            self._fd = os.open(str(arguments.get("delta")), os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._fd).st_size
            self._decoder = open_decoder(os.pread(self._fd, HEAD_BYTES, 0))

    def pieces(self) -> Iterator[bytes]:
        """The target's tar. Raises: DataLoss, when the delta is at fault or does not fit."""
        made = told = 0
        try:
            if self._fd >= 0 and self._digest:
                self._check_digest()
            for piece in self._way():
                yield bytes(piece)
                made += len(piece)
                if made - told >= TELL_BYTES:
                    told = made
                    process.write_all(1, b"progress %d\n" % self._used(made))
        except DeltaError as error:
            raise DataLoss(str(error)) from error

    def _check_digest(self) -> None:
        digest = hashlib.sha256()
        position = 0
        while data := os.pread(self._fd, READ_BYTES, position):
            digest.update(data)
            position += len(data)
        if f"sha256:{digest.hexdigest()}" != self._digest:
            raise DataLoss(f"delta verification failed for digest {self._digest}")

    def _used(self, made: int) -> int:
        """How much of the delta that is."""
        if self._format == "native" and self._target_bytes:
            return min(self.size, self.size * made // self._target_bytes)
        return min(self.size, self._position)

    # --- formats

    def _native(self) -> Pieces:
        head, _ = native.read_head(self._read_at)
        if f"sha256:{head.target_sha256.hex()}" != self._diff_id:
            raise Malformed("native delta: for another layer")
        self._target_bytes = head.target_bytes
        return native.apply(
            self._read_at,
            TarBase(self._tars),
            budget_bytes=self._memory,
            check=native.base_check(self._base),
            hashed=False,  # it is, when it is unpacked
        )

    def _tar_diff(self) -> Pieces:
        assert self._files is not None
        return tardiff.apply(self._read, self._files, budget_bytes=self._memory)

    def _librsync(self) -> Pieces:
        return self._patch(_Entry(self._plain()).read)

    def _librsync_file(self) -> Pieces:
        return self._patch(self._read)

    def _patch(self, read: Callable[[int], bytes]) -> Pieces:
        base = Stream(self._tars)
        return librsync.patch(read, base.pread, base.total)

    def _copy(self) -> Pieces:
        (tar,) = self._tars
        for offset in range(0, tar.total, native.PIECE_BYTES):
            yield tar.pread(offset, native.PIECE_BYTES)

    # --- the delta's bytes

    def _read_at(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def _read(self, length: int) -> bytes:
        data = os.pread(self._fd, length, self._position)
        self._position += len(data)
        return data

    def _plain(self) -> Iterator[bytes]:
        while data := self._read(READ_BYTES):
            yield from self._decoder.feed(data)
        self._decoder.close()


def _files_of(layer: dict[str, Any]) -> str:
    """The directory of a layer's files."""
    directory = str(layer["directory"])
    return directory if layer.get("split") else os.path.join(directory, "diff")


class _Entry:
    """The content of a tar's first entry, whatever its name."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._reader = TarReader()
        self._left = -1  # before the entry
        self._pending: bytes | memoryview = b""

    def read(self, length: int) -> bytes:
        """Up to `length` bytes, b"" at the end of the entry. Raises: Malformed, when there is none."""
        while not self._pending and self._left:
            event = self._reader.next_event()
            if isinstance(event, NeedData):
                self._reader.feed(next(self._pieces, b""))
            elif isinstance(event, End):
                break
            elif isinstance(event, Entry):
                self._left = event.size
            else:
                self._left -= len(event)
                self._pending = bytes(event)
        if self._left < 0:
            raise Malformed("unexpected EOF, invalid delta tar archive")  # balena-engine's words
        data = bytes(self._pending[:length])
        self._pending = self._pending[len(data) :]
        return data
