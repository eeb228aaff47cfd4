"""A small virtual machine for real power cuts: a Debian kernel, Python and this engine, and a disk of its own.

Its root is an ext4 image made without a loop device, with the interpreter, our packages and the sources at the places
they have here; it is mounted read-only. The data disk is another image, which survives the kills. The guest speaks on
its serial port, one line of JSON each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
FETCHED = REPOSITORY / "build" / "powercut" / "root"
QEMU = "qemu-system-x86_64"
MODULES = ("virtio_pci", "virtio_blk", "overlay")
TOOLS = ("runc", "crun", "conmon", "ip", "nft")  # what the engine looks for; nothing runs there
LEFT_OUT = ("mypy", "mypyc", "ruff", "pip", "hypothesis", "_hypothesis*", "pygments", "setuptools", "*mypyc*", "docker")
BOOT_TIMEOUT_S = 300.0  # emulated, on a busy machine
DISK_BYTES = 1 << 30

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
mount -t proc proc /proc
if grep -q probe /proc/cmdline; then
  echo '{"probe": true}'; poweroff -f
fi
guest=$(sed -n 's/.*guest=\\([^ ]*\\).*/\\1/p' /proc/cmdline)
mount -t ext4 -o ro /dev/vda /root
mount -t ext4 /dev/vdb /root/disk
mount --move /proc /root/proc
mount -t sysfs sys /root/sys
mount --move /dev /root/dev
mount -t tmpfs tmp /root/tmp
mkdir /root/dev/shm; mount -t tmpfs shm /root/dev/shm
mount -t tmpfs run /root/run
mount -t cgroup2 cgroup /root/sys/fs/cgroup
ip link set lo up
exec chroot /root /bin/sh -c "cd REPOSITORY; exec PYTHON -m tests.powercut.guest $guest"
"""


def why_not() -> str:
    """Why there can be no machine here; "" if there can."""
    if os.uname().machine != "x86_64":
        return "the virtual machine is x86-64"
    if not list((FETCHED / "boot").glob("vmlinuz-*")):
        return "no kernel in build/powercut: run tests/powercut/fetch"
    for tool in (QEMU, "mkfs.ext4", "busybox"):
        if shutil.which(tool) is None:
            return f"no {tool}"
    return ""


@dataclass
class Machine:
    """Images and a way to start them. `accelerator` is found out once."""

    kernel: Path
    initrd: Path
    root: Path
    disk: Path
    accelerator: str = ""

    @classmethod
    def build(cls, directory: Path) -> Machine:
        """Make the images: some seconds."""
        kernel = sorted((FETCHED / "boot").glob("vmlinuz-*"))[-1]
        machine = cls(kernel, directory / "initrd", directory / "root.img", directory / "disk.img")
        _write_initrd(machine.initrd, kernel.name.removeprefix("vmlinuz-"))
        tree = directory / "root"
        _make_root(tree)
        size = sum(path.lstat().st_size + 4096 for path in tree.rglob("*"))
        _make_file_system(machine.root, size * 5 // 4 + (64 << 20), tree)
        shutil.rmtree(tree)
        _make_file_system(machine.disk, DISK_BYTES, None)
        machine.accelerator = machine.choose_accelerator()
        return machine

    def choose_accelerator(self) -> str:
        """KVM where a kernel really boots under it; else emulation."""
        if chosen := os.environ.get("POWERCUT_ACCELERATOR"):
            return chosen
        if os.access("/dev/kvm", os.W_OK):
            self.accelerator = "kvm"
            with contextlib.suppress(AssertionError), self.boot("probe", timeout_s=10) as guest:
                guest.read()
                return "kvm"
        return "tcg"

    @contextlib.contextmanager
    def boot(self, arguments: str, *, timeout_s: float = BOOT_TIMEOUT_S) -> Iterator[Guest]:
        """Run until the end of the block, which is a power cut."""
        command = [
            "setpriv", "--pdeathsig", "KILL", "--",  # it ends with the test, however that ends
            QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
            "-machine", "pc", "-accel", self.accelerator + (",thread=multi" if self.accelerator == "tcg" else ""),
            "-cpu", "max" if self.accelerator == "tcg" else "host", "-smp", "2", "-m", "768",
            "-kernel", str(self.kernel), "-initrd", str(self.initrd),
            "-append", f"console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off random.trust_cpu=on {arguments}",
            "-drive", f"file={self.root},format=raw,if=virtio,readonly=on,cache=writeback",
            "-drive", f"file={self.disk},format=raw,if=virtio,cache=writeback",
        ]  # fmt: skip
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Guest(process, timeout_s)
        finally:
            process.kill()
            process.communicate()


class Guest:
    """What a running guest says."""

    def __init__(self, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        self._process = process
        self._timeout_s = timeout_s
        self._pending = b""
        self._said: list[str] = []

    def read(self, *, until: float | None = None) -> dict[str, Any] | None:
        """The next line of JSON; None when `until` (on the monotonic clock) comes first."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout_s if until is None else until
        while True:
            line, newline, rest = self._pending.partition(b"\n")
            if newline:
                self._pending = rest
                text = line.decode(errors="replace").strip()
                if found := re.search(r"\{.*\}$", text):
                    with contextlib.suppress(ValueError):
                        return dict(json.loads(found[0]))
                self._said.append(text)
                continue
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._process.stdout], [], [], left)[0]
            if not ready:
                if until is not None:
                    return None
                raise AssertionError(self.last_words("the guest says nothing"))
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise AssertionError(self.last_words("the guest ended"))
            self._pending += data

    def last_words(self, what: str) -> str:
        return "\n".join([what, *self._said[-30:], self._pending.decode(errors="replace")])


# --- images


def _make_file_system(image: Path, size_bytes: int, tree: Path | None) -> None:
    with image.open("wb") as file:
        file.truncate(size_bytes)
    source = ["-d", str(tree)] if tree is not None else []
    subprocess.run(["mkfs.ext4", "-q", "-F", *source, str(image)], check=True, capture_output=True)


def _make_root(tree: Path) -> None:
    """The interpreter, our packages and sources, what they are linked against, and a shell."""
    for name in ("disk", "proc", "sys", "dev", "tmp", "run", "etc", "bin"):
        (tree / name).mkdir(parents=True)
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, tree / "bin/busybox")
    (tree / "bin/sh").symlink_to("busybox")
    programs = {Path(sys.executable), Path(sys.executable).resolve()}
    programs |= {Path(found) for tool in TOOLS if (found := _which(tool))}
    ignore = shutil.ignore_patterns(
        "test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "config-*", *LEFT_OUT
    )
    standard = Path(sysconfig.get_path("stdlib"))
    _copy_tree(standard, tree, shutil.ignore_patterns("site-packages", "dist-packages", "test", "idlelib", "config-*"))
    packages = Path(sysconfig.get_path("purelib"))
    _copy_tree(packages, tree, ignore)
    if sys.prefix != sys.base_prefix:
        _copy(Path(sys.prefix) / "pyvenv.cfg", tree)
        for link in (Path(sys.prefix) / "bin").glob("python*"):
            _copy(link, tree)
            programs.add(link.resolve())
    for name in ("balenapy", "delta", "tests"):
        _copy_tree(REPOSITORY / name, tree, shutil.ignore_patterns("node_modules", "fixtures"))
    # Compiling takes the guest longer than everything else.
    compiled = [str(tree / str(path).lstrip("/")) for path in (REPOSITORY, packages)]
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-s", str(tree), *compiled], check=False)
    objects = [path for path in tree.rglob("*.so*") if path.is_file()]
    for library in _linked([*programs, *objects]) | programs:
        _copy(library, tree)


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _copy(path: Path, tree: Path) -> None:
    """At the same place; a link is copied with what it leads to."""
    target = tree / str(path).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy(path, target)


def _copy_tree(path: Path, tree: Path, ignore: Any) -> None:
    shutil.copytree(path, tree / str(path).lstrip("/"), ignore=ignore, symlinks=True, dirs_exist_ok=True)


def _linked(files: list[Path]) -> set[Path]:
    """The shared libraries of programs and libraries, the loader included."""
    done = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, check=False)
    return {Path(found) for found in re.findall(r"(?:=> |^\s*)(/\S+) \(0x", done.stdout, re.MULTILINE)}


def _write_initrd(target: Path, version: str) -> None:
    busybox = shutil.which("busybox")
    assert busybox is not None
    init = _INIT.replace("REPOSITORY", str(REPOSITORY)).replace("PYTHON", sys.executable)
    entries: list[tuple[str, int, bytes]] = [
        (name, 0o040755, b"") for name in ("bin", "dev", "proc", "root", "modules")
    ]
    entries += [("init", 0o100755, init.encode()), ("bin/busybox", 0o100755, Path(busybox).read_bytes())]
    for number, module in enumerate(_modules_in_order(FETCHED / "lib/modules" / version)):
        entries.append((f"modules/{number:02}-{module.name}", 0o100644, module.read_bytes()))
    archive = b"".join(_cpio(name, mode, data, number) for number, (name, mode, data) in enumerate(entries, 1))
    target.write_bytes(archive + _cpio("TRAILER!!!", 0, b"", 0))


def _cpio(name: str, mode: int, data: bytes, number: int) -> bytes:
    """One entry of a "newc" archive."""
    raw = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + raw
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def _modules_in_order(directory: Path) -> list[Path]:
    """The modules we want, each after those it depends on."""
    files = {path.name.partition(".")[0].replace("-", "_"): path for path in directory.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name)
        if path is None or path in order:  # built in, or there already
            return
        found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for needed in found[1].decode().split(",") if found else ():
            add(needed)
        order.append(path)

    for name in MODULES:
        add(name)
    return order
