"""`/version` and `/info`: what this engine and this machine are.

Source: moby 18.09 daemon/info.go, daemon/info_unix.go, pkg/sysinfo.
"""

from __future__ import annotations

import base64
import os
import socket
import sqlite3
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from balenapy import __version__, version
from balenapy.core.container import Status
from balenapy.core.wire import rfc3339nano
from balenapy.engine.disk import disk_use
from balenapy.engine.memory import memory_facts
from balenapy.errors import EngineError, SystemFailure
from balenapy.linux.process import run_tool

if TYPE_CHECKING:
    from balenapy.config import Config
    from balenapy.engine.engine import Engine
    from balenapy.linux.cgroups import Cgroups

# uname -m -> Go's name
ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "armv8l": "arm",
    "i686": "386",
    "i386": "386",
}
RUNNING = (Status.RUNNING, Status.PAUSED, Status.RESTARTING)
ROOT_ACCESS = (
    "         Access to the remote API is equivalent to root access on the\n"
    "         host. Refer to the 'Docker daemon attack surface' section in the\n"
    "         documentation for more information: "
    "https://docs.docker.com/engine/security/security/#docker-daemon-attack-surface"
)


class Info:
    """What `/version` and `/info` tell. Facts that cannot change while we run are read once."""

    def __init__(self, engine: Engine) -> None:
        """Read or draw the engine's ID. Blocks: for start."""
        self._engine = engine
        self.id = _engine_id(engine)
        self._runc_version: str | None = None
        self._version = _version(engine.config)
        self._counting = False
        self._machine: _Machine | None = None  # read when somebody asks first

    def version(self) -> dict[str, Any]:
        return self._version

    async def info(self, *, memory: bool = False) -> dict[str, Any]:
        """
        Args:
            memory: tell what this process takes as well.
        """
        engine, config = self._engine, self._engine.config
        statuses = [container.state.status for container in engine.containers.all()]
        if self._machine is None:
            self._machine = await trio.to_thread.run_sync(
                _Machine, engine.runtimes.cgroups, config.data_root, limiter=engine.limiters.files
            )
        machine = self._machine
        machine.refresh()
        if self._runc_version is None:
            self._runc_version = await _runtime_version(engine.runtimes.get("").path)
        runtimes = engine.runtimes.paths
        return {
            "ID": self.id,
            "Containers": len(statuses),
            "ContainersRunning": sum(status in (Status.RUNNING, Status.RESTARTING) for status in statuses),
            "ContainersPaused": statuses.count(Status.PAUSED),
            "ContainersStopped": sum(status not in RUNNING for status in statuses),
            "Images": len(engine.images.all()),
            "Driver": "overlay2",
            "DriverStatus": [
                ["Backing Filesystem", machine.filesystem],
                ["Supports d_type", "true"],
                ["Native Overlay Diff", "true"],
            ],
            "SystemStatus": None,
            "Plugins": {
                "Volume": ["local"],
                "Network": ["bridge", "host", "ipvlan", "macvlan", "null"],
                "Authorization": None,
                "Log": ["journald", "json-file", "local", "syslog"],
            },
            **machine.limits,
            "IPv4Forwarding": machine.ipv4_forwarding,
            "BridgeNfIptables": machine.bridge_nf_iptables,
            "BridgeNfIp6tables": machine.bridge_nf_ip6tables,
            "Debug": config.debug,
            "NFd": len(os.listdir("/proc/self/fd")),
            "OomKillDisable": machine.oom_kill_disable,
            "NGoroutines": trio.lowlevel.current_statistics().tasks_living,
            "SystemTime": rfc3339nano(time.time_ns()),
            "LoggingDriver": config.log_driver,
            "CgroupDriver": config.cgroup_driver,
            "NEventsListener": engine.events.listener_count,
            "KernelVersion": os.uname().release,
            "OperatingSystem": machine.operating_system,
            "OSType": "linux",
            "Architecture": os.uname().machine,
            "IndexServerAddress": "https://index.docker.io/v1/",
            "RegistryConfig": _registry_config(config),
            "NCPU": len(os.sched_getaffinity(0)),
            "MemTotal": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "GenericResources": None,
            "DockerRootDir": str(config.data_root),
            "HttpProxy": _proxy("http_proxy"),
            "HttpsProxy": _proxy("https_proxy"),
            "NoProxy": _proxy("no_proxy"),
            "Name": socket.gethostname(),
            "Labels": list(config.labels),
            "ExperimentalBuild": config.experimental,
            "ServerVersion": version.ENGINE_VERSION,
            "ClusterStore": "",
            "ClusterAdvertise": "",
            "Runtimes": {name: {"path": path} for name, path in sorted({"bare": "", **runtimes}.items())},
            "DefaultRuntime": engine.runtimes.default,
            "Swarm": {
                "NodeID": "",
                "NodeAddr": "",
                "LocalNodeState": "",
                "ControlAvailable": False,
                "Error": "",
                "RemoteManagers": None,
            },
            "LiveRestoreEnabled": config.live_restore,
            "Isolation": "",
            "InitBinary": Path(config.init_path or "tini").name,
            "ContainerdCommit": {"ID": "", "Expected": ""},
            "RuncCommit": {"ID": self._runc_version, "Expected": self._runc_version},
            "InitCommit": {"ID": "", "Expected": ""},
            "SecurityOptions": self._security_options(),
            "Warnings": [*_api_warnings(config), *machine.warnings(), *engine.images.warnings()] or None,
            **({"Memory": await memory_facts(engine)} if memory else {}),  # ours
        }

    def _security_options(self) -> list[str]:
        facts, profile = self._engine.containers.host_facts, self._engine.config.seccomp_profile or "default"
        found = ["name=apparmor"] if facts.apparmor and facts.apparmor_default else []
        return [*found, f"name=seccomp,profile={profile}"] if facts.seccomp else found

    async def disk_usage(self, *, disk: bool = False) -> dict[str, Any]:
        """Sizes of everything; walks the trees of volumes and of containers' writable layers.

        Args:
            disk: tell what is taken on disk as well.
        Raises: SystemFailure, while another one is at it.
        """
        if self._counting:
            raise SystemFailure("a disk usage operation is already running")
        self._counting = True
        engine = self._engine
        try:
            layers_size, images = engine.images.disk_usage()
            return {
                "LayersSize": layers_size,
                "Images": images,
                "Containers": await engine.containers.summaries(everything=True, size=True),
                "Volumes": [
                    {
                        **engine.volumes.describe(usage.volume),
                        "UsageData": {"RefCount": usage.references, "Size": usage.size_bytes},
                    }
                    for usage in await engine.volumes.usage()
                ],
                "BuildCache": None,
                "BuilderSize": 0,
                # Ours: what unfinished pulls have staged. Absent when there is nothing, as everywhere else.
                **({"Ingests": ingests} if (ingests := engine.images.ingests()) else {}),
                **({"Disk": await disk_use(engine)} if disk else {}),  # ours too
            }
        finally:
            self._counting = False


class _Machine:
    """What the kernel can do and how it is set. Blocks: reads a dozen small files, and later three of /proc."""

    def __init__(self, cgroups: Cgroups, data_root: Path) -> None:
        self.cgroup_version = cgroups.version
        is_v2 = cgroups.version == 2
        self.limits = {
            "MemoryLimit": cgroups.has("memory"),
            "SwapLimit": _has_swap_limit(cgroups),
            "KernelMemory": _has_file(cgroups, "memory", "memory.kmem.limit_in_bytes"),
            "CpuCfsPeriod": (is_v2 and cgroups.has("cpu")) or _has_file(cgroups, "cpu", "cpu.cfs_period_us"),
            "CpuCfsQuota": (is_v2 and cgroups.has("cpu")) or _has_file(cgroups, "cpu", "cpu.cfs_quota_us"),
            "CPUShares": cgroups.has("cpu"),
            "CPUSet": cgroups.has("cpuset"),
        }
        self.oom_kill_disable = _has_file(cgroups, "memory", "memory.oom_control")
        self.operating_system = _operating_system()
        self.filesystem = _filesystem(data_root)
        self.refresh()

    def refresh(self) -> None:
        """Read what an administrator may change at any time."""
        self.ipv4_forwarding = _is_one("/proc/sys/net/ipv4/ip_forward")
        self.bridge_nf_iptables = _is_one("/proc/sys/net/bridge/bridge-nf-call-iptables")
        self.bridge_nf_ip6tables = _is_one("/proc/sys/net/bridge/bridge-nf-call-ip6tables")

    def warnings(self) -> list[str]:
        limits = self.limits
        # v2 has neither; 20.10 says nothing about them there.
        is_v1 = self.cgroup_version == 1
        checks = (
            (limits["MemoryLimit"], "No memory limit support"),
            (limits["SwapLimit"], "No swap limit support"),
            (limits["KernelMemory"] or not is_v1, "No kernel memory limit support"),
            (self.oom_kill_disable or not is_v1, "No oom kill disable support"),
            (limits["CpuCfsQuota"], "No cpu cfs quota support"),
            (limits["CpuCfsPeriod"], "No cpu cfs period support"),
            (limits["CPUShares"], "No cpu shares support"),
            (limits["CPUSet"], "No cpuset support"),
            (self.ipv4_forwarding, "IPv4 forwarding is disabled"),
            (self.bridge_nf_iptables, "bridge-nf-call-iptables is disabled"),
            (self.bridge_nf_ip6tables, "bridge-nf-call-ip6tables is disabled"),
        )
        return [f"WARNING: {text}" for is_there, text in checks if not is_there]


def _version(config: Config) -> dict[str, Any]:
    details = {
        "ApiVersion": config.api_compat,
        "Arch": ARCHITECTURES.get(os.uname().machine, os.uname().machine),
        "BuildTime": "",
        "Experimental": str(config.experimental).lower(),
        "GitCommit": f"balenapy-{__version__}",
        # Clients print this field and read nothing from it.
        "GoVersion": f"python{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}",
        "KernelVersion": os.uname().release,
        "MinAPIVersion": version.MIN_API_VERSION,
        "Os": "linux",
    }
    result: dict[str, Any] = {
        "Platform": {"Name": ""},
        "Components": [{"Name": "Engine", "Version": version.ENGINE_VERSION, "Details": details}],
        "Engine": version.ENGINE_NAME,
        "Version": version.ENGINE_VERSION,
    }
    for name in ("ApiVersion", "MinAPIVersion", "GitCommit", "GoVersion", "Os", "Arch", "KernelVersion"):
        result[name] = details[name]
    if config.experimental:
        result["Experimental"] = True
    result["BuildTime"] = details["BuildTime"]
    return result


def _engine_id(engine: Engine) -> str:
    """12 groups of 4 base32 characters, drawn once for a data root."""
    rows = engine.db.query("SELECT value FROM setting WHERE name = 'engine_id'")
    if rows:
        return str(rows[0][0])
    letters = base64.b32encode(os.urandom(30)).decode()
    drawn = ":".join(letters[index : index + 4] for index in range(0, 48, 4))

    def insert(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO setting VALUES ('engine_id', ?)", (drawn,))

    engine.db.transaction_nowait(insert)
    return drawn


async def _runtime_version(path: str) -> str:
    """The second word of what the runtime says about itself, `runc version 1.1.5`; "" when it says nothing."""
    try:
        words = (await run_tool([path, "--version"])).stdout.decode(errors="replace").split()
    except EngineError:
        return ""
    return words[2] if len(words) > 2 and words[1] == "version" else ""


def _registry_config(config: Config) -> dict[str, Any]:
    """Source: moby registry/config.go."""
    mirrors = [mirror.rstrip("/") + "/" for mirror in config.registry_mirrors]
    cidrs = [entry for entry in config.insecure_registries if "/" in entry]
    indexes = {"docker.io": {"Name": "docker.io", "Mirrors": mirrors, "Secure": True, "Official": True}}
    for entry in config.insecure_registries:
        if "/" not in entry:
            indexes[entry] = {"Name": entry, "Mirrors": [], "Secure": False, "Official": False}
    return {
        "AllowNondistributableArtifactsCIDRs": [],
        "AllowNondistributableArtifactsHostnames": [],
        "InsecureRegistryCIDRs": [*cidrs, "127.0.0.0/8"],
        "IndexConfigs": dict(sorted(indexes.items())),
        "Mirrors": mirrors,
    }


def _api_warnings(config: Config) -> list[str]:
    warnings = []
    for host in config.hosts:
        address = host.removeprefix("tcp://")
        if address == host or config.tls_verify:
            continue
        if config.tls:
            text = f"WARNING: API is accessible on https://{address} without TLS client verification."
        else:
            text = f"WARNING: API is accessible on http://{address} without encryption."
        warnings.append(f"{text}\n{ROOT_ACCESS}")
    return warnings


def _proxy(name: str) -> str:
    """The variable, without the password in it (moby maskCredentials)."""
    value = os.environ.get(name.upper()) or os.environ.get(name) or ""
    scheme, separator, rest = value.rpartition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}{separator}xxxxx:xxxxx@{host}" if at and credentials else value


def _filesystem(path: Path) -> str:
    # os.statvfs does not tell the type; mountinfo does, for the longest mount point above the path.
    best, kind = "", "<unknown>"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4]
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return "extfs" if kind in ("ext2", "ext3", "ext4") else "overlayfs" if kind == "overlay" else kind


def _has_file(cgroups: Cgroups, controller: str, name: str) -> bool:
    hierarchy = cgroups.controller_mount(controller)
    return hierarchy is not None and (hierarchy.mount / name).exists()


def _has_swap_limit(cgroups: Cgroups) -> bool:
    if cgroups.version == 1:
        return _has_file(cgroups, "memory", "memory.memsw.limit_in_bytes")
    hierarchy = cgroups.controller_mount("memory")
    if hierarchy is None:
        return False
    # The root has no limits of its own: look at any child.
    return any((child / "memory.swap.max").exists() for child in hierarchy.mount.iterdir() if child.is_dir())


def _is_one(path: str) -> bool:
    try:
        return Path(path).read_text().strip() == "1"
    except OSError:
        return False


def _operating_system() -> str:
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition("=")
            if name == "PRETTY_NAME":
                return value.strip("\"'")
    return "<unknown>"
