"""The whole daemon is killed at every durable step of every journey; the next one finds all whole and goes on."""

from __future__ import annotations

import contextlib
import http.client
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.compat.images import file, make_tar
from tests.deltas_fixture import add_delta
from tests.engine_process import EngineProcess, wait_until
from tests.images_fixture import ImageFixture, busybox
from tests.powercut.invariants import Found, inspect
from tests.powercut.journeys import delta_to_fourth, fourth_image, third_image
from tests.registry.fake import FakeRegistry, fake_registry

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

NAME = "box"
# A build has three dozen steps, and each kill costs two builds: every fourth, or all with CRASH=all.
BUILD_STRIDE = 1 if os.environ.get("CRASH") == "all" else 4
tried: Counter[str] = Counter()


class MortalEngine(EngineProcess):
    """Dies at the step it is told to."""

    def __init__(self, root: Path, *flags: str) -> None:
        super().__init__(root, *flags)
        self.orders = root / "orders"
        self.orders.mkdir()

    @property
    def command(self) -> list[str]:
        flags = super().command[3:]
        return [sys.executable, "-m", "tests.crash.mortal_engine", str(self.orders), *flags]

    def die_at(self, number: int) -> None:
        """Count from the next step on; die before the step of this number."""
        (self.orders / "steps").write_text("")
        order = self.orders / "die_at.new"
        order.write_text(str(number))
        order.rename(self.orders / "die_at")

    def live(self) -> None:
        (self.orders / "die_at").unlink()

    def answers(self) -> bool:
        """Whether it lives; one that is dying does not answer any more."""
        return self.ask("GET", "/_ping") == 200

    @property
    def steps(self) -> list[str]:
        return (self.orders / "steps").read_text().splitlines()

    def reap(self) -> None:
        assert self._process is not None
        assert self._process.wait(10) == -9, self.log_tail()

    def ask(self, method: str, path: str, body: Any = None) -> int:
        """The status of an answer; 0 when the engine died before it was whole."""
        try:
            return self.request(method, path, body).status
        except (OSError, http.client.HTTPException):
            return 0


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        registry.add("team/app", "1", busybox())
        registry.add("team/app", "2", ImageFixture((*busybox().tars, make_tar([file("new", os.urandom(300_000))]))))
        registry.has_referrers = True
        registry.add("team/app", "3", third_image())
        registry.add("team/app", "4", fourth_image())
        add_delta(registry, "team/app", delta_to_fourth())
        yield registry


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MortalEngine]:
    monkeypatch.chdir(Path(__file__).parent.parent.parent)  # for `-m tests.crash...`
    engine = MortalEngine(tmp_path / "engine")
    try:
        engine.start()
        yield engine
    finally:
        engine.clean_up()


def look(engine: MortalEngine) -> Found:
    """What is on the disk when the background has come to rest; at the latest then all must be whole."""
    found = inspect(engine.data_root)

    def is_whole() -> bool:
        nonlocal found
        with contextlib.suppress(OSError):  # something went while we looked
            found = inspect(engine.data_root)
            return not found.violations
        return False

    with contextlib.suppress(AssertionError):
        wait_until(is_whole, timeout_s=5)
    assert found.violations == []
    answer = engine.request("GET", "/containers/json?all=1").json
    assert sorted(name[1:] for one in answer for name in one["Names"]) == sorted(found.containers)
    names = {name for one in engine.request("GET", "/images/json?all=1").json for name in one["RepoTags"] or ()}
    assert len(names - {"<none>:<none>"}) == len([name for name in found.references if "@" not in name])
    return found


def every_step(
    engine: MortalEngine,
    journey: str,
    prepare: Callable[[], None],
    act: Callable[[], int],
    *,
    is_over: Callable[[], bool] = lambda: True,
    between: tuple[str, ...] = (),
) -> None:
    """Kill the engine at step 1, 2, ... of `act` until it survives; after each the state is as before or as after.

    Args:
        is_over: whether a journey that goes on after its answer has ended.
        between: states of the container that may be found on the way, too.
    """
    number = 0
    states: list[dict[str, Any]] = []
    while True:
        number += 1
        assert number < 60, f"{journey} does not end: {engine.steps}"
        prepare()
        before = look(engine).state
        engine.die_at(number)
        status = act()
        with contextlib.suppress(AssertionError, OSError, http.client.HTTPException):
            # No answer means that it is dying.
            wait_until(
                lambda: not engine.is_alive or (status and is_over() and _is_at_rest(engine)),  # noqa: B023
                timeout_s=5,
            )
        engine.live()
        if engine.answers():
            assert status in (200, 201, 204), f"{journey}: {status}\n{engine.log_tail()}"
            assert is_over(), f"{journey} does not end\n{engine.log_tail(80)}"
            after = look(engine).state
            for state in states:
                if state["containers"].get(NAME) in between:
                    state["containers"] = before["containers"]
                assert state in (before, after), f"{journey}: {state} is neither {before} nor {after}"
            break
        engine.reap()
        engine.start()
        states.append(look(engine).state)
        tried[journey] += 1
    print(f"{journey}: killed at each of {number - 1} steps: {', '.join(engine.steps)}")
    assert number > 1


def _is_at_rest(engine: MortalEngine) -> bool:
    """Nothing is left to do for the background."""
    return not os.listdir(engine.data_root / "trash") and not inspect(engine.data_root).violations


def test_images_survive_a_daemon_killed_at_every_step(engine: MortalEngine, registry: FakeRegistry) -> None:
    one, two, local = f"{registry.host}/team/app:1", f"{registry.host}/team/app:2", "local:1"
    four = f"{registry.host}/team/app:4"

    def pull(name: str) -> int:
        return engine.ask("POST", f"/images/create?fromImage={name}")

    def remove(name: str) -> int:
        return engine.ask("DELETE", f"/images/{name}?force=1")

    def without_two() -> None:
        pull(one)
        remove(two)

    def with_both() -> None:
        pull(one)
        pull(two)

    def untagged() -> None:
        with_both()
        remove(local)

    def with_an_untagged_image() -> None:
        pull(two)
        engine.ask("POST", f"/images/{two}/tag?repo=local&tag=1")
        for name in [one["RepoDigests"] for one in engine.request("GET", "/images/json").json]:
            for digest in name or ():
                remove(digest)
        pull(one)
        remove(two)
        engine.ask("POST", f"/images/{one}/tag?repo=local&tag=1")  # leaves the other one without a name

    def without_four() -> None:
        pull(f"{registry.host}/team/app:3")
        remove(four)

    every_step(engine, "pull", without_two, lambda: pull(two))
    every_step(engine, "pull by delta", without_four, lambda: pull(four))
    assert registry.seen(f"blobs/{delta_to_fourth().layers[0].digest}")
    assert not registry.seen(f"blobs/{fourth_image().layers[0].digest}")
    every_step(engine, "delete", with_both, lambda: remove(two))
    every_step(engine, "tag", untagged, lambda: engine.ask("POST", f"/images/{one}/tag?repo=local&tag=1"))
    every_step(
        engine,
        "prune",
        with_an_untagged_image,
        lambda: engine.ask("POST", "/images/prune"),
    )
    assert set(tried) >= {"pull", "delete", "tag", "prune"}
    print(f"{sum(tried.values())} kills until now")


def test_containers_survive_a_daemon_killed_at_every_step(engine: MortalEngine, registry: FakeRegistry) -> None:
    image = f"{registry.host}/team/app:1"
    engine.ask("POST", f"/images/create?fromImage={image}")
    body = {"Image": image, "Cmd": ["sleep", "1000"], "Volumes": {"/data": {}}, "StopSignal": "SIGKILL"}

    def create() -> int:
        return engine.ask("POST", f"/containers/create?name={NAME}", body)

    def status() -> str:
        answer = engine.request("GET", f"/containers/{NAME}/json")
        return str(answer.json["State"]["Status"]) if answer.status == 200 else ""

    def absent() -> None:
        engine.ask("DELETE", f"/containers/{NAME}?force=1&v=1")

    def created() -> None:
        if status() != "created":
            absent()
            create()

    def running() -> None:
        if status() != "running":
            absent()
            create()
            assert engine.ask("POST", f"/containers/{NAME}/start") == 204

    def exited() -> None:
        running()
        engine.ask("POST", f"/containers/{NAME}/kill")
        wait_until(lambda: status() == "exited")

    def is_exited() -> bool:
        """In the rows: the API tells it a moment earlier."""
        return inspect(engine.data_root).containers.get(NAME) == "exited"

    every_step(engine, "create", absent, create)
    every_step(engine, "start", created, lambda: engine.ask("POST", f"/containers/{NAME}/start"))
    every_step(
        engine,
        "exit",
        running,
        lambda: engine.ask("POST", f"/containers/{NAME}/kill"),
        is_over=is_exited,
    )
    assert engine.inspect(NAME)["State"]["ExitCode"] == 137
    # A removal that was cut off leaves a container that is dead, until it is removed again: as dockerd does.
    removal = ("removing", "exited")
    every_step(engine, "remove", exited, lambda: engine.ask("DELETE", f"/containers/{NAME}?v=1"), between=removal)
    every_step(
        engine,
        "remove by force",
        running,
        lambda: engine.ask("DELETE", f"/containers/{NAME}?v=1&force=1"),
        between=removal,
    )
    absent()
    assert engine.request("GET", "/volumes").json["Volumes"] in ([], None)
    print(f"{sum(tried.values())} kills of the daemon until now")


def test_builds_survive_a_daemon_killed_at_every_step(engine: MortalEngine, registry: FakeRegistry) -> None:
    """What a cut build leaves is whole, and no container; the next one goes on from its steps."""
    base = f"{registry.host}/team/app:1"
    engine.ask("POST", f"/images/create?fromImage={base}")

    def build(number: int) -> int:
        dockerfile = f"FROM {base}\nENV a={number}\nRUN echo {number} > /made\nWORKDIR /w\nCOPY f .\nCMD cat f\n"
        body = make_tar([file("Dockerfile", dockerfile.encode()), file("f", b"content")])
        return engine.ask("POST", "/build?t=built:1&rm=1", body)

    number = 1 - BUILD_STRIDE
    kills = 0
    while True:
        number += BUILD_STRIDE
        assert number < 80, f"the build does not end: {engine.steps}"
        engine.die_at(number)
        status = build(number)
        with contextlib.suppress(AssertionError, OSError, http.client.HTTPException):
            wait_until(lambda: not engine.is_alive or (status and _is_at_rest(engine)), timeout_s=5)  # noqa: B023
        engine.live()
        if engine.answers():
            assert status == 200, f"{status}\n{engine.log_tail()}"
            break
        engine.reap()
        kills += 1
        engine.start()
        wait_until(lambda: not inspect(engine.data_root).containers, timeout_s=30, what="its container is gone")
        look(engine)
        assert build(number) == 200  # and goes on
        assert engine.request("GET", "/images/built:1/json").json["Config"]["Env"][-1] == f"a={number}"
    look(engine)
    print(f"build: killed at {kills} of its {len(engine.steps)} steps: {', '.join(engine.steps)}")
    assert kills > 6
