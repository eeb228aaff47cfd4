"""Options of `docker run` as the process inside sees them, and as the kernel keeps them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat.cli import Cli
from tests.engine_process import EngineProcess, wait_until
from tests.leftovers import CGROUP_ROOT

pytestmark = pytest.mark.root

DEFAULT_CAPABILITIES = 0x00000000A80425FB  # the fourteen of the reference engine
STATUS = "/proc/self/status"


@pytest.fixture
def cli(docker_cli: str, engine: EngineProcess) -> Cli:
    return Cli(engine, {})


def capability_limit() -> int:
    """The most a container can get: what we have ourselves."""
    for line in Path(STATUS).read_text().splitlines():
        if line.startswith("CapBnd:"):
            return int(line.split()[1], 16)
    raise AssertionError("no CapBnd")


def status(cli: Cli, image: str, *options: str) -> dict[str, str]:
    lines = cli.lines("run", "--rm", "--network", "none", *options, image, "cat", STATUS)
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


# -- process --


def test_environment_user_directory_and_command(cli: Cli, busybox: str, app: str, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("FROM_FILE=file\nB=file\n")
    script = "echo $A $B $FROM_FILE; id; pwd; echo $HOME; echo $HOSTNAME; hostname; cat /etc/hostname"
    options = ["-e", "A=1", "-e", "B=2", "--env-file", str(tmp_path / "env"), "--hostname", "box"]

    lines = cli.lines(
        "run", "--rm", *options, "-u", "65534:29", "--group-add", "7", "-w", "/made/here", busybox, "sh", "-c", script
    )

    assert lines[0] == "1 2 file"
    assert lines[1] == "uid=65534(nobody) gid=29(audio) groups=7,29(audio)"
    assert lines[2] == "/made/here"
    assert lines[3] == "/home"
    assert lines[4:] == ["box", "box", "box"]
    assert cli.out("run", "--rm", "--entrypoint", "/bin/echo", app, "only", "this") == "only this"
    assert cli.out("run", "--rm", "-u", "nobody", busybox, "id", "-un") == "nobody"
    assert "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" in cli.lines(
        "run", "--rm", busybox, "env"
    )
    assert cli.out("run", "--rm", "-e", "PATH", busybox, "sh", "-c", "echo ok") == "ok"


def test_hosts_resolv_conf_and_extra_hosts(cli: Cli, busybox: str) -> None:
    dns = ["--dns", "10.1.1.1", "--dns-search", "corp", "--dns-option", "ndots:3"]
    names = ["--add-host", "extra:10.9.8.7", "--hostname", "box", "--domainname", "site"]
    name = cli.start(*dns, *names, busybox, "sleep", "1000")
    address = cli.out("inspect", "-f", "{{.NetworkSettings.IPAddress}}", name)

    hosts = cli.out("exec", name, "cat", "/etc/hosts")
    resolv = cli.lines("exec", name, "cat", "/etc/resolv.conf")

    assert "127.0.0.1\tlocalhost" in hosts
    assert "10.9.8.7\textra" in hosts
    assert f"{address}\tbox.site box" in hosts
    assert resolv[:1] == ["search corp"]
    assert "nameserver 10.1.1.1" in resolv
    assert "options ndots:3" in resolv
    assert cli.out("exec", name, "hostname") in ("box.site", "box")
    assert (Path(cli.out("inspect", "-f", "{{.HostsPath}}", name))).read_text() == hosts + "\n"


def test_capabilities(cli: Cli, busybox: str) -> None:
    plain = status(cli, busybox)
    dropped = status(cli, busybox, "--cap-drop", "ALL", "--cap-add", "NET_ADMIN")
    added = status(cli, busybox, "--cap-add", "SYS_TIME", "--cap-drop", "CHOWN")
    user = status(cli, busybox, "-u", "nobody")

    assert int(plain["CapBnd"], 16) == int(plain["CapEff"], 16) == DEFAULT_CAPABILITIES
    assert int(plain["CapInh"], 16) == 0
    assert int(dropped["CapBnd"], 16) == 1 << 12
    assert int(added["CapBnd"], 16) == DEFAULT_CAPABILITIES & ~1 | 1 << 25
    assert int(user["CapEff"], 16) == 0
    assert int(user["CapBnd"], 16) == DEFAULT_CAPABILITIES


def test_seccomp_and_no_new_privileges(cli: Cli, busybox: str, tmp_path: Path) -> None:
    plain = status(cli, busybox)
    unconfined = status(cli, busybox, "--security-opt", "seccomp=unconfined")
    hardened = status(cli, busybox, "--security-opt", "no-new-privileges")
    profile = tmp_path / "profile.json"
    rules = [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    own = cli("run", "--rm", "--security-opt", f"seccomp={profile}", busybox, "mkdir", "/x", check=False)

    assert (plain["Seccomp"], plain["NoNewPrivs"]) == ("2", "0")
    assert unconfined["Seccomp"] == "0"
    assert hardened["NoNewPrivs"] == "1"
    assert (own.returncode, "Operation not permitted" in own.stderr) == (1, True)
    # What the default profile forbids even to root.
    assert cli("run", "--rm", busybox, "unshare", "-m", "true", check=False).returncode == 1
    assert cli("run", "--rm", busybox, "mount", "-t", "tmpfs", "x", "/tmp", check=False).returncode != 0


def test_masked_and_read_only_paths(cli: Cli, busybox: str) -> None:
    script = "head -c 1 /proc/kcore | wc -c; ls /sys/firmware | wc -l; touch /proc/sys/x /proc/irq/x /sys/x 2>&1 | sort"
    lines = cli.lines("run", "--rm", busybox, "sh", "-c", script)
    mounts = cli.out("run", "--rm", busybox, "cat", "/proc/mounts")
    write = cli("run", "--rm", busybox, "sh", "-c", "echo 1 > /proc/sys/kernel/panic", check=False)

    assert lines[:2] == ["0", "0"]
    assert "Read-only file system" in write.stderr
    for line in ("proc /proc/bus proc ro", "proc /proc/sys proc ro", "tmpfs /sys/firmware tmpfs ro"):
        assert line in mounts, (line, mounts)
    assert " /sys sysfs ro,nosuid,nodev,noexec" in mounts
    assert " /dev/shm tmpfs rw,nosuid,nodev,noexec" in mounts
    assert " /dev/mqueue mqueue " in mounts
    assert "overlay / overlay rw" in mounts


def test_privileged(cli: Cli, busybox: str) -> None:
    done = cli(
        "run", "--rm", "--privileged", busybox, "sh", "-c", f"cat {STATUS}; cat /proc/mounts; ls /dev", check=False
    )
    if cli.engine.is_reference and done.returncode != 0 and "unable to apply caps" in done.stderr:
        pytest.skip("dockerd asks for every capability of the kernel, and this machine's root lacks some")
    fields = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)

    assert done.returncode == 0, done.stderr
    assert int(fields["CapEff"], 16) == capability_limit()
    assert fields["Seccomp"] == "0"
    assert " /sys sysfs rw" in done.stdout
    assert "/proc/sys proc ro" not in done.stdout
    assert "kmsg" in done.stdout.split()


def test_devices(cli: Cli, busybox: str) -> None:
    nodes = cli.lines("run", "--rm", busybox, "ls", "/dev")
    given = cli.out("run", "--rm", "--device", "/dev/zero:/dev/given:r", busybox, "sh", "-c",
                    "head -c 3 /dev/given | wc -c; echo x > /dev/given")  # fmt: skip
    open_it = "mknod /node c 10 237 && exec 3</node"  # loop-control: opening it does nothing
    made = cli("run", "--rm", busybox, "sh", "-c", open_it, check=False)
    ruled = cli("run", "--rm", "--device-cgroup-rule", "c 10:237 rm", busybox, "sh", "-c", open_it, check=False)

    usual = {
        "null",
        "zero",
        "full",
        "random",
        "urandom",
        "tty",
        "fd",
        "stdin",
        "stdout",
        "stderr",
        "ptmx",
        "pts",
        "shm",
    }
    assert usual <= set(nodes)
    assert given.splitlines()[0] == "3"
    assert made.returncode != 0
    assert "Operation not permitted" in made.stderr
    assert "Operation not permitted" not in ruled.stderr


def test_read_only_root(cli: Cli, busybox: str) -> None:
    done = cli("run", "--rm", "--read-only", "--tmpfs", "/run", "-v", "/scratch", busybox, "sh", "-c",
               "touch /run/a /scratch/b /dev/shm/c && touch /x", check=False)  # fmt: skip

    assert done.returncode == 1
    assert done.stderr == "touch: /x: Read-only file system\n"


def test_ulimits_sysctls_and_namespaces_of_ipc(cli: Cli, busybox: str) -> None:
    limits = ["--ulimit", "nofile=100:200", "--ulimit", "core=0", "--shm-size", "8m", "--oom-score-adj", "300"]
    sysctls = ["--sysctl", "net.ipv4.ip_forward=1", "--sysctl", "kernel.shmmax=12345"]
    script = """
        ulimit -n; ulimit -Hn; ulimit -c
        cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax
        df -k /dev/shm | tail -1 | awk '{print $2}'
        cat /proc/self/oom_score_adj
    """
    lines = cli.lines("run", "--rm", *limits, *sysctls, busybox, "sh", "-c", script)

    assert lines == ["100", "200", "0", "1", "12345", "8192", "300"]


def test_namespaces_shared_with_host_and_container(cli: Cli, busybox: str) -> None:
    first = cli.start("--ipc", "shareable", "--hostname", "first", busybox, "sleep", "1000")
    links = ("net", "ipc", "pid", "uts", "mnt")

    show = f"cd /proc/self/ns; for n in {' '.join(links)}; do readlink $n; done"

    def spaces(*options: str) -> dict[str, str]:
        return dict(zip(links, cli.lines("run", "--rm", *options, busybox, "sh", "-c", show), strict=True))

    inside = dict(zip(links, cli.lines("exec", first, "sh", "-c", show), strict=True))
    host = {name: os.readlink(f"/proc/self/ns/{name}") for name in links}
    own = spaces()
    hosts = spaces("--net", "host", "--ipc", "host", "--pid", "host", "--uts", "host")
    shared = spaces("--net", f"container:{first}", "--ipc", f"container:{first}", "--pid", f"container:{first}")

    assert not set(own.values()) & set(host.values())
    assert not set(own.values()) & set(inside.values())
    assert {name for name in links if hosts[name] == host[name]} == {"net", "ipc", "pid", "uts"}
    assert {name for name in links if shared[name] == inside[name]} == {"net", "ipc", "pid"}


def test_init_reaps_and_passes_signals(cli: Cli, busybox: str) -> None:
    name = cli.start("--init", busybox, "sh", "-c", "(sleep 0.05 &) ; exec sleep 1000")

    processes = wait_until(lambda: _settled(cli, name))
    first = cli.out("exec", name, "cat", "/proc/1/comm")
    cli("stop", name)

    assert first in ("docker-init", "tini", "init")
    assert len(processes) == 2
    assert cli.state(name, "ExitCode") == "143"
    assert cli.out("inspect", "-f", "{{.Path}} {{.HostConfig.Init}}", name) == "sh true"


def _settled(cli: Cli, name: str) -> list[str] | None:
    rows = cli.lines("top", name, "-o", "pid,stat,args")[1:]
    return rows if len(rows) == 2 and not any("<defunct>" in row for row in rows) else None


# -- control groups --


def cgroup_file(engine: EngineProcess, controller: str, container: str, *names: str) -> str:
    """What the kernel has for a container, under the name of cgroup v1 or of v2."""
    v1 = CGROUP_ROOT / controller / engine.cgroup_parent.lstrip("/") / container
    v2 = CGROUP_ROOT / engine.cgroup_parent.lstrip("/") / container
    for directory in (v1, v2):
        for name in names:
            if (directory / name).exists():
                return (directory / name).read_text().strip()
    raise AssertionError(f"none of {names} for {container}")


def test_limits_are_seen_in_the_control_group(cli: Cli, busybox: str) -> None:
    memory = ["--memory", "64m", "--memory-swap", "128m"]
    cpu = ["--cpus", "0.5", "--cpu-shares", "512", "--cpuset-cpus", "0"]
    name = cli.start(*memory, *cpu, "--pids-limit", "33", busybox, "sleep", "1000")
    engine = cli.engine

    assert cgroup_file(engine, "memory", name, "memory.limit_in_bytes", "memory.max") == str(64 << 20)
    assert cgroup_file(engine, "pids", name, "pids.max") == "33"
    assert cgroup_file(engine, "cpuset", name, "cpuset.cpus") == "0"
    quota = cgroup_file(engine, "cpu", name, "cpu.cfs_quota_us", "cpu.max")
    assert quota in ("50000", "50000 100000")
    assert cgroup_file(engine, "cpu", name, "cpu.shares", "cpu.weight") in ("512", "20")
    cli("update", "--cpus", "0.25", "--memory", "32m", "--memory-swap", "64m", name)
    assert cgroup_file(engine, "memory", name, "memory.limit_in_bytes", "memory.max") == str(32 << 20)
    assert cgroup_file(engine, "cpu", name, "cpu.cfs_quota_us", "cpu.max") in ("25000", "25000 100000")


def test_too_much_memory_is_killed_and_told(cli: Cli, busybox: str) -> None:
    limits = ["--memory", "16m", "--memory-swap", "16m"]
    done = cli("run", "--name", "greedy", *limits, busybox, "sh", "-c", "x=a; while :; do x=$x$x; done", check=False)

    assert done.returncode == 137
    assert cli.state("greedy", "OOMKilled") == "true"


def test_too_many_processes_are_refused(cli: Cli, busybox: str) -> None:
    script = "for n in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; wait"
    done = cli("run", "--rm", "--pids-limit", "5", busybox, "sh", "-c", script, check=False)

    assert done.returncode != 0
    assert "Resource temporarily unavailable" in done.stderr


# -- network --


def test_containers_reach_each_other_and_the_host_reaches_them(cli: Cli, busybox: str) -> None:
    server = cli.start(busybox, "sh", "-c", "mkdir /w; echo inside > /w/index.html; exec httpd -f -p 80 -h /w")
    address = cli.out("inspect", "-f", "{{.NetworkSettings.IPAddress}}", server)

    def fetch() -> str:
        return cli("run", "--rm", busybox, "wget", "-q", "-O", "-", f"http://{address}/", check=False).stdout

    assert wait_until(fetch) == "inside\n"
    assert (
        cli.engine.request("GET", "/v1.39/networks/bridge").json["Containers"][server]["IPv4Address"] == f"{address}/24"
    )
    shared = cli.out(
        "run", "--rm", "--net", f"container:{server}", busybox, "wget", "-q", "-O", "-", "http://127.0.0.1/"
    )
    assert shared == "inside"


@contextlib.contextmanager
def outside_network(number: int) -> Iterator[tuple[str, str]]:
    """A namespace that knows no way back to our containers: an answer comes only to a masked sender."""
    name, ours = f"bpout{number}", f"bpov{number}"
    here, there = f"10.213.{number}.253", f"10.213.{number}.254"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        ip("netns", "add", name)
        ip("link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("address", "add", here, "peer", there, "dev", ours)
        ip("link", "set", ours, "up")
        ip("-n", name, "address", "add", there, "peer", here, "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name, there
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", ours], check=False, capture_output=True)


def test_what_leaves_the_bridge_is_masked(cli: Cli, busybox: str) -> None:
    if cli.engine.is_reference:
        pytest.skip("the reference runs here without its firewall rules")
    with outside_network(250) as (namespace, address):
        command = ["ip", "netns", "exec", namespace, "busybox", "nc", "-l", "-p", "7000", "-e", "echo", "seen"]
        with subprocess.Popen(command) as listener:
            try:
                out = wait_until(
                    lambda: cli("run", "--rm", busybox, "nc", "-w", "2", address, "7000", check=False).stdout,
                    what="an answer",
                )
            finally:
                listener.kill()

    assert out == "seen\n"


def test_published_ports_of_every_kind(cli: Cli, busybox: str) -> None:
    serve = "mkdir /w; echo out there > /w/index.html; exec httpd -f -p 80 -h /w"
    everywhere = cli.start("-p", "80", busybox, "sh", "-c", serve)
    port = cli.lines("port", everywhere, "80/tcp")[0].rsplit(":", 1)[1]
    udp = cli.start("-p", "127.0.0.1:0:53/udp", busybox, "sleep", "1000")
    ranged = cli.start("-p", "127.0.0.1:18500-18509:80", busybox, "sh", "-c", serve)

    def get(address: str) -> str | None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{address}/", timeout=2) as answer:
                return answer.read().decode()
        except OSError:
            return None

    assert wait_until(lambda: get(f"127.0.0.1:{port}")) == "out there\n"
    assert get(f"{cli.engine.gateway}:{port}") == "out there\n"
    inside = cli("run", "--rm", busybox, "wget", "-q", "-O", "-", f"http://{cli.engine.gateway}:{port}/")
    assert inside.stdout == "out there\n"
    assert 18500 <= int(cli.out("port", ranged, "80/tcp").rsplit(":", 1)[1]) <= 18509
    assert cli.out("port", udp).startswith("53/udp -> 127.0.0.1:")
    both = json.loads(cli.out("inspect", "-f", "{{json .NetworkSettings.Ports}}", everywhere))["80/tcp"]
    assert {"HostIp": "0.0.0.0", "HostPort": port} in both


# -- storage --


def test_mount_options(cli: Cli, busybox: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one\n")
    missing = tmp_path / "made" / "by" / "engine"

    binds = ["-v", f"{tmp_path}/file:/etc/note:ro", "-v", f"{missing}:/m"]
    mounts = ["--mount", f"type=bind,src={tmp_path},dst=/b,readonly", "--tmpfs", "/t:size=64k,mode=700,exec"]
    script = "cat /etc/note; touch /m/x; touch /b/y 2>&1; stat -c %a /t; grep ' /t ' /proc/mounts"
    lines = cli.lines("run", "--rm", *binds, *mounts, busybox, "sh", "-c", script)

    assert lines[0] == "one"
    assert (missing / "x").exists()
    assert "Read-only file system" in lines[1]
    assert lines[2] == "700"
    assert "size=64k" in lines[3]
    assert "noexec" not in lines[3]
