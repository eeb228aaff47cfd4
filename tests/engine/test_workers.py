"""Workers: fed, drained, bounded in number, and never left behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from balenapy.core.membudget import WORKERS_MAX, limits_for
from balenapy.engine.workers import Workers
from balenapy.errors import Conflict, InvalidParameter, NotFound, SystemFailure, Unavailable
from balenapy.linux.cgroups import Cgroups
from tests.core import tars
from tests.trio_tests import trio_test

pytestmark = pytest.mark.root

TAR = tars.directory(b"d") + tars.file(b"d/f", b"hello") + tars.END


CGROUP = f"bptest-{os.getpid()}"  # of this process: several may run


def make_workers(cgroup: str = CGROUP) -> Workers:
    limits = limits_for(0, 4 << 30, 2)
    return Workers(cast(Any, SimpleNamespace(config=SimpleNamespace(cgroup_parent=cgroup), limits=limits)))


@pytest.fixture(autouse=True)
def no_cgroup_stays() -> Iterator[None]:
    yield
    hierarchy = Cgroups.read().controller_mount("memory")
    if hierarchy is not None and (parent := hierarchy.mount / CGROUP).exists():
        assert list(parent.glob("*/")) == []
        parent.rmdir()


def children() -> list[int]:
    """Our workers. The suite has other children that are none of ours: a registry, an engine."""
    pids: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            for pid in map(int, (task / "children").read_text().split()):
                if b"balenapy.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    pids.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return pids


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def until_one_child() -> int:
    with trio.fail_after(10):
        while not (pids := children()):  # noqa: ASYNC110 (the kernel has no trio.Event)
            await trio.sleep(0.01)
    return pids[0]


@trio_test
async def test_a_fed_worker_gives_its_report_and_leaves_nothing_open(tmp_path: Path) -> None:
    async def feed(stdin: trio.abc.SendStream) -> None:
        for at in range(0, len(TAR), 100):
            await stdin.send_all(TAR[at : at + 100])

    workers = make_workers()
    before = descriptors()
    report = await workers.run("unpack", {"directory": str(tmp_path)}, feed=feed)

    assert report["diff_id"] == f"sha256:{hashlib.sha256(TAR).hexdigest()}"
    assert (tmp_path / "diff/d/f").read_text() == "hello"
    assert descriptors() == before
    assert children() == []


@trio_test
async def test_what_a_worker_puts_out_is_drained_to_its_end(tmp_path: Path) -> None:
    received = bytearray()

    async def feed(stdin: trio.abc.SendStream) -> None:
        await stdin.send_all(TAR)

    async def drain(output: trio.abc.ReceiveStream) -> None:
        async for data in output:
            received.extend(data)

    workers = make_workers()
    before = descriptors()
    await workers.run("unpack", {"directory": str(tmp_path)}, feed=feed)
    report = await workers.run("pack", {"directory": str(tmp_path)}, drain=drain)

    assert bytes(received) == TAR
    assert report["size"] == len(TAR)
    assert descriptors() == before


@trio_test
async def test_errors_arrive_as_their_kind(tmp_path: Path) -> None:
    (tmp_path / "diff").mkdir()
    (tmp_path / "diff/x").touch()
    workers = make_workers()

    with pytest.raises(Conflict, match="is not empty"):
        await workers.run("unpack", {"directory": str(tmp_path)})
    with pytest.raises(InvalidParameter, match="absolute path"):
        await workers.run("unpack", {})
    with pytest.raises(NotFound, match="source /no"):
        await workers.run(
            "copy",
            {
                "source_root": str(tmp_path),
                "source": "/no",
                "destination_root": str(tmp_path),
                "destination": "/",
            },
        )


@trio_test
async def test_a_worker_that_ends_early_ends_its_feed_and_says_why(tmp_path: Path) -> None:
    """The feed sees no broken pipe: it is cancelled, and the report is what is raised."""
    ended = "never"

    async def feed(stdin: trio.abc.SendStream) -> None:
        nonlocal ended
        try:
            while True:
                await stdin.send_all(b"no tar at all " * 1000)
        except trio.Cancelled:
            ended = "cancelled"
            raise

    with pytest.raises(InvalidParameter, match="invalid tar header"):
        await make_workers().run("unpack", {"directory": str(tmp_path)}, feed=feed)
    assert ended == "cancelled"


@trio_test
async def test_an_error_of_the_feed_or_drain_kills_the_worker_and_is_raised_as_it_is(tmp_path: Path) -> None:
    async def lose_connection(stdin: trio.abc.SendStream) -> None:
        await stdin.send_all(TAR[:100])
        raise Unavailable("connection reset by peer")

    async def lose_client(output: trio.abc.ReceiveStream) -> None:
        raise trio.BrokenResourceError("client is gone")

    workers = make_workers()
    with pytest.raises(Unavailable, match="connection reset by peer"):
        await workers.run("unpack", {"directory": str(tmp_path)}, feed=lose_connection)
    with pytest.raises(trio.BrokenResourceError, match="client is gone"):
        await workers.run("pack", {"directory": str(tmp_path), "fresh": True}, drain=lose_client)
    assert children() == []


@trio_test
async def test_cancelling_kills_and_reaps(tmp_path: Path) -> None:
    workers = make_workers()
    before = descriptors()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: workers.run("unpack", {"directory": str(tmp_path)}, feed=starve))
        pid = await until_one_child()
        nursery.cancel_scope.cancel()

    assert not is_alive(pid)
    assert descriptors() == before


async def starve(stdin: trio.abc.SendStream) -> None:
    """A feed from a network that has stalled."""
    await stdin.send_all(TAR[:600])
    await trio.sleep_forever()


@trio_test
async def test_a_worker_that_is_killed_is_a_system_failure(tmp_path: Path) -> None:
    workers = make_workers()

    async def kill() -> None:
        os.kill(await until_one_child(), signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        with pytest.raises(SystemFailure, match="worker unpack was killed by signal 9"):
            await workers.run("unpack", {"directory": str(tmp_path)}, feed=starve)


@trio_test
async def test_two_at_once_and_downloads_do_not_keep_others_waiting(tmp_path: Path) -> None:
    workers = make_workers()
    for number in range(WORKERS_MAX + 2):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").touch()
    (tmp_path / "destination").mkdir()
    async with trio.open_nursery() as nursery:
        for number in range(WORKERS_MAX + 2):
            nursery.start_soon(
                lambda n=number: workers.run("unpack", {"directory": str(tmp_path / str(n))}, feed=starve)
            )
        await until_one_child()
        await trio.testing.wait_all_tasks_blocked()
        running = len(children())

        report = await workers.run(
            "copy",
            {"source_root": str(tmp_path), "source": "/source", "destination_root": str(tmp_path / "destination"),
             "destination": "/"},
        )  # fmt: skip
        nursery.cancel_scope.cancel()

    assert running <= WORKERS_MAX
    assert report["entries"] == 1
    assert children() == []


@trio_test
async def test_a_worker_has_bounds_of_its_own(tmp_path: Path) -> None:
    workers = make_workers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: workers.run("unpack", {"directory": str(tmp_path)}, feed=starve))
        pid = await until_one_child()
        with trio.fail_after(10):
            while not diff_exists(tmp_path):  # noqa: ASYNC110 (the process has set its bounds by then)
                await trio.sleep(0.01)
            while os.readlink(f"/proc/{pid}/root") == "/":  # noqa: ASYNC110
                await trio.sleep(0.01)
            while os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):  # noqa: ASYNC110
                await trio.sleep(0.01)
        limits, cgroups, nice = (read_proc(pid, name) for name in ("limits", "cgroup", "stat"))
        root = os.readlink(f"/proc/{pid}/root")
        nursery.cancel_scope.cancel()

    data = next(line.split() for line in limits.splitlines() if line.startswith("Max data size"))
    assert 96 << 20 <= int(data[3]) <= 384 << 20
    assert int(nice.rpartition(")")[2].split()[16]) == 10
    assert root == str(tmp_path / "diff")
    if Cgroups.read().has("memory"):
        assert f"/{CGROUP}/balenapy-worker-" in cgroups


def diff_exists(directory: Path) -> bool:
    return (directory / "diff").exists()


def read_proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def test_without_a_memory_cgroup_workers_run_all_the_same(tmp_path: Path) -> None:
    async def main() -> dict[str, Any]:
        workers = make_workers()
        workers._memory.parent = Path("/proc/no/such")
        return await workers.run("pack", {"directory": str(tmp_path), "fresh": True})

    (tmp_path / "diff").mkdir()
    assert trio.run(main)["entries"] == 0


def test_a_worker_does_not_outlive_the_daemon(tmp_path: Path) -> None:
    program = f"""
import trio
from tests.engine.test_workers import make_workers, starve, until_one_child
async def main():
    async with trio.open_nursery() as nursery:
        arguments = {{"directory": {str(tmp_path)!r}}}
        nursery.start_soon(lambda: make_workers({CGROUP!r}).run("unpack", arguments, feed=starve))
        print(await until_one_child(), flush=True)
trio.run(main)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=os.getcwd()) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        deadline = time.monotonic() + 10
        while not (tmp_path / "diff").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert Path(f"/proc/{pid}").exists()
        daemon.kill()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # an engine of another test may have made this process the subreaper
        time.sleep(0.01)

    assert not Path(f"/proc/{pid}").exists()
    make_workers()  # the next daemon removes the cgroup that this one could not


def test_the_daemon_imports_no_codec() -> None:
    """What a worker needs costs the daemon nothing."""
    heavy = "tarfile zstandard bsdiff4 balenapy.worker"
    program = f"import sys, balenapy.engine.workers; print([m for m in {heavy.split()!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout

    assert loaded.strip() == "[]"
