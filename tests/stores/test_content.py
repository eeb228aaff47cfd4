"""Ingests: what is staged, what of it is trusted, and when it goes. Leases: what they keep and for how long."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from balenapy.core.digest import Digest
from balenapy.errors import SystemFailure
from balenapy.stores import content as module
from balenapy.stores import leases
from balenapy.stores.content import INGEST_TTL_NS, Content, Ingest, NoSpace, file_error
from balenapy.stores.db import Database
from balenapy.stores.leases import LEASE_TTL_NS, Lease, Leases
from tests.trio_tests import trio_test

DATA = os.urandom(3_000_000)
DIGEST = Digest("sha256", hashlib.sha256(DATA).hexdigest())


@asynccontextmanager
async def opened(root: Path, boot_id: str = "boot-1") -> AsyncIterator[Content]:
    db = Database.open(root / "meta.db")
    try:
        content = Content(db, root, trio.CapacityLimiter(4), boot_id)
        content.recover()
        yield content
    finally:
        db.close()


async def write(ingest: Ingest, data: bytes, chunk: int = 100_000) -> None:
    for position in range(0, len(data), chunk):
        await ingest.write(data[position : position + chunk])


async def read_all(ingest: Ingest) -> bytes:
    data = b""
    while piece := await ingest.read(len(data)):
        data += piece
    return data


def file_of(root: Path) -> Path:
    return root / "ingest" / f"sha256-{DIGEST.hex}"


@trio_test
async def test_readers_follow_the_writer_from_the_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as content:
        ingest = await content.open(DIGEST, len(DATA))
        got: list[bytes] = []

        async def reader() -> None:
            got.append(await read_all(ingest))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await write(ingest, DATA)
            nursery.start_soon(reader)
        assert got == [DATA, DATA]
        assert await ingest.hash("sha256") == DIGEST.hex
        await ingest.aclose()


@trio_test
async def test_a_blob_longer_than_announced_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as content:
        ingest = await content.open(DIGEST, 10)
        with pytest.raises(SystemFailure):
            await ingest.write(b"x" * 11)
        await ingest.aclose()


@trio_test
async def test_after_a_crash_of_ours_all_of_the_file_counts(tmp_path: Path) -> None:
    async with opened(tmp_path) as content:
        ingest = await content.open(DIGEST, len(DATA))
        await write(ingest, DATA[:1_000_000])
        await ingest.aclose()
    async with opened(tmp_path) as content:
        assert content.staged_bytes(DIGEST) == 1_000_000
        ingest = await content.open(DIGEST, len(DATA))
        assert ingest.received == 1_000_000
        await write(ingest, DATA[1_000_000:])
        assert await read_all(ingest) == DATA
        await ingest.aclose()


@trio_test
async def test_after_a_power_cut_only_synced_bytes_count(tmp_path: Path) -> None:
    async with opened(tmp_path) as content:
        ingest = await content.open(DIGEST, len(DATA))
        await write(ingest, DATA[:1_000_000])
        await ingest.sync()
        await write(ingest, DATA[1_000_000:2_000_000])
        await ingest.aclose()
    async with opened(tmp_path, "boot-2") as content:
        assert content.staged_bytes(DIGEST) == 1_000_000
        ingest = await content.open(DIGEST, len(DATA))
        assert ingest.received == 1_000_000
        assert file_of(tmp_path).stat().st_size == 1_000_000
        await ingest.aclose()


@trio_test
async def test_without_a_sync_nothing_counts_after_a_power_cut(tmp_path: Path) -> None:
    async with opened(tmp_path) as content:
        ingest = await content.open(DIGEST, len(DATA))
        await write(ingest, DATA[:1_000_000])
        await ingest.aclose()
    async with opened(tmp_path, "boot-2") as content:
        assert content.staged_bytes(DIGEST) == 0


@trio_test(autojump=True)
async def test_a_fast_download_is_never_synced_and_a_slow_one_often(tmp_path: Path) -> None:
    async with opened(tmp_path) as content:
        ingest = await content.open(DIGEST, len(DATA))
        await write(ingest, DATA[:2_000_000])
        assert content.find(DIGEST) is not None
        assert content.find(DIGEST).length == 0  # type: ignore[union-attr]
        await trio.sleep(module.STAGE_AFTER_S + 1)
        await write(ingest, DATA[2_000_000:2_900_000])
        assert content.find(DIGEST).length >= 2_000_000  # type: ignore[union-attr]
        await trio.sleep(module.SYNC_IDLE_S + 1)
        await ingest.write(DATA[2_900_000:2_950_000])
        assert content.find(DIGEST).length == 2_950_000  # type: ignore[union-attr]
        await ingest.aclose()


@trio_test
async def test_a_complete_blob_that_was_never_synced_is_unlinked_before_its_layer_is(tmp_path: Path) -> None:
    async with opened(tmp_path) as content:
        ingest = await content.open(DIGEST, len(DATA))
        await write(ingest, DATA[:1_000_000])
        await ingest.unlink_if_fresh()
        assert file_of(tmp_path).exists()
        await write(ingest, DATA[1_000_000:])
        await ingest.unlink_if_fresh()
        assert not file_of(tmp_path).exists()
        assert await read_all(ingest) == DATA
        await ingest.aclose()
        assert content.staged_bytes(DIGEST) == 0


@trio_test
async def test_files_without_a_row_go_at_start(tmp_path: Path) -> None:
    (tmp_path / "ingest").mkdir()
    (tmp_path / "ingest/sha256-0000").write_text("x")
    async with opened(tmp_path):
        assert os.listdir(tmp_path / "ingest") == []


@trio_test
async def test_idle_ingests_can_be_dropped_and_expire(tmp_path: Path) -> None:
    async with opened(tmp_path) as content:
        ingest = await content.open(DIGEST, len(DATA))
        await write(ingest, DATA[:1_000_000])
        assert await content.drop_idle() == 0
        await ingest.aclose()
        record = content.find(DIGEST)
        assert record is not None
        assert await content.drop_idle(record.expires_ns - 1) == 0
        assert await content.drop_idle(record.expires_ns - INGEST_TTL_NS - 10**9) == 0
        assert await content.drop_idle(record.expires_ns) == 1_000_000
        assert content.sizes() == {}
        assert os.listdir(tmp_path / "ingest") == []


def test_a_full_disk_is_told_in_the_words_clients_know() -> None:
    full = file_error("cannot stage x", OSError(28, "No space left on device"))
    assert isinstance(full, NoSpace)
    assert full.message == "cannot stage x: no space left on device"
    assert not full.retryable
    assert (
        file_error("cannot stage x", OSError(5, "Input/output error")).message == "cannot stage x: input/output error"
    )


@pytest.mark.parametrize(
    ("age_ns", "expired"),
    [(0, False), (LEASE_TTL_NS - 1, False), (LEASE_TTL_NS, True), (-1, False), (-(10**18), False)],
)
def test_a_lease_expires_unless_the_clock_was_reset(age_ns: int, expired: bool) -> None:
    created = 2 * 10**18
    lease = Lease("pull/x", created, created + LEASE_TTL_NS)
    assert lease.is_expired(created + age_ns) is expired


@trio_test
async def test_a_renewed_lease_keeps_what_it_had(tmp_path: Path) -> None:
    db = Database.open(tmp_path / "meta.db")
    try:
        store = Leases(db)
        await store.hold("pull/x", 1000, [("chain", "a")])
        await store.hold("pull/x", 2000, [("chain", "a"), ("document", "b")])
        (lease,) = db.transaction_nowait(leases.read)
        assert lease == Lease("pull/x", 2000, 2000 + LEASE_TTL_NS, {("chain", "a"), ("document", "b")})
        await store.drop("pull/x")
        await store.drop("pull/x")
        assert store.all() == []
        assert db.query("SELECT * FROM lease_item") == []
    finally:
        db.close()
