"""What this machine and this process can do: read once at start, given to the pure rules in `core`.

Devices are looked up here too, at each start of a container that asks for some.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from balenapy.core.container import DeviceMapping, HostConfig
from balenapy.core.creation import KernelSupport
from balenapy.core.ociconfig import ALL_CAPABILITIES, RLIM_INFINITY, RLIMIT_NAMES, DeviceNode, HostFacts
from balenapy.core.staging import Pressure, parse_pressure
from balenapy.errors import SystemFailure
from balenapy.linux import apparmor
from balenapy.linux.cgroups import Cgroups

GO_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv6l": "arm",
    "armv7l": "arm",
    "armv8l": "arm",
    "i686": "386",
    "riscv64": "riscv64",
    "s390x": "s390x",
    "ppc64le": "ppc64le",
}


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_pressure() -> Pressure:
    """How much waits for processors and memory; zeros where the kernel does not tell. Quick."""
    found = {}
    for name in ("cpu", "memory"):
        try:
            found[name] = parse_pressure(Path(f"/proc/pressure/{name}").read_text())
        except OSError:  # not compiled in, or switched off (EOPNOTSUPP)
            found[name] = 0.0
    return Pressure(**found)


def read_host_facts(cgroups: Cgroups) -> HostFacts:
    status = _status()
    bounding = int(status.get("CapBnd", "0"), 16)
    capabilities = frozenset(name for bit, name in enumerate(ALL_CAPABILITIES) if bounding >> bit & 1)
    return HostFacts(
        architecture=go_architecture(),
        capabilities=capabilities,
        cgroup_version=cgroups.version,
        seccomp="Seccomp" in status,
        unusable_architectures=_unusable_architectures(),
        apparmor=apparmor.is_enabled(),
        apparmor_default=apparmor.is_enabled() and apparmor.ensure_default_profile(),
        can_raise_limits="CAP_SYS_RESOURCE" in capabilities,
        hard_limits=_hard_limits(),
        oom_score_adj=int(_read("/proc/self/oom_score_adj") or "0"),
    )


def go_architecture() -> str:
    machine = platform.machine()
    return GO_ARCHITECTURES.get(machine, machine)


_X32_GETPID = 0x40000000 + 39


def _unusable_architectures() -> frozenset[str]:
    if platform.machine() != "x86_64":
        return frozenset()
    unusable = set()
    ctypes.set_errno(0)
    if ctypes.CDLL(None, use_errno=True).syscall(_X32_GETPID) == -1:  # ENOSYS: built without the x32 ABI, as Debian's
        unusable.add("SCMP_ARCH_X32")
    if os.path.isdir("/proc/sys/abi") and not os.path.exists("/proc/sys/abi/vsyscall32"):
        unusable.add("SCMP_ARCH_X86")  # built without IA32 emulation
    return frozenset(unusable)


def _status() -> dict[str, str]:
    lines = _read("/proc/self/status").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _hard_limits() -> dict[str, int]:
    limits = {}
    for name in RLIMIT_NAMES:
        number = getattr(resource, f"RLIMIT_{name.upper()}", None)
        if number is None:  # locks: not in Python's list
            continue
        _, hard = resource.getrlimit(number)
        limits[name] = RLIM_INFINITY if hard == resource.RLIM_INFINITY else hard
    return limits


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


# --- what can be limited --------------------------------------------------------------------------------------


def read_kernel_support(cgroups: Cgroups) -> KernelSupport:
    """What `create` may be asked for here. Source: moby pkg/sysinfo/sysinfo_linux.go; v2: 20.10's."""
    forwarding = _read("/proc/sys/net/ipv4/ip_forward") != "0"
    cpu_count = len(os.sched_getaffinity(0))
    if cgroups.version == 2:
        return KernelSupport(
            memory_limit=cgroups.has("memory"),
            swap_limit=cgroups.has("memory") and _v2_swap(),
            memory_reservation=cgroups.has("memory"),
            kernel_memory=False,
            oom_kill_disable=False,
            memory_swappiness=False,
            cpu_shares=cgroups.has("cpu"),
            cpu_cfs_period=cgroups.has("cpu"),
            cpu_cfs_quota=cgroups.has("cpu"),
            cpu_realtime=False,
            cpuset=cgroups.has("cpuset"),
            cpus=_read("/sys/fs/cgroup/cpuset.cpus.effective"),
            mems=_read("/sys/fs/cgroup/cpuset.mems.effective"),
            cpu_count=cpu_count,
            blkio_weight=cgroups.has("io"),
            blkio_weight_device=cgroups.has("io"),
            blkio_throttle=cgroups.has("io"),
            pids_limit=cgroups.has("pids"),
            ipv4_forwarding=forwarding,
        )

    def has(controller: str, name: str) -> bool:
        hierarchy = cgroups.controller_mount(controller)
        return hierarchy is not None and (hierarchy.mount / name).exists()

    cpuset = cgroups.controller_mount("cpuset")
    return KernelSupport(
        memory_limit=has("memory", "memory.limit_in_bytes"),
        swap_limit=has("memory", "memory.memsw.limit_in_bytes"),
        memory_reservation=has("memory", "memory.soft_limit_in_bytes"),
        kernel_memory=has("memory", "memory.kmem.limit_in_bytes"),
        oom_kill_disable=has("memory", "memory.oom_control"),
        memory_swappiness=has("memory", "memory.swappiness"),
        cpu_shares=has("cpu", "cpu.shares"),
        cpu_cfs_period=has("cpu", "cpu.cfs_period_us"),
        cpu_cfs_quota=has("cpu", "cpu.cfs_quota_us"),
        cpu_realtime=has("cpu", "cpu.rt_period_us"),
        cpuset=cpuset is not None,
        cpus=_read(cpuset.mount / "cpuset.cpus") if cpuset else "",
        mems=_read(cpuset.mount / "cpuset.mems") if cpuset else "",
        cpu_count=cpu_count,
        blkio_weight=has("blkio", "blkio.weight") or has("blkio", "blkio.bfq.weight"),
        blkio_weight_device=has("blkio", "blkio.weight_device") or has("blkio", "blkio.bfq.weight_device"),
        blkio_throttle=has("blkio", "blkio.throttle.read_bps_device"),
        pids_limit=cgroups.has("pids"),
        ipv4_forwarding=forwarding,
    )


def _v2_swap() -> bool:
    # The root of the tree has no such file; any cgroup below it tells.
    return any(Path("/sys/fs/cgroup").glob("*/memory.swap.max"))


# --- devices --------------------------------------------------------------------------------------------------

_SKIPPED = frozenset(("pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"))  # libcontainer/devices


def _node(path: str, status: os.stat_result, destination: str) -> DeviceNode | None:
    mode = status.st_mode
    kind = "c" if stat.S_ISCHR(mode) else "b" if stat.S_ISBLK(mode) else ""
    if not kind:
        return None
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return DeviceNode(destination, kind, major, minor, stat.S_IMODE(mode), status.st_uid, status.st_gid)


def _walk(directory: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in _SKIPPED:
                    yield from _walk(entry.path)
            elif entry.name != "console":
                yield entry


def host_devices(root: str = "/dev") -> list[DeviceNode]:
    """Every device node of the host: what a privileged container gets."""
    found = []
    for entry in _walk(root):
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # unplugged meanwhile
            continue
        node = _node(entry.path, status, entry.path)
        if node is not None:
            found.append(node)
    return found


def resolve_devices(mappings: Sequence[DeviceMapping]) -> list[tuple[DeviceNode, str]]:
    """HostConfig.Devices: a link is followed; a directory means every device below it.

    Raises: SystemFailure. Source: moby oci/devices_linux.go DevicesFromPath.
    """
    found: list[tuple[DeviceNode, str]] = []
    for mapping in mappings:
        source = mapping.path_on_host
        destination = mapping.path_in_container or source
        permissions = mapping.cgroup_permissions or "rwm"
        complaint = f'error gathering device information while adding custom device "{source}"'
        try:
            resolved = os.path.realpath(source) if os.path.islink(source) else source
            status = os.stat(resolved)
            if stat.S_ISDIR(status.st_mode):
                below = [
                    node
                    for entry in _walk(resolved)
                    if (node := _node(entry.path, entry.stat(), destination + entry.path[len(resolved) :]))
                ]
            else:
                one = _node(resolved, status, destination)
                below = [one] if one else []
        except FileNotFoundError:
            raise SystemFailure(f"{complaint}: no such file or directory") from None
        except OSError as error:
            raise SystemFailure(f"{complaint}: {error.strerror}") from error
        if not below:
            raise SystemFailure(f"{complaint}: not a device node")
        found += [(node, permissions) for node in below]
    return found


def device_node(path: str) -> DeviceNode:
    """The device node at a path; links are followed.

    Raises: SystemFailure.
    """
    try:
        node = _node(path, os.stat(path), path)
    except OSError as error:
        raise SystemFailure(f"{path}: {(error.strerror or str(error)).lower()}") from error
    if node is None:
        raise SystemFailure(f"{path}: not a device node")
    return node


def read_cdi_files(directories: Sequence[str], max_bytes: int) -> list[tuple[str, str]]:
    """The vendors' files, path and contents, in the order of their directories and names. What cannot be read is empty,
    and will be named as such when a device is wanted out of it."""
    found = []
    for directory in directories:
        try:
            names = sorted(name for name in os.listdir(directory) if name.endswith((".json", ".yaml", ".yml")))
        except OSError:
            continue
        for name in names:
            path = os.path.join(directory, name)
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    text = file.read(max_bytes + 1)
            except OSError:
                text = ""
            found.append((path, text if len(text) <= max_bytes else ""))
    return found


def device_numbers(host_config: HostConfig) -> dict[str, tuple[int, int]]:
    """Major and minor numbers of the devices that Blkio limits name.

    Raises: SystemFailure.
    """
    lists: Iterable[Sequence[object] | None] = (
        host_config.blkio_weight_device,
        host_config.blkio_device_read_bps,
        host_config.blkio_device_write_bps,
        host_config.blkio_device_read_iops,
        host_config.blkio_device_write_iops,
    )
    numbers: dict[str, tuple[int, int]] = {}
    for entry in (each for entries in lists for each in entries or ()):
        path = str(getattr(entry, "path", ""))
        try:
            status = os.stat(path)
        except OSError as error:
            raise SystemFailure(f"{path}: {error.strerror}") from error
        numbers[path] = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return numbers
