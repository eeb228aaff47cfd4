"""Does a stopped container run again, and after how long."""

from __future__ import annotations

from dataclasses import dataclass

from balenapy.core.container import RestartPolicy, State

BACKOFF_FIRST_S = 0.1  # moby restartmanager defaultTimeout
BACKOFF_MAX_S = 60.0  # moby maxRestartTimeout
LONG_RUN_S = 10.0  # a run of this length resets the delay


@dataclass(frozen=True, slots=True)
class Exit:
    code: int  # 0..255, 128+n for a death by signal n
    ran_s: float
    manually_stopped: bool = False  # stop or kill by a user, in this run or before
    cancelled: bool = False  # stop, or a kill that cancels the policy for this exit
    unhealthy: bool = False


@dataclass(frozen=True, slots=True)
class Stay:
    pass


@dataclass(frozen=True, slots=True)
class Restart:
    after_s: float


Decision = Stay | Restart


def decide_restart(policy: RestartPolicy, exit: Exit, count: int, last_delay_s: float) -> Decision:
    """Say whether a stopped container runs again, and after how long.

    Args:
        exit: how and by whom the run ended.
        count: restarts since a user last started it; `on-failure:N` gives up at N.
        last_delay_s: the delay of the previous answer, 0.0 at first.

    Returns:
        `Stay()` or `Restart(after_s)`: 0.1 at first and after a run of 10 s, then doubled up to 60.

    Source: moby restartmanager/restartmanager.go, ShouldRestart; unhealthy counts as failure: balena-engine.
    """
    if exit.cancelled or not _wants_restart(policy, exit, count):
        return Stay()
    if exit.ran_s >= LONG_RUN_S or last_delay_s <= 0:
        return Restart(BACKOFF_FIRST_S)
    return Restart(min(last_delay_s * 2, BACKOFF_MAX_S))


def _wants_restart(policy: RestartPolicy, exit: Exit, count: int) -> bool:
    if policy.name == "always":
        return True
    if policy.name == "unless-stopped":
        return not exit.manually_stopped
    if policy.name == "on-failure":
        within = policy.maximum_retry_count == 0 or count < policy.maximum_retry_count
        return within and (exit.code != 0 or exit.unhealthy)
    return False


def starts_with_daemon(policy: RestartPolicy, state: State) -> bool:
    """Say whether a container that is not running is started when the daemon starts.

    `always` is started even if a user had stopped it. Source: moby daemon.go restore, ShouldRestart.
    """
    if not state.ever_started:
        return False
    if policy.name == "always":
        return True
    if policy.name == "unless-stopped":
        return not state.manually_stopped
    return policy.name == "on-failure" and state.exit_code != 0
