"""Health of a container: which command probes it, and what its results mean.

    (started) -> starting -> healthy <-> unhealthy

    starting   no probe succeeded yet; failures in the start period do not count
    healthy    the last probe succeeded, or fewer than `retries` in a row have failed since
    unhealthy  `retries` in a row have failed; or nobody probes: paused, stopped

A start makes it `starting` and keeps the log, as in the engine we replace.

Source: moby daemon/health.go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from balenapy.core.container import ContainerConfig, Health, HealthConfig, HealthResult
from balenapy.core.timefmt import show_duration

STARTING, HEALTHY, UNHEALTHY, NONE = "starting", "healthy", "unhealthy", "none"

SECOND_NS = 1_000_000_000
DEFAULT_INTERVAL_NS = 30 * SECOND_NS  # moby defaultProbeInterval
DEFAULT_TIMEOUT_NS = 30 * SECOND_NS
DEFAULT_RETRIES = 3
LOG_RESULTS = 5  # moby maxLogEntries
OUTPUT_MAX_BYTES = 4096  # moby maxOutputLen
DEFAULT_SHELL = ("/bin/sh", "-c")
FAILED_TO_RUN = -1  # the exit code of a probe that could not be started, or took too long


@dataclass(frozen=True, slots=True)
class Probe:
    """What is run how often."""

    command: tuple[str, ...]
    interval_ns: int
    timeout_ns: int
    start_period_ns: int
    retries: int

    @property
    def exceeded(self) -> str:
        """What the log says of one that took too long."""
        return f"Health check exceeded timeout ({show_duration(self.timeout_ns)})"


def find_probe(config: ContainerConfig) -> Probe | None:
    """The probe of a container (its config is merged with the image's); None: it has none."""
    health = config.healthcheck
    if health is None or not (command := _command(health, config.shell)):
        return None
    return Probe(
        command,
        health.interval or DEFAULT_INTERVAL_NS,
        health.timeout or DEFAULT_TIMEOUT_NS,
        health.start_period,
        health.retries or DEFAULT_RETRIES,
    )


def _command(health: HealthConfig, shell: Sequence[str] | None) -> tuple[str, ...]:
    kind, *words = health.test or [""]
    if kind == "CMD":
        return tuple(words)
    if kind == "CMD-SHELL":
        return (*(shell or DEFAULT_SHELL), *words)
    return ()  # NONE, or a word that nobody knows


def begin(before: Health | None) -> Health:
    """At a start."""
    return Health(STARTING, 0, list(before.log) if before is not None else [])


def suspend(health: Health) -> None:
    """Nobody probes any more."""
    health.status = UNHEALTHY


def failed_probes(health: Health | None) -> bool:
    """Whether it is probes that say unhealthy."""
    return health is not None and health.status == UNHEALTHY and health.failing_streak > 0


def record(health: Health, result: HealthResult, probe: Probe, started_ns: int) -> bool:
    """Take one result in; true when the status has changed."""
    before = health.status
    health.log = [*health.log, result][-LOG_RESULTS:]
    if result.exit_code == 0:
        health.failing_streak = 0
        health.status = HEALTHY
    elif before != STARTING or result.start_ns - started_ns >= probe.start_period_ns:
        health.failing_streak += 1
        if health.failing_streak >= probe.retries:
            health.status = UNHEALTHY
    return health.status != before


def show_output(output: bytes) -> str:
    """What a result keeps of a probe's output."""
    text = output[:OUTPUT_MAX_BYTES].decode(errors="replace")
    return text + "..." if len(output) > OUTPUT_MAX_BYTES else text
