from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.membudget import limits_for
from balenapy.core.staging import WAIT_MAX_S, WAIT_STEP_S, Pressure, must_wait, parse_pressure

MIB = 1 << 20


def test_pressure_is_read_as_the_kernel_writes_it() -> None:
    text = "some avg10=12.34 avg60=1.00 avg300=0.10 total=99\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    assert parse_pressure(text) == 12.34
    assert parse_pressure("") == 0.0


def test_the_first_start_does_not_wait_for_a_processor() -> None:
    busy = Pressure(cpu=99.0)
    assert not must_wait(busy, others=0, waited_s=0.0)
    assert must_wait(busy, others=1, waited_s=0.0)
    assert not must_wait(Pressure(cpu=20.0), others=3, waited_s=0.0)


def test_nobody_starts_while_memory_is_short_but_not_for_ever() -> None:
    short = Pressure(memory=50.0)
    assert must_wait(short, others=0, waited_s=WAIT_MAX_S - WAIT_STEP_S)
    assert not must_wait(short, others=0, waited_s=WAIT_MAX_S)


def test_a_small_board_does_less_at_once() -> None:
    zero = limits_for(0, 512 * MIB, 1)
    big = limits_for(0, 8192 * MIB, 4)
    tight = limits_for(48 * MIB, 512 * MIB, 4)

    assert (zero.workers, zero.starts, zero.spool_bytes) == (1, 1, 16 * MIB)
    assert (big.workers, big.starts, big.worker_bytes) == (2, 4, 512 * MIB)
    assert (tight.workers, tight.downloads, tight.starts, tight.spool_bytes) == (1, 1, 1, 6 * MIB)
    assert tight.worker_bytes == 64 * MIB


@given(budget=st.integers(0, 1 << 40), machine=st.integers(1 << 20, 1 << 44), cpus=st.integers(1, 64))
def test_something_is_always_possible_and_more_memory_never_means_less(budget: int, machine: int, cpus: int) -> None:
    limits = limits_for(budget, machine, cpus)
    more = limits_for(budget * 2, machine * 2, cpus)
    for name in ("workers", "worker_bytes", "downloads", "starts", "spool_bytes"):
        assert 1 <= getattr(limits, name) <= getattr(more, name)
