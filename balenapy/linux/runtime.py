"""The OCI runtime: which one this machine can use, and its verbs.

`create` is conmon's (conmon.py). Two verbs are short-cut for runc under the cgroupfs driver, because each start of a
Go program costs 5-20 ms on the way of every `docker run`; both do the whole of what runc 1.0-1.1 does there:

- `start`: open the fifo that the container's init waits to write, read, unlink it (libcontainer `Exec`).
- `delete` of a container that ended: remove its cgroups and its state directory (libcontainer `Destroy`); we give the
  runtime no hooks. A container that is alive, or anything unexpected, goes to the program itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from balenapy.errors import EngineError, InvalidParameter, SystemFailure
from balenapy.linux.cgroups import Cgroups, ContainerCgroup, Mode
from balenapy.linux.conmon import find_conmon, runtime_message
from balenapy.linux.process import TOOL_ENV, run_tool

log = logging.getLogger(__name__)

DEFAULT_NAME = "runc"  # the name in the API of whatever we chose; clients know no other
START_TIMEOUT_S = 30  # the init has only to open its fifo
_PROGRAMS = {"runc": ("runc", "balena-engine-runc"), "crun": ("crun",)}


@dataclass(frozen=True, slots=True)
class StartFailure:
    """What a runtime's words mean to a client: the container's exit code and the error."""

    exit_code: int  # 0: the caller's default
    error: EngineError


def start_failure(message: str, command: str, verb: str = "create") -> StartFailure:
    """Translate why a container (or, with `verb` exec, an exec) did not start.

    Source: moby daemon/errors.go, translateContainerdStartErr.
    """
    text = f"OCI runtime {verb} failed: {message}: unknown"
    lower = text.lower()
    code, bad_request = 0, False
    if (not command or command in lower or command in text) and any(
        words in lower
        for words in (
            "executable file not found",
            "no such file or directory",
            "system cannot find the file specified",
        )
    ):
        code, bad_request = 127, True
    if "permission denied" in lower:
        code, bad_request = 126, True
    if "not a directory" in lower:
        code, bad_request = 127, True
        text += (
            ": Are you trying to mount a directory onto a file (or vice-versa)? "
            "Check if the specified host path exists and is the expected type"
        )
    return StartFailure(code, InvalidParameter(text) if bad_request else SystemFailure(text))


_CRUN_NOT_FOUND = re.compile(r"executable file [`'\"]([^`'\"]*)[`'\"] not found in \$PATH.*")


_ERRNO = re.compile(r"(?:Permission denied|No such file or directory|Not a directory|Exec format error)$")


def familiar_message(message: str) -> str:
    """crun's words in runc's form, where clients match on them: Go writes the C library's errors in lower case."""
    message = _CRUN_NOT_FOUND.sub(r'exec: "\1": executable file not found in $PATH', message)
    return _ERRNO.sub(lambda match: match[0].lower(), message)


@dataclass(frozen=True, slots=True)
class Runtime:
    """One runtime program with the directory of its state."""

    name: str
    path: str
    root: Path
    cgroups: Cgroups

    @property
    def is_runc(self) -> bool:
        return Path(self.path).name in _PROGRAMS["runc"]

    @property
    def command(self) -> list[str]:
        """The program and its global options."""
        argv = [self.path, f"--root={self.root}", "--log-format=json"]
        if self.cgroups.driver == "systemd":
            argv.append("--systemd-cgroup")
        return argv

    async def start(self, cid: str) -> None:
        """Let a created container's process run. Raises: SystemFailure."""
        fifo = self.root / cid / "exec.fifo"
        if not self.is_runc or not fifo.exists():
            await self._run("start", cid)
            return
        with trio.move_on_after(START_TIMEOUT_S) as scope:
            while not await _read_fifo(fifo):  # noqa: ASYNC110
                # A signal interrupted the init's open (Go's scheduler sends them): it opens again.
                await trio.sleep(0.001)
        if scope.cancelled_caught:
            raise SystemFailure(f"cannot start {cid}: its process does not answer")
        fifo.unlink(missing_ok=True)

    async def delete(self, cid: str, cgroup: ContainerCgroup | None = None) -> None:
        """Remove what the runtime keeps of a container, killing what is left of it. Idempotent.

        Args:
            cgroup: given when the container's first process is known to be dead.
        """
        state = self.root / cid
        if cgroup is not None and self.is_runc and cgroup.cgroups.driver == "cgroupfs":
            gone = cgroup.remove() or await trio.to_thread.run_sync(cgroup.kill_and_remove)
            if gone:
                shutil.rmtree(state, ignore_errors=True)
                return
        if state.exists():
            await self._run("delete", "--force", cid)

    async def pause(self, cid: str) -> None:
        await self._run("pause", cid)

    async def resume(self, cid: str) -> None:
        await self._run("resume", cid)

    async def update(self, cid: str, resources: Mapping[str, object]) -> None:
        """Change limits of a running container. `resources` is `linux.resources` of the OCI spec, in part."""
        await self._run("update", "--resources", "-", cid, input=json.dumps(resources).encode())

    def exec_command(self, cid: str, *, pid_file: str, process_spec: str, console: str = "") -> list[str]:
        """Run a process in a container and return once it runs; it is then reaped by whoever is subreaper."""
        argv = [*self.command, "exec", "--detach", "--pid-file", pid_file, "--process", process_spec]
        if console:
            argv += ["--console-socket", console]
        return [*argv, cid]

    async def _run(self, *arguments: str, input: bytes = b"") -> None:
        outcome = await run_tool([*self.command, *arguments], input=input, check=False)
        if outcome.code != 0:
            message = familiar_message(runtime_message(outcome.last_words))
            raise SystemFailure(f"{self.name} {arguments[0]} failed: {message}")


async def _read_fifo(fifo: Path) -> bytes:
    """What a writer puts into it; b"" when one came and left without a word."""
    # Opened without O_NONBLOCK this would wait for ever, in the way of everybody, when the init is dead.
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            await trio.lowlevel.wait_readable(fd)
            try:
                return os.read(fd, 16)
            except BlockingIOError:
                continue
    finally:
        os.close(fd)


class Settings(Protocol):
    """The part of the configuration that concerns runtimes."""

    @property
    def exec_root(self) -> Path: ...
    @property
    def cgroup_driver(self) -> str: ...
    @property
    def default_runtime(self) -> str: ...
    @property
    def runtimes(self) -> Mapping[str, str]: ...


class Runtimes:
    """The runtimes that containers may name. `runc` is always one of them and the default unless told otherwise."""

    def __init__(self, settings: Settings) -> None:
        """Look what is installed and what this machine's cgroups allow.

        Raises: SystemFailure when neither runc nor crun can be used, an added one is missing, or conmon is.
        """
        self.cgroups = Cgroups.read(settings.cgroup_driver)
        self.conmon = find_conmon()
        self.default = settings.default_runtime
        self._root = settings.exec_root / "runtimes"
        paths = {DEFAULT_NAME: choose(self.cgroups)}
        for name, path in settings.runtimes.items():
            found = _find(path)
            if found is None:
                raise SystemFailure(f"runtime {name}: {path} is not an executable")
            paths[name] = found
        self._runtimes = {name: Runtime(name, path, self._root / name, self.cgroups) for name, path in paths.items()}

    async def probe(self) -> None:
        """Make the directories of the runtimes' state and say what was chosen."""
        for runtime in self._runtimes.values():
            runtime.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        log.info(
            "cgroups=%s driver=%s runtimes=%s conmon=%s",
            self.cgroups.mode.value,
            self.cgroups.driver,
            ",".join(f"{name}:{path}" for name, path in self.paths.items()),
            self.conmon,
        )

    @property
    def paths(self) -> dict[str, str]:
        """Name -> program, as `/info` shows it."""
        return {name: runtime.path for name, runtime in self._runtimes.items()}

    def get(self, name: str) -> Runtime:
        """By name; "" is the default, and `bare`, which only concerns the filesystem, runs on it.

        Raises: InvalidParameter.
        """
        if name in ("", "bare"):
            name = self.default
        try:
            return self._runtimes[name]
        except KeyError:
            raise InvalidParameter(f"Unknown runtime specified {name}") from None


def choose(cgroups: Cgroups) -> str:
    """The program behind the default name: crun where it can run (it starts in a third of the time), else runc.

    crun 1.8 refuses the hybrid layout while a controller is bound to the v2 tree
    ("cgroups in hybrid mode not supported, drop all controllers from cgroupv2"); runc does not mind.

    Raises: SystemFailure.
    """
    programs = ["runc"] if _crun_refuses(cgroups) else ["crun", "runc"]
    for name in programs:
        for candidate in _PROGRAMS[name]:
            path = _find(candidate)
            if path is not None:
                return path
    raise SystemFailure(f"no OCI runtime: install {' or '.join(programs)}")


def _crun_refuses(cgroups: Cgroups) -> bool:
    if cgroups.mode is not Mode.HYBRID:
        return False
    return any(one.version == 2 and one.controllers for one in cgroups.hierarchies)


def _find(program: str) -> str | None:
    return shutil.which(program, path=TOOL_ENV["PATH"])
