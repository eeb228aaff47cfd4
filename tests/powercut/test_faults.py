"""A disk that refuses: EIO, ENOSPC and EROFS at any change or sync, in the engine and its workers; a small full disk.

The recording file system refuses chosen requests (`fuse.fail`), so every system call that writes is reached, whoever
makes it. `POWERCUT_FAULTS` asks for more than the short form, `POWERCUT_SEED` for the places of an earlier one.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from balenapy.core.digest import sha256_digest
from balenapy.engine import pull as pull_module
from balenapy.errors import EngineError, SystemFailure
from balenapy.linux import syscalls
from balenapy.stores import content as content_module
from tests.compat.images import file, make_tar
from tests.engine.image_engine import image_engine, pull, settle
from tests.images_fixture import ImageFixture
from tests.powercut import fuse
from tests.powercut.invariants import inspect
from tests.powercut.journeys import Session, fill_registry, say_syncfs
from tests.registry.fake import FakeRegistry, fake_registry
from tests.trio_tests import trio_test

reason = fuse.is_usable()
pytestmark = [pytest.mark.root, pytest.mark.slow]

FAULTS = int(os.environ.get("POWERCUT_FAULTS", "40"))
ALWAYS = 1 << 30
KINDS = (
    (errno.EIO, 1),
    (errno.EIO, ALWAYS),
    (errno.ENOSPC, ALWAYS),
    (errno.ENOSPC, 3),
    (errno.EROFS, ALWAYS),
)
# About how many requests a journey makes.
REACH = {"pull": 200, "delta": 150, "move": 120, "tag": 6, "container": 40, "remove": 30}
DISK_BYTES = 24 << 20


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        yield registry


@pytest.mark.skipif(bool(reason), reason=reason)
def test_whatever_the_disk_refuses_the_store_is_as_before_or_as_after(tmp_path: Path, registry: FakeRegistry) -> None:
    """The error is ours, what clients see is what the rows say, and when the disk works again so does all."""
    seed = int(os.environ.get("POWERCUT_SEED") or random.randrange(1 << 32))
    print(f"seed {seed}")
    choose = random.Random(seed)
    begun = time.monotonic()
    outcomes: Counter[str] = Counter()
    root = tmp_path / "disk"
    root.mkdir()
    with fuse.recorded(root, tmp_path / "log"), fuse.syncfs_also_said():
        for number in range(FAULTS):
            journey = choose.choice(list(REACH))
            error, times = choose.choice(KINDS)
            after = choose.randrange(REACH[journey])
            what = f"fault {number} of seed {seed}: {errno.errorcode[error]} in {journey} after {after}, {times} times"
            fill_registry(registry)
            outcome = trio.run(one_fault, root, registry, number, journey, (after, error, times), what)
            outcomes[f"{journey} {outcome}"] += 1
    print(f"{FAULTS} faults in {time.monotonic() - begun:.0f} s: {dict(sorted(outcomes.items()))}")


async def one_fault(
    mount: Path, registry: FakeRegistry, number: int, journey: str, fault: tuple[int, int, int], what: str
) -> str:
    root = mount / str(number)
    root.mkdir()
    session = Session(root, registry, watched=False)
    outcome, message = "done", ""
    async with session.open():
        say_syncfs(session.engine)
        await session.pull("1")
        if journey == "delta":
            await session.pull("3")
        before = session.state()
        await trio.to_thread.run_sync(fuse.fail, mount, *fault)
        try:
            await act(session, journey)
        except EngineError as error:
            outcome, message = "refused", error.message
        finally:
            await trio.to_thread.run_sync(fuse.fail, mount, 0, 0, 0)
        if message and fault[1:] == (errno.ENOSPC, ALWAYS):
            # SQLite tells apart only what a write meets: ENOSPC of a sync or a truncation is an I/O error to it.
            words = ("no space left on device", "database: disk I/O error")
            assert message.endswith(words), f"{what}: {message}"
        state = session.state()
        await settle(session.engine)
    after = {} if outcome == "refused" else state
    async with session.open():
        await settle(session.engine)
        assert session.state() == state, f"{what}: clients were shown {state}, the rows say {session.state()}"
        if journey in ("pull", "delta") and outcome == "refused":
            assert state == before, what
        found = inspect(root / "data")
        assert found.violations == [], what
        assert found.state in (state, after), what
        await session.pull("2")
        await settle(session.engine)
        assert inspect(root / "data").violations == [], what
    return outcome


async def act(session: Session, journey: str) -> None:
    if journey == "pull":
        await session.pull("2")
    elif journey == "delta":
        await session.pull("4")
    elif journey == "move":
        session.registry.manifests["team/app", "1"] = session.registry.manifests["team/app", "3"]
        await session.pull("1")
        await settle(session.engine)
    elif journey == "tag":
        await session.tag("1", "local", "1")
    elif journey == "container":
        container = await session.run_container("1", "box")
        await session.remove_container(container)
    else:
        await session.remove(session.name("1"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@trio_test
async def test_a_disk_that_refuses_the_directory_of_a_layer_is_our_error(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        (tmp_path / "data" / "snapshots").rmdir()
        with pytest.raises(SystemFailure) as caught:
            await engine.snapshots.new_directory()
    assert caught.value.message.endswith("no such file or directory")


@trio_test
async def test_staged_bytes_that_cannot_be_deleted_are_only_logged_after_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is there: that is what the client is told."""

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    async with image_engine(tmp_path) as engine:
        content, digest = engine.images.content, sha256_digest(b"x")
        await (await content.open(digest, 10)).aclose()
        monkeypatch.setattr(content_module, "_unlink", refuse)
        with pytest.raises(SystemFailure):
            await content.drop(digest)
        await content.deleted(digest)
    assert content.find(digest) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 24 MiB in a file. The loop device goes with the mount."""
    image, root = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as out:
        out.truncate(DISK_BYTES)
    root.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(root)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop devices here: {done.stderr.strip()}")
    try:
        yield root
    finally:
        syscalls.umount2(root)
        wait = time.monotonic() + 5
        while subprocess.run(["losetup", "-j", str(image)], capture_output=True, check=False).stdout:
            assert time.monotonic() < wait, "the loop device stays"
            time.sleep(0.02)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_small_disk_that_fills_up_anywhere_in_a_pull_is_rolled_back_exactly(
    small_disk: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little by little more is free; the pull is let begin each time, and fits in the end."""
    old = ImageFixture((make_tar([file("old", b"old")]),))
    tars = tuple(make_tar([file(f"zeros{n}", bytes(3 << 20)), file(f"random{n}", os.urandom(1 << 20))]) for n in (1, 2))
    registry.add("team/app", "old", old)
    registry.add("team/app", "new", ImageFixture(tars))
    assert all(len(gzip.compress(tar)) < len(tar) / 3 for tar in tars)
    monkeypatch.setattr(pull_module, "usable_bytes", lambda *_: 1 << 40)
    refused = 0
    filler = small_disk / "filler"

    async def fill_and_pull(free: int) -> bool:
        nonlocal refused
        async with image_engine(small_disk) as engine:
            await pull(engine, f"{registry.host}/team/app:old")
            before = inspect(small_disk / "data").state
            _fill(filler, free)
            message = ""
            try:
                await pull(engine, f"{registry.host}/team/app:new")
            except EngineError as error:
                message = error.message
            finally:
                filler.unlink()
            if not message:
                return True
            refused += 1
            assert message.endswith("no space left on device"), (free, message)
            await settle(engine)
            found = inspect(small_disk / "data")
            assert (found.violations, found.state) == ([], before), free
            return False

    free = 0
    while not trio.run(fill_and_pull, free):
        free += 450_000
        assert free < DISK_BYTES
    print(f"{refused} pulls refused with 0 to {free - 450_000} bytes free, each rolled back; {free} bytes were enough")
    assert refused > 10


def _fill(filler: Path, free: int) -> None:
    """Write until the disk is full, then give so much back."""
    with filler.open("wb", buffering=0) as out:
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while out.write(bytes(size)):
                    pass
        out.truncate(max(0, out.tell() - free))
        os.fsync(out.fileno())
