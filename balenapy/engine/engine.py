"""The object that handlers hold: every part of the engine by its name.

`daemon.py` builds the parts and this object; nothing else does. Parts get what they need in their constructor;
a part that needs another *engine* part takes the `Engine` and looks it up at call time, so that the
order of construction does not matter.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import trio

from balenapy.core.membudget import MemoryLimits, limits_for
from balenapy.engine.keylock import KeyLock
from balenapy.errors import Unavailable
from balenapy.linux.hostfacts import memory_bytes

if TYPE_CHECKING:
    from balenapy.config import Config
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
    from balenapy.stores.db import Database
    from balenapy.stores.snapshots import Snapshots

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Limiters:
    """How many threads each kind of blocking work may use. Made in `daemon.py`."""

    files: trio.CapacityLimiter
    netns: trio.CapacityLimiter


@dataclass(slots=True, eq=False)
class Engine:
    config: Config
    db: Database
    limiters: Limiters
    nursery: trio.Nursery  # supervisors, collector, trash: what outlives a request
    locks: KeyLock = field(default_factory=KeyLock)  # "container/<id>", "chain/<chain_id>", "pull/<reference>"

    limits: MemoryLimits = field(init=False)  # what follows from the memory budget

    # Set once by daemon.py, right after construction.
    events: EventBus = field(init=False)
    info: Info = field(init=False)
    workers: Workers = field(init=False)
    registry: Registry = field(init=False)
    snapshots: Snapshots = field(init=False)
    images: Images = field(init=False)
    pulls: Pulls = field(init=False)
    pushes: Pushes = field(init=False)
    volumes: Volumes = field(init=False)
    networks: Networks = field(init=False)
    runtimes: Runtimes = field(init=False)
    logs: Logs = field(init=False)
    containers: Containers = field(init=False)
    supervisors: Supervisors = field(init=False)
    execs: Execs = field(init=False)
    builds: Builds = field(init=False)

    started_s: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.limits = limits_for(self.config.memory_budget, memory_bytes(), len(os.sched_getaffinity(0)))

    async def to_end(self, call: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Await what is done to its end, whether or not somebody still waits for it: a stop that was begun, a removal.

        Raises: what the call raises (to the log when nobody waits any more); Unavailable when the daemon stops.
        Cancellation: the call goes on.
        """
        done = trio.Event()
        results: list[T] = []
        errors: list[Exception] = []
        left = False

        async def work() -> None:
            try:
                results.append(await call(*arguments))
            except Exception as error:
                errors.append(error)
                if left:
                    log.warning("request failed after its client had left call=%s error=%s", name, error)
            finally:
                done.set()

        name = getattr(call, "__qualname__", repr(call))
        self.nursery.start_soon(work, name=f"to end: {name}")
        try:
            await done.wait()
        except trio.Cancelled:
            left = True
            raise
        if errors:
            raise errors[0]
        if not results:
            raise Unavailable("the daemon is shutting down")
        return results[0]
