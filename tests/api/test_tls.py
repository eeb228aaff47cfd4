"""tcp:// with and without TLS, client certificates, and sockets handed over by the service manager."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from balenapy.api import server
from balenapy.api.app import App
from balenapy.config import Config
from balenapy.errors import SystemFailure
from tests.api.connection import Client, request_bytes
from tests.api.test_hijack import HEAD_101, UPGRADE, application
from tests.trio_tests import trio_test

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem; server.pem and client.pem signed by it; stranger.pem signed by itself."""
    directory = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    for name in ("ca", "stranger"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.pem",
                "-days", "2", "-subj", f"/CN={name}")  # fmt: skip
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr",
                "-subj", f"/CN={name}")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "names", "-out", f"{name}.pem")  # fmt: skip
    return directory


@asynccontextmanager
async def served(app: App, config: Config) -> AsyncIterator[None]:
    listeners = server.open_listeners(config)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, app, listeners)
            yield
            nursery.cancel_scope.cancel()
    finally:
        server.close_listeners(listeners)


def tls_config(certificates: Path, port: int) -> Config:
    return Config(
        hosts=(f"tcp://127.0.0.1:{port}",),
        tls_verify=True,
        tls_ca_cert=certificates / "ca.pem",
        tls_cert=certificates / "server.pem",
        tls_key=certificates / "server.key",
    )


@asynccontextmanager
async def connected(certificates: Path, port: int, name: str) -> AsyncIterator[Client]:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    if name:
        context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", port, ssl_context=context, https_compatible=True)
    try:
        yield Client(stream)
    finally:
        await trio.aclose_forcefully(stream)


@needs_openssl
@trio_test
async def test_known_clients_speak_http_and_raw_streams(certificates: Path) -> None:
    port = free_port()
    async with (
        served(application(), tls_config(certificates, port)),
        connected(certificates, port, "client") as client,
    ):
        assert (await client.request("GET", "/_ping")).body == b"OK"
        await client.send(request_bytes("POST", "/attach", **UPGRADE) + b"early")
        assert await client.receive_exactly(len(HEAD_101) + 5) == HEAD_101 + b"EARLY"
        await client.send(b"x" * 200_000)
        assert await client.receive_exactly(200_000) == b"X" * 200_000


@needs_openssl
@pytest.mark.parametrize("name", ["", "stranger"])
@trio_test
async def test_unknown_clients_are_refused_and_harm_nobody(certificates: Path, name: str) -> None:
    port = free_port()
    async with served(application(), tls_config(certificates, port)):
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            async with connected(certificates, port, name) as client:
                await client.request("GET", "/_ping")
        async with connected(certificates, port, "client") as good:
            assert (await good.request("GET", "/_ping")).body == b"OK"


@needs_openssl
@trio_test
async def test_plain_http_to_a_tls_port_is_dropped(certificates: Path) -> None:
    port = free_port()
    async with served(application(), tls_config(certificates, port)):
        client = Client(await trio.open_tcp_stream("127.0.0.1", port))
        await client.send(request_bytes("GET", "/_ping"))
        assert b"OK" not in await client.receive_to_end()
        await client.stream.aclose()


@trio_test
async def test_plain_tcp() -> None:
    port = free_port()
    async with served(application(), Config(hosts=(f"tcp://127.0.0.1:{port}",))):
        client = Client(await trio.open_tcp_stream("127.0.0.1", port))
        assert (await client.request("GET", "/_ping")).body == b"OK"
        await client.stream.aclose()


@trio_test
async def test_sockets_of_the_service_manager(tmp_path: Path) -> None:
    path = tmp_path / "passed.sock"
    config = Config(hosts=("fd://",))
    with pytest.raises(SystemFailure, match="no sockets found via socket activation"):
        server.open_listeners(config)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    with pytest.raises(SystemFailure):
        server.open_listeners(replace(config, hosts=("fd://other",)), [("docker.socket", listening)])
    listeners = server.open_listeners(config, [("docker.socket", listening)])
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, application(), listeners)
        async with await trio.open_unix_socket(str(path)) as stream:
            assert (await Client(stream).request("GET", "/_ping")).body == b"OK"
        nursery.cancel_scope.cancel()
    server.close_listeners(listeners)
    assert path.exists()


@trio_test
async def test_a_listener_that_fails_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemFailure, match=r"cannot listen on tcp://127\.0\.0\.1"):
            server.open_listeners(Config(hosts=(f"unix://{path}", f"tcp://127.0.0.1:{port}")))
    assert not path.exists()
    with pytest.raises(SystemFailure, match="group no-such-group not found"):
        server.open_listeners(Config(hosts=(f"unix://{path}",), group="no-such-group"))
    assert not path.exists()
