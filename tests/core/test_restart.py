from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.container import RestartPolicy, State
from balenapy.core.restart import Exit, Restart, Stay, decide_restart, starts_with_daemon

policies = st.builds(
    RestartPolicy, st.sampled_from(["", "no", "always", "unless-stopped", "on-failure"]), st.integers(0, 5)
)
exits = st.builds(Exit, st.integers(0, 255), st.floats(0, 1e6), st.booleans(), st.booleans(), st.booleans())


@pytest.mark.parametrize(
    ("policy", "exit", "count", "restarts"),
    [
        (RestartPolicy(""), Exit(1, 0), 0, False),
        (RestartPolicy("no"), Exit(1, 0), 0, False),
        (RestartPolicy("always"), Exit(0, 0), 99, True),
        (RestartPolicy("always"), Exit(0, 0, manually_stopped=True), 0, True),
        (RestartPolicy("always"), Exit(0, 0, cancelled=True), 0, False),
        (RestartPolicy("unless-stopped"), Exit(0, 0), 0, True),
        (RestartPolicy("unless-stopped"), Exit(0, 0, manually_stopped=True), 0, False),
        (RestartPolicy("on-failure"), Exit(0, 0), 0, False),
        (RestartPolicy("on-failure"), Exit(1, 0), 1000, True),
        (RestartPolicy("on-failure"), Exit(0, 0, unhealthy=True), 0, True),
        (RestartPolicy("on-failure", 3), Exit(1, 0), 2, True),
        (RestartPolicy("on-failure", 3), Exit(1, 0), 3, False),
    ],
)
def test_the_policy_decides(policy: RestartPolicy, exit: Exit, count: int, restarts: bool) -> None:
    assert restarts == isinstance(decide_restart(policy, exit, count, 0.0), Restart)


def test_the_delay_doubles_up_to_a_minute_and_a_long_run_resets_it() -> None:
    policy, delay, delays = RestartPolicy("always"), 0.0, []
    for _ in range(12):
        decision = decide_restart(policy, Exit(1, 0.5), 0, delay)
        assert isinstance(decision, Restart)
        delay = decision.after_s
        delays.append(delay)

    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 60, 60]
    assert decide_restart(policy, Exit(1, 10.0), 0, delay) == Restart(0.1)


@given(policies, exits, st.integers(0, 10), st.floats(0, 60))
def test_an_answer_is_a_stay_or_a_delay_in_bounds(policy: RestartPolicy, exit: Exit, count: int, last: float) -> None:
    decision = decide_restart(policy, exit, count, last)

    assert isinstance(decision, Stay) or 0 < decision.after_s <= 60
    if exit.cancelled:
        assert decision == Stay()


@pytest.mark.parametrize(
    ("policy", "state", "starts"),
    [
        ("always", State(ever_started=True, manually_stopped=True), True),
        ("always", State(), False),
        ("unless-stopped", State(ever_started=True), True),
        ("unless-stopped", State(ever_started=True, manually_stopped=True), False),
        ("on-failure", State(ever_started=True, exit_code=1), True),
        ("on-failure", State(ever_started=True), False),
        ("no", State(ever_started=True, exit_code=1), False),
    ],
)
def test_what_starts_with_the_daemon(policy: str, state: State, starts: bool) -> None:
    assert starts == starts_with_daemon(RestartPolicy(policy), state)
