"""Further processes in real containers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from balenapy.core.container import Container
from balenapy.core.execconfig import ExecConfig
from balenapy.core.wire import MalformedJSON, decode
from balenapy.errors import Conflict, InvalidParameter, NotFound, SystemFailure
from tests.engine.process_rig import Rig, frames, open_rig
from tests.trio_tests import trio_test

pytestmark = pytest.mark.root


async def _ended(rig: Rig, exec_id: str) -> dict[str, Any]:
    with trio.fail_after(20):
        await rig.execs.find(exec_id).ended.wait()
    return rig.execs.inspect(exec_id)


def _config(*command: str, **fields: Any) -> ExecConfig:
    return ExecConfig(cmd=list(command), **fields)


@trio_test
async def test_an_exec_has_output_exit_code_and_events(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        exec_id, output = await rig.exec(container, "sh", "-c", "echo out; echo err >&2; exit 3")

        assert frames(output) == {1: b"out\n", 2: b"err\n"}
        shown = rig.execs.inspect(exec_id)
        assert shown["Running"] is False
        assert shown["ExitCode"] == 3
        assert shown["Pid"] > 0
        assert shown["ProcessConfig"] == {
            "tty": False,
            "entrypoint": "sh",
            "arguments": ["-c", "echo out; echo err >&2; exit 3"],
            "privileged": False,
        }
        assert rig.actions[-3:] == [
            "exec_create: sh -c echo out; echo err >&2; exit 3",
            "exec_start: sh -c echo out; echo err >&2; exit 3",
            "exec_die",
        ]
        assert rig.event("exec_die").attributes["exitCode"] == "3"
        assert rig.execs.ids_of(container) is None
        assert "execs" not in rig.leftovers()


@trio_test
async def test_inspect_shows_the_user_of_the_container_and_the_keys_in_base64(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000", User="7")
        exec_id, _ = await rig.exec(container, "true")
        assert rig.execs.inspect(exec_id)["ProcessConfig"]["user"] == "7"
        assert rig.execs.inspect(exec_id)["DetachKeys"] == ""

        exec_id, _ = await rig.exec(container, "true", user="8", detach_keys="ctrl-a")
        assert rig.execs.inspect(exec_id)["ProcessConfig"]["user"] == "8"
        assert rig.execs.inspect(exec_id)["DetachKeys"] == "AQ=="


def test_a_command_is_a_list() -> None:
    with pytest.raises(MalformedJSON, match=r"ExecConfig.Cmd of type \[\]string"):
        decode(ExecConfig, {"Cmd": "ls"})


@trio_test
async def test_stdin_reaches_the_process_and_its_end_too(tmp_path: Path) -> None:
    data = bytes(range(256)) * 3000
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        _, output = await rig.exec(container, "sh", "-c", "cat; echo end", stdin=data, attach_stdin=True)

        assert frames(output) == {1: data + b"end\n"}


@trio_test
async def test_a_terminal_of_an_exec_can_be_resized(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        script = "tty; read x; stty size; echo $TERM"
        created = rig.execs.create(container, _config("sh", "-c", script, tty=True, attach_stdin=True,
                                                      attach_stdout=True), "c")  # fmt: skip
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await rig.execs.serve(rig.execs.check_start(created.id), theirs, tty=True)
                await theirs.aclose()

            nursery.start_soon(serve)
            with trio.fail_after(20):
                await rig.execs.resize(created.id, 44, 99)
                await ours.send_all(b"\n")
                text = b"".join([bytes(chunk) async for chunk in ours])

        assert b"/dev/pts/0\r\n" in text
        assert b"44 99\r\n" in text
        assert b"xterm\r\n" in text
        with pytest.raises(NotFound, match="no such exec"):
            await rig.execs.resize(created.id, 1, 1)


@trio_test
async def test_detach_keys_end_the_attach_of_an_exec(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        config = _config("cat", tty=True, attach_stdin=True, attach_stdout=True, detach_keys="a,b")
        created = rig.execs.create(container, config, "c")
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await rig.execs.serve(rig.execs.check_start(created.id), theirs, tty=True)
                await theirs.aclose()

            nursery.start_soon(serve)
            with trio.fail_after(20):
                await ours.send_all(b"ab")
                text = b"".join([bytes(chunk) async for chunk in ours])

        assert text.endswith(b"exec attach failed: error on attach stdin: read escape sequence\r\n")
        assert created.running
        assert rig.execs.ids_of(container) == [created.id]
        await rig.supervisors.kill(container)  # who ends without reaping it would keep the container alive
        await _ended(rig, created.id)


@trio_test
async def test_a_detached_exec_runs_on(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        created = rig.execs.create(container, _config("sh", "-c", "sleep 0.2; exit 8"), "c")
        await rig.execs.start_detached(created.id)
        assert rig.execs.inspect(created.id)["Running"]
        with pytest.raises(Conflict, match=f"Error: Exec command {created.id} is already running"):
            rig.execs.check_start(created.id)

        assert (await _ended(rig, created.id))["ExitCode"] == 8
        with pytest.raises(Conflict, match=f"Error: Exec command {created.id} has already run"):
            rig.execs.check_start(created.id)


@trio_test
async def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        text = 'exec: "nosuch": executable file not found in $PATH'
        exec_id, output = await rig.exec(container, "nosuch")
        message = frames(output)[1].decode()
        assert text in message
        assert message.startswith("OCI runtime exec failed: ")
        assert message.endswith("\r\n")
        assert rig.execs.inspect(exec_id)["ExitCode"] == 126

        created = rig.execs.create(container, _config("nosuch"), "c")
        with pytest.raises(InvalidParameter, match="executable file not found"):
            await rig.execs.start_detached(created.id)
        assert rig.execs.inspect(created.id)["ExitCode"] == 126
        assert "exec_die" not in rig.actions


@trio_test
async def test_user_environment_and_directory_are_those_asked_for(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000", Env=["A=1", "B=2"], WorkingDir="/tmp")
        _, output = await rig.exec(
            container, "sh", "-c", "id -u; pwd; echo $A $B $C", user="user", working_dir="/etc", env=["B=3", "C=4"]
        )
        assert frames(output)[1] == b"1000\n/etc\n1 3 4\n"
        _, output = await rig.exec(container, "pwd")
        assert frames(output)[1] == b"/tmp\n"
        _, output = await rig.exec(container, "true", user="nobody-here")
        assert b"unable to find user nobody-here" in output


@trio_test
async def test_execs_die_with_their_container(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        created = rig.execs.create(container, _config("sleep", "1000"), "c")
        await rig.execs.start_detached(created.id)
        await rig.supervisors.kill(container)

        assert (await _ended(rig, created.id))["ExitCode"] == 137
        await rig.settled(container)
        await rig.engine.containers.remove(container.id)
        with pytest.raises(NotFound, match=f"No such exec instance: {created.id}"):
            rig.execs.find(created.id)


@trio_test
async def test_what_an_exec_leaves_behind_does_not_hold_its_end_up(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        with trio.fail_after(10):
            _, output = await rig.exec(container, "sh", "-c", "sleep 1000 & echo done")
        assert frames(output) == {1: b"done\n"}


@trio_test
async def test_states_that_allow_no_exec(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container: Container = await rig.create("sleep", "1000")
        with pytest.raises(Conflict, match="is not running"):
            rig.execs.create(container, _config("true"), "name")
        await rig.supervisors.start(container)
        with pytest.raises(SystemFailure, match=r"Invalid escape keys \(zz\) provided"):
            rig.execs.create(container, _config("true", detach_keys="zz"), "name")
        created = rig.execs.create(container, _config("true"), "name")
        await rig.supervisors.pause(container)
        with pytest.raises(Conflict, match="Container name is paused, unpause the container before exec"):
            rig.execs.create(container, _config("true"), "name")
        with pytest.raises(Conflict, match="is paused"):
            rig.execs.check_start(created.id)
        await rig.supervisors.unpause(container)


@trio_test
async def test_many_execs_at_once_leave_no_descriptor(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        await rig.exec(container, "true")
        before = len(os.listdir("/proc/self/fd"))

        async def one() -> None:
            _, output = await rig.exec(container, "echo", "x")
            assert frames(output) == {1: b"x\n"}

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one)
        assert len(os.listdir("/proc/self/fd")) == before
