"""Control groups of containers: where they are, who is in them, what they count, and their removal.

Three layouts exist: `unified` (v2 at /sys/fs/cgroup), `legacy` (one v1 hierarchy a controller) and `hybrid` (legacy,
and a v2 tree at /sys/fs/cgroup/unified). The runtime makes a container's cgroup, in every hierarchy under one relative
path; this module reads there and takes away what the runtime left.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import trio

CGROUP_ROOT = Path("/sys/fs/cgroup")
_GONE = (errno.ENOENT, errno.ENODEV)  # ENODEV: the cgroup was removed while we had its file open


class Mode(Enum):
    UNIFIED = "unified"
    LEGACY = "legacy"
    HYBRID = "hybrid"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    mount: Path
    version: int
    controllers: frozenset[str]  # v1: as mounted, `name=systemd` too; v2: those enabled at its root


@dataclass(slots=True)
class Cgroups:
    """The machine's hierarchies, read once."""

    mode: Mode
    hierarchies: tuple[Hierarchy, ...]
    driver: str = "cgroupfs"  # or systemd
    _by_controller: dict[str, Hierarchy] = field(init=False)
    _expecting_moves: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._by_controller = {name: one for one in self.hierarchies for name in one.controllers if one.version == 1}
        for one in self.hierarchies:
            if one.version == 2:
                for name in one.controllers:
                    self._by_controller.setdefault(name, one)

    @classmethod
    def read(cls, driver: str = "cgroupfs", mountinfo: str = "") -> Cgroups:
        text = mountinfo or Path("/proc/self/mountinfo").read_text()
        found: dict[Path, Hierarchy] = {}
        for line in text.splitlines():
            left, _, right = line.partition(" - ")
            mount, (kind, *_), options = Path(left.split()[4]), right.split(), right.split()[-1]
            if kind == "cgroup" and mount.is_relative_to(CGROUP_ROOT):
                names = frozenset(set(options.split(",")) - {"rw", "ro", "xattr", "none", "noprefix", "clone_children"})
                found[mount] = Hierarchy(mount, 1, names)
            elif kind == "cgroup2" and mount.is_relative_to(CGROUP_ROOT):
                found[mount] = Hierarchy(mount, 2, frozenset(_read(mount / "cgroup.controllers").split()))
        versions = {one.version for one in found.values()}
        mode = Mode.HYBRID if versions == {1, 2} else Mode.UNIFIED if versions == {2} else Mode.LEGACY
        return cls(mode, tuple(found.values()), driver)

    @property
    def version(self) -> int:
        """The version that limits containers here: 1 on a hybrid machine."""
        return 2 if self.mode is Mode.UNIFIED else 1

    def has(self, controller: str) -> bool:
        return controller in self._by_controller

    @property
    def controllers(self) -> frozenset[str]:
        return frozenset(name for name in self._by_controller if not name.startswith("name="))

    def expect_moves_nowait(self) -> None:
        """Have the kernel ready when a runtime, which is still being loaded, moves its process into cgroups.

        The first move after a quiet while waits for a grace period (a percpu_rw_semaphore is taken for writing in
        kernel/cgroup/cgroup.c), one that follows soon does not. So we move ourselves to where we are, in a thread:
        the waiting happens while the runtime starts. `runc exec` takes 26 ms instead of 34 (runc 1.1.5, Linux 6.18).
        """
        if not self._expecting_moves:
            self._expecting_moves = True
            trio.lowlevel.start_thread_soon(self._move_to_where_we_are, self._moved, "cgroup")

    def _moved(self, _: object) -> None:
        self._expecting_moves = False

    def _move_to_where_we_are(self) -> None:
        try:
            for line in Path("/proc/self/cgroup").read_text().splitlines():
                _, names, path = line.split(":", 2)
                for one in self.hierarchies:
                    if (names == "" and one.version == 2) or set(names.split(",")) == one.controllers:
                        (one.mount / path.lstrip("/") / "cgroup.procs").write_text("0")
                        return
        except OSError:
            pass  # not ours to write here: the move will take its time

    def of_spec(self, cgroups_path: str) -> ContainerCgroup:
        """The cgroup that a runtime makes for `linux.cgroupsPath` of an OCI spec."""
        if self.driver == "systemd":
            parent, prefix, name = [*cgroups_path.split(":"), "", ""][:3]
            return self.at(f"{_expand_slice(parent)}/{prefix}-{name}.scope")
        return self.at(cgroups_path)

    def at(self, relative: str) -> ContainerCgroup:
        inner = relative.strip("/")
        if not inner or ".." in inner.split("/"):  # the root holds every process of the machine
            raise ValueError(f"not a container's cgroup: {relative!r}")
        return ContainerCgroup(self, inner)

    def controller_mount(self, controller: str) -> Hierarchy | None:
        return self._by_controller.get(controller)


@dataclass(frozen=True, slots=True)
class ContainerCgroup:
    """One relative path in every hierarchy. Reading what is gone gives nothing, never an error."""

    cgroups: Cgroups
    relative: str

    def directory(self, controller: str) -> Path | None:
        """Where a controller counts and limits this container."""
        hierarchy = self.cgroups.controller_mount(controller)
        return None if hierarchy is None else hierarchy.mount / self.relative

    def directories(self) -> list[Path]:
        return [one.mount / self.relative for one in self.cgroups.hierarchies]

    def read(self, controller: str, name: str) -> str:
        """The text of one file; "" when the file, the controller or the cgroup does not exist."""
        directory = self.directory(controller)
        return "" if directory is None else _read(directory / name)

    def read_number(self, controller: str, name: str) -> int:
        """0 when there is no such number; `max` is the largest that API objects show."""
        text = self.read(controller, name).strip()
        if text == "max":
            return (1 << 64) - 1
        try:
            return int(text)
        except ValueError:
            return 0

    def read_keyed(self, controller: str, name: str) -> dict[str, int]:
        """A file of `key number` lines."""
        return parse_keyed(self.read(controller, name))

    def pids(self) -> list[int]:
        """Every process in the cgroup or below it, as seen from the host; sorted."""
        directory = self._process_directory()
        found: set[int] = set()
        if directory is not None:
            for below in _walk(directory):
                found.update(map(int, _read(below / "cgroup.procs").split()))
        return sorted(found)

    def frozen(self) -> bool:
        """Whether its processes stand still, or are about to."""
        if self.cgroups.version == 2:
            return self._freezer_file("cgroup.freeze").strip() == "1"
        return self.read("freezer", "freezer.self_freezing").strip() == "1"

    def thaw(self) -> None:
        """Let its processes go on; of one that is not frozen, or gone, nothing comes. Runtimes read the same file."""
        directory, name, text = self.directory("freezer"), "freezer.state", "THAWED"
        if self.cgroups.version == 2:
            directory, name, text = self._process_directory(), "cgroup.freeze", "0"
        if directory is not None:
            try:
                (directory / name).write_text(text)
            except OSError as error:
                if error.errno not in (*_GONE, errno.EACCES, errno.EINVAL):
                    raise

    def _freezer_file(self, name: str) -> str:
        directory = self._process_directory()
        return "" if directory is None else _read(directory / name)

    def kill_all(self) -> bool:
        """Send SIGKILL to every process; False when there was none. Frozen ones die when they are thawed (v1)."""
        self.thaw()
        pids = self.pids()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return bool(pids)

    def oom_kills(self) -> int:
        """How many processes the kernel has killed in it for want of memory."""
        if self.cgroups.version == 2:
            return self.read_keyed("memory", "memory.events").get("oom_kill", 0)
        return self.read_keyed("memory", "memory.oom_control").get("oom_kill", 0)

    def exists(self) -> bool:
        return any(directory.is_dir() for directory in self.directories())

    def remove(self) -> bool:
        """Remove it from every hierarchy; False while a process is left in one."""
        done = True
        for directory in self.directories():
            for below in reversed(list(_walk(directory))):
                try:
                    os.rmdir(below)
                except OSError as error:
                    if error.errno not in _GONE:
                        done = False
        return done

    def kill_and_remove(self, attempts: int = 100, pause_s: float = 0.01) -> bool:
        """`kill_all` and `remove` until it is gone: a killed process needs a moment. Blocks; for a thread."""
        for _ in range(attempts):
            if self.remove():
                return True
            self.kill_all()
            time.sleep(pause_s)
        return False

    def _process_directory(self) -> Path | None:
        for name in ("pids", "freezer", "devices", "memory", "cpu"):
            directory = self.directory(name)
            if directory is not None and directory.is_dir():
                return directory
        return next((directory for directory in self.directories() if directory.is_dir()), None)


def parse_keyed(text: str) -> dict[str, int]:
    """`key number` lines -> a dict; other lines are left out."""
    found = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        try:
            found[key] = int(value)
        except ValueError:
            continue
    return found


def parse_blkio(text: str) -> list[Mapping[str, int | str]]:
    """`8:0 Read 4096` lines of a v1 blkio file, in the API's form; the `Total` without a device is left out."""
    found: list[Mapping[str, int | str]] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) not in (2, 3) or ":" not in words[0]:
            continue
        major, _, minor = words[0].partition(":")
        operation = words[1] if len(words) == 3 else ""
        found.append({"major": int(major), "minor": int(minor), "op": operation, "value": int(words[-1])})
    return found


def _expand_slice(name: str) -> str:
    """`a-b.slice` is the directory `a.slice/a-b.slice`, systemd.slice(5)."""
    if not name.endswith(".slice") or name == "-.slice":
        return "" if name == "-.slice" else name
    parts = name.removesuffix(".slice").split("-")
    return "/".join("-".join(parts[: end + 1]) + ".slice" for end in range(len(parts)))


def _walk(directory: Path) -> Iterator[Path]:
    """A cgroup and those below it, parents first."""
    pending = [directory]
    while pending:
        one = pending.pop()
        try:
            with os.scandir(one) as entries:
                pending.extend(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError as error:
            if error.errno in (*_GONE, errno.ENOTDIR):
                continue
            raise
        yield one


def _read(path: Path) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode(errors="replace")
    except OSError as error:
        if error.errno in (*_GONE, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTDIR):
            return ""
        raise
