"""Flags and daemon.json -> one frozen `Config`. Standard library only.

Names are those dockerd 18.09 and balena-engine users know. `OPTIONS` is the one table: the command line, the
configuration file, the README's table (a test compares them) and what SIGHUP may change all come from it.
An unknown flag or key is refused by name, and so is an option given in both places.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from balenapy.errors import EngineError
from balenapy.version import API_VERSION, MAX_COMPAT_API_VERSION

DEFAULT_HOSTS = ("unix:///var/run/balena-engine.sock", "unix:///var/run/balena.sock")
DEFAULT_CONFIG_FILE = "/etc/balena-engine/daemon.json"
DELTA_MODES = ("auto", "require", "off")  # core/deltaplan says what they mean
LOG_DRIVERS = ("json-file", "local", "journald", "syslog", "none")
LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")
ULIMIT_NAMES = frozenset(
    "core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack".split()
)


class UsageError(EngineError):
    """The command line or the configuration file is wrong: the daemon does not start."""


@dataclass(frozen=True, slots=True)
class Ulimit:
    """One resource limit; -1 is unlimited."""

    name: str
    soft: int
    hard: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """Room that pulls leave on the disk: a share of it in percent, or bytes."""

    percent: float = 0.0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the daemon was told, checked. Modules get the values they need, not the whole."""

    config_file: Path = Path(DEFAULT_CONFIG_FILE)
    hosts: tuple[str, ...] = ()
    data_root: Path = Path("/var/lib/balena-engine")
    exec_root: Path = Path("/var/run/balena-engine")
    pidfile: Path = Path("/var/run/balena-engine.pid")
    group: str = ""
    debug: bool = False
    log_level: str = "info"
    log_driver: str = "json-file"
    log_opts: Mapping[str, str] = field(default_factory=dict)
    log_budget: int = 256 << 20
    log_flush_interval_s: float = 8.0
    log_flush_size: int = 256 << 10
    memory_budget: int = 0
    metrics_addr: str = ""
    labels: tuple[str, ...] = ()
    experimental: bool = False
    live_restore: bool = True
    shutdown_timeout_s: int = 15
    api_cors_header: str = ""
    api_compat: str = API_VERSION

    tls: bool = False
    tls_verify: bool = False
    tls_ca_cert: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    allow_insecure_tcp: bool = False

    bridge: str = ""
    bip: str = ""
    ipv6: bool = False
    fixed_cidr: str = ""
    fixed_cidr_v6: str = ""
    default_gateway: str = ""
    default_gateway_v6: str = ""
    default_address_pools: tuple[str, ...] = ()
    mtu: int = 1500
    ip: str = "0.0.0.0"
    icc: bool = True
    ip_masq: bool = True
    ip_forward: bool = True
    iptables: bool = True
    userland_proxy: bool = False
    dns: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    dns_opts: tuple[str, ...] = ()

    insecure_registries: tuple[str, ...] = ()
    registry_mirrors: tuple[str, ...] = ()
    max_concurrent_downloads: int = 3
    max_concurrent_uploads: int = 5
    max_download_attempts: int = 10
    max_upload_attempts: int = 5

    pull_reserve: Reserve | None = None
    scrub_interval_h: int = 0
    scrub_rate: int = 4 << 20

    storage_driver: str = "overlay2"
    storage_opts: tuple[str, ...] = ()
    delta_mode: str = "auto"
    delta_memory: int = 48 << 20
    delta_data_root: str = ""
    delta_storage_driver: str = ""
    delta_storage_opts: tuple[str, ...] = ()

    default_runtime: str = "runc"
    runtimes: Mapping[str, str] = field(default_factory=dict)
    cgroup_driver: str = "cgroupfs"
    cgroup_parent: str = ""
    default_ulimits: Mapping[str, Ulimit] = field(default_factory=dict)
    cdi_directories: tuple[str, ...] = ()  # () is the standard's: /etc/cdi, /var/run/cdi
    default_shm_size: int = 64 << 20
    default_ipc_mode: str = "shareable"
    init: bool = False
    init_path: str = ""
    no_new_privileges: bool = False
    seccomp_profile: str = ""
    oom_score_adjust: int = 0


# Values: text (from the command line) or JSON (from the file) -> what the field holds.


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def _path(value: object) -> Path:
    text = _text(value)
    if not text:
        raise ValueError("must not be empty")
    return Path(os.path.abspath(text))


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("1", "t", "true"):
        return True
    if isinstance(value, str) and value.lower() in ("0", "f", "false"):
        return False
    raise ValueError(f"invalid syntax: {value!r} is not true or false")


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("must be a number")
    return int(value)


def _positive(value: object) -> int:
    number = _integer(value)
    if number < 1:
        raise ValueError(f"invalid value {number}: must be at least 1")
    return number


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)i?b?", re.ASCII)


def parse_size(text: str) -> int:
    """`64m`, `1.5g`, `4096` -> bytes, with binary multiples.

    Raises: ValueError. Source: docker/go-units RAMInBytes.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"invalid size: '{text}'")
    return int(float(match[1]) * 1024 ** " kmgtp".index(match[2] or " "))


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return parse_size(_text(value))


def _reserve(value: object) -> Reserve:
    """`64m`, or `5%` of the disk."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
    if not text.endswith("%"):
        return Reserve(size_bytes=parse_size(text))
    percent = float(text[:-1])
    if not 0 <= percent < 100:
        raise ValueError(f"invalid share of the disk: '{text}'")
    return Reserve(percent)


def _delta_mode(value: object) -> str:
    text = _text(value)
    if text not in DELTA_MODES:
        raise ValueError(f"{text!r} is none of {', '.join(DELTA_MODES)}")
    return text


def _delta_memory(value: object) -> int:
    size = _size(value)
    if size < 16 << 20:
        raise ValueError(f"invalid size {size}: a delta needs at least 16m")
    return size


def _natural(value: object) -> int:
    number = _integer(value)
    if number < 0:
        raise ValueError(f"invalid value {number}: must not be negative")
    return number


def _address(value: object) -> str:
    text = _text(value)
    ipaddress.ip_address(text)
    return text


def _interface(value: object) -> str:
    text = _text(value)
    if text:
        ipaddress.IPv4Interface(text)
    return text


def _network(value: object) -> str:
    text = _text(value)
    if text:
        ipaddress.IPv4Network(text, strict=False)
    return text


def _network6(value: object) -> str:
    text = _text(value)
    if text:
        ipaddress.IPv6Network(text, strict=False)
    return text


def _gateway(value: object) -> str:
    text = _text(value)
    return str(ipaddress.IPv4Address(text)) if text else text


def _gateway6(value: object) -> str:
    text = _text(value)
    return str(ipaddress.IPv6Address(text)) if text else text


def _log_level(value: object) -> str:
    text = _text(value)
    if text not in LOG_LEVELS:
        raise ValueError(f"Unable to parse logging level: {text}")
    return text


def _api_compat(value: object) -> str:
    """A version between ours and the last one whose changes we know."""
    text = _text(value)
    lowest, highest = (int(known.removeprefix("1.")) for known in (API_VERSION, MAX_COMPAT_API_VERSION))
    if not re.fullmatch(r"1\.[0-9]{2}", text, re.ASCII) or not lowest <= int(text[2:]) <= highest:
        raise ValueError(f"invalid API version '{text}': must be between {API_VERSION} and {MAX_COMPAT_API_VERSION}")
    return text


def _label(value: object) -> str:
    text = _text(value)
    if "=" not in text:
        raise ValueError(f"bad attribute format: {text}")
    return text


def _storage_driver(value: object) -> str:
    text = _text(value)
    if text not in ("overlay2", "overlay"):
        raise ValueError(f"driver not supported: {text} (this engine has overlay2)")
    return "overlay2"


def _ipc_mode(value: object) -> str:
    text = _text(value)
    if text not in ("shareable", "private"):
        raise ValueError(f"IPC mode {text!r} is not supported as default value")
    return text


def _metrics_address(value: object) -> str:
    """`:9323`, `127.0.0.1:9323`, `[::1]:9323` or `unix:///run/x.sock`."""
    text = _text(value)
    if not text or re.fullmatch(r"unix:///.+", text):
        return text
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]*):(\d{1,5})", text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError(f"invalid address {text!r}: must be HOST:PORT or unix://PATH")
    return text


def _seconds(value: object) -> float:
    """`8`, `0.5`, `8s`."""
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float(_text(value).removesuffix("s"))
    if not 0 < number <= 3600:
        raise ValueError(f"invalid value {value}: must be more than 0 and at most 3600 seconds")
    return number


def _log_driver(value: object) -> str:
    text = _text(value)
    if text not in LOG_DRIVERS:
        raise ValueError(f"logger: no log driver named '{text}' is registered")
    return text


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"invalid value {text!r}: must be KEY=VALUE")
    return key, value


def parse_ulimit(text: str) -> Ulimit:
    """`nofile=1024:2048` or `core=-1`.

    Raises: ValueError. Source: docker/go-units ParseUlimit.
    """
    name, value = _pair(text)
    soft, separator, hard = value.partition(":")
    return _checked_ulimit(name, int(soft), int(hard) if separator else int(soft))


def _checked_ulimit(name: str, soft: int, hard: int) -> Ulimit:
    if name not in ULIMIT_NAMES:
        raise ValueError(f"invalid ulimit type: {name}")
    if hard != -1 and (soft == -1 or soft > hard):
        raise ValueError(f"ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}")
    return Ulimit(name, soft, hard)


# A group option collects several values; `flag` reads one of the command line, `load` the whole JSON value.


def _list(item: Callable[[object], str]) -> Callable[[object], tuple[str, ...]]:
    def load(value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError("must be a list of strings")
        return tuple(item(one) for one in value)

    return load


def _log_opts(value: object) -> dict[str, str]:
    if isinstance(value, list):
        return dict(_pair(one) for one in value)
    if isinstance(value, dict) and all(isinstance(one, str) for one in value.values()):
        return dict(value)
    raise ValueError("must be an object of strings")


def _runtimes(value: object) -> dict[str, str]:
    if isinstance(value, list):
        return dict(_pair(one) for one in value)
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    runtimes = {}
    for name, description in value.items():
        if not isinstance(description, dict) or not isinstance(description.get("path"), str):
            raise ValueError(f"runtime {name!r} must have a path")
        if description.get("runtimeArgs"):
            raise ValueError(f"runtime {name!r}: runtimeArgs is not supported")
        runtimes[name] = description["path"]
    return runtimes


def _ulimits(value: object) -> dict[str, Ulimit]:
    if isinstance(value, list):
        return {limit.name: limit for limit in map(parse_ulimit, value)}
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    found = {}
    for name, description in value.items():
        if not isinstance(description, dict):
            raise ValueError(f"ulimit {name!r} must be an object with Soft and Hard")
        lower = {key.lower(): number for key, number in description.items()}
        found[name] = _checked_ulimit(name, _integer(lower.get("soft", 0)), _integer(lower.get("hard", 0)))
    return found


def _exec_opts(value: object) -> str:
    """`native.cgroupdriver=X` is the only one; the field holds X."""
    driver = "cgroupfs"
    for one in _list(_text)(value):
        key, setting = _pair(one)
        if key != "native.cgroupdriver":
            raise ValueError(f"invalid option: {key}")
        if setting not in ("cgroupfs", "systemd"):
            raise ValueError(f"invalid cgroup driver: {setting}")
        driver = setting
    return driver


def _address_pools(value: object) -> tuple[str, ...]:
    """`base=10.0.0.0/8,size=24` each; the file may hold objects with the same keys."""
    if not isinstance(value, list):
        raise ValueError("must be a list")
    pools = []
    for one in value:
        text = one if isinstance(one, str) else f"base={one.get('base')},size={one.get('size')}"
        parts = dict(_pair(part) for part in text.split(","))
        network = ipaddress.ip_network(parts.get("base", ""))
        size = int(parts.get("size", "-1"))
        if not network.prefixlen <= size <= network.max_prefixlen:
            raise ValueError(f"invalid pool: {text}")
        pools.append(f"{network}:{size}")
    return tuple(pools)


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: its flag, its daemon.json key, the `Config` field it fills, and how its value is read."""

    flag: str
    field: str
    load: Callable[[object], object]
    help: str
    key: str = ""  # in daemon.json; "" means the flag's name; "-" means flag only
    short: str = ""
    kind: str = "value"  # value | switch | group
    reloadable: bool = False
    ignored: bool = False  # accepted because tools pass it, has no effect here (the help says why)

    @property
    def file_key(self) -> str:
        return self.key or self.flag


OPTIONS: tuple[Option, ...] = (
    Option("host", "hosts", _list(_text), "socket to listen on: unix://, tcp://, fd:// (repeatable)", "hosts", "H", "group"),
    Option("config-file", "config_file", _path, "configuration file", "-"),
    Option("data-root", "data_root", _path, "directory of images, containers and volumes"),
    Option("graph", "data_root", _path, "old name of --data-root", short="g"),
    Option("exec-root", "exec_root", _path, "directory of run time state (on tmpfs)"),
    Option("pidfile", "pidfile", _path, "file that holds the daemon's process id", short="p"),
    Option("group", "group", _text, "group that owns the unix sockets (default: balena-engine, else docker)", short="G"),
    Option("debug", "debug", _boolean, "log at debug level", short="D", kind="switch", reloadable=True),
    Option("log-level", "log_level", _log_level, "debug, info, warn, error or fatal", short="l"),
    Option("log-driver", "log_driver", _log_driver, "default log driver of containers: json-file, local, journald, syslog, none"),
    Option("log-opt", "log_opts", _log_opts, "default log driver option KEY=VALUE", "log-opts", kind="group"),
    Option("log-budget", "log_budget", _size, "bytes that the ring logs of all containers may take (default 256m; 0: no bound)", reloadable=True),
    Option("log-flush-interval", "log_flush_interval_s", _seconds,
           "seconds of log that a power cut may cost (default 8); more spares the flash", reloadable=True),
    Option("log-flush-size", "log_flush_size", _size, "bytes of a container's log that wait in memory at most (default 256k)", reloadable=True),
    Option("memory-budget", "memory_budget", _size,
           "memory that the engine with its workers may use; less lowers how much it does at once (default: a quarter)"),
    Option("metrics-addr", "metrics_addr", _metrics_address,
           "HOST:PORT or unix://PATH that serves /metrics and a read-only status page (default: none)"),
    Option("label", "labels", _list(_label), "KEY=VALUE label of this daemon", "labels", kind="group", reloadable=True),
    Option("experimental", "experimental", _boolean, "allow experimental features", kind="switch"),
    Option("live-restore", "live_restore", _boolean, "accepted: containers always outlive the daemon", kind="switch", reloadable=True, ignored=True),
    Option("shutdown-timeout", "shutdown_timeout_s", _integer, "seconds a clean stop may take", reloadable=True),
    Option("api-cors-header", "api_cors_header", _text, "Access-Control-Allow-Origin of the API"),
    Option("api-compat", "api_compat", _api_compat, "highest API version that newer clients may ask for, up to 1.44 (default 1.39)"),
    Option("tls", "tls", _boolean, "use TLS on tcp:// (implied by --tlsverify)", kind="switch"),
    Option("tlsverify", "tls_verify", _boolean, "use TLS on tcp:// and demand a client certificate", kind="switch"),
    Option("tlscacert", "tls_ca_cert", _path, "trust client certificates signed by this CA"),
    Option("tlscert", "tls_cert", _path, "server certificate"),
    Option("tlskey", "tls_key", _path, "server key"),
    Option("allow-insecure-tcp", "allow_insecure_tcp", _boolean,
           "listen on tcp:// beyond loopback without --tlsverify: whoever reaches the port is root", kind="switch"),
    Option("bridge", "bridge", _text, "default bridge interface (default balena0; none: no default network)", short="b"),
    Option("bip", "bip", _interface, "address and prefix of the default bridge"),
    Option("fixed-cidr", "fixed_cidr", _network, "container addresses on the default bridge are taken from here"),
    Option("ipv6", "ipv6", _boolean, "the default bridge has IPv6 too; --fixed-cidr-v6 says which", kind="switch"),
    Option("fixed-cidr-v6", "fixed_cidr_v6", _network6, "IPv6 subnet of the default bridge"),
    Option("default-gateway", "default_gateway", _gateway, "default gateway of containers on the default bridge"),
    Option("default-gateway-v6", "default_gateway_v6", _gateway6, "the same for IPv6"),
    Option("default-address-pool", "default_address_pools", _address_pools,
           "base=CIDR,size=N pool for networks without a subnet", "default-address-pools", kind="group"),
    Option("mtu", "mtu", _integer, "MTU of container networks"),
    Option("ip", "ip", _address, "host address that published ports bind by default"),
    Option("icc", "icc", _boolean, "containers on the default bridge may talk to each other (default true)", kind="switch"),
    Option("ip-masq", "ip_masq", _boolean, "masquerade what leaves the default bridge (default true)", kind="switch"),
    Option("ip-forward", "ip_forward", _boolean, "switch net.ipv4.ip_forward on (default true)", kind="switch"),
    Option("iptables", "iptables", _boolean, "write firewall rules, into an nftables table of our own (default true)", kind="switch"),
    Option("userland-proxy", "userland_proxy", _boolean, "accepted: published ports need no proxy here", kind="switch", ignored=True),
    Option("dns", "dns", _list(_address), "DNS server of containers", kind="group"),
    Option("dns-search", "dns_search", _list(_text), "DNS search domain of containers", kind="group"),
    Option("dns-opt", "dns_opts", _list(_text), "resolver option of containers", "dns-opts", kind="group"),
    Option("insecure-registry", "insecure_registries", _list(_text), "registry, or CIDR, that may be asked without verified TLS",
           "insecure-registries", kind="group", reloadable=True),
    Option("registry-mirror", "registry_mirrors", _list(_text), "mirror asked before Docker Hub", "registry-mirrors",
           kind="group", reloadable=True),
    Option("max-concurrent-downloads", "max_concurrent_downloads", _positive, "layers downloaded at once by one pull", reloadable=True),
    Option("max-concurrent-uploads", "max_concurrent_uploads", _positive, "layers uploaded at once by one push", reloadable=True),
    Option("max-download-attempts", "max_download_attempts", _positive, "attempts for each download", reloadable=True),
    Option("max-upload-attempts", "max_upload_attempts", _positive, "attempts for each upload", reloadable=True),
    Option("pull-reserve", "pull_reserve", _reserve, "free room that a pull leaves on the disk: SIZE or PERCENT% (default 5%, at most 64m)",
           reloadable=True),
    Option("scrub-interval", "scrub_interval_h", _natural, "hours between two background checks of all layers (default 0: none)",
           reloadable=True),
    Option("scrub-rate", "scrub_rate", _size, "bytes a second that the background check reads (default 4m; 0: no bound)", reloadable=True),
    Option("storage-driver", "storage_driver", _storage_driver, "overlay2", short="s"),
    Option("storage-opt", "storage_opts", _list(_text), "accepted: there is nothing to set", "storage-opts", kind="group", ignored=True),
    Option("delta-mode", "delta_mode", _delta_mode, "whether pulls look for deltas: auto (and fall back), require, off (default auto)",
           reloadable=True),
    Option("delta-memory", "delta_memory", _delta_memory, "memory that applying a delta may take (default 48m, at least 16m)",
           reloadable=True),
    Option("delta-data-root", "delta_data_root", _text, "another store, read only, whose images may be bases of deltas: ours or balena-engine's"),
    Option("delta-storage-driver", "delta_storage_driver", _text, "accepted: the store's layout tells it", ignored=True),
    Option("delta-storage-opt", "delta_storage_opts", _list(_text), "accepted: there is nothing to set", "delta-storage-opts",
           kind="group", ignored=True),
    Option("default-runtime", "default_runtime", _text, "OCI runtime used by default", reloadable=True),
    Option("add-runtime", "runtimes", _runtimes, "NAME=PATH of another OCI runtime", "runtimes", kind="group", reloadable=True),
    Option("exec-opt", "cgroup_driver", _exec_opts, "native.cgroupdriver=cgroupfs or systemd", "exec-opts", kind="group"),
    Option("cgroup-parent", "cgroup_parent", _text, "parent cgroup of containers"),
    Option("default-ulimit", "default_ulimits", _ulimits, "NAME=SOFT[:HARD] for containers", "default-ulimits", kind="group"),
    Option("cdi-spec-dir", "cdi_directories", _list(_text), "directory of CDI files, for --device VENDOR/CLASS=NAME (default /etc/cdi, /var/run/cdi)",
           "cdi-spec-dirs", kind="group"),
    Option("default-shm-size", "default_shm_size", _size, "size of /dev/shm of containers"),
    Option("default-ipc-mode", "default_ipc_mode", _ipc_mode, "shareable or private"),
    Option("init", "init", _boolean, "run an init in every container", kind="switch"),
    Option("init-path", "init_path", _text, "the init binary (default: the first of balena-engine-init, docker-init, tini)"),
    Option("no-new-privileges", "no_new_privileges", _boolean, "set no_new_privs in every container", kind="switch"),
    Option("seccomp-profile", "seccomp_profile", _text, "file with the default seccomp profile"),
    Option("oom-score-adjust", "oom_score_adjust", _integer, "OOM score of the daemon"),
)  # fmt: skip

_BY_KEY = {option.file_key: option for option in OPTIONS if option.file_key != "-"}
RELOADABLE = frozenset(option.field for option in OPTIONS if option.reloadable)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            name = unknown[1].partition("=")[0]
            kind = "flag" if name.startswith("-") else "command"
            raise UsageError(f"unknown {kind}: {name}\nSee 'balenapyd --help'.")
        raise UsageError(f"{message}\nSee 'balenapyd --help'.")


def _parser() -> argparse.ArgumentParser:
    from balenapy.version import ENGINE_VERSION

    parser = _Parser(
        prog="balenapyd", allow_abbrev=False, description="A fleet container engine: Docker Engine API v1.39."
    )
    parser.add_argument("-v", "--version", action="version", version=f"balenapyd version {ENGINE_VERSION}")
    for option in OPTIONS:
        names = [f"--{option.flag}"] + ([f"-{option.short}"] if option.short else [])
        settings: dict[str, Any] = {"dest": option.flag, "help": option.help, "default": None}
        if option.kind == "switch":
            parser.add_argument(*names, nargs="?", const="true", metavar="true|false", **settings)
        else:
            action = "append" if option.kind == "group" else "store"
            parser.add_argument(*names, action=action, metavar="VALUE", **settings)
    return parser


def _read_file(path: Path, required: bool) -> dict[str, object]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        if required:
            raise UsageError(f"unable to configure the daemon with file {path}: no such file or directory") from None
        return {}
    except OSError as error:
        raise UsageError(f"unable to configure the daemon with file {path}: {error}") from error
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise UsageError(f"unable to configure the daemon with file {path}: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"unable to configure the daemon with file {path}: not a JSON object")
    unknown = sorted(found.keys() - _BY_KEY.keys())
    if unknown:
        raise UsageError(
            f"unable to configure the daemon with file {path}: "
            f"the following directives don't match any configuration option: {', '.join(unknown)}"
        )
    return found


def parse(arguments: Sequence[str]) -> Config:
    """Command line (without the program's name) and the file it names -> Config.

    Raises: UsageError, with text for the terminal; SystemExit after --help and --version.
    """
    given = {name: value for name, value in vars(_parser().parse_args(arguments)).items() if value is not None}
    explicit = given.get("config-file")
    path = Path(explicit or DEFAULT_CONFIG_FILE)
    in_file = _read_file(path, required=explicit is not None)
    both = [
        f"{option.file_key}: (from flag: {given[option.flag]}, from file: {in_file[option.file_key]})"
        for option in OPTIONS
        if option.flag in given and option.file_key in in_file
    ]
    if both:
        raise UsageError(
            f"unable to configure the daemon with file {path}: "
            f"the following directives are specified both as a flag and in the configuration file: {', '.join(both)}"
        )
    values: dict[str, Any] = {}
    for option in OPTIONS:
        for source, where in (
            (given.get(option.flag), f'invalid argument for "--{option.flag}" flag'),
            (in_file.get(option.file_key), f"{path}: {option.file_key}"),
        ):
            if source is None:
                continue
            try:
                values[option.field] = option.load(source)
            except (ValueError, TypeError, AttributeError) as error:
                raise UsageError(f"{where}: {error}") from error
    return check(Config(**values | {"config_file": path}))


def check(config: Config) -> Config:
    """Fill what depends on other options and refuse what does not fit together.

    Unlike dockerd, --bridge and --bip go together: a bridge that does not exist yet is made with that address.
    """
    hosts = tuple(map(_listener, config.hosts)) or DEFAULT_HOSTS
    if config.tls_verify and not (config.tls_ca_cert and config.tls_cert and config.tls_key):
        raise UsageError("--tlsverify needs --tlscacert, --tlscert and --tlskey")
    if config.tls and not (config.tls_cert and config.tls_key):
        raise UsageError("--tls needs --tlscert and --tlskey")
    if config.ipv6 and not config.fixed_cidr_v6:
        raise UsageError("--ipv6 needs --fixed-cidr-v6: there is no default subnet of IPv6")
    for host in hosts:
        if host.startswith("tcp://") and not config.tls_verify and not config.allow_insecure_tcp:
            name, _ = split_tcp(host)
            if name != "localhost" and not (_is_address(name) and ipaddress.ip_address(name).is_loopback):
                raise UsageError(
                    f"{host} without --tlsverify makes root of whoever reaches it: "
                    "use --tlsverify or a loopback address, or say --allow-insecure-tcp as well"
                )
    if config.default_runtime != "runc" and config.default_runtime not in config.runtimes:
        raise UsageError(f"specified default runtime '{config.default_runtime}' does not exist")
    if config.seccomp_profile and not Path(config.seccomp_profile).is_file():
        raise UsageError(f"opening seccomp profile ({config.seccomp_profile}) failed: no such file")
    return replace(config, hosts=hosts, log_level="debug" if config.debug else config.log_level)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _listener(host: str) -> str:
    """`unix://PATH`, `tcp://HOST:PORT`, `fd://[NAME]`; a bare `HOST:PORT` is tcp and a bare path is refused.

    Source: moby opts/hosts.go: tcp without a host is localhost, ports 2375 and 2376 are the defaults.
    """
    scheme, separator, rest = host.partition("://")
    if not separator:
        scheme, rest = "tcp", host
    if scheme == "unix" and rest.startswith("/"):
        return f"unix://{rest}"
    if scheme == "unix" and not rest:
        return DEFAULT_HOSTS[0]
    if scheme == "fd":
        return f"fd://{rest}"
    if scheme == "tcp":
        name, port = split_tcp(f"tcp://{rest}")
        return f"tcp://{f'[{name}]' if ':' in name else name}:{port}"
    raise UsageError(f"Invalid bind address format: {host}")


def split_tcp(host: str) -> tuple[str, int]:
    """`tcp://name:port` -> (name, port), with dockerd's defaults for what is missing."""
    rest = host.removeprefix("tcp://")
    name, _, port = rest.rpartition(":") if re.search(r":\d*$", rest) else (rest, "", "")
    try:
        number = int(port or "2375")
    except ValueError:
        number = -1
    if not 0 < number < 65536 or "/" in name:
        raise UsageError(f"Invalid bind address format: {host}")
    return name.strip("[]") or "localhost", number


def reload(config: Config) -> tuple[Config, tuple[str, ...]]:
    """Read the configuration file again and take what may change without a restart.

    Returns the new Config and the names of the fields that changed.
    Raises: UsageError; the old configuration then stays in force.
    """
    in_file = _read_file(config.config_file, required=False)
    changes: dict[str, Any] = {}
    for option in OPTIONS:
        if option.reloadable and option.file_key in in_file:
            try:
                value = option.load(in_file[option.file_key])
            except (ValueError, TypeError, AttributeError) as error:
                raise UsageError(f"{config.config_file}: {option.file_key}: {error}") from error
            if value != getattr(config, option.field):
                changes[option.field] = value
    changed = replace(config, **changes)
    if "debug" in changes:
        changed = replace(changed, log_level="debug" if changed.debug else "info")
    return changed, tuple(changes)
