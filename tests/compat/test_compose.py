"""docker-compose 1.29: a project of three services from `up` to `down -v`."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.engine_process import EngineProcess, wait_until

pytestmark = pytest.mark.root

PROJECT = "threefold"
FILE = """\
version: "2.4"
services:
  db:
    image: {image}
    command: ["sh", "-c", "sleep 2; echo ready > /data/state; echo db is up; exec httpd -f -p 5432 -h /data"]
    volumes: ["store:/data"]
    healthcheck:
      test: ["CMD", "test", "-e", "/data/state"]
      interval: 300ms
      retries: 100
    networks:
      back:
        aliases: [database, store.internal]
    stop_grace_period: 1s
  api:
    image: {image}
    command: ["sh", "-c", "wget -q -O /tmp/state http://database:5432/state && cat /tmp/state; exec httpd -f -h /tmp"]
    depends_on:
      db: {{condition: service_healthy}}
    networks: [back, front]
    environment: {{ROLE: api}}
    labels: {{tier: middle}}
    tmpfs: /scratch
    stop_grace_period: 1s
  web:
    image: {image}
    command: ["sh", "-c", "trap 'exit 0' TERM; wget -q -O - http://api/state; echo web is up; sleep 1000 & wait"]
    depends_on: [api]
    networks: [front]
    volumes: ["store:/seen:ro", "./site:/site"]
    ports: ["127.0.0.1::80"]
    restart: on-failure
networks:
  front: {{}}
  back:
    internal: true
    ipam:
      config: [{{subnet: "10.219.{number}.0/24"}}]
volumes:
  store:
    labels: {{kept: "no"}}
"""


class Project:
    def __init__(self, engine: EngineProcess, directory: Path, program: str) -> None:
        self.engine = engine
        self.directory = directory
        self._command = [program, "--no-ansi", "-p", PROJECT]

    def __call__(self, *arguments: str, timeout_s: float = 180.0) -> str:
        done = subprocess.run(
            [*self._command, *arguments],
            cwd=self.directory,
            env=self.engine.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def containers(self, service: str) -> list[Any]:
        labels = [f"com.docker.compose.project={PROJECT}", f"com.docker.compose.service={service}"]
        filters = quote(json.dumps({"label": labels}))
        listed = self.engine.request("GET", f"/v1.39/containers/json?all=1&filters={filters}").json
        return [self.engine.inspect(one["Id"]) for one in listed]


@pytest.fixture
def project(engine: EngineProcess, busybox: str, tmp_path: Path) -> Iterator[Project]:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("no docker-compose on this machine")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "page").write_text("bound\n")
    (tmp_path / "docker-compose.yml").write_text(FILE.format(image=busybox, number=engine.number))
    project = Project(engine, tmp_path, program)
    yield project
    project("down", "-v", "--remove-orphans", "-t", "0")
    networks = {network["Name"] for network in engine.request("GET", "/v1.39/networks").json}
    assert networks == {"bridge", "host", "none"}
    assert engine.request("GET", "/v1.39/volumes").json["Volumes"] in ([], None)


def test_a_project_of_three_services(project: Project) -> None:
    project("config", "-q")
    begun = time.monotonic()
    project("up", "-d")
    print(f"compose up: {time.monotonic() - begun:.1f} s")
    db, api, web = (project.containers(service)[0] for service in ("db", "api", "web"))

    # start-up waited for health
    assert db["State"]["Health"]["Status"] == "healthy"
    assert db["State"]["StartedAt"] < api["State"]["StartedAt"] < web["State"]["StartedAt"]
    wait_until(lambda: "web is up" in project("logs", "web"), 30, "web is up")
    wait_until(lambda: "ready" in project("logs", "api"), 30, "api read db's state by its alias")

    # aliases, networks, volumes
    back = db["NetworkSettings"]["Networks"][f"{PROJECT}_back"]
    assert {"database", "store.internal", "db"} <= set(back["Aliases"])
    assert back["IPAddress"].startswith(f"10.219.{project.engine.number}.")
    assert set(api["NetworkSettings"]["Networks"]) == {f"{PROJECT}_back", f"{PROJECT}_front"}
    assert project("exec", "-T", "web", "cat", "/seen/state", "/site/page") == "ready\nbound\n"
    assert "read-only" in project("exec", "-T", "web", "sh", "-c", "touch /seen/x 2>&1; true").lower()
    told = project("exec", "-T", "-e", "X=1", "-u", "nobody", "api", "sh", "-c", "echo $ROLE $X $(id -u)")
    assert told == "api 1 65534\n"
    assert "tmpfs" in project("exec", "-T", "api", "grep", " /scratch ", "/proc/mounts")
    assert project("port", "web", "80").startswith("127.0.0.1:")

    # nothing changes where nothing is to change
    project("up", "-d")
    assert [one["Id"] for one in project.containers("db")] == [db["Id"]]

    # scale
    project("up", "-d", "--no-recreate", "--scale", "api=3")
    scaled = project.containers("api")
    assert sorted(one["Name"] for one in scaled) == [f"/{PROJECT}_api_{number}" for number in (1, 2, 3)]
    addresses = project("exec", "-T", "web", "nslookup", "api")
    for one in scaled:
        assert one["NetworkSettings"]["Networks"][f"{PROJECT}_front"]["IPAddress"] in addresses
    project("up", "-d", "--no-recreate", "--scale", "api=1")
    assert len(project.containers("api")) == 1

    # look at it
    assert [line.split()[0] for line in project("ps").splitlines()[2:]] == [
        f"{PROJECT}_api_1",
        f"{PROJECT}_db_1",
        f"{PROJECT}_web_1",
    ]
    assert "httpd" in project("top", "db")
    logs = project("logs", "--no-color", "--tail=5", "db")
    assert "db_1" in logs and "db is up" in logs
    assert len(project("ps", "-q").split()) == 3

    # stop, start, pause, kill, restart, run
    project("pause", "web")
    assert project.containers("web")[0]["State"]["Paused"]
    project("unpause", "web")
    project("stop", "-t", "1", "web")
    assert project.containers("web")[0]["State"]["ExitCode"] == 0
    project("start", "web")
    project("restart", "-t", "0", "api")
    project("kill", "-s", "SIGKILL", "api")
    assert project.containers("api")[0]["State"]["ExitCode"] == 137
    assert project("run", "--rm", "-T", "--no-deps", "api", "sh", "-c", "echo one-off; cat /etc/hostname") != ""
    project("rm", "-f", "api")
    assert project.containers("api") == []


def test_recreation_keeps_volumes(project: Project) -> None:
    project("up", "-d", "db")
    first = project.containers("db")[0]["Id"]
    project("exec", "-T", "db", "sh", "-c", "echo mine > /data/kept")

    project("up", "-d", "--force-recreate", "-t", "0", "db")

    assert project.containers("db")[0]["Id"] != first
    assert project("exec", "-T", "db", "cat", "/data/kept") == "mine\n"


def test_what_is_wrong_is_told(project: Project) -> None:
    program = project._command[0]
    text = (project.directory / "docker-compose.yml").read_text()
    broken = project.directory / "broken.yml"

    def fails(change: tuple[str, str]) -> str:
        broken.write_text(text.replace(*change))
        done = subprocess.run(
            [program, "--no-ansi", "-p", PROJECT, "-f", str(broken), "up", "-d", "db"],
            cwd=project.directory,
            env=project.engine.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr

    assert "nope" in fails(('["sh", "-c", "sleep 2', '["nope", "-c", "sleep 2'))
    assert "Minimum memory limit allowed is" in fails(("stop_grace_period: 1s", "mem_limit: 1024"))
