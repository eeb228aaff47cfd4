"""Rows and directories of volumes: `<data-root>/volumes/<name>/_data`.

A directory without a row is not rubbish here, because it holds what people care about most. So a removal leaves a
tombstone: the row stays, marked, until the rename into the trash is surely on the disk; a directory that a power cut
brought back is known by it. Directories that no row names are taken over when the database is new, and left alone
otherwise.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import trio

from balenapy.core import wire
from balenapy.core.volume import Volume
from balenapy.errors import EngineError, SystemFailure
from balenapy.linux import durable
from balenapy.stores.db import Database
from balenapy.stores.trash import Trash

log = logging.getLogger(__name__)

TOMBSTONE_NS = 120 * 1_000_000_000  # journals of ext4, xfs and btrfs commit at least every 30 s
_TAKEN_OVER = "volumes_taken_over"


class VolumeStore:
    def __init__(self, db: Database, data_root: Path, trash: Trash, limiter: trio.CapacityLimiter) -> None:
        self._db = db
        self._root = data_root / "volumes"
        self._trash = trash
        self._limiter = limiter
        self._volumes: dict[str, Volume] = {}
        self._tombstones: dict[str, Volume] = {}
        try:
            self._root.mkdir(mode=0o701, parents=True, exist_ok=True)
            self._load()
        except OSError as error:
            raise SystemFailure(f"cannot use {self._root}: {error.strerror}") from error

    def _load(self) -> None:
        for name, record in self._db.query("SELECT name, record FROM volume ORDER BY name"):
            try:
                volume = wire.decode(Volume, json.loads(str(record)))
                if volume.name != name:
                    raise ValueError("its record is another's")
            except (EngineError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
                self._db.found_damaged("volume", name, error)
                if not (self._root / str(name) / "_data").is_dir():
                    continue
                volume = Volume(str(name), created_ns=0)  # what people care about is there
            (self._tombstones if volume.removed_ns else self._volumes)[volume.name] = volume
        # They were renamed before the last stop, or a power cut brought them back.
        self._trash.discard_nowait(*(self._root / name for name in self._tombstones))
        if self._db.query("SELECT value FROM setting WHERE name = ?", (_TAKEN_OVER,)):
            return
        found = [
            Volume(entry.name, created_ns=entry.stat().st_mtime_ns)
            for entry in self._root.iterdir()
            if entry.name not in self._volumes and (entry / "_data").is_dir()
        ]

        def take_over(connection: sqlite3.Connection) -> None:
            _insert(connection, found)
            connection.execute("INSERT INTO setting(name, value) VALUES (?, '1')", (_TAKEN_OVER,))

        self._db.transaction_nowait(take_over)
        self._volumes.update((volume.name, volume) for volume in found)
        if found:
            log.info("took over volumes without a record count=%d", len(found))

    def all(self) -> list[Volume]:
        return list(self._volumes.values())

    def find(self, name: str) -> Volume | None:
        return self._volumes.get(name)

    def directory(self, name: str) -> Path:
        return self._root / name

    def mountpoint(self, name: str) -> Path:
        return self._root / name / "_data"

    async def insert(self, *volumes: Volume) -> None:
        """Make directories, then rows, in one transaction.

        Raises: SystemFailure.
        """

        def make_directories() -> None:
            returned = False
            for volume in volumes:
                self.make_directory(volume.name)
                returned = returned or volume.name in self._tombstones
            if returned:
                # The old directory must not come back under the new row.
                durable.sync_directory(self._root)

        try:
            await trio.to_thread.run_sync(make_directories, limiter=self._limiter)
        except OSError as error:
            raise SystemFailure(f"cannot create volume: {error}") from error

        def write(connection: sqlite3.Connection) -> Collection[str]:
            durable.step("insert volumes")
            gone = self._delete_old_tombstones(connection)
            _insert(connection, volumes)
            return gone

        def apply(gone: Collection[str]) -> None:
            for name in gone:
                self._tombstones.pop(name, None)
            for volume in volumes:
                self._tombstones.pop(volume.name, None)
                self._volumes[volume.name] = volume

        await self._db.change(write, apply)

    async def leave_behind(self, *names: str) -> None:
        """The containers these volumes were made for go, and the volumes stay."""
        known = [self._volumes[name] for name in names if name in self._volumes]
        left = [replace(volume, made_for="") for volume in known if volume.made_for]

        def write(connection: sqlite3.Connection) -> None:
            durable.step("leave volumes behind")
            _insert(connection, left)

        def apply(_: None) -> None:
            self._volumes.update((volume.name, volume) for volume in left if volume.name in self._volumes)

        if left:
            await self._db.change(write, apply)

    def make_directory(self, name: str) -> None:
        """Make what is missing of a volume's directories: a power cut may have taken them from under the row."""
        for path, mode in ((self.directory(name), 0o701), (self.mountpoint(name), 0o755)):
            try:
                path.mkdir()
            except FileExistsError:
                continue
            path.chmod(mode)

    async def remove(self, *names: str) -> None:
        """Rows first, then the directories by way of the trash. Names that are gone are fine."""
        now = time.time_ns()
        buried = [replace(self._volumes[name], removed_ns=now) for name in names if name in self._volumes]

        def bury(connection: sqlite3.Connection) -> Collection[str]:
            durable.step("remove volumes")
            gone = self._delete_old_tombstones(connection)
            _insert(connection, buried)
            return gone

        def apply(gone: Collection[str]) -> None:
            for name in gone:
                self._tombstones.pop(name, None)
            for volume in buried:
                self._volumes.pop(volume.name, None)
                self._tombstones[volume.name] = volume

        if buried:
            await self._db.change(bury, apply)
        await self._trash.discard(*(self.directory(volume.name) for volume in buried))

    def _delete_old_tombstones(self, connection: sqlite3.Connection) -> Collection[str]:
        limit = time.time_ns() - TOMBSTONE_NS
        old = [volume.name for volume in self._tombstones.values() if volume.removed_ns < limit]
        connection.executemany("DELETE FROM volume WHERE name = ?", ((name,) for name in old))
        return old


def _insert(connection: sqlite3.Connection, volumes: Collection[Volume]) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO volume(name, record) VALUES (?, ?)",
        [(volume.name, json.dumps(wire.encode(volume))) for volume in volumes],
    )
