"""Any one file below the data root is truncated, zeroed, flipped or missing: the engine starts, serves, says what is
damaged, keeps all else working, and pulling heals images.

A sample in CI (which kinds of files exist is small, so each kind is in it); everything with DAMAGE_CASES=all.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine_process import EngineProcess, _remove_nft_tables, wait_until
from tests.images_fixture import busybox, layered
from tests.registry.fake import FakeRegistry, fake_registry

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

CASES = os.environ.get("DAMAGE_CASES", "16")
BRIDGE = "bptdamage"
SECONDS = 45.0  # a sample stops here; the number tried is printed


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.seek(size // 2)
        byte = file.read(1)
        file.seek(size // 2)
        file.write(bytes((byte[0] ^ 0x10,)))


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, zero, flip, Path.unlink)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        registry.add("team/app", "1", layered())
        registry.add("team/box", "1", busybox())
        yield registry


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    links = network_links()
    engine = EngineProcess(tmp_path)
    try:
        yield engine
    finally:
        engine.clean_up()
        # An engine that lost the row of a network does not remove its bridge.
        for link in network_links() - links:
            subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True)
            _remove_nft_tables(link)


def network_links() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir() if path.name == BRIDGE}


def populate(engine: EngineProcess, images: list[str]) -> None:
    engine.start()
    for image in images:
        pull(engine, image)
    options = {"com.docker.network.bridge.name": BRIDGE}
    network = engine.request("POST", "/networks/create", {"Name": "net", "Options": options})
    assert network.status == 201, network.body
    assert engine.request("POST", "/volumes/create", {"Name": "vol"}).status == 201
    for name in ("ran", "other"):
        command = ["sh", "-c", "echo said; echo kept > /file"]
        body = {"Image": images[1], "Cmd": command, "HostConfig": {"Binds": ["vol:/vol"]}}
        created = engine.request("POST", f"/containers/create?name={name}", body)
        assert created.status == 201, created.body
    assert engine.request("POST", "/containers/ran/start").status == 204
    assert engine.request("POST", "/containers/ran/wait").json["StatusCode"] == 0
    engine.stop()


def pull(engine: EngineProcess, image: str) -> None:
    answer = engine.request("POST", f"/images/create?fromImage={image}")
    assert b"errorDetail" not in answer.body, answer.body


def kind_of(path: Path) -> str:
    """Files of one kind are alike for the engine."""
    name = re.sub(r"[0-9a-f]{16,}", "ID", str(path))
    return re.sub(r"(ID/(?:diff|init|displaced))/.*", r"\1/…", name)


def choose(files: list[Path]) -> list[tuple[Path, Callable[[Path], None]]]:
    """All of them, or a sample that has every kind before it has one twice."""
    seed = int(os.environ.get("SEED", time.time_ns() % 10**6))
    print(f"\nseed {seed}")
    pairs = [(path, damage) for path in files for damage in DAMAGES]
    random.Random(seed).shuffle(pairs)
    if CASES == "all":
        return pairs
    seen: Counter[str] = Counter()
    ranked = []
    for path, damage in pairs:
        ranked.append((seen[kind_of(path)], path, damage))
        seen[kind_of(path)] += 1
    ranked.sort(key=lambda entry: entry[0])
    return [(path, damage) for _, path, damage in ranked[: int(CASES)]]


def test_any_one_damaged_file_costs_one_object_at_most(
    engine: EngineProcess, registry: FakeRegistry, tmp_path: Path
) -> None:
    images = [f"{registry.host}/team/app:1", f"{registry.host}/team/box:1"]
    populate(engine, images)
    whole = tmp_path / "whole"
    engine.data_root.rename(whole)
    files = [
        path.relative_to(whole)
        for path in sorted(whole.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.stat().st_size
    ]
    kinds = Counter(map(kind_of, files))
    began, tried = time.monotonic(), Counter[str]()
    cases = choose(files)
    failures: list[str] = []
    for path, damage in cases:
        if CASES != "all" and time.monotonic() - began > SECONDS:
            break
        tried[kind_of(path)] += 1
        subprocess.run(["cp", "-a", whole, engine.data_root], check=True)
        damage(engine.data_root / path)
        try:
            check(engine, images, str(path))
        except Exception as error:
            log = "\n".join(line for line in engine.log_text().splitlines() if "level=DEBUG" not in line)
            failures.append(f"{damage.__name__} {path}: {error!r}\n{log[-3000:]}")
        finally:
            if engine.is_alive:
                engine.remove_containers()
                engine.request("DELETE", "/networks/net")
                engine.kill()
            shutil.rmtree(engine.data_root)
            engine.log_path.unlink(missing_ok=True)
    assert not failures, f"{len(failures)} of {sum(tried.values())}:\n" + "\n\n".join(failures)
    print(f"{sum(tried.values())} of {len(files) * len(DAMAGES)} damages, {len(tried)} of {len(kinds)} kinds of files")


def check(engine: EngineProcess, images: list[str], path: str) -> None:
    engine.start()
    wait_until(lambda: "rebuilding" not in engine.log_text() or "rebuilt " in engine.log_text(), 30, "rebuilt")
    shown = engine.request("GET", "/images/json").json
    for image in shown:
        assert engine.request("GET", f"/images/{image['Id']}/json").status == 200
    assert engine.request("GET", "/system/df").status == 200
    assert engine.request("GET", "/networks").status == 200
    assert [volume["Name"] for volume in engine.request("GET", "/volumes").json["Volumes"]] == ["vol"]
    containers = engine.request("GET", "/containers/json?all=1").json
    for container in containers:
        assert engine.request("GET", f"/containers/{container['Id']}/json").status == 200
        assert engine.request("GET", f"/containers/{container['Id']}/logs?stdout=1").status == 200
    # What a verification finds is told from then on.
    found = engine.request("POST", "/images/fsck?deep=1").lines
    warnings = [text for text in engine.request("GET", "/info").json["Warnings"] or () if "damaged" in text]
    if re.match(r"snapshots/[0-9a-f]+/(diff|tar-split|layer\.json|image-|displaced)", path) and is_layer(engine, path):
        assert found[-1]["Damaged"], found
        assert warnings
    if path != "meta.db-wal":  # what it holds is of the last seconds before the stop
        assert len(shown) == len(images) or warnings, "an image is gone, and nobody says so"
    # Pulling heals; then everything works, that of damaged containers aside.
    for image in images:
        pull(engine, image)
    assert engine.request("POST", "/images/fsck?deep=1").lines[-1]["Damaged"] == 0
    created = engine.request("POST", "/containers/create", {"Image": images[1], "Cmd": ["true"]})
    assert created.status == 201, created.body
    name = created.json["Id"]
    assert engine.request("POST", f"/containers/{name}/start").status == 204
    assert engine.request("POST", f"/containers/{name}/wait").json["StatusCode"] == 0
    for container in containers:
        started = engine.request("POST", f"/containers/{container['Id']}/start")
        assert started.status in (204, 500) and (started.status == 204 or container["Id"] in path), started.body


def is_layer(engine: EngineProcess, path: str) -> bool:
    """Whether it belongs to an image, and not to a container's own layer."""
    directory = engine.data_root / "/".join(path.split("/")[:2])
    return not (directory / "work").exists()
