"""Every durable step of create, rename, update and remove may be the last: then a container is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from balenapy.core.container import UpdateConfig
from balenapy.linux import durable
from tests.engine.container_rig import Rig, open_rig

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

DIED, ENDED, FAILED = 77, 0, 78
Action = Callable[[Rig], Awaitable[object]]


async def create(rig: Rig) -> None:
    await rig.create("web", Volumes={"/anonymous": {}}, HostConfig={"Binds": ["named:/n"]})


async def rename(rig: Rig) -> None:
    await rig.containers.rename("old", "new")


async def update(rig: Rig) -> None:
    await rig.containers.update("old", UpdateConfig(cpu_shares=7))


async def remove(rig: Rig) -> None:
    await rig.containers.remove("old", remove_volumes=True)


def run_in_child(root: Path, action: Action, die_at: int) -> bool:
    """Do it in a forked process that dies before its k-th durable step; False when there is no such step."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            code = trio.run(_act, root, action, die_at)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (DIED, ENDED)
    return code == DIED


async def _act(root: Path, action: Action, die_at: int) -> int:
    count = 0

    def step(_: str) -> None:
        nonlocal count
        count += 1
        if count == die_at:
            os._exit(DIED)

    async with open_rig(root) as rig:
        durable.listen(step)
        await action(rig)
        durable.listen(None)
    return ENDED


async def names_after_recovery(root: Path) -> dict[str, int]:
    """The containers there are after a start, with their CPU shares; checks that rows and directories agree."""
    async with open_rig(root) as rig:
        rig.engine.snapshots.recover()
        containers = rig.containers.all()
        layers = {active.key: active.path for active in rig.engine.snapshots.active()}

        assert {container.id for container in containers} == set(layers)
        assert all((path / "diff").is_dir() and (path / "init/.dockerenv").exists() for path in layers.values())
        rows = rig.rows()
        assert rows["container"] == rows["container_state"] == rows["snapshot"] == len(containers)
        on_disk = {path.name for path in (rig.engine.config.data_root / "snapshots").iterdir()}
        assert on_disk == {path.name for path in layers.values()}
        for container in containers:
            assert rig.containers.find(container.name) is container
            for mount in container.mounts:
                assert await trio.Path(mount.source).is_dir()
                assert rig.engine.volumes.users(mount.name) == [container.id]
        return {container.name: container.host_config.cpu_shares for container in containers}


@pytest.mark.parametrize(
    ("action", "before", "after"),
    [
        (create, {"old": 0}, {"old": 0, "web": 0}),
        (rename, {"old": 0}, {"new": 0}),
        (update, {"old": 0}, {"old": 7}),
        (remove, {"old": 0}, {}),
    ],
)
def test_a_container_is_whole_or_not_there(
    tmp_path: Path, action: Action, before: dict[str, int], after: dict[str, int]
) -> None:
    async def prepare(root: Path) -> None:
        async with open_rig(root) as rig:
            await rig.add_image()
            await rig.create("old", Volumes={"/v": {}})

    seen = []
    for die_at in range(1, 50):
        root = tmp_path / str(die_at)
        root.mkdir()
        trio.run(prepare, root)
        assert trio.run(names_after_recovery, root) == before
        died = run_in_child(root, action, die_at)
        found = trio.run(names_after_recovery, root)
        seen.append(found)
        if not died:
            break

    assert found == after
    assert all(each in (before, after) for each in seen)
    assert before in seen
