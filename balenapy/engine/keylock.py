"""Locks by key: two tasks that work on one container, layer or reference take turns; others do not wait."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class KeyLock:
    """A lock for each key that is in use; a key nobody holds or waits for takes no memory.

    Never hold one while waiting for a client. Order: container, network, snapshot, database.
    """

    def __init__(self) -> None:
        self._locks: dict[str, tuple[trio.Lock, int]] = {}

    @asynccontextmanager
    async def __call__(self, key: str) -> AsyncIterator[None]:
        lock, users = self._locks.get(key, (trio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)

    def is_held(self, key: str) -> bool:
        entry = self._locks.get(key)
        return entry is not None and entry[0].locked()
