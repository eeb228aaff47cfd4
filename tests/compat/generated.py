"""Requests made up from the API's description (tests/data/v1.39.yaml), right and wrong ones, as Hypothesis strategies.

What a request may do to the machine is bounded by `VALUES`: images come from the test's registry, binds from its
directory, commands are short and harmless, registries that are asked are on loopback. Where the description has no
more than a type, anything of that type comes, and now and then something of another.

Names come from small pools, so that requests meet what earlier ones made.
"""

from __future__ import annotations

import functools
import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from tests.build.case import pack
from tests.compat import shapes

DEPTH = 4  # how deep bodies go
MAKING = (
    "/containers/create",
    "/containers/{id}/start",
    "/containers/{id}/exec",
    "/networks/create",
    "/volumes/create",
)
ABSENT = ("/plugins", "/nodes", "/swarm", "/services", "/tasks", "/secrets", "/configs", "/session")
STRANGE = ["nobody", "c1x", "a" * 300, "ä ö", "%00", "sha256:zz", "UPPER/Case:Tag", "-", "c1?x=1"]
NOWHERE = "127.0.0.1:1"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
BOOLEANS = st.sampled_from(["1", "0", "true", "false", "", "maybe"])
NUMBERS = st.sampled_from(["0", "1", "3", "-1", "x", "", "1.5", "99999999999999999999", "0x10"])
TEXTS = st.text(max_size=6) | st.sampled_from(["", "x", "a=b", "1h", "@", "\0", "é"])
TIMES = st.sampled_from(["0", "1700000000", "1700000000.5", "x", "-1", "2024-01-02T03:04:05Z", "10m", ""])
FILTERS = st.builds(
    lambda entries, raw, choose: raw if choose == 0 else json.dumps(entries),
    st.dictionaries(
        st.sampled_from(
            "all ancestor before dangling driver event exited expose health id image is-task isolation label label! "
            "name network publish reference scope since status type until volume zz".split()
        ),
        st.lists(
            st.sampled_from(["c1", "v1", "n1", "true", "1", "running", "bridge", "a=b", "80/tcp", "x", ""]), max_size=2
        )
        | st.dictionaries(st.sampled_from(["c1", "true", "a=b"]), st.booleans(), max_size=2),
        max_size=2,
    ),
    st.sampled_from(["", "{", "[]", "null", "x", '{"label":1}', '{"label":{"a":"b"}}']),
    st.integers(0, 4),
)


@dataclass(frozen=True)
class Place:
    """The names that requests may use."""

    image: str
    registry: str
    directory: str  # that may be bound
    number: int  # of the engine: its subnets are 10.219.N.0/24 and 10.220.N.0/24


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # as the description has it
    target: str  # as it is sent; `<exec>` is one of the execs made so far
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def sampled(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def lists(*values: Any) -> st.SearchStrategy[Any]:
    return st.none() | st.lists(st.sampled_from(values), max_size=2)


@functools.cache
def values_of(place: Place) -> dict[str, st.SearchStrategy[Any]]:
    """Fields of bodies and parameters by name, where their type alone would not do."""
    references = (
        place.image,
        place.image.split(":1.0")[0],
        f"{NOWHERE}/x",
        f"{place.registry}/nothing:1",
        "scratch",
        "",
    )
    return {
        # what runs
        "Image": sampled(place.image, place.image, place.image, f"{NOWHERE}/x:1", "", "Bad Name"),
        "Cmd": sampled(["sleep", "5"], ["true"], ["sh", "-c", "echo x; echo y >&2"], ["nope"], None, [], "true"),
        "Entrypoint": sampled(None, None, None, [], ["sleep"], ""),
        "User": sampled("", "", "nobody", "0:0", "nope", "1:2:3", "-1"),
        "WorkingDir": sampled("", "/", "/new", "rel", "/etc/passwd"),
        "Env": lists("A=b", "A", "=b", "PATH=/bin"),
        "Shell": lists("/bin/sh", "-c"),
        "StopSignal": sampled("", "SIGTERM", "9", "SIGNOPE"),
        "StopTimeout": sampled(0, 1),
        "Hostname": sampled("", "host", "a" * 70, "ä"),
        "Test": sampled(["CMD", "true"], ["CMD-SHELL", "false"], ["NONE"], [], ["BAD"]),
        "Interval": sampled(0, 1, 10**9, -1),
        "Timeout": sampled(0, 10**6, 10**9),
        # what it may touch
        "Binds": lists(
            "v1:/v", f"{place.directory}:/b:ro", f"{place.directory}/made:/m", "v2:/v:nocopy", "/x", ":", "v1:v"
        ),
        "Mounts": lists(
            {"Type": "volume", "Source": "v1", "Target": "/w"},
            {"Type": "bind", "Source": place.directory, "Target": "/b", "ReadOnly": True},
            {"Type": "tmpfs", "Target": "/t", "TmpfsOptions": {"SizeBytes": 4096}},
            {"Type": "bad", "Target": "/x"},
            {"Type": "volume", "Target": "rel"},
        ),
        "Devices": lists({"PathOnHost": "/dev/null", "PathInContainer": "/dev/nil", "CgroupPermissions": "rwm"}, {}),
        "DeviceCgroupRules": lists("c 1:3 rwm", "bad"),
        "CgroupParent": sampled("", ""),
        "Sysctls": sampled(None, {}, {"net.ipv4.ip_forward": "0"}, {"kernel.bad": "1"}),
        "Privileged": sampled(False, False, False, True),
        "CapAdd": lists("NET_ADMIN", "CAP_CHOWN", "ALL", "BAD"),
        "CapDrop": lists("NET_ADMIN", "ALL", "BAD"),
        "SecurityOpt": lists("no-new-privileges", "seccomp=unconfined", "bad", "x=y"),
        "NetworkMode": sampled("none", "none", "none", "bridge", "n1", "container:c1", "nothing"),
        "PidMode": sampled("", "", "host", "container:c1", "bad"),
        "IpcMode": sampled("", "", "private", "shareable", "host", "none", "container:c1", "bad"),
        "UTSMode": sampled("", "host", "bad"),
        "UsernsMode": sampled("", "host", "bad"),
        "Runtime": sampled("", "", "runc", "nope"),
        "Isolation": sampled("", "default", "hyperv"),
        "LogConfig": sampled(None, {"Type": "json-file", "Config": {}}, {"Type": "none"}, {"Type": "nope"}),
        "RestartPolicy": sampled(
            None,
            {"Name": "no"},
            {"Name": "on-failure", "MaximumRetryCount": 1},
            {"Name": "bad"},
            {"Name": "no", "MaximumRetryCount": -1},
        ),
        "VolumesFrom": lists("c1", "c2:ro", "nobody", "c1:bad"),
        "Volumes": sampled(None, {}, {"/anonymous": {}}, {"rel": {}}),
        "Links": lists("c1:x", "nobody", ":"),
        "PortBindings": sampled(
            None, {}, {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}, {"x": []}, {"80/tcp": None}
        ),
        "ExposedPorts": sampled(None, {}, {"80/tcp": {}}, {"80": {}}, {"x/y": {}}),
        "PublishAllPorts": sampled(False),
        "Dns": lists("127.0.0.1", "bad"),
        "ExtraHosts": lists("a:1.2.3.4", "bad", "a:b"),
        "Tmpfs": sampled(None, {"/t": "size=1m"}, {"/t": "bad"}, {"rel": ""}),
        "StorageOpt": sampled(None, None, {"size": "1G"}),
        "CpusetCpus": sampled("", "0", "0-9999", "x"),
        "CpusetMems": sampled("", "0", "x"),
        "MacAddress": sampled("", "02:42:0a:00:00:01", "bad"),
        "Memory": sampled(0, 4 << 20, 64 << 20, 1, -1, 2**62),
        "MemorySwap": sampled(0, -1, 128 << 20, 1),
        "KernelMemory": sampled(0, 1),
        "PidsLimit": sampled(0, -1, 50),
        "NanoCPUs": sampled(0, 10**9, 10**12, -1),
        "CpuCount": sampled(0),
        "CpuPercent": sampled(0),
        "ShmSize": sampled(0, 1 << 20, -1),
        "EndpointsConfig": sampled(
            None, {}, {"n1": {}}, {"n1": {"Aliases": ["x"], "IPAMConfig": {"IPv4Address": "bad"}}}
        ),
        # networks and volumes
        "Name": sampled("n1", "n2", "v1", "v2", "host", "", "bad name", "-x"),
        "Driver": sampled("", "bridge", "local", "nope"),
        "IPAM": sampled(
            None,
            {"Config": [{"Subnet": f"10.219.{place.number}.0/24"}]},
            {"Config": [{"Subnet": f"10.220.{place.number}.0/24", "Gateway": f"10.220.{place.number}.7"}]},
            {"Config": [{"Subnet": "bad"}]},
            {"Driver": "nope"},
            {"Config": [{"Subnet": f"10.219.{place.number}.1/33"}]},
        ),
        "Options": sampled(
            None, {}, {"com.docker.network.bridge.enable_icc": "false"}, {"com.docker.network.driver.mtu": "x"}
        ),
        "EnableIPv6": sampled(False),
        "DriverOpts": sampled(
            None, {}, {"type": "tmpfs", "device": "tmpfs", "o": "size=1m"}, {"bad": "x"}, {"type": "nope"}
        ),
        "ConfigFrom": sampled(None, {"Network": ""}, {"Network": "nothing"}),
        "ConfigOnly": sampled(False, False, True),
        "Container": sampled("c1", "c2", "nobody", ""),
        # registries
        "serveraddress": sampled(place.registry, f"http://{NOWHERE}", NOWHERE),
        "fromImage": sampled(*references),
        "fromSrc": sampled("-", f"http://{NOWHERE}/x.tar", "zz"),
        "remote": sampled("", f"http://{NOWHERE}/x", "zz", f"http://{NOWHERE}/x.git"),
        "repo": sampled(f"{NOWHERE}/made", f"{NOWHERE}/made/b", "Bad", ""),
        "tag": sampled("1", "latest", "", "bad tag", "sha256:" + "0" * 64),
        "term": sampled(f"{NOWHERE}/x", f"{NOWHERE}/"),
        "src": sampled(place.image, "nothing", ""),
        "dest": sampled(place.image, "nothing", ""),
        "names": sampled(place.image, "nothing"),
        "platform": sampled("", "linux/amd64", "linux", "windows", "x/y/z/w"),
        "changes": sampled("ENV a=b", "LABEL x=y", "RUN x", "FROM x", "EXPOSE zz", ""),
        # the rest of the parameters
        "container": sampled("c1", "c2", "nobody", ""),
        "name": sampled("c1", "c2", "c3", "c1/x", "-bad", "", "a"),
        "path": sampled("/", "/etc/passwd", "/etc", "etc/../tmp", "", "/nothing", "/proc/self"),
        "signal": sampled("", "KILL", "SIGTERM", "0", "10", "NOPE", "99"),
        "since": TIMES,
        "until": TIMES,
        "filters": FILTERS,
        "ps_args": sampled("", "-ef", "aux", "-o pid,cmd", "-o cmd", "--nope"),
        "tail": sampled("all", "0", "5", "x", "-1"),
        "detachKeys": sampled("", "ctrl-p", "ctrl-zz", "a,b"),
        "condition": sampled("", "not-running", "next-exit", "removed", "x"),
        "dockerfile": sampled("", "Dockerfile", "../x", "nope"),
        "t": sampled("0", "1", "x"),  # seconds of a stop; a build reads it as a tag
        "networkmode": sampled("none", "nope"),
        "squash": sampled("", "0"),
        "cachefrom": sampled("", "[]", "x", '["nothing"]'),
        "buildargs": sampled("", "{}", '{"a":null}', "x", "[]"),
        "labels": sampled("", '{"a":"b"}', "x"),
        "Content-type": sampled("application/x-tar", "text/plain"),
        "X-Registry-Auth": sampled("", "e30=", "x"),
        "X-Registry-Config": sampled("", "e30=", "x"),
    }


def bodies(place: Place, path: str) -> st.SearchStrategy[Any]:
    """What is sent where the description says binary, by path."""
    tar = pack({"file": "x", "d/l": {"link": "../file"}})
    context = pack({"Dockerfile": f"FROM {place.image}\nLABEL a=b\n"})
    archives = [tar, context, b"", b"garbage" * 100, tar[:700], pack({"../out": "x"}), bytes(1024)]
    return st.sampled_from([context, *archives] if path == "/build" else archives)


def requests(place: Place) -> st.SearchStrategy[Request]:
    """Any operation, with any parameters; those that change something more often, those we never have less."""
    chosen = []
    for method, path in shapes.operations():
        often = 8 if path in MAKING else 1 if path.startswith(ABSENT) else 4
        chosen += [(method, path)] * often
    return st.sampled_from(chosen).flatmap(lambda one: _requests(place, *one))


@st.composite
def _requests(draw: st.DrawFn, place: Place, method: str, path: str) -> Request:
    values = values_of(place)
    target, query, headers, body = path, [], {}, b""
    for parameter in shapes.description()["paths"][path][method.lower()].get("parameters", ()):
        name, where = parameter["name"], parameter["in"]
        if where == "path":
            text = draw(_identifiers(place, path))
            target = target.replace(f"{{{name}}}", text if text == "<exec>" else urllib.parse.quote(text, safe="/:"))
        elif where == "body":
            body, headers = draw(_body(place, path, parameter["schema"], values)), {"Content-Type": "application/json"}
        elif parameter.get("required") or draw(st.integers(0, 2)) == 0:
            value = draw(values[name] if name in values else _parameter(parameter))
            if where == "query":
                query.append((name, value))
            else:
                headers[name] = value
    if draw(st.integers(0, 30)) == 0:
        headers["Content-Type"] = "text/plain"
    if draw(st.integers(0, 30)) == 0:
        query.append((draw(TEXTS), draw(TEXTS)))
    suffix = f"?{urllib.parse.urlencode(query)}" if query else ""
    return Request(method, path, f"/v1.39{target}{suffix}", body, headers)


def _identifiers(place: Place, path: str) -> st.SearchStrategy[str]:
    if path.startswith("/exec/"):
        return sampled("<exec>", "<exec>", "nobody")
    if path.startswith("/containers/"):
        return sampled("c1", "c1", "c2", "c2", "c3", *STRANGE)
    if path.startswith("/networks/"):
        return sampled("n1", "n2", "bridge", "none", *STRANGE)
    if path.startswith("/volumes/"):
        return sampled("v1", "v2", *STRANGE)
    # No name that would be looked for in a public registry.
    here = (place.image, f"{NOWHERE}/made:1", f"{NOWHERE}/made/b:latest", f"{NOWHERE}/x", f"{place.registry}/nothing:1")
    return sampled(*here) if path.startswith("/distribution/") else sampled(*here, *STRANGE)


def _parameter(parameter: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    if "enum" in parameter:
        return sampled(*parameter["enum"], "x")
    return {"boolean": BOOLEANS, "integer": NUMBERS}.get(parameter.get("type", "string"), TEXTS)


@st.composite
def _body(draw: st.DrawFn, place: Place, path: str, schema: Mapping[str, Any], values: Mapping[str, Any]) -> bytes:
    if schema.get("format") == "binary" or (schema.get("type") == "string" and "properties" not in schema):
        return bytes(draw(bodies(place, path)))
    if path == "/auth":  # without an address it would be a public one
        return json.dumps({"username": draw(TEXTS), "serveraddress": draw(values["serveraddress"])}).encode()
    how = draw(st.integers(0, 12))
    if how == 0:
        return draw(sampled(b"", b"{", b"null", b"[]", b'"x"', b"\xff", b"{}{}"))
    if how == 1:
        return json.dumps(draw(JSON)).encode()
    value = draw(_value(schema, values, DEPTH))
    if path == "/containers/create" and isinstance(value, dict):
        # Without these nearly nothing is ever made, and what is made takes ten seconds to stop.
        value.setdefault("Image", place.image)
        value.setdefault("StopTimeout", 0)
        if not isinstance(value.get("HostConfig"), dict):
            value["HostConfig"] = {"NetworkMode": "none"}
        value["HostConfig"].setdefault("NetworkMode", "none")
    return json.dumps(value).encode()


@st.composite
def _value(draw: st.DrawFn, schema: Mapping[str, Any], values: Mapping[str, Any], depth: int) -> Any:
    schema = shapes.resolve(schema)
    if draw(st.integers(0, 60)) == 0:
        return draw(JSON)
    if "enum" in schema:
        return draw(sampled(*schema["enum"], "x"))
    wanted = schema.get("type", "object" if "properties" in schema else "string")
    if wanted == "object":
        answer = {}
        for name, inner in schema.get("properties", {}).items():
            # A request with every field is refused for one of them: few are set.
            if depth > 0 and draw(st.integers(0, 6)) == 0:
                answer[name] = draw(values[name] if name in values else _value(inner, values, depth - 1))
        others = schema.get("additionalProperties")
        if isinstance(others, dict) and depth > 0 and draw(st.booleans()):
            answer[draw(sampled("a", "b", "com.example.x"))] = draw(_value(others, values, depth - 1))
        return answer
    if wanted == "array":
        items = schema.get("items", {"type": "string"})
        return draw(st.none() | st.lists(_value(items, values, depth - 1), max_size=2)) if depth > 0 else []
    if wanted == "boolean":
        return draw(st.booleans())
    if wanted in ("integer", "number"):
        return draw(sampled(0, 1, -1, 10, 1000, 10**9, 2**63 - 1, -(2**63)))
    return draw(TEXTS)
