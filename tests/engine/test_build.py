"""Builds by the docker CLI and the bare API: what the stream says, what is in the image, what is left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

import pytest
import zstandard

from tests.engine_process import EngineProcess, Response, running_engine, wait_until

pytestmark = pytest.mark.root
LEGACY = {"DOCKER_BUILDKIT": "0"}


def context(files: Mapping[str, str | bytes]) -> bytes:
    """The tar of a build context."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), 1_600_000_000
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def build(
    engine: EngineProcess, text: str, files: Mapping[str, str | bytes] | None = None, /, **query: str
) -> Response:
    """`POST /build` with these files."""
    body = context({"Dockerfile": text, **(files or {})})
    path = f"/v1.39/build?{urlencode({'rm': '1', **query})}"
    return engine.request("POST", path, body, headers={"Content-Type": "application/x-tar"}, timeout_s=120)


def text(answer: Response) -> str:
    """What a client prints."""
    assert answer.status == 200, answer.body
    return "".join(line.get("stream", "") for line in answer.lines)


def image_of(answer: Response) -> str:
    """The ID of the last image."""
    assert "error" not in answer.lines[-1], answer.lines[-1]
    return str([line["aux"]["ID"] for line in answer.lines if "aux" in line][-1])


def run(engine: EngineProcess, image: str, *command: str) -> str:
    return engine.docker("run", "--rm", image, *command).stdout


def test_the_cli_builds_an_image_that_runs_and_finds_it_again(
    engine: EngineProcess, busybox: str, tmp_path: Path
) -> None:
    (tmp_path / "greeting").write_text("hello\n")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {busybox}\nENV A=b\nRUN echo $A > /made && echo err >&2\nCOPY greeting /data/\n"
        'CMD ["cat","/data/greeting"]\n'
    )
    first = engine.docker("build", "-t", "built:1", str(tmp_path), env=LEGACY, timeout_s=120).stdout
    assert "Step 5/5 : CMD" in first
    assert "\x1b[91merr\n\x1b[0m" in first
    assert "Using cache" not in first
    assert first.endswith("Successfully tagged built:1\n")
    assert engine.docker("run", "--rm", "built:1").stdout == "hello\n"
    assert run(engine, "built:1", "cat", "/made") == "b\n"
    again = engine.docker("build", "-t", "built:1", str(tmp_path), env=LEGACY, timeout_s=120).stdout
    assert again.count("Using cache") == 4
    assert engine.docker("ps", "-aq").stdout == ""


def test_a_command_that_fails_ends_the_build_with_its_code(engine: EngineProcess, busybox: str) -> None:
    answer = build(engine, f"FROM {busybox}\nRUN exit 3", forcerm="1")
    message = "The command '/bin/sh -c exit 3' returned a non-zero code: 3"
    assert answer.lines[-1] == {"errorDetail": {"code": 3, "message": message}, "error": message}
    assert engine.docker("ps", "-aq").stdout == ""


@pytest.mark.parametrize(
    ("dockerfile", "status", "message"),
    [
        ("", 400, "the Dockerfile (Dockerfile) cannot be empty"),
        ("# c\n", 400, "No image was generated. Is your Dockerfile empty?"),
        ("FROM x\nFOO", 400, "Dockerfile parse error line 2: unknown instruction: FOO"),
        ("RUN x", 400, "no build stage in current context"),
    ],
)
def test_a_dockerfile_that_cannot_be_read_is_refused(
    engine: EngineProcess, dockerfile: str, status: int, message: str
) -> None:
    answer = build(engine, dockerfile)
    assert (answer.status, answer.message) == (status, message)


def test_a_missing_dockerfile_and_bad_parameters_are_refused(engine: EngineProcess) -> None:
    for query, status, message in (
        ({"dockerfile": "nope"}, 500, "Cannot locate specified Dockerfile: nope"),
        ({"dockerfile": "../x"}, 500, "Forbidden path outside the build context: ../x ()"),
        ({"t": "a@sha256:" + "0" * 64}, 500, "build tag cannot contain a digest"),
        ({"version": "2"}, 400, "BuildKit is not supported by this daemon, use version=1"),
        ({"version": "3"}, 500, 'invalid version "3"'),
        ({"target": "zz"}, 400, "failed to reach build target zz in Dockerfile"),
        ({"buildargs": "zz"}, 400, "error reading build args: invalid character 'z' looking for beginning of value"),
        (
            {"ulimits": "[1]"},
            400,
            "error reading ulimit settings: json: cannot unmarshal number into Go value of type units.Ulimit",
        ),
        (
            {"ulimits": "{}"},
            400,
            "error reading ulimit settings: json: cannot unmarshal object into Go value of type []*units.Ulimit",
        ),
        ({"shmsize": "zz"}, 500, 'strconv.ParseInt: parsing "zz": invalid syntax'),
        ({"securityopt": "x"}, 400, "The daemon on this platform does not support setting security options on build"),
    ):
        answer = build(engine, "FROM scratch", **query)
        assert (answer.status, answer.message) == (status, message)


def test_labels_and_tags_of_the_request(engine: EngineProcess, busybox: str) -> None:
    body = context({"Dockerfile": f"FROM {busybox}"})
    labels = json.dumps({"b": "$x", "a": "1"})
    query = urlencode([("labels", labels), ("t", "foo"), ("t", "foo:1"), ("t", "foo:latest")])
    answer = engine.request("POST", f"/build?{query}", body)
    assert text(answer).endswith("Successfully tagged foo:latest\nSuccessfully tagged foo:1\n")
    config = engine.request("GET", "/images/foo/json").json["Config"]
    assert config["Labels"] == {"a": "1", "b": "$x"}


def snapshot_directories(engine: EngineProcess) -> set[str]:
    return {path.name for path in (engine.data_root / "snapshots").iterdir()}


def test_a_client_that_leaves_ends_the_step_and_nothing_is_left(engine: EngineProcess, busybox: str) -> None:
    build(engine, f"FROM {busybox}\nENV before=1")
    before = snapshot_directories(engine)
    body = context({"Dockerfile": f"FROM {busybox}\nENV before=1\nRUN echo begun; sleep 4321 & sleep 4321"})
    connection = engine.raw_connection()
    head = f"POST /v1.39/build?rm=1 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    stream = b""
    while b'{"stream":"begun' not in stream:
        stream += connection.recv(65536)
    wait_until(lambda: sleepers() == 2, timeout_s=30, what="the step sleeps")
    connection.close()
    began = time.monotonic()
    wait_until(lambda: not sleepers(), timeout_s=30, what="the step is ended")
    took_s = time.monotonic() - began
    wait_until(lambda: snapshot_directories(engine) == before, timeout_s=30, what="its files are gone")
    assert engine.request("GET", "/containers/json?all=1").json == []
    print(f"the step was ended {took_s:.2f} s after its client had left")
    assert took_s < 1 or os.getloadavg()[0] > 2, f"{took_s:.2f} s"


def sleepers() -> int:
    """Processes of the step above."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += path.read_bytes() == b"sleep\0004321\0"
    return found


def test_the_same_context_gives_the_same_image_elsewhere(engine: EngineProcess, busybox: str, tmp_path: Path) -> None:
    dockerfile = f"""FROM {busybox} AS one
ARG SOURCE_DATE_EPOCH
RUN mkdir -p /made/deep && date > /made/deep/now.$SOURCE_DATE_EPOCH && rm /made/deep/now.* && echo x > /made/x
WORKDIR /work
COPY --chown=1:2 a d/
ADD inner.tar /unpacked
FROM scratch
COPY --from=one /made /made
LABEL a=b
"""
    inner = context({"deep/file": "content"})
    files = {"a": "x", "inner.tar": inner}
    query = {"buildargs": json.dumps({"SOURCE_DATE_EPOCH": "1600000000"}), "nocache": "1"}
    first = build(engine, dockerfile, files, **query)
    with running_engine(tmp_path) as other:
        assert "error" not in build(other, dockerfile, files, **query).lines[-1]
        second = build(other, dockerfile, files, **query)
        third = build(other, dockerfile, files, **{**query, "nocache": "0"})
        plain = build(other, dockerfile, files)
    ids = [[line["aux"]["ID"] for line in answer.lines if "aux" in line] for answer in (first, second, third, plain)]
    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) == 2
    assert ids[3][0] != ids[0][0]
    created = engine.request("GET", f"/images/{ids[0][1]}/json").json["Created"]
    assert created == "2020-09-13T12:26:40Z"
    bad = build(engine, f"FROM {busybox}", buildargs=json.dumps({"SOURCE_DATE_EPOCH": "yesterday"}))
    assert (bad.status, bad.message) == (400, "invalid SOURCE_DATE_EPOCH: yesterday: seconds since 1970 are wanted")


def test_containers_of_steps_stay_when_that_is_asked_for_or_a_command_fails(
    engine: EngineProcess, busybox: str
) -> None:
    build(engine, f"FROM {busybox}\nRUN echo kept > /kept\nLABEL a={time.time()}", rm="0")
    kept = engine.request("GET", "/containers/json?all=1").json
    assert [one["State"] for one in kept] == ["created", "exited"]
    assert engine.docker("cp", f"{kept[1]['Id']}:/kept", "-").stdout.count("kept\n") == 1
    engine.remove_containers()
    build(engine, f"FROM {busybox}\nRUN exit 3")
    assert len(engine.request("GET", "/containers/json?all=1").json) == 1
    engine.remove_containers()


def test_a_build_that_is_cut_by_a_crash_leaves_nothing(busybox: str, tmp_path: Path) -> None:
    with running_engine(tmp_path) as engine:
        build(engine, f"FROM {busybox}\nENV a=b")
        before = snapshot_directories(engine)
        body = context({"Dockerfile": f"FROM {busybox}\nENV a=b\nRUN echo begun; sleep 4322"})
        with engine.raw_connection() as connection:
            head = f"POST /v1.39/build?rm=1 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            stream = b""
            while b'{"stream":"begun' not in stream:
                stream += connection.recv(65536)
            engine.kill()
        engine.start()
        wait_until(lambda: snapshot_directories(engine) == before, timeout_s=30, what="the container is gone")
        assert engine.request("GET", "/containers/json?all=1").json == []
        answer = build(engine, f"FROM {busybox}\nENV a=b\nRUN true")
        assert text(answer).count("Using cache") == 1


def test_a_step_of_much_output_loses_nothing(engine: EngineProcess, busybox: str) -> None:
    answer = build(engine, f"FROM {busybox}\nRUN seq 1 60000", nocache="1")
    said = text(answer)
    assert "\n59999\n60000\n" in said
    assert said.count("\n") >= 60000


def test_a_large_context_goes_through_workers(engine: EngineProcess, busybox: str) -> None:
    files = {f"many/{number}": os.urandom(4096) for number in range(400)}
    dockerfile = f"FROM {busybox}\nCOPY many/1* /some/\nCOPY . /all\nRUN ls /some | wc -l; ls /all/many | wc -l"
    assert "\n111\n400\n" in text(build(engine, dockerfile, files))
    again = build(engine, dockerfile, {**files, "many/2": b"other"})
    assert text(again).count("Using cache") == 1


def test_a_context_packed_by_zstd(engine: EngineProcess, busybox: str) -> None:
    body = zstandard.ZstdCompressor().compress(context({"Dockerfile": f"FROM {busybox}\nLABEL zstd=yes"}))
    answer = engine.request("POST", "/build", body)
    assert engine.request("GET", f"/images/{image_of(answer)}/json").json["Config"]["Labels"]["zstd"] == "yes"
