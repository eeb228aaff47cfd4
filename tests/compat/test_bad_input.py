"""Bad input gets a clear answer, changes nothing and leaves nothing; the engine goes on."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.compat.images import (
    MANIFEST_TYPE,
    busybox_layer,
    device,
    digest,
    directory,
    file,
    link,
    make_tar,
)
from tests.compat.lying_registry import LyingRegistry, lying_registry
from tests.engine_process import EngineProcess, Response, leftovers, wait_until
from tests.leftovers import wait_for_no_leftovers

pytestmark = pytest.mark.root

JSON = {"Content-Type": "application/json"}
CREATE = "/v1.39/containers/create"


def everything(engine: EngineProcess) -> dict[str, Any]:
    """All that the engine knows of, by ID."""
    volumes = engine.request("GET", "/v1.39/volumes").json["Volumes"] or []
    return {
        "containers": sorted(one["Id"] for one in engine.request("GET", "/v1.39/containers/json?all=1").json),
        "images": sorted(one["Id"] for one in engine.request("GET", "/v1.39/images/json?all=1").json),
        "volumes": sorted(one["Name"] for one in volumes),
        "networks": sorted(one["Id"] for one in engine.request("GET", "/v1.39/networks").json),
    }


def directories(engine: EngineProcess) -> set[str]:
    """What lies two levels deep in the data root; what is on its way out (`trash`) does not count."""
    return {
        f"{child.parent.name}/{child.name}"
        for top in engine.data_root.iterdir()
        if top.is_dir() and top.name not in ("trash", "tmp", "containerd", "runtimes")
        for child in top.iterdir()
    }


@pytest.fixture
def unchanged(engine: EngineProcess) -> Iterator[EngineProcess]:
    """The engine, which after the test knows, and has left, exactly what it knew and had before."""
    known, machine, files = everything(engine), leftovers(), directories(engine)
    yield engine
    assert engine.request("GET", "/_ping").body == b"OK"
    assert everything(engine) == known
    assert wait_for_no_leftovers(machine) == {}
    if not engine.is_reference:
        wait_until(lambda: not directories(engine) - files, what=f"no more than {files}")


def refused(answer: Response, status: int | tuple[int, ...], *parts: str) -> None:
    statuses = (status,) if isinstance(status, int) else status
    assert answer.status in statuses, (answer.status, answer.body)
    assert answer.headers["content-type"] == "application/json", answer.headers
    assert set(answer.json) == {"message"}
    assert all(part in answer.message for part in parts), (answer.message, parts)


# -- JSON --


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        pytest.param(b'{"Image":', 500, "unexpected EOF", id="cut"),
        pytest.param(b"{Image: 1}", 500, "invalid character 'I' looking for beginning of object key string", id="bare"),
        pytest.param(b'{"Image": 5}', 500, "json: cannot unmarshal number into Go struct field", id="number"),
        pytest.param(b'{"Image": {}}', 500, "json: cannot unmarshal object into Go struct field", id="object"),
        pytest.param(b'{"Cmd": [1]}', 500, "json: cannot unmarshal", id="numbers"),
        pytest.param(b'{"HostConfig": {"Memory": "x"}}', 500, "json: cannot unmarshal string into", id="word"),
        pytest.param(b'{"HostConfig": {"Memory": 1.5}}', 500, "json: cannot unmarshal number 1.5 into", id="fraction"),
        pytest.param(b'{"HostConfig": {"Memory": 99999999999999999999}}', 500, "json: cannot unmarshal", id="huge"),
        pytest.param(b'{"HostConfig": {"Memory": NaN}}', 500, "invalid character 'N'", id="nan"),
        pytest.param(b'{"Tty": "yes"}', 500, "json: cannot unmarshal string into Go struct field", id="bool"),
        pytest.param(b"[]", 500, "json: cannot unmarshal array into Go value of type", id="list"),
        pytest.param(b'"text"', 500, "json: cannot unmarshal string into Go value of type", id="text"),
        pytest.param(b"null", 400, "Config cannot be empty in order to create a container", id="null"),
        pytest.param(b"{}", 400, "Config cannot be empty in order to create a container", id="nothing"),
        pytest.param(b'{"Tty": true}', 400, "No command specified", id="no-image"),
        pytest.param(b"\xff\xfe{}", 500, "invalid character", id="bytes"),
        pytest.param(b'{"Image": "\xff\xfe"}', (400, 404, 500), "", id="not-utf8"),
        pytest.param(b'{"a":' * 20_000 + b"1" + b"}" * 20_000, (400, 500), "", id="deep"),
        pytest.param(b"[" * 200_000, (400, 500), "", id="deeper"),
    ],
)
def test_bodies_that_are_no_container(unchanged: EngineProcess, body: bytes, status: int, text: str) -> None:
    refused(unchanged.request("POST", CREATE, body, headers=JSON), status, text)


def test_content_type_must_be_json(unchanged: EngineProcess) -> None:
    answer = unchanged.request("POST", CREATE, b"{}", headers={"Content-Type": "text/plain"})
    refused(answer, 400, "Content-Type specified (text/plain) must be 'application/json'")
    parameters = {"Content-Type": "application/json; charset=utf-8"}
    refused(unchanged.request("POST", CREATE, b'{"Tty": true}', headers=parameters), 400, "No command specified")


def test_empty_bodies(unchanged: EngineProcess) -> None:
    refused(unchanged.request("POST", CREATE, headers=JSON), 500, "EOF")
    # dockerd 20.10 says EOF in its own way for volumes.
    for path in ("/v1.39/volumes/create", "/v1.39/networks/create"):
        refused(unchanged.request("POST", path, b"", headers=JSON), (400, 500), "EOF")


def test_unknown_fields_and_other_spellings_are_accepted(engine: EngineProcess, busybox: str) -> None:
    body = {"image": busybox, "CMD": ["true"], "Surprise": {"deep": [1]}, "HostConfig": {"NoSuchKey": 1}}

    answer = engine.request("POST", CREATE, body)

    assert answer.status == 201, answer.body
    assert engine.inspect(answer.json["Id"])["Config"]["Cmd"] == ["true"]


# -- names and references --


@pytest.mark.parametrize("name", ["a", "-x", ".x", "x%20y", "x%2Fy", "..%2Fx", "%C3%A9%C3%A9", "x%00y", "a:b"])
def test_container_names(unchanged: EngineProcess, busybox: str, name: str) -> None:
    answer = unchanged.request("POST", f"{CREATE}?name={name}", {"Image": busybox})
    refused(answer, 400, "Invalid container name (", "only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ("fromImage=UPPER", 400, "invalid reference format"),
        ("fromImage=a:b:c", 400, "invalid reference format"),
        ("fromImage=http://host/x", 400, "invalid reference format"),
        ("fromImage=x&tag=bad%20tag", 400, "invalid"),
        ("fromImage=x&tag=sha256:12", 400, "invalid"),
        ("fromImage=-x", 400, "invalid reference format"),
        ("fromImage=x/../y", 400, "invalid reference format"),
        ("fromImage=" + "a" * 256, 400, "repository name must not be more than 255 characters"),
        ("fromImage=" + "0" * 64, 400, "cannot specify 64-byte hexadecimal strings"),
        ("fromImage=127.0.0.1:1/x&tag=1", 500, "connection refused"),
    ],
)
def test_references_to_pull(unchanged: EngineProcess, query: str, status: int, text: str) -> None:
    refused(unchanged.request("POST", f"/v1.39/images/create?{query}"), status, text)


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/images/nothing:1/json", 404, "No such image: nothing:1"),
        ("GET", "/images/UPPER/json", (400, 404), "invalid reference format"),
        ("DELETE", "/images/nothing", 404, "No such image: nothing:latest"),
        ("DELETE", "/images/UPPER", (400, 404), "invalid reference format"),
        ("POST", "/images/nothing/tag?repo=x", 404, "No such image: nothing:latest"),
        ("POST", "/images/{image}/tag?repo=UPPER", (400, 500), "invalid reference format"),
        ("POST", "/images/{image}/tag?repo=x&tag=b%20d", (400, 500), "invalid tag format"),
        ("GET", "/images/json?filters=x", (400, 500), "invalid character 'x' looking for beginning of value"),
        ("GET", '/images/json?filters={{"nope":["x"]}}', 400, "Invalid filter 'nope'"),
        ("GET", "/containers/json?filters=[]", (400, 500), "json: cannot unmarshal array"),
        ("GET", '/containers/json?filters={{"nope":["x"]}}', 400, "Invalid filter 'nope'"),
        ("GET", '/containers/json?filters={{"status":["nope"]}}', 400, "Invalid filter 'status=nope'"),
        ("GET", "/containers/json?limit=x", 500, 'strconv.Atoi: parsing "x": invalid syntax'),
        ("GET", "/containers/ghost/json", 404, "No such container: ghost"),
        ("POST", "/containers/ghost/start", 404, "No such container: ghost"),
        ("POST", "/containers/ghost/kill", 404, "Cannot kill container: ghost: No such container: ghost"),
        ("POST", "/containers/ghost/wait", 404, "No such container: ghost"),
        ("DELETE", "/containers/ghost", 404, "No such container: ghost"),
        ("GET", "/exec/ghost/json", 404, "No such exec instance: ghost"),
        ("POST", "/exec/ghost/start", 404, "No such exec instance: ghost"),
        ("GET", "/volumes/ghost", 404, "get ghost: no such volume"),
        ("DELETE", "/volumes/ghost", 404, "get ghost: no such volume"),
        ("GET", "/events?since=yesterday", (400, 500), 'strconv.ParseInt: parsing "yesterday": invalid syntax'),
        ("GET", "/nothing/here", 404, "page not found"),
        ("PATCH", "/containers/json", 404, "page not found"),
        ("GET", "/v1.11/containers/json", 400, "client version 1.11 is too old"),
        ("GET", "/v1.99/containers/json", 400, "client version 1.99 is too new. Maximum supported API version is 1."),
    ],
)
def test_calls_for_what_is_not_there(
    unchanged: EngineProcess, busybox: str, method: str, path: str, status: int, text: str
) -> None:
    path = path.format(image=busybox).replace('"', "%22").replace("{", "%7B").replace("}", "%7D")
    path = path if path.startswith(("/v1", "/nothing")) else f"/v1.39{path}"
    answer = unchanged.request(method, path, {} if path.endswith("/start") and "exec" in path else None)
    if "v1.11" in path:  # text, not JSON, for clients of that age
        assert (answer.status, answer.headers["content-type"].split(";")[0]) == (status, "text/plain")
        assert text.encode() in answer.body
    else:
        refused(answer, status, text)


def test_calls_with_bad_parameters(unchanged: EngineProcess, busybox: str) -> None:
    container = unchanged.request("POST", CREATE, {"Image": busybox, "Cmd": ["sleep", "1000"]}).json["Id"]
    base = f"/v1.39/containers/{container}"

    try:
        for path, status, text in (
            (f"{base}/stop?t=x", 500, 'strconv.Atoi: parsing "x": invalid syntax'),
            (f"{base}/kill?signal=NOPE", 400, "nvalid signal: NOPE"),
            (f"{base}/kill", 409, f"Cannot kill container: {container}: Container {container} is not running"),
            (f"{base}/pause", 409, f"Container {container} is not running"),
            (f"{base}/unpause", 500, f"Container {container} is not paused"),
            (f"{base}/resize?h=x&w=1", 400, 'strconv.Atoi: parsing "x": invalid syntax'),
            (f"{base}/resize?h=1&w=1", 409, f"Container {container} is not running"),
            (f"{base}/rename?name=", 400, "Neither old nor new names may be empty"),
            (f"{base}/rename?name=-", 400, "Error when allocating new name: Invalid container name ("),
        ):
            refused(unchanged.request("POST", path), status, text)
        refused(unchanged.request("GET", f"{base}/logs"), 400, "you must choose at least one stream")
        since = unchanged.request("GET", f"{base}/logs?stdout=1&since=soon")
        refused(since, (400, 500), 'strconv.ParseInt: parsing "soon": invalid syntax')
        refused(unchanged.request("GET", f"{base}/top"), 409, f"Container {container} is not running")
        refused(unchanged.request("POST", f"{base}/exec", {"Cmd": []}), 400, "No exec command specified")
        refused(unchanged.request("POST", f"{base}/exec", {"Cmd": ["true"]}), 409, "is not running")
        refused(unchanged.request("POST", f"{base}/start", b"x" * 10), 400, "starting container with non-empty request")
        update = {"Memory": 1 << 30, "MemorySwap": 1 << 20}
        refused(unchanged.request("POST", f"{base}/update", update), (400, 409), "emory")
        answer = unchanged.request("POST", f"{base}/attach?stream=1&stdout=1&detachKeys=nope,nope")
        assert answer.status == 400
        assert b"Invalid detach keys (nope,nope) provided" in answer.body
    finally:
        unchanged.remove_containers()


# -- what a container may not be --


@pytest.mark.parametrize(
    ("config", "status", "text"),
    [
        ({"Image": "nothing:1"}, 404, "No such image: nothing:1"),
        (
            {"WorkingDir": "relative"},
            400,
            "the working directory 'relative' is invalid, it needs to be an absolute path",
        ),
        ({"StopSignal": "NOPE"}, 400, "nvalid signal: NOPE"),
        ({"Env": ["=x"]}, 400, "invalid environment variable: =x"),
        ({"Healthcheck": {"Interval": 1000}}, 400, "Interval in Healthcheck cannot be less than 1ms"),
        ({"HostConfig": {"Memory": 1024}}, 400, "Minimum memory limit allowed is"),
        (
            {"HostConfig": {"Memory": 64 << 20, "MemorySwap": 32 << 20}},
            400,
            "Minimum memoryswap limit should be larger than memory limit",
        ),
        ({"HostConfig": {"NanoCpus": 10**13}}, 400, "Range of CPUs is from 0.01 to"),
        ({"HostConfig": {"CpusetCpus": "0-x"}}, 400, "Invalid value 0-x for cpuset cpus"),
        ({"HostConfig": {"CpusetCpus": "999"}}, 400, "Requested CPUs are not available"),
        ({"HostConfig": {"OomScoreAdj": 2000}}, 400, "Invalid value 2000, range for oom score adj is [-1000, 1000]"),
        ({"HostConfig": {"ShmSize": -1}}, 400, "SHM size can not be less than 0"),
        ({"HostConfig": {"Runtime": "nope"}}, 400, "nknown runtime specified nope"),
        ({"HostConfig": {"RestartPolicy": {"Name": "nope"}}}, 400, "invalid restart policy 'nope'"),
        (
            {"HostConfig": {"RestartPolicy": {"Name": "always"}, "AutoRemove": True}},
            400,
            "can't create 'AutoRemove' container with restart policy",
        ),
        ({"HostConfig": {"Binds": ["relative/path:/x"]}}, (400, 500), "relative/path"),
        ({"HostConfig": {"Binds": ["/a:b"]}}, (400, 500), "invalid mount path: 'b' mount path must be absolute"),
        ({"HostConfig": {"Binds": ["/a:/b:zz"]}}, (400, 500), "invalid mode: zz"),
        ({"HostConfig": {"Binds": ["/a:/"]}}, (400, 500), "destination can't be '/'"),
        ({"HostConfig": {"Binds": ["/a:/x", "/b:/x"]}}, 400, "Duplicate mount point: /x"),
        ({"HostConfig": {"Mounts": [{"Type": "zz", "Target": "/x"}]}}, 400, "mount type unknown"),
        ({"HostConfig": {"Mounts": [{"Type": "bind", "Target": "/x"}]}}, 400, "field Source must not be empty"),
        (
            {"HostConfig": {"Mounts": [{"Type": "bind", "Target": "/x", "Source": "/no/such"}]}},
            400,
            "bind source path does not exist: /no/such",
        ),
        ({"HostConfig": {"PortBindings": {"x/tcp": [{"HostPort": "1"}]}}}, (400, 500), "nvalid"),
        ({"HostConfig": {"SecurityOpt": ["nope"]}}, (400, 500), "invalid --security-opt"),
        ({"HostConfig": {"ExtraHosts": ["nope"]}}, 400, 'bad format for add-host: "nope"'),
        ({"HostConfig": {"VolumesFrom": ["ghost"]}}, (400, 404), "No such container: ghost"),
        ({"HostConfig": {"LogConfig": {"Type": "nope"}}}, (400, 404, 500), "nope"),
        ({"HostConfig": {"LogConfig": {"Type": "json-file", "Config": {"nope": "1"}}}}, 400, "unknown log opt 'nope'"),
        ({"HostConfig": {"PidMode": "container:ghost"}}, (400, 404), "No such container: ghost"),
        ({"HostConfig": {"NetworkMode": "container:"}}, 400, "nvalid container format container:<name|id>"),
        (
            {"NetworkingConfig": {"EndpointsConfig": {"a": {}, "b": {}}}},
            400,
            "Container cannot be connected to network endpoints: ",
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_configurations_refused_at_create(
    unchanged: EngineProcess, busybox: str, config: dict[str, Any], status: int, text: str
) -> None:
    if unchanged.is_reference and "LogConfig" in str(config):
        pytest.skip("dockerd looks 15 s for a plugin of that name")
    refused(unchanged.request("POST", CREATE, {"Image": busybox, "Cmd": ["true"], **config}), status, text)


@pytest.mark.parametrize(
    ("config", "status", "text"),
    [
        ({"Cmd": ["no-such-command"]}, 400, "executable file not found in $PATH"),
        ({"Cmd": ["/etc"]}, 400, ""),
        ({"User": "ghost"}, (400, 500), "unable to find user ghost: no matching entries in passwd file"),
        ({"User": "root:ghost"}, (400, 500), "unable to find group ghost"),
        ({"HostConfig": {"Devices": [{"PathOnHost": "/dev/ghost", "PathInContainer": "/dev/x"}]}}, 500, "/dev/ghost"),
        ({"HostConfig": {"Sysctls": {"kernel.hostname": "x"}}}, (400, 500), "kernel.hostname"),
        ({"HostConfig": {"Ulimits": [{"Name": "nofile", "Soft": 9, "Hard": 5}]}}, (400, 500), "limit"),
        ({"HostConfig": {"Tmpfs": {"/x": "zz"}}}, (400, 500), "invalid tmpfs option"),
        ({"HostConfig": {"DeviceCgroupRules": ["nope"]}}, (400, 500), "nope"),
        ({"HostConfig": {"IpcMode": "nope"}}, (400, 500), "nvalid IPC mode: nope"),
        ({"HostConfig": {"NetworkMode": "ghost"}}, 404, "network ghost not found"),
        ({"HostConfig": {"NetworkMode": "container:ghost"}}, (400, 404), "No such container: ghost"),
        ({"Hostname": "x" * 300}, (400, 500), "sethostname: invalid argument"),
        ({"HostConfig": {"Binds": ["/etc/passwd:/tmp"]}}, 400, "Are you trying to mount a directory onto a file"),
        ({"MacAddress": "nope"}, (400, 500), "nope"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_starts_that_fail_leave_a_created_container_and_nothing_else(
    unchanged: EngineProcess, busybox: str, config: dict[str, Any], status: int, text: str
) -> None:
    before = leftovers()
    created = unchanged.request("POST", CREATE, {"Image": busybox, "Cmd": ["true"], **config})
    if created.status != 201:  # the reference finds some of these at create already
        assert unchanged.is_reference, created.body
        refused(created, status, text)
        return
    container = created.json["Id"]

    try:
        refused(unchanged.request("POST", f"/v1.39/containers/{container}/start"), status, text)
        state = unchanged.inspect(container)["State"]

        assert (state["Status"], state["Running"], state["Pid"]) == ("created", False, 0)
        assert state["ExitCode"] in (126, 127, 128)
        assert text in state["Error"]
        assert wait_for_no_leftovers(before) == {}
    finally:
        unchanged.remove_containers()


# -- HTTP --


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS to a plain socket
        b"GET\r\n\r\n",
        b"GET /_ping HTTP/9.9\r\n\r\n",
        b"GET /_ping HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST /v1.39/containers/create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 3_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0" * 5000,
    ],
    ids=["tls", "short", "version", "length", "chunk", "long", "zeros"],
)
def test_garbage_on_the_socket(unchanged: EngineProcess, data: bytes) -> None:
    with unchanged.raw_connection(timeout_s=10) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(1)
            answer = connection.recv(65536)
        except ConnectionError:
            answer = b""

    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505", b"HTTP/1.0 400"))


def test_bodies_cut_short(unchanged: EngineProcess) -> None:
    head = "POST /v1.39/containers/create HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for rest in ('Content-Length: 1000\r\n\r\n{"Image":', 'Transfer-Encoding: chunked\r\n\r\n5\r\n{"Im'):
        with unchanged.raw_connection() as connection:
            connection.sendall((head + rest).encode())
        assert unchanged.request("GET", "/_ping").status == 200


def test_paths_that_wander_are_cleaned(unchanged: EngineProcess) -> None:
    for path in ("/v1.39/containers//json", "/v1.39/./containers/json", "/v1.39/images/../containers/json"):
        with unchanged.raw_connection() as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = connection.recv(65536)

        assert answer.startswith(b"HTTP/1.1 301"), answer
        assert b"/v1.39/containers/json\r\n" in answer


# -- pulls --


@pytest.fixture(scope="module")
def liar() -> Iterator[LyingRegistry]:
    with lying_registry() as registry:
        yield registry


def pull_error(engine: EngineProcess, reference: str) -> str:
    """Pull what must fail; the message, whether it came as a status or in the stream."""
    answer = engine.request("POST", f"/v1.39/images/create?fromImage={reference}", timeout_s=60)
    if answer.status != 200:
        assert 400 <= answer.status < 600
        return answer.message
    last = answer.lines[-1]
    assert last["errorDetail"]["message"] == last["error"], answer.body
    return str(last["error"])


def test_a_manifest_that_is_not_what_its_digest_says(unchanged: EngineProcess, liar: LyingRegistry) -> None:
    claimed = digest(b"something else")
    liar.add_image("lie/manifest", [make_tar([file("a", b"a")])])
    reference = liar.add_manifest("lie/manifest", liar.manifests["lie/manifest:1"][1], tag=claimed)

    message = pull_error(unchanged, reference)

    assert "digest" in message
    assert claimed in message or "verif" in message


@pytest.mark.parametrize(
    ("name", "data", "media_type"),
    [
        ("garbage", b"\x00\x01garbage", MANIFEST_TYPE),
        ("empty", b"", MANIFEST_TYPE),
        ("list", b"[]", MANIFEST_TYPE),
        ("hollow", b'{"schemaVersion":2}', MANIFEST_TYPE),
        ("version", b'{"schemaVersion":9}', MANIFEST_TYPE),
        ("html", b"<html>welcome</html>", "text/html"),
        ("type", b'{"schemaVersion":2}', "application/vnd.acme.cake"),
        ("nested", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, MANIFEST_TYPE),
    ],
)
def test_manifests_that_are_none(
    unchanged: EngineProcess, liar: LyingRegistry, name: str, data: bytes, media_type: str
) -> None:
    assert pull_error(unchanged, liar.add_manifest(f"none/{name}", data, media_type)) != ""


def test_a_config_that_is_not_what_its_digest_says(unchanged: EngineProcess, liar: LyingRegistry) -> None:
    reference = liar.add_image("lie/config", [make_tar([file("a", b"a")])])
    config = json.loads(liar.manifests["lie/config:1"][1])["config"]["digest"]
    liar.blobs[config] = liar.blobs[config].replace(b'"sh"', b'"no"')

    message = pull_error(unchanged, reference)

    assert "verif" in message or "digest" in message


def test_a_layer_that_is_not_what_its_digest_says(unchanged: EngineProcess, liar: LyingRegistry) -> None:
    claimed = digest(b"another layer")
    reference = liar.add_image("lie/layer", [make_tar([file("a", b"a")])], blob_digests=[claimed])

    assert pull_error(unchanged, reference) == f"filesystem layer verification failed for digest {claimed}"


def test_a_layer_that_is_not_what_the_config_says(unchanged: EngineProcess, liar: LyingRegistry) -> None:
    claimed = digest(b"another tar")
    wrong = liar.add_image("lie/diff", [make_tar([file("b", b"b")])], diff_ids=[claimed])
    too_many = liar.add_image("lie/count", [make_tar([file("c", b"c")])], diff_ids=[claimed, claimed])

    assert "layers from manifest don't match image configuration" in pull_error(unchanged, wrong)
    assert "layers from manifest don't match image configuration" in pull_error(unchanged, too_many)


def pax_bomb(size: int) -> bytes:
    """An extended header that claims to be `size` bytes long."""
    entry = tarfile.TarInfo("././@PaxHeader")
    entry.type, entry.size = tarfile.XHDTYPE, size
    return entry.tobuf(tarfile.GNU_FORMAT) + b"0" * 4096


def claiming(size: int) -> bytes:
    """A file that claims to be `size` bytes long and is not."""
    entry = tarfile.TarInfo("big")
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT) + b"x" * 4096


@pytest.mark.parametrize(
    ("name", "tar"),
    [
        ("climbing", make_tar([file("../escape", b"x")])),
        ("climbing-deep", make_tar([directory("a"), file("a/../../../../../../../../tmp/escape", b"x")])),
        ("ten-gigabytes", claiming(10 << 30)),
        ("ten-gigabyte-header", pax_bomb(10 << 30)),
        ("negative", claiming(0)[:124] + b"\xff" * 12 + claiming(0)[136:]),
        ("checksum", b"x" * 5120),
        ("cut", make_tar([file("a", b"a" * 5000)])[:1000]),
        ("hard-link-climbing", make_tar([link("l", "../../../../../../../../etc/hostname", tarfile.LNKTYPE)])),
        ("hard-link-nowhere", make_tar([link("l", "/no/such/file", tarfile.LNKTYPE)])),
    ],
)
def test_tars_that_are_refused(unchanged: EngineProcess, liar: LyingRegistry, name: str, tar: bytes) -> None:
    if unchanged.is_reference and "climbing" in name:
        pytest.skip("dockerd cleans such a name and puts the entry inside, somewhere")
    reference = liar.add_image(f"tar/{name}", [tar])

    assert pull_error(unchanged, reference) != ""
    assert not os.path.exists("/tmp/escape")


@pytest.mark.parametrize(
    ("name", "blob"),
    [("no-gzip", b"this is no gzip" * 100), ("empty", b""), ("cut-gzip", gzip.compress(os.urandom(5000))[:2000])],
)
def test_blobs_that_are_no_layer(unchanged: EngineProcess, liar: LyingRegistry, name: str, blob: bytes) -> None:
    reference = liar.add_image(f"blob/{name}", [b"a tar"], blobs=[blob])

    assert pull_error(unchanged, reference) != ""


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host with a secret; after the test both are as they were."""
    place = tmp_path / "victim"
    place.mkdir()
    secret = place / "secret"
    secret.write_text("mine")
    before = secret.stat()
    yield place
    after = secret.stat()
    assert sorted(child.name for child in place.iterdir()) == ["secret"]
    assert secret.read_text() == "mine"
    assert (after.st_nlink, after.st_mode, after.st_uid, after.st_mtime) == (
        before.st_nlink,
        before.st_mode,
        before.st_uid,
        before.st_mtime,
    )


@pytest.mark.parametrize(
    "attack",
    [
        "absolute-name",
        "absolute-symlink",
        "climbing-symlink",
        "hard-link",
        "hard-link-to-symlink",
        "whiteout-through-symlink",
        "opaque-through-symlink",
        "whiteout-of-parent",
        "chmod-through-symlink",
    ],
)
def test_tars_that_reach_for_the_host(engine: EngineProcess, liar: LyingRegistry, victim: Path, attack: str) -> None:
    """Some of these pull, inside their root, and some do not: what counts is the host."""
    climb = "../" * 30 + str(victim).lstrip("/")
    entries: list[Any] = {
        "absolute-name": [file(f"{victim}/pwned", b"x"), file(str(victim / "secret"), b"pwned")],
        "absolute-symlink": [link("l", str(victim)), file("l/pwned", b"x"), file("l/secret", b"pwned")],
        "climbing-symlink": [link("l", climb), file("l/pwned", b"x"), file("l/secret", b"pwned")],
        "hard-link": [link("h", str(victim / "secret"), tarfile.LNKTYPE), file("h", b"pwned")],
        "hard-link-to-symlink": [
            link("l", str(victim / "secret")),
            link("h", "l", tarfile.LNKTYPE),
            file("h", b"pwned"),
        ],
        "whiteout-through-symlink": [link("l", str(victim)), file("l/.wh.secret")],
        "opaque-through-symlink": [link("l", str(victim)), file("l/.wh..wh..opq")],
        "whiteout-of-parent": [directory("d"), file("d/.wh..."), file("d/.wh.."), file(".wh...")],
        "chmod-through-symlink": [link("l", str(victim)), directory("l", 0o777, 1000, 1000)],
    }[attack]
    before = leftovers()
    reference = liar.add_image(f"reach/{attack}", [make_tar(entries)])

    answer = engine.request("POST", f"/v1.39/images/create?fromImage={reference}", timeout_s=60)

    assert answer.status == 200
    last = answer.lines[-1]
    if "error" not in last:
        assert engine.request("DELETE", f"/v1.39/images/{reference}?force=1").status == 200
    assert wait_for_no_leftovers(before) == {}


def test_device_nodes_of_an_image_open_nothing(engine: EngineProcess, liar: LyingRegistry) -> None:
    """They are made, as dockerd makes them; the device cgroup is what stands before the disk."""
    nodes = make_tar([directory("nodes"), device("nodes/mem", 1, 1), device("nodes/kmsg", 1, 11)])
    shell = busybox_layer()
    reference = liar.add_image("nodes", [shell.tar, nodes])
    assert "error" not in engine.request("POST", f"/v1.39/images/create?fromImage={reference}").lines[-1]

    done = engine.docker("run", "--rm", reference, "dd", "if=/nodes/kmsg", "of=/dev/null", "count=1", check=False)

    assert done.returncode == 1
    assert "Operation not permitted" in done.stderr
    engine.docker("rmi", reference)
