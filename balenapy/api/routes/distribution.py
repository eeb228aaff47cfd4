"""Questions about images in registries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balenapy.api.app import App, Request, route
from balenapy.api.response import Response, json_response
from balenapy.engine.distribution import inspect_remote

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine


def register(app: App, engine: Engine) -> None:
    async def inspect(request: Request, name: str) -> Response:
        auth = request.headers.get("X-Registry-Auth", "")
        client = request.headers.get("User-Agent", "")
        return json_response(await inspect_remote(engine.registry, name, auth, upstream_client=client))

    route(app, "GET", "/distribution/<path:name>/json", inspect)
