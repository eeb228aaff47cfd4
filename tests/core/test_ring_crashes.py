"""Any sequence of appends, wraps, crashes at any byte of any write, and re-opens, against a list of lines.

RING_EXAMPLES says how many sequences (2,000; `make test-ring` 100,000).
"""

from __future__ import annotations

import os
import zlib

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from balenapy.core.conmonlog import STDERR, STDOUT, LogPart, format_line
from balenapy.core.logview import LogOptions, LogView
from balenapy.core.ringlog import COMPRESSED_MAX_BYTES, Geometry, Ring, SpoolPosition, Writer
from tests.core.test_ringlog import MemoryFile

EXAMPLES = int(os.environ.get("RING_EXAMPLES", "2000"))
GEOMETRY = Geometry(5, 512)
TIME_NS = 1_700_000_000_000_000_000
SPOOL = 7  # its inode

steps = st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 3000))


def text(number: int) -> bytes:
    return b"%d " % number + b"\0x\xff" * (number * 7 % 17)


def line(number: int) -> bytes:
    # The clock jumps back now and then.
    time_ns = TIME_NS + number * 10**6 * (-1 if number % 11 == 0 else 1)
    return format_line(LogPart(time_ns, STDERR if number % 5 == 0 else STDOUT, True, text(number)))


def compress(data: bytes) -> bytes:
    return zlib.compress(data, 1)


def decompress(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, COMPRESSED_MAX_BYTES)
    except zlib.error as error:
        raise ValueError(str(error)) from error


class Model:
    """A ring with its writer, and what was said to it."""

    def __init__(self, *, compressed: bool) -> None:
        self.file = MemoryFile(GEOMETRY)
        self.compress = compress if compressed else None
        self.writer = self.open()
        self.spool: list[int] = []  # numbers of lines, as conmon's file has them
        self.taken = 0  # so many of them are behind a checkpoint
        self.next = 0

    def ring(self) -> Ring:
        return Ring(self.file.read, decompress=decompress)

    def open(self) -> Writer:
        return Writer(GEOMETRY, self.ring().end(), self.compress)

    def append(self, count: int, limit: int | None) -> None:
        """A batch; with `limit` only so many of its bytes get written."""
        self.spool += range(self.next, self.next + count)
        self.next += count
        if self.taken == 0:
            self.writer.append_checkpoint(SpoolPosition(SPOOL, 0))
        self.writer.append_text(b"".join(map(line, self.spool[self.taken :])))
        self.taken = len(self.spool)
        self.writer.append_checkpoint(SpoolPosition(SPOOL, self.taken))
        self.file.write(self.writer, limit)

    def crash(self) -> None:
        """The writer is gone; the spool is not."""
        found = self.ring().last_checkpoint()
        self.writer = self.open()
        self.taken = 0
        if found is not None:
            position, behind = found
            self.taken = position.offset
            self.writer.rewind(behind, self.ring().end())
            self.file.write(self.writer)
        self.append(0, None)

    def shown(self) -> tuple[list[int], int]:
        """Numbers of the lines, and how many notes there were between them."""
        view = LogView(self.ring(), LogOptions(), tty=True)
        output = b""
        while data := view.read_some():
            output += data
        output += view.rest(run_ended=True)
        numbers, notes = [], 0
        for one in output.split(b"\n")[:-1]:
            if one.startswith(b"["):
                notes += 1
                continue
            number = int(one.split(b" ")[0])
            assert one == text(number)
            numbers.append(number)
        return numbers, notes


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(compressed=st.booleans(), history=st.lists(steps, max_size=12))
def test_crashes_lose_and_double_nothing_and_the_newest_lines_are_there(
    compressed: bool, history: list[tuple[int, int, int]]
) -> None:
    model = Model(compressed=compressed)
    for count, what, limit in history:
        if what == 0:
            model.append(count, limit)
            model.crash()
        elif what == 1:
            model.crash()
        else:
            model.append(count, None)
    numbers, notes = model.shown()

    total = model.next
    assert notes == 0
    assert numbers == list(range(total - len(numbers), total))
    assert len(numbers) >= min(total, 8)  # three whole blocks hold more, whatever the lines


# A head alone in the newest block, and damage in the next place, where an older lap's records are.
@example(
    compressed=False,
    history=[
        (5, 1, 0), (6, 0, 433), (3, 0, 404), (7, 0, 531), (9, 1, 0),
        (7, 1, 0), (7, 1, 0), (9, 1, 0), (9, 1, 0), (1, 0, 145),
    ],
    flips=[1536],
)  # fmt: skip
@settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(compressed=st.booleans(), history=st.lists(steps, max_size=12), flips=st.lists(st.integers(0, 2559), max_size=3))
def test_power_cuts_and_flipped_bytes_cost_what_they_hit_and_are_told(
    compressed: bool, history: list[tuple[int, int, int]], flips: list[int]
) -> None:
    """After a power cut the spool is gone: what was not written is lost, never what was."""
    model = Model(compressed=compressed)
    lost: set[int] = set()
    for count, what, limit in history:
        if what == 0:
            first = model.next
            model.append(count, limit)
            lost |= set(range(first, model.next))  # some of these may be there all the same
            model.spool, model.taken = [], 0
            model.writer = model.open()
        else:
            model.append(count, None)
    before, _ = model.shown()
    for place in flips:
        model.file.data[4096 + place] ^= 0x10
    numbers, notes = model.shown()

    assert before == sorted(set(before))
    assert numbers == sorted(set(numbers))
    oldest = before[0] if before else 0
    assert set(range(oldest, model.next)) - set(before) <= lost
    # Behind a damaged head of the oldest block an older lap's last lines may still be there: true, whole and in order.
    assert all(number < oldest or number in lost for number in set(numbers) - set(before))
    inner = set(before) - set(numbers) - set(range(numbers[0] if numbers else model.next))
    if inner and numbers and max(inner) < numbers[-1]:
        assert notes > 0
    # And writing goes on.
    model.writer = model.open()
    model.spool, model.taken = [], 0
    model.append(3, None)
    again, _ = model.shown()
    assert again[-3:] == [model.next - 3, model.next - 2, model.next - 1]
