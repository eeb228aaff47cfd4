"""Containers: create to remove, list, inspect; their files. What runs in them is in `process.py`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from balenapy.api import query
from balenapy.api.app import MAX_JSON_BYTES, App, Request, check_json_type, json_body, route
from balenapy.api.response import BodyWriter, Response, StreamResponse, empty_response, json_response, stream_response
from balenapy.core import wire
from balenapy.core.container import ContainerConfig, UpdateConfig
from balenapy.core.creation import parse_create
from balenapy.core.filters import parse_filters
from balenapy.engine.containerfiles import (
    CommitRequest,
    check_export,
    commit_container,
    container_changes,
    export_container,
)
from balenapy.engine.containers import LIST_FILTERS, PRUNE_FILTERS
from balenapy.errors import SystemFailure

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine


def register(app: App, engine: Engine) -> None:
    async def create(request: Request) -> Response:
        asked = parse_create(await json_body(request, refuse=SystemFailure))
        if not request.version_at_least("1.25"):
            asked.host_config.auto_remove = False  # such clients remove by themselves
        container, warnings = await engine.containers.create(asked, request.args.get("name", ""))
        return json_response({"Id": container.id, "Warnings": warnings or None}, 201)

    async def summaries(request: Request) -> Response:
        filters = parse_filters(request.args.get("filters", ""), LIST_FILTERS)
        return json_response(
            await engine.containers.summaries(
                filters,
                everything=query.boolean(request.args, "all"),
                limit=query.integer(request.args, "limit"),
                size=query.boolean(request.args, "size"),
            )
        )

    async def inspect(request: Request, name: str) -> Response:
        return json_response(await engine.containers.inspect(name, size=query.boolean(request.args, "size")))

    async def update(request: Request, name: str) -> Response:
        changes = await json_body(request, UpdateConfig, refuse=SystemFailure) or UpdateConfig()
        return json_response({"Warnings": await engine.containers.update(name, changes) or None})

    async def rename(request: Request, name: str) -> Response:
        await engine.containers.rename(name, request.args.get("name", ""))
        return empty_response()

    async def remove(request: Request, name: str) -> Response:
        removal = partial(
            engine.containers.remove,
            force=query.boolean(request.args, "force"),
            remove_volumes=query.boolean(request.args, "v"),
            link=query.boolean(request.args, "link"),
        )
        await engine.to_end(removal, name)
        return empty_response()

    async def prune(request: Request) -> Response:
        filters = parse_filters(request.args.get("filters", ""), PRUNE_FILTERS)
        removed, reclaimed = await engine.containers.prune(filters)
        return json_response({"ContainersDeleted": removed or None, "SpaceReclaimed": reclaimed})

    async def changes(request: Request, name: str) -> Response:
        return json_response(await container_changes(engine, name))

    async def export(request: Request, name: str) -> StreamResponse:
        container = check_export(engine, name)

        async def produce(write: BodyWriter) -> None:
            await export_container(engine, container, write)

        return stream_response(produce, "application/octet-stream", head_first=False)

    async def commit(request: Request) -> Response:
        check_json_type(request)
        body = await request.body.read(MAX_JSON_BYTES)
        config = wire.parse_json(body) if body.strip() else None
        image_id = await commit_container(
            engine,
            CommitRequest(
                request.args.get("container", ""),
                request.args.get("repo", ""),
                request.args.get("tag", ""),
                request.args.get("comment", ""),
                request.args.get("author", ""),
                query.boolean(request.args, "pause") if request.args.get("pause") else True,
                request.args.getlist("changes"),
                wire.decode(ContainerConfig, config) if config else None,
            ),
        )
        return json_response({"Id": image_id}, 201)

    route(app, "POST", "/commit", commit)
    route(app, "GET", "/containers/<path:name>/changes", changes)
    route(app, "GET", "/containers/<path:name>/export", export)
    route(app, "POST", "/containers/create", create)
    route(app, "GET", "/containers/json", summaries)
    route(app, "GET", "/containers/<path:name>/json", inspect)
    route(app, "POST", "/containers/<path:name>/update", update)
    route(app, "POST", "/containers/<path:name>/rename", rename)
    route(app, "DELETE", "/containers/<path:name>", remove)
    route(app, "POST", "/containers/prune", prune)
