"""What the records say of the disk is what is on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from balenapy.linux import durable
from tests.compat.images import directory, file, link, make_tar
from tests.engine.image_engine import image_engine, pull, settle
from tests.images_fixture import ImageFixture, busybox
from tests.registry.fake import FakeRegistry, fake_registry
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        yield registry


def small_files() -> ImageFixture:
    entries = [directory(f"d{number}") for number in range(50)]
    entries += [file(f"d{number % 50}/file-{number}", os.urandom(number % 5000)) for number in range(3000)]
    entries += [link(f"d{number}/link", "../d1/file-1") for number in range(50)]
    return ImageFixture((make_tar(entries),))


@pytest.mark.parametrize("image", [busybox(), small_files()], ids=["busybox", "small files"])
@trio_test
async def test_layers_take_what_their_rows_say(tmp_path: Path, registry: FakeRegistry, image: ImageFixture) -> None:
    registry.add("team/app", "1", image)
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        await settle(engine)
        told = sum(layer.disk_bytes for layer in engine.snapshots.layers())
        _, taken = durable.tree_size(engine.config.data_root / "snapshots")
        assert abs(told - taken) <= taken / 100 + 16384, (told, taken)


@trio_test
async def test_staged_bytes_are_told(tmp_path: Path, registry: FakeRegistry) -> None:
    image = busybox()
    registry.add("team/app", "1", image)
    layer = image.layers[0]
    registry.fault(f"blobs/{layer.digest}", cut_at=500_000)
    async with image_engine(tmp_path, max_download_attempts=1) as engine:
        with pytest.raises(Exception, match="EOF"):
            await pull(engine, f"{registry.host}/team/app:1")
        assert engine.images.ingests() == [
            {"Digest": layer.digest, "Size": 500_000, "TotalSize": len(layer.data)},
        ]
