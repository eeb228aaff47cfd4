"""Builds by the docker CLI and the bare API: what the stream says, what is in the image, what is left behind."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.engine_process import EngineProcess, Response

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
