"""The short form of the board test: the engine's prefix for arm64 under qemu-user, and an arm64 container here."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.arm import foreign
from tests.arm.sources import REPOSITORY
from tests.arm.test_board import arm_image, noise
from tests.compat import images
from tests.engine_process import running_engine

from imagemaker import prefix, rootfs  # isort: skip
from imagemaker.targets import GENERIC_ARM64_UEFI  # isort: skip

pytestmark = pytest.mark.root

KEPT = REPOSITORY / "build/arm-short"  # downloads: 12 MB of packages, 6 MB of wheels
EM_AARCH64 = 183
SHT_SYMTAB = 2


@pytest.fixture(scope="module")
def downloads() -> Path:
    if foreign.QEMU is None or shutil.which("aarch64-linux-gnu-strip") is None:
        pytest.skip("not on this machine: qemu-user-static, binutils-aarch64-linux-gnu")
    KEPT.mkdir(parents=True, exist_ok=True)
    return KEPT


@pytest.fixture(scope="module")
def root(downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An arm64 interpreter and the engine's prefix, as they lie in an image."""
    root = tmp_path_factory.mktemp("root")
    foreign.unpack(foreign.fetch(downloads, foreign.INTERPRETER), root)
    work = tmp_path_factory.mktemp("work")
    prefix.make_prefix(GENERIC_ARM64_UEFI, work / "prefix", downloads / "wheels", work)
    prefix.install(work / "prefix", root)
    rootfs.leave_out(root)
    for name in ("proc", "tmp", "dev", "run"):
        (root / name).mkdir(exist_ok=True)
    assert foreign.QEMU is not None
    shutil.copyfile(foreign.QEMU, root / "qemu")
    (root / "qemu").chmod(0o755)
    return root


def emulated(root: Path, *words: str) -> str:
    chroot = shutil.which("chroot") or "/usr/sbin/chroot"
    done = subprocess.run(
        [chroot, root, "/qemu", *words], capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin", "LANG": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def elf_header(path: Path) -> tuple[int, bool]:
    """The machine an ELF file is for, and whether it has its symbol table still."""
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x02"
    (machine,) = struct.unpack_from("<H", data, 18)
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    kinds = [struct.unpack_from("<I", data, table + index * size + 4)[0] for index in range(count)]
    return machine, SHT_SYMTAB in kinds


def test_the_engine_and_its_packages_fit_into_45_mb(root: Path) -> None:
    tree = root / prefix.PREFIX
    ours = rootfs.tree_bytes(tree)
    interpreter = rootfs.tree_bytes(root / "usr/lib/python3.11") + (root / "usr/bin/python3.11").stat().st_size
    objects = sorted(tree.rglob("*.so*"))
    headers = [elf_header(path) for path in objects]
    print(f"\narm64: engine with its packages {ours / 1e6:.1f} MB, interpreter with its {interpreter / 1e6:.1f} MB")

    assert ours + interpreter <= 45e6
    assert {machine for machine, _ in headers} == {EM_AARCH64}
    assert not any(symbols for _, symbols in headers)
    assert not list(tree.rglob("pip")) and not list(tree.rglob("_tests")) and not list(tree.rglob("_cffi*.so"))
    assert not list(tree.rglob("*.c"))


def test_every_module_of_the_engine_imports_and_codecs_work_on_arm64(root: Path) -> None:
    modules = sorted(
        str(path.relative_to(REPOSITORY).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for package in ("balenapy", "delta") for path in (REPOSITORY / package).rglob("*.py")
        if path.name != "__main__.py"
    )  # fmt: skip
    program = (
        "import importlib, json, os, sys, zstandard, bsdiff4, crc32c\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "data = os.urandom(50000) * 2\n"
        "packed = zstandard.ZstdCompressor().compress(data)\n"
        "assert zstandard.ZstdDecompressor().decompress(packed) == data\n"
        "assert bsdiff4.patch(data, bsdiff4.diff(data, data[1:] + b'x')) == data[1:] + b'x'\n"
        "print(json.dumps([os.uname().machine, sys.prefix, zstandard.backend, crc32c.crc32c(b'123456789')]))"
    )
    machine, base, backend, checksum = json.loads(emulated(root, "/usr/lib/balenapy/bin/python3", "-I", "-c", program))
    print(f"\narm64: {len(modules)} modules imported under qemu-user")

    assert (machine, base, backend, checksum) == ("aarch64", "/usr/lib/balenapy", "cext", 0xE3069283)


def test_the_commands_start_on_arm64(root: Path) -> None:
    text = emulated(root, "/usr/lib/balenapy/bin/python3", "-I", "/usr/bin/balenapyd", "--version")
    usage = emulated(root, "/usr/lib/balenapy/bin/python3", "-I", "/usr/bin/balenapy", "--help")

    assert re.search(r"\d+\.\d+", text)
    assert "pull" in usage
    first = (root / "usr/lib/balenapy/bin/balenapyd").read_text().splitlines()[0]
    assert first == "#!/usr/lib/balenapy/bin/python3 -I"


def test_an_arm64_container_runs_here(downloads: Path, registry: str, tmp_path: Path) -> None:
    (deb,) = foreign.fetch(downloads, ["busybox-static"])
    foreign.unpack([deb], tmp_path / "busybox")
    busybox = (tmp_path / "busybox/usr/bin/busybox").read_bytes()
    images.push(registry, "arm", "v1", arm_image(busybox, noise(3, 100_000)))
    name = f"{registry}/arm:v1"
    with foreign.arm64_programs(), running_engine(tmp_path / "engine", "--insecure-registry", registry) as engine:
        engine.client().images.pull(name)
        container = engine.client().containers.run(
            name, ["sh", "-c", "uname -m; wc -c < /payload"], detach=True, network_mode="none"
        )
        code = container.wait()["StatusCode"]
        text = container.logs().decode()
        architecture = engine.request("GET", f"/images/{name}/json").json["Architecture"]
        container.remove()

    assert (code, text.split(), architecture) == (0, ["aarch64", "100000"], "arm64")
    assert os.uname().machine == "aarch64" or not (foreign.BINFMT / foreign.HANDLER).exists()
