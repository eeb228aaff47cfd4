"""The application: version prefix, routes, the headers every answer carries, errors.

How to write routes (one file a resource in `api/routes/`):

    from balenapy.api.app import App, Request, json_body, route
    from balenapy.api.response import Response, StreamResponse, json_response, empty_response, stream_response
    from balenapy.api import query
    from balenapy.api.hijack import Hijack

    def register(app: App, engine: Engine) -> None:
        async def inspect(request: Request, name: str) -> Response:
            return json_response(engine.containers.inspect(name, size=query.boolean(request.args, "size")))

        async def create(request: Request) -> Response:
            body = await json_body(request, CreateBody, refuse=SystemFailure)   # or cls=None: the plain dict
            return json_response(await engine.containers.create(body, request.args.get("name", "")), 201)

        async def logs(request: Request, name: str) -> StreamResponse:
            container = engine.containers.find(name)       # raises NotFound: an ordinary 404
            async def produce(write: BodyWriter) -> None:  # runs while the client reads, cancelled when it leaves
                async with open_logs(container) as chunks:
                    async for chunk in chunks:
                        await write(chunk)
            return stream_response(produce)                # the head leaves at once, before the first chunk

        async def attach(request: Request, name: str) -> Hijack:
            container = engine.containers.find(name)
            async def serve(stream: trio.abc.HalfCloseableStream) -> None: ...
            return Hijack(serve, upgrade="Upgrade" in request.headers)

        route(app, "GET", "/containers/<path:name>/json", inspect)
        route(app, "POST", "/containers/create", create)

A route is registered once and answers with and without `/vX.Y`. Names are `<path:name>`: the reference engine's
patterns take slashes too. A handler is `async def handler(request, **names)`, raises the kinds of
`balenapy.errors`, and is cancelled when its client disconnects. Upload bodies: `async for chunk in request.body`.
HEAD answers only where it is registered; a known path with another method is 404, as in the engine we replace.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload
from urllib.parse import parse_qsl, quote

import trio
from quart.routing import QuartRule
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioRequest
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import HTTPException

from balenapy import version
from balenapy.api.errors import status_of, unwrap
from balenapy.api.hijack import EngineHTTPConnection, Hijack, StreamedBody
from balenapy.api.response import Response, StreamResponse, error_response
from balenapy.core import wire
from balenapy.errors import EngineError, InvalidParameter, SystemFailure

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

T = TypeVar("T")
Answer: TypeAlias = Response | StreamResponse | Hijack
Handler: TypeAlias = Callable[..., Awaitable[Answer]]

MAX_JSON_BYTES = 16 << 20  # ours; the engine we replace has no bound
MAX_FORM_BYTES = 10 << 20  # net/http maxFormSize
EARLY = frozenset(("/_ping", "/version"))  # answered while containers are still being restored
VERSION_PREFIX = re.compile(r"/v([0-9.]+)(/.*)", re.DOTALL)


class Request(TrioRequest):
    """Quart's request with a streamed body and the API version the client asked for."""

    body_class = StreamedBody
    body: StreamedBody

    api_version: str = ""  # as in the path, "" without a prefix
    route_path: str = ""  # the path without the prefix

    @cached_property
    def args(self) -> MultiDict[str, str]:
        """Parameters of the URL; `answer` adds those of a form body."""
        query = self.query_string.decode("utf-8", "replace")
        return MultiDict(parse_qsl(query, keep_blank_values=True))

    @property
    def wants_plain_errors(self) -> bool:
        """JSON errors came with API 1.24."""
        return not self.version_at_least("1.24")

    def version_at_least(self, wanted: str) -> bool:
        """Whether the client asked for this API version or a later one (no prefix means 1.39)."""
        return _numbers(self.api_version or version.API_VERSION) >= _numbers(wanted)


class EngineRule(QuartRule):
    """A rule without the HEAD that Werkzeug gives to every GET."""

    def __init__(self, string: str, *, methods: Any = None, **kwargs: Any) -> None:
        super().__init__(string, methods=methods, **kwargs)
        self.methods = set(methods)


class App(QuartTrio):
    """Quart-Trio's application with our own way from a request to an answer.

    Quart's dispatch (contexts, signals, sessions, error pages) is left out: nothing here uses it, and it costs more
    than most of our handlers do.
    """

    request_class = Request
    asgi_http_class = EngineHTTPConnection
    url_rule_class = EngineRule  # type: ignore[assignment]

    def __init__(
        self, *, experimental: bool = False, cors: str = "", newest_version: str = version.API_VERSION
    ) -> None:
        super().__init__("balenapy.api", static_folder=None, template_folder=None, root_path="/")
        # Nothing below may cut a long `logs -f` or a big `load`.
        self.config["MAX_CONTENT_LENGTH"] = None
        self.config["BODY_TIMEOUT"] = None
        self.config["RESPONSE_TIMEOUT"] = None
        self.url_map.strict_slashes = True
        self.url_map.merge_slashes = False
        self._adapter = self.url_map.bind("")
        self._newest_version = newest_version
        self._version_error_headers = {
            "Api-Version": newest_version,
            "Ostype": "linux",
            "Server": f"Docker/{version.ENGINE_VERSION} (linux)",
        }
        if cors:
            self._version_error_headers |= {
                "Access-Control-Allow-Origin": cors,
                "Access-Control-Allow-Headers": ("Origin, X-Requested-With, Content-Type, Accept, X-Registry-Auth"),
                "Access-Control-Allow-Methods": "HEAD, GET, POST, DELETE, PUT, OPTIONS",
            }
        self._headers = self._version_error_headers | {"Docker-Experimental": str(experimental).lower()}
        self.ready: trio.Event | None = None  # until it is set, what is not EARLY waits

    async def answer(self, request: Request) -> tuple[Answer, Mapping[str, str]]:
        """Route one request; return the answer and the headers that go with every matched route."""
        path: str = request.scope["path"]  # `request.path` has its leading slashes merged
        clean = clean_path(path)
        if clean != path:
            query = request.query_string.decode("latin-1")
            location = quote(clean, safe="/$&+,:;=@!'()*~") + (f"?{query}" if query else "")
            return Response(301, headers={"Location": location}), {}
        if prefixed := VERSION_PREFIX.fullmatch(path):
            request.api_version, path = prefixed.groups()
        request.route_path = path
        handler: Handler
        names: Mapping[str, Any]
        if request.method == "OPTIONS":
            handler, names = _options, {}
        else:
            try:
                endpoint, names = self.match(path, request.method)
            except HTTPException:  # unknown, another method, or a trailing slash: all one to the engine we replace
                return error_response(404, "page not found"), {}
            handler = self.view_functions[endpoint]  # type: ignore[assignment]
        if refusal := _refuse_version(request.api_version, self._newest_version):
            return error_response(400, refusal, plain=request.wants_plain_errors), self._version_error_headers
        try:
            if self.ready is not None and path not in EARLY:
                await self.ready.wait()
            if request.mimetype == "application/x-www-form-urlencoded" and request.method in ("POST", "PUT"):
                await _read_form(request)
            return await handler(request, **names), self._headers
        except Exception as raised:
            return self.error(request, raised), self._headers

    def match(self, path: str, method: str) -> tuple[str, Mapping[str, Any]]:
        """The endpoint and the names in the path. Raises: HTTPException."""
        return self._adapter.match(path, method)

    def error(self, request: Request, raised: BaseException) -> Response:
        """Render an error; one that has no kind is our bug, and its traceback goes to the log."""
        plain = request.wants_plain_errors
        error = unwrap(raised)
        if not isinstance(error, EngineError):
            log.error("bug method=%s path=%s", request.method, request.path, exc_info=raised)
            return error_response(500, f"internal error: {type(error).__name__}: {error}", plain=plain)
        status = status_of(error)
        if status >= 500:
            log.error(
                "request failed method=%s path=%s status=%d error=%s",
                request.method,
                request.path,
                status,
                error.message,
            )
        return error_response(status, error.message, plain=plain)


def create_app(engine: Engine) -> App:
    """The application with every route of API v1.39."""
    from balenapy.api.routes import register_all

    config = engine.config
    app = App(experimental=config.experimental, cors=config.api_cors_header, newest_version=config.api_compat)
    register_all(app, engine)
    return app


def route(app: App, method: str, path: str, handler: Handler) -> None:
    """Register `handler(request, **names)`; it answers with and without the version prefix."""
    endpoint = f"{method} {path}"
    app.add_url_rule(path, endpoint, methods=[method], provide_automatic_options=False)
    app.view_functions[endpoint] = handler  # type: ignore[assignment]


@overload
async def json_body(request: Request, cls: type[T], *, refuse: type[EngineError] = InvalidParameter) -> T | None: ...


@overload
async def json_body(request: Request, cls: None = None, *, refuse: type[EngineError] = InvalidParameter) -> Any: ...


async def json_body(
    request: Request, cls: type[Any] | None = None, *, refuse: type[EngineError] = InvalidParameter
) -> Any:
    """The body as JSON: the plain value, or with `cls` what `core.wire.decode` makes of it. `null` is None.

    Args:
        refuse: the kind for an empty or broken body: most routes 400 (`got EOF while reading request body`),
            container create and auth 500 (`EOF`, the decoder's words).

    Raises: InvalidParameter for a wrong Content-Type; `refuse`.
    """
    check_json_type(request)
    data = await request.body.read(MAX_JSON_BYTES)
    try:
        value = wire.parse_json(data)
        return value if cls is None or value is None else wire.decode(cls, value)
    except wire.MalformedJSON as error:
        text = error.message
        if text == "EOF" and refuse is not SystemFailure:
            text = "got EOF while reading request body"
        raise refuse(text) from None


def check_json_type(request: Request) -> None:
    """A body must say it is JSON; no body and no type passes (moby httputils.CheckForJSON)."""
    content_type = request.headers.get("Content-Type", "")
    if content_type == "" and (request.content_length or 0) == 0 and not request.body.is_chunked:
        return
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise InvalidParameter(f"Content-Type specified ({content_type}) must be 'application/json'")


def clean_path(path: str) -> str:
    """Go's path.Clean with a kept trailing slash, as gorilla/mux redirects."""
    if "//" not in path and "/." not in path and path[:1] == "/":
        return path
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if parts:
                parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    clean = "/" + "/".join(parts)
    return clean + "/" if path.endswith("/") and clean != "/" else clean


async def _options(request: Request) -> Response:
    return Response(200)


async def _read_form(request: Request) -> None:
    body = await request.body.read(MAX_FORM_BYTES)
    pairs = parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)
    # Go puts the body's values before the URL's.
    request.args = MultiDict([*pairs, *request.args.items(multi=True)])


def _refuse_version(asked: str, newest: str) -> str:
    if not asked:
        return ""
    numbers = _numbers(asked)
    if numbers < _numbers(version.MIN_API_VERSION):
        return (
            f"client version {asked} is too old. Minimum supported API version is {version.MIN_API_VERSION}, "
            "please upgrade your client to a newer version"
        )
    if numbers > _numbers(newest):
        return f"client version {asked} is too new. Maximum supported API version is {newest}"
    return ""


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers between dots; trailing zeros do not count (`1.39.0` is 1.39)."""
    numbers = [int(part[:18]) if part else 0 for part in text.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


__all__ = [
    "Answer",
    "App",
    "Handler",
    "Request",
    "check_json_type",
    "create_app",
    "json_body",
    "route",
]
