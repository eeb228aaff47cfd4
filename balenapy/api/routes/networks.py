"""/networks"""

from __future__ import annotations

from typing import TYPE_CHECKING

from balenapy.api.app import App, Request, route
from balenapy.api.response import Response, json_response
from balenapy.core.filters import parse_filters

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

LIST_FILTERS = ("driver", "id", "label", "name", "scope", "type")
PRUNE_FILTERS = ("label", "label!", "until")


def register(app: App, engine: Engine) -> None:
    async def list_networks(request: Request) -> Response:
        filters = parse_filters(request.args.get("filters", ""), LIST_FILTERS)
        matching = engine.networks.matching(filters)
        return json_response([engine.networks.describe(network, containers=False) for network in matching])

    async def inspect(request: Request, name: str) -> Response:
        return json_response(engine.networks.describe(engine.networks.get(name), containers=True))

    route(app, "GET", "/networks", list_networks)
    route(app, "GET", "/networks/", list_networks)
    route(app, "GET", "/networks/<path:name>", inspect)
