"""Options of create and update that other tests do not meet: their effect in the kernel, or why they are refused."""

from __future__ import annotations

import json
import re
import time
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from tests.engine_process import EngineProcess, Response
from tests.leftovers import CGROUP_ROOT

pytestmark = pytest.mark.root

MEGABYTE = 1 << 20


class Options:
    def __init__(self, engine: EngineProcess, image: str) -> None:
        self.engine = engine
        self.image = image

    def create(self, *command: str, name: str = "", host: Any = None, **config: Any) -> Response:
        body = {"Image": self.image, "Cmd": list(command or ("sleep", "1000")), **config}
        body["HostConfig"] = {"NetworkMode": "none"} | (host or {})
        return self.engine.request("POST", f"/v1.39/containers/create?name={name}", body)

    def made(self, *command: str, name: str = "", host: Any = None, **config: Any) -> str:
        answer = self.create(*command, name=name, host=host, **config)
        assert answer.status == 201, answer.body
        return str(answer.json["Id"])

    def post(self, container: str, call: str, body: Any = None) -> Response:
        return self.engine.request("POST", f"/v1.39/containers/{container}/{call}", body)

    def started(self, *command: str, host: Any = None, **config: Any) -> str:
        container = self.made(*command, host=host, **config)
        answer = self.post(container, "start")
        assert answer.status == 204, answer.body
        return container

    def output(self, *command: str, host: Any = None, **config: Any) -> str:
        container = self.started(*command, host=host, Tty=True, **config)
        self.post(container, "wait")
        logs = self.engine.request("GET", f"/v1.39/containers/{container}/logs?stdout=1")
        return logs.body.decode().replace("\r\n", "\n").strip()

    def refused_start(self, host: Any = None, **config: Any) -> tuple[int, str]:
        answer = self.post(self.made(host=host, **config), "start")
        return answer.status, re.sub("[0-9a-f]{64}", "ID", answer.message)

    def host_config(self, container: str) -> Any:
        return self.engine.inspect(container)["HostConfig"]


@pytest.fixture
def options(engine: EngineProcess, busybox: str) -> Options:
    return Options(engine, busybox)


def cgroup(options: Options, container: str, controller: str, v1: str, v2: str = "") -> str:
    parent = options.engine.cgroup_parent.lstrip("/")
    for path in (CGROUP_ROOT / controller / parent / container / v1, CGROUP_ROOT / parent / container / (v2 or v1)):
        if path.exists():
            return path.read_text().strip()
    raise AssertionError(f"no {controller}/{v1} of {container}")


# -- balena's own --


def test_the_container_knows_its_id_if_asked_to(options: Options) -> None:
    if options.engine.is_reference:
        pytest.skip("balena's own")
    script = 'test "$MY_ID" && sleep 1000'
    container = options.started("sh", "-c", script, host={"ContainerIDEnv": "MY_ID"}, Env=["A=1"])

    config = options.engine.inspect(container)["Config"]
    assert f"MY_ID={container}" in config["Env"]
    assert options.host_config(container)["ContainerIDEnv"] == "MY_ID"
    assert options.engine.inspect(container)["State"]["Running"]
    taken = options.create(host={"ContainerIDEnv": "MY_ID"}, Env=["MY_IDENTITY=1"])  # anything that begins so
    assert (taken.status, taken.message) == (409, "Error environment variable MY_ID already defined")


def test_a_bare_container_has_nothing_of_ours_in_it(options: Options) -> None:
    if options.engine.is_reference:
        pytest.skip("balena's own")
    bare = options.made(name="bare-one", host={"Runtime": "bare"})
    plain = options.made()

    def has(container: str, path: str) -> bool:
        query = urllib.parse.quote(path, safe="")
        return options.engine.request("HEAD", f"/v1.39/containers/{container}/archive?path={query}").status == 200

    assert options.host_config(bare)["Runtime"] == "bare"
    assert (has(bare, "/.dockerenv"), has(plain, "/.dockerenv")) == (False, True)
    info = options.engine.request("GET", "/v1.39/info").json
    assert info["Runtimes"]["bare"] == {"path": ""}


def test_fields_of_newer_clients_are_ignored(options: Options) -> None:
    if options.engine.is_reference:
        pytest.skip("20.10 knows some of them")
    host = {
        "DeviceRequests": [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}], "CgroupnsMode": "host",
        "Annotations": {"a": "b"}, "UsernsMode": "", "Init": True, "CgroupParent": "", "Zz": {"x": [1]},
    }  # fmt: skip
    container = options.started(host=host, StopTimeout=3, MacAddress="02:42:00:00:00:09", Zz=1)

    assert options.engine.inspect(container)["Config"]["StopTimeout"] == 3
    assert not {"DeviceRequests", "CgroupnsMode", "Zz"} & set(options.host_config(container))


# -- confinement and resources --


@pytest.mark.parametrize("names", [("NET_ADMIN", "CHOWN"), ("CAP_NET_ADMIN", "CAP_CHOWN"), ("cap_net_admin", "chown")])
def test_capabilities_are_named_with_and_without_their_prefix(options: Options, names: tuple[str, str]) -> None:
    add, drop = names
    host = {"CapAdd": [add], "CapDrop": [drop]}

    bounding = int(options.output("sh", "-c", "grep CapBnd /proc/self/status | cut -f2", host=host), 16)

    assert bounding >> 12 & 1 == 1
    assert bounding & 1 == 0
    assert bounding >> 1 & 1 == 1


def test_unknown_capabilities_are_refused_at_start(options: Options) -> None:
    if options.engine.is_reference:
        pytest.skip("20.10 refuses them at create")
    assert options.refused_start(host={"CapAdd": ["zz"]}) == (
        500, 'linux spec capabilities: Unknown capability to add: "CAP_ZZ"',
    )  # fmt: skip


@pytest.mark.parametrize(("rule", "refused"), [
    ("c 10:237 rm", False), ("a *:* rwm", False), ("b 8:* r", False),
    ("x 1:1 r", True), ("c 1 r", True), ("", True), ("b 8:* rwmx", True),
])  # fmt: skip
def test_device_cgroup_rules(options: Options, rule: str, refused: bool) -> None:
    container = options.made(host={"DeviceCgroupRules": [rule]})
    answer = options.post(container, "start")

    if refused:
        assert (answer.status, answer.message) == (500, f"invalid device cgroup rule format: '{rule}'")
    else:
        assert answer.status == 204


def test_storage_options_are_refused(options: Options) -> None:
    size = options.create(host={"StorageOpt": {"size": "1G"}})
    other = options.create(host={"StorageOpt": {"zz": "1"}})

    needs = "--storage-opt is supported only for overlay over xfs with 'pquota' mount option"
    assert (size.status, size.message) == (500, needs)
    assert (other.status, other.message) == (500, "Unknown option zz")


def test_a_cgroup_parent_of_its_own(options: Options) -> None:
    parent = options.engine.cgroup_parent + "/below"
    container = options.started(host={"CgroupParent": parent})
    pid = options.engine.inspect(container)["State"]["Pid"]

    paths = {line.rpartition(":")[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()}
    options.engine.request("DELETE", f"/v1.39/containers/{container}?force=1")
    for place in [CGROUP_ROOT / parent.lstrip("/"), *CGROUP_ROOT.glob(f"*{parent}")]:
        if place.exists():
            place.rmdir()  # the runtime made it, and nobody removes it

    assert f"{parent}/{container}" in paths


def test_the_oom_killer_is_kept_away_if_asked(options: Options) -> None:
    limited = options.create(host={"OomKillDisable": True, "Memory": 64 * MEGABYTE})
    unlimited = options.create(host={"OomKillDisable": True})
    container = limited.json["Id"]
    assert options.post(container, "start").status == 204

    assert not limited.json["Warnings"]
    assert unlimited.json["Warnings"] == [
        "OOM killer is disabled for the container, but no memory limit is set, this can result in the system running "
        "out of resources."
    ]
    if (CGROUP_ROOT / "memory").exists():  # version 2 cannot
        assert "oom_kill_disable 1" in cgroup(options, container, "memory", "memory.oom_control")


@pytest.mark.parametrize(
    ("mode", "status", "message"),
    [
        ({"NetworkMode": "container:{stopped}"}, 409, "cannot join network of a non running container: ID"),
        ({"NetworkMode": "container:nobody"}, 404, "No such container: nobody"),
        ({"PidMode": "container:{stopped}"}, 409, "container ID is not running"),
        ({"IpcMode": "container:{stopped}"}, 409, "can't join IPC of container ID: container ID is not running"),
        ({"IpcMode": "container:{private}"}, 500, "can't join IPC of container ID: non-shareable IPC"),
        ({"IpcMode": "zz"}, 500, "invalid IPC mode: zz"),
    ],
)
def test_what_cannot_be_joined(options: Options, mode: dict[str, str], status: int, message: str) -> None:
    if options.engine.is_reference:
        pytest.skip("20.10 classifies some of them otherwise")
    stopped, private = options.made(), options.started(host={"IpcMode": "private"})
    host = {key: value.format(stopped=stopped, private=private) for key, value in mode.items()}

    assert options.refused_start(host=host) == (status, message)


# -- update --

UPDATES: list[tuple[dict[str, Any], str, str, str, tuple[str, ...]]] = [
    ({"CpuShares": 512}, "cpu", "cpu.shares", "cpu.weight", ("512", "20")),
    ({"Memory": 64 * MEGABYTE, "MemorySwap": 128 * MEGABYTE}, "memory", "memory.limit_in_bytes", "memory.max",
     (str(64 * MEGABYTE),)),
    ({"MemoryReservation": 32 * MEGABYTE}, "memory", "memory.soft_limit_in_bytes", "memory.low",
     (str(32 * MEGABYTE),)),
    ({"CpuPeriod": 50000, "CpuQuota": 25000}, "cpu", "cpu.cfs_quota_us", "cpu.max", ("25000", "25000 50000")),
    ({"CpusetCpus": "0"}, "cpuset", "cpuset.cpus", "cpuset.cpus", ("0",)),
    ({"CpusetMems": "0"}, "cpuset", "cpuset.mems", "cpuset.mems", ("0",)),
]  # fmt: skip


def test_update_of_every_field_is_kept_and_takes_effect_at_once(options: Options) -> None:
    container, stopped = options.started(), options.made()
    for changes, controller, v1, v2, expected in UPDATES:
        for one in (container, stopped):
            answer = options.post(one, "update", changes)
            assert (answer.status, answer.json) == (200, {"Warnings": None}), answer.body
            shown = options.host_config(one)
            assert {key: shown[key] for key in changes} == changes
        assert cgroup(options, container, controller, v1, v2) in expected, changes
    assert options.post(stopped, "start").status == 204
    for _, controller, v1, v2, expected in UPDATES:
        assert cgroup(options, stopped, controller, v1, v2) in expected
    policy = {"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3}}
    assert options.post(container, "update", policy).status == 200
    assert options.host_config(container)["RestartPolicy"] == policy["RestartPolicy"]
    assert options.post(container, "update", {}).status == 200
    assert options.host_config(container)["CpuShares"] == 512  # zero means unchanged


@pytest.mark.parametrize(
    ("host", "changes", "message"),
    [
        ({}, {"Memory": 64 * MEGABYTE}, "Memory limit should be smaller than already set memoryswap limit, update the "
         "memoryswap at the same time"),
        ({"NanoCpus": 500_000_000}, {"CpuQuota": 20000},
         "Conflicting options: CPU Quota cannot be updated as NanoCPUs has already been set"),
        ({"NanoCpus": 500_000_000}, {"CpuPeriod": 20000},
         "Conflicting options: CPU Period cannot be updated as NanoCPUs has already been set"),
        ({"CpuQuota": 20000}, {"NanoCpus": 500_000_000},
         "Conflicting options: Nano CPUs cannot be updated as CPU Quota has already been set"),
        ({"AutoRemove": True}, {"RestartPolicy": {"Name": "always"}},
         "Restart policy cannot be updated because AutoRemove is enabled for the container"),
    ],
)  # fmt: skip
def test_updates_that_contradict_what_is_set(options: Options, host: Any, changes: Any, message: str) -> None:
    container = options.made(host=host)
    before = options.host_config(container)

    answer = options.post(container, "update", changes)

    assert (answer.status, answer.message) == (409, f"Cannot update container {container}: {message}")
    assert options.host_config(container) == before


# -- sizes and prune --


def test_sizes_are_what_was_written(options: Options) -> None:
    container = options.started("sh", "-c", "dd if=/dev/zero of=/big bs=1M count=3; sleep 1000")
    path = f"/v1.39/containers/{container}/json?size=1"
    deadline = time.monotonic() + 30
    while (written := options.engine.request("GET", path).json["SizeRw"]) < 3 * MEGABYTE:
        assert time.monotonic() < deadline, written
        time.sleep(0.1)

    sized = options.engine.request("GET", path).json
    (listed,) = options.engine.request("GET", "/v1.39/containers/json?size=1").json
    assert 3 * MEGABYTE <= sized["SizeRw"] < 3 * MEGABYTE + 10_000
    assert sized["SizeRootFs"] - sized["SizeRw"] > MEGABYTE
    assert (listed["SizeRw"], listed["SizeRootFs"]) == (sized["SizeRw"], sized["SizeRootFs"])


def test_prune_removes_what_its_filters_choose(options: Options) -> None:
    def prune(**filters: list[str]) -> set[str]:
        query = urllib.parse.quote(json.dumps({key.replace("_not", "!"): value for key, value in filters.items()}))
        answer = options.engine.request("POST", f"/v1.39/containers/prune?filters={query}")
        assert answer.status == 200, answer.body
        return set(answer.json["ContainersDeleted"] or ())

    keep = options.made(Labels={"keep": "yes", "all": "1"})
    drop = options.made(Labels={"keep": "no", "all": "1"})
    plain = options.made(Labels={"all": "1"})
    running, paused = options.started(Labels={"all": "1"}), options.started(Labels={"all": "1"})
    options.post(paused, "pause")

    assert prune(until=["1h"], label=["all"]) == set()
    assert prune(until=["2001-01-01T00:00:00Z"], label=["all"]) == set()
    assert prune(label=["keep=zz"]) == set()
    assert prune(label=["all", "keep=no"]) == {drop}
    assert prune(label_not=["keep"], label=["all"]) == {plain}
    assert prune(until=["0s"], label=["all"]) == {keep}
    names = {entry["Id"] for entry in options.engine.request("GET", "/v1.39/containers/json?all=1").json}
    assert {running, paused} == names
    twice = urllib.parse.quote(json.dumps({"until": ["1h", "2h"]}))
    answer = options.engine.request("POST", f"/v1.39/containers/prune?filters={twice}")
    assert (answer.status, answer.message) == (500, "more than one until filter specified")
