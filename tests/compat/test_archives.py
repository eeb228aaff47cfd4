"""docker save and load, by the CLI, docker-py and skopeo."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.compat import images
from tests.engine_process import EngineProcess, wait_until

pytestmark = pytest.mark.root

SKOPEO = shutil.which("skopeo")


def skopeo(*arguments: str) -> str:
    """Run skopeo; tests of it are skipped where there is none."""
    if SKOPEO is None:
        pytest.skip("no skopeo on this machine")
    done = subprocess.run(
        [SKOPEO, "--insecure-policy", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def image_id(engine: EngineProcess, name: str) -> str:
    answer = engine.request("GET", f"/v1.39/images/{name}/json")
    assert answer.status == 200, answer.body
    return str(answer.json["Id"])


def test_the_cli_saves_and_loads(engine: EngineProcess, docker_cli: str, busybox: str, tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    engine.docker("tag", busybox, "saved:1")
    engine.docker("save", "-o", str(file), "saved:1")
    engine.docker("rmi", "saved:1")
    loaded = engine.docker("load", "-i", str(file)).stdout
    packed = subprocess.run(["gzip", "-c", str(file)], capture_output=True, check=True).stdout
    again = engine.docker("load", input=packed).stdout

    assert loaded == "Loaded image: saved:1\n"
    assert again == "Loaded image: saved:1\n"
    assert engine.docker("run", "--rm", "saved:1", "echo", "works").stdout == "works\n"
    engine.docker("rmi", "saved:1")


def test_docker_py_saves_and_loads(engine: EngineProcess, busybox: str) -> None:
    client = engine.client()
    image = client.images.get(busybox)
    data = b"".join(image.save(named=True))
    loaded = client.images.load(data)

    assert [each.id for each in loaded] == [image.id]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.extractfile("manifest.json")
        assert member is not None
        assert json.load(member)[0]["RepoTags"] == [busybox]


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_skopeo_reads_ours_and_we_read_skopeos(engine: EngineProcess, busybox: str, tmp_path: Path, form: str) -> None:
    if engine.is_reference and form == "oci-archive":
        pytest.skip("it does not read such layouts")
    wanted = image_id(engine, busybox)
    ours, theirs = tmp_path / "ours.tar", tmp_path / "theirs.tar"
    ours.write_bytes(engine.request("GET", f"/v1.39/images/get?names={busybox}").body)
    name = "docker.io/library/skopeo:1"
    suffix = f":{name}" if form == "docker-archive" else ":skopeo:1"
    skopeo("copy", f"docker-archive:{ours}", f"{form}:{theirs}{suffix}")
    answer = engine.request("POST", "/v1.39/images/load", theirs.read_bytes())

    seen = json.loads(skopeo("inspect", "--config", "--raw", f"docker-archive:{ours}"))
    config = engine.request("GET", f"/v1.39/images/{wanted}/json").json
    assert seen["rootfs"]["diff_ids"] == config["RootFS"]["Layers"]
    if form == "docker-archive":
        assert answer.lines == [{"stream": "Loaded image: skopeo:1\n"}]
        assert image_id(engine, "skopeo:1") == wanted
        engine.docker("rmi", "skopeo:1")
    else:
        # Its layout names images by a bare tag; the config is written anew, the layers are the same.
        assert "error" not in answer.lines[-1], answer.lines


def test_refusals(engine: EngineProcess) -> None:
    def refusal(path: str) -> tuple[int, str]:
        answer = engine.request("GET", f"/v1.39/images/{path}")
        return answer.status, answer.message

    assert refusal("nope-x/get") == (404, "No such image: nope-x")
    assert refusal("nope:1/get") == (404, "reference does not exist")
    assert refusal("get?names=nope&names=nope:1") == (404, "No such image: nope")
    assert refusal("BAD/get") == (500, "invalid reference format: repository name must be lowercase")
    answer = engine.request("POST", "/v1.39/images/load", b"not a tar" * 100)
    assert answer.status == 200
    assert set(answer.lines[-1]) == {"errorDetail", "error"}


def test_a_load_that_is_cut_leaves_nothing(engine: EngineProcess, busybox: str) -> None:
    before, others = state(engine), unfinished(engine)
    data = engine.request("GET", f"/v1.39/images/get?names={busybox}").body
    client = engine.raw_connection()
    client.sendall(f"POST /images/load HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode())
    client.sendall(data[: len(data) // 2])
    wait_until(lambda: engine.is_reference or unfinished(engine) - others, what="the layer is being unpacked")
    client.shutdown(socket.SHUT_RDWR)
    client.close()
    wait_until(lambda: engine.is_reference or not unfinished(engine) - others, what="nothing is left")

    assert state(engine) == before


def state(engine: EngineProcess) -> Any:
    return engine.request("GET", "/v1.39/images/json?all=1").json


def unfinished(engine: EngineProcess) -> set[str]:
    """Snapshot directories without a layer's sidecar."""
    root = engine.data_root / "snapshots"
    return {
        path.name for path in root.iterdir() if not (path / "layer.json").exists() and not (path / "work").exists()
    }


def test_a_save_the_client_leaves_ends(engine: EngineProcess, registry: str) -> None:
    layer = images.Layer(images.make_tar([images.file("big", bytes(30 << 20))]))
    images.push(registry, "big", "1", images.Image((layer,)))
    name = f"{registry}/big:1"
    engine.docker("pull", name)
    client = engine.raw_connection()
    client.sendall(f"GET /images/get?names={name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert client.recv(10) == b"HTTP/1.1 2"
    client.close()
    data = engine.request("GET", f"/v1.39/images/{name}/get").body

    assert len(data) > 30 << 20
    engine.docker("rmi", name)
