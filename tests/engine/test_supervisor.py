"""Containers that really run: start, exit, stop, kill, restart policies, pause, and what is left afterwards."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.core.container import Container, Status
from balenapy.errors import Conflict, InvalidParameter, NotModified, SystemFailure
from tests.engine.process_rig import Rig, frames, kill_process, open_rig
from tests.trio_tests import trio_test

pytestmark = pytest.mark.root

TRAP = ("sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.02; done")


async def _until(condition: Callable[[], bool], seconds: float = 10) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  (real processes)
            await trio.sleep(0.01)


@trio_test
async def test_a_run_goes_through_its_events_and_leaves_nothing(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sh", "-c", "echo hello; exit 7")
        assert container.state.status is Status.CREATED
        waiting = rig.supervisors.wait(container, "next-exit")

        await rig.supervisors.start(container)
        assert container.state.ever_started
        code, error = await waiting.result()
        await rig.settled(container)

        assert (code, error) == (7, "")
        assert container.state.status is Status.EXITED
        assert container.state.exit_code == 7
        assert container.state.pid == 0
        assert container.state.started_ns <= container.state.finished_ns
        assert rig.actions == ["create", "connect", "start", "die", "disconnect"]
        assert rig.event("die").attributes["exitCode"] == "7"
        assert frames(await rig.output(container)) == {1: b"hello\n"}
        assert rig.leftovers() == {}


@trio_test
async def test_a_container_can_run_again_and_its_log_goes_on(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sh", "-c", "echo run; exit 1")
        for _ in range(3):
            await rig.supervisors.start(container)
            assert await rig.wait(container) == 1
        await rig.settled(container)

        assert frames(await rig.output(container)) == {1: b"run\nrun\nrun\n"}
        assert container.state.restart_count == 0


@trio_test
async def test_starting_what_runs_is_not_modified(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")

        with pytest.raises(NotModified):
            await rig.supervisors.start(container)
        await rig.supervisors.kill(container)
        with pytest.raises(NotModified):
            await rig.supervisors.stop(container)


@trio_test
async def test_two_starts_at_once_make_one_run(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sleep", "1000")
        outcomes: list[str] = []

        async def start() -> None:
            try:
                await rig.supervisors.start(container)
                outcomes.append("started")
            except NotModified:
                outcomes.append("running")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            nursery.start_soon(start)

        assert sorted(outcomes) == ["running", "started"]
        assert rig.actions.count("start") == 1


@trio_test
async def test_a_client_that_leaves_does_not_stop_a_start(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sleep", "1000")
        with trio.move_on_after(0.005) as scope:
            await rig.supervisors.start(container)

        assert scope.cancelled_caught
        await _until(lambda: container.state.status is Status.RUNNING)


@pytest.mark.parametrize(
    ("command", "code", "kind", "text"),
    [
        (("nosuch",), 127, InvalidParameter, 'exec: "nosuch": executable file not found in $PATH'),
        (("/bin/nosuch",), 127, InvalidParameter, "no such file or directory"),
        (("/etc/passwd",), 126, InvalidParameter, "permission denied"),
    ],
)
@trio_test
async def test_a_command_that_cannot_run_has_its_code_and_leaves_nothing(
    tmp_path: Path, command: tuple[str, ...], code: int, kind: type[Exception], text: str
) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create(*command)
        with pytest.raises(kind, match=text.replace("$", r"\$").replace("[", r"\[")):
            await rig.supervisors.start(container)

        assert container.state.status is Status.CREATED
        assert container.state.exit_code == code
        assert text in container.state.error
        assert container.state.error.startswith("OCI runtime create failed: ")
        assert rig.actions == ["create", "connect", "disconnect"]
        assert rig.leftovers() == {}


@trio_test
async def test_any_other_failure_of_a_start_is_128_and_undone(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("true", User="nobody-here")
        with pytest.raises(SystemFailure, match="unable to find user nobody-here"):
            await rig.supervisors.start(container)
        assert container.state.exit_code == 128

        other = await rig.create("true")
        rig.networks.error = Conflict("port is already allocated")
        with pytest.raises(Conflict, match="port is already allocated"):
            await rig.supervisors.start(other)
        assert other.state.exit_code == 128
        assert rig.leftovers() == {}


@trio_test
async def test_a_failed_start_of_an_auto_remove_container_removes_it(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("nosuch", HostConfig={"AutoRemove": True})
        removed = rig.supervisors.wait(container, "removed")
        with pytest.raises(InvalidParameter):
            await rig.supervisors.start(container)

        with trio.fail_after(10):
            assert await removed.result() == (127, "")
        assert rig.engine.containers.all() == []


@trio_test
async def test_auto_remove_tells_the_exit_code_to_who_waits_for_the_removal(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sh", "-c", "exit 9", HostConfig={"AutoRemove": True})
        removed = rig.supervisors.wait(container, "removed")
        await rig.supervisors.start(container)

        with trio.fail_after(10):
            assert await removed.result() == (9, "")
        await _until(lambda: "destroy" in rig.actions)
        assert rig.actions == ["create", "connect", "start", "die", "disconnect", "destroy"]
        assert rig.leftovers() == {}
        assert not (rig.engine.config.data_root / "containers" / container.id).exists()


@trio_test
async def test_wait_answers_at_once_for_what_does_not_run(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("true")
        assert await rig.wait(container) == 0
        assert await rig.wait(container, "anything") == 0
        with trio.move_on_after(0.05) as scope:
            await rig.supervisors.wait(container, "next-exit").result()
        assert scope.cancelled_caught
        rig.supervisors._waiters.clear()


@trio_test
async def test_stop_sends_the_stop_signal_and_returns_after_cleaning_up(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run(*TRAP)
        await trio.sleep(0.1)
        await rig.supervisors.stop(container)

        assert container.state.exit_code == 3
        assert rig.actions[2:] == ["start", "kill", "die", "disconnect", "stop"]
        assert rig.event("kill").attributes["signal"] == "15"
        assert rig.leftovers() == {}


@trio_test
async def test_stop_kills_what_does_not_obey(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000", StopSignal="SIGUSR1")
        await rig.supervisors.stop(container, 0)

        assert container.state.exit_code == 137
        signals = [event.attributes["signal"] for event in rig.events if event.action == "kill"]
        assert signals == ["10", "9"]


@trio_test
async def test_init_makes_a_program_without_handlers_obey(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000", HostConfig={"Init": True})
        await trio.sleep(0.2)
        await rig.supervisors.stop(container, 10)

        assert container.state.exit_code == 143


@trio_test
async def test_kill_with_another_signal_returns_at_once_and_the_process_gets_it(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        script = "trap 'echo got; exit 5' USR1; while :; do sleep 0.02; done"
        container = await rig.run("sh", "-c", script)
        await trio.sleep(0.1)
        await rig.supervisors.kill(container, 10)

        assert await rig.wait(container) == 5
        await rig.settled(container)
        assert frames(await rig.output(container)) == {1: b"got\n"}
        with pytest.raises(Conflict, match="is not running"):
            await rig.supervisors.kill(container, 10)
        with pytest.raises(Conflict, match="is not running"):
            await rig.supervisors.kill(container)


@trio_test
async def test_pause_freezes_and_stop_works_on_what_is_paused(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run(*TRAP)
        await rig.supervisors.pause(container)
        assert container.state.status is Status.PAUSED
        with pytest.raises(Conflict, match="is already paused"):
            await rig.supervisors.pause(container)
        with pytest.raises(Conflict, match="cannot start a paused container"):
            await rig.supervisors.start(container)
        await rig.supervisors.unpause(container)
        assert container.state.status is Status.RUNNING
        with pytest.raises(SystemFailure, match="is not paused"):
            await rig.supervisors.unpause(container)

        await rig.supervisors.pause(container)
        await rig.supervisors.stop(container, 5)
        assert container.state.exit_code == 3
        assert "pause" in rig.actions and "unpause" in rig.actions


@trio_test
async def test_restart_keeps_auto_remove_from_firing(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run(*TRAP, HostConfig={"AutoRemove": True})
        first = container.state.pid
        await trio.sleep(0.1)
        await rig.supervisors.restart(container, 5)

        assert container.state.status is Status.RUNNING
        assert container.state.pid != first
        assert rig.actions[2:] == ["start", "kill", "die", "disconnect", "stop", "connect", "start", "restart"]
        assert container.state.restart_count == 0


@trio_test
async def test_a_policy_restarts_with_growing_delay_until_its_count(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        policy = {"Name": "on-failure", "MaximumRetryCount": 2}
        container = await rig.run("false", HostConfig={"RestartPolicy": policy})
        started = time.monotonic()
        await _until(lambda: container.state.status is Status.EXITED)

        assert time.monotonic() - started > 0.3 - 0.1  # 0.1 and 0.2
        assert container.state.restart_count == 2
        assert rig.actions.count("start") == 3
        assert rig.actions.count("die") == 3


@trio_test
async def test_waiters_are_told_when_a_policy_restarts(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sh", "-c", "exit 4", HostConfig={"RestartPolicy": {"Name": "always"}})
        assert await rig.wait(container, "next-exit") == 4


@trio_test
async def test_stop_cancels_a_restart_that_waits(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("false", HostConfig={"RestartPolicy": {"Name": "always"}})
        await _until(lambda: container.state.status is Status.RESTARTING and container.state.restart_count >= 3)
        assert container.state.pid == 0
        with pytest.raises(Conflict, match="is restarting, wait until the container is running"):
            rig.supervisors.run_of(container)
        await rig.supervisors.stop(container)

        assert container.state.status is Status.EXITED
        assert container.state.exit_code == 1
        count = container.state.restart_count
        await trio.sleep(0.3)
        assert container.state.restart_count == count
        assert rig.leftovers() == {}


@trio_test
async def test_stop_while_a_restart_is_made_leaves_it_as_its_last_run_did(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        begin_run = rig.supervisors.attachments.begin_run
        stopped = trio.Event()

        async def stop() -> None:
            await rig.supervisors.stop(container)
            stopped.set()

        async def begin_run_and_stop(*arguments: Any) -> None:
            await begin_run(*arguments)
            if container.state.restart_count == 1:
                rig.engine.nursery.start_soon(stop)
                await rig.supervisors._active[container.id].cancelled.wait()

        container = await rig.create("true", HostConfig={"RestartPolicy": {"Name": "always"}})
        rig.supervisors.attachments.begin_run = begin_run_and_stop  # type: ignore[assignment,method-assign]
        await rig.supervisors.start(container)
        with trio.fail_after(10):
            await stopped.wait()
        await rig.settled(container)

        state = container.state
        assert (state.status, state.exit_code, state.error) == (Status.EXITED, 0, "")
        assert rig.leftovers() == {}


@trio_test
async def test_a_signal_before_the_start_is_told_is_the_only_one(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sh", "-c", "trap 'exit 6' INT; while :; do sleep 0.05; done")
        store = rig.engine.containers.store
        update_state = store.update_state

        async def update_state_and_interrupt(record: Container) -> None:
            if container.state.running:
                await trio.sleep(0.3)  # the shell sets its trap
                await rig.supervisors.kill(container, signal.SIGINT)
            await update_state(record)

        store.update_state = update_state_and_interrupt  # type: ignore[assignment,method-assign]
        await rig.supervisors.start(container)

        assert await rig.wait(container) == 6


@trio_test
async def test_a_kill_cancels_the_policy_of_always(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000", HostConfig={"RestartPolicy": {"Name": "always"}})
        await rig.supervisors.kill(container)
        await rig.settled(container)

        assert container.state.status is Status.EXITED
        assert container.state.manually_stopped


@trio_test
async def test_an_oom_kill_is_seen_at_exit_and_as_an_event(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run(
            "dd", "if=/dev/zero", "of=/dev/null", "bs=64M", HostConfig={"Memory": 20_000_000}
        )
        assert await rig.wait(container) == 137
        await rig.settled(container)

        assert container.state.oom_killed
        await _until(lambda: "oom" in rig.actions)


@trio_test
async def test_a_killed_conmon_takes_its_container_with_it(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        await kill_process(container.state.conmon_pid)

        assert await rig.wait(container) == 137
        await rig.settled(container)
        assert rig.leftovers() == {}


@trio_test
async def test_removing_by_force_ends_whatever_its_policy_says(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000", HostConfig={"RestartPolicy": {"Name": "always"}})
        removed = rig.supervisors.wait(container, "removed")
        await rig.engine.containers.remove(container.id, force=True)

        assert await removed.result() == (137, "")
        assert rig.leftovers() == {}


@trio_test
async def test_removing_by_force_waits_for_a_start_under_way(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sleep", "1000")
        begin_run = rig.supervisors.attachments.begin_run
        begun = trio.Event()

        async def begin_run_and_tell(*arguments: Any) -> None:
            begun.set()
            await begin_run(*arguments)

        rig.supervisors.attachments.begin_run = begin_run_and_tell  # type: ignore[assignment,method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.supervisors.start, container)
            await begun.wait()
            await rig.engine.containers.remove(container.id, force=True)

        assert rig.engine.containers.all() == []
        assert rig.leftovers() == {}


@trio_test
async def test_ten_containers_at_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        containers = [await rig.create("sh", "-c", f"exit {n}") for n in range(10)]

        async def cycle(rig: Rig, number: int) -> None:
            await rig.supervisors.start(containers[number])
            assert await rig.wait(containers[number]) == number

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(cycle, rig, number)
        for container in containers:
            await rig.settled(container)
        assert rig.leftovers() == {}
