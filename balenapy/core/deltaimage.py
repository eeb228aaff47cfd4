"""balena's delta images: ordinary images whose layers are librsync deltas, and whose labels say from what to what.

    io.resin.delta.base      the image that the deltas start from, all its layer tars one after the other
    io.resin.delta.config    the target's config, verbatim: its digest is the target's ID

Layer n of the delta image gives layer n of the target: its tar has one entry, whose content is the delta. A layer that
base and target have in common, at the same place and with everything below it, is an empty tar.

Source: balena-engine daemon/images/image_delta.go, distribution/pull_v2.go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from balenapy.core import gojson
from balenapy.core.deltaplan import COPY, LIBRSYNC, Base, DeltaPlan, Way
from balenapy.core.digest import Digest
from balenapy.core.manifest import ImageConfig, Manifest, parse_image_config
from balenapy.core.progress import human_size
from balenapy.errors import EngineError, SystemFailure

BASE_LABEL = "io.resin.delta.base"
CONFIG_LABEL = "io.resin.delta.config"
EMPTY_LAYER = bytes(1024)  # a tar without entries


@dataclass(frozen=True, slots=True)
class DeltaImage:
    """An image whose layers are librsync deltas from the whole of another image, lowest layer first."""

    target: ImageConfig
    base: str  # image_id; "": its layers are plain, only the config is another

    def ways(self, manifest: Manifest, base: Base | None, missing: Sequence[int]) -> DeltaPlan:
        """All missing layers as deltas: there is no other way."""
        size_bytes = sum(manifest.layers[position].size_bytes for position in missing)
        if base is None:
            return DeltaPlan({}, size_bytes, size_bytes)
        ways = {}
        for position in missing:
            common = self.target.diff_ids[: position + 1]
            if base.places and base.diff_ids[: position + 1] == tuple(map(str, common)):
                # Its layer in the delta image is empty, and the base is in another store.
                place = base.places[position]
                ways[position] = Way(COPY, place.diff_id, base.chain_ids[position], None, (place,))
            else:
                ways[position] = Way(LIBRSYNC, base.image_id, base.chain_id, manifest.layers[position], base.places)
        return DeltaPlan(ways, sum(way.size_bytes for way in ways.values()))


def delta_image(config: ImageConfig) -> DeltaImage | None:
    """What a config says of the image that its layers are deltas of; None for an ordinary image.

    Raises: SystemFailure, InvalidDocument.
    """
    labels = config.config.get("Labels") or {}
    base, target = labels.get(BASE_LABEL, ""), labels.get(CONFIG_LABEL, "")
    if not base and not target:
        return None
    if base:
        try:
            Digest.parse(base)
        except EngineError as error:
            raise SystemFailure(f'parsing base image "{base}": {error.message}') from error
    # The label's text is the config: its digest is the target's ID.
    return DeltaImage(parse_image_config(target.encode()) if target else config, base)


def common_layers(base: ImageConfig, target: ImageConfig) -> int:
    """How many layers both have from the bottom up."""
    count = 0
    for here, there in zip(base.diff_ids, target.diff_ids, strict=False):
        if here != there:
            break
        count += 1
    return count


def encode_config(base_id: str, target: ImageConfig, diff_ids: Sequence[Digest], created: str) -> bytes:
    """The config of a delta image.

    Raises: SystemFailure, when the target's config cannot be a label's text.
    """
    try:
        text = target.raw.decode()
    except UnicodeDecodeError as error:
        raise SystemFailure("the target's config is not UTF-8: it cannot stand in a label") from error
    return gojson.dumps_escaped(
        {
            "architecture": "",
            "config": {"Labels": {BASE_LABEL: base_id, CONFIG_LABEL: text}},
            "created": created,
            "os": "",
            "rootfs": {"type": "layers", "diff_ids": [str(diff_id) for diff_id in diff_ids]},
        }
    )


def improvement(normal_bytes: int, delta_bytes: int) -> str:
    """What is said when a delta image is made."""
    ratio = normal_bytes / delta_bytes if delta_bytes else float("inf")
    return (
        f"Normal size: {human_size(normal_bytes)}, Delta size: {human_size(delta_bytes)}, {ratio:.2f}x improvement"
    )
