"""Dockerfiles of the kinds that people have, with local bases: they build, the second time from the cache, and run.

`world/NAME/` is a context; its `world.toml` says on which bases it stands (`world/bases/`, built like the rest, on a
`debian` made by mmdebstrap), what the image is run with, and what that prints. Those that stand on busybox alone are
the short form in `make test`; `make test-world` builds all, with the package registries that their steps ask.
`DEBIAN_TAR` names a root file system made before, which saves some minutes.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.build.case import pack
from tests.build.place import BASES
from tests.build.play import is_missing
from tests.compat import images
from tests.engine_process import EngineProcess, running_engine
from tests.leftovers import Leftovers

pytestmark = pytest.mark.root

WORLD = Path(__file__).parent / "world"
NAMES = sorted(path.parent.name for path in WORLD.glob("*/world.toml"))
WHOLE = os.environ.get("WORLD") == "all"
STEP_TIMEOUT_S = 900.0
# A registry is asked over the host's network, with the certificates the host trusts.
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def settings(name: str) -> dict[str, Any]:
    return tomllib.loads((WORLD / name / "world.toml").read_text())


def is_short(name: str) -> bool:
    return "bases" not in settings(name)


@pytest.fixture(scope="module")
def engine(nothing_left_behind: Leftovers, tmp_path_factory: pytest.TempPathFactory, registry: str) -> Iterator[Any]:
    with running_engine(tmp_path_factory.mktemp("world")) as engine:
        if reason := is_missing(engine):
            pytest.skip(reason)
        images.push(registry, "busybox", "latest", BASES["busybox"])
        engine.docker("pull", "-q", f"{registry}/busybox:latest")
        engine.docker("tag", f"{registry}/busybox:latest", "busybox")
        yield engine


@pytest.fixture(scope="module")
def made_bases(engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The bases built so far, with the seconds each took."""
    tar = Path(os.environ.get("DEBIAN_TAR", "") or tmp_path_factory.mktemp("debian") / "debian.tar")
    if WHOLE and not tar.exists():
        command = ["mmdebstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(tar)]
        subprocess.run(command, check=True, capture_output=True)
    if WHOLE:
        engine.docker("import", str(tar), "debian", timeout_s=STEP_TIMEOUT_S)
    return {}


@pytest.mark.parametrize("name", NAMES)
def test_dockerfile(name: str, engine: EngineProcess, made_bases: dict[str, float], tmp_path: Path) -> None:
    told = settings(name)
    if not is_short(name) and not WHOLE:
        pytest.skip("stands on Debian and asks package registries: make test-world")
    for base in told.get("bases", ()):
        if base not in made_bases:
            made_bases[base] = build(engine, base_context(base, tmp_path / base), base)[1]
    context = shutil.copytree(WORLD / name, tmp_path / "context")
    complete(context, told)

    output, first_s = build(engine, context, f"world/{name}", told)
    again, second_s = build(engine, context, f"world/{name}", told)
    ran = engine.docker("run", "--rm", "--network", "none", f"world/{name}", *told.get("command", ()), timeout_s=60)

    print(f"{name}: built in {first_s:.1f} s, from the cache in {second_s:.2f} s")
    assert ran.stdout == told["expect"], ran.stderr
    assert output.count("\nStep ") == again.count("\nStep ")
    assert " ---> Running in" not in again, again
    assert first_line(output, "Successfully built") == first_line(again, "Successfully built")


def build(engine: EngineProcess, context: Path, tag: str, told: dict[str, Any] | None = None) -> tuple[str, float]:
    told = told or {}
    arguments = ["--network", "host", "-t", tag]
    for key, value in told.get("args", {}).items():
        arguments += ["--build-arg", f"{key}={value}"]
    if "target" in told:
        arguments += ["--target", told["target"]]
    begun = time.monotonic()
    done = engine.docker(
        "build", *arguments, str(context), env={"DOCKER_BUILDKIT": "0"}, check=False, timeout_s=STEP_TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return "\n" + done.stdout, time.monotonic() - begun


def first_line(text: str, beginning: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(beginning))


def complete(context: Path, told: dict[str, Any]) -> None:
    """Put what is not kept in the repository into the context: wheels, archives."""
    (context / "world.toml").unlink()
    for name, files in told.get("packed", {}).items():
        (context / name).write_bytes(pack(files))
    if "wheels" in told:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary=:none:", "--only-binary=:all:"]
        command += ["--platform", "manylinux2014_x86_64", "--python-version", "3.11", "-d", str(context / "wheels")]
        subprocess.run([*command, *told["wheels"]], check=True, capture_output=True)


def base_context(base: str, directory: Path) -> Path:
    shutil.copytree(WORLD / "bases" / base, directory)
    if base == "node":
        node = shutil.which("node")
        if node is None:
            pytest.skip("no node on this machine")
        shutil.copy(os.path.realpath(node), directory / "node")
        npm = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=True).stdout.strip()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(Path(npm) / "npm", "npm")
        (directory / "npm.tar").write_bytes(buffer.getvalue())
        shutil.copy(CERTIFICATES, directory)
    return directory
