"""An engine dies and another one finds what it left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from balenapy.core.container import Container, Status
from balenapy.linux import conmon, syscalls
from balenapy.linux.conmon import Bundle
from tests.engine.process_rig import Rig, _end_everything, frames, kill_process, open_engine
from tests.trio_tests import trio_test

pytestmark = pytest.mark.root

COUNT = ("sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.005; done")


@asynccontextmanager
async def _roots(tmp_path: Path) -> AsyncIterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="bpt", dir="/dev/shm") as exec_root:
        try:
            yield tmp_path, Path(exec_root)
        finally:
            with trio.CancelScope(shield=True):
                await _end_everything(tmp_path, Path(exec_root))


def _only(rig: Rig) -> Container:
    (container,) = rig.engine.containers.all()
    return container


@trio_test
async def test_a_running_container_is_adopted_and_loses_no_line(tmp_path: Path) -> None:
    async with _roots(tmp_path) as roots:
        async with open_engine(*roots) as rig:
            container = await rig.run(*COUNT)
            pid = container.state.pid
            await trio.sleep(0.1)
            await rig.logs.flush()
        for _ in range(3):
            await trio.sleep(0.05)
            async with open_engine(*roots) as rig:
                container = _only(rig)
                assert container.state.status is Status.RUNNING
                assert container.state.pid == pid
                await rig.logs.flush()
        async with open_engine(*roots) as rig:
            container = _only(rig)
            _, output = await rig.exec(container, "echo", "still here")
            assert frames(output) == {1: b"still here\n"}
            await rig.supervisors.stop(container, 0)
            assert container.state.exit_code == 137
            lines = frames(await rig.output(container))[1].split()
            assert lines == [b"%d" % number for number in range(len(lines))]
            assert len(lines) > 30
            assert rig.leftovers() == {}


@trio_test
async def test_execs_of_a_killed_engine_leave_no_directory(tmp_path: Path) -> None:
    async with _roots(tmp_path) as roots:
        async with open_engine(*roots) as rig:
            container = await rig.run("sleep", "1000")
            left = rig.execs._root / ("1" * 64)
            left.mkdir(parents=True)
            (left / "process.json").write_text("{}")
        async with open_engine(*roots) as rig:
            assert not left.exists()
            _, output = await rig.exec(_only(rig), "echo", "still here")
            assert frames(output) == {1: b"still here\n"}
            assert container.id == _only(rig).id


@trio_test
async def test_an_exit_that_nobody_saw_has_its_code_and_its_output(tmp_path: Path) -> None:
    async with _roots(tmp_path) as roots:
        async with open_engine(*roots) as rig:
            container = await rig.run("sh", "-c", "echo first; sleep 0.2; echo last; exit 6")
            conmon_pid = container.state.conmon_pid
            handle = conmon.ProcessHandle.open(conmon_pid)
            assert handle is not None
        with handle, trio.fail_after(10):
            await handle.wait()
            # Not reaped: this process is the subreaper still, and a zombie is no container.
        async with open_engine(*roots) as rig:
            container = _only(rig)
            assert container.state.status is Status.EXITED
            assert container.state.exit_code == 6
            assert container.state.finished_ns > container.state.started_ns
            assert frames(await rig.output(container)) == {1: b"first\nlast\n"}
            assert rig.leftovers() == {}
            os.waitpid(conmon_pid, 0)  # noqa: ASYNC222


@trio_test
async def test_policies_say_what_starts_with_the_daemon(tmp_path: Path) -> None:
    async with _roots(tmp_path) as roots:
        async with open_engine(*roots) as rig:
            for name in ("always", "unless-stopped", "no", "on-failure"):
                policy = {"Name": name}
                await rig.run("sleep", "1000", name=f"dies-{name}", HostConfig={"RestartPolicy": policy})
                stopped = await rig.run("sleep", "1000", name=f"stopped-{name}", HostConfig={"RestartPolicy": policy})
                await rig.supervisors.kill(stopped)
                await rig.settled(stopped)
            await rig.create("sleep", "1000", name="never", HostConfig={"RestartPolicy": {"Name": "always"}})
            await rig.run("sleep", "1000", name="gone", HostConfig={"AutoRemove": True})
            states = [c.state for c in rig.engine.containers.all() if c.state.running]
        # As by a reboot: nothing runs and nothing is mounted any more.
        for state in states:
            await kill_process(state.conmon_pid)
            await kill_process(state.pid)
        for point in syscalls.mount_points(roots[1]):
            syscalls.umount2(point)
        async with open_engine(*roots) as rig:
            await rig.supervisors.start_wanted()
            running = sorted(c.name for c in rig.engine.containers.all() if c.state.running)
            assert running == [
                "dies-always",
                "dies-on-failure",
                "dies-unless-stopped",
                "stopped-always",
                "stopped-on-failure",
            ]
            assert "gone" not in [c.name for c in rig.engine.containers.all()]


@trio_test
async def test_a_start_that_was_cut_off_is_cleaned_up(tmp_path: Path) -> None:
    async with _roots(tmp_path) as roots:
        async with open_engine(*roots) as rig:
            container = await rig.run("sleep", "1000")
            # The row as it was before the start was committed.
            container.state.status = Status.CREATED
            container.state.pid = 0
            await rig.engine.containers.store.update_state(container)
        async with open_engine(*roots) as rig:
            container = _only(rig)
            assert container.state.status is Status.CREATED
            assert rig.leftovers() == {}
            await rig.supervisors.start(container)
            assert container.state.status is Status.RUNNING


@trio_test
async def test_what_is_left_of_a_container_without_a_row_is_removed(tmp_path: Path) -> None:
    async with _roots(tmp_path) as roots:
        async with open_engine(*roots) as rig:
            container = await rig.run("sleep", "1000")
            pid = container.state.pid
            await rig.engine.snapshots.remove(
                container.id, also=lambda connection: rig.engine.containers.store.erase(connection, container.id)
            )
        async with open_engine(*roots) as rig:
            assert rig.engine.containers.all() == []
            assert rig.leftovers() == {} or list(rig.leftovers()) == ["cgroups"]
            assert conmon.ProcessHandle.open(pid) is None


@trio_test
async def test_a_reused_pid_is_not_taken_for_the_container(tmp_path: Path) -> None:
    async with _roots(tmp_path) as roots:
        async with open_engine(*roots) as rig:
            container = await rig.run("sleep", "1000")
            pid = container.state.conmon_pid
            container.state.conmon_start_time += 1
            await rig.engine.containers.store.update_state(container)
        async with open_engine(*roots) as rig:
            container = _only(rig)
            assert container.state.status is Status.EXITED
            assert rig.leftovers() == {}
            assert conmon.ProcessHandle.open(pid) is None or Bundle(roots[1]).conmon_pid() is None


@trio_test
async def test_a_paused_container_stays_paused(tmp_path: Path) -> None:
    async with _roots(tmp_path) as roots:
        async with open_engine(*roots) as rig:
            container = await rig.run("sleep", "1000")
            await rig.supervisors.pause(container)
        async with open_engine(*roots) as rig:
            container = _only(rig)
            assert container.state.status is Status.PAUSED
            await rig.supervisors.unpause(container)
            assert container.state.status is Status.RUNNING
            await rig.supervisors.kill(container)
            await rig.settled(container)
