"""The file `tar-split.zst` beside a layer: core/tarsplit's records, compressed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import zstandard

from balenapy.core import tarsplit
from balenapy.worker import process

NAME = "tar-split.zst"
LEVEL = 3
BATCH_BYTES = 128 << 10
_READ_BYTES = 8 << 10  # headers take a hundredth of their size; all of a piece is in memory at once


class SplitWriter:
    """The tar-split file: records collected, compressed in batches."""

    def __init__(self, directory: str) -> None:
        path = os.path.join(directory, NAME)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()
        self._records: list[bytes] = [tarsplit.MAGIC]
        self._size = 0

    def segment(self, raw: bytes | memoryview) -> None:
        self._add(tarsplit.encode_segment(raw))

    def file(self, size: int, crc: int, path: bytes) -> None:
        self._add(tarsplit.encode_file(size, crc, path))

    def _add(self, record: bytes) -> None:
        self._records.append(record)
        self._size += len(record)
        if self._size >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        process.write_all(self._fd, self._compressor.compress(b"".join(self._records)))
        self._records.clear()
        self._size = 0

    def close(self) -> None:
        self._flush()
        process.write_all(self._fd, self._compressor.flush())
        os.close(self._fd)


def read_records(fd: int) -> Iterator[tarsplit.Record]:
    """All records of an open tar-split file; closes it.

    Raises: InvalidSplit.
    """
    reader = tarsplit.SplitReader()
    # Not stream_reader: it says nothing when the file ends too early.
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        while not decompressor.eof and (piece := os.read(fd, _READ_BYTES)):
            yield from reader.feed(decompressor.decompress(piece))
    except zstandard.ZstdError as error:
        raise tarsplit.InvalidSplit(f"{NAME}: {error}") from error
    finally:
        os.close(fd)
    if not decompressor.eof:
        raise tarsplit.InvalidSplit(f"{NAME} ends too early")
    reader.close()
