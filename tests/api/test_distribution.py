"""`/distribution/{name}/json` and `/auth` over HTTP, asking a fake registry."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from balenapy.api.app import App
from balenapy.api.routes import distribution, system
from balenapy.engine.engine import Engine
from balenapy.registry.client import Registry
from tests import images_fixture
from tests.api.connection import connected
from tests.registry.fake import FakeRegistry, fake_registry
from tests.registry.real_registry import PASSWORD, USERNAME
from tests.registry.test_client import Settings
from tests.trio_tests import trio_test

USER = {
    "X-Registry-Auth": base64.urlsafe_b64encode(
        json.dumps({"username": USERNAME, "password": PASSWORD}).encode()
    ).decode()
}


@pytest.fixture
def app() -> App:
    engine = cast(Engine, SimpleNamespace(registry=Registry(Settings(), directories=(), environment={})))
    made = App()
    distribution.register(made, engine)
    system.register(made, engine)
    return made


@pytest.fixture(params=["basic", "token"])
def fake(request: pytest.FixtureRequest) -> Iterator[FakeRegistry]:
    with fake_registry(auth=request.param) as registry:
        registry.add("team/app", "1", images_fixture.busybox())
        registry.add("team/app", "many", images_fixture.multi_platform("docker"))
        yield registry


async def ask(app: App, path: str, **headers: str) -> tuple[int, Any]:
    async with connected(app) as client:
        answer = await client.request("GET", f"/v1.39/distribution/{path}/json", **{**USER, **headers})
    return answer.status, answer.json


@trio_test
async def test_one_image_is_described_with_the_platform_of_its_config(app: App, fake: FakeRegistry) -> None:
    manifest = images_fixture.busybox().manifest

    status, body = await ask(app, f"{fake.host}/team/app:1")

    assert (status, body) == (
        200,
        {
            "Descriptor": manifest.descriptor,
            "Platforms": [{"architecture": "amd64", "os": "linux"}],
        },
    )
    assert "UpstreamClient(" not in fake.seen("manifests")[0].headers["User-Agent"]


@trio_test
async def test_an_index_is_described_with_its_platforms(app: App, fake: FakeRegistry) -> None:
    status, body = await ask(app, f"{fake.host}/team/app:many")

    assert status == 200
    assert body["Descriptor"] == images_fixture.multi_platform("docker").manifest.descriptor
    assert body["Platforms"][0] == {"architecture": "arm", "os": "linux", "variant": "v5"}
    assert len(body["Platforms"]) == 5


@trio_test
async def test_without_a_config_the_platform_is_unknown(app: App, fake: FakeRegistry) -> None:
    fake.fault("blobs/", status=404)

    status, body = await ask(app, f"{fake.host}/team/app:1")

    assert (status, body["Platforms"]) == (200, None)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("{host}/team/app:no", 404, "manifest unknown: manifest unknown"),
        ("{host}/no:no", 404, "name unknown: no such name"),
        ("BAD", 500, "invalid reference format: repository name must be lowercase"),
        ("sha256:" + "0" * 64, 500, "no manifest found for full image ID"),
        ("127.0.0.1:1/x", 500, "Get http://127.0.0.1:1/v2/: dial tcp 127.0.0.1:1: connect: connection refused"),
    ],
)
@trio_test
async def test_what_cannot_be_described_is_told(
    app: App, fake: FakeRegistry, name: str, status: int, message: str
) -> None:
    assert (status, {"message": message}) == await ask(app, name.format(host=fake.host))


@trio_test
async def test_a_refusal_is_unauthorized(app: App) -> None:
    with fake_registry(auth="basic") as fake:
        fake.add("team/app", "1", images_fixture.busybox())
        wrong = base64.urlsafe_b64encode(b'{"username":"u","password":"p"}').decode()

        status, body = await ask(app, f"{fake.host}/team/app:1", **{"X-Registry-Auth": wrong})

    assert (status, body) == (401, {"message": "unauthorized: authentication required"})


@pytest.mark.parametrize("auth", ["basic", "token"])
@trio_test
async def test_a_login_over_http(app: App, auth: Any) -> None:
    async def login(password: str) -> tuple[int, Any]:
        body = json.dumps({"username": USERNAME, "password": password, "serveraddress": fake.host}).encode()
        async with connected(app) as client:
            answer = await client.request("POST", "/v1.39/auth", body, **{"Content-Type": "application/json"})
        return answer.status, answer.json

    with fake_registry(auth=auth) as fake:
        status, body = await login(PASSWORD)
        assert (status, body["Status"]) == (200, "Login Succeeded")
        assert bool(body["IdentityToken"]) == (auth == "token")
        status, body = await login("wrong")
        assert status == 401
        assert "nauthorized" in body["message"]
