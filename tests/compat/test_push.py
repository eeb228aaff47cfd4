"""docker push, by the CLI and docker-py; what arrives is what skopeo and another engine read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.compat.test_archives import image_id, skopeo
from tests.engine_process import EngineProcess, running_engine

pytestmark = pytest.mark.root


def test_the_cli_pushes_and_others_read_the_same_image(
    engine: EngineProcess, docker_cli: str, busybox: str, registry: str, tmp_path: Path
) -> None:
    name = f"{registry}/pushed/app:1"
    engine.docker("run", "--name", "pushed", busybox, "sh", "-c", "echo 1 > /new; rm /etc/group")
    engine.docker("commit", "pushed", name)
    first = engine.docker("push", name).stdout.splitlines()
    again = engine.docker("push", name).stdout.splitlines()
    wanted = image_id(engine, name)
    diff_ids = engine.request("GET", f"/v1.39/images/{name}/json").json["RootFS"]["Layers"]
    seen = json.loads(skopeo("inspect", "--tls-verify=false", "--config", "--raw", f"docker://{name}"))
    with running_engine(tmp_path / "other") as other:
        other.docker("pull", name)
        pulled = image_id(other, name)
        output = other.docker("run", "--rm", name, "sh", "-c", "cat /new; ls /etc/group || echo gone").stdout

    assert first[0] == f"The push refers to repository [{registry}/pushed/app]"
    assert first[-1].startswith("1: digest: sha256:")
    assert sum(line.endswith(": Pushed") for line in first) == 1
    assert sum(": Mounted from " in line for line in first) == len(diff_ids) - 1
    assert sum(line.endswith(": Layer already exists") for line in again) == len(diff_ids)
    assert again[-1] == first[-1]
    assert seen["rootfs"]["diff_ids"] == diff_ids
    assert pulled == wanted
    assert output == "1\ngone\n"
    engine.docker("rm", "pushed")
    engine.docker("rmi", "-f", name)


def test_docker_py_pushes(engine: EngineProcess, busybox: str, registry: str) -> None:
    client = engine.client()
    client.images.get(busybox).tag(f"{registry}/pushed/py", "1")
    lines = list(client.images.push(f"{registry}/pushed/py", tag="1", stream=True, decode=True))
    missing = list(client.images.push(f"{registry}/pushed/none", tag="1", stream=True, decode=True))

    assert lines[-1]["aux"]["Tag"] == "1"
    assert missing[-1]["error"] == f"An image does not exist locally with the tag: {registry}/pushed/none"
    client.images.remove(f"{registry}/pushed/py:1")
