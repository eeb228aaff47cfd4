"""Our own initrd: busybox, the drivers of disks and file systems, and ../initrd/init."""

from __future__ import annotations

import re
from pathlib import Path

from imagemaker.cpio import Archive
from imagemaker.program import Failed, run
from imagemaker.rootfs import HERE
from imagemaker.targets import Target

APPLETS = (
    "sh mount umount mkdir cat sed grep sleep modprobe switch_root dd od ln ls echo reboot sync rm mv cp test tr cut "
    "head sort find xargs poweroff dmesg expr wc date"
).split()


def make_initrd(target: Target, root: Path, files: Path, version: str, image: Path) -> None:
    archive = Archive()
    for name in ("dev", "proc", "sys", "run", "newroot", "state", "bin", "etc", "tmp"):
        archive.directory(name)
    archive.node("dev/console", 5, 1)
    archive.node("dev/null", 1, 3)
    busybox = next((path for name in ("bin/busybox", "usr/bin/busybox") if (path := files / name).is_file()), None)
    if busybox is None:
        raise Failed("busybox-static has no bin/busybox")
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    archive.link("sbin/modprobe", "/bin/busybox")  # where the kernel itself looks
    archive.file("init", (HERE / "initrd" / "init").read_bytes(), 0o755)
    modules = root / "usr/lib/modules" / version
    wanted, missing = closure(modules, target.initrd_modules)
    for name in wanted:
        archive.file(f"lib/modules/{version}/{name}", (modules / name).read_bytes())
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        if (modules / name).is_file():
            archive.file(f"lib/modules/{version}/{name}", (modules / name).read_bytes())
    archive.file(f"lib/modules/{version}/modules.dep", dependencies(modules, wanted))
    archive.file(f"lib/modules/{version}/modules.alias", aliases(modules, wanted))
    loaded = [name for name in target.initrd_modules if name not in missing]
    archive.file("etc/modules", ("\n".join(loaded) + "\n").encode())
    lines = [f"SWITCH={target.switch}", f"BOOT={target.source('boot')}", f"STATE={target.source('state')}"]
    lines += [f"ROOT_{slot.upper()}={target.source(f'root-{slot}')}" for slot in "ab"]
    archive.file("etc/board", ("\n".join(lines) + "\n").encode())
    plain = image.with_suffix(".cpio")
    plain.write_bytes(archive.finish())
    run(["zstd", "-q", "-f", "-15", "-T1", plain, "-o", image])
    plain.unlink()


def _key(name: str) -> str:
    """modprobe takes - and _ for the same."""
    return re.sub(r"\.ko(\.\w+)?$", "", name.rpartition("/")[2]).replace("-", "_")


def read_dependencies(modules: Path) -> dict[str, list[str]]:
    result = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, needs = line.partition(":")
        result[name] = needs.split()
    return result


def closure(modules: Path, names: tuple[str, ...]) -> tuple[list[str], set[str]]:
    """Files of the named modules and of all they need; and the names this kernel has no file for (built in, or not)."""
    needs = read_dependencies(modules)
    by_name = {_key(path): path for path in needs}
    found: dict[str, None] = {}
    missing = set()
    for name in names:
        path = by_name.get(name.replace("-", "_"))
        if path is None:
            missing.add(name)
            continue
        for each in (path, *needs[path]):
            found[each] = None
    # crc32c of ext4 is asked for by name when it is mounted.
    for name in ("crc32c_generic", "libcrc32c", "crc32c_cryptoapi"):
        if name in by_name:
            found[by_name[name]] = None
    return sorted(found), missing


def dependencies(modules: Path, wanted: list[str]) -> bytes:
    needs = read_dependencies(modules)
    return "".join(f"{name}: {' '.join(needs[name])}\n" for name in wanted).encode()


def aliases(modules: Path, wanted: list[str]) -> bytes:
    names = {_key(path) for path in wanted}
    lines = [line for line in (modules / "modules.alias").read_text().splitlines()
             if line.startswith("alias ") and line.split()[-1] in names]  # fmt: skip
    return ("\n".join(lines) + "\n").encode()
