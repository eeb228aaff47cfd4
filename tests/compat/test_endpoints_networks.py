"""Every row of the API's table for networks and volumes: its success and each of its errors."""

from __future__ import annotations

import json
import os
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from tests.compat import shapes
from tests.compat.test_endpoints_containers import World, ask, check, row
from tests.engine_process import Response, running_engine
from tests.leftovers import claim

pytestmark = pytest.mark.root

CREATE, CONNECT, DISCONNECT = "/networks/create", "/networks/{id}/connect", "/networks/{id}/disconnect"
VOLUME = "/volumes/create"


def filters(**given: Any) -> str:
    return "filters=" + urllib.parse.quote(json.dumps({key: [value] for key, value in given.items()}))


def subnet(part: int) -> str:
    """`<n>` is the engine's own number."""
    return f"10.214.<n>.{part * 16}/28"


def bridge(name: str, part: int, **more: Any) -> dict[str, Any]:
    options = {"com.docker.network.bridge.name": f"bpte<n>-{part}"}
    return {"Name": name, "IPAM": {"Config": [{"Subnet": subnet(part)}]}, "Options": options} | more


class Networks(World):
    def fill(self, text: str) -> str:
        return super().fill(text).replace("<n>", str(self.engine.number))


def fill(world: World, body: Any) -> Any:
    return json.loads(world.fill(json.dumps(body))) if body is not None else None


def problems(world: World, method: str, path: str, answer: Response) -> list[str]:
    """What the description does not know of our answers; the reference here is of a later version."""
    return [] if world.engine.is_reference else shapes.problems(method, path, answer)


def create(world: World, body: dict[str, Any]) -> str:
    answer = ask(world, "POST", CREATE, fill(world, body))
    assert answer.status == 201, answer.body
    return str(answer.json["Id"])


def known(world: World) -> list[str]:
    """Every network and volume, whole, in an order."""
    networks, volumes = ask(world, "GET", "/networks").json, ask(world, "GET", "/volumes").json["Volumes"]
    return sorted(json.dumps(one) for one in [*networks, *volumes])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, busybox: str) -> Iterator[World]:
    with running_engine(tmp_path_factory.mktemp("networks")) as engine:
        engine.docker("pull", "-q", busybox)
        world = Networks(engine, busybox)
        claim(f"bpte{engine.number}-")
        world.ids["net"] = create(world, bridge("net", 0, Labels={"a": "b"}, Attachable=True))
        world.ids["idle"] = create(world, bridge("idle", 1))
        # Of the default pools: theirs is no address for a container of ours.
        for twin in ("twin-1", "twin-2"):
            world.ids[twin] = create(world, bridge("twin", 2 if twin == "twin-1" else 3))
        world.ids["pooled"] = create(world, {"Name": "pooled"})
        for name, mode in (
            ("runs", "net"),
            ("default", "default"),
            ("hosted", "host"),
            ("none", "none"),
            ("stopped", "net"),
        ):
            world.create(name, NetworkMode=mode, Binds=["used:/used"] if name == "runs" else None)
            if name != "stopped":
                world.call(name, "start")
        world.create("joined", NetworkMode=f"container:{world.ids['runs']}")
        world.call("joined", "start")
        try:
            yield world
        finally:
            engine.close_clients()
            engine.remove_containers()
            for name in ("net", "idle", "twin-1", "twin-2", "pooled"):
                assert ask(world, "DELETE", f"/networks/{world.ids[name]}").status == 204


# -- networks: lists and descriptions --


CONFIG = ("Config[].Gateway", "Config[].IPRange", "Config[].AuxiliaryAddresses")


def test_a_network_is_described_as_recorded(world: World) -> None:
    for target, fixture, listed in (
        ("bridge", "network_inspect_bridge.json", {"IPAM.Config[].Gateway": "--bip was given"}),
        ("host", "network_inspect_host.json", {}),
        ("none", "network_inspect_none.json", {}),
        (
            "net",
            "network_inspect_custom.json",
            {f"IPAM.{key}": "not asked for" for key in ("Options", *CONFIG)},
        ),
    ):
        answer = ask(world, "GET", f"/networks/{target}?verbose=1&scope=local")
        assert problems(world, "GET", "/networks/{id}", answer) == []
        found = shapes.differences(answer.json, fixture)
        assert [line for line in found if line.partition(":")[0] not in listed] == [], target


def test_containers_are_shown_by_inspect_only(world: World) -> None:
    inspected = ask(world, "GET", "/networks/net").json
    (listed,) = ask(world, "GET", f"/networks?{filters(name='^net$')}").json
    (shown,) = inspected["Containers"].values()

    assert list(inspected["Containers"]) == [world.ids["runs"]]
    assert list(shown) == ["Name", "EndpointID", "MacAddress", "IPv4Address", "IPv6Address"]
    assert shown["Name"] == "row-runs"
    assert shown["IPv4Address"] == world.fill("10.214.<n>.2/28")
    assert listed == inspected | {"Containers": {}}
    assert inspected["Attachable"] is True and inspected["Labels"] == {"a": "b"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"bridge", "host", "none", "net", "idle", "twin", "pooled"}),
        ({"driver": "null"}, {"none"}),
        ({"driver": "bridge", "type": "builtin"}, {"bridge"}),
        ({"type": "custom"}, {"net", "idle", "twin", "pooled"}),
        ({"name": "wi"}, {"twin"}),
        ({"name": "^(net|idle)$"}, {"net", "idle"}),
        ({"label": "a"}, {"net"}),
        ({"label": "a=c"}, set()),
        ({"scope": "local", "label": "a=b"}, {"net"}),
        ({"scope": "swarm"}, set()),
        ({"id": "<idle>"}, {"idle"}),
    ],
)
def test_lists_are_filtered(world: World, given: dict[str, str], expected: set[str]) -> None:
    query = filters(**fill(world, given)) if given else ""
    for target in (f"/networks?{query}", f"/networks/?{query}"):
        answer = ask(world, "GET", target)
        assert answer.status == 200
        assert problems(world, "GET", "/networks", answer) == []
        assert {network["Name"] for network in answer.json} == expected
    if not given:
        assert (
            shapes.differences(answer.json, "network_list.json", {"[].IPAM.Config[].Gateway": "of a default pool"})
            == []
        )


GETS = [
    row("GET", "/networks", f"/networks?{filters(nope='x')}", 400, "Invalid filter 'nope'"),
    row(
        "GET", "/networks", f"/networks?{filters(dangling='true')}", 400,
        "Invalid filter 'dangling'", reference=(200, ""),
    ),
    row("GET", "/networks", f"/networks?{filters(type='zz')}", 500, "invalid filter: 'type'='zz'"),
    row("GET", "/networks", "/networks?filters=zz", 500, "invalid character 'z' looking for beginning of value"),
    row("GET", "/networks/{id}", "/networks/nope", 404, "network nope not found"),
    row("GET", "/networks/{id}", "/networks/net?scope=swarm", 404, "network net not found"),
    row(
        "GET", "/networks/{id}", "/networks/net?verbose=zz", 400,
        'invalid value for verbose: zz: strconv.ParseBool: parsing "zz": invalid syntax',
    ),
    row(
        "GET", "/networks/{id}", "/networks/twin", 400,
        "2 matches found based on name: network twin is ambiguous",
    ),
]  # fmt: skip

BAD_CREATES: list[tuple[Any, int, str]] = [
    (None, 400, "got EOF while reading request body"),
    ({"Name": ""}, 500, "invalid name: "),
    ({"Name": "  "}, 500, "invalid name:   "),
    ({"Name": "bridge"}, 403, "operation is not permitted on predefined bridge network "),
    ({"Name": "none"}, 403, "operation is not permitted on predefined none network "),
    ({"Name": "default"}, 403, "operation is not permitted on predefined default network "),
    ({"Name": "x", "Driver": "host"}, 403, 'only one instance of "host" network is allowed'),
    ({"Name": "x", "Driver": "null"}, 403, 'only one instance of "null" network is allowed'),
    ({"Name": "x", "Driver": "zz"}, 404, 'plugin "zz" not found'),
    ({"Name": "x", "IPAM": {"Driver": "zz"}}, 404, 'plugin "zz" not found'),
    ({"Name": "net", "CheckDuplicate": True}, 409, "network with name net already exists"),
    ({"Name": "x", "Scope": "swarm"}, 403, "cannot create a swarm scoped network when swarm is not active"),
    ({"Name": "x", "Ingress": True}, 403, "Ingress network can only be global scope network"),
    ({"Name": "x", "IPAM": {"Config": [{"Subnet": "zz"}]}}, 500, "Invalid subnet zz : invalid CIDR address: zz"),
    (
        {"Name": "x", "IPAM": {"Config": [{"Gateway": "10.0.0.1"}]}},
        500,
        "Invalid subnet  : invalid CIDR address: ",
    ),
    ({"Name": "x", "IPAM": {"Config": [{}]}}, 500, "Invalid subnet  : invalid CIDR address: "),
    (
        {"Name": "x", "IPAM": {"Config": [{"Subnet": subnet(0)}]}},
        403,
        "Pool overlaps with other one on this address space",
    ),
    (
        {"Name": "x", "IPAM": {"Config": [{"Subnet": subnet(8), "Gateway": "10.98.0.1"}]}},
        500,
        r"failed to allocate gateway \(10\.98\.0\.1\): Requested address is out of range",
    ),
    (
        {"Name": "x", "IPAM": {"Config": [{"Subnet": subnet(9), "Gateway": "zz"}]}},
        500,
        "invalid gateway address zz in Ipam configuration",
    ),
    (
        {"Name": "x", "IPAM": {"Config": [{"Subnet": subnet(10), "AuxiliaryAddresses": {"h": "10.9.9.9"}}]}},
        403,
        r"auxiliary address: \(h:10\.9\.9\.9\) must belong to the master pool: 10\.214\.<n>\.160/28",
    ),
    (
        {"Name": "x", "IPAM": {"Config": [{"Subnet": subnet(11), "IPRange": "zz"}]}},
        500,
        'failed to parse pool request for address space "LocalDefault" pool "10.214.<n>.176/28" subpool "zz": '
        "Invalid Address SubPool",
    ),
    (
        {"Name": "x", "IPAM": {"Config": [{"Subnet": subnet(12)}, {"Subnet": subnet(13)}]}},
        403,
        "bridge driver doesn't support multiple subnets",
    ),
    (
        {"Name": "x", "EnableIPv6": True},
        404,
        "could not find an available, non-overlapping IPv6 address pool among the defaults to assign to the network",
    ),
    ({"Name": "x", "ConfigFrom": {"Network": "zz"}}, 404, 'configuration network "zz" does not exist'),
    (
        {"Name": "x", "ConfigFrom": {"Network": "net"}, "ConfigOnly": True},
        403,
        "a configuration network cannot depend on another configuration network",
    ),
    (
        {"Name": "x", "Driver": "macvlan", "Options": {"parent": "nope0"}},
        500,
        "invalid subinterface vlan name nope0, example formatting is eth0.10",
    ),
    (
        {"Name": "x", "Driver": "macvlan", "Options": {"parent": "lo"}},
        500,
        "loopback interface is not a valid macvlan parent link",
    ),
    (
        {"Name": "x", "Driver": "ipvlan", "Options": {"ipvlan_mode": "zz"}},
        500,
        "requested ipvlan mode 'zz' is not valid, 'l2' mode is the ipvlan driver default",
    ),
    *(
        ({"Name": "x", "Options": {f"com.docker.network.{key}": value}}, 500, message)
        for key, value, message in (
            (
                "bridge.enable_icc", "zz",
                "failed to parse com.docker.network.bridge.enable_icc value: zz "
                r'\(strconv.ParseBool: parsing "zz": invalid syntax\)',
            ),
            (
                "bridge.enable_ip_masquerade", "zz",
                "failed to parse com.docker.network.bridge.enable_ip_masquerade value: zz "
                r'\(strconv.ParseBool: parsing "zz": invalid syntax\)',
            ),
            (
                "bridge.default_bridge", "zz",
                "failed to parse com.docker.network.bridge.default_bridge value: zz "
                r'\(strconv.ParseBool: parsing "zz": invalid syntax\)',
            ),
            (
                "bridge.host_binding_ipv4", "zz",
                r"failed to parse com.docker.network.bridge.host_binding_ipv4 value: zz \(nil ip\)",
            ),
            (
                "driver.mtu", "zz",
                "failed to parse com.docker.network.driver.mtu value: zz "
                r'\(strconv.Atoi: parsing "zz": invalid syntax\)',
            ),
            ("driver.mtu", "-1", "invalid MTU number: -1"),
        )
    ),
]  # fmt: skip

ADDRESS = {"IPAMConfig": {"IPv4Address": "10.214.<n>.9"}}
CONNECTS: list[tuple[str, Any, int, str]] = [
    ("net", None, 400, "got EOF while reading request body"),
    ("net", {"Container": "nobody"}, 404, "No such container: nobody"),
    ("nope", {"Container": "nobody"}, 404, "No such container: nobody"),
    ("nope", {"Container": "<default>"}, 404, "network nope not found"),
    ("twin", {"Container": "<default>"}, 400, r"network twin is ambiguous \(2 matches found on name\)"),
    ("net", {"Container": "<runs>"}, 403, "endpoint with name row-runs already exists in network net"),
    (
        "bridge", {"Container": "<runs>", "EndpointConfig": ADDRESS}, 400,
        "user specified IP address is supported on user defined networks only",
    ),
    (
        "bridge", {"Container": "<runs>", "EndpointConfig": {"Aliases": ["a"]}}, 400,
        "network-scoped alias is supported only for containers in user defined networks",
    ),
    (
        "pooled", {"Container": "<runs>", "EndpointConfig": ADDRESS}, 400,
        "user specified IP address is supported only when connecting to networks with user configured subnets",
    ),
    (
        "idle", {"Container": "<runs>", "EndpointConfig": {"IPAMConfig": {"IPv4Address": "9.9.9.9"}}}, 500,
        r"Invalid address 9\.9\.9\.9: It does not belong to any of this network's subnets",
    ),
    (
        "host", {"Container": "<runs>"}, 400,
        "container cannot be disconnected from host network or connected to host network",
    ),
    (
        "none", {"Container": "<runs>"}, 400,
        r"container cannot be connected to multiple networks with one of the networks in private \(none\) mode",
    ),
    (
        "net", {"Container": "<none>"}, 400,
        r"container cannot be connected to multiple networks with one of the networks in private \(none\) mode",
    ),
    (
        "net", {"Container": "<joined>"}, 400,
        "container sharing network namespace with another container or host cannot be connected to any other network",
    ),
    (
        "net", {"Container": "<hosted>"}, 400,
        "container sharing network namespace with another container or host cannot be connected to any other network",
    ),
]  # fmt: skip

DISCONNECTS: list[tuple[str, Any, int, str]] = [
    ("net", None, 400, "got EOF while reading request body"),
    ("net", {"Container": "nobody"}, 404, "No such container: nobody"),
    ("net", {"Container": "nobody", "Force": True}, 404, "endpoint nobody not found"),
    ("nope", {"Container": "<runs>"}, 404, "network nope not found"),
    ("idle", {"Container": "<runs>"}, 500, "container <runs> is not connected to network idle"),
    (
        "host", {"Container": "<hosted>"}, 400,
        "container cannot be disconnected from host network or connected to host network",
    ),
]  # fmt: skip

ERRORS = [
    *GETS,
    *(row("POST", CREATE, CREATE, status, message, body) for body, status, message in BAD_CREATES),
    *(
        row("POST", CONNECT, f"/networks/{name}/connect", status, message, body)
        for name, body, status, message in CONNECTS
    ),
    *(
        row("POST", DISCONNECT, f"/networks/{name}/disconnect", status, message, body)
        for name, body, status, message in DISCONNECTS
    ),
    row("DELETE", "/networks/{id}", "/networks/nope", 404, "network nope not found"),
    row("DELETE", "/networks/{id}", "/networks/bridge", 403, "bridge is a pre-defined network and cannot be removed"),
    row("DELETE", "/networks/{id}", "/networks/host", 403, "host is a pre-defined network and cannot be removed"),
    row(
        "DELETE", "/networks/{id}", "/networks/net", 403,
        "error while removing network: network net id <net> has active endpoints",
    ),
    row(
        "DELETE", "/networks/{id}", "/networks/twin", 400,
        r"network twin is ambiguous \(2 matches found based on name\)",
    ),
    row("POST", "/networks/prune", f"/networks/prune?{filters(nope='x')}", 400, "Invalid filter 'nope'"),
    row(
        "POST", "/networks/prune", f"/networks/prune?{filters(until='zz')}", 500,
        'failed to parse value as time or duration: "zz"',
    ),
    row("POST", "/networks/prune", "/networks/prune?filters=zz", 500, "invalid character 'z' looking for .*"),
]  # fmt: skip


@pytest.mark.parametrize("one", ERRORS, ids=str)
def test_a_refusal_is_worded_as_over_there(world: World, one: Any) -> None:
    before = known(world)
    check(
        world,
        row(one.method, one.path, one.target, one.status, one.message, fill(world, one.body), reference=one.reference),
    )

    assert known(world) == before


def test_an_ambiguous_id_is_refused(world: World) -> None:
    """The ids of two networks may begin alike: they are made until they do."""
    made: dict[str, str] = {}
    body = {"ConfigOnly": True}
    twins: list[str] = []
    while not twins:
        assert len(made) < 17
        one = create(world, body | {"Name": f"many{len(made)}"})
        if one[0] in made:
            twins = [made[one[0]], one]
        made.setdefault(one[0], one)
        if twins:
            made["twin"] = one
    refused = ask(world, "GET", f"/networks/{twins[0][0]}")
    for network in made.values():
        assert ask(world, "DELETE", f"/networks/{network}").status == 204

    assert refused.status == 400
    assert "matches found based on ID prefix: network" in refused.message


# -- networks: making, joining, leaving, removing --


def test_a_network_is_made_and_removed(world: World) -> None:
    body = {
        "Internal": True,
        "Labels": {"z": "1", "b": "2"},
        "IPAM": {
            "Driver": "default",
            "Options": {"foo": "bar"},
            "Config": [
                {
                    "Subnet": subnet(4),
                    "IPRange": "10.214.<n>.72/30",
                    "Gateway": "10.214.<n>.78",
                    "AuxiliaryAddresses": {"printer": "10.214.<n>.73"},
                }
            ],
        },
    }
    answer = ask(world, "POST", CREATE, fill(world, bridge("made", 4) | body))
    assert problems(world, "POST", CREATE, answer) == []
    assert shapes.differences(answer.json, "network_create.json") == []
    shown = ask(world, "GET", "/networks/made").json
    world.create("inside", NetworkMode="made")
    world.call("inside", "start")
    settings = world.engine.inspect(world.ids["inside"])["NetworkSettings"]["Networks"]["made"]
    world.engine.request("DELETE", f"/containers/{world.ids['inside']}?force=1")
    removed = ask(world, "DELETE", "/networks/made")

    assert shown["IPAM"] == fill(world, body["IPAM"])
    assert (shown["Internal"], shown["Labels"]) == (True, {"b": "2", "z": "1"})
    assert settings["IPAddress"] == world.fill("10.214.<n>.72")
    if not world.engine.is_reference:  # without its firewall rules it lets internal networks out
        assert settings["Gateway"] == ""
    assert removed.status == 204
    assert problems(world, "DELETE", "/networks/{id}", removed) == []
    assert not os.path.exists(world.fill("/sys/class/net/bpte<n>-4"))


def test_a_second_network_of_a_name_is_made_with_a_warning(world: World) -> None:
    answer = ask(world, "POST", CREATE, fill(world, bridge("net", 5)))
    removed = ask(world, "DELETE", f"/networks/{answer.json['Id']}")

    assert answer.status == 201
    assert answer.json["Warning"] == world.fill("Network with name net (id : <net>) already exists")
    assert removed.status == 204


def test_a_configuration_is_taken_by_another_network(world: World) -> None:
    body = {"Name": "conf", "ConfigOnly": True, "IPAM": {"Config": [{"Subnet": subnet(6)}]}, "Labels": {"l": "m"}}
    create(world, body | {"Options": {"com.docker.network.bridge.name": "bpte<n>-6"}})
    create(world, {"Name": "taker", "ConfigFrom": {"Network": "conf"}})
    conf, taker = (ask(world, "GET", f"/networks/{name}").json for name in ("conf", "taker"))
    world.create("there", NetworkMode="conf")
    refused = ask(world, "POST", "/containers/<there>/start")
    in_use = ask(world, "DELETE", "/networks/conf")
    for name in ("taker", "conf"):
        assert ask(world, "DELETE", f"/networks/{name}").status == 204
    ask(world, "DELETE", "/containers/<there>?force=1")

    assert (conf["Driver"], conf["ConfigOnly"], conf["IPAM"]["Config"]) == (
        "null", True, [{"Subnet": world.fill(subnet(6))}],
    )  # fmt: skip
    assert taker["ConfigFrom"] == {"Network": "conf"}
    assert (taker["Driver"], taker["IPAM"]["Config"]) == ("bridge", conf["IPAM"]["Config"])
    assert taker["Labels"] == {"l": "m"}
    assert (refused.status, refused.message) == (403, "cannot create endpoint on configuration-only network")
    assert (in_use.status, in_use.message) == (
        403, 'error while removing network: configuration network "conf" is in use',
    )  # fmt: skip


def test_a_container_joins_and_leaves_a_network(world: World) -> None:
    for state in ("runs", "stopped"):
        body = {
            "Container": world.ids[state],
            "EndpointConfig": {"IPAMConfig": {"IPv4Address": "10.214.<n>.25"}, "Aliases": ["other"], "Links": ["x:y"]},
        }
        joined = ask(world, "POST", "/networks/idle/connect", fill(world, body))
        assert problems(world, "POST", CONNECT, joined) == []
        settings = world.engine.inspect(world.ids[state])["NetworkSettings"]["Networks"]["idle"]
        left = ask(world, "POST", "/networks/idle/disconnect", {"Container": world.ids[state]})
        assert problems(world, "POST", DISCONNECT, left) == []
        after = world.engine.inspect(world.ids[state])["NetworkSettings"]["Networks"]

        assert (joined.status, joined.body, left.status, left.body) == (200, b"", 200, b"")
        assert settings["IPAMConfig"] == {"IPv4Address": world.fill("10.214.<n>.25")}
        assert settings["Links"] == ["x:y"]
        assert settings["Aliases"] == ["other", world.ids[state][:12]]
        if state == "runs":
            assert settings["IPAddress"] == world.fill("10.214.<n>.25")
            assert settings["MacAddress"] == f"02:42:0a:d6:{world.engine.number:02x}:19"
        assert list(after) == ["net"]


def test_prune_takes_what_nobody_runs_on(world: World) -> None:
    create(world, bridge("keep", 4, Labels={"keep": "1"}))
    create(world, bridge("gone", 5, Labels={"gone": "1"}))
    nothing = ask(world, "POST", f"/networks/prune?{filters(until='24h', label='gone')}")
    unlabelled = "filters=" + urllib.parse.quote('{"label!":["keep","a"],"label":["gone"]}')
    pruned = ask(world, "POST", f"/networks/prune?{unlabelled}")
    assert ask(world, "DELETE", "/networks/keep").status == 204

    for answer, expected in ((nothing, None), (pruned, ["gone"])):
        assert problems(world, "POST", "/networks/prune", answer) == []
        assert answer.json == {"NetworksDeleted": expected}


# -- volumes --

VOLUME_ERRORS = [
    row("POST", VOLUME, VOLUME, 400, "got EOF while reading request body"),
    row("POST", VOLUME, VOLUME, 400, "create a: volume name is too short, .*", {"Name": "a"}),
    row(
        "POST", VOLUME, VOLUME, 400,
        'create a b: "a b" includes invalid characters for a local volume name, only ".*" are allowed. If you .*',
        {"Name": "a b"},
    ),
    row(
        "POST", VOLUME, VOLUME, 400, 'create wrong: invalid option key: "zz"',
        {"Name": "wrong", "DriverOpts": {"zz": "1"}}, reference=(400, 'create wrong: invalid option: "zz"'),
    ),
    row(
        "POST", VOLUME, VOLUME, 404, 'create wrong: error looking up volume plugin zz: plugin "zz" not found',
        {"Name": "wrong", "Driver": "zz"},
    ),
    row(
        "POST", VOLUME, VOLUME, 404, 'create used: error looking up volume plugin zz: plugin "zz" not found',
        {"Name": "used", "Driver": "zz"},
    ),
    row("GET", "/volumes/{name}", "/volumes/nope", 404, "get nope: no such volume"),
    row("GET", "/volumes/{name}", "/volumes/us", 404, "get us: no such volume"),
    row("GET", "/volumes", f"/volumes?{filters(zz='1')}", 400, "Invalid filter 'zz'"),
    row("GET", "/volumes", f"/volumes?{filters(dangling='zz')}", 400, r"Invalid filter 'dangling=\[zz\]'"),
    row(
        "GET", "/volumes", "/volumes?filters=zz", 400,
        "error reading volume filters: invalid character 'z' looking for beginning of value",
    ),
    row("DELETE", "/volumes/{name}", "/volumes/nope", 404, "get nope: no such volume"),
    row("DELETE", "/volumes/{name}", "/volumes/used", 409, r"remove used: volume is in use - \[<runs>\]"),
    row("DELETE", "/volumes/{name}", "/volumes/used?force=1", 409, r"remove used: volume is in use - \[<runs>\]"),
    row("POST", "/volumes/prune", f"/volumes/prune?{filters(until='1h')}", 400, "Invalid filter 'until'"),
]  # fmt: skip


@pytest.mark.parametrize("one", VOLUME_ERRORS, ids=str)
def test_a_volumes_refusal_is_worded_as_over_there(world: World, one: Any) -> None:
    before = known(world)
    check(world, one)

    assert known(world) == before


def test_a_volume_is_made_once_shown_listed_and_removed(world: World) -> None:
    body = {"Name": "made", "Labels": {"b": "1", "a": "2"}}
    first = ask(world, "POST", VOLUME, body)
    again = ask(world, "POST", VOLUME, {"Name": "made", "Driver": "local", "Labels": {"other": "1"}})
    shown = ask(world, "GET", "/volumes/made")
    listed = ask(world, "GET", f"/volumes?{filters(name='^made$')}")
    removed = ask(world, "DELETE", "/volumes/made")
    hidden = ask(world, "DELETE", "/volumes/made?force=1")

    assert problems(world, "POST", VOLUME, first) == []
    assert shapes.differences(first.json, "volume_create.json") == []
    assert first.json == again.json == shown.json
    assert list(first.json["Labels"]) == ["a", "b"]
    assert problems(world, "GET", "/volumes/{name}", shown) == []
    assert problems(world, "GET", "/volumes", listed) == []
    assert shapes.differences(listed.json, "volume_list.json") == []
    assert listed.json == {"Volumes": [first.json], "Warnings": None}
    assert (removed.status, hidden.status) == (204, 204)
    assert problems(world, "DELETE", "/volumes/{name}", removed) == []


def test_a_volume_with_options_is_shown_as_recorded_and_not_made_with_others(world: World) -> None:
    body = {"Name": "ram", "DriverOpts": {"type": "tmpfs", "device": "tmpfs", "o": "size=1m,uid=1000"}}
    made = ask(world, "POST", VOLUME, body)
    other = ask(world, "POST", VOLUME, {"Name": "ram", "DriverOpts": {"type": "tmpfs", "device": "tmpfs"}})
    without = ask(world, "POST", VOLUME, {"Name": "ram"})
    usage = ask(world, "GET", "/system/df")
    pruned = ask(world, "POST", f"/volumes/prune?{filters(label='none')}")
    assert ask(world, "DELETE", "/volumes/ram").status == 204

    assert shapes.differences(made.json, "volume_create_tmpfs.json") == []
    assert without.json == made.json
    if not world.engine.is_reference:
        assert (other.status, other.message) == (
            409, "create ram: volume 'ram' exists already with other driver options",
        )  # fmt: skip
    assert [one["Name"] for one in usage.json["Volumes"]] == ["used"]
    assert shapes.differences(usage.json["Volumes"], shapes.recorded("system_df.json")["Volumes"]) == []
    assert pruned.json == {"VolumesDeleted": [], "SpaceReclaimed": 0}


def test_volumes_are_filtered_and_pruned(world: World) -> None:
    names = {}
    for label in ("x", "y", ""):
        answer = ask(world, "POST", VOLUME, {"Labels": {label: "1"} if label else None})
        names[label] = answer.json["Name"]
        assert len(names[label]) == 64
    option = ask(world, "POST", VOLUME, {"Name": "kept", "DriverOpts": {"type": "tmpfs", "device": "tmpfs"}})
    assert option.status == 201

    def listed(**given: str) -> set[str]:
        return {volume["Name"] for volume in ask(world, "GET", f"/volumes?{filters(**given)}").json["Volumes"]}

    lists = [
        listed(dangling="true"),
        listed(dangling="0"),
        listed(label="x=1"),
        listed(driver="zz"),
        listed(name="^us"),
    ]
    labelled = ask(world, "POST", f"/volumes/prune?{filters(label='x')}")
    pruned = ask(world, "POST", "/volumes/prune?filters=" + urllib.parse.quote('{"label!":["y"]}'))
    assert problems(world, "POST", "/volumes/prune", pruned) == []
    left = listed()
    for name in (names["y"], "kept"):
        assert ask(world, "DELETE", f"/volumes/{name}").status == 204

    assert lists == [{*names.values(), "kept"}, {"used"}, {names["x"]}, set(), {"used"}]
    assert labelled.json["VolumesDeleted"] == [names["x"]]
    assert pruned.json["VolumesDeleted"] == [names[""]]
    assert left == {names["y"], "kept", "used"}
