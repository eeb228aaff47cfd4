"""A sample of what a container uses -> the object of `GET /containers/{id}/stats`.

Keys, their order and which zeros are left out are those of moby api/types/stats.go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from balenapy.core.wire import rfc3339nano

NANOSECONDS_A_TICK = 10_000_000  # USER_HZ is 100 on every architecture

_MEMORY_KEYS = (
    "cache rss rss_huge mapped_file dirty writeback pgpgin pgpgout pgfault pgmajfault inactive_anon active_anon "
    "inactive_file active_file unevictable"
).split()
MEMORY_KEYS_V1 = (
    *_MEMORY_KEYS,
    *(f"total_{name}" for name in _MEMORY_KEYS),
    "hierarchical_memory_limit",
    "hierarchical_memsw_limit",
)
MEMORY_KEYS_V2 = tuple(
    (
        "anon file kernel_stack slab sock shmem file_mapped file_dirty file_writeback anon_thp inactive_anon "
        "active_anon inactive_file active_file unevictable slab_reclaimable slab_unreclaimable pgfault pgmajfault "
        "workingset_refault workingset_activate workingset_nodereclaim pgrefill pgscan pgsteal pgactivate "
        "pgdeactivate pglazyfree pglazyfreed thp_fault_alloc thp_collapse_alloc"
    ).split()
)
BLKIO_KEYS = (
    "io_service_bytes_recursive",
    "io_serviced_recursive",
    "io_queue_recursive",
    "io_service_time_recursive",
    "io_wait_time_recursive",
    "io_merged_recursive",
    "io_time_recursive",
    "sectors_recursive",
)
NETWORK_KEYS = (
    "rx_bytes",
    "rx_packets",
    "rx_errors",
    "rx_dropped",
    "tx_bytes",
    "tx_packets",
    "tx_errors",
    "tx_dropped",
)


@dataclass(frozen=True, slots=True)
class CpuSample:
    total_ns: int = 0
    per_cpu_ns: Sequence[int] = ()
    kernel_ns: int = 0
    user_ns: int = 0
    system_ns: int = 0  # of the whole machine
    online: int = 0
    periods: int = 0
    throttled_periods: int = 0
    throttled_ns: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    read_ns: int = 0
    cpu: CpuSample = field(default_factory=CpuSample)
    pids: int = 0
    pids_limit: int = 0
    memory_usage: int = 0
    memory_max_usage: int = 0
    memory_failures: int = 0
    memory_limit: int = 0
    memory_stats: Mapping[str, int] = field(default_factory=dict)
    blkio: Mapping[str, Sequence[Mapping[str, int | str]] | None] = field(default_factory=dict)
    networks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


ZERO = Sample()


def show_sample(sample: Sample, before: Sample, *, name: str, container_id: str) -> dict[str, Any]:
    """`before` is the sample shown before this one, `ZERO` at first. `name` has its slash."""
    shown: dict[str, Any] = {
        "read": rfc3339nano(sample.read_ns),
        "preread": rfc3339nano(before.read_ns),
        "pids_stats": _without_zeros({"current": sample.pids, "limit": sample.pids_limit}),
        "blkio_stats": {key: sample.blkio.get(key) for key in BLKIO_KEYS},
        "num_procs": 0,
        "storage_stats": {},
        "cpu_stats": _cpu(sample.cpu),
        "precpu_stats": _cpu(before.cpu),
        "memory_stats": _memory(sample),
        "name": name,
        "id": container_id,
    }
    if sample.networks:
        shown["networks"] = {
            interface: {key: counters.get(key, 0) for key in NETWORK_KEYS}
            for interface, counters in sorted(sample.networks.items())
        }
    return shown


def _cpu(cpu: CpuSample) -> dict[str, Any]:
    usage: dict[str, Any] = {"total_usage": cpu.total_ns}
    if cpu.per_cpu_ns:
        usage["percpu_usage"] = list(cpu.per_cpu_ns)
    usage |= {"usage_in_kernelmode": cpu.kernel_ns, "usage_in_usermode": cpu.user_ns}
    return {
        "cpu_usage": usage,
        **_without_zeros({"system_cpu_usage": cpu.system_ns, "online_cpus": cpu.online}),
        "throttling_data": {
            "periods": cpu.periods,
            "throttled_periods": cpu.throttled_periods,
            "throttled_time": cpu.throttled_ns,
        },
    }


def _memory(sample: Sample) -> dict[str, Any]:
    shown: dict[str, Any] = _without_zeros({"usage": sample.memory_usage, "max_usage": sample.memory_max_usage})
    if sample.memory_stats:
        shown["stats"] = dict(sorted(sample.memory_stats.items()))
    return shown | _without_zeros({"failcnt": sample.memory_failures, "limit": sample.memory_limit})


def _without_zeros(values: Mapping[str, int]) -> dict[str, int]:
    return {key: value for key, value in values.items() if value}


def parse_system_cpu(stat: str) -> int:
    """/proc/stat -> nanoseconds of user, nice, system, idle, iowait, irq and softirq of all processors."""
    for line in stat.splitlines():
        words = line.split()
        if words and words[0] == "cpu":
            return sum(map(int, words[1:8])) * NANOSECONDS_A_TICK
    return 0


def parse_net_dev(text: str) -> dict[str, dict[str, int]]:
    """/proc/PID/net/dev -> counters by interface, without the loopback."""
    found = {}
    for line in text.splitlines()[2:]:
        name, colon, rest = line.partition(":")
        numbers = [int(word) for word in rest.split() if word.isdigit()]
        name = name.strip()
        if not colon or name == "lo" or len(numbers) < 12:
            continue
        received, sent = numbers[0:4], numbers[8:12]
        found[name] = dict(zip(NETWORK_KEYS, received + sent, strict=True))
    return found


def parse_io_stat(text: str) -> list[Mapping[str, int | str]]:
    """io.stat of cgroup v2 -> `io_service_bytes_recursive`."""
    found: list[Mapping[str, int | str]] = []
    for line in text.splitlines():
        device, *pairs = line.split()
        major, colon, minor = device.partition(":")
        if not colon:
            continue
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        for operation, key in (("read", "rbytes"), ("write", "wbytes")):
            found.append(
                {"major": int(major), "minor": int(minor), "op": operation, "value": int(values.get(key, "0"))}
            )
    return found
