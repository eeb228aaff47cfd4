"""Health checks: probes containers while they run. What results mean is in `core/health`.

One task a running container that has a probe, a child of its supervisor's. A probe is an exec like any other, seen in
events and `ps`; it never overlaps the next. Only a change of the status is written to disk: a result every few seconds
would wear out flash, and after a crash of the engine the status goes on from where it was.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from balenapy.core import health
from balenapy.core.container import Container, HealthResult, Status
from balenapy.core.execconfig import ExecConfig
from balenapy.core.health import Probe
from balenapy.core.restart import Exit, Restart, decide_restart
from balenapy.errors import EngineError

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.engine.exec import Exec

log = logging.getLogger(__name__)

NS = 1e-9
AFTER_TROUBLE_S = 5.0  # of our own: probing goes on


@dataclass(slots=True, eq=False)
class _Watch:
    """The probing of one run."""

    wanted: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class HealthChecks:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watches: dict[str, _Watch] = {}

    def begin(self, container: Container) -> None:
        """At a start, before it is told."""
        state = container.state
        state.health = health.begin(state.health) if health.find_probe(container.config) is not None else None

    def suspend(self, container: Container) -> None:
        """Paused, or about to end: no more probes."""
        watch = self._watches.get(container.id)
        if watch is not None:
            watch.wanted = trio.Event()
            watch.scope.cancel()
        if container.state.health is not None:
            health.suspend(container.state.health)

    def resume(self, container: Container) -> None:
        """Not paused any more: the next probe comes one interval from now."""
        watch = self._watches.get(container.id)
        if watch is not None:
            watch.wanted.set()

    async def watch(self, container: Container) -> None:
        """Probe a running container until cancelled."""
        probe = health.find_probe(container.config)
        if probe is None:
            return
        if container.state.health is None:  # started by an engine that did not probe
            self.begin(container)
        watch = self._watches[container.id] = _Watch()
        if container.state.status is not Status.PAUSED:
            watch.wanted.set()
        try:
            while True:
                await watch.wanted.wait()
                with trio.CancelScope() as watch.scope:
                    await self._probe_again_and_again(container, probe)
        finally:
            if self._watches.get(container.id) is watch:
                del self._watches[container.id]

    async def _probe_again_and_again(self, container: Container, probe: Probe) -> None:
        while True:
            await trio.sleep(probe.interval_ns * NS)
            try:
                result, found = await self._probe(container, probe)
                await self._take(container, probe, result)
                if found is not None:
                    await found.ended.wait()  # one that was killed may take its time
            except Exception:  # the wall around one container
                log.exception("health check failed container=%s", container.short_id)
                await trio.sleep(AFTER_TROUBLE_S)

    async def _probe(self, container: Container, probe: Probe) -> tuple[HealthResult, Exec | None]:
        """Run it once. Cancellation: the process is killed."""
        start_ns = time.time_ns()
        code, output = health.FAILED_TO_RUN, probe.exceeded
        found = None
        try:
            config = ExecConfig(cmd=list(probe.command), attach_stdout=True, attach_stderr=True)
            found = self._engine.execs.create(container, config, container.id)
            with trio.move_on_after(probe.timeout_ns * NS):
                captured = await self._engine.execs.run(found, health.OUTPUT_MAX_BYTES)
                code, output = captured.exit_code, health.show_output(captured.output)
        except EngineError as error:
            output = error.message
        return HealthResult(start_ns, time.time_ns(), code, output), found

    async def _take(self, container: Container, probe: Probe, result: HealthResult) -> None:
        state = container.state
        if state.health is None or not health.record(state.health, result, probe, state.started_ns):
            return
        status = state.health.status
        log.info("health changed container=%s status=%s", container.short_id, status)
        self._engine.events.container(container, f"health_status: {status}")
        if status == health.UNHEALTHY:
            self._restart_if_wanted(container, result.exit_code)
        try:
            await self._engine.containers.store.update_state(container)
        except EngineError as error:
            log.error("health cannot be stored container=%s error=%s", container.short_id, error.message)

    def _restart_if_wanted(self, container: Container, code: int) -> None:
        """With --experimental an unhealthy container is restarted when its policy would. Source: B daemon/health.go."""
        if not self._engine.config.experimental:
            return
        state = container.state
        ran_s = (time.time_ns() - state.started_ns) * NS
        seen = Exit(code, ran_s, manually_stopped=False, cancelled=False, unhealthy=True)
        if isinstance(decide_restart(container.host_config.restart_policy, seen, state.restart_count, 0.0), Restart):
            # Not in our task: it ends with the run.
            self._engine.nursery.start_soon(self._restart, container)

    async def _restart(self, container: Container) -> None:
        try:
            await self._engine.supervisors.restart(container)
        except EngineError as error:
            log.error("cannot restart unhealthy container=%s error=%s", container.short_id, error.message)
