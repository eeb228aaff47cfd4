"""The trash: what a committed transaction no longer names is renamed here and removed in the background.

Renaming takes no time however many files a directory has, so a request never waits for a removal. What is left
here by a stop or a power cut is removed after the next start.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import trio

from balenapy.linux import durable

log = logging.getLogger(__name__)


RETRY_S = 60


class Trash:
    """One directory on the file system of the things that go into it."""

    def __init__(self, path: Path, limiter: trio.CapacityLimiter) -> None:
        self._path = path
        self._limiter = limiter
        # One removal at a time, and not one of the places requests wait for.
        self._removals = trio.CapacityLimiter(1)
        self._wake = trio.Event()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(path.iterdir()):
            self._wake.set()

    def discard_nowait(self, *paths: Path) -> None:
        """Rename into the trash, in the calling thread. A path that is gone is fine; a failure is logged."""
        for path in paths:
            try:
                durable.move_to_trash(path, self._path)
            except OSError as error:  # the row is gone: the next start finds the file again
                log.error("cannot move to trash path=%s error=%s", path, error)

    async def discard(self, *paths: Path) -> None:
        """Rename into the trash; never raises for the file system's sake: the rows are gone already.

        Cancellation: nothing is cut short; the renames are clean-up and are done although the caller is cancelled.
        """
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.discard_nowait, *paths, limiter=self._limiter)
        self._wake.set()

    def wake(self) -> None:
        """Say that there may be something to remove."""
        self._wake.set()

    async def empty(self) -> None:
        """Remove what is in the trash now."""
        self._wake = trio.Event()
        for name in await trio.to_thread.run_sync(os.listdir, self._path, limiter=self._removals):
            try:
                # Abandoned at shutdown: the interpreter need not wait for 20,000 unlinks.
                await trio.to_thread.run_sync(
                    durable.remove_tree, self._path / name, limiter=self._removals, abandon_on_cancel=True
                )
            except OSError as error:  # an immutable file, a directory something is mounted on
                log.warning("cannot empty trash path=%s error=%s", self._path / name, error)

    async def serve(self) -> None:
        """Empty the trash whenever something was put into it, until cancelled."""
        while True:
            await self._wake.wait()
            try:
                await self.empty()
            except Exception:  # a background job must not end the daemon
                log.exception("cannot empty the trash")
                await trio.sleep(RETRY_S)
