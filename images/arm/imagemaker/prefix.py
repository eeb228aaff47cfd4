"""The engine in a prefix of its own: pinned wheels unpacked, stripped, compiled. No pip on the device.

The prefix is laid out like a virtual environment on the system's interpreter, so that `python -I` finds its packages.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

from imagemaker.program import Failed, run, say
from imagemaker.rootfs import MIRROR, PYTHON, REPOSITORY, SUITE, strip, tree_bytes
from imagemaker.targets import Target

sys.path.insert(0, str(REPOSITORY / "images"))
from pins import Pin, engine_pins, engine_version

PREFIX = "usr/lib/balenapy"
# Below site-packages. zstandard has two backends for one thing; the templates and command lines of the web stack
# are never imported by the engine (balenapy/lean.py), but its packages import their own modules: only these are safe.
NOT_NEEDED = (
    "**/tests", "**/_tests", "werkzeug/debug/shared", "zstandard/_cffi*.so", "zstandard/backend_cffi.py",
    "bsdiff4/test*", "**/*.pyx", "**/*.pxd", "**/*.c", "**/*.h", "**/*.pyi", "**/py.typed",
    "flask/sansio/README.md", "dnslib/test", "dnslib/zoneresolver.py", "*.dist-info/licenses/AUTHORS*",
    "jinja2/_identifier.py.bak", "h2/*.rst", "hypercorn/asyncio/*_test*",
)  # fmt: skip
WITHOUT_ARMV7_WHEEL = frozenset(("bsdiff4", "zstandard", "crc32c", "markupsafe"))
SCRIPT = """#!/{prefix}/bin/python3 -I
import sys

from {module} import {function}

sys.exit({function}())
"""


def fetch_wheels(target: Target, pins: list[Pin], wheels: Path, work: Path) -> None:
    """Download the pinned wheels for the target; on armhf some have none and are built under emulation."""
    wheels.mkdir(parents=True, exist_ok=True)
    missing = [pin for pin in pins if find_wheel(target, pin, wheels) is None]
    missing = [pin for pin in missing if find_built(target, pin, wheels) is None]
    if not missing:
        return
    if target.architecture == "armhf":
        build_wheels(target, [pin for pin in missing if pin.name in WITHOUT_ARMV7_WHEEL], wheels, work)
        missing = [pin for pin in missing if pin.name not in WITHOUT_ARMV7_WHEEL]
    requirements = write_requirements(missing, work / "requirements.txt")
    run([
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes",
        "--disable-pip-version-check", "--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=abi3",
        "--abi=none", *(f"--platform={platform}" for platform in target.platforms), "-d", wheels, "-r", requirements,
    ])  # fmt: skip


def write_requirements(pins: list[Pin], path: Path) -> Path:
    path.write_text(
        "".join(f"{pin.name}=={pin.version} {' '.join(f'--hash=sha256:{h}' for h in pin.hashes)}\n" for pin in pins)
    )
    return path


def build_wheels(target: Target, pins: list[Pin], wheels: Path, work: Path) -> None:
    """Build what has no wheel for an architecture from its pinned source, in a Debian of it (qemu-user): long."""
    if not pins:
        return
    say(f"building for {target.architecture}: {', '.join(pin.name for pin in pins)} (long)")
    requirements = write_requirements(pins, work / "sources.txt")
    built = wheels / f"built-{target.architecture}"
    built.mkdir(parents=True, exist_ok=True)
    pip = "pip wheel --quiet --no-deps --no-binary=:all: --require-hashes -r /sources.txt -w /wheels"
    run([
        "mmdebstrap", f"--architectures={target.architecture}", "--variant=minbase", "--mode=root", "--format=null",
        "--include=gcc,libc6-dev,libffi-dev,python3-dev,python3-pip,ca-certificates",
        "--aptopt=APT::Install-Recommends false", f"--customize-hook=copy-in {requirements} /",
        f'--customize-hook=chroot "$1" {pip}', f"--customize-hook=sync-out /wheels {built}", SUITE, "-",
        f"deb {MIRROR} {SUITE} main",
    ])  # fmt: skip


def find_built(target: Target, pin: Pin, wheels: Path) -> Path | None:
    pattern = f"{pin.name.replace('-', '_')}-{pin.version}-*.whl"
    return next(iter(sorted((wheels / f"built-{target.architecture}").glob(pattern))), None)


def find_wheel(target: Target, pin: Pin, wheels: Path) -> Path | None:
    """The pinned wheel for the target, held against its digests."""
    for path in sorted(wheels.glob(f"{pin.name.replace('-', '_')}-{pin.version}-*.whl")):
        if fits(target, path.name) and hashlib.sha256(path.read_bytes()).hexdigest() in pin.hashes:
            return path
    return None


def fits(target: Target, name: str) -> bool:
    return name.endswith("-any.whl") or any(platform in name for platform in target.platforms)


def site_of(tree: Path) -> Path:
    return tree / "lib" / PYTHON / "site-packages"


def make_prefix(target: Target, tree: Path, wheels: Path, work: Path) -> int:
    """Lay the prefix into `tree` (as /usr/lib/balenapy will be on the device).

    Returns: its bytes.
    """
    pins = engine_pins()
    fetch_wheels(target, pins, wheels, work)
    site = site_of(tree)
    site.mkdir(parents=True)
    for pin in pins:
        wheel = find_wheel(target, pin, wheels) or find_built(target, pin, wheels)
        if wheel is None:
            raise Failed(f"no wheel of {pin.name} {pin.version} for {target.architecture}")
        unpack_wheel(wheel, site)
    for package in ("balenapy", "delta"):
        shutil.copytree(REPOSITORY / package, site / package, ignore=shutil.ignore_patterns("__pycache__", "FORMAT.md"))
    write_metadata(site)
    for pattern in NOT_NEEDED:
        for path in sorted(site.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()
    strip(target, site)
    (tree / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (tree / "bin").mkdir()
    (tree / "bin" / "python3").symlink_to(f"/usr/bin/{PYTHON}")
    for name, entry in entry_points().items():
        module, _, function = entry.partition(":")
        script = tree / "bin" / name
        script.write_text(SCRIPT.format(prefix=PREFIX, module=module, function=function))
    compile_modules(site)
    fix_modes(tree)
    size = tree_bytes(tree)
    say(f"engine and its packages: {size / 1e6:.1f} MB in files")
    return size


def unpack_wheel(wheel: Path, site: Path) -> None:
    """Purelib and platlib are one directory here; scripts and headers are not wanted."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            place = name
            if ".data/" in name:
                _, _, rest = name.partition(".data/")
                kind, _, place = rest.partition("/")
                if kind not in ("purelib", "platlib"):
                    continue
            if not place or place.endswith("/"):
                continue
            path = site / place
            if not path.resolve().is_relative_to(site.resolve()):
                raise Failed(f"{wheel.name}: {name} points out of the directory")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))


def write_metadata(site: Path) -> None:
    info = site / f"balenapy-{engine_version()}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: balenapy\nVersion: {engine_version()}\n")
    for path in site.glob("*.dist-info"):
        for name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "WHEEL", "top_level.txt"):
            (path / name).unlink(missing_ok=True)


def entry_points() -> dict[str, str]:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    lines = [line for line in setup["options.entry_points"]["console_scripts"].splitlines() if line.strip()]
    return dict(re.split(r"\s*=\s*", line.strip(), maxsplit=1) for line in lines)  # type: ignore[arg-type]


def compile_modules(site: Path) -> None:
    """Compiled once, here, and never checked on the device: a start there is mostly imports."""
    interpreter = next((path for path in (shutil.which(PYTHON), sys.executable) if path and _is_311(path)), None)
    if interpreter is None:
        raise Failed(f"{PYTHON} is wanted to compile the engine's modules")
    place = f"/{PREFIX}/lib/{PYTHON}/site-packages"
    run([interpreter, "-I", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash", "-s", site, "-p",
         place, site], env={"PYTHONHASHSEED": "0"})  # fmt: skip


def _is_311(path: str) -> bool:
    return run([path, "-c", "import sys; print(*sys.version_info[:2])"]).split() == ["3", "11"]


def fix_modes(tree: Path) -> None:
    for path in sorted(tree.rglob("*")):
        if path.is_symlink():
            continue
        path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
    os.chmod(tree, 0o755)


def install(tree: Path, root: Path) -> None:
    """Into the root, with the commands where people look for them."""
    shutil.copytree(tree, root / PREFIX, symlinks=True)
    for name in entry_points():
        link = root / "usr/bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to(f"/{PREFIX}/bin/{name}")
