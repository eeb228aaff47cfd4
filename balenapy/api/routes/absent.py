"""What is not answered: for now (501, naming it) and for good (404, as the engine we replace).

Registered last: a route somebody built is skipped here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from balenapy.api.app import App, Handler, Request, route
from balenapy.api.response import Response, empty_response
from balenapy.errors import Unsupported

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

# Every route of API v1.39 that this engine answers or will answer.
ROUTES = """
GET    /_ping
HEAD   /_ping
GET    /version
GET    /info
GET    /events
GET    /system/df
POST   /auth
GET    /containers/json
POST   /containers/create
GET    /containers/<path:name>/json
GET    /containers/<path:name>/top
GET    /containers/<path:name>/logs
GET    /containers/<path:name>/changes
GET    /containers/<path:name>/export
GET    /containers/<path:name>/stats
POST   /containers/<path:name>/resize
POST   /containers/<path:name>/start
POST   /containers/<path:name>/stop
POST   /containers/<path:name>/restart
POST   /containers/<path:name>/kill
POST   /containers/<path:name>/update
POST   /containers/<path:name>/rename
POST   /containers/<path:name>/pause
POST   /containers/<path:name>/unpause
POST   /containers/<path:name>/attach
GET    /containers/<path:name>/attach/ws
POST   /containers/<path:name>/wait
DELETE /containers/<path:name>
HEAD   /containers/<path:name>/archive
GET    /containers/<path:name>/archive
PUT    /containers/<path:name>/archive
POST   /containers/<path:name>/exec
POST   /containers/prune
POST   /exec/<path:name>/start
POST   /exec/<path:name>/resize
GET    /exec/<path:name>/json
POST   /commit
GET    /images/json
POST   /images/create
GET    /images/<path:name>/json
GET    /images/<path:name>/history
POST   /images/<path:name>/push
POST   /images/<path:name>/tag
DELETE /images/<path:name>
GET    /images/search
POST   /images/prune
GET    /images/<path:name>/get
GET    /images/get
POST   /images/load
POST   /build
GET    /distribution/<path:name>/json
GET    /networks
GET    /networks/<path:name>
POST   /networks/create
POST   /networks/<path:name>/connect
POST   /networks/<path:name>/disconnect
DELETE /networks/<path:name>
POST   /networks/prune
GET    /volumes
POST   /volumes/create
GET    /volumes/<path:name>
DELETE /volumes/<path:name>
POST   /volumes/prune
"""

# Answered by nobody, for good: `page not found`, like any unknown route. Orchestration and managed plugins were taken
# out of the engine we replace; `/session` (and `/grpc`) belong to BuildKit, which is not built.
REFUSED = (
    "swarm",
    "nodes",
    "services",
    "tasks",
    "secrets",
    "configs",
    "plugins",
    "session",
    "grpc",
)

_NAME = re.compile(r"<[^>]*>")


def register(app: App, engine: Engine) -> None:
    taken = {_NAME.sub("<>", endpoint) for endpoint in app.view_functions}
    for line in ROUTES.split("\n")[1:-1]:
        method, path = line.split()
        if _NAME.sub("<>", f"{method} {path}") not in taken:
            route(app, method, path, _absent(method, path))
    for method, path, handler in _TRIVIAL:
        if f"{method} {path}" not in taken:
            route(app, method, path, handler)
    if "GET /networks" in taken and "GET /networks/" not in taken:
        # The one route that has a twin with a slash.
        app.add_url_rule("/networks/", "GET /networks", methods=["GET"], provide_automatic_options=False)


def _absent(method: str, path: str) -> Handler:
    resource = path.split("/")[1]

    async def absent(request: Request, **names: str) -> Response:
        raise Unsupported(f"{resource} is not supported by this engine yet: {method} {request.route_path}")

    return absent


async def _copy(request: Request, name: str) -> Response:
    """Gone since API 1.24, with an empty body."""
    return empty_response(404)


_TRIVIAL: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/containers/<path:name>/copy", _copy),
)
