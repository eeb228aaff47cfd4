"""A full disk: refused before the first byte when that can be known, rolled back when it cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from balenapy.config import Reserve
from balenapy.core.reference import parse_pull_reference
from balenapy.engine import pull as module
from balenapy.engine.engine import Engine
from balenapy.linux import syscalls
from balenapy.stores.content import NoSpace
from tests.compat.images import file, make_tar
from tests.engine.archives import archive, docker_members, load_error
from tests.engine.image_engine import NO_ROWS, NOTHING_ON_DISK, image_engine, on_disk, pull, rows, settle
from tests.images_fixture import ImageFixture, layered
from tests.registry.fake import FakeRegistry, fake_registry
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

DISK_BYTES = 16 << 20


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        yield registry


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """16 MiB, of which few are left."""
    root = tmp_path / "disk"
    root.mkdir()
    syscalls.mount("tmpfs", root, "tmpfs", data=f"size={DISK_BYTES}")
    yield root
    syscalls.umount2(root)


def random_image(*sizes: int) -> ImageFixture:
    """Layers that do not compress."""
    return ImageFixture(tuple(make_tar([file(f"data{n}", os.urandom(size))]) for n, size in enumerate(sizes)))


async def fails_for_space(engine: Engine, name: str) -> str:
    async def write(_line: bytes) -> None:
        pass

    with pytest.raises(NoSpace) as caught:
        await engine.pulls.pull(parse_pull_reference(name, ""), "", None, write)
    return caught.value.message


@trio_test
async def test_a_pull_that_cannot_fit_fails_before_its_first_byte(small_disk: Path, registry: FakeRegistry) -> None:
    image = random_image(8 << 20)
    registry.add("team/app", "1", image)
    async with image_engine(small_disk) as engine:
        message = await fails_for_space(engine, f"{registry.host}/team/app:1")
        assert message.startswith(f"cannot pull {registry.host}/team/app:1: ")
        assert "MB needed, " in message
        assert message.endswith("MB free: no space left on device")
        asked = [request.headers.get("Range") for request in registry.seen(f"blobs/{image.layers[0].digest}")]
        assert asked == [f"bytes={len(image.layers[0].data) - 4}-"]
        await settle(engine)
        assert rows(engine) == NO_ROWS
        assert on_disk(engine) == NOTHING_ON_DISK


@trio_test
async def test_a_pull_that_fits_by_its_true_size_is_not_refused(small_disk: Path, registry: FakeRegistry) -> None:
    """Twice the blob would not fit, but its content does not compress, as its last four bytes tell."""
    image = random_image(6 << 20)
    layer = image.layers[0].digest
    registry.add("team/app", "1", image)
    async with image_engine(small_disk) as engine:
        await pull(engine, f"{registry.host}/team/app:1")
        first = registry.seen(f"blobs/{layer}")[0]
        assert first.headers["Range"] == f"bytes={len(image.layers[0].data) - 4}-"


@trio_test
async def test_a_layer_that_unpacks_to_much_more_is_refused(small_disk: Path, registry: FakeRegistry) -> None:
    filling = b"".join(os.urandom(1000) + bytes(9000) for _ in range(2000))
    image = ImageFixture((make_tar([file("data", filling), file("more", os.urandom(5 << 20))]),))
    registry.add("team/app", "1", image)
    async with image_engine(small_disk) as engine:
        message = await fails_for_space(engine, f"{registry.host}/team/app:1")
        size = (len(image.tars[0]) + len(image.layers[0].data)) / 1_000_000
        assert f": {size:.4g}MB needed, " in message


@trio_test
async def test_a_load_that_cannot_fit_fails_before_the_layer_is_written(small_disk: Path) -> None:
    image = random_image(1 << 20, 15 << 20)
    async with image_engine(small_disk) as engine:
        message = await load_error(engine, archive(docker_members(image)))
        assert message.startswith("cannot load layer1.tar: 15.74MB needed, ")
        assert message.endswith("MB free: no space left on device")
        await settle(engine)
        assert rows(engine) == NO_ROWS
        assert on_disk(engine) == NOTHING_ON_DISK


@pytest.mark.parametrize("size", [0, 1, 255, 256, 300, 65_000, 70_000, 5_000_000])
def test_zstd_tells_the_size_of_its_content(size: int) -> None:
    data = os.urandom(max(0, size - 100)) + bytes(min(size, 100))
    head = zstandard.ZstdCompressor().compress(data)[: module.ZSTD_HEAD_BYTES].ljust(module.ZSTD_HEAD_BYTES)
    assert module.zstd_content_size(head) == size
    unknown = zstandard.ZstdCompressor().compressobj()
    head = (unknown.compress(data) + unknown.flush())[: module.ZSTD_HEAD_BYTES].ljust(module.ZSTD_HEAD_BYTES)
    assert module.zstd_content_size(head) is (None if data else 0)
    assert module.zstd_content_size(b"") is None


@trio_test
async def test_a_zstd_layer_that_unpacks_to_much_more_is_refused(small_disk: Path, registry: FakeRegistry) -> None:
    filling = b"".join(os.urandom(1000) + bytes(9000) for _ in range(2000))
    image = ImageFixture((make_tar([file("data", filling)]),), family="oci", compressions=("zstd",))
    registry.add("team/app", "1", image)
    async with image_engine(small_disk) as engine:
        message = await fails_for_space(engine, f"{registry.host}/team/app:1")
        size = (len(image.tars[0]) + len(image.layers[0].data)) / 1_000_000
        assert f": {size:.4g}MB needed, " in message
        await settle(engine)
        assert on_disk(engine) == NOTHING_ON_DISK


@pytest.mark.parametrize(
    ("reserve", "kept"), [(Reserve(size_bytes=5 << 20), 5 << 20), (Reserve(50.0), DISK_BYTES // 2), (Reserve(), 0)]
)
def test_the_reserve_can_be_set(small_disk: Path, reserve: Reserve, kept: int) -> None:
    status = os.statvfs(small_disk)
    free = status.f_bavail * status.f_frsize
    assert module.usable_bytes(small_disk, reserve) == pytest.approx(free - kept, abs=2 << 20)


@trio_test
async def test_what_unfinished_pulls_have_left_makes_room(small_disk: Path, registry: FakeRegistry) -> None:
    abandoned, wanted = random_image(3 << 20), random_image(3 << 20)
    registry.add("team/app", "1", abandoned)
    registry.add("team/app", "2", wanted)
    layer = abandoned.layers[0].digest
    async with image_engine(small_disk, max_download_attempts=1) as engine:
        registry.fault(f"blobs/{layer}", cut_at=(3 << 20) - 1000, times=2)  # its size is asked first
        with pytest.raises(module.RegistryError):
            await pull(engine, f"{registry.host}/team/app:1")
        assert engine.images.content.sizes()[layer] > 2 << 20
        filler = small_disk / "filler"
        filler.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - (6 << 20)))

        await pull(engine, f"{registry.host}/team/app:2")
        assert layer not in engine.images.content.sizes()


@pytest.mark.parametrize("sizes", [(14 << 20,), (3 << 20, 3 << 20, 12 << 20), (30 << 20,)])
@trio_test
async def test_a_disk_that_fills_up_meanwhile_is_rolled_back(
    small_disk: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(module, "usable_bytes", lambda root, reserve: 1 << 40)
    name = f"{registry.host}/team/app:1"
    registry.add("team/app", "1", layered())
    async with image_engine(small_disk) as engine:
        await pull(engine, name)
        await settle(engine)
        before = engine.images.inspect(name), rows(engine), on_disk(engine)

        registry.add("team/app", "1", random_image(*sizes))
        message = await fails_for_space(engine, name)
        assert message.endswith("no space left on device")
        await settle(engine)
        assert (engine.images.inspect(name), rows(engine), on_disk(engine)) == before
        free = os.statvfs(small_disk)
        assert free.f_bavail * free.f_frsize > DISK_BYTES - (1 << 20)
