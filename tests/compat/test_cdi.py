"""`--device vendor/class=name`: what a vendor's file says is in the container, and what it misses stops the start."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_process import EngineProcess, running_engine

pytestmark = pytest.mark.root

CDI_YAML = """---
cdiVersion: 0.5.0
kind: example.com/gpu
containerEdits:
  env:
  - FROM_CDI=yes
  mounts:
  - containerPath: /usr/lib/vendor.so
    hostPath: {library}
    options: [] # the default ones
devices:
- name: all
  containerEdits:
    deviceNodes:
    - path: /dev/fake-gpu
      hostPath: /dev/zero
- name: broken
  containerEdits:
    deviceNodes:
    - path: /dev/not-there
"""


@pytest.fixture(scope="module")
def engine_with_cdi(tmp_path_factory: pytest.TempPathFactory, busybox: str) -> Iterator[EngineProcess]:
    directory = tmp_path_factory.mktemp("cdi")
    (directory / "cdi").mkdir()
    library = directory / "vendor.so"
    library.write_text("a library\n")
    (directory / "cdi" / "gpu.yaml").write_text(CDI_YAML.replace("{library}", str(library)))
    registry = busybox.partition("/")[0]
    flags = ["--cdi-spec-dir", str(directory / "cdi"), "--insecure-registry", registry]
    with running_engine(directory / "engine", *flags) as engine:
        engine.client().images.pull(busybox)
        yield engine


def run(engine: EngineProcess, image: str, host_config: dict[str, object]) -> tuple[int, str]:
    script = "echo $FROM_CDI; cat /usr/lib/vendor.so; stat -c '%t:%T' /dev/fake-gpu; head -c 4 /dev/fake-gpu | wc -c; "
    script += "echo x > /usr/lib/vendor.so || echo read-only"
    body = {"Image": image, "Cmd": ["sh", "-c", script], "HostConfig": {"NetworkMode": "none", **host_config}}
    identifier = engine.request("POST", "/containers/create", body).json["Id"]
    started = engine.request("POST", f"/containers/{identifier}/start")
    if started.status != 204:
        engine.client().containers.get(identifier).remove()
        return started.status, started.message
    container = engine.client().containers.get(identifier)
    code = container.wait()["StatusCode"]
    output = container.logs(stderr=False).decode()
    container.remove()
    return code, output


@pytest.mark.parametrize(
    "asked",
    [
        {"Devices": [{"PathOnHost": "example.com/gpu=all", "CgroupPermissions": "rwm"}]},
        {"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["example.com/gpu=all"]}]},
    ],
    ids=["Devices", "DeviceRequests"],
)  # fmt: skip
def test_the_vendors_device_library_and_environment_are_inside(
    engine_with_cdi: EngineProcess, busybox: str, asked: dict[str, object]
) -> None:
    code, output = run(engine_with_cdi, busybox, asked)
    zero = os.stat("/dev/zero")

    assert stat.S_ISCHR(zero.st_mode)
    assert code == 0
    numbers = f"{os.major(zero.st_rdev):x}:{os.minor(zero.st_rdev):x}"
    assert output.splitlines() == ["yes", "a library", numbers, "4", "read-only"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("example.com/gpu=7", "unresolvable CDI devices example.com/gpu=7"),
        ("example.com/gpu=broken", "/dev/not-there: no such file or directory"),
    ],
)
def test_a_device_that_is_missing_stops_the_start(
    engine_with_cdi: EngineProcess, busybox: str, name: str, message: str
) -> None:
    status, text = run(engine_with_cdi, busybox, {"Devices": [{"PathOnHost": name}]})

    assert status == 500
    assert message in text
    assert not list(Path(engine_with_cdi.data_root / "containers").iterdir())
