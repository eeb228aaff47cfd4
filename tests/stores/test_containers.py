from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from balenapy.core import wire
from balenapy.core.container import (
    Container,
    EndpointSettings,
    Health,
    HealthResult,
    HostConfig,
    Mount,
    MountPoint,
    PortBinding,
    RestartPolicy,
    SandboxState,
    State,
    Status,
    TmpfsOptions,
)
from balenapy.stores.containers import ContainerStore, decode_record, encode_record, encode_state
from balenapy.stores.db import Database
from tests.trio_tests import trio_test


def full() -> Container:
    """A container that uses every kind of field."""
    return Container(
        id="a" * 64,
        name="web",
        created_ns=1,
        path="sleep",
        args=["1"],
        host_config=HostConfig(restart_policy=RestartPolicy("always"), console_size=(1, 2), init=False),
        mounts=[
            MountPoint(
                "tmpfs", destination="/t", spec=Mount("tmpfs", target="/t", tmpfs_options=TmpfsOptions(5)), rw=True
            )
        ],
        state=State(
            Status.PAUSED,
            pid=5,
            conmon_pid=6,
            conmon_start_time=7,
            ever_started=True,
            health=Health("healthy", 0, [HealthResult(1, 2, 0, "ok")]),
        ),
        endpoints={"bridge": EndpointSettings(ip_address="10.0.0.2", aliases=["x"])},
        sandbox=SandboxState("s", "/key", {"80/tcp": [PortBinding("0.0.0.0", "1")], "81/udp": None}, "/r"),
    )


def test_a_record_is_read_as_it_was_written() -> None:
    container = full()

    again = decode_record(encode_record(container), encode_state(container))

    assert wire.encode(container) == wire.encode(again)
    for name in ("state", "endpoints", "sandbox", "mounts", "host_config"):
        assert getattr(container, name) == getattr(again, name)


@trio_test
async def test_rows_follow_the_changes(tmp_path: Path) -> None:
    db = Database.open(tmp_path / "meta.db")
    store = ContainerStore(db)
    container = full()
    await store.insert(container)
    container.name = "new"
    await store.update_record(container)
    container.state.pid = 99
    await store.update_state(container)

    found = ContainerStore(db).find(container.id)
    assert found is not None
    assert (found.name, found.state.pid) == ("new", 99)
    assert store.find(container.id) is container

    await store.delete(container.id)
    await store.delete(container.id)
    assert store.all() == ContainerStore(db).all() == []
    db.close()


def test_a_row_that_cannot_be_read_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    db = Database.open(tmp_path / "meta.db")
    rows = [("bad1", "{", "{}"), ("bad2", '{"Args": 5}', "{}"), ("bad3", "{}", '{"Status": "zz"}'), ("bad4", "[]", "7")]
    for container_id, record, state in rows:
        db.transaction_nowait(
            lambda connection, row=(container_id, container_id, record): connection.execute(
                "INSERT INTO container VALUES (?, ?, ?)", row
            )
        )
        db.transaction_nowait(
            lambda connection, row=(container_id, state): connection.execute(
                "INSERT INTO container_state VALUES (?, ?)", row
            )
        )
    good = full()
    store = ContainerStore(db)
    db.transaction_nowait(lambda connection: store.write(connection, good))

    caplog.clear()
    with caplog.at_level(logging.ERROR):
        found = ContainerStore(db).all()

    assert [container.id for container in found] == [good.id]
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 4
    assert json.loads(json.dumps(db.query("SELECT count(*) FROM container"))) == [[5]]
    db.close()
