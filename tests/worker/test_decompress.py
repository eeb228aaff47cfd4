"""Decoders: bounded pieces, any cut of the input, and an error instead of silence."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import time
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from balenapy.worker.decompress import CHUNK_BYTES, InvalidCompression, open_decoder

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    "zstd without size": zstandard.ZstdCompressor(write_content_size=False).compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


def decode(blob: bytes, step: int = 1 << 20) -> bytes:
    decoder = open_decoder(blob[:512])
    out = bytearray()
    for at in range(0, len(blob), step):
        for piece in decoder.feed(blob[at : at + step]):
            assert len(piece) <= CHUNK_BYTES
            out += piece
    decoder.close()
    return bytes(out)


@pytest.mark.parametrize("name", COMPRESS)
@given(data=st.binary(max_size=3000), more=st.binary(max_size=100), step=st.integers(1, 500))
@settings(max_examples=25, deadline=None)
def test_any_cut_of_one_or_two_streams_gives_the_bytes(name: str, data: bytes, more: bytes, step: int) -> None:
    compress = COMPRESS[name]

    assert decode(compress(data), step) == data
    assert decode(compress(data) + compress(more), step) == data + more


@pytest.mark.parametrize("name", COMPRESS)
def test_much_output_of_little_input_comes_in_bounded_pieces(name: str) -> None:
    data = bytes(20_000_000)

    assert decode(COMPRESS[name](data)) == data


@pytest.mark.parametrize("name", COMPRESS)
def test_a_stream_that_stops_anywhere_is_an_error(name: str) -> None:
    blob = COMPRESS[name](random.Random(1).randbytes(2000))
    for size in [*range(10, 60), *range(60, len(blob), 97), len(blob) - 1]:
        with pytest.raises(InvalidCompression):
            decode(blob[:size])


def test_a_tar_whose_first_name_looks_like_a_magic_is_a_tar() -> None:
    from tests.core import tars

    for name in (b"BZh9", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"):
        assert decode(tars.file(name, b"x")) == tars.file(name, b"x")


def test_damage_is_an_error_or_shows_in_the_bytes() -> None:
    """Ten thousand damaged streams: nothing but our error, and never more memory than a piece."""
    random_ = random.Random(3)
    data = random_.randbytes(300) + bytes(3000) + b"text " * 200
    blobs = [compress(data) for compress in COMPRESS.values()]
    started = time.monotonic()
    refused = 0
    for number in range(10_000):
        blob = bytearray(blobs[number % len(blobs)])
        for _ in range(random_.randint(1, 3)):
            blob[random_.randrange(4, len(blob))] = random_.randrange(256)
        try:
            decode(bytes(blob), random_.choice((7, 100, 5000)))
        except InvalidCompression:
            refused += 1
    print(f"decoder fuzz: 10000 inputs, {refused} refused, {time.monotonic() - started:.1f} s")
    assert refused > 5000
