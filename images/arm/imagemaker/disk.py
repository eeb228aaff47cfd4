"""The disk image: a partition table on a file, file systems made beside it and laid in. No loop device, no mount."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from imagemaker.program import run
from imagemaker.targets import DISK_ID, MIB, Partition, Target

_NAMESPACE = uuid.UUID("6a2f6a3e-0f3d-4d0e-9a94-2e0c7b1a7f10")
_GPT_TYPES = {
    "fat": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",  # ESP
    "root": "0FC63DAF-8483-4772-8E79-3D69D8477DE4",  # not the "root arm64" type: nobody mounts a slot by itself
    "ext4": "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
}
_DOS_TYPES = {"fat": "c", "root": "83", "ext4": "83", "extended": "f"}
START_MIB = 4  # U-Boot and other first stages of boards to come have room before


def identifier(target: Target, name: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{target.name} {name}"))


def layout(target: Target, data_mib: int) -> tuple[str, dict[str, tuple[int, int]], int]:
    """sfdisk's input; each partition's first byte and size; the disk's size."""
    lines = [f"label: {target.table}", "unit: sectors"]
    lines.append(f"label-id: {identifier(target, 'disk').upper() if target.table == 'gpt' else hex(DISK_ID)}")
    if target.table == "gpt":
        lines.append(f"first-lba: {2048}")
    places: dict[str, tuple[int, int]] = {}
    position = START_MIB
    logical = False
    for partition in target.partitions:
        size = data_mib if partition.name == "data" else partition.mib
        if partition.kind == "extended":
            # All that follows lies within, each behind a sector of its own: 1 MiB is left for it.
            inner = [data_mib if other.name == "data" else other.mib for other in target.partitions
                     if other.number > partition.number]  # fmt: skip
            size = sum(inner) + len(inner)
            logical = True
        elif logical:
            position += 1
        kind = _GPT_TYPES[partition.kind] if target.table == "gpt" else _DOS_TYPES[partition.kind]
        line = f"{partition.number}: start={position * 2048}, size={size * 2048}, type={kind}"
        if target.table == "gpt":
            line += f', name="{partition.name}", uuid={identifier(target, partition.name).upper()}'
        elif partition.name == "boot":
            line += ", bootable"
        lines.append(line)
        places[partition.name] = (position * MIB, size * MIB)
        if partition.kind != "extended":
            position += size
    return "\n".join(lines) + "\n", places, (position + 1) * MIB


def make_fat(partition: Partition, tree: Path, image: Path, epoch: int, size_bytes: int) -> None:
    """A FAT file system with a tree's files in it, in the order of their names, all of one time."""
    image.unlink(missing_ok=True)
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    volume = hashlib.sha256(partition.name.encode()).hexdigest()[:8]
    kind = ["-F", "32"] if size_bytes >= 64 * MIB else []
    run(["mkfs.vfat", "--invariant", *kind, "-i", volume, "-n", partition.name.upper(), image])
    for path in sorted(tree.rglob("*")):
        os.utime(path, (epoch, epoch))
    environment = {"SOURCE_DATE_EPOCH": str(epoch), "TZ": "UTC", "MTOOLS_SKIP_CHECK": "1"}
    for path in sorted(tree.rglob("*")):
        name = "::" + str(path.relative_to(tree))
        if path.is_dir():
            run(["mmd", "-i", image, name], env=environment)
        else:
            run(["mcopy", "-m", "-i", image, path, name], env=environment)


def make_ext4(target: Target, partition: Partition, tree: Path | None, image: Path, epoch: int, size: int) -> None:
    image.unlink(missing_ok=True)
    with open(image, "wb") as file:
        file.truncate(size)
    unique = identifier(target, partition.name + " file system")
    # resize=…: room for the group descriptors of a big card, so that growing stays possible while mounted.
    options = f"hash_seed={identifier(target, partition.name + ' hash')},lazy_itable_init=1,lazy_journal_init=1"
    if partition.name == "data":
        options += ",resize=67108864"
    command: list[str | Path] = ["mkfs.ext4", "-q", "-F", "-L", partition.name, "-U", unique, "-E", options, "-m", "1"]
    if partition.name != "data":
        command += ["-N", "4096"]
    run([*command, *(["-d", tree] if tree else []), image], env={"E2FSPROGS_FAKE_TIME": str(epoch)})


def assemble(
    target: Target, image: Path, parts: Mapping[str, Path], data_mib: int
) -> None:
    """Write the table and lay the parts in; holes stay holes."""
    table, places, size = layout(target, data_mib)
    image.unlink(missing_ok=True)
    with open(image, "wb") as file:
        file.truncate(size)
    run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", image], stdin=table)
    with open(image, "r+b") as disk:
        for name, part in parts.items():
            start, room = places[name]
            if part.stat().st_size > room:
                raise ValueError(f"{name}: {part.stat().st_size} bytes in a partition of {room}")
            with open(part, "rb") as source:
                offset = 0
                while chunk := source.read(MIB):
                    if chunk.count(0) != len(chunk):
                        disk.seek(start + offset)
                        disk.write(chunk)
                    offset += len(chunk)
