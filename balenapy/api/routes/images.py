"""Images: create (pull, import), list, inspect, history, tag, delete, prune, save, load, push, search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balenapy.api import query
from balenapy.api.app import MAX_JSON_BYTES, Request, route
from balenapy.api.response import BodyWriter, Response, StreamResponse, empty_response, json_response, stream_response
from balenapy.core import progress
from balenapy.core.deltaplan import parse_request
from balenapy.core.filters import Filters, parse_filters
from balenapy.core.manifest import Platform, parse_platform
from balenapy.core.reference import parse_pull_reference, parse_reference
from balenapy.engine.deltaimage import DeltaOrder
from balenapy.engine.deltaimage import create as create_delta
from balenapy.engine.images import LIST_FILTERS, PRUNE_FILTERS
from balenapy.engine.imports import check_import, import_image
from balenapy.engine.load import load
from balenapy.engine.push import credentials
from balenapy.engine.save import choose_images, save
from balenapy.engine.search import DEFAULT_LIMIT, search
from balenapy.engine.search import FILTERS as SEARCH_FILTERS
from balenapy.errors import EngineError, InvalidParameter, SystemFailure

if TYPE_CHECKING:
    from balenapy.api.app import App
    from balenapy.engine.engine import Engine


def register(app: App, engine: Engine) -> None:
    async def summaries(request: Request) -> Response:
        filters = parse_filters(request.args.get("filters", ""), LIST_FILTERS)
        if not request.version_at_least("1.28") and request.args.get("filter"):
            filters = Filters({**filters.values, "reference": (request.args["filter"],)})
        return json_response(engine.images.summaries(filters, everything=query.boolean(request.args, "all")))

    async def inspect(request: Request, name: str) -> Response:
        return json_response(engine.images.inspect(name))

    async def history(request: Request, name: str) -> Response:
        return json_response(engine.images.history(name))

    async def tag(request: Request, name: str) -> Response:
        await engine.images.tag(name, request.args.get("repo", ""), request.args.get("tag", ""))
        return empty_response(201)

    async def remove(request: Request, name: str) -> Response:
        deleted = await engine.images.remove(
            name.strip(),
            force=query.boolean(request.args, "force"),
            prune_parents=not query.boolean(request.args, "noprune"),
        )
        return json_response(deleted)

    async def prune(request: Request) -> Response:
        filters = parse_filters(request.args.get("filters", ""), PRUNE_FILTERS)
        return json_response(await engine.images.prune(filters))

    async def create(request: Request) -> StreamResponse:
        image = request.args.get("fromImage", "")
        if not image:
            return create_from_files(request)
        reference = parse_pull_reference(image, request.args.get("tag", ""))
        platform = wanted_platform(request)
        auth = request.headers.get("X-Registry-Auth", "")
        deltas = parse_request(lambda name: request.headers.get(name, ""), engine.config.delta_mode)

        async def produce(write: BodyWriter) -> None:
            try:
                await engine.pulls.pull(reference, auth, platform, write, deltas)
            except EngineError as error:
                if not write.started:
                    raise
                await write(progress.error(error.message))

        return stream_response(produce, "application/json", head_first=False)

    def wanted_platform(request: Request) -> Platform | None:
        asked = request.args.get("platform", "") if request.version_at_least("1.32") else ""
        platform = parse_platform(asked, engine.pulls.platform) if asked else None
        if platform is not None and platform.os != "linux":
            raise InvalidParameter("operating system is not supported")
        return platform

    def create_from_files(request: Request) -> StreamResponse:
        source = request.args.get("fromSrc", "")
        if not source:
            # What the reference engine makes of an import of nothing.
            raise SystemFailure('Get "http:": http: no Host in request URL')
        asked = check_import(
            source,
            request.args.get("repo", ""),
            request.args.get("tag", ""),
            request.args.get("message", ""),
            request.args.getlist("changes"),
            wanted_platform(request) or engine.pulls.platform,
        )

        async def produce(write: BodyWriter) -> None:
            try:
                await import_image(engine, asked, request.body, write)
            except EngineError as error:
                if not write.started:
                    raise
                await write(progress.error(error.message))

        return stream_response(produce, "application/json", head_first=False)

    async def save_one(request: Request, name: str) -> StreamResponse:
        return save_all([name])

    async def save_many(request: Request) -> StreamResponse:
        return save_all(request.args.getlist("names"))

    async def push(request: Request, name: str) -> StreamResponse:
        header = request.headers.get("X-Registry-Auth", "")
        auth = credentials(header, b"" if header else await request.body.read(MAX_JSON_BYTES))
        try:
            reference = parse_reference(name)
            if request.args.get("tag"):
                reference = reference.with_tag(request.args["tag"])
        except InvalidParameter as error:
            raise SystemFailure(error.message) from error

        async def produce(write: BodyWriter) -> None:
            try:
                await engine.pushes.push(reference, auth, write)
            except EngineError as error:
                await write(progress.error(error.message))

        return stream_response(produce, "application/json", head_first=False)

    def save_all(names: list[str]) -> StreamResponse:
        images = choose_images(engine, names)

        async def produce(write: BodyWriter) -> None:
            await save(engine, images, write)

        return stream_response(produce, "application/x-tar", head_first=False)

    async def load_archive(request: Request) -> StreamResponse:
        quiet = query.boolean(request.args, "quiet", True)

        async def produce(write: BodyWriter) -> None:
            try:
                await load(engine, request.body, quiet=quiet, write=write)
            except EngineError as error:
                await write(progress.error(error.message))

        return stream_response(produce, "application/json")

    async def make_delta(request: Request) -> StreamResponse:
        args = request.args
        order = DeltaOrder(engine, args.get("src", ""), args.get("dest", ""), args.get("t", ""))

        async def produce(write: BodyWriter) -> None:
            try:
                await create_delta(engine, order, write)
            except EngineError as error:
                await write(progress.error(error.message))

        return stream_response(produce, "application/json")

    async def search_registry(request: Request) -> Response:
        limit = query.integer(request.args, "limit", DEFAULT_LIMIT)
        filters = parse_filters(request.args.get("filters", ""), SEARCH_FILTERS)
        auth = request.headers.get("X-Registry-Auth", "")
        client = request.headers.get("User-Agent", "")
        found = await search(engine, request.args.get("term", ""), limit, filters, auth, upstream_client=client)
        return json_response(found)

    route(app, "GET", "/images/json", summaries)
    route(app, "GET", "/images/search", search_registry)
    route(app, "GET", "/images/get", save_many)
    route(app, "POST", "/images/load", load_archive)
    route(app, "GET", "/images/<path:name>/get", save_one)
    route(app, "POST", "/images/create", create)
    route(app, "POST", "/images/delta", make_delta)
    route(app, "POST", "/images/prune", prune)
    route(app, "GET", "/images/<path:name>/json", inspect)
    route(app, "GET", "/images/<path:name>/history", history)
    route(app, "POST", "/images/<path:name>/push", push)
    route(app, "POST", "/images/<path:name>/tag", tag)
    route(app, "DELETE", "/images/<path:name>", remove)
