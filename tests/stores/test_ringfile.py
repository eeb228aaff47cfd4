from __future__ import annotations

import os
from pathlib import Path

import pytest

from balenapy.core.conmonlog import STDERR, STDOUT, LogPart, format_line
from balenapy.core.logview import Joiner
from balenapy.stores.ringfile import SpoolDrain, open_ring

SIZE = 256 << 10


def line(number: int, stream: int = STDOUT, ends: bool = True) -> bytes:
    return format_line(LogPart(1_700_000_000_000_000_000 + number, stream, ends, b"line %d" % number))


def texts(path: Path) -> list[bytes]:
    opened = open_ring(path)
    if opened is None:
        return []
    fd, ring = opened
    try:
        joiner = Joiner()
        newest = ring.newest_number()
        numbers = range(ring.oldest_number(newest), newest + 1) if newest else ()
        found = [e.data for n in numbers for r in ring.read_block(n) for e in joiner.feed(r)]
        return found + [entry.data for entry in joiner.flush()]
    finally:
        os.close(fd)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    return tmp_path / "ring.log"


def drain(spool: Path, ring: Path, *, adopt: bool = False) -> SpoolDrain:
    found = SpoolDrain(spool, ring, SIZE, adopt=adopt)
    while found.drain_some():
        pass
    return found


def test_a_silent_container_has_no_file(spool: Path, ring: Path) -> None:
    one = drain(spool, ring)
    one.end_run()
    one.close()
    assert not ring.exists()
    assert open_ring(ring) is None


def test_lines_are_taken_over_once_and_the_file_has_its_size_at_once(spool: Path, ring: Path) -> None:
    spool.write_bytes(line(0) + line(1, STDERR) + line(2)[:20])
    one = drain(spool, ring)
    size = ring.stat().st_size
    assert size <= SIZE
    with spool.open("ab") as file:
        file.write(line(2)[20:])
    assert one.waiting_bytes > 0
    assert one.drain_some() > 0
    assert one.drain_some() == 0
    assert one.waiting_bytes == 0
    one.close()

    assert texts(ring) == [b"line 0\n", b"line 1\n", b"line 2\n"]
    assert ring.stat().st_size == size


def test_a_replaced_spool_is_read_to_its_end_first(spool: Path, ring: Path) -> None:
    one = drain(spool, ring)
    spool.write_bytes(line(0))
    other = spool.with_name("log.tmp")
    other.write_bytes(line(1))
    other.rename(spool)
    while one.drain_some():
        pass
    one.close()

    assert texts(ring) == [b"line 0\n", b"line 1\n"]


@pytest.mark.parametrize("cut", range(0, 700, 13))
def test_a_crash_in_the_middle_of_a_write_loses_and_doubles_nothing(spool: Path, ring: Path, cut: int) -> None:
    spool.write_bytes(b"".join(map(line, range(10))))
    drain(spool, ring).close()
    with spool.open("ab") as file:
        file.write(b"".join(map(line, range(10, 25))))
    before = ring.read_bytes()
    drain(spool, ring, adopt=True).close()
    after = ring.read_bytes()
    # Play the last write again, only its first `cut` bytes.
    start = next((i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b), len(before))
    ring.write_bytes(before[:start] + after[start : start + cut] + before[start + cut :])

    drain(spool, ring, adopt=True).close()

    assert texts(ring) == [b"line %d\n" % n for n in range(25)]


def test_a_line_without_end_is_not_continued_by_the_next_run(spool: Path, ring: Path) -> None:
    spool.write_bytes(line(0, ends=False))
    one = drain(spool, ring)
    one.end_run()
    one.close()
    spool.unlink()
    spool.write_bytes(line(1))
    drain(spool, ring).close()

    assert texts(ring) == [b"line 0", b"line 1\n"]


def test_a_file_that_is_no_ring_is_put_aside(spool: Path, ring: Path) -> None:
    ring.write_bytes(b"x" * 10_000)
    spool.write_bytes(line(0))
    drain(spool, ring).close()

    assert texts(ring) == [b"line 0\n"]
    assert ring.with_name("ring.log.broken").exists()


def test_memory_of_what_was_taken_over_is_given_back(ring: Path) -> None:
    directory = Path("/dev/shm") / f"bpt-{os.getpid()}"
    directory.mkdir()
    try:
        spool = directory / "log"
        spool.write_bytes(b"".join(map(line, range(20_000))))
        full = spool.stat().st_blocks
        one = drain(spool, ring)
        assert spool.stat().st_blocks < full / 4
        one.close()
    finally:
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    assert texts(ring)[-1] == b"line 19999\n"


def test_the_oldest_lines_go_first(spool: Path, ring: Path) -> None:
    spool.write_bytes(b"".join(map(line, range(20_000))))
    drain(spool, ring).close()

    found = texts(ring)
    assert found[-1] == b"line 19999\n"
    assert len(found) > 3000
    assert found == [b"line %d\n" % n for n in range(20_000 - len(found), 20_000)]
