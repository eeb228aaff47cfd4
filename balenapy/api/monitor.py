"""What `--metrics-addr` serves, to look at and nothing else: metrics, and a status page with what it shows.

    GET /                      the page: one file, `status.html` beside this one
    GET /metrics               Prometheus' text form
    GET /status.json           the page's figures
    GET /logs/NAME?tail=N      the last lines of a container's log, as text
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trio

from balenapy.api.app import App, Request, route
from balenapy.api.response import Response, json_response
from balenapy.core.logview import LogOptions
from balenapy.core.stdcopy import FrameReader
from balenapy.engine.overview import Onlooker

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

TAIL_DEFAULT, TAIL_MAX = 100, 1000
LOG_MAX_BYTES = 1 << 20
# The page's script and style are in the page; it asks its own address only.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}


def create_monitor(engine: Engine) -> App:
    app = App()
    onlooker = Onlooker(engine)
    scrape = trio.Lock()  # one at a time: each reads a dozen files a container

    async def page(request: Request) -> Response:
        data = await trio.to_thread.run_sync(Path(__file__).with_name("status.html").read_bytes)
        return Response(body=data, headers={"Content-Type": "text/html; charset=utf-8", **HEADERS})

    async def metrics(request: Request) -> Response:
        from balenapy.engine import metrics

        async with scrape:
            body = await metrics.render(onlooker)
        return Response(body=body, headers={"Content-Type": metrics.CONTENT_TYPE, **HEADERS})

    async def status(request: Request) -> Response:
        async with scrape:
            answer = json_response(await onlooker.overview())
        answer.headers |= HEADERS
        return answer

    async def logs(request: Request, name: str) -> Response:
        container = engine.containers.find(name)
        given = request.args.get("tail", "")
        tail = min(int(given), TAIL_MAX) if given.isdigit() and len(given) < 10 else TAIL_DEFAULT
        engine.logs.check_readable(container)
        found = bytearray()

        async def take(data: bytes) -> None:
            await trio.lowlevel.checkpoint()
            found.extend(data)  # at most TAIL_MAX entries of 16 KiB

        await engine.logs.read(container, LogOptions(tail=tail, timestamps=True), take)
        text = bytes(found) if container.config.tty else _payloads(bytes(found))
        headers = {"Content-Type": "text/plain; charset=utf-8", **HEADERS}
        return Response(body=text[-LOG_MAX_BYTES:], headers=headers)

    route(app, "GET", "/", page)
    route(app, "GET", "/metrics", metrics)
    route(app, "GET", "/status.json", status)
    route(app, "GET", "/logs/<path:name>", logs)
    return app


def _payloads(data: bytes) -> bytes:
    reader = FrameReader()
    reader.feed(data)
    found = bytearray()
    while (one := reader.next_frame()) is not None:
        found += one[1]
    return bytes(found)
