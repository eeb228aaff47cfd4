from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import trio

from balenapy.errors import SystemFailure
from balenapy.linux.process import ProcessHandle, child_pids, command_line, run_tool, start_time
from tests.trio_tests import trio_test


@trio_test
async def test_a_tool_gets_its_input_and_returns_its_output() -> None:
    data = b"x" * 300_000  # more than a pipe holds
    outcome = await run_tool(["cat"], input=data)

    assert outcome.code == 0
    assert outcome.stdout == data


@trio_test
async def test_a_tool_that_fails_says_why() -> None:
    with pytest.raises(SystemFailure, match="sh: exit status 3: no luck"):
        await run_tool(["sh", "-c", "echo no luck >&2; exit 3"])

    outcome = await run_tool(["sh", "-c", "exit 3"], check=False)
    assert outcome.code == 3


@trio_test
async def test_a_program_that_is_not_there_is_a_system_failure() -> None:
    with pytest.raises(SystemFailure, match="cannot run /nonexistent: No such file or directory"):
        await run_tool(["/nonexistent"])


@trio_test
async def test_a_tool_that_prints_without_end_is_killed() -> None:
    with pytest.raises(SystemFailure, match="printed more than 100000 bytes"):
        await run_tool(["yes"], max_output_bytes=100_000)


@trio_test
async def test_cancelling_kills_and_reaps() -> None:
    before = len(os.listdir("/proc/self/fd")), child_pids(os.getpid())
    with trio.move_on_after(0.05) as scope:
        await run_tool(["sleep", "1000"])

    assert scope.cancelled_caught
    assert (len(os.listdir("/proc/self/fd")), child_pids(os.getpid())) == before


@trio_test
async def test_a_handle_waits_and_tells_the_exit_code_of_a_child() -> None:
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 5"], os.environ)  # noqa: ASYNC221
    handle = ProcessHandle.open(pid)
    assert handle is not None
    with handle:
        await handle.wait()

        assert handle.ended
        assert handle.reap() == 5
        assert handle.reap() is None
        assert not handle.send_signal(signal.SIGTERM)


def test_a_handle_is_refused_when_the_pid_belongs_to_another_process() -> None:
    with subprocess.Popen(["sleep", "1000"]) as child:
        started = start_time(child.pid)
        assert started is not None
        assert ProcessHandle.open(child.pid, started + 1) is None
        handle = ProcessHandle.open(child.pid, started)
        assert handle is not None
        assert not handle.ended
        handle.send_signal(signal.SIGKILL)
        child.wait()
        assert handle.ended
        handle.close()
    assert start_time(child.pid) is None
    assert ProcessHandle.open(child.pid) is None


def test_start_time_of_ourselves_is_in_the_past() -> None:
    ours = start_time(os.getpid())
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        theirs = start_time(child.pid)
    assert ours is not None and theirs is not None
    assert 0 < ours <= theirs


def test_arguments_and_children_of_a_process_are_told() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(b"x")
            child.stdin.flush()
            child.stdout.read(1)  # it runs: just after exec the kernel does not know its arguments yet
            assert child.pid in child_pids(os.getpid())
            assert command_line(child.pid) == ["cat"]
        finally:
            child.kill()
    assert command_line(child.pid) == []
    assert child_pids(child.pid) == []
