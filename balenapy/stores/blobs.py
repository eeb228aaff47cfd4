"""Blobs we know of: which gzipped blob holds a layer, and which repositories have it.

Written by pull and push, asked by push: what a repository has is not uploaded again, and what another one on the same
registry has is mounted from there. It is hearsay: the registry is asked before it counts. Gzip only, because that is
what the manifests we push may name.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

KEPT_ROWS = 2000  # a layer that is gone may be loaded or built again; its blob is then still where it was
KEPT = 20  # of one layer: more places are not worth the asking


@dataclass(frozen=True, slots=True)
class BlobRecord:
    diff_id: str
    repository: str  # canonical, without tag
    digest: str
    size_bytes: int


def known(connection: sqlite3.Connection, diff_ids: Iterable[str]) -> dict[str, list[BlobRecord]]:
    """What is known of each layer."""
    found: dict[str, list[BlobRecord]] = {}
    for diff_id in set(diff_ids):
        rows = connection.execute(
            "SELECT diff_id, repository, digest, size_bytes FROM blob WHERE diff_id = ? LIMIT ?", (diff_id, KEPT)
        )
        found[diff_id] = [BlobRecord(*row) for row in rows]
    return found


def note(connection: sqlite3.Connection, records: Iterable[BlobRecord]) -> None:
    """Remember that repositories have these."""
    connection.executemany(
        "INSERT OR REPLACE INTO blob(diff_id, repository, digest, size_bytes) VALUES(?, ?, ?, ?)",
        [(record.diff_id, record.repository, record.digest, record.size_bytes) for record in records],
    )


def thin_out(connection: sqlite3.Connection) -> None:
    """Forget the blobs of layers that are gone, when there are many rows."""
    (count,) = connection.execute("SELECT count(*) FROM blob").fetchone()
    if count > KEPT_ROWS:
        connection.execute("DELETE FROM blob WHERE diff_id NOT IN (SELECT diff_id FROM snapshot)")
