"""Times and durations as clients write and read them (Go's forms)."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from balenapy.core.wire import parse_rfc3339
from balenapy.errors import EngineError

SECOND_NS = 1_000_000_000


class MalformedTime(EngineError):
    """A time or duration nobody can read: unclassified (500), as the engine we replace has it."""


def human_duration(ns: int) -> str:
    """`5 seconds`, `About an hour`, `2 weeks`: the D of `Up D`.

    Source: docker/go-units HumanDuration.
    """
    seconds = ns // SECOND_NS
    if seconds < 1:
        return "Less than a second"
    if seconds == 1:
        return "1 second"
    if seconds < 60:
        return f"{seconds} seconds"
    minutes = seconds // 60
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    hours = (seconds + 1800) // 3600
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    if hours < 24 * 7 * 2:
        return f"{hours // 24} days"
    if hours < 24 * 30 * 2:
        return f"{hours // 24 // 7} weeks"
    if hours < 24 * 365 * 2:
        return f"{hours // 24 // 30} months"
    return f"{seconds // 3600 // 24 // 365} years"


_UNITS_NS = {
    "ns": 1, "us": 1_000, "µs": 1_000, "μs": 1_000, "ms": 1_000_000,
    "s": SECOND_NS, "m": 60 * SECOND_NS, "h": 3600 * SECOND_NS,
}  # fmt: skip
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)


def parse_duration(value: str) -> int:
    """Go's duration (`1h30m`, `-1.5s`, `0`) in nanoseconds.

    Raises: ValueError.
    """
    rest = value[1:] if value[:1] in ("+", "-") else value
    if rest == "0":
        return 0
    total, position = 0, 0
    while position < len(rest):
        match = _PART.match(rest, position)
        if match is None or len(match[1]) > 30:
            raise ValueError(f"invalid duration {value!r}")
        whole, _, fraction = match[1].partition(".")
        unit = _UNITS_NS[match[2]]
        total += int(whole or "0") * unit
        if fraction:
            total += int(fraction) * unit // 10 ** len(fraction)
        position = match.end()
    if not rest or total >= 2**63:
        raise ValueError(f"invalid duration {value!r}")
    return -total if value.startswith("-") else total


def show_duration(ns: int) -> str:
    """Go's Duration.String: `1h0m0s`, `1.5s`, `500ms`, `0s`."""
    sign, ns = ("-" if ns < 0 else ""), abs(ns)
    if ns < SECOND_NS:
        for unit, size in (("ms", 1_000_000), ("µs", 1_000), ("ns", 1)):
            if ns >= size:
                return f"{sign}{_decimal(ns, size)}{unit}"
        return "0s"
    minutes, rest = divmod(ns, 60 * SECOND_NS)
    text = f"{_decimal(rest, SECOND_NS)}s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = (f"{hours}h" if hours else "") + f"{minutes}m{text}"
    return sign + text


def _decimal(ns: int, unit: int) -> str:
    """Without zeros at its end: a unit is a power of ten."""
    whole, fraction = divmod(ns, unit)
    return f"{whole}.{fraction:0{len(str(unit)) - 1}d}".rstrip("0").rstrip(".")


_HTTP_DATE = re.compile(
    r"[A-Z][a-z]+, (?P<day>\d\d)[ -](?P<month>[A-Z][a-z]{2})[ -](?P<year>\d{4}) (?P<time>\d\d:\d\d:\d\d) GMT", re.ASCII
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def parse_http_date(value: str) -> int | None:
    """`Sun, 06 Nov 1994 08:49:37 GMT` as seconds since 1970; None for anything else."""
    match = _HTTP_DATE.fullmatch(value.strip())
    if match is None or match["month"] not in _MONTHS:
        return None
    hour, minute, second = map(int, match["time"].split(":"))
    month = _MONTHS.index(match["month"]) + 1
    try:
        when = datetime(int(match["year"]), month, int(match["day"]), hour, minute, min(second, 59), tzinfo=UTC)
    except ValueError:
        return None
    return int(when.timestamp())


_UNIX = re.compile(r"([+-]?\d{1,18})(?:\.(\d*))?", re.ASCII)


def parse_unix(value: str) -> int:
    """`seconds[.nanoseconds]` in nanoseconds; the only form of `since` and `until` in the query of logs and events.

    Raises: MalformedTime.
    """
    match = _UNIX.fullmatch(value)
    if match is None:
        raise MalformedTime(f'strconv.ParseInt: parsing "{value.partition(".")[0]}": invalid syntax')
    fraction = (match[2] or "")[:9].ljust(9, "0")
    return int(match[1]) * SECOND_NS + int(fraction)


_LOCAL = re.compile(r"(\d{4}-\d\d-\d\d)(?:T(\d\d)(?::(\d\d)(?::(\d\d(?:\.\d+)?))?)?)?(Z|z|[+-]\d\d:\d\d)?", re.ASCII)


def parse_until(value: str, now_ns: int) -> int:
    """The `until` filter of prunes: RFC 3339 (date alone, or cut after hour or minute), unix seconds, or a duration
    counted back from now; in nanoseconds since 1970. Times without a zone are UTC, the clock of devices.

    Raises: MalformedTime. Source: moby api/types/time GetTimestamp.
    """
    if value != "0":
        try:
            return now_ns - parse_duration(value)
        except ValueError:
            pass
    match = _LOCAL.fullmatch(value)
    if match is not None:
        date, hour, minute, second, zone = match.groups()
        try:
            return parse_rfc3339(f"{date}T{hour or '00'}:{minute or '00'}:{second or '00'}{(zone or 'Z').upper()}")
        except ValueError:
            pass
    try:
        return parse_unix(value)
    except MalformedTime:
        raise MalformedTime(f'failed to parse value as time or duration: "{value}"') from None
