"""balena's delta images as files: an image whose layers are librsync deltas, and whose labels say from what to what.

Theory
------
Layer n of the delta image gives layer n of the target: its tar has one member, whose content is a librsync delta from
all layer tars of the base, one after the other. What both images have alike from the bottom up is an empty tar. The
label `io.resin.delta.config` is the target's config verbatim: its digest is the target's ID.

Manifests are docker's schema 2: balena-engine takes deltas of no other.

Source: balena-engine daemon/images/image_delta.go, distribution/pull_v2.go.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from delta import librsync
from delta.balena import LayerDelta
from delta.base import LayerTar, Stream, TarBase
from delta.errors import Malformed, WrongBase, WrongResult
from delta.match import BaseIndex
from delta.oci import Image, LayoutWriter, compact, open_image, open_layer, parse_json
from delta.registry import DOCKER_MANIFEST

BASE_LABEL = "io.resin.delta.base"
CONFIG_LABEL = "io.resin.delta.config"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"
MEMBER = "delta"
_EMPTY_TAR = bytes(1024)
_COMPRESS_LEVEL = 9


# Making


def write(writer: LayoutWriter, old: Image, new: Image) -> int:
    """Write the delta image from one image to another into a layout; the bytes a device fetches."""
    common = 0
    while common < min(len(old.diff_ids), len(new.diff_ids)) and old.diff_ids[common] == new.diff_ids[common]:
        common += 1
    layers: list[dict[str, Any]] = []
    diff_ids = []
    with ExitStack() as stack:
        tars = [stack.enter_context(open_layer(old, layer)) for layer in range(len(old.layers))]
        index = BaseIndex(TarBase(tars))
        for number in range(len(new.layers)):
            tar = _EMPTY_TAR
            if number >= common:
                with open_layer(new, number) as target:
                    tar = _delta_tar(index, target)
            diff_ids.append("sha256:" + hashlib.sha256(tar).hexdigest())
            blob = gzip.compress(tar, _COMPRESS_LEVEL, mtime=0)
            layers.append({"mediaType": LAYER_TYPE, "size": len(blob), "digest": writer.blob(blob)})
    target_config = parse_json(new.config, f"{new.name}: config")
    config = compact(
        {
            "created": target_config.get("created", "1970-01-01T00:00:00Z"),
            "architecture": "",
            "os": "",
            "config": {"Labels": {BASE_LABEL: old.config_digest, CONFIG_LABEL: new.config.decode()}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    )
    manifest = compact(
        {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": {"mediaType": CONFIG_TYPE, "size": len(config), "digest": writer.blob(config)},
            "layers": layers,
        }
    )
    writer.manifest(manifest, {"mediaType": DOCKER_MANIFEST, "annotations": {BASE_LABEL: old.config_digest}})
    return len(manifest) + len(config) + sum(int(layer["size"]) for layer in layers)


def _delta_tar(index: BaseIndex, target: LayerTar) -> bytes:
    with TemporaryFile(prefix="balenapy-delta-") as file:
        LayerDelta(index, target, file.write).make()
        size = file.tell()
        file.seek(0)
        info = tarfile.TarInfo(MEMBER)
        info.mode, info.size = 0o600, size
        header = info.tobuf(tarfile.GNU_FORMAT)
        return header + file.read() + bytes(-size % tarfile.BLOCKSIZE) + bytes(2 * tarfile.BLOCKSIZE)


# Reading


@dataclass(frozen=True, slots=True)
class DeltaImage:
    """A delta image in a layout or archive."""

    image: Image
    base_config: str
    target_diff_ids: tuple[str, ...]


def find(path: Path, platform: str | None = None) -> DeltaImage | None:
    """The delta image in a layout or archive, None if what is there is none.

    Raises:
        Malformed: it is one, and is not as it must be.
    """
    try:
        image = open_image(path, platform)
    except (Malformed, OSError):
        return None
    labels = (parse_json(image.config, f"{path}: config").get("config") or {}).get("Labels") or {}
    base, config = labels.get(BASE_LABEL), labels.get(CONFIG_LABEL)
    if not isinstance(base, str) or not isinstance(config, str):
        return None
    rootfs = parse_json(config.encode(), f"{path}: label {CONFIG_LABEL}").get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or len(diff_ids) != len(image.layers):
        raise Malformed(f"{path}: layers and label {CONFIG_LABEL} do not match")
    return DeltaImage(image, base, tuple(map(str, diff_ids)))


def rebuild(delta: DeltaImage, old: Image) -> Iterator[tuple[str, Iterator[bytes] | None]]:
    """(diff_id, pieces of the tar) of each layer of the target; no pieces of those that the base has at the same place.

    Raises:
        WrongBase: the base is another image.
    """
    if old.config_digest != delta.base_config:
        raise WrongBase(f"{old.name}: not the base of this delta, {delta.base_config}")
    with ExitStack() as stack:
        stream = Stream([stack.enter_context(open_layer(old, layer)) for layer in range(len(old.layers))])
        alike = True
        for number, diff_id in enumerate(delta.target_diff_ids):
            alike = alike and number < len(old.diff_ids) and old.diff_ids[number] == diff_id
            if alike:
                yield diff_id, None
                continue
            with open_layer(delta.image, number) as tar:
                yield diff_id, _patched(stream, tar, diff_id)


def _patched(stream: Stream, tar: LayerTar, diff_id: str) -> Iterator[bytes]:
    if not len(tar):
        raise Malformed(f"delta of layer {diff_id}: an empty tar")
    member = tar.member(0)
    at = member.content

    def read(size: int) -> bytes:
        nonlocal at
        data = tar.pread(at, min(size, member.content + member.size - at))
        at += len(data)
        return data

    digest = hashlib.sha256()
    for piece in librsync.patch(read, stream.pread, stream.total):
        digest.update(piece)
        yield piece
    if f"sha256:{digest.hexdigest()}" != diff_id:
        raise WrongResult(f"what came out is not layer {diff_id}")
