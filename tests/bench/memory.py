"""Memory of an engine: the proportional set size of its whole process tree, its containers left out."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.engine_process import EngineProcess


def proportional_memory(engine: EngineProcess) -> float:
    """Megabytes (10^6). Counted are the daemon and what it started, and what carries its directories in its command
    line (conmon, shims, containerd, proxies); not counted is what runs in containers.

    Pages shared with processes of others (another Python, say the one that measures) count by their share, as PSS does.
    """
    containers = {
        engine.inspect(one["Id"])["State"]["Pid"] for one in engine.request("GET", "/v1.39/containers/json").json
    }
    parents = {}
    ours = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            pid = int(entry.name)
            parents[pid] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (entry / "cmdline").read_bytes()
            if str(engine.run).encode() in command or str(engine.data_root).encode() in command:
                ours.add(pid)

    def belongs(pid: int) -> bool:
        while pid > 1:
            if pid in containers:
                return False
            if pid == engine.pid or pid in ours:
                return True
            pid = parents.get(pid, 0)
        return False

    return sum(_pss_bytes(pid) for pid in parents if belongs(pid)) / 1e6


def _pss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def tree_memory(pid: int) -> int:
    """PSS in bytes of a process and all its descendants: quick, for sampling."""
    total = _pss_bytes(pid)
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(tree_memory(int(child)) for child in (task / "children").read_text().split())
    return total
