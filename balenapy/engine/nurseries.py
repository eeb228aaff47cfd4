"""What comes out of a nursery: one error, not a group of one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from balenapy.errors import EngineError


@asynccontextmanager
async def one_error() -> AsyncIterator[None]:
    """Let one error out of a nursery instead of a group: a bug before anything else, or what failed first."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [error for error in _leaves(group) if not isinstance(error, trio.Cancelled)]
        if not errors:
            raise
        raise next((error for error in errors if not isinstance(error, EngineError)), errors[0]) from None


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
