"""Runs in the virtual machine: the engine recovers, the disk is looked at, then images are pulled and deleted for ever.

Every line is JSON: {"found": ...} after recovery, {"begin": journey, "after": state} before a journey, {"told": state}
when the engine has answered. A state is what a client sees.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.compat.images import file, make_tar
from tests.images_fixture import ImageFixture
from tests.powercut.invariants import inspect
from tests.registry.fake import fake_registry

PORT = 5000
DATA_ROOT = Path("/disk/data")
SOCKET = "/run/engine.sock"
REPOSITORY = f"127.0.0.1:{PORT}/team/app"
BASE = f"{REPOSITORY}:base"


def image(number: int) -> ImageFixture:
    """Two layers: one that neighbours share, and some hundred files."""
    choose = random.Random(number)
    shared = make_tar([file(f"shared{n}", random.Random(number // 2).randbytes(30_000)) for n in range(20)])
    own = make_tar([file(f"d{n % 7}/f{n}", choose.randbytes(choose.randrange(20_000))) for n in range(150)])
    return ImageFixture((shared, own), {"Cmd": ["true"]})


class Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(SOCKET)


def ask(method: str, path: str, body: Any = None) -> Any:
    connection = Connection("engine", timeout=60)
    try:
        raw = None if body is None else json.dumps(body).encode()
        connection.request(method, path, raw, {"Content-Type": "application/json"} if raw else {})
        answer = connection.getresponse()
        data = answer.read()
        if answer.status >= 400:
            raise AssertionError(f"{method} {path}: {answer.status} {data!r}")
        lines = [json.loads(line) for line in data.splitlines() if line.strip()]
        if lines and isinstance(lines[-1], dict) and "error" in lines[-1]:
            raise AssertionError(f"{method} {path}: {lines[-1]}")
        return lines
    finally:
        connection.close()


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def state() -> dict[str, Any]:
    """What a client sees: names with their images, and containers."""
    images = (ask("GET", "/images/json") or [[]])[0]
    containers = (ask("GET", "/containers/json?all=1") or [[]])[0]
    names = {
        name: one["Id"]
        for one in images
        for name in [*(one["RepoTags"] or ()), *(one["RepoDigests"] or ())]
        if "<none>" not in name
    }
    return {
        "names": dict(sorted(names.items())),
        "containers": sorted(name for one in containers for name in one["Names"]),
    }


def start_engine() -> None:
    command = [sys.executable, "-m", "balenapy", "-H", f"unix://{SOCKET}", "--data-root", str(DATA_ROOT)]
    command += ["--exec-root", "/run/engine", "--pidfile", "/run/engine.pid", "--bridge", "none", "--iptables=false"]
    with open("/run/engine.log", "wb") as log:
        subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while True:
        try:
            ask("GET", "/info")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise AssertionError(Path("/run/engine.log").read_text()) from None
            time.sleep(0.05)


def look() -> None:
    """Say what is on the disk when the background has come to rest."""
    deadline = time.monotonic() + 10
    while (found := inspect(DATA_ROOT)).violations and time.monotonic() < deadline:
        time.sleep(0.2)
    say(found=state(), violations=found.violations, layers=found.layers, files=found.files)


class Journeys:
    """Chosen at random; each says beforehand what a client will see after it."""

    def __init__(self, seed: str) -> None:
        self._choose = random.Random(seed)
        self._images = {f"{REPOSITORY}:{n}": image(n) for n in range(4)}
        self._state = state()

    def run(self) -> None:
        if not any(name == BASE for name in self._state["names"]):
            self._pull(BASE, image(100))
        while True:
            self._choose.choice((self._pull_one, self._pull_one, self._remove, self._tag, self._container))()

    def _journey(self, name: str, method: str, path: str, after: dict[str, Any], body: Any = None) -> None:
        after = {"names": dict(sorted(after["names"].items())), "containers": sorted(after["containers"])}
        say(begin=name, after=after)
        ask(method, path, body)
        self._state = state()
        if self._state != after:
            say(violations=[f"after {name}: {self._state} instead of {after}"])
        say(told=self._state)

    def _pull_one(self) -> None:
        self._pull(*self._choose.choice(list(self._images.items())))

    def _pull(self, name: str, fixture: ImageFixture) -> None:
        names = {**self._state["names"], name: fixture.image_id}
        names[f"{REPOSITORY}@{fixture.manifest.digest}"] = fixture.image_id
        self._journey(f"pull {name}", "POST", f"/images/create?fromImage={name}", {**self._state, "names": names})

    def _remove(self) -> None:
        there = sorted({one for name, one in self._state["names"].items() if one != self._state["names"].get(BASE)})
        if there:
            image_id = self._choose.choice(there)
            names = {name: one for name, one in self._state["names"].items() if one != image_id}
            self._journey("remove", "DELETE", f"/images/{image_id}?force=1", {**self._state, "names": names})

    def _tag(self) -> None:
        image_id = self._choose.choice(sorted(self._state["names"].values()))
        number = self._choose.randrange(3)
        names = {**self._state["names"], f"local:{number}": image_id}
        path = f"/images/{image_id}/tag?repo=local&tag={number}"
        self._journey("tag", "POST", path, {**self._state, "names": names})

    def _container(self) -> None:
        name = f"/box{self._choose.randrange(2)}"
        containers = self._state["containers"]
        if name in containers:
            after = [one for one in containers if one != name]
            self._journey("remove container", "DELETE", f"/containers{name}", {**self._state, "containers": after})
            return
        after = [*containers, name]
        body = {"Image": self._state["names"][BASE], "Cmd": ["true"]}
        path = f"/containers/create?name={name[1:]}"
        self._journey("create container", "POST", path, {**self._state, "containers": after}, body)


def main() -> None:
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin"
    try:
        with fake_registry(port=PORT) as registry:
            for number in range(4):
                registry.add("team/app", str(number), image(number))
            registry.add("team/app", "base", image(100))
            start_engine()
            look()
            Journeys(sys.argv[1]).run()
    except BaseException as error:
        log = Path("/run/engine.log")
        say(violations=[f"{type(error).__name__}: {error}"], log=log.read_text()[-3000:] if log.exists() else "")
        time.sleep(1000)


if __name__ == "__main__":
    main()
