"""Rows of networks: what was written is what is read, also by an engine that wrote them otherwise."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from balenapy.core import wire
from balenapy.core.network import IPAM, IPAMConfigEntry, Network, PoolRecord
from balenapy.stores.db import Database
from balenapy.stores.networks import NetworkStore
from tests.trio_tests import trio_test

POOLS = [
    PoolRecord("10.0.0.0/24", "10.0.0.64/26", "10.0.0.1", {"printer": "10.0.0.65"}),
    PoolRecord("fd00::/64", "", "fd00::1", chosen=True),
]


@trio_test
async def test_a_network_is_read_as_it_was_written(tmp_path: Path) -> None:
    network = Network("ab" * 32, "net", 1, "bridge", ipam=IPAM("default", None, [IPAMConfigEntry("10.0.0.0/24")]))
    network.pools = POOLS
    db = Database.open(tmp_path / "meta.db")
    await NetworkStore(db).save(network)
    found = NetworkStore(db).find(network.id)
    db.close()

    assert found is not None
    assert wire.encode(found) == wire.encode(network)
    assert [str(one.pool.container_gateway) for one in found.pools] == ["10.0.0.1", "fd00::1"]


@pytest.mark.parametrize(
    "spoiled",
    [
        {"Pools": [{"Subnet": "10.0.0.0/24", "Gateway": "zz"}]},
        {"Pools": [{"Subnet": "zz", "Gateway": "10.0.0.1"}]},
        {"Pools": []},
        {"Options": {"com.docker.network.driver.mtu": "zz"}},
        {"Driver": "macvlan", "Options": {"macvlan_mode": "zz"}},
    ],
)
@trio_test
async def test_a_network_that_cannot_be_is_named_and_left_out(tmp_path: Path, spoiled: dict[str, object]) -> None:
    id = "ef" * 32
    record = {"Id": id, "Name": "n", "Driver": "bridge", "Pools": [{"Subnet": "10.0.0.0/24", "Gateway": "10.0.0.1"}]}

    def write(connection: sqlite3.Connection) -> None:
        text = json.dumps(record | spoiled)
        connection.execute("INSERT INTO network(id, name, record) VALUES (?, 'n', ?)", (id, text))

    db = Database.open(tmp_path / "meta.db")
    await db.transaction(write)
    store = NetworkStore(db)
    damaged = [str(one) for one in db.damaged]
    db.close()

    assert store.all() == []
    assert len(damaged) == 1 and id in damaged[0]


@trio_test
async def test_a_network_of_the_time_of_one_pool_is_read(tmp_path: Path) -> None:
    id = "cd" * 32
    old = {
        "Id": id,
        "Name": "old",
        "Driver": "bridge",
        "Subnet": "10.0.0.0/24",
        "IPRange": "10.0.0.64/26",
        "Gateway": "10.0.0.1",
        "Auxiliary": {"printer": "10.0.0.65"},
    }

    def write(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO network(id, name, record) VALUES (?, 'old', ?)", (id, json.dumps(old)))

    db = Database.open(tmp_path / "meta.db")
    await db.transaction(write)
    found = NetworkStore(db).find(id)
    db.close()

    assert found is not None
    assert found.pools == POOLS[:1]
