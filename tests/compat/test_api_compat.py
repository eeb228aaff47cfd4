"""`--api-compat`: the negotiation of newer Go clients, and the Docker CLI at the versions it then speaks.

The rule is the one of the Go client since 2025 (moby `client.NegotiateAPIVersionPing` and `MinAPIVersion`): take the
lower of the own version and the one in `_ping`'s header, and give up where that is below the least the client knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.compat.cli import Cli
from tests.engine_process import EngineProcess, running_engine
from tests.leftovers import Leftovers

pytestmark = pytest.mark.root

CEILING = "1.44"
CLIENTS = {"1.51": "1.44", "1.50": "1.40", "1.44": "1.44"}  # what they speak -> the least they know


@pytest.fixture(scope="module")
def compatible(
    nothing_left_behind: Leftovers, tmp_path_factory: pytest.TempPathFactory, busybox: str
) -> Iterator[EngineProcess]:
    """An engine with the ceiling raised."""
    with running_engine(tmp_path_factory.mktemp("compat"), "--api-compat", CEILING, program="balenapy") as engine:
        engine.docker("pull", "-q", busybox)
        yield engine


def negotiate(engine: EngineProcess, own: str, least: str) -> str:
    """The version the client goes on with. Raises: ValueError, as the client gives up."""
    answer = engine.request("HEAD", "/_ping")
    if answer.status != 200:
        answer = engine.request("GET", "/_ping")
    offered = answer.headers.get("api-version", "1.24")
    if numbers(offered) < numbers(least):
        raise ValueError(f"API version {offered} is not supported: the minimum supported API version is {least}")
    return min(own, offered, key=numbers)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.mark.parametrize(("own", "least"), CLIENTS.items())
def test_newer_clients_give_up_without_it(engine: EngineProcess, own: str, least: str) -> None:
    if engine.is_reference:
        pytest.skip("the reference speaks 1.41")

    with pytest.raises(ValueError, match=r"API version 1\.39 is not supported"):
        negotiate(engine, own, least)
    refused = engine.request("GET", f"/v{least}/version")

    assert refused.status == 400
    assert refused.message == f"client version {least} is too new. Maximum supported API version is 1.39"


@pytest.mark.parametrize(("own", "least"), CLIENTS.items())
def test_newer_clients_agree_with_it(compatible: EngineProcess, own: str, least: str) -> None:
    version = negotiate(compatible, own, least)
    answer = compatible.request("GET", f"/v{version}/version")

    assert version == CEILING
    assert answer.status == 200
    assert answer.headers["api-version"] == CEILING
    assert answer.json["ApiVersion"] == answer.json["Components"][0]["Details"]["ApiVersion"] == CEILING
    assert compatible.request("GET", "/v1.45/version").message == (
        f"client version 1.45 is too new. Maximum supported API version is {CEILING}"
    )


def test_older_clients_see_what_they_saw(compatible: EngineProcess, engine: EngineProcess) -> None:
    for path in ("/v1.24/info", "/v1.39/containers/json", "/v1.39/images/json", "/networks"):
        assert compatible.request("GET", path).status == 200, path

    assert compatible.client("1.39").ping() is True


def test_the_cli_works_at_the_raised_version(compatible: EngineProcess, busybox: str) -> None:
    cli = Cli(compatible, {})

    assert cli.out("version", "-f", "{{.Client.APIVersion}} {{.Server.APIVersion}}") == f"{CEILING} {CEILING}"
    assert cli.out("run", "--rm", busybox, "echo", "hello") == "hello"
    cli("network", "create", "raised")
    container = cli.start("--name", "web", "--network", "raised", "--network-alias", "www", busybox, "sleep", "1000")
    assert cli.out("exec", "web", "nslookup", "www").count("Address") >= 2
    assert cli.lines("ps", "-q", "--no-trunc") == [container]
    assert json.loads(cli.out("stats", "--no-stream", "--format", "{{json .Name}}")) == "web"
    assert cli.out("logs", "web") == ""
    assert cli.out("inspect", "-f", "{{.State.Status}}", "web") == "running"
    assert "web" in cli.out("events", "--since", "1h", "--until", "0s", "--filter", "event=start")
    cli("rm", "-f", "web")
    assert cli.fails("network", "create", "raised").strip().endswith("network with name raised already exists")
    cli("network", "rm", "raised")
    assert "Images" in cli.out("system", "df")


def test_volumes_with_names_are_spared_where_the_client_says_so(compatible: EngineProcess) -> None:
    cli = Cli(compatible, {})
    cli("volume", "create", "kept")
    anonymous = cli.out("volume", "create")

    pruned = cli.out("volume", "prune", "-f")
    names = cli.lines("volume", "ls", "-q")
    everything = cli.out("volume", "prune", "-f", "-a")

    assert anonymous in pruned
    assert names == ["kept"]
    assert "kept" in everything
    cli("volume", "create", "old")
    old = compatible.request("POST", "/v1.39/volumes/prune", b"")
    assert old.json["VolumesDeleted"] == ["old"]  # 1.39 knows no difference
