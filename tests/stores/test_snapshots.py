"""Snapshots: the rows are the truth, the directories follow."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from balenapy.errors import Conflict, NotFound, SystemFailure
from balenapy.linux import syscalls
from balenapy.stores.db import Database
from balenapy.stores.snapshots import Layer, Snapshots
from tests.trio_tests import trio_test

KEY = "c" * 64
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@asynccontextmanager
async def opened(root: Path) -> AsyncIterator[Snapshots]:
    (root / "data").mkdir(parents=True, exist_ok=True)
    db = Database.open(root / "data/meta.db")
    try:
        snapshots = Snapshots(db, root / "data", root / "exec", trio.CapacityLimiter(4))
        snapshots.recover()
        yield snapshots
    finally:
        db.close()


async def add_layer(snapshots: Snapshots, chain_id: str, parent: str = "", size: int = 10) -> Layer:
    path = await snapshots.new_directory({"layer.json": b"{}"})
    (path / "diff" / f"from-{chain_id}").write_text(chain_id)
    layer = Layer(path, chain_id, parent, f"diff-{chain_id}", size, size)
    await snapshots.commit(layer)
    return layer


def directories(root: Path) -> list[str]:
    return sorted(os.listdir(root / "data/snapshots"))


@trio_test
async def test_a_writable_layer_stands_on_its_chain(tmp_path: Path) -> None:
    async with opened(tmp_path) as snapshots:
        one = await add_layer(snapshots, "one")
        two = await add_layer(snapshots, "two", "one", 5)
        active = await snapshots.prepare(KEY, "two", fill=lambda init: (init / "etc").mkdir())
        dirs = snapshots.mounts(KEY)
        assert dirs.lower == (active.init, two.diff, one.diff)
        assert (dirs.upper, dirs.work) == (active.diff, active.work)
        assert (active.init / "etc").is_dir()
        assert active.diff.stat().st_mode & 0o777 == 0o755
        assert snapshots.size_bytes("two") == 15
        (active.diff / "new").write_bytes(b"x" * 100)
        assert await snapshots.size_rw(KEY) == 100
    async with opened(tmp_path) as snapshots:
        assert snapshots.mounts(KEY) == dirs
        assert snapshots.get(KEY) == active
        await snapshots.remove(KEY)
        await snapshots.remove(KEY)
        with pytest.raises(NotFound):
            snapshots.mounts(KEY)
        assert not active.path.exists()


@trio_test
async def test_what_the_caller_adds_is_one_transaction_with_the_layer(tmp_path: Path) -> None:
    async with opened(tmp_path) as snapshots:

        def refuse(connection: sqlite3.Connection) -> None:
            raise Conflict("taken")

        with pytest.raises(Conflict) as caught:
            await snapshots.prepare(KEY, "", also=refuse)
        assert caught.value.message == "taken"
        assert directories(tmp_path) == []
        await snapshots.prepare(KEY, "")
        with pytest.raises(Conflict):
            await snapshots.prepare(KEY, "")
        with pytest.raises(Conflict):
            await snapshots.remove(KEY, also=refuse)
        assert snapshots.get(KEY).path.is_dir()
        assert len(directories(tmp_path)) == 1


@trio_test
async def test_a_failed_fill_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as snapshots:

        def fill(init: Path) -> None:
            (init / "a").write_text("x")
            raise PermissionError(1, "Operation not permitted")

        with pytest.raises(SystemFailure):
            await snapshots.prepare(KEY, "", fill=fill)
        assert directories(tmp_path) == []
        with pytest.raises(NotFound):
            snapshots.get(KEY)


@trio_test
async def test_a_layer_needs_its_parent(tmp_path: Path) -> None:
    async with opened(tmp_path) as snapshots:
        for parent in ("gone", "sha256:gone"):
            with pytest.raises(SystemFailure) as caught:
                await add_layer(snapshots, "x", parent)
            assert caught.value.message == f"layer does not exist: {parent}"
            with pytest.raises(SystemFailure):
                await snapshots.prepare(KEY, parent)
        await add_layer(snapshots, "one")
        with pytest.raises(Conflict):
            await add_layer(snapshots, "one")


@trio_test
async def test_directories_without_a_row_go_at_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as snapshots:
        layer = await add_layer(snapshots, "one")
        await snapshots.new_directory()
    async with opened(tmp_path) as snapshots:
        assert directories(tmp_path) == [layer.path.name]
        await snapshots.trash.empty()
        assert os.listdir(tmp_path / "data/trash") == []


@trio_test
async def test_a_lost_writable_layer_is_empty_after_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as snapshots:
        active = await snapshots.prepare(KEY, "")
        for path in (active.diff, active.work, active.init, active.path):
            path.rmdir()
    async with opened(tmp_path) as snapshots:
        assert snapshots.mounts(KEY).upper.is_dir()


@root_only
@trio_test
async def test_a_view_shows_the_stack_read_only_and_is_gone_afterwards(tmp_path: Path) -> None:
    async with opened(tmp_path) as snapshots:
        await add_layer(snapshots, "one")
        await add_layer(snapshots, "two", "one")
        for chain_id, names in (
            ("two", ["from-one", "from-two"]),
            ("one", ["from-one"]),
            ("", []),
        ):
            async with snapshots.view(chain_id) as path:
                assert sorted(os.listdir(path)) == names
                if chain_id:
                    with pytest.raises(OSError):
                        (path / "x").write_text("x")
        assert os.listdir(tmp_path / "exec/views") == []
        assert syscalls.mount_points(tmp_path) == []


@root_only
@trio_test
async def test_a_view_left_by_a_crash_is_unmounted_at_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as snapshots:
        layer = await add_layer(snapshots, "one")
    left = tmp_path / "exec/views/left"
    left.mkdir()
    syscalls.mount_overlay(left, [layer.diff])
    async with opened(tmp_path):
        assert syscalls.mount_points(tmp_path) == []
        assert not left.exists()


@root_only
@trio_test
async def test_127_layers_can_be_mounted(tmp_path: Path) -> None:
    async with opened(tmp_path) as snapshots:
        parent = ""
        for number in range(127):
            parent = (await add_layer(snapshots, f"layer{number}", parent)).chain_id
        await snapshots.prepare(KEY, parent)
        dirs = snapshots.mounts(KEY)
        target = tmp_path / "rootfs"
        target.mkdir()
        syscalls.mount_overlay(target, dirs.lower, dirs.upper, dirs.work)
        try:
            assert len(os.listdir(target)) == 127
        finally:
            syscalls.umount2(target)
