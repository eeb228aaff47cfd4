"""Verification of images: an addition of ours, at a path that v1.39 does not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balenapy.api import query
from balenapy.api.app import Request, route
from balenapy.api.response import BodyWriter, StreamResponse, stream_response
from balenapy.core import progress
from balenapy.engine.fsck import fsck
from balenapy.errors import EngineError

if TYPE_CHECKING:
    from balenapy.api.app import App
    from balenapy.engine.engine import Engine


def register(app: App, engine: Engine) -> None:
    async def verify(request: Request) -> StreamResponse:
        names = request.args.getlist("name")
        images = [engine.images.resolve(name) for name in names] if names else None
        deep, repair = query.boolean(request.args, "deep"), query.boolean(request.args, "repair")
        auth = request.headers.get("X-Registry-Auth", "")

        async def produce(write: BodyWriter) -> None:
            try:
                await fsck(engine, images, deep=deep, repair=repair, auth=auth, write=write)
            except EngineError as error:
                await write(progress.error(error.message))

        return stream_response(produce, "application/json")

    route(app, "POST", "/images/fsck", verify)
