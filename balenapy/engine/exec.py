"""Execs: further processes in a running container.

An exec has no conmon: the runtime starts the process and ends, the process becomes our child (we are a subreaper) and
its pipes or terminal are ours. That saves half of the start's time and the memory of a conmon, and decides what a
crash of the daemon does: the process lives on; a detached one (its stdio is /dev/null) does not notice, an attached
one reads end of file and gets SIGPIPE when it writes, as it would had its client's connection broken. Its exit code
is then nobody's. An engine that starts again knows no old execs, as the engine we replace knows none.

One task an exec moves its output and waits for its end; the request of an attached client only serves the client.
"""

from __future__ import annotations

import array
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import struct
import termios
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core import lifecycle
from balenapy.core.detachkeys import KeyFilter, parse_keys
from balenapy.core.execconfig import ExecConfig
from balenapy.core.ociconfig import build_env, find_user, merge_env
from balenapy.engine.attach import STDIN_CHUNK_BYTES, AttachOptions, Client
from balenapy.engine.bundles import read_in_rootfs
from balenapy.errors import Conflict, EngineError, InvalidParameter, NotFound, SystemFailure
from balenapy.linux import durable
from balenapy.linux.conmon import STDERR, STDOUT, runtime_message
from balenapy.linux.process import TOOL_ENV, Child, ProcessHandle, memory_file, strays
from balenapy.linux.runtime import familiar_message, start_failure

if TYPE_CHECKING:
    from balenapy.core.container import Container
    from balenapy.engine.engine import Engine
    from balenapy.engine.supervisor import Run

log = logging.getLogger(__name__)

KEPT_S = 300.0  # moby daemon/exec.go: an ended exec can be inspected for some minutes
KEPT_MAX = 256  # of ended ones
OUTPUT_GRACE_S = 2.0  # moby: for output of what the process left behind
RESIZE_WAIT_S = 10.0  # moby daemon/resize.go
CANNOT_START_CODE = 126
READ_BYTES = 32 << 10
LOG_MAX_BYTES = 64 << 10
CONSOLE_WAIT_S = 10.0
STRAY_WAIT_S = 2.0


@dataclass(slots=True, eq=False)
class Exec:
    id: str
    container: Container
    config: ExecConfig
    detach_keys: bytes
    begun: bool = False
    running: bool = False
    exit_code: int | None = None
    pid: int = 0
    ended_at: float = 0.0
    ready: trio.Event = field(default_factory=trio.Event)  # runs, or failed to
    ended: trio.Event = field(default_factory=trio.Event)
    client: Client | None = None
    stdin: trio.lowlevel.FdStream | None = None
    terminal: trio.lowlevel.FdStream | None = None
    process: ProcessHandle | None = None  # while it runs
    doomed: bool = False  # to be killed as soon as it runs

    @property
    def command(self) -> str:
        """As events show it: with a blank at the end when there are no arguments."""
        first, *rest = self.config.cmd or [""]
        return f"{first} {' '.join(rest)}"


@dataclass(frozen=True, slots=True)
class Captured:
    """How an exec without a client ended."""

    exit_code: int
    output: bytes  # stdout and stderr as they came


class Execs:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._execs: dict[str, Exec] = {}
        self._root = engine.config.exec_root / "execs"

    def recover(self) -> None:
        """Those of an engine that was killed are known to nobody: their processes go on, their directories go.

        Blocks. Raises: SystemFailure.
        """
        if self._root.exists():
            durable.remove_tree(self._root)

    # -- records --

    def find(self, exec_id: str) -> Exec:
        """Raises: NotFound, also when its container is gone or has stopped."""
        found = self._execs.get(exec_id)
        if found is None or self._engine.containers.store.find(found.container.id) is None:
            raise NotFound(f"No such exec instance: {exec_id}")
        return found

    def ids_of(self, container: Container) -> list[str] | None:
        """Those that have not ended; None when there are none."""
        ids = [each.id for each in self._execs.values() if each.container is container and each.exit_code is None]
        return ids or None

    def create(self, container: Container, config: ExecConfig, name: str) -> Exec:
        """`name` is what the client called the container. Raises: Conflict, SystemFailure, InvalidParameter."""
        lifecycle.check_exec(container, name)
        try:
            keys = parse_keys(config.detach_keys)
        except InvalidParameter:
            raise SystemFailure(f"Invalid escape keys ({config.detach_keys}) provided") from None
        self._sweep()
        created = Exec(secrets.token_hex(32), container, config, keys)
        self._execs[created.id] = created
        self._engine.events.container(container, f"exec_create: {created.command}", execID=created.id)
        return created

    def _sweep(self) -> None:
        now = trio.current_time()
        gone = self._engine.containers.store.find
        ended = [each for each in self._execs.values() if each.exit_code is not None]
        surplus = len(ended) - KEPT_MAX
        for index, each in enumerate(ended):
            if now - each.ended_at > KEPT_S or index < surplus:
                del self._execs[each.id]
        for each in list(self._execs.values()):
            if gone(each.container.id) is None or not (each.begun or each.container.state.running):
                self._execs.pop(each.id, None)

    def inspect(self, exec_id: str) -> dict[str, Any]:
        found = self.find(exec_id)
        config = found.config
        first, *rest = config.cmd or [""]
        process: dict[str, Any] = {
            "tty": config.tty,
            "entrypoint": first,
            "arguments": rest,
            "privileged": config.privileged,
        }
        if user := config.user or found.container.config.user:
            process["user"] = user
        return {
            "ID": found.id,
            "Running": found.running,
            "ExitCode": found.exit_code,
            "ProcessConfig": process,
            "OpenStdin": config.attach_stdin,
            "OpenStderr": config.attach_stderr,
            "OpenStdout": config.attach_stdout,
            "CanRemove": False,
            "ContainerID": found.container.id,
            # []byte in Go, hence base64; empty means the default ones.
            "DetachKeys": b64encode(found.detach_keys).decode() if config.detach_keys else "",
            "Pid": found.pid,
        }

    # -- start --

    def check_start(self, exec_id: str) -> Exec:
        """The exec, if it can be started. Raises: NotFound, Conflict."""
        found = self.find(exec_id)
        if found.exit_code is not None:
            raise Conflict(f"Error: Exec command {exec_id} has already run")
        if found.begun:
            raise Conflict(f"Error: Exec command {exec_id} is already running")
        lifecycle.check_exec(found.container, found.container.id)
        return found

    async def start_detached(self, exec_id: str) -> None:
        """Returns once it runs. Raises: NotFound, Conflict, InvalidParameter, SystemFailure."""
        found = self.check_start(exec_id)
        await self._start(found, attached=False)

    async def serve(self, found: Exec, stream: trio.abc.HalfCloseableStream, *, tty: bool) -> None:
        """Start it and be its stdio until its output ends, the client leaves or detaches.

        `tty` is what the start's body said: it picks the framing. Errors go into the stream.
        """
        config = found.config
        options = AttachOptions(
            stdin=config.attach_stdin, stdout=config.attach_stdout, stderr=config.attach_stderr, multiplexed=not tty
        )
        client = found.client = Client(options)
        try:
            try:
                await self._start(found, attached=True)
            except EngineError as error:
                client.say(f"{error.message}\r\n")
                client.end()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_input, found, client, stream, nursery.cancel_scope)
                await client.send_to(stream)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client left
        finally:
            client.cut()
            if found.stdin is not None:
                await trio.aclose_forcefully(found.stdin)

    async def run(self, found: Exec, max_output_bytes: int) -> Captured:
        """Start it without a client; its exit code, and the first bytes of its output, one more than asked for if any.

        Raises: as `start_detached`.
        Cancellation: it is killed, with its process group.
        """
        client = found.client = Client(AttachOptions(stdout=True, stderr=True, multiplexed=False))
        output = _Beginning(max_output_bytes + 1)
        try:
            await self._start(found, attached=True)
            await client.send_to(output)
            await found.ended.wait()
        finally:
            client.cut()
            _kill_nowait(found)
        return Captured(found.exit_code or 0, bytes(output.data))

    async def _serve_input(
        self, found: Exec, client: Client, stream: trio.abc.ReceiveStream, attached: trio.CancelScope
    ) -> None:
        config = found.config
        target = found.terminal if config.tty else found.stdin
        keys = KeyFilter(found.detach_keys) if config.tty else None
        if not config.attach_stdin or target is None:
            await _discard(stream)
            return
        try:
            while data := bytes(await stream.receive_some(STDIN_CHUNK_BYTES)):
                if keys is not None:
                    data = keys.feed(data)
                if data:
                    await target.send_all(data)
                if keys is not None and keys.detached:
                    client.say("exec attach failed: error on attach stdin: read escape sequence\r\n")
                    client.end()
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # the process reads no more, or the client left
        if config.tty:
            attached.cancel()  # the end of input ends the attach
        else:
            await target.aclose()

    async def _start(self, found: Exec, *, attached: bool) -> None:
        """Raises: EngineError, and the exec has ended with 126 then."""
        found.begun = True
        run = self._engine.supervisors.run_of(found.container)
        self._engine.events.container(found.container, f"exec_start: {found.command}", execID=found.id)
        starting = _Starting(self._root, found.id)
        outcome: list[EngineError] = []
        started = trio.Event()
        # In the engine's nursery: a client that leaves does not stop the start half way.
        self._engine.nursery.start_soon(self._run, found, run, starting, attached, outcome, started)
        await started.wait()
        if outcome:
            raise outcome[0]

    async def _run(
        self,
        found: Exec,
        run: Run,
        starting: _Starting,
        attached: bool,
        outcome: list[EngineError],
        started: trio.Event,
    ) -> None:
        """The task of one exec: start it, move its output, wait for its end."""
        code = CANNOT_START_CODE
        try:
            try:
                process = self._process_spec(found, run)
                handle = await starting.start(found, run, process, attached=attached)
            except EngineError as error:
                outcome.append(error)
                await self._reap_strays()
                return
            with handle:
                found.pid, found.running, found.process = handle.pid, True, handle
                if found.doomed:
                    _kill_nowait(found)
                found.ready.set()
                started.set()
                code = await self._follow(found, handle, starting)
        except Exception as error:  # the wall around one exec
            log.exception("exec failed container=%s exec=%s", found.container.short_id, found.id[:12])
            outcome.append(SystemFailure(str(error)))
        finally:
            ran = found.running
            found.running, found.exit_code, found.ended_at = False, code, trio.current_time()
            found.process = None
            starting.close()
            found.ready.set()
            found.ended.set()
            started.set()
            if found.client is not None and not outcome:
                found.client.end()
            if ran:
                self._engine.events.container(
                    found.container, "exec_die", execID=found.id, exitCode=str(code)
                )

    async def _reap_strays(self) -> None:
        """What a runtime left of an exec that failed; see `strays`."""
        running = {each.pid for each in self._execs.values() if each.running}
        for program in ("runc", "crun"):
            for handle in strays(program):
                with handle, trio.move_on_after(STRAY_WAIT_S):
                    if handle.pid not in running:
                        await handle.wait()
                        handle.reap()

    async def _follow(self, found: Exec, handle: ProcessHandle, starting: _Starting) -> int:
        async with trio.open_nursery() as nursery:
            for stream, source in starting.outputs:
                nursery.start_soon(_move_output, found, stream, source)
            await handle.wait()
            # At once: until it is reaped, the first process of its namespace cannot end.
            code = handle.reap() or 0
            # What it started may hold the pipes open; moby gives that two seconds.
            nursery.cancel_scope.deadline = trio.current_time() + OUTPUT_GRACE_S
        return code

    def _process_spec(self, found: Exec, run: Run) -> dict[str, Any]:
        """The container's own process, with what the exec changes.

        Reads a few small files in the loop's thread: they are in memory, and a thread costs more than they do.

        Raises: SystemFailure.
        """
        container, config = found.container, found.config
        try:
            process: dict[str, Any] = json.loads(run.bundle.config.read_bytes())["process"]
        except (OSError, ValueError, KeyError) as error:
            raise SystemFailure(f"cannot read the spec of {container.id}: {error}") from error
        user_spec = config.user or container.config.user
        passwd = read_in_rootfs(run.bundle.rootfs, "etc/passwd")
        group = read_in_rootfs(run.bundle.rootfs, "etc/group")
        user = find_user(user_spec, passwd, group, container.host_config.group_add or ())
        process["user"] = {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.additional_gids)}
        process["terminal"] = config.tty
        process.pop("consoleSize", None)
        process["args"] = list(config.cmd or ())
        process["env"] = merge_env(build_env(container.config, tty=config.tty), config.env or ())
        process["cwd"] = config.working_dir or container.config.working_dir or "/"
        capabilities = process.get("capabilities", {})
        if config.privileged:
            everything = sorted(self._engine.containers.host_facts.capabilities)
            capabilities = dict.fromkeys(("bounding", "effective", "permitted"), everything)
        else:
            effective = capabilities.get("bounding", []) if user.uid == 0 else []
            capabilities = {**capabilities, "effective": effective, "permitted": effective}
        process["capabilities"] = capabilities
        return process

    # -- resize --

    async def resize(self, exec_id: str, height: int, width: int) -> None:
        """Raises: NotFound, SystemFailure when it does not start in time."""
        found = self.find(exec_id)
        with trio.move_on_after(RESIZE_WAIT_S) as scope:
            await found.ready.wait()
        if scope.cancelled_caught:
            raise SystemFailure("timeout waiting for exec session ready")
        if not found.running:
            raise NotFound("no such exec")
        if found.terminal is not None:
            size = struct.pack("HHHH", min(height, 0xFFFF), min(width, 0xFFFF), 0, 0)
            try:
                fcntl.ioctl(found.terminal.fileno(), termios.TIOCSWINSZ, size)
            except OSError as error:
                raise SystemFailure(f"cannot resize exec {exec_id}: {error.strerror}") from error


def _kill_nowait(found: Exec) -> None:
    """End it and what it started, as far as that is in its process group; one that is being started ends then."""
    found.doomed = True
    process = found.process
    if process is None or not process.send_signal(signal.SIGKILL):
        return
    # Not reaped yet: its number is nobody else's, and neither is its group's.
    with suppress(ProcessLookupError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)


class _Beginning(trio.abc.SendStream):
    """Keeps the first bytes of what is sent to it."""

    def __init__(self, size: int) -> None:
        self.data = bytearray()
        self._size = size

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.data += data[: self._size - len(self.data)]
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def _discard(stream: trio.abc.ReceiveStream) -> None:
    try:
        while await stream.receive_some(STDIN_CHUNK_BYTES):
            pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


async def _move_output(found: Exec, stream: int, source: trio.lowlevel.FdStream) -> None:
    """From a pipe or terminal to the client; without one, or when it has left, to nowhere."""
    while True:
        try:
            data = bytes(await source.receive_some(READ_BYTES))
        except (trio.BrokenResourceError, OSError):  # a terminal nobody holds open any more: EIO
            return
        if not data:
            return
        client = found.client
        while client is not None and not client.put_nowait(stream, data):
            await client.wait_for_room()


class _Starting:
    """The descriptors and the pid file of one exec. What the runtime reads and logs are memory files."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self._runtime_log = -1
        self.outputs: list[tuple[int, trio.lowlevel.FdStream]] = []
        self._found: Exec | None = None
        self._listener: socket.socket | None = None

    async def start(self, found: Exec, run: Run, process: dict[str, Any], *, attached: bool) -> ProcessHandle:
        """Raises: InvalidParameter, SystemFailure."""
        self._found = found
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if found.config.tty:
            self._listener = self._listen()
        self._runtime_log = os.memfd_create("log", os.MFD_CLOEXEC)
        spec = memory_file("process.json", json.dumps(process).encode())
        theirs: list[int] = []
        try:
            command = run.runtime.exec_command(
                run.container.id,
                pid_file=self._pid_file.name,
                process_spec=f"/proc/self/fd/{spec}",
                console=self._console.name if found.config.tty else "",
            )
            # The runtime's own words would be taken for the process's.
            command.insert(1, f"--log=/proc/self/fd/{self._runtime_log}")
            theirs = self._make_pipes(found, attached=attached)
            run.runtime.cgroups.expect_moves_nowait()
            child = Child(
                command,
                stdin=theirs[0],
                stdout=theirs[1],
                stderr=theirs[2],
                env={"PATH": TOOL_ENV["PATH"], "TZ": "UTC0"},
                cwd=self._directory,
                pass_fds=(spec, self._runtime_log),
            )
        finally:
            for fd in (spec, *theirs):
                if fd >= 0:
                    os.close(fd)
        async with child:
            code = await child.wait()
        if code != 0:
            raise self._failure(found)
        handle = self._open_process()
        try:
            if found.config.tty:
                await self._take_terminal(found)
        except BaseException:
            with handle, trio.move_on_after(STRAY_WAIT_S, shield=True):
                handle.send_signal(signal.SIGKILL)
                await handle.wait()
                handle.reap()
            raise
        return handle

    @property
    def _pid_file(self) -> Path:
        return self._directory / f"{self._name}.pid"

    @property
    def _console(self) -> Path:
        return self._directory / f"{self._name}.console"

    def close(self) -> None:
        for _, stream in self.outputs:
            stream.close()
        found = self._found
        if found is not None:
            for one in (found.stdin, found.terminal):
                if one is not None:
                    one.close()
        if self._runtime_log >= 0:
            os.close(self._runtime_log)
        if self._listener is not None:
            self._listener.close()
            self._console.unlink(missing_ok=True)
        self._pid_file.unlink(missing_ok=True)

    def _make_pipes(self, found: Exec, *, attached: bool) -> list[int]:
        """Ours are kept as streams; returns the process's stdin, stdout, stderr, -3 (DEVNULL) for none."""
        config = found.config
        theirs = [-3, -3, -3]
        if config.tty or not attached:
            return theirs
        if config.attach_stdin:
            theirs[0], ours = os.pipe2(os.O_CLOEXEC)
            found.stdin = trio.lowlevel.FdStream(ours)
        for position, (stream, wanted) in enumerate(((STDOUT, config.attach_stdout), (STDERR, config.attach_stderr))):
            if wanted:
                ours, theirs[position + 1] = os.pipe2(os.O_CLOEXEC)
                self.outputs.append((stream, trio.lowlevel.FdStream(ours)))
        return theirs

    def _listen(self) -> socket.socket:
        """The socket over which the runtime sends the terminal."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        directory = os.open(self._directory, os.O_PATH | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{directory}/{self._console.name}")  # a socket address holds 107 bytes
            listener.listen(1)
        except BaseException:
            listener.close()
            raise
        finally:
            os.close(directory)
        return listener

    async def _take_terminal(self, found: Exec) -> None:
        assert self._listener is not None
        listener = trio.socket.from_stdlib_socket(self._listener)
        with trio.move_on_after(CONSOLE_WAIT_S) as scope:
            connection, _ = await listener.accept()
            with connection:
                fds = array.array("i")
                _, ancillary, _, _ = await connection.recvmsg(4096, socket.CMSG_SPACE(fds.itemsize))
        if scope.cancelled_caught:
            raise SystemFailure("the runtime did not send a terminal")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if not fds:
            raise SystemFailure("the runtime did not send a terminal")
        os.set_inheritable(fds[0], False)
        attributes = termios.tcgetattr(fds[0])
        attributes[1] |= termios.ONLCR  # runtimes switch it off
        termios.tcsetattr(fds[0], termios.TCSANOW, attributes)
        found.terminal = trio.lowlevel.FdStream(os.dup(fds[0]))
        self.outputs.append((STDOUT, trio.lowlevel.FdStream(fds[0])))

    def _open_process(self) -> ProcessHandle:
        try:
            pid = int(self._pid_file.read_text())
        except (OSError, ValueError) as error:
            raise SystemFailure(f"the runtime did not say which process it started: {error}") from error
        handle = ProcessHandle.open(pid)
        if handle is None:
            raise SystemFailure("the process was gone at once")
        return handle

    def _failure(self, found: Exec) -> EngineError:
        words = os.pread(self._runtime_log, LOG_MAX_BYTES, 0).decode(errors="replace")
        command: Sequence[str] = found.config.cmd or [""]
        message = familiar_message(runtime_message(words)) or "the runtime failed without a word"
        return start_failure(message, command[0], verb="exec").error
