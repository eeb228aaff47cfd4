"""Thousands of requests made up from the API's description: answered as it says, nothing dies, nothing is left.

`REQUESTS` says how many (make test-generated: 20,000). What must hold of each answer is `shapes.problems`: a status
that is known for the route, the engine's headers, an error object or the described types. A 500 is right only where
the engine we replace has nothing better (`REFUSALS`); one that tells of a fault of ours never is.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import Phase

from tests.compat import shapes
from tests.compat.generated import Place, Request, requests
from tests.engine_process import EngineProcess, Response, UnixHTTPConnection, running_engine, wait_until
from tests.leftovers import Leftovers, leftovers, open_descriptors, wait_for_no_leftovers

pytestmark = pytest.mark.root

REQUESTS = int(os.environ.get("REQUESTS", "400"))
FURNISH_EVERY = 40
ANSWER_TIMEOUT_S = 60.0
STREAM_S = 0.15  # how long a stream without an end is listened to
STREAMS = {
    "/containers/{id}/logs",
    "/containers/{id}/stats",
    "/containers/{id}/attach",
    "/containers/{id}/attach/ws",
    "/containers/{id}/wait",
    "/exec/{id}/start",
    "/events",
}

# Statuses that the code of the engine we replace gives and the description does not say. The first are for any route.
ANYWHERE = {
    301,  # a path that is not clean
    400,  # a body of another type than JSON, or that cannot be read
    404,  # a path that no route has: an empty name
}
STATUSES: dict[str, set[int]] = {
    "/containers/create": {403},
    "/containers/{id}/start": {400, 409},
    "/containers/{id}/stop": {409},
    "/containers/{id}/restart": {409},
    "/containers/{id}/pause": {409},
    "/containers/{id}/unpause": {409},
    "/containers/{id}/resize": {409},
    "/containers/{id}/top": {409},
    "/containers/{id}/logs": {409, 501},  # 501: a log driver that cannot be read
    "/containers/{id}/export": {409},
    "/containers/{id}/update": {409},
    "/containers/{id}/attach": {409},
    "/containers/{id}/archive": {409},
    "/containers/prune": {409},
    "/exec/{id}/resize": {409, 500},
    "/exec/{id}/start": {500},
    "/exec/{id}/json": set(),
    "/commit": {409},
    "/images/create": {403, 401},
    "/images/prune": {409},
    "/images/delta": {500},
    "/auth": {401},
    "/distribution/{name}/json": {404},
    "/volumes/create": {409},
    "/volumes/prune": {409},
    "/networks/create": {409},
    "/networks/{id}/connect": {409},
    "/networks/prune": {409},
    "/system/df": {500},
    "/build": {404},
}

# 500s of the engine we replace: what it does not classify (ENDPOINTS, BEHAVIOUR 1.2).
REFUSALS = [
    r"strconv\.\w+: parsing ",
    r"invalid character ",
    r"json: cannot unmarshal ",
    r"^EOF$",
    r"unexpected EOF",
    r"unexpected end of JSON input",
    r"connection refused",  # by a registry, a download
    r"^invalid reference format",
    r"^invalid tag format",
    r"^repository name must not be more than 255 characters",
    r"^Cannot locate specified Dockerfile: ",
    r"^[Ff]orbidden path outside the build context: ",
    r"^invalid QoS settings: ",
    r"^Invalid subnet ",
    r"^ps: ",
    r"^Couldn't find PID field in ps output$",
    r"^Conflict, cannot remove the default link name of the container$",
    r"^extraction point is not a directory$",
    r"^--storage-opt is supported only ",
    r"^invalid (volume|mount) ",
    r"^Container [0-9a-f]{64} is not paused$",
    r"^timeout waiting for exec session ready$",
    r"lookup zz: no such host$",
    r"^archive/tar: ",
    r"^Error processing tar file",
    r"^Cannot mkdir: ",
    r"no Host in request URL",
    r"^invalid name: ",
]


class Session:
    """A client that keeps its connection, and what it has learned and seen."""

    def __init__(self, engine: EngineProcess) -> None:
        self.engine = engine
        self.execs: list[str] = []
        self.counts: Counter[str] = Counter()
        self._connection: UnixHTTPConnection | None = None

    def send(self, request: Request) -> Response:
        target = request.target.replace("<exec>", self.execs[-1] if self.execs else "none")
        endless = request.path in STREAMS
        connection = self._connection or UnixHTTPConnection(str(self.engine.socket), ANSWER_TIMEOUT_S)
        self._connection = None
        headers = dict(request.headers)
        connection.request(request.method, target, request.body or None, headers)
        answer = connection.getresponse()
        body = self._read_some(connection, answer) if endless else answer.read()
        if endless or answer.will_close:
            connection.close()
        else:
            self._connection = connection
        fields = {name.lower(): value for name, value in answer.getheaders()}
        response = Response(answer.status, answer.reason, fields, body)
        if request.path == "/containers/{id}/exec" and response.status == 201:
            self.execs.append(response.json["Id"])
        self.counts[f"{response.status}"] += 1
        return response

    def furnish(self, image: str) -> None:
        """Make what is not there: a running container, one that was never started, a network, a volume."""
        if self.engine.request("GET", f"/v1.39/images/{image}/json").status == 404:
            self.engine.request("POST", f"/v1.39/images/create?fromImage={image}", b"")
        container = {"Image": image, "Cmd": ["sleep", "1000"], "StopTimeout": 0, "HostConfig": {"NetworkMode": "none"}}
        for path, body in (
            ("/containers/create?name=c1", container),
            ("/containers/create?name=c2", container),
            ("/networks/create", {"Name": "n1", "CheckDuplicate": True}),
            ("/volumes/create", {"Name": "v1"}),
            ("/containers/c1/start", b""),
        ):
            status = self.engine.request("POST", f"/v1.39{path}", body).status
            assert status in (200, 201, 204, 304, 400, 409, 500), (path, status)

    @staticmethod
    def _read_some(connection: UnixHTTPConnection, answer: http.client.HTTPResponse) -> bytes:
        if answer.status >= 400:
            return answer.read()
        sock = connection.sock
        if sock is not None:
            sock.settimeout(STREAM_S)
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer.read(4096)
        return b""

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def wrong(request: Request, answer: Response) -> list[str]:
    """What of this answer should not be."""
    told = answer.body[:300].decode(errors="replace")
    if answer.status == 500 and not any(re.search(pattern, message(answer)) for pattern in REFUSALS):
        return [f"500 {told}"]
    if (answer.status == 404 and "page not found" in told) or answer.status in (101, 301):
        return []
    if request.path.endswith("/attach") and answer.headers.get("content-type", "").startswith("application/vnd"):
        return []  # a raw head, or a raw refusal
    if request.path.endswith("/attach/ws") and answer.body == b"not websocket protocol":
        return []  # the WebSocket library's own refusal
    if request.path == "/exec/{id}/start" and answer.status in (200, 101):
        return []
    statuses = ANYWHERE | STATUSES.get(request.path, set())
    return shapes.problems(request.method, request.path, answer, statuses=statuses)


def message(answer: Response) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return answer.message
    return answer.body.decode(errors="replace")


@pytest.fixture(scope="module")
def alone(
    nothing_left_behind: Leftovers, tmp_path_factory: pytest.TempPathFactory, busybox: str
) -> Iterator[EngineProcess]:
    """An engine for these requests, which must be as it was when they are over."""
    with running_engine(tmp_path_factory.mktemp("generated")) as engine:
        engine.docker("pull", "-q", busybox)
        for network in ("bridge", "none"):
            engine.docker("run", "--rm", "--network", network, busybox, "true")
        yield engine


def test_generated_requests(alone: EngineProcess, busybox: str, registry: str, tmp_path: Path) -> None:
    place = Place(busybox, registry, str(tmp_path), alone.number)
    session = Session(alone)
    before = leftovers()
    descriptors = open_descriptors(alone.pid)
    surprises: dict[str, str] = {}
    begun = time.monotonic()

    # No shrinking: what an answer is depends on all requests before it.
    @hypothesis.settings(max_examples=REQUESTS, phases=[Phase.generate], database=None)
    @hypothesis.given(requests(place))
    def ask(request: Request) -> None:
        if sum(session.counts.values()) % FURNISH_EVERY == 0:
            session.furnish(busybox)
        try:
            answer = session.send(request)
        except (OSError, http.client.HTTPException) as error:
            assert alone.is_alive, f"the engine died of {request}\n{alone.log_tail()}"
            surprises.setdefault(f"{request.method} {request.path}: no answer: {error!r}", repr(request))
            return
        for line in wrong(request, answer):
            what = f"{request.method} {request.path}: {line}"[:300]
            surprises.setdefault(what, f"{request} -> {answer.body[:200]!r}")

    ask()
    session.close()

    total = sum(session.counts.values())
    took = time.monotonic() - begun
    print(f"{total} generated requests in {took:.0f} s: {dict(sorted(session.counts.items()))}")
    assert alone.is_alive, alone.log_tail()
    assert not surprises, "\n".join(f"{what}\n    {example}" for what, example in sorted(surprises.items()))
    assert total >= REQUESTS
    reached = {"200", "201", "400", "404"} | ({"204", "409"} if REQUESTS >= 2000 else set())
    assert reached <= set(session.counts), "requests that reach nothing show nothing"
    assert [line for line in alone.log_text().splitlines() if " msg=bug " in line or "Traceback" in line] == []
    clean(alone, busybox)
    assert wait_for_no_leftovers(before) == {}
    if not alone.is_reference:
        wait_until(
            lambda: not open_descriptors(alone.pid) - descriptors,
            30,
            f"no more descriptors than {descriptors}, now {open_descriptors(alone.pid)}",
        )


def clean(engine: EngineProcess, image: str) -> None:
    """Remove everything by the API; that this is possible is part of the promise."""

    def listed(path: str) -> Any:
        answer = engine.request("GET", f"/v1.39{path}")
        assert answer.status == 200, answer.body
        return answer.json

    for container in listed("/containers/json?all=1"):
        answer = engine.request("DELETE", f"/v1.39/containers/{container['Id']}?force=1&v=1", timeout_s=60)
        assert answer.status in (204, 404), answer.body
    assert listed("/containers/json?all=1") == []
    for network in listed("/networks"):
        if network["Name"] not in ("bridge", "host", "none"):
            assert engine.request("DELETE", f"/v1.39/networks/{network['Id']}").status == 204, network
    for volume in listed("/volumes")["Volumes"] or []:
        assert engine.request("DELETE", f"/v1.39/volumes/{volume['Name']}").status == 204, volume
    filters = json.dumps({"dangling": ["false"]})
    assert engine.request("POST", f"/v1.39/images/prune?filters={filters.replace(' ', '')}", b"").status == 200
    assert listed("/images/json?all=1") == []
