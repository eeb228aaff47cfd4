"""balena's deltas, made from tars that are at hand: any librsync gives the target back."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from delta import librsync
from delta.balena import LayerDelta
from delta.match import BaseIndex
from tests.compat.images import directory, file, make_tar
from tests.delta.randomtars import opened, opened_base, random_pair

RDIFF = shutil.which("rdiff")


def make(base: list[bytes], target: bytes, window_bytes: int = 1 << 20) -> bytes:
    out = io.BytesIO()
    with opened_base(base) as tars, opened(target) as (tar,):
        LayerDelta(BaseIndex(tars), tar, out.write, window_bytes).make()
    return out.getvalue()


def patched(base: list[bytes], delta: bytes) -> bytes:
    whole = b"".join(base)
    pieces = librsync.patch(io.BytesIO(delta).read, lambda at, n: whole[at : at + n], len(whole))
    return b"".join(pieces)


def test_random_pairs_come_back() -> None:
    copied = total = 0
    for seed in range(400):
        base, target = random_pair(seed)
        delta = make(base, target, 700)
        assert patched(base, delta) == target, f"seed {seed}"
        copied += len(delta)
        total += len(target)
    print(f"400 pairs of tars, 0 mismatches, {total} bytes as {copied}")
    assert copied < total


def pair() -> tuple[list[bytes], bytes]:
    """Two layers, and a third that has most of both with small changes."""
    rng = random.Random(4)
    program, data = rng.randbytes(300_000), rng.randbytes(100_000)
    changed = bytearray(program)
    for at in range(0, len(changed), 9_000):
        changed[at : at + 3] = b"new"
    base = [
        make_tar([directory("d"), file("d/data", data)]),
        make_tar([file("bin/tool-1.2", program, 0o755), file("same", b"s" * 5000)]),
    ]
    target = make_tar(
        [file("bin/tool-1.3", bytes(changed[:150_000]) + b"inserted" + bytes(changed[150_000:]), 0o755),
         file("moved/data", data), file("same", b"s" * 5000)]
    )  # fmt: skip
    return base, target


@pytest.mark.parametrize("window_bytes", [1 << 20, 64 << 10])
def test_what_is_alike_is_copied_wherever_it_stands(window_bytes: int) -> None:
    base, target = pair()

    delta = make(base, target, window_bytes)

    assert patched(base, delta) == target
    assert len(delta) < 6_000


@pytest.mark.skipif(RDIFF is None, reason="Debian's rdiff is not installed")
def test_rdiff_reads_what_we_make(tmp_path: Path) -> None:
    base, target = pair()
    (tmp_path / "base").write_bytes(b"".join(base))
    (tmp_path / "delta").write_bytes(make(base, target))

    subprocess.run(["rdiff", "patch", "base", "delta", "new"], cwd=tmp_path, check=True)

    assert (tmp_path / "new").read_bytes() == target
    # And it is smaller than what balena-engine makes of the same.
    (tmp_path / "target").write_bytes(target)
    options = ["-b", "512", "-S", "32", "-H", "blake2"]
    subprocess.run(["rdiff", *options, "signature", "base", "signature"], cwd=tmp_path, check=True)
    subprocess.run(["rdiff", "delta", "signature", "target", "theirs"], cwd=tmp_path, check=True)
    assert (tmp_path / "delta").stat().st_size < (tmp_path / "theirs").stat().st_size
