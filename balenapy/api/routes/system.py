"""The engine itself: ping, version, info, events, login, disk usage."""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING

import trio

from balenapy.api import query
from balenapy.api.app import App, Request, json_body, route
from balenapy.api.response import (
    BodyWriter,
    Response,
    StreamResponse,
    json_response,
    stream_response,
    text_response,
)
from balenapy.core import gojson
from balenapy.errors import InvalidParameter, SystemFailure

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine


def register(app: App, engine: Engine) -> None:
    async def ping(request: Request) -> Response:
        return text_response("OK")

    async def head_ping(request: Request) -> Response:
        return Response(sniffed_type="text/plain; charset=utf-8")

    async def version(request: Request) -> Response:
        return json_response(engine.info.version())

    async def info(request: Request) -> Response:
        return json_response(await engine.info.info(memory=query.boolean(request.args, "memory")))

    async def events(request: Request) -> StreamResponse:
        since_ns = query.timestamp_ns(request.args, "since")
        until_ns = query.timestamp_ns(request.args, "until")
        if until_ns is not None and until_ns < (since_ns or 0):
            since, until = request.args.get("since", ""), request.args["until"]
            raise InvalidParameter(f"`since` time ({since}) cannot be after `until` time ({until})")
        filters = query.filters(request.args)

        async def produce(write: BodyWriter) -> None:
            async with engine.events.open(since_ns, until_ns, filters) as channel:
                await write(b"")  # the head, now that nothing can be missed any more
                left_ns = 0 if until_ns is None else until_ns - time.time_ns()
                deadline = trio.current_time() + left_ns / 1e9 if left_ns > 0 else inf
                while True:
                    # Not around the write: a cancelled write costs the connection.
                    with trio.move_on_at(deadline) as scope:
                        event = await anext(channel, None)
                    if scope.cancelled_caught or event is None:
                        return
                    await write(gojson.dumps_escaped(event.to_json()) + b"\n")

        return stream_response(produce, "application/json", head_first=False)

    async def auth(request: Request) -> Response:
        from balenapy.registry.auth import auth_config

        given = auth_config(await json_body(request, refuse=SystemFailure))
        login = await engine.registry.login(given, upstream_client=request.headers.get("User-Agent", ""))
        return json_response({"IdentityToken": login.identity_token, "Status": login.status})

    async def disk_usage(request: Request) -> Response:
        return json_response(await engine.info.disk_usage(disk=query.boolean(request.args, "disk")))

    route(app, "GET", "/_ping", ping)
    route(app, "HEAD", "/_ping", head_ping)
    route(app, "GET", "/version", version)
    route(app, "GET", "/info", info)
    route(app, "GET", "/events", events)
    route(app, "POST", "/auth", auth)
    route(app, "GET", "/system/df", disk_usage)
