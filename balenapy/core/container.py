"""The container: what a client asks for (Config, HostConfig, NetworkingConfig), and the record we keep of it.

The first half mirrors Go types of API 1.39 field by field, in Go's order, so that `wire.encode` writes what
clients expect (source: api/types of balena-engine 18.09). The second half is ours: `Container` and its `State`.
"""

# ruff: noqa: RUF009  (the kinds make dataclass fields)

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from balenapy.core.wire import Empty, flag, number, optional, struct, text, words

# --- Config ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class HealthConfig:
    """How health is checked."""

    GO: ClassVar[str] = "container.HealthConfig"
    test: list[str] | None = optional("Test", omit=True)
    interval: int = number("Interval", omit=True, go="time.Duration")  # nanoseconds, as the next two
    timeout: int = number("Timeout", omit=True, go="time.Duration")
    start_period: int = number("StartPeriod", omit=True, go="time.Duration")
    retries: int = number("Retries", omit=True, go="int")


@dataclass(slots=True)
class ContainerConfig:
    """What of a container is portable: the image gives the rest."""

    GO: ClassVar[str] = "container.Config"
    hostname: str = text("Hostname")
    domainname: str = text("Domainname")
    user: str = text("User")
    attach_stdin: bool = flag("AttachStdin")
    attach_stdout: bool = flag("AttachStdout")
    attach_stderr: bool = flag("AttachStderr")
    exposed_ports: dict[str, Empty] | None = optional("ExposedPorts", omit=True, go="nat.PortSet")
    tty: bool = flag("Tty")
    open_stdin: bool = flag("OpenStdin")
    stdin_once: bool = flag("StdinOnce")
    env: list[str] | None = optional("Env")
    cmd: list[str] | None = words("Cmd")
    healthcheck: HealthConfig | None = optional("Healthcheck", omit=True)
    args_escaped: bool = flag("ArgsEscaped", omit=True)
    image: str = text("Image")
    volumes: dict[str, Empty] | None = optional("Volumes")
    working_dir: str = text("WorkingDir")
    entrypoint: list[str] | None = words("Entrypoint")
    network_disabled: bool = flag("NetworkDisabled", omit=True)
    mac_address: str = text("MacAddress", omit=True)
    on_build: list[str] | None = optional("OnBuild")
    labels: dict[str, str] | None = optional("Labels")
    stop_signal: str = text("StopSignal", omit=True)
    stop_timeout: int | None = optional("StopTimeout", omit=True, go="int")
    shell: list[str] | None = words("Shell", omit=True)


# --- HostConfig -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LogConfig:
    """Log driver and its options."""

    GO: ClassVar[str] = "container.LogConfig"
    type: str = text("Type")
    config: dict[str, str] | None = optional("Config")


@dataclass(slots=True)
class PortBinding:
    """Where a port of the container is published."""

    GO: ClassVar[str] = "nat.PortBinding"
    host_ip: str = text("HostIp")
    host_port: str = text("HostPort")


@dataclass(slots=True)
class RestartPolicy:
    """Whether it runs again after an exit."""

    GO: ClassVar[str] = "container.RestartPolicy"
    name: str = text("Name")
    maximum_retry_count: int = number("MaximumRetryCount", go="int")


@dataclass(slots=True)
class WeightDevice:
    """Block I/O weight of one device."""

    GO: ClassVar[str] = "blkiodev.WeightDevice"
    path: str = text("Path")
    weight: int = number("Weight", go="uint16")


@dataclass(slots=True)
class ThrottleDevice:
    """Block I/O limit of one device."""

    GO: ClassVar[str] = "blkiodev.ThrottleDevice"
    path: str = text("Path")
    rate: int = number("Rate", go="uint64")


@dataclass(slots=True)
class DeviceMapping:
    """A device of the host in the container."""

    GO: ClassVar[str] = "container.DeviceMapping"
    path_on_host: str = text("PathOnHost")
    path_in_container: str = text("PathInContainer")
    cgroup_permissions: str = text("CgroupPermissions")


@dataclass(slots=True)
class Ulimit:
    """A resource limit; -1 is unlimited."""

    GO: ClassVar[str] = "units.Ulimit"
    name: str = text("Name")
    hard: int = number("Hard")
    soft: int = number("Soft")


@dataclass(slots=True)
class BindOptions:
    """Of an entry of Mounts."""

    GO: ClassVar[str] = "mount.BindOptions"
    propagation: str = text("Propagation", omit=True, go="mount.Propagation")


@dataclass(slots=True)
class VolumeDriver:
    """Of an entry of Mounts."""

    GO: ClassVar[str] = "mount.Driver"
    name: str = text("Name", omit=True)
    options: dict[str, str] | None = optional("Options", omit=True)


@dataclass(slots=True)
class VolumeOptions:
    """Of an entry of Mounts."""

    GO: ClassVar[str] = "mount.VolumeOptions"
    no_copy: bool = flag("NoCopy", omit=True)
    labels: dict[str, str] | None = optional("Labels", omit=True)
    driver_config: VolumeDriver | None = optional("DriverConfig", omit=True)
    subpath: str = text("Subpath", omit=True)  # of API 1.45: known so that it can be refused


@dataclass(slots=True)
class TmpfsOptions:
    """Of an entry of Mounts."""

    GO: ClassVar[str] = "mount.TmpfsOptions"
    size_bytes: int = number("SizeBytes", omit=True)
    mode: int = number("Mode", omit=True, go="uint32")


@dataclass(slots=True)
class Mount:
    """An entry of HostConfig.Mounts."""

    GO: ClassVar[str] = "mount.Mount"
    type: str = text("Type", omit=True, go="mount.Type")
    source: str = text("Source", omit=True)
    target: str = text("Target", omit=True)
    read_only: bool = flag("ReadOnly", omit=True)
    consistency: str = text("Consistency", omit=True, go="mount.Consistency")
    bind_options: BindOptions | None = optional("BindOptions", omit=True)
    volume_options: VolumeOptions | None = optional("VolumeOptions", omit=True)
    tmpfs_options: TmpfsOptions | None = optional("TmpfsOptions", omit=True)


@dataclass(slots=True)
class Resources:
    """Limits of the cgroup: the part of HostConfig that `update` may also change."""

    GO: ClassVar[str] = "container.Resources"
    cpu_shares: int = number("CpuShares")
    memory: int = number("Memory")
    nano_cpus: int = number("NanoCpus")
    cgroup_parent: str = text("CgroupParent")
    blkio_weight: int = number("BlkioWeight", go="uint16")
    blkio_weight_device: list[WeightDevice] | None = optional("BlkioWeightDevice")
    blkio_device_read_bps: list[ThrottleDevice] | None = optional("BlkioDeviceReadBps")
    blkio_device_write_bps: list[ThrottleDevice] | None = optional("BlkioDeviceWriteBps")
    blkio_device_read_iops: list[ThrottleDevice] | None = optional("BlkioDeviceReadIOps")
    blkio_device_write_iops: list[ThrottleDevice] | None = optional("BlkioDeviceWriteIOps")
    cpu_period: int = number("CpuPeriod")
    cpu_quota: int = number("CpuQuota")
    cpu_realtime_period: int = number("CpuRealtimePeriod")
    cpu_realtime_runtime: int = number("CpuRealtimeRuntime")
    cpuset_cpus: str = text("CpusetCpus")
    cpuset_mems: str = text("CpusetMems")
    devices: list[DeviceMapping] | None = optional("Devices")
    device_cgroup_rules: list[str] | None = optional("DeviceCgroupRules")
    disk_quota: int = number("DiskQuota")
    kernel_memory: int = number("KernelMemory")
    memory_reservation: int = number("MemoryReservation")
    memory_swap: int = number("MemorySwap")
    memory_swappiness: int | None = optional("MemorySwappiness")
    oom_kill_disable: bool | None = optional("OomKillDisable")
    pids_limit: int = number("PidsLimit")
    ulimits: list[Ulimit] | None = optional("Ulimits")
    cpu_count: int = number("CpuCount")
    cpu_percent: int = number("CpuPercent")
    io_maximum_iops: int = number("IOMaximumIOps", go="uint64")
    io_maximum_bandwidth: int = number("IOMaximumBandwidth", go="uint64")


@dataclass(slots=True)
class HostConfig(Resources):
    """What of a container belongs to this host."""

    GO: ClassVar[str] = "container.HostConfig"
    BASE_AFTER: ClassVar[str] = "isolation"
    binds: list[str] | None = optional("Binds")
    container_id_file: str = text("ContainerIDFile")
    container_id_env: str = text("ContainerIDEnv")  # balena: the variable that receives the container's id
    log_config: LogConfig = struct("LogConfig", LogConfig)
    network_mode: str = text("NetworkMode", go="container.NetworkMode")
    port_bindings: dict[str, list[PortBinding] | None] | None = optional("PortBindings", go="nat.PortMap")
    restart_policy: RestartPolicy = struct("RestartPolicy", RestartPolicy)
    auto_remove: bool = flag("AutoRemove")
    volume_driver: str = text("VolumeDriver")
    volumes_from: list[str] | None = optional("VolumesFrom")
    cap_add: list[str] | None = words("CapAdd")
    cap_drop: list[str] | None = words("CapDrop")
    dns: list[str] | None = optional("Dns")
    dns_options: list[str] | None = optional("DnsOptions")
    dns_search: list[str] | None = optional("DnsSearch")
    extra_hosts: list[str] | None = optional("ExtraHosts")
    group_add: list[str] | None = optional("GroupAdd")
    ipc_mode: str = text("IpcMode", go="container.IpcMode")
    cgroup: str = text("Cgroup", go="container.CgroupSpec")
    links: list[str] | None = optional("Links")
    oom_score_adj: int = number("OomScoreAdj", go="int")
    pid_mode: str = text("PidMode", go="container.PidMode")
    privileged: bool = flag("Privileged")
    publish_all_ports: bool = flag("PublishAllPorts")
    readonly_rootfs: bool = flag("ReadonlyRootfs")
    security_opt: list[str] | None = optional("SecurityOpt")
    storage_opt: dict[str, str] | None = optional("StorageOpt", omit=True)
    tmpfs: dict[str, str] | None = optional("Tmpfs", omit=True)
    uts_mode: str = text("UTSMode", go="container.UTSMode")
    userns_mode: str = text("UsernsMode", go="container.UsernsMode")
    shm_size: int = number("ShmSize")
    sysctls: dict[str, str] | None = optional("Sysctls", omit=True)
    runtime: str = text("Runtime", omit=True)
    console_size: tuple[int, int] = struct("ConsoleSize", lambda: (0, 0))
    isolation: str = text("Isolation", go="container.Isolation")
    mounts: list[Mount] | None = optional("Mounts", omit=True)
    masked_paths: list[str] | None = optional("MaskedPaths")
    readonly_paths: list[str] | None = optional("ReadonlyPaths")
    init: bool | None = optional("Init", omit=True)


@dataclass(slots=True)
class UpdateConfig(Resources):
    """Body of `POST /containers/{id}/update`."""

    GO: ClassVar[str] = "container.UpdateConfig"
    restart_policy: RestartPolicy = struct("RestartPolicy", RestartPolicy)


# --- NetworkingConfig -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class IPAMConfig:
    """Static addresses an endpoint asks for."""

    GO: ClassVar[str] = "network.EndpointIPAMConfig"
    ipv4_address: str = text("IPv4Address", omit=True)
    ipv6_address: str = text("IPv6Address", omit=True)
    link_local_ips: list[str] | None = optional("LinkLocalIPs", omit=True)


@dataclass(slots=True)
class EndpointSettings:
    """A container's attachment to one network: what was asked for, and what is in force."""

    GO: ClassVar[str] = "network.EndpointSettings"
    ipam_config: IPAMConfig | None = optional("IPAMConfig")
    links: list[str] | None = optional("Links")
    aliases: list[str] | None = optional("Aliases")
    network_id: str = text("NetworkID")
    endpoint_id: str = text("EndpointID")
    gateway: str = text("Gateway")
    ip_address: str = text("IPAddress")
    ip_prefix_len: int = number("IPPrefixLen", go="int")
    ipv6_gateway: str = text("IPv6Gateway")
    global_ipv6_address: str = text("GlobalIPv6Address")
    global_ipv6_prefix_len: int = number("GlobalIPv6PrefixLen", go="int")
    mac_address: str = text("MacAddress")
    driver_opts: dict[str, str] | None = optional("DriverOpts")


@dataclass(slots=True)
class NetworkingConfig:
    """Endpoints asked for at create, by network name."""

    GO: ClassVar[str] = "network.NetworkingConfig"
    endpoints_config: dict[str, EndpointSettings | None] | None = optional("EndpointsConfig")


# --- the record -----------------------------------------------------------------------------------------------


class Status(Enum):
    """Where a container is in its life. The moves between them are in `lifecycle`."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    RESTARTING = "restarting"
    REMOVING = "removing"
    EXITED = "exited"
    DEAD = "dead"


@dataclass(slots=True)
class HealthResult:
    """One probe."""

    start_ns: int = number("Start")
    end_ns: int = number("End")
    exit_code: int = number("ExitCode")
    output: str = text("Output")


@dataclass(slots=True)
class Health:
    """What the probes say."""

    status: str = text("Status")  # starting, healthy, unhealthy
    failing_streak: int = number("FailingStreak")
    log: list[HealthResult] = struct("Log", list)


@dataclass(slots=True)
class State:
    """What changes at every start and exit. Times are nanoseconds since 1970, 0 for never."""

    status: Status = Status.CREATED
    pid: int = number("Pid")
    exit_code: int = number("ExitCode")
    error: str = text("Error")
    oom_killed: bool = flag("OOMKilled")
    started_ns: int = number("Started")
    finished_ns: int = number("Finished")
    restart_count: int = number("RestartCount")
    manually_stopped: bool = flag("ManuallyStopped")
    ever_started: bool = flag("EverStarted")
    conmon_pid: int = number("ConmonPid")
    conmon_start_time: int = number("ConmonStartTime")  # clock ticks since boot: tells a reused pid from ours
    health: Health | None = optional("Health")

    @property
    def running(self) -> bool:
        """Running as the API means it: paused and restarting containers count."""
        return self.status in (Status.RUNNING, Status.PAUSED, Status.RESTARTING)


@dataclass(slots=True)
class SandboxState:
    """The network namespace of the last or the present run."""

    sandbox_id: str = text("SandboxID")
    sandbox_key: str = text("SandboxKey")
    ports: dict[str, list[PortBinding] | None] = struct("Ports", dict)  # in force; {} when not running
    resolv_conf_path: str = text("ResolvConfPath")
    hostname_path: str = text("HostnamePath")
    hosts_path: str = text("HostsPath")
    nameserver_port: int = number("NameserverPort", omit=True)  # that the namespace's rules lead to; 0: none


@dataclass(slots=True)
class MountPoint:
    """One resolved mount of a container: a bind, a volume or a tmpfs of HostConfig.Mounts."""

    type: str = text("Type")  # bind, volume, tmpfs
    name: str = text("Name", omit=True)  # volumes
    source: str = text("Source")
    destination: str = text("Destination")
    driver: str = text("Driver", omit=True)  # volumes
    mode: str = text("Mode")
    rw: bool = flag("RW")
    propagation: str = text("Propagation")
    # Ours, not shown by inspect:
    anonymous: bool = flag("Anonymous", omit=True)  # goes with `rm -v`
    no_copy: bool = flag("NoCopy", omit=True)
    must_exist: bool = flag("MustExist", omit=True)  # bind of HostConfig.Mounts: the source is not created
    spec: Mount | None = optional("Spec", omit=True)  # where it came from, if from HostConfig.Mounts


@dataclass(slots=True, eq=False)
class Container:
    """The record. One object per container, shared and changed in place; stores/containers.py makes it durable.

    Two rows: what is set at create (`ContainerStore.update_record`), and `state`, `endpoints`, `sandbox`
    which every start changes (`ContainerStore.update_state`).
    """

    id: str = text("Id")
    name: str = text("Name")  # without slash
    created_ns: int = number("Created")
    path: str = text("Path")
    args: list[str] = struct("Args", list)
    image_id: str = text("ImageID")
    chain_id: str = text("ChainID")  # the filesystem of that image; "" for an image without layers
    config: ContainerConfig = struct("Config", ContainerConfig)
    host_config: HostConfig = struct("HostConfig", HostConfig)
    mounts: list[MountPoint] = struct("Mounts", list)
    managed: bool = flag("Managed", omit=True)  # made by the engine itself (a build step)
    name_generated: bool = flag("NameGenerated", omit=True)  # nobody chose it, so no other container resolves it
    state: State = field(default_factory=State)
    endpoints: dict[str, EndpointSettings] = field(default_factory=dict)  # by network name
    sandbox: SandboxState = field(default_factory=SandboxState)

    @property
    def short_id(self) -> str:
        return self.id[:12]
