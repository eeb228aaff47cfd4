"""A container's record and the facts of this machine -> the OCI runtime spec (config.json).

Everything is decided here and nothing is looked up: which devices the host has, what /etc/passwd says inside the
container, which capabilities we hold ourselves, arrive as `HostFacts` (the machine's, read once) and `SpecInputs`
(this container's, this start's). So the whole of it can be tested with literals.
Source: balena-engine daemon/oci_linux.go, oci/defaults.go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from balenapy.core.container import Container, ContainerConfig, HostConfig, ThrottleDevice
from balenapy.core.seccomp import custom_seccomp, default_seccomp
from balenapy.core.wire import parse_bool
from balenapy.errors import InvalidParameter, SystemFailure

OCI_VERSION = "1.0.1"  # what 18.09 wrote; crun and runc of today read it
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RLIM_INFINITY = 2**64 - 1

DEFAULT_CAPABILITIES = tuple(
    "CAP_" + name
    for name in (
        "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL "
        "AUDIT_WRITE"
    ).split()
)
# By number, as linux/capability.h has them.
ALL_CAPABILITIES = tuple(
    "CAP_" + name
    for name in (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
        "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT "
        "SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL "
        "SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
    ).split()
)
DEFAULT_MASKED_PATHS = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
)
DEFAULT_READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
RLIMIT_NAMES = frozenset(
    "core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack".split()
)


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device file to make in the container."""

    path: str  # in the container
    kind: str  # c, b or p
    major: int
    minor: int
    mode: int  # permission bits
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What this machine and this process are able to do. Read once at start."""

    architecture: str = "amd64"  # as Go names it
    capabilities: frozenset[str] = frozenset(ALL_CAPABILITIES)  # our own bounding set: nobody can be given more
    cgroup_version: int = 1
    seccomp: bool = True
    unusable_architectures: frozenset[str] = frozenset()  # libseccomp's names; the kernel runs no such programs
    apparmor: bool = False
    apparmor_default: bool = True  # where there is AppArmor: docker-default is loaded
    can_raise_limits: bool = True  # we hold CAP_SYS_RESOURCE
    hard_limits: Mapping[str, int] = field(default_factory=dict)  # our own, by ulimit name; RLIM_INFINITY possible
    oom_score_adj: int = 0  # our own: without CAP_SYS_RESOURCE nobody gets a lower one


class SpecMount(Protocol):
    """What volumes resolve a mount to; options are final (`rbind`, propagation, `ro`)."""

    @property
    def source(self) -> str: ...
    @property
    def destination(self) -> str: ...
    @property
    def options(self) -> Sequence[str]: ...
    @property
    def type(self) -> str: ...


@dataclass(slots=True)
class SpecInputs:
    """What a start knows beside the record."""

    rootfs: str
    facts: HostFacts
    mounts: Sequence[SpecMount] = ()
    netns_path: str | None = None  # None: the host's network
    hosts_path: str = ""  # "" leaves out the mount
    hostname_path: str = ""
    resolv_conf_path: str = ""
    shm_path: str = ""  # IpcMode shareable, container: and host: the directory to bind on /dev/shm
    pid_namespace: str = ""  # path, for PidMode container:
    ipc_namespace: str = ""  # path, for IpcMode container:
    init_path: str = ""  # the init binary on the host
    init_default: bool = False  # --init
    passwd: str = ""  # contents of the container's /etc/passwd, "" if it has none
    group: str = ""
    host_devices: Sequence[DeviceNode] = ()  # all of the host, for privileged containers
    devices: Sequence[tuple[DeviceNode, str]] = ()  # HostConfig.Devices resolved, with cgroup permissions
    device_numbers: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # of Blkio*Device paths
    link_env: Sequence[str] = ()
    cgroup_driver: str = "cgroupfs"
    cgroup_parent: str = ""  # --cgroup-parent
    no_new_privileges: bool = False  # the daemon's flag
    seccomp_profile: str = ""  # JSON, the daemon's flag; "" is the built-in one
    warnings: list[str] = field(default_factory=list)  # what could not be given as asked


# --- process --------------------------------------------------------------------------------------------------


def merge_env(defaults: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Replace by key, append what is new; an override without `=` removes its key.

    Source: moby container/env.go ReplaceOrAppendEnvValues.
    """
    result: list[str | None] = list(defaults)
    position = {entry.partition("=")[0]: index for index, entry in enumerate(defaults)}
    for entry in overrides:
        key, equals, _ = entry.partition("=")
        index = position.get(key)
        if not equals:
            if index is not None:
                result[index] = None
        elif index is not None:
            result[index] = entry
        else:
            result.append(entry)
    return [entry for entry in result if entry is not None]


def build_env(config: ContainerConfig, link_env: Sequence[str] = (), *, tty: bool | None = None) -> list[str]:
    """The environment of the container's process; `tty` overrides the config's (exec)."""
    defaults = [f"PATH={DEFAULT_PATH}", f"HOSTNAME={config.hostname}"]
    if config.tty if tty is None else tty:
        defaults.append("TERM=xterm")
    return merge_env([*defaults, *link_env], config.env or ())


@dataclass(frozen=True, slots=True)
class User:
    """`additional_gids` has the primary one too: a process that drops it keeps no other way in (CVE-2022-36109)."""

    uid: int
    gid: int
    additional_gids: tuple[int, ...] = ()
    home: str = "/"


_ID_MAX = 2**31 - 1


def _id(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _entries(content: str, fields: int) -> list[list[str]]:
    result = []
    for line in content.splitlines():
        line = line.strip()
        if line and not line.startswith("#"):
            parts = line.split(":")
            result.append(parts + [""] * (fields - len(parts)))
    return result


def _checked_id(number: int) -> int:
    if number > _ID_MAX:
        raise SystemFailure(f"uids and gids must be in range 0-{_ID_MAX}")
    return number


def find_user(spec: str, passwd: str, group: str, group_add: Sequence[str] = ()) -> User:
    """Resolve `[name|uid][:group|gid]` by the contents of a container's passwd and group files.

    Raises: SystemFailure, `unable to find user X: no matching entries in passwd file` and kin.
    Source: runc libcontainer/user GetExecUser, moby daemon/oci_linux.go getUser.
    """
    wanted_user, _, wanted_group = spec.partition(":")
    number = _id(wanted_user)
    uid, gid, home, name = 0, 0, "/", ""
    for entry in _entries(passwd, 7):
        entry_uid = _id(entry[2])
        if entry_uid is None:
            continue
        by_number = entry_uid == (0 if not wanted_user else number)
        if by_number or (wanted_user and entry[0] == wanted_user):
            name, uid, gid, home = entry[0], entry_uid, _id(entry[3]) or 0, entry[5] or "/"
            break
    else:
        if wanted_user and number is None:
            raise SystemFailure(f"unable to find user {wanted_user}: no matching entries in passwd file")
        uid = _checked_id(number or 0)
    groups = [(entry[0], entry_gid, entry[3].split(",")) for entry in _entries(group, 4)
              if (entry_gid := _id(entry[2])) is not None]  # fmt: skip
    additional: list[int] = []
    if wanted_group:
        gid = _find_gid(wanted_group, groups, "unable to find group")
    elif name:
        additional = [entry_gid for _, entry_gid, members in groups if name in members]
    for extra in group_add:
        extra_gid = _find_gid(extra, groups, "Unable to find group")
        additional.append(extra_gid)
    return User(uid, gid, tuple(dict.fromkeys((gid, *additional))), home)


def _find_gid(wanted: str, groups: Sequence[tuple[str, int, list[str]]], complaint: str) -> int:
    number = _id(wanted)
    for name, gid, _ in groups:
        if name == wanted or gid == number:
            return gid
    if number is None:
        raise SystemFailure(f"{complaint} {wanted}: no matching entries in group file")
    return _checked_id(number)


# --- confinement ----------------------------------------------------------------------------------------------


def capability_name(text: str) -> str:
    """`net_admin`, `CAP_NET_ADMIN` -> `CAP_NET_ADMIN`; `all` -> `ALL`."""
    name = text.upper()
    return name if name == "ALL" or name.startswith("CAP_") else "CAP_" + name


def bounding_set(
    cap_add: Sequence[str] | None, cap_drop: Sequence[str] | None, *, privileged: bool, facts: HostFacts
) -> list[str]:
    """The capabilities of a container: defaults, plus added, minus dropped, within what we have ourselves.

    Raises: SystemFailure for a name that is no capability. Source: moby oci/caps/utils.go TweakCapabilities.
    """
    everything = [name for name in ALL_CAPABILITIES if name in facts.capabilities]
    if privileged:
        return everything
    adds = [capability_name(text) for text in cap_add or ()]
    drops = [capability_name(text) for text in cap_drop or ()]
    for name in drops:
        if name != "ALL" and name not in ALL_CAPABILITIES:
            raise SystemFailure(f'linux spec capabilities: Unknown capability drop: "{name.removeprefix("CAP_")}"')
    for name in adds:
        if name != "ALL" and name not in ALL_CAPABILITIES:
            raise SystemFailure(f'linux spec capabilities: Unknown capability to add: "{name}"')
    result: list[str] = []
    if "ALL" not in drops:
        basics = everything if "ALL" in adds else [name for name in DEFAULT_CAPABILITIES if name in everything]
        result = [name for name in basics if name not in drops]
    result += [name for name in dict.fromkeys(adds) if name in everything and name not in result]
    return result


@dataclass(frozen=True, slots=True)
class SecurityOptions:
    no_new_privileges: bool | None = None  # None: as the daemon's flag
    seccomp: str = ""  # "", "unconfined" or a profile's JSON
    apparmor: str = ""
    labels: tuple[str, ...] = ()


def parse_security_options(options: Sequence[str] | None) -> SecurityOptions:
    """Read HostConfig.SecurityOpt.

    Raises: SystemFailure `invalid --security-opt N: "X"`. Source: moby daemon_unix.go parseSecurityOpt.
    """
    no_new_privileges: bool | None = None
    seccomp = apparmor = ""
    labels: list[str] = []
    for option in options or ():
        if option == "no-new-privileges":
            no_new_privileges = True
            continue
        if option == "disable":
            labels.append("disable")
            continue
        separator = "=" if "=" in option else ":"
        key, found, value = option.partition(separator)
        if not found:
            raise SystemFailure(f'invalid --security-opt 1: "{option}"')
        if key == "label":
            labels.append(value)
        elif key == "apparmor":
            apparmor = value
        elif key == "seccomp":
            seccomp = value
        elif key == "no-new-privileges":
            wanted = parse_bool(value)
            if wanted is None:
                raise SystemFailure(f'invalid --security-opt 2: "{option}"')
            no_new_privileges = wanted
        else:
            raise SystemFailure(f'invalid --security-opt 2: "{option}"')
    return SecurityOptions(no_new_privileges, seccomp, apparmor, tuple(labels))


def _seccomp(
    host_config: HostConfig, security: SecurityOptions, bounding: Sequence[str], inputs: SpecInputs
) -> dict[str, Any] | None:
    facts = inputs.facts
    if host_config.privileged or security.seccomp == "unconfined":
        return None
    if not facts.seccomp:
        if security.seccomp:
            raise SystemFailure("seccomp is not enabled in your kernel, cannot run a custom seccomp profile")
        return None
    profile = security.seccomp or inputs.seccomp_profile
    if profile:
        return custom_seccomp(profile, bounding, facts.architecture)
    return default_seccomp(frozenset(bounding), facts.architecture, facts.unusable_architectures)


# --- mounts ---------------------------------------------------------------------------------------------------


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def _default_mounts() -> list[dict[str, Any]]:
    return [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro", "nosuid", "noexec", "nodev"),
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
    ]


# Option -> the flag it sets or clears; options of one flag replace each other (moby pkg/mount/flags_linux.go).
_MOUNT_FLAGS = {
    "ro": "ro", "rw": "ro", "suid": "nosuid", "nosuid": "nosuid", "dev": "nodev", "nodev": "nodev", "exec": "noexec",
    "noexec": "noexec", "sync": "sync", "async": "sync", "dirsync": "dirsync", "remount": "remount", "mand": "mand",
    "nomand": "mand", "atime": "noatime", "noatime": "noatime", "diratime": "nodiratime", "nodiratime": "nodiratime",
    "bind": "bind", "rbind": "rbind", "relatime": "relatime", "norelatime": "relatime", "strictatime": "strictatime",
    "nostrictatime": "strictatime", "unbindable": "propagation", "runbindable": "propagation",
    "private": "propagation", "rprivate": "propagation", "shared": "propagation", "rshared": "propagation",
    "slave": "propagation", "rslave": "propagation",
}  # fmt: skip
_TMPFS_DATA = frozenset(("", "size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol"))


def merge_tmpfs_options(options: Sequence[str]) -> list[str]:
    """Drop what a later option overrides.

    Raises: SystemFailure `invalid tmpfs option ["zz"]`. Source: moby pkg/mount/flags.go MergeTmpfsOptions.
    """
    seen: set[str] = set()
    result: list[str] = []
    for option in reversed(options):
        if option == "defaults":
            continue
        key = _MOUNT_FLAGS.get(option, "")
        if not key:
            name, equals, value = option.partition("=")
            if not equals or name not in _TMPFS_DATA:
                parts = [name, value] if equals else [name]
                raise SystemFailure("invalid tmpfs option [" + " ".join(f'"{part}"' for part in parts) + "]")
            key = "data " + name
        if key not in seen:
            seen.add(key)
            result.insert(0, option)
    return result


def _depth(destination: str) -> int:
    return len([part for part in destination.split("/") if part])


def _shm_mounts(host_config: HostConfig, inputs: SpecInputs) -> list[dict[str, Any]]:
    mode = host_config.ipc_mode
    if mode == "none":
        return []
    if inputs.shm_path:
        return [_mount("/dev/shm", "bind", inputs.shm_path, "rbind", "rprivate")]
    size = f"size={host_config.shm_size}"
    return [_mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", size)]


def _user_mounts(host_config: HostConfig, inputs: SpecInputs) -> list[dict[str, Any]]:
    """What volumes resolved, and HostConfig.Tmpfs, which hides a volume of the image at the same place."""
    tmpfs = host_config.tmpfs or {}
    mounts = []
    for mount in inputs.mounts:
        if mount.destination not in tmpfs:
            mounts.append(_mount(mount.destination, mount.type, mount.source, *mount.options))
        elif mount.type == "tmpfs":
            raise InvalidParameter(f"Duplicate mount point: {mount.destination}")
    for destination, text in sorted(tmpfs.items()):
        options = ["noexec", "nosuid", "nodev", "rprivate", *(text.split(",") if text else ())]
        mounts.append(_mount(destination, "tmpfs", "tmpfs", *merge_tmpfs_options(options)))
    return sorted(mounts, key=lambda mount: _depth(mount["destination"]))


def _build_mounts(host_config: HostConfig, inputs: SpecInputs) -> list[dict[str, Any]]:
    user = _user_mounts(host_config, inputs)
    by_user = {mount["destination"] for mount in user}
    defaults = [
        mount
        for mount in [*_default_mounts(), *_shm_mounts(host_config, inputs)]
        if mount["destination"] not in by_user and not ("/dev" in by_user and mount["destination"].startswith("/dev/"))
    ]
    files = (
        ("/etc/resolv.conf", inputs.resolv_conf_path),
        ("/etc/hostname", inputs.hostname_path),
        ("/etc/hosts", inputs.hosts_path),
    )
    network = [
        _mount(destination, "bind", source, "rbind", "rprivate")
        for destination, source in files
        if source and destination not in by_user
    ]
    if host_config.readonly_rootfs:
        for mount in [*defaults, *network]:
            destination = mount["destination"]
            if destination not in ("/proc", "/dev") and not destination.startswith("/dev/"):
                _add_option(mount, "ro")
    if host_config.privileged:
        for mount in defaults:
            if mount["destination"] == "/sys" or mount["type"] == "cgroup":
                mount["options"] = [option for option in mount["options"] if option != "ro"]
    return [*defaults, *user, *network]


def _add_option(mount: dict[str, Any], option: str) -> None:
    if option not in mount["options"]:
        mount["options"].append(option)


def _rootfs_propagation(mounts: Sequence[dict[str, Any]]) -> str:
    options = {option for mount in mounts for option in mount["options"]}
    if options & {"shared", "rshared"}:
        return "shared"
    return "rslave" if options & {"slave", "rslave"} else ""


# --- resources ------------------------------------------------------------------------------------------------

_DEVICE_RULE = re.compile(r"([acb]) ([0-9]+|\*):([0-9]+|\*) ([rwm]{1,3})", re.ASCII)


def _device_rule(allow: bool, access: str, kind: str = "", major: int = -1, minor: int = -1) -> dict[str, Any]:
    rule: dict[str, Any] = {"allow": allow}
    if kind:
        rule |= {"type": kind, "major": major, "minor": minor}
    return rule | {"access": access}


def _default_device_rules() -> list[dict[str, Any]]:
    allowed = [_device_rule(True, "rwm", "c", major, minor) for major, minor in
               ((1, 5), (1, 3), (1, 9), (1, 8), (5, 0), (5, 1))]  # fmt: skip
    return [_device_rule(False, "rwm"), *allowed, _device_rule(False, "rwm", "c", 10, 229)]  # 10:229 is /dev/fuse


def _parse_device_rule(text: str) -> dict[str, Any]:
    match = _DEVICE_RULE.fullmatch(text)
    if match is None:
        raise SystemFailure(f"invalid device cgroup rule format: '{text}'")
    major, minor = (-1 if part == "*" else int(part) for part in match.group(2, 3))
    return _device_rule(True, match[4], match[1], major, minor)


def _device(node: DeviceNode) -> dict[str, Any]:
    return {
        "path": node.path,
        "type": node.kind,
        "major": node.major,
        "minor": node.minor,
        "fileMode": node.mode,
        "uid": node.uid,
        "gid": node.gid,
    }


def build_devices(host_config: HostConfig, inputs: SpecInputs) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Device nodes to make, and the rules of the device cgroup."""
    if host_config.privileged:
        return [_device(node) for node in inputs.host_devices], [_device_rule(True, "rwm")]
    rules = _default_device_rules()
    for node, permissions in inputs.devices:
        rules.append(_device_rule(True, permissions, node.kind, node.major, node.minor))
    rules += [_parse_device_rule(text) for text in host_config.device_cgroup_rules or ()]
    return [_device(node) for node, _ in inputs.devices], rules


def _memory(host_config: HostConfig) -> dict[str, Any]:
    memory: dict[str, Any] = {}
    for key, value in (
        ("limit", host_config.memory),
        ("reservation", host_config.memory_reservation),
        ("kernel", host_config.kernel_memory),
        ("swap", host_config.memory_swap),
    ):
        if value > 0:
            memory[key] = value
    if host_config.memory_swappiness is not None and host_config.memory_swappiness != -1:
        memory["swappiness"] = host_config.memory_swappiness
    if host_config.oom_kill_disable is not None:
        memory["disableOOMKiller"] = host_config.oom_kill_disable
    return memory


def _cpu(host_config: HostConfig) -> dict[str, Any]:
    cpu: dict[str, Any] = {"shares": host_config.cpu_shares}
    if host_config.nano_cpus > 0:
        cpu["period"] = 100_000
        cpu["quota"] = host_config.nano_cpus // 10_000
    for key, value in (
        ("period", host_config.cpu_period),
        ("quota", host_config.cpu_quota),
        ("realtimePeriod", host_config.cpu_realtime_period),
        ("realtimeRuntime", host_config.cpu_realtime_runtime),
    ):
        if value != 0:
            cpu[key] = value
    for key, text in (("cpus", host_config.cpuset_cpus), ("mems", host_config.cpuset_mems)):
        if text:
            cpu[key] = text
    return cpu


def _block_io(host_config: HostConfig, numbers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    block: dict[str, Any] = {}
    if host_config.blkio_weight:
        block["weight"] = host_config.blkio_weight

    def entry(path: str, key: str, value: int) -> dict[str, Any]:
        if path not in numbers:
            raise SystemFailure(f"no such device: {path}")
        major, minor = numbers[path]
        return {"major": major, "minor": minor, key: value}

    if host_config.blkio_weight_device:
        block["weightDevice"] = [entry(each.path, "weight", each.weight) for each in host_config.blkio_weight_device]
    throttles: tuple[tuple[str, list[ThrottleDevice] | None], ...] = (
        ("throttleReadBpsDevice", host_config.blkio_device_read_bps),
        ("throttleWriteBpsDevice", host_config.blkio_device_write_bps),
        ("throttleReadIOPSDevice", host_config.blkio_device_read_iops),
        ("throttleWriteIOPSDevice", host_config.blkio_device_write_iops),
    )
    for key, devices in throttles:
        if devices:
            block[key] = [entry(each.path, "rate", each.rate) for each in devices]
    return block


def build_resources(
    host_config: HostConfig, device_numbers: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, Any]:
    """`linux.resources` without devices: also what `update` gives to the runtime."""
    resources: dict[str, Any] = {}
    if memory := _memory(host_config):
        resources["memory"] = memory
    resources["cpu"] = _cpu(host_config)
    # 0 and -1 are both unlimited, and nothing says so to all runtimes: crun 1.8 writes either into pids.max.
    if host_config.pids_limit > 0:
        resources["pids"] = {"limit": host_config.pids_limit}
    if block := _block_io(host_config, device_numbers or {}):
        resources["blockIO"] = block
    return resources


def build_rlimits(host_config: HostConfig, facts: HostFacts, warnings: list[str]) -> list[dict[str, Any]]:
    """Ulimits as rlimits; without CAP_SYS_RESOURCE those above our own hard limit are cut, with a warning.

    Raises: SystemFailure for an unknown name or a soft limit above the hard one.
    """
    rlimits = []
    for ulimit in host_config.ulimits or ():
        if ulimit.name not in RLIMIT_NAMES:
            raise SystemFailure(f"invalid ulimit type: {ulimit.name}")
        hard = RLIM_INFINITY if ulimit.hard < 0 else ulimit.hard
        soft = RLIM_INFINITY if ulimit.soft < 0 else ulimit.soft
        if soft > hard:
            raise SystemFailure(
                f"ulimit soft limit must be less than or equal to hard limit: {ulimit.soft} > {ulimit.hard}"
            )
        ceiling = facts.hard_limits.get(ulimit.name, RLIM_INFINITY)
        if hard > ceiling and not facts.can_raise_limits:
            warnings.append(f"ulimit {ulimit.name} cut to {ceiling}: the engine may not raise it")
            soft, hard = min(soft, ceiling), ceiling
        rlimits.append({"type": f"RLIMIT_{ulimit.name.upper()}", "hard": hard, "soft": soft})
    return rlimits


# --- the whole ------------------------------------------------------------------------------------------------


def uses_init(host_config: HostConfig, *, default: bool) -> bool:
    """Say whether the init binary is process 1; only a container with a pid namespace of its own has one."""
    return not host_config.pid_mode and (default if host_config.init is None else host_config.init)


def _namespaces(host_config: HostConfig, inputs: SpecInputs) -> list[dict[str, Any]]:
    namespaces: list[dict[str, Any]] = [{"type": "mount"}]
    if inputs.netns_path is not None:
        namespaces.append({"type": "network", "path": inputs.netns_path} if inputs.netns_path else {"type": "network"})
    if host_config.uts_mode != "host":
        namespaces.append({"type": "uts"})
    for kind, mode, path in (
        ("pid", host_config.pid_mode, inputs.pid_namespace),
        ("ipc", host_config.ipc_mode, inputs.ipc_namespace),
    ):
        if mode != "host":
            namespaces.append({"type": kind, "path": path} if path else {"type": kind})
    if inputs.facts.cgroup_version == 2:
        # Without one of its own a container on cgroup v2 would see the whole tree of the host.
        namespaces.append({"type": "cgroup"})
    return namespaces


def _check_ipc_mode(mode: str) -> None:
    # The only mode that is not checked at create and does not act as private either.
    if mode not in ("", "none", "private", "shareable", "host") and not mode.startswith("container:"):
        raise SystemFailure(f"invalid IPC mode: {mode}")


def cgroups_path(container: Container, driver: str, parent: str) -> str:
    """Where the runtime makes the cgroup: a path, or `slice:prefix:name` for systemd."""
    parent = container.host_config.cgroup_parent or parent
    if driver == "systemd":
        return f"{parent or 'system.slice'}:docker:{container.id}"
    return f"{(parent or '/docker').rstrip('/')}/{container.id}"


def full_hostname(config: ContainerConfig) -> str:
    return f"{config.hostname}.{config.domainname}" if config.domainname else config.hostname


def _capabilities(bounding: list[str], user: User) -> dict[str, Any]:
    # Inheritable and ambient stay empty (CVE-2022-24769). A user other than root gets what execve would leave it.
    effective = bounding if user.uid == 0 else []
    return {"bounding": bounding, "effective": effective, "inheritable": [], "permitted": effective, "ambient": []}


def build_process(
    container: Container, user: User, bounding: list[str], security: SecurityOptions, inputs: SpecInputs
) -> dict[str, Any]:
    config, host_config = container.config, container.host_config
    arguments = [container.path, *container.args]
    if uses_init(host_config, default=inputs.init_default):
        arguments = ["/dev/init", "--", *arguments]
    process: dict[str, Any] = {"terminal": config.tty}
    if config.tty and host_config.console_size != (0, 0):
        height, width = host_config.console_size
        process["consoleSize"] = {"height": height, "width": width}
    process |= {
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.additional_gids)},
        "args": arguments,
        "env": build_env(config, inputs.link_env),
        "cwd": config.working_dir or "/",
        "capabilities": _capabilities(bounding, user),
        "rlimits": build_rlimits(host_config, inputs.facts, inputs.warnings),
        "oomScoreAdj": _oom_score_adj(host_config.oom_score_adj, inputs),
    }
    wanted = security.no_new_privileges
    process["noNewPrivileges"] = inputs.no_new_privileges if wanted is None else wanted
    profile = apparmor_profile(security, inputs.facts, privileged=host_config.privileged)
    if profile:
        process["apparmorProfile"] = profile
    return process


def apparmor_profile(security: SecurityOptions, facts: HostFacts, *, privileged: bool) -> str:
    """What confines a container, where the kernel has AppArmor; "" for nothing."""
    if not facts.apparmor:
        return ""
    default = "docker-default" if facts.apparmor_default else ""
    return security.apparmor or ("unconfined" if privileged else default)


def _oom_score_adj(wanted: int, inputs: SpecInputs) -> int:
    own = inputs.facts.oom_score_adj
    if wanted >= own or inputs.facts.can_raise_limits:
        return wanted
    inputs.warnings.append(f"oom score adjustment {wanted} raised to {own}: the engine may not go lower")
    return own


def build_spec(container: Container, inputs: SpecInputs) -> dict[str, Any]:
    """The OCI runtime spec of this container for this start.

    What cannot be given as asked, but does not stop a start, is told in `inputs.warnings`.
    Raises: SystemFailure, with the texts of the engine we replace: unknown user, device rule, capability, ...
    """
    config, host_config = container.config, container.host_config
    _check_ipc_mode(host_config.ipc_mode)
    security = parse_security_options(host_config.security_opt)
    user = find_user(config.user, inputs.passwd, inputs.group, host_config.group_add or ())
    bounding = bounding_set(
        host_config.cap_add, host_config.cap_drop, privileged=host_config.privileged, facts=inputs.facts
    )
    missing = {capability_name(text) for text in host_config.cap_add or ()} - inputs.facts.capabilities - {"ALL"}
    if missing and not host_config.privileged:
        inputs.warnings.append(f"not available on this machine: {', '.join(sorted(missing))}")
    mounts = _build_mounts(host_config, inputs)
    if uses_init(host_config, default=inputs.init_default):
        mounts.append(_mount("/dev/init", "bind", inputs.init_path, "bind", "ro"))
    devices, device_rules = build_devices(host_config, inputs)
    resources = build_resources(host_config, inputs.device_numbers)
    resources["devices"] = device_rules
    linux: dict[str, Any] = {
        "cgroupsPath": cgroups_path(container, inputs.cgroup_driver, inputs.cgroup_parent),
        "namespaces": _namespaces(host_config, inputs),
        "resources": resources,
        "devices": devices,
    }
    if host_config.sysctls:
        linux["sysctl"] = dict(sorted(host_config.sysctls.items()))
    if seccomp := _seccomp(host_config, security, bounding, inputs):
        linux["seccomp"] = seccomp
    if propagation := _rootfs_propagation(mounts):
        linux["rootfsPropagation"] = propagation
    if not host_config.privileged:
        linux["maskedPaths"] = list(host_config.masked_paths or ())
        linux["readonlyPaths"] = list(host_config.readonly_paths or ())
    spec: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "process": build_process(container, user, bounding, security, inputs),
        "root": {"path": inputs.rootfs, "readonly": host_config.readonly_rootfs},
        "mounts": mounts,
        "linux": linux,
    }
    if host_config.uts_mode != "host":
        spec["hostname"] = full_hostname(config)
    return spec
