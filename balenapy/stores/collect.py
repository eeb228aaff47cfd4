"""Collection: delete the rows that nothing leads to, then the directories they named.

Roots are images (tagged or not: untagged ones go by prune or delete only), leases, containers' snapshots and what
is being read at the moment. Mark and sweep are one transaction on the rows themselves, so whatever commits before
it is seen by it, and whatever commits after it finds the rows gone and says so. Ends or begins again at any point.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import trio

from balenapy.core.mark import reachable
from balenapy.linux import durable
from balenapy.stores import blobs, leases
from balenapy.stores.content import Content
from balenapy.stores.db import Database
from balenapy.stores.snapshots import Snapshots

log = logging.getLogger(__name__)

IDLE_INTERVAL_S = 3600.0  # leases and ingests expire without anybody asking

Node = tuple[str, str]  # ("image", image_id), ("chain", chain_id), ("document", digest), ("key", container id)


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a collection deleted."""

    chain_ids: list[str]
    documents: int
    leases: int


class Collector:
    """Collects when woken and once an hour."""

    def __init__(self, db: Database, snapshots: Snapshots, content: Content) -> None:
        self._db = db
        self._snapshots = snapshots
        self._content = content
        self._wake = trio.Event()

    def wake(self) -> None:
        """Say that something was deleted."""
        self._wake.set()

    async def serve(self) -> None:
        """Collect whenever woken, until cancelled."""
        while True:
            try:
                await self.collect()
            except Exception:  # a background job must not end the daemon; a full disk passes
                log.exception("collection failed")
            with trio.move_on_after(IDLE_INTERVAL_S):
                await self._wake.wait()

    async def collect(self) -> int:
        """Delete everything unreachable; returns the bytes of the deleted layers.

        Cancellation: rows are deleted or not; directories without a row go at the next start at the latest.
        """
        self._wake = trio.Event()
        if self._snapshots.unclaimed:  # rows were lost, and what leads to the others is still being found again
            return 0
        now_ns = time.time_ns()
        directories: list[Path] = []
        freed = 0

        def apply(sweep: Sweep) -> None:
            nonlocal freed
            for layer in self._snapshots.forget(sweep.chain_ids):
                directories.append(layer.path)
                freed += layer.size_bytes

        sweep = await self._db.change(lambda connection: sweep_rows(connection, self._snapshots.pins(), now_ns), apply)
        if directories:
            await self._snapshots.trash.discard(*directories)
        if sweep.chain_ids or sweep.leases:
            log.info("collected layers=%d documents=%d", len(sweep.chain_ids), sweep.documents)
        await self._content.drop_idle(now_ns)
        return freed


def sweep_rows(connection: sqlite3.Connection, pins: Iterable[str], now_ns: int) -> Sweep:
    """Mark and sweep, inside a transaction."""
    durable.step("collect")
    expired = [lease.name for lease in leases.read(connection) if lease.is_expired(now_ns)]
    for name in expired:
        leases.drop(connection, name)
    roots: list[Node] = [("chain", chain_id) for chain_id in pins]
    roots += [("image", image_id) for (image_id,) in connection.execute("SELECT image_id FROM image")]
    roots += [("key", key) for (key,) in connection.execute("SELECT key FROM snapshot WHERE kind = 'active'")]
    roots += [(kind, key) for kind, key in connection.execute("SELECT kind, key FROM lease_item")]
    kept = reachable(roots, edges(connection))
    chain_ids = [
        chain_id
        for (chain_id,) in connection.execute("SELECT chain_id FROM snapshot WHERE kind != 'active'")
        if ("chain", chain_id) not in kept
    ]
    documents = [
        digest for (digest,) in connection.execute("SELECT digest FROM document") if ("document", digest) not in kept
    ]
    connection.executemany("DELETE FROM snapshot WHERE chain_id = ?", [(chain_id,) for chain_id in chain_ids])
    connection.executemany("DELETE FROM document WHERE digest = ?", [(digest,) for digest in documents])
    if chain_ids:
        blobs.thin_out(connection)
    return Sweep(chain_ids, len(documents), len(expired))


def edges(connection: sqlite3.Connection) -> Callable[[Node], list[Node]]:
    """What each node leads to, by the rows."""
    graph: dict[Node, list[Node]] = {}
    for image_id, chain_id in connection.execute("SELECT image_id, chain_id FROM image"):
        graph[("image", image_id)] = [("document", image_id), ("chain", chain_id)]
    for image_id, *manifests in connection.execute("SELECT image_id, manifest, image_manifest FROM reference"):
        graph.setdefault(("image", image_id), []).extend(("document", manifest) for manifest in manifests)
    for chain_id, key, parent in connection.execute("SELECT chain_id, key, parent FROM snapshot"):
        graph[("key", key) if key is not None else ("chain", chain_id)] = [("chain", parent)]
    return lambda node: graph.get(node, [])
