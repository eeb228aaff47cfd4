"""The root file system: Debian by mmdebstrap, the kernel's files, the engine's prefix, and ../root on top.

Kernel and firmware packages are unpacked, not installed: their scripts would make an initrd with a program that does
not end under emulation, and ours takes two seconds (initrd.py).
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import stat
from pathlib import Path

from imagemaker.program import Failed, run, say
from imagemaker.targets import PACKAGES, TARGETS, Target

HERE = Path(__file__).resolve().parent.parent
REPOSITORY = HERE.parent.parent
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
SECURITY = "http://security.debian.org/debian-security"
PYTHON = "python3.11"  # of that suite
NO_DOCUMENTS = ("man", "doc", "info", "locale", "lintian", "bug", "gtk-doc", "groff")
# Not used by an engine or by a system that is replaced as a whole. Names below the root.
LEFT_OUT = (
    "debs", "var/cache/apt", "var/lib/apt/lists", "var/log", "var/lib/dpkg/info", "usr/share/doc", "usr/share/man",
    "usr/share/info", "usr/share/locale", "usr/share/lintian", "usr/share/bash-completion", "usr/share/zsh",
    "usr/share/perl5/Debconf", "usr/lib/python3.11/lib2to3", "usr/lib/python3.11/pydoc_data",
    "usr/lib/python3.11/ensurepip", "usr/lib/python3.11/distutils", "usr/lib/python3.11/idlelib",
    "usr/lib/python3.11/turtledemo", "usr/lib/python3.11/test", "usr/lib/python3.11/unittest",
    "usr/lib/python3.11/turtle.py", "usr/lib/python3.11/xmlrpc", "usr/lib/python3.11/lib-dynload/_codecs_*",
    "usr/lib/python3.11/lib-dynload/_test*", "boot",
)  # fmt: skip


def bootstrap(target: Target, tar: Path, epoch: int, mirror: str) -> None:
    """Make the tar of the bare system, the same for all boards of an architecture, with the packages that are only
    unpacked in /debs.
    """
    same = [other for other in TARGETS.values() if other.architecture == target.architecture]
    fetch = " ".join(sorted({name for other in same for name in wanted_debs(other)}))
    command: list[str | Path] = [
        "mmdebstrap", f"--architectures={target.architecture}", "--variant=minbase", "--mode=root", "--format=tar",
        "--components=main,non-free-firmware", f"--include={','.join(PACKAGES)}",
        "--aptopt=APT::Install-Recommends false", "--aptopt=Acquire::Languages none",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in NO_DOCUMENTS),
        f"--customize-hook={HERE / 'fetch-debs'} \"$1\" {fetch}",
        SUITE, tar,
        f"deb {mirror} {SUITE} main non-free-firmware",
        f"deb {mirror} {SUITE}-updates main non-free-firmware",
        f"deb {mirror}-security {SUITE}-security main non-free-firmware"
        if not mirror.startswith(MIRROR)
        else f"deb {SECURITY} {SUITE}-security main non-free-firmware",
    ]  # fmt: skip
    run(command, env={"SOURCE_DATE_EPOCH": str(epoch)})


def wanted_debs(target: Target) -> list[str]:
    return [target.kernel, "busybox-static", "ca-certificates", *target.unpacked]


def unpack(tar: Path, root: Path) -> None:
    root.mkdir(parents=True)
    run(["tar", "-x", "-p", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-f", tar, "-C", root,
         "--exclude=./dev/*"])  # fmt: skip


def unpack_debs(target: Target, root: Path, kernel_deb: Path | None, work: Path) -> tuple[Path, str]:
    """Lay kernel, firmware and busybox in a directory of their own; modules and firmware go to the root.

    Returns: that directory and the kernel's version.
    """
    files = work / "debs"
    files.mkdir()
    names = [name.replace(target.kernel, "linux-image-[0-9]*") for name in wanted_debs(target)]
    debs = sorted(Path(path) for name in names for path in glob.glob(f"{root}/debs/{name}_*.deb"))
    if kernel_deb is not None:
        debs = [deb for deb in debs if not deb.name.startswith("linux-image")] + [kernel_deb]
    for deb in debs:
        run(["dpkg-deb", "-x", deb, files])
    kernels = sorted(path.name.removeprefix("vmlinuz-") for path in files.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise Failed(f"one kernel is wanted, found: {', '.join(kernels) or 'none'}")
    version = kernels[0]
    for name in ("bin", "sbin", "lib/systemd", "usr/bin", "usr/lib/systemd"):
        place = root / (name if name.startswith("usr/") else f"usr/{name}")
        if (files / name).is_dir() and "systemd-boot" in target.unpacked:
            run(["cp", "-a", f"{files / name}/.", place])
    for base in ("lib", "usr/lib"):
        modules = files / base / "modules" / version
        if modules.is_dir():
            shutil.copytree(modules, root / "usr/lib/modules" / version, symlinks=True)
            break
    else:
        raise Failed(f"the kernel package has no modules for {version}")
    for base in ("lib", "usr/lib"):
        firmware = files / base / "firmware"
        if firmware.is_dir():
            shutil.copytree(firmware, root / "usr/lib/firmware", symlinks=True, dirs_exist_ok=True)
    return files, version


def install_certificates(files: Path, root: Path) -> int:
    """The CA bundle, at the places where OpenSSL, Python and people look. The package's own script takes minutes
    under emulation for the same file.
    """
    certificates = sorted((files / "usr/share/ca-certificates/mozilla").glob("*.crt"))
    if not certificates:
        raise Failed("ca-certificates has no certificates")
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.write_text("".join(path.read_text().rstrip("\n") + "\n" for path in certificates))
    for place in ("usr/lib/ssl/cert.pem", "etc/ssl/cert.pem"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).unlink(missing_ok=True)
        (root / place).symlink_to("/etc/ssl/certs/ca-certificates.crt")
    return len(certificates)


def prune_modules(target: Target, root: Path, version: str) -> None:
    modules = root / "usr/lib/modules" / version
    for name in target.dropped_modules:
        shutil.rmtree(modules / "kernel" / name, ignore_errors=True)
    for name in ("build", "source"):
        (modules / name).unlink(missing_ok=True)
    run(["depmod", "-b", root, version])


def strip(target: Target, tree: Path) -> int:
    """Strip the shared objects below a directory; the number stripped."""
    tool = f"{target.triple}-strip"
    if shutil.which(tool) is None:
        tool = "strip" if os.uname().machine in ("aarch64", "armv7l") else tool
    objects = sorted(str(path) for path in tree.rglob("*.so*") if path.is_file() and not path.is_symlink())
    if objects:
        run([tool, "--strip-unneeded", *objects])
    return len(objects)


def finish(target: Target, root: Path, version: str, release: str, epoch: int) -> None:
    """Our own files, the machine's description, mount points; and away with what is not used."""
    leave_out(root)
    for cache in ("var/lib/dpkg/status-old", "var/cache/debconf/config.dat-old", "var/cache/ldconfig/aux-cache"):
        (root / cache).unlink(missing_ok=True)
    for keyfile in root.glob("etc/ssh/ssh_host_*"):
        keyfile.unlink()
    copy_over(HERE / "root", root)
    install_units(REPOSITORY / "images" / "systemd", root)
    (root / "usr/lib/balenapy-os").mkdir(parents=True, exist_ok=True)
    board = {
        "target": target.name,
        "release": release,
        "kernel": version,
        "switch": target.switch,
        "architecture": target.architecture,
        "partitions": {partition.name: target.source(partition.name) for partition in target.partitions
                       if partition.kind != "extended"},
        "numbers": {partition.name: partition.number for partition in target.partitions},
    }  # fmt: skip
    (root / "usr/lib/balenapy-os/board.json").write_text(json.dumps(board, indent=1) + "\n")
    (root / "usr/lib/os-release").write_text(
        (root / "usr/lib/os-release").read_text()
        + f'VARIANT="balenapy for {target.name}"\nVARIANT_ID={target.name}\n'
        + f"IMAGE_ID=balenapy\nIMAGE_VERSION={release}\n"
    )
    boot = "/efi" if target.switch == "systemd-boot" else "/boot"
    # nofail: what cannot be mounted must not stop a device that nobody sits before.
    patient = "nofail,x-systemd.device-timeout=300"
    mounts = [f"{target.source('boot')} {boot} vfat rw,noatime,umask=0077,errors=remount-ro,{patient} 0 2"]
    if target.switch == "autoboot":
        for slot in "ab":
            mounts.append(f"{target.source('boot-' + slot)} /boot-{slot} vfat ro,noatime,umask=0077,noauto 0 0")
            (root / f"boot-{slot}").mkdir(exist_ok=True)
    mounts.append(f"{target.source('data')} /mnt/data ext4 noatime,commit=5,errors=remount-ro,{patient} 0 2")
    mounts.append("tmpfs /tmp tmpfs nosuid,nodev,size=20% 0 0")
    (root / "etc/fstab").write_text("# The root, /etc and /var are laid by the initrd.\n" + "\n".join(mounts) + "\n")
    for name in ("mnt/state", "mnt/data", "efi", "boot"):
        (root / name).mkdir(parents=True, exist_ok=True)
    if boot == "/efi":
        (root / "boot").rmdir()
        (root / "boot").symlink_to("efi")
    (root / "etc/machine-id").write_text("")
    (root / "etc/hostname").write_text("balenapy\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n127.0.1.1 balenapy\n::1 localhost ip6-localhost\n")
    resolv = root / "etc/resolv.conf"
    resolv.unlink(missing_ok=True)
    resolv.symlink_to("../run/systemd/resolve/stub-resolv.conf")
    # PID 1 and timesyncd never set the clock before this file's time: certificates are valid before the first sync.
    clock = root / "usr/lib/clock-epoch"
    clock.write_text("")
    os.utime(clock, (epoch, epoch))
    add_group(root, "balena-engine", 990)
    enable_units(root)


def leave_out(root: Path) -> None:
    for path in sorted(path for name in LEFT_OUT for path in root.glob(name)):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def copy_over(source: Path, root: Path) -> None:
    """Files of ours with fixed modes, owned by root: 755 for what is executable here, else 644."""
    for path in sorted(source.rglob("*")):
        if "__pycache__" in path.parts:
            continue
        place = root / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif path.is_symlink():
            place.unlink(missing_ok=True)
            place.symlink_to(os.readlink(path))
        else:
            shutil.copyfile(path, place)
            place.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)


def install_units(source: Path, root: Path) -> None:
    """The engine's own units: the copy that the Yocto layer takes too."""
    places = {".service": "usr/lib/systemd/system", ".socket": "usr/lib/systemd/system"}
    for path in sorted(source.iterdir()):
        if path.suffix in places:
            place = root / places[path.suffix] / path.name
        elif path.suffix in (".sysusers", ".tmpfiles"):
            place = root / f"usr/lib/{path.suffix[1:]}.d" / (path.stem + ".conf")
        else:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        place.chmod(0o644)


def add_group(root: Path, name: str, gid: int) -> None:
    for file, line in (("group", f"{name}:x:{gid}:\n"), ("gshadow", f"{name}:!::\n")):
        path = root / "etc" / file
        text = path.read_text()
        if f"\n{name}:" not in text:
            path.write_text(text + line)


ENABLED = {
    "sockets.target.wants": ["balena-engine.socket"],
    "multi-user.target.wants": [
        "balena-engine.service", "systemd-networkd.service", "systemd-resolved.service", "balenapy-containers.service",
    ],
    "sysinit.target.wants": ["balenapy-configure.service", "systemd-timesyncd.service", "balenapy-zram.service"],
    "local-fs.target.wants": ["balenapy-grow-data.service"],
    "boot-complete.target.requires": ["balenapy-health.service"],
}  # fmt: skip
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "getty-static.service", "ssh.service", "wpa_supplicant.service", "nftables.service",
    "systemd-networkd-wait-online.service", "systemd-remount-fs.service", "systemd-boot-system-token.service",
    "systemd-boot-update.service", "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service",
    "systemd-firstboot.service", "systemd-logind.service", "systemd-hibernate-resume@.service", "rsync.service",
)  # fmt: skip


def enable_units(root: Path) -> None:
    """In /etc, as `systemctl enable` would: the packages' own choices are replaced by this list."""
    system = root / "etc/systemd/system"
    shutil.rmtree(system, ignore_errors=True)
    for directory, units in ENABLED.items():
        (system / directory).mkdir(parents=True)
        for unit in units:
            for base in ("usr/lib/systemd/system", "lib/systemd/system"):
                if (root / base / unit).exists():
                    (system / directory / unit).symlink_to(f"/{base}/{unit}")
                    break
            else:
                raise Failed(f"no such unit in the image: {unit}")
    for unit in MASKED:
        (system / unit).symlink_to("/dev/null")
    (system / "ssh.service").unlink()  # configure starts it when there is a key
    (system / "default.target").symlink_to("/lib/systemd/system/multi-user.target")


def tree_bytes(root: Path) -> int:
    """Bytes of files, each link's file once."""
    seen: set[int] = set()
    total = 0
    for directory, _, names in os.walk(root):
        for name in names:
            status = os.lstat(os.path.join(directory, name))
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                total += -(-status.st_size // 4096) * 4096 if stat.S_ISREG(status.st_mode) else 0
    return total


def pack(root: Path, image: Path, epoch: int) -> None:
    """The squashfs of the root: the same bytes for the same tree."""
    say(f"root file system: {tree_bytes(root) / 1e6:.0f} MB in files")
    image.unlink(missing_ok=True)
    run(
        ["mksquashfs", root, image, "-noappend", "-no-progress", "-comp", "zstd", "-Xcompression-level", "12",
         "-b", "128K", "-xattrs", "-reproducible"],
        env={"SOURCE_DATE_EPOCH": str(epoch)},
    )  # fmt: skip
