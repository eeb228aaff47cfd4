"""What runs: start, stop, kill, restart, pause, wait, attach, logs, exec, resize, top, stats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balenapy.api import query
from balenapy.api.app import Request, json_body, route
from balenapy.api.errors import status_of
from balenapy.api.hijack import Hijack
from balenapy.api.response import (
    BodyWriter,
    Response,
    StreamResponse,
    empty_response,
    json_response,
    stream_response,
)
from balenapy.api.websocket import websocket
from balenapy.core import gojson
from balenapy.core.container import Container, Status
from balenapy.core.detachkeys import parse_keys
from balenapy.core.execconfig import ExecConfig, ExecStart
from balenapy.core.logview import LogOptions
from balenapy.core.signals import check_signal, parse_signal
from balenapy.engine.attach import AttachOptions
from balenapy.engine.stats import read_stats, stream_stats, top
from balenapy.errors import Conflict, EngineError, InvalidParameter

if TYPE_CHECKING:
    import trio

    from balenapy.api.app import App
    from balenapy.engine.engine import Engine

START_BODY_MAX_BYTES = 7  # clients of old send `{}` or `null`


def register(app: App, engine: Engine) -> None:
    _register_life(app, engine)
    _register_streams(app, engine)
    _register_exec(app, engine)


def _register_life(app: App, engine: Engine) -> None:
    async def start(request: Request, name: str) -> Response:
        length = request.content_length
        if (length is None and request.body.is_chunked) or (length or 0) > START_BODY_MAX_BYTES:
            raise InvalidParameter(
                "starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24"
            )
        await engine.supervisors.start(engine.containers.find(name))
        return empty_response()

    async def stop(request: Request, name: str) -> Response:
        timeout_s = _timeout(request)
        container = engine.containers.find(name)
        await engine.to_end(engine.supervisors.stop, container, timeout_s)
        return empty_response()

    async def restart(request: Request, name: str) -> Response:
        timeout_s = _timeout(request)
        container = engine.containers.find(name)
        try:
            await engine.to_end(engine.supervisors.restart, container, timeout_s)
        except EngineError as error:
            raise type(error)(f"Cannot restart container {name}: {error.message}") from error
        return empty_response()

    async def kill(request: Request, name: str) -> Response:
        text = request.args.get("signal", "")
        number = parse_signal(text) if text else 0
        try:
            container = engine.containers.find(name)
            if number:
                check_signal(number)
            await engine.to_end(engine.supervisors.kill, container, number)
        except EngineError as error:
            raise type(error)(f"Cannot kill container: {name}: {error.message}") from error
        return empty_response()

    async def pause(request: Request, name: str) -> Response:
        await engine.to_end(engine.supervisors.pause, engine.containers.find(name))
        return empty_response()

    async def unpause(request: Request, name: str) -> Response:
        await engine.to_end(engine.supervisors.unpause, engine.containers.find(name))
        return empty_response()

    async def resize(request: Request, name: str) -> Response:
        height, width = _size(request)
        engine.supervisors.resize(engine.containers.find(name), height, width)
        return empty_response(200)

    async def wait(request: Request, name: str) -> StreamResponse:
        container = engine.containers.find(name)
        waiter = engine.supervisors.wait(container, request.args.get("condition", ""))

        async def produce(write: BodyWriter) -> None:
            try:
                code, error = await waiter.result()
            finally:
                engine.supervisors.forget_waiter(container, waiter)
            answer = {"Error": {"Message": error} if error else None, "StatusCode": code}
            await write(gojson.dumps(answer) + b"\n")

        return stream_response(produce, "application/json")

    async def show_top(request: Request, name: str) -> Response:
        return json_response(await top(engine, engine.containers.find(name), request.args.get("ps_args", "")))

    async def stats(request: Request, name: str) -> Response | StreamResponse:
        container = engine.containers.find(name)
        if not query.boolean(request.args, "stream", default=True):
            return json_response(await read_stats(engine, container))

        async def produce(write: BodyWriter) -> None:
            await stream_stats(engine, container, lambda shown: write(gojson.dumps_escaped(shown) + b"\n"))

        return stream_response(produce, "application/json")

    for method, path, handler in (
        ("POST", "start", start),
        ("POST", "stop", stop),
        ("POST", "restart", restart),
        ("POST", "kill", kill),
        ("POST", "pause", pause),
        ("POST", "unpause", unpause),
        ("POST", "resize", resize),
        ("POST", "wait", wait),
        ("GET", "top", show_top),
        ("GET", "stats", stats),
    ):
        route(app, method, f"/containers/<path:name>/{path}", handler)


def _timeout(request: Request) -> int | None:
    return query.integer(request.args, "t") if request.args.get("t", "") else None


def _size(request: Request) -> tuple[int, int]:
    height = query.integer(request.args, "h", None, refuse=InvalidParameter)
    return height, query.integer(request.args, "w", None, refuse=InvalidParameter)


def _register_streams(app: App, engine: Engine) -> None:
    async def logs(request: Request, name: str) -> StreamResponse:
        args = request.args
        stdout, stderr = query.boolean(args, "stdout"), query.boolean(args, "stderr")
        if not (stdout or stderr):
            raise InvalidParameter("Bad parameters: you must choose at least one stream")
        container = engine.containers.find(name)
        options = LogOptions(
            stdout=stdout,
            stderr=stderr,
            since_ns=query.timestamp_ns(args, "since") or 0,
            until_ns=query.timestamp_ns(args, "until") or 0,
            tail=_tail(args.get("tail", "")),
            timestamps=query.boolean(args, "timestamps"),
            details=query.boolean(args, "details"),
            follow=query.boolean(args, "follow"),
        )
        engine.logs.check_readable(container)

        async def produce(write: BodyWriter) -> None:
            await engine.logs.read(container, options, write)

        return stream_response(produce)

    async def attach(request: Request, name: str) -> Hijack:
        try:
            container = engine.containers.find(name)
            options = _attach_options(request, container)
            _check_attach(container, name)
        except EngineError as error:
            return Hijack.refused(status_of(error), error.message)

        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            await engine.supervisors.attachments.serve(container, options, stream)

        return Hijack(serve, upgrade="Upgrade" in request.headers)

    async def attach_websocket(request: Request, name: str) -> Hijack:
        container = engine.containers.find(name)
        options = _attach_options(request, container, mixed=True)
        _check_attach(container, name)

        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            await engine.supervisors.attachments.serve(container, options, stream)

        return websocket(request, serve)

    route(app, "GET", "/containers/<path:name>/logs", logs)
    route(app, "POST", "/containers/<path:name>/attach", attach)
    route(app, "GET", "/containers/<path:name>/attach/ws", attach_websocket)


def _tail(text: str) -> int:
    """A number of entries; anything else means all of them."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1


def _attach_options(request: Request, container: Container, *, mixed: bool = False) -> AttachOptions:
    """`mixed`: a WebSocket, which carries all of stdio without frames when it streams.

    Raises: InvalidParameter.
    """
    args = request.args
    text = args.get("detachKeys", "")
    try:
        keys = parse_keys(text)
    except InvalidParameter:
        raise InvalidParameter(f"Invalid detach keys ({text}) provided") from None
    stream = query.boolean(args, "stream")
    everything = mixed and stream
    return AttachOptions(
        stdin=everything or query.boolean(args, "stdin"),
        stdout=everything or query.boolean(args, "stdout"),
        stderr=everything or query.boolean(args, "stderr"),
        stream=stream,
        logs=query.boolean(args, "logs"),
        detach_keys=keys,
        multiplexed=not (mixed or container.config.tty),
    )


def _check_attach(container: Container, name: str) -> None:
    """Raises: Conflict."""
    if container.state.status is Status.PAUSED:
        raise Conflict(f"container {name} is paused, unpause the container before attach")
    if container.state.status is Status.RESTARTING:
        raise Conflict(f"container {name} is restarting, wait until the container is running")


def _register_exec(app: App, engine: Engine) -> None:
    async def create(request: Request, name: str) -> Response:
        config = await json_body(request, ExecConfig)
        if config is None or not config.cmd:
            raise InvalidParameter("No exec command specified")
        created = engine.execs.create(engine.containers.find(name), config, name)
        return json_response({"Id": created.id}, 201)

    async def start(request: Request, name: str) -> Response | Hijack:
        options = await json_body(request, ExecStart) or ExecStart()
        if options.detach:
            await engine.execs.start_detached(name)
            return empty_response(200)
        found = engine.execs.check_start(name)

        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            await engine.execs.serve(found, stream, tty=options.tty)

        return Hijack(serve, upgrade="Upgrade" in request.headers, engine_headers=True)

    async def resize(request: Request, name: str) -> Response:
        height, width = _size(request)
        await engine.execs.resize(name, height, width)
        return empty_response(200)

    async def inspect(request: Request, name: str) -> Response:
        return json_response(engine.execs.inspect(name))

    route(app, "POST", "/containers/<path:name>/exec", create)
    route(app, "POST", "/exec/<path:name>/start", start)
    route(app, "POST", "/exec/<path:name>/resize", resize)
    route(app, "GET", "/exec/<path:name>/json", inspect)
