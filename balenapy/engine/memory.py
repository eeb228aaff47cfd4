"""What this process takes, and what bounds it: the `Memory` section of `/info?memory=1`, and of the metrics."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine


class _Mallinfo2(ctypes.Structure):
    """Source: malloc.h of glibc 2.33."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


async def memory_facts(engine: Engine) -> dict[str, Any]:
    """Bytes and counts, now."""
    process = await trio.to_thread.run_sync(_process, limiter=engine.limiters.files)
    limits = engine.limits
    return {
        **process,
        "Budget": limits.budget_bytes,
        "Limits": {
            "Workers": limits.workers,
            "WorkerBytes": limits.worker_bytes,
            "Downloads": min(limits.downloads, engine.config.max_concurrent_downloads),
            "StartsAtBoot": limits.starts,
            "SpoolBytes": limits.spool_bytes,
        },
        "Threads": threading.active_count(),
        "Tasks": trio.lowlevel.current_statistics().tasks_living,
        "Workers": engine.workers.running,
        "LogBytesWaiting": engine.logs.waiting_bytes(),
        "LogBytesDropped": engine.logs.lost_bytes(),
        "EventListeners": engine.events.listener_count,
    }


def _process() -> dict[str, int]:
    """Blocks: reads two files of /proc."""
    found = {"Rss": 0, "Pss": 0, "PeakRss": 0}
    names = {"Rss:": "Rss", "Pss:": "Pss", "VmHWM:": "PeakRss"}
    for path in ("/proc/self/smaps_rollup", "/proc/self/status"):
        try:
            text = Path(path).read_text()
        except OSError:
            continue
        for line in text.splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] in names:
                found[names[words[0]]] = int(words[1]) * 1024
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = _Mallinfo2
        heap = libc.mallinfo2()
        found |= {"HeapBytes": heap.arena + heap.hblkhd, "HeapFreeBytes": heap.fordblks}
    return found


def io_bytes() -> dict[str, int]:
    """What this process has read from and written to block devices, workers that ended included. Blocks."""
    found = {}
    for line in Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(":")
        found[name] = int(value)
    return {"Read": found.get("read_bytes", 0), "Written": found.get("write_bytes", 0)}
