from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import trio

from balenapy.linux.cgroups import CGROUP_ROOT, Cgroups, Hierarchy, Mode, parse_blkio, parse_keyed
from tests.trio_tests import trio_test

HYBRID = """\
30 23 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
33 30 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct
34 30 0:32 / /sys/fs/cgroup/memory rw,nosuid shared:16 - cgroup cgroup rw,memory
35 23 0:33 / /var/lib/lxc/cgroup rw shared:17 - cgroup cgroup rw,pids
"""
UNIFIED = "31 30 0:27 / /sys/fs/cgroup rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate\n"
LEGACY = "34 30 0:32 / /sys/fs/cgroup/memory rw,nosuid shared:16 - cgroup cgroup rw,memory\n"


def test_the_layout_is_read_from_the_mounts() -> None:
    hybrid = Cgroups.read(mountinfo=HYBRID)
    assert (hybrid.mode, hybrid.version) == (Mode.HYBRID, 1)
    assert hybrid.controllers >= {"cpu", "cpuacct", "memory"}
    assert not hybrid.has("pids")
    assert hybrid.at("/docker/x").directory("cpuacct") == CGROUP_ROOT / "cpu,cpuacct/docker/x"
    assert len(hybrid.at("docker/x").directories()) == 4

    unified = Cgroups.read(mountinfo=UNIFIED)
    assert (unified.mode, unified.version) == (Mode.UNIFIED, 2)
    legacy = Cgroups.read(mountinfo=LEGACY)
    assert (legacy.mode, legacy.version) == (Mode.LEGACY, 1)


@pytest.mark.parametrize(
    ("path", "relative"),
    [
        ("system.slice:docker:abc", "system.slice/docker-abc.scope"),
        ("a-b-c.slice:docker:abc", "a.slice/a-b.slice/a-b-c.slice/docker-abc.scope"),
        ("-.slice:docker:abc", "docker-abc.scope"),
    ],
)
def test_the_systemd_driver_means_a_scope_below_its_slices(path: str, relative: str) -> None:
    assert Cgroups.read("systemd", LEGACY).of_spec(path).relative == relative


@pytest.mark.parametrize("path", ["", "/", "..", "/docker/../..", "a/../b"])
def test_the_root_is_never_a_containers_cgroup(path: str) -> None:
    with pytest.raises(ValueError, match="not a container's cgroup"):
        Cgroups.read(mountinfo=LEGACY).at(path)


def test_files_that_do_not_exist_read_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "memory.max").write_text("max\n")
    (tmp_path / "x" / "memory.events").write_text("low 0\nhigh 0\nmax 4\noom 2\noom_kill 2\n")
    cgroups = Cgroups(Mode.UNIFIED, (Hierarchy(tmp_path, 2, frozenset({"memory"})),))
    cgroup = cgroups.at("x")

    assert cgroup.read_number("memory", "memory.max") == 2**64 - 1
    assert cgroup.read_number("memory", "memory.current") == 0
    assert cgroup.read_number("pids", "pids.current") == 0
    assert cgroup.oom_kills() == 2
    assert cgroup.pids() == []
    assert cgroups.at("y").pids() == []
    assert cgroups.at("y").remove()


def test_keyed_files_and_blkio_files_are_parsed() -> None:
    assert parse_keyed("a 1\nb x\nc 3\n") == {"a": 1, "c": 3}
    assert parse_blkio("8:0 Read 10\n8:0 Total 12\n8:16 5\nTotal 12\n") == [
        {"major": 8, "minor": 0, "op": "Read", "value": 10},
        {"major": 8, "minor": 0, "op": "Total", "value": 12},
        {"major": 8, "minor": 16, "op": "", "value": 5},
    ]


@pytest.mark.root
def test_a_cgroup_with_processes_below_it_is_emptied_and_removed() -> None:
    cgroup = Cgroups.read().at(f"bptcgroup/{os.getpid()}")
    directory = cgroup.directory("pids")
    assert directory is not None
    for one in cgroup.directories():
        (one / "below").mkdir(parents=True)
    process = subprocess.Popen(["sleep", "1000"])
    try:
        (directory / "below" / "cgroup.procs").write_text(str(process.pid))
        assert cgroup.pids() == [process.pid]
        assert not cgroup.remove()
        cgroup.kill_all()
        assert process.wait() == -signal.SIGKILL
        assert cgroup.kill_and_remove()
        assert not cgroup.exists()
    finally:
        process.kill()
        process.wait()
        cgroup.kill_and_remove()
        for one in cgroup.directories():
            if one.parent.is_dir():
                one.parent.rmdir()


@pytest.mark.root
@trio_test
async def test_expecting_moves_changes_nothing_and_is_done_once_at_a_time() -> None:
    cgroups = Cgroups.read()
    before = where_we_are()

    for _ in range(3):
        cgroups.expect_moves_nowait()
    with trio.fail_after(10):
        while cgroups._expecting_moves:  # noqa: ASYNC110 (a thread of which nobody waits)
            await trio.sleep(0.01)

    assert where_we_are() == before


def where_we_are() -> str:
    return Path("/proc/self/cgroup").read_text()
