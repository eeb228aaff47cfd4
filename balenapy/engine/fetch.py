"""Downloads that a client names by URL: the source of an import, of an ADD, the context of a build."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

from balenapy.errors import EngineError, Forbidden, InvalidParameter, NotFound, SystemFailure, Unauthorized
from balenapy.registry.client import user_agent
from balenapy.registry.errors import reason_phrase
from balenapy.registry.http import HTTP, Answer

ERROR_BODY_MAX_BYTES = 64 << 10
_KINDS: dict[int, Callable[[str], EngineError]] = {
    400: InvalidParameter,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
}


async def open_url(stack: AsyncExitStack, url: str) -> Answer:
    """Begin a download; it ends with the stack.

    Raises: EngineError of the kind of the status `failed to GET U with status 404 Not Found: BODY`.
    Source: moby builder/remotecontext/remote.go, GetWithStatusError.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidParameter(f'parse "{url}": {error}') from error
    if parts.scheme not in ("http", "https"):
        raise SystemFailure(f'Get {url}: unsupported protocol scheme "{parts.scheme}"')
    http = await stack.enter_async_context(HTTP(user_agent=user_agent(), host=parts.netloc, verify=True))
    answer = await stack.enter_async_context(http.request("GET", url))
    if answer.status >= 400:
        text = (await answer.read_some(ERROR_BODY_MAX_BYTES)).decode("utf-8", "replace").strip()
        status = f"{answer.status} {reason_phrase(answer.status)}"
        raise _KINDS.get(answer.status, SystemFailure)(f"failed to GET {url} with status {status}: {text}")
    return answer
