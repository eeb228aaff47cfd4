"""Rows of networks. The dictionary in memory is what is read; a change is durable before it is seen."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from balenapy.core import wire
from balenapy.core.network import Network
from balenapy.errors import EngineError
from balenapy.stores.db import Database


class NetworkStore:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._networks: dict[str, Network] = {}
        for network_id, record in db.query("SELECT id, record FROM network ORDER BY id"):
            try:
                network = wire.decode(Network, _with_pools(json.loads(str(record))))
                if network.id != network_id:
                    raise ValueError("its record is another's")
                network.check()
            except (EngineError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
                db.found_damaged("network", network_id, error)
                continue
            self._networks[network.id] = network

    def all(self) -> list[Network]:
        return list(self._networks.values())

    def find(self, network_id: str) -> Network | None:
        return self._networks.get(network_id)

    async def save(self, *networks: Network) -> None:
        """Insert or replace, all in one transaction."""
        rows = [(network.id, network.name, json.dumps(wire.encode(network))) for network in networks]

        def write(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT OR REPLACE INTO network(id, name, record) VALUES (?, ?, ?)", rows)

        await self._db.transaction(write)
        self._networks.update((network.id, network) for network in networks)

    async def delete(self, network_id: str) -> None:
        """Forget one; again is fine."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM network WHERE id = ?", (network_id,))

        await self._db.transaction(write)
        self._networks.pop(network_id, None)


def _with_pools(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it is now: the first ones had one pool, spread out over the network's own fields."""
    if record.get("Subnet") and "Pools" not in record:
        pool = {key: record[key] for key in ("Subnet", "IPRange", "Gateway", "Auxiliary") if key in record}
        return record | {"Pools": [pool]}
    return record
