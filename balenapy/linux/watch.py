"""One inotify instance for the whole engine: directories of running containers are watched, nothing is polled.

After a round of events the watcher waits a moment before it reads again: the kernel joins equal events meanwhile, so a
container that writes a thousand lines a second wakes us twenty times a second and an idle one never.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path

import trio

from balenapy.errors import SystemFailure
from balenapy.linux import syscalls
from balenapy.linux.syscalls import IN_CREATE, IN_IGNORED, IN_MODIFY, IN_MOVED_TO, IN_Q_OVERFLOW

log = logging.getLogger(__name__)

ROUND_S = 0.05
_EVENT = struct.Struct("iIII")

OnChange = Callable[[str], None]  # gets the name of the file in the directory; "" when events were lost


class DirectoryWatcher:
    """Calls back when a file in a watched directory is written, made, or put in place of another."""

    def __init__(self) -> None:
        self._fd = -1
        self._callbacks: dict[int, OnChange] = {}

    async def serve(self) -> None:
        """Deliver events until cancelled; then nothing is watched any more."""
        fd = self._open()
        try:
            while True:
                await trio.lowlevel.wait_readable(fd)
                try:
                    data = os.read(fd, 64 << 10)
                except BlockingIOError:
                    continue
                self._deliver(data)
                await trio.sleep(ROUND_S)
        finally:
            os.close(fd)
            self._fd = -1
            self._callbacks.clear()

    def watch(self, directory: Path, on_change: OnChange) -> int:
        """Begin; the number is for `unwatch`. Raises: SystemFailure."""
        try:
            number = syscalls.inotify_add_watch(self._open(), directory, IN_MODIFY | IN_CREATE | IN_MOVED_TO)
        except OSError as error:
            raise SystemFailure(f"cannot watch {directory}: {error.strerror}") from error
        self._callbacks[number] = on_change
        return number

    def unwatch(self, number: int) -> None:
        if self._callbacks.pop(number, None) is not None:
            syscalls.inotify_rm_watch(self._fd, number)

    def _open(self) -> int:
        if self._fd < 0:
            self._fd = syscalls.inotify_init()
        return self._fd

    def _deliver(self, data: bytes) -> None:
        changed: dict[tuple[int, str], None] = {}
        offset = 0
        while offset < len(data):
            number, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
            offset += length
            if mask & IN_Q_OVERFLOW:
                changed.update(dict.fromkeys((one, "") for one in self._callbacks))
            elif mask & IN_IGNORED:
                self._callbacks.pop(number, None)
            else:
                changed[number, name] = None
        for number, name in changed:
            callback = self._callbacks.get(number)
            try:
                if callback is not None:
                    callback(name)
            except Exception:  # the wall around one container
                log.exception("change cannot be handled name=%s", name)
