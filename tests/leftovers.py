"""What an engine can leave behind on a machine, counted: taken before and after, two snapshots must be equal.

`leftovers()` reads the whole machine, not only what carries our marks: what nobody claims is exactly what
a leak looks like. Where several test on one machine, `BALENAPY_SHARED_MACHINE=1` narrows the comparison to the marks
of this process (`claim`); so do processes that share one run of the suite, whose whole is compared by conftest.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROGRAMS = {
    "conmon",
    "runc",
    "crun",
    "balenapyd",
    "dockerd",
    "containerd",
    "containerd-shim",
    "containerd-shim-runc-v2",
    "docker-proxy",
    "docker-registry",
}

_claims: set[str] = set()


def claim(mark: str) -> None:
    """Say that everything whose name holds `mark` (a directory, a bridge, a cgroup) is this process's."""
    _claims.add(mark)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """One look at the machine. Every field is a set of lines that name one thing each."""

    mounts: frozenset[str]
    netns: frozenset[str]
    links: frozenset[str]
    nft_tables: frozenset[str]
    cgroups: frozenset[str]
    processes: frozenset[str]

    def added_since(self, before: Leftovers, ignore: str = "") -> dict[str, list[str]]:
        """What is here now and was not before, by kind; empty when nothing was left.

        Args:
            ignore: how the line of a process begins that may be there.
        """
        shared_machine = os.environ.get("BALENAPY_SHARED_MACHINE") == "1"
        answer = {}
        for field in fields(self):
            new = sorted(getattr(self, field.name) - getattr(before, field.name))
            if ignore:
                new = [line for line in new if not line.startswith(ignore)]
            if shared_machine:
                new = [line for line in new if any(mark in line for mark in _claims)]
            if new:
                answer[field.name] = new
        return answer


def leftovers() -> Leftovers:
    return Leftovers(
        mounts=frozenset(_mounts()),
        netns=frozenset(_netns()),
        links=frozenset(os.listdir("/sys/class/net")),
        nft_tables=frozenset(_nft_tables()),
        cgroups=frozenset(_cgroups()),
        processes=frozenset(_processes()),
    )


def wait_for_no_leftovers(before: Leftovers, timeout_s: float = 10.0, *, ignore: str = "") -> dict[str, list[str]]:
    """Give asynchronous clean-up (zombies, cgroups, lazy unmounts) a moment; what is still there is the answer."""
    deadline = time.monotonic() + timeout_s
    while True:
        now = leftovers()
        _reap(now.processes - before.processes)
        added = now.added_since(before, ignore)
        if not added or time.monotonic() > deadline:
            return added
        time.sleep(0.1)


def _reap(lines: frozenset[str]) -> None:
    """Take in the dead among them that are our children.

    An engine that a test builds in this process makes it the subreaper of the conmons of every other engine: they end
    when they like, and nobody waits for them here.
    """
    for line in lines:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(int(line.split()[0]), os.WNOHANG)


def open_descriptors(pid: int) -> Counter[str]:
    """The descriptors of a process by what they are; numbers of sockets and pipes are cut off."""
    counts: Counter[str] = Counter()
    directory = Path(f"/proc/{pid}/fd")
    for entry in os.listdir(directory):
        try:
            target = os.readlink(directory / entry)
        except FileNotFoundError:
            continue
        kind = target.split(":[")[0] if target.startswith(("socket:", "pipe:", "net:", "mnt:")) else target
        counts[kind] += 1
    return counts


def mounts_under(directory: Path) -> list[Path]:
    """Mount points at and below `directory`, deepest first, as `umount` wants them."""
    points = [point for point, _ in _mount_points() if f"{point}/".startswith(f"{directory}/")]
    return [Path(point) for point in reversed(points)]


def _mount_points() -> Iterator[tuple[str, str]]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        # Spaces and kin are octal escapes in this file.
        point = before.split()[4].encode().decode("unicode_escape")
        yield point, after.split()[0]


def _mounts() -> Iterator[str]:
    seen: Counter[str] = Counter()
    for point, kind in _mount_points():
        seen[f"{kind} {point}"] += 1
    for line, count in seen.items():
        yield line if count == 1 else f"{line} ({count} times)"


def _netns() -> Iterator[str]:
    for directory in ("/run/netns", "/run/docker/netns", "/run/balena-engine/netns"):
        if os.path.isdir(directory):
            for name in os.listdir(directory):
                yield f"{directory}/{name}"


def _nft_tables() -> Iterator[str]:
    done = subprocess.run(["nft", "-j", "list", "tables"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return
    for item in json.loads(done.stdout)["nftables"]:
        if "table" in item:
            yield f"{item['table']['family']} {item['table']['name']}"


def _cgroups() -> Iterator[str]:
    for directory, _, _ in os.walk(CGROUP_ROOT):
        yield directory


def _processes() -> Iterator[str]:
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            stat = Path(f"/proc/{entry}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        name, rest = stat[stat.index("(") + 1 :].rsplit(")", 1)
        ppid = int(rest.split()[1])
        ours = name in PROGRAMS or "-m balenapy" in command
        # A zombie has no command line; if it is a child of this process, it was ours to reap.
        if ours or (rest.split()[0] == "Z" and ppid == os.getpid()):
            yield f"{entry} (parent {ppid}, started {rest.split()[19]}): {command.strip() or f'[{name}]'}"
