"""Volumes as processes in containers see them: where they come from, what is in them, who may write, who keeps them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine_process import EngineProcess, Response
from tests.leftovers import claim

pytestmark = pytest.mark.root


@pytest.fixture
def engine(shared_engine: EngineProcess) -> Iterator[EngineProcess]:
    yield shared_engine
    shared_engine.remove_containers()
    for volume in shared_engine.request("GET", "/volumes").json["Volumes"]:
        assert shared_engine.request("DELETE", f"/volumes/{volume['Name']}").status == 204


def create(engine: EngineProcess, image: str, *command: str, **host: Any) -> Response:
    body = {
        "Image": image,
        "Entrypoint": [],
        "User": "root",
        "Cmd": list(command or ("sleep", "1000")),
        "HostConfig": {"NetworkMode": "none"} | host,
    }
    return engine.request("POST", "/v1.39/containers/create", body)


def started(engine: EngineProcess, image: str, *command: str, **host: Any) -> str:
    made = create(engine, image, *command, **host)
    assert made.status == 201, made.body
    answer = engine.request("POST", f"/containers/{made.json['Id']}/start")
    assert answer.status == 204, answer.body
    return str(made.json["Id"])


def says(engine: EngineProcess, image: str, script: str, **host: Any) -> list[str]:
    """What a container prints that runs a script to its end."""
    container = started(engine, image, "sh", "-c", script, **host)
    engine.request("POST", f"/containers/{container}/wait")
    lines = engine.docker("logs", container)
    return (lines.stdout + lines.stderr).splitlines()


def volume(engine: EngineProcess, name: str, **options: str) -> Path:
    """Its directory on the host."""
    answer = engine.request("POST", "/volumes/create", {"Name": name, "DriverOpts": options or None})
    assert answer.status == 201, answer.body
    return Path(answer.json["Mountpoint"])


def mounted_on(path: Path) -> bool:
    return any(line.split()[1] == str(path) for line in Path("/proc/self/mounts").read_text().splitlines())


# -- the local driver's options --


def test_a_tmpfs_is_mounted_while_somebody_uses_it(engine: EngineProcess, busybox: str) -> None:
    place = volume(engine, "ram", type="tmpfs", device="tmpfs", o="size=1m,uid=1234,mode=750")
    one = started(engine, busybox, Binds=["ram:/v"])
    shown = says(engine, busybox, "stat -c '%u %a' /v; grep ' /v ' /proc/mounts; touch /v/x", Binds=["ram:/v"])
    during = mounted_on(place), (place / "x").exists()
    engine.request("DELETE", f"/containers/{one}?force=1")

    assert shown[0] == "1234 750"
    assert "tmpfs" in shown[1] and "size=1024k" in shown[1]
    assert during == (True, True)
    assert not mounted_on(place)
    assert list(place.iterdir()) == []


def test_a_directory_of_the_host_is_a_volume(engine: EngineProcess, busybox: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("seed\n")
    place = volume(engine, "elsewhere", type="none", device=str(tmp_path), o="bind")
    shown = says(engine, busybox, "cat /v/there; echo new > /v/here", Binds=["elsewhere:/v"])

    assert shown == ["seed"]
    assert (tmp_path / "here").read_text() == "new\n"
    assert not mounted_on(place)


@pytest.mark.parametrize(
    ("options", "ours", "theirs"),
    [
        (
            {"type": "none", "device": "/no/such/place", "o": "bind"},
            "error while mounting volume with options: type='none' device='/no/such/place' o='bind': "
            "no such file or directory",
            "failed to mount local volume: mount /no/such/place:",
        ),
        (
            {"type": "nfs", "device": ":/export", "o": "addr=127.0.0.1,nolock,soft,retrans=1,timeo=1"},
            "error while mounting volume with options: type='nfs' device=':/export' o='addr=127.0.0.1,",
            "failed to mount local volume: mount :/export:",
        ),
    ],
)
def test_what_cannot_be_mounted_fails_the_start_and_leaves_nothing(
    engine: EngineProcess, busybox: str, options: dict[str, str], ours: str, theirs: str
) -> None:
    place = volume(engine, "broken", **options)
    container = create(engine, busybox, Binds=["broken:/v:nocopy"]).json["Id"]
    answer = engine.request("POST", f"/containers/{container}/start")

    assert answer.status == 500
    assert (theirs if engine.is_reference else ours) in answer.message
    assert not mounted_on(place)
    assert engine.inspect(container)["State"]["Status"] == "created"


def test_options_may_come_with_the_container(engine: EngineProcess, busybox: str) -> None:
    driver = {"Name": "local", "Options": {"type": "tmpfs", "device": "tmpfs", "o": "size=2m"}}
    mount = {
        "Type": "volume",
        "Source": "made",
        "Target": "/v",
        "VolumeOptions": {"Labels": {"a": "b"}, "DriverConfig": driver},
    }
    shown = says(engine, busybox, "grep ' /v ' /proc/mounts", Mounts=[mount])
    made = engine.request("GET", "/volumes/made").json

    assert "size=2048k" in shown[0]
    assert (made["Labels"], made["Options"]) == ({"a": "b"}, driver["Options"])


# -- what is in them --


def test_a_new_volume_is_filled_from_the_image_with_owners_and_modes(
    engine: EngineProcess, app: str, busybox: str
) -> None:
    script = "stat -c '%u:%g %a %n' /data /data/seed; cat /data/seed"
    filled = says(engine, app, script, Binds=["fresh:/data"])
    anonymous = says(engine, app, script)
    kept = says(engine, busybox, "ls /v; echo mine > /v/seed", Binds=["fresh:/v"])
    again = says(engine, app, "cat /data/seed", Binds=["fresh:/data"])

    assert filled == ["65534:65534 750 /data", "65534:65534 640 /data/seed", "from the image"]
    assert anonymous == filled
    assert (kept, again) == (["seed"], ["mine"])


def test_nothing_is_copied_where_nobody_wants_it(engine: EngineProcess, app: str, busybox: str, tmp_path: Path) -> None:
    mount = {"Type": "volume", "Source": "three", "Target": "/data", "VolumeOptions": {"NoCopy": True}}
    shown = [
        says(engine, app, "ls /data", Binds=["one:/data:nocopy"]),
        says(engine, app, "ls /data", Binds=[f"{tmp_path}:/data"]),
        says(engine, app, "ls /data", Mounts=[mount]),
    ]

    assert shown == [[], [], []]


# -- who may write --


def test_read_only_is_for_that_container_alone(engine: EngineProcess, busybox: str) -> None:
    mount = {"Type": "volume", "Source": "shared", "Target": "/m", "ReadOnly": True}
    refused = says(engine, busybox, "touch /v/x; touch /m/x", Binds=["shared:/v:ro"], Mounts=[mount])
    allowed = says(engine, busybox, "touch /v/x && echo done", Binds=["shared:/v"])

    assert [line.rpartition(": ")[2] for line in refused] == ["Read-only file system"] * 2
    assert allowed == ["done"]


def test_volumes_from_another_container_are_the_same_ones(engine: EngineProcess, app: str, busybox: str) -> None:
    donor = started(engine, app, "sleep", "1000")
    shown = says(engine, busybox, "cat /data/seed; touch /data/x", VolumesFrom=[f"{donor}:ro"])

    assert shown[0] == "from the image"
    assert "Read-only file system" in shown[1]


@contextlib.contextmanager
def shared_mount(path: Path) -> Iterator[Path]:
    """A tmpfs whose mounts are seen by others."""
    claim(str(path))
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], check=True)
    try:
        subprocess.run(["mount", "--make-shared", str(path)], check=True)
        yield path
    finally:
        subprocess.run(["umount", "-R", "-l", str(path)], check=True)


@pytest.mark.parametrize(
    ("mode", "inward", "outward"),
    [("rshared", True, True), ("rslave", True, False), ("rprivate", False, False)],
)
def test_mounts_propagate_as_far_as_is_asked_for(
    engine: EngineProcess, busybox: str, tmp_path: Path, mode: str, inward: bool, outward: bool
) -> None:
    with shared_mount(tmp_path / "top") as top:
        for name in ("in", "out"):
            (top / name).mkdir()
        container = started(engine, busybox, Binds=[f"{top}:/p:{mode}"], CapAdd=["SYS_ADMIN"], SecurityOpt=UNCONFINED)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(top / "in")], check=True)
        engine.docker("exec", container, "mount", "-t", "tmpfs", "tmpfs", "/p/out")
        seen_inside = " /p/in " in engine.docker("exec", container, "cat", "/proc/mounts").stdout
        seen_outside = mounted_on(top / "out")
        shown = engine.inspect(container)["Mounts"]
        engine.request("DELETE", f"/containers/{container}?force=1")

    assert (seen_inside, seen_outside) == (inward, outward)
    assert [(one["Type"], one["Propagation"]) for one in shown] == [("bind", mode)]


UNCONFINED = ["seccomp=unconfined", "apparmor=unconfined"] if os.path.exists("/sys/kernel/security/apparmor") else [
    "seccomp=unconfined"
]  # fmt: skip


def test_a_part_of_a_volume_is_refused(engine: EngineProcess, busybox: str) -> None:
    """API 1.45 has it; of 1.39 it would mount the whole volume in its place."""
    mount = {"Type": "volume", "Source": "whole", "Target": "/v", "VolumeOptions": {"Subpath": "a"}}
    answer = create(engine, busybox, Mounts=[mount])

    if engine.is_reference:
        assert answer.status == 201
    else:
        assert answer.status == 400
        assert answer.message.endswith("VolumeOptions.Subpath needs API v1.45 or newer")
        assert engine.request("GET", "/volumes/whole").status == 404


# -- who keeps them --


def test_a_volume_is_in_use_until_its_last_container_is_removed(engine: EngineProcess, busybox: str) -> None:
    ids = [create(engine, busybox, Binds=["kept:/v"]).json["Id"] for _ in range(2)]
    first = engine.request("DELETE", "/volumes/kept")
    engine.request("DELETE", f"/containers/{ids[0]}?v=1")
    second = engine.request("DELETE", "/volumes/kept?force=1")
    engine.request("DELETE", f"/containers/{ids[1]}?v=1")
    last = engine.request("GET", "/volumes/kept").status, engine.request("DELETE", "/volumes/kept").status

    assert first.status == 409
    assert first.message.startswith("remove kept: volume is in use - [")
    assert set(first.message.partition("[")[2].rstrip("]").split(", ")) == set(ids)
    assert (second.status, second.message) == (409, f"remove kept: volume is in use - [{ids[1]}]")
    assert last == (200, 204)  # `rm -v` takes those that nobody gave a name


def test_anonymous_volumes_go_with_their_container_on_request_only(engine: EngineProcess, app: str) -> None:
    def volumes() -> list[str]:
        return [one["Name"] for one in engine.request("GET", "/volumes").json["Volumes"]]

    taken = create(engine, app).json["Id"]
    (name,) = volumes()
    engine.request("DELETE", f"/containers/{taken}?v=1")
    after_taken = volumes()
    left = create(engine, app).json["Id"]
    engine.request("DELETE", f"/containers/{left}")

    assert len(name) == 64
    assert after_taken == []
    assert len(volumes()) == 1
