"""The lines of progress that one client gets: in order, and never slower than the work they tell of."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from balenapy.core import progress
from balenapy.engine.nurseries import one_error
from balenapy.errors import EngineError

Write = Callable[[bytes], Awaitable[None]]

QUEUED_LINES = 256  # advances beyond this many unsent lines are left out; steps never


class Lines:
    """The lines one client gets, written by one task in the order they were made."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._queue: deque[bytes] = deque()
        self._more = trio.Event()
        self._limit = progress.UpdateLimit()
        self._ended = False
        self._held = False
        self.last: dict[str, tuple[str, int, int]] = {}  # by id, a layer's say: status, current, total

    async def run(self) -> None:
        """Write until `end`, and then what is left."""
        while True:
            while self._queue and not self._held:
                await self._write(self._queue.popleft())
            if self._ended:  # what is still held then belongs to an answer that is an error
                return
            self._more = trio.Event()
            await self._more.wait()

    def hold(self) -> None:
        """Keep lines back: the answer may yet become an error with a status."""
        self._held = True

    def release(self) -> None:
        self._held = False
        self._more.set()

    def end(self) -> None:
        self._ended = True
        self._more.set()

    def put(self, line: bytes) -> None:
        """A line that was made elsewhere."""
        self._queue.append(line)
        self._more.set()

    def message(self, status: str, id: str = "") -> None:
        self.put(progress.message(status, id))

    def step(self, id: str, status: str) -> None:
        self.last[id] = (status, 0, 0)
        self.put(progress.step(id, status))

    def advance(self, id: str, status: str, current: int, total: int) -> None:
        """One of many; some are left out."""
        self.last[id] = (status, current, total)
        if len(self._queue) < QUEUED_LINES and self._limit.allows(
            f"{id} {status}", current, total, trio.current_time()
        ):
            self.put(progress.advance(id, status, current, total))


async def write_during(lines: Lines, work: Callable[[], Awaitable[None]]) -> None:
    """Do `work`, and meanwhile write the lines it makes; when it fails, what was said before is still written.

    Raises: what `work` raises.
    """
    failure: EngineError | None = None
    async with one_error(), trio.open_nursery() as nursery:
        nursery.start_soon(lines.run)
        try:
            await work()
        except EngineError as error:
            failure = error
        lines.end()
    if failure is not None:
        raise failure
