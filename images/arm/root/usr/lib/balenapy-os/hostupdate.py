"""A/B host updates: write the other slot, try it, keep it when it is good. The engine's containers and data stay.

Order, so that the power may go anywhere:

1. The other slot's boot entry goes: from here on nothing can start what is half written.
2. The root is written to the other slot's partition, synced every few MiB; `progress.json` says how far. A prefix that
   is there is hashed again when the update goes on, never trusted. With a difference, its file is staged on the data
   partition, and the running root is held against the base's digest first.
3. The written partition is read back from the medium and held against the digest of the manifest.
4. Kernel, initrd and what else the slot boots from: written beside, synced, renamed.
5. The boot entry, with three tries; or autoboot.txt's trial. Restart.
6. The new slot is good when `check` says so (boot-complete.target); else its tries run out and the other one starts.

The manifest's digests say everything; the manifest is held against `--digest` and, if the device has a public key,
against its signature. Which is verified before anything is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import engineapi
import slots

FORMAT = 1
PIECE = 1 << 20
SYNC_EVERY = 8 << 20
MAX_MANIFEST = 4 << 20
ATTEMPTS = 8  # of a source that breaks off, without getting on
BLOCK = 512


class UpdateError(Exception):
    """The update cannot be done; the running slot is as it was."""


@dataclass(frozen=True, slots=True)
class Board:
    """What the image says of itself (board.json), and where things are. Tests put a directory before it all."""

    target: str
    release: str
    switch: str
    partitions: dict[str, str]
    slot: str
    prefix: Path = Path("/")

    @classmethod
    def of_this_machine(cls, prefix: Path = Path("/")) -> Board:
        document = json.loads((prefix / "usr/lib/balenapy-os/board.json").read_text())
        slot = slots.running_slot((prefix / "proc/cmdline").read_text())
        if slot is None:
            raise UpdateError("the kernel's command line does not say which slot runs (balenapy.slot=)")
        return cls(document["target"], document["release"], document["switch"], document["partitions"], slot, prefix)

    def device(self, name: str) -> Path:
        kind, _, value = self.partitions[name].partition("=")
        directory = {"PARTLABEL": "by-partlabel", "PARTUUID": "by-partuuid"}[kind]
        return self.prefix / "dev/disk" / directory / (value.lower() if kind == "PARTUUID" else value)

    @property
    def boot(self) -> Path:
        return self.prefix / ("efi" if self.switch == "systemd-boot" else "boot")

    def running_file(self, name: str) -> Path:
        """A file of the running slot, by its name in an update (`boot/linux`). Only where slots share a partition."""
        return self.boot / f"slot-{self.slot}" / name.removeprefix("boot/")

    @property
    def state(self) -> Path:
        return self.prefix / "mnt/state/host-update"

    @property
    def data(self) -> Path:
        return self.prefix / "mnt/data/host-update"

    @property
    def public_key(self) -> Path:
        return self.prefix / "etc/balenapy-os/update.pub"


# --- files ----------------------------------------------------------------------------------------------------


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes) -> None:
    """Beside, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_directory(path.parent)


def write_in_place(path: Path, data: bytes) -> None:
    """One sector, at once: for a file whose blocks must not move."""
    with open(path, "r+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# --- sources --------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Bytes from an offset on. May break off: then it is opened again further on."""

    def open_at(self, offset: int) -> BinaryIO: ...


@dataclass(frozen=True, slots=True)
class FileSource:
    path: Path

    def open_at(self, offset: int) -> BinaryIO:
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - the stream's to close
        except OSError as error:
            raise UpdateError(f"{self.path}: {error.strerror}") from error
        file.seek(offset)
        return file


@dataclass(frozen=True, slots=True)
class UrlSource:
    url: str
    timeout_s: float = 60.0

    def open_at(self, offset: int) -> BinaryIO:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={offset}-"} if offset else {})
        try:
            response = urllib.request.urlopen(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (408, 429, 500, 502, 503, 504):
                raise OSError(f"{self.url}: HTTP {error.code}") from error
            raise UpdateError(f"{self.url}: HTTP {error.code} {error.reason}") from error
        if offset and response.status != 206:  # a server without ranges: read up to there
            left = offset
            while left and (piece := response.read(min(left, PIECE))):
                left -= len(piece)
        return response  # type: ignore[no-any-return]


def source_of(name: str) -> Source:
    scheme = urllib.parse.urlsplit(name).scheme
    if scheme in ("http", "https"):
        return UrlSource(name)
    if scheme and not Path(name).exists():
        raise UpdateError(f"{name}: neither a file nor an http(s) URL")
    return FileSource(Path(name))


class Stream:
    """A source read in order, through breaks: it goes on where it broke."""

    def __init__(self, source: Source, offset: int = 0, wait: Callable[[float], None] = time.sleep) -> None:
        self._source = source
        self._wait = wait
        self._file: BinaryIO | None = None
        self.offset = offset

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes.

        Raises: UpdateError when the source ends before, or stays broken.
        """
        parts = []
        left, failures = size, 0
        while left:
            try:
                if self._file is None:
                    self._file = self._source.open_at(self.offset)
                piece = self._file.read(min(left, PIECE))
                if not piece:
                    raise OSError("ends too early")
            except OSError as error:
                self.close()
                failures += 1
                if failures >= ATTEMPTS or isinstance(self._source, FileSource):
                    raise UpdateError(f"the update breaks off at byte {self.offset}: {error}") from error
                self._wait(min(2**failures, 60))
                continue
            failures = 0
            parts.append(piece)
            left -= len(piece)
            self.offset += len(piece)
        return b"".join(parts)

    def skip_to(self, offset: int) -> None:
        """Further on, without reading what lies between."""
        if offset != self.offset:
            self.close()
            self.offset = offset

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


# --- the bundle -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    size: int
    offset: int  # of its contents in the bundle


def read_header(stream: Stream) -> Member:
    """One header of the tar. Only plain files: nothing here is laid anywhere by its name.

    Raises: UpdateError.
    """
    block = stream.read(BLOCK)
    name = block[:100].rstrip(b"\0").decode(errors="replace")
    if block[345:500].strip(b"\0"):
        name = block[345:500].rstrip(b"\0").decode(errors="replace") + "/" + name
    try:
        size, told = int(block[124:136].rstrip(b" \0") or b"0", 8), int(block[148:156].rstrip(b" \0"), 8)
    except ValueError as error:
        raise UpdateError("this is no host update") from error
    if block[257:262] != b"ustar" or told != sum(block) - sum(block[148:156]) + 8 * 32:
        raise UpdateError("this is no host update")
    if block[156:157] not in (b"0", b"\0"):
        raise UpdateError(f"{name}: only plain files are expected in a host update")
    return Member(name, size, stream.offset)


@dataclass(slots=True)
class Bundle:
    stream: Stream
    manifest: dict[str, Any]
    digest: str
    next_header: int  # where the members begin that the manifest names

    def members(self) -> Iterator[Member]:
        position = self.next_header
        for _ in range(len(self.manifest["files"])):
            self.stream.skip_to(position)
            member = read_header(self.stream)
            yield member
            position = member.offset + -(-member.size // BLOCK) * BLOCK


def check_manifest(document: Any, board: Board) -> dict[str, Any]:
    """Shape, target, bounds.

    Raises: UpdateError.
    """

    def described(value: Any) -> bool:
        return (
            isinstance(value, dict) and isinstance(value.get("bytes"), int) and value["bytes"] >= 0
            and isinstance(value.get("sha256"), str) and re.fullmatch("[0-9a-f]{64}", value["sha256"]) is not None
        )  # fmt: skip

    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UpdateError("the update is of a format that this device does not know")
    if document.get("target") != board.target:
        raise UpdateError(f"the update is for {document.get('target')}, this device is {board.target}")
    files = document.get("files")
    if (
        not described(document.get("root")) or not isinstance(files, dict) or not files
        or not all(described(value) for value in files.values()) or not isinstance(document.get("release"), str)
        or not isinstance(document.get("command_line"), str) or "\n" in document["command_line"] + document["release"]
        or ("base" in document and not described(document["base"]))
        or ("root.delta" if "base" in document else "root.squashfs") not in files
    ):  # fmt: skip
        raise UpdateError("the update's manifest is not complete")
    kept = document.get("kept", {})
    if not isinstance(kept, dict) or not all(described(value) for value in kept.values()) or (
        kept and (board.switch != "systemd-boot" or "base" not in document)
    ):
        raise UpdateError("the update's manifest is not complete")
    for name in (*files, *kept):
        parts = name.split("/")
        if name not in ("root.squashfs", "root.delta") and (parts[0] != "boot" or not all(parts) or ".." in parts):
            raise UpdateError(f"the update's manifest names {name!r}")
    return document


def open_bundle(stream: Stream, board: Board, digest: str = "") -> Bundle:
    """Read and verify the manifest.

    Raises: UpdateError.
    """
    member = read_header(stream)
    if member.name != "manifest.json" or not 0 < member.size <= MAX_MANIFEST:
        raise UpdateError("this is no host update")
    text = stream.read(member.size)
    position = member.offset + -(-member.size // BLOCK) * BLOCK
    found = "sha256:" + hashlib.sha256(text).hexdigest()
    if digest and digest != found:
        raise UpdateError(f"the update is {found}, wanted is {digest}")
    stream.skip_to(position)
    signature = b""
    following = read_header(stream)
    if following.name == "manifest.sig":
        if following.size > BLOCK:
            raise UpdateError("the update's signature is too long")
        signature = stream.read(following.size)
        position = following.offset + BLOCK
    if board.public_key.exists():
        verify_signature(board.public_key, text, signature)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UpdateError("the update's manifest is no JSON") from error
    return Bundle(stream, check_manifest(document, board), found, position)


def verify_signature(key: Path, text: bytes, signature: bytes) -> None:
    """Raises: UpdateError."""
    if not signature:
        raise UpdateError("the update is not signed, and this device has a key for updates")
    with tempfile.TemporaryDirectory() as directory:
        data, sig = Path(directory) / "data", Path(directory) / "sig"
        data.write_bytes(text)
        sig.write_bytes(signature)
        done = subprocess.run(
            ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", key, "-rawin", "-in", data, "-sigfile", sig],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise UpdateError("the update's signature is not of this device's key")


# --- installing -----------------------------------------------------------------------------------------------


def install(board: Board, name: str, *, digest: str = "", say: Callable[[str], None], delta: bool = True) -> str:
    """Write the other slot and make it the next to be tried. The release.

    Raises: UpdateError: the running slot stays the one that starts.
    """
    if pending(board):
        raise UpdateError("the running slot is itself on trial: it must be good before it may replace the other one")
    bundle = choose(board, name, digest, say, delta)
    with contextlib.closing(bundle.stream):
        return _install(board, bundle, say)


def _install(board: Board, bundle: Bundle, say: Callable[[str], None]) -> str:
    slot = slots.other(board.slot)
    release = bundle.manifest["release"]
    say(f"release {release} ({bundle.digest}) goes to slot {slot.upper()}")
    withdraw(board, slot)
    members = {}
    for member in bundle.members():
        described = bundle.manifest["files"].get(member.name)
        if described is None or described["bytes"] != member.size:
            raise UpdateError(f"{member.name}: not as the manifest says")
        members[member.name] = member
    if missing := set(bundle.manifest["files"]) - set(members):
        raise UpdateError(f"not in the update: {', '.join(sorted(missing))}")
    target = board.device(f"root-{slot}")
    if "root.delta" in members:
        apply_delta(board, bundle, members["root.delta"], target, say)
    else:
        write_root(board, bundle, members["root.squashfs"], target, say)
    verify_root(bundle.manifest["root"], target)
    staged = stage_boot_directory(board, slot)
    for name, described in bundle.manifest.get("kept", {}).items():
        keep_file(board.running_file(name), described, staged / name.removeprefix("boot/"))
    for member in members.values():
        if member.name.startswith("boot/"):
            copy_member(bundle, member, staged / member.name.removeprefix("boot/"))
    commit_boot(board, slot, staged, release, bundle.manifest["command_line"])
    forget_progress(board)
    say(f"slot {slot.upper()} has release {release}: it is tried at the next start")
    return str(release)


def choose(board: Board, name: str, digest: str, say: Callable[[str], None], delta: bool) -> Bundle:
    """The difference to the running release if it lies beside the whole and fits; else the whole."""
    if delta and not digest:
        offered = slots.delta_name(name, board.release)
        stream: Stream | None = None
        try:
            stream = Stream(source_of(offered))
            bundle = open_bundle(stream, board)
            base = bundle.manifest.get("base")
            if base and is_base(board, bundle.manifest):
                say(f"difference to {board.release}: {bundle.manifest['files']['root.delta']['bytes'] / 1e6:.1f} MB")
                return bundle
            say(f"{offered} is against another root than the running one: the whole update")
        except (UpdateError, OSError) as error:
            say(f"no difference to {board.release} ({error}): the whole update")
        if stream is not None:
            stream.close()
    stream = Stream(source_of(name))
    try:
        return open_bundle(stream, board, digest)
    except UpdateError:
        stream.close()
        raise


def is_base(board: Board, manifest: dict[str, Any]) -> bool:
    """Whether the running slot has all that a difference builds on."""
    wanted = [(board.device(f"root-{board.slot}"), manifest["base"])]
    wanted += [(board.running_file(name), described) for name, described in manifest.get("kept", {}).items()]
    return all(path.exists() and digest_of(path, each["bytes"]) == each["sha256"] for path, each in wanted)


def digest_of(path: Path, size: int) -> str:
    """sha256 of the first bytes of a partition, from the medium rather than from what was just written to memory."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = size
        while left and (piece := file.read(min(left, PIECE))):
            sha.update(piece)
            left -= len(piece)
    return sha.hexdigest() if not left else ""


def withdraw(board: Board, slot: str) -> None:
    """From now on nothing starts this slot."""
    if board.switch == "systemd-boot":
        entries = board.boot / "loader/entries"
        for entry in slots.entries_of(os.listdir(entries), slot):
            (entries / entry.name).unlink()
        sync_directory(entries)
        return
    if slots.default_slot((board.boot / "autoboot.txt").read_text()) != board.slot:
        raise UpdateError("autoboot.txt does not start the running slot: restart first")
    (board.state / "trial").unlink(missing_ok=True)


def progress_path(board: Board) -> Path:
    return board.state / "progress.json"


def read_progress(board: Board, bundle: Bundle, slot_device: Path) -> int:
    """How much of the root this update has written before it was interrupted."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        document = json.loads(progress_path(board).read_text())
        if document["digest"] == bundle.digest and document["device"] == str(slot_device):
            return max(0, int(document["bytes"]))
    return 0


def note_progress(board: Board, bundle: Bundle, device: Path, done: int) -> None:
    document = {"digest": bundle.digest, "device": str(device), "bytes": done}
    write_durably(progress_path(board), json.dumps(document).encode())


def forget_progress(board: Board) -> None:
    progress_path(board).unlink(missing_ok=True)
    shutil.rmtree(board.data, ignore_errors=True)


def room_of(device: Path) -> int:
    with open(device, "rb") as file:
        return file.seek(0, os.SEEK_END)


def write_root(board: Board, bundle: Bundle, member: Member, device: Path, say: Callable[[str], None]) -> None:
    """The whole root, from where it was left."""
    check_room(device, member.size)
    done = min(read_progress(board, bundle, device), member.size)
    sha = hashlib.sha256()
    with open(device, "r+b") as file:
        left = done
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                raise UpdateError(f"{device}: cannot be read")
            sha.update(piece)
            left -= len(piece)
        if done:
            say(f"going on at {done / 1e6:.0f} of {member.size / 1e6:.0f} MB")
        bundle.stream.skip_to(member.offset + done)
        file.seek(done)
        synced = done
        while done < member.size:
            piece = bundle.stream.read(min(PIECE, member.size - done))
            sha.update(piece)
            file.write(piece)
            done += len(piece)
            if done - synced >= SYNC_EVERY or done == member.size:
                file.flush()
                os.fsync(file.fileno())
                note_progress(board, bundle, device, done)
                synced = done
    if sha.hexdigest() != bundle.manifest["files"][member.name]["sha256"]:
        forget_progress(board)  # what was written before is not to be trusted: from the start next time
        raise UpdateError(f"{member.name}: wrong digest")


def apply_delta(board: Board, bundle: Bundle, member: Member, device: Path, say: Callable[[str], None]) -> None:
    """Stage the difference, verify it, then make the root out of the running one."""
    check_room(device, bundle.manifest["root"]["bytes"])
    staged = board.data / f"{bundle.digest.removeprefix('sha256:')}.delta"
    copy_member(bundle, member, staged, resume=True)
    from delta.errors import DeltaError
    from delta.librsync import patch

    base_device, base_bytes = board.device(f"root-{board.slot}"), bundle.manifest["base"]["bytes"]
    base = os.open(base_device, os.O_RDONLY)
    try:
        with open(staged, "rb") as delta, open(device, "r+b") as file:
            written = 0
            pieces = patch(
                delta.read, lambda offset, size: os.pread(base, size, offset), base_bytes,
                bundle.manifest["root"]["bytes"],
            )
            for piece in pieces:
                file.write(piece)
                written += len(piece)
                if written >= SYNC_EVERY:
                    file.flush()
                    os.fdatasync(file.fileno())
                    written = 0
            file.flush()
            os.fsync(file.fileno())
    except DeltaError as error:
        raise UpdateError(f"the difference does not apply: {error}") from error
    finally:
        os.close(base)


def check_room(device: Path, size: int) -> None:
    if size > (room := room_of(device)):
        raise UpdateError(f"the root has {size} bytes, the slot {room}")


def verify_root(described: dict[str, Any], device: Path) -> None:
    if digest_of(device, described["bytes"]) != described["sha256"]:
        raise UpdateError(f"{device}: what was written reads back differently")


def copy_member(bundle: Bundle, member: Member, path: Path, *, resume: bool = False) -> None:
    """One file of the bundle to a file, verified.

    Raises: UpdateError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    sha = hashlib.sha256()
    if resume and path.exists():
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                sha.update(piece)
                done += len(piece)
        if done > member.size:
            done, sha = 0, hashlib.sha256()
    with open(path, "r+b" if done else "wb") as out:
        out.seek(done)
        bundle.stream.skip_to(member.offset + done)
        while done < member.size:
            piece = bundle.stream.read(min(PIECE, member.size - done))
            sha.update(piece)
            out.write(piece)
            done += len(piece)
        out.flush()
        os.fsync(out.fileno())
    if sha.hexdigest() != bundle.manifest["files"][member.name]["sha256"]:
        path.unlink()
        raise UpdateError(f"{member.name}: wrong digest")


def keep_file(source: Path, described: dict[str, Any], path: Path) -> None:
    """A file that this release has in common with the running one.

    Raises: UpdateError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise UpdateError(f"{source}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != described["sha256"]:
        raise UpdateError(f"{source}: not the file that the difference is against")
    write_durably(path, data)


# --- the switch -----------------------------------------------------------------------------------------------


def stage_boot_directory(board: Board, slot: str) -> Path:
    """Where the slot's kernel is laid before it is in force."""
    if board.switch == "systemd-boot":
        staged = board.boot / f"slot-{slot}.new"
        shutil.rmtree(staged, ignore_errors=True)
        # The old kernel of the slot goes first: the partition has room for two, not for three.
        shutil.rmtree(board.boot / f"slot-{slot}", ignore_errors=True)
        staged.mkdir()
        return staged
    place = board.prefix / f"boot-{slot}"
    subprocess.run(["mount", "-o", "rw,noatime", board.device(f"boot-{slot}"), place], check=True)
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return place


def commit_boot(board: Board, slot: str, staged: Path, release: str, command_line: str) -> None:
    if board.switch == "systemd-boot":
        place = board.boot / f"slot-{slot}"
        staged.rename(place)
        sync_directory(place)
        sync_directory(board.boot)
        entries = board.boot / "loader/entries"
        texts = [path.read_text() for path in entries.glob("slot-*.conf")]
        text = slots.loader_entry(slot, slots.next_sequence(texts), release, command_line)
        write_durably(entries / f"slot-{slot}+{slots.TRIES}.conf", text.encode())
        return
    write_durably(staged / "cmdline.txt", command_line.replace("{slot}", slot).encode() + b"\n")
    os.sync()
    subprocess.run(["umount", staged], check=True)
    (board.state / "failed").unlink(missing_ok=True)
    # Read by the initrd of the tried slot, which counts down where the firmware does not.
    write_durably(board.state / "trial", f"slot={slot}\ntries={slots.TRIES - 1}\n".encode())
    if not firmware_tries(board):
        write_in_place(board.boot / "autoboot.txt", slots.autoboot(slot).encode())


def firmware_tries(board: Board) -> bool:
    """Whether the kernel hands `reboot "0 tryboot"` on to the firmware: Raspberry Pi's own kernels, which have vcio."""
    return board.switch == "autoboot" and (board.prefix / "dev/vcio").exists()


def restart(board: Board) -> None:
    argument = ["--reboot-argument=0 tryboot"] if firmware_tries(board) else []
    subprocess.run(["systemctl", "reboot", *argument], check=True)


def pending(board: Board) -> bool:
    """Whether the running slot is on trial still."""
    if board.switch == "systemd-boot":
        entries = board.boot / "loader/entries"
        running = slots.entries_of(os.listdir(entries), board.slot)
        return bool(running) and all(entry.tries_left is not None for entry in running)
    trial = board.state / "trial"
    return trial.exists() and f"slot={board.slot}\n" in trial.read_text()


def mark_good(board: Board) -> None:
    """For boards without systemd-boot, whose own service does it: the tried slot is the one that starts."""
    if board.switch == "systemd-boot":
        raise UpdateError("systemd-bless-boot.service does this here")
    if not pending(board):
        return
    if slots.default_slot((board.boot / "autoboot.txt").read_text()) != board.slot:
        write_in_place(board.boot / "autoboot.txt", slots.autoboot(board.slot).encode())
    (board.state / "trial").unlink()
    sync_directory(board.state)


def status(board: Board) -> dict[str, Any]:
    result: dict[str, Any] = {
        "target": board.target, "release": board.release, "slot": board.slot, "trial": pending(board),
    }  # fmt: skip
    if board.switch == "systemd-boot":
        names = os.listdir(board.boot / "loader/entries")
        result["entries"] = [entry.name for slot in "ab" for entry in slots.entries_of(names, slot)]
    else:
        result["starts"] = slots.default_slot((board.boot / "autoboot.txt").read_text())
        result["failed"] = (board.state / "failed").exists()
    return result


# --- containers and health ------------------------------------------------------------------------------------


def wanted_containers(board: Board) -> dict[str, dict[str, Any]]:
    try:
        document = json.loads((board.prefix / "run/balenapy-os/containers.json").read_text())
    except FileNotFoundError:
        return {}
    return document if isinstance(document, dict) else {}


def ensure_containers(board: Board, say: Callable[[str], None]) -> None:
    """Create and start, once, the containers that config.json names; afterwards their restart policies hold.

    Raises: UpdateError naming those that do not start.
    """
    failures = []
    for name, body in wanted_containers(board).items():
        body = {key: value for key, value in body.items() if key != "required"}
        body.setdefault("HostConfig", {}).setdefault("RestartPolicy", {"Name": "unless-stopped"})
        quoted = urllib.parse.quote(name, safe="")
        try:
            try:
                found = engineapi.call("GET", f"/containers/{quoted}/json")
            except engineapi.ApiError as error:
                if error.status != 404:
                    raise
                engineapi.call("POST", f"/containers/create?name={quoted}", body)
                found = engineapi.call("GET", f"/containers/{quoted}/json")
                say(f"container {name} created")
            if found["State"]["Status"] == "created":
                engineapi.call("POST", f"/containers/{quoted}/start")
                say(f"container {name} started")
        except (engineapi.ApiError, OSError) as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise UpdateError("; ".join(failures))


def check(
    board: Board, *, timeout_s: float = 600.0, steady_s: float = 10.0, wait: Callable[[float], None] = time.sleep
) -> None:
    """The engine answers, and for a while the containers that must run do.

    Raises: UpdateError naming what is missing.
    """
    deadline = time.monotonic() + timeout_s
    good_since: float | None = None
    restarts: dict[str, int] = {}
    trouble = "nothing was asked"
    while time.monotonic() < deadline:
        trouble = find_trouble(board, restarts)
        now = time.monotonic()
        if trouble:
            good_since = None
        elif good_since is None:
            good_since = now
        elif now - good_since >= steady_s:
            return
        wait(1.0)
    raise UpdateError(trouble or "was good, but not long enough")


def find_trouble(board: Board, restarts: dict[str, int]) -> str:
    """What is not as it must be; "" when all is."""
    try:
        if (client := board.prefix / "usr/bin/balenapy").exists():
            command = [client, "healthcheck", "--timeout", "60"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"balenapy healthcheck: {(done.stderr or done.stdout).strip()}"
        engineapi.call("GET", "/info", timeout_s=60)
        for name, body in wanted_containers(board).items():
            if body.get("required", True) is False:
                continue
            found = engineapi.call("GET", f"/containers/{urllib.parse.quote(name, safe='')}/json", timeout_s=60)
            state = found["State"]
            if not state["Running"]:
                return f"container {name} is {state['Status']}"
            if state.get("Health", {}).get("Status", "healthy") != "healthy":
                return f"container {name} is {state['Health']['Status']}"
            count = found.get("RestartCount", 0)
            if restarts.setdefault(name, count) != count:
                restarts[name] = count
                return f"container {name} has been restarted"
    except (engineapi.ApiError, OSError) as error:
        return f"the engine: {error}"
    return ""


# --- command line ---------------------------------------------------------------------------------------------

USAGE = """usage: balenapy-host-update [--digest sha256:…] [--no-delta] [--no-reboot] FILE|URL
       balenapy-host-update status | check | good | containers | reboot
"""


def main(arguments: list[str]) -> int:
    def say(text: str) -> None:
        print(text, flush=True)

    import argparse

    parser = argparse.ArgumentParser(prog="balenapy-host-update", usage=USAGE)
    parser.add_argument("what")
    parser.add_argument("--digest", default="")
    parser.add_argument("--no-delta", action="store_true")
    parser.add_argument("--no-reboot", action="store_true")
    parser.add_argument("--timeout", type=float, default=600.0)
    options = parser.parse_args(arguments)
    if options.digest and not re.fullmatch("sha256:[0-9a-f]{64}", options.digest):
        parser.error("--digest wants sha256: and 64 hexadecimal digits")
    try:
        board = Board.of_this_machine()
        match options.what:
            case "status":
                say(json.dumps(status(board)))
            case "check":
                check(board, timeout_s=options.timeout)
            case "good":
                mark_good(board)
            case "containers":
                ensure_containers(board, say)
            case "reboot":
                restart(board)
            case name:
                install(board, name, digest=options.digest, say=say, delta=not options.no_delta)
                if not options.no_reboot:
                    restart(board)
    except (UpdateError, OSError, subprocess.CalledProcessError) as error:
        print(f"balenapy-host-update: {error}", file=sys.stderr)
        return 1
    return 0
