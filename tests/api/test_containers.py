"""The routes of containers over HTTP: statuses, bodies, words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.api.app import App
from balenapy.api.routes import containers
from tests.api.connection import Answer, Client, connected
from tests.engine.container_rig import Rig, open_rig
from tests.trio_tests import trio_test

RECORDED = [
    entry
    for entry in json.loads((Path(__file__).parent.parent / "data/fixtures/errors.json").read_text())
    if entry["path"].startswith("/containers/create")
]


class Caller:
    def __init__(self, rig: Rig, client: Client) -> None:
        self.rig = rig
        self.client = client

    async def __call__(self, method: str, path: str, body: Any = None, *, prefix: str = "/v1.39") -> Answer:
        if body is None:
            return await self.client.request(method, prefix + path)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.request(method, prefix + path, data, Content_Type="application/json")


@asynccontextmanager
async def serving(root: Path) -> AsyncIterator[Caller]:
    async with open_rig(root) as rig:
        await rig.add_image()
        app = App()
        containers.register(app, rig.engine)
        async with connected(app) as client:
            yield Caller(rig, client)


def message_of(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json["message"]


@trio_test
async def test_create_answers_with_the_id_and_null_warnings(tmp_path: Path) -> None:
    async with serving(tmp_path) as call:
        answer = await call("POST", "/containers/create?name=web", {"Image": "busybox", "Cmd": ["x"]})

        container = call.rig.containers.find("web")
        assert answer.status == 201
        # The test machine's forwarding may be off: then there is one warning.
        assert list(answer.json) == ["Id", "Warnings"]
        assert answer.json["Id"] == container.id
        assert answer.json["Warnings"] in (None, ["IPv4 forwarding is disabled. Networking will not work."])


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"", {}, 500, "EOF"),
        (b'{"Image":', {}, 500, "unexpected EOF"),
        (b"{}", {"Content_Type": "text/plain"}, 400,
         "Content-Type specified (text/plain) must be 'application/json'"),
        (b"null", {}, 400, "Config cannot be empty in order to create a container"),
        (b'{"Image":""}', {}, 400, "No command specified"),
        (b'{"Image":"nope-nope"}', {}, 404, "No such image: nope-nope:latest"),
        (b'{"Image":"NOPE"}', {}, 400, "invalid reference format: repository name must be lowercase"),
        (b'{"Image":"busybox","HostConfig":{"Memory":"x"}}', {}, 500,
         "json: cannot unmarshal string into Go struct field HostConfig.HostConfig.Memory of type int64"),
        (b'{"Image":"busybox","Cmd":["x"],"HostConfig":{"StorageOpt":{"zz":"1"}}}', {}, 500, "Unknown option zz"),
    ],
)  # fmt: skip
def test_create_refuses_in_the_words_of_the_reference(
    tmp_path: Path, body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    assert (status, message) in [(entry["status"], entry["message"]) for entry in RECORDED]

    async def main() -> None:
        async with serving(tmp_path) as call:
            fields = {"Content_Type": "application/json", **headers}
            answer = await call.client.request("POST", "/v1.39/containers/create", body, **fields)
            assert (status, message) == message_of(answer)

    trio.run(main)


@pytest.mark.parametrize("name", ["a", "a%20b", "/x//y"])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    (recorded,) = [entry for entry in RECORDED if entry["path"].endswith(f"?name={name}")]

    async def main() -> None:
        async with serving(tmp_path) as call:
            answer = await call("POST", f"/containers/create?name={name}", {"Image": "busybox", "Cmd": ["x"]})
            assert (recorded["status"], recorded["message"]) == message_of(answer)

    trio.run(main)


@trio_test
async def test_old_clients_remove_containers_by_themselves(tmp_path: Path) -> None:
    async with serving(tmp_path) as call:
        body = {"Image": "busybox", "Cmd": ["x"], "HostConfig": {"AutoRemove": True}}
        await call("POST", "/containers/create?name=new", body)
        await call("POST", "/containers/create?name=old", body, prefix="/v1.24")

        assert call.rig.containers.find("new").host_config.auto_remove
        assert not call.rig.containers.find("old").host_config.auto_remove


@trio_test
async def test_list_inspect_and_look_up(tmp_path: Path) -> None:
    async with serving(tmp_path) as call:
        container = await call.rig.create("web")

        assert (await call("GET", "/containers/json")).json == []
        (entry,) = (await call("GET", "/containers/json?all=1&size=1")).json
        assert entry["Names"] == ["/web"]
        assert "SizeRw" not in entry
        plain = await call("GET", "/containers/web/json")
        sized = await call("GET", f"/containers/{container.short_id}/json?size=1", prefix="")
        assert [key for key in sized.json if key not in plain.json] == ["SizeRw", "SizeRootFs"]
        assert message_of(await call("GET", "/containers/nope/json")) == (404, "No such container: nope")
        zz = await call("GET", "/containers/json?filters=zz")
        assert message_of(zz) == (500, "invalid character 'z' looking for beginning of value")
        unknown = await call("GET", "/containers/json?filters=%7B%22zz%22%3A%5B%22%22%5D%7D")
        assert message_of(unknown) == (400, "Invalid filter 'zz'")
        limit = await call("GET", "/containers/json?limit=zz")
        assert message_of(limit) == (500, 'strconv.Atoi: parsing "zz": invalid syntax')


@trio_test
async def test_update_rename_remove_and_prune(tmp_path: Path) -> None:
    async with serving(tmp_path) as call:
        await call.rig.create("web")
        await call.rig.create("other")

        answer = await call("POST", "/containers/web/update", {"CpuShares": 5, "RestartPolicy": {"Name": "always"}})
        assert (answer.status, answer.json) == (200, {"Warnings": None})
        assert call.rig.containers.find("web").host_config.cpu_shares == 5
        assert (await call("POST", "/containers/web/rename?name=new")).status == 204
        refused = await call("POST", "/containers/new/rename")
        assert message_of(refused) == (400, "Neither old nor new names may be empty")
        assert (await call("DELETE", "/containers/new?v=1")).status == 204
        assert message_of(await call("DELETE", "/containers/new")) == (404, "No such container: new")
        other = call.rig.containers.find("other").id
        answer = await call("POST", "/containers/prune")
        assert answer.json == {"ContainersDeleted": [other], "SpaceReclaimed": 0}
        answer = await call("POST", "/containers/prune")
        assert answer.json == {"ContainersDeleted": None, "SpaceReclaimed": 0}
        until = await call("POST", "/containers/prune?filters=%7B%22until%22%3A%5B%22zz%22%5D%7D")
        assert message_of(until) == (500, 'failed to parse value as time or duration: "zz"')
