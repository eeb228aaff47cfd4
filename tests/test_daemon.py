"""The daemon as a process: sockets, signals, TLS, the service manager, a second engine, a damaged start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_process import EngineProcess, running_engine, wait_until
from tests.registry_process import free_port

pytestmark = pytest.mark.root


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    with running_engine(tmp_path) as running:
        yield running


def ping_over(connection: socket.socket) -> bytes:
    connection.settimeout(10)
    connection.sendall(b"GET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def test_socket_has_mode_0660_and_goes_with_the_daemon(engine: EngineProcess) -> None:
    mode = engine.socket.stat().st_mode

    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660
    assert engine.stop() == 0
    assert not engine.socket.exists()
    assert not (engine.run / "pid").exists()


def test_second_engine_on_the_same_data_root_is_refused_by_name(engine: EngineProcess) -> None:
    done = subprocess.run(engine.command, capture_output=True, text=True, timeout=20, check=False)

    assert done.returncode == 1
    assert f"{engine.data_root} is in use by another engine" in done.stderr
    assert engine.request("GET", "/_ping").status == 200


def test_wrong_flag_says_so_and_exits_125(engine: EngineProcess) -> None:
    done = subprocess.run([*engine.command, "--nope"], capture_output=True, text=True, timeout=20, check=False)

    assert (done.returncode, done.stdout) == (125, "")
    assert "unknown flag: --nope" in done.stderr


def test_stale_socket_and_pidfile_of_a_killed_daemon_do_no_harm(engine: EngineProcess) -> None:
    engine.kill()
    assert engine.socket.exists()

    engine.start()

    assert engine.request("GET", "/_ping").body == b"OK"


def test_sighup_reloads_the_file_and_says_so_in_an_event(tmp_path: Path) -> None:
    file = tmp_path / "daemon.json"
    file.write_text('{"max-concurrent-downloads": 2}')
    with running_engine(tmp_path, "--config-file", str(file)) as engine:
        before = time.time()
        file.write_text('{"max-concurrent-downloads": 7, "labels": ["a=b"]}')
        os.kill(engine.pid, signal.SIGHUP)
        wait_until(lambda: "reloaded" in engine.log_text(), what="reload in the log")
        answer = engine.request("GET", f"/events?since={before:.3f}&until={time.time() + 0.5:.3f}")
        assert [line["Action"] for line in answer.lines] == ["reload"]
        assert engine.request("GET", "/info").json["Labels"] == ["a=b"]

        file.write_text('{"nope": 1}')
        os.kill(engine.pid, signal.SIGHUP)
        wait_until(lambda: "reload refused" in engine.log_text(), what="refusal in the log")
        assert engine.request("GET", "/_ping").status == 200


def test_sigusr1_writes_the_task_tree(engine: EngineProcess) -> None:
    os.kill(engine.pid, signal.SIGUSR1)

    wait_until(lambda: "Trash.serve" in engine.log_text(), what="tasks in the log")


def test_two_sockets_serve_the_same_engine(tmp_path: Path) -> None:
    second = tmp_path / "second.sock"
    with running_engine(tmp_path, "-H", f"unix://{second}") as engine:
        engine.request("POST", "/volumes/create", {"Name": "seen-by-both"})
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(second))
            assert ping_over(connection).endswith(b"OK")
            assert engine.request("GET", "/volumes/seen-by-both").status == 200


def test_tcp_on_loopback_answers(tmp_path: Path) -> None:
    port = free_port()
    host = f"tcp://127.0.0.1:{port}"
    with running_engine(tmp_path, "-H", host), socket.create_connection(("127.0.0.1", port)) as connection:
        assert ping_over(connection).endswith(b"OK")


def make_certificates(directory: Path) -> None:
    """A CA, a server certificate for 127.0.0.1 and a client certificate, by openssl."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=directory)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test-ca", "-days", "30")
    for name, usage in (("server", "serverAuth"), ("client", "clientAuth")):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (directory / "ext").write_text(f"subjectAltName=IP:127.0.0.1\nextendedKeyUsage={usage}\n")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", f"{name}.pem", "-days", "30", "-extfile", "ext",
        )  # fmt: skip


def test_mutual_tls_lets_in_only_who_has_a_certificate(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    port = free_port()
    flags = [
        "-H", f"tcp://0.0.0.0:{port}", "--tlsverify", "--tlscacert", str(tmp_path / "ca.pem"),
        "--tlscert", str(tmp_path / "server.pem"), "--tlskey", str(tmp_path / "server.key"),
    ]  # fmt: skip
    with running_engine(tmp_path, *flags):
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        with (
            pytest.raises((ssl.SSLError, ConnectionError)),
            socket.create_connection(("127.0.0.1", port)) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as anonymous,
        ):
            if not ping_over(anonymous):
                raise ConnectionError("closed without an answer")
        context.load_cert_chain(str(tmp_path / "client.pem"), str(tmp_path / "client.key"))
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as known,
        ):
            assert ping_over(known).endswith(b"OK")


def test_service_manager_hands_the_socket_and_hears_of_every_stage(tmp_path: Path) -> None:
    notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notifications.bind(str(tmp_path / "notify"))
    notifications.settimeout(20)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "passed.sock"))
    listener.listen()
    engine = EngineProcess(tmp_path)
    # What systemd does between fork and exec: the socket becomes descriptor 3, LISTEN_PID our pid.
    wrapper = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True); "
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='engine.socket'); "
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    command = [one for one in engine.command if one != f"unix://{engine.socket}"]
    command[command.index("-H") + 1 : command.index("-H") + 1] = ["fd://"]
    environment = {**engine.environment, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
    try:
        with (
            engine.log_path.open("wb") as log,
            subprocess.Popen(
                [sys.executable, "-c", wrapper, str(listener.fileno()), *command],
                pass_fds=[listener.fileno()],
                stdout=log,
                stderr=log,
                env=environment,
            ) as process,
        ):
            try:
                heard = [notifications.recv(100)]
                while b"READY=1" not in heard or heard.count(b"WATCHDOG=1") < 2:
                    heard.append(notifications.recv(100))
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(tmp_path / "passed.sock"))
                    assert ping_over(connection).endswith(b"OK")
                process.terminate()
                while heard[-1] != b"STOPPING=1":
                    heard.append(notifications.recv(100))
                assert process.wait(20) == 0
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        # The socket belongs to the service manager: clients can go on connecting.
        assert (tmp_path / "passed.sock").exists()
    finally:
        engine.clean_up()
        notifications.close()
        listener.close()


def test_stop_is_not_held_up_by_a_client_that_never_reads(engine: EngineProcess) -> None:
    with engine.raw_connection() as follower, engine.raw_connection() as idle:
        follower.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert follower.recv(100).startswith(b"HTTP/1.1 200")
        idle.sendall(b"POST /build HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        started = time.monotonic()

        assert engine.stop() == 0
        assert time.monotonic() - started < 5


def test_damaged_database_is_put_aside_and_the_engine_serves(engine: EngineProcess) -> None:
    engine.stop()
    database = engine.data_root / "meta.db"
    data = bytearray(database.read_bytes())
    data[:64] = b"\xff" * 64
    database.write_bytes(bytes(data))
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{database}{suffix}")

    engine.start()

    assert engine.request("GET", "/_ping").status == 200
    assert list(engine.data_root.glob("meta.db.broken-*"))
    assert json.loads(engine.request("GET", "/images/json").body) == []
