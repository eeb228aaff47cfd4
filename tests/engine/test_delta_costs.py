"""What a pull by delta may cost a device: memory in a cgroup of 512 MB, and bytes written to its card."""

from __future__ import annotations

import functools
import os
import random
import resource
from pathlib import Path

import pytest

from tests.bench.deltapull import pull as pull_watched
from tests.bench.deltapull import small_device
from tests.compat.images import directory, file, make_tar
from tests.deltas_fixture import DeltaFixture, add_delta, native_delta
from tests.engine.image_engine import image_engine, pull, settle
from tests.images_fixture import ImageFixture
from tests.registry.fake import fake_registry
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

PROGRAM_BYTES = 16 << 20
MORE_MEMORY = 64 << 20
MORE_WRITTEN = 1.05


def release(version: int) -> ImageFixture:
    """A large binary with changes all over it, and many small files."""
    chance = random.Random(1)
    program = bytearray(chance.randbytes(PROGRAM_BYTES))
    for at in range(version, PROGRAM_BYTES, 40_000):
        program[at : at + 2] = b"%02d" % version
    small = [file(f"lib/module-{n}.js", chance.randbytes(900)) for n in range(300)]
    return ImageFixture((make_tar([directory("lib"), file("program", bytes(program), 0o755), *small]),), {}, "oci")


@functools.cache
def releases() -> tuple[ImageFixture, ImageFixture, DeltaFixture]:
    old, new = release(1), release(2)
    return old, new, native_delta(old, new)


def test_memory_stays_within_the_bound_on_a_small_device(tmp_path: Path) -> None:
    old, new, delta = releases()
    with fake_registry() as registry:
        registry.has_referrers = True
        registry.add("fleet/app", "1", old)
        registry.add("fleet/app", "2", new)
        add_delta(registry, "fleet/app", delta)
        with small_device(tmp_path) as (engine, limited):
            pull_watched(engine, f"{registry.host}/fleet/app:1", limited)

            cost = pull_watched(engine, f"{registry.host}/fleet/app:2", limited)

            assert engine.request("GET", f"/images/{registry.host}/fleet/app:2/json").json["Id"] == new.image_id
    print(
        f"{cost.delta['DeltaBytes']} bytes instead of {cost.delta['FullBytes']}; {cost.idle / 2**20:.1f} MiB idle, "
        f"{cost.above_idle / 2**20:.1f} MiB more at the peak, cgroup of 512 MB: {limited}"
    )
    assert cost.delta["Codec"] == "native"
    assert 0 < cost.above_idle <= MORE_MEMORY


def written_bytes(*whose: int) -> int:
    """What somebody has handed to the file system's disk: data, and what the file system notes of it."""
    return sum(resource.getrusage(who).ru_oublock for who in whose) * 512


@trio_test
async def test_little_more_is_written_than_the_layer_and_its_delta(tmp_path: Path) -> None:
    old, new, delta = releases()
    with fake_registry() as registry:
        registry.has_referrers = True
        registry.add("fleet/app", "1", old)
        registry.add("fleet/app", "2", new)
        add_delta(registry, "fleet/app", delta)
        name = f"{registry.host}/fleet/app:2"
        async with image_engine(tmp_path) as engine:
            await pull(engine, f"{registry.host}/fleet/app:1")
            # The snapshot: what the worker writes that unpacks the whole layer. The engine stages the blob.
            before = written_bytes(resource.RUSAGE_CHILDREN)
            await pull(engine, name, mode="off")
            snapshot = written_bytes(resource.RUSAGE_CHILDREN) - before
            await engine.images.remove(name, force=True, prune_parents=True)
            await settle(engine)
            before = written_bytes(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

            await pull(engine, name)

            written = written_bytes(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) - before
            layer = engine.snapshots.chain(engine.images.resolve(name).chain_id)[0]
    if not written:
        pytest.skip("this file system tells nobody what is written to it")
    share = written / (snapshot + delta.size)
    print(
        f"{written} bytes written; the layer's snapshot {snapshot} (of {layer.disk_bytes} in blocks of files), "
        f"its delta {delta.size}: {share:.3f}"
    )
    assert share <= MORE_WRITTEN
