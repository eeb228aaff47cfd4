"""The SQLite file: open, migrate, `transaction(fn)`. One connection, one thread.

Rows are the truth; a file or directory that no row names is rubbish. Records live in memory as dataclasses,
so reads after start never touch the file; a mutation is `await db.transaction(fn)`: one call in one
thread, committed when it returns, rolled back when it raises, atomic for cancellation (a call that began always ends).
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from balenapy.errors import SystemFailure

log = logging.getLogger(__name__)

T = TypeVar("T")

CHECKPOINT_PAGES = 100  # a small log, soon at its size: 2.1 writes and 1 flush a commit (ARCHITECTURE, Decisions)

# Each entry brings a database from version (its index) to the next. Never edit one that was released: append.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE setting(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

    -- Registry documents (manifests, indexes, image configs), by digest of their exact bytes.
    CREATE TABLE document(digest TEXT PRIMARY KEY, media_type TEXT NOT NULL, bytes BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE image(
        image_id TEXT PRIMARY KEY,          -- digest of the config document
        chain_id TEXT NOT NULL,             -- of its whole stack; '' without layers
        parent TEXT NOT NULL DEFAULT '',    -- image_id it was built or committed from
        size_bytes INTEGER NOT NULL,        -- sum of its layers' diffs
        last_tagged_ns INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID;
    CREATE TABLE reference(
        name TEXT PRIMARY KEY,              -- canonical, with tag or digest
        image_id TEXT NOT NULL,
        manifest TEXT NOT NULL DEFAULT '',  -- digest it was pulled or pushed by: of an index or a manifest
        image_manifest TEXT NOT NULL DEFAULT ''  -- digest of the manifest for our platform
    ) WITHOUT ROWID;

    -- A snapshot directory is committed (has a chain_id) or active (has a key, the container's id). A committed one
    -- that was found damaged is corrupt: its directory lies in quarantine until the layer is fetched again.
    CREATE TABLE snapshot(
        directory TEXT PRIMARY KEY,
        kind TEXT NOT NULL CHECK(kind IN ('committed', 'active', 'corrupt')),
        chain_id TEXT UNIQUE,
        key TEXT UNIQUE,
        parent TEXT NOT NULL DEFAULT '',    -- chain_id
        diff_id TEXT NOT NULL DEFAULT '',
        size_bytes INTEGER NOT NULL DEFAULT 0,  -- sum of the regular files of the diff, as the API tells it
        disk_bytes INTEGER NOT NULL DEFAULT 0   -- what the directory takes on disk
    ) WITHOUT ROWID;
    -- A blob that is arriving. `length` bytes are certain to be on disk; in the same boot all of the file is.
    CREATE TABLE ingest(
        digest TEXT PRIMARY KEY,
        size_bytes INTEGER NOT NULL,
        length INTEGER NOT NULL,
        boot_id TEXT NOT NULL,
        expires_ns INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE lease(name TEXT PRIMARY KEY, created_ns INTEGER NOT NULL, expires_ns INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE lease_item(
        lease TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY(lease, kind, key)
    ) WITHOUT ROWID;

    -- Big and rarely written columns apart from small volatile ones, so that a start rewrites little.
    CREATE TABLE container(id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, record TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE container_state(id TEXT PRIMARY KEY, state TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE network(id TEXT PRIMARY KEY, name TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE volume(name TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
    """,
)


class Database:
    """The one connection to `meta.db`. Opened before Trio runs; used only through `transaction` afterwards."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._limiter = trio.CapacityLimiter(1)
        self._order = trio.Lock()

    @classmethod
    def open(cls, path: Path) -> Database:
        """Open or create, check and migrate the database.

        A file that SQLite cannot use is renamed aside (`.broken-<time>`), never deleted, and a new one is begun.

        Raises: SystemFailure, when the file cannot be opened at all or is of a newer version.
        """
        try:
            return cls(_open(path))
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise SystemFailure(f"cannot open {path}: {error}") from error
            aside = f"{path}.broken-{time.time_ns()}"
            log.error("database is damaged path=%s error=%s renamed_to=%s", path, error, aside)
            for suffix in ("", "-wal", "-shm"):
                if os.path.exists(f"{path}{suffix}"):
                    os.replace(f"{path}{suffix}", f"{aside}{suffix}")
            return cls(_open(path))

    def query(self, sql: str, parameters: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        """Read rows synchronously: for start only, before requests are served."""
        return self._connection.execute(sql, parameters).fetchall()

    def transaction_nowait(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """`transaction` in the calling thread: for start and for tests."""
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = fn(connection)
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
            return result
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise SystemFailure(f"database: {error}") from error

    async def transaction(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Run `fn(connection)` in one durable transaction and return its result.

        Cancellation: before it starts, nothing happened; once started it always commits and returns.
        """
        return await trio.to_thread.run_sync(self.transaction_nowait, fn, limiter=self._limiter)

    async def change(self, fn: Callable[[sqlite3.Connection], T], apply: Callable[[T], None]) -> T:
        """`transaction(fn)`, then `apply(result)` to the records in memory, in the order of the commits.

        Without it two tasks may wake in the other order than their transactions committed (Trio shuffles).
        """
        async with self._order:
            result = await self.transaction(fn)
            apply(result)
            return result

    @asynccontextmanager
    async def ordered(self) -> AsyncIterator[None]:
        """A time in which no `change` is under way."""
        async with self._order:
            yield

    def close(self) -> None:
        self._connection.close()


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        connection.execute("PRAGMA foreign_keys=OFF")
        (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if result != "ok":
            raise sqlite3.DatabaseError(result)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise SystemFailure(f"{path} is of version {version}, this engine knows up to {len(MIGRATIONS)}")
        for number in range(version, len(MIGRATIONS)):
            connection.executescript(f"BEGIN; {MIGRATIONS[number]}; PRAGMA user_version={number + 1}; COMMIT;")
    except BaseException:
        connection.close()
        raise
    os.chmod(path, 0o600)
    return connection
