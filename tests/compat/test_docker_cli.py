"""The Docker CLI, as people and scripts use it: once left to find the API version out, once told."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.compat import images
from tests.compat.cli import Cli
from tests.engine_process import EngineProcess, read_line, wait_until

pytestmark = pytest.mark.root

FULL_ID = re.compile(r"[0-9a-f]{64}")


@pytest.fixture(params=["unset", "1.39"], ids=lambda version: f"api-{version}")
def cli(request: pytest.FixtureRequest, docker_cli: str, engine: EngineProcess) -> Cli:
    version = request.param
    return Cli(engine, {} if version == "unset" else {"DOCKER_API_VERSION": version})


def fetch(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        return answer.read().decode()


# -- images --


def test_pull_tells_of_layers_digest_and_status(cli: Cli, registry: str) -> None:
    layers = tuple(images.Layer(images.make_tar([images.file(f"random{n}", os.urandom(1_500_000))])) for n in range(2))
    digest = images.push(registry, "pulled", "1", images.Image(layers))
    reference = f"{registry}/pulled:1"

    first = cli.lines("pull", reference)
    again = cli.lines("pull", reference)
    cli("rmi", reference)
    with cli.terminal("pull", reference, columns=160) as terminal:
        status = terminal.wait(30)

    assert first[0] == "1: Pulling from pulled"
    assert len([line for line in first if line.endswith(": Pulling fs layer")]) == 2
    assert len([line for line in first if line.endswith(": Pull complete")]) == 2
    assert first[-3:] == [f"Digest: {digest}", f"Status: Downloaded newer image for {reference}", reference]
    assert again[-2:] == [f"Status: Image is up to date for {reference}", reference]
    assert status == 0
    assert re.search(r"Extracting +\[=*>? *\] +[\d.]+ ?[kM]?B/[\d.]+ ?[kM]?B", terminal.output), terminal.output
    cli("rmi", reference)


def test_pull_by_digest_quietly_and_of_what_is_not_there(cli: Cli, registry: str) -> None:
    layer = images.Layer(images.make_tar([images.file("by-digest", b"x")]))
    digest = images.push(registry, "digested", "1", images.Image((layer,)))
    reference = f"{registry}/digested@{digest}"

    quiet = cli.out("pull", "-q", reference)
    missing_tag = cli.fails("pull", f"{registry}/digested:nope")
    missing_repository = cli.fails("pull", f"{registry}/nowhere:1")
    bad = cli.fails("pull", f"{registry}/UPPER:1")

    assert quiet == reference
    assert f"manifest for {registry}/digested:nope not found" in missing_tag
    assert "not found" in missing_repository
    assert "invalid reference format: repository name" in bad
    assert "must be lowercase" in bad
    assert digest in cli.out("images", "--digests", f"{registry}/digested")
    cli("rmi", reference)


def test_images_tag_history_and_rmi(cli: Cli, busybox: str) -> None:
    image_id = images.busybox_image().image_id
    name = busybox.rsplit(":", 1)[0]

    cli("tag", busybox, "local/copy:two")
    listed = cli.lines("images", "--no-trunc", "--format", "{{.Repository}} {{.Tag}} {{.ID}}")
    inspected = json.loads(cli.out("image", "inspect", "local/copy:two"))[0]
    history = cli.lines("history", "--no-trunc", "--format", "{{.ID}}|{{.CreatedBy}}|{{.Size}}", busybox)
    untagged = cli.lines("rmi", "local/copy:two")

    assert f"{name} 1.0 {image_id}" in listed
    assert f"local/copy two {image_id}" in listed
    assert inspected["Id"] == image_id
    assert sorted(inspected["RepoTags"]) == sorted([busybox, "local/copy:two"])
    assert inspected["RepoDigests"] == [f"{name}@{images.digest(images.busybox_image().manifest)}"]
    assert inspected["RootFS"]["Layers"] == [layer.stated_diff_id for layer in images.busybox_image().layers]
    assert inspected["Config"]["Cmd"] == ["sh"]
    assert [line.split("|")[1] for line in history] == [
        '/bin/sh -c #(nop)  CMD ["sh"]',
        "/bin/sh -c echo second layer > /etc/note",
        "/bin/sh -c #(nop) ADD file:busybox in / ",
    ]
    assert [line.split("|")[0] for line in history] == [image_id, "<missing>", "<missing>"]
    assert [line.split("|")[2] for line in history][:2] == ["0B", "13B"]
    assert untagged == ["Untagged: local/copy:two"]
    assert "No such image: local/copy:two" in cli.fails("image", "inspect", "local/copy:two")


def test_rmi_refuses_what_a_container_uses(cli: Cli, registry: str) -> None:
    image = images.Image((images.busybox_layer(),), {"Cmd": ["sleep", "1000"], "Env": [images.PATH]})
    images.push(registry, "used", "1", image)
    reference = f"{registry}/used:1"
    cli("pull", "-q", reference)
    container = cli.out("create", "--name", "user", reference)

    refused = cli.fails("rmi", reference)
    by_id = cli.fails("rmi", image.image_id)
    forced = cli.lines("rmi", "-f", reference)
    cli("rm", "user")
    # The reference went with -f; the image stayed for its container and goes with its ID.
    left = cli.out("images", "-q", "--no-trunc", "--filter", "dangling=true")
    if image.image_id in left:
        cli("rmi", image.image_id)

    short = image.image_id.removeprefix("sha256:")[:12]
    assert (
        f'conflict: unable to remove repository reference "{reference}" (must force) - container {container[:12]} '
        f"is using its referenced image {short}"
    ) in refused
    assert f"conflict: unable to delete {short} (must be forced)" in by_id
    assert f"Untagged: {reference}" in forced
    assert image.image_id not in cli.lines("images", "-q", "--no-trunc")


def test_image_prune_takes_the_dangling_ones(cli: Cli, registry: str) -> None:
    layer = images.Layer(images.make_tar([images.file("dangling", b"x" * 5000)]))
    for label in ("first", "second"):
        images.push(registry, "moving", "1", images.Image((layer,), {"Labels": {"which": label}}))
        cli("pull", "-q", f"{registry}/moving:1")
    first = images.Image((layer,), {"Labels": {"which": "first"}}).image_id

    dangling = cli.lines("images", "-q", "--no-trunc", "--filter", "dangling=true")
    pruned = cli.out("image", "prune", "-f")

    assert first in dangling
    assert f"deleted: {first}" in pruned
    assert "Total reclaimed space: " in pruned
    assert cli.out("images", "-q", "--filter", "dangling=true") == ""
    assert "Total reclaimed space: 0B" in cli.out("image", "prune", "-f")
    cli("rmi", f"{registry}/moving:1")


# -- run --


def test_run_keeps_output_apart_and_gives_the_exit_status(cli: Cli, busybox: str) -> None:
    done = cli("run", "--rm", busybox, "sh", "-c", "echo out; echo err >&2; exit 42", check=False)

    assert (done.returncode, done.stdout, done.stderr) == (42, "out\n", "err\n")
    assert cli("run", "--rm", busybox, "true").returncode == 0
    assert cli("run", "--rm", busybox, "false", check=False).returncode == 1
    assert cli.out("ps", "-aq") == ""


def test_exit_statuses_of_what_cannot_run(cli: Cli, busybox: str, registry: str) -> None:
    missing = cli.fails("run", "--rm", busybox, "no-such-command", status=127)
    missing_path = cli.fails("run", "--rm", busybox, "/no/such/path", status=127)
    not_executable = cli.fails("run", "--rm", busybox, "/etc/passwd", status=126)
    directory = cli.fails("run", "--rm", busybox, "/etc", status=126)
    no_image = cli.fails("run", "--rm", f"{registry}/no-image:1", "true", status=125)
    bad_option = cli.fails("run", "--rm", "--memory", "1k", busybox, "true", status=125)
    bad_user = cli.fails("run", "--rm", "-u", "ghost", busybox, "true", status=125)

    assert "executable file not found in $PATH" in missing
    assert "no such file or directory" in missing_path
    assert "permission denied" in not_executable
    assert "permission denied" in directory or "is a directory" in directory
    assert "not found" in no_image
    assert "Minimum memory limit allowed is" in bad_option
    assert "unable to find user ghost: no matching entries in passwd file" in bad_user
    assert cli.out("ps", "-aq") == ""


def test_run_detached_then_ps_inspect_logs_stop_rm(cli: Cli, busybox: str) -> None:
    container = cli.start("--name", "web", "--label", "role=test", busybox, "sh", "-c", "echo up; sleep 1000")
    wait_until(lambda: cli.out("logs", "web") == "up")

    assert FULL_ID.fullmatch(container)
    assert cli.lines("ps", "--no-trunc", "--format", "{{.ID}}|{{.Image}}|{{.Names}}|{{.State}}|{{.Command}}") == [
        f"""{container}|{busybox}|web|running|"sh -c 'echo up; sleep 1000'\""""
    ]
    assert re.fullmatch(r"Up (Less than a second|\d+ seconds?)", cli.out("ps", "--format", "{{.Status}}"))
    assert cli.out("ps", "-q", "--filter", "label=role=test") == container[:12]
    assert cli.out("ps", "-q", "--filter", "name=we") == container[:12]
    assert cli.out("ps", "-q", "--filter", "status=exited") == ""
    assert cli.out("inspect", "-f", "{{.State.Running}} {{.Config.Cmd}} {{.Name}}", "web") == (
        "true [sh -c echo up; sleep 1000] /web"
    )
    assert cli.out("stop", "-t", "0", "web") == "web"
    assert cli.state("web") == "exited"
    assert cli.state("web", "ExitCode") == "137"
    assert re.fullmatch(r"Exited \(137\) .* ago", cli.out("ps", "-a", "--format", "{{.Status}}"))
    assert cli.out("ps", "-q") == ""
    assert cli.out("rm", "web") == "web"
    assert cli.fails("inspect", "web").lower().startswith("error: no such object: web")
    assert "No such container: web" in cli.fails("rm", "web")


def test_create_start_attached_and_cidfile(cli: Cli, busybox: str, tmp_path: Path) -> None:
    cidfile = tmp_path / "cid"
    container = cli.out("create", "--name", "later", "--cidfile", str(cidfile), busybox, "sh", "-c", "echo on; exit 5")
    created = cli.state("later")
    done = cli("start", "-a", "later", check=False)
    duplicate = cli.fails("create", "--name", "later", busybox)

    assert cidfile.read_text() == container
    assert created == "created"
    assert (done.returncode, done.stdout) == (5, "on\n")
    assert f'The container name "/later" is already in use by container "{container}"' in duplicate


def test_interactive_shell_on_a_terminal(cli: Cli, busybox: str) -> None:
    with cli.terminal("run", "--rm", "-it", "--name", "shell", busybox, rows=33, columns=111) as terminal:
        terminal.expect("/ # ")
        terminal.send("tty; stty size; echo TERM=$TERM\n")
        terminal.expect("^/dev/pts/0\r\n")
        terminal.expect("^33 111\r\n")
        terminal.expect("^TERM=xterm\r\n")
        terminal.resize(44, 122)
        wait_until(lambda: _type_and_see(terminal, "stty size\n", "44 122"), what="the new size")
        terminal.send("exit 7\n")
        status = terminal.wait()

    assert status == 7
    assert cli.out("ps", "-aq") == ""


def _type_and_see(terminal, line: str, wanted: str) -> bool:
    terminal.send(line)
    return terminal.expect(r"^(\d+ \d+)\r\n").group(1) == wanted


def test_detach_with_keys_and_attach_again(cli: Cli, busybox: str) -> None:
    with cli.terminal("run", "-it", "--name", "shell", busybox) as terminal:
        terminal.expect("/ # ")
        terminal.send("mark=before\n")
        terminal.expect("/ # ")
        terminal.send("\x10\x11")  # ctrl-p ctrl-q
        detached = terminal.wait()
    running = cli.state("shell")
    with cli.terminal("attach", "--detach-keys", "ctrl-a,x", "shell") as terminal:
        terminal.send("echo mark is $mark\n")
        terminal.expect("^mark is before\r\n")
        terminal.send("\x01x")
        detached_again = terminal.wait()
    with cli.terminal("attach", "shell") as terminal:
        terminal.send("exit 9\n")
        status = terminal.wait()

    assert (detached, running) == (0, "running")
    assert detached_again in (0, 1)  # the CLI says "read escape sequence", with 1 since 23.0
    assert status == 9


def test_piped_stdin_arrives_whole_and_ends(cli: Cli, busybox: str) -> None:
    data = os.urandom(500_000).hex()

    echoed = cli("run", "--rm", "-i", busybox, "cat", input=data)
    counted = cli.out("run", "--rm", "-i", busybox, "wc", "-c", input=data)
    late = cli.out("run", "--rm", "-i", busybox, "sh", "-c", "cat >/dev/null; sleep 0.2; echo after the end", input="x")

    assert echoed.stdout == data
    assert counted == str(len(data))
    assert late == "after the end"


def test_attach_sees_output_and_passes_signals_and_status(cli: Cli, busybox: str) -> None:
    script = 'trap "echo got INT; exit 11" INT; while :; do echo tick; sleep 0.1; done'
    cli.start("--name", "target", busybox, "sh", "-c", script)

    with cli.process("attach", "target") as process:
        first = read_line(process.stdout)
        process.send_signal(2)
        rest = process.stdout.read().decode().splitlines()
        status = process.wait(10)

    assert first == "tick\n"
    assert rest[-1] == "got INT"
    assert status == 11
    assert cli.state("target", "ExitCode") == "11"
    assert "attach" in [event["Action"] for event in _events(cli, "target")]


def _events(cli: Cli, container: str) -> list[dict[str, Any]]:
    """What the engine still knows of a container's past."""
    selection = ["--since", "10m", "--until", f"{time.time():.6f}", "--filter", f"container={container}"]
    return [json.loads(line) for line in cli.lines("events", *selection, "--format", "json")]


# -- exec --


def test_exec_in_a_running_container(cli: Cli, busybox: str) -> None:
    cli.start("--name", "host", "-e", "COLOR=blue", busybox, "sleep", "1000")

    assert cli.out("exec", "host", "sh", "-c", "echo $COLOR $PWD $(id -u)") == "blue / 0"
    assert cli.out(
        "exec", "-e", "COLOR=red", "-w", "/tmp", "-u", "nobody", "host", "sh", "-c", "echo $COLOR $PWD $(id -u)"
    ) == ("red /tmp 65534")
    assert cli.fails("exec", "host", "sh", "-c", "echo no >&2; exit 23", status=23) == "no\n"
    assert cli.out("exec", "-i", "host", "cat", input="through stdin") == "through stdin"
    missing = cli("exec", "host", "nope", check=False)
    assert (missing.returncode, "executable file not found in $PATH" in missing.stdout) == (126, True)
    cli("exec", "-d", "host", "sh", "-c", "echo done > /tmp/detached")
    wait_until(lambda: cli("exec", "host", "cat", "/tmp/detached", check=False).stdout == "done\n")
    with cli.terminal("exec", "-it", "host", "sh") as terminal:
        terminal.expect("/ # ")
        terminal.send("tty; exit 3\n")
        terminal.expect("^/dev/pts/")
        assert terminal.wait() == 3
    assert cli.out("inspect", "-f", "{{.ExecIDs}}", "host") in ("[]", "<no value>")


def test_exec_needs_a_running_container(cli: Cli, busybox: str) -> None:
    container = cli.out("create", "--name", "idle", busybox, "sleep", "1000")

    not_running = cli.fails("exec", "idle", "true")
    cli("start", "idle")
    cli("pause", "idle")
    paused = cli.fails("exec", "idle", "true")
    cli("unpause", "idle")

    assert f"ontainer {container} is not running" in not_running
    assert f"Container {container} is paused, unpause the container before exec" in paused or (
        "Container idle is paused, unpause the container before exec" in paused
    )
    assert cli("exec", "idle", "true").returncode == 0
    assert "No such container: ghost" in cli.fails("exec", "ghost", "true")


# -- logs --


def test_logs_tail_since_until_timestamps_and_streams(cli: Cli, busybox: str) -> None:
    cli.start(
        "--name",
        "talker",
        busybox,
        "sh",
        "-c",
        "for n in 1 2 3; do echo line $n; done; sleep 0.6; echo late; echo err >&2",
    )
    assert cli.out("wait", "talker") == "0"

    whole = cli("logs", "talker")
    stamped = cli.lines("logs", "-t", "talker")
    stamps = [line.split(" ")[0] for line in stamped]

    assert whole.stdout == "line 1\nline 2\nline 3\nlate\n"
    assert whole.stderr == "err\n"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", stamp) for stamp in stamps)
    assert stamps == sorted(stamps)
    assert cli.lines("logs", "--tail", "2", "talker") == ["late"]  # the other of the two is on stderr
    assert cli.lines("logs", "--tail", "3", "talker") == ["line 3", "late"]
    assert cli.out("logs", "--tail", "0", "talker") == ""
    assert cli.lines("logs", "--since", stamps[3], "talker") == ["late"]
    assert cli.lines("logs", "--until", stamps[2], "talker") == ["line 1", "line 2", "line 3"]
    assert "No such container: ghost" in cli.fails("logs", "ghost")


def test_logs_follow_until_the_container_ends(cli: Cli, busybox: str) -> None:
    cli.start(
        "--name", "talker", busybox, "sh", "-c", "echo first; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo last"
    )

    with cli.process("logs", "-f", "talker") as process:
        first = read_line(process.stdout)
        cli("exec", "talker", "touch", "/tmp/go")
        last = read_line(process.stdout)
        status = process.wait(10)

    assert (first, last, status) == ("first\n", "last\n", 0)
    assert cli.lines("logs", "-f", "talker") == ["first", "last"]


# -- life --


def test_stop_obeys_the_signal_and_the_time(cli: Cli, busybox: str) -> None:
    script = 'trap "echo bye; exit 4" TERM; echo ready; while :; do sleep 0.05; done'
    cli.start("--name", "polite", busybox, "sh", "-c", script)
    cli.start("--name", "custom", "--stop-signal", "USR1", busybox, "sh", "-c", script.replace("TERM", "USR1"))
    cli.start("--name", "deaf", busybox, "sh", "-c", 'trap "" TERM; echo ready; while :; do sleep 0.05; done')
    cli.start("--name", "tiny", "--init", busybox, "sleep", "1000")
    for name in ("polite", "custom", "deaf"):
        wait_until(lambda name=name: "ready" in cli.out("logs", name))

    cli("stop", "polite", "custom", "tiny")
    begun = time.monotonic()
    cli("stop", "-t", "1", "deaf")
    took = time.monotonic() - begun

    assert cli.out("logs", "polite") == "ready\nbye"
    assert [cli.state(name, "ExitCode") for name in ("polite", "custom", "tiny", "deaf")] == ["4", "4", "143", "137"]
    assert 1.0 <= took < 5.0
    cli("stop", "polite")  # once more is no error


def test_kill_with_names_and_numbers(cli: Cli, busybox: str) -> None:
    script = 'for s in HUP USR1 USR2; do trap "echo $s" $s; done; echo ready; while :; do sleep 0.05; done'
    container = cli.start("--name", "ears", busybox, "sh", "-c", script)
    wait_until(lambda: "ready" in cli.out("logs", "ears"))

    for signal, word in (("HUP", "HUP"), ("SIGUSR1", "USR1"), ("12", "USR2"), ("sighup", "HUP")):
        before = cli.lines("logs", "ears").count(word)
        assert cli.out("kill", "-s", signal, "ears") == "ears"
        wait_until(lambda word=word, before=before: cli.lines("logs", "ears").count(word) == before + 1)
    bad = cli.fails("kill", "-s", "NOPE", "ears")
    cli("kill", "ears")
    again = cli.fails("kill", "ears")

    assert "Invalid signal: NOPE" in bad or "invalid signal: NOPE" in bad
    assert cli.state("ears", "ExitCode") == "137"
    assert f"ontainer {container} is not running" in again


def test_wait_blocks_and_prints_each_status(cli: Cli, busybox: str) -> None:
    cli.start("--name", "one", busybox, "sh", "-c", "exit 1")
    cli.start("--name", "long", busybox, "sleep", "1000")

    with cli.process("wait", "one", "long") as process:
        first = read_line(process.stdout)
        cli("kill", "-s", "KILL", "long")
        second = read_line(process.stdout)
        status = process.wait(10)

    assert (first, second, status) == ("1\n", "137\n", 0)


def test_restart_pause_unpause_and_rename(cli: Cli, busybox: str) -> None:
    container = cli.start("--name", "old", busybox, "sleep", "1000")
    first_pid = cli.state("old", "Pid")

    cli("restart", "-t", "0", "old")
    second_pid = cli.state("old", "Pid")
    cli("pause", "old")
    paused = cli.state("old")
    paused_status = cli.out("ps", "--format", "{{.Status}}")
    pause_again = cli.fails("pause", "old")
    cli("unpause", "old")
    cli("rename", "old", "new")

    assert first_pid != second_pid
    assert paused == "paused"
    assert paused_status.endswith("(Paused)")
    assert f"ontainer {container} is already paused" in pause_again
    assert cli.state("new") == "running"
    assert cli.out("ps", "--format", "{{.Names}}") == "new"
    assert "No such container: old" in cli.fails("pause", "old")
    assert "is not paused" in cli.fails("unpause", "new")


def test_restart_policies(cli: Cli, busybox: str) -> None:
    cli.start("--name", "twice", "--restart", "on-failure:2", busybox, "sh", "-c", "echo run; exit 6")
    cli.start("--name", "fine", "--restart", "on-failure:2", busybox, "true")
    cli.start("--name", "always", "--restart", "always", busybox, "sh", "-c", "echo run; sleep 0.05")
    cli.start("--name", "unless", "--restart", "unless-stopped", busybox, "sh", "-c", "echo run; sleep 0.05")

    wait_until(lambda: cli.state("twice") == "exited" and cli.out("inspect", "-f", "{{.RestartCount}}", "twice") == "2")
    for name in ("always", "unless"):
        wait_until(lambda name=name: cli.lines("logs", name).count("run") >= 2)
    cli("stop", "-t", "0", "always", "unless")

    assert cli.lines("logs", "twice") == ["run"] * 3
    assert cli.state("twice", "ExitCode") == "6"
    assert cli.out("inspect", "-f", "{{.RestartCount}}", "fine") == "0"
    assert cli.state("fine") == "exited"
    assert [cli.state(name) for name in ("always", "unless")] == ["exited", "exited"]
    runs = cli.lines("logs", "always")
    time.sleep(0.4)
    assert cli.lines("logs", "always") == runs


def test_rm_of_running_containers_needs_force(cli: Cli, busybox: str) -> None:
    container = cli.start("--name", "busy", busybox, "sleep", "1000")

    refused = cli.fails("rm", "busy")
    removed = cli.out("rm", "-f", "busy")
    pruned = [cli.out("create", busybox), cli.out("create", busybox)]
    reclaimed = cli.out("container", "prune", "-f")

    assert container in refused or "busy" in refused
    assert "remove" in refused
    assert removed == "busy"
    assert all(one in reclaimed for one in pruned)
    assert "Total reclaimed space: " in reclaimed
    assert cli.out("ps", "-aq") == ""


def test_auto_remove_takes_container_and_anonymous_volume(cli: Cli, busybox: str) -> None:
    before = cli.out("volume", "ls", "-q")

    cli.start("--rm", "--name", "gone", "-v", "/scratch", busybox, "sh", "-c", "sleep 0.1")

    wait_until(lambda: cli.out("ps", "-aq") == "" and cli.out("volume", "ls", "-q") == before)


def test_events_of_a_run_in_order(cli: Cli, busybox: str) -> None:
    with cli.process(
        "events", "--filter", "container=eventful", "--format", "{{.Action}} {{.Actor.Attributes.exitCode}}"
    ) as process:
        time.sleep(0.2)
        cli("run", "--name", "eventful", "--label", "a=b", busybox, "sh", "-c", "exit 3", check=False)
        cli("rm", "eventful")
        live = [read_line(process.stdout).split()[0] for _ in range(5)]
    replayed = _events(cli, "eventful")

    assert live == ["create", "attach", "start", "die", "destroy"]
    assert [event["Action"] for event in replayed][-5:] == live
    died = next(event for event in replayed[::-1] if event["Action"] == "die")
    assert died["Type"] == "container"
    assert died["scope"] == "local"
    # docker 20.10 adds how long it ran
    attributes = {key: value for key, value in died["Actor"]["Attributes"].items() if key != "execDuration"}
    assert attributes == {"a": "b", "exitCode": "3", "image": busybox, "name": "eventful"}
    assert died["from"] == busybox


# -- network --


def test_published_port_answers_from_the_host(cli: Cli, busybox: str) -> None:
    serve = ["sh", "-c", "mkdir /www; echo hello from inside > /www/index.html; exec httpd -f -p 80 -h /www"]
    cli.start("--name", "web", "-p", "127.0.0.1::80", busybox, *serve)
    address = cli.out("port", "web", "80/tcp")
    port = address.rsplit(":", 1)[1]

    body = wait_until(lambda: _try_fetch(f"http://{address}/"))
    taken = cli.fails("run", "--rm", "-p", f"127.0.0.1:{port}:80", busybox, "true", status=125)

    assert address.startswith("127.0.0.1:")
    assert body == "hello from inside\n"
    assert f"127.0.0.1:{port}->80/tcp" in cli.out("ps", "--format", "{{.Ports}}")
    assert f"Bind for 127.0.0.1:{port} failed: port is already allocated" in taken
    cli("rm", "-f", "web")
    assert _try_fetch(f"http://{address}/") is None


def _try_fetch(url: str) -> str | None:
    try:
        return fetch(url)
    except OSError:
        return None


def test_networks_none_host_and_bridge(cli: Cli, busybox: str) -> None:
    none = cli.lines("run", "--rm", "--network", "none", busybox, "ls", "/sys/class/net")
    host = cli.lines("run", "--rm", "--network", "host", busybox, "ls", "/sys/class/net")
    bridge = cli.out("run", "--rm", busybox, "ip", "-4", "-o", "addr", "show", "eth0")
    cli("run", "--rm", busybox, "ping", "-c", "1", "-W", "2", cli.engine.gateway)

    assert none == ["lo"]
    assert cli.engine.bridge in host
    assert f"inet {cli.engine.gateway.rsplit('.', 1)[0]}." in bridge
    names = cli.lines("network", "ls", "--format", "{{.Name}} {{.Driver}} {{.Scope}}")
    assert {"bridge bridge local", "host host local", "none null local"} <= set(names)


# -- storage --


def test_binds_volumes_and_tmpfs(cli: Cli, busybox: str, app: str, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from the host\n")

    read = cli.out(
        "run", "--rm", "-v", f"{tmp_path}:/mnt", busybox, "sh", "-c", "cat /mnt/given; echo back > /mnt/made"
    )
    read_only = cli("run", "--rm", "-v", f"{tmp_path}:/mnt:ro", busybox, "touch", "/mnt/x", check=False)
    cli("run", "--rm", "-v", "store:/data", busybox, "sh", "-c", "echo kept > /data/file")
    kept = cli.out("run", "--rm", "--mount", "type=volume,src=store,dst=/other,readonly", busybox, "cat", "/other/file")
    filled = cli.out("run", "--rm", "-v", "filled:/data", "--entrypoint", "cat", app, "/data/seed")
    owner = cli.out("run", "--rm", "-v", "filled:/data", "--entrypoint", "stat", app, "-c", "%u:%g %a", "/data")
    tmpfs = cli.out("run", "--rm", "--tmpfs", "/scratch:size=1m", busybox, "grep", " /scratch ", "/proc/mounts")

    assert read == "from the host"
    assert (tmp_path / "made").read_text() == "back\n"
    assert read_only.returncode == 1
    assert "Read-only file system" in read_only.stderr
    assert kept == "kept"
    assert filled == "from the image"
    assert owner == "65534:65534 750"
    assert tmpfs.startswith("tmpfs /scratch tmpfs rw,nosuid,nodev,noexec")
    assert "size=1024k" in tmpfs
    assert {"store", "filled"} <= set(cli.lines("volume", "ls", "-q"))
    assert cli.out("volume", "inspect", "-f", "{{.Driver}} {{.Scope}}", "store") == "local local"
    mountpoint = Path(cli.out("volume", "inspect", "-f", "{{.Mountpoint}}", "store"))
    assert (mountpoint / "file").read_text() == "kept\n"
    cli("create", "--name", "holder", "-v", "store:/data", busybox)
    assert "volume is in use" in cli.fails("volume", "rm", "store")
    assert cli.out("run", "--rm", "--volumes-from", "holder", busybox, "cat", "/data/file") == "kept"
    cli("rm", "-v", "holder")
    assert cli.lines("volume", "rm", "store", "filled") == ["store", "filled"]
    assert not mountpoint.exists()


# -- looking --


def test_update_top_and_stats(cli: Cli, busybox: str) -> None:
    cli.start("--name", "measured", "--memory", "64m", busybox, "sleep", "1000")

    cli(
        "update",
        "--memory",
        "32m",
        "--memory-swap",
        "64m",
        "--cpu-shares",
        "512",
        "--restart",
        "on-failure:3",
        "measured",
    )
    top = cli.lines("top", "measured")
    custom = cli.lines("top", "measured", "-o", "pid,comm")
    stats = json.loads(cli.out("stats", "--no-stream", "--format", "json", "measured"))
    with cli.terminal("stats", "measured") as terminal:
        terminal.expect("measured +[0-9.]+%", 15)

    host = "{{.HostConfig.Memory}} {{.HostConfig.CpuShares}} {{.HostConfig.RestartPolicy.Name}}"
    assert cli.out("inspect", "-f", host, "measured") == f"{32 << 20} 512 on-failure"
    assert top[0].split() == ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]
    assert top[1].endswith("sleep 1000")
    assert custom[0].split() == ["PID", "COMMAND"]
    assert custom[1].split()[1] == "sleep"
    assert stats["Name"] == "measured"
    assert stats["PIDs"] == "1"
    assert stats["MemUsage"].endswith(" / 32MiB")
    assert re.fullmatch(r"[0-9.]+%", stats["CPUPerc"])


def test_inspect_shows_what_was_asked(cli: Cli, app: str) -> None:
    container = cli.out(
        "create", "--name", "told", "-e", "OVERRIDDEN=run", "-e", "ADDED=run", "--label", "overridden=run",
        "--hostname", "box", "--memory", "64m", "--cap-add", "NET_ADMIN", "-w", "/tmp", "-p", "8080", app,
        "echo", "given",
    )  # fmt: skip
    value = json.loads(cli.out("inspect", "told"))[0]

    assert value["Id"] == container
    assert (value["Path"], value["Args"]) == ("/srv/entry", ["echo", "given"])
    assert value["State"]["Status"] == "created"
    assert value["State"]["StartedAt"] == "0001-01-01T00:00:00Z"
    assert value["Image"] == images.app_image().image_id
    assert value["Driver"] == "overlay2"
    config = value["Config"]
    assert sorted(config["Env"]) == sorted(["OVERRIDDEN=run", "ADDED=run", "FROM_IMAGE=image", images.PATH])
    assert config["Labels"] == {"from.image": "yes", "overridden": "run"}
    assert (config["Hostname"], config["WorkingDir"], config["User"]) == ("box", "/tmp", "nobody")
    assert config["StopSignal"] == "SIGUSR1"
    assert config["ExposedPorts"] == {"8080/tcp": {}}
    assert value["HostConfig"]["Memory"] == 64 << 20
    assert value["HostConfig"]["CapAdd"] in (["NET_ADMIN"], ["CAP_NET_ADMIN"])
    assert value["HostConfig"]["PortBindings"] == {"8080/tcp": [{"HostIp": "", "HostPort": ""}]}
    assert [mount["Destination"] for mount in value["Mounts"]] == ["/data"]
    cli("rm", "-v", "told")


def test_run_uses_what_the_image_says(cli: Cli, app: str) -> None:
    assert cli.lines("run", "--rm", app) == ["entry echo default", "default"]
    assert cli.lines("run", "--rm", app, "sh", "-c", "id -u; pwd; echo $FROM_IMAGE")[1:] == ["65534", "/srv", "image"]
    assert cli.out("run", "--rm", "--entrypoint", "id", app, "-un") == "nobody"


def test_version_info_and_disk_usage(cli: Cli, busybox: str) -> None:
    cli.start("--name", "counted", busybox, "sleep", "1000")

    version = json.loads(cli.out("version", "--format", "json"))
    info = json.loads(cli.out("info", "--format", "json"))
    usage = [json.loads(line) for line in cli.lines("system", "df", "--format", "json")]
    plain = cli.out("info")

    assert version["Server"]["Os"] == "linux"
    assert version["Client"]["ApiVersion"] == ("1.41" if cli.engine.is_reference and not cli._env else "1.39")
    assert info["Driver"] == "overlay2"
    assert (info["Containers"], info["ContainersRunning"]) == (1, 1)
    assert info["Images"] >= 2
    assert info["OSType"] == "linux"
    assert info["DockerRootDir"] == str(cli.engine.data_root)
    assert info["CgroupDriver"] == "cgroupfs"
    assert "name=seccomp,profile=default" in info["SecurityOptions"]
    assert info["DefaultRuntime"] in info["Runtimes"]
    assert "Storage Driver: overlay2" in plain
    assert [row["Type"] for row in usage] == ["Images", "Containers", "Local Volumes", "Build Cache"]
    assert (usage[1]["TotalCount"], usage[1]["Active"]) == ("1", "1")
