"""Leases: what keeps things that no image names yet, so that a pull which stops half-way loses no finished layer.

A lease belongs to one piece of work, by name (`pull/docker.io/library/busybox:latest`), and ends with the
transaction that makes the work visible. One whose owner never comes back expires; the same work begun again renews it.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field

from balenapy.stores.db import Database

LEASE_TTL_NS = 24 * 3600 * 10**9

Item = tuple[str, str]  # (kind, key): ("chain", chain_id), ("document", digest), ("ingest", digest)


@dataclass(slots=True)
class Lease:
    name: str
    created_ns: int
    expires_ns: int
    items: set[Item] = field(default_factory=set)

    def is_expired(self, now_ns: int) -> bool:
        """A clock that stands before the lease's creation was reset (no battery): that time does not count."""
        return self.created_ns <= now_ns and self.expires_ns <= now_ns


class Leases:
    """All leases. The functions that take a connection run inside a transaction; `reload` follows it."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def all(self) -> list[Lease]:
        """Every lease, from the rows. Blocks: for start and tests."""
        return self._db.transaction_nowait(read)

    async def hold(self, name: str, now_ns: int, items: list[Item]) -> None:
        """Take or renew a lease on these items and those it has."""
        await self._db.transaction(lambda connection: hold(connection, name, now_ns, items))

    async def drop(self, name: str) -> None:
        """End a lease; one that is gone is fine."""
        await self._db.transaction(lambda connection: drop(connection, name))


def read(connection: sqlite3.Connection) -> list[Lease]:
    """Every lease with its items."""
    leases = {
        name: Lease(name, _time(created_ns), _time(expires_ns))
        for name, created_ns, expires_ns in connection.execute("SELECT name, created_ns, expires_ns FROM lease")
    }
    for name, kind, key in connection.execute("SELECT lease, kind, key FROM lease_item"):
        if name in leases:
            leases[name].items.add((kind, key))
    return list(leases.values())


def _time(value: object) -> int:
    """One that is no number (damage) is long ago."""
    return value if isinstance(value, int) else 0


def hold(connection: sqlite3.Connection, name: str, now_ns: int, items: list[Item]) -> None:
    """Take or renew a lease on these items and those it has."""
    connection.execute(
        "INSERT INTO lease(name, created_ns, expires_ns) VALUES(?, ?, ?) "
        "ON CONFLICT(name) DO UPDATE SET created_ns = excluded.created_ns, expires_ns = excluded.expires_ns",
        (name, now_ns, now_ns + LEASE_TTL_NS),
    )
    connection.executemany(
        "INSERT OR IGNORE INTO lease_item(lease, kind, key) VALUES(?, ?, ?)",
        [(name, kind, key) for kind, key in items],
    )


def drop(connection: sqlite3.Connection, name: str) -> None:
    """End a lease; one that is gone is fine."""
    connection.execute("DELETE FROM lease WHERE name = ?", (name,))
    connection.execute("DELETE FROM lease_item WHERE lease = ?", (name,))
