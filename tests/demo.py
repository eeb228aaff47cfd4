"""`make demo`: the engine does its main job on real input, before your eyes.

A private socket, data root and bridge; a registry on loopback; an image made of Debian's busybox-static. The
ordinary docker CLI does the work when there is one, else our own. Everything is gone afterwards, and a second run
does just as well.
"""

from __future__ import annotations

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from tests.compat.images import file, make_tar
from tests.engine_process import EngineProcess, running_engine
from tests.images_fixture import ImageFixture, busybox, push
from tests.registry_process import running_registry

PLATFORMS = {"aarch64": ("arm64", "v8"), "armv7l": ("arm", "v7"), "armv6l": ("arm", "v6"), "i686": ("386", "")}
SCRIPT = "i=0; while true; do i=$((i+1)); echo line $i of the demonstration; sleep 0.2; done"


def cli() -> list[str]:
    """The docker CLI of this machine, or our own."""
    found = shutil.which("docker")
    return [found] if found else [sys.executable, "-m", "balenapy.cli.main"]


def show(engine: EngineProcess, *arguments: str) -> str:
    """Run one command as a user would type it, and print both it and its output."""
    name = "docker" if shutil.which("docker") else "balenapy"
    quoted = " ".join(f"'{one}'" if " " in one else one for one in arguments)
    print(f"\n\x1b[1m$ {name} {quoted}\x1b[0m", flush=True)
    started = time.monotonic()
    done = subprocess.run(
        [*cli(), *arguments],
        env=engine.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, end="")
    print(f"\x1b[2m({time.monotonic() - started:.2f} s)\x1b[0m", flush=True)
    if done.returncode != 0:
        raise SystemExit(f"that should not have failed (exit status {done.returncode}):\n{engine.log_tail()}")
    return done.stdout


def update_by_delta(
    engine: EngineProcess, directory: Path, registry: str, architecture: str, variant: str
) -> None:
    """A second release of the demonstration, of which only a delta crosses the network."""
    print("\nA new release is pushed, and from a build machine the delta to it; the device pulls as ever:")
    push(registry, "demo/busybox", "2", release(architecture, variant, 2))
    old, new = f"{registry}/demo/busybox:latest", f"{registry}/demo/busybox:2"
    delta = directory / "delta"
    tool(engine, "make", old, new, "-o", str(delta))
    tool(engine, "push", str(delta), new)
    show(engine, "pull", new)
    show(engine, "run", "--rm", new, "cat", "/etc/release")
    now = int(time.time()) + 1
    wanted = quote('{"event":["pull"]}')
    told = engine.request("GET", f"/events?since=0&until={now}&filters={wanted}").lines[-1]
    sent, saved = (int(told["Actor"]["Attributes"][f"delta.{name}"]) for name in ("bytes", "saved"))
    print(f"\n\x1b[1m{sent:,} bytes were sent for the new layer; in full it would be {sent + saved:,}.\x1b[0m")
    for one in (new, old):
        show(engine, "rmi", one)


def release(architecture: str, variant: str, version: int) -> ImageFixture:
    """busybox with a number in it: its one layer changes, and hardly."""
    image = busybox(architecture=architecture, variant=variant)
    with tarfile.open(fileobj=io.BytesIO(image.tars[0])) as former:
        entries: list[tuple[tarfile.TarInfo, bytes]] = []
        for entry in former:
            content = former.extractfile(entry)
            entries.append((entry, content.read() if content is not None else b""))
    return replace(image, tars=(make_tar([*entries, file("etc/release", f"release {version}\n".encode())]),))


def tool(engine: EngineProcess, *arguments: str) -> None:
    """Run balenapy-delta as a user would type it."""
    print(f"\n\x1b[1m$ balenapy-delta {' '.join(arguments)}\x1b[0m", flush=True)
    command = [sys.executable, "-m", "delta.cli", *arguments]
    subprocess.run(command, env={**engine.environment, "PYTHONPATH": str(Path(__file__).parent.parent)}, check=True)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="balenapy-demo-") as name:
        directory = Path(name)
        with running_registry(directory / "registry") as registry:
            architecture, variant = PLATFORMS.get(platform.machine(), ("amd64", ""))
            push(registry, "demo/busybox", "latest", release(architecture, variant, 1))
            started = time.monotonic()
            with running_engine(directory / "engine") as engine:
                print(f"engine answers after {time.monotonic() - started:.2f} s, on {engine.socket}")
                image = f"{registry}/demo/busybox:latest"
                show(engine, "version")
                show(engine, "pull", image)
                show(engine, "images")
                show(engine, "run", "--rm", image, "echo", "hello from a container")
                show(engine, "run", "-d", "--name", "demo", "--restart", "unless-stopped", image, "sh", "-c", SCRIPT)
                time.sleep(1)
                show(engine, "ps")
                show(engine, "logs", "--tail", "3", "demo")
                show(engine, "exec", "demo", "sh", "-c", "hostname; ps")
                print("\nThe engine is killed (SIGKILL) and started again; the container runs on:")
                engine.kill()
                engine.start()
                show(engine, "ps")
                show(engine, "logs", "--tail", "3", "demo")
                show(engine, "stop", "-t", "1", "demo")
                show(engine, "ps", "-a")
                show(engine, "rm", "demo")
                update_by_delta(engine, directory, registry, architecture, variant)
    print(
        "\nAll of it worked, and all of it is gone again. To try by hand: `make run` in one shell, and in another\n"
        "  export DOCKER_HOST=unix:///var/run/balena-engine.sock\n"
        "  docker ps          # or: .venv/bin/balenapy ps"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
