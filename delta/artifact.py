"""Deltas of images as OCI artifacts: one blob for each changed layer, a manifest that a client can choose by."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from delta import native, tardiff
from delta.base import LayerTar, TarBase
from delta.errors import Malformed, WrongBase, WrongResult
from delta.maker import LayerMaker, Line, Settings
from delta.match import BaseIndex, survey
from delta.oci import (
    MANIFEST,
    Image,
    LayoutWriter,
    blob_path,
    compact,
    open_layer,
    parse_json,
    read_blob,
    sha256,
)

ARTIFACT_TYPE = "application/vnd.balenapy.image.delta.v1"
CONFIG_TYPE = "application/vnd.balenapy.image.delta.config.v1+json"
LAYER_TYPE = "application/vnd.balenapy.layer.delta.v1"
BASE_ANNOTATION = "vnd.balenapy.delta.base"  # config digest (image ID) of the base
TARGET_ANNOTATION = "vnd.balenapy.delta.target"  # config digest of the target
VERSION = 1


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of a changed layer."""

    layer: int
    tar_bytes: int
    blob_bytes: int
    delta_bytes: int
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What `make` made. A device fetches manifest and blobs; the config is for people and tools."""

    layers: tuple[LayerReport, ...]
    manifest_bytes: int
    config_bytes: int

    @property
    def delta_bytes(self) -> int:
        """What crosses the network to a device."""
        return self.manifest_bytes + sum(report.delta_bytes for report in self.layers)


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta of an image, in a layout."""

    path: Path
    base_config: str
    target_config: str
    base_diff_ids: tuple[str, ...]
    target_diff_ids: tuple[str, ...]
    layers: dict[int, str]  # layer of the target -> blob

    def blob(self, layer: int) -> Path:
        return blob_path(self.path, self.layers[layer])


def missing_layers(base_diff_ids: Sequence[str], target_diff_ids: Sequence[str]) -> list[int]:
    """The layers of a target that its base does not have: those that a delta has blobs for, in this order."""
    return [number for number, diff_id in enumerate(target_diff_ids) if diff_id not in base_diff_ids]


def make(
    old: Image,
    new: Image,
    output: Path,
    settings: Settings,
    progress: Callable[[int, int, int], object] = lambda layer, done, total: None,
) -> Report:
    """Write the delta from one image to another as a layout."""
    writer = LayoutWriter(output)
    layers, reports = [], []
    with ExitStack() as stack:
        index: BaseIndex | None = None
        for number in missing_layers(old.diff_ids, new.diff_ids):
            if index is None:
                index = BaseIndex(TarBase([stack.enter_context(open_layer(old, n)) for n in range(len(old.layers))]))
            with open_layer(new, number) as target:
                total = target.total
                maker = LayerMaker(index, old.diff_ids, target, settings)
                made = maker.make(lambda done, number=number, total=total: progress(number, done, total))  # type: ignore[misc]
            layers.append({"mediaType": LAYER_TYPE, "digest": writer.blob(made.data), "size": len(made.data)})
            reports.append(LayerReport(number, total, new.blob_bytes(number), len(made.data), made.lines))
    config = compact(
        {
            "version": VERSION,
            "base": old.config_digest,
            "baseDiffIds": old.diff_ids,
            "targetDiffIds": new.diff_ids,
            "madeBy": "balenapy-delta",
            "effort": "fast" if settings.fast else "default",
        }
    )
    manifest = compact(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": writer.blob(config), "size": len(config)},
            "layers": layers,
            **(
                {"subject": {"mediaType": MANIFEST, "digest": sha256(new.manifest), "size": len(new.manifest)}}
                if new.manifest
                else {}
            ),
            "annotations": {BASE_ANNOTATION: old.config_digest, TARGET_ANNOTATION: new.config_digest},
        }
    )
    digest = writer.blob(manifest)
    writer.close(
        [{"mediaType": MANIFEST, "artifactType": ARTIFACT_TYPE, "digest": digest, "size": len(manifest)}]
    )
    return Report(tuple(reports), len(manifest), len(config))


def open_delta(path: Path) -> Delta:
    """The delta in a layout.

    Raises:
        Malformed: there is none.
    """
    try:
        entries = parse_json((path / "index.json").read_bytes(), f"{path}/index.json")["manifests"]
        entry = next((each for each in entries if each.get("artifactType") == ARTIFACT_TYPE), None)
        if entry is None:
            raise Malformed(f"{path}: no delta")
        manifest = parse_json(read_blob(path, entry["digest"]), f"{path}: manifest")
        config = parse_json(read_blob(path, manifest["config"]["digest"]), f"{path}: config")
        annotations = manifest["annotations"]
        missing = missing_layers(config["baseDiffIds"], config["targetDiffIds"])
        blobs = [str(layer["digest"]) for layer in manifest["layers"] if layer["mediaType"] == LAYER_TYPE]
        if len(blobs) != len(missing):
            raise Malformed(f"{path}: {len(blobs)} blobs for {len(missing)} layers")
        layers = dict(zip(missing, blobs, strict=True))
        return Delta(
            path,
            str(annotations[BASE_ANNOTATION]),
            str(annotations[TARGET_ANNOTATION]),
            tuple(map(str, config["baseDiffIds"])),
            tuple(map(str, config["targetDiffIds"])),
            layers,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"{path}: not a delta: {error!r}") from None


def rebuild(delta: Delta, layer: int, base: TarBase, budget_bytes: int) -> Iterator[bytes]:
    """A layer's tar out of its delta; when this returns without an error, it is that of the diff_id."""
    with delta.blob(layer).open("rb") as file:

        def read_at(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        head, _ = native.read_head(read_at)
        if "sha256:" + head.target_sha256.hex() != delta.target_diff_ids[layer]:
            raise WrongResult(f"{delta.path}: the blob of layer {layer} is for another layer")
        check = native.base_check(delta.base_diff_ids)
        yield from native.apply(read_at, base, budget_bytes=budget_bytes, check=check)


# tar-diff, as the image deltas specification lays it out: from one layer to another, no file of others

TAR_DIFF_TYPE = "application/vnd.tar-diff"
TAR_DIFF_TARGET = "io.github.containers.delta.target"
TAR_DIFF_FROM = "io.github.containers.delta.from"
TAR_DIFF_TO = "io.github.containers.delta.to"


@dataclass(frozen=True, slots=True)
class TarDiff:
    """The tar-diff from one layer to another, by their diff_ids."""

    path: Path
    source: str
    target: str


def make_tar_diffs(old: Image, new: Image, output: Path) -> int:
    """Write tar-diffs of all missing layers as a layout; the bytes a device fetches."""
    writer = LayoutWriter(output)
    layers = []
    with ExitStack() as stack:
        tars = [stack.enter_context(open_layer(old, layer)) for layer in range(len(old.layers))]
        indexes = [BaseIndex(TarBase([tar])) for tar in tars]
        for number in missing_layers(old.diff_ids, new.diff_ids):
            with open_layer(new, number) as target:
                paths = {known.path for known in survey(target)}
                alike = [sum(known.path in paths for known in index.known[0]) for index in indexes]
                if not any(alike):
                    continue  # nothing of it is in the base: the layer itself is as good
                source = alike.index(max(alike))
                out = io.BytesIO()
                tardiff.make(indexes[source], target, out.write)
            annotations = {TAR_DIFF_FROM: old.diff_ids[source], TAR_DIFF_TO: new.diff_ids[number]}
            digest, size = writer.blob(out.getvalue()), len(out.getvalue())
            layers.append({"mediaType": TAR_DIFF_TYPE, "digest": digest, "size": size, "annotations": annotations})
    annotations = {TAR_DIFF_TARGET: sha256(new.manifest)}
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": writer.blob(b"{}"), "size": 2}
    manifest = compact(
        {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers, "annotations": annotations}
    )
    writer.close(
        [{"mediaType": MANIFEST, "digest": writer.blob(manifest), "size": len(manifest), "annotations": annotations}]
    )
    return len(manifest) + sum(int(str(layer["size"])) for layer in layers)


def open_tar_diffs(path: Path) -> list[TarDiff]:
    """The tar-diffs in a layout; an empty list when it has none."""
    found = []
    try:
        for entry in parse_json((path / "index.json").read_bytes(), f"{path}/index.json")["manifests"]:
            if TAR_DIFF_TARGET not in entry.get("annotations", {}):
                continue
            for layer in parse_json(read_blob(path, entry["digest"]), f"{path}: manifest")["layers"]:
                source, target = (str(layer["annotations"][key]) for key in (TAR_DIFF_FROM, TAR_DIFF_TO))
                found.append(TarDiff(blob_path(path, layer["digest"]), source, target))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"{path}: not a delta: {error!r}") from None
    return found


def rebuild_tar_diff(delta: TarDiff, old: Image, budget_bytes: int) -> Iterator[bytes]:
    """A layer's tar; when this returns without an error, it is that of the diff_id."""
    if delta.source not in old.diff_ids:
        raise WrongBase(f"{old.path}: has no layer {delta.source}")
    digest = hashlib.sha256()
    with open_layer(old, old.diff_ids.index(delta.source)) as tar, delta.path.open("rb") as file:
        files = tardiff.MergedFiles(BaseIndex(TarBase([tar])))
        for piece in tardiff.apply(file.read, files, budget_bytes=budget_bytes):
            digest.update(piece)
            yield piece
    if "sha256:" + digest.hexdigest() != delta.target:
        raise WrongResult(f"{delta.path}: what came out is not {delta.target}")


def open_base(stack: ExitStack, delta: Delta, old: Image) -> TarBase:
    """The base of a delta, all layers uncompressed.

    Raises:
        WrongBase: it is another image.
    """
    if old.diff_ids != delta.base_diff_ids:
        raise WrongBase(f"{old.path}: not the base of this delta, {delta.base_config}")
    tars: list[LayerTar] = [stack.enter_context(open_layer(old, layer)) for layer in range(len(old.layers))]
    return TarBase(tars)
