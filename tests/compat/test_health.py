"""Health checks of running containers: status, log, events, and who waits for them."""

from __future__ import annotations

import json
import time
import urllib.parse
from typing import Any

import pytest

from tests.compat import shapes
from tests.engine_process import EngineProcess, running_engine, wait_until

pytestmark = pytest.mark.root

SECOND = 1_000_000_000
SOON = SECOND // 5
PATIENCE_S = 40.0


def start(engine: EngineProcess, image: str, *test: str, host: Any = None, **fields: Any) -> str:
    """A running container with a health check every 0.2 s."""
    check = {"Test": list(test), "Interval": SOON, "Timeout": 20 * SECOND, "Retries": 2} | fields
    body = {"Image": image, "Cmd": ["sleep", "1000"], "Healthcheck": check}
    body["HostConfig"] = {"NetworkMode": "none"} | (host or {})
    answer = engine.request("POST", "/v1.39/containers/create", body)
    assert answer.status == 201, answer.body
    post(engine, answer.json["Id"], "start")
    return str(answer.json["Id"])


def post(engine: EngineProcess, container: str, call: str) -> None:
    assert engine.request("POST", f"/v1.39/containers/{container}/{call}").status == 204


def health(engine: EngineProcess, container: str) -> Any:
    return engine.inspect(container)["State"].get("Health")


def wait_for(engine: EngineProcess, container: str, status: str) -> Any:
    wait_until(lambda: health(engine, container)["Status"] == status, PATIENCE_S, status)
    return health(engine, container)


def listed(engine: EngineProcess, **filters: str) -> dict[str, str]:
    query = urllib.parse.quote(json.dumps({key: [value] for key, value in filters.items()}))
    found = engine.request("GET", f"/v1.39/containers/json?all=1&filters={query}").json
    return {entry["Id"]: entry["Status"] for entry in found}


def status_events(engine: EngineProcess, since: float, container: str) -> list[str]:
    lines = engine.request("GET", f"/v1.39/events?since={since:.9f}&until={time.time():.9f}").lines
    actions = [line["Action"] for line in lines if line["Actor"]["ID"] == container]
    return [action for action in actions if action.startswith("health_status")]


def touch(engine: EngineProcess, container: str, path: str) -> None:
    created = engine.request("POST", f"/v1.39/containers/{container}/exec", {"Cmd": ["touch", path]})
    assert engine.request("POST", f"/v1.39/exec/{created.json['Id']}/start", {"Detach": True}).status == 200


def test_a_container_becomes_unhealthy_and_healthy_and_says_so(engine: EngineProcess, busybox: str) -> None:
    since = time.time()
    script = "test -e /ok && echo fine || { echo bad >&2; exit 7; }"
    container = start(engine, busybox, "CMD-SHELL", script, StartPeriod=0)

    found = wait_for(engine, container, "unhealthy")
    assert found["FailingStreak"] >= 2
    assert {(each["ExitCode"], each["Output"]) for each in found["Log"]} == {(7, "bad\n")}
    assert listed(engine, health="unhealthy")[container].endswith("(unhealthy)")
    state = engine.inspect(container)["State"]
    assert shapes.differences(state, "container_state_unhealthy.json") == []
    touch(engine, container, "/ok")
    found = wait_for(engine, container, "healthy")
    assert found["FailingStreak"] == 0
    assert found["Log"][-1]["Output"] == "fine\n"
    wait_until(lambda: len(health(engine, container)["Log"]) == 5, PATIENCE_S, "five results")
    assert listed(engine, health="healthy")[container].endswith("(healthy)")
    times = [(each["Start"], each["End"]) for each in health(engine, container)["Log"]]
    assert times == sorted(times)

    post(engine, container, "stop?t=0")
    assert health(engine, container)["Status"] == "unhealthy"
    post(engine, container, "start")
    assert health(engine, container)["Log"], "the log is kept"
    assert status_events(engine, since, container)[:2] == ["health_status: unhealthy", "health_status: healthy"]
    wait_for(engine, container, "healthy")
    assert health(engine, container)["FailingStreak"] == 0


def test_probes_are_execs_seen_in_events(engine: EngineProcess, busybox: str) -> None:
    since = time.time()
    container = start(engine, busybox, "CMD-SHELL", "true")
    wait_for(engine, container, "healthy")

    lines = engine.request("GET", f"/v1.39/events?since={since:.9f}&until={time.time():.9f}").lines
    execs = [line for line in lines if line["Action"].startswith("exec_") and line["Actor"]["ID"] == container]

    assert [line["Action"] for line in execs[:3]] == [
        "exec_create: /bin/sh -c true", "exec_start: /bin/sh -c true", "exec_die",
    ]  # fmt: skip
    assert len({line["Actor"]["Attributes"]["execID"] for line in execs[:3]}) == 1
    assert execs[2]["Actor"]["Attributes"]["exitCode"] == "0"


def test_a_probe_that_takes_too_long_is_killed_with_what_it_started(engine: EngineProcess, busybox: str) -> None:
    container = start(engine, busybox, "CMD-SHELL", "sleep 777 | sleep 777", Timeout=SECOND, Retries=1)

    found = wait_for(engine, container, "unhealthy")

    assert (found["Log"][0]["ExitCode"], found["Log"][0]["Output"]) == (-1, "Health check exceeded timeout (1s)")

    def sleepers() -> int:
        rows = engine.request("GET", f"/v1.39/containers/{container}/top?ps_args=-o+pid,args").json["Processes"]
        return sum("777" in row[1] for row in rows)

    if not engine.is_reference:  # which lets the children live
        wait_until(lambda: sleepers() == 0, PATIENCE_S, "no sleeper")


def test_a_probe_that_cannot_be_started_is_a_failure(engine: EngineProcess, busybox: str) -> None:
    container = start(engine, busybox, "CMD", "nope-nope", Retries=1)

    found = wait_for(engine, container, "unhealthy")

    assert found["Log"][0]["ExitCode"] == -1
    assert "executable file not found in $PATH" in found["Log"][0]["Output"]


def test_long_output_is_cut(engine: EngineProcess, busybox: str) -> None:
    container = start(engine, busybox, "CMD-SHELL", "yes | head -c 2000000; exit 1", Retries=1)

    output = wait_for(engine, container, "unhealthy")["Log"][0]["Output"]

    assert output == ("y\n" * 2048) + "..."


def test_failures_in_the_start_period_do_not_count(engine: EngineProcess, busybox: str) -> None:
    container = start(engine, busybox, "CMD", "false", StartPeriod=3600 * SECOND, Retries=1)

    wait_until(lambda: len(health(engine, container)["Log"]) >= 3, PATIENCE_S, "three results")

    assert (health(engine, container)["Status"], health(engine, container)["FailingStreak"]) == ("starting", 0)
    assert listed(engine, health="starting")[container].endswith("(health: starting)")


@pytest.mark.parametrize("test", [["NONE"], [], ["zz", "x"]])
def test_without_a_probe_there_is_no_health(engine: EngineProcess, busybox: str, test: list[str]) -> None:
    container = start(engine, busybox, *test)

    assert "Health" not in engine.inspect(container)["State"]
    assert container in listed(engine, health="none")


def test_the_images_check_is_inherited_in_parts_or_switched_off(engine: EngineProcess, busybox: str) -> None:
    base = engine.request("POST", "/v1.39/containers/create", {"Image": busybox, "Cmd": ["sleep", "1000"]}).json["Id"]
    change = urllib.parse.quote("HEALTHCHECK --interval=200ms --retries=7 CMD true")
    committed = engine.request("POST", f"/v1.39/commit?container={base}&repo=checked&changes={change}", {})
    assert committed.status == 201, committed.body
    try:

        def create(check: Any) -> Any:
            body = {"Image": "checked", "Cmd": ["sleep", "1000"], "HostConfig": {"NetworkMode": "none"}}
            answer = engine.request("POST", "/v1.39/containers/create", body | {"Healthcheck": check})
            post(engine, answer.json["Id"], "start")
            return answer.json["Id"], engine.inspect(answer.json["Id"])["Config"]["Healthcheck"]

        inherited, check = create(None)
        _, mixed = create({"Timeout": 5 * SECOND, "Retries": 2})
        off, none = create({"Test": ["NONE"]})

        assert check == {"Test": ["CMD-SHELL", "true"], "Interval": SOON, "Retries": 7}
        assert mixed == {"Test": ["CMD-SHELL", "true"], "Interval": SOON, "Timeout": 5 * SECOND, "Retries": 2}
        assert none["Test"] == ["NONE"]
        wait_for(engine, inherited, "healthy")
        assert health(engine, off) is None
    finally:
        engine.remove_containers()
        engine.request("DELETE", "/v1.39/images/checked")


def test_probes_rest_while_it_is_paused(engine: EngineProcess, busybox: str) -> None:
    container = start(engine, busybox, "CMD", "true")
    wait_for(engine, container, "healthy")

    post(engine, container, "pause")
    before = health(engine, container)
    time.sleep(1)
    paused = health(engine, container)
    post(engine, container, "unpause")

    assert (paused["Status"], paused["Log"]) == ("unhealthy", before["Log"])
    wait_for(engine, container, "healthy")


def test_a_signal_that_ends_nothing_ends_no_probes(engine: EngineProcess, busybox: str) -> None:
    container = start(engine, busybox, "CMD", "true")
    wait_for(engine, container, "healthy")
    post(engine, container, "kill?signal=WINCH")
    first = health(engine, container)["Log"][-1]["Start"]

    wait_until(lambda: health(engine, container)["Log"][-1]["Start"] > first, PATIENCE_S, "another probe")

    assert health(engine, container)["Status"] == "healthy"


def test_on_failure_restarts_what_ended_well_but_unhealthy(engine: EngineProcess, busybox: str) -> None:
    if engine.is_reference:
        pytest.skip("balena-engine's own")
    body = {
        "Image": busybox,
        "Cmd": ["sh", "-c", "while ! test -e /end; do sleep 0.1; done; rm /end"],
        "Healthcheck": {"Test": ["CMD", "false"], "Interval": SOON, "Retries": 1},
        "HostConfig": {"NetworkMode": "none", "RestartPolicy": {"Name": "on-failure"}},
    }
    container = engine.request("POST", "/v1.39/containers/create", body).json["Id"]
    post(engine, container, "start")
    wait_for(engine, container, "unhealthy")

    touch(engine, container, "/end")

    wait_until(lambda: engine.inspect(container)["RestartCount"] >= 1, PATIENCE_S, "a restart")


def test_health_goes_on_under_the_next_engine(
    engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory, busybox: str
) -> None:
    if engine.is_reference:
        pytest.skip("dockerd ends its containers unless told not to")
    with running_engine(tmp_path_factory.mktemp("experimental"), "--experimental") as other:
        assert other.request("POST", f"/v1.39/images/create?fromImage={busybox}").status == 200
        container = start(other, busybox, "CMD-SHELL", "test ! -e /bad", Retries=1, host={
            "RestartPolicy": {"Name": "always"}
        })  # fmt: skip
        wait_for(other, container, "healthy")
        other.kill()
        other.start()
        assert health(other, container)["Status"] == "healthy"
        wait_until(lambda: health(other, container)["Log"], PATIENCE_S, "another probe")
        pid = other.inspect(container)["State"]["Pid"]

        # Only with --experimental: unhealthy means restarted.
        other.request("POST", f"/v1.39/containers/{container}/update", {"RestartPolicy": {"Name": "always"}})
        touch(other, container, "/bad")

        wait_until(lambda: other.inspect(container)["State"]["Pid"] not in (0, pid), PATIENCE_S, "a restart")
