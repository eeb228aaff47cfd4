"""A container's files as it would see them, with volumes, binds and network files, for this process alone.

The process gets a mount namespace of its own, mounts there what the container would mount, and goes below it (chroot):
no link and no `..` leads out, and when the process ends, however it ends, everything is unmounted with its namespace.

    rootfs     where the overlay of a running container is mounted; or
    overlay    {"lower": [...], "upper", "work", "at"}: of one that does not run; `at` is any directory to mount it on,
               and stays as it is. Without `upper` nothing that is done is kept: places of mounts that are missing are
               made in memory
    mounts     [{"source", "destination", "writable"}]: binds and volumes; what else the runtime mounts (/proc, tmpfs)
               is not shown, as by dockerd

Source: moby daemon/archive.go (Mount, mountVolumes), which does it in the daemon's own namespace.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from typing import Any

from balenapy.errors import SystemFailure
from balenapy.linux import syscalls
from balenapy.worker import process

SCRATCH_BYTES = 4 << 20  # directories for mounts
_PATH = os.O_PATH | os.O_CLOEXEC


def enter(view: dict[str, Any]) -> None:
    """Mount and go below. Raises: SystemFailure."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    # A slave, not private: what the daemon unmounts later is unmounted here too.
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_SLAVE)
    overlay = view.get("overlay")
    with ExitStack() as stack:
        mounts = []
        for one in view["mounts"]:
            # Opened now: what is mounted below may hide them.
            try:
                source = os.open(one["source"], _PATH)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and overlay is not None and not overlay["upper"]:
                    continue  # a start would make it; to look at, there is nothing
                raise SystemFailure(f"cannot mount {one['source']}: {process.describe(error)}") from error
            stack.callback(os.close, source)
            mounts.append((source, os.fsencode(one["destination"]), bool(one["writable"])))
        root = view["rootfs"] if overlay is None else _mount_overlay(overlay, stack)
        fd = os.open(root, _PATH | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        for source, destination, writable in sorted(mounts, key=lambda mount: mount[1].count(b"/")):
            try:
                _bind(fd, source, destination, writable=writable)
            except OSError as error:
                raise process.failed("mount", destination.lstrip(b"/"), error) from error
    process.enter(root)


def _mount_overlay(overlay: dict[str, Any], stack: ExitStack) -> str:
    """Mount it; where it is now."""
    at = str(overlay["at"])
    lower = []
    for path in overlay["lower"]:  # opened now: they may be below `at`
        fd = os.open(path, _PATH | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        lower.append(f"/proc/self/fd/{fd}")
    if overlay["upper"]:
        syscalls.mount_overlay(at, lower, overlay["upper"], overlay["work"])
        return at
    syscalls.mount("scratch", at, "tmpfs", syscalls.MS_NODEV | syscalls.MS_NOSUID, f"mode=700,size={SCRATCH_BYTES}")
    for name in ("upper", "work", "root"):
        os.mkdir(f"{at}/{name}", 0o755)
    status = os.stat(lower[0])
    os.chmod(f"{at}/upper", stat.S_IMODE(status.st_mode))
    os.chown(f"{at}/upper", status.st_uid, status.st_gid)
    os.utime(f"{at}/upper", ns=(status.st_atime_ns, status.st_mtime_ns))
    syscalls.mount_overlay(f"{at}/root", lower, f"{at}/upper", f"{at}/work")
    return f"{at}/root"


def _bind(root: int, source: int, destination: bytes, *, writable: bool) -> None:
    place = _mount_point(root, destination, directory=stat.S_ISDIR(os.fstat(source).st_mode))
    try:
        syscalls.mount(f"/proc/self/fd/{source}", f"/proc/self/fd/{place}", flags=syscalls.MS_BIND | syscalls.MS_REC)
    finally:
        os.close(place)
    mounted = syscalls.open_in_root(root, destination, os.O_PATH)
    try:
        here = f"/proc/self/fd/{mounted}"
        syscalls.mount("none", here, flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
        if not writable:
            syscalls.mount("none", here, flags=syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
    finally:
        os.close(mounted)


def _mount_point(root: int, path: bytes, *, directory: bool) -> int:
    """Open the place of a mount; made like a start makes it when it is not there."""
    try:
        return syscalls.open_in_root(root, path, os.O_PATH)
    except FileNotFoundError:
        pass
    parts = [part for part in path.split(b"/") if part]
    for end in range(1, len(parts) + 1):
        last = end == len(parts)
        try:
            os.close(syscalls.open_in_root(root, b"/".join(parts[:end]), os.O_PATH))
            continue
        except FileNotFoundError:
            pass
        parent = syscalls.open_in_root(root, b"/".join(parts[: end - 1]), os.O_PATH | os.O_DIRECTORY)
        try:
            if directory or not last:
                os.mkdir(parts[end - 1], 0o755, dir_fd=parent)
            else:
                os.close(os.open(parts[end - 1], os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755, dir_fd=parent))
        finally:
            os.close(parent)
    return syscalls.open_in_root(root, path, os.O_PATH)
