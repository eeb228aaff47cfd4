"""A second store whose images may be bases of deltas: `--delta-data-root`, on balenaOS the one of the host system.

It is only read, and nothing of it is listed. Two layouts are known:

    ours                 snapshots/*/: layer.json says which layer it is, image-*.json which images end with it
    balena-engine's      image/<driver>/imagedb/content/sha256/<id>: configs; layerdb/sha256/<chain>/{diff,parent,
                         cache-id,tar-split.json.gz}: layers; <driver>/: their files

Nothing in it is believed: what is made of a base has to have its digest.

Source: balena-engine distribution/config.go GetTarSeekStream; moby layer/filestore.go, image/fs.go.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from balenapy.core.deltaplan import LayerPlace
from balenapy.core.manifest import DOCUMENT_MAX_BYTES, ImageConfig, parse_image_config
from balenapy.core.sidecar import LAYER_FILE, SIDECAR_MAX_BYTES, decode_image, decode_layer
from balenapy.errors import EngineError

log = logging.getLogger(__name__)

DRIVERS = ("overlay2", "aufs")
SMALL_BYTES = 4096  # a digest, a cache-id


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of that store, all of its layers there."""

    config: ImageConfig
    places: tuple[LayerPlace, ...]  # lowest first


class DeltaStore:
    """See the module. Every method blocks."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def images(self) -> list[StoredImage]:
        """All images that are whole; a store that cannot be read has none."""
        found = []
        try:
            for raw, places in (*self._ours(), *self._balena_engines()):
                config = parse_image_config(raw)
                layers = [places.get(str(chain_id)) for chain_id in config.chain_ids]
                if layers and None not in layers:
                    found.append(StoredImage(config, tuple(layer for layer in layers if layer is not None)))
        except (OSError, EngineError) as error:
            log.warning("delta store cannot be read path=%s error=%s", self._root, error)
        return found

    def _ours(self) -> Iterator[tuple[bytes, dict[str, LayerPlace]]]:
        places: dict[str, LayerPlace] = {}
        configs: dict[str, bytes] = {}
        for directory in sorted(_listed(self._root / "snapshots")):
            try:
                layer = decode_layer(_read(directory / LAYER_FILE, SIDECAR_MAX_BYTES))
            except (OSError, EngineError):
                continue  # a container's, or unfinished
            places[str(layer.chain_id)] = LayerPlace(str(layer.diff_id), str(directory))
            for path in directory.glob("image-*.json"):
                image = decode_image(_read(path, SIDECAR_MAX_BYTES))
                configs[str(image.image_id)] = image.documents[0].raw
        for raw in configs.values():
            yield raw, places

    def _balena_engines(self) -> Iterator[tuple[bytes, dict[str, LayerPlace]]]:
        for driver in DRIVERS:
            images = self._root / "image" / driver
            places: dict[str, LayerPlace] = {}
            for directory in _listed(images / "layerdb/sha256"):
                try:
                    diff_id, cache_id = (
                        _read(directory / name, SMALL_BYTES).decode().strip() for name in ("diff", "cache-id")
                    )
                except (OSError, ValueError):
                    continue  # unfinished
                if "/" in cache_id or not cache_id:
                    continue
                home = self._root / driver
                files = home / cache_id / "diff" if driver == "overlay2" else home / "diff" / cache_id
                places[f"sha256:{directory.name}"] = LayerPlace(
                    diff_id, str(files), str(directory / "tar-split.json.gz")
                )
            for path in _listed(images / "imagedb/content/sha256"):
                yield _read(path, DOCUMENT_MAX_BYTES), places


def _listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most)
