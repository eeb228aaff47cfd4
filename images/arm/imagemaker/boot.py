"""What lies on the boot partitions of each kind of board."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from imagemaker.program import Failed, say
from imagemaker.rootfs import HERE
from imagemaker.targets import Target

sys.path.insert(0, str(HERE / "root/usr/lib/balenapy-os"))
from slots import autoboot, loader_entry

CONFIG = {
    "hostname": "",
    "network": {"interfaces": {}},
    "time_servers": [],
    "engine": {},
    "containers": {},
}
# panic: a kernel that cannot go on starts again, which is counted. The watchdog is systemd's.
COMMON_LINE = "balenapy.slot={slot} panic=10 loglevel=4 systemd.show_status=0 fsck.repair=yes"
BOOT_README = """config.json        settings of this device: network, time servers, engine, containers
authorized_keys    put a file of this name here with your public key: ssh is on, for root, with that key only
update.pub         public key (PEM, Ed25519) of host updates: updates without its signature are then refused
"""


def command_line(target: Target, extra: str = "") -> str:
    """The kernel's, with `{slot}` where the slot's letter goes."""
    words = [COMMON_LINE, target.command_line, extra]
    return " ".join(word for word in words if word)


def raspberry_config(target: Target) -> str:
    lines = [
        "# balenapy: replaced by host updates. What is yours goes into usercfg.txt on the first partition's copy.",
        "kernel=vmlinuz",
        "initramfs initrd followkernel",
        "enable_uart=1",
        "disable_splash=1",
        "disable_overscan=1",
        "upstream_kernel=1",
        "[pi4]",
        "max_framebuffers=2",
        "arm_boost=1",
        "[all]",
    ]
    if target.architecture == "arm64":
        lines.insert(1, "arm_64bit=1")
    return "\n".join(lines) + "\n"


def slot_files(target: Target, files: Path, version: str, initrd: Path, slot_tree: Path) -> None:
    """Kernel, initrd, device trees (and a Raspberry Pi's firmware): what an update carries beside the root."""
    slot_tree.mkdir(parents=True)
    kernel = files / f"boot/vmlinuz-{version}"
    if target.switch == "systemd-boot":
        shutil.copyfile(kernel, slot_tree / "linux")
        shutil.copyfile(initrd, slot_tree / "initrd")
        return
    shutil.copyfile(kernel, slot_tree / "vmlinuz")
    shutil.copyfile(initrd, slot_tree / "initrd")
    (slot_tree / "config.txt").write_text(raspberry_config(target))
    trees = files / f"usr/lib/linux-image-{version}"
    found = sorted({path for pattern in target.device_trees for path in trees.glob(pattern)})
    if not found:
        raise Failed(f"the kernel has no device tree of a Raspberry Pi below {trees}")
    for path in found:
        shutil.copyfile(path, slot_tree / path.name)
    overlays = trees / "overlays"
    if overlays.is_dir():
        shutil.copytree(overlays, slot_tree / "overlays")
    firmware = files / "usr/lib/raspi-firmware"
    for pattern in ("start.elf", "start4.elf", "fixup.dat", "fixup4.dat", "start_cd.elf", "fixup_cd.dat"):
        for path in firmware.glob(pattern):
            shutil.copyfile(path, slot_tree / path.name)
    if not (slot_tree / "start.elf").exists():
        raise Failed("raspi-firmware has no start.elf")
    if not any("bcm2712" in path.name for path in found):
        say("this kernel has no device tree of a Pi 5: give one that has with --kernel")


def boot_tree(target: Target, files: Path, root: Path, slot_tree: Path, tree: Path, release: str, extra: str) -> None:
    """The first boot partition."""
    tree.mkdir(parents=True)
    (tree / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (tree / "README.txt").write_text(BOOT_README)
    if target.switch == "systemd-boot":
        loader = root / "usr/lib/systemd/boot/efi/systemd-bootaa64.efi"
        for place in ("EFI/BOOT/BOOTAA64.EFI", "EFI/systemd/systemd-bootaa64.efi"):
            (tree / place).parent.mkdir(parents=True)
            shutil.copyfile(loader, tree / place)
        (tree / "loader/entries").mkdir(parents=True)
        (tree / "loader/loader.conf").write_text("timeout 0\neditor no\n")
        (tree / "loader/entries/slot-a.conf").write_text(loader_entry("a", 1, release, command_line(target, extra)))
        shutil.copytree(slot_tree, tree / "slot-a")
        return
    (tree / "autoboot.txt").write_text(autoboot("a"))
    for slot in "ab":
        (tree / f"autoboot-{slot}.txt").write_text(autoboot(slot))
    # A Pi 3 and older start from bootcode.bin of the first partition, and want a config.txt beside it.
    (tree / "config.txt").write_text("")
    bootcode = files / "usr/lib/raspi-firmware/bootcode.bin"
    if bootcode.exists():
        shutil.copyfile(bootcode, tree / "bootcode.bin")


def boot_slot_tree(target: Target, slot_tree: Path, tree: Path, slot: str, extra: str) -> None:
    """A Raspberry Pi slot's own boot partition."""
    shutil.copytree(slot_tree, tree)
    (tree / "cmdline.txt").write_text(command_line(target, extra).replace("{slot}", slot) + "\n")
