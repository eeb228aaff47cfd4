"""kill -9 of the engine harms no container: what runs goes on, what ends meanwhile is known afterwards."""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat.cli import Cli
from tests.engine_process import EngineProcess, leftovers, read_line, running_engine, wait_until
from tests.leftovers import CGROUP_ROOT, Leftovers, mounts_under, wait_for_no_leftovers
from tests.terminal import Terminal

pytestmark = pytest.mark.root

COUNT = "n=0; while [ $n -lt {limit} ]; do n=$((n+1)); echo line $n; {pause}; done"
SLOWLY = "[ $((n % 5)) = 0 ] && sleep 0.02"


@pytest.fixture(scope="module")
def restored(
    nothing_left_behind: Leftovers, tmp_path_factory: pytest.TempPathFactory, docker_cli: str, busybox: str
) -> Iterator[EngineProcess]:
    """An engine of its own for all the crashes of this module."""
    directory = tmp_path_factory.mktemp("restored")
    reference = os.environ.get("ENGINE_UNDER_TEST") == "dockerd"
    with running_engine(directory, *(["--live-restore"] if reference else [])) as engine:
        engine.docker("run", "--rm", busybox, "true")  # pulls, and makes what stays: the parent cgroup
        yield engine


@pytest.fixture
def cli(restored: EngineProcess) -> Iterator[Cli]:
    yield Cli(restored, {})
    if not restored.is_alive:
        restored.start()
    restored.remove_containers()


def crash(cli: Cli, *, down_s: float = 0.0) -> None:
    """Kill the engine, leave it dead for a while, start it again."""
    cli.engine.kill()
    time.sleep(down_s)
    cli.engine.start()


def process_of(cli: Cli, name: str) -> int:
    return int(cli.state(name, "Pid"))


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}") and b"\nState:\tZ" not in Path(f"/proc/{pid}/status").read_bytes()


def numbers(text: str) -> list[int]:
    return [int(line.removeprefix("line ")) for line in text.splitlines() if line.startswith("line ")]


def test_a_running_container_is_the_same_afterwards(cli: Cli, busybox: str) -> None:
    cli.start("--name", "same", "--label", "a=b", "-m", "64m", "-v", "/data", busybox, "sleep", "1000")
    before = cli.engine.inspect("same")

    crash(cli)
    after = cli.engine.inspect("same")

    assert after["State"]["Pid"] == before["State"]["Pid"]
    assert after["State"]["Status"] == "running"
    assert after["State"]["StartedAt"] == before["State"]["StartedAt"]
    assert after["NetworkSettings"]["IPAddress"] == before["NetworkSettings"]["IPAddress"]
    assert after["Mounts"] == before["Mounts"]
    assert after["Config"] == before["Config"]
    assert after["RestartCount"] == 0
    assert re.fullmatch(r"Up .*second.*", cli.out("ps", "--format", "{{.Status}}"))
    assert cli.out("exec", "same", "sh", "-c", "echo inside; exit 0") == "inside"
    assert cli.fails("exec", "same", "sh", "-c", "exit 9", status=9) == ""
    assert cli.lines("top", "same")[1].endswith("sleep 1000")
    assert '"PIDs":"1"' in cli.out("stats", "--no-stream", "--format", "json", "same")
    assert "volume is in use" in cli.fails("volume", "rm", before["Mounts"][0]["Name"])
    cli("update", "--memory", "32m", "--memory-swap", "64m", "same")
    cli("pause", "same")
    cli("unpause", "same")
    cli("restart", "-t", "0", "same")
    assert cli.state("same") == "running"
    cli("stop", "-t", "0", "same")
    assert cli.state("same", "ExitCode") == "137"
    assert not alive(before["State"]["Pid"])


def test_no_line_of_the_log_is_lost(cli: Cli, busybox: str) -> None:
    cli.start("--name", "counter", busybox, "sh", "-c", COUNT.format(limit=600, pause=SLOWLY))
    with cli.process("logs", "-f", "counter") as process:
        assert read_line(process.stdout) == "line 1\n"
        crash(cli, down_s=0.4)
        process.wait(10)  # the connection is gone with the engine

    middle = numbers(cli.out("logs", "counter"))
    followed = numbers(cli.out("logs", "-f", "counter", timeout_s=30))
    status = cli.out("wait", "counter")

    assert middle == list(range(1, len(middle) + 1))
    assert followed == list(range(1, 601))
    assert status == "0"
    assert numbers(cli.out("logs", "counter")) == followed
    stamps = [line.split()[0] for line in cli.lines("logs", "-t", "counter")]
    assert stamps == sorted(stamps)


def test_what_ends_meanwhile_keeps_its_status_and_its_last_words(cli: Cli, busybox: str) -> None:
    words = "sleep 0.3; echo last words; exit {}"
    cli.start("--name", "three", busybox, "sh", "-c", words.format(3))
    cli.start("--name", "zero", busybox, "sh", "-c", words.format(0))
    killed = cli.start("--name", "killed", busybox, "sleep", "1000")
    cli.start("--rm", "--name", "gone", busybox, "sh", "-c", "sleep 0.3")
    pid = process_of(cli, "killed")

    cli.engine.kill()
    os.kill(pid, 9)
    time.sleep(0.8)
    cli.engine.start()

    assert wait_until(lambda: [cli.state(name) for name in ("three", "zero", "killed")] == ["exited"] * 3)
    assert [cli.state(name, "ExitCode") for name in ("three", "zero", "killed")] == ["3", "0", "137"]
    assert cli.lines("wait", "three", "zero", "killed") == ["3", "0", "137"]
    assert cli.out("logs", "three") == "last words"
    assert "0001-01-01" not in cli.state("three", "FinishedAt")
    wait_until(lambda: "gone" not in cli.lines("ps", "-a", "--format", "{{.Names}}"), what="auto remove")
    assert not [point for point in mounts_under(cli.engine.exec_root) if killed in str(point)]
    cli("start", "three")
    assert cli.out("wait", "three") == "3"
    assert cli.out("logs", "three") == "last words\nlast words"


def test_restart_policies_after_a_crash(cli: Cli, busybox: str) -> None:
    short = ["sh", "-c", "[ -e /ran ] && exec sleep 1000; touch /ran; sleep 0.3; exit 1"]
    cli.start("--name", "no", busybox, *short)
    cli.start("--name", "always", "--restart", "always", busybox, *short)
    cli.start("--name", "failure", "--restart", "on-failure:5", busybox, *short)
    cli.start("--name", "unless", "--restart", "unless-stopped", busybox, *short)
    for name, policy in (("stopped-always", "always"), ("stopped-unless", "unless-stopped")):
        cli.start("--name", name, "--restart", policy, busybox, "sleep", "1000")
    cli("stop", "-t", "0", "stopped-always", "stopped-unless")
    cli("create", "--name", "never-started", "--restart", "always", busybox, "sleep", "1000")

    crash(cli, down_s=0.8)

    for name in ("always", "failure", "unless", "stopped-always"):
        wait_until(lambda name=name: cli.state(name) == "running", what=f"{name} runs")
    assert cli.state("no") == "exited"
    assert cli.state("stopped-unless") == "exited"
    assert cli.state("never-started") == "created"


def test_policies_go_on_working_for_adopted_containers(cli: Cli, busybox: str) -> None:
    cli.start("--name", "again", "--restart", "on-failure:2", busybox, "sh", "-c", "sleep 1; exit 4")

    crash(cli)

    wait_until(lambda: cli.state("again") == "exited" and cli.engine.inspect("again")["RestartCount"] == 2)
    assert cli.state("again", "ExitCode") == "4"


def test_a_terminal_can_be_attached_again(cli: Cli, busybox: str) -> None:
    cli("create", "-it", "--name", "shell", busybox, "sh")
    cli("start", "shell")
    with cli.terminal("attach", "shell") as terminal:
        terminal.send("mark=kept; echo is se''t\n")
        terminal.expect("^is set\r\n")  # by the shell, not by the echo of what was typed
        crash(cli)
        terminal.wait()
    with cli.terminal("attach", "shell", rows=30, columns=100) as terminal:
        terminal.send("echo is $mark\n")
        terminal.expect("^is kept\r\n")
        # An attach asks for two sizes, one row and column larger first.
        wait_until(lambda: size_told(terminal) == "30 100", what="the size of the new terminal")
        terminal.send("exit 6\n")
        status = terminal.wait()

    assert status == 6
    assert cli.state("shell", "ExitCode") == "6"


def size_told(terminal: Terminal) -> str:
    terminal.send("stty size\n")
    return terminal.expect(r"^(\d+ \d+)\r\n").group(1)


def test_open_stdin_survives(cli: Cli, busybox: str) -> None:
    cli("create", "-i", "--name", "reader", busybox, "sh", "-c", "while read line; do echo got $line; done; exit 8")
    cli("start", "reader")

    crash(cli)
    with cli.process("attach", "reader") as process:
        process.stdin.write(b"one\n")
        process.stdin.flush()
        first = read_line(process.stdout)

    assert first == "got one\n"


def test_a_paused_container_stays_paused(cli: Cli, busybox: str) -> None:
    cli.start("--name", "frozen", busybox, "sleep", "1000")
    cli("pause", "frozen")

    crash(cli)

    assert cli.state("frozen") == "paused"
    assert cli.out("ps", "--format", "{{.Status}}").endswith("(Paused)")
    cli("unpause", "frozen")
    assert cli.out("exec", "frozen", "echo", "awake") == "awake"


def fetch(port: str) -> str | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/", timeout=2) as answer:
            return answer.read().decode()
    except OSError:
        return None


def test_published_ports_stay_open_and_taken(cli: Cli, busybox: str) -> None:
    serve = "mkdir /w; echo hello > /w/index.html; exec httpd -f -p 80 -h /w"
    cli.start("--name", "web", "-p", "127.0.0.1::80", busybox, "sh", "-c", serve)
    port = cli.out("port", "web", "80/tcp").rsplit(":", 1)[1]
    wait_until(lambda: fetch(port))

    cli.engine.kill()
    meanwhile = fetch(port)
    cli.engine.start()

    assert meanwhile == "hello\n" or cli.engine.is_reference  # dockerd's proxies die with it
    assert fetch(port) == "hello\n"
    assert cli.out("port", "web", "80/tcp") == f"127.0.0.1:{port}"
    if not cli.engine.is_reference:
        taken = cli.fails("run", "--rm", "-p", f"127.0.0.1:{port}:80", busybox, "true", status=125)
        assert "port is already allocated" in taken
    other = cli.start(busybox, "sleep", "1000")
    addresses = {cli.engine.inspect(name)["NetworkSettings"]["IPAddress"] for name in ("web", other)}
    assert len(addresses) == 2
    cli("rm", "-f", "web")
    assert fetch(port) is None
    cli("run", "--rm", "-p", f"127.0.0.1:{port}:80", busybox, "true")


def test_a_clean_stop_leaves_containers_too(cli: Cli, busybox: str) -> None:
    cli.start("--name", "kept", busybox, "sleep", "1000")
    pid = process_of(cli, "kept")

    status = cli.engine.stop()
    between = alive(pid)
    cli.engine.start()

    assert (status, between) == (0, True)
    assert process_of(cli, "kept") == pid
    assert cli.out("exec", "kept", "echo", "here") == "here"


def test_many_crashes_in_a_row(cli: Cli, busybox: str) -> None:
    cli.start("--name", "tough", busybox, "sh", "-c", COUNT.format(limit=100_000, pause=SLOWLY))
    pid = process_of(cli, "tough")

    for _ in range(4):
        crash(cli)
    seen = numbers(cli.out("logs", "tough"))

    assert process_of(cli, "tough") == pid
    assert seen == list(range(1, len(seen) + 1))


@pytest.mark.parametrize("seed", range(4))
def test_a_crash_at_any_moment_of_run_and_rm_leaves_nothing(cli: Cli, busybox: str, seed: int) -> None:
    if cli.engine.is_reference:
        pytest.skip("dockerd does leave mounts and half-made containers")
    engine = cli.engine
    before = leftovers()
    moment = random.Random(seed)
    command = ["docker", "run", "--name", f"c{seed}", "-p", "127.0.0.1::80", "-v", "/v", busybox, "sleep", "1000"]
    with subprocess.Popen(command, env=engine.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(moment.uniform(0.05, 0.45))
        engine.kill()
        process.kill()
        process.communicate()
    engine.start()

    for container in engine.request("GET", "/v1.39/containers/json?all=1").json:
        state = engine.inspect(container["Id"])["State"]
        mounted = [point for point in mounts_under(engine.exec_root) if container["Id"] in str(point)]
        if state["Running"]:
            assert alive(state["Pid"])
            assert mounted
        else:
            assert state["Status"] in ("created", "exited")
            assert mounted == []
            assert not list(CGROUP_ROOT.glob(f"*{engine.cgroup_parent}/{container['Id']}"))
    engine.remove_containers()
    assert cli.out("ps", "-aq") == ""
    assert cli.out("volume", "ls", "-q") == ""
    added = wait_for_no_leftovers(before, ignore=f"{engine.pid} ")  # the engine itself is a new process
    assert added == {}
    assert cli.out("run", "--rm", busybox, "echo", "fine") == "fine"
