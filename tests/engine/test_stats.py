from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.core.statsview import BLKIO_KEYS
from balenapy.engine import stats
from balenapy.errors import Conflict, SystemFailure
from tests.engine.process_rig import open_rig
from tests.trio_tests import trio_test

PS = """\
UID        PID  PPID  C STIME TTY          TIME CMD
root         1     0  0 14:00 ?        00:00:01 /sbin/init splash
root        22     1  0 14:00 ?        00:00:00 sh -c  sleep 10
root         -     -  0 14:00 -        00:00:00 -
root        23     1  0 14:00 ?        00:00:00 other
"""


def test_rows_of_the_containers_processes_are_kept_with_their_threads() -> None:
    found = stats.parse_ps(PS, frozenset({22}))

    assert found["Titles"] == ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]
    assert [row[-1] for row in found["Processes"]] == ["sh -c sleep 10", "-"]
    assert found["Processes"][0][:2] == ["root", "22"]


def test_output_without_pids_is_refused() -> None:
    with pytest.raises(SystemFailure, match="Couldn't find PID field in ps output"):
        stats.parse_ps("COMMAND\nsh\n", frozenset({1}))


@pytest.mark.root
@trio_test
async def test_top_and_stats_of_a_running_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "INTERVAL_S", 0.05)
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sh", "-c", "sleep 1000", HostConfig={"Memory": 50 << 20, "PidsLimit": 12})
        with pytest.raises(Conflict, match="is not running"):
            await stats.top(rig.engine, container, "")
        zero = await stats.read_stats(rig.engine, container)
        assert zero["read"] == "0001-01-01T00:00:00Z"
        await rig.supervisors.start(container)
        await trio.sleep(0.1)

        shown = await stats.top(rig.engine, container, "")
        assert [row[-1] for row in shown["Processes"]] == ["sh -c sleep 1000"] or len(shown["Processes"]) == 1
        shown = await stats.top(rig.engine, container, "-o pid,comm")
        assert shown["Titles"] == ["PID", "COMMAND"]
        with pytest.raises(SystemFailure, match='specifying "name=PIDs" is not allowed'):
            await stats.top(rig.engine, container, "-o pid, name=PIDs")
        assert "top" in rig.actions

        sample = await stats.read_stats(rig.engine, container)
        assert sample["pids_stats"] == {"current": 1, "limit": 12}
        assert sample["memory_stats"]["limit"] == 50 << 20
        assert sample["memory_stats"]["usage"] > 0
        assert sample["cpu_stats"]["cpu_usage"]["total_usage"] > 0
        assert sample["precpu_stats"]["system_cpu_usage"] <= sample["cpu_stats"]["system_cpu_usage"]
        assert tuple(sample["blkio_stats"]) == BLKIO_KEYS
        assert sample["name"] == f"/{container.name}"


@pytest.mark.root
@trio_test
async def test_a_stream_of_stats_ends_with_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "INTERVAL_S", 0.05)
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        seen: list[dict[str, Any]] = []

        async def show(shown: dict[str, Any]) -> None:
            await trio.lowlevel.checkpoint()
            seen.append(shown)
            if len(seen) == 3:
                await rig.supervisors.kill(container)
                await rig.settled(container)
            if len(seen) == 5:
                await rig.engine.containers.remove(container.id)

        with trio.fail_after(20):
            await stats.stream_stats(rig.engine, container, show)

        assert len(seen) == 5
        assert seen[0]["preread"] == "0001-01-01T00:00:00Z"
        assert seen[1]["preread"] == seen[0]["read"]
        assert seen[4]["read"] == "0001-01-01T00:00:00Z"
