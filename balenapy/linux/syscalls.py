"""System calls that Python 3.11 does not offer, through libc. Nothing else uses ctypes.

Like the functions of `os`, these raise `OSError` with errno and path; the module that calls them
says what that means. Numbers of flags are those of linux/mount.h, linux/openat2.h and sched.h.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import stat
from collections.abc import Sequence

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_NOATIME = 1024
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MAX_SYMLINKS = 40  # the kernel's MAXSYMLINKS

_MOUNT_DATA_MAX = 4095  # mount(2) copies one page and ends it with a zero byte
_SYS_OPENAT2 = 437  # the same number on every architecture
_SYS_RENAMEAT2 = {"x86_64": 316, "i686": 353, "i386": 353, "armv6l": 382, "armv7l": 382, "armv8l": 382}
_RENAME_EXCHANGE = 2
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_OCTAL = re.compile(rb"\\([0-7]{3})")  # how mountinfo writes blanks

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.syncfs.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.syscall.restype = ctypes.c_long

PathLike = str | bytes | os.PathLike[str]


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _raise_errno(*paths: PathLike) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), *(os.fsdecode(path) for path in paths[:1]))


def mount(source: PathLike, target: PathLike, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). `data` is cut off by the kernel at one page; a longer one is refused here."""
    options = os.fsencode(data)
    if len(options) > _MOUNT_DATA_MAX:
        raise OSError(errno.E2BIG, "mount options are longer than a page", os.fsdecode(target))
    if _libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode() or None, flags, options or None):
        _raise_errno(target)


def bind_mount(source: PathLike, target: PathLike, *, recursive: bool = False, read_only: bool = False) -> None:
    """Bind `source` to `target`; read-only needs a second call, as mount(2) says."""
    depth = MS_REC if recursive else 0
    mount(source, target, flags=MS_BIND | depth)
    if read_only:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | depth)


def exchange(source: bytes, target: bytes, source_dir: int, target_dir: int) -> None:
    """renameat2(2) with RENAME_EXCHANGE: two names of one file system swap what they mean, at once."""
    number = _SYS_RENAMEAT2.get(os.uname().machine, 276)
    if _libc.syscall(number, source_dir, source, target_dir, target, _RENAME_EXCHANGE) != 0:
        _raise_errno(source)


def umount2(target: PathLike, flags: int = MNT_DETACH | UMOUNT_NOFOLLOW) -> None:
    """umount2(2), by default lazily and without following a link."""
    if _libc.umount2(os.fsencode(target), flags):
        _raise_errno(target)


def unmount_if_mounted(target: PathLike) -> bool:
    """Unmount lazily; False when nothing was mounted there or the path does not exist."""
    try:
        umount2(target)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return False
        raise
    return True


def syncfs(fd: int) -> None:
    """Write back everything of the file system that holds `fd`; ENOSPC and EIO are told from kernel 5.8."""
    if _libc.syncfs(fd):
        _raise_errno()


def setns(fd: int, nstype: int = 0) -> None:
    """Move the calling *thread* into the namespace behind `fd`."""
    if _libc.setns(fd, nstype):
        _raise_errno()


def unshare(flags: int) -> None:
    """Give the calling thread (a process, for some flags) namespaces of its own."""
    if _libc.unshare(flags):
        _raise_errno()


def mount_overlay(
    target: PathLike,
    lower: Sequence[PathLike],
    upper: PathLike | None = None,
    work: PathLike | None = None,
    *,
    options: str = "",
) -> None:
    """Mount an overlay at `target`; `lower` is top first; without `upper` it is read-only.

    mount(2) has one page for all options. When 127 layers do not fit, or a path holds a character with a
    meaning in the options, each directory is opened and named by its short link in /proc/self/fd.
    """
    if upper is None and len(lower) == 1:
        bind_mount(lower[0], target, read_only=True)  # an overlay needs two layers
        return
    flags = MS_RDONLY if upper is None else 0
    if upper is not None:
        options = ",".join(part for part in (options, *_overlay_exceptions()) if part)
    plain = _overlay_data([os.fsdecode(path) for path in lower], upper, work, options)
    special = any(c in os.fsdecode(path) for path in (*lower, upper or "", work or "") for c in ":,\\")
    if len(os.fsencode(plain)) <= _MOUNT_DATA_MAX and not special:
        mount("overlay", target, "overlay", flags, plain)
        return
    fds: list[int] = []
    try:

        def link(path: PathLike) -> str:
            fds.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            return f"/proc/self/fd/{fds[-1]}"

        short = _overlay_data(
            [link(path) for path in lower],
            None if upper is None else link(upper),
            None if work is None else link(work),
            options,
        )
        mount("overlay", target, "overlay", flags, short)
    finally:
        for fd in fds:
            os.close(fd)


@functools.cache
def _overlay_exceptions() -> tuple[str, ...]:
    """Switch off what some kernels do by default: with it an upper directory does not stand for itself.

    A directory that was renamed, or a file of which only the owner changed, would be there by name alone, its content
    somewhere below: no layer could be made of that. Source: moby daemon/graphdriver/overlay2/check.go.
    """
    found = []
    for name in ("redirect_dir", "metacopy"):
        try:
            with open(f"/sys/module/overlay/parameters/{name}") as file:
                if file.read(1) == "Y":
                    found.append(f"{name}=off")
        except FileNotFoundError:  # an older kernel, which cannot do it at all
            continue
    return tuple(found)


def _overlay_data(lower: Sequence[str], upper: PathLike | None, work: PathLike | None, options: str) -> str:
    data = f"lowerdir={':'.join(lower)}"
    if upper is not None and work is not None:
        data += f",upperdir={os.fsdecode(upper)},workdir={os.fsdecode(work)}"
    return f"{data},{options}" if options else data


def open_in_root(root: int | PathLike, path: PathLike, flags: int, mode: int = 0) -> int:
    """Open `path` as if `root` were `/`: neither `..`, an absolute link nor a race leads out of it.

    Args:
        root: an open directory or its path. flags: as for `os.open`; O_CLOEXEC is always set.
    """
    if not isinstance(root, int):
        root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return open_in_root(root_fd, path, flags, mode)
        finally:
            os.close(root_fd)
    flags |= os.O_CLOEXEC
    new = flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE  # else openat2 refuses a mode
    how = _OpenHow(flags, mode if new else 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    name = os.fsencode(path) or b"."
    while True:
        fd = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(root),
            ctypes.c_char_p(name),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        number = ctypes.get_errno()
        if number == errno.EAGAIN:  # a rename raced with `..`; openat2(2) says: again
            continue
        if number == errno.ENOSYS:  # before kernel 5.6
            return open_in_root_by_steps(root, name, flags, mode)
        raise OSError(number, os.strerror(number), os.fsdecode(path))


def open_in_root_by_steps(root_fd: int, path: bytes, flags: int, mode: int = 0) -> int:
    """`open_in_root` for kernels without openat2: one component at a time, links followed by hand."""
    pending = [part for part in path.split(b"/") if part not in (b"", b".")]
    want_directory = path.endswith(b"/")
    parents = [os.dup(root_fd)]
    followed = 0
    try:
        while pending:
            part = pending.pop(0)
            if part == b"..":
                if len(parents) > 1:
                    os.close(parents.pop())
                continue
            last = not pending
            try:
                fd = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parents[-1])
            except FileNotFoundError:
                if last and flags & os.O_CREAT:
                    return os.open(part, flags | os.O_NOFOLLOW, mode, dir_fd=parents[-1])
                raise
            kind = os.fstat(fd).st_mode
            follow = stat.S_ISLNK(kind) and (not last or want_directory or not flags & os.O_NOFOLLOW)
            if follow:
                os.close(fd)
                followed += 1
                if followed > MAX_SYMLINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(path))
                link = os.readlink(part, dir_fd=parents[-1])
                if link.startswith(b"/"):
                    while len(parents) > 1:
                        os.close(parents.pop())
                pending[:0] = [step for step in link.split(b"/") if step not in (b"", b".")]
            elif last:
                os.close(fd)
                extra = os.O_DIRECTORY if want_directory else 0
                return os.open(part, flags | extra | os.O_NOFOLLOW, mode, dir_fd=parents[-1])
            elif stat.S_ISDIR(kind):
                parents.append(fd)
            else:
                os.close(fd)
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(path))
        return os.open(b".", flags & ~os.O_CREAT, mode, dir_fd=parents[-1])
    finally:
        for fd in parents:
            os.close(fd)


def mount_points(below: PathLike) -> list[str]:
    """Where something is mounted at or below a directory, deepest first. Works for bind mounts too."""
    base = os.path.realpath(os.fsdecode(below))
    found = []
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            path = os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), line.split(b" ", 5)[4]))
            if path == base or path.startswith(f"{base}/"):
                found.append(path)
    return sorted(found, key=len, reverse=True)


def is_mount_point(path: PathLike) -> bool:
    """Whether something is mounted exactly there; False also when the path is gone."""
    return os.path.realpath(os.fsdecode(path)) in mount_points(path)


_PR_SET_PDEATHSIG = 1
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_CLASS_SHIFT = 13
_SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "armv8l": 314, "armv7l": 314, "armv6l": 314, "riscv64": 30}


def set_parent_death_signal(signum: int) -> None:
    """Have the kernel send us a signal when the *thread* that started us ends."""
    if _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signum), 0, 0, 0):
        _raise_errno()


def set_io_priority(io_class: int, level: int) -> None:
    """ioprio_set(2) for this process: class 1 real time, 2 best effort, 3 idle; level 0 (first) to 7."""
    number = _SYS_IOPRIO_SET.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    value = io_class << _IOPRIO_CLASS_SHIFT | level
    if _libc.syscall(ctypes.c_long(number), ctypes.c_int(_IOPRIO_WHO_PROCESS), 0, ctypes.c_int(value)):
        _raise_errno()


_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Adopt orphans among our descendants, so that their exit codes are ours to read: prctl(2)."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0):
        _raise_errno()


IN_MODIFY = 0x00000002
IN_MOVED_TO = 0x00000080
IN_CREATE = 0x00000100
IN_Q_OVERFLOW = 0x00004000
IN_IGNORED = 0x00008000


def inotify_init() -> int:
    """inotify_init1(2): a non-blocking descriptor."""
    fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        _raise_errno()
    return int(fd)


def inotify_add_watch(fd: int, path: PathLike, mask: int) -> int:
    number = _libc.inotify_add_watch(fd, ctypes.c_char_p(os.fsencode(path)), ctypes.c_uint32(mask))
    if number < 0:
        _raise_errno(path)
    return int(number)


def inotify_rm_watch(fd: int, number: int) -> None:
    """A watch that went with its file is no error."""
    if _libc.inotify_rm_watch(fd, number) and ctypes.get_errno() != errno.EINVAL:
        _raise_errno()


_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(2): give the memory or the blocks of a part of a file back; it then reads as zeros."""
    mode = ctypes.c_int(_FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE)
    if _libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        _raise_errno()
