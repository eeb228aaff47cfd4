"""Many clients at once, some of which leave in the middle of a request; and one client that does anything in any order.

Afterwards nothing hangs, nothing is left and every container is in a state that the API knows. `BALENAPY_CYCLES` and
`BALENAPY_STEPS` make the runs longer.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.engine_process import EngineProcess, running_engine, wait_until
from tests.leftovers import leftovers, open_descriptors, wait_for_no_leftovers

pytestmark = pytest.mark.root

PARALLEL = 50
CYCLES = int(os.environ.get("BALENAPY_CYCLES", "1"))  # of each of them
STEPS = int(os.environ.get("BALENAPY_STEPS", "500"))
ANSWER_S = 300.0  # a request that takes longer on a loaded machine hangs
LEGAL = {"created", "running", "paused", "restarting", "removing", "exited", "dead"}

SUCCESSES = {"create": {201}, "start": {204, 304}, "stop": {204, 304}, "kill": {204}, "restart": {204}, "remove": {204},
             "pause": {204}, "unpause": {204}}  # fmt: skip
# What a cycle may be told because a request that it gave up is still at work, or never was.
REFUSALS = {404, 409, 500}


class Cycle:
    """One client: create, start, a few calls, stop, remove; now and then it hangs up before the answer."""

    def __init__(self, engine: EngineProcess, image: str, number: int, seed: int) -> None:
        self._engine = engine
        self._image = image
        self._random = random.Random(seed * 1000 + number)
        self.name = f"cycle-{number}"
        self.answers: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self) -> None:
        try:
            for _ in range(CYCLES):
                self._once()
        except Exception as error:
            self.problems.append(f"{self.name}: {type(error).__name__}: {error}")

    def _once(self) -> None:
        body = {"Image": self._image, "Cmd": ["sleep", "1000"], "HostConfig": {"NetworkMode": "none"}}
        self._ask("create", "POST", f"/containers/create?name={self.name}", body)
        self._ask("start", "POST", f"/containers/{self.name}/start")
        for _ in range(self._random.randrange(3)):
            call = self._random.choice(("pause", "unpause", "restart?t=0", "kill", "start", "stop?t=0"))
            self._ask(call.partition("?")[0], "POST", f"/containers/{self.name}/{call}")
        self._check_state()
        self._ask("stop", "POST", f"/containers/{self.name}/stop?t=0")
        self._ask("remove", "DELETE", f"/containers/{self.name}?force={self._random.randrange(2)}")

    def _ask(self, what: str, method: str, path: str, body: Any = None) -> None:
        if self._random.random() < 0.25:
            self._hang_up(method, path, body, self._random.choice((0.0, 0.01, 0.05, 0.2)))
            self.answers["hung up"] += 1
            return
        answer = self._engine.request(method, f"/v1.39{path}", body, timeout_s=ANSWER_S)
        self.answers[f"{what} {answer.status}"] += 1
        if answer.status not in SUCCESSES[what] | REFUSALS:
            self.problems.append(f"{self.name}: {what}: {answer.status} {answer.body!r}")
        elif answer.status == 500 and "is not paused" not in answer.message:
            self.problems.append(f"{self.name}: {what}: {answer.message}")

    def _hang_up(self, method: str, path: str, body: Any, after_s: float) -> None:
        data = json.dumps(body).encode() if body is not None else b""
        head = f"{method} /v1.39{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        if data:
            head += "Content-Type: application/json\r\n"
        with self._engine.raw_connection() as connection:
            connection.sendall(head.encode() + b"\r\n" + data)
            time.sleep(after_s)

    def _check_state(self) -> None:
        answer = self._engine.request("GET", f"/v1.39/containers/{self.name}/json", timeout_s=ANSWER_S)
        if answer.status == 404:
            return
        state = answer.json["State"]
        running = state["Running"]
        legal = (
            state["Status"] in LEGAL
            and running == (state["Status"] in ("running", "paused", "restarting"))
            and state["Paused"] == (state["Status"] == "paused")
            and (state["Pid"] > 0) == (state["Status"] in ("running", "paused"))
        )
        if not legal:
            self.problems.append(f"{self.name}: {state}")


def test_parallel_cycles_with_clients_that_leave(engine: EngineProcess, busybox: str) -> None:
    at_rest = leftovers()
    seed = random.randrange(1_000_000)
    cycles = [Cycle(engine, busybox, number, seed) for number in range(PARALLEL)]
    threads = [threading.Thread(target=cycle.run, daemon=True) for cycle in cycles]
    pings: list[float] = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        begun = time.monotonic()
        assert engine.request("GET", "/_ping", timeout_s=ANSWER_S).status == 200
        pings.append(time.monotonic() - begun)
        time.sleep(0.05)
    counts: Counter[str] = sum((cycle.answers for cycle in cycles), Counter())
    print(f"seed {seed}: {PARALLEL} x {CYCLES} cycles, {dict(sorted(counts.items()))}")
    print(f"_ping meanwhile: median {sorted(pings)[len(pings) // 2] * 1000:.0f} ms, most {max(pings) * 1000:.0f} ms")

    assert [problem for cycle in cycles for problem in cycle.problems] == [], f"seed {seed}"

    # What was given up may still be at work; then everything can be removed, by one ordinary request each.
    def settled() -> bool:
        engine.remove_containers()
        return bool(engine.request("GET", "/v1.39/containers/json?all=1").json == [])

    wait_until(settled, 120, "everything removed")
    if not engine.is_reference:
        assert wait_for_no_leftovers(at_rest) == {}
    for number in range(PARALLEL):  # every name is free again
        name = f"cycle-{number}"
        body = {"Image": busybox, "Cmd": ["true"]}
        assert engine.request("POST", f"/v1.39/containers/create?name={name}", body).status == 201


def test_a_loop_of_restarts_can_always_be_stopped_and_removed(engine: EngineProcess, busybox: str) -> None:
    """At any moment of its restarting: while it starts, runs, ends or waits."""
    seed = random.randrange(1_000_000)
    pick = random.Random(seed)
    print(f"seed {seed}")
    for number in range(12):
        policy = pick.choice(({"Name": "always"}, {"Name": "unless-stopped"}, {"Name": "on-failure"}))
        body = {
            "Image": busybox,
            "Cmd": ["sh", "-c", f"sleep 0.0{number % 3}; exit 3"],
            "HostConfig": {"NetworkMode": "none", "RestartPolicy": policy},
        }
        container = engine.request("POST", "/v1.39/containers/create", body).json["Id"]
        assert engine.request("POST", f"/v1.39/containers/{container}/start").status == 204
        time.sleep(pick.random() * 0.8)
        if number % 2:
            stopped = engine.request("POST", f"/v1.39/containers/{container}/stop?t=5", timeout_s=ANSWER_S)
            assert stopped.status == 204, stopped.body
            state = engine.inspect(container)["State"]
            assert (state["Status"], state["Restarting"]) == ("exited", False)
            time.sleep(0.3)
            assert engine.inspect(container)["State"]["Status"] == "exited"
            assert engine.request("DELETE", f"/v1.39/containers/{container}").status == 204
        else:
            removed = engine.request("DELETE", f"/v1.39/containers/{container}?force=1", timeout_s=ANSWER_S)
            assert removed.status == 204, removed.body
        assert engine.request("GET", f"/v1.39/containers/{container}/json").status == 404


def test_execs_while_their_container_is_removed_leave_nothing(engine: EngineProcess, busybox: str) -> None:
    at_rest, descriptors = leftovers(), open_descriptors(engine.pid)
    answers: Counter[str] = Counter()

    def run_exec(container: str, number: int) -> None:
        body = {"Cmd": ["sh", "-c", f"echo hi; sleep 0.{number % 10}"], "AttachStdout": True, "Tty": bool(number % 2)}
        made = engine.request("POST", f"/v1.39/containers/{container}/exec", body, timeout_s=ANSWER_S)
        answers[f"create {made.status}"] += 1
        if made.status == 201:
            how = {"Detach": number % 3 == 0, "Tty": bool(number % 2)}
            started = engine.request("POST", f"/v1.39/exec/{made.json['Id']}/start", how, timeout_s=ANSWER_S)
            answers[f"start {started.status}"] += 1

    for number in range(3):
        body = {
            "Image": busybox, "Cmd": ["sleep", "1000"], "HostConfig": {"NetworkMode": "none"},
            "Healthcheck": {"Test": ["CMD", "true"], "Interval": 50_000_000},
        }  # fmt: skip
        container = engine.request("POST", "/v1.39/containers/create", body).json["Id"]
        assert engine.request("POST", f"/v1.39/containers/{container}/start").status == 204
        threads = [threading.Thread(target=run_exec, args=(container, each), daemon=True) for each in range(30)]
        for thread in threads:
            thread.start()
        time.sleep(0.3 + 0.5 * number)
        assert engine.request("DELETE", f"/v1.39/containers/{container}?force=1", timeout_s=ANSWER_S).status == 204
        for thread in threads:
            thread.join(ANSWER_S)
            assert not thread.is_alive()
    print(dict(sorted(answers.items())))

    if not engine.is_reference:
        assert wait_for_no_leftovers(at_rest) == {}
        wait_until(lambda: not open_descriptors(engine.pid) - descriptors, 30, "no more descriptors")


def give_up(engine: EngineProcess, method: str, path: str, after_s: float = 0.2) -> None:
    with engine.raw_connection() as connection:
        connection.sendall(f"{method} /v1.39{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        time.sleep(after_s)


def test_what_was_asked_is_done_though_the_client_left(engine: EngineProcess, busybox: str) -> None:
    deaf = ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]
    body = {"Image": busybox, "Cmd": deaf, "HostConfig": {"NetworkMode": "none"}}
    stopped, restarted, removed = (
        engine.request("POST", "/v1.39/containers/create", body).json["Id"] for _ in range(3)
    )
    for container in (stopped, restarted, removed):
        assert engine.request("POST", f"/v1.39/containers/{container}/start").status == 204
    pid = engine.inspect(restarted)["State"]["Pid"]
    time.sleep(0.5)

    give_up(engine, "POST", f"/containers/{stopped}/stop?t=1")
    give_up(engine, "POST", f"/containers/{restarted}/restart?t=1")
    give_up(engine, "DELETE", f"/containers/{removed}?force=1", 0.02)

    wait_until(lambda: engine.inspect(stopped)["State"]["Status"] == "exited", 60, "stopped")
    wait_until(lambda: engine.inspect(restarted)["State"]["Pid"] not in (0, pid), 60, "restarted")
    gone = f"/v1.39/containers/{removed}/json"
    wait_until(lambda: engine.request("GET", gone).status == 404, 60, "removed")


# -- one client, any order, against a model --

NAMES = ("ann", "bob", "cyd", "dan", "eve")


class Model(RuleBasedStateMachine):
    """Containers by name, each with the state that the API must show."""

    engine: EngineProcess
    image: str
    steps = 0
    restarts = 0
    answers: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.engine.remove_containers()
        self.states: dict[str, str] = {}
        self.codes: dict[str, int] = {}
        self.done = 0
        self.restarted = False

    def ask(self, expected: int, method: str, path: str, body: Any = None, *, step: bool = True) -> Any:
        type(self).steps += step
        self.done += step
        answer = self.engine.request(method, f"/v1.39{path}", body, timeout_s=ANSWER_S)
        note(f"{method} {path} -> {answer.status} {answer.body[:200]!r}")
        if step:
            self.answers[f"{method} {answer.status}"] += 1
        assert answer.status == expected, f"{method} {path}: {answer.status} {answer.body!r}, model {self.states}"
        return answer

    def state(self, name: str) -> str:
        return self.states.get(name, "absent")

    @initialize()
    def begin_with_some(self) -> None:
        for name in NAMES[1:]:
            self.create(name)
        for name in NAMES[2:]:
            self.start(name)

    @rule(name=st.sampled_from(NAMES))
    def create(self, name: str) -> None:
        body = {"Image": self.image, "Cmd": ["sleep", "1000"], "HostConfig": {"NetworkMode": "none"}}
        known = name in self.states
        self.ask(409 if known else 201, "POST", f"/containers/create?name={name}", body)
        if not known:
            self.states[name] = "created"

    @rule(name=st.sampled_from(NAMES))
    def start(self, name: str) -> None:
        expected = {"absent": 404, "created": 204, "exited": 204, "running": 304, "paused": 409}[self.state(name)]
        self.ask(expected, "POST", f"/containers/{name}/start")
        if expected == 204:
            self.states[name] = "running"

    def _end(self, name: str) -> None:
        self.states[name], self.codes[name] = "exited", 137

    @rule(name=st.sampled_from(NAMES))
    def stop(self, name: str) -> None:
        expected = {"absent": 404, "created": 304, "exited": 304, "running": 204, "paused": 204}[self.state(name)]
        self.ask(expected, "POST", f"/containers/{name}/stop?t=0")
        if expected == 204:
            self._end(name)

    @rule(name=st.sampled_from(NAMES))
    def kill(self, name: str) -> None:
        expected = {"absent": 404, "created": 409, "exited": 409, "running": 204, "paused": 204}[self.state(name)]
        self.ask(expected, "POST", f"/containers/{name}/kill")
        if expected == 204:
            self._end(name)

    @rule(name=st.sampled_from(NAMES))
    def signal(self, name: str) -> None:
        expected = {"absent": 404, "created": 409, "exited": 409, "running": 204, "paused": 204}[self.state(name)]
        if self.state(name) != "paused":  # without a stop signal of its own, any signal thaws it
            self.ask(expected, "POST", f"/containers/{name}/kill?signal=WINCH")

    @rule(name=st.sampled_from(NAMES))
    def pause(self, name: str) -> None:
        expected = {"absent": 404, "created": 409, "exited": 409, "running": 204, "paused": 409}[self.state(name)]
        self.ask(expected, "POST", f"/containers/{name}/pause")
        if expected == 204:
            self.states[name] = "paused"

    @rule(name=st.sampled_from(NAMES))
    def unpause(self, name: str) -> None:
        expected = {"absent": 404, "created": 500, "exited": 500, "running": 500, "paused": 204}[self.state(name)]
        self.ask(expected, "POST", f"/containers/{name}/unpause")
        if expected == 204:
            self.states[name] = "running"

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name: str) -> None:
        expected = 404 if self.state(name) == "absent" else 204
        self.ask(expected, "POST", f"/containers/{name}/restart?t=0")
        if expected == 204:
            self.states[name] = "running"

    @rule(name=st.sampled_from(NAMES), force=st.booleans())
    def remove(self, name: str, force: bool) -> None:
        alive = self.state(name) in ("running", "paused")
        expected = 404 if self.state(name) == "absent" else 409 if alive and not force else 204
        self.ask(expected, "DELETE", f"/containers/{name}?force={int(force)}")
        if expected == 204:
            for known in (self.states, self.codes):
                known.pop(name, None)

    @rule(name=st.sampled_from(NAMES), new=st.sampled_from(NAMES))
    def rename(self, name: str, new: str) -> None:
        expected = 404 if name not in self.states else 400 if name == new else 409 if new in self.states else 204
        self.ask(expected, "POST", f"/containers/{name}/rename?name={new}")
        if expected == 204:
            self.states[new] = self.states.pop(name)
            if name in self.codes:
                self.codes[new] = self.codes.pop(name)

    @rule(name=st.sampled_from(NAMES), shares=st.integers(2, 1024))
    def update(self, name: str, shares: int) -> None:
        expected = 404 if self.state(name) == "absent" else 200
        self.ask(expected, "POST", f"/containers/{name}/update", {"CpuShares": shares})
        if expected == 200:
            assert self.ask(200, "GET", f"/containers/{name}/json").json["HostConfig"]["CpuShares"] == shares

    @rule(name=st.sampled_from(NAMES))
    def exec(self, name: str) -> None:
        expected = {"absent": 404, "created": 409, "exited": 409, "running": 201, "paused": 409}[self.state(name)]
        made = self.ask(expected, "POST", f"/containers/{name}/exec", {"Cmd": ["true"], "AttachStdout": True})
        if expected == 201:
            self.ask(200, "POST", f"/exec/{made.json['Id']}/start", {"Detach": False})
            assert self.ask(200, "GET", f"/exec/{made.json['Id']}/json").json["ExitCode"] == 0

    @rule(name=st.sampled_from(NAMES))
    def wait(self, name: str) -> None:
        if self.state(name) in ("created", "exited"):
            answer = self.ask(200, "POST", f"/containers/{name}/wait")
            assert answer.json == {"Error": None, "StatusCode": self.codes.get(name, 0)}

    @precondition(lambda self: len(self.states) == len(NAMES))
    @rule()
    def prune(self) -> None:
        gone = [name for name, state in self.states.items() if state in ("created", "exited")]
        answer = self.ask(200, "POST", "/containers/prune")
        assert len(answer.json["ContainersDeleted"] or ()) == len(gone)
        for name in gone:
            for known in (self.states, self.codes):
                known.pop(name, None)

    @precondition(lambda self: self.done > 20 and not self.restarted and not self.engine.is_reference)
    @rule(kill=st.booleans())
    def restart_the_engine(self, kill: bool) -> None:
        type(self).restarts += 1
        self.restarted = True
        if kill:
            self.engine.kill()
        else:
            self.engine.stop()
        self.engine.start()

    @rule(status=st.sampled_from(("created", "running", "paused", "exited")))
    def list_by_status(self, status: str) -> None:
        filters = urllib.parse.quote(json.dumps({"status": [status]}))
        found = self.ask(200, "GET", f"/containers/json?filters={filters}").json
        expected = {name for name, state in self.states.items() if state == status}
        assert {entry["Names"][0][1:] for entry in found} == expected

    @invariant()
    def everything_is_listed_as_the_model_has_it(self) -> None:
        found = self.ask(200, "GET", "/containers/json?all=1", step=False).json
        assert {entry["Names"][0][1:]: entry["State"] for entry in found} == self.states

    def teardown(self) -> None:
        self.engine.remove_containers()


def test_any_order_of_requests_agrees_with_the_model(tmp_path: Path, busybox: str) -> None:
    class Run(Model):
        pass

    chosen = settings(
        max_examples=max(1, STEPS // 40),
        stateful_step_count=50,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),  # shrinking would take an hour
        suppress_health_check=list(HealthCheck),
    )
    with running_engine(tmp_path) as engine:
        assert engine.request("POST", f"/v1.39/images/create?fromImage={busybox}").status == 200
        Run.engine, Run.image, Run.answers = engine, busybox, Counter()
        run_state_machine_as_test(Run, settings=chosen)
    print(f"{Run.steps} requests, {Run.restarts} restarts of the engine, {dict(sorted(Run.answers.items()))}")

    assert Run.steps >= STEPS
