"""Debian's docker-registry on loopback with what `tests/registry_process.py` leaves out: basic auth and TLS."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.registry_process import REGISTRY, free_port

USERNAME, PASSWORD = "user", "secret"
# crypt(3) of PASSWORD with bcrypt, the only kind the registry reads
HTPASSWD = f"{USERNAME}:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate for 127.0.0.1 and localhost: it is its own authority."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class RealRegistry:
    host: str  # "127.0.0.1:port"
    port: int
    storage: Path
    credentials: tuple[str, str] | None
    log: Path


def make_certificate(directory: Path) -> Certificate:
    """Make a certificate with openssl."""
    directory.mkdir(parents=True, exist_ok=True)
    certificate, key = directory / "registry.crt", directory / "registry.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=127.0.0.1"
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run([*command.split(), *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return Certificate(certificate, key)


@contextlib.contextmanager
def real_registry(
    directory: Path, *, basic_auth: bool = False, tls: Certificate | None = None
) -> Iterator[RealRegistry]:
    """Run a registry until the block ends; everything it writes is under `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    lines = [
        "version: 0.1",
        "log: {level: warn}",
        "storage:",
        f"  filesystem: {{rootdirectory: {directory / 'storage'}}}",
        "  delete: {enabled: true}",
        "http:",
        f'  addr: "127.0.0.1:{port}"',
    ]
    if tls:
        lines.append(f"  tls: {{certificate: {tls.certificate}, key: {tls.key}}}")
    if basic_auth:
        (directory / "htpasswd").write_text(HTPASSWD)
        lines.append(f"auth: {{htpasswd: {{realm: test, path: {directory / 'htpasswd'}}}}}")
    (directory / "config.yml").write_text("\n".join(lines) + "\n")
    log = directory / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [REGISTRY or shutil.which("docker-registry") or "docker-registry", "serve", directory / "config.yml"],
            stdout=output,
            stderr=output,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 20
            while not _listens(port):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            credentials = (USERNAME, PASSWORD) if basic_auth else None
            yield RealRegistry(f"127.0.0.1:{port}", port, directory / "storage", credentials, log)
        finally:
            process.kill()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False
