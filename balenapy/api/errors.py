"""Kind of failure -> HTTP status, in one table, and the error bodies.

Source: moby 18.09 api/server/httputils/errors.go, errdefs.
"""

from __future__ import annotations

from balenapy.errors import (
    Conflict,
    EngineError,
    Forbidden,
    InvalidParameter,
    NotFound,
    NotModified,
    SystemFailure,
    Unauthorized,
    Unavailable,
    Unsupported,
)

STATUS: tuple[tuple[type[EngineError], int], ...] = (
    (NotFound, 404),
    (InvalidParameter, 400),
    (Conflict, 409),
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotModified, 304),
    (Unsupported, 501),
    (Unavailable, 503),
    (SystemFailure, 500),
)


def status_of(error: BaseException) -> int:
    """The status of an error's kind; 500 for whatever has none."""
    for kind, status in STATUS:
        if isinstance(error, kind):
            return status
    return 500


def unwrap(error: BaseException) -> BaseException:
    """The error inside groups of one: a nursery between the cause and us changes nothing for a client."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
