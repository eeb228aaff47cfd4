"""The Yocto layer: its recipes are the constraints', its style is the linter's, its names are the stock units'."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from balenapy import __version__
from tests.arm.sources import IMAGES, REPOSITORY

import pins  # isort: skip

LAYER = REPOSITORY / "yocto-layer/meta-balenapy"
GENERATE = REPOSITORY / "yocto-layer/generate"
OELINT = "oelint-adv==9.11.2"
# A request for each recipe's home page has no place in a test.
SUPPRESSED = "oelint.vars.homepageping"


def recipes() -> list[Path]:
    return sorted(path for pattern in ("*.bb", "*.bbappend", "*.inc", "layer.conf") for path in LAYER.rglob(pattern))


def test_recipes_have_the_versions_and_digests_of_the_constraints() -> None:
    done = subprocess.run([sys.executable, GENERATE, "--check"], capture_output=True, text=True, check=False)
    print(f"yocto: {done.stdout.strip()}")

    assert (done.returncode, done.stderr) == (0, "")


def test_another_version_or_digest_in_the_constraints_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "yocto-layer", tmp_path / "yocto-layer")
    (tmp_path / "images").mkdir()
    for name in ("images/pins.py", "setup.cfg"):
        shutil.copyfile(REPOSITORY / name, tmp_path / name)
    (tmp_path / ".ci").mkdir()
    text = (REPOSITORY / ".ci/constraints.txt").read_text()
    trio = next(pin for pin in pins.engine_pins() if pin.name == "trio")
    changed = text.replace(f"trio=={trio.version} ", "trio==99.0 ", 1)
    recipe = (LAYER / f"recipes-devtools/python/python3-trio_{trio.version}.bb").read_text()
    found = re.search(r'sha256sum\] = "(\w+)"', recipe)
    assert found is not None
    for constraints, expected in ((changed, "missing: python3-trio_99.0.bb"),
                                  (text.replace(found[1], "0" * 64), "its digest is not among")):  # fmt: skip
        assert constraints != text
        (tmp_path / ".ci/constraints.txt").write_text(constraints)
        done = subprocess.run([sys.executable, tmp_path / "yocto-layer/generate", "--check"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 1
        assert expected in done.stdout


def test_the_engines_recipe_is_of_this_version_and_takes_the_one_copy_of_the_units() -> None:
    (recipe,) = (LAYER / "recipes-containers/balenapy").glob("balenapy_*.bb")
    text = recipe.read_text()

    assert recipe.name == f"balenapy_{__version__}.bb"
    for path in (IMAGES / "systemd").iterdir():
        assert f"images/systemd/{path.name}" in text
    assert not list((REPOSITORY / "yocto-layer").rglob("*.service"))


def test_the_engines_recipe_has_the_standard_library_it_imports() -> None:
    """Yocto packages the standard library in pieces; what a start imports must be named."""
    text = next((LAYER / "recipes-containers/balenapy").glob("balenapy_*.bb")).read_text()
    pieces = {"sqlite3": "sqlite3", "ctypes": "ctypes", "resource": "resource", "fcntl": "fcntl", "json": "json",
              "logging": "logging", "pwd": "unixadmin", "grp": "unixadmin", "termios": "terminal",
              "ssl": "netclient", "shutil": "shell", "datetime": "datetime"}  # fmt: skip
    sources = "\n".join(path.read_text() for path in (REPOSITORY / "balenapy").rglob("*.py"))
    for module, piece in pieces.items():
        if re.search(rf"^\s*(import|from) {module}\b", sources, re.MULTILINE):
            assert f"python3-{piece} " in text, f"{module} is in python3-{piece}"


def test_licences_named_by_checksum_are_the_files() -> None:
    import hashlib

    text = next((LAYER / "recipes-containers/balenapy").glob("balenapy_*.bb")).read_text()

    assert f"file://LICENSE;md5={hashlib.md5((REPOSITORY / 'LICENSE').read_bytes()).hexdigest()}" in text


@pytest.fixture(scope="module")
def oelint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("oelint")
    venv.create(directory, with_pip=True, symlinks=True)
    done = subprocess.run(
        [directory / "bin/pip", "install", "--quiet", "--disable-pip-version-check", OELINT],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"{OELINT} cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return directory / "bin/oelint-adv"


@pytest.mark.parametrize("release", ["scarthgap"])
def test_the_linter_of_recipes_finds_nothing(oelint: Path, release: str) -> None:
    files = recipes()
    done = subprocess.run(
        [oelint, "--quiet", "--jobs", "2", "--release", release, "--suppress", SUPPRESSED, *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(f"oelint-adv: {len(files)} files for {release}")

    assert len(files) > 30
    assert (done.stdout.strip(), done.stderr.strip()) == ("", "")
    assert done.returncode == 0


# -- the names of balena-engine --


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """The drop-in's names, beside programs that tell how they were called."""
    directory = tmp_path / "bin"
    directory.mkdir()
    source = LAYER / "recipes-containers/balena-engine/files/balena-engine-names"
    text = source.read_text().replace("/usr/bin/", f"{directory}/")
    (directory / "balena-engine-names").write_text(text)
    (directory / "balena-engine-names").chmod(0o755)
    recipe = next((LAYER / "recipes-containers/balena-engine").glob("*.bb")).read_text()
    found = re.search(r'BALENA_NAMES = "\\\n(.*?)"', recipe, re.DOTALL)
    assert found is not None
    for name in found[1].replace("\\", "").split():
        (directory / name).symlink_to("balena-engine-names")
    (directory / "balena-engine").symlink_to("balena-engine-names")
    for program in ("balenapyd", "balenapy", "crun", "tini"):
        (directory / program).write_text(f'#!/bin/sh\necho {program} "$@"\n')
        (directory / program).chmod(0o755)
    return directory


@pytest.mark.parametrize(
    ("called", "becomes"),
    [
        # As meta-balena's unit and healthcheck call them.
        ("balenad -H fd:// --log-driver journald -s overlay2 --delta-data-root /x", "balenapyd -H fd:// --log-driver "
         "journald -s overlay2 --delta-data-root /x"),
        ("balena-engine-daemon -H fd://", "balenapyd -H fd://"),
        ("balena-engine-containerd-ctr --address /run/balena-engine/containerd/balena-engine-containerd.sock version",
         "balenapy version"),
        ("balena ps -a", "balenapy ps -a"),
        ("balena-engine-runc list", "crun list"),
        ("balena-engine-init -- sleep 1", "tini -- sleep 1"),
    ],
)  # fmt: skip
def test_a_name_of_balena_engine_is_our_program(names: Path, called: str, becomes: str) -> None:
    program, *arguments = called.split()
    environment = {**os.environ, "PATH": f"{names}:{os.environ['PATH']}"}
    done = subprocess.run([names / program, *arguments], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == becomes


@pytest.mark.parametrize("name", ["balena-engine-containerd-shim", "balena-engine-proxy", "balena-engine-containerd"])
def test_a_part_that_does_not_exist_says_so(names: Path, name: str) -> None:
    done = subprocess.run([names / name], capture_output=True, text=True, check=False)

    assert done.returncode == 64
    assert "no such part" in done.stderr


def test_the_flags_of_stock_units_are_accepted() -> None:
    """shared with meta-balena: what its unit passes to the engine."""
    from balenapy.config import OPTIONS

    flags = {option.flag for option in OPTIONS}
    stock = ("host log-driver storage-driver delta-data-root delta-storage-driver max-download-attempts exec-opt dns "
             "bip fixed-cidr add-runtime experimental").split()  # fmt: skip

    assert set(stock) <= flags


def test_bitbake_parses_the_layer() -> None:
    """`make test-yocto BITBAKE_BUILD=directory`: a build directory with oe-core and the layers this one depends on."""
    build = os.environ.get("BITBAKE_BUILD")
    if not build:
        pytest.skip("BITBAKE_BUILD names no build directory (make test-yocto)")
    command = f"cd {build} && bitbake-layers add-layer {LAYER} ; bitbake -n balenapy-image && yocto-check-layer {LAYER}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
