from __future__ import annotations

from itertools import product

import pytest

from balenapy.core.container import Container, State, Status
from balenapy.core.lifecycle import (
    MOVES,
    IllegalMove,
    can_move,
    check_exec,
    check_pause,
    check_remove,
    check_running,
    check_start,
    check_unpause,
    move,
)
from balenapy.errors import Conflict, EngineError, NotModified, SystemFailure

ID = "a" * 64


def container(status: Status) -> Container:
    return Container(id=ID, name="web", state=State(status=status))


def test_every_status_has_its_moves_and_none_leads_nowhere() -> None:
    assert set(MOVES) == set(Status)
    assert all(MOVES.values())
    assert not any(can_move(status, status) for status in Status)


@pytest.mark.parametrize(("status", "target"), list(product(Status, Status)))
def test_a_move_is_made_or_refused_never_repaired(status: Status, target: Status) -> None:
    state = State(status=status)

    if can_move(status, target):
        move(state, target)
        assert state.status is target
    else:
        with pytest.raises(IllegalMove, match=f"from {status.value} to {target.value}"):
            move(state, target)
        assert state.status is status


def test_what_runs_cannot_be_removed_without_an_exit() -> None:
    assert [status for status in Status if can_move(status, Status.REMOVING)] == [
        Status.CREATED,
        Status.EXITED,
        Status.DEAD,
    ]


@pytest.mark.parametrize(
    ("check", "status", "kind", "message"),
    [
        (check_start, Status.PAUSED, Conflict, "cannot start a paused container, try unpause instead"),
        (check_start, Status.RUNNING, NotModified, "Container is already running"),
        (check_start, Status.RESTARTING, NotModified, "Container is already running"),
        (check_start, Status.DEAD, Conflict, "container is marked for removal and cannot be started"),
        (check_start, Status.REMOVING, Conflict, "container is marked for removal and cannot be started"),
        (check_running, Status.CREATED, Conflict, f"Container {ID} is not running"),
        (check_running, Status.RESTARTING, Conflict,
         f"Container {ID} is restarting, wait until the container is running"),
        (check_pause, Status.EXITED, Conflict, f"Container {ID} is not running"),
        (check_pause, Status.PAUSED, Conflict, f"Container {ID} is already paused"),
        (check_pause, Status.RESTARTING, Conflict,
         f"Container {ID} is restarting, wait until the container is running"),
        (check_unpause, Status.RUNNING, SystemFailure, f"Container {ID} is not paused"),
        (check_exec, Status.PAUSED, Conflict, "Container web is paused, unpause the container before exec"),
        (check_exec, Status.EXITED, Conflict, f"Container {ID} is not running"),
        (check_remove, Status.RUNNING, Conflict,
         f"You cannot remove a running container {ID}. "
         "Stop the container before attempting removal or force remove"),
        (check_remove, Status.PAUSED, Conflict,
         f"You cannot remove a paused container {ID}. "
         "Unpause and then stop the container before attempting removal or force remove"),
        (check_remove, Status.RESTARTING, Conflict,
         f"You cannot remove a restarting container {ID}. "
         "Stop the container before attempting removal or force remove"),
    ],
)  # fmt: skip
def test_refusals_are_worded_as_clients_know_them(
    check: object, status: Status, kind: type[EngineError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        ask(check, status)

    assert message == caught.value.message


def ask(check: object, status: Status) -> None:
    one = container(status)
    if check is check_start:
        check_start(one.state)
    elif check is check_exec:
        check_exec(one, "web")
    elif check is check_remove:
        check_remove(one, force=False)
    else:
        assert callable(check)
        check(one)


def test_what_is_allowed_passes() -> None:
    for status in (Status.CREATED, Status.EXITED):
        ask(check_start, status)
    for check, status in (
        (check_running, Status.PAUSED),
        (check_pause, Status.RUNNING),
        (check_unpause, Status.PAUSED),
        (check_exec, Status.RUNNING),
        (check_remove, Status.EXITED),
        (check_remove, Status.DEAD),
    ):
        ask(check, status)
    check_remove(container(Status.RUNNING), force=True)
