"""Parts of the images that need no emulation: pins, initrd, partition tables, boot files, units, settings."""

from __future__ import annotations

import configparser
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.arm.sources import IMAGES, OVERLAY, REPOSITORY

import pins  # isort: skip
import settings  # isort: skip
import slots  # isort: skip
from imagemaker import boot, disk, initrd, rootfs  # isort: skip
from imagemaker.cpio import Archive  # isort: skip
from imagemaker.targets import DISK_ID, MIB, TARGETS, Target  # isort: skip

EPOCH = 1_795_000_000


def need(*tools: str) -> None:
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"not on this machine: {', '.join(missing)}")


# -- pins --


def test_the_engines_share_of_the_constraints_has_no_test_tool_and_no_pip() -> None:
    names = {pin.name for pin in pins.engine_pins()}

    assert {"trio", "quart-trio", "hypercorn", "zstandard", "bsdiff4", "h11", "httpcore", "dnslib", "werkzeug"} <= names
    assert names.isdisjoint({"pytest", "pip", "setuptools", "wheel", "mypy", "ruff", "docker", "requests", "pyyaml"})
    assert all(pin.hashes and pin.version for pin in pins.engine_pins())


def test_every_pin_is_installed_here_in_that_version() -> None:
    """The closure by `# via` is what the packages themselves ask for."""
    from importlib import metadata

    names = {pin.name for pin in pins.engine_pins()}
    for name in names:
        for requirement in metadata.requires(name) or ():
            if "extra ==" in requirement or "python_version" in requirement or "platform" in requirement:
                continue
            wanted = pins.canonical(re.split(r"[<>=!~;\s\[(]", requirement, maxsplit=1)[0])
            assert wanted in names or "implementation_name" in requirement, f"{name} wants {wanted}"


# -- initrd --


def test_an_initrd_archive_is_read_by_cpio(tmp_path: Path) -> None:
    need("cpio")
    archive = Archive()
    archive.directory("dev")
    archive.file("init", b"#!/bin/sh\n", 0o755)
    archive.file("lib/modules/6/x.ko", b"module" * 100)
    archive.link("bin/sh", "busybox")
    listed = subprocess.run(["cpio", "-itv", "--quiet"], input=archive.finish(), capture_output=True, check=True).stdout

    lines = [line.split() for line in listed.decode().splitlines()]
    assert [(line[0], line[8]) for line in lines] == [
        ("drwxr-xr-x", "dev"), ("-rwxr-xr-x", "init"), ("drwxr-xr-x", "lib"), ("drwxr-xr-x", "lib/modules"),
        ("drwxr-xr-x", "lib/modules/6"), ("-rw-r--r--", "lib/modules/6/x.ko"), ("drwxr-xr-x", "bin"),
        ("lrwxrwxrwx", "bin/sh"),
    ]  # fmt: skip


def test_modules_come_with_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("k/ext4.ko: k/jbd2.ko k/mbcache.ko\nk/jbd2.ko:\nk/mbcache.ko:\nk/x-y.ko:\n")

    wanted, missing = initrd.closure(tmp_path, ("ext4", "x_y", "virtio_blk"))

    assert wanted == ["k/ext4.ko", "k/jbd2.ko", "k/mbcache.ko", "k/x-y.ko"]
    assert missing == {"virtio_blk"}


@pytest.mark.parametrize("script", ["images/arm/initrd/init", "images/arm/fetch-debs", ".ci/packages"])
def test_shell_programs_are_shell(script: str) -> None:
    shell = "bash" if script.startswith(".ci") else "sh"
    subprocess.run([shell, "-n", REPOSITORY / script], check=True)


# -- partitions --


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_partition_table_is_what_the_target_says(target: Target, tmp_path: Path) -> None:
    need("sfdisk")
    parts = {}
    for partition in target.partitions:
        if partition.kind != "extended":
            parts[partition.name] = tmp_path / partition.name
            parts[partition.name].write_bytes(partition.name.encode() * 100)
    image = tmp_path / "image"
    disk.assemble(target, image, parts, 256)
    dumped = subprocess.run(["sfdisk", "--json", image], capture_output=True, check=True).stdout
    table = json.loads(dumped)["partitiontable"]

    found = {int(re.sub(r".*?(\d+)$", r"\1", each["node"])): each for each in table["partitions"]}
    assert table["label"] == target.table
    assert sorted(found) == [partition.number for partition in target.partitions]
    for partition in target.partitions:
        entry = found[partition.number]
        if partition.kind == "extended":
            assert entry["type"] in ("f", "5")
            continue
        assert entry["size"] == partition.mib * MIB // 512
        assert entry["start"] % 2048 == 0
        with open(image, "rb") as file:
            file.seek(entry["start"] * 512)
            assert file.read(len(partition.name)) == partition.name.encode()
        if target.table == "gpt":
            assert entry["name"] == partition.name
    if target.table == "dos":
        assert table["id"] == f"0x{DISK_ID:08x}"
        assert found[1]["type"] == found[2]["type"] == found[3]["type"] == "c"
    last = max(found.values(), key=lambda entry: int(entry["start"]))
    assert last["start"] == found[target.partition("data").number]["start"]  # data is last: it can grow
    assert not subprocess.run(["sfdisk", "--verify", image], capture_output=True, check=False).returncode


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_file_systems_are_the_same_bytes_each_time(target: Target, tmp_path: Path) -> None:
    need("mkfs.vfat", "mcopy", "mkfs.ext4")
    tree = tmp_path / "tree"
    (tree / "loader/entries").mkdir(parents=True)
    (tree / "loader/entries/slot-a.conf").write_text("x")
    (tree / "config.json").write_text("{}")
    images = []
    for each in ("one", "two"):
        fat, ext4 = tmp_path / f"{each}.fat", tmp_path / f"{each}.ext4"
        disk.make_fat(target.partition("boot"), tree, fat, EPOCH, 32 * MIB)
        disk.make_ext4(target, target.partition("state"), None, ext4, EPOCH, 64 * MIB)
        images.append((fat.read_bytes(), ext4.read_bytes()))

    assert images[0] == images[1]
    listed = subprocess.run(["mdir", "-b", "-/", "-i", tmp_path / "one.fat", "::"], capture_output=True, check=True)
    assert "::/loader/entries/slot-a.conf" in listed.stdout.decode().split()


def test_the_root_is_the_same_bytes_whenever_its_files_were_written(tmp_path: Path) -> None:
    need("mksquashfs")
    images = []
    for each, written_at in (("one", EPOCH + 5), ("two", EPOCH + 500)):
        root = tmp_path / each
        for name in ("etc/hosts", "usr/bin/tool", "usr/lib/a/b"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name * 100)
        (root / "usr/bin/link").symlink_to("tool")
        for path in sorted(root.rglob("*"), reverse=each == "one"):
            os.utime(path, (written_at, written_at), follow_symlinks=False)
        os.utime(root, (written_at, written_at))
        rootfs.pack(root, tmp_path / f"{each}.squashfs", EPOCH)
        images.append((tmp_path / f"{each}.squashfs").read_bytes())

    assert images[0] == images[1]


# -- boot files --


def raspberry_files(directory: Path, version: str) -> Path:
    """What the kernel's and the firmware's packages lay down."""
    files = directory / "debs"
    trees = files / f"usr/lib/linux-image-{version}"
    for path in (trees / "broadcom/bcm2837-rpi-3-b.dtb", trees / "broadcom/bcm2711-rpi-4-b.dtb",
                 trees / "bcm2836-rpi-2-b.dtb", trees / "bcm2837-rpi-3-b.dtb", files / f"boot/vmlinuz-{version}",
                 *(files / "usr/lib/raspi-firmware" / name for name in
                   ("start.elf", "start4.elf", "fixup.dat", "fixup4.dat", "bootcode.bin"))):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode())
    return files


@pytest.mark.parametrize("name", ["rpi-arm64", "rpi-armhf"])
def test_a_raspberry_starts_slot_a_and_can_try_slot_b(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    files = raspberry_files(tmp_path, "6.1")
    (tmp_path / "initrd").write_bytes(b"initrd")
    boot.slot_files(target, files, "6.1", tmp_path / "initrd", tmp_path / "slot")
    boot.boot_tree(target, files, tmp_path, tmp_path / "slot", tmp_path / "boot", "r1", "")
    boot.boot_slot_tree(target, tmp_path / "slot", tmp_path / "boot-a", "a", "quiet")

    first = {path.name for path in (tmp_path / "boot").iterdir()}
    assert {"autoboot.txt", "autoboot-a.txt", "autoboot-b.txt", "config.txt", "bootcode.bin", "config.json"} <= first
    text = (tmp_path / "boot/autoboot.txt").read_text()
    assert (len(text), slots.default_slot(text)) == (512, "a")
    assert "tryboot_a_b=1" in text
    slot_a = {path.name for path in (tmp_path / "boot-a").iterdir()}
    assert {"vmlinuz", "initrd", "config.txt", "cmdline.txt", "start.elf", "start4.elf", "fixup.dat"} <= slot_a
    assert "bcm2837-rpi-3-b.dtb" in slot_a
    config = (tmp_path / "boot-a/config.txt").read_text()
    assert "kernel=vmlinuz\n" in config and "initramfs initrd followkernel\n" in config
    assert ("arm_64bit=1" in config) is (target.architecture == "arm64")
    words = (tmp_path / "boot-a/cmdline.txt").read_text().split()
    assert {"balenapy.slot=a", "panic=10", "quiet", "console=tty0"} <= set(words)
    assert (tmp_path / "boot-a/cmdline.txt").read_text().count("\n") == 1


def test_a_uefi_board_has_loader_entry_and_kernel(tmp_path: Path) -> None:
    target = TARGETS["generic-arm64-uefi"]
    loader = tmp_path / "root/usr/lib/systemd/boot/efi/systemd-bootaa64.efi"
    loader.parent.mkdir(parents=True)
    loader.write_bytes(b"MZ")
    files = raspberry_files(tmp_path, "6.1")
    (tmp_path / "initrd").write_bytes(b"initrd")
    boot.slot_files(target, files, "6.1", tmp_path / "initrd", tmp_path / "slot")
    boot.boot_tree(target, files, tmp_path / "root", tmp_path / "slot", tmp_path / "boot", "r1", "")

    entry = (tmp_path / "boot/loader/entries/slot-a.conf").read_text()
    fields = dict(line.split(" ", 1) for line in entry.splitlines())
    assert fields["version"] == "1"
    for key in ("linux", "initrd"):
        assert (tmp_path / "boot" / fields[key].lstrip("/")).is_file()
    assert "balenapy.slot=a" in fields["options"].split()
    assert (tmp_path / "boot/EFI/BOOT/BOOTAA64.EFI").read_bytes() == b"MZ"


# -- units --


def unit(path: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return parser


def test_the_engines_units_keep_containers_and_the_sockets_inode() -> None:
    service = unit(IMAGES / "systemd/balena-engine.service")
    socket = unit(IMAGES / "systemd/balena-engine.socket")

    assert service["Service"]["KillMode"] == "process"
    assert service["Service"]["Delegate"] == "yes"
    assert service["Service"]["Type"] == "notify"
    assert "MALLOC_ARENA_MAX=1" in service["Service"]["Environment"]
    assert int(service["Service"]["WatchdogSec"]) == 360
    assert service["Service"]["ExecStart"].endswith("-H fd://")
    assert socket["Socket"]["RemoveOnStop"] == "no"
    assert socket["Socket"]["ListenStream"] == "/run/balena-engine.sock"
    assert "balena-engine.socket" in service["Unit"]["Requires"]


def test_every_enabled_unit_and_every_program_of_a_unit_exists() -> None:
    ours = {path.name for path in (OVERLAY / "usr/lib/systemd/system").iterdir()} | {
        path.name for path in (IMAGES / "systemd").iterdir()
    }
    enabled = {name for names in rootfs.ENABLED.values() for name in names}

    assert {name for name in enabled if name.startswith("balen")} <= ours
    for path in (OVERLAY / "usr/lib/systemd/system").glob("*.service"):
        program = unit(path)["Service"]["ExecStart"].split()[0]
        assert (OVERLAY / program.lstrip("/")).is_file(), f"{path.name}: {program}"
        assert (OVERLAY / program.lstrip("/")).stat().st_mode & 0o111


# -- config.json --


def test_an_empty_card_gets_a_name_of_its_own_and_dhcp() -> None:
    read = settings.read_settings("", "0123456789abcdef")

    assert read.hostname == "balenapy-012345"
    assert json.loads(read.files["/etc/balena-engine/daemon.json"]) == {"data-root": "/mnt/data/balena-engine"}
    assert (read.complaints, read.wifi) == ([], [])


def test_the_builders_own_config_json_has_nothing_to_complain_about() -> None:
    assert settings.read_settings(json.dumps(boot.CONFIG), "x").complaints == []


def test_network_wifi_time_and_engine_become_files() -> None:
    read = settings.read_settings(json.dumps({
        "hostname": "box", "time_servers": ["ntp.lan"], "engine": {"registry-mirrors": ["https://mirror.lan"]},
        "network": {"interfaces": {
            "eth0": {"address": "10.0.0.2/24", "gateway": "10.0.0.1", "dns": ["10.0.0.1", "fd00::1"]},
            "wlan0": {"wifi": {"ssid": 'a "net"', "password": "secret pass", "country": "DE"}},
        }},
    }), "x")  # fmt: skip

    assert read.complaints == []
    assert read.hostname == "box"
    wired = read.files["/etc/systemd/network/10-config-eth0.network"]
    assert "DHCP=no\nAddress=10.0.0.2/24\nGateway=10.0.0.1\nDNS=10.0.0.1\nDNS=fd00::1\n" in wired
    assert "DHCP=yes" in read.files["/etc/systemd/network/10-config-wlan0.network"]
    wifi = read.files["/etc/wpa_supplicant/wpa_supplicant-wlan0.conf"]
    assert "ssid=" + b'a "net"'.hex() in wifi
    assert 'psk="secret pass"' in wifi and "country=DE" in wifi
    assert read.files["/etc/systemd/timesyncd.conf.d/10-config.conf"] == "[Time]\nNTP=ntp.lan\n"
    assert json.loads(read.files["/etc/balena-engine/daemon.json"])["registry-mirrors"] == ["https://mirror.lan"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "none of it is used"),
        ("[]", "not an object"),
        ('{"hostnam": "x"}', "unknown key hostnam"),
        ('{"hostname": "a b"}', "hostname"),
        ('{"network": {"interfaces": {"eth0\\nx": {}}}}', "is none"),
        ('{"network": {"interfaces": {"eth0": {"address": "x\\n[Match]"}}}}', "is no address"),
        ('{"network": {"interfaces": {"w": {"wifi": {"ssid": "x", "password": "short"}}}}}', "8 to 63"),
        ('{"network": {"interfaces": {"w": {"wifi": {"ssid": "x", "password": "quote\\"quote"}}}}}', "8 to 63"),
        ('{"network": [1]}', "not an object"),
        ('{"time_servers": "x"}', "not a list"),
        ('{"engine": [1]}', "not an object"),
        ('{"containers": {"a": 1}}', "not an object of objects"),
    ],
)
def test_a_mistake_is_told_and_the_device_comes_up(text: str, complaint: str) -> None:
    read = settings.read_settings(text, "abcdef")

    assert any(complaint in each for each in read.complaints)
    assert read.hostname
    assert "/etc/balena-engine/daemon.json" in read.files
    assert "\n[Match]" not in read.files.get("/etc/systemd/network/10-config-eth0.network", "")


def test_settings_never_raise() -> None:
    numbers = random.Random(8)
    values = [None, 1, "", "x", [], {}, [1], {"a": 1}, True, {"interfaces": {"eth0": 5}}, {"interfaces": [1]},
              {"interfaces": {"w": {"wifi": 3, "dns": {"a": 1}, "address": [3]}}}]  # fmt: skip
    for _ in range(2000):
        document = {key: numbers.choice(values) for key in settings.KEYS if numbers.random() < 0.7}
        settings.read_settings(json.dumps(document), "x")
