"""Log drivers that give output away: journald and syslog. Imported when the first container uses one.

They take conmon's spool like the ring does (engine/logs.py). What was taken is remembered beside the spool, in memory,
so that the next daemon goes on there: a crash doubles at most what was under way, and loses nothing. A sink that takes
nothing makes the output wait, and then, in blocking mode, the container.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import trio

from balenapy.core import journal as journal_format
from balenapy.core import syslog as syslog_format
from balenapy.core.conmonlog import split_line
from balenapy.core.logview import Entry, Formatter, Joiner, LogOptions
from balenapy.errors import SystemFailure
from balenapy.linux.conmon import Bundle
from balenapy.linux.journal import JournalSocket, is_available, open_lines
from balenapy.linux.syslog import SyslogConnection
from balenapy.stores.spool import Spool

if TYPE_CHECKING:
    from balenapy.core.container import Container
    from balenapy.engine.logs import Write, _RunningLog

log = logging.getLogger(__name__)

BATCH_BYTES = 64 << 10
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 30.0
SEND_TIMEOUT_S = 10.0
JOURNAL_LAG_S = 2.0  # how long a reader waits for the journal to have written what it was given


class Sink(Protocol):
    """Somebody who takes entries."""

    async def send(self, entries: deque[Entry]) -> int:
        """Take entries away as they are sent; returns how many were surely lost.

        Raises: SystemFailure, when it is worth trying again with those that are left.
        """

    async def finish(self) -> None:
        """Say goodbye, when all is sent."""

    def close(self) -> None: ...


class JournalSink:
    """One run's entries into the journal."""

    def __init__(self, container: Container, tag: str, extra: Mapping[str, str]) -> None:
        self._socket = JournalSocket()
        self._fixed = journal_format.fixed_fields(container.id, container.name, tag, extra)
        self.epoch = secrets.token_hex(8)
        self.ordinal = 0

    async def send(self, entries: deque[Entry]) -> int:
        while entries:
            await self._socket.send(
                journal_format.encode_entry(entries[0], self._fixed, self.epoch, self.ordinal + 1)
            )
            entries.popleft()
            self.ordinal += 1
        return 0

    async def finish(self) -> None:
        """The journal's protocol knows no end."""

    def close(self) -> None:
        self._socket.close()


class SyslogSink:
    """One run's entries to a syslog server."""

    def __init__(self, settings: syslog_format.Settings, connection: SyslogConnection, tag: str) -> None:
        self._settings = settings
        self._connection: SyslogConnection | None = connection
        self._tag = tag
        self._hostname = socket.gethostname()

    async def send(self, entries: deque[Entry]) -> int:
        """Of a stream that broke or was left it is not known what arrived: all of it is given again."""
        if self._connection is None:
            self._connection = await SyslogConnection.open(self._settings)
        lost = 0
        try:
            while entries:
                count = len(entries) if self._connection.is_stream else 1
                messages = [
                    syslog_format.format_message(entry, self._settings, self._hostname, self._tag, os.getpid())
                    for entry in islice(entries, count)
                ]
                lost += await self._connection.send(messages)
                for _ in messages:
                    entries.popleft()
            return lost
        except BaseException:
            broken, self._connection = self._connection, None
            if broken is not None:
                with trio.CancelScope(shield=True):
                    await broken.aclose()
            raise

    async def finish(self) -> None:
        if self._connection is not None:
            await self._connection.finish()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class SinkDrain:
    """Moves what conmon wrote to a sink. One at a time may work on a container's."""

    def __init__(self, bundle: Bundle, sink: Sink, keep_bytes: int) -> None:
        self._spool = Spool(bundle.spool)
        self.sink = sink
        self._joiner = Joiner()
        self._keep_bytes = keep_bytes
        self._batch: deque[Entry] = deque()  # on its way: what is not given away yet
        self._batch_bytes = 0  # of spool
        self._taken_path = bundle.path / "log.taken"
        self._retry_s = RETRY_FIRST_S
        self.lost_bytes = 0
        self._resume()

    def _resume(self) -> None:
        """Go on where an engine that died was."""
        self._spool.look()
        try:
            inode, offset = map(int, self._taken_path.read_text().split())
        except (FileNotFoundError, ValueError):
            return
        self._spool.go_to(inode, offset)

    def look(self) -> int:
        return self._spool.look()

    async def drain_some(self) -> int:
        """Give one batch away; returns the bytes of spool it took, 0 when there is no more for now.

        Cancellation: the next call goes on with the batch.
        """
        if not self._batch_bytes:
            if self._keep_bytes:
                self.lost_bytes += self._spool.drop(self._keep_bytes)
            data = _whole_lines(self._spool.read(BATCH_BYTES))
            if not data:
                return 0
            self._batch.extend(self._joiner.feed_lines(data))
            self._batch_bytes = len(data)
        while True:
            try:
                # The end of a run cancels this; half a message would be given again.
                with trio.move_on_after(SEND_TIMEOUT_S, shield=True) as scope:
                    lost = await self.sink.send(self._batch)
                if scope.cancelled_caught:
                    raise SystemFailure(f"the server took nothing for {SEND_TIMEOUT_S:.0f} s")
                break
            except SystemFailure as error:
                log.warning("log driver: %s; again after_s=%.1f", error.message, self._retry_s)
                await trio.sleep(self._retry_s)
                self._retry_s = min(self._retry_s * 2, RETRY_MAX_S)
        self._retry_s = RETRY_FIRST_S
        self.lost_bytes += lost
        taken, self._batch_bytes = self._batch_bytes, 0
        self._spool.take(taken)
        inode, offset = self._spool.position
        self._taken_path.write_text(f"{inode} {offset}")
        return taken

    async def end_run(self) -> None:
        """Give the rest away, a last line without end too."""
        while await self.drain_some():
            pass
        if rest := self._joiner.flush():
            await self.sink.send(deque(rest))
        self._spool.end()
        await self.sink.finish()

    def close(self) -> None:
        self._spool.close()
        self.sink.close()


def _whole_lines(data: bytes) -> bytes:
    """Up to the last line of output that is ended: what is taken must not be held back here."""
    end = len(data)
    while end > 0:
        start = data.rfind(b"\n", 0, end - 1) + 1
        parts = split_line(data[start : end - 1])
        if parts is None or parts[2]:
            return data[:end]
        end = start
    return data


async def open_drain(
    container: Container, bundle: Bundle, tag: str, extra: Mapping[str, str], keep_bytes: int
) -> SinkDrain:
    """Raises: SystemFailure, InvalidParameter."""
    sink: Sink
    if container.host_config.log_config.type == "journald":
        if not is_available():
            raise SystemFailure("journald is not enabled on this host")
        sink = JournalSink(container, tag, extra)
    else:
        settings = syslog_format.parse_settings(container.host_config.log_config.config or {})
        sink = SyslogSink(settings, await SyslogConnection.open(settings), tag)
    return SinkDrain(bundle, sink, keep_bytes)


async def read_journal(
    container: Container,
    options: LogOptions,
    details: bytes,
    running: _RunningLog | None,
    given: object,
    write: Write,
) -> None:
    """Show a container's entries out of the journal; with `follow` until the run ends.

    Args:
        given: the sink of a run that has ended, if there was one.
    Raises: SystemFailure when there is no journalctl.
    """
    formatter = Formatter(options, tty=container.config.tty, details=details)
    match = f"CONTAINER_ID_FULL={container.id}"
    sink = running.drain.sink if running is not None and isinstance(running.drain, SinkDrain) else given
    await _wait_until_written(match, sink)
    first = [match]
    if options.since_ns:
        first.append(f"--since=@{options.since_ns // 10**9}")
    first.append(f"--lines={options.tail if options.tail >= 0 else 'all'}")
    cursor = ""

    async def copy(arguments: list[str]) -> None:
        nonlocal cursor
        async with open_lines(arguments) as lines:
            async for line in lines:
                found = journal_format.parse_entry(line)
                if found is None:
                    continue
                output = bytearray()
                formatter.add(output, [found.entry])
                if output:
                    await write(bytes(output))
                cursor = found.cursor  # only now: who is cancelled while writing has not shown it
                if formatter.finished:
                    return

    if running is None or not options.follow:
        await copy(first)
        return
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            await copy([*first, "--follow"])
            nursery.cancel_scope.cancel()  # an entry after `until`

        nursery.start_soon(follow)
        while not running.ended:
            await running.news.wait()
        await _wait_until_written(match, sink)
        nursery.cancel_scope.cancel()
    if not formatter.finished:
        await copy([match, f"--after-cursor={cursor}"] if cursor else first)


async def _wait_until_written(match: str, sink: object) -> None:
    """The journal tells nobody when it has written an entry: look for the last one, for a while."""
    if not isinstance(sink, JournalSink) or not sink.ordinal:
        return
    with trio.move_on_after(JOURNAL_LAG_S):
        while True:
            async with open_lines([match, f"CONTAINER_LOG_EPOCH={sink.epoch}", "--lines=1"]) as lines:
                async for line in lines:
                    found = journal_format.parse_entry(line)
                    if found is not None and found.ordinal >= sink.ordinal:
                        return
            await trio.sleep(0.05)
