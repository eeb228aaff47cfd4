"""Updates by delta as a user has them: a real registry, `balenapy-delta`, the docker CLI and docker-py."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests import images_fixture
from tests.compat.images import directory, file, make_tar
from tests.engine_process import EngineProcess, running_engine
from tests.images_fixture import ImageFixture, busybox

pytestmark = pytest.mark.root


@dataclass(frozen=True)
class Fleet:
    """Two releases in a registry, and the delta between them."""

    registry: str
    repository: str
    old: ImageFixture
    new: ImageFixture

    def name(self, tag: str) -> str:
        return f"{self.registry}/{self.repository}:{tag}"


def release(version: int) -> ImageFixture:
    content = make_tar(
        [directory("app"), file("app/version", f"{version}\n".encode()), file("app/data", bytes(range(256)) * 400)]
    )
    return ImageFixture((*busybox().tars, content), {"Cmd": ["cat", "/app/version"]})


@pytest.fixture
def fleet(engine: EngineProcess, registry: str, tmp_path: Path) -> Iterator[Fleet]:
    if engine.is_reference:
        pytest.skip("dockerd knows no deltas")
    fleet = Fleet(registry, "fleet/by-delta", release(1), release(2))
    for tag, image in (("1", fleet.old), ("2", fleet.new)):
        images_fixture.push(registry, fleet.repository, tag, image)
    for arguments in (
        ["make", fleet.name("1"), fleet.name("2"), "-q", "-o", str(tmp_path / "delta")],
        ["push", "-q", str(tmp_path / "delta"), fleet.name("2")],
    ):
        subprocess.run([sys.executable, "-m", "delta.cli", *arguments], check=True, capture_output=True)
    try:
        yield fleet
    finally:
        for image in engine.request("GET", "/images/json?all=1").json:
            if image["Id"] in (fleet.old.image_id, fleet.new.image_id):
                engine.request("DELETE", f"/images/{image['Id']}?force=1")


def last_pull(engine: EngineProcess) -> dict[str, str]:
    events = engine.request(
        "GET", f"/events?since=0&until={int(time.time()) + 1}&filters=" + quote('{"event":["pull"]}')
    ).lines
    attributes: dict[str, str] = events[-1]["Actor"]["Attributes"]
    return attributes


def test_the_docker_cli_pulls_a_delta_that_was_pushed(engine: EngineProcess, fleet: Fleet) -> None:
    engine.docker("pull", fleet.name("1"))
    output = engine.docker("run", "-d", "--name", "running", fleet.name("1"), "sleep", "100").stdout  # the base is used
    assert output

    pulled = engine.docker("pull", fleet.name("2")).stdout

    assert f"Status: Downloaded newer image for {fleet.name('2')}" in pulled
    attributes = last_pull(engine)
    assert attributes["delta.base"] == fleet.old.image_id
    assert int(attributes["delta.bytes"]) < 500
    assert int(attributes["delta.bytes"]) + int(attributes["delta.saved"]) == len(fleet.new.layers[1].data)
    assert engine.docker("run", "--rm", fleet.name("2")).stdout == "2\n"
    assert engine.request("GET", f"/images/{fleet.name('2')}/json").json["Id"] == fleet.new.image_id
    pushed = engine.docker("push", fleet.name("2")).stdout
    assert pushed.count("Layer already exists") == 2
    engine.docker("rmi", fleet.name("2"))
    create(engine, fleet, Mode="off")
    assert "delta.base" not in last_pull(engine)
    assert engine.docker("push", fleet.name("2")).stdout.splitlines()[-1] == pushed.splitlines()[-1]


def test_docker_py_sees_an_ordinary_pull(engine: EngineProcess, fleet: Fleet) -> None:
    client = engine.client()
    client.images.pull(f"{fleet.registry}/{fleet.repository}", tag="1")

    image = client.images.pull(f"{fleet.registry}/{fleet.repository}", tag="2")

    assert image.id == fleet.new.image_id
    assert "delta.base" in last_pull(engine)


@pytest.mark.skipif(shutil.which("dockerd") is None, reason="dockerd is not installed: its store cannot be tried")
def test_the_base_may_be_in_the_store_of_the_reference_engine(fleet: Fleet, tmp_path: Path) -> None:
    """Its layout is that of balena-engine, whose host system's store a device has beside its own."""
    with running_engine(tmp_path / "host", program="dockerd") as host:
        host.docker("pull", fleet.name("1"))
        driver = host.docker("info", "--format", "{{.Driver}}").stdout.strip()
        if driver != "overlay2":
            pytest.skip(f"dockerd has the driver {driver} here")
        host.stop()
        with running_engine(tmp_path / "device", "--delta-data-root", str(host.data_root)) as engine:
            done = create(engine, fleet, Mode="require")

            assert done.status == 200, done.body
            (told,) = [line["aux"]["Delta"] for line in done.lines if "aux" in line]
            assert told["Codec"] == "copy,native"
            assert engine.docker("run", "--rm", fleet.name("2")).stdout == "2\n"
            assert [one["Id"] for one in engine.request("GET", "/images/json").json] == [fleet.new.image_id]


def create(engine: EngineProcess, fleet: Fleet, **headers: str) -> Any:
    given = {f"X-Balena-Delta{name and '-' + name}": value for name, value in headers.items()}
    mode = given.pop("X-Balena-Delta-Mode", "")
    if mode:
        given["x-balena-delta"] = mode
    return engine.request("POST", f"/images/create?fromImage={fleet.name('2')}", headers=given)


def test_headers_are_checked_and_obeyed(engine: EngineProcess, fleet: Fleet) -> None:
    bad = create(engine, fleet, Mode="sometimes")
    assert (bad.status, bad.message) == (400, "X-Balena-Delta: 'sometimes' is none of auto, require, off")
    assert create(engine, fleet, **{"Max-Bytes": "many"}).status == 400

    none = create(engine, fleet, Mode="require")  # nothing is here to start from
    assert none.status == 404
    assert none.message.startswith(f"no applicable delta for {fleet.name('2')}: ")
    assert engine.request("GET", f"/images/{fleet.name('2')}/json").status == 404

    engine.docker("pull", fleet.name("1"))
    done = create(engine, fleet, Mode="require", Base=fleet.name("1"))
    assert done.status == 200
    assert done.lines[-1]["status"] == f"Status: Downloaded newer image for {fleet.name('2')}"
    assert [line["aux"]["Delta"]["Layers"] for line in done.lines if "aux" in line] == [1]
