"""Every row of the API's table for system, containers and exec: its success and each of its errors.

A row is one request with what it must be answered: status, message, and whatever `shapes` knows of the answer (headers,
the description's types, recorded answers). The world they are asked in is made once: a container in every state.
"""

from __future__ import annotations

import json
import re
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.compat import shapes
from tests.engine_process import EngineProcess, Response, wait_until

pytestmark = pytest.mark.root

NOBODY = "No such container: nobody"
LABELS = {"row": "yes", "com.example.x": "1"}


@dataclass
class World:
    engine: EngineProcess
    image: str
    ids: dict[str, str] = field(default_factory=dict)  # state -> container
    execs: dict[str, str] = field(default_factory=dict)

    def fill(self, text: str) -> str:
        for name, value in {**self.ids, **self.execs, "image": urllib.parse.quote(self.image)}.items():
            text = text.replace(f"<{name}>", value)
        return text

    def create(self, name: str, *command: str, **host: Any) -> str:
        body = {
            "Image": self.image,
            "Cmd": list(command or ("sleep", "1000")),
            "Labels": LABELS,
            "HostConfig": {"NetworkMode": "none"} | host,
        }
        answer = self.engine.request("POST", f"/v1.39/containers/create?name=row-{name}", body)
        assert answer.status == 201, answer.body
        self.ids[name] = answer.json["Id"]
        return str(answer.json["Id"])

    def call(self, name: str, call: str) -> None:
        assert self.engine.request("POST", f"/v1.39/containers/{self.ids[name]}/{call}").status == 204

    def exec(self, name: str, container: str, *command: str, start: bool, **config: Any) -> None:
        body = {"Cmd": list(command), "AttachStdout": True} | config
        answer = self.engine.request("POST", f"/v1.39/containers/{self.ids[container]}/exec", body)
        assert answer.status == 201, answer.body
        self.execs[name] = answer.json["Id"]
        if start:
            started = self.engine.request("POST", f"/v1.39/exec/{answer.json['Id']}/start", {"Detach": True})
            assert started.status == 200


@pytest.fixture(scope="module")
def world(shared_engine: EngineProcess, busybox: str) -> Iterator[World]:
    made = World(shared_engine, busybox)
    for state in ("created", "running", "paused", "exited"):
        made.create(state)
        if state != "created":
            made.call(state, "start")
    made.create("network", NetworkMode="default")
    made.call("network", "start")
    made.call("paused", "pause")
    made.call("exited", "kill")
    made.create("restarting", "false", RestartPolicy={"Name": "always"})
    made.call("restarting", "start")
    made.exec("exec-created", "running", "true", start=False)
    made.exec("exec-running", "running", "sleep", "1000", start=True)
    made.exec("exec-exited", "running", "true", start=True)
    wait_until(lambda: ask(made, "GET", "/exec/<exec-exited>/json").json["ExitCode"] == 0)
    yield made
    shared_engine.close_clients()
    shared_engine.remove_containers()


def ask(world: World, method: str, target: str, body: Any = None, **headers: str) -> Response:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return world.engine.request(method, "/v1.39" + world.fill(target), body, headers=fields)


@dataclass(frozen=True)
class Row:
    method: str
    path: str  # as the description has it
    target: str
    status: int
    message: str = ""  # a pattern the whole of it must match
    body: Any = None
    reference: tuple[int, str] | None = None  # where dockerd 20.10 differs, and BEHAVIOUR gives what 18.09 says
    headers: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.method} {self.target} {self.status} {self.message}"[:90]


def row(method: str, path: str, target: str, status: int, message: str = "", body: Any = None, **more: Any) -> Row:
    return Row(method, path, target, status, message, body, **more)


def check(world: World, one: Row) -> Response:
    answer = ask(world, one.method, one.target, one.body, **dict(one.headers))
    status, message = one.status, one.message
    if world.engine.is_reference and one.reference is not None:
        status, message = one.reference
    assert answer.status == status, answer.body
    if message:
        assert re.fullmatch(world.fill(message), answer.message, re.DOTALL), answer.message
    if not world.engine.is_reference:
        assert shapes.problems(one.method, one.path, answer, statuses={one.status}) == []
    return answer


# -- before a route is found --


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/nope"), ("GET", "/v1.39/nope"), ("GET", "/v9.99/nope"), ("POST", "/v1.39/info"), ("DELETE", "/_ping"),
        ("GET", "/v1.39/info/"), ("GET", "/v1.39/containers/create"), ("PUT", "/v1.39/containers/json"),
        ("HEAD", "/v1.39/info"), ("GET", "/containers/x/checkpoints"), ("POST", "/v1.39/containers/x/checkpoints"),
        ("GET", "/v1.39/swarm"), ("POST", "/v1.39/swarm/init"), ("GET", "/v1.39/plugins"), ("GET", "/v1.39/nodes"),
        ("GET", "/v1.39/services"), ("GET", "/v1.39/tasks"), ("GET", "/v1.39/secrets"), ("GET", "/v1.39/configs"),
    ],
)  # fmt: skip
def test_what_is_no_route_is_not_found(world: World, method: str, target: str) -> None:
    stock = "swarm|plugins|nodes|services|tasks|secrets|configs|checkpoints"
    if world.engine.is_reference and re.search(stock, target):
        pytest.skip("a stock daemon has it")
    answer = world.engine.request(method, target)

    assert answer.status == 404
    if method != "HEAD":
        assert answer.body == b'{"message":"page not found"}\n'
    assert answer.headers["content-type"] == "application/json"
    assert not {"server", "api-version", "ostype", "docker-experimental"} & set(answer.headers)


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("/containers//json?all=1", "/containers/json?all=1"),
        ("/v1.39/./info", "/v1.39/info"),
        ("/v1.39/x/../info", "/v1.39/info"),
    ],
)
def test_paths_that_are_not_clean_are_redirected(world: World, target: str, location: str) -> None:
    answer = world.engine.request("GET", target)

    assert (answer.status, answer.headers["location"]) == (301, location)


def test_options_are_answered_everywhere(world: World) -> None:
    for target in ("/v1.39/info", "/anything", "/v1.39/containers/x/start"):
        answer = world.engine.request("OPTIONS", target)
        assert (answer.status, answer.body) == (200, b"")
        assert "api-version" in answer.headers


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.40", "client version 1.40 is too new. Maximum supported API version is 1.39"),
        ("1.39.1", "client version 1.39.1 is too new. Maximum supported API version is 1.39"),
        ("99", "client version 99 is too new. Maximum supported API version is 1.39"),
    ],
)
def test_versions_too_new_are_refused(world: World, version: str, message: str) -> None:
    if world.engine.is_reference:
        pytest.skip("it speaks 1.41")
    answer = world.engine.request("GET", f"/v{version}/info")

    assert (answer.status, answer.message) == (400, message)
    assert answer.headers["api-version"] == "1.39"
    assert "docker-experimental" not in answer.headers


@pytest.mark.parametrize("version", ["1.11", "1", "0.5"])
def test_versions_too_old_are_refused_in_plain_text(world: World, version: str) -> None:
    answer = world.engine.request("GET", f"/v{version}/info")

    expected = f"client version {version} is too old. Minimum supported API version is 1.12, please upgrade your client"
    assert answer.status == 400
    assert answer.body.decode() == expected + " to a newer version\n"
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_every_version_between_is_served(world: World) -> None:
    for version in ("1.12", "1.24", "1.39", "1.39.0"):
        assert world.engine.request("GET", f"/v{version}/_ping").status == 200


# -- system --


def test_ping(world: World) -> None:
    for method in ("GET", "HEAD"):
        answer = ask(world, method, "/_ping")
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.body == (b"OK" if method == "GET" else b"")
    if not world.engine.is_reference:
        heads = shapes.recorded("http_heads.json")["ping"]
        names = {line.partition(":")[0].lower() for line in heads[1:]}
        # The newer daemon forbids caching.
        assert names - {"cache-control", "pragma"} <= set(ask(world, "GET", "/_ping").headers)


def test_version_is_as_recorded(world: World) -> None:
    if world.engine.is_reference:
        pytest.skip("recorded from it")
    answer = ask(world, "GET", "/version")

    assert shapes.problems("GET", "/version", answer) == []
    assert shapes.differences(answer.json, "version.json", {"Engine": "balena's own key"}) == []
    assert answer.json["Engine"] == "balena-engine"
    assert (answer.json["ApiVersion"], answer.json["MinAPIVersion"]) == ("1.39", "1.12")
    assert [component["Name"] for component in answer.json["Components"]] == ["Engine"]


def test_info_is_as_recorded(world: World) -> None:
    if world.engine.is_reference:
        pytest.skip("recorded from it")
    answer = ask(world, "GET", "/info")

    assert shapes.problems("GET", "/info", answer) == []
    listed = {
        "SystemStatus": "18.09 has it", "ClusterStore": "18.09 has it", "ClusterAdvertise": "18.09 has it",
        "KernelMemoryTCP": "20.10 only", "PidsLimit": "20.10 only", "CgroupVersion": "20.10 only",
        "OSVersion": "20.10 only",
    }  # fmt: skip
    found = shapes.differences(answer.json, "info.json", listed, maps=("Runtimes",))
    # What depends on the machine: warnings are a list where there are any.
    assert [line for line in found if not line.startswith(("Warnings:", "RegistryConfig.IndexConfigs"))] == []
    assert answer.json["Swarm"]["LocalNodeState"] == ""
    assert "bare" in answer.json["Runtimes"]
    states = [entry["State"] for entry in ask(world, "GET", "/containers/json?all=1").json]
    assert answer.json["Containers"] == len(states)
    assert answer.json["ContainersPaused"] == states.count("paused")


def test_disk_usage_is_as_recorded(world: World) -> None:
    answer = ask(world, "GET", "/system/df")

    assert answer.status == 200
    if not world.engine.is_reference:
        assert shapes.problems("GET", "/system/df", answer) == []
        assert set(shapes.recorded("system_df.json")) <= set(answer.json)
    sizes = {entry["Id"]: entry.get("SizeRootFs", 0) for entry in answer.json["Containers"]}
    assert sizes[world.ids["running"]] > 1_000_000


SYSTEM = [
    row("GET", "/events", "/events?since=2&until=1", 400, r"`since` time \(2\) cannot be after `until` time \(1\)"),
    row("GET", "/events", "/events?since=x", 500, r'strconv.ParseInt: parsing "x": invalid syntax'),
    row("GET", "/events", "/events?filters=x", 500, "invalid character 'x' looking for beginning of value"),
    row("GET", "/events", "/events?since=1&until=1", 200),
    row("POST", "/auth", "/auth", 500, "EOF"),
]


@pytest.mark.parametrize("one", SYSTEM, ids=str)
def test_system(world: World, one: Row) -> None:
    check(world, one)


# -- containers: what is asked --


def test_list_is_as_recorded(world: World) -> None:
    answer = ask(world, "GET", "/containers/json?all=1")

    assert answer.status == 200
    if not world.engine.is_reference:
        assert shapes.problems("GET", "/containers/json", answer) == []
    mine = [entry for entry in answer.json if entry["Id"] in world.ids.values()]
    if not world.engine.is_reference:
        running = [entry for entry in mine if entry["Id"] == world.ids["network"]]
        assert shapes.differences(running, "container_list.json") == []
    assert [entry["Created"] for entry in mine] == sorted((entry["Created"] for entry in mine), reverse=True)
    states = {entry["Id"]: (entry["State"], entry["Status"]) for entry in mine}
    assert states[world.ids["created"]] == ("created", "Created")
    assert re.fullmatch(r"Up .*", states[world.ids["running"]][1])
    assert re.fullmatch(r"Up .* \(Paused\)", states[world.ids["paused"]][1])
    assert re.fullmatch(r"Exited \(137\) .* ago", states[world.ids["exited"]][1])
    assert states[world.ids["restarting"]][0] in ("restarting", "running")


def ids(world: World, query: str, **filters: Any) -> set[str]:
    """Which of ours a list has, by their states."""
    text = urllib.parse.quote(json.dumps(filters))
    answer = ask(world, "GET", f"/containers/json?filters={text}{query}")
    assert answer.status == 200, answer.body
    names = {container: state for state, container in world.ids.items()}
    return {names[entry["Id"]] for entry in answer.json if entry["Id"] in names}


EVERY = {"created", "running", "paused", "exited", "restarting", "network"}
ALIVE = {"running", "paused", "restarting", "network"}


def test_list_filters_with_all_their_quirks(world: World) -> None:
    run = world.ids["running"]

    assert ids(world, "") == ALIVE
    assert ids(world, "&all=true") == EVERY
    assert ids(world, "&all=0") == ALIVE
    assert ids(world, "&limit=100") == EVERY  # a limit means all
    assert len(ask(world, "GET", "/containers/json?limit=2").json) == 2
    assert ids(world, "&limit=-1") == ALIVE
    assert ids(world, "", status=["created"]) == {"created"}  # a status means all
    assert ids(world, "", status={"created": True, "exited": True}) == {"created", "exited"}  # the older form
    assert ids(world, "", status=["paused"]) == {"paused"}
    # A running filter finds paused ones not, since their status is another.
    assert "paused" not in ids(world, "", status=["running"])
    assert ids(world, "&all=1", name=["row-run"]) == {"running"}  # a regular expression
    assert ids(world, "&all=1", name=["^/row-running$"]) == {"running"}
    assert ids(world, "&all=1", name=["^row-running$"]) == {"running"}
    assert ids(world, "&all=1", name=["row-run", "row-pau"]) == {"running", "paused"}
    assert ids(world, "&all=1", id=[run[:12]]) == {"running"}
    assert ids(world, "&all=1", id=[run[4:16]]) == set()  # which must be its beginning
    assert ids(world, "&all=1", id=[""]) == set()  # and of one container only
    assert ids(world, "&all=1", label=["row"]) == EVERY
    assert ids(world, "&all=1", label=["row=yes", "com.example.x"]) == EVERY  # all of them
    assert ids(world, "&all=1", label=["row=yes", "com.example.x=2"]) == set()
    assert ids(world, "", exited=["137"]) == set()  # does not imply all
    assert ids(world, "&all=1", exited=["137"]) == {"exited"}
    assert ids(world, "&all=1", exited=["0"]) == set()  # one that never ran has no exit code
    assert ids(world, "&all=1", ancestor=[world.image]) == EVERY
    assert ids(world, "&all=1", ancestor=["nobody/knows"]) == set()
    assert ids(world, "&all=1", before=["row-paused"]) == {"created", "running"}
    assert ids(world, "&all=1", since=["row-paused"]) == {"exited", "restarting", "network"}
    assert ids(world, "&all=1", since=["row-created"], before=["row-exited"]) == {"running", "paused"}
    assert ids(world, "&all=1", health=["none"]) == EVERY
    assert ids(world, "&all=1", health=["healthy"]) == set()
    assert ids(world, "&all=1", network=["none"]) == EVERY - {"network"}
    assert ids(world, "&all=1", network=["bridge"]) == {"network"}
    bridge = ask(world, "GET", "/networks/bridge").json["Id"]
    assert ids(world, "", network=[bridge[:8]]) == {"network"}
    assert ids(world, "&all=1", volume=["/nowhere"]) == set()
    assert ids(world, "&all=1", publish=["80"]) == set()
    assert ids(world, "&all=1", expose=["80-90/udp"]) == set()
    assert ids(world, "&all=1", **{"is-task": ["true"]}) == set()
    assert ids(world, "&all=1", **{"is-task": ["false"]}) in (EVERY, set())
    assert ids(world, "&all=1", isolation=["default"]) == EVERY


def test_filters_of_ports_and_volumes(world: World) -> None:
    if world.engine.is_reference:
        pytest.skip("20.10 looks at the ports of running containers, 18.09 at what was asked for")
    host = {
        "PortBindings": {"80/tcp": [{"HostPort": ""}], "53/udp": [{"HostPort": "15399"}]},
        "Binds": ["row-volume:/data", "/tmp:/host"],
    }
    body = {"Image": world.image, "Cmd": ["true"], "ExposedPorts": {"8000/tcp": {}}, "HostConfig": host}
    answer = world.engine.request("POST", "/v1.39/containers/create?name=row-ports", body)
    assert answer.status == 201, answer.body
    world.ids["ports"] = answer.json["Id"]
    try:
        for wanted in (["80"], ["80/tcp"], ["70-90/tcp"], ["53/udp"], ["81", "80"]):
            assert ids(world, "&all=1", publish=wanted) == {"ports"}, wanted
        for other in (["80/udp"], ["53"], ["8000"]):
            assert ids(world, "&all=1", publish=other) == set(), other
        for wanted in (["8000"], ["7999-8001/tcp"]):
            assert ids(world, "&all=1", expose=wanted) == {"ports"}, wanted
        assert ids(world, "&all=1", expose=["80"]) == set()  # published only
        for wanted in (["row-volume"], ["/data"], ["/host"]):
            assert ids(world, "&all=1", volume=wanted) == {"ports"}, wanted
    finally:
        world.engine.request("DELETE", f"/v1.39/containers/{world.ids.pop('ports')}?force=1")
        world.engine.request("DELETE", "/v1.39/volumes/row-volume")


def filters(**values: Any) -> str:
    return urllib.parse.quote(json.dumps({key.replace("_", "-"): value for key, value in values.items()}))


LIST = "/containers/json"
LISTING = [
    row("GET", LIST, f"{LIST}?filters={filters(zz=['1'])}", 400, "Invalid filter 'zz'"),
    row("GET", LIST, f"{LIST}?filters={filters(status=['zz'])}", 400, "Invalid filter 'status=zz'"),
    row("GET", LIST, f"{LIST}?filters={filters(health=['zz'])}", 400, "Unrecognised filter value for health: zz"),
    row("GET", LIST, f"{LIST}?filters={filters(before=['nobody'])}", 500, "no such container nobody"),
    row("GET", LIST, f"{LIST}?filters={filters(since=['nobody'])}", 500, "no such container nobody"),
    row("GET", LIST, f"{LIST}?filters={filters(exited=['x'])}", 500, 'strconv.Atoi: parsing "x": invalid syntax'),
    row("GET", LIST, f"{LIST}?filters={filters(is_task=['zz'])}", 400, r"Invalid filter 'is-task=\[zz\]'"),
    row("GET", LIST, f"{LIST}?limit=x", 500, 'strconv.Atoi: parsing "x": invalid syntax'),
    row("GET", LIST, f"{LIST}?filters=x", 500, "invalid character 'x' looking for beginning of value"),
    row("GET", LIST, f"{LIST}?filters={filters(publish=['x'])}", 500, "error while looking up for publish x.*"),
]  # fmt: skip


@pytest.mark.parametrize("one", LISTING, ids=str)
def test_list_errors(world: World, one: Row) -> None:
    check(world, one)


INSPECT_18_09 = {
    "HostConfig.ContainerIDEnv": "balena's own",
    "HostConfig.CgroupnsMode": "20.10 only",
    "HostConfig.DeviceRequests": "20.10 only",
    "HostConfig.KernelMemoryTCP": "20.10 only",
    "HostConfig.PidsLimit": "null in 20.10",
    "HostConfig.DiskQuota": "18.09 has it",
}


@pytest.mark.parametrize(
    ("state", "fixture"),
    [
        ("network", "container_inspect_running.json"),
        ("created", "container_inspect_created.json"),
        ("exited", "container_inspect_exited.json"),
    ],
)
def test_inspect_is_as_recorded(world: World, state: str, fixture: str) -> None:
    if world.engine.is_reference:
        pytest.skip("recorded from it")
    answer = ask(world, "GET", f"/containers/<{state}>/json")

    assert answer.status == 200
    assert shapes.problems("GET", "/containers/{id}/json", answer) == []
    listed = {"HostConfig.Runtime": "20.10 knows it at start only"} if state == "created" else {}
    found = shapes.differences(answer.json, fixture, INSPECT_18_09 | listed)
    assert found == [], "\n".join(found)


@pytest.mark.parametrize("name", ["{id}", "{short}", "row-running"])
def test_containers_are_found_by_any_of_their_names(world: World, name: str) -> None:
    container = world.ids["running"]
    target = urllib.parse.quote(name.format(id=container, short=container[:12]), safe="")

    assert ask(world, "GET", f"/containers/{target}/json").json["Id"] == container


def test_inspect_with_sizes(world: World) -> None:
    plain = ask(world, "GET", "/containers/<running>/json").json
    sized = ask(world, "GET", "/containers/<running>/json?size=1").json

    assert not {"SizeRw", "SizeRootFs"} & set(plain)
    assert sized["SizeRootFs"] > 1_000_000
    assert 0 <= sized["SizeRw"] < 100_000
    entries = {entry["Id"]: entry for entry in ask(world, "GET", "/containers/json?size=1").json}
    assert entries[world.ids["running"]]["SizeRootFs"] > 1_000_000


TOP, LOGS, STATS = "/containers/{id}/top", "/containers/{id}/logs", "/containers/{id}/stats"
ASKED = [
    row("GET", "/containers/{id}/json", "/containers/nobody/json", 404, NOBODY),
    row("GET", TOP, "/containers/nobody/top", 404, NOBODY),
    row("GET", TOP, "/containers/<created>/top", 409, "Container <created> is not running"),
    row("GET", TOP, "/containers/<exited>/top", 409, "Container <exited> is not running"),
    row("GET", TOP, "/containers/<running>/top?ps_args=-o+args", 500, "Couldn't find PID field in ps output"),
    row("GET", TOP, "/containers/<running>/top?ps_args=--zz", 500, "ps: .*"),
    row("GET", TOP, "/containers/<paused>/top", 200),
    row("GET", LOGS, "/containers/<running>/logs", 400, "Bad parameters: you must choose at least one stream"),
    row("GET", LOGS, "/containers/nobody/logs?stdout=1", 404, NOBODY),
    row("GET", LOGS, "/containers/<running>/logs?stdout=1&since=x", 500,
        'strconv.ParseInt: parsing "x": invalid syntax'),
    row("GET", LOGS, "/containers/<running>/logs?stdout=1&until=x", 500,
        'strconv.ParseInt: parsing "x": invalid syntax'),
    row("GET", LOGS, "/containers/<created>/logs?stdout=1", 200),
    row("GET", LOGS, "/containers/<running>/logs?stderr=1&tail=5", 200),
    row("GET", "/containers/{id}/changes", "/containers/nobody/changes", 404, NOBODY),
    row("GET", "/containers/{id}/export", "/containers/nobody/export", 404, NOBODY),
    row("GET", STATS, "/containers/nobody/stats", 404, NOBODY),
    row("GET", STATS, "/containers/nobody/stats?stream=0", 404, NOBODY),
    row("POST", "/containers/{id}/resize", "/containers/nobody/resize?h=1&w=1", 404, NOBODY),
    row("POST", "/containers/{id}/resize", "/containers/<running>/resize?h=x&w=1", 400,
        'strconv.Atoi: parsing "x": invalid syntax'),
    row("POST", "/containers/{id}/resize", "/containers/<running>/resize?h=1", 400,
        'strconv.Atoi: parsing "": invalid syntax'),
    row("POST", "/containers/{id}/resize", "/containers/<exited>/resize?h=1&w=1", 409,
        "Container <exited> is not running"),
    row("POST", "/containers/{id}/resize", "/containers/<running>/resize?h=10&w=20", 200),
]  # fmt: skip


@pytest.mark.parametrize("one", ASKED, ids=str)
def test_what_is_asked_of_containers(world: World, one: Row) -> None:
    check(world, one)


def test_top_has_titles_and_rows(world: World) -> None:
    answer = ask(world, "GET", "/containers/<running>/top?ps_args=-o+pid,ppid,args")

    assert answer.json["Titles"] == ["PID", "PPID", "COMMAND"]
    assert "sleep 1000" in [one[2] for one in answer.json["Processes"]]
    default = ask(world, "GET", "/containers/<running>/top").json
    assert shapes.differences(default, "container_top.json") == []


def test_stats_once_and_as_a_stream(world: World) -> None:
    once = ask(world, "GET", "/containers/<network>/stats?stream=0")

    assert once.headers["content-type"] == "application/json"
    value = once.json
    assert value["name"] == "/row-network"
    assert value["precpu_stats"]["system_cpu_usage"] < value["cpu_stats"]["system_cpu_usage"]
    assert value["preread"] < value["read"]
    assert value["networks"]["eth0"]["rx_bytes"] >= 0
    assert value["memory_stats"]["usage"] > 0
    assert value["memory_stats"]["limit"] > value["memory_stats"]["usage"]
    assert value["pids_stats"]["current"] == 1
    if not world.engine.is_reference and "percpu_usage" in value["cpu_stats"]["cpu_usage"]:
        found = shapes.differences(value, "container_stats_cgroup_v1.json")
        # A list of block I/O is empty, null or filled as the machine has it.
        assert [line for line in found if not line.startswith("blkio_stats")] == []
    idle = ask(world, "GET", "/containers/<exited>/stats?stream=0").json
    assert (idle["name"], idle["id"]) == ("/row-exited", world.ids["exited"])
    assert idle["cpu_stats"]["cpu_usage"]["total_usage"] == 0
    no_network = ask(world, "GET", "/containers/<running>/stats?stream=0").json
    assert no_network.get("networks") in (None, {})


# -- containers: what is done --

CREATE = "/containers/create"
MODES = [
    row("POST", CREATE, CREATE, 500, "EOF"),
    row("POST", CREATE, CREATE, 400, "Config cannot be empty in order to create a container", b"null",
        headers=(("Content_Type", "application/json"),)),
    row("POST", CREATE, CREATE, 500, "unexpected EOF", b'{"Image": ', headers=(("Content_Type", "application/json"),)),
    row("POST", CREATE, CREATE, 400, r"Content-Type specified \(text/plain\) must be 'application/json'", b"{}",
        headers=(("Content_Type", "text/plain"),)),
    row("POST", CREATE, CREATE, 404, "No such image: nope-nope:latest", {"Image": "nope-nope", "Cmd": ["x"]}),
    row("POST", CREATE, CREATE, 400, "Config cannot be empty in order to create a container", {}),
    row("POST", CREATE, CREATE, 400, "No command specified", {"Env": ["A=1"]}),
    row("POST", CREATE, f"{CREATE}?name=row-running", 409,
        'Conflict. The container name "/row-running" is already in use by container "<running>". You have to remove '
        r"\(or rename\) that container to be able to reuse that name.", {"Image": "<image>", "Cmd": ["x"]}),
    row("POST", CREATE, f"{CREATE}?name=a%20b", 400,
        r"Invalid container name \(a b\), only \[a-zA-Z0-9\]\[a-zA-Z0-9_.-\] are allowed",
        {"Image": "<image>", "Cmd": ["x"]}),
]  # fmt: skip


@pytest.mark.parametrize("one", MODES, ids=str)
def test_create_errors(world: World, one: Row) -> None:
    if isinstance(one.body, dict) and one.body.get("Image") == "<image>":
        one = Row(one.method, one.path, one.target, one.status, one.message, one.body | {"Image": world.image})
    check(world, one)


START, STOP, KILL = "/containers/{id}/start", "/containers/{id}/stop", "/containers/{id}/kill"
UPDATE, RENAME, WAIT = "/containers/{id}/update", "/containers/{id}/rename", "/containers/{id}/wait"
PAUSE, UNPAUSE, RESTART = "/containers/{id}/pause", "/containers/{id}/unpause", "/containers/{id}/restart"
JSON = (("Content_Type", "application/json"),)
DONE = [
    row("POST", START, "/containers/nobody/start", 404, NOBODY),
    row("POST", START, "/containers/<running>/start", 304),
    row("POST", START, "/containers/<paused>/start", 409, "cannot start a paused container, try unpause instead"),
    row("POST", START, "/containers/<created>/start", 400, "starting container with non-empty request body was "
        "deprecated since API v1.22 and removed in v1.24", b'{"Binds":[]}', headers=JSON),
    row("POST", STOP, "/containers/nobody/stop", 404, NOBODY),
    row("POST", STOP, "/containers/<created>/stop", 304),
    row("POST", STOP, "/containers/<exited>/stop", 304),
    row("POST", STOP, "/containers/<running>/stop?t=x", 500, 'strconv.Atoi: parsing "x": invalid syntax'),
    row("POST", RESTART, "/containers/nobody/restart", 404, NOBODY),
    row("POST", RESTART, "/containers/<running>/restart?t=x", 500, 'strconv.Atoi: parsing "x": invalid syntax'),
    row("POST", KILL, "/containers/nobody/kill", 404, "Cannot kill container: nobody: No such container: nobody"),
    row("POST", KILL, "/containers/<running>/kill?signal=ZZ", 400, "Invalid signal: ZZ"),
    row("POST", KILL, "/containers/<exited>/kill", 409,
        "Cannot kill container: <exited>: Container <exited> is not running"),
    row("POST", KILL, "/containers/<running>/kill?signal=0", 400, "Invalid signal: 0"),
    row("POST", KILL, "/containers/<running>/kill?signal=99", 500,
        "Cannot kill container: <running>: The linux daemon does not support signal 99"),
    row("POST", KILL, "/containers/<running>/kill?signal=winch", 204),
    row("POST", KILL, "/containers/<running>/kill?signal=SIGWINCH", 204),
    row("POST", KILL, "/containers/<running>/kill?signal=28", 204),
    row("POST", KILL, "/containers/<running>/kill?signal=RTMIN%2B3", 204),
    row("POST", UPDATE, "/containers/nobody/update", 404, NOBODY, {}),
    row("POST", UPDATE, "/containers/<running>/update", 400, "Minimum memory limit allowed is 4MB", {"Memory": 1},
        reference=(400, "Minimum memory limit allowed is 6MB")),
    row("POST", UPDATE, "/containers/<running>/update", 400, "invalid restart policy 'zz'",
        {"RestartPolicy": {"Name": "zz"}}),
    row("POST", UPDATE, "/containers/<running>/update", 400, "Invalid value x for cpuset cpus.*", {"CpusetCpus": "x"}),
    row("POST", RENAME, "/containers/nobody/rename?name=x-x", 404, NOBODY),
    row("POST", RENAME, "/containers/<running>/rename", 400, "Neither old nor new names may be empty"),
    row("POST", RENAME, "/containers/<running>/rename?name=row-running", 400,
        "Renaming a container with the same name as its current name"),
    row("POST", RENAME, "/containers/<running>/rename?name=row-paused", 409,
        'Error when allocating new name: Conflict. The container name "/row-paused" is already in use by .*'),
    row("POST", RENAME, "/containers/<running>/rename?name=a%20b", 400,
        r"Error when allocating new name: Invalid container name \(/a b\), only .*"),
    row("POST", PAUSE, "/containers/nobody/pause", 404, NOBODY),
    row("POST", PAUSE, "/containers/<created>/pause", 409, "Container <created> is not running"),
    row("POST", PAUSE, "/containers/<paused>/pause", 409, "Container <paused> is already paused"),
    row("POST", UNPAUSE, "/containers/nobody/unpause", 404, NOBODY),
    row("POST", UNPAUSE, "/containers/<running>/unpause", 500, "Container <running> is not paused"),
    row("POST", WAIT, "/containers/nobody/wait", 404, NOBODY),
    row("POST", WAIT, "/containers/<created>/wait", 200),
    row("POST", WAIT, "/containers/<exited>/wait?condition=zz", 200),
    row("DELETE", "/containers/{id}", "/containers/nobody", 404, NOBODY),
    row("DELETE", "/containers/{id}", "/containers/nobody/checkpoints/c", 404,
        "No such container: nobody/checkpoints/c", reference=(501, ".*")),
    row("DELETE", "/containers/{id}", "/containers/<running>", 409, "You cannot remove a running container <running>. "
        "Stop the container before attempting removal or force remove"),
    row("DELETE", "/containers/{id}", "/containers/<paused>", 409, "You cannot remove a paused container <paused>. "
        "Unpause and then stop the container before attempting removal or force remove"),
    row("DELETE", "/containers/{id}", "/containers/<running>?link=1", 500,
        "Conflict, cannot remove the default link name of the container"),
    row("POST", "/containers/prune", f"/containers/prune?filters={filters(zz=['1'])}", 400, "Invalid filter 'zz'"),
    row("POST", "/containers/prune", f"/containers/prune?filters={filters(until=['x'])}", 500, ".*"),
    row("POST", "/containers/prune", f"/containers/prune?filters={filters(label=['none-has-it'])}", 200),
]  # fmt: skip


@pytest.mark.parametrize("one", DONE, ids=str)
def test_what_is_done_to_containers(world: World, one: Row) -> None:
    check(world, one)


def test_prune_says_null_when_there_is_nothing(world: World) -> None:
    answer = ask(world, "POST", f"/containers/prune?filters={filters(label=['none-has-it'])}")

    assert answer.json == {"ContainersDeleted": None, "SpaceReclaimed": 0}


def test_wait_sends_its_head_at_once(world: World) -> None:
    with world.engine.raw_connection() as connection:
        connection.sendall(f"POST /v1.39/containers/{world.ids['running']}/wait HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = connection.recv(4096)

    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert ask(world, "POST", "/containers/<exited>/wait").json == {"Error": None, "StatusCode": 137}


# -- exec and commit --

EXEC, EXEC_START = "/containers/{id}/exec", "/exec/{id}/start"
ABSENT = "ab" * 32
EXECS = [
    row("POST", EXEC, "/containers/nobody/exec", 404, NOBODY, {"Cmd": ["x"]}),
    row("POST", EXEC, "/containers/nobody/exec", 400, "No exec command specified", {}),
    row("POST", EXEC, "/containers/<running>/exec", 400, "got EOF while reading request body"),
    row("POST", EXEC, "/containers/<created>/exec", 409, "Container <created> is not running", {"Cmd": ["x"]}),
    row("POST", EXEC, "/containers/<exited>/exec", 409, "Container <exited> is not running", {"Cmd": ["x"]}),
    row("POST", EXEC, "/containers/<paused>/exec", 409,
        "Container <paused> is paused, unpause the container before exec", {"Cmd": ["x"]}),
    row("POST", EXEC, "/containers/<running>/exec", 500, r"Invalid escape keys \(zz-\) provided",
        {"Cmd": ["x"], "DetachKeys": "zz-"}),
    row("POST", EXEC_START, f"/exec/{ABSENT}/start", 404, f"No such exec instance: {ABSENT}", {"Detach": True}),
    row("POST", EXEC_START, "/exec/<exec-running>/start", 409,
        "Error: Exec command <exec-running> is already running", {"Detach": True}),
    row("POST", EXEC_START, "/exec/<exec-exited>/start", 409, "Error: Exec command <exec-exited> has already run",
        {"Detach": True}),
    row("POST", "/exec/{id}/resize", f"/exec/{ABSENT}/resize?h=1&w=1", 404, f"No such exec instance: {ABSENT}"),
    row("POST", "/exec/{id}/resize", "/exec/<exec-running>/resize?h=x&w=1", 400, ".*invalid syntax"),
    row("POST", "/exec/{id}/resize", "/exec/<exec-exited>/resize?h=1&w=1", 404, "no such exec"),
    row("POST", "/exec/{id}/resize", "/exec/<exec-running>/resize?h=1&w=1", 200),
    row("GET", "/exec/{id}/json", f"/exec/{ABSENT}/json", 404, f"No such exec instance: {ABSENT}"),
    row("POST", "/commit", "/commit", 400, 'invalid name or ID supplied: ""', {}),
    row("POST", "/commit", "/commit?container=nobody", 404, NOBODY, {}),
    row("POST", "/commit", "/commit?container=<created>&changes=RUN+x", 400, "run is not a valid change command", {}),
]  # fmt: skip


@pytest.mark.parametrize("one", EXECS, ids=str)
def test_execs_and_commit(world: World, one: Row) -> None:
    check(world, one)


@pytest.mark.parametrize("state", ["created", "running", "exited"])
def test_execs_are_as_recorded(world: World, state: str) -> None:
    answer = ask(world, "GET", f"/exec/<exec-{state}>/json")

    if not world.engine.is_reference:
        assert shapes.problems("GET", "/exec/{id}/json", answer) == []
    found = shapes.differences(answer.json, f"exec_inspect_{state}.json")
    assert [line for line in found if not line.startswith("ProcessConfig.user")] == []
    assert (answer.json["Running"], answer.json["ExitCode"]) == (state == "running", 0 if state == "exited" else None)


def test_detached_execs_that_cannot_start_are_told(world: World) -> None:
    world.exec("exec-bad", "running", "nope-nope", start=False)

    answer = ask(world, "POST", "/exec/<exec-bad>/start", {"Detach": True})

    assert answer.status == 400
    assert "executable file not found in $PATH" in answer.message
    assert ask(world, "GET", "/exec/<exec-bad>/json").json["ExitCode"] == 126


# -- attach: answers are text, and the connection is the stream --

RAW = b"Content-Type: application/vnd.docker.raw-stream"


def raw(world: World, target: str, *fields: str) -> bytes:
    lines = [f"POST /v1.39{world.fill(target)} HTTP/1.1", "Host: x", *fields, "", ""]
    with world.engine.raw_connection(10) as connection:
        connection.sendall("\r\n".join(lines).encode())
        received = b""
        while data := connection.recv(4096):
            received += data
            if b"\r\n\r\n" in received and b" 101 " in received.split(b"\r\n")[0]:
                break
        return received


@pytest.mark.parametrize(
    ("target", "status", "text"),
    [
        ("/containers/nobody/attach?stream=1", b"404 Not Found", "No such container: nobody"),
        ("/containers/<paused>/attach?stream=1", b"409 Conflict",
         "container <paused> is paused, unpause the container before attach"),
        ("/containers/<running>/attach?stream=1&detachKeys=zz-", b"400 Bad Request",
         "Invalid detach keys (zz-) provided"),
    ],
)  # fmt: skip
def test_attach_refuses_in_plain_text(world: World, target: str, status: bytes, text: str) -> None:
    head, _, body = raw(world, target).partition(b"\r\n\r\n")

    assert head.split(b"\r\n")[:2] == [b"HTTP/1.1 " + status, RAW]
    assert body.decode() == world.fill(text) + "\r\n"


def test_attach_upgrades_or_not(world: World) -> None:
    upgraded = raw(world, "/containers/<running>/attach?stream=1&stdout=1", "Upgrade: tcp", "Connection: Upgrade")
    nothing = raw(world, "/containers/<running>/attach")

    assert upgraded == b"HTTP/1.1 101 UPGRADED\r\n" + RAW + b"\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
    assert nothing == b"HTTP/1.1 200 OK\r\n" + RAW + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("container", "status", "message"),
    [
        ("nobody/attach/ws?stream=1", 404, NOBODY),
        ("<running>/attach/ws?detachKeys=zz-", 400, r"Invalid detach keys \(zz-\) provided"),
    ],
)
def test_attach_by_websocket_refuses_in_json(world: World, container: str, status: int, message: str) -> None:
    one = row("GET", "/containers/{id}/attach/ws", f"/containers/{container}", status, message)

    check(world, one)


# -- copy and checkpoints --


def test_copy_is_gone(world: World) -> None:
    answer = ask(world, "POST", "/containers/<running>/copy", {"Resource": "/etc/passwd"})

    assert (answer.status, answer.body) == (404, b"")


# -- events --


def test_events_of_a_life_have_every_attribute(world: World) -> None:
    since = time.time()
    container = world.create("life")
    calls = ["start", "pause", "unpause", "kill?signal=WINCH", "rename?name=row-other", "resize?h=3&w=4", "restart?t=0",
             "stop?t=0", "start", "kill"]  # fmt: skip
    for call in calls:
        status = world.engine.request("POST", f"/v1.39/containers/{container}/{call}").status
        assert status in (200, 204), call
        if call == "unpause":
            assert world.engine.request("GET", f"/v1.39/containers/{container}/top").status == 200
            update = world.engine.request("POST", f"/v1.39/containers/{container}/update", {"CpuShares": 512})
            assert update.status == 200
    world.engine.request("DELETE", f"/v1.39/containers/{world.ids.pop('life')}")
    lines = ask(world, "GET", f"/events?since={since:.9f}&until={time.time():.9f}").lines
    mine = [line for line in lines if line["Actor"]["ID"] == container]

    own = ["create", "start", "pause", "unpause", "top", "update", "kill", "rename", "resize", "kill", "die", "stop",
           "start", "restart", "kill", "die", "stop", "start", "kill", "die", "destroy"]  # fmt: skip
    # A stop without time is signalled twice where the first had no time to act.
    actions = [line["Action"] for line in mine]
    collapsed = [action for index, action in enumerate(actions) if index == 0 or actions[index - 1] != action]
    assert collapsed == own
    extra = {line["Action"]: set(line["Actor"]["Attributes"]) - {"image", "name", *LABELS} for line in mine}
    assert extra == {
        "create": set(), "start": set(), "pause": set(), "unpause": set(), "top": set(), "update": set(),
        "kill": {"signal"}, "rename": {"oldName"}, "resize": {"height", "width"}, "die": {"exitCode"}, "stop": set(),
        "restart": set(), "destroy": set(),
    }  # fmt: skip
    for line in mine:
        assert LABELS.items() <= line["Actor"]["Attributes"].items()
        assert list(line) == ["status", "id", "from", "Type", "Action", "Actor", "scope", "time", "timeNano"]
        assert (line["status"], line["id"], line["from"]) == (line["Action"], container, world.image)
    (renamed,) = (line["Actor"]["Attributes"] for line in mine if line["Action"] == "rename")
    assert (renamed["oldName"], renamed["name"]) == ("/row-life", "row-other")


# -- recorded answers of other containers --


def test_mounts_are_as_recorded(world: World) -> None:
    # Not /tmp, where this engine's own directories are: such a bind is made a slave.
    text = json.dumps(shapes.recorded("container_inspect_mounts.json"))
    recorded = json.loads(text.replace('"/tmp"', '"/srv"').replace("/tmp:/tmp2", "/srv:/tmp2"))
    host = {
        "NetworkMode": "none", "Tmpfs": recorded["HostConfig.Tmpfs"], "Mounts": recorded["HostConfig.Mounts"],
        "Binds": recorded["HostConfig.Binds"],
    }  # fmt: skip
    body = {"Image": world.image, "Cmd": ["x"], "Volumes": recorded["Config.Volumes"], "HostConfig": host}
    made = world.engine.request("POST", "/v1.39/containers/create", body)
    assert made.status == 201, made.body
    try:
        shown = world.engine.inspect(made.json["Id"])

        def normal(mounts: list[dict[str, Any]]) -> list[dict[str, Any]]:
            """By destination, without names that are made and places that differ."""
            found = []
            for mount in sorted(mounts, key=lambda one: one["Destination"]):
                named = mount.get("Name", "")
                source = re.sub(r".*/volumes/", "volumes/", mount["Source"])
                if re.fullmatch("[0-9a-f]{64}", named):
                    named, source = "made", source.replace(named, "made")
                found.append(mount | {"Source": source} | ({"Name": named} if named else {}))
            return found

        assert normal(shown["Mounts"]) == normal(recorded["Mounts"])
        for key in ("Binds", "Mounts", "Tmpfs"):
            assert shown["HostConfig"][key] == recorded[f"HostConfig.{key}"]
        assert shown["Config"]["Volumes"] == recorded["Config.Volumes"]
    finally:
        world.engine.request("DELETE", f"/v1.39/containers/{made.json['Id']}?force=1&v=1")
        for name in ("n", "m", "v", "t"):
            world.engine.request("DELETE", f"/v1.39/volumes/bpyref-{name}")


def test_lists_with_sizes_and_ports_are_as_recorded(world: World) -> None:
    if world.engine.is_reference:
        pytest.skip("recorded from it")
    bindings = {"80/tcp": [{"HostPort": ""}, {"HostIp": "127.0.0.1", "HostPort": ""}]}
    body = {
        "Image": world.image, "Cmd": ["sleep", "100"], "ExposedPorts": {"80/tcp": {}, "81/udp": {}},
        "HostConfig": {"PortBindings": bindings},
    }  # fmt: skip
    made = world.engine.request("POST", "/v1.39/containers/create?name=row-published", body).json["Id"]
    try:
        assert world.engine.request("POST", f"/v1.39/containers/{made}/start").status == 204
        entries = {entry["Id"]: entry for entry in ask(world, "GET", "/containers/json?all=1&size=1").json}
        ports = entries[made]["Ports"]

        assert shapes.differences(ports, shapes.recorded("container_list_ports.json")[0]["Ports"]) == []
        kinds = sorted((port.get("IP", ""), port["PrivatePort"], port["Type"]) for port in ports)
        assert kinds == [("", 81, "udp"), ("0.0.0.0", 80, "tcp"), ("127.0.0.1", 80, "tcp")]  # 20.10 adds "::"
        ours = [entries[world.ids["network"]]]
        found = shapes.differences(ours, "container_list_size.json")
        # What the recorded containers had none of: mounts, host networks.
        assert [line for line in found if "SizeR" in line] == []
        shown = world.engine.inspect(made)["NetworkSettings"]["Ports"]
        assert {port: bool(bound) for port, bound in shown.items()} == {"80/tcp": True, "81/udp": False}
    finally:
        world.engine.request("DELETE", f"/v1.39/containers/{made}?force=1")


def test_changes_are_as_recorded(world: World) -> None:
    made = world.create("changed", "sh", "-c", "echo x > /a; rm /etc/group; mkdir /d")
    try:
        world.call("changed", "start")
        world.engine.request("POST", f"/v1.39/containers/{made}/wait")
        answer = ask(world, "GET", "/containers/<changed>/changes")

        assert shapes.differences(answer.json, "container_changes.json") == []
        changes = {change["Path"]: change["Kind"] for change in answer.json}
        assert {path: changes[path] for path in ("/a", "/etc", "/etc/group", "/d")} == {
            "/a": 1, "/etc": 0, "/etc/group": 2, "/d": 1,
        }  # fmt: skip
        assert ask(world, "GET", "/containers/<created>/changes").body == b"null\n"
    finally:
        world.engine.request("DELETE", f"/v1.39/containers/{world.ids.pop('changed')}")
