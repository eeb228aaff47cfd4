"""What somebody sees who looks at an engine: metrics, the status page in a browser, stats, df, bundles, dead rings."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine_process import EngineProcess, running_engine, wait_until

pytestmark = pytest.mark.root

CHROMIUM = shutil.which("chromium")
TALKER = "i=0; while true; do echo \"<b>line</b> $i\"; i=$((i+1)); sleep 0.2; done"


@dataclass(frozen=True)
class Watched:
    engine: EngineProcess
    port: int

    def get(self, path: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()
        finally:
            connection.close()

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "balenapy.cli.main", "-H", f"unix://{self.engine.socket}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, busybox: str) -> Iterator[Watched]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory = tmp_path_factory.mktemp("watched")
    with running_engine(directory, "--metrics-addr", f"127.0.0.1:{port}", program="balenapy") as engine:
        engine.docker("pull", "-q", busybox)
        secrets = ["-e", "DB_PASSWORD=hunter22secret", "-e", "URL=http://u:topsecretpw@x/"]
        secrets += ["--label", "api.token=lbl12345"]
        engine.docker("run", "-d", "--name", "talker", "--network", "none", *secrets, busybox, "sh", "-c", TALKER)
        engine.docker("run", "--name", "done", "--network", "none", busybox, "sh", "-c",
                      "echo password: printed-secret-1; exit 3", check=False)  # fmt: skip
        engine.docker("volume", "create", "stored")
        yield Watched(engine, port)


def test_metrics_are_prometheus_and_true(watched: Watched) -> None:
    status, headers, text = watched.get("/metrics")

    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    states = {one.labels["state"]: one.value for one in families["engine_daemon_container_states_containers"].samples}
    assert states == {"running": 1, "paused": 0, "stopped": 1}
    assert families["balenapy_images"].samples[0].value == 1
    memory = {one.labels["name"]: one.value for one in families["balenapy_container_memory_bytes"].samples}
    assert list(memory) == ["talker"]
    assert memory["talker"] > 0
    assert {one.labels["kind"] for one in families["balenapy_memory_bytes"].samples} >= {"Pss", "Rss", "PeakRss"}
    assert families["balenapy_flash_written_bytes"].samples[0].value > 0


def test_whoever_looks_can_change_nothing(watched: Watched) -> None:
    for method in ("POST", "PUT", "DELETE"):
        for path in ("/", "/metrics", "/status.json", "/containers/create", "/logs/talker"):
            assert watched.get(path, method)[0] == 404, (method, path)
    assert watched.get("/containers/json")[0] == 404
    assert watched.get("/logs/nobody")[0] == 404


def test_the_log_tail_is_text(watched: Watched) -> None:
    wait_until(lambda: "line</b> 6" in watched.get("/logs/talker")[2], 30, "seven lines")
    status, headers, text = watched.get("/logs/talker?tail=3")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert headers["x-content-type-options"] == "nosniff"
    assert len(text.splitlines()) == 3


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_the_page_shows_it_all_in_a_browser(watched: Watched, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path}/profile", "--window-size=1100,1100", "--virtual-time-budget=6000"]
    address = f"http://127.0.0.1:{watched.port}/#log=talker"
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=120)
    page = done.stdout

    for expected in (">talker</td>", ">done</td>", "code 3", "Log of talker", "&lt;b&gt;line&lt;/b&gt; 1", "free of"):
        assert expected in page, expected
    assert '<span id="problem" role="status"></span>' in page
    assert "<b>line" not in page
    subprocess.run(
        [*command, f"--screenshot={tmp_path}/page.png", address], check=True, timeout=120, capture_output=True
    )
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_stats_and_df_have_dockers_columns(watched: Watched) -> None:
    header, row = watched.cli("stats", "--no-stream").stdout.splitlines()
    assert header.split("  ")[0] == "CONTAINER ID"
    assert " talker " in row
    formatted = watched.cli("stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", "talker")
    assert formatted.stdout.split()[0] == "talker"
    assert watched.cli("stats", "--no-stream", "nobody").returncode == 1
    text = watched.cli("df", "-v").stdout
    for expected in ("Images space usage:", "busybox", "talker", "Exited (3)", "stored", "On disk:", "Layers"):
        assert expected in text, expected


def test_info_tells_memory_only_when_asked(watched: Watched) -> None:
    assert "Memory" not in watched.engine.request("GET", "/info").json
    memory = watched.engine.request("GET", "/info?memory=1").json["Memory"]
    assert 10e6 < memory["Pss"] < 120e6
    assert memory["Limits"]["Workers"] >= 1
    assert "Engine Memory (PSS): " in watched.cli("info").stdout


def test_a_bundle_has_everything_but_secrets(watched: Watched, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tgz"
    done = watched.cli("support-bundle", "-o", str(path))
    assert (done.returncode, done.stdout) == (0, f"{path}\n")
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        found = {member.name.partition("/")[2]: archive.extractfile(member).read().decode()  # type: ignore[union-attr]
                 for member in archive}  # fmt: skip

    assert {"engine/info.json", "engine/events.json", "containers/talker/inspect.json", "containers/talker/log.txt",
            "host/dmesg.txt", "host/proc-meminfo.txt", "config/daemon.json", "problems.txt"} <= set(found)  # fmt: skip
    assert json.loads(found["containers/done/inspect.json"])["State"]["ExitCode"] == 3
    assert "<b>line</b> 1" in found["containers/talker/log.txt"]
    everything = "".join(found.values())
    for secret in ("hunter22secret", "topsecretpw", "lbl12345", "printed-secret-1"):
        assert secret not in everything, secret
    assert watched.cli("support-bundle", "-o", str(path)).stderr.startswith(f"cannot write {path}: File exists")


def test_a_ring_is_read_without_an_engine(watched: Watched, tmp_path: Path) -> None:
    container = watched.engine.inspect("done")["Id"]
    ring = watched.engine.data_root / "containers" / container / "ring.log"
    copy = tmp_path / "ring.log"
    shutil.copy(ring, copy)

    def read(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "balenapy.cli.main", "logs", "--file", str(copy), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})

    assert read().stdout == "password: printed-secret-1\n"
    assert read("--tail", "0").stdout == ""
    assert read("--since", f"{time.time() + 60:.0f}").stdout == ""
    assert read("-t").stdout.endswith("Z password: printed-secret-1\n")
    data = bytearray(copy.read_bytes())
    data[data.find(b"printed")] ^= 1
    copy.write_bytes(bytes(data))
    assert "damaged record" in read().stderr
    copy.write_bytes(b"x" * 5000)
    assert (read().returncode, read().stderr) == (1, f"{copy}: not a ring log\n")
    assert read("-f").returncode == 1
