"""The lines conmon writes into its log: `2026-11-23T14:08:39.094557432+00:00 stdout F text`.

`F` is the end of a line of output; `P` a part of one without its newline (conmon reads 8 KiB at a time, and what it
read need not end with a line). The text is any bytes but a newline.
"""

from __future__ import annotations

from calendar import timegm
from collections.abc import Iterator
from dataclasses import dataclass

STDOUT, STDERR = 1, 2
_STREAMS = {b"stdout": STDOUT, b"stderr": STDERR}
_TIME_SIZE = 35  # with nanoseconds and the offset, for the years 1000 to 9999


@dataclass(frozen=True, slots=True)
class LogPart:
    time_ns: int
    stream: int  # STDOUT or STDERR
    ends_line: bool
    data: bytes  # without the newline


class LineReader:
    """`feed` pieces of the log; get the parts they complete. A line that is none is counted in `damaged`."""

    def __init__(self) -> None:
        self._rest = b""
        self._stamp = b""
        self._stamp_ns = 0
        self.damaged = 0
        self.consumed_bytes = 0  # up to the end of the last whole line

    def feed(self, data: bytes) -> Iterator[LogPart]:
        """To be consumed before the next `feed`."""
        data = self._rest + data
        lines = data.split(b"\n")
        self._rest = lines.pop()
        self.consumed_bytes += len(data) - len(self._rest)
        for line in lines:
            part = self._parse(line)
            if part is None:
                self.damaged += 1
            else:
                yield part

    def _parse(self, line: bytes) -> LogPart | None:
        stamp = line[:_TIME_SIZE]
        if stamp != self._stamp:  # lines of one read have one time
            found = parse_time(stamp)
            if found is None:
                return None
            self._stamp, self._stamp_ns = stamp, found
        # " stdout F " behind the time
        stream = _STREAMS.get(line[_TIME_SIZE + 1 : _TIME_SIZE + 7])
        tag = line[_TIME_SIZE + 7 : _TIME_SIZE + 10]
        if stream is None or tag not in (b" F ", b" P "):
            return None
        return LogPart(self._stamp_ns, stream, tag == b" F ", line[_TIME_SIZE + 10 :])


def parse_time(stamp: bytes) -> int | None:
    """RFC 3339 with nine digits and an offset -> nanoseconds since 1970; None when it is something else."""
    try:
        text = stamp.decode("ascii")
        if len(text) != _TIME_SIZE or text[19] != "." or text[10] != "T":
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
