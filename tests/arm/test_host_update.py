"""balenapy-host-update on a board made of files: what it writes, in which order, and what stops it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.arm import sources  # noqa: F401 - the paths

import engineapi  # isort: skip
import hostupdate  # isort: skip
import slots  # isort: skip
from imagemaker import update  # isort: skip
from imagemaker.targets import GENERIC_ARM64_UEFI, RPI_ARM64, Target  # isort: skip

EPOCH = 1_795_000_000
SLOT_BYTES = 4 << 20
ONE = {"bytes": 1, "sha256": "0" * 64}  # what a manifest says of a file
LINE = "balenapy.slot={slot} panic=10"


def make_board(prefix: Path, target: Target, *, slot: str = "a", root: bytes = b"old") -> hostupdate.Board:
    """A device that runs `slot`."""
    os_files = prefix / "usr/lib/balenapy-os"
    os_files.mkdir(parents=True)
    partitions = {each.name: target.source(each.name) for each in target.partitions if each.kind != "extended"}
    board_json = {"target": target.name, "release": "r1", "switch": target.switch, "partitions": partitions}
    (os_files / "board.json").write_text(json.dumps(board_json))
    (prefix / "proc").mkdir()
    (prefix / "proc/cmdline").write_text(f"x balenapy.slot={slot} panic=10\n")
    (prefix / "mnt/state/host-update").mkdir(parents=True)
    (prefix / "mnt/data").mkdir()
    if target.switch == "systemd-boot":
        (prefix / "efi/loader/entries").mkdir(parents=True)
        (prefix / f"efi/slot-{slot}").mkdir()
        (prefix / f"efi/loader/entries/slot-{slot}.conf").write_text(slots.loader_entry(slot, 7, "r1", LINE))
    else:
        (prefix / "boot").mkdir()
        (prefix / "boot/autoboot.txt").write_text(slots.autoboot(slot))
        for each in "ab":
            (prefix / f"boot-{each}").mkdir()
    board = hostupdate.Board.of_this_machine(prefix)
    for each in ("root-a", "root-b", "boot-a", "boot-b"):
        if each in partitions:
            board.device(each).parent.mkdir(parents=True, exist_ok=True)
            data = root if each == f"root-{slot}" else b"stale" * 1000
            board.device(each).write_bytes(data.ljust(SLOT_BYTES, b"\0"))
    return board


@pytest.fixture
def board(tmp_path: Path) -> hostupdate.Board:
    return make_board(tmp_path / "device", GENERIC_ARM64_UEFI, root=old_root())


def old_root() -> bytes:
    return random.Random(1).randbytes(3_000_000)


def new_root() -> bytes:
    old = old_root()
    return old[:1_000_000] + b"changed here" + old[1_000_000:]


def make_update(
    directory: Path, target: Target = GENERIC_ARM64_UEFI, *, root: bytes | None = None, base: bytes | None = None,
    key: Path | None = None, name: str = "os-r2.update", release: str = "r2", base_release: str = "base",
) -> tuple[Path, str]:  # fmt: skip
    work = directory / f"make-{name}"
    (work / "slot").mkdir(parents=True)
    kernel, initrd = ("linux", "initrd") if target.switch == "systemd-boot" else ("vmlinuz", "initrd")
    (work / "slot" / kernel).write_bytes(b"kernel " + release.encode())
    (work / "slot" / initrd).write_bytes(b"initrd " + release.encode())
    if target.switch != "systemd-boot":
        (work / "slot/overlays").mkdir()
        (work / "slot/overlays/x.dtbo").write_bytes(b"overlay")
    (work / "root").write_bytes(new_root() if root is None else root)
    base_path = None
    if base is not None:
        base_path = directory / f"os-{base_release}.squashfs"
        base_path.write_bytes(base)
    out = directory / name
    digest = update.write_update(
        target, release, work / "slot", work / "root", out, EPOCH, LINE, base=base_path, key=key, work=work
    )
    return out, digest


def said() -> tuple[list[str], Any]:
    lines: list[str] = []
    return lines, lines.append


def entries(board: hostupdate.Board) -> list[str]:
    return sorted(os.listdir(board.boot / "loader/entries"))


def unchanged(board: hostupdate.Board) -> None:
    """The running slot is as it was, and nothing else can start."""
    assert slots.entries_of(entries(board), "b") == []
    assert "slot-a.conf" in entries(board)
    assert board.device("root-a").read_bytes()[:3_000_000] == old_root()


# -- installing --


def test_the_other_slot_is_written_and_tried_next(board: hostupdate.Board, tmp_path: Path) -> None:
    bundle, digest = make_update(tmp_path)
    (board.boot / "loader/entries/slot-b+0-3.conf").write_text("version 9\n")
    (board.boot / "slot-b").mkdir()
    (board.boot / "slot-b/leftover").write_text("of the last release")
    _, say = said()

    release = hostupdate.install(board, str(bundle), digest=digest, say=say)

    assert release == "r2"
    assert entries(board) == ["slot-a.conf", "slot-b+3.conf"]
    entry = (board.boot / "loader/entries/slot-b+3.conf").read_text()
    assert "version 8\n" in entry and "options balenapy.slot=b panic=10\n" in entry
    assert sorted(os.listdir(board.boot / "slot-b")) == ["initrd", "linux"]
    assert (board.boot / "slot-b/linux").read_bytes() == b"kernel r2"
    assert board.device("root-b").read_bytes().startswith(new_root())
    assert board.device("root-a").read_bytes().startswith(old_root())
    assert not hostupdate.progress_path(board).exists()


def test_a_difference_beside_the_whole_is_taken_when_it_fits(board: hostupdate.Board, tmp_path: Path) -> None:
    bundle, _ = make_update(tmp_path)
    delta, _ = make_update(tmp_path, base=old_root(), name="os-r2.from-r1.update")
    lines, say = said()

    hostupdate.install(board, str(bundle), say=say)

    assert delta.stat().st_size < bundle.stat().st_size / 20
    assert any("difference to r1" in line for line in lines)
    assert board.device("root-b").read_bytes().startswith(new_root())
    assert not board.data.exists()


def test_files_that_both_releases_have_do_not_travel(board: hostupdate.Board, tmp_path: Path) -> None:
    make_update(tmp_path, root=old_root(), name="os-r1.update", release="r1")
    older = update.boot_files(tmp_path / "os-r1.update")
    (board.boot / "slot-a/linux").write_bytes(b"kernel r1")
    (board.boot / "slot-a/initrd").write_bytes(b"initrd r1")
    whole, _ = make_update(tmp_path, name="os-r2.update")
    slot_tree = tmp_path / "make-os-r2.update/slot"
    (slot_tree / "linux").write_bytes(b"kernel r1")  # the new release has the same kernel, and another initrd
    (tmp_path / "os-r1.squashfs").write_bytes(old_root())
    delta = tmp_path / "os-r2.from-r1.update"
    update.write_update(GENERIC_ARM64_UEFI, "r2", slot_tree, tmp_path / "make-os-r2.update/root", delta, EPOCH, LINE,
                        base=tmp_path / "os-r1.squashfs", work=tmp_path)  # fmt: skip

    lines, say = said()
    hostupdate.install(board, str(whole), say=say)

    assert set(older) == {"boot/initrd", "boot/linux", "root.squashfs"}
    assert b"kernel r1" not in delta.read_bytes()
    assert any("difference to r1" in line for line in lines)
    assert (board.boot / "slot-b/linux").read_bytes() == b"kernel r1"
    assert (board.boot / "slot-b/initrd").read_bytes() == b"initrd r2"
    assert board.device("root-b").read_bytes().startswith(new_root())


def test_a_difference_is_left_when_the_running_kernel_is_another(board: hostupdate.Board, tmp_path: Path) -> None:
    manifest = {"base": {"bytes": 9, "sha256": hashlib.sha256(old_root()[:9]).hexdigest()}, "kept": {"boot/linux": ONE}}
    (board.boot / "slot-a/linux").write_bytes(b"k")

    assert hostupdate.is_base(board, {**manifest, "kept": {}}) is True
    assert hostupdate.is_base(board, manifest) is False


def test_a_difference_to_another_root_is_left_for_the_whole(board: hostupdate.Board, tmp_path: Path) -> None:
    bundle, _ = make_update(tmp_path)
    make_update(tmp_path, base=b"another root" * 1000, name="os-r2.from-r1.update")
    lines, say = said()

    hostupdate.install(board, str(bundle), say=say)

    assert any("another root" in line for line in lines)
    assert board.device("root-b").read_bytes().startswith(new_root())


def test_a_spoilt_difference_changes_nothing(board: hostupdate.Board, tmp_path: Path) -> None:
    delta, _ = make_update(tmp_path, base=old_root(), name="os-r2.from-r1.update")
    data = bytearray(delta.read_bytes())
    data[data.index(b"changed here") + 3] ^= 1
    delta.write_bytes(data)

    with pytest.raises(hostupdate.UpdateError, match=r"root.delta: wrong digest"):
        hostupdate.install(board, str(delta), say=print, delta=False)

    unchanged(board)


@pytest.mark.parametrize("part", ["root", "linux", "initrd"])
def test_a_flipped_bit_is_found_and_the_running_slot_stays(board: hostupdate.Board, tmp_path: Path, part: str) -> None:
    bundle, _ = make_update(tmp_path)
    data = bytearray(bundle.read_bytes())
    where = {"root": data.index(new_root()[:64]) + 2_000_000, "linux": data.index(b"kernel r2"),
             "initrd": data.index(b"initrd r2")}[part]  # fmt: skip
    data[where] ^= 0x10
    bundle.write_bytes(data)

    with pytest.raises(hostupdate.UpdateError, match="wrong digest"):
        hostupdate.install(board, str(bundle), say=print)

    unchanged(board)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "rpi-arm64"}, "is for rpi-arm64, this device is generic-arm64-uefi"),
        ({"format": 2}, "of a format that this device does not know"),
        ({"files": {"boot/../x": ONE, "root.squashfs": ONE}}, "names 'boot/../x'"),
        ({"root": {"bytes": -1, "sha256": "0" * 64}}, "not complete"),
        ({"files": {}}, "not complete"),
        ({"command_line": "a\nb"}, "not complete"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_for_this_device_is_refused(
    board: hostupdate.Board, change: dict[str, Any], message: str
) -> None:
    document = {"format": 1, "target": board.target, "release": "r2", "command_line": "x", "root": ONE,
                "files": {"root.squashfs": ONE}}  # fmt: skip
    assert hostupdate.check_manifest(document, board) == document

    with pytest.raises(hostupdate.UpdateError, match=message):
        hostupdate.check_manifest({**document, **change}, board)


@pytest.mark.parametrize("size", [0, 100, 512, 1300, 4096])
def test_what_is_no_update_is_refused(board: hostupdate.Board, tmp_path: Path, size: int) -> None:
    path = tmp_path / "noise"
    path.write_bytes(random.Random(size).randbytes(size))

    with pytest.raises(hostupdate.UpdateError, match=r"no host update|breaks off"):
        hostupdate.install(board, str(path), say=print)

    assert entries(board) == ["slot-a.conf"]


def test_another_digest_than_the_wanted_one_is_refused(board: hostupdate.Board, tmp_path: Path) -> None:
    bundle, _ = make_update(tmp_path)

    with pytest.raises(hostupdate.UpdateError, match="wanted is sha256:1111"):
        hostupdate.install(board, str(bundle), digest="sha256:" + "1" * 64, say=print)

    unchanged(board)


def test_a_root_larger_than_the_slot_is_refused(board: hostupdate.Board, tmp_path: Path) -> None:
    bundle, _ = make_update(tmp_path, root=bytes(SLOT_BYTES + 1))

    with pytest.raises(hostupdate.UpdateError, match="the slot 4194304"):
        hostupdate.install(board, str(bundle), say=print)

    unchanged(board)


# -- signatures --


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return private, public


def test_with_a_key_only_its_signature_is_taken(
    board: hostupdate.Board, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    board.public_key.parent.mkdir(parents=True)
    shutil.copyfile(public, board.public_key)
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", other], check=True, capture_output=True)
    unsigned, _ = make_update(tmp_path, name="unsigned.update")
    foreign, _ = make_update(tmp_path, name="foreign.update", key=other)
    signed, _ = make_update(tmp_path, name="signed.update", key=private)

    with pytest.raises(hostupdate.UpdateError, match="is not signed"):
        hostupdate.install(board, str(unsigned), say=print)
    with pytest.raises(hostupdate.UpdateError, match="not of this device's key"):
        hostupdate.install(board, str(foreign), say=print)
    unchanged(board)
    assert hostupdate.install(board, str(signed), say=print) == "r2"


# -- interruptions --


class Power(BaseException):
    """It goes."""


def cuts(board: hostupdate.Board, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the power go at the n-th sync."""
    left = [at]
    real = os.fsync

    def fsync(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Power
        real(fd)

    monkeypatch.setattr(hostupdate.os, "fsync", fsync)


@pytest.mark.parametrize("with_delta", [False, True], ids=["whole", "difference"])
def test_cut_at_every_sync_the_running_slot_starts_and_the_update_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_delta: bool
) -> None:
    base = old_root() if with_delta else None
    bundle, _ = make_update(tmp_path, base=base)
    monkeypatch.setattr(hostupdate, "SYNC_EVERY", 1 << 19)
    monkeypatch.setattr(hostupdate, "PIECE", 1 << 18)
    resumed = cut = 0
    for at in range(200):
        board = make_board(tmp_path / f"device{at}", GENERIC_ARM64_UEFI, root=old_root())
        with monkeypatch.context() as patch:
            cuts(board, patch, at)
            try:
                hostupdate.install(board, str(bundle), say=lambda _: None, delta=False)
            except Power:
                cut += 1
            else:
                break
        if "slot-b+3.conf" in entries(board):  # the entry came last: all of it is there
            assert board.device("root-b").read_bytes().startswith(new_root())
            assert (board.boot / "slot-b/linux").read_bytes() == b"kernel r2"
        else:
            unchanged(board)
        lines: list[str] = []
        hostupdate.install(board, str(bundle), say=lines.append, delta=False)
        resumed += any("going on at" in line for line in lines)
        assert entries(board) == ["slot-a.conf", "slot-b+3.conf"]
        assert board.device("root-b").read_bytes().startswith(new_root())
        shutil.rmtree(board.prefix)
    print(f"host update: cut at {cut} syncs, {resumed} went on in the middle")

    assert cut >= 8
    assert with_delta or resumed >= 3


def test_what_was_written_before_the_cut_is_hashed_again(
    board: hostupdate.Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, digest = make_update(tmp_path)
    monkeypatch.setattr(hostupdate, "SYNC_EVERY", 1 << 20)
    device = board.device("root-b")
    document = {"digest": digest, "device": str(device), "bytes": 2 << 20}
    hostupdate.progress_path(board).write_text(json.dumps(document))

    with pytest.raises(hostupdate.UpdateError, match="wrong digest"):  # the prefix is not there: stale bytes
        hostupdate.install(board, str(bundle), say=print)
    unchanged(board)

    hostupdate.install(board, str(bundle), say=print)  # from the start this time
    assert device.read_bytes().startswith(new_root())


class _Flaky(http.server.BaseHTTPRequestHandler):
    data = b""
    cut_after = 700_000
    ranges = True
    asked: list[str]

    def do_GET(self) -> None:
        offset = 0
        self.asked.append(self.headers.get("Range", ""))
        if "from-" in self.path:
            self.send_error(404)
            return
        if self.ranges and (wanted := self.headers.get("Range")):
            offset = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if offset else 200)
        self.send_header("Content-Length", str(len(self.data) - offset))
        self.end_headers()
        self.wfile.write(self.data[offset : offset + self.cut_after])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def flaky() -> Iterator[tuple[type[_Flaky], str]]:
    handler = type("Handler", (_Flaky,), {"asked": []})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_address[1]}/os-r2.update"
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_network_that_breaks_off_costs_ranges_only(
    board: hostupdate.Board, tmp_path: Path, flaky: tuple[type[_Flaky], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, url = flaky
    bundle, _ = make_update(tmp_path)
    handler.data = bundle.read_bytes()
    monkeypatch.setattr(hostupdate.time, "sleep", lambda _: None)
    monkeypatch.setattr(hostupdate.Stream.__init__, "__defaults__", (0, lambda _: None))

    hostupdate.install(board, url, say=print)

    assert board.device("root-b").read_bytes().startswith(new_root())
    offsets = [int(text.removeprefix("bytes=").rstrip("-")) for text in handler.asked if text]
    assert len([offset for offset in offsets if offset > 100_000]) >= 4


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_server_that_is_gone_is_told(board: hostupdate.Board, flaky: tuple[type[_Flaky], str]) -> None:
    _, url = flaky

    with pytest.raises(hostupdate.UpdateError, match="HTTP 404"):
        hostupdate.install(board, url + ".from-", say=print, delta=False)


# -- the switch --


def test_a_slot_on_trial_may_not_replace_the_other(board: hostupdate.Board, tmp_path: Path) -> None:
    bundle, _ = make_update(tmp_path)
    (board.boot / "loader/entries/slot-a.conf").rename(board.boot / "loader/entries/slot-a+2-1.conf")

    assert hostupdate.status(board)["trial"] is True
    with pytest.raises(hostupdate.UpdateError, match="itself on trial"):
        hostupdate.install(board, str(bundle), say=print)


@pytest.fixture
def raspberry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[hostupdate.Board, list[list[str]]]:
    """A Raspberry Pi whose slot A runs; mounting is only written down."""
    board = make_board(tmp_path / "pi", RPI_ARM64, root=old_root())
    calls: list[list[str]] = []

    def run(command: Any, **_: Any) -> None:
        calls.append([str(word) for word in command])

    monkeypatch.setattr(hostupdate.subprocess, "run", run)
    return board, calls


def test_a_raspberry_without_tryboot_is_tried_by_the_counting_initrd(
    raspberry: tuple[hostupdate.Board, list[list[str]]], tmp_path: Path
) -> None:
    board, calls = raspberry
    (work := tmp_path / "u").mkdir()
    # No programs may run: the bundle is made without openssl and rdiff.
    bundle, _ = make_update(work, RPI_ARM64)
    (board.prefix / "boot-b/old.dtb").write_text("of the last release")
    size = (board.boot / "autoboot.txt").stat()

    hostupdate.install(board, str(bundle), say=print)

    assert [call[0] for call in calls] == ["mount", "umount"]
    assert sorted(os.listdir(board.prefix / "boot-b")) == ["cmdline.txt", "initrd", "overlays", "vmlinuz"]
    assert (board.prefix / "boot-b/cmdline.txt").read_text() == "balenapy.slot=b panic=10\n"
    assert slots.default_slot((board.boot / "autoboot.txt").read_text()) == "b"
    assert (board.boot / "autoboot.txt").stat().st_ino == size.st_ino
    assert (board.boot / "autoboot.txt").stat().st_size == 512
    assert (board.state / "trial").read_text() == "slot=b\ntries=2\n"


def test_a_raspberry_with_tryboot_leaves_the_default_until_it_is_good(
    raspberry: tuple[hostupdate.Board, list[list[str]]], tmp_path: Path
) -> None:
    board, calls = raspberry
    (board.prefix / "dev/vcio").touch()
    (work := tmp_path / "u").mkdir()
    bundle, _ = make_update(work, RPI_ARM64)

    hostupdate.install(board, str(bundle), say=print)
    hostupdate.restart(board)

    assert slots.default_slot((board.boot / "autoboot.txt").read_text()) == "a"
    assert calls[-1] == ["systemctl", "reboot", "--reboot-argument=0 tryboot"]
    (board.prefix / "proc/cmdline").write_text("balenapy.slot=b")
    tried = hostupdate.Board.of_this_machine(board.prefix)
    assert hostupdate.status(tried)["trial"] is True
    hostupdate.mark_good(tried)
    assert slots.default_slot((board.boot / "autoboot.txt").read_text()) == "b"
    assert hostupdate.status(tried)["trial"] is False


# -- health --


def test_check_wants_the_engine_and_the_containers_that_must_run(
    board: hostupdate.Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    (board.prefix / "run/balenapy-os").mkdir(parents=True)
    wanted = {"app": {"Image": "x"}, "extra": {"Image": "x", "required": False}}
    (board.prefix / "run/balenapy-os/containers.json").write_text(json.dumps(wanted))
    clock = [0.0]
    state = {"app": [("created", 0), ("running", 0), ("running", 1), *[("running", 1)] * 99]}
    asked: list[str] = []

    def call(method: str, path: str, body: Any = None, timeout_s: float = 1) -> Any:
        asked.append(path)
        if clock[0] < 5:
            raise OSError("connection refused")
        if path.endswith("/json"):
            status, restarts = state["app"].pop(0)
            return {"State": {"Running": status == "running", "Status": status}, "RestartCount": restarts}
        return None

    monkeypatch.setattr(engineapi, "call", call)
    monkeypatch.setattr(hostupdate.time, "monotonic", lambda: clock[0])
    hostupdate.check(board, wait=lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    assert 17 <= clock[0] <= 19  # 5 without engine, then created, running, restarted; then ten good seconds
    assert "/containers/extra/json" not in asked


def test_check_names_what_is_missing(board: hostupdate.Board, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def call(*_: Any, **__: Any) -> Any:
        raise engineapi.ApiError(500, "out of order")

    monkeypatch.setattr(engineapi, "call", call)
    monkeypatch.setattr(hostupdate.time, "monotonic", lambda: clock[0])
    with pytest.raises(hostupdate.UpdateError, match="the engine: 500: out of order"):
        hostupdate.check(board, timeout_s=30, wait=lambda seconds: clock.__setitem__(0, clock[0] + seconds))


# -- the pure parts --


def test_entries_are_read_as_systemd_boot_counts_them() -> None:
    names = ["slot-a.conf", "slot-b+3.conf", "slot-b+2-1.conf", "slot-b+0-3.conf", "other.conf", "slot-c.conf"]
    read = [slots.read_entry(name) for name in names]

    assert [(each.slot, each.tries_left, each.bad) if each else None for each in read] == [
        ("a", None, False), ("b", 3, False), ("b", 2, False), ("b", 0, True), None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("slot", ["a", "b"])
def test_autoboot_is_one_sector_and_reads_back(slot: str) -> None:
    text = slots.autoboot(slot)

    assert len(text.encode()) == 512
    assert slots.default_slot(text) == slot
    assert f"[tryboot]\nboot_partition={slots.BOOT_PARTITIONS[slots.other(slot)]}\n" in text


def test_the_update_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    one, _ = make_update(tmp_path, name="one.update")
    other, _ = make_update(tmp_path, name="other.update")

    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()
