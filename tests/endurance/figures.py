"""Figures of a process out of /proc."""

from __future__ import annotations

import contextlib
import os
import statistics
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figures:
    written_bytes: int  # to block devices, by it and its reaped children
    cpu_ticks: int
    pss_bytes: int
    descriptors: int
    threads: int

    def __sub__(self, before: Figures) -> Figures:
        return Figures(*(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__))


def wakeups_of(pid: int) -> dict[int, int]:
    """Voluntary context switches, by thread."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found[int(task.name)] = _number(task / "status", "voluntary_ctxt_switches:")
    return found


def figures_of(pid: int) -> Figures:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Figures(
        written_bytes=_number(Path(f"/proc/{pid}/io"), "write_bytes:"),
        cpu_ticks=int(fields[11]) + int(fields[12]),
        pss_bytes=_number(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") * 1024,
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        threads=len(os.listdir(f"/proc/{pid}/task")),
    )


def _number(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def spread(values: list[float]) -> str:
    values = sorted(values)
    return f"median {statistics.median(values):.1f} p95 {values[len(values) * 95 // 100]:.1f} most {values[-1]:.1f}"
