"""What a running container uses, sample by sample; and its processes (`top`)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core import lifecycle
from balenapy.core.container import Container
from balenapy.core.statsview import (
    BLKIO_KEYS,
    MEMORY_KEYS_V1,
    MEMORY_KEYS_V2,
    NANOSECONDS_A_TICK,
    ZERO,
    CpuSample,
    Sample,
    parse_io_stat,
    parse_net_dev,
    parse_system_cpu,
    show_sample,
)
from balenapy.errors import SystemFailure
from balenapy.linux.cgroups import ContainerCgroup, parse_blkio
from balenapy.linux.process import run_tool

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.engine.supervisor import Run

INTERVAL_S = 1.0

Show = Callable[[dict[str, Any]], Awaitable[None]]


async def stream_stats(engine: Engine, container: Container, show: Show) -> None:
    """Show one object a second until the container is removed; of zeros while it does not run."""
    before = ZERO
    while engine.containers.store.find(container.id) is container:
        sample = await _sample(engine, container)
        await show(_object(container, sample, before))
        before = sample
        await trio.sleep(INTERVAL_S)


async def read_stats(engine: Engine, container: Container) -> dict[str, Any]:
    """One object, with a sample a second older behind it so that a client can compute rates."""
    before = await _sample(engine, container)
    if before is ZERO:
        return _object(container, ZERO, ZERO)
    await trio.sleep(INTERVAL_S)
    return _object(container, await _sample(engine, container), before)


def _object(container: Container, sample: Sample, before: Sample) -> dict[str, Any]:
    return show_sample(sample, before, name=f"/{container.name}", container_id=container.id)


async def _sample(engine: Engine, container: Container) -> Sample:
    run = engine.supervisors.find_run(container)
    if run is None or not container.state.running:
        return ZERO
    return await trio.to_thread.run_sync(take_sample, run, limiter=engine.limiters.files)


def take_sample(run: Run) -> Sample:
    """Read the counters of one container. Blocks."""
    cgroup = run.cgroup
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    networks = {}
    mode = run.container.host_config.network_mode
    if mode not in ("host", "none") and not mode.startswith("container:"):
        try:
            networks = parse_net_dev(Path(f"/proc/{run.container.state.pid}/net/dev").read_text())
        except (FileNotFoundError, ProcessLookupError, OSError):
            networks = {}
    take = _take_v2 if cgroup.cgroups.version == 2 else _take_v1
    return take(cgroup, host_memory, networks)


def _system_cpu() -> int:
    return parse_system_cpu(Path("/proc/stat").read_text())


def _pids(cgroup: ContainerCgroup) -> tuple[int, int]:
    limit = cgroup.read("pids", "pids.max").strip()
    return cgroup.read_number("pids", "pids.current"), int(limit) if limit.isdigit() else 0


def _take_v1(cgroup: ContainerCgroup, host_memory: int, networks: dict[str, dict[str, int]]) -> Sample:
    per_cpu = [int(word) for word in cgroup.read("cpuacct", "cpuacct.usage_percpu").split()]
    ticks = cgroup.read_keyed("cpuacct", "cpuacct.stat")
    throttling = cgroup.read_keyed("cpu", "cpu.stat")
    memory = cgroup.read_keyed("memory", "memory.stat")
    limit = cgroup.read_number("memory", "memory.limit_in_bytes")
    pids, pids_limit = _pids(cgroup)
    online = len(os.sched_getaffinity(0))
    return Sample(
        read_ns=time.time_ns(),
        cpu=CpuSample(
            total_ns=cgroup.read_number("cpuacct", "cpuacct.usage"),
            per_cpu_ns=per_cpu,
            kernel_ns=ticks.get("system", 0) * NANOSECONDS_A_TICK,
            user_ns=ticks.get("user", 0) * NANOSECONDS_A_TICK,
            system_ns=_system_cpu(),
            online=online,
            periods=throttling.get("nr_periods", 0),
            throttled_periods=throttling.get("nr_throttled", 0),
            throttled_ns=throttling.get("throttled_time", 0),
        ),
        pids=pids,
        pids_limit=pids_limit,
        memory_usage=cgroup.read_number("memory", "memory.usage_in_bytes"),
        memory_max_usage=cgroup.read_number("memory", "memory.max_usage_in_bytes"),
        memory_failures=cgroup.read_number("memory", "memory.failcnt"),
        memory_limit=min(limit, host_memory) if limit else host_memory,
        memory_stats={key: memory[key] for key in MEMORY_KEYS_V1 if key in memory},
        blkio={key: _blkio_v1(cgroup, key) for key in BLKIO_KEYS},
        networks=networks,
    )


def _blkio_v1(cgroup: ContainerCgroup, key: str) -> Any:
    """The scheduler's own counters where there are any, else those of throttling, which every device has."""
    name = {"io_queue_recursive": "io_queued_recursive", "io_time_recursive": "time_recursive"}.get(key, key)
    for prefix in ("blkio.", "blkio.bfq.", "blkio.throttle."):
        found = parse_blkio(cgroup.read("blkio", prefix + name))
        if found:
            return found
    return []


def _take_v2(cgroup: ContainerCgroup, host_memory: int, networks: dict[str, dict[str, int]]) -> Sample:
    cpu = cgroup.read_keyed("cpu", "cpu.stat")
    memory = cgroup.read_keyed("memory", "memory.stat")
    limit = cgroup.read_number("memory", "memory.max")
    pids, pids_limit = _pids(cgroup)
    return Sample(
        read_ns=time.time_ns(),
        cpu=CpuSample(
            total_ns=cpu.get("usage_usec", 0) * 1000,
            kernel_ns=cpu.get("system_usec", 0) * 1000,
            user_ns=cpu.get("user_usec", 0) * 1000,
            system_ns=_system_cpu(),
            online=len(os.sched_getaffinity(0)),
            periods=cpu.get("nr_periods", 0),
            throttled_periods=cpu.get("nr_throttled", 0),
            throttled_ns=cpu.get("throttled_usec", 0) * 1000,
        ),
        pids=pids,
        pids_limit=pids_limit,
        memory_usage=cgroup.read_number("memory", "memory.current"),
        memory_failures=cgroup.read_keyed("memory", "memory.events").get("oom", 0),
        memory_limit=min(limit, host_memory) if limit else host_memory,
        memory_stats={key: memory[key] for key in MEMORY_KEYS_V2 if key in memory},
        blkio={BLKIO_KEYS[0]: parse_io_stat(cgroup.read("io", "io.stat"))},
        networks=networks,
    )


# --- top ------------------------------------------------------------------------------------------------------

_RENAMED_PID = re.compile(r"\s+(\S*)=\s*(PID\S*)")


async def top(engine: Engine, container: Container, ps_args: str) -> dict[str, Any]:
    """Titles and rows of the host's `ps` for the processes of a container.

    Raises: Conflict, SystemFailure. Source: moby daemon/top_unix.go.
    """
    lifecycle.check_running(container)
    arguments = ps_args.split() or ["-ef"]
    for match in _RENAMED_PID.finditer(f" {' '.join(arguments)}"):
        if match[1].lower() != "pid":
            raise SystemFailure(f'specifying "{match[1]}={match[2]}" is not allowed')
    pids = engine.supervisors.run_of(container).cgroup.pids()
    output = await _ps(arguments, pids)
    result = parse_ps(output, frozenset(pids))
    engine.events.container(container, "top")
    return result


async def _ps(arguments: list[str], pids: list[int]) -> str:
    wanted = ",".join(map(str, pids))
    outcome = await run_tool(["ps", *arguments, f"-q{wanted}"], check=False)
    if outcome.code != 0:
        outcome = await run_tool(["ps", *arguments], check=False)
    if outcome.code != 0 and b"BusyBox" in outcome.stderr:  # whose ps knows no options. Source: H daemon/top_unix.go
        outcome = await run_tool(["ps"], check=False)
    if outcome.code != 0:
        raise SystemFailure(f"ps: {outcome.last_words}")
    return outcome.stdout.decode(errors="replace")


def parse_ps(output: str, pids: frozenset[int]) -> dict[str, Any]:
    """Raises: SystemFailure."""
    lines = output.splitlines()
    titles = lines[0].split() if lines else []
    if "PID" not in titles:
        raise SystemFailure("Couldn't find PID field in ps output")
    column, last = titles.index("PID"), len(titles) - 1
    processes = []
    wanted_thread = False
    for line in lines[1:]:
        words = line.split()
        if len(words) <= column:
            continue
        if words[column] == "-":  # a thread of the process above
            keep = wanted_thread
        else:
            try:
                keep = wanted_thread = int(words[column]) in pids
            except ValueError:
                raise SystemFailure(f"Unexpected pid '{words[column]}': not a number") from None
        if keep:
            processes.append([*words[:last], " ".join(words[last:])])
    return {"Processes": processes, "Titles": titles}
