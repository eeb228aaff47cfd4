"""What an onlooker sees of the engine: the figures behind the status page and the metrics. Nothing is changed here."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from balenapy import version
from balenapy.core.statsview import Sample
from balenapy.engine.disk import disk_use
from balenapy.engine.memory import io_bytes, memory_facts
from balenapy.engine.stats import take_sample
from balenapy.errors import EngineError

if TYPE_CHECKING:
    from balenapy.core.container import Container
    from balenapy.engine.engine import Engine

DISK_EVERY_S = 60.0  # the walk over volumes costs the disk: not at each look


@dataclass(slots=True)
class Onlooker:
    """Gathers; remembers the last disk figures."""

    engine: Engine
    _disk: dict[str, int] | None = None
    _disk_at: float = 0.0

    async def overview(self) -> dict[str, Any]:
        """For the status page."""
        engine = self.engine
        samples = await self.samples()
        pulls = engine.pulls
        return {
            "Engine": {
                "Version": version.ENGINE_VERSION,
                "Time": time.time(),
                "Started": engine.started_s,
                "DataRoot": str(engine.config.data_root),
                "Warnings": engine.images.warnings(),
            },
            "Containers": [
                {**self._container(one), **_usage(samples.get(one.id))}
                for one in sorted(engine.containers.all(), key=lambda one: one.name)
            ],
            "Images": [
                {key: one[key] for key in ("Id", "RepoTags", "RepoDigests", "Size", "Created")}
                for one in engine.images.summaries()
            ],
            "Pulls": pulls.progress(),
            "Deltas": self.deltas(),
            "Disk": await self.disk(),
            "Flash": await trio.to_thread.run_sync(io_bytes, limiter=engine.limiters.files),
            "Memory": await memory_facts(engine),
        }

    def _container(self, container: Container) -> dict[str, Any]:
        state = container.state
        return {
            "Id": container.id,
            "Name": container.name,
            "Image": container.config.image,
            "Status": state.status.value,
            "Health": state.health.status if state.health is not None else "",
            "ExitCode": state.exit_code,
            "Restarts": state.restart_count,
            "Started": state.started_ns / 1e9,
            "Finished": state.finished_ns / 1e9,
            "LogDriver": container.host_config.log_config.type,
        }

    async def samples(self) -> dict[str, Sample]:
        """The counters of what runs, by container."""
        runs = [run for one in self.engine.containers.all() if (run := self.engine.supervisors.find_run(one))]

        def take() -> dict[str, Sample]:
            found = {}
            for run in runs:
                try:
                    found[run.container.id] = take_sample(run)
                except (OSError, EngineError, ValueError):
                    continue  # it has just ended
            return found

        return await trio.to_thread.run_sync(take, limiter=self.engine.limiters.files)

    def deltas(self) -> dict[str, int]:
        """What deltas have spared since the daemon began."""
        pulls = self.engine.pulls
        return {
            "Layers": pulls.delta_layers,
            "FetchedBytes": pulls.delta_bytes,
            "SavedBytes": pulls.delta_saved_bytes,
        }

    async def disk(self) -> dict[str, int]:
        """Bytes on disk by what they are for, and what is free; at most a minute old."""
        now = trio.current_time()
        if self._disk is None or now - self._disk_at > DISK_EVERY_S:
            self._disk_at = now
            self._disk = await disk_use(self.engine)
        status = os.statvfs(self.engine.config.data_root)
        free = {"Free": status.f_bavail * status.f_frsize, "Total": status.f_blocks * status.f_frsize}
        return {**self._disk, **free}


def _usage(sample: Sample | None) -> dict[str, Any]:
    if sample is None:
        return {}
    cache = sample.memory_stats.get("total_inactive_file", sample.memory_stats.get("inactive_file", 0))
    return {
        "CpuNs": sample.cpu.total_ns,
        "MemoryBytes": max(0, sample.memory_usage - cache),
        "Processes": sample.pids,
        "NetworkReceived": sum(one.get("rx_bytes", 0) for one in sample.networks.values()),
        "NetworkSent": sum(one.get("tx_bytes", 0) for one in sample.networks.values()),
    }
