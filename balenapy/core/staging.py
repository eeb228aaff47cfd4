"""How many containers are started at once when the daemon starts: a policy of plain values.

Twenty containers that a boot starts together make a small board swap and miss its watchdog. The kernel's pressure stall
information (PSI) tells how much of the last ten seconds tasks waited for a processor or for memory. The first start
never waits; others do while the machine is under pressure, each for a bounded time, so that all are started in the end.
Source: Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CPU_LIMIT = 60.0  # percent of time in which something waited
MEMORY_LIMIT = 10.0
STARTS_MAX = 4  # each is mostly waiting for the runtime
WAIT_STEP_S = 0.5
WAIT_MAX_S = 15.0  # a start waits at most so long for calm

_SOME = re.compile(r"^some avg10=(\d+(?:\.\d+)?)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pressure:
    """Percent of the last ten seconds in which some task was stalled."""

    cpu: float = 0.0
    memory: float = 0.0


def parse_pressure(text: str) -> float:
    """The first line of a file in /proc/pressure; 0 when it says nothing."""
    match = _SOME.search(text)
    return float(match[1]) if match else 0.0


def must_wait(pressure: Pressure, others: int, waited_s: float) -> bool:
    """Whether a start waits, with `others` under way."""
    if waited_s >= WAIT_MAX_S:
        return False
    if pressure.memory > MEMORY_LIMIT:
        return True
    return others > 0 and pressure.cpu > CPU_LIMIT
