"""Builds every object, owns the root nursery: start order, signals, reload, the service manager, a clean stop.

    engine nursery: supervisors, collector, trash, watchdog    cancelled last; containers stay
      front nursery: one task a connection                     cancelled first, after a grace period

Start order (ARCHITECTURE, journey e): lock the data root; database; records; containers and networks brought to what
the rows say, while pings are answered and requests wait; READY=1; then, in the background, what restart policies want
and the emptying of the trash.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from balenapy import config as configuration
from balenapy.config import Config, UsageError
from balenapy.engine.engine import Engine, Limiters
from balenapy.errors import EngineError, SystemFailure
from balenapy.linux import systemd
from balenapy.stores.db import Database

log = logging.getLogger(__name__)

STOP_GRACE_S = 1.0  # requests under way at SIGTERM may end in this time
THREAD_STACK_BYTES = 256 * 1024
M_ARENA_MAX = -8  # glibc malloc.h
LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
}


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; the process's exit code.

    A start that fails says why on stderr and leaves nothing behind.
    """
    _configure_process(config)
    status = 0
    try:
        with _exclusive(config), _pidfile(config.pidfile):
            trio.run(_main, config, strict_exception_groups=True)
    except* EngineError as group:
        for error in _leaves(group):
            log.critical("the daemon cannot run: %s", error)
        status = 1  # `return` may not stand in an except* block
    return status


def _leaves(group: BaseExceptionGroup[EngineError]) -> Iterator[EngineError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _configure_process(config: Config) -> None:
    """Logging to stderr, small thread stacks, one malloc arena, our place among the OOM killer's victims."""
    logging.basicConfig(
        stream=sys.stderr,
        level=LOG_LEVELS[config.log_level],
        # journald stamps lines itself.
        format="level=%(levelname)s logger=%(name)s msg=%(message)s"
        if os.environ.get("JOURNAL_STREAM")
        else "time=%(asctime)s level=%(levelname)s logger=%(name)s msg=%(message)s",
    )
    _set_log_level(config)
    threading.stack_size(THREAD_STACK_BYTES)
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    os.umask(0o022)
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    if config.oom_score_adjust:
        try:
            Path("/proc/self/oom_score_adj").write_text(str(config.oom_score_adjust))
        except OSError as error:
            log.warning("cannot set the OOM score value=%d error=%s", config.oom_score_adjust, error)


def _set_log_level(config: Config) -> None:
    logging.getLogger().setLevel(LOG_LEVELS[config.log_level])
    # These speak at info and debug about every request; ours say what matters.
    for name in ("httpcore", "hypercorn", "h11", "quart"):
        logging.getLogger(name).setLevel(max(logging.WARNING, LOG_LEVELS[config.log_level]))


@contextmanager
def _exclusive(config: Config) -> Iterator[None]:
    """One engine a data root and an exec root: the lock is the kernel's and ends with the process."""
    held = []
    try:
        for root, mode in ((config.data_root, 0o711), (config.exec_root, 0o711)):
            try:
                root.mkdir(parents=True, exist_ok=True)
                root.chmod(mode)
                descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise SystemFailure(f"cannot use {root}: {error.strerror}") from error
            held.append(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SystemFailure(f"{root} is in use by another engine") from error
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


@contextmanager
def _pidfile(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            text = path.read_text().strip()
            if text.isdigit() and int(text) != os.getpid() and os.path.exists(f"/proc/{text}"):
                command = Path(f"/proc/{text}/cmdline").read_bytes()
                if b"balenapy" in command:
                    raise SystemFailure(
                        f"pid file found, ensure the daemon is not running or delete {path} (pid {text})"
                    )
        path.write_text(str(os.getpid()))
    except OSError as error:
        raise SystemFailure(f"cannot write the pid file {path}: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


async def _main(config: Config) -> None:
    from balenapy.api import server
    from balenapy.api.app import create_app

    started = time.monotonic()
    with _signals() as caught:
        db = Database.open(config.data_root / "meta.db")
        listeners = server.open_listeners(config, systemd.take_listening_sockets())
        monitors: list[server.Listener] = []
        try:
            monitors = server.open_monitor_listeners(config.metrics_addr)
            async with trio.open_nursery() as engine_nursery:
                engine = _build(config, db, engine_nursery)
                app = create_app(engine)
                app.ready = trio.Event()
                engine_nursery.start_soon(_watchdog)
                async with trio.open_nursery() as front:
                    await front.start(server.serve, app, listeners)
                    await _restore(engine)
                    app.ready.set()
                    app.ready = None
                    gc.collect()
                    gc.freeze()
                    systemd.notify("READY=1")
                    log.info("ready hosts=%s after_s=%.2f", ",".join(config.hosts), time.monotonic() - started)
                    _start_background(engine)
                    if monitors:
                        from balenapy.api.monitor import create_monitor

                        engine_nursery.start_soon(server.serve, create_monitor(engine), monitors)
                    await _until_stopped(engine, caught)
                    systemd.notify("STOPPING=1")
                    log.info("stopping: containers stay as they are")
                    server.stop_accepting(listeners)
                    # `serve` ends when the last busy connection does, or here.
                    front.cancel_scope.deadline = trio.current_time() + STOP_GRACE_S
                await engine.supervisors.shutdown()
                engine_nursery.cancel_scope.cancel()
        finally:
            server.close_listeners([*listeners, *monitors])
            db.close()


def _build(config: Config, db: Database, nursery: trio.Nursery) -> Engine:
    from balenapy.engine.build import Builds
    from balenapy.engine.containers import Containers
    from balenapy.engine.events import EventBus
    from balenapy.engine.exec import Execs
    from balenapy.engine.images import Images
    from balenapy.engine.info import Info
    from balenapy.engine.logs import Logs
    from balenapy.engine.networks import Networks
    from balenapy.engine.pull import Pulls
    from balenapy.engine.push import Pushes
    from balenapy.engine.supervisor import Supervisors
    from balenapy.engine.volumes import Volumes
    from balenapy.engine.workers import Workers
    from balenapy.linux.runtime import Runtimes
    from balenapy.registry.client import Registry
    from balenapy.stores.snapshots import Snapshots

    limiters = Limiters(files=trio.CapacityLimiter(4), netns=trio.CapacityLimiter(1))
    engine = Engine(config, db, limiters, nursery)
    engine.events = EventBus()
    engine.workers = Workers(engine)
    engine.registry = Registry(config)
    engine.runtimes = Runtimes(config)
    engine.snapshots = Snapshots(db, config.data_root, config.exec_root, limiters.files)
    engine.images = Images(engine)
    engine.pulls = Pulls(engine)
    engine.pushes = Pushes(engine)
    engine.volumes = Volumes(engine)
    engine.networks = Networks(engine)
    engine.logs = Logs(engine)
    engine.containers = Containers(engine)
    engine.supervisors = Supervisors(engine)
    engine.execs = Execs(engine)
    engine.builds = Builds(engine)
    engine.info = Info(engine)
    return engine


async def _restore(engine: Engine) -> None:
    """Bring the kernel's state and the rows together; meanwhile requests wait, but for the first questions."""
    await engine.runtimes.probe()
    engine.snapshots.recover()
    engine.images.recover()
    engine.containers.recover()
    await engine.networks.restore()
    await engine.supervisors.recover()
    await engine.volumes.recover()


def _start_background(engine: Engine) -> None:
    from balenapy.engine.rebuild import rebuild

    engine.nursery.start_soon(engine.supervisors.start_wanted)
    engine.nursery.start_soon(engine.containers.remove_managed)
    engine.nursery.start_soon(engine.snapshots.trash.serve)
    engine.nursery.start_soon(engine.images.collector.serve)
    engine.nursery.start_soon(engine.images.checks.serve)
    engine.nursery.start_soon(engine.db.serve)
    engine.nursery.start_soon(rebuild, engine)


@contextmanager
def _signals() -> Iterator[trio.MemoryReceiveChannel[int]]:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 as a channel; they queue up while the engine starts."""
    send, receive = trio.open_memory_channel[int](16)
    token = trio.lowlevel.current_trio_token()

    def put(number: int, _frame: object) -> None:
        def deliver() -> None:
            try:
                send.send_nowait(number)
            except trio.WouldBlock:
                pass  # sixteen are waiting already: one more says nothing new

        token.run_sync_soon(deliver)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, put) for number in numbers}
    try:
        yield receive
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _until_stopped(engine: Engine, caught: trio.MemoryReceiveChannel[int]) -> None:
    """Serve the signals; returns at the first that ends the daemon."""
    async for number in caught:
        if number == signal.SIGHUP:
            _reload(engine)
        elif number == signal.SIGUSR1:
            _dump_tasks()
        else:
            log.info("signal %s", signal.Signals(number).name)
            return


def _reload(engine: Engine) -> None:
    """Take what may change from the configuration file; a wrong file changes nothing."""
    try:
        changed, names = configuration.reload(engine.config)
    except UsageError as error:
        log.error("reload refused, nothing changed: %s", error)
        return
    engine.config = changed
    engine.registry.configure(changed)
    _set_log_level(changed)
    log.info("reloaded changed=%s", ",".join(names) or "nothing")
    engine.events.daemon("reload", {name: str(getattr(changed, name)) for name in sorted(configuration.RELOADABLE)})


def _dump_tasks() -> None:
    """Every Trio task with its innermost frames, as an indented tree, to the log."""
    root = trio.lowlevel.current_root_task()
    lines: list[str] = []

    def walk(task: trio.lowlevel.Task, depth: int) -> None:
        frames = list(task.iter_await_frames())
        # Every task waits in Trio's own code: where ours stands is what tells something.
        ours = [one for one in frames if not one[0].f_globals.get("__name__", "").startswith("trio.")] or frames
        where = " > ".join(
            f"{frame.f_code.co_qualname}:{os.path.basename(frame.f_code.co_filename)}:{line}"
            for frame, line in ours[-3:]
        )
        lines.append(f"{'  ' * depth}{task.name} [{where}]")
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                walk(child, depth + 1)

    if root is not None:
        walk(root, 0)
    log.warning("%d tasks\n%s", len(lines), "\n".join(lines))


async def _watchdog() -> None:
    """Feed the service manager's watchdog; a loop that no longer runs stops feeding it."""
    interval_s = systemd.watchdog_interval_s()
    if interval_s is None:
        return
    while True:
        systemd.notify("WATCHDOG=1")
        await trio.sleep(interval_s)
