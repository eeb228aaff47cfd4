"""testcontainers: services that a test suite starts, waits for, asks, and forgets."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest

from tests.engine_process import EngineProcess, wait_until

pytestmark = [
    pytest.mark.root,
    # docker-py leaves the sockets of streams to the garbage collector; testcontainers warns of its own old names.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def environment(engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """testcontainers finds the engine by the environment; its reaper is an image of a public registry."""
    for name, value in engine.environment.items():
        if name != "PATH":
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
    monkeypatch.setenv("TESTCONTAINERS_HOST_OVERRIDE", "127.0.0.1")
    from testcontainers.core.config import testcontainers_config

    monkeypatch.setattr(testcontainers_config, "ryuk_disabled", True)
    return


def test_a_service_that_is_waited_for(engine: EngineProcess, busybox: str) -> None:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.waiting_utils import wait_for_logs

    script = "mkdir /www; echo served > /www/page; echo about to listen; exec httpd -f -p 8080 -h /www"
    with (
        DockerContainer(busybox)
        .with_command(["sh", "-c", script])
        .with_exposed_ports(8080)
        .with_env("ROLE", "web")
        .with_kwargs(labels={"by": "test"}) as service
    ):
        wait_for_logs(service, "about to listen", timeout=30)
        port = service.get_exposed_port(8080)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def answer() -> bytes:
            try:
                return opener.open(f"http://127.0.0.1:{port}/page", timeout=5).read()
            except OSError:
                return b""

        assert wait_until(answer, 20, "an answer of the service") == b"served\n"
        code, output = service.exec(["sh", "-c", "echo $ROLE; exit 4"])
        assert (code, output) == (4, b"web\n")
        assert b"about to listen" in service.get_logs()[0]
        identity = service.get_wrapped_container().id

    assert engine.request("GET", f"/v1.39/containers/{identity}/json").status == 404


def test_services_on_a_network_of_their_own(engine: EngineProcess, busybox: str) -> None:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.network import Network

    with Network() as network:
        with (
            DockerContainer(busybox)
            .with_command(["sh", "-c", "echo shared > /tmp/f; exec httpd -f -h /tmp"])
            .with_network(network)
            .with_network_aliases("store") as _,
            DockerContainer(busybox).with_command(["sleep", "1000"]).with_network(network) as client,
        ):
            fetch = ["sh", "-c", "until wget -q -O - http://store/f; do sleep 0.1; done"]
            code, output = client.exec(fetch)

            assert code == 0
            assert output.decode().endswith("shared\n")
        name = network.name

    assert name not in {one["Name"] for one in engine.request("GET", "/v1.39/networks").json}


def test_volumes_and_what_fails(engine: EngineProcess, busybox: str, tmp_path: object) -> None:
    from docker.errors import APIError
    from testcontainers.core.container import DockerContainer

    (tmp_path / "seed").write_text("from the host\n")  # type: ignore[operator]
    with (
        DockerContainer(busybox)
        .with_command(["sleep", "1000"])
        .with_volume_mapping(str(tmp_path), "/seeded", "ro") as container
    ):
        assert container.exec(["cat", "/seeded/seed"]).output == b"from the host\n"
        assert container.exec(["touch", "/seeded/x"]).exit_code == 1

    with pytest.raises(APIError, match="executable file not found"):
        DockerContainer(busybox).with_command(["nope"]).start()
    engine.remove_containers()
