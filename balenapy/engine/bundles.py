"""The directory of one run of a container: its root filesystem mounted, its spec written; and all of that taken away.

    <exec-root>/containers/<id>/
        rootfs/      the overlay      shm/   tmpfs of a shareable IPC namespace
        config.json  pid  conmon.pid  attach  ctl  winsz  log  oom       (see linux/conmon.py)

Nothing here survives a reboot, and nothing here is worth keeping after the run.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from balenapy.core import cdi
from balenapy.core.container import Container, Status
from balenapy.core.ociconfig import SpecInputs, SpecMount, build_spec, uses_init
from balenapy.errors import Conflict, SystemFailure
from balenapy.linux import hostfacts, syscalls
from balenapy.linux.conmon import Bundle
from balenapy.linux.process import TOOL_ENV

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.engine.networks import NetworkAttachment

log = logging.getLogger(__name__)

INIT_NAMES = ("balena-engine-init", "docker-init", "tini")  # tini by any name
PASSWD_MAX_BYTES = 4 << 20  # /etc/passwd and /etc/group belong to the image's author


class Bundles:
    """Makes and removes bundles. Methods that touch files block: they are for a thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._root = engine.config.exec_root / "containers"
        self._seccomp = ""
        if engine.config.seccomp_profile:
            self._seccomp = Path(engine.config.seccomp_profile).read_text()

    def of(self, container_id: str) -> Bundle:
        return Bundle(self._root / container_id)

    def all_ids(self) -> list[str]:
        """Of the containers that have a bundle, whatever became of them."""
        try:
            return os.listdir(self._root)
        except FileNotFoundError:
            return []

    # -- make --

    def mount_rootfs(self, container: Container) -> None:
        """Make the directory and mount the container's filesystem. Blocks.

        Raises: NotFound, SystemFailure.
        """
        bundle = self.of(container.id)
        dirs = self._engine.snapshots.mounts(container.id)
        try:
            bundle.rootfs.mkdir(mode=0o700, parents=True, exist_ok=True)
            syscalls.mount_overlay(bundle.rootfs, list(dirs.lower), dirs.upper, dirs.work)
            if self._makes_shm(container):
                shm = bundle.path / "shm"
                shm.mkdir(mode=0o700, exist_ok=True)
                flags = syscalls.MS_NOSUID | syscalls.MS_NOEXEC | syscalls.MS_NODEV
                syscalls.mount("shm", shm, "tmpfs", flags, f"mode=1777,size={container.host_config.shm_size}")
        except OSError as error:
            raise SystemFailure(f"error creating overlay mount to {bundle.rootfs}: {error.strerror}") from error

    def write_spec(
        self, container: Container, mounts: Sequence[SpecMount], attachment: NetworkAttachment
    ) -> dict[str, Any]:
        """Build config.json out of the record and this machine. Blocks.

        Raises: Conflict, InvalidParameter, SystemFailure.
        """
        inputs = self._inputs(container, mounts, attachment)
        spec = build_spec(container, inputs)
        if names := _cdi_names(container):
            directories = self._engine.config.cdi_directories or cdi.DIRECTORIES
            edits = cdi.select(names, hostfacts.read_cdi_files(directories, cdi.MAX_FILE_BYTES))
            cdi.apply(spec, edits, hostfacts.device_node)
        for warning in inputs.warnings:
            log.warning("container=%s %s", container.short_id, warning)
        self.of(container.id).config.write_text(json.dumps(spec))
        return spec

    def _inputs(
        self, container: Container, mounts: Sequence[SpecMount], attachment: NetworkAttachment
    ) -> SpecInputs:
        engine, config, host_config = self._engine, self._engine.config, container.host_config
        bundle = self.of(container.id)
        inputs = SpecInputs(
            rootfs=str(bundle.rootfs),
            facts=engine.containers.host_facts,
            mounts=mounts,
            netns_path=attachment.netns_path,
            hosts_path=attachment.hosts_path,
            hostname_path=attachment.hostname_path,
            resolv_conf_path=attachment.resolv_path,
            shm_path=self._shm_path(container),
            pid_namespace=self._namespace(container, "pid", host_config.pid_mode),
            ipc_namespace=self._namespace(container, "ipc", host_config.ipc_mode),
            init_default=config.init,
            link_env=engine.containers.link_env(container),
            passwd=read_in_rootfs(bundle.rootfs, "etc/passwd"),
            group=read_in_rootfs(bundle.rootfs, "etc/group"),  # root too is a member of groups there
            cgroup_driver=config.cgroup_driver,
            cgroup_parent=config.cgroup_parent,
            no_new_privileges=config.no_new_privileges,
            seccomp_profile=self._seccomp,
        )
        if uses_init(host_config, default=config.init):
            inputs.init_path = self._init_path()
        if host_config.privileged:
            inputs.host_devices = hostfacts.host_devices()
        paths = [mapping for mapping in host_config.devices or () if not cdi.is_name(mapping.path_on_host)]
        if paths:
            inputs.devices = hostfacts.resolve_devices(paths)
        inputs.device_numbers = hostfacts.device_numbers(host_config)
        return inputs

    def _init_path(self) -> str:
        configured = self._engine.config.init_path
        for name in (configured,) if configured else INIT_NAMES:
            path = shutil.which(name, path=TOOL_ENV["PATH"])
            if path is not None:
                return path
        raise SystemFailure(f"no init binary: {configured or ', '.join(INIT_NAMES)} not found in PATH")

    def _makes_shm(self, container: Container) -> bool:
        return container.host_config.ipc_mode in ("", "shareable")

    def _shm_path(self, container: Container) -> str:
        mode = container.host_config.ipc_mode
        if mode == "host":
            return "/dev/shm"
        if mode.startswith("container:"):
            return str(self.of(mode.removeprefix("container:")).path / "shm")
        return str(self.of(container.id).path / "shm") if self._makes_shm(container) else ""

    def _namespace(self, container: Container, kind: str, mode: str) -> str:
        """The path of another container's namespace; "" when none is joined.

        Raises: Conflict, SystemFailure, with the texts of BEHAVIOUR 5.1.
        """
        if not mode.startswith("container:"):
            return ""
        other = self._engine.containers.find(mode.removeprefix("container:"))
        prefix = f"can't join IPC of container {other.id}: " if kind == "ipc" else ""
        if other.state.status is Status.RESTARTING:
            raise Conflict(f"{prefix}Container {other.id} is restarting, wait until the container is running")
        if not other.state.running:
            raise Conflict(f"{prefix}container {other.id} is not running")
        if kind == "ipc" and not self._makes_shm(other):
            raise SystemFailure(f"{prefix}non-shareable IPC")
        return f"/proc/{other.state.pid}/ns/{kind}"

    # -- take away --

    def unmount(self, container_id: str) -> None:
        """Unmount and remove the directory. Blocks; idempotent; never removes what lies in a mount."""
        path = self.of(container_id).path
        for name in ("rootfs", "shm"):
            while syscalls.unmount_if_mounted(path / name):
                pass
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        os.rmdir(entry.path)
                    else:
                        os.unlink(entry.path)
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                raise
            log.error("run time directory cannot be removed path=%s error=%s", path, error.strerror)


def _cdi_names(container: Container) -> list[str]:
    """`--device nvidia.com/gpu=all`: devices that files of their vendor describe."""
    names = [mapping.path_on_host for mapping in container.host_config.devices or ()]
    return [name for name in names if cdi.is_name(name)]


def read_in_rootfs(rootfs: Path, path: str) -> str:
    """A text file of the container, found as the container would find it; "" if there is none."""
    try:
        fd = syscalls.open_in_root(rootfs, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    with open(fd, "rb") as file:
        try:
            return file.read(PASSWD_MAX_BYTES).decode(errors="replace")
        except OSError:  # a directory
            return ""
