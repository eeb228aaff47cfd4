"""What follows from the memory the engine may use at its busiest: `--memory-budget`, or a share of the machine's.

At rest the engine is as small as it can be. What grows with work are workers (each with a bound of its own), downloads
(buffers in sockets and pipes), starts at boot, and output of containers that nobody has taken over yet. Nothing holds a
large file in memory, whatever the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from balenapy.core.staging import STARTS_MAX

SHARE = 4  # of the machine's memory, when nothing is said
MIB = 1 << 20
WORKER_MIN_BYTES, WORKER_MAX_BYTES = 64 * MIB, 512 * MIB
WORKERS_MAX = 2  # of each sort: each takes a core and tens of megabytes
SPOOL_MAX_BYTES = 16 * MIB
SPOOL_MIN_BYTES = 2 * MIB


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    budget_bytes: int
    workers: int  # at once, of each sort
    worker_bytes: int  # that each may take
    downloads: int  # at once, at most
    starts: int  # at once, when the daemon starts
    spool_bytes: int  # output of one container in memory


def limits_for(budget_bytes: int, machine_bytes: int, cpus: int) -> MemoryLimits:
    """
    Args:
        budget_bytes: 0: not said.
    """
    budget = budget_bytes or machine_bytes // SHARE
    workers = max(1, min(WORKERS_MAX, cpus, budget // (96 * MIB)))
    # A worker that unpacks takes 30 MB; more is for deltas with large windows, and for page cache it dirties.
    floor = WORKER_MIN_BYTES if budget_bytes else 2 * WORKER_MIN_BYTES
    return MemoryLimits(
        budget_bytes=budget,
        workers=workers,
        worker_bytes=max(floor, min(WORKER_MAX_BYTES, budget)),
        downloads=max(1, budget // (32 * MIB)),
        starts=max(1, min(STARTS_MAX, cpus, budget // (32 * MIB))),
        spool_bytes=max(SPOOL_MIN_BYTES, min(SPOOL_MAX_BYTES, budget // 8 // MIB * MIB)),
    )
