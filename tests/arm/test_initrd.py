"""The initrd's script itself, on a directory in place of a machine: which slot it mounts, and how it counts tries."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.arm.sources import IMAGES

import slots  # isort: skip
from imagemaker.targets import DISK_ID, GENERIC_ARM64_UEFI, RPI_ARM64, Target  # isort: skip

PLACES = ("/sys/class/block", "/sys/devices", "/proc/cmdline", "/etc/board", "/etc/modules", "/newroot", "/state",
          "/dev/kmsg", "/run/var", "/tmp/autoboot")  # fmt: skip
STUB = '#!/bin/sh\necho "$(basename "$0") $*" >> {log}\n{then}\n'


class Machine:
    """What the kernel would show, as files; programs that would change a machine write down that they were called."""

    def __init__(self, directory: Path, target: Target, slot: str) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.log.touch()
        self.state = directory / "state"
        text = (IMAGES / "arm/initrd/init").read_text()
        for place in PLACES:
            text = text.replace(f"{place}", f"{directory}{place}")
        text = text.replace("export PATH=/bin", f"export PATH={directory}/bin:$PATH")
        text = text.replace("/bin/busybox mount", "mount").replace('[ -b "$device" ]', '[ -e "$device" ]')
        text = text.replace('"/dev/', f'"{directory}/dev/')
        text = text.replace("sleep 10", ":").replace("sleep 0.5", ":").replace(f"echo {directory}/dev", "echo /dev")
        (directory / "init").write_text(text)
        root = ("newroot/usr/lib/systemd", "newroot/etc", "newroot/var")
        for name in ("bin", "proc", "etc", "dev", "state", "tmp", *root):
            (directory / name).mkdir(parents=True, exist_ok=True)
        for name in ("mount", "umount", "modprobe", "switch_root", "reboot", "sync"):
            ends = "kill -9 $PPID" if name == "reboot" else "exit 0"  # the script must not go on after it
            (directory / "bin" / name).write_text(STUB.format(log=self.log, then=ends))
            (directory / "bin" / name).chmod(0o755)
        (directory / "newroot/usr/lib/systemd/systemd").write_text("")
        (directory / "newroot/usr/lib/systemd/systemd").chmod(0o755)
        (directory / "proc/cmdline").write_text(f"panic=10 balenapy.slot={slot} quiet\n")
        (directory / "etc/modules").write_text("squashfs\n")
        board = [f"SWITCH={target.switch}", f"BOOT={target.source('boot')}", f"STATE={target.source('state')}"]
        board += [f"ROOT_{each.upper()}={target.source(f'root-{each}')}" for each in "ab"]
        (directory / "etc/board").write_text("\n".join(board) + "\n")
        # Another disk before ours, so that names and numbers alone do not find it.
        self._disk("sda", target, 0x11111111, "other-")
        self._disk("sdb", target, DISK_ID, "")
        for each in "ab":
            (directory / f"tmp/autoboot-{each}.txt").write_text(slots.autoboot(each))
        (directory / "tmp/autoboot.txt").write_text(slots.autoboot(slot))

    def _disk(self, name: str, target: Target, identifier: int, prefix: str) -> None:
        (self.directory / "dev" / name).write_bytes(bytes(440) + identifier.to_bytes(4, "little") + bytes(68))
        for partition in target.partitions:
            place = self.directory / f"sys/class/block/{name}/{name}{partition.number}"
            place.mkdir(parents=True)
            (place / "partition").write_text(f"{partition.number}\n")
            label = f"PARTNAME={prefix}{partition.name}\n" if target.table == "gpt" else ""
            (place / "uevent").write_text(f"DEVNAME={name}{partition.number}\n{label}")
            (self.directory / f"sys/class/block/{name}{partition.number}").symlink_to(place)
            (self.directory / "dev" / f"{name}{partition.number}").touch()

    def boot(self) -> list[str]:
        self.log.write_text("")
        subprocess.run(["sh", self.directory / "init"], capture_output=True, check=False, timeout=60,
                       env={"PATH": os.environ["PATH"]})  # fmt: skip
        return [line.replace(str(self.directory), "") for line in self.log.read_text().splitlines()]

    @property
    def default(self) -> str | None:
        return slots.default_slot((self.directory / "tmp/autoboot.txt").read_text())


def mounted_root(calls: list[str]) -> str:
    (line,) = (line for line in calls if "-t squashfs" in line)
    return line.split()[-2].rpartition("/")[2]


@pytest.mark.parametrize("target", [GENERIC_ARM64_UEFI, RPI_ARM64], ids=lambda target: str(target.name))
@pytest.mark.parametrize("slot", ["a", "b"])
def test_the_slots_own_root_on_the_right_disk_is_mounted(tmp_path: Path, target: Target, slot: str) -> None:
    calls = Machine(tmp_path, target, slot).boot()

    assert mounted_root(calls) == f"sdb{target.partition(f'root-{slot}').number}"
    assert any("-t overlay" in line and line.endswith("/newroot/etc") for line in calls)
    assert any(line.startswith("mount --bind") and line.endswith("/var/lib/systemd") for line in calls)
    assert calls[-1].startswith("switch_root /newroot")


def test_a_slot_without_a_system_restarts_the_machine(tmp_path: Path) -> None:
    machine = Machine(tmp_path, GENERIC_ARM64_UEFI, "b")
    (tmp_path / "newroot/usr/lib/systemd/systemd").unlink()

    assert machine.boot()[-1] == "reboot -f"


def test_tries_are_counted_down_and_then_the_other_slot_starts(tmp_path: Path) -> None:
    machine = Machine(tmp_path, RPI_ARM64, "b")
    (machine.state / "host-update").mkdir()
    trial = machine.state / "host-update/trial"
    trial.write_text("slot=b\ntries=2\n")

    for left in (1, 0):
        assert machine.boot()[-1].startswith("switch_root")
        assert trial.read_text() == f"slot=b\ntries={left}\n"
        assert machine.default == "b"
    size = (tmp_path / "tmp/autoboot.txt").stat()
    assert machine.boot()[-1] == "reboot -f"
    assert machine.default == "a"
    assert (tmp_path / "tmp/autoboot.txt").stat().st_size == 512
    assert (tmp_path / "tmp/autoboot.txt").stat().st_ino == size.st_ino  # in place
    assert not trial.exists()
    assert (machine.state / "host-update/failed").exists()


def test_the_other_slots_boots_are_not_counted(tmp_path: Path) -> None:
    """With the firmware's tryboot the old slot may start while the trial is still noted."""
    machine = Machine(tmp_path, RPI_ARM64, "a")
    (machine.state / "host-update").mkdir()
    (machine.state / "host-update/trial").write_text("slot=b\ntries=0\n")

    assert machine.boot()[-1].startswith("switch_root")
    assert (machine.state / "host-update/trial").read_text() == "slot=b\ntries=0\n"
    assert machine.default == "a"
