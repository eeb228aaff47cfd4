"""The engine as a process on a private socket, data root, bridge and cgroup, for end-to-end tests.

    with running_engine(tmp_path) as engine:
        engine.docker("run", "-d", image, "sleep", "1000")
        engine.kill()       # as a crash does
        engine.start()

Whatever happens in the block, afterwards nothing of the engine is left: containers, mounts, namespaces, links,
cgroups, processes.

`ENGINE_UNDER_TEST=dockerd` starts Debian's dockerd in the same place, with its own containerd and without its
firewall rules: the tests are first of all true of the engine we replace. `engine.is_reference` is then true.
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import docker

from tests.leftovers import CGROUP_ROOT, claim, leftovers, mounts_under
from tests.terminal import Terminal

__all__ = ["DOCKER", "EngineProcess", "Response", "leftovers", "running_engine", "wait_until"]

DOCKER = shutil.which("docker")
# Our own serves where there is none; it has the everyday verbs and docker's options for them.
CLI = [DOCKER] if DOCKER else [sys.executable, "-m", "balenapy.cli.main"]
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 40.0


@dataclass(frozen=True, slots=True)
class Response:
    """An answer of the API, whole."""

    status: int
    reason: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The text of an error answer."""
        return str(self.json["message"])

    @property
    def lines(self) -> list[Any]:
        """The objects of a JSON stream."""
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]


class UnixHTTPConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("engine", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class EngineProcess:
    """One engine. It may be stopped, killed and started again on the same data root."""

    def __init__(self, root: Path, *flags: str, program: str | None = None) -> None:
        self.program = program or os.environ.get("ENGINE_UNDER_TEST", "balenapy")
        self.is_reference = self.program == "dockerd"
        self.root = root
        self.data_root = root / "data"
        # Sockets below the exec root must fit into 107 bytes, and a test's directory is often long.
        # Run time state is in memory on a device; the benchmarks have it so here.
        self.run = Path(tempfile.mkdtemp(prefix="bpt", dir=os.environ.get("ENGINE_RUN_DIRECTORY")))
        self.exec_root = self.run / "exec"
        self.socket = self.run / "engine.sock"
        self.log_path = root / "engine.log"
        self.flags = flags
        self._slot = _reserve_slot()
        self.number: int = self._slot.number
        self.bridge = f"bptest{self.number}"
        self.gateway = f"10.213.{self.number}.1"
        self.subnet = f"10.213.{self.number}.0/24"
        self.cgroup_parent = f"/bptest{self.number}"
        self.config_directory = root / "docker-config"
        self.config_directory.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[docker.DockerClient] = []
        for mark in (str(self.root), str(self.run), self.bridge):
            claim(mark)

    # -- life --

    @property
    def command(self) -> list[str]:
        if self.program == "podman":
            return [*self.cli, "system", "service", "--time", "0", f"unix://{self.socket}"]
        places = ["-H", f"unix://{self.socket}", "--data-root", str(self.data_root)]
        places += ["--exec-root", str(self.exec_root), "--pidfile", str(self.run / "pid")]
        places += ["--cgroup-parent", self.cgroup_parent]
        network = ["--bridge", self.bridge]
        if self.is_reference:
            # Its rules would land in the host's tables; the userland proxy serves published ports without them.
            network += ["--iptables=false", "--ip6tables=false"]
            return ["dockerd", *places, *network, *self.flags]
        network += ["--bip", f"{self.gateway}/24"]
        return [sys.executable, "-m", "balenapy", *places, *network, "--log-level", "debug", *self.flags]

    @property
    def cli(self) -> list[str]:
        """docker, or podman for its own benchmarks: it refuses docker attaching before a start."""
        if self.program != "podman":
            return CLI
        places = ["--root", str(self.data_root), "--runroot", str(self.exec_root), "--tmpdir", str(self.run / "tmp")]
        choices = ["--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", "runc"]
        return ["podman", *places, *choices]

    def _podman_configuration(self) -> dict[str, str]:
        """Registries on loopback may be plain; its default limits are above what this process may give."""
        registries, containers = (self.config_directory / f"{name}.conf" for name in ("registries", "containers"))
        found = {"CONTAINERS_REGISTRIES_CONF": str(registries), "CONTAINERS_CONF": str(containers)}
        if containers.exists():  # somebody may be reading it
            return found
        registries.write_text('[[registry]]\nprefix = "127.0.0.1"\nlocation = "127.0.0.1"\ninsecure = true\n')
        containers.write_text('[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n')
        (self.config_directory / "config.json").write_text("{}")
        return found

    @property
    def environment(self) -> dict[str, str]:
        """What the engine and its clients see of ours: no proxies, no other engine, no user configuration."""
        return {
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "HOME": str(self.config_directory),
            "DOCKER_CONFIG": str(self.config_directory),
            "DOCKER_HOST": f"unix://{self.socket}",
            **(self._podman_configuration() if self.program == "podman" else {}),
        }

    @property
    def pid(self) -> int:
        assert self._process is not None, "the engine is not running"
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, wait: bool = True) -> None:
        assert not self.is_alive
        if self.is_reference and not os.path.exists(f"/sys/class/net/{self.bridge}"):
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("address", "add", f"{self.gateway}/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
        environment = self.environment
        del environment["DOCKER_HOST"]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if not self.is_alive:
                raise AssertionError(f"the engine ended at once:\n{self.log_tail()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", "/_ping", timeout_s=2).status == 200:
                    # Pings are answered while containers are still restored; this is not.
                    self.request("GET", "/v1.39/containers/json?limit=1", timeout_s=START_TIMEOUT_S)
                    return
            time.sleep(0.02)
        raise AssertionError(f"no answer to _ping within {START_TIMEOUT_S} s:\n{self.log_tail()}")

    def stop(self) -> int:
        """SIGTERM, and the exit status; containers end too, unless the engine keeps them (live restore)."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: nothing of the engine has a chance to say goodbye. Containers go on."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def _end(self, number: int) -> int:
        assert self._process is not None
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            return process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"no end after signal {number}:\n{self.log_tail()}") from None
        finally:
            if self.is_reference:
                self._wait_for_containerd()

    def _wait_for_containerd(self) -> None:
        # It dies with dockerd; found half dead by the next dockerd, it would be waited for in vain.
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid = int((self.exec_root / "containerd" / "containerd.pid").read_text())
            wait_until(lambda: not os.path.exists(f"/proc/{pid}"), what="containerd ends")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # -- clients --

    def docker(
        self,
        *arguments: str,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run the CLI against this engine. `check=False` for a command that is to fail."""
        done = subprocess.run(
            [*self.cli, *arguments],
            input=input.encode() if isinstance(input, str) else input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            env={**self.environment, **(env or {})},
            timeout=timeout_s,
            check=False,
        )
        text = subprocess.CompletedProcess(
            done.args,
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )
        if check and text.returncode != 0:
            raise AssertionError(
                f"docker {' '.join(arguments)}: exit status {text.returncode}\n{text.stdout}{text.stderr}"
            )
        return text

    @contextlib.contextmanager
    def docker_process(
        self, *arguments: str, env: Mapping[str, str] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """The CLI in the background with pipes at stdin, stdout and stderr; killed at the end of the block."""
        with subprocess.Popen(
            [*self.cli, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self.environment, **(env or {})},
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def docker_terminal(
        self, *arguments: str, env: Mapping[str, str] | None = None, rows: int = 24, columns: int = 80
    ) -> Terminal:
        """The CLI on a pseudo terminal."""
        return Terminal(
            [*self.cli, *arguments],
            env={**self.environment, "TERM": "xterm", **(env or {})},
            rows=rows,
            columns=columns,
        )

    def client(self, version: str = "1.39") -> docker.DockerClient:
        """docker-py; closed by `close_clients`, at the latest with the engine."""
        client = docker.DockerClient(base_url=f"unix://{self.socket}", version=version, timeout=60)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        """Close what docker-py keeps open, its forgotten streams as well."""
        while self._clients:
            self._clients.pop().close()
        gc.collect()

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
    ) -> Response:
        """One API call on a connection of its own. A dict or list is sent as JSON, bytes as they are."""
        fields = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            fields.setdefault("Content-Type", "application/json")
        connection = UnixHTTPConnection(str(self.socket), timeout_s)
        try:
            connection.request(method, path, body=body, headers=fields)
            answer = connection.getresponse()
            return Response(
                answer.status,
                answer.reason,
                {name.lower(): value for name, value in answer.getheaders()},
                answer.read(),
            )
        finally:
            connection.close()

    def raw_connection(self, timeout_s: float = 30.0) -> socket.socket:
        """A bare connection, for what no client library sends."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        connection.connect(str(self.socket))
        return connection

    def inspect(self, container: str) -> Any:
        answer = self.request("GET", f"/v1.39/containers/{container}/json")
        assert answer.status == 200, answer.body
        return answer.json

    def remove_containers(self) -> None:
        """Remove every container of the engine, running or not."""
        for container in self.request("GET", "/v1.39/containers/json?all=1").json:
            self.request("DELETE", f"/v1.39/containers/{container['Id']}?force=1&v=1")

    # -- the end --

    def clean_up(self) -> None:
        """Take away all that is left, by force where it must be."""
        self.close_clients()
        try:
            if self.is_alive:
                with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                    self.remove_containers()
                with contextlib.suppress(AssertionError):
                    self.stop()
        finally:
            self._sweep()
            self._slot.release()

    def _sweep(self) -> None:
        if self.is_alive:
            self.kill()
        # What still runs of ours carries our directory in its command line or sits in our cgroup.
        for _ in range(3):
            victims = _pids_naming(str(self.run)) | _pids_naming(str(self.data_root))
            victims |= _pids_in_cgroup(self.cgroup_parent)
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not victims:
                break
            time.sleep(0.1)
        for directory in (self.run, self.data_root):
            for point in mounts_under(directory):
                subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True)
        for bridge in (self.bridge, *_bridges_of_networks(self.data_root / "meta.db")):
            directory = Path("/sys/class/net") / bridge
            if directory.exists():
                for port in (directory / "brif").iterdir():
                    subprocess.run(["ip", "link", "delete", port.name], check=False, capture_output=True)
                _ip("link", "delete", bridge)
            _remove_nft_tables(bridge)
        for hierarchy in [CGROUP_ROOT, *CGROUP_ROOT.iterdir()]:
            top = hierarchy / self.cgroup_parent.lstrip("/")
            for directory, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(self.data_root, ignore_errors=True)


@contextlib.contextmanager
def running_engine(directory: Path, *flags: str, program: str | None = None) -> Iterator[EngineProcess]:
    """An engine that answers, with its data below `directory`; gone without a trace after the block."""
    engine = EngineProcess(directory, *flags, program=program)
    try:
        engine.start()
        yield engine
    finally:
        engine.clean_up()


def wait_until(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "condition") -> Any:
    """Poll until `condition()` is true, and give its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)
    return value


class _Slot:
    """A number that no other engine under test on this machine has: the kernel keeps the reservation for us."""

    def __init__(self, number: int, reservation: socket.socket) -> None:
        self.number = number
        self._reservation = reservation

    def release(self) -> None:
        self._reservation.close()


def _reserve_slot() -> _Slot:
    # Processes that share a run of the suite share no numbers: each would see what another has under one it had.
    first = 100 + 37 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4)
    for number in range(first, first + 37):
        reservation = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            reservation.bind(f"\0balenapy-test-engine-{number}")
        except OSError:
            reservation.close()
            continue
        # In another network namespace the reservation is not seen; its cgroups are.
        taken = [Path(f"/sys/class/net/bptest{number}"), *CGROUP_ROOT.glob(f"bptest{number}")]
        if any(place.exists() for place in (*taken, *CGROUP_ROOT.glob(f"*/bptest{number}"))):
            reservation.close()
            continue
        return _Slot(number, reservation)
    raise AssertionError("no number left for another engine under test")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _pids_naming(text: str) -> set[int]:
    pids = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if text.encode() in (entry / "cmdline").read_bytes():
                pids.add(int(entry.name))
    return pids


def _pids_in_cgroup(parent: str) -> set[int]:
    pids = set()
    for hierarchy in [CGROUP_ROOT, *CGROUP_ROOT.iterdir()]:
        for directory, _, _ in os.walk(hierarchy / parent.lstrip("/")):
            with contextlib.suppress(OSError):
                pids |= {int(pid) for pid in (Path(directory) / "cgroup.procs").read_text().split()}
    return pids


def _bridges_of_networks(database: Path) -> list[str]:
    """Bridges of the networks that users made, and that an engine which was killed has left."""
    uri = f"file:{database}?mode=rw"
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        return [f"br-{network_id[:12]}" for (network_id,) in db.execute("SELECT id FROM network")]
    return []


def _remove_nft_tables(bridge: str) -> None:
    """Tables that speak of our bridge; a table of another engine does not."""
    done = subprocess.run(["nft", "-j", "list", "ruleset"], capture_output=True, text=True, check=False)
    if done.returncode != 0 or bridge not in done.stdout:
        return
    tables = set()
    for item in json.loads(done.stdout)["nftables"]:
        for kind, value in item.items():
            if kind != "metainfo" and f'"{bridge}"' in json.dumps(value):
                tables.add((value["family"], value.get("table", value.get("name"))))
    for family, name in tables:
        subprocess.run(["nft", "delete", "table", family, name], check=False, capture_output=True)


def read_line(stream: IO[bytes], timeout_s: float = 10.0) -> str:
    """One line of a pipe, or an error when it does not come in time."""
    import select

    data = b""
    deadline = time.monotonic() + timeout_s
    while not data.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"no whole line within {timeout_s} s, only {data!r}")
        byte = os.read(stream.fileno(), 1)
        if not byte:
            break
        data += byte
    return data.decode(errors="replace")
