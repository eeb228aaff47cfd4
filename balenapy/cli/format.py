"""How the command line prints: tables, sizes and ages, in docker's shapes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns three blanks apart, at least ten wide. Source: docker's tabwriter(10, 1, 3)."""
    lines = [list(header), *map(list, rows)]
    widths = [max(10, *(len(line[column]) + 3 for line in lines)) for column in range(len(header))]
    return "\n".join(
        "".join(
            cell.ljust(width) if column < len(header) - 1 else cell
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def human_size(size_bytes: float, digits: int = 4) -> str:
    """4.26MB, 0B. Source: docker/go-units HumanSizeWithPrecision."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    index = 0
    while size_bytes >= 1000 and index < len(units) - 1:
        size_bytes /= 1000
        index += 1
    return f"{size_bytes:.{digits}g}{units[index]}"


def age(created_s: float) -> str:
    """`5 minutes ago`."""
    return f"{human_duration(time.time() - created_s)} ago"


def human_duration(seconds: float) -> str:
    """Source: docker/go-units HumanDuration."""
    whole = int(seconds)
    minutes, hours = whole // 60, round(seconds / 3600)
    for limit, text in (
        (whole < 1, "Less than a second"),
        (whole == 1, "1 second"),
        (whole < 60, f"{whole} seconds"),
        (minutes == 1, "About a minute"),
        (minutes < 60, f"{minutes} minutes"),
        (hours == 1, "About an hour"),
        (hours < 48, f"{hours} hours"),
        (hours < 24 * 7 * 2, f"{hours // 24} days"),
        (hours < 24 * 30 * 2, f"{hours // 24 // 7} weeks"),
        (hours < 24 * 365 * 2, f"{hours // 24 // 30} months"),
    ):
        if limit:
            return text
    return f"{hours // 24 // 365} years"


def short_id(identifier: str) -> str:
    return identifier.rpartition(":")[2][:12]


def ports(entries: Iterable[dict[str, Any]]) -> str:
    """`0.0.0.0:8080->80/tcp, 443/tcp`."""
    return ", ".join(
        f"{one['IP']}:{one['PublicPort']}->{one['PrivatePort']}/{one['Type']}"
        if one.get("PublicPort")
        else f"{one['PrivatePort']}/{one['Type']}"
        for one in sorted(entries, key=lambda one: (one["PrivatePort"], one.get("PublicPort", 0)))
    )


def ellipsis(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
