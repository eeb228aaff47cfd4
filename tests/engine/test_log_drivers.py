"""Output of real containers in a real journal and at syslog servers of every kind."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from balenapy.errors import SystemFailure, Unsupported
from balenapy.linux import journal as journal_module
from tests.engine.process_rig import frames, open_rig
from tests.journal_process import Journal, can_run, running_journal
from tests.trio_tests import trio_test

pytestmark = pytest.mark.root


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    if not can_run():
        pytest.skip("needs systemd-journald and root")
    with running_journal() as found:
        monkeypatch.setattr(journal_module, "SOCKET", found.socket)
        monkeypatch.setattr(journal_module, "JOURNALCTL", found.journalctl)
        yield found


def journald(**options: str) -> dict[str, object]:
    return {"LogConfig": {"Type": "journald", "Config": options}}


def entries(journal: Journal, container_id: str) -> list[dict[str, object]]:
    command = [*journal.journalctl, "--output=json", "--all", f"CONTAINER_ID_FULL={container_id}"]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


@trio_test
async def test_the_journal_has_dockers_fields_and_logs_come_back_out_of_it(tmp_path: Path, journal: Journal) -> None:
    async with open_rig(tmp_path) as rig:
        script = r"echo one; echo two >&2; printf 'a\0b\377\n'; head -c 20000 /dev/zero | tr '\0' x; echo; printf last"
        container = await rig.run(
            "sh", "-c", script,
            HostConfig=journald(tag="t-{{.Name}}", labels="com.example.app,other", env="MODE"),
            Labels={"com.example.app": "web\nserver"}, Env=["MODE=fast", "HIDDEN=1"],
        )  # fmt: skip
        await rig.wait(container)
        await rig.settled(container)

        long = b"x" * 20000 + b"\n"
        whole = frames(await rig.output(container))
        assert whole == {1: b"one\na\0b\xff\n" + long + b"last", 2: b"two\n"}
        assert frames(await rig.output(container, tail=1)) == {1: b"last"}
        stamped = frames(await rig.output(container, timestamps=True, stdout=False))[2]
        assert re.fullmatch(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z two\n", stamped)
        details = frames(await rig.output(container, details=True, stdout=False))[2]
        tag = f"t-{container.name}"
        assert details == f"MODE=fast,com.example.app=web%0Aserver,tag={tag} two\n".encode()

        found = entries(journal, container.id)
        by_message = {str(one["MESSAGE"]): one for one in found}
        one, two = by_message["one"], by_message["two"]
        expected = {
            "PRIORITY": "6",
            "CONTAINER_ID": container.id[:12],
            "CONTAINER_ID_FULL": container.id,
            "CONTAINER_NAME": container.name,
            "CONTAINER_TAG": tag,
            "SYSLOG_IDENTIFIER": tag,
            "COM_EXAMPLE_APP": "web\nserver",
            "MODE": "fast",
            "CONTAINER_LOG_ORDINAL": "1",
        }
        assert {key: one.get(key) for key in expected} == expected
        assert two["PRIORITY"] == "3"
        assert "HIDDEN" not in one
        assert "OTHER" not in one
        partial = [entry.get("CONTAINER_PARTIAL_MESSAGE") for entry in found]
        assert partial.count("true") == 2  # of the long line, and the last


@trio_test
async def test_following_the_journal_ends_with_the_run(tmp_path: Path, journal: Journal) -> None:
    async with open_rig(tmp_path) as rig:
        script = "for i in 1 2 3 4 5; do echo $i; sleep 0.1; done"
        container = await rig.run("sh", "-c", script, HostConfig=journald())
        assert frames(await rig.output(container, follow=True)) == {1: b"1\n2\n3\n4\n5\n"}


@trio_test
async def test_without_a_journal_the_start_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SOCKET", tmp_path / "none")
    async with open_rig(tmp_path) as rig:
        container = await rig.create("true", HostConfig=journald())
        with pytest.raises(
            SystemFailure, match="failed to initialize logging driver: journald is not enabled on this host"
        ):
            await rig.supervisors.start(container)


class Server:
    """Collects what syslog clients send."""

    def __init__(self) -> None:
        self.received = bytearray()

    async def take(self, stream: trio.abc.ReceiveStream) -> None:
        async for data in stream:
            self.received += data

    async def take_datagrams(self, sock: trio.socket.SocketType) -> None:
        with sock:
            while True:
                self.received += await sock.recv(65536) + b"\n"


def _certificate(directory: Path) -> tuple[Path, Path]:
    key, cert = directory / "key.pem", directory / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return key, cert


@pytest.mark.parametrize("scheme", ["unix", "unixgram", "udp", "tcp", "tcp+tls"])
@trio_test
async def test_syslog_gets_rfc_5424_over_every_transport(tmp_path: Path, scheme: str) -> None:
    server = Server()
    options = {"tag": "app/{{.Name}}", "syslog-facility": "local3"}
    async with trio.open_nursery() as nursery:
        if scheme in ("unix", "unixgram"):
            kind = trio.socket.SOCK_STREAM if scheme == "unix" else trio.socket.SOCK_DGRAM
            sock = trio.socket.socket(trio.socket.AF_UNIX, kind)
            await sock.bind(str(tmp_path / "log.sock"))
            options["syslog-address"] = f"{scheme}://{tmp_path}/log.sock"
        else:
            kind = trio.socket.SOCK_DGRAM if scheme == "udp" else trio.socket.SOCK_STREAM
            sock = trio.socket.socket(trio.socket.AF_INET, kind)
            await sock.bind(("127.0.0.1", 0))
            options["syslog-address"] = f"{scheme}://127.0.0.1:{sock.getsockname()[1]}"
        if kind == trio.socket.SOCK_DGRAM:
            nursery.start_soon(server.take_datagrams, sock)
        else:
            sock.listen(5)
            listener: trio.abc.Listener[trio.abc.Stream] = trio.SocketListener(sock)
            if scheme == "tcp+tls":
                key, cert = _certificate(tmp_path)
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(cert, key)
                listener = trio.SSLListener(listener, context)
                options["syslog-tls-ca-cert"] = str(cert)
            nursery.start_soon(trio.serve_listeners, server.take, [listener])
        async with open_rig(tmp_path) as rig:
            config = {"LogConfig": {"Type": "syslog", "Config": options}}
            container = await rig.run("sh", "-c", "echo one; echo two >&2; echo three", HostConfig=config)
            await rig.wait(container)
            await rig.settled(container)
            # Two streams, and datagrams: the last to be sent need not be the last to come.
            await _until(lambda: all(word in server.received for word in (b"one", b"two", b"three")))
            with pytest.raises(Unsupported, match="configured logging driver does not support reading"):
                await rig.output(container)
        nursery.cancel_scope.cancel()

    text = bytes(server.received).decode()
    if scheme == "tcp+tls":
        messages = []
        while text:
            length, _, rest = text.partition(" ")
            messages.append(rest[: int(length)])
            text = rest[int(length) :]
    else:
        messages = text.splitlines()
    pattern = r"<(\d+)>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (\S+) (app/\S+) (\d+) (\S+) - (.*)"
    found = [re.fullmatch(pattern, message) for message in messages]
    assert all(found), messages
    assert sorted((match[1], match[7]) for match in found if match) == [
        ("155", "two"), ("158", "one"), ("158", "three"),
    ]  # fmt: skip
    assert {match[4] for match in found if match} == {f"app/{container.name}"}


@trio_test
async def test_lines_wait_for_a_syslog_server_that_went_away(tmp_path: Path) -> None:
    server = Server()
    address = ("127.0.0.1", 0)
    async with open_rig(tmp_path) as rig:
        async with trio.open_nursery() as nursery:
            sock = trio.socket.socket()
            await sock.bind(address)
            address = sock.getsockname()
            sock.listen(5)
            nursery.start_soon(trio.serve_listeners, server.take, [trio.SocketListener(sock)])
            options = {"syslog-address": f"tcp://127.0.0.1:{address[1]}"}
            script = "echo begin; sleep 1; for i in 1 2 3; do echo line-$i; sleep 0.3; done; sleep 1000"
            config = {"LogConfig": {"Type": "syslog", "Config": options}}
            container = await rig.run("sh", "-c", script, HostConfig=config)
            await _until(lambda: b"begin" in server.received)
            nursery.cancel_scope.cancel()
        neighbour = await rig.run("echo", "undisturbed")
        await rig.wait(neighbour)
        await rig.settled(neighbour)
        assert frames(await rig.output(neighbour)) == {1: b"undisturbed\n"}
        await trio.sleep(2.5)
        async with trio.open_nursery() as nursery:
            sock = trio.socket.socket()
            sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
            await sock.bind(address)
            sock.listen(5)
            nursery.start_soon(trio.serve_listeners, server.take, [trio.SocketListener(sock)])
            await _until(lambda: b"line-3" in server.received)
            nursery.cancel_scope.cancel()
        # What was on its way as the server went is the network's to lose; what waited here is not.
        assert [number in server.received for number in (b"line-2", b"line-3")] == [True, True]
        await rig.supervisors.kill(container)


async def _until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.02)


@trio_test
async def test_a_syslog_server_that_is_not_there_fails_the_start(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        options = {"syslog-address": "tcp://127.0.0.1:1"}
        container = await rig.create("true", HostConfig={"LogConfig": {"Type": "syslog", "Config": options}})
        expected = "failed to initialize logging driver: dial tcp 127.0.0.1:1: connect: connection refused"
        with pytest.raises(SystemFailure, match=f"^{expected}$"):
            await rig.supervisors.start(container)
