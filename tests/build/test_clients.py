"""The programs that people build with: the Docker CLI, docker-py, docker-compose."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError, BuildError

from tests.build.case import pack
from tests.build.play import is_missing
from tests.engine_process import EngineProcess, wait_until

pytestmark = [
    pytest.mark.root,
    # docker-py leaves the sockets of streams to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

LEGACY = {"DOCKER_BUILDKIT": "0"}
DOCKERFILE = """\
FROM {image} AS build
ARG WHO=nobody
COPY words /words
RUN echo "hello $WHO" > /greeting
FROM {image}
COPY --from=build /greeting /words /
LABEL kind=test
CMD ["cat", "/greeting", "/words"]
"""


@pytest.fixture
def builder(engine: EngineProcess) -> Iterator[EngineProcess]:
    """An engine that builds; the images of the test go with it."""
    if reason := is_missing(engine):
        pytest.skip(reason)
    before = {image["Id"] for image in images(engine)}
    yield engine
    engine.remove_containers()
    while made := [image["Id"] for image in images(engine) if image["Id"] not in before]:
        removed = [engine.request("DELETE", f"/v1.39/images/{image}?force=1").status for image in made]
        assert 200 in removed, f"images that cannot be removed: {made}"


@pytest.fixture
def context(tmp_path: Path, busybox: str) -> Path:
    directory = tmp_path / "context"
    directory.mkdir()
    (directory / "Dockerfile").write_text(DOCKERFILE.format(image=busybox))
    (directory / "words").write_text("and more\n")
    (directory / ".dockerignore").write_text("*.log\n")
    (directory / "big.log").write_bytes(bytes(1 << 20))
    return directory


def images(engine: EngineProcess) -> Any:
    return engine.request("GET", "/v1.39/images/json?all=1").json


# -- the Docker CLI --


def test_cli_builds_tags_and_runs(builder: EngineProcess, context: Path, docker_cli: str) -> None:
    first = builder.docker("build", "-t", "cli/one", "-t", "cli/two:v", str(context), env=LEGACY)
    again = builder.docker("build", "-t", "cli/one", "--build-arg", "WHO=nobody", str(context), env=LEGACY)
    ran = builder.docker("run", "--rm", "--network", "none", "cli/one")

    assert "Step 1/8 : FROM" in first.stdout
    assert first.stdout.splitlines()[-2:] == [
        "Successfully tagged cli/one:latest",
        "Successfully tagged cli/two:v",
    ]
    assert again.stdout.count(" ---> Using cache") == 6  # a value that is the default's changes no key
    assert ran.stdout == "hello nobody\nand more\n"
    assert builder.docker("image", "inspect", "-f", "{{.Config.Labels.kind}}", "cli/two:v").stdout == "test\n"


def test_cli_reads_a_dockerfile_from_its_input(builder: EngineProcess, context: Path, busybox: str) -> None:
    text = f"FROM {busybox}\nCOPY words /w\nRUN test ! -e /big.log && cat /w\n"

    with_context = builder.docker("build", "-q", "-f", "-", str(context), input=text, env=LEGACY)
    alone = builder.docker("build", "-", input=f"FROM {busybox}\nLABEL alone=yes\n", env=LEGACY)
    packed = builder.docker(
        "build", "-f", "x/D", "-", input=pack({"x/D": f"FROM {busybox}\nCOPY a /\n", "a": "x"}), env=LEGACY
    )

    assert with_context.stdout.startswith("sha256:")
    assert "Successfully built" in alone.stdout
    assert "Step 2/2 : COPY a /" in packed.stdout


def test_cli_options_reach_the_build(builder: EngineProcess, context: Path, busybox: str) -> None:
    script = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2> /dev/null; ulimit -n; true"
    text = f"FROM {busybox} AS one\nRUN {script}; grep there /etc/hosts; echo $HTTP_PROXY\nFROM one\nRUN false\n"
    arguments = ["--target", "one", "--memory", "64m", "--ulimit", "nofile=77:78", "--add-host", "there:10.9.8.7"]
    arguments += ["--label", "a=b", "--no-cache", "--network", "none", "--shm-size", "2m", "--force-rm"]
    arguments += ["--build-arg", "HTTP_PROXY=http://proxy"]

    done = builder.docker("build", *arguments, "-t", "optioned", "-f", "-", str(context), input=text, env=LEGACY)

    assert "67108864\n" in done.stdout
    assert "\n77\n" in done.stdout
    assert "10.9.8.7\tthere" in done.stdout
    assert "http://proxy" in done.stdout
    assert builder.docker("image", "inspect", "-f", "{{.Config.Labels.a}}", "optioned").stdout == "b\n"


def test_cli_tells_what_failed(builder: EngineProcess, context: Path, busybox: str) -> None:
    def fails(text: str) -> tuple[int, str]:
        done = builder.docker("build", "-f", "-", str(context), input=text, env=LEGACY, check=False)
        return done.returncode, done.stderr

    run = fails(f"FROM {busybox}\nRUN echo before && exit 9\n")
    parse = fails(f"FROM {busybox}\nNOPE x\n")
    copy = fails(f"FROM {busybox}\nCOPY big.log /\n")

    assert run[0] == 9
    assert "The command '/bin/sh -c echo before && exit 9' returned a non-zero code: 9" in run[1]
    assert parse[0] == 1
    assert "parse error line 2: unknown instruction: NOPE" in parse[1]
    assert copy[0] == 1
    assert "COPY failed" in copy[1]


def test_a_client_that_goes_takes_its_step_with_it(builder: EngineProcess, context: Path, busybox: str) -> None:
    seconds = f"1000.{builder.number}{os.getpid()}"  # nobody else sleeps so long
    (context / "Dockerfile").write_text(f"FROM {busybox}\nRUN exec sleep {seconds}\n")

    def running() -> list[str]:
        return [entry for entry in os.listdir("/proc") if command_of(entry) == f"sleep\0{seconds}\0"]

    with builder.docker_process("build", "--force-rm", str(context), env=LEGACY) as process:
        wait_until(running, 30, "the step runs")
        begun = time.monotonic()
    wait_until(lambda: not running(), 10, "the step was killed")

    took = time.monotonic() - begun
    print(f"the step was gone {took:.2f} s after its client")
    assert process.returncode != 0
    wait_until(lambda: builder.request("GET", "/v1.39/containers/json?all=1").json == [], 10, "nothing is left")


def command_of(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_text()
    except OSError:
        return ""


# -- docker-py --


def test_docker_py_builds_from_a_directory(builder: EngineProcess, context: Path) -> None:
    client = builder.client()

    image, log = client.images.build(path=str(context), tag="py/one:1", buildargs={"WHO": "py"}, rm=True)
    said = "".join(line.get("stream", "") for line in log)

    assert image.tags == ["py/one:1"]
    assert image.labels == {"kind": "test"}
    assert "Step 8/8 : CMD" in said
    assert client.containers.run("py/one:1", remove=True, network_mode="none") == b"hello py\nand more\n"


def test_docker_py_builds_from_objects_and_options(builder: EngineProcess, busybox: str) -> None:
    client = builder.client()
    dockerfile = io.BytesIO(f"FROM {busybox} AS a\nENV x=1\nFROM a\nENV y=2\n".encode())
    custom = io.BytesIO(pack({"Other": f"FROM {busybox}\nCOPY f /f\n", "f": "x"}))

    target, _ = client.images.build(fileobj=dockerfile, target="a", labels={"from": "py"}, nocache=True)
    packed, _ = client.images.build(
        fileobj=custom,
        custom_context=True,
        dockerfile="Other",
        container_limits={"memory": 64 << 20, "cpushares": 512},
        extra_hosts={"there": "10.9.8.7"},
        shmsize=1 << 20,
        network_mode="none",
        pull=False,
        forcerm=True,
    )

    assert "x=1" in target.attrs["Config"]["Env"]
    assert "y=2" not in target.attrs["Config"]["Env"]
    assert target.labels == {"from": "py"}
    assert packed.attrs["ContainerConfig"]["Cmd"][-1].startswith("#(nop) COPY file:")


def test_docker_py_raises_what_the_build_said(builder: EngineProcess, busybox: str) -> None:
    client = builder.client()

    with pytest.raises(BuildError, match="returned a non-zero code: 4") as failed:
        client.images.build(fileobj=io.BytesIO(f"FROM {busybox}\nRUN echo seen; exit 4\n".encode()), forcerm=True)
    with pytest.raises(APIError, match="unknown instruction: NOPE") as refused:
        client.images.build(fileobj=io.BytesIO(f"FROM {busybox}\nNOPE\n".encode()))

    assert any("seen" in line.get("stream", "") for line in failed.value.build_log)
    assert refused.value.status_code == 400


# -- docker-compose --

COMPOSE = """\
version: "3.7"
services:
  web:
    build:
      context: context
      args: {WHO: compose}
      labels: {by: compose}
    image: composed/web:1
    network_mode: none
  second:
    build: {context: context, dockerfile: Second}
    network_mode: none
"""


def test_compose_builds_its_services(builder: EngineProcess, context: Path, busybox: str) -> None:
    compose = shutil.which("docker-compose")
    if compose is None:
        pytest.skip("no docker-compose on this machine")
    (context.parent / "docker-compose.yml").write_text(COMPOSE)
    (context / "Second").write_text(f"FROM {busybox}\nRUN echo second\nCMD echo I am second\n")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [compose, "--no-ansi", "-p", "builds", *arguments],
            cwd=context.parent,
            env={**builder.environment, **LEGACY, "COMPOSE_DOCKER_CLI_BUILD": "0"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    built = run("build")
    rebuilt = run("build")
    up = run("up", "--no-color")
    run("down", "--rmi", "all")

    assert "Successfully tagged composed/web:1" in built
    assert "Successfully tagged builds_second:latest" in built
    assert rebuilt.count(" ---> Using cache") >= 7
    assert "hello compose" in up
    assert "I am second" in up
    names = {tag for image in images(builder) for tag in image["RepoTags"] or []}
    assert not names & {"composed/web:1", "builds_second:latest"}
