"""Some Debian packages of another architecture, unpacked: for programs under qemu-user, without a root file system."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.arm.sources import IMAGES

QEMU = shutil.which("qemu-aarch64-static")
BINFMT = Path("/proc/sys/fs/binfmt_misc")
HANDLER = "balenapy-test-aarch64"
# ELF, 64 bits, little-endian, EM_AARCH64.
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
INTERPRETER = (
    "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libgcc-s1 libcrypt1 zlib1g libexpat1 libssl3 "
    "libbz2-1.0 liblzma5 libffi8 libsqlite3-0 libuuid1 libtinfo6 libncursesw6 libreadline8"
).split()


def apt_config(directory: Path, mirror: str = "http://deb.debian.org/debian") -> Path:
    """An apt of its own for arm64: nothing of this machine's is touched."""
    for name in ("etc", "state/lists/partial", "cache/archives/partial"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "status").touch()
    (directory / "sources.list").write_text(f"deb {mirror} bookworm main\n")
    config = directory / "apt.conf"
    config.write_text(
        f'APT::Architecture "arm64"; APT::Architectures "arm64"; Acquire::Languages "none";\n'
        f'Dir::Etc "{directory}/etc"; Dir::Etc::SourceList "{directory}/sources.list";\n'
        f'Dir::Etc::SourceParts "/dev/null"; Dir::Etc::TrustedParts "/usr/share/keyrings";\n'
        f'Dir::State "{directory}/state"; Dir::State::status "{directory}/status"; Dir::Cache "{directory}/cache";\n'
    )
    return config


def fetch(directory: Path, packages: Sequence[str]) -> list[Path]:
    """Download packages once; they stay in the directory."""
    missing = [name for name in packages if not list((directory / "debs").glob(f"{name}_*.deb"))]
    if missing:
        config = apt_config(directory / "apt")
        environment = {**os.environ, "APT_CONFIG": str(config), "MMDEBSTRAP_APT_CONFIG": str(config)}
        subprocess.run(["apt-get", "update", "-qq"], env=environment, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([IMAGES / "arm/fetch-debs", directory, *missing], env=environment, check=True)
    return [next((directory / "debs").glob(f"{name}_*.deb")) for name in packages]


def unpack(debs: Sequence[Path], root: Path) -> None:
    """With /usr merged, as Debian's roots are."""
    for name in ("bin", "lib", "sbin"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for deb in debs:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as source:
            subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", root], stdin=source.stdout, check=True)
        assert source.returncode == 0


@contextlib.contextmanager
def arm64_programs() -> Iterator[None]:
    """While it lasts, this kernel runs arm64 programs (binfmt_misc).

    In containers as well (flag F), under the name they are called by (P): busybox does what its name says.
    """
    mounted = not (BINFMT / "register").exists()
    if mounted:
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
    try:
        present = any(b"aarch64" in path.name.encode() and b"enabled" in path.read_bytes()
                      for path in BINFMT.iterdir() if path.name not in ("register", "status"))  # fmt: skip
        if not present:
            (BINFMT / "register").write_text(f":{HANDLER}:M::{MAGIC}:{MASK}:{QEMU}:PF")
        yield
    finally:
        if (BINFMT / HANDLER).exists():
            (BINFMT / HANDLER).write_text("-1")
        if mounted:
            subprocess.run(["umount", BINFMT], check=True)
