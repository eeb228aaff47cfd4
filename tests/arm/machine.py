"""An emulated board: qemu-system-aarch64 with UEFI, the image on its disk, the engine's socket forwarded through ssh.

The disk is an overlay over the built image, so that an image serves many boots; the power is cut by SIGKILL. QEMU's
own page cache is the disk's: what the guest flushed is kept, what it did not flush is kept as well, so a cut here is
milder than a card's. tests/powercut does the harder ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.engine_process import UnixHTTPConnection

FIRMWARE = Path("/usr/share/AAVMF/AAVMF_CODE.fd")
VARIABLES = Path("/usr/share/AAVMF/AAVMF_VARS.fd")
NEEDED = ("qemu-system-aarch64", "qemu-img", "mcopy", "ssh", "ssh-keygen")
HOST = "10.0.2.2"  # this machine, as the guest sees it
BOOT_TIMEOUT_S = 900.0  # emulated, on a busy machine


def missing_tools() -> list[str]:
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return missing + ([] if FIRMWARE.exists() else ["qemu-efi-aarch64"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Board:
    """A machine with a disk. Make it once, start and cut it often."""

    def __init__(self, image: Path, directory: Path, *, disk_gib: int = 4, memory_mib: int = 1024) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.disk = directory / "disk.img"
        self.variables = directory / "vars.fd"
        self.memory_mib = memory_mib
        self.serial = directory / "serial.log"
        self.key = directory / "key"
        self.port = free_port()
        self.socket = directory / "engine.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._tunnel: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        shutil.copyfile(VARIABLES, self.variables)
        subprocess.run(["cp", "--sparse=always", image, self.disk], check=True)
        os.truncate(self.disk, disk_gib << 30)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        self.put_on_boot_partition("authorized_keys", (directory / "key.pub").read_bytes())

    # -- its card, while it is off --

    def boot_partition_offset(self) -> int:
        table = json.loads(subprocess.run(["sfdisk", "--json", self.disk], capture_output=True, check=True).stdout)
        return int(table["partitiontable"]["partitions"][0]["start"]) * 512

    def put_on_boot_partition(self, name: str, data: bytes) -> None:
        source = self.directory / "upload"
        source.write_bytes(data)
        subprocess.run(
            ["mcopy", "-o", "-i", f"{self.disk}@@{self.boot_partition_offset()}", source, f"::{name}"], check=True
        )
        source.unlink()

    def list_boot_partition(self, name: str) -> list[str]:
        done = subprocess.run(
            ["mdir", "-b", "-i", f"{self.disk}@@{self.boot_partition_offset()}", f"::{name}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [line.rpartition("/")[2] for line in done.stdout.splitlines() if line.strip()]

    # -- power --

    def start(self) -> None:
        assert self._process is None
        self.started_at = time.monotonic()
        command = [
            "nice", "-n", "15", "qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a57", "-smp", "2",
            "-m", str(self.memory_mib), "-display", "none", "-monitor", "none", "-nodefaults",
            "-drive", f"if=pflash,format=raw,readonly=on,file={FIRMWARE}",
            "-drive", f"if=pflash,format=raw,file={self.variables}",
            "-drive", f"if=none,id=card,format=raw,file={self.disk},cache=writeback",
            "-device", "virtio-blk-pci,drive=card",
            "-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self.port}-:22", "-device", "virtio-net-pci,netdev=net",
            "-device", "virtio-rng-pci", "-device", "i6300esb", "-serial", f"file:{self.serial}",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def cut(self) -> None:
        """Pull the plug."""
        self.close_tunnel()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def is_on(self) -> bool:
        return self._process is not None and self._process.poll() is None

    # -- the guest --

    def ssh(self, command: str, *, timeout_s: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["ssh", *self._ssh_options(), "root@127.0.0.1", command],
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def _ssh_options(self) -> list[str]:
        return [
            "-q", "-F", "none", "-i", str(self.key), "-p", str(self.port), "-o", "StrictHostKeyChecking=no",
            "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30",
            "-o", "ServerAliveInterval=30", "-o", "ServerAliveCountMax=20",
        ]  # fmt: skip

    def wait_ssh(self, timeout_s: float = BOOT_TIMEOUT_S) -> float:
        """Seconds since the power came on until a shell answered."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.is_on, f"the machine ended:\n{self.console()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self.ssh("true", timeout_s=90, check=False).returncode == 0:
                    return time.monotonic() - self.started_at
            time.sleep(1)
        raise AssertionError(f"no shell within {timeout_s} s:\n{self.console()}")

    def open_tunnel(self) -> None:
        self.close_tunnel()
        self.socket.unlink(missing_ok=True)
        self._tunnel = subprocess.Popen(
            ["ssh", *self._ssh_options(), "-N", "-L", f"{self.socket}:/run/balena-engine.sock", "root@127.0.0.1"],
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not self.socket.exists():
            assert self._tunnel.poll() is None and time.monotonic() < deadline, "no tunnel"
            time.sleep(0.2)

    def close_tunnel(self) -> None:
        if self._tunnel is not None:
            self._tunnel.kill()
            self._tunnel.wait()
            self._tunnel = None

    def request(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None,
        timeout_s: float = 300.0,
    ) -> tuple[int, bytes]:  # fmt: skip
        connection = UnixHTTPConnection(str(self.socket), timeout_s)
        try:
            data = None if body is None else json.dumps(body).encode()
            fields = {"Content-Type": "application/json"} if data else {}
            connection.request(method, path, body=data, headers={**fields, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def wait_engine(self, timeout_s: float = BOOT_TIMEOUT_S) -> float:
        """Seconds since the power came on until `_ping` was answered through the tunnel."""
        deadline = time.monotonic() + timeout_s
        last: object = None
        while time.monotonic() < deadline:
            assert self.is_on, f"the machine ended:\n{self.console()}"
            try:
                if self._tunnel is None or self._tunnel.poll() is not None:
                    self.open_tunnel()
                status, _ = self.request("GET", "/_ping", timeout_s=120)
                if status == 200:
                    return time.monotonic() - self.started_at
                last = status
            except (OSError, AssertionError) as error:
                last = error
                self.close_tunnel()
            time.sleep(1)
        raise AssertionError(f"the engine does not answer: {last!r}")

    def console(self, lines: int = 40) -> str:
        text = self.serial.read_text(errors="replace") if self.serial.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


@contextlib.contextmanager
def running(board: Board) -> Iterator[Board]:
    board.start()
    try:
        yield board
    finally:
        board.cut()
