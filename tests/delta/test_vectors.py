"""What was written once is read for ever."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from delta import librsync, tardiff
from delta.match import BaseIndex
from tests.delta.inverse import apply
from tests.delta.make_vectors import VECTORS
from tests.delta.randomtars import opened_base

FOLDERS = sorted(VECTORS.iterdir())


def test_there_are_vectors() -> None:
    assert len(FOLDERS) >= 8


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_vectors_give_their_target(folder: Path) -> None:
    layers = [path.read_bytes() for path in sorted(folder.glob("base-*.tar"))]
    target = (folder / "target.tar").read_bytes()
    delta = {path.stem: path.read_bytes() for path in folder.glob("*.delta")}

    with opened_base(layers) as base:
        for name in ("native", "native-bsdiff"):
            assert apply(base, delta[name]) == target
        files = tardiff.MergedFiles(BaseIndex(base))
        assert b"".join(tardiff.apply(io.BytesIO(delta["tar-diff"]).read, files)) == target
    whole = b"".join(layers)
    pieces = librsync.patch(io.BytesIO(delta["librsync"]).read, lambda at, n: whole[at : at + n], len(whole))
    assert b"".join(pieces) == target
