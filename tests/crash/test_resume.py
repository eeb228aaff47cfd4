"""An interrupted pull fetches only what is missing: over connections, over SIGKILL, over a client that left."""

from __future__ import annotations

import hashlib
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat.images import file, make_tar
from tests.engine_process import EngineProcess, running_engine, wait_until
from tests.images_fixture import ImageFixture
from tests.registry.fake import FakeRegistry, fake_registry

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

MIB = 1 << 20


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        yield registry


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    with running_engine(tmp_path / "engine") as engine:
        yield engine


def image_of(size: int) -> ImageFixture:
    content = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(size // 32))
    return ImageFixture((make_tar([file("data", content)]),), compressions=("plain",))


def staged(engine: EngineProcess) -> int:
    return sum(path.stat().st_size for path in (engine.data_root / "ingest").iterdir())


def offsets(registry: FakeRegistry, digest: str) -> list[int]:
    asked = registry.seen(f"GET .*blobs/{digest}")
    return [int(request.headers["Range"][6:-1]) if "Range" in request.headers else 0 for request in asked]


def begin_pull(engine: EngineProcess, name: str, tag: str) -> socket.socket:
    """A client that may leave at any time."""
    client = engine.raw_connection()
    client.sendall(f"POST /images/create?fromImage={name}&tag={tag} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return client


def finish_pull(engine: EngineProcess, name: str, tag: str) -> None:
    answer = engine.request("POST", f"/images/create?fromImage={name}&tag={tag}", timeout_s=120)
    assert answer.status == 200
    assert answer.lines[-1] == {"status": f"Status: Downloaded newer image for {name}:{tag}"}


def test_a_killed_engine_goes_on_where_it_was(engine: EngineProcess, registry: FakeRegistry) -> None:
    """Three kills at different places; another tag that has the same blob goes on too."""
    image = image_of(12 * MIB)
    digest = image.layers[0].digest
    registry.add("team/app", "1", image)
    registry.add("team/app", "2", image)
    name = f"{registry.host}/team/app"
    for number, place in enumerate((2 * MIB, 3 * MIB, 5 * MIB)):
        registry.fault(f"blobs/{digest}", stall_at=place)
        before = staged(engine) if number else 0
        client = begin_pull(engine, name, "1" if number % 2 else "2")
        wait_until(lambda reached=before + place: staged(engine) >= reached - MIB, what="the stall")
        engine.kill()
        client.close()
        engine.start()
    finish_pull(engine, name, "1")

    begun = offsets(registry, digest)
    assert len(begun) == 4
    sent = [0]
    for start, place in zip(begun, (2 * MIB, 3 * MIB, 5 * MIB), strict=False):
        assert sent[-1] - start <= MIB
        sent.append(start + place)
    assert sent[-1] - begun[-1] <= MIB
    assert staged(engine) == 0


def test_a_client_that_leaves_cancels_the_pull_within_a_second(engine: EngineProcess, registry: FakeRegistry) -> None:
    image = image_of(8 * MIB)
    registry.add("team/app", "1", image)
    registry.fault(f"blobs/{image.layers[0].digest}", stall_at=4 * MIB)
    client = begin_pull(engine, f"{registry.host}/team/app", "1")
    wait_until(lambda: staged(engine) >= 3 * MIB, what="the stall")
    client.shutdown(socket.SHUT_RDWR)
    client.close()
    wait_until(lambda: list((engine.data_root / "snapshots").iterdir()) == [], timeout_s=1.5, what="the roll-back")
    assert engine.request("GET", "/images/json").json == []
    assert 3 * MIB <= staged(engine) <= 4 * MIB


@pytest.mark.slow
def test_a_download_cut_ten_times_fetches_little_twice(engine: EngineProcess, registry: FakeRegistry) -> None:
    """The seed is printed; every cut may be an orderly end or a reset."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    image = image_of(40 * MIB)
    digest = image.layers[0].digest
    registry.add("team/app", "1", image)
    cuts = [choose.randrange(1, 4 * MIB) for _ in range(10)]
    for cut in cuts:
        registry.fault(f"blobs/{digest}", cut_at=cut, reset=choose.random() < 0.5)
    finish_pull(engine, f"{registry.host}/team/app", "1")

    begun = offsets(registry, digest)
    assert len(begun) == 11
    assert begun == sorted(begun)
    sent = sum(cuts) + len(image.layers[0].data) - begun[-1]
    print(f"sent {sent} bytes of {len(image.layers[0].data)}")
    assert sent <= len(image.layers[0].data) + 10 * MIB
