"""What a create request must satisfy, and what is filled in: the rules of `POST /containers/create`, without I/O.

The order of the checks is that of the engine we replace: a request that is wrong twice must get the same answer.
It is `check_modes` (when the body is read), `check_config`, `check_host_config`, `check_resources`, `check_networking`,
then, once the image is known, `merge_config` and `check_log_config`. What the kernel cannot do is not an error: the
value is reset to zero and a warning goes into the answer.
Source: moby 18.09 runconfig/hostconfig_unix.go, daemon/container.go, daemon/daemon_unix.go, daemon/commit.go merge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from balenapy.core import syslog
from balenapy.core.container import (
    ContainerConfig,
    DeviceMapping,
    HealthConfig,
    HostConfig,
    LogConfig,
    NetworkingConfig,
    Resources,
    RestartPolicy,
    Ulimit,
)
from balenapy.core.ociconfig import DEFAULT_MASKED_PATHS, DEFAULT_READONLY_PATHS
from balenapy.core.ports import parse_port
from balenapy.core.signals import parse_signal
from balenapy.core.wire import Empty, MalformedJSON, decode, has_any_key, kind_of
from balenapy.errors import Conflict, InvalidParameter, SystemFailure

MIN_MEMORY_BYTES = 4 << 20  # moby linuxMinMemory in 18.09; 6 MB later
NAME_PATTERN = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]+")
LOG_OPTIONS: dict[str, tuple[frozenset[str], str]] = {
    "json-file": (
        frozenset(("max-file", "max-size", "compress", "labels", "env", "env-regex", "tag")),
        "unknown log opt '{}' for json-file log driver",
    ),
    "local": (frozenset(("max-file", "max-size", "compress")), "unknown log opt '{}' for log driver local"),
    "journald": (
        frozenset(("labels", "env", "env-regex", "tag")),
        "unknown log opt '{}' for journald log driver",
    ),
    "syslog": (syslog.OPTIONS, "unknown log opt '{}' for syslog log driver"),
}


@dataclass(frozen=True, slots=True)
class KernelSupport:
    """What this machine's cgroups can limit (moby pkg/sysinfo). The API's /info shows most of it."""

    memory_limit: bool = True
    swap_limit: bool = True
    memory_reservation: bool = True
    kernel_memory: bool = True
    oom_kill_disable: bool = True
    memory_swappiness: bool = True
    cpu_shares: bool = True
    cpu_cfs_period: bool = True
    cpu_cfs_quota: bool = True
    cpu_realtime: bool = True
    cpuset: bool = True
    cpus: str = ""  # usable CPUs and memory nodes, as lists: "0-3"
    mems: str = ""
    cpu_count: int = 1
    blkio_weight: bool = True
    blkio_weight_device: bool = True
    blkio_throttle: bool = True
    pids_limit: bool = True
    ipv4_forwarding: bool = True


# --- the body -------------------------------------------------------------------------------------------------


_WRAPPER = "ContainerConfigWrapper"  # the Go type of the whole body, for error texts


@dataclass(slots=True)
class CreateRequest:
    config: ContainerConfig
    host_config: HostConfig
    networking: NetworkingConfig | None = None


def parse_create(body: Any) -> CreateRequest:
    """Read the body of a create request: Config's keys with HostConfig and NetworkingConfig beside them.

    Clients from before API 1.18 put some keys of HostConfig at the top level; without HostConfig all of them may be.

    Raises: MalformedJSON; InvalidParameter, when there is no config at all.
    """
    if body is not None and not isinstance(body, dict):
        raise MalformedJSON(f"json: cannot unmarshal {kind_of(body)} into Go value of type runconfig.{_WRAPPER}")
    keys = {key.lower(): value for key, value in (body or {}).items()}
    config = decode(ContainerConfig, body, within=(_WRAPPER, ""))
    inner = keys.get("hostconfig")
    outer = decode(HostConfig, body, within=(_WRAPPER, ""))
    host_config = outer if inner is None else decode(HostConfig, inner, within=(_WRAPPER, "HostConfig"))
    _take_cdi_requests(host_config, inner)
    for attribute in ("memory", "memory_swap", "cpu_shares", "cpuset_cpus", "volume_driver"):
        if not getattr(host_config, attribute):
            setattr(host_config, attribute, getattr(outer, attribute))
    networking = None
    if keys.get("networkingconfig") is not None:
        within = (_WRAPPER, "NetworkingConfig")
        networking = decode(NetworkingConfig, keys["networkingconfig"], within=within)
    if body is None or not has_any_key(ContainerConfig, body):
        raise InvalidParameter("Config cannot be empty in order to create a container")
    if not host_config.network_mode:
        host_config.network_mode = "default"
    return CreateRequest(config, host_config, networking)


def _take_cdi_requests(host_config: HostConfig, body: Any) -> None:
    """Clients of today ask for CDI devices in `DeviceRequests`, which this API does not have: here they are Devices."""
    found = {key.lower(): value for key, value in body.items()} if isinstance(body, dict) else {}
    requests = found.get("devicerequests")
    for request in requests if isinstance(requests, list) else ():
        keys = {key.lower(): value for key, value in request.items()} if isinstance(request, dict) else {}
        names = keys.get("deviceids")
        if keys.get("driver") == "cdi" and isinstance(names, list):
            mappings = [DeviceMapping(name, name, "rwm") for name in names if isinstance(name, str)]
            host_config.devices = [*(host_config.devices or ()), *mappings]


# --- names ----------------------------------------------------------------------------------------------------


def check_name(name: str) -> str:
    """Strip the slash. Raises: InvalidParameter."""
    if NAME_PATTERN.fullmatch(name) is None:
        raise InvalidParameter(f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    return name.removeprefix("/")


# --- modes of namespaces --------------------------------------------------------------------------------------


def container_of_mode(mode: str) -> str:
    """`container:X` -> X, else ""."""
    kind, separator, name = mode.partition(":")
    return name if kind == "container" and separator else ""


def is_user_network(mode: str) -> bool:
    """Whether NetworkMode names a network that is none of the built-in ones."""
    return mode not in ("", "default", "bridge", "host", "none") and not mode.startswith("container:")


def check_modes(config: ContainerConfig, host_config: HostConfig) -> None:
    """What excludes each other among network, UTS and IPC modes.

    Raises: InvalidParameter; SystemFailure for real-time values (decoded over there by another function).
    """
    mode = host_config.network_mode
    if mode.partition(":")[0] == "container":
        parts = mode.split(":")
        if len(parts) < 2 or not parts[1]:
            raise InvalidParameter("Invalid network mode: invalid container format container:<name|id>")
    joined = mode.startswith("container:")

    def refuse(condition: object, what: str) -> None:
        if condition:
            raise InvalidParameter(f"conflicting options: {what}")

    links = "{} can't be used with links. This would result in undefined behavior"
    refuse(joined and config.hostname, "hostname and the network mode")
    refuse(joined and host_config.links, links.format("container type network"))
    refuse(joined and host_config.dns, "dns and the network mode")
    refuse(joined and host_config.extra_hosts, "custom host-to-IP mapping and the network mode")
    refuse((joined or mode == "host") and config.mac_address, "mac-address and the network mode")
    published = host_config.port_bindings or host_config.publish_all_ports
    refuse(joined and published, "port publishing and the container type network mode")
    refuse(joined and config.exposed_ports, "port exposing and the container type network mode")
    refuse(host_config.uts_mode == "host" and config.hostname, "hostname and the UTS mode")
    refuse(mode == "host" and host_config.links, links.format("host type networking"))
    if host_config.io_maximum_bandwidth:
        raise SystemFailure("invalid QoS settings: linux does not support maximum bandwidth")
    if host_config.io_maximum_iops:
        raise SystemFailure("invalid QoS settings: linux does not support maximum IOPs")
    period, runtime = host_config.cpu_realtime_period, host_config.cpu_realtime_runtime
    if period and runtime and runtime > period:
        raise SystemFailure("cpu real-time runtime cannot be higher than cpu real-time period")


# --- Config ---------------------------------------------------------------------------------------------------


def check_config(config: ContainerConfig) -> None:
    """Raises: InvalidParameter."""
    if config.working_dir and not config.working_dir.startswith("/"):
        raise InvalidParameter(
            f"the working directory '{config.working_dir}' is invalid, it needs to be an absolute path"
        )
    if config.stop_signal:
        parse_signal(config.stop_signal)
    for entry in config.env or ():
        if not entry.partition("=")[0]:
            raise InvalidParameter(f"invalid environment variable: {entry}")
    check_health(config.healthcheck)


_MILLISECOND_NS = 1_000_000


def check_health(health: HealthConfig | None) -> None:
    """Raises: InvalidParameter."""
    if health is None:
        return
    for name, value in (("Interval", health.interval), ("Timeout", health.timeout)):
        if value != 0 and value < _MILLISECOND_NS:
            raise InvalidParameter(f"{name} in Healthcheck cannot be less than 1ms")
    if health.retries < 0:
        raise InvalidParameter("Retries in Healthcheck cannot be negative")
    if health.start_period != 0 and health.start_period < _MILLISECOND_NS:
        raise InvalidParameter("StartPeriod in Healthcheck cannot be less than 1ms")


def merge_config(config: ContainerConfig, image: ContainerConfig | None) -> None:
    """Fill what the request left open from the image's config, in place.

    Raises: InvalidParameter `No command specified`.
    """
    if image is not None:
        fill_from_image(config, image)
    if config.entrypoint == [""]:
        config.entrypoint = None
    if not config.entrypoint and not config.cmd:
        raise InvalidParameter("No command specified")


def fill_from_image(config: ContainerConfig, image: ContainerConfig) -> None:
    """Fill what a config leaves open from another, in place. Source: moby daemon/commit.go merge."""
    config.user = config.user or image.user
    config.exposed_ports = _union(config.exposed_ports, image.exposed_ports)
    if config.env:
        named = {entry.partition("=")[0] for entry in config.env}
        config.env = config.env + [entry for entry in image.env or () if entry.partition("=")[0] not in named]
    else:
        config.env = image.env
    config.labels = {**(image.labels or {}), **(config.labels or {})}
    if not config.entrypoint:
        if not config.cmd:
            config.cmd = image.cmd
            config.args_escaped = image.args_escaped
        if config.entrypoint is None:
            config.entrypoint = image.entrypoint
    config.healthcheck = _merge_health(config.healthcheck, image.healthcheck)
    config.working_dir = config.working_dir or image.working_dir
    config.volumes = _union(config.volumes, image.volumes)
    config.stop_signal = config.stop_signal or image.stop_signal


def _union(own: dict[str, Empty] | None, image: dict[str, Empty] | None) -> dict[str, Empty] | None:
    return {**(image or {}), **own} if own else image


def _merge_health(own: HealthConfig | None, image: HealthConfig | None) -> HealthConfig | None:
    if own is None or image is None:
        return own or image
    return HealthConfig(
        own.test or image.test,
        own.interval or image.interval,
        own.timeout or image.timeout,
        own.start_period or image.start_period,
        own.retries or image.retries,
    )


def command_of(config: ContainerConfig) -> tuple[str, list[str]]:
    """Path and Args: entrypoint and command joined, first word and rest."""
    joined = [*(config.entrypoint or ()), *(config.cmd or ())]
    return joined[0], joined[1:]


# --- HostConfig -----------------------------------------------------------------------------------------------


def parse_link(text: str) -> tuple[str, str]:
    """`name[:alias]` of HostConfig.Links, or inspect's form `/name:/this/alias`.

    Raises: InvalidParameter. Source: moby opts/opts.go ParseLink.
    """
    if not text:
        raise InvalidParameter("empty string specified for links")
    parts = text.split(":")
    if len(parts) > 2:
        raise InvalidParameter(f"bad format for links: {text}")
    if len(parts) == 1:
        return text, text
    name, alias = parts
    return (name[1:], alias.rpartition("/")[2]) if name.startswith("/") else (name, alias)


def check_restart_policy(policy: RestartPolicy) -> None:
    """Raises: InvalidParameter."""
    if policy.name in ("always", "unless-stopped", "no"):
        if policy.maximum_retry_count != 0:
            raise InvalidParameter(f"maximum retry count cannot be used with restart policy '{policy.name}'")
    elif policy.name == "on-failure":
        if policy.maximum_retry_count < 0:
            raise InvalidParameter("maximum retry count cannot be negative")
    elif policy.name != "":
        raise InvalidParameter(f"invalid restart policy '{policy.name}'")


def restarts(policy: RestartPolicy) -> bool:
    return policy.name not in ("", "no")


def _check_extra_host(text: str) -> None:
    # opts.ValidateExtraHost: the first colon parts name and address, so that IPv6 addresses may follow.
    name, colon, address = text.partition(":")
    if not colon or not name:
        raise InvalidParameter(f'bad format for add-host: "{text}"')
    try:
        ip_address(address.partition("%")[0])
    except ValueError:
        raise InvalidParameter(f'invalid IP address in add-host: "{address}"') from None


def check_host_config(host_config: HostConfig) -> None:
    """Everything but Mounts (see `check_auto_remove`, which comes before them) and resources.

    Raises: InvalidParameter.
    """
    for text in host_config.extra_hosts or ():
        _check_extra_host(text)
    for key, bindings in (host_config.port_bindings or {}).items():
        parse_port(key)
        for binding in bindings or ():
            if binding.host_port:
                _check_host_port(binding.host_port)
    check_restart_policy(host_config.restart_policy)
    if host_config.isolation.lower() not in ("", "default"):
        raise InvalidParameter(f"invalid isolation '{host_config.isolation}' on linux")


def check_auto_remove(host_config: HostConfig) -> None:
    """Raises: InvalidParameter."""
    if host_config.auto_remove and restarts(host_config.restart_policy):
        raise InvalidParameter("can't create 'AutoRemove' container with restart policy")


def _check_host_port(text: str) -> None:
    if "/" in text:
        raise InvalidParameter(f'invalid port specification: "{text}"')
    parse_port(text)


def check_limits_of_host(
    host_config: HostConfig, support: KernelSupport, *, cgroup_driver: str, runtimes: Sequence[str]
) -> list[str]:
    """The checks behind the resources; returns warnings. Raises: InvalidParameter."""
    if host_config.shm_size < 0:
        raise InvalidParameter("SHM size can not be less than 0")
    if not -1000 <= host_config.oom_score_adj <= 1000:
        raise InvalidParameter(f"Invalid value {host_config.oom_score_adj}, range for oom score adj is [-1000, 1000]")
    warnings = []
    if not support.ipv4_forwarding and host_config.network_mode not in ("host", "none"):
        warnings.append("IPv4 forwarding is disabled. Networking will not work.")
    if host_config.network_mode == "host" and host_config.port_bindings:
        warnings.append("Published ports are discarded when using host network mode")
    parent = host_config.cgroup_parent
    if parent and cgroup_driver == "systemd" and (len(parent) <= 6 or not parent.endswith(".slice")):
        raise InvalidParameter('cgroup-parent for systemd cgroup should be a valid slice named as "xxx.slice"')
    if host_config.runtime and host_config.runtime not in (*runtimes, "bare"):
        raise InvalidParameter(f"Unknown runtime specified {host_config.runtime}")
    for destination in host_config.tmpfs or ():
        if destination == "/":
            raise InvalidParameter("invalid specification: destination can't be '/'")
        if not destination.startswith("/"):
            raise InvalidParameter(f"invalid mount path: '{destination}' mount path must be absolute")
    return warnings


def check_networking(networking: NetworkingConfig | None) -> None:
    """Raises: InvalidParameter."""
    endpoints = (networking.endpoints_config if networking else None) or {}
    if len(endpoints) > 1:
        raise InvalidParameter(f"Container cannot be connected to network endpoints: {', '.join(endpoints)}")
    for name, endpoint in endpoints.items():
        if endpoint is None:
            raise InvalidParameter(f"no EndpointSettings for {name}")
        ipam = endpoint.ipam_config
        if ipam is not None and ipam.ipv4_address and not _is_address(ipam.ipv4_address, IPv4Address):
            raise InvalidParameter(f"invalid IPv4 address: {ipam.ipv4_address}")
        if ipam is not None and ipam.ipv6_address and not _is_address(ipam.ipv6_address, IPv6Address):
            raise InvalidParameter(f"invalid IPv6 address: {ipam.ipv6_address}")


def _is_address(text: str, kind: type[IPv4Address] | type[IPv6Address]) -> bool:
    try:
        return isinstance(ip_address(text), kind)
    except ValueError:
        return False


# --- resources ------------------------------------------------------------------------------------------------


def _unsupported(what: str, consequence: str) -> str:
    return f"Your kernel does not support {what} or the cgroup is not mounted. {consequence}"


def check_resources(resources: Resources, support: KernelSupport, *, update: bool = False) -> list[str]:
    """Check limits and reset those the kernel cannot do, in place; returns the warnings.

    Raises: InvalidParameter.
    """
    warnings: list[str] = []
    _check_memory(resources, support, warnings, update=update)
    if resources.pids_limit and not support.pids_limit:
        warnings.append(_unsupported("pids limit capabilities", "PIDs limit discarded."))
        resources.pids_limit = 0
    _check_cpu(resources, support, warnings)
    _check_cpuset(resources, support, warnings)
    _check_block_io(resources, support, warnings)
    return warnings


def _check_memory(resources: Resources, support: KernelSupport, warnings: list[str], *, update: bool) -> None:
    if resources.memory_swappiness == -1:
        resources.memory_swappiness = None
    if 0 != resources.memory < MIN_MEMORY_BYTES:
        raise InvalidParameter("Minimum memory limit allowed is 4MB")
    if resources.memory > 0 and not support.memory_limit:
        warnings.append(_unsupported("memory limit capabilities", "Limitation discarded."))
        resources.memory, resources.memory_swap = 0, -1
    if resources.memory > 0 and resources.memory_swap != -1 and not support.swap_limit:
        warnings.append(_unsupported("swap limit capabilities", "Memory limited without swap."))
        resources.memory_swap = -1
    if resources.memory > 0 and 0 < resources.memory_swap < resources.memory:
        raise InvalidParameter("Minimum memoryswap limit should be larger than memory limit, see usage")
    if resources.memory == 0 and resources.memory_swap > 0 and not update:
        raise InvalidParameter("You should always set the Memory limit when using Memoryswap limit, see usage")
    if resources.memory_swappiness is not None and not support.memory_swappiness:
        warnings.append(_unsupported("memory swappiness capabilities", "Memory swappiness discarded."))
        resources.memory_swappiness = None
    if resources.memory_swappiness is not None and not 0 <= resources.memory_swappiness <= 100:
        raise InvalidParameter(f"Invalid value: {resources.memory_swappiness}, valid memory swappiness range is 0-100")
    if resources.memory_reservation > 0 and not support.memory_reservation:
        warnings.append(_unsupported("memory soft limit capabilities", "Limitation discarded."))
        resources.memory_reservation = 0
    if 0 < resources.memory_reservation < MIN_MEMORY_BYTES:
        raise InvalidParameter("Minimum memory reservation allowed is 4MB")
    if 0 < resources.memory < resources.memory_reservation:
        raise InvalidParameter("Minimum memory limit can not be less than memory reservation limit, see usage")
    if resources.kernel_memory > 0 and not support.kernel_memory:
        warnings.append(_unsupported("kernel memory limit capabilities", "Limitation discarded."))
        resources.kernel_memory = 0
    if 0 < resources.kernel_memory < MIN_MEMORY_BYTES:
        raise InvalidParameter("Minimum kernel memory limit allowed is 4MB")
    if resources.oom_kill_disable is not None and not support.oom_kill_disable:
        if resources.oom_kill_disable:
            warnings.append("Your kernel does not support OomKillDisable. OomKillDisable discarded.")
        resources.oom_kill_disable = None
    if resources.oom_kill_disable and resources.memory == 0:
        warnings.append(
            "OOM killer is disabled for the container, but no memory limit is set, "
            "this can result in the system running out of resources."
        )


def _check_cpu(resources: Resources, support: KernelSupport, warnings: list[str]) -> None:
    if resources.nano_cpus > 0 and resources.cpu_period > 0:
        raise InvalidParameter("Conflicting options: Nano CPUs and CPU Period cannot both be set")
    if resources.nano_cpus > 0 and resources.cpu_quota > 0:
        raise InvalidParameter("Conflicting options: Nano CPUs and CPU Quota cannot both be set")
    if resources.nano_cpus > 0 and not (support.cpu_cfs_period and support.cpu_cfs_quota):
        raise InvalidParameter(
            "NanoCPUs can not be set, as your kernel does not support CPU cfs period/quota or the cgroup is not mounted"
        )
    count = support.cpu_count
    if not 0 <= resources.nano_cpus <= count * 1_000_000_000:
        raise InvalidParameter(f"Range of CPUs is from 0.01 to {count}.00, as there are only {count} CPUs available")
    if resources.cpu_shares > 0 and not support.cpu_shares:
        warnings.append(_unsupported("CPU shares", "Shares discarded."))
        resources.cpu_shares = 0
    if resources.cpu_period > 0 and not support.cpu_cfs_period:
        warnings.append(_unsupported("CPU cfs period", "Period discarded."))
        resources.cpu_period = 0
    if resources.cpu_period != 0 and not 1000 <= resources.cpu_period <= 1_000_000:
        raise InvalidParameter("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
    if resources.cpu_quota > 0 and not support.cpu_cfs_quota:
        warnings.append(_unsupported("CPU cfs quota", "Quota discarded."))
        resources.cpu_quota = 0
    if 0 < resources.cpu_quota < 1000:
        raise InvalidParameter("CPU cfs quota can not be less than 1ms (i.e. 1000)")
    if (resources.cpu_realtime_period or resources.cpu_realtime_runtime) and not support.cpu_realtime:
        raise SystemFailure("Your kernel does not support cgroup cpu real-time period")
    if resources.cpu_percent > 0:
        warnings.append("linux does not support CPU percent. Percent discarded.")
        resources.cpu_percent = 0


def _check_cpuset(resources: Resources, support: KernelSupport, warnings: list[str]) -> None:
    if (resources.cpuset_cpus or resources.cpuset_mems) and not support.cpuset:
        warnings.append(_unsupported("cpuset", "Cpuset discarded."))
        resources.cpuset_cpus = resources.cpuset_mems = ""
    for wanted, available, kind, name in (
        (resources.cpuset_cpus, support.cpus, "cpus", "CPUs"),
        (resources.cpuset_mems, support.mems, "mems", "memory nodes"),
    ):
        if not wanted:
            continue
        try:
            numbers = parse_number_list(wanted)
        except ValueError as error:
            raise InvalidParameter(f"Invalid value {wanted} for cpuset {kind}: {error}") from None
        if available and not numbers <= parse_number_list(available):
            raise InvalidParameter(f"Requested {name} are not available - requested {wanted}, available: {available}")


_NUMBER_MAX = 8192  # moby parsers.ParseUintListMaximum


def parse_number_list(text: str) -> frozenset[int]:
    """`0-3,7` -> {0, 1, 2, 3, 7}.

    Raises: ValueError `invalid format: X`. Source: moby pkg/parsers ParseUintList.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not dash:
            last = first
        valid = first.isascii() and first.isdigit() and last.isascii() and last.isdigit()
        if not valid or len(first) > 9 or len(last) > 9 or int(first) > int(last) or int(last) > _NUMBER_MAX:
            raise ValueError(f"invalid format: {text}")
        numbers.update(range(int(first), int(last) + 1))
    return frozenset(numbers)


def _check_block_io(resources: Resources, support: KernelSupport, warnings: list[str]) -> None:
    if resources.blkio_weight > 0 and not support.blkio_weight:
        warnings.append(_unsupported("Block I/O weight", "Weight discarded."))
        resources.blkio_weight = 0
    if resources.blkio_weight > 0 and not 10 <= resources.blkio_weight <= 1000:
        raise InvalidParameter("Range of blkio weight is from 10 to 1000")
    if resources.blkio_weight_device and not support.blkio_weight_device:
        warnings.append(_unsupported("Block I/O weight_device", "Weight-device discarded."))
        resources.blkio_weight_device = []
    if support.blkio_throttle:
        return
    if resources.blkio_device_read_bps:
        warnings.append(_unsupported("BPS Block I/O read limit", "Block I/O BPS read limit discarded."))
        resources.blkio_device_read_bps = []
    if resources.blkio_device_write_bps:
        warnings.append(_unsupported("BPS Block I/O write limit", "Block I/O BPS write limit discarded."))
        resources.blkio_device_write_bps = []
    if resources.blkio_device_read_iops:
        warnings.append(_unsupported("IOPS Block read limit", "Block I/O IOPS read limit discarded."))
        resources.blkio_device_read_iops = []
    if resources.blkio_device_write_iops:
        warnings.append(_unsupported("IOPS Block write limit", "Block I/O IOPS write limit discarded."))
        resources.blkio_device_write_iops = []


# --- what is filled in ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostDefaults:
    """What the daemon's configuration gives to a HostConfig that does not say."""

    ipc_mode: str = "shareable"
    shm_size: int = 64 << 20
    runtime: str = "runc"
    log_driver: str = "json-file"
    log_opts: Mapping[str, str] | None = None
    ulimits: Sequence[Ulimit] = ()


def fill_host_config(host_config: HostConfig, defaults: HostDefaults) -> None:
    """Set defaults, in place, after the checks."""
    if host_config.memory > 0 and host_config.memory_swap == 0:
        host_config.memory_swap = 2 * host_config.memory
    host_config.shm_size = host_config.shm_size or defaults.shm_size
    host_config.ipc_mode = host_config.ipc_mode or defaults.ipc_mode
    if host_config.oom_kill_disable is None:
        host_config.oom_kill_disable = False
    host_config.runtime = host_config.runtime or defaults.runtime
    named = {ulimit.name for ulimit in host_config.ulimits or ()}
    added = [ulimit for ulimit in defaults.ulimits if ulimit.name not in named]
    if added:
        host_config.ulimits = [*(host_config.ulimits or ()), *added]
    if not host_config.privileged:
        if host_config.masked_paths is None:
            host_config.masked_paths = list(DEFAULT_MASKED_PATHS)
        if host_config.readonly_paths is None:
            host_config.readonly_paths = list(DEFAULT_READONLY_PATHS)
    _fill_labels(host_config)


def _fill_labels(host_config: HostConfig) -> None:
    # moby generateSecurityOpt: shown by inspect even where there is no SELinux.
    options = host_config.security_opt or []
    if any(option.partition("=")[0] == "label" for option in options):
        return
    if host_config.privileged or host_config.pid_mode == "host" or host_config.ipc_mode == "host":
        host_config.security_opt = [*options, "label=disable"]


def fill_log_config(log_config: LogConfig, defaults: HostDefaults) -> None:
    """Take the daemon's driver if none is named, and its options if it is that driver."""
    if not log_config.type:
        log_config.type = defaults.log_driver
    log_config.config = log_config.config or {}
    if log_config.type == defaults.log_driver:  # named or not, as moby's mergeAndVerifyLogConfig
        log_config.config = {**(defaults.log_opts or {}), **log_config.config}


def check_log_config(log_config: LogConfig) -> None:
    """Raises: InvalidParameter. Source: moby daemon/logger/factory.go ValidateLogOpts."""
    if log_config.type == "none":
        return
    options = dict(log_config.config or {})
    mode = options.pop("mode", "")
    if mode not in ("", "blocking", "non-blocking"):
        raise InvalidParameter(f"logger: logging mode not supported: {mode}")
    if options.pop("max-buffer-size", None) is not None and mode != "non-blocking":
        raise InvalidParameter("logger: max-buffer-size option is only supported with 'mode=non-blocking'")
    if log_config.type not in LOG_OPTIONS:
        raise InvalidParameter(f"logger: no log driver named '{log_config.type}' is registered")
    known, complaint = LOG_OPTIONS[log_config.type]
    for name in options:
        if name not in known:
            raise InvalidParameter(complaint.format(name))
    if log_config.type == "syslog":
        syslog.parse_settings(options)


def fill_container_id_env(config: ContainerConfig, variable: str, container_id: str) -> None:
    """balena: append `variable=<id>` to the environment.

    Raises: Conflict, if any entry begins with the variable's name. Source: balena daemon/create.go setContainerIDEnv.
    """
    if not variable:
        return
    if any(entry.startswith(variable) for entry in config.env or ()):
        raise Conflict(f"Error environment variable {variable} already defined")
    config.env = [*(config.env or ()), f"{variable}={container_id}"]


# --- update ---------------------------------------------------------------------------------------------------

_UPDATED = (
    "blkio_weight", "cpu_shares", "nano_cpus", "cpu_period", "cpu_quota", "cpuset_cpus", "cpuset_mems", "memory",
    "memory_swap", "memory_reservation", "kernel_memory", "cpu_realtime_period", "cpu_realtime_runtime",
)  # fmt: skip


def apply_update(host_config: HostConfig, resources: Resources, policy: RestartPolicy, *, running: bool) -> None:
    """Write the changes of an update into a HostConfig; zero means unchanged.

    Raises: Conflict; nothing is changed then. Source: moby container/container_unix.go UpdateContainer.
    """
    for given, present, text in (
        (resources.nano_cpus, host_config.cpu_period, "Nano CPUs cannot be updated as CPU Period has already been set"),
        (resources.nano_cpus, host_config.cpu_quota, "Nano CPUs cannot be updated as CPU Quota has already been set"),
        (resources.cpu_period, host_config.nano_cpus, "CPU Period cannot be updated as NanoCPUs has already been set"),
        (resources.cpu_quota, host_config.nano_cpus, "CPU Quota cannot be updated as NanoCPUs has already been set"),
    ):
        if given > 0 and present > 0:
            raise Conflict(f"Conflicting options: {text}")
    if resources.memory and resources.memory > host_config.memory_swap and resources.memory_swap == 0:
        raise Conflict(
            "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time"
        )
    if resources.kernel_memory and running and not host_config.kernel_memory:
        raise Conflict("Can not update kernel memory to a running container, please stop it first.")
    if policy.name and host_config.auto_remove and restarts(policy):
        raise Conflict("Restart policy cannot be updated because AutoRemove is enabled for the container")
    for attribute in _UPDATED:
        value = getattr(resources, attribute)
        if value:
            setattr(host_config, attribute, value)
    if policy.name:
        host_config.restart_policy = policy
