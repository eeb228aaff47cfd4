"""A ring as `logs` shows it: the wanted part, lines whole, in the client's form, with what is missing told.

`LogView.read_some` gives piece after piece and b"" when there is no more for now; a writer may go on meanwhile. What
cannot be shown is said in the stream, on stderr, in brackets: damaged records, output that was dropped before it got
here, and what a slow reader missed because the ring came round.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from balenapy.core.conmonlog import STAMP_END, STDERR, STDOUT, TEXT_START, TIME_SIZE, WHOLE, split_line
from balenapy.core.ringlog import LOST, RUN_END, TEXT, Record, Ring
from balenapy.core.stdcopy import FRAME_HEADER, frame

ENTRY_MAX_BYTES = 16 << 10  # docker splits longer lines: `logs` shows entries of at most this size
CHUNK_BYTES = 64 << 10  # of output at a time
LINE_HEAD = TEXT_START - 1  # of a line of conmon's, less its newline


@dataclass(frozen=True, slots=True)
class LogOptions:
    stdout: bool = True
    stderr: bool = True
    since_ns: int = 0
    until_ns: int = 0
    tail: int = -1  # entries; -1: all
    timestamps: bool = False
    details: bool = False
    follow: bool = False


class Entry(NamedTuple):
    """What `logs` shows as one: a line with its newline, or a part of a long one, or a last one without."""

    stamp: bytes  # as conmon wrote it: RFC 3339 with nanoseconds and an offset
    stream: int
    data: bytes


class Joiner:
    """Records -> entries, as the reference engine's copier cuts them. Pieces of a line are joined first."""

    def __init__(self) -> None:
        self._held: dict[int, bytearray] = {STDOUT: bytearray(), STDERR: bytearray()}
        self._stamps: dict[int, bytes] = {}  # of a line that is longer than one entry: all its parts bear it
        self._last = b""

    @property
    def is_idle(self) -> bool:
        """Whether no line has begun and not ended."""
        return not (self._held[STDOUT] or self._held[STDERR] or self._stamps)

    def feed(self, record: Record) -> list[Entry]:
        if record.kind == TEXT:
            return self.feed_lines(record.data)
        return self.flush() if record.kind == RUN_END else []

    def feed_lines(self, data: bytes) -> list[Entry]:
        """Some whole lines of conmon's."""
        entries: list[Entry] = []
        for line in data.split(b"\n"):
            parts = split_line(line)
            if parts is not None:
                self._add(entries, *parts)
        return entries

    def flush(self) -> list[Entry]:
        """What is left of lines that were never ended."""
        entries = []
        for stream, held in self._held.items():
            if held:
                entries.append(Entry(self._stamps.get(stream, self._last), stream, bytes(held)))
                held.clear()
        self._stamps.clear()
        return entries

    def _add(self, entries: list[Entry], stamp: bytes, stream: int, ends_line: bool, data: bytes) -> None:
        held = self._held[stream]
        if ends_line and not held and len(data) < ENTRY_MAX_BYTES and not self._stamps:
            entries.append(Entry(stamp, stream, data + b"\n"))
            return
        self._last = stamp
        held += data
        while len(held) >= ENTRY_MAX_BYTES:
            entries.append(Entry(self._stamps.setdefault(stream, stamp), stream, bytes(held[:ENTRY_MAX_BYTES])))
            del held[:ENTRY_MAX_BYTES]
        if ends_line:
            entries.append(Entry(self._stamps.pop(stream, stamp), stream, bytes(held) + b"\n"))
            held.clear()


class Formatter:
    """Entries -> bytes for the client, those it wants."""

    def __init__(self, options: LogOptions, *, tty: bool, details: bytes = b"") -> None:
        """
        Args:
            tty: the output has no frames.
            details: shown before each line if the client asked for details.
        """
        self._tty = tty
        self._streams = {STDOUT: options.stdout, STDERR: options.stderr}
        self._since = stamp_of(options.since_ns)
        self._until = stamp_of(options.until_ns)
        self._timestamps = options.timestamps
        self._details = details + b" " if options.details else b""
        self._plain = not (self._details or self._timestamps)
        self._all = self._plain and not (self._since or self._until)
        self.finished = False  # an entry after `until` was met

    def quick(self, lines: bytes) -> bytes | None:
        """What `add` makes of some of conmon's lines, all of them whole, if it does not depend on times; else None.

        A third of the time: reading all of a large log is mostly this.
        """
        if not self._all:
            return None
        streams, tty, pack = self._streams, self._tty, FRAME_HEADER.pack
        pieces: list[bytes] = []
        append = pieces.append
        for line in lines.split(b"\n"):
            stream = WHOLE.get(line[TIME_SIZE:TEXT_START])
            size = len(line) - LINE_HEAD  # with its newline
            if stream is None:
                if line:
                    return None
                continue
            if size > ENTRY_MAX_BYTES:
                return None
            if streams[stream]:
                if not tty:
                    append(pack(stream, size))
                append(line[TEXT_START:])
                append(b"\n")
        return b"".join(pieces)

    def add(self, output: bytearray, entries: Iterable[Entry | bytes]) -> None:
        """Entries, or what `quick` has made."""
        since, until, streams = self._since, self._until, self._streams
        plain = self._plain
        for entry in entries:
            if isinstance(entry, bytes):
                output += entry
                continue
            stamp, stream, text = entry
            # Times of one form, so that their bytes compare as they do.
            if since and stamp < since:
                continue
            if until and stamp > until:
                self.finished = True
                return
            if not streams[stream]:
                continue
            if not plain:
                text = self._details + text
                if self._timestamps:
                    text = stamp[:STAMP_END] + b"Z " + text
            output += text if self._tty else frame(stream, text)


class LogView:
    """Reads a ring from the wanted place on. Blocks where the ring does."""

    def __init__(self, ring: Ring, options: LogOptions, *, tty: bool, details: bytes = b"") -> None:
        self._ring = ring
        self._tail = options.tail
        self._since_ns = options.since_ns
        self._follow = options.follow
        self._done = False
        self._counting = False
        self._last = 0  # the block after which a reader that does not follow has seen all there was; 0: not known
        self._formatter = Formatter(options, tty=tty, details=details)
        self._joiner = Joiner()
        self._number = 0  # of the block to read next; 0: not begun
        self._seq = 0  # of the last record read; 0: none
        self._lines = 0  # how many lines the ring had got up to there; -1: not known
        self._notes: list[bytes] = []  # to be shown before the next line
        self._stamp = b""  # of the last line
        self._newest = 0

    @property
    def finished(self) -> bool:
        return self._formatter.finished

    def read_some(self) -> bytes:
        """The next piece of output; b"" when there is no more for now."""
        if self.finished or self._done:
            return b""
        if self._number == 0 and not self._begin():
            return b""
        output = bytearray()
        if self._tail >= 0:
            last: deque[Entry | bytes] = deque(maxlen=self._tail)
            self._tail = -1
            self._counting = True
            for entries in self._blocks():
                last.extend(entries)
            self._counting = False
            self._formatter.add(output, last)
            return bytes(output)
        for entries in self._blocks():
            self._formatter.add(output, entries)
            if len(output) >= CHUNK_BYTES or self.finished:
                break
        return bytes(output)

    def rest(self, *, run_ended: bool) -> bytes:
        """A last line without end, of a run that has no more to say (its end may not be marked: a power cut)."""
        output = bytearray()
        if run_ended:
            self._formatter.add(output, [*self._noted(self._stamp), *self._joiner.flush()])
        return bytes(output)

    def _begin(self) -> bool:
        """Find the first block; False while there is none."""
        ring = self._ring
        self._newest = ring.newest_number()
        if self._newest == 0:
            return False
        self._last = 0 if self._follow else self._newest
        if self._tail >= 0:
            self._number = ring.start_of_tail(self._tail)
        elif self._since_ns:
            self._number = ring.start_of_time(self._since_ns, self._newest)
        else:
            self._number = ring.oldest_number(self._newest)
        head = ring.head(self._number)
        self._lines = head.lines if head is not None else -1
        return True

    def _blocks(self) -> Iterator[list[Entry | bytes]]:
        """The entries of block after block, up to the newest."""
        more = True
        # A writer that fills block after block would lead on a reader that does not follow for ever.
        while more and not (self._last and self._number > self._last):
            entries, more = self._next_entries()
            yield entries
        self._done = not self._follow

    def _next_entries(self) -> tuple[list[Entry | bytes], bool]:
        """Those of one block, and whether there is another block behind it."""
        ring = self._ring
        oldest = ring.oldest_number(self._newest)
        if self._number < oldest:  # the writer overtook us
            self._skip_to(oldest)
        # Looked up before the block is read: only a block that had a successor then is complete in what we read.
        if self._number >= self._newest:
            self._newest = ring.newest_after(self._newest)
        complete = self._number < self._newest
        records = ring.read_block(self._number, self._seq)
        if complete and (not records or (self._seq and records[0].seq != self._seq + 1) or _has_gap(records)):
            # Damaged, or overwritten just now: what is behind us then was not lost by damage.
            self._newest = ring.newest_after(self._newest)
            if self._number < ring.oldest_number(self._newest):
                return [], True
        entries: list[Entry | bytes] = []
        for record in records:
            missing = record.seq - self._seq - 1
            if self._seq and missing > 0:
                self._note(b"%d damaged record%s of this log cannot be shown" % (missing, b"s" * (missing > 1)))
            self._seq = record.seq
            if record.kind == LOST:
                self._note(b"%d bytes of output were dropped, they came too fast to be logged" % record.lost_bytes)
            elif record.kind == TEXT:
                if self._lines >= 0:
                    self._lines += record.data.count(b"\n")
                if self._notes:
                    entries.extend(self._noted(record.data[:TIME_SIZE]))
                self._stamp = record.data[:TIME_SIZE]
                # For a tail entries are counted.
                quick = self._formatter.quick(record.data) if not self._counting and self._joiner.is_idle else None
                if quick is not None:
                    entries.append(quick)
                else:
                    entries.extend(self._joiner.feed_lines(record.data))
            elif record.kind == RUN_END:
                entries.extend(self._joiner.feed(record))
        self._number += complete
        return entries, complete

    def _skip_to(self, number: int) -> None:
        head = self._ring.head(number)
        if head is not None and self._seq:
            missed, unit = head.lines - self._lines, b"lines"
            if self._lines < 0:
                missed, unit = head.first_seq - 1 - self._seq, b"records"
            if missed > 0:
                self._note(b"%d %s were overwritten before they were read" % (missed, unit))
            self._seq = head.first_seq - 1
            self._lines = head.lines
        self._number = number

    def _note(self, text: bytes) -> None:
        self._notes.append(b"[balenapy: " + text + b"]\n")

    def _noted(self, stamp: bytes) -> list[Entry]:
        notes, self._notes = self._notes, []
        return [Entry(stamp, STDERR, text) for text in notes]


def _has_gap(records: list[Record]) -> bool:
    return records[-1].seq - records[0].seq != len(records) - 1


def stamp_of(time_ns: int) -> bytes:
    """A time as conmon writes it in UTC, which is what we run it in; b"" for none."""
    if not time_ns:
        return b""
    second, rest = divmod(time_ns, 10**9)
    return b"%s.%09d+00:00" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode(), rest)
