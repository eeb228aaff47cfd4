"""What probes are, and what their results mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import health
from balenapy.core.container import ContainerConfig, Health, HealthConfig, HealthResult
from balenapy.core.health import SECOND_NS, Probe

START_NS = 1_000 * SECOND_NS


def probe(*, start_period_s: int = 0, retries: int = 3) -> Probe:
    return Probe(("true",), SECOND_NS, SECOND_NS, start_period_s * SECOND_NS, retries)


def result(code: int, at_s: int = 0) -> HealthResult:
    begin_ns = START_NS + at_s * SECOND_NS
    return HealthResult(begin_ns, begin_ns + 1, code, "")


@pytest.mark.parametrize(
    ("test", "shell", "command"),
    [
        (None, None, None),
        ([], None, None),
        (["NONE"], None, None),
        (["CMD"], None, None),
        (["zz", "x"], None, None),
        (["CMD", "a", "b"], None, ("a", "b")),
        (["CMD-SHELL", "a b"], None, ("/bin/sh", "-c", "a b")),
        (["CMD-SHELL", "a b"], ["/bin/bash", "-ec"], ("/bin/bash", "-ec", "a b")),
    ],
)
def test_commands(test: list[str] | None, shell: list[str] | None, command: tuple[str, ...] | None) -> None:
    found = health.find_probe(ContainerConfig(healthcheck=HealthConfig(test=test), shell=shell))

    assert (found.command if found is not None else None) == command


def test_defaults_are_those_of_the_reference() -> None:
    found = health.find_probe(ContainerConfig(healthcheck=HealthConfig(test=["CMD", "x"])))

    assert found == Probe(("x",), 30 * SECOND_NS, 30 * SECOND_NS, 0, 3)
    assert health.find_probe(ContainerConfig()) is None
    assert found.exceeded == "Health check exceeded timeout (30s)"


def test_only_so_many_failures_in_a_row_make_it_unhealthy() -> None:
    state = health.begin(None)
    changes = [health.record(state, result(code), probe(), START_NS) for code in (1, 1, 0, 1, -1, 3, 1, 0)]

    assert changes == [False, False, True, False, False, True, False, True]
    assert (state.status, state.failing_streak) == ("healthy", 0)


def test_failures_in_the_start_period_do_not_count_until_it_was_healthy_once() -> None:
    state = health.begin(None)
    waiting = probe(start_period_s=10, retries=1)

    assert not health.record(state, result(1, 9), waiting, START_NS)
    assert (state.status, state.failing_streak) == ("starting", 0)
    assert health.record(state, result(0, 9), waiting, START_NS)
    assert health.record(state, result(1, 9), waiting, START_NS)
    assert state.status == "unhealthy"
    late = health.begin(state)
    assert health.record(late, result(1, 10), waiting, START_NS)


def test_a_start_begins_anew_and_keeps_the_log() -> None:
    state = health.begin(Health("unhealthy", 4, [result(1)]))

    assert (state.status, state.failing_streak, state.log) == ("starting", 0, [result(1)])


def test_nobody_who_stopped_probing_says_that_probes_failed() -> None:
    state = health.begin(None)
    health.record(state, result(0), probe(), START_NS)
    health.suspend(state)

    assert state.status == "unhealthy"
    assert not health.failed_probes(state)
    assert not health.failed_probes(None)
    for _ in range(3):
        health.record(state, result(1), probe(), START_NS)
    assert health.failed_probes(state)


@given(st.lists(st.integers(-1, 2), max_size=20), st.integers(1, 4))
def test_status_follows_from_the_last_results(codes: list[int], retries: int) -> None:
    state = health.begin(None)
    changed = [health.record(state, result(code), probe(retries=retries), START_NS) for code in codes]

    streak = 0
    for code in codes:
        streak = 0 if code == 0 else streak + 1
    expected = "unhealthy" if streak >= retries else "healthy" if 0 in codes else "starting"
    if streak < retries and 0 in codes:
        # After it was unhealthy only a success makes it healthy again, and that begins a new streak.
        expected = "healthy"
    assert (state.status, state.failing_streak) == (expected, streak)
    assert [each.exit_code for each in state.log] == codes[-5:]
    assert sum(changed) <= len(codes)


@pytest.mark.parametrize(
    ("output", "shown"),
    [(b"", ""), (b"x" * 4096, "x" * 4096), (b"x" * 4097, "x" * 4096 + "..."), (b"\xff", "\ufffd")],
)
def test_long_output_is_cut(output: bytes, shown: str) -> None:
    assert health.show_output(output) == shown
