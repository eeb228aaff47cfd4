"""Debian's docker-registry on a loopback port, with its storage in a directory of the test."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

REGISTRY = shutil.which("docker-registry")

CONFIG = """\
version: 0.1
log: {{level: warn}}
storage:
  filesystem: {{rootdirectory: {storage}}}
  delete: {{enabled: true}}
http: {{addr: "127.0.0.1:{port}"}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_registry(directory: Path) -> Iterator[str]:
    """A registry that wants no credentials; its `host:port`."""
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = directory / "config.yml"
    config.write_text(CONFIG.format(storage=directory / "storage", port=port))
    with (
        (directory / "log").open("wb") as log,
        subprocess.Popen([REGISTRY or "docker-registry", "serve", config], stdout=log, stderr=log) as process,
    ):
        try:
            deadline = time.monotonic() + 20
            while not _answers(port):
                assert process.poll() is None and time.monotonic() < deadline, (directory / "log").read_text()
                time.sleep(0.02)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
