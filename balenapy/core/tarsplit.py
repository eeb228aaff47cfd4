"""What is needed beside an unpacked layer to give back its tar, byte for byte: split and join.

Theory
------
A layer's digest is over the bytes of its tar: headers, their order, padding, what follows the end. Unpacking keeps
the contents of files and throws the rest away; a *tar-split* is that rest. It is a list of records in stream order:

    Segment(raw)              bytes that stand in no file: headers, padding, trailer
    File(size, crc, path)     here the content of that file goes

    join(records of split(tar), contents) == tar          for every tar that `tarstream` reads

On disk: MAGIC, then records, each `kind:u8 length:u32` and a body, little-endian; the caller compresses the whole.
Not the JSON lines of vbatts/tar-split, which the engine we replace keeps: nothing but that engine reads its files, and
base64 cuts the headers at other places each time, so that those of 20,000 files take a third more
space compressed and several times as long to write (`python -m tests.bench.layers`). The records say the same.

Caveats:
- A path that occurs twice in one tar has only its last content on disk. The extractor keeps what it must overwrite
  under `displaced_name(size, crc)` beside the tar-split, and `join`'s caller looks there first.
- Content for which no file is made (of a whiteout, of the root) is a Segment: nothing is lost, only not shared.
- CRC-32 tells that a file was changed since, and which; it is no proof. The digest of the joined tar is.
- A file reached through a link that a later entry replaced is no longer at its path: `join` then fails by CRC
  or by a missing file, it never gives wrong bytes silently. Sparse files do not get here: tarstream refuses them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from balenapy.errors import DataLoss

MAGIC = b"balenapy tar-split 1\n"
MAX_RECORD_BYTES = 8 << 20  # a segment is a header with its extensions, or a piece of a trailer

_HEAD = struct.Struct("<BI")
_FILE = struct.Struct("<QI")
_SEGMENT_KIND, _FILE_KIND = 1, 2


class Segment(NamedTuple):
    """Bytes that stand in no file."""

    raw: bytes


class File(NamedTuple):
    """The content of a file: `size` > 0 bytes with this CRC-32, found at `path` below the layer's root."""

    size: int
    crc: int
    path: bytes


Record = Segment | File
Piece = bytes | memoryview


class InvalidSplit(DataLoss):
    """A tar-split that we did not write, or not to its end."""


def encode_segment(raw: Piece) -> bytes:
    """One Segment as bytes of the file."""
    return b"".join((_HEAD.pack(_SEGMENT_KIND, len(raw)), raw))


def encode_file(size: int, crc: int, path: bytes) -> bytes:
    """One File as bytes of the file."""
    return _HEAD.pack(_FILE_KIND, _FILE.size + len(path)) + _FILE.pack(size, crc) + path


def displaced_name(size: int, crc: int) -> str:
    """The name under which a content is kept that has lost its path to a later entry."""
    return f"{size}-{crc:08x}"


class SplitReader:
    """The file's bytes in, records out; `close` says whether it was whole."""

    def __init__(self) -> None:
        self._pending = b""
        self._begun = False

    def feed(self, data: bytes) -> Iterator[Record]:
        """Take the next piece (already decompressed) and give the records that are complete.

        Raises: InvalidSplit.
        """
        buffer = self._pending + data
        at = 0
        if not self._begun:
            if len(buffer) < len(MAGIC):
                self._pending = buffer
                return
            if not buffer.startswith(MAGIC):
                raise InvalidSplit("not a tar-split of a known version")
            at = len(MAGIC)
            self._begun = True
        total = len(buffer)
        while at + _HEAD.size <= total:
            kind, length = _HEAD.unpack_from(buffer, at)
            if length > MAX_RECORD_BYTES:
                raise InvalidSplit(f"tar-split record of {length} bytes")
            begin = at + _HEAD.size
            end = begin + length
            if end > total:
                break
            if kind == _SEGMENT_KIND:
                yield Segment(buffer[begin:end])
            elif kind == _FILE_KIND and length >= _FILE.size:
                size, crc = _FILE.unpack_from(buffer, begin)
                yield File(size, crc, buffer[begin + _FILE.size : end])
            else:
                raise InvalidSplit(f"tar-split record of unknown kind {kind}")
            at = end
        self._pending = buffer[at:]

    def close(self) -> None:
        """Raises: InvalidSplit, when the input ended inside a record or before the first."""
        if self._pending or not self._begun:
            raise InvalidSplit("tar-split ends too early")


def tar_length(records: Iterable[Record]) -> int:
    """How long the tar will be that `join` makes of these."""
    return sum(record.size if isinstance(record, File) else len(record.raw) for record in records)


def join(records: Iterable[Record], open_content: Callable[[File], Iterable[Piece]]) -> Iterator[Piece]:
    """The tar again, in pieces.

    Args:
        open_content: gives the pieces of a file's content.

    Raises: DataLoss, when a content is not what the record says; pieces of it have gone out by then.
    """
    for record in records:
        if isinstance(record, Segment):
            yield record.raw
            continue
        crc = size = 0
        for piece in open_content(record):
            size += len(piece)
            if size > record.size:
                break
            crc = zlib.crc32(piece, crc)
            yield piece
        if size != record.size or crc != record.crc:
            raise DataLoss(f"{record.path.decode(errors='backslashreplace')} was changed after it was unpacked")
