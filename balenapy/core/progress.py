"""JSON lines of pull, push, load, import and build, and which of them are worth sending.

A line is one object and CR LF, keys in Go's order: stream, status, progressDetail, progress, id, errorDetail, error,
aux. Three shapes are told apart by clients: a *message* has no `progressDetail` ("Pulling from…", "Status: …"), a
*step* of one layer has an empty one, an *advance* has numbers and a bar.

balena's pull has one advance more: no status, id `Total`, over the compressed bytes of all layers to be fetched.
docker-progress (the supervisor's and the CLI's) moves its bar by that line alone when `/version` names the engine
`balena-engine`.

Sources: moby pkg/jsonmessage, pkg/streamformatter, pkg/progress/progressreader.go; go-units size.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from balenapy.core.gojson import dumps_escaped

BAR_CELLS = 50
UPDATE_INTERVAL_S = 0.1  # progressreader.go: rate.Every(100 * time.Millisecond)
UPDATE_STEP_BYTES = 512 * 1024  # progressreader.go updateInterval; 1 % of the total if that is less
TOTAL_ID = "Total"

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")


def message(status: str, id: str = "") -> bytes:
    """A line about the whole: `{"status":"Pulling from library/x","id":"latest"}`."""
    return _line({"status": status, **({"id": id} if id else {})})


def step(id: str, status: str) -> bytes:
    """A line about one layer: `{"status":"Pull complete","progressDetail":{},"id":"…"}`."""
    return _line({"status": status, "progressDetail": {}, "id": id})


def advance(id: str, status: str, current: int, total: int = 0) -> bytes:
    """How far one layer is; `total` 0 when nobody knows. An empty status or id is left out."""
    numbers = {"current": current, "total": total}
    line: dict[str, Any] = {"status": status} if status else {}
    line["progressDetail"] = {name: value for name, value in numbers.items() if value}
    text = progress_text(current, total)
    if text:
        line["progress"] = text
    return _line({**line, "id": id} if id else line)


def advance_total(current: int, total: int) -> bytes:
    """balena's line about all layers together."""
    return advance(TOTAL_ID, "", current, total)


def stream(text: str) -> bytes:
    """A line of output as it is: `{"stream":"Loaded image: x:1\\n"}`."""
    return _line({"stream": text})


def aux(value: Mapping[str, Any], *, with_progress: bool = False, id: str = "") -> bytes:
    """A result for programs; push writes an empty `progressDetail` before it, build does not."""
    return _line({**({"progressDetail": {}} if with_progress else {}), **({"id": id} if id else {}), "aux": value})


def blank() -> bytes:
    """What ends the bar of a download in a build."""
    return _line({})


def error(text: str, code: int = 0) -> bytes:
    """The last line of a stream that failed after its first byte."""
    detail: dict[str, Any] = {"code": code} if code else {}
    return _line({"errorDetail": {**detail, "message": text}, "error": text})


def _line(value: Mapping[str, Any]) -> bytes:
    return dumps_escaped(value) + b"\r\n"


def human_size(size_bytes: float) -> str:
    """Decimal units, four digits: `33.79kB`, `1.984MB`."""
    unit = 0
    while size_bytes >= 1000 and unit < len(_UNITS) - 1:
        size_bytes /= 1000
        unit += 1
    return f"{size_bytes:.4g}{_UNITS[unit]}"


def progress_text(current: int, total: int) -> str:
    """The bar as the engine draws it; clients that know the terminal's width draw their own."""
    if current <= 0 and total <= 0:
        return ""
    if total <= 0:
        return f"{human_size(current):>8}"
    filled = max(0, min(int(current / total * 100) // 2, BAR_CELLS))
    bar = f"[{'=' * filled}>{' ' * (BAR_CELLS - filled)}] "
    if current > total:  # pushes count tar headers, the total does not: show what is certain
        return f"{bar}{human_size(current):>8}"
    return f"{bar}{human_size(current):>8}/{human_size(total)}"


class UpdateLimit:
    """Says which advances are worth sending: at least 100 ms and 1 % (at most 512 KiB) apart, the last one always."""

    __slots__ = ("_sent",)

    def __init__(self) -> None:
        self._sent: dict[str, tuple[int, float]] = {}

    def allows(self, id: str, current: int, total: int, now_s: float) -> bool:
        """Ask before sending; a yes counts as sent."""
        last = self._sent.get(id)
        if last is not None and current != total:
            step_bytes = min(total // 100, UPDATE_STEP_BYTES) if total > 0 else UPDATE_STEP_BYTES
            if current - last[0] < step_bytes or now_s - last[1] < UPDATE_INTERVAL_S:
                return False
        self._sent[id] = (current, now_s)
        return True
