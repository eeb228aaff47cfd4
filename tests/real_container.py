"""A container made by hand for tests of what runs below the engine: a busybox rootfs, a spec, conmon and a runtime."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balenapy.config import Config
from balenapy.linux import conmon
from balenapy.linux.conmon import Bundle, Created
from balenapy.linux.runtime import Runtime, Runtimes

CGROUP_PARENT = "bptlinux"
_numbers = itertools.count()
_CAPABILITIES = ["CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_DAC_OVERRIDE"]


def make_rootfs(path: Path) -> Path:
    """Debian's static busybox with links for its usual names."""
    (path / "bin").mkdir(parents=True)
    for name in ("proc", "sys", "dev", "tmp", "etc"):
        (path / name).mkdir()
    (path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n")
    (path / "etc" / "group").write_text("root:x:0:\nuser:x:1000:\n")
    shutil.copy("/usr/bin/busybox", path / "bin" / "busybox")
    for name in "sh pwd tr sleep cat echo true false ls stty tty id kill head dd yes seq ps printf wc env".split():
        (path / "bin" / name).symlink_to("busybox")
    return path


def make_spec(cid: str, args: list[str], *, tty: bool = False, memory_bytes: int = 0) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": tty,
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
        },
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755", "size=65536k"]},
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            },
        ],
        "linux": {
            "cgroupsPath": f"/{CGROUP_PARENT}/{cid}",
            "namespaces": [{"type": name} for name in ("pid", "network", "ipc", "uts", "mount")],
        },
    }
    if memory_bytes:
        spec["linux"]["resources"] = {"memory": {"limit": memory_bytes, "swap": memory_bytes}}
    return spec


@dataclass(slots=True)
class RealContainer:
    cid: str
    bundle: Bundle
    exit_dir: Path
    runtime: Runtime
    conmon: str
    spec: dict[str, Any]
    created: Created | None = None

    async def create(self, *, keep_stdin: bool = False, log: list[str] | None = None) -> Created:
        self.bundle.config.write_text(json.dumps(self.spec))
        argv = conmon.conmon_argv(
            self.conmon,
            self.cid,
            self.runtime.command,
            self.exit_dir,
            tty=self.spec["process"]["terminal"],
            stdin=True,
            keep_stdin=keep_stdin,
            **({} if log is None else {"log": log}),
        )
        self.created = await conmon.create(argv, self.bundle)
        return self.created

    async def wait(self) -> int:
        assert self.created is not None
        await self.created.conmon.wait()
        code = conmon.read_exit_code(self.exit_dir)
        assert code is not None
        return code

    @property
    def cgroup(self) -> Any:
        return self.runtime.cgroups.of_spec(self.spec["linux"]["cgroupsPath"])


@contextmanager
def real_container(
    root: Path, args: list[str], *, tty: bool = False, memory_bytes: int = 0, directory: str = "run"
) -> Iterator[RealContainer]:
    """A container that is not created yet; whatever becomes of it, nothing is left afterwards."""
    cid = f"bpt{os.getpid()}x{next(_numbers)}"
    runtimes = Runtimes(Config(exec_root=root / directory))
    bundle = Bundle(root / directory / cid)
    exit_dir = root / "persist" / cid
    exit_dir.mkdir(parents=True)
    bundle.path.mkdir(parents=True)
    make_rootfs(bundle.rootfs)
    spec = make_spec(cid, args, tty=tty, memory_bytes=memory_bytes)
    container = RealContainer(cid, bundle, exit_dir, runtimes.get(""), runtimes.conmon, spec)
    try:
        yield container
    finally:
        container.cgroup.kill_and_remove()
        shutil.rmtree(container.runtime.root / cid, ignore_errors=True)
        if container.created is not None:
            with container.created.conmon as handle:
                handle.send_signal(9)
        for one in runtimes.cgroups.hierarchies:
            try:
                (one.mount / CGROUP_PARENT).rmdir()
            except OSError:
                continue
