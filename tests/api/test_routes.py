"""Every route of API v1.39 is answered: by its owner, by a 501 that names it, or by 404 for good."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from balenapy.api.app import Answer, App, Request, route
from balenapy.api.response import json_response
from balenapy.api.routes import absent, build, register_all
from balenapy.engine.engine import Engine
from tests.api.connection import connected
from tests.trio_tests import trio_test

DESCRIPTION = Path(__file__).parent.parent / "data" / "v1.39.yaml"


class Anything:
    """An engine whose parts are there and are not asked."""

    def __getattr__(self, name: str) -> Anything:
        return self


ENGINE = cast(Engine, Anything())


def described() -> list[tuple[str, str]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    paths: dict[str, dict[str, Any]] = yaml.load(DESCRIPTION.read_text(), loader)["paths"]
    methods = ("get", "head", "post", "put", "delete")
    return [(method.upper(), path) for path, entry in paths.items() for method in entry if method in methods]


ROUTES = described()
NO_ROUTE = r"404 Not Found|405 Method Not Allowed"


@pytest.fixture(scope="module")
def app() -> App:
    app = App()
    register_all(app, ENGINE)
    return app


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_of_the_description_is_registered_or_refused(app: App, method: str, path: str) -> None:
    target = re.sub(r"\{[^}]*\}", "name", path)
    if path.split("/")[1] in absent.REFUSED:
        with pytest.raises(Exception, match=NO_ROUTE):
            app.match(target, method)
    else:
        endpoint, names = app.match(target, method)
        assert endpoint.startswith(f"{method} /")
        assert list(names.values()) == ["name"] * path.count("{")


def test_the_description_has_all_of_v1_39() -> None:
    assert len(ROUTES) > 100


@trio_test(autojump=True)
async def test_what_is_not_built_says_so() -> None:
    app = App()
    absent.register(app, ENGINE)
    async with connected(app) as client:
        answer = await client.request("POST", "/v1.39/containers/a/b/start?x=1")
        assert (answer.status, answer.json) == (
            501,
            {"message": "containers is not supported by this engine yet: POST /containers/a/b/start"},
        )
        assert answer.headers["Api-Version"] == "1.39"
        answer = await client.request("PUT", "/containers/a/archive", b"x" * 100)
        assert answer.status == 501


@trio_test(autojump=True)
async def test_a_real_registration_wins() -> None:
    app = App()

    async def mine(request: Request, id: str) -> Answer:
        return json_response(id)

    route(app, "POST", "/containers/<path:id>/start", mine)
    route(app, "GET", "/networks", lambda request: mine(request, "networks"))
    absent.register(app, ENGINE)
    async with connected(app) as client:
        assert (await client.request("POST", "/containers/x/start")).json == "x"
        assert (await client.request("GET", "/networks/")).json == "networks"
        assert (await client.request("GET", "/networks")).json == "networks"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *((method, path) for method, path in ROUTES if path.split("/")[1] in absent.REFUSED),
        ("POST", "/grpc"),
        ("GET", "/containers/{id}/checkpoints"),
        ("POST", "/containers/{id}/checkpoints"),
        ("GET", "/debug/vars"),
        ("GET", "/debug/pprof/"),
    ],
)
def test_these_are_not_found_for_good(app: App, method: str, path: str) -> None:
    with pytest.raises(Exception, match=NO_ROUTE):
        app.match(path.replace("{", "").replace("}", ""), method)


@trio_test(autojump=True)
async def test_builder_calls_that_mean_nothing_here() -> None:
    app = App()
    build.register(app, ENGINE)
    absent.register(app, ENGINE)
    async with connected(app) as client:
        answer = await client.request("POST", "/build/prune")
        assert (answer.status, answer.json) == (200, {"CachesDeleted": None, "SpaceReclaimed": 0})
        assert (await client.request("POST", "/build/cancel?id=x")).status == 200
        answer = await client.request("POST", "/build/cancel")
        assert (answer.status, answer.json["message"]) == (500, "build ID not provided")
        answer = await client.request("POST", "/containers/x/copy")
        assert (answer.status, answer.body) == (404, b"")
