"""The host update: one tar that holds a slot's files, described by its first member.

    manifest.json    {"format", "target", "release", "command_line", "root": {"bytes", "sha256"},
                     "files": {name: {"bytes", "sha256"}}, and of a difference: "base": {"bytes", "sha256"},
                     "kept": files that the running slot has already}
    manifest.sig     optional: Ed25519 over manifest.json
    boot/…           kernel, initrd, device trees: as they lie in a slot
    root.squashfs    or root.delta: librsync's format against the root of the release in "base"
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from imagemaker.program import run
from imagemaker.targets import Target

FORMAT = 1


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_update(
    target: Target, release: str, slot_tree: Path, root: Path, out: Path, epoch: int, command_line: str,
    base: Path | None = None, key: Path | None = None, work: Path | None = None,
) -> str:  # fmt: skip
    """Write the bundle; with `base`, the root image of an older release, only the difference to it.

    Returns: the digest of its manifest, which says all the others. Raises: Failed.
    """
    members = {f"boot/{path.relative_to(slot_tree)}": path for path in sorted(slot_tree.rglob("*")) if path.is_file()}
    manifest: dict[str, Any] = {"format": FORMAT, "target": target.name, "release": release,
                                "command_line": command_line, "root": describe(root)}  # fmt: skip
    work = work or out.parent
    if base is not None:
        signature, delta = work / "base.signature", work / "root.delta"
        run(["rdiff", "-H", "blake2", "-b", "2048", "-S", "16", "signature", base, signature])
        run(["rdiff", "delta", signature, root, delta])
        manifest["base"] = describe(base)
        if target.switch == "systemd-boot":  # elsewhere the running slot's files are not at hand
            older = boot_files(base.with_suffix(".update"))
            kept = {name: older[name] for name, path in members.items() if older.get(name) == describe(path)}
            members = {name: path for name, path in members.items() if name not in kept}
            manifest["kept"] = kept
        members["root.delta"] = delta
    else:
        members["root.squashfs"] = root
    manifest["files"] = {name: describe(path) for name, path in members.items()}
    text = (json.dumps(manifest, indent=1) + "\n").encode()
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as archive:
        add(archive, "manifest.json", text, epoch)
        if key is not None:
            (work / "manifest.json").write_bytes(text)
            run(["openssl", "pkeyutl", "-sign", "-inkey", key, "-rawin", "-in", work / "manifest.json", "-out",
                 work / "manifest.sig"])  # fmt: skip
            add(archive, "manifest.sig", (work / "manifest.sig").read_bytes(), epoch)
        for name, path in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = path.stat().st_size, epoch, 0o644
            with open(path, "rb") as file:
                archive.addfile(info, file)
    return "sha256:" + hashlib.sha256(text).hexdigest()


def boot_files(bundle: Path) -> dict[str, Any]:
    """What an older release's update, if it lies beside its root, says of the files that a slot boots from."""
    if not bundle.exists():
        return {}
    with tarfile.open(bundle) as archive:
        file = archive.extractfile("manifest.json")
        return dict(json.load(file)["files"]) if file else {}


def add(archive: tarfile.TarFile, name: str, data: bytes, epoch: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), epoch, 0o644
    archive.addfile(info, io.BytesIO(data))
