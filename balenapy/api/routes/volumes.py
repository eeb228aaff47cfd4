"""/volumes"""

from __future__ import annotations

from typing import TYPE_CHECKING

from balenapy.api import query
from balenapy.api.app import App, Request, json_body, route
from balenapy.api.response import Response, empty_response, json_response
from balenapy.core.filters import parse_filters
from balenapy.core.volume import VolumeCreate
from balenapy.core.wire import MalformedJSON
from balenapy.errors import InvalidParameter

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

LIST_FILTERS = ("dangling", "driver", "label", "name")
PRUNE_FILTERS = ("label", "label!")


def register(app: App, engine: Engine) -> None:
    async def list_volumes(request: Request) -> Response:
        try:
            filters = parse_filters(request.args.get("filters", ""), LIST_FILTERS)
        except MalformedJSON as error:
            raise InvalidParameter(f"error reading volume filters: {error.message}") from error
        shown = [engine.volumes.describe(volume) for volume in engine.volumes.matching(filters)]
        return json_response({"Volumes": shown, "Warnings": None})

    async def create(request: Request) -> Response:
        body = await json_body(request, VolumeCreate) or VolumeCreate()
        volume = await engine.volumes.create(body.name, body.driver, body.driver_opts, body.labels)
        return json_response(engine.volumes.describe(volume), 201)

    async def inspect(request: Request, name: str) -> Response:
        return json_response(engine.volumes.describe(engine.volumes.get(name)))

    async def remove(request: Request, name: str) -> Response:
        await engine.volumes.remove(name, force=query.boolean(request.args, "force"))
        return empty_response(204)

    async def prune(request: Request) -> Response:
        # Clients of 1.42 tell their users that volumes with a name stay unless they say `all`.
        spares_named = request.version_at_least("1.42")
        known = (*PRUNE_FILTERS, "all") if spares_named else PRUNE_FILTERS
        filters = parse_filters(request.args.get("filters", ""), known)
        named = not spares_named or filters.boolean("all", digits=True) is True
        removed, reclaimed = await engine.volumes.prune(filters, named=named)
        return json_response({"VolumesDeleted": removed, "SpaceReclaimed": reclaimed})

    route(app, "GET", "/volumes", list_volumes)
    route(app, "POST", "/volumes/create", create)
    route(app, "POST", "/volumes/prune", prune)
    route(app, "GET", "/volumes/<path:name>", inspect)
    route(app, "DELETE", "/volumes/<path:name>", remove)
