"""The life of a container: which moves are legal, and which requests a state refuses.

A container is in exactly one `Status`; the API's flags (Running, Paused, Restarting, Dead) are derived from it.
"Running" as clients see it means RUNNING, PAUSED or RESTARTING: a container between two runs of its restart policy
answers `Running: true, Restarting: true, Pid: 0`.

              start            pause
    CREATED ---------> RUNNING <-----> PAUSED
                       |  ^ |              |
             policy +--+  | +-- exit --+   | exit
                    v     |            v   v
              RESTARTING -+  start   EXITED ---> REMOVING ---> (no row)
                    |                  ^  |          |  ^
                    +-- stop, kill ----+  +- start   v  |
                                                    DEAD

A start that fails leaves CREATED or EXITED as it was. A removal that fails leaves DEAD, which only removal leaves.
`move` raises on anything else: an illegal move is our bug and is never repaired silently.
"""

from __future__ import annotations

from balenapy.core.container import Container, State, Status
from balenapy.errors import Conflict, NotModified, SystemFailure

MOVES: dict[Status, frozenset[Status]] = {
    Status.CREATED: frozenset({Status.RUNNING, Status.REMOVING}),
    Status.RUNNING: frozenset({Status.PAUSED, Status.RESTARTING, Status.EXITED}),
    Status.PAUSED: frozenset({Status.RUNNING, Status.RESTARTING, Status.EXITED}),
    Status.RESTARTING: frozenset({Status.RUNNING, Status.EXITED}),
    Status.EXITED: frozenset({Status.RUNNING, Status.RESTARTING, Status.REMOVING}),
    Status.REMOVING: frozenset({Status.DEAD}),
    Status.DEAD: frozenset({Status.REMOVING}),
}
# EXITED -> RESTARTING happens at daemon start only: the exit was found afterwards, the policy says "again".


class IllegalMove(SystemFailure):
    """The engine tried to move a container in a way the table does not have."""


def can_move(status: Status, target: Status) -> bool:
    return target in MOVES[status]


def move(state: State, target: Status) -> None:
    """Change the status.

    Raises: IllegalMove.
    """
    if not can_move(state.status, target):
        raise IllegalMove(f"a container cannot go from {state.status.value} to {target.value}")
    state.status = target


def being_removed(state: State) -> bool:
    return state.status in (Status.REMOVING, Status.DEAD)


def check_start(state: State) -> None:
    """Raises: NotModified when it runs, Conflict when it is paused, dead or being removed."""
    if state.status is Status.PAUSED:
        raise Conflict("cannot start a paused container, try unpause instead")
    if state.running:
        raise NotModified("Container is already running")
    if being_removed(state):
        raise Conflict("container is marked for removal and cannot be started")


def check_running(container: Container) -> None:
    """Raises: Conflict unless it runs or is paused."""
    if container.state.status is Status.RESTARTING:
        raise Conflict(f"Container {container.id} is restarting, wait until the container is running")
    if not container.state.running:
        raise Conflict(f"Container {container.id} is not running")


def check_pause(container: Container) -> None:
    """Raises: Conflict."""
    if not container.state.running:
        raise Conflict(f"Container {container.id} is not running")
    if container.state.status is Status.PAUSED:
        raise Conflict(f"Container {container.id} is already paused")
    check_running(container)


def check_unpause(container: Container) -> None:
    """Raises: SystemFailure (500, as the engine we replace has it)."""
    if container.state.status is not Status.PAUSED:
        raise SystemFailure(f"Container {container.id} is not paused")


def check_exec(container: Container, name: str) -> None:
    """`name` is what the client called it.

    Raises: Conflict.
    """
    if container.state.status is Status.PAUSED:
        raise Conflict(f"Container {name} is paused, unpause the container before exec")
    check_running(container)


def check_remove(container: Container, *, force: bool) -> None:
    """Raises: Conflict when it runs and nobody said force."""
    state = container.state
    if state.running and not force:
        procedure = "Stop the container before attempting removal or force remove"
        if state.status is Status.PAUSED:
            procedure = "Unpause and then stop the container before attempting removal or force remove"
        raise Conflict(f"You cannot remove a {state.status.value} container {container.id}. {procedure}")
