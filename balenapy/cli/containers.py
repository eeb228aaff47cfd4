"""The verbs about containers: run, ps, logs, exec, stop and their kin."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from balenapy.cli.client import Client, ClientError, EngineAnswer
from balenapy.cli.format import age, ellipsis, human_size, moment, ports, print_rows, render, short_id, table
from balenapy.cli.images import parse_filters, pull, split_reference
from balenapy.cli.system import parse_moment
from balenapy.cli.terminal import Frames, join, on_resize, raw_terminal, window_size

# Signals a client in front of a container passes on: all but those about our own children, terminal and faults.
PROXIED = set(signal.Signals) - {
    signal.SIGCHLD, signal.SIGPIPE, signal.SIGURG, signal.SIGWINCH, signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV,
    signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGALRM,
}  # fmt: skip
DETACH_GRACE_S = 2.0
DURATION_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


def add_verbs(verbs: Any) -> None:
    for name, text in (("run", "create a container and run it"), ("create", "create a container")):
        verb = verbs.add_parser(name, help=text, add_help=False)  # -h is the hostname
        verb.add_argument("--help", action="help")
        _add_create_options(verb)
        if name == "run":
            verb.add_argument("-d", "--detach", action="store_true")
            verb.add_argument("--detach-keys", default="")
            verb.add_argument("--sig-proxy", type=_boolean, default=True)
        verb.set_defaults(run=run_run if name == "run" else run_create)

    ps = verbs.add_parser("ps", help="list containers")
    ps.add_argument("-a", "--all", action="store_true")
    ps.add_argument("-q", "--quiet", action="store_true")
    ps.add_argument("-s", "--size", action="store_true")
    ps.add_argument("-n", "--last", type=int, default=-1)
    ps.add_argument("-l", "--latest", action="store_true")
    ps.add_argument("-f", "--filter", action="append", default=[])
    ps.add_argument("--no-trunc", action="store_true")
    ps.add_argument("--format", default="")
    ps.set_defaults(run=run_ps)

    logs = verbs.add_parser("logs", help="what a container wrote")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("-t", "--timestamps", action="store_true")
    logs.add_argument("-n", "--tail", default="all")
    logs.add_argument("--since", default="")
    logs.add_argument("--until", default="")
    logs.add_argument("--details", action="store_true")
    logs.add_argument("--file", default="", help="a ring log taken from a device; needs no engine")
    logs.add_argument("container", nargs="?", default="")
    logs.set_defaults(run=run_logs)

    execute = verbs.add_parser("exec", help="run a command in a running container")
    execute.add_argument("-d", "--detach", action="store_true")
    execute.add_argument("-i", "--interactive", action="store_true")
    execute.add_argument("-t", "--tty", action="store_true")
    execute.add_argument("-e", "--env", action="append", default=[])
    execute.add_argument("-u", "--user", default="")
    execute.add_argument("-w", "--workdir", default="")
    execute.add_argument("--privileged", action="store_true")
    execute.add_argument("--detach-keys", default="")
    execute.add_argument("container")
    execute.add_argument("command", nargs=argparse.REMAINDER)
    execute.set_defaults(run=run_exec)

    attach = verbs.add_parser("attach", help="join the streams of a running container")
    attach.add_argument("--no-stdin", action="store_true")
    attach.add_argument("--detach-keys", default="")
    attach.add_argument("--sig-proxy", type=_boolean, default=True)
    attach.add_argument("container")
    attach.set_defaults(run=run_attach)

    start = verbs.add_parser("start", help="start containers")
    start.add_argument("-a", "--attach", action="store_true")
    start.add_argument("-i", "--interactive", action="store_true")
    start.add_argument("--detach-keys", default="")
    start.add_argument("--sig-proxy", type=_boolean, default=True)
    start.add_argument("container", nargs="+")
    start.set_defaults(run=run_start)

    for verb_name, text in (("stop", "stop containers"), ("restart", "restart containers")):
        verb = verbs.add_parser(verb_name, help=text)
        verb.add_argument("-t", "--time", type=int, default=None)
        verb.add_argument("container", nargs="+")
        verb.set_defaults(run=_each(_stopper(verb_name)))

    kill = verbs.add_parser("kill", help="send a signal to containers")
    kill.add_argument("-s", "--signal", default="KILL")
    kill.add_argument("container", nargs="+")
    kill.set_defaults(run=_each(_kill))

    for verb_name in ("pause", "unpause"):
        verb = verbs.add_parser(verb_name, help=f"{verb_name} containers")
        verb.add_argument("container", nargs="+")
        verb.set_defaults(run=_each(_poster(verb_name)))

    rm = verbs.add_parser("rm", help="remove containers")
    rm.add_argument("-f", "--force", action="store_true")
    rm.add_argument("-v", "--volumes", action="store_true")
    rm.add_argument("container", nargs="+")
    rm.set_defaults(run=run_rm)

    wait = verbs.add_parser("wait", help="wait until containers stop, print their exit codes")
    wait.add_argument("container", nargs="+")
    wait.set_defaults(run=run_wait)

    inspect = verbs.add_parser("inspect", help="all that is known of containers or images, as JSON")
    inspect.add_argument("-s", "--size", action="store_true")
    inspect.add_argument("-f", "--format", default="")
    inspect.add_argument("--type", choices=("container", "image", "network", "volume"), default="")
    inspect.add_argument("name", nargs="+")
    inspect.set_defaults(run=run_inspect)

    rename = verbs.add_parser("rename", help="rename a container")
    rename.add_argument("container")
    rename.add_argument("name")
    rename.set_defaults(run=run_rename)

    top = verbs.add_parser("top", help="processes of a container")
    top.add_argument("container")
    top.add_argument("ps_args", nargs=argparse.REMAINDER)
    top.set_defaults(run=run_top)

    port = verbs.add_parser("port", help="published ports of a container")
    port.add_argument("container")
    port.set_defaults(run=run_port)


def _boolean(text: str) -> bool:
    return text.lower() not in ("0", "false", "f")


def _poster(verb: str) -> Callable[[Client, str, argparse.Namespace], object]:
    return lambda client, name, options: client.call("POST", f"/containers/{name}/{verb}")


def _kill(client: Client, name: str, options: argparse.Namespace) -> object:
    return client.call("POST", f"/containers/{name}/kill", {"signal": options.signal})


def _stopper(verb: str) -> Callable[[Client, str, argparse.Namespace], object]:
    return lambda client, name, options: client.call(
        "POST", f"/containers/{name}/{verb}", {} if options.time is None else {"t": options.time}
    )


def _each(
    act: Callable[[Client, str, argparse.Namespace], object],
) -> Callable[[Client, argparse.Namespace], int]:
    """Act on each named container, print its name (unless it says False), go on after an error, tell by exit code."""

    def run(client: Client, options: argparse.Namespace) -> int:
        code = 0
        for name in options.container:
            try:
                if act(client, name, options) is not False:
                    print(name)
            except EngineAnswer as error:
                print(error, file=sys.stderr)
                code = 1
        return code

    return run


def run_rm(client: Client, options: argparse.Namespace) -> int:
    def remove(client: Client, name: str, options: argparse.Namespace) -> bool:
        try:
            client.call("DELETE", f"/containers/{name}", {"force": options.force, "v": options.volumes})
        except EngineAnswer as error:
            if not (options.force and error.status == 404):
                raise
            print(error, file=sys.stderr)  # it is not there, as was wanted
            return False
        return True

    return _each(remove)(client, options)


# run, create and start


def _add_create_options(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    many: dict[str, Any] = {"action": "append", "default": []}
    add("--name", default="")
    add("-i", "--interactive", action="store_true")
    add("-t", "--tty", action="store_true")
    add("--rm", action="store_true")
    add("-e", "--env", **many)
    add("--env-file", **many)
    add("-v", "--volume", **many)
    add("--mount", **many)
    add("--tmpfs", **many)
    add("--volumes-from", **many)
    add("-p", "--publish", **many)
    add("-P", "--publish-all", action="store_true")
    add("--expose", **many)
    add("--network", "--net", default="")
    add("--network-alias", **many)
    add("--ip", default="")
    add("--mac-address", default="")
    add("-h", "--hostname", default="")
    add("--add-host", **many)
    add("--dns", **many)
    add("--dns-search", **many)
    add("--link", **many)
    add("-u", "--user", default="")
    add("-w", "--workdir", default="")
    add("--entrypoint", default=None)
    add("-l", "--label", **many)
    add("--restart", default="no")
    add("--privileged", action="store_true")
    add("--cap-add", **many)
    add("--cap-drop", **many)
    add("--device", **many)
    add("--security-opt", **many)
    add("--group-add", **many)
    add("--ulimit", **many)
    add("--sysctl", **many)
    add("--read-only", action="store_true")
    add("-m", "--memory", type=_size, default=0)
    add("--memory-swap", type=_size, default=0)
    add("--memory-reservation", type=_size, default=0)
    add("--cpus", type=float, default=0)
    add("--cpu-shares", type=int, default=0)
    add("--cpuset-cpus", default="")
    add("--pids-limit", type=int, default=0)
    add("--shm-size", type=_size, default=0)
    add("--oom-score-adj", type=int, default=0)
    add("--init", action="store_true")
    add("--ipc", default="")
    add("--pid", default="")
    add("--uts", default="")
    add("--cgroup-parent", default="")
    add("--runtime", default="")
    add("--log-driver", default="")
    add("--log-opt", **many)
    add("--stop-signal", default="")
    add("--stop-timeout", type=int, default=None)
    add("--health-cmd", default="")
    add("--health-interval", type=_duration, default=0)
    add("--health-timeout", type=_duration, default=0)
    add("--health-start-period", type=_duration, default=0)
    add("--health-retries", type=int, default=0)
    add("--no-healthcheck", action="store_true")
    add("--cidfile", default="")
    add("--cidenv", default="", help="environment variable that receives the container's id")
    add("image")
    add("command", nargs=argparse.REMAINDER)


def _size(text: str) -> int:
    from balenapy.config import parse_size

    return -1 if text == "-1" else parse_size(text)


def _duration(text: str) -> int:
    parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise argparse.ArgumentTypeError(f"invalid duration {text!r}")
    return int(sum(float(number) * DURATION_UNITS[unit] for number, unit in parts))


def _environment(given: list[str], files: list[str]) -> list[str]:
    found = []
    for path in files:
        try:
            with open(path) as file:
                lines = [line.strip() for line in file]
        except OSError as error:
            raise ClientError(f"open {path}: {error.strerror}") from error
        found += [line for line in lines if line and not line.startswith("#")]
    return [
        one if "=" in one else f"{one}={os.environ[one]}" for one in found + given if "=" in one or one in os.environ
    ]


def _labels(given: list[str]) -> dict[str, str]:
    return {key: value for key, _, value in (one.partition("=") for one in given)}


def _ports(publish: list[str], expose: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`[IP:][HOST:]CONTAINER[/PROTO]`, ranges too -> (ExposedPorts, PortBindings)."""
    exposed: dict[str, Any] = {(one if "/" in one else f"{one}/tcp"): {} for one in expose}
    bindings: dict[str, Any] = {}
    for one in publish:
        head, _, protocol = one.partition("/")
        match = re.fullmatch(r"(?:(?:(?P<ip>[\d.]+|\[[^]]+\]):)?(?P<host>[\d-]*):)?(?P<inner>\d+(?:-\d+)?)", head)
        if match is None:
            raise ClientError(f"invalid publish opts format: {one!r}")
        first, _, last = match["inner"].partition("-")
        inner = range(int(first), int(last or first) + 1)
        host = match["host"] or ""
        low, _, high = host.partition("-")
        outer = [str(number) for number in range(int(low), int(high) + 1)] if high else [low] * len(inner)
        if high and len(inner) > 1 and len(outer) != len(inner):
            raise ClientError(f"invalid ranges specified for container and host ports: {one!r}")
        if high and len(inner) == 1:
            outer = [host]
        for port, host_port in zip(inner, outer, strict=False):
            key = f"{port}/{protocol or 'tcp'}"
            exposed[key] = {}
            bindings.setdefault(key, []).append({"HostIp": (match["ip"] or "").strip("[]"), "HostPort": host_port})
    return exposed, bindings


def _device(text: str) -> dict[str, str]:
    host, _, rest = text.partition(":")
    inner, _, permissions = rest.partition(":")
    if inner and not inner.startswith("/") and not permissions:
        inner, permissions = "", inner
    return {"PathOnHost": host, "PathInContainer": inner or host, "CgroupPermissions": permissions or "rwm"}


def _mount(text: str) -> dict[str, Any]:
    mount: dict[str, Any] = {"Type": "volume"}
    for part in text.split(","):
        key, _, value = part.partition("=")
        match key.lower():
            case "type":
                mount["Type"] = value
            case "source" | "src":
                mount["Source"] = value
            case "target" | "dst" | "destination":
                mount["Target"] = value
            case "readonly" | "ro":
                mount["ReadOnly"] = _boolean(value or "true")
            case "bind-propagation":
                mount["BindOptions"] = {"Propagation": value}
            case "volume-nocopy":
                mount.setdefault("VolumeOptions", {})["NoCopy"] = _boolean(value or "true")
            case "tmpfs-size":
                mount.setdefault("TmpfsOptions", {})["SizeBytes"] = _size(value)
            case "tmpfs-mode":
                mount.setdefault("TmpfsOptions", {})["Mode"] = int(value, 8)
            case _:
                raise ClientError(f"unexpected key '{key}' in '{part}'")
    return mount


def _ulimit(text: str) -> dict[str, Any]:
    from balenapy.config import parse_ulimit

    try:
        limit = parse_ulimit(text)
    except ValueError as error:
        raise ClientError(str(error)) from error
    return {"Name": limit.name, "Soft": limit.soft, "Hard": limit.hard}


def _restart_policy(text: str) -> dict[str, Any]:
    name, _, count = text.partition(":")
    if count and not count.isdigit():
        raise ClientError("maximum retry count must be an integer")
    return {"Name": name, "MaximumRetryCount": int(count or 0)}


def _security_options(given: list[str]) -> list[str]:
    """A seccomp profile is named by file here and travels by content."""
    found = []
    for one in given:
        key, _, value = one.partition("=")
        if key == "seccomp" and value != "unconfined":
            try:
                with open(value) as file:
                    one = f"seccomp={json.dumps(json.load(file))}"
            except (OSError, ValueError) as error:
                raise ClientError(f"opening seccomp profile ({value}) failed: {error}") from error
        found.append(one)
    return found


def _health(options: argparse.Namespace) -> dict[str, Any] | None:
    if options.no_healthcheck:
        return {"Test": ["NONE"]}
    found = {
        "Test": ["CMD-SHELL", options.health_cmd] if options.health_cmd else None,
        "Interval": options.health_interval,
        "Timeout": options.health_timeout,
        "StartPeriod": options.health_start_period,
        "Retries": options.health_retries,
    }
    found = {key: value for key, value in found.items() if value}
    return found or None


def create_body(options: argparse.Namespace, *, detached: bool) -> dict[str, Any]:
    """The body of /containers/create for `run` and `create` options.

    Raises: ClientError for a value that cannot be read.
    """
    exposed, bindings = _ports(options.publish, options.expose)
    attach = not detached
    network = options.network or "default"
    endpoint: dict[str, Any] = {}
    if options.network_alias:
        endpoint["Aliases"] = options.network_alias
    if options.ip:
        endpoint["IPAMConfig"] = {"IPv4Address": options.ip}
    volumes = [one for one in options.volume if ":" not in one]
    body: dict[str, Any] = {
        "Hostname": options.hostname,
        "User": options.user,
        "AttachStdin": attach and options.interactive,
        "AttachStdout": attach,
        "AttachStderr": attach,
        "Tty": options.tty,
        "OpenStdin": options.interactive,
        "StdinOnce": attach and options.interactive,
        "Env": _environment(options.env, options.env_file),
        "Cmd": options.command or None,
        "Entrypoint": None if options.entrypoint is None else [options.entrypoint],
        "Image": options.image,
        "Volumes": {one: {} for one in volumes},
        "WorkingDir": options.workdir,
        "Labels": _labels(options.label),
        "ExposedPorts": exposed,
        "MacAddress": options.mac_address,
        "HostConfig": {
            "Binds": [one for one in options.volume if ":" in one] or None,
            "Mounts": [_mount(one) for one in options.mount],
            "Tmpfs": {path: rest for path, _, rest in (one.partition(":") for one in options.tmpfs)},
            "VolumesFrom": options.volumes_from or None,
            "NetworkMode": network,
            "PortBindings": bindings,
            "PublishAllPorts": options.publish_all,
            "RestartPolicy": _restart_policy(options.restart),
            "AutoRemove": options.rm,
            "CapAdd": options.cap_add or None,
            "CapDrop": options.cap_drop or None,
            "Dns": options.dns,
            "DnsSearch": options.dns_search,
            "ExtraHosts": options.add_host or None,
            "GroupAdd": options.group_add or None,
            "Links": options.link or None,
            "IpcMode": options.ipc,
            "PidMode": options.pid,
            "UTSMode": options.uts,
            "Privileged": options.privileged,
            "ReadonlyRootfs": options.read_only,
            "SecurityOpt": _security_options(options.security_opt) or None,
            "ShmSize": options.shm_size,
            "Devices": [_device(one) for one in options.device],
            "Ulimits": [_ulimit(one) for one in options.ulimit],
            "Sysctls": _labels(options.sysctl),
            "Memory": options.memory,
            "MemorySwap": options.memory_swap,
            "MemoryReservation": options.memory_reservation,
            "NanoCpus": round(options.cpus * 1e9),
            "CpuShares": options.cpu_shares,
            "CpusetCpus": options.cpuset_cpus,
            "PidsLimit": options.pids_limit,
            "OomScoreAdj": options.oom_score_adj,
            "CgroupParent": options.cgroup_parent,
            "Runtime": options.runtime,
            "LogConfig": {"Type": options.log_driver, "Config": _labels(options.log_opt)},
            "ContainerIDEnv": options.cidenv,
        },
        "NetworkingConfig": {"EndpointsConfig": {network: endpoint} if endpoint else {}},
    }
    if options.init:
        body["HostConfig"]["Init"] = True
    if options.stop_signal:
        body["StopSignal"] = options.stop_signal
    if options.stop_timeout is not None:
        body["StopTimeout"] = options.stop_timeout
    health = _health(options)
    if health:
        body["Healthcheck"] = health
    return body


def _create(client: Client, options: argparse.Namespace, *, detached: bool) -> str:
    body = create_body(options, detached=detached)
    query = {"name": options.name} if options.name else {}
    try:
        answer = client.call("POST", "/containers/create", query, body)
    except EngineAnswer as error:
        if error.status != 404 or "No such image" not in error.message:
            raise
        name, tag = split_reference(options.image)
        image = f"{name}{'@' if ':' in tag else ':'}{tag}"
        print(f"Unable to find image '{image}' locally", file=sys.stderr)
        _pull_quietly(client, image)
        answer = client.call("POST", "/containers/create", query, body)
    for warning in answer.get("Warnings") or []:
        print(f"WARNING: {warning}", file=sys.stderr)
    if options.cidfile:
        with open(options.cidfile, "x") as file:
            file.write(answer["Id"])
    return str(answer["Id"])


def _pull_quietly(client: Client, image: str) -> None:
    """Pull with the progress on stderr: stdout belongs to the container."""
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        pull(client, image)
    finally:
        sys.stdout = out


def run_create(client: Client, options: argparse.Namespace) -> int:
    print(_create(client, options, detached=True))
    return 0


def run_run(client: Client, options: argparse.Namespace) -> int:
    if options.tty and options.interactive and not options.detach and not os.isatty(0):
        refused = ClientError("the input device is not a TTY")
        refused.exit_code = 1
        raise refused
    container = _create(client, options, detached=options.detach)
    if options.detach:
        _start(client, container)
        print(container)
        return 0
    stream = _attach(client, container, stdin=options.interactive, detach_keys=options.detach_keys)
    condition = "removed" if options.rm else "next-exit"
    exit_code = _ExitCode(client, container, condition)
    try:
        _start(client, container)
    except EngineAnswer as error:
        # docker's codes: 126 cannot be executed, 127 not found, 125 anything else.
        text = error.message.lower()
        error.exit_code = (
            127
            if "executable file not found" in text or "no such file or directory" in text
            else 126
            if "permission denied" in text or "is a directory" in text
            else 125
        )
        raise
    with _proxied_signals(client, container, options.sig_proxy and not options.tty):
        _join(client, f"/containers/{container}/resize", stream, options.interactive, options.tty)
        return exit_code.after_stream()


def run_start(client: Client, options: argparse.Namespace) -> int:
    if not (options.attach or options.interactive):
        return _each(lambda client, name, options: client.call("POST", f"/containers/{name}/start"))(client, options)
    if len(options.container) > 1:
        raise ClientError("you cannot start and attach multiple containers at once")
    found = client.call("GET", f"/containers/{options.container[0]}/json")
    container, is_tty = found["Id"], found["Config"]["Tty"]
    stdin = options.interactive and found["Config"]["OpenStdin"]
    if found["State"]["Running"]:
        raise ClientError("you cannot start and attach a container that runs: use attach")
    stream = _attach(client, container, stdin=stdin, detach_keys=options.detach_keys)
    exit_code = _ExitCode(client, container, "removed" if found["HostConfig"]["AutoRemove"] else "next-exit")
    _start(client, container)
    with _proxied_signals(client, container, options.sig_proxy and not is_tty):
        _join(client, f"/containers/{container}/resize", stream, stdin, is_tty)
        return exit_code.after_stream()


def _start(client: Client, container: str) -> None:
    client.call("POST", f"/containers/{container}/start")


class _ExitCode:
    """Waits for the container's exit on a connection of its own, opened before the start."""

    def __init__(self, client: Client, container: str, condition: str) -> None:
        self._response = client.request("POST", f"/containers/{container}/wait", {"condition": condition})

    def after_stream(self) -> int:
        """The exit code once our stream has ended, or 0 when the user detached and the container runs on."""
        # The end of the output can be seen a moment before the end of the process.
        ready, _, _ = select.select([self._response.fileno()], [], [], DETACH_GRACE_S)
        if not ready:
            return 0
        answer = self._response.json()
        if answer.get("Error"):
            raise ClientError(answer["Error"]["Message"])
        return int(answer["StatusCode"])


def _attach(client: Client, container: str, *, stdin: bool, detach_keys: str) -> tuple[socket.socket, bytes]:
    query: dict[str, Any] = {"stream": True, "stdin": stdin, "stdout": True, "stderr": True}
    if detach_keys:
        query["detachKeys"] = detach_keys
    return client.hijack(f"/containers/{container}/attach", query)


def _join(client: Client, resize_path: str, stream: tuple[socket.socket, bytes], stdin: bool, is_tty: bool) -> None:
    connection, leading = stream

    def resize(rows: int, columns: int) -> None:
        try:
            client.call("POST", resize_path, {"h": rows, "w": columns})
        except ClientError:
            pass  # the process has just ended

    with connection, raw_terminal(is_tty and stdin), on_resize(is_tty, resize):
        if is_tty and os.isatty(0):
            threading.Thread(target=resize, args=window_size(), daemon=True).start()
        join(connection, leading, stdin=stdin, is_tty=is_tty)


@contextmanager
def _proxied_signals(client: Client, container: str, enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return

    def forward(number: int, _frame: object) -> None:
        try:
            client.call("POST", f"/containers/{container}/kill", {"signal": str(number)})
        except ClientError:
            pass  # it has just ended

    before = {number: signal.signal(number, forward) for number in (PROXIED & _settable())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _settable() -> set[signal.Signals]:
    return {number for number in PROXIED if number not in (signal.SIGTRAP, signal.SIGABRT)}


def run_attach(client: Client, options: argparse.Namespace) -> int:
    state = client.call("GET", f"/containers/{options.container}/json")
    if not state["State"]["Running"]:
        raise ClientError("You cannot attach to a stopped container, start it first")
    stdin = state["Config"]["OpenStdin"] and not options.no_stdin
    exit_code = _ExitCode(client, options.container, "not-running")
    stream = _attach(client, options.container, stdin=stdin, detach_keys=options.detach_keys)
    is_tty = state["Config"]["Tty"]
    with _proxied_signals(client, options.container, options.sig_proxy and not is_tty):
        _join(client, f"/containers/{options.container}/resize", stream, stdin, is_tty)
    return exit_code.after_stream()


def run_exec(client: Client, options: argparse.Namespace) -> int:
    if not options.command:
        raise ClientError('"exec" requires at least 2 arguments.')
    attach = not options.detach
    body = {
        "Cmd": options.command,
        "AttachStdin": attach and options.interactive,
        "AttachStdout": attach,
        "AttachStderr": attach,
        "Tty": options.tty,
        "Env": _environment(options.env, []) or None,
        "User": options.user,
        "WorkingDir": options.workdir,
        "Privileged": options.privileged,
        "DetachKeys": options.detach_keys,
    }
    identifier = client.call("POST", f"/containers/{options.container}/exec", body=body)["Id"]
    start = {"Detach": options.detach, "Tty": options.tty}
    if options.detach:
        client.call("POST", f"/exec/{identifier}/start", body=start)
        return 0
    stream = client.hijack(f"/exec/{identifier}/start", body=start)
    _join(client, f"/exec/{identifier}/resize", stream, options.interactive, options.tty)
    return int(client.call("GET", f"/exec/{identifier}/json")["ExitCode"] or 0)


# ps, logs and the rest


def run_ps(client: Client, options: argparse.Namespace) -> int:
    limit = 1 if options.latest else options.last
    size = options.size or ".Size" in options.format
    query: dict[str, Any] = {"all": options.all, "size": size, "filters": parse_filters(options.filter)}
    if limit > 0:
        query["limit"] = limit
    rows = []
    for one in client.call("GET", "/containers/json", query):
        identifier = one["Id"] if options.no_trunc else short_id(one["Id"])
        if options.quiet:
            print(identifier)
            continue
        image = one["Image"]
        if image.startswith("sha256:") and not options.no_trunc:
            image = short_id(image)
        command = one["Command"] if options.no_trunc else ellipsis(one["Command"], 20)
        mounts = [mount.get("Name") or mount["Source"] for mount in one["Mounts"]]
        rows.append({
            "ID": identifier,
            "Image": image,
            "Command": f'"{command}"',
            "CreatedAt": moment(one["Created"]),
            "RunningFor": age(one["Created"]),
            "State": one["State"],
            "Status": one["Status"],
            "Ports": ports(one["Ports"]),
            "Names": ",".join(name.lstrip("/") for name in one["Names"] if name.count("/") == 1),
            "Labels": ",".join(f"{key}={value}" for key, value in (one["Labels"] or {}).items()),
            "Networks": ",".join(one["NetworkSettings"]["Networks"]),
            "Mounts": ",".join(mounts if options.no_trunc else (ellipsis(mount, 15) for mount in mounts)),
            "LocalVolumes": str(sum(mount.get("Driver") == "local" for mount in one["Mounts"])),
            "Size": f"{human_size(one.get('SizeRw', 0), 3)} (virtual {human_size(one.get('SizeRootFs', 0), 3)})",
        })  # fmt: skip
    columns = ["ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names", *(["Size"] if options.size else [])]
    if not options.quiet:
        titles = {
            "ID": "CONTAINER ID",
            "RunningFor": "CREATED",
            "CreatedAt": "CREATED AT",
            "LocalVolumes": "LOCAL VOLUMES",
        }
        print_rows(rows, columns, titles, options.format)
    return 0


def run_logs(client: Client, options: argparse.Namespace) -> int:
    if options.file:
        if options.container or options.follow or options.details:
            raise ClientError("--file goes with --since, --until, --tail and --timestamps only")
        from balenapy.cli.observe import show_ring
        from balenapy.cli.terminal import write_all

        return show_ring(options.file, options, lambda stream, data: write_all(1 if stream == 1 else 2, data))
    if not options.container:
        raise ClientError("'balenapy logs' requires container\nSee 'balenapy logs --help'.")
    tty = client.call("GET", f"/containers/{options.container}/json")["Config"]["Tty"]
    query: dict[str, Any] = {
        "stdout": True,
        "stderr": True,
        "follow": options.follow,
        "timestamps": options.timestamps,
        "details": options.details,
        "tail": options.tail,
    }
    query |= {key: parse_moment(value) for key, value in (("since", options.since), ("until", options.until)) if value}
    frames = Frames(multiplexed=not tty)
    for chunk in client.request("GET", f"/containers/{options.container}/logs", query).chunks():
        frames.write(chunk)
    return 0


def run_wait(client: Client, options: argparse.Namespace) -> int:
    code = 0
    for name in options.container:
        try:
            print(client.call("POST", f"/containers/{name}/wait")["StatusCode"])
        except EngineAnswer as error:
            print(error, file=sys.stderr)
            code = 1
    return code


def run_inspect(client: Client, options: argparse.Namespace) -> int:
    paths = {
        "container": "/containers/{}/json",
        "image": "/images/{}/json",
        "network": "/networks/{}",
        "volume": "/volumes/{}",
    }
    wanted = [options.type] if options.type else list(paths)
    found, code = [], 0
    for name in options.name:
        for kind in wanted:
            try:
                query = {"size": True} if options.size and kind == "container" else None
                found.append(client.call("GET", paths[kind].format(name), query))
                break
            except EngineAnswer as error:
                if error.status != 404:
                    raise
        else:
            print(f"Error: No such {options.type or 'object'}: {name}", file=sys.stderr)
            code = 1
    if options.format:
        for one in found:
            print(render("{{json .}}" if options.format == "json" else options.format, one))
    else:
        print(json.dumps(found, indent=4, ensure_ascii=False))
    return code


def run_rename(client: Client, options: argparse.Namespace) -> int:
    client.call("POST", f"/containers/{options.container}/rename", {"name": options.name})
    return 0


def run_top(client: Client, options: argparse.Namespace) -> int:
    query = {"ps_args": " ".join(options.ps_args)} if options.ps_args else {}
    found = client.call("GET", f"/containers/{options.container}/top", query)
    print(table(found["Titles"], found["Processes"] or []))
    return 0


def run_port(client: Client, options: argparse.Namespace) -> int:
    settings = client.call("GET", f"/containers/{options.container}/json")["NetworkSettings"]
    for port, bindings in sorted((settings["Ports"] or {}).items()):
        for binding in bindings or []:
            print(f"{port} -> {binding['HostIp']}:{binding['HostPort']}")
    return 0
