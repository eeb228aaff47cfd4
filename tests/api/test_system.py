"""Ping, version, info, events, login, disk usage over HTTP, with an engine of small fakes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from balenapy.api.app import App
from balenapy.api.routes import system
from balenapy.config import Config
from balenapy.core.container import Container, State, Status
from balenapy.core.ociconfig import HostFacts
from balenapy.engine.engine import Engine
from balenapy.engine.events import EventBus
from balenapy.engine.info import Info
from balenapy.errors import Unauthorized
from balenapy.linux.cgroups import Cgroups
from balenapy.registry.auth import AuthConfig
from balenapy.stores.db import Database
from tests.api.connection import connected, request_bytes
from tests.trio_tests import trio_test

FIXTURES = Path(__file__).parent.parent / "data" / "fixtures"


class FakeContainers:
    host_facts = HostFacts(apparmor=True)

    def all(self) -> list[Container]:
        statuses = (Status.RUNNING, Status.PAUSED, Status.EXITED, Status.CREATED, Status.RESTARTING)
        return [Container(id=status.value, state=State(status=status)) for status in statuses]

    async def summaries(self, **options: bool) -> list[dict[str, Any]]:
        assert options == {"everything": True, "size": True}
        await trio.sleep(1)
        return [{"Id": "c"}]


class FakeVolumes:
    def describe(self, volume: str) -> dict[str, Any]:
        return {"Name": volume}

    async def usage(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(volume="v", references=2, size_bytes=10)]


class FakeRegistry:
    async def login(self, auth: AuthConfig, *, upstream_client: str = "") -> SimpleNamespace:
        if auth.password != "right":
            raise Unauthorized("Get https://registry.example/v2/: unauthorized: authentication required")
        return SimpleNamespace(status="Login Succeeded", identity_token="")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    config = Config(data_root=tmp_path, hosts=("unix:///x",), insecure_registries=("10.0.0.0/8", "reg:5000"))
    engine = SimpleNamespace(
        config=config,
        db=Database.open(tmp_path / "meta.db"),
        events=EventBus(),
        limiters=SimpleNamespace(files=None),
        containers=FakeContainers(),
        images=SimpleNamespace(all=lambda: ["i"], disk_usage=lambda: (7, [{"Id": "i"}]), warnings=list, ingests=list),
        volumes=FakeVolumes(),
        registry=FakeRegistry(),
        runtimes=SimpleNamespace(
            cgroups=Cgroups.read(),
            paths={"runc": "/usr/sbin/runc", "mine": "/bin/mine"},
            default="runc",
            get=lambda name: SimpleNamespace(path="/bin/false"),
        ),
    )
    engine.info = Info(cast(Engine, engine))
    yield cast(Engine, engine)
    engine.db.close()


def application(engine: Engine) -> App:
    app = App()
    system.register(app, engine)
    return app


@trio_test(autojump=True)
async def test_ping(engine: Engine) -> None:
    async with connected(application(engine)) as client:
        answer = await client.request("GET", "/_ping")
        assert (answer.status, answer.body) == (200, b"OK")
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert (await client.request("HEAD", "/v1.39/_ping")).status == 200


@trio_test(autojump=True)
async def test_version_has_the_reference_keys_and_the_engines_name(engine: Engine) -> None:
    expected = list(json.loads((FIXTURES / "version.json").read_text()))
    expected.insert(expected.index("Version"), "Engine")
    async with connected(application(engine)) as client:
        version = (await client.request("GET", "/version")).json
    assert list(version) == expected
    assert (version["Engine"], version["Version"], version["ApiVersion"]) == ("balena-engine", "18.9.17", "1.39")
    (component,) = version["Components"]
    assert list(component["Details"]) == sorted(component["Details"])


@trio_test
async def test_info_has_the_keys_of_18_09(engine: Engine) -> None:
    newer = {"KernelMemoryTCP", "PidsLimit", "CgroupVersion", "OSVersion"}
    older = {"SystemStatus", "ClusterStore", "ClusterAdvertise"}
    reference = json.loads((FIXTURES / "info.json").read_text())
    async with connected(application(engine)) as client:
        info = (await client.request("GET", "/info")).json
        assert [key for key in info if key not in older] == [key for key in reference if key not in newer]
        for key, value in reference.items():
            if key not in newer and value is not None and info[key] is not None:
                assert type(info[key]) is type(value), key
        assert list(info["RegistryConfig"]) == list(reference["RegistryConfig"])
        counts = [info[f"Containers{kind}"] for kind in ("", "Running", "Paused", "Stopped")]
        assert counts == [5, 2, 1, 2]
        assert len(info["ID"].split(":")) == 12
        assert info["Swarm"]["LocalNodeState"] == ""
        assert info["SecurityOptions"] == ["name=apparmor", "name=seccomp,profile=default"]
        assert info["Runtimes"] == {
            "bare": {"path": ""},
            "mine": {"path": "/bin/mine"},
            "runc": {"path": "/usr/sbin/runc"},
        }
        assert info["RegistryConfig"]["InsecureRegistryCIDRs"] == ["10.0.0.0/8", "127.0.0.0/8"]
        assert info["RegistryConfig"]["IndexConfigs"]["reg:5000"]["Secure"] is False
        assert (await client.request("GET", "/info")).json["ID"] == info["ID"]
    assert Info(engine).id == info["ID"]


@trio_test
async def test_events_are_one_object_a_line_and_live(engine: Engine) -> None:
    async with connected(application(engine)) as client:
        await client.send(request_bytes("GET", "/events?filters=%7B%22type%22%3A%5B%22volume%22%5D%7D"))
        head = await client.head()
        assert (head.status, head.headers["Content-Type"]) == (200, "application/json")
        engine.events.network("n", "create", {})
        engine.events.volume("<v>", "create", {"driver": "local"})
        line = await client.chunk()
        assert line.endswith(b"\n")
        assert b"\\u003cv\\u003e" in line
        assert json.loads(line)["Actor"] == {"ID": "<v>", "Attributes": {"driver": "local"}}
        assert engine.events.listener_count == 1
    assert engine.events.listener_count == 0


@trio_test
async def test_events_until_now_are_replayed_and_end(engine: Engine) -> None:
    engine.events.volume("v", "create")
    now = time.time_ns()
    async with connected(application(engine)) as client:
        answer = await client.request("GET", f"/events?since=0&until={now // 10**9}.{now % 10**9:09}")
        assert [json.loads(line)["Action"] for line in answer.body.splitlines()] == ["create"]
        answer = await client.request("GET", f"/events?until={time.time() + 0.1:.3f}")
        assert (answer.status, len(answer.body.splitlines())) == (200, 1)


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("since=20&until=10", 400, "`since` time (20) cannot be after `until` time (10)"),
        ("since=yesterday", 500, 'strconv.ParseInt: parsing "yesterday": invalid syntax'),
        ("filters=x", 500, "invalid character 'x' looking for beginning of value"),
    ],
)
@trio_test(autojump=True)
async def test_events_refuse(engine: Engine, query: str, status: int, message: str) -> None:
    async with connected(application(engine)) as client:
        answer = await client.request("GET", f"/events?{query}")
    assert (answer.status, answer.json) == (status, {"message": message})


@trio_test(autojump=True)
async def test_auth(engine: Engine) -> None:
    headers = {"Content_Type": "application/json"}
    async with connected(application(engine)) as client:
        answer = await client.request("POST", "/auth", b'{"username":"u","Password":"right"}', **headers)
        assert (answer.status, answer.json) == (200, {"IdentityToken": "", "Status": "Login Succeeded"})
        answer = await client.request("POST", "/auth", b'{"username":"u","password":"wrong"}', **headers)
        assert answer.status == 401
        answer = await client.request("POST", "/auth")
        assert (answer.status, answer.json) == (500, {"message": "EOF"})


@trio_test(autojump=True)
async def test_disk_usage_runs_once_at_a_time(engine: Engine) -> None:
    app = application(engine)
    async with connected(app) as first, connected(app) as second:
        await first.send(request_bytes("GET", "/system/df"))
        await trio.testing.wait_all_tasks_blocked()
        answer = await second.request("GET", "/system/df")
        assert (answer.status, answer.json["message"]) == (500, "a disk usage operation is already running")
        usage = (await first.answer()).json
        assert list(usage) == list(json.loads((FIXTURES / "system_df.json").read_text()))
        assert usage["Volumes"] == [{"Name": "v", "UsageData": {"RefCount": 2, "Size": 10}}]
        assert (await second.request("GET", "/system/df")).status == 200
