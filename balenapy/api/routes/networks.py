"""/networks"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from balenapy.api.app import App, Request, json_body, route
from balenapy.api.response import Response, empty_response, json_response
from balenapy.core.filters import parse_filters
from balenapy.core.network import NetworkConnect, NetworkCreate, NetworkDisconnect
from balenapy.core.wire import parse_bool
from balenapy.errors import InvalidParameter

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

LIST_FILTERS = ("driver", "id", "label", "name", "scope", "type")
PRUNE_FILTERS = ("label", "label!", "until")


def register(app: App, engine: Engine) -> None:
    networks = engine.networks

    async def list_networks(request: Request) -> Response:
        filters = parse_filters(request.args.get("filters", ""), LIST_FILTERS)
        return json_response([networks.describe(network, containers=False) for network in networks.matching(filters)])

    async def inspect(request: Request, name: str) -> Response:
        verbose = request.args.get("verbose", "")
        if verbose and parse_bool(verbose) is None:
            problem = f'strconv.ParseBool: parsing "{verbose}": invalid syntax'
            raise InvalidParameter(f"invalid value for verbose: {verbose}: {problem}")
        # Verbose adds the services of a swarm.
        network = networks.get(name, request.args.get("scope", ""))
        return json_response(networks.describe(network, containers=True))

    async def create(request: Request) -> Response:
        body = await json_body(request, NetworkCreate) or NetworkCreate()
        if request.version_at_least("1.44"):  # its clients no longer ask for the check, and count on it
            body = replace(body, check_duplicate=True)
        network, warning = await networks.create(body)
        return json_response({"Id": network.id, "Warning": warning}, 201)

    async def connect(request: Request, name: str) -> Response:
        body = await json_body(request, NetworkConnect) or NetworkConnect()
        await networks.connect(name, body.container, body.endpoint_config)
        return empty_response(200)

    async def disconnect(request: Request, name: str) -> Response:
        body = await json_body(request, NetworkDisconnect) or NetworkDisconnect()
        await networks.disconnect(name, body.container, force=body.force)
        return empty_response(200)

    async def remove(request: Request, name: str) -> Response:
        await networks.remove(name)
        return empty_response(204)

    async def prune(request: Request) -> Response:
        filters = parse_filters(request.args.get("filters", ""), PRUNE_FILTERS)
        return json_response({"NetworksDeleted": await networks.prune(filters) or None})

    route(app, "GET", "/networks", list_networks)
    route(app, "GET", "/networks/", list_networks)
    route(app, "POST", "/networks/create", create)
    route(app, "POST", "/networks/prune", prune)
    route(app, "POST", "/networks/<path:name>/connect", connect)
    route(app, "POST", "/networks/<path:name>/disconnect", disconnect)
    route(app, "GET", "/networks/<path:name>", inspect)
    route(app, "DELETE", "/networks/<path:name>", remove)
