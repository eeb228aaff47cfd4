"""What the whole suite shares: one registry, one engine, and the check that nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.compat import images
from tests.engine_process import DOCKER, EngineProcess, running_engine, wait_until
from tests.leftovers import Leftovers, leftovers, open_descriptors, wait_for_no_leftovers
from tests.registry_process import running_registry

# A loaded machine is slow at everything: only what is wrong may fail a property.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("suite")

FORWARDING = [Path("/proc/sys/net") / name for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding")]
FOUND = pytest.StashKey[tuple[Leftovers, dict[Path, str]]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `root` are skipped, with the reason, where the suite runs as an ordinary user."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """The machine before the suite. With `-n`, processes that share it look at what is theirs only."""
    if os.geteuid() != 0:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["BALENAPY_SHARED_MACHINE"] = "1"
        return
    session.config.stash[FOUND] = (leftovers(), {path: path.read_text() for path in FORWARDING if path.exists()})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The machine after the suite is the machine before it."""
    if FOUND not in session.config.stash:
        return
    before, forwarding = session.config.stash[FOUND]
    # An engine switches forwarding on for its containers, as dockerd does, and leaves it on.
    for path, value in forwarding.items():
        path.write_text(value)
    added = wait_for_no_leftovers(before)
    if added:
        print(f"\nERROR: the suite left behind: {added}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What passing tests printed: how much they tried, with which seed."""
    told = [
        (report.nodeid, line)
        for report in terminalreporter.stats.get("passed", ())
        for line in report.capstdout.splitlines()
        if line.strip()
    ]
    if told:
        terminalreporter.section("what was tried")
    for name, line in told:
        terminalreporter.write_line(f"{name}: {line}")


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[Leftovers]:
    """What this process found, and leaves; see also `pytest_sessionfinish`."""
    before = leftovers()
    yield before
    if os.geteuid() == 0:
        added = wait_for_no_leftovers(before)
        assert added == {}, f"the suite left behind: {added}"


@pytest.fixture(scope="session")
def registry(nothing_left_behind: Leftovers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a docker-registry on loopback."""
    with running_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="session")
def busybox(registry: str) -> str:
    """A pushed image with a shell: two layers, `sh` as its command."""
    images.push(registry, "busybox", "1.0", images.busybox_image())
    return f"{registry}/busybox:1.0"


@pytest.fixture(scope="session")
def app(registry: str) -> str:
    """A pushed image that sets entrypoint, user, environment, labels, a volume and a port."""
    images.push(registry, "team/app", "v1", images.app_image())
    return f"{registry}/team/app:v1"


@pytest.fixture(scope="session")
def docker_cli() -> str:
    """The path of the Docker CLI; tests of it are skipped where there is none."""
    if DOCKER is None:
        pytest.skip("no docker CLI on this machine")
    return DOCKER


@pytest.fixture(scope="session")
def shared_engine(
    nothing_left_behind: Leftovers, tmp_path_factory: pytest.TempPathFactory, busybox: str, app: str
) -> Iterator[EngineProcess]:
    """One engine for all tests that need neither flags nor a crash, with both images pulled.

    At the end it holds exactly the descriptors it held at first, and the machine what it held before.
    """
    before = leftovers()
    with running_engine(tmp_path_factory.mktemp("shared")) as engine:
        for image in (busybox, app):
            answer = engine.request("POST", f"/v1.39/images/create?fromImage={image}")
            assert "error" not in answer.lines[-1], answer.body
        # The first runs make what stays: a bridge, the host's namespace among the sandboxes.
        for network in ("bridge", "host"):
            body = {"Image": busybox, "Cmd": ["true"], "HostConfig": {"NetworkMode": network}}
            container = engine.request("POST", "/v1.39/containers/create", body).json["Id"]
            for call in ("start", "wait"):
                engine.request("POST", f"/v1.39/containers/{container}/{call}")
        engine.remove_containers()
        wait_until(lambda: engine.request("GET", "/v1.39/containers/json?all=1").json == [])
        at_rest = leftovers()
        descriptors = open_descriptors(engine.pid)

        yield engine

        assert engine.is_alive, f"the engine died during the tests:\n{engine.log_tail()}"
        engine.remove_containers()
        added = wait_for_no_leftovers(at_rest)
        assert added == {}, f"removed containers left behind: {added}"
        if not engine.is_reference:
            wait_until(
                lambda: not open_descriptors(engine.pid) - descriptors,
                what=f"no more descriptors than {descriptors}, now {open_descriptors(engine.pid)}",
            )
        status = engine.stop()
        assert status == 0, f"the engine ended with {status}:\n{engine.log_tail()}"
    added = wait_for_no_leftovers(before)
    assert added == {}, f"the engine left behind: {added}"


@pytest.fixture
def engine(shared_engine: EngineProcess) -> Iterator[EngineProcess]:
    """The shared engine without containers, before and after."""
    assert shared_engine.is_alive, f"the engine died in an earlier test:\n{shared_engine.log_tail()}"
    yield shared_engine
    shared_engine.close_clients()
    if shared_engine.is_alive:
        shared_engine.remove_containers()
