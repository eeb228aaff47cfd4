"""stats, support-bundle, and `logs --file`: what somebody looks at when a device is slow, sick or dead."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from balenapy.cli.client import Client, ClientError, EngineAnswer
from balenapy.cli.format import human_size, print_rows, short_id
from balenapy.cli.system import parse_moment
from balenapy.core.logview import LogOptions, LogView
from balenapy.core.ringlog import COMPRESSED_MAX_BYTES, Ring
from balenapy.errors import DataLoss

FRAME_S = 1.0
LOG_TAIL = 500  # lines of each container's log in a bundle
TOOL_TIMEOUT_S = 20.0
HIDDEN = "(hidden)"
SECRET = re.compile(r"pass(word|wd)?|secret|token|api.?key|auth|credential|private|cookie|dsn|_key$|^key$", re.I)
# user:password@ in addresses, bearer tokens, and anything assigned to a name like the above.
IN_TEXT = (
    (re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@"), r"\1" + HIDDEN + "@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), r"\1 " + HIDDEN),
    (
        re.compile(
            r"(?i)([\w.-]*(?:pass(?:word|wd)?|secret|token|api[_-]?key|credential)[\w.-]*[\"']?\s*[=:]\s*[\"']?)"
            r"[^\s\"',;&}]+"
        ),
        r"\1" + HIDDEN,
    ),
)  # fmt: skip
HOST_FILES = (
    "/proc/meminfo", "/proc/loadavg", "/proc/mounts", "/proc/version", "/proc/uptime", "/proc/cmdline",
    "/proc/diskstats", "/proc/pressure/cpu", "/proc/pressure/memory", "/proc/pressure/io", "/proc/cpuinfo",
    "/etc/os-release",
)  # fmt: skip
HOST_TOOLS = {
    "dmesg.txt": ["dmesg", "--time-format=iso"],
    "journal-engine.txt": ["journalctl", "--no-pager", "--lines=2000", "--unit=balena-engine", "--unit=balena"],
    "df.txt": ["df", "-h"],
    "ip-address.txt": ["ip", "address"],
    "ip-route.txt": ["ip", "route"],
    "nft-ruleset.txt": ["nft", "list", "ruleset"],
    "processes.txt": ["ps", "-e", "-o", "pid,ppid,stat,rss,etime,comm"],
}


def add_verbs(verbs: Any) -> None:
    stats = verbs.add_parser("stats", help="what containers use, as it changes")
    stats.add_argument("-a", "--all", action="store_true")
    stats.add_argument("--no-stream", action="store_true")
    stats.add_argument("--no-trunc", action="store_true")
    stats.add_argument("--format", default="")
    stats.add_argument("container", nargs="*")
    stats.set_defaults(run=run_stats)

    bundle = verbs.add_parser("support-bundle", help="configuration, state, logs, facts of the host; no secrets")
    bundle.add_argument("-o", "--output", default="", help="file (default: a name with the time); - for stdout")
    bundle.add_argument("--data-root", default="/var/lib/balena-engine", help="its rings are read if no engine answers")
    bundle.add_argument("--config-file", default="/etc/balena-engine/daemon.json")
    bundle.set_defaults(run=run_support_bundle)


# --- logs --file ----------------------------------------------------------------------------------------------


def show_ring(path: str, options: argparse.Namespace, write: Callable[[int, bytes], None]) -> int:
    """Print a ring that was taken from somewhere, `logs`' options applied. Raises: ClientError."""
    from balenapy.core.stdcopy import FrameReader

    wanted = LogOptions(
        since_ns=_nanoseconds(options.since),
        until_ns=_nanoseconds(options.until),
        tail=int(options.tail) if options.tail.isdigit() else -1,
        timestamps=options.timestamps,
    )
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ClientError(f"cannot read {path}: {error.strerror}") from error
    try:
        ring = Ring(lambda offset, size: os.pread(fd, size, offset), decompress=_decompress)
        view = LogView(ring, wanted, tty=False)
        reader = FrameReader()

        def show(data: bytes) -> None:
            reader.feed(data)
            while (one := reader.next_frame()) is not None:
                write(int(one[0]), one[1])

        while data := view.read_some():
            show(data)
        show(view.rest(run_ended=True))
    except DataLoss as error:
        raise ClientError(f"{path}: {error.message}") from error
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise ClientError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    return 0


def _decompress(data: bytes) -> bytes:
    import zstandard

    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=COMPRESSED_MAX_BYTES << 3)
        return decompressor.decompress(data, max_output_size=COMPRESSED_MAX_BYTES)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _nanoseconds(text: str) -> int:
    return int(float(parse_moment(text)) * 1e9) if text else 0


# --- stats ----------------------------------------------------------------------------------------------------


def run_stats(client: Client, options: argparse.Namespace) -> int:
    names = options.container
    shown: dict[str, dict[str, Any]] = {}
    if names:
        for name in names:
            client.call("GET", f"/containers/{name}/json")  # an unknown one is an error at once
    if options.no_stream:
        _print_stats([_stats_row(client.call("GET", f"/containers/{one}/stats", {"stream": False}), options)
                      for one in names or _running(client, options)], options)  # fmt: skip
        return 0
    followed: set[str] = set()

    def follow(name: str) -> None:
        try:
            for one in client.request("GET", f"/containers/{name}/stats", {"stream": True}).objects():
                shown[name] = _stats_row(one, options)
        except (ClientError, OSError, ValueError):
            pass
        shown.pop(name, None)
        followed.discard(name)

    while True:
        for name in names or _running(client, options):
            if name not in followed:
                followed.add(name)
                threading.Thread(target=follow, args=(name,), daemon=True).start()
        time.sleep(FRAME_S)
        if sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        _print_stats([shown[name] for name in sorted(shown)], options)
        if names and not followed:
            return 0


def _running(client: Client, options: argparse.Namespace) -> list[str]:
    return [one["Id"] for one in client.call("GET", "/containers/json", {"all": options.all})]


def _stats_row(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Source: docker/cli cli/command/container/stats_helpers.go."""
    cpu, before = found["cpu_stats"], found["precpu_stats"]
    spent = cpu["cpu_usage"]["total_usage"] - before["cpu_usage"]["total_usage"]
    system = cpu.get("system_cpu_usage", 0) - before.get("system_cpu_usage", 0)
    percent = 100 * spent / system * (cpu.get("online_cpus", 0) or 1) if system > 0 and spent > 0 else 0.0
    memory = found["memory_stats"]
    counters = memory.get("stats", {})
    used = memory.get("usage", 0)
    cache = counters.get("total_inactive_file", counters.get("inactive_file", 0))
    used -= cache if cache < used else 0
    limit = memory.get("limit", 0)
    networks = found.get("networks", {}).values()
    blocks = found["blkio_stats"].get("io_service_bytes_recursive") or []

    def done(operation: str) -> int:
        return int(sum(one["value"] for one in blocks if one["op"].lower() == operation))

    received, sent = (sum(one[key] for one in networks) for key in ("rx_bytes", "tx_bytes"))
    return {
        "ID": found["id"] if options.no_trunc else short_id(found["id"]),
        "Container": short_id(found["id"]),
        "Name": found["name"].lstrip("/"),
        "CPUPerc": f"{percent:.2f}%",
        "MemUsage": f"{_binary(used)} / {_binary(limit)}",
        "MemPerc": f"{100 * used / limit if limit else 0:.2f}%",
        "NetIO": f"{human_size(received, 3)} / {human_size(sent, 3)}",
        "BlockIO": f"{human_size(done('read'), 3)} / {human_size(done('write'), 3)}",
        "PIDs": str(found["pids_stats"].get("current", 0)),
    }


def _binary(count: float) -> str:
    """Source: docker/go-units BytesSize."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    index = 0
    while count >= 1024 and index < len(units) - 1:
        count, index = count / 1024, index + 1
    return f"{count:.4g}{units[index]}"


def _print_stats(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    titles = {
        "ID": "CONTAINER ID", "CPUPerc": "CPU %", "MemUsage": "MEM USAGE / LIMIT", "MemPerc": "MEM %",
        "NetIO": "NET I/O", "BlockIO": "BLOCK I/O",
    }  # fmt: skip
    columns = ["ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs"]
    print_rows(rows, columns, titles, options.format)
    sys.stdout.flush()


# --- support-bundle -------------------------------------------------------------------------------------------


class _Bundle:
    """A tar of texts, each without secrets."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._known: set[str] = set()  # values that were hidden somewhere: they are hidden everywhere
        self._texts: dict[str, str] = {}
        self.problems: list[str] = []

    def add(self, name: str, text: str) -> None:
        self._texts[name] = text

    def add_json(self, name: str, value: Any) -> None:
        self.add(name, json.dumps(self.without_secrets(value), indent=1, ensure_ascii=False) + "\n")

    def attempt(self, name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make` gives goes in as JSON or text; what fails is told in the bundle."""
        try:
            value = make(*arguments)
        except Exception as error:  # one missing part must not cost the others
            self.problems.append(f"{name}: {error}")
            return None
        if isinstance(value, str):
            self.add(name, value)
        else:
            self.add_json(name, value)
        return value

    def without_secrets(self, value: Any, name: str = "") -> Any:
        """The same JSON; variables, labels and options are known by their names, values by what they look like."""
        if isinstance(value, dict):
            return {key: self.without_secrets(one, str(key)) for key, one in value.items()}
        if isinstance(value, list):
            return [self._item(one, name) for one in value]
        if isinstance(value, str) and value and name and SECRET.search(name):
            return self._hide(value)
        return value

    def _item(self, value: Any, name: str) -> Any:
        if isinstance(value, str) and name in ("Env", "Args", "Cmd", "Entrypoint", "Labels", "Options"):
            key, separator, rest = value.partition("=")
            if name == "Env" and separator and key not in ("PATH", "HOME", "LANG", "TERM", "HOSTNAME"):
                return f"{key}={self._hide(rest)}"  # nobody can tell which of these is one
            if separator and SECRET.search(key):
                return f"{key}={self._hide(rest)}"
        return self.without_secrets(value, name)

    def _hide(self, value: str) -> str:
        if len(value) >= 6:
            self._known.add(value)
        return HIDDEN

    def close(self) -> None:
        import gzip
        import tarfile

        self.add("problems.txt", "".join(f"{line}\n" for line in self.problems))
        with (
            gzip.GzipFile(fileobj=self._file, mode="wb", mtime=0) as compressed,
            tarfile.open(fileobj=compressed, mode="w") as tar,
        ):
            for name, text in self._texts.items():
                data = self._clean(text).encode("utf-8", "surrogateescape")
                entry = tarfile.TarInfo(f"support-bundle/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                tar.addfile(entry, io.BytesIO(data))

    def _clean(self, text: str) -> str:
        for value in sorted(self._known, key=len, reverse=True):
            text = text.replace(value, HIDDEN)
        for pattern, instead in IN_TEXT:
            text = pattern.sub(instead, text)
        return text


def run_support_bundle(client: Client, options: argparse.Namespace) -> int:
    name = options.output or time.strftime("balenapy-support-%Y%m%d-%H%M%S.tar.gz")
    if name == "-":
        _fill(_Bundle(sys.stdout.buffer), client, options)
        return 0
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ClientError(f"cannot write {name}: {error.strerror}") from error
    with open(fd, "wb") as file:
        _fill(_Bundle(file), client, options)
    print(name)
    return 0


def _fill(bundle: _Bundle, client: Client, options: argparse.Namespace) -> None:
    def ask(name: str, path: str, **query: Any) -> Any:
        return bundle.attempt(f"engine/{name}.json", client.call, "GET", path, query)

    ask("version", "/version")
    if ask("info", "/info", memory=True) is not None:
        ask("images", "/images/json", all=True)
        ask("networks", "/networks")
        ask("volumes", "/volumes")
        ask("disk", "/system/df", disk=True)
        bundle.attempt("engine/events.json", _events, client)
        for one in ask("containers", "/containers/json", all=True) or ():
            place = f"containers/{one['Names'][0].strip('/') if one['Names'] else one['Id'][:12]}"
            path = f"/containers/{one['Id']}/json"
            found = bundle.attempt(f"{place}/inspect.json", client.call, "GET", path, {"size": True})
            if found is not None:
                bundle.attempt(f"{place}/log.txt", _log_text, client, one["Id"], found["Config"]["Tty"])
    else:
        for path in sorted(_rings(options.data_root)):
            bundle.attempt(f"containers/{path.split(os.sep)[-2][:12]}/log.txt", _ring_text, path)
    bundle.attempt("config/daemon.json", _json_file, options.config_file)
    for path in HOST_FILES:
        bundle.attempt(f"host/{path.strip('/').replace('/', '-')}.txt", _text_file, path)
    for name, command in HOST_TOOLS.items():
        bundle.attempt(f"host/{name}", _tool, command)
    bundle.close()


def _events(client: Client) -> list[dict[str, Any]]:
    """Those that the engine remembers."""
    query = {"since": "1", "until": f"{time.time():.9f}"}
    return list(client.request("GET", "/events", query).objects())


def _log_text(client: Client, container_id: str, tty: bool) -> str:
    from balenapy.core.stdcopy import FrameReader

    query = {"stdout": True, "stderr": True, "timestamps": True, "tail": str(LOG_TAIL)}
    try:
        data = client.request("GET", f"/containers/{container_id}/logs", query).read()
    except EngineAnswer as error:
        return f"{error}\n"
    if tty:
        return data.decode("utf-8", "replace")
    reader, text = FrameReader(), bytearray()
    reader.feed(data)
    while (one := reader.next_frame()) is not None:
        text += one[1]
    return text.decode("utf-8", "replace")


def _rings(data_root: str) -> list[str]:
    directory = os.path.join(data_root, "containers")
    try:
        found = [os.path.join(directory, name, "ring.log") for name in os.listdir(directory)]
    except OSError:
        return []
    return [path for path in found if os.path.exists(path)]


def _ring_text(path: str) -> str:
    text = bytearray()
    options = argparse.Namespace(since="", until="", tail=str(LOG_TAIL), timestamps=True)
    show_ring(path, options, lambda stream, data: text.extend(data))
    return text.decode("utf-8", "replace")


def _text_file(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.read(1 << 20)


def _json_file(path: str) -> Any:
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        return json.load(file)


def _tool(command: list[str]) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TOOL_TIMEOUT_S,
        check=False,
    )  # fmt: skip
    return done.stdout[-(4 << 20) :] + done.stderr[-4096:]
