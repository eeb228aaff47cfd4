"""`@trio_test`: run an async test under Trio; `autojump=True` gives it a clock that never waits."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing


def trio_test(fn: Callable[..., Awaitable[None]] | None = None, *, autojump: bool = False) -> Any:
    """Decorate `async def test_…`; fixtures arrive as arguments as they do for any test."""
    if fn is None:
        return functools.partial(trio_test, autojump=autojump)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> None:
        clock = trio.testing.MockClock(autojump_threshold=0) if autojump else None
        trio.run(functools.partial(fn, *args, **kwargs), clock=clock, strict_exception_groups=True)

    return run
