"""What a pull by delta costs a device: memory of the daemon and its workers in a cgroup of 512 MB, and time.

    python -m tests.bench.deltapull PAIR DELTA

PAIR is a folder with `old` and `new`, OCI layouts; DELTA the layout of the delta between them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balenapy.linux.cgroups import Cgroups
from tests.bench.memory import tree_memory
from tests.engine_process import EngineProcess
from tests.registry.fake import FakeRegistry, fake_registry

MEMORY_LIMIT_BYTES = 512 << 20
SAMPLE_S = 0.01


@dataclass(frozen=True)
class Cost:
    """One pull. Memory in bytes; `limited` says whether there was a memory cgroup."""

    idle: int
    peak: int
    seconds: float
    limited: bool
    lines: list[dict[str, Any]]

    @property
    def above_idle(self) -> int:
        return self.peak - self.idle

    @property
    def delta(self) -> dict[str, Any]:
        return next(line["aux"]["Delta"] for line in self.lines if "aux" in line)


@contextmanager
def small_device(directory: Path, *flags: str) -> Iterator[tuple[EngineProcess, bool]]:
    """An engine in a memory cgroup of 512 MB, its workers' within; whether there is such a cgroup."""
    engine = EngineProcess(directory, *flags)
    hierarchy = Cgroups.read().controller_mount("memory")
    group = hierarchy.mount / engine.cgroup_parent.strip("/") if hierarchy is not None else None
    try:
        if hierarchy is not None and group is not None:
            group.mkdir(exist_ok=True)
            if hierarchy.version == 1:
                (group / "memory.use_hierarchy").write_text("1")
            limit = "memory.limit_in_bytes" if hierarchy.version == 1 else "memory.max"
            (group / limit).write_text(str(MEMORY_LIMIT_BYTES))
        engine.start()
        if group is not None:
            (group / "cgroup.procs").write_text(str(engine.pid))
        yield engine, group is not None
    finally:
        engine.clean_up()


def pull(engine: EngineProcess, reference: str, limited: bool, **headers: str) -> Cost:
    """Pull, watching the memory of the daemon and everything it starts."""
    idle = peak = tree_memory(engine.pid)
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(SAMPLE_S):
            peak = max(peak, tree_memory(engine.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        answer = engine.request(
            "POST", f"/images/create?fromImage={reference}", headers=dict(headers), timeout_s=900
        )
    finally:
        took = time.monotonic() - began
        ended.set()
        watcher.join()
    assert answer.status == 200, answer.body
    assert "error" not in answer.lines[-1], answer.lines[-1]
    return Cost(idle, peak, took, limited, answer.lines)


def hold_layout(registry: FakeRegistry, repository: str, tag: str, layout: Path) -> None:
    """Everything of an OCI layout."""
    index = json.loads((layout / "index.json").read_text())
    for blob in (layout / "blobs/sha256").iterdir():
        registry.blobs[f"sha256:{blob.name}"] = blob.read_bytes()
    for entry in index["manifests"]:
        data = registry.blobs[entry["digest"]]
        registry.add_manifest(repository, tag or entry["digest"], entry["mediaType"], data)


def main() -> None:
    pair, delta = map(Path, sys.argv[1:3])
    with fake_registry() as registry, tempfile.TemporaryDirectory(prefix="deltapull-") as directory:
        registry.has_referrers = True
        hold_layout(registry, "pair", "old", pair / "old")
        hold_layout(registry, "pair", "new", pair / "new")
        hold_layout(registry, "pair", "", delta)
        with small_device(Path(directory)) as (engine, limited):
            platform = "&platform=linux/arm64"
            pull(engine, f"{registry.host}/pair:old{platform}", limited)
            cost = pull(engine, f"{registry.host}/pair:new{platform}", limited)
            image = engine.request("GET", f"/images/{registry.host}/pair:new/json").json
    print(
        f"{pair.name}: {cost.delta['DeltaBytes'] / 1e6:.3f} MB instead of {cost.delta['FullBytes'] / 1e6:.3f} MB, "
        f"{cost.seconds:.1f} s for an image of {image['Size'] / 1e6:.0f} MB; memory {cost.idle / 2**20:.1f} MiB idle, "
        f"at most {cost.above_idle / 2**20:.1f} MiB more"
        + (", in a cgroup of 512 MB" if cost.limited else " (no memory cgroup here)")
    )


if __name__ == "__main__":
    main()
