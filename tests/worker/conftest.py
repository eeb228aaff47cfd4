"""Running real workers on real directories."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from balenapy.engine.workers import python_command
from balenapy.linux import durable


class Worker:
    """Runs verbs as the engine does, on one snapshot directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.snapshot = directory / "snapshot"
        self.snapshot.mkdir()

    @property
    def diff(self) -> Path:
        return self.snapshot / "diff"

    def run(self, verb: str, stdin: bytes = b"", **arguments: object) -> dict[str, Any]:
        """The report, which may be an error."""
        output = arguments.get("output")
        done = subprocess.run(
            [*python_command(), verb, json.dumps(arguments)],
            input=stdin,
            capture_output=True,
            timeout=60,
            check=False,
            pass_fds=(output,) if isinstance(output, int) else (),
        )
        assert done.stderr == b"", done.stderr.decode()
        report: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == ("error" in report)
        return report

    def unpack(self, tar: bytes, blob: bytes | None = None) -> dict[str, Any]:
        """Unpack (`blob` is what `tar` was compressed to), and hold what every success promises."""
        blob = tar if blob is None else blob
        report = self.run("unpack", blob, directory=str(self.snapshot))
        assert "error" not in report, report
        assert report["digest"] == sha256(blob)
        assert report["size"] == len(blob)
        assert report["diff_id"] == sha256(tar)
        assert self.pack() == tar
        assert self.damage(report["diff_id"]) == []
        return report

    def damage(self, diff_id: str, *, deep: bool = True) -> list[list[str]]:
        """What `verify` finds."""
        layer = {"directory": str(self.snapshot), "diff_id": diff_id, "chain_id": diff_id}
        (found,) = self.run("verify", layers=[layer], deep=deep)["layers"]
        self.report = found
        bad: list[list[str]] = found["bad"]
        return bad

    def refuse(self, blob: bytes) -> str:
        """Unpack something that must fail; the message."""
        report = self.run("unpack", blob, directory=str(self.snapshot))
        assert "error" in report, report
        return str(report["error"]["message"])

    def pack(self, **arguments: object) -> bytes:
        """What `pack` puts out."""
        path = self.directory / "packed.tar"
        with open(path, "wb") as file:
            report = self.run("pack", directory=str(self.snapshot), output=file.fileno(), **arguments)
        assert "error" not in report, report
        data = path.read_bytes()
        assert (report["digest"], report["size"]) == (sha256(data), len(data))
        self.report = report
        return data


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    worker = Worker(tmp_path)
    yield worker
    durable.remove_tree(worker.snapshot)  # some trees are too deep for pytest
