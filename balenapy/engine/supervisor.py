"""Supervisors: one task a container that runs or waits to be restarted.

The task starts the container, waits on the pidfd of its conmon, deals with the exit, asks the restart policy, waits and
starts again. It alone moves the container between running, restarting and exited; API calls send signals and wait
for it. `start` holds the container's lock while it starts (removal and update wait); dealing with an exit does not
take the lock, so whoever holds it may wait for an exit.

What survives us: conmon, the container and the exit code on disk. `recover` finds them again by the pid and start time
of conmon in the row, and cleans up after starts that were cut off and exits that nobody saw.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core import lifecycle, staging
from balenapy.core.container import Container, Status
from balenapy.core.health import failed_probes
from balenapy.core.ociconfig import cgroups_path
from balenapy.core.restart import Exit, Restart, decide_restart, starts_with_daemon
from balenapy.core.signals import parse_signal
from balenapy.engine.attach import Attachments
from balenapy.engine.bundles import Bundles
from balenapy.engine.health import HealthChecks
from balenapy.errors import Conflict, EngineError, InvalidParameter, NotModified, SystemFailure
from balenapy.linux import conmon, syscalls
from balenapy.linux.cgroups import ContainerCgroup
from balenapy.linux.conmon import Bundle, RuntimeRefused
from balenapy.linux.hostfacts import read_pressure
from balenapy.linux.process import ProcessHandle, child_pids, command_line
from balenapy.linux.runtime import Runtime, familiar_message, start_failure
from balenapy.linux.watch import DirectoryWatcher

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

RESIZE_APART_S = 0.05  # enough for conmon to have read the size before
SIGKILL = 9
STOP_TIMEOUT_S = 10  # moby container.DefaultStopTimeout
FIRST_SIGNAL_LOST_S = 2  # moby daemon/stop.go
KILL_DIRECTLY_S = 10  # moby daemon/kill.go
UNDO_TIMEOUT_S = 30
SHUTDOWN_GRACE_S = 10
UNKNOWN_EXIT_CODE = 137  # conmon and container were killed together
CANNOT_START_CODE = 128  # moby daemon/start.go


class Waiter:
    """Somebody who waits for a container to stop or to be removed."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._exit_code = 0
        self._error = ""

    def tell(self, exit_code: int, error: str = "") -> None:
        if not self._done.is_set():
            self._exit_code, self._error = exit_code, error
            self._done.set()

    async def result(self) -> tuple[int, str]:
        """(exit code, error text)."""
        await self._done.wait()
        return self._exit_code, self._error


@dataclass(slots=True, eq=False)
class Run:
    """One run of a container, from the runtime's create to the end of cleaning up."""

    container: Container
    bundle: Bundle
    runtime: Runtime
    cgroup: ContainerCgroup
    conmon: ProcessHandle
    init: ProcessHandle | None = None  # the container's first process
    began: float = 0.0  # trio time
    watch: int = -1
    size: tuple[int, int] | None = None  # of the terminal, as asked for last
    sizing: bool = False
    gone: trio.Event = field(default_factory=trio.Event)  # nothing of it is mounted any more

    def close(self) -> None:
        self.conmon.close()
        if self.init is not None:
            self.init.close()


class _RestartCancelled(Conflict):
    """A stop or kill came while a restart was being made."""


@dataclass(slots=True, eq=False)
class _Supervised:
    """A container that has a task."""

    run: Run | None = None
    begun: bool = False  # it holds, or has held, the container's lock
    cancelled: trio.Event = field(default_factory=trio.Event)  # stop or kill: no restart after the coming exit
    last_delay_s: float = 0.0
    keep: bool = False  # `restart`: auto-remove must not fire at its stop
    started: trio.Event = field(default_factory=trio.Event)  # the first start ended, well or not
    error: EngineError | None = None  # why it did not
    done: trio.Event = field(default_factory=trio.Event)  # nothing of it runs and everything is cleaned up


class Supervisors:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._active: dict[str, _Supervised] = {}
        self._waiters: dict[str, list[tuple[str, Waiter]]] = {}
        self._watcher = DirectoryWatcher()
        self._bundles = Bundles(engine)
        self._stopping = False
        self.attachments = Attachments(engine)
        self.health = HealthChecks(engine)

    # -- what others ask --

    def run_of(self, container: Container) -> Run:
        """The present run. Raises: Conflict when there is none."""
        lifecycle.check_running(container)
        active = self._active.get(container.id)
        if active is None or active.run is None:
            raise Conflict(f"Container {container.id} is not running")
        return active.run

    def find_run(self, container: Container) -> Run | None:
        active = self._active.get(container.id)
        return active.run if active is not None else None

    def bundle_of(self, container: Container) -> Bundle | None:
        run = self.find_run(container)
        return run.bundle if run is not None else None

    def is_running(self, container: Container) -> bool:
        return self.find_run(container) is not None

    async def wait_until_unmounted(self, container: Container) -> None:
        """Of a container that does not run: until nothing of its last run is there."""
        run = self.find_run(container)
        if run is not None:
            await run.gone.wait()

    def wait(self, container: Container, condition: str) -> Waiter:
        """Register for `not-running`, `next-exit` or `removed`; anything else is the first."""
        waiter = Waiter()
        if condition not in ("next-exit", "removed"):
            condition = "not-running"
            if not container.state.running:
                waiter.tell(container.state.exit_code)
                return waiter
        self._waiters.setdefault(container.id, []).append((condition, waiter))
        return waiter

    async def wait_until_stopped(self, container: Container) -> None:
        await self.wait(container, "not-running").result()

    async def wait_until_cleaned_up(self, container: Container) -> None:
        """Until nothing of its last run is left, mounts included."""
        active = self._active.get(container.id)
        if active is not None:
            await active.done.wait()

    def forget_waiter(self, container: Container, waiter: Waiter) -> None:
        """Whoever waited has gone."""
        waiters = self._waiters.get(container.id, [])
        waiters[:] = [entry for entry in waiters if entry[1] is not waiter]
        if not waiters:
            self._waiters.pop(container.id, None)

    def _tell_stopped(self, container: Container) -> None:
        waiters = self._waiters.pop(container.id, [])
        kept = [entry for entry in waiters if entry[0] == "removed"]
        if kept:
            self._waiters[container.id] = kept
        for condition, waiter in waiters:
            if condition != "removed":
                waiter.tell(container.state.exit_code)

    def tell_removed(self, container: Container) -> None:
        """The container is gone from the records."""
        for _, waiter in self._waiters.pop(container.id, []):
            waiter.tell(container.state.exit_code)

    def _tell_not_removed(self, container: Container, message: str) -> None:
        waiters = self._waiters.pop(container.id, [])
        for condition, waiter in waiters:
            if condition == "removed":
                waiter.tell(container.state.exit_code, message)
        kept = [entry for entry in waiters if entry[0] != "removed"]
        if kept:
            self._waiters[container.id] = kept

    # -- start --

    async def start(self, container: Container) -> None:
        """Start it and return once it runs.

        Raises: NotModified, Conflict, and whatever kept it from starting (then nothing is left of the attempt).
        Cancellation: the start goes on.
        """
        while True:
            lifecycle.check_start(container.state)
            active = self._active.get(container.id)
            if active is None:
                break
            await (active.done if active.started.is_set() else active.started).wait()
        if self._stopping:
            raise Conflict("the daemon is shutting down")
        container.state.restart_count = 0
        container.state.manually_stopped = False
        active = self._spawn(container)
        await active.started.wait()
        if active.error is not None:
            raise active.error

    def _spawn(
        self, container: Container, *, adopted: Run | None = None, after_s: float | None = None
    ) -> _Supervised:
        """Give the container its task. Sync, so that nobody else can meanwhile."""
        active = self._active[container.id] = _Supervised(run=adopted, begun=adopted is not None)
        self._engine.nursery.start_soon(
            self._supervise, container, active, after_s, name=f"container {container.short_id}"
        )
        return active

    async def _supervise(self, container: Container, active: _Supervised, after_s: float | None) -> None:
        try:
            await self._run_until_it_stays_down(container, active, after_s)
        except EngineError as error:
            active.error = error
        except Exception as error:  # the wall around one container
            log.exception("supervisor failed container=%s", container.short_id)
            active.error = SystemFailure(f"{container.id}: {error}")
        finally:
            if self._active.get(container.id) is active:
                del self._active[container.id]
            active.run = None
            active.started.set()
            active.done.set()
        if container.host_config.auto_remove and not active.keep:
            await self._remove_after_exit(container)

    async def _run_until_it_stays_down(
        self, container: Container, active: _Supervised, after_s: float | None
    ) -> None:
        """Raises: EngineError, when the first start fails."""
        first = active.run is None and after_s is None
        while True:
            if after_s is not None:
                with trio.move_on_after(after_s):
                    await active.cancelled.wait()
                if active.cancelled.is_set():
                    await self._stay_down(container)
                    return
            if active.run is None:
                try:
                    async with self._engine.locks(f"container/{container.id}"):
                        await self._begin(container, active)
                except EngineError as error:
                    if first:
                        raise
                    if not isinstance(error, _RestartCancelled):
                        log.error("restart failed container=%s error=%s", container.short_id, error.message)
                    await self._stay_down(container)
                    return
            first = False
            active.started.set()
            run = active.run
            assert run is not None
            await self._follow(run)
            after_s = await self._end(run, active)
            active.run = None
            if after_s is None:
                return

    async def _follow(self, run: Run) -> None:
        """Return when the run has ended."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.health.watch, run.container)
            await run.conmon.wait()
            nursery.cancel_scope.cancel()

    async def _stay_down(self, container: Container) -> None:
        """A restart was cancelled or failed: the container stays exited."""
        if container.state.status is Status.RESTARTING:
            lifecycle.move(container.state, Status.EXITED)
        self._tell_stopped(container)
        await self._store(container)

    async def _remove_after_exit(self, container: Container) -> None:
        if container.state.running or self._active.get(container.id) is not None:
            return
        try:
            await self._engine.containers.remove_after_exit(container)
        except Conflict:
            pass  # somebody removes it already
        except EngineError as error:
            log.error("auto-remove failed container=%s error=%s", container.short_id, error.message)
            self._tell_not_removed(container, error.message)
        except Exception as error:  # the wall around one container
            log.exception("auto-remove failed container=%s", container.short_id)
            self._tell_not_removed(container, str(error))

    async def _begin(self, container: Container, active: _Supervised) -> None:
        """One start, from the network to the event. Raises: EngineError, with everything undone."""
        state = container.state
        if state.status is not Status.RESTARTING:
            lifecycle.check_start(state)
        active.begun = True
        try:
            await self._create_and_start(container, active)
        except BaseException as error:
            with trio.move_on_after(UNDO_TIMEOUT_S, shield=True):
                await self._undo(container, active)
            if isinstance(error, _RestartCancelled):
                raise  # it is exited as its last run left it
            if isinstance(error, OSError):  # a file of ours that cannot be written
                error = SystemFailure(f"cannot start {container.id}: {error}")
            if not isinstance(error, EngineError):
                raise
            code = 0
            if isinstance(error, RuntimeRefused):
                failure = start_failure(familiar_message(error.message), container.path)
                code, error = failure.exit_code, failure.error
            state.exit_code = code or state.exit_code or CANNOT_START_CODE
            state.error = error.message
            await self._store(container)
            raise error from None

    async def _create_and_start(self, container: Container, active: _Supervised) -> None:
        engine, state, files = self._engine, container.state, self._engine.limiters.files
        runtime = engine.runtimes.get(container.host_config.runtime)
        bundle = self._bundles.of(container.id)
        exit_dir = self._exit_dir(container)

        attachment = await engine.networks.attach(container)
        mounts = await engine.volumes.mount(container)

        def prepare() -> dict[str, Any]:
            exit_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            conmon.clear_exit_code(exit_dir)
            self._bundles.mount_rootfs(container)
            return self._bundles.write_spec(container, mounts, attachment)

        spec = await trio.to_thread.run_sync(prepare, limiter=files)
        log_options = await engine.logs.prepare_run(container, bundle)
        argv = conmon.conmon_argv(
            engine.runtimes.conmon,
            container.id,
            runtime.command,
            exit_dir,
            tty=container.config.tty,
            stdin=container.config.open_stdin,
            keep_stdin=container.config.tty or not container.config.stdin_once,
            log=log_options,
        )
        runtime.cgroups.expect_moves_nowait()
        created = await conmon.create(argv, bundle)
        cgroup = runtime.cgroups.of_spec(spec["linux"]["cgroupsPath"])
        run = Run(container, bundle, runtime, cgroup, created.conmon, ProcessHandle.open(created.pid))
        active.run = run
        await engine.logs.begin_run(container, bundle, run.conmon)
        await self.attachments.begin_run(container, bundle)
        self._watch(run)
        if active.cancelled.is_set():
            raise _RestartCancelled(f"the restart of {container.id} was cancelled")
        started_ns = time.time_ns()  # before anything is written: `logs --since StartedAt` shows all of the run
        await runtime.start(container.id)
        run.began = trio.current_time()
        before = (state.pid, state.status)
        # From here on a signal reaches the process itself.
        stopped_before = active.cancelled.is_set()
        lifecycle.move(state, Status.RUNNING)
        state.pid = created.pid
        state.exit_code, state.error, state.oom_killed = 0, "", False
        state.started_ns = started_ns
        state.ever_started = True
        self.health.begin(container)
        state.conmon_pid, state.conmon_start_time = run.conmon.pid, run.conmon.start_time
        try:
            await engine.containers.store.update_state(container)
        except BaseException:
            state.pid, state.status = before
            raise
        engine.events.container(container, "start")
        if stopped_before and run.init is not None:  # stopped while it was being restarted
            run.init.send_signal(SIGKILL)

    def _watch(self, run: Run) -> None:
        container = run.container

        def changed(name: str) -> None:
            if name == "oom":
                self._engine.events.container(container, "oom")
            elif name in ("log", ""):
                self._engine.logs.changed(container.id)

        run.watch = self._watcher.watch(run.bundle.path, changed)

    async def _undo(self, container: Container, active: _Supervised) -> None:
        """After a start that failed or was cut off: end what came to be, take everything away."""
        run, active.run = active.run, None
        if run is not None:
            self._watcher.unwatch(run.watch)
            run.close()
        await self._clean_up(container, kill=True)
        if run is not None:
            run.gone.set()
        self.attachments.end_run(container)

    # -- exit --

    async def _end(self, run: Run, active: _Supervised) -> float | None:
        """Deal with an exit; returns after how long the container starts again, None if it stays down."""
        container, state = run.container, run.container.state
        code = await self._exit_code(run)
        oom_killed = run.cgroup.oom_kills() > 0
        exit = Exit(
            code=code,
            ran_s=trio.current_time() - run.began,
            manually_stopped=state.manually_stopped,
            cancelled=active.cancelled.is_set() or self._stopping,
            unhealthy=failed_probes(state.health),
        )
        decision = decide_restart(
            container.host_config.restart_policy, exit, state.restart_count, active.last_delay_s
        )
        state.pid, state.conmon_pid, state.conmon_start_time = 0, 0, 0
        state.exit_code, state.oom_killed = code, oom_killed
        state.finished_ns = time.time_ns()
        self.health.suspend(container)
        after_s: float | None = None
        if isinstance(decision, Restart):
            after_s = active.last_delay_s = decision.after_s
            state.restart_count += 1
            lifecycle.move(state, Status.RESTARTING)
        else:
            lifecycle.move(state, Status.EXITED)
        self._tell_stopped(container)
        self._engine.events.container(container, "die", exitCode=str(code))
        self._watcher.unwatch(run.watch)
        self.attachments.end_run(container)
        await self._engine.logs.end_run(container)
        run.close()
        await self._clean_up(container, kill=False, cgroup=run.cgroup)
        run.gone.set()
        if not (container.host_config.auto_remove and after_s is None and not active.keep):
            await self._store(container)  # else the row is about to go
        return after_s

    async def _exit_code(self, run: Run) -> int:
        """From the file conmon wrote; when conmon itself was killed, the container is ended too."""
        run.conmon.reap()
        code = conmon.read_exit_code(self._exit_dir(run.container))
        if code is not None:
            return code
        log.error("conmon died before its container container=%s", run.container.short_id)
        run.cgroup.kill_all()
        if run.init is None:
            return UNKNOWN_EXIT_CODE
        run.init.send_signal(SIGKILL)
        with trio.move_on_after(KILL_DIRECTLY_S):
            await run.init.wait()
        return run.init.reap() or UNKNOWN_EXIT_CODE

    async def _clean_up(self, container: Container, *, kill: bool, cgroup: ContainerCgroup | None = None) -> None:
        """Take away what a run had outside the records. Idempotent; what fails is logged, the rest is still done.

        Args:
            kill: something may still run; else `cgroup` is that of a container whose first process is dead.
        """

        async def attempt(what: str, call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
            try:
                await call(*arguments)
            except (EngineError, OSError) as error:
                log.error("cannot %s container=%s error=%s", what, container.short_id, error)

        orphans: list[ProcessHandle] = []
        if kill:
            await attempt("end conmon", self._kill_conmon, container, orphans)
        with suppress(InvalidParameter):  # the runtime is no longer configured
            runtime = self._engine.runtimes.get(container.host_config.runtime)
            await attempt("delete from the runtime", runtime.delete, container.id, cgroup)
        if kill:
            await attempt("remove the cgroup", self._remove_cgroup, container)
            await attempt("reap", self._reap, orphans)
            await attempt("end the log", self._engine.logs.end_run, container)
        await attempt("detach from networks", self._engine.networks.detach, container)
        await attempt("release volumes", self._engine.volumes.unmount, container)
        await attempt("unmount", self._unmount, container.id)

    async def _unmount(self, container_id: str) -> None:
        await trio.to_thread.run_sync(self._bundles.unmount, container_id, limiter=self._engine.limiters.files)

    async def _kill_conmon(self, container: Container, orphans: list[ProcessHandle]) -> None:
        """End conmon; its children (the runtime, the container), which become ours, are added to `orphans`."""
        bundle = self._bundles.of(container.id)
        pid = bundle.conmon_pid()
        handle = ProcessHandle.open(pid) if pid is not None else None
        if handle is not None:
            with handle:
                if container.id in command_line(handle.pid):  # else its pid has gone to somebody else
                    orphans += [one for child in child_pids(handle.pid) if (one := ProcessHandle.open(child))]
                    # Ended before the container is: so that it does not tell an exit of what never was.
                    handle.send_signal(SIGKILL)
                    with trio.move_on_after(KILL_DIRECTLY_S):
                        await handle.wait()
                    handle.reap()

    async def _reap(self, orphans: list[ProcessHandle]) -> None:
        for handle in orphans:
            with handle:
                handle.send_signal(SIGKILL)
                with trio.move_on_after(KILL_DIRECTLY_S):
                    await handle.wait()
                handle.reap()

    async def _remove_cgroup(self, container: Container) -> None:
        config = self._engine.config
        path = cgroups_path(container, config.cgroup_driver, config.cgroup_parent)
        cgroup = self._engine.runtimes.cgroups.of_spec(path)
        if not cgroup.remove():
            await trio.to_thread.run_sync(cgroup.kill_and_remove, limiter=self._engine.limiters.files)

    async def _store(self, container: Container) -> None:
        """Write the state; a container that runs or stopped is what it is even if that cannot be written."""
        try:
            await self._engine.containers.store.update_state(container)
        except EngineError as error:
            log.error("state cannot be stored container=%s error=%s", container.short_id, error.message)

    def _exit_dir(self, container: Container) -> Path:
        return self._engine.config.data_root / "containers" / container.id

    # -- stop, kill, restart, pause --

    async def stop(self, container: Container, timeout_s: int | None = None) -> None:
        """Stop signal, wait, SIGKILL, wait. `timeout_s` None: the container's own; negative: for ever.

        Raises: NotModified when it does not run.
        """
        if not container.state.running:
            raise NotModified("container already stopped")
        await self._stop(container, timeout_s)

    async def _stop(self, container: Container, timeout_s: int | None) -> None:
        if timeout_s is None:
            own = container.config.stop_timeout
            timeout_s = STOP_TIMEOUT_S if own is None else own
        active = self._active.get(container.id)
        waiter = self.wait(container, "not-running")
        self.health.suspend(container)
        try:
            delivered = self._signal(container, _stop_signal(container))
        except EngineError:
            delivered = False
        if not delivered:
            with trio.move_on_after(FIRST_SIGNAL_LOST_S) as scope:
                await waiter.result()
            if scope.cancelled_caught and container.state.running:
                self._signal(container, SIGKILL)
        with trio.move_on_after(math.inf if timeout_s < 0 else timeout_s) as scope:
            await waiter.result()
        if scope.cancelled_caught:
            log.info("did not stop in time, killed container=%s timeout_s=%d", container.short_id, timeout_s)
            await self._kill_and_wait(container, waiter)
        if active is not None and container.state.status is not Status.RESTARTING:
            await active.done.wait()
        self._engine.events.container(container, "stop")

    async def kill(self, container: Container, number: int = 0) -> None:
        """Send a signal; SIGKILL (and 0) waits for the exit.

        Raises: Conflict when it does not run.
        """
        if number in (0, SIGKILL):
            if not container.state.running:
                raise Conflict(f"Container {container.id} is not running")
            await self._kill_and_wait(container, self.wait(container, "not-running"))
        else:
            self._signal(container, number)

    async def _kill_and_wait(self, container: Container, waiter: Waiter) -> None:
        run = self.find_run(container)
        if container.state.running:
            self._signal(container, SIGKILL)
        with trio.move_on_after(KILL_DIRECTLY_S) as scope:
            await waiter.result()
        if scope.cancelled_caught:
            log.warning("did not die of SIGKILL, killing all of it container=%s", container.short_id)
            if run is not None:
                run.cgroup.kill_all()
            await waiter.result()

    def _signal(self, container: Container, number: int) -> bool:
        """Send one signal, with what it means for the restart policy; False when there is nobody to get it.

        Raises: Conflict when it does not run. Source: moby daemon/kill.go killWithSignal.
        """
        if not container.state.running:
            raise Conflict(f"Container {container.id} is not running")
        active = self._active.get(container.id)
        resume = False
        stop_signal = container.config.stop_signal
        if number == SIGKILL or not stop_signal or parse_signal(stop_signal) == number:
            if active is not None:
                active.cancelled.set()
            resume = container.state.status is Status.PAUSED
        container.state.manually_stopped = True
        if container.state.status is Status.RESTARTING:
            return True
        run = active.run if active is not None else None
        if run is None or run.init is None or not run.init.send_signal(number):
            return False
        if resume or number == SIGKILL:
            # In a frozen cgroup of v1 nobody gets a signal, whoever froze it.
            run.cgroup.thaw()
            if number != SIGKILL:
                self._engine.nursery.start_soon(self._follow_freezer, run)
        self._engine.events.container(container, "kill", signal=str(number))
        return True

    async def _follow_freezer(self, run: Run) -> None:
        """Have the record say what is: whoever paused or unpaused, and however far he came."""
        container, frozen = run.container, run.cgroup.frozen()
        if self.find_run(container) is not run:
            return
        if frozen and container.state.status is Status.RUNNING:
            lifecycle.move(container.state, Status.PAUSED)
            self.health.suspend(container)
            self._engine.events.container(container, "pause")
        elif not frozen and container.state.status is Status.PAUSED:
            lifecycle.move(container.state, Status.RUNNING)
            self.health.resume(container)
            self._engine.events.container(container, "unpause")
        else:
            return
        with trio.move_on_after(UNDO_TIMEOUT_S, shield=True):
            await self._store(container)

    async def restart(self, container: Container, timeout_s: int | None = None) -> None:
        """Stop it if it runs, and start it.

        Raises: as `start`.
        """
        if container.state.running:
            active = self._active.get(container.id)
            if active is not None:
                active.keep = True
            await self._stop(container, timeout_s)
        with suppress(NotModified):  # somebody else has started it meanwhile
            await self.start(container)
        self._engine.events.container(container, "restart")

    async def pause(self, container: Container) -> None:
        """Raises: Conflict, SystemFailure.

        Cancellation: it goes on running.
        """
        async with self._engine.locks(f"container/{container.id}"):
            lifecycle.check_pause(container)
            run = self.run_of(container)
            try:
                await run.runtime.pause(container.id)
            except SystemFailure as error:
                if run.init is not None and run.init.ended:
                    raise Conflict(f"Container {container.id} is not running") from error
                raise SystemFailure(f"Cannot pause container {container.id}: {error.message}") from error
            except trio.Cancelled:
                run.cgroup.thaw()
                raise
            finally:
                await self._follow_freezer(run)

    async def unpause(self, container: Container) -> None:
        """Raises: SystemFailure.

        Cancellation: it is paused or not, and the record says which.
        """
        async with self._engine.locks(f"container/{container.id}"):
            lifecycle.check_unpause(container)
            run = self.run_of(container)
            try:
                await run.runtime.resume(container.id)
            except SystemFailure as error:
                raise SystemFailure(f"Cannot unpause container {container.id}: {error.message}") from error
            finally:
                await self._follow_freezer(run)

    def resize(self, container: Container, height: int, width: int) -> None:
        """Raises: Conflict."""
        run = self.run_of(container)
        if container.config.tty:
            run.size = (height, width)
            if not run.sizing:
                run.sizing = True
                self._engine.nursery.start_soon(self._apply_size, run)
        self._engine.events.container(container, "resize", height=str(height), width=str(width))

    async def _apply_size(self, run: Run) -> None:
        """Tell conmon the size that was asked for last.

        conmon 2.1.6 loses the second of two sizes that it reads at once (docker sends two at every attach), so they go
        apart, and the last of several goes again: a terminal that has its size already does not notice.
        """
        sent: tuple[int, int] | None = None
        again = False
        try:
            while run.size is not None and (again or run.size != sent):
                again = sent is not None and run.size != sent
                sent = run.size
                if not conmon.resize(run.bundle, *sent):
                    return
                await trio.sleep(RESIZE_APART_S)
        except SystemFailure as error:
            log.warning("terminal cannot be resized container=%s error=%s", run.container.short_id, error.message)
        finally:
            run.sizing = False

    # -- removal --

    async def kill_for_removal(self, container: Container) -> None:
        """End a running container, whatever its policy says; returns when nothing of it is left."""
        active = self._active.get(container.id)
        if active is not None:
            active.keep = True  # the caller removes it
        with suppress(Conflict):
            await self.kill(container)
        if active is not None:
            await active.done.wait()

    async def remove_process(self, container: Container) -> None:
        """Of a container that does not run: wait for the end of cleaning up, drop its logs. Idempotent."""
        active = self._active.get(container.id)
        if active is not None and active.begun:  # else it waits for our caller's lock, and will find it gone
            await active.done.wait()
        if self._bundles.of(container.id).path.exists():
            await self._clean_up(container, kill=True)
        self.attachments.end_run(container)
        await self._engine.logs.forget(container)
        await self._engine.snapshots.trash.discard(self._exit_dir(container))

    # -- start and stop of the daemon --

    async def recover(self) -> None:
        """Adopt what runs, settle what ended while nobody looked, clean up what was cut off."""
        syscalls.become_subreaper()
        nursery = self._engine.nursery
        nursery.start_soon(self._watcher.serve, name="directory watcher")
        nursery.start_soon(self._engine.logs.serve, name="log drain")
        known = set()
        for container in self._engine.containers.all():
            known.add(container.id)
            try:
                if container.state.running:
                    if not await self._adopt(container):
                        await self._settle(container)
                elif self._bundles.of(container.id).path.exists():
                    log.info("cleaning up after a start that was cut off container=%s", container.short_id)
                    await self._clean_up(container, kill=True)
            except EngineError as error:
                log.error("cannot recover container=%s error=%s", container.short_id, error.message)
        self._engine.execs.recover()
        for container_id in set(self._bundles.all_ids()) - known:
            log.info("removing what is left of a container without a row id=%s", container_id[:12])
            await self._clean_up(Container(id=container_id), kill=True)

    async def _adopt(self, container: Container) -> bool:
        """Follow a container that outlived an engine; False when it did not."""
        state = container.state
        handle = ProcessHandle.open(state.conmon_pid, state.conmon_start_time)
        if handle is None:
            return False
        # Its arguments too: after a reboot another process may have started with that pid in the same tick.
        if state.status is Status.RESTARTING or container.id not in command_line(handle.pid):
            handle.close()
            return False
        runtime = self._engine.runtimes.get(container.host_config.runtime)
        config = self._engine.config
        path = cgroups_path(container, config.cgroup_driver, config.cgroup_parent)
        cgroup = self._engine.runtimes.cgroups.of_spec(path)
        init = ProcessHandle.open(state.pid)
        if init is not None and state.pid not in cgroup.pids():
            init.close()  # it has ended and somebody else has its pid
            init = None
        ran_s = max(0.0, (time.time_ns() - state.started_ns) / 1e9)
        run = Run(
            container, self._bundles.of(container.id), runtime, cgroup, handle, init, trio.current_time() - ran_s
        )
        await self._engine.logs.begin_run(container, run.bundle, handle, adopt=True)
        self._watch(run)
        self._engine.logs.changed(container.id)
        self._spawn(container, adopted=run).started.set()
        await self._follow_freezer(run)  # we may have ended between a pause and its record
        log.info("adopted container=%s pid=%d", container.short_id, state.pid)
        return True

    async def _settle(self, container: Container) -> None:
        """It ended while no engine ran: take its exit code from disk. Whether it starts again is asked later."""
        state, bundle = container.state, self._bundles.of(container.id)
        code = conmon.read_exit_code(self._exit_dir(container))
        if state.status is not Status.RESTARTING:
            if code is not None:
                state.exit_code = code
            elif bundle.conmon_pid() is not None:
                state.exit_code = UNKNOWN_EXIT_CODE  # conmon was killed
            # else the machine was rebooted: moby's restore leaves the code that the row has
            state.finished_ns = time.time_ns()
        state.oom_killed = state.oom_killed or bundle.oom.exists()
        if bundle.spool.exists():
            await self._engine.logs.begin_run(container, bundle, None, adopt=True)
        lifecycle.move(state, Status.EXITED)
        state.pid, state.conmon_pid, state.conmon_start_time = 0, 0, 0
        await self._clean_up(container, kill=True)
        await self._store(container)
        log.info("ended while no engine ran container=%s exit_code=%d", container.short_id, state.exit_code)

    async def start_wanted(self) -> None:
        """After the daemon's start: what restart policies want, few at a time; what was to be removed then goes."""
        wanted = []
        for container in self._engine.containers.all():
            if container.state.running or lifecycle.being_removed(container.state):
                continue
            if container.host_config.auto_remove and container.state.ever_started:
                await self._remove_after_exit(container)
            elif starts_with_daemon(container.host_config.restart_policy, container.state):
                wanted.append(container)
        limit = trio.CapacityLimiter(self._engine.limits.starts)
        async with trio.open_nursery() as nursery:
            for container in wanted:
                nursery.start_soon(self._start_wanted, container, limit)

    async def _start_wanted(self, container: Container, limit: trio.CapacityLimiter) -> None:
        async with limit:
            waited_s = 0.0
            while staging.must_wait(read_pressure(), limit.borrowed_tokens - 1, waited_s):
                await trio.sleep(staging.WAIT_STEP_S)
                waited_s += staging.WAIT_STEP_S
            manually_stopped = container.state.manually_stopped
            try:
                await self.start(container)
            except NotModified:
                pass
            except EngineError as error:
                container.state.manually_stopped = manually_stopped
                log.error("cannot start container=%s error=%s", container.short_id, error.message)

    async def shutdown(self) -> None:
        """Containers stay. Wait for starts and exits under way, and put all logs on disk."""
        self._stopping = True
        with trio.move_on_after(SHUTDOWN_GRACE_S) as scope:
            for active in list(self._active.values()):
                await active.started.wait()
                if active.run is not None and not active.run.container.state.running:
                    await active.done.wait()
            await self._engine.logs.flush()
        self._engine.logs.close()
        if scope.cancelled_caught:
            log.warning("starts or logs were cut off by the shutdown")


def _stop_signal(container: Container) -> int:
    """Raises: InvalidParameter."""
    return parse_signal(container.config.stop_signal or "SIGTERM")
