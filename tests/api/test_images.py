"""Image routes over HTTP: recorded refusals, and the stream of a pull."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from balenapy.api.app import App
from balenapy.api.routes import images
from balenapy.engine.engine import Engine
from tests.api.connection import Client, connected
from tests.engine.image_engine import image_engine
from tests.engine.test_images import add_image
from tests.images_fixture import busybox, layered
from tests.registry.fake import fake_registry
from tests.trio_tests import trio_test

FIXTURES = Path(__file__).parent.parent / "data" / "fixtures"
# These depend on the images of the recorded machine (tests/engine/test_images.py has them), or are of other routes.
ELSEWHERE = ("57ae6bcb", "b7b8c1209fe8", "/get", "/images/search", "commit")
RECORDED = [
    entry
    for entry in json.loads((FIXTURES / "errors.json").read_text())
    if entry["path"].startswith("/images/") and not any(part in entry["path"] for part in ELSEWHERE)
]


@asynccontextmanager
async def client_of(tmp_path: Path) -> AsyncIterator[tuple[Client, Engine]]:
    async with image_engine(tmp_path) as engine:
        app = App()
        images.register(app, engine)
        async with connected(app) as client:
            yield client, engine


@pytest.mark.parametrize("entry", RECORDED, ids=lambda entry: f"{entry['method']} {entry['path'][:50]}")
@trio_test
async def test_refusals_are_those_of_the_reference_engine(tmp_path: Path, entry: dict[str, Any]) -> None:
    async with client_of(tmp_path) as (client, engine):
        await add_image(engine, "busybox:latest")
        answer = await client.request(entry["method"], f"/v1.39{entry['path']}")
        assert (answer.status, answer.json) == (entry["status"], {"message": entry["message"]})


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("fromImage=UPPER", 400, "invalid reference format: repository name must be lowercase"),
        ("fromImage=a&tag=b%20c", 400, "invalid tag format"),
        ("fromImage=scratch&tag=latest", 403, "'scratch' is a reserved name"),
        ("fromImage=a&platform=windows", 400, "operating system is not supported"),
    ],
)
@trio_test
async def test_pulls_that_cannot_begin_are_refused_by_status(
    tmp_path: Path, query: str, status: int, message: str
) -> None:
    async with client_of(tmp_path) as (client, _):
        answer = await client.request("POST", f"/v1.39/images/create?{query}")
        assert (answer.status, answer.json) == (status, {"message": message})


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@trio_test
async def test_a_pull_streams_its_progress_and_its_late_error(tmp_path: Path) -> None:
    with fake_registry() as registry:
        registry.add("team/app", "1", layered())
        broken = busybox()
        registry.add("team/app", "2", broken)
        registry.blobs[broken.layers[0].digest] = b"x" * len(broken.layers[0].data)
        async with client_of(tmp_path) as (client, _):
            name = quote(f"{registry.host}/team/app", safe="")
            missing = await client.request("POST", f"/images/create?fromImage={name}&tag=3")
            good = await client.request("POST", f"/images/create?fromImage={name}&tag=1")
            bad = await client.request("POST", f"/images/create?fromImage={name}&tag=2")

        assert (missing.status, missing.json) == (
            404,
            {"message": f"manifest for {registry.host}/team/app:3 not found"},
        )
        assert (good.status, good.headers["Content-Type"]) == (200, "application/json")
        lines = [json.loads(line) for line in good.body.split(b"\r\n") if line]
        assert lines[0] == {"status": "Pulling from team/app", "id": "1"}
        assert lines[-1] == {"status": f"Status: Downloaded newer image for {registry.host}/team/app:1"}
        assert bad.status == 200
        message = f"filesystem layer verification failed for digest {broken.layers[0].digest}"
        last = json.loads(bad.body.split(b"\r\n")[-2])
        assert last == {"errorDetail": {"message": message}, "error": message}


@trio_test
async def test_tag_list_inspect_and_delete_over_http(tmp_path: Path) -> None:
    async with client_of(tmp_path) as (client, engine):
        image = await add_image(engine, "busybox:latest")
        tagged = await client.request("POST", "/v1.39/images/busybox/tag?repo=team/app&tag=1")
        assert (tagged.status, tagged.body) == (201, b"")
        shown = await client.request("GET", "/v1.39/images/team/app:1/json")
        assert shown.json["RepoTags"] == ["busybox:latest", "team/app:1"]
        filtered = await client.request("GET", "/v1.39/images/json?filters=" + quote('{"reference":["team/*"]}'))
        assert [row["RepoTags"] for row in filtered.json] == [["team/app:1"]]
        old = await client.request("GET", "/v1.27/images/json?filter=busybox")
        assert [row["RepoTags"] for row in old.json] == [["busybox:latest"]]
        removed = await client.request("DELETE", "/v1.39/images/team/app:1")
        assert removed.json == [{"Untagged": "team/app:1"}]
        removed = await client.request("DELETE", f"/v1.39/images/{image.short_id}?force=1")
        assert [list(entry) for entry in removed.json] == [["Untagged"], ["Deleted"], ["Deleted"]]
