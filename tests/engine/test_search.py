"""Search: what registries are asked, and what is kept of their answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from balenapy.config import Config
from balenapy.core.filters import parse_filters
from balenapy.engine.search import FILTERS, search
from balenapy.errors import InvalidParameter, SystemFailure
from balenapy.registry.client import Registry
from balenapy.registry.errors import RegistryError
from tests.trio_tests import trio_test

ENTRIES = [
    {"name": "busybox", "star_count": 100, "is_official": True, "is_automated": False, "description": "b"},
    {"name": "x/busybox", "star_count": 3, "is_official": False, "is_automated": True, "description": None},
]


@pytest.fixture
def index() -> Iterator[SimpleNamespace]:
    """A v1 search on loopback, and the requests it got."""
    state = SimpleNamespace(paths=[], headers=[], status=200, body=json.dumps({"results": ENTRIES}).encode())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.paths.append(self.path)
            state.headers.append(dict(self.headers))
            self.send_response(state.status)
            self.send_header("Content-Length", str(len(state.body)))
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.host = f"127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def engine() -> Any:
    return SimpleNamespace(registry=Registry(replace(Config()), environment={}))


async def names(term: str, filters: str = "", limit: int = 25, auth: str = "") -> list[str]:
    found = await search(engine(), term, limit, parse_filters(filters, FILTERS), auth)
    return [entry["name"] for entry in found]


@trio_test
async def test_a_registry_is_asked_and_its_answer_filtered(index: SimpleNamespace) -> None:
    term = f"{index.host}/busy box"
    everything = await search(engine(), term, 7, parse_filters("", FILTERS), "")
    assert [list(entry) for entry in everything] == [
        ["star_count", "is_official", "name", "is_automated", "description"]
    ] * 2
    assert everything[1]["description"] == ""
    assert index.paths == ["/v1/search?q=busy+box&n=7"]
    assert index.headers[0]["X-Docker-Token"] == "true"
    assert await names(term, '{"is-official":["true"]}') == ["busybox"]
    assert await names(term, '{"is-automated":["true"]}') == ["x/busybox"]
    assert await names(term, '{"stars":["2"]}') == ["busybox", "x/busybox"]
    assert await names(term, '{"stars":["2","50"]}') == ["busybox"]
    await names(term, auth="eyJ1c2VybmFtZSI6InUiLCJwYXNzd29yZCI6InAifQ==")
    assert index.headers[-1]["Authorization"] == "Basic dTpw"


@trio_test
async def test_refusals(index: SimpleNamespace) -> None:
    term = f"{index.host}/x"
    for limit in (0, 101, -1):
        with pytest.raises(InvalidParameter, match=rf"^Limit {limit} is outside the range of \[1, 100\]$"):
            await names(term, limit=limit)
    for filters, words in (
        ('{"is-official":["maybe"]}', "Invalid filter 'is-official=[maybe]'"),
        ('{"stars":["many"]}', "Invalid filter 'stars=many'"),
        ('{"nope":["x"]}', "Invalid filter 'nope'"),
    ):
        with pytest.raises(InvalidParameter) as caught:
            await names(term, filters)
        assert caught.value.message == words
    with pytest.raises(SystemFailure, match="Invalid repository name"):
        await names("http://x/y")
    assert index.paths == []
    index.status = 404
    with pytest.raises(RegistryError, match=r"^Unexpected status code 404$"):
        await names(term)
    index.status, index.body = 200, b"<html>"
    with pytest.raises(RegistryError, match="unable to decode search results"):
        await names(term)
    index.body = b'{"results":[1,{"name":5,"star_count":"x"}]}'
    assert await names(term) == ["5"]
