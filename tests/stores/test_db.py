"""The database file: whatever happens to it, the engine starts, and what the standby copy has is there."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from balenapy.errors import SystemFailure
from balenapy.stores import db as module
from balenapy.stores.db import MIGRATIONS, Database, Origin, standby_of


def put(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT OR REPLACE INTO setting(name, value) VALUES('a', 'b')")


def settings(db: Database) -> list[tuple[object, ...]]:
    return db.query("SELECT name, value FROM setting WHERE name != 'origin'")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database with one setting, closed, and its copy."""
    path = tmp_path / "meta.db"
    db = Database.open(path)
    db.transaction_nowait(put)
    db.settled_nowait()
    db.close()
    return path


def reopened(path: Path) -> tuple[Origin, list[tuple[object, ...]]]:
    db = Database.open(path)
    try:
        return db.origin, settings(db)
    finally:
        db.close()


def test_a_whole_file_is_kept(path: Path) -> None:
    assert reopened(path) == (Origin.KEPT, [("a", "b")])


def truncate(path: Path) -> None:
    os.truncate(path, 0)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def zero(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def scramble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:4096] = os.urandom(3996)
    path.write_bytes(data)


def flip_version(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[60] ^= 0x40
    path.write_bytes(data)


DAMAGES = [truncate, Path.unlink, cut, zero, scramble, flip_version]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_gives_way_to_its_copy(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path)
    assert reopened(path) == (Origin.STANDBY, [("a", "b")])
    assert reopened(path) == (Origin.STANDBY, [("a", "b")]), "until it is settled"
    db = Database.open(path)
    db.settled_nowait()
    db.close()
    assert reopened(path) == (Origin.KEPT, [("a", "b")])
    if damage is not Path.unlink:
        assert list(path.parent.glob("meta.db.broken-*")), "nothing is deleted"


@pytest.mark.parametrize("damage", [cut, zero, scramble])
def test_without_a_usable_copy_a_new_one_is_begun(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path)
    damage(standby_of(path))
    assert reopened(path) == (Origin.LOST, [])


def test_each_byte_of_the_header_may_be_damaged(path: Path) -> None:
    """Every bit of the first 100 bytes: the engine starts, with the records."""
    whole = path.read_bytes()
    for bit in range(800):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert reopened(path)[1] == [("a", "b")], f"bit {bit}"


def test_a_newer_version_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    standby_of(path).write_bytes(path.read_bytes())
    with pytest.raises(SystemFailure) as caught:
        Database.open(path)
    assert "is of version" in caught.value.message
    assert list(path.parent.glob("meta.db.broken-*")) == []


def test_a_failed_transaction_changes_nothing(path: Path) -> None:
    db = Database.open(path)
    try:

        def fail(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM setting")
            raise KeyError("x")

        with pytest.raises(KeyError):
            db.transaction_nowait(fail)
        with pytest.raises(SystemFailure):
            db.transaction_nowait(lambda connection: connection.execute("INSERT INTO nothing VALUES(1)"))
        assert settings(db) == [("a", "b")]
    finally:
        db.close()


def test_changes_are_folded_and_copied_soon_but_copied_rarely(tmp_path: Path) -> None:
    path, wal = tmp_path / "meta.db", tmp_path / "meta.db-wal"
    standby = standby_of(path)
    clock = trio.testing.MockClock()  # moved by hand: an automatic one would not wait for the database's thread

    async def after(seconds: float, holds: Callable[[], bool]) -> None:
        """Let so much time pass, and the threads end their work."""
        await trio.testing.wait_all_tasks_blocked()
        clock.jump(seconds)
        for _ in range(500):
            if holds():
                return
            await trio.to_thread.run_sync(time.sleep, 0.01)
        pytest.fail("what should happen did not")

    def copied() -> int:
        return standby.stat().st_mtime_ns if standby.exists() else 0

    async def main() -> None:
        db = Database.open(path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(db.serve)
            await after(module.SETTLE_S, lambda: copied() > 0)
            first = copied()
            await db.transaction(put)
            assert wal.stat().st_size > 0
            await after(module.SETTLE_S, lambda: wal.stat().st_size == 0)
            assert copied() == first
            await after(module.COPY_INTERVAL_S, lambda: True)
            await after(module.SETTLE_S, lambda: copied() > first)
            second = copied()
            await db.transaction(put, volatile=True)
            await after(10 * module.COPY_INTERVAL_S, lambda: True)
            await after(module.SETTLE_S, lambda: True)
            assert copied() == second
            nursery.cancel_scope.cancel()
        db.close()

    trio.run(main, clock=clock)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_full_disk_does_not_stop_commits(tmp_path: Path) -> None:
    """There is room that only transactions get; it comes back when the disk has room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "none", disk], check=True)
    try:
        db = Database.open(disk / "meta.db")
        with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for number in range(200):
            db.transaction_nowait(
                lambda connection, number=number: connection.execute(  # type: ignore[misc]
                    "INSERT INTO setting VALUES(?, ?)", (f"name{number}", "x" * 500)
                )
            )
        assert not (disk / "meta.db.ballast").exists()
        (disk / "filler").unlink()
        db._checkpoint()
        assert (disk / "meta.db.ballast").stat().st_size == 1 << 20
        db.close()
        db = Database.open(disk / "meta.db")
        assert db.query("SELECT count(*) FROM setting WHERE name LIKE 'name%'") == [(200,)]
        db.close()
    finally:
        subprocess.run(["umount", disk], check=True)
