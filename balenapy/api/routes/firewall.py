"""Our firewall rules as a whole: an addition of ours, at a path that v1.39 does not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balenapy.api.app import App, Request, route
from balenapy.api.response import Response, json_response

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine


def register(app: App, engine: Engine) -> None:
    async def clear(request: Request) -> Response:
        return json_response({"Tables": await engine.networks.clear_firewall()})

    async def restore(request: Request) -> Response:
        return json_response({"Tables": await engine.networks.restore_firewall()})

    route(app, "POST", "/firewall/clear", clear)
    route(app, "POST", "/firewall/restore", restore)
