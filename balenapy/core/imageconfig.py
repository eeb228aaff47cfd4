"""Image configs that we write: of commits and of imports. What is written here is what the image ID is the digest of.

Keys are in Go's order: sorted at the top, as moby's `Image.MarshalJSON` has them, in the order of the structs below.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from balenapy.core import gojson, wire
from balenapy.core.container import ContainerConfig
from balenapy.core.digest import Digest
from balenapy.core.manifest import HistoryEntry, ImageConfig, Platform
from balenapy.version import ENGINE_VERSION

# Of a tar without entries: such a layer is left out, and history says so. Source: moby layer.DigestSHA256EmptyTar
EMPTY_TAR = Digest("sha256", "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef")


@dataclass(frozen=True, slots=True)
class Child:
    """What is laid on top of an image."""

    diff_id: Digest
    container_id: str
    container_config: ContainerConfig
    config: ContainerConfig
    author: str = ""
    comment: str = ""
    created_ns: int = 0


def child_config(parent: ImageConfig | None, child: Child, platform: Platform) -> bytes:
    """The config of an image made from a container; the parent's layers and history go on in it.

    Source: moby image/image.go NewChildImage.
    """
    is_empty = child.diff_id == EMPTY_TAR
    diff_ids = [str(diff_id) for diff_id in (parent.diff_ids if parent is not None else ())]
    history = [_show(entry) for entry in (parent.history if parent is not None else ())]
    created = wire.rfc3339nano(child.created_ns)
    history.append(
        _show(
            HistoryEntry(
                created,
                " ".join(child.container_config.cmd or ()),
                child.comment,
                child.author,
                is_empty,
            )
        )
    )
    made_for = parent.platform if parent is not None else platform
    return _encode(
        {
            "architecture": made_for.architecture or platform.architecture,
            "variant": made_for.variant,
            "author": child.author,
            "config": wire.encode(child.config),
            "container": child.container_id,
            "container_config": wire.encode(child.container_config),
            "created": created,
            "docker_version": ENGINE_VERSION,
            "history": history,
            "os": "linux",
            "os.version": made_for.os_version,
            "rootfs": {"type": "layers", "diff_ids": diff_ids if is_empty else [*diff_ids, str(child.diff_id)]},
        }
    )


def restored_config(parent: ImageConfig | None, target: ImageConfig, config: ContainerConfig) -> bytes:
    """The config of a step that another image has in its history: that image as it was then.

    Source: moby image/cache/cache.go restoreCachedImage.
    """
    length = len(parent.history) if parent is not None else 0
    entry = target.history[length]
    diff_ids = [str(diff_id) for diff_id in (parent.diff_ids if parent is not None else ())]
    if not entry.empty_layer:
        diff_ids.append(str(target.diff_ids[len(diff_ids)]))
    return _encode(
        {
            "architecture": target.architecture,
            "variant": target.variant,
            "author": target.author,
            "config": wire.encode(config),
            "container_config": wire.encode(ContainerConfig()),
            "created": entry.created or wire.ZERO_TIME,
            "docker_version": ENGINE_VERSION,
            "history": [_show(each) for each in target.history[: length + 1]],
            "os": target.os,
            "os.version": target.os_version,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    )


def squashed_config(
    image: ImageConfig, parent_id: str, base: ImageConfig | None, diff_id: Digest, created_ns: int
) -> bytes:
    """The config of an image whose layers above its base are one; the steps stay in history, without layers.

    Source: moby daemon/images/image_squash.go.
    """
    document = json.loads(image.raw)
    length = len(base.history) if base is not None else 0
    diff_ids = [str(known) for known in (base.diff_ids if base is not None else ())]
    created = wire.rfc3339nano(created_ns)
    if base is not None:
        comment = f"merge {image.image_id} to {base.image_id}"
    else:
        comment = f"create new from {image.image_id}"
    steps = [
        _show(entry if number < length else replace(entry, empty_layer=True))
        for number, entry in enumerate(image.history)
    ]
    document["history"] = [*steps, _show(HistoryEntry(created, "", comment, "", False))]
    document["created"] = created
    document["parent"] = parent_id
    document["rootfs"] = {"type": "layers", "diff_ids": [*diff_ids, str(diff_id)]}
    return _encode(document)


def imported_config(
    diff_id: Digest, config: ContainerConfig, message: str, created_ns: int, platform: Platform
) -> bytes:
    """The config of an image whose files came as one tar. Source: moby daemon/images/image_import.go."""
    created = wire.rfc3339nano(created_ns)
    return _encode(
        {
            "architecture": platform.architecture,
            "variant": platform.variant,
            "comment": message,
            "config": wire.encode(config),
            "container_config": wire.encode(ContainerConfig()),
            "created": created,
            "docker_version": ENGINE_VERSION,
            "history": [_show(HistoryEntry(created, "", message, "", False))],
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [str(diff_id)]},
        }
    )


def _show(entry: HistoryEntry) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "author": entry.author,
        "created_by": entry.created_by,
        "comment": entry.comment,
        "empty_layer": entry.empty_layer,
    }
    return {"created": entry.created or wire.ZERO_TIME, **{key: value for key, value in fields.items() if value}}


def _encode(document: dict[str, Any]) -> bytes:
    shown = {key: value for key, value in sorted(document.items()) if value not in ("", None)}
    return gojson.dumps_escaped(shown)
