"""The metrics, in Prometheus' text form. Imported at the first scrape: prometheus-client costs 2.7 MB.

Names that dockerd has are dockerd's (`engine_daemon_...`), the others begin with `balenapy_`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from balenapy import version
from balenapy.engine.memory import io_bytes, memory_facts
from balenapy.linux.hostfacts import read_pressure

if TYPE_CHECKING:
    from balenapy.engine.overview import Onlooker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CONTAINER_COUNTERS = {
    "cpu_seconds": "processor time used",
    "network_received_bytes": "bytes received",
    "network_sent_bytes": "bytes sent",
}
MEMORY_KINDS = ("Rss", "Pss", "PeakRss", "HeapBytes", "HeapFreeBytes")
CONTAINER_GAUGES = {"memory_bytes": "memory used, cache included", "processes": "processes"}


class _Gathered:
    """A collector that has its figures already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


async def render(onlooker: Onlooker) -> bytes:
    """All metrics, now."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Gathered(await _gather(onlooker)))
    return generate_latest(registry)


async def _gather(onlooker: Onlooker) -> list[Metric]:
    engine = onlooker.engine
    memory = await memory_facts(engine)
    disk = await onlooker.disk()
    flash = await trio.to_thread.run_sync(io_bytes, limiter=engine.limiters.files)
    statuses = Counter(one.state.status.value for one in engine.containers.all())
    states = {
        "running": statuses["running"] + statuses["restarting"],
        "paused": statuses["paused"],
        "stopped": sum(statuses.values()) - sum(statuses[name] for name in ("running", "restarting", "paused")),
    }
    pressure = read_pressure()
    info = InfoMetricFamily("engine_daemon_engine", "what this engine is")
    info.add_metric([], {"version": version.ENGINE_VERSION, "engine": version.ENGINE_NAME})
    return [
        info,
        _by("engine_daemon_container_states_containers", "containers by state", "state", states),
        _gauge("balenapy_images", "images, intermediate ones included", len(engine.images.all())),
        _by("balenapy_disk_bytes", "bytes on disk by what they are for", "kind", disk),
        _counter("balenapy_flash_written_bytes", "bytes written to block devices, workers' too", flash["Written"]),
        _counter("balenapy_flash_read_bytes", "bytes read from block devices, workers' too", flash["Read"]),
        _by("balenapy_memory_bytes", "memory of the daemon", "kind", {
            name: value for name, value in memory.items() if name in MEMORY_KINDS
        }),
        _gauge("balenapy_memory_budget_bytes", "what the engine with its workers may use", memory["Budget"]),
        _gauge("balenapy_threads", "threads of the daemon", memory["Threads"]),
        _gauge("balenapy_tasks", "tasks of the daemon", memory["Tasks"]),
        _gauge("balenapy_workers", "worker processes that run", memory["Workers"]),
        _gauge("balenapy_event_listeners", "clients that listen to events", memory["EventListeners"]),
        _gauge("balenapy_log_waiting_bytes", "output in memory that is not in a log yet", memory["LogBytesWaiting"]),
        _gauge("balenapy_log_dropped_bytes", "output of present runs that was dropped", memory["LogBytesDropped"]),
        _gauge("balenapy_pulls", "pulls under way", len(engine.pulls.progress())),
        _counter("balenapy_delta_layers", "layers that came as deltas", engine.pulls.delta_layers),
        _counter("balenapy_delta_fetched_bytes", "bytes of deltas fetched", engine.pulls.delta_bytes),
        _counter("balenapy_delta_saved_bytes", "bytes that deltas have spared", engine.pulls.delta_saved_bytes),
        _by("balenapy_pressure_percent", "share of ten seconds in which something waited", "resource",
            {"cpu": pressure.cpu, "memory": pressure.memory}),
        *await _containers(onlooker),
    ]  # fmt: skip


async def _containers(onlooker: Onlooker) -> list[Metric]:
    labels = ["id", "name", "image"]
    families: dict[str, Metric] = {
        name: CounterMetricFamily(f"balenapy_container_{name}", text, labels=labels)
        for name, text in CONTAINER_COUNTERS.items()
    }
    families |= {
        name: GaugeMetricFamily(f"balenapy_container_{name}", text, labels=labels)
        for name, text in CONTAINER_GAUGES.items()
    }
    restarts = CounterMetricFamily("balenapy_container_restarts", "restarts by policy", labels=labels)
    samples = await onlooker.samples()
    for one in onlooker.engine.containers.all():
        who = [one.short_id, one.name, one.config.image]
        restarts.add_metric(who, one.state.restart_count)
        sample = samples.get(one.id)
        if sample is None:
            continue
        values = {
            "cpu_seconds": sample.cpu.total_ns / 1e9,
            "network_received_bytes": sum(each.get("rx_bytes", 0) for each in sample.networks.values()),
            "network_sent_bytes": sum(each.get("tx_bytes", 0) for each in sample.networks.values()),
            "memory_bytes": sample.memory_usage,
            "processes": sample.pids,
        }
        for name, value in values.items():
            families[name].add_metric(who, value)  # type: ignore[attr-defined]  # of both classes
    return [*families.values(), restarts]


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _by(name: str, text: str, label: str, values: Mapping[str, Any]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
