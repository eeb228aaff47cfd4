"""The tar-diff format: inverse, every operation, what is refused."""

from __future__ import annotations

import io
import random

import pytest
import zstandard

from delta import tardiff
from delta.errors import DeltaError, Malformed, OverBudget, Unsupported, WrongBase
from delta.match import BaseIndex
from tests.delta.randomtars import Entry, opened, opened_base, random_pair, tar_of

FILES = {b"etc/motd": b"0123456789", b"bin/sh": b"\xff" * 10}


class Dictionary:
    """A base of a few files."""

    def size(self, path: bytes) -> int:
        if path not in FILES:
            raise WrongBase("no such file")
        return len(FILES[path])

    def read(self, path: bytes, offset: int, length: int) -> bytes:
        return FILES[path][offset : offset + length]


def packed(operations: bytes) -> bytes:
    return tardiff.MAGIC + zstandard.ZstdCompressor().compress(operations)


def run(delta: bytes, limit: int | None = None) -> bytes:
    return b"".join(tardiff.apply(io.BytesIO(delta).read, Dictionary(), max_bytes=limit))


def test_every_operation() -> None:
    operations = (
        b"\x00\x03abc"  # data
        b"\x01\x09/etc/motd"  # open
        b"\x02\x04"  # copy 0123
        b"\x04\x08\x02\x02"  # seek 8, copy 89
        b"\x01\x06bin/sh"
        b"\x03\x02\x02\x03"  # add
    )

    assert run(packed(operations)) == b"abc012389\x01\x02"


@pytest.mark.parametrize(
    ("delta", "error"),
    [
        (b"", Malformed),
        (b"tardf1\n", Malformed),
        (b"tardf2\n\0", Unsupported),
        (packed(b"\x05\x00"), Malformed),
        (packed(b"\x00\x05ab"), Malformed),
        (packed(b"\x00"), Malformed),
        (packed(b"\x00" + b"\xff" * 10), Malformed),
        (packed(b"\x02\x01"), Malformed),
        (packed(b"\x01\x00"), Malformed),
        (packed(b"\x01\x02.."), Malformed),
        (packed(b"\x01\x81\x20" + b"x" * 4097), Malformed),
        (packed(b"\x01\x04nope"), WrongBase),
        (packed(b"\x01\x08etc/motd\x02\x0b"), WrongBase),
        (packed(b"\x01\x08etc/motd\x04\xff\xff\xff\xff\x0f\x02\x01"), WrongBase),
        (packed(b"\x01\x08etc/motd\x03\x05ab"), Malformed),
        (packed(b"\x00\x03abc")[:-4], Malformed),
    ],
)
def test_what_cannot_be_is_refused(delta: bytes, error: type[DeltaError]) -> None:
    with pytest.raises(error):
        run(delta)


def test_output_and_window_are_bounded() -> None:
    with pytest.raises(Malformed, match="more than"):
        run(packed(b"\x01\x08etc/motd" + b"\x04\x00\x02\x0a" * 100), 500)
    parameters = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
    wide = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    delta = tardiff.MAGIC + wide.compress(b"\x00\x03abc") + wide.flush()
    with pytest.raises(OverBudget):
        list(tardiff.apply(io.BytesIO(delta).read, Dictionary(), budget_bytes=16 << 20))


def test_paths_cannot_leave_the_root() -> None:
    assert tardiff.clean_path(b"../../etc/./x//../passwd") == b"etc/passwd"
    assert tardiff.clean_path(b"/..") == b""


def test_reading_is_the_inverse_of_making() -> None:
    count = 300
    size = 0
    for seed in range(count):
        layers, target = random_pair(seed)
        out = io.BytesIO()
        with opened_base(layers) as base, opened(target) as (tar,):
            index = BaseIndex(base)
            tardiff.make(index, tar, out.write, level=3)
            files = tardiff.MergedFiles(index)
            delta = io.BytesIO(out.getvalue())
            assert target == b"".join(tardiff.apply(delta.read, files)), f"seed {seed}"
        size += len(out.getvalue())
    print(f"{count} random pairs of tars by tar-diff, 0 mismatches, {size} bytes")


def test_files_that_are_hidden_in_the_merged_base_are_not_named() -> None:
    rng = random.Random(1)
    rng.randrange = lambda *_: 11  # type: ignore[method-assign]
    lower = [Entry(f"a/{n}", data=b"%d" % n) for n in range(3)] + [Entry("b/x", data=b"x"), Entry("c", data=b"c")]
    upper = [Entry("a/.wh.1"), Entry("b/.wh..wh..opq"), Entry("b/y", data=b"y"), Entry("d/.wh.none")]
    tars = [tar_of(each, 1, rng) for each in (lower, upper)]

    with opened_base(tars) as base:
        assert {b"a/0", b"a/2", b"b/y", b"c"} == set(tardiff.MergedFiles(BaseIndex(base)).places)
