"""docker diff, export, commit and import."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.compat import images
from tests.engine_process import EngineProcess

pytestmark = pytest.mark.root

FIXTURES = Path(__file__).parent.parent / "data/fixtures"
# As the recording has it.
SCRIPT = "touch /a; rm /etc/group; mkdir -p /d/e; echo x >> /etc/passwd; ln -s /etc/passwd /lnk; ln -s /nowhere /dang"


def fixture(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text())


@pytest.fixture
def changed(engine: EngineProcess, docker_cli: str, busybox: str) -> Iterator[str]:
    """A container that has changed files and ended."""
    engine.docker("run", "--name", "changed", "-v", "/vol", busybox, "sh", "-c", SCRIPT)
    yield "changed"
    engine.docker("rm", "-f", "-v", "changed", check=False)


@pytest.fixture(autouse=True)
def no_images_left(engine: EngineProcess) -> Iterator[None]:
    """Images that a test makes go with it."""
    before = {image["Id"] for image in engine.request("GET", "/v1.39/images/json?all=1").json}
    yield
    engine.remove_containers()
    for image in engine.request("GET", "/v1.39/images/json?all=1").json:
        if image["Id"] not in before:
            engine.request("DELETE", f"/v1.39/images/{image['Id']}?force=1")


def events_since(engine: EngineProcess, start: float, *kinds: str) -> list[tuple[str, dict[str, str]]]:
    filters = quote(json.dumps({"event": list(kinds)}))
    answer = engine.request("GET", f"/v1.39/events?since={start}&until={time.time()}&filters={filters}")
    return [(event["Action"], event["Actor"]["Attributes"]) for event in answer.lines]


def pairs(changes: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return sorted((change["Path"], change["Kind"]) for change in changes)


def test_changes_are_those_of_the_recording(engine: EngineProcess, changed: str) -> None:
    answer = engine.request("GET", f"/v1.39/containers/{changed}/changes")

    assert pairs(answer.json) == pairs(fixture("container_changes.json"))
    assert list(answer.json[0]) == ["Path", "Kind"]


def test_changes_of_replaced_directories_and_of_nothing(engine: EngineProcess, docker_cli: str, busybox: str) -> None:
    engine.docker("run", "--name", "replaced", busybox, "sh", "-c", "rm -r /etc; mkdir /etc; echo 1 > /etc/new")
    engine.docker("create", "--name", "untouched", busybox)
    replaced = pairs(engine.request("GET", "/v1.39/containers/replaced/changes").json)
    untouched = engine.request("GET", "/v1.39/containers/untouched/changes")

    assert {("/etc", 0), ("/etc/new", 1), ("/etc/passwd", 2), ("/etc/group", 2)} <= set(replaced)
    assert (untouched.status, untouched.body) == (200, b"null\n")
    assert "A /etc/new" in engine.docker("diff", "replaced").stdout.splitlines()


def test_export_gives_all_files_but_volumes(engine: EngineProcess, changed: str) -> None:
    start = time.time()
    answer = engine.request("GET", f"/v1.39/containers/{changed}/export")
    with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
        members = {member.name: member for member in tar}
        passwd = tar.extractfile("etc/passwd")
        assert passwd is not None
        text = passwd.read().decode()

    assert answer.headers["content-type"] == "application/octet-stream"
    assert {"bin/busybox", "a", "d/e", "lnk", "vol", ".dockerenv", "etc/hosts"} <= members.keys()
    assert "etc/group" not in members
    assert text.endswith("x\n")
    assert members["lnk"].linkname == "/etc/passwd"
    assert [action for action, _ in events_since(engine, start, "export")] == ["export"]


def test_a_running_container_is_exported_as_it_is(engine: EngineProcess, docker_cli: str, busybox: str) -> None:
    engine.docker("run", "-d", "--name", "runs", busybox, "sh", "-c", "echo 1 > /new; sleep 100")
    engine.docker("exec", "runs", "sh", "-c", "until [ -s /new ]; do :; done")
    data = engine.request("GET", "/v1.39/containers/runs/export").body
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getmember("new").size == 2
    assert engine.inspect("runs")["State"]["Running"]


def test_commit_is_as_recorded(engine: EngineProcess, changed: str) -> None:
    start = time.time()
    query = "&".join(
        ["repo=bpyref/commit", "tag=t1", "comment=cm", "author=me"]
        + [f"changes={quote(line)}" for line in ("ENV A=1", "LABEL q=w", 'CMD ["x"]')]
    )
    answer = engine.request("POST", f"/v1.39/commit?container={changed}&{query}")
    inspected = engine.request("GET", "/v1.39/images/bpyref/commit:t1/json").json
    wanted = fixture("image_inspect_committed.json")
    history = engine.request("GET", "/v1.39/images/bpyref/commit:t1/history").json
    events = events_since(engine, start, "commit", "tag")

    assert (answer.status, answer.json) == (201, {"Id": inspected["Id"]})
    assert list(inspected) == list(wanted)
    for key in ("Author", "Comment", "RepoTags", "RepoDigests", "Architecture", "Os"):
        assert inspected[key] == wanted[key]
    assert list(inspected["Config"]) == list(wanted["Config"])
    assert inspected["Config"]["Cmd"] == ["x"]
    assert inspected["Config"]["Labels"] == {"q": "w"}
    assert inspected["Config"]["Env"][-1] == "A=1"
    assert inspected["ContainerConfig"]["Cmd"] == ["sh", "-c", SCRIPT]
    assert inspected["Parent"] == engine.inspect(changed)["Image"]
    assert inspected["Metadata"]["LastTagTime"] > wanted["Metadata"]["LastTagTime"][:4]
    assert history[0]["CreatedBy"] == f"sh -c {SCRIPT}"
    assert history[0]["Comment"] == "cm"
    assert history[1]["Id"] == inspected["Parent"]
    assert [action for action, _ in events] == ["tag", "commit"]
    attributes = events[1][1]
    assert attributes["imageID"] == inspected["Id"]
    assert (attributes["imageRef"], attributes["comment"]) == ("bpyref/commit:t1", "cm")


def test_a_committed_image_runs_with_what_was_changed(engine: EngineProcess, changed: str) -> None:
    engine.docker("commit", changed, "runs:1")
    command = "tail -n 1 /etc/passwd; ls -d /a /d/e; ls /etc/group || echo gone"
    listed = engine.docker("run", "--rm", "runs:1", "sh", "-c", command).stdout

    assert listed.splitlines() == ["x", "/a", "/d/e", "gone"]


def test_a_commit_pauses_what_runs(engine: EngineProcess, docker_cli: str, busybox: str) -> None:
    engine.docker("run", "-d", "--name", "runs", busybox, "sleep", "100")
    start = time.time()
    engine.docker("commit", "runs", "paused:1")
    with_pause = [action for action, _ in events_since(engine, start, "pause", "unpause", "commit")]
    start = time.time()
    engine.request("POST", "/v1.39/commit?container=runs&pause=0")
    without = [action for action, _ in events_since(engine, start, "pause", "unpause", "commit")]

    assert with_pause == ["pause", "commit", "unpause"]
    assert without == ["commit"]
    assert engine.inspect("runs")["State"]["Status"] == "running"


def test_nothing_changed_makes_no_layer(engine: EngineProcess, docker_cli: str, busybox: str) -> None:
    engine.docker("create", "--name", "untouched", busybox, "sh")
    image = engine.request("POST", "/v1.39/commit?container=untouched&comment=same").json["Id"]
    inspected = engine.request("GET", f"/v1.39/images/{image}/json").json
    base = engine.request("GET", f"/v1.39/images/{busybox}/json").json

    assert inspected["RootFS"] == base["RootFS"]
    assert engine.request("GET", f"/v1.39/images/{image}/history").json[0]["Size"] == 0


def test_a_body_replaces_the_config_and_the_containers_fills_it(
    engine: EngineProcess, docker_cli: str, busybox: str
) -> None:
    engine.docker("create", "--name", "base", "-e", "A=1", "-l", "l=1", "-w", "/tmp", busybox, "sh")
    answer = engine.request("POST", "/v1.39/commit?container=base", {"Cmd": ["y"], "Env": ["B=2"]})
    config = engine.request("GET", f"/v1.39/images/{answer.json['Id']}/json").json["Config"]

    assert config["Cmd"] == ["y"]
    assert {"A=1", "B=2"} <= set(config["Env"])
    assert config["WorkingDir"] == "/tmp"
    assert config["Labels"] == {"l": "1"}
    assert config["Hostname"] == ""


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("container=changed&changes=RUN%20x", 400, "run is not a valid change command"),
        ("container=changed&changes=ENV%20x", 400, "ENV must have two arguments"),
        ("container=changed&repo=BAD", 500, "invalid reference format: repository name must be lowercase"),
        ("container=changed&repo=x&tag=a!b", 500, "invalid tag format"),
        ("", 400, 'invalid name or ID supplied: ""'),
        ("container=nope", 404, "No such container: nope"),
    ],
)
def test_refusals_of_commit(engine: EngineProcess, changed: str, query: str, status: int, message: str) -> None:
    answer = engine.request("POST", f"/v1.39/commit?{query}")

    assert (answer.status, answer.message) == (status, message)


def test_docker_py_commits_exports_and_diffs(engine: EngineProcess, changed: str) -> None:
    container = engine.client().containers.get(changed)
    image = container.commit("py/commit", tag="2", changes=["USER nobody"], conf={"Cmd": ["z"]})
    exported = b"".join(container.export())

    assert image.tags == ["py/commit:2"]
    assert image.attrs["Config"]["User"] == "nobody"
    assert {"Path": "/a", "Kind": 1} in container.diff()
    with tarfile.open(fileobj=io.BytesIO(exported)) as tar:
        assert tar.getmember("a").size == 0


def test_import_of_an_export_runs(engine: EngineProcess, changed: str) -> None:
    start = time.time()
    data = engine.request("GET", f"/v1.39/containers/{changed}/export").body
    done = engine.docker("import", "-c", 'CMD ["cat","/etc/passwd"]', "-m", "msg", "-", "imp:1", input=data)
    inspected = engine.request("GET", "/v1.39/images/imp:1/json").json
    wanted = fixture("image_inspect_imported.json")

    assert done.stdout.strip() == inspected["Id"]
    assert list(inspected) == list(wanted)
    assert list(inspected["Config"]) == list(wanted["Config"])
    assert inspected["Comment"] == "msg"
    assert inspected["Config"]["Cmd"] == ["cat", "/etc/passwd"]
    assert engine.docker("run", "--rm", "imp:1").stdout.endswith("x\n")
    assert [action for action, _ in events_since(engine, start, "tag", "import")] == ["tag", "import"]


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("fromSrc=-&repo=BAD", 400, "invalid reference format: repository name must be lowercase"),
        (f"fromSrc=-&repo=x@sha256:{'0' * 64}", 400, "cannot import digest reference"),
        ("fromSrc=-&repo=x&tag=!", 400, "invalid tag format"),
        ("fromSrc=-&changes=RUN%20x", 400, "run is not a valid change command"),
        ("fromSrc=", 500, None),
        ("fromSrc=http://127.0.0.1:1/x", 500, None),
    ],
)
def test_refusals_of_import(engine: EngineProcess, query: str, status: int, message: str | None) -> None:
    tar = images.make_tar([images.file("x", b"x")])
    answer = engine.request("POST", f"/v1.39/images/create?{query}", tar if "=-" in query else None)

    assert answer.status == status
    assert message is None or answer.message == message
