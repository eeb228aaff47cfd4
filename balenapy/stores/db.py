"""The SQLite file: open, migrate, `transaction(fn)`. One connection, one thread.

Rows are the truth; a file or directory that no row names is rubbish. Records live in memory as dataclasses,
so reads after start never touch the file; a mutation is `await db.transaction(fn)`: one call in one
thread, committed when it returns, rolled back when it raises, atomic for cancellation (a call that began always ends).

One file is one file to lose: a standby copy (`meta.db.standby`) is made after changes and takes its place when it is
damaged, missing or empty; what was damaged is renamed aside.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

import trio

from balenapy.errors import SystemFailure
from balenapy.linux import durable

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
    -- Blobs that hold a layer, gzipped, and repositories that were seen to have them: what a push need not upload.
    CREATE TABLE blob(
        diff_id TEXT NOT NULL,
        repository TEXT NOT NULL,           -- canonical, without tag
        digest TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        PRIMARY KEY(diff_id, repository, digest)
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


TABLES = tuple(
    line.split("(")[0].split()[-1] for script in MIGRATIONS for line in script.splitlines() if "CREATE TABLE" in line
)
BALLAST_BYTES = 1 << 20  # a few hundred transactions, and the log folded into the file
BALLAST_ROOM = 64  # times its size has to be free before it is made again
SETTLE_S = 5.0
COPY_INTERVAL_S = 900.0  # of an SD card's life: some hundred KiB each
# An error that another file would meet as well. Everything else is taken for damage.
NOT_THE_FILES_FAULT = frozenset(
    (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
    )
)


class NoSpace(SystemFailure):
    """The disk is full. Its text ends in `no space left on device`; trying again does not help."""


class Origin(Enum):
    """Where the records come from. STANDBY: some are old. LOST: there were some. NEW: there were none, or a file
    went that nobody knows of."""

    KEPT = "kept"
    NEW = "new"
    STANDBY = "standby"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class DamagedRow:
    """A row that is valid to SQLite and to nobody else: bits have flipped in it."""

    kind: str  # container, network, volume, layer, reference
    name: str
    why: str


class Database:
    """The one connection to `meta.db`. Opened before Trio runs; used only through `transaction` afterwards."""

    def __init__(self, connection: sqlite3.Connection, path: Path, origin: Origin = Origin.KEPT) -> None:
        self._path = path
        self._connection = connection
        self._limiter = trio.CapacityLimiter(1)
        self._order = trio.Lock()
        self._changed = trio.Event()  # something worth a copy was committed
        self.damaged: list[DamagedRow] = []  # found at this start
        self.origin = self._remember(origin)
        self._is_stale = self.origin is not Origin.KEPT or not standby_of(path).exists()
        if self._is_stale:
            self._changed.set()
        self._ballast = path.with_name(f"{path.name}.ballast")
        self._load_ballast()

    def _remember(self, origin: Origin) -> Origin:
        """Until it is `settled`, a restart still knows that rows were lost."""
        ((known,),) = self.query("SELECT max(value) FROM setting WHERE name = 'origin'")
        if origin is Origin.KEPT:
            return Origin(known) if known in {each.value for each in Origin} else origin
        self.transaction_nowait(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO setting(name, value) VALUES('origin', ?)", (origin.value,)
            )
        )
        return origin

    def found_damaged(self, kind: str, name: object, why: object) -> None:
        """Tell of a row that cannot be read: in the log, and to whoever asks. It stays where it is."""
        row = DamagedRow(kind, str(name), str(why))
        log.error("%s cannot be read name=%s error=%s", row.kind, row.name, row.why)
        self.damaged.append(row)

    async def settled(self) -> None:
        """Say that everything was found again that can be."""
        await self.transaction(_forget_origin)
        self.origin = Origin.KEPT

    def settled_nowait(self) -> None:
        """`settled` in the calling thread: for start."""
        self.transaction_nowait(_forget_origin)
        self.origin = Origin.KEPT

    @classmethod
    def open(cls, path: Path) -> Database:
        """Open or create, check and migrate the database.

        A file that SQLite cannot use is renamed aside (`.broken-<time>`), never deleted, and the standby copy takes
        its place; so it does when the file is missing or empty. Without a copy a new one is begun.

        Raises: SystemFailure, when the file cannot be opened at all or is of a newer version.
        """
        is_there = path.exists() and path.stat().st_size > 0
        standby = standby_of(path)
        if is_there or not standby.exists():
            try:
                return cls(_open(path), path, Origin.KEPT if is_there else Origin.NEW)
            except _Newer as newer:
                # Written by a newer engine, or one bit has flipped: the copy knows.
                if not standby.exists() or _version_of(standby) > len(MIGRATIONS):
                    raise SystemFailure(str(newer)) from newer
                log.error("database is damaged path=%s error=%s", path, newer)
            except _Damaged as damage:
                log.error("database is damaged path=%s error=%s", path, damage)
        else:
            log.error("database is missing path=%s", path)
        _put_aside(path)
        if standby.exists():
            try:
                durable.write_file(path, standby.read_bytes())
                database = cls(_open(path), path, Origin.STANDBY)
                log.error("database was replaced by its standby copy path=%s", path)
                return database
            except _Damaged as damage:
                log.error("the standby copy is damaged too path=%s error=%s", standby, damage)
                _put_aside(path)
        return cls(_open(path), path, Origin.LOST)

    def query(self, sql: str, parameters: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        """Read rows synchronously: for start only, before requests are served."""
        return self._connection.execute(sql, parameters).fetchall()

    def transaction_nowait(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """`transaction` in the calling thread: for start and for tests."""
        self._is_stale = True
        return self._run(fn)

    def _run(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return self._run_once(fn)
        except SystemFailure as error:
            cause = error.__cause__
            if not isinstance(cause, sqlite3.Error) or not _is_full(cause) or not self._drop_ballast():
                raise
        return self._run_once(fn)

    def _load_ballast(self) -> None:
        """Keep some room that only transactions get, so that on a full disk states are still committed."""
        if self._ballast.exists() or durable.free_bytes(self._path.parent) < BALLAST_ROOM * BALLAST_BYTES:
            return
        try:
            fd = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, BALLAST_BYTES)
            finally:
                os.close(fd)
        except OSError as error:
            log.warning("no ballast for a full disk error=%s", error)
            self._ballast.unlink(missing_ok=True)

    def _drop_ballast(self) -> bool:
        try:
            self._ballast.unlink()
        except OSError:
            return False
        log.error("the disk is full: ballast dropped path=%s", self._ballast)
        return True

    def _run_once(self, fn: Callable[[sqlite3.Connection], T]) -> T:
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
            # Errors of the module itself have no code.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                raise NoSpace("database: no space left on device") from error
            raise SystemFailure(f"database: {error}") from error

    async def transaction(self, fn: Callable[[sqlite3.Connection], T], *, volatile: bool = False) -> T:
        """Run `fn(connection)` in one durable transaction and return its result.

        Args:
            volatile: what it writes changes again soon (a state, a position): not worth a new standby copy.
        Cancellation: before it starts, nothing happened; once started it always commits and returns.
        """
        result = await trio.to_thread.run_sync(self._run, fn, limiter=self._limiter)
        if not volatile:
            self._is_stale = True
            self._changed.set()
        return result

    async def change(
        self, fn: Callable[[sqlite3.Connection], T], apply: Callable[[T], None], *, volatile: bool = False
    ) -> T:
        """`transaction(fn)`, then `apply(result)` to the records in memory, in the order of the commits.

        Without it two tasks may wake in the other order than their transactions committed (Trio shuffles).
        """
        async with self._order:
            result = await self.transaction(fn, volatile=volatile)
            apply(result)
            return result

    @asynccontextmanager
    async def ordered(self) -> AsyncIterator[None]:
        """A time in which no `change` is under way."""
        async with self._order:
            yield

    # --- the standby copy

    async def serve(self) -> None:
        """Keep the log short and the standby copy young, until cancelled.

        Soon after a change the log is folded into the file, so that a damaged log costs no more than states; the
        copy follows, at most once in COPY_INTERVAL_S.
        """
        copied_at = -math.inf
        while True:
            with trio.move_on_at(copied_at + COPY_INTERVAL_S if self._is_stale else math.inf):
                await self._changed.wait()
            await trio.sleep(SETTLE_S)  # changes come in groups
            self._changed = trio.Event()
            try:
                await trio.to_thread.run_sync(self._checkpoint, limiter=self._limiter)
                if self._is_stale and trio.current_time() >= copied_at + COPY_INTERVAL_S:
                    copied_at = trio.current_time()
                    await trio.to_thread.run_sync(self._copy, limiter=self._limiter)
            except (sqlite3.Error, OSError) as error:  # a full disk passes
                log.warning("no standby copy of the database error=%s", error)

    def _checkpoint(self) -> None:
        self._load_ballast()
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _copy(self) -> None:
        standby = standby_of(self._path)
        fresh = standby.with_name(f".{standby.name}")
        fresh.unlink(missing_ok=True)
        self._is_stale = False
        try:
            self._connection.execute("VACUUM INTO ?", (str(fresh),))
            fd = os.open(fresh, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fchmod(fd, 0o600)
                durable.sync_file(fd)
            finally:
                os.close(fd)
            durable.replace(fresh, standby)
        except BaseException:
            self._is_stale = True
            raise

    def close(self) -> None:
        """Close; a copy that is behind is made now."""
        if self._is_stale:
            try:
                self._copy()
            except (sqlite3.Error, OSError) as error:
                log.warning("no standby copy of the database error=%s", error)
        self._connection.close()


def _forget_origin(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM setting WHERE name = 'origin'")


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def _text(data: bytes) -> str:
    """Not strict: one damaged byte must not make all rows unreadable."""
    return data.decode(errors="replace")


def _columns(connection: sqlite3.Connection) -> list[object]:
    """Every column of every table. Each table is read once: what is damaged in the schema shows here."""
    for table in TABLES:
        connection.execute(f"SELECT * FROM {table} LIMIT 1").fetchall()
    return [connection.execute(f"PRAGMA table_info({table})").fetchall() for table in TABLES]


def _intended_columns() -> list[object]:
    fresh = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for script in MIGRATIONS:
            fresh.executescript(script)
        return _columns(fresh)
    finally:
        fresh.close()


def _mend_indexes(connection: sqlite3.Connection, path: Path) -> None:
    """A bit that flips in a value leaves its index behind: rows are the truth, the index is made anew."""
    problems = connection.execute("PRAGMA integrity_check(3)").fetchall()
    if problems == [("ok",)]:
        return
    log.error("database has damaged rows or indexes path=%s error=%s", path, problems[0][0])
    try:
        connection.execute("REINDEX")
    except sqlite3.IntegrityError as error:  # two rows claim one name
        raise _Damaged(str(error)) from error


def standby_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.standby")


def _put_aside(path: Path) -> None:
    """Rename a database and what belongs to it; nothing is deleted."""
    aside = f"{path}.broken-{time.time_ns()}"
    for suffix in ("", "-wal", "-shm"):
        source = Path(f"{path}{suffix}")
        if source.exists():
            durable.replace(source, Path(f"{aside}{suffix}"))
            log.error("renamed path=%s to=%s", source, f"{aside}{suffix}")


class _Damaged(Exception):
    """The file is not, or no longer, our database."""


class _Newer(_Damaged):
    """The file says that a newer engine wrote it."""


def _version_of(path: Path) -> int:
    """The version in a database file's header: bytes 60 to 63 (SQLite file format, 1.3)."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(64)[60:64], "big")


def _open(path: Path) -> sqlite3.Connection:
    """Raises: _Damaged; SystemFailure, when the fault is not the file's."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    connection.text_factory = _text
    try:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        connection.execute("PRAGMA foreign_keys=OFF")
        (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if result != "ok":
            raise _Damaged(result)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= len(MIGRATIONS):
            raise _Newer(f"{path} is of version {version}, this engine knows up to {len(MIGRATIONS)}")
        for number in range(version, len(MIGRATIONS)):
            connection.executescript(f"BEGIN; {MIGRATIONS[number]}; PRAGMA user_version={number + 1}; COMMIT;")
        if _columns(connection) != _intended_columns():
            raise _Damaged("its tables are not ours")
        _mend_indexes(connection, path)
    except sqlite3.Error as error:
        connection.close()
        if error.sqlite_errorcode & 0xFF in NOT_THE_FILES_FAULT:
            raise SystemFailure(f"cannot open {path}: {error}") from error
        raise _Damaged(str(error)) from error
    except UnicodeDecodeError as error:  # SQLite complains of a damaged name, in its own bytes
        connection.close()
        raise _Damaged(str(error)) from error
    except BaseException:
        connection.close()
        raise
    os.chmod(path, 0o600)
    return connection
