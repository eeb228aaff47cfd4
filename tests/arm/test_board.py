"""The long form (`make test-arm`): a real image is built, booted in an emulator, used, cut and updated.

One board goes through all of it, test after test, as a device in the field would. `ARM_IMAGES` names the directory of
built images; what is there already is not built again.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.arm import machine
from tests.arm.machine import HOST, Board
from tests.arm.sources import IMAGES, REPOSITORY
from tests.arm.updates import Throttled
from tests.compat import images
from tests.registry_process import running_registry

TARGET = "generic-arm64-uefi"
EPOCH = "1795000000"

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("ARM_IMAGES"), reason="minutes of emulation: make test-arm"),
]


@dataclass(frozen=True)
class Built:
    directory: Path

    def facts(self, release: str) -> Any:
        return json.loads((self.directory / f"balenapy-{TARGET}-{release}.json").read_text())

    def path(self, release: str, suffix: str) -> Path:
        return self.directory / f"balenapy-{TARGET}-{release}.{suffix}"


@pytest.fixture(scope="module")
def built() -> Built:
    """Release r1 as an image; r2 as an update, whole and as a difference; bad, whose system does not start."""
    if missing := machine.missing_tools():
        pytest.skip(f"not on this machine: {', '.join(missing)}")
    directory = Path(os.environ["ARM_IMAGES"]).resolve()
    found = Built(directory)

    def build(release: str, *options: str) -> None:
        if found.path(release, "json").exists():
            return
        command = ["nice", "-n", "15", IMAGES / "arm/build", TARGET, "--release", release, "--out", directory,
                   "--cache", directory / "cache", *options]  # fmt: skip
        subprocess.run(command, check=True, cwd=REPOSITORY, env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH})

    build("r1")
    build("r2", "--update-only", "--delta-from", str(found.path("r1", "squashfs")))
    build("bad", "--update-only", "--break", "system")
    return found


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="module")
def seen_by_guest(registry: str) -> str:
    return f"{HOST}:{registry.rpartition(':')[2]}"


@pytest.fixture(scope="module")
def board(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    board = Board(built.path("r1", "img"), tmp_path_factory.mktemp("board"))
    config = {"hostname": "field-7", "engine": {"insecure-registries": [f"{HOST}/32"]}}
    board.put_on_boot_partition("config.json", json.dumps(config).encode())
    try:
        yield board
    finally:
        board.cut()


@pytest.fixture(scope="module")
def arm_busybox(built: Built) -> bytes:
    """The static arm64 busybox that the image's initrd has."""
    tar = next((built.directory / "cache").glob("arm64-*.tar"))
    work = built.directory / "busybox"
    if not (work / "busybox").exists():
        work.mkdir(exist_ok=True)
        command = f"tar -x -C {work} --strip-components=2 --wildcards -f {tar} './debs/busybox-static*' && "
        command += f"dpkg-deb --fsys-tarfile {work}/busybox-static*.deb | "
        command += f"tar -x -O --wildcards '*bin/busybox' > {work}/b"
        command += f" && mv {work}/b {work}/busybox"
        subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True)
    return (work / "busybox").read_bytes()


def arm_image(busybox: bytes, payload: bytes) -> images.Image:
    entries = [
        images.directory("bin"), images.file("bin/busybox", busybox, 0o755), images.link("bin/sh", "busybox"),
        *(images.link(f"bin/{name}", "busybox") for name in ("cat", "echo", "seq", "sleep", "uname", "wc")),
        images.directory("data"), images.directory("etc"), images.directory("proc"), images.directory("tmp", 0o1777),
    ]  # fmt: skip
    layers = (
        images.Layer(images.make_tar(entries), "busybox"),
        images.Layer(images.make_tar([images.file("payload", payload)]), "payload"),
    )
    config = {"Env": [images.PATH], "Cmd": ["sh"], "Volumes": {"/data": {}}}
    return images.Image(layers, config, architecture="arm64")


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def pull(board: Board, name: str) -> list[dict[str, Any]]:
    status, body = board.request("POST", f"/images/create?fromImage={name}", timeout_s=600)
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    assert status == 200, body
    assert not any("error" in line for line in lines), lines[-1]
    return lines


def run(board: Board, image: str, script: str, *, name: str = "", policy: str = "no") -> str:
    body = {"Image": image, "Cmd": ["sh", "-c", script], "HostConfig": {"RestartPolicy": {"Name": policy}}}
    status, data = board.request("POST", f"/containers/create?name={name}" if name else "/containers/create", body)
    assert status == 201, data
    identifier = str(json.loads(data)["Id"])
    status, data = board.request("POST", f"/containers/{identifier}/start")
    assert status == 204, data
    return identifier


def output(board: Board, identifier: str) -> str:
    status, data = board.request("POST", f"/containers/{identifier}/wait", timeout_s=300)
    assert status == 200 and json.loads(data)["StatusCode"] == 0, data
    return logs(board, identifier)


def logs(board: Board, identifier: str, query: str = "stdout=1") -> str:
    status, data = board.request("GET", f"/containers/{identifier}/logs?{query}")
    assert status == 200
    text = b""
    while data:  # frames of eight bytes and their contents
        size = int.from_bytes(data[4:8], "big")
        text += data[8 : 8 + size]
        data = data[8 + size :]
    return text.decode()


def status_of(board: Board) -> Any:
    return json.loads(board.ssh("balenapy-host-update status").stdout)


def test_sizes_are_within_the_bars(built: Built) -> None:
    facts = built.facts("r1")
    sizes = {key[:-6]: round(value / 1e6, 1) for key, value in facts.items() if key.endswith("_bytes")}
    print(f"\nsizes in MB: {sizes}")

    assert facts["compressed_bytes"] <= 350e6
    assert facts["root_bytes"] <= 900e6
    assert facts["engine_bytes"] <= 45e6


def test_it_boots_to_an_engine_that_answers(board: Board) -> None:
    board.start()
    shell_s = board.wait_ssh()
    engine_s = board.wait_engine()
    print(f"\nshell after {shell_s:.0f} s, engine after {engine_s:.0f} s (emulated)")
    memory = {line.split()[0]: int(line.split()[1]) for line in board.ssh("cat /proc/meminfo").stdout.splitlines()}
    used_mb = (memory["MemTotal:"] - memory["MemAvailable:"]) / 1000
    print(f"idle memory of the whole system: {used_mb:.0f} MB")

    assert board.ssh("hostname").stdout.strip() == "field-7"
    assert board.ssh("systemctl --failed --plain --no-legend").stdout.strip() == ""
    assert board.ssh("touch /usr/x", check=False).returncode != 0
    assert used_mb <= 200
    expected = {"target": TARGET, "release": "r1", "slot": "a", "trial": False, "entries": ["slot-a.conf"]}
    assert status_of(board) == expected


def test_the_data_partition_has_the_rest_of_the_disk(board: Board) -> None:
    size = int(board.ssh("df --output=size -B1 /mnt/data | tail -1").stdout)

    assert size > 2.2 * (1 << 30)  # of 4 GiB
    assert "noatime" in board.ssh("findmnt -n -o OPTIONS /mnt/data").stdout
    assert "zram0" in board.ssh("cat /proc/swaps").stdout
    assert int(board.ssh("date +%s").stdout) >= int(EPOCH)


def test_an_arm64_container_is_pulled_and_run(
    board: Board, registry: str, seen_by_guest: str, arm_busybox: bytes
) -> None:
    images.push(registry, "app", "v1", arm_image(arm_busybox, noise(1, 2_000_000)))
    pull(board, f"{seen_by_guest}/app:v1")

    identifier = run(board, f"{seen_by_guest}/app:v1", "uname -m; wc -c < /payload; echo kept > /data/x")
    assert output(board, identifier).split() == ["aarch64", "2000000"]
    # The one that has to be there at the end, whatever happens meanwhile.
    run(board, f"{seen_by_guest}/app:v1", "echo up >> /data/starts; cat /data/starts; exec sleep 100000",
        name="keeper", policy="always")  # fmt: skip


def test_the_ring_keeps_a_containers_last_lines(board: Board, seen_by_guest: str) -> None:
    identifier = run(board, f"{seen_by_guest}/app:v1", "seq 1 5000")

    assert output(board, identifier).split() == [str(number) for number in range(1, 5001)]
    assert logs(board, identifier, "stdout=1&tail=3").split() == ["4998", "4999", "5000"]


def test_an_update_of_the_image_comes_as_a_delta(
    board: Board, registry: str, seen_by_guest: str, arm_busybox: bytes, tmp_path: Path
) -> None:
    changed = noise(1, 1_000_000) + b"a few new bytes" + noise(1, 2_000_000)[1_000_000:]
    images.push(registry, "app", "v2", arm_image(arm_busybox, changed))
    delta = [str(REPOSITORY / ".venv/bin/balenapy-delta")]
    subprocess.run([*delta, "make", "-q", f"{registry}/app:v1", f"{registry}/app:v2", "-o", tmp_path / "d"], check=True)
    subprocess.run([*delta, "push", "-q", tmp_path / "d", f"{registry}/app:v2"], check=True)

    lines = pull(board, f"{seen_by_guest}/app:v2")
    told = [line["aux"]["Delta"] for line in lines if "Delta" in (line.get("aux") or {})]
    print(f"\ndelta pull: {told}")
    assert told and told[0]["DeltaBytes"] < told[0]["FullBytes"] / 10
    identifier = run(board, f"{seen_by_guest}/app:v2", "wc -c < /payload")
    assert output(board, identifier).split() == [str(len(changed))]


def test_the_power_goes_during_a_pull(board: Board, registry: str, seen_by_guest: str, arm_busybox: bytes) -> None:
    images.push(registry, "app", "large", arm_image(arm_busybox, noise(2, 60_000_000)))
    seen = threading.Event()

    def pull_until_cut() -> None:
        try:
            connection = machine.UnixHTTPConnection(str(board.socket), 120)
            connection.request("POST", f"/images/create?fromImage={seen_by_guest}/app:large")
            answer = connection.getresponse()
            while line := answer.readline():
                if json.loads(line).get("progressDetail", {}).get("current", 0) > 3_000_000:
                    seen.set()
        except (OSError, ValueError):
            pass
        finally:
            connection.close()

    thread = threading.Thread(target=pull_until_cut)
    thread.start()
    assert seen.wait(300), "the pull did not begin"
    board.cut()
    thread.join()

    board.start()
    board.wait_ssh()
    board.wait_engine()
    pull(board, f"{seen_by_guest}/app:large")
    identifier = run(board, f"{seen_by_guest}/app:large", "wc -c < /payload")
    assert output(board, identifier).split() == ["60000000"]
    checked = board.ssh("balenapy fsck", timeout_s=900)
    print(f"\nfsck after the cut: {checked.stdout.strip().splitlines()[-1:]}")
    assert keeper(board)["State"]["Running"]


def keeper(board: Board) -> Any:
    status, data = board.request("GET", "/containers/keeper/json")
    assert status == 200, data
    return json.loads(data)


@pytest.fixture(scope="module")
def update_server(built: Built) -> Iterator[tuple[type[Throttled], str]]:
    handler = type("Handler", (Throttled,), {"asked": [], "rate": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(built.directory))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield handler, f"http://{HOST}:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_power_goes_during_a_host_update_and_it_goes_on(
    board: Board, built: Built, update_server: tuple[type[Throttled], str]
) -> None:
    handler, url = update_server
    name = f"{url}/{built.path('r2', 'update').name}"
    command = f"balenapy-host-update --no-delta --no-reboot {name}"
    board.ssh(f"systemd-run --unit=update {command}")
    deadline = time.monotonic() + 900
    while "bytes" not in board.ssh("cat /mnt/state/host-update/progress.json", check=False).stdout:
        assert time.monotonic() < deadline, board.ssh("journalctl -u update --no-pager", check=False).stdout
        time.sleep(1)
    board.cut()
    handler.asked.clear()

    board.start()
    board.wait_ssh()
    assert status_of(board)["entries"] == ["slot-a.conf"]  # nothing half written can start
    done = board.ssh(command, timeout_s=1800)
    print(f"\n{done.stdout.strip()}")
    assert "going on at" in done.stdout
    assert any(offset > 8_000_000 for offset in handler.asked)
    assert status_of(board)["entries"] == ["slot-a.conf", "slot-b+3.conf"]


def test_the_new_slot_is_tried_found_good_and_stays(board: Board) -> None:
    restart_into(board, "b")
    board.wait_engine()
    deadline = time.monotonic() + 900
    while (found := status_of(board))["trial"]:
        assert time.monotonic() < deadline, board.ssh("systemctl status balenapy-health --no-pager", check=False).stdout
        time.sleep(5)

    assert (found["slot"], found["release"]) == ("b", "r2")
    assert found["entries"] == ["slot-a.conf", "slot-b.conf"]
    assert keeper(board)["State"]["Running"]  # containers and their data stay
    assert logs(board, keeper(board)["Id"]).count("up") >= 2


def test_a_difference_to_the_running_root_is_taken(board: Board, built: Built, update_server: Any) -> None:
    """r2 runs now; back to r1 there is no difference, so the whole comes; what the maker made is small all the same."""
    whole = built.path("r2", "update").stat().st_size
    delta = (built.directory / f"balenapy-{TARGET}-r2.from-r1.update").stat().st_size
    print(f"\nhost update: whole {whole / 1e6:.0f} MB, difference {delta / 1e6:.0f} MB")

    assert delta < whole / 2


def test_a_broken_update_falls_back(board: Board, built: Built, update_server: tuple[type[Throttled], str]) -> None:
    _, url = update_server
    done = board.ssh(f"balenapy-host-update --no-reboot {url}/{built.path('bad', 'update').name}", timeout_s=1800)
    assert "goes to slot A" in done.stdout
    assert status_of(board)["entries"] == ["slot-a+3.conf", "slot-b.conf"]
    started = time.monotonic()
    restart_into(board, "b")
    board.wait_engine()
    print(f"\nthree failed boots and the good slot again: {time.monotonic() - started:.0f} s")

    found = status_of(board)
    assert (found["slot"], found["release"], found["trial"]) == ("b", "r2", False)
    assert found["entries"] == ["slot-a+0-3.conf", "slot-b.conf"]
    assert keeper(board)["State"]["Running"]


def restart_into(board: Board, slot: str) -> None:
    """Restart, and wait for a boot of that slot."""
    boot_id = "cat /proc/sys/kernel/random/boot_id"
    before = board.ssh(boot_id).stdout.strip()
    board.close_tunnel()
    board.ssh("systemctl reboot", check=False)
    deadline = time.monotonic() + 3 * machine.BOOT_TIMEOUT_S
    while time.monotonic() < deadline:
        assert board.is_on
        try:
            done = board.ssh(f"{boot_id} /proc/cmdline", timeout_s=60, check=False)
        except subprocess.TimeoutExpired:
            continue
        if done.returncode == 0 and before not in done.stdout and f"balenapy.slot={slot}" in done.stdout:
            return
        time.sleep(3)
    raise AssertionError(f"slot {slot} did not start:\n{board.console()}")
