from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from balenapy.core.statsview import (
    BLKIO_KEYS,
    MEMORY_KEYS_V1,
    ZERO,
    CpuSample,
    Sample,
    parse_io_stat,
    parse_net_dev,
    parse_system_cpu,
    show_sample,
)

FIXTURES = Path(__file__).parent.parent / "data" / "fixtures"

NET_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:   0   0   0   0   0     0          0         0        0       0    0    0    0     0       0          0
  eth0: 486   5   1   2   0     0          0         0       42       3    4    6    0     0       0          0
"""


def test_a_sample_has_the_keys_and_order_of_the_reference_engine() -> None:
    expected: dict[str, Any] = json.loads((FIXTURES / "container_stats_cgroup_v1.json").read_text())
    cpu = CpuSample(33503405, (2033637, 31469768), 10000000, 20000000, 3530320000000, 2)
    sample = Sample(
        read_ns=1795425891378808686,
        cpu=cpu,
        pids=1,
        memory_usage=1097728,
        memory_max_usage=3575808,
        memory_limit=25276502016,
        memory_stats=expected["memory_stats"]["stats"],
        blkio={key: [] for key in BLKIO_KEYS},
        networks={"eth0": {"rx_bytes": 486, "rx_packets": 5}},
    )
    before = Sample(read_ns=1795425890375061505, cpu=CpuSample(*_with_system(cpu, 3528330000000)))

    shown = show_sample(sample, before, name="/bpyref-plain", container_id=expected["id"])

    assert set(expected["memory_stats"]["stats"]) == set(MEMORY_KEYS_V1)
    assert json.dumps(shown) == json.dumps(expected)


def _with_system(cpu: CpuSample, system_ns: int) -> tuple[Any, ...]:
    return (cpu.total_ns, cpu.per_cpu_ns, cpu.kernel_ns, cpu.user_ns, system_ns, cpu.online)


def test_what_does_not_run_is_shown_as_zeros() -> None:
    shown = show_sample(ZERO, ZERO, name="/x", container_id="ab")

    assert shown["read"] == "0001-01-01T00:00:00Z"
    assert shown["pids_stats"] == shown["memory_stats"] == {}
    assert shown["blkio_stats"] == dict.fromkeys(BLKIO_KEYS)
    assert shown["cpu_stats"] == {
        "cpu_usage": {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0},
        "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0},
    }
    assert "networks" not in shown


def test_counters_of_interfaces_are_read() -> None:
    found = parse_net_dev(NET_DEV)
    assert list(found) == ["eth0"]
    assert found["eth0"] == {
        "rx_bytes": 486,
        "rx_packets": 5,
        "rx_errors": 1,
        "rx_dropped": 2,
        "tx_bytes": 42,
        "tx_packets": 3,
        "tx_errors": 4,
        "tx_dropped": 6,
    }
    assert parse_net_dev("") == {}


def test_processor_time_is_the_sum_of_seven_fields() -> None:
    assert parse_system_cpu("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n") == 28 * 10_000_000


def test_io_of_the_unified_hierarchy_is_read() -> None:
    assert parse_io_stat("8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n") == [
        {"major": 8, "minor": 0, "op": "read", "value": 10},
        {"major": 8, "minor": 0, "op": "write", "value": 20},
    ]
