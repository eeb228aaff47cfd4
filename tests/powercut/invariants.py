"""What must hold of a data root after a start, whatever happened before: one function, read from the files alone.

Nothing of the engine decides here but the readers of its formats: rows are read from a copy of the database, every
layer is put together again from its files and its tar-split, and hashed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sqlite3
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from balenapy.core import tarsplit
from balenapy.core.digest import Digest, chain_id
from balenapy.core.tarsplit import File
from balenapy.errors import EngineError
from balenapy.worker.splitfile import NAME, read_records

SNAPSHOT_MODE, ROOT_MODE = 0o710, 0o755
READ_BYTES = 1 << 20
INIT_LAYER = ("dev/console", "dev/pts", "dev/shm", "proc", "sys", ".dockerenv", "etc/hostname", "etc/hosts",
    "etc/resolv.conf", "etc/mtab")  # fmt: skip


@dataclass
class Found:
    """What was looked at and what is wrong with it."""

    violations: list[str] = field(default_factory=list)
    references: dict[str, str] = field(default_factory=dict)  # canonical name -> image_id
    images: set[str] = field(default_factory=set)
    containers: dict[str, str] = field(default_factory=dict)  # name -> status
    layers: int = 0
    files: int = 0

    @property
    def state(self) -> dict[str, Any]:
        """What a client sees, for comparison with what it was told."""
        return {
            "references": dict(sorted(self.references.items())),
            "images": sorted(self.images),
            "containers": dict(sorted(self.containers.items())),
        }


def inspect(data_root: Path, *, settled: bool = True) -> Found:
    """Look at everything below a data root that an engine has recovered.

    Args:
        settled: collection has run and the trash has been emptied.
    """
    found = Found()
    wrong = found.violations.append
    with _database(data_root) as connection:
        (result,) = connection.execute("PRAGMA quick_check").fetchone()
        if result != "ok":
            wrong(f"database: {result}")
        rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in _TABLES}
    _look_for_damage_reports(data_root, rows, wrong)
    layers = _check_layers(data_root, rows, found)
    _check_images(rows, layers, found)
    _check_containers(data_root, rows, layers, found)
    _check_rubbish(data_root, rows, settled, wrong)
    return found


_TABLES = (
    "document", "image", "reference", "snapshot", "ingest", "lease", "lease_item", "container", "container_state",
)  # fmt: skip


class _database:
    """A copy of the database, opened: the engine may hold the lock on the original."""

    def __init__(self, data_root: Path) -> None:
        self._data_root = data_root

    def __enter__(self) -> sqlite3.Connection:
        self._directory = tempfile.mkdtemp(prefix="bpt-meta")
        for suffix in ("", "-wal"):
            source = self._data_root / f"meta.db{suffix}"
            if source.exists():
                shutil.copy(source, self._directory)
        self._connection = sqlite3.connect(f"{self._directory}/meta.db")
        self._connection.row_factory = sqlite3.Row
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        shutil.rmtree(self._directory)


def _look_for_damage_reports(data_root: Path, rows: dict[str, list[sqlite3.Row]], wrong: Any) -> None:
    """A power cut damages nothing: what is put aside for damage is a violation."""
    for path in data_root.glob("meta.db.broken-*"):
        wrong(f"the database was taken for damaged: {path.name}")
    quarantine = data_root / "quarantine"
    if quarantine.exists():
        for path in quarantine.iterdir():
            wrong(f"in quarantine: {path.name}")
    for row in rows["snapshot"]:
        if row["kind"] == "corrupt":
            wrong(f"layer is marked corrupt: {row['chain_id']}")


def _check_layers(data_root: Path, rows: dict[str, list[sqlite3.Row]], found: Found) -> dict[str, sqlite3.Row]:
    """Every layer with a row has all its files: its tar, put together again, has its diff_id."""
    wrong = found.violations.append
    layers = {row["chain_id"]: row for row in rows["snapshot"] if row["kind"] == "committed"}
    for key, row in layers.items():
        found.layers += 1
        parent = row["parent"]
        if parent and parent not in layers:
            wrong(f"layer {key}: its parent {parent} has no row")
        expected = chain_id([*([Digest.parse(parent)] if parent else []), Digest.parse(row["diff_id"])])
        if str(expected) != key:
            wrong(f"layer {key}: does not follow from its parent and diff_id")
        directory = data_root / "snapshots" / row["directory"]
        try:
            tar, files = rebuild(directory)
        except (EngineError, OSError) as error:
            wrong(f"layer {key}: {error}")
            continue
        found.files += files
        digest = f"sha256:{hashlib.sha256(tar).hexdigest()}"
        if digest != row["diff_id"]:
            wrong(f"layer {key}: its files give {digest}, not {row['diff_id']}")
        else:
            try:
                found.violations += [f"layer {key}: {difference}" for difference in compare(tar, directory / "diff")]
            except OSError as error:
                wrong(f"layer {key}: {error}")
    return layers


def rebuild(directory: Path) -> tuple[bytes, int]:
    """The tar of a layer's directory as it is, by its tar-split; and how many files that took.

    Raises: EngineError, OSError, when a file is missing or has another content.
    """
    root = os.open(directory / "diff", os.O_PATH | os.O_DIRECTORY)
    try:
        displaced = directory / "displaced"
        aside = set(os.listdir(displaced)) if displaced.exists() else set()
        count = 0

        def content(file: File) -> Iterator[bytes]:
            nonlocal count
            count += 1
            name = tarsplit.displaced_name(file.size, file.crc)
            if name in aside:
                fd = os.open(displaced / name, os.O_RDONLY | os.O_NOFOLLOW)
            else:
                fd = os.open(file.path.lstrip(b"/"), os.O_RDONLY | os.O_NOFOLLOW, dir_fd=root)
            with open(fd, "rb") as stream:
                while piece := stream.read(READ_BYTES):
                    yield piece

        records = read_records(os.open(directory / NAME, os.O_RDONLY))
        return b"".join(tarsplit.join(records, content)), count
    finally:
        os.close(root)


def compare(tar: bytes, diff: Path) -> Iterator[str]:
    """Where the files are not what the tar says: type, mode, owner, link, device, extended attributes, whiteouts."""
    members: dict[str, tarfile.TarInfo] = {}  # the last of a name counts
    contents: dict[str, tarfile.TarInfo] = {}  # by name: where its content and type come from
    owners: dict[int, tarfile.TarInfo] = {}  # of what a hard link leads to, the last link sets mode and owner too
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        for member in archive:
            members[member.name] = member
            target = contents.get(member.linkname.removeprefix("./"), member) if member.islnk() else member
            contents[member.name] = target
            owners[id(target)] = member
    for name, member in members.items():
        directory, _, base = name.rpartition("/")
        if base == ".wh..wh..opq":
            if "trusted.overlay.opaque" not in os.listxattr(diff / directory):
                yield f"{directory} is not opaque"
            continue
        whiteout = base.startswith(".wh.")
        path = diff / directory / base.removeprefix(".wh.")
        try:
            status = path.lstat()
        except OSError as error:
            yield str(error)
            continue
        if whiteout:
            if not stat.S_ISCHR(status.st_mode) or status.st_rdev:
                yield f"{path} is no whiteout"
            continue
        target = contents[name]
        owner = owners[id(target)]
        if stat.S_IFMT(status.st_mode) != _TYPES.get(target.type, stat.S_IFREG):
            yield f"{path} is of another type"
        elif not member.issym() and stat.S_IMODE(status.st_mode) != owner.mode & 0o7777:
            yield f"{path} has mode {stat.S_IMODE(status.st_mode):o}, not {owner.mode:o}"
        if (status.st_uid, status.st_gid) != (owner.uid, owner.gid):
            yield f"{path} has owner {status.st_uid}:{status.st_gid}, not {owner.uid}:{owner.gid}"
        if member.issym() and os.readlink(path) != member.linkname:
            yield f"{path} leads to {os.readlink(path)}, not {member.linkname}"
        if member.islnk() and status.st_nlink < 2:
            yield f"{path} is no hard link"
        if target.isdev() and not target.isfifo():
            device = (os.major(status.st_rdev), os.minor(status.st_rdev))
            if device != (target.devmajor, target.devminor):
                yield f"{path} is device {device}"
        for key, value in target.pax_headers.items():
            if key.startswith("SCHILY.xattr."):
                try:
                    held = os.getxattr(path, key.removeprefix("SCHILY.xattr."), follow_symlinks=False)
                except OSError as error:
                    yield str(error)
                    continue
                if held != value.encode("utf-8", "surrogateescape"):
                    yield f"{path} has another {key}"


_TYPES = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def _check_images(rows: dict[str, list[sqlite3.Row]], layers: dict[str, sqlite3.Row], found: Found) -> None:
    """References lead to images, images to documents of their digest and to layers that are all there."""
    documents = {row["digest"]: row["bytes"] for row in rows["document"]}
    wrong = found.violations.append
    for digest, raw in documents.items():
        if f"sha256:{hashlib.sha256(raw).hexdigest()}" != digest:
            wrong(f"document {digest}: other bytes")
    for row in rows["image"]:
        image_id = row["image_id"]
        found.images.add(image_id)
        if image_id not in documents:
            wrong(f"image {image_id}: no config")
            continue
        diff_ids = [Digest.parse(text) for text in json.loads(documents[image_id])["rootfs"]["diff_ids"]]
        size_bytes = 0
        for number in range(len(diff_ids)):
            layer = layers.get(str(chain_id(diff_ids[: number + 1])))
            if layer is None:
                wrong(f"image {image_id}: layer {number} has no row")
            else:
                size_bytes += layer["size_bytes"]
        if row["chain_id"] != (str(chain_id(diff_ids)) if diff_ids else ""):
            wrong(f"image {image_id}: chain {row['chain_id']} is not that of its config")
        if size_bytes != row["size_bytes"]:
            wrong(f"image {image_id}: {size_bytes} bytes, its row says {row['size_bytes']}")
    for row in rows["reference"]:
        found.references[row["name"]] = row["image_id"]
        if row["image_id"] not in found.images:
            wrong(f"reference {row['name']}: no image {row['image_id']}")
        for column in ("manifest", "image_manifest"):
            if row[column] and row[column] not in documents:
                wrong(f"reference {row['name']}: no document {row[column]}")
    for row in rows["lease_item"]:
        if row["lease"] not in {lease["name"] for lease in rows["lease"]}:
            wrong(f"lease item without lease {row['lease']}")
        if row["kind"] == "chain" and row["key"] not in layers:
            wrong(f"lease {row['lease']}: no layer {row['key']}")


def _check_containers(
    data_root: Path, rows: dict[str, list[sqlite3.Row]], layers: dict[str, sqlite3.Row], found: Found
) -> None:
    """A container has its two rows, its writable layer with all directories, and a stack below it."""
    wrong = found.violations.append
    states = {row["id"]: row["state"] for row in rows["container_state"]}
    active = {row["key"]: row for row in rows["snapshot"] if row["kind"] == "active"}
    for row in rows["container"]:
        try:
            found.containers[row["name"]] = json.loads(states.pop(row["id"]))["Status"]
            json.loads(row["record"])
        except (KeyError, ValueError) as error:
            wrong(f"container {row['name']}: {error!r}")
        if row["id"] not in active:
            wrong(f"container {row['name']}: no writable layer")
    for key in states:
        wrong(f"state without container {key}")
    known = {row["id"] for row in rows["container"]}
    for key, row in active.items():
        if key not in known:
            wrong(f"writable layer without container {key}")
        if row["parent"] and row["parent"] not in layers:
            wrong(f"writable layer {key}: no layer {row['parent']}")
        directory = data_root / "snapshots" / row["directory"]
        for name, mode in (("", SNAPSHOT_MODE), ("diff", ROOT_MODE), ("work", None), ("init", ROOT_MODE)):
            try:
                status = (directory / name).stat()
            except OSError as error:
                wrong(f"writable layer {key}: {error}")
                continue
            if mode is not None and stat.S_IMODE(status.st_mode) != mode:
                wrong(f"writable layer {key}: {name or 'directory'} has mode {stat.S_IMODE(status.st_mode):o}")
        for name in INIT_LAYER:
            if not os.path.lexists(directory / "init" / name):
                wrong(f"writable layer {key}: init/{name} is missing")


def _check_rubbish(data_root: Path, rows: dict[str, list[sqlite3.Row]], settled: bool, wrong: Any) -> None:
    """Files that no row names are gone, and every row's files are there."""
    named = {row["directory"] for row in rows["snapshot"] if row["kind"] != "corrupt"}
    there = set(os.listdir(data_root / "snapshots"))
    for name in sorted(there - named):
        wrong(f"directory without a row: snapshots/{name}")
    for name in sorted(named - there):
        wrong(f"row without a directory: snapshots/{name}")
    ingests = {row["digest"].replace(":", "-", 1) for row in rows["ingest"]}
    for name in sorted(set(os.listdir(data_root / "ingest")) - ingests):
        wrong(f"staged bytes without a row: ingest/{name}")
    if settled:
        for name in sorted(os.listdir(data_root / "trash")):
            wrong(f"not removed: trash/{name}")
