"""The lines conmon writes into its log: `2026-11-23T14:08:39.094557432+00:00 stdout F text`.

`F` is the end of a line of output; `P` a part of one without its newline (conmon reads 8 KiB at a time, and what it
read need not end with a line). The text is any bytes but a newline.
"""

from __future__ import annotations

import re
from calendar import timegm
from dataclasses import dataclass

STDOUT, STDERR = 1, 2
TIME_SIZE = 35  # with nanoseconds and the offset, for the years 1000 to 9999
STAMP_END = 29  # where the nanoseconds end and the offset begins

# What lies between the time and the text -> stream, whether it ends a line.
_KINDS = {
    b" stdout F ": (STDOUT, True),
    b" stderr F ": (STDERR, True),
    b" stdout P ": (STDOUT, False),
    b" stderr P ": (STDERR, False),
}
TEXT_START = TIME_SIZE + 10
WHOLE = {kind: stream for kind, (stream, ends) in _KINDS.items() if ends}
_FULL_LINE = re.compile(rb"^.{35} std(?:out|err) F ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class LogPart:
    time_ns: int
    stream: int  # STDOUT or STDERR
    ends_line: bool
    data: bytes  # without the newline


def split_line(line: bytes) -> tuple[bytes, int, bool, bytes] | None:
    """One line without its newline -> (time as written, stream, whether it ends a line, text); None when it is none."""
    kind = _KINDS.get(line[TIME_SIZE:TEXT_START])
    if kind is None:
        return None
    return line[:TIME_SIZE], kind[0], kind[1], line[TEXT_START:]


def count_lines(data: bytes) -> int:
    """How many lines of output end in a piece of the log."""
    return len(_FULL_LINE.findall(data))


def parse_line(line: bytes) -> LogPart | None:
    """`split_line` with the time understood; None when that is none either."""
    parts = split_line(line)
    if parts is None:
        return None
    time_ns = parse_time(parts[0])
    return None if time_ns is None else LogPart(time_ns, *parts[1:])


def parse_time(stamp: bytes) -> int | None:
    """RFC 3339 with nine digits and an offset -> nanoseconds since 1970; None when it is something else."""
    try:
        text = stamp.decode("ascii")
        if len(text) != TIME_SIZE or text[19] != "." or text[10] != "T":
            return None
        fields = (text[0:4], text[5:7], text[8:10], text[11:13], text[14:16], text[17:19])
        numbers = [int(field) for field in fields]
        seconds = timegm((*numbers, 0, 0, 0))
        sign = {"+": 1, "-": -1}[text[29]]
        seconds -= sign * (int(text[30:32]) * 3600 + int(text[33:35]) * 60)
        return seconds * 10**9 + int(text[20:29])
    except (ValueError, KeyError, OverflowError):
        return None


def format_line(part: LogPart) -> bytes:
    """The inverse, as conmon writes it in UTC. For tests and for recordings."""
    from time import gmtime

    seconds, nanoseconds = divmod(part.time_ns, 10**9)
    at = gmtime(seconds)
    stamp = (
        f"{at.tm_year}-{at.tm_mon:02}-{at.tm_mday:02}T{at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02}"
        f".{nanoseconds:09}+00:00"
    )
    stream = b"stdout" if part.stream == STDOUT else b"stderr"
    return b"%s %s %s %s\n" % (stamp.encode(), stream, b"F" if part.ends_line else b"P", part.data)
