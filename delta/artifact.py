"""Deltas of images as OCI artifacts: one blob for each changed layer, a manifest that a client can choose by."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta import native, tardiff
from delta.base import LayerTar, TarBase
from delta.errors import Malformed, Unsupported, WrongBase, WrongResult
from delta.maker import LayerMaker, Line, Settings
from delta.match import BaseIndex, survey
from delta.oci import Image, LayoutWriter, blob_path, compact, open_layer, parse_json, read_blob
from delta.registry import MANIFEST, Document

ARTIFACT_TYPE = "application/vnd.balenapy.image.delta.v1"
CONFIG_TYPE = "application/vnd.balenapy.image.delta.config.v1+json"
LAYER_TYPE = "application/vnd.balenapy.layer.delta.v1"
BASE_ANNOTATION = "vnd.balenapy.delta.base"  # config digest (image ID) of the base
CODECS_ANNOTATION = "vnd.balenapy.delta.codecs"  # only when it is made with less than all
TARGET_ANNOTATION = "vnd.balenapy.delta.target"  # config digest of the target, where no subject says it
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
    manifest: Document
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
    report = write(writer, old, new, settings, progress)
    writer.close()
    return report


def write(
    writer: LayoutWriter,
    old: Image,
    new: Image,
    settings: Settings,
    progress: Callable[[int, int, int], object] = lambda layer, done, total: None,
) -> Report:
    """Write the delta from one image to another into a layout that may hold others too."""
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
            reports.append(LayerReport(number, total, new.layer_bytes[number], len(made.data), made.lines))
    config = compact(
        {
            "version": VERSION,
            "base": old.config_digest,
            "target": new.config_digest,
            **({"baseManifest": old.manifest.digest} if old.manifest.data else {}),
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
            **({"subject": subject_of(new.manifest)} if new.manifest.data else {}),
            "annotations": {
                BASE_ANNOTATION: old.config_digest,
                **({} if new.manifest.data else {TARGET_ANNOTATION: new.config_digest}),
                **_told_codecs(settings),
            },
        }
    )
    writer.manifest(manifest, {"artifactType": ARTIFACT_TYPE})
    return Report(tuple(reports), len(manifest), len(config))


def subject_of(manifest: Document) -> dict[str, Any]:
    """The descriptor by which a delta names its target."""
    return {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.data)}


def entries_of(path: Path) -> list[dict[str, Any]]:
    """The descriptors in a layout's index.

    Raises:
        Malformed: no layout.
    """
    entries = parse_json((path / "index.json").read_bytes(), f"{path}/index.json").get("manifests")
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise Malformed(f"{path}/index.json: no list of manifests")
    return entries


def open_deltas(path: Path) -> list[Delta]:
    """All deltas in a layout.

    Raises:
        Malformed: one of them is none.
    """
    try:
        return [
            _delta(path, entry["digest"]) for entry in entries_of(path) if entry.get("artifactType") == ARTIFACT_TYPE
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"{path}: not a delta: {error!r}") from None


def _told_codecs(settings: Settings) -> dict[str, str]:
    return {} if settings.codecs == Settings().codecs else {CODECS_ANNOTATION: ",".join(sorted(settings.codecs))}


def open_delta(path: Path, base_diff_ids: Sequence[str] | None = None) -> Delta:
    """The delta in a layout; of several, the one for a base.

    Raises:
        Malformed: there is none, or several and no base. WrongBase: none is for this base.
    """
    deltas = open_deltas(path)
    if not deltas:
        raise Malformed(f"{path}: no delta")
    fitting = [each for each in deltas if each.base_diff_ids == tuple(base_diff_ids or ())]
    if fitting:
        return fitting[0]
    if len(deltas) == 1:
        return deltas[0]
    if base_diff_ids is None:
        raise Malformed(f"{path}: {len(deltas)} deltas")
    raise WrongBase(f"{path}: none of {len(deltas)} deltas is for this base")


def _delta(path: Path, digest: str) -> Delta:
    data = read_blob(path, digest)
    manifest = parse_json(data, f"{path}: manifest")
    config = parse_json(read_blob(path, manifest["config"]["digest"]), f"{path}: config")
    missing = missing_layers(config["baseDiffIds"], config["targetDiffIds"])
    blobs = [str(layer["digest"]) for layer in manifest["layers"] if layer["mediaType"] == LAYER_TYPE]
    if len(blobs) != len(missing):
        raise Malformed(f"{path}: {len(blobs)} blobs for {len(missing)} layers")
    return Delta(
        path,
        Document(data, MANIFEST),
        str(config["base"]),
        str(config["target"]),
        tuple(map(str, config["baseDiffIds"])),
        tuple(map(str, config["targetDiffIds"])),
        dict(zip(missing, blobs, strict=True)),
    )


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
TAR_DIFF_CONFIG_TYPE = "application/vnd.redhat.delta.config.v1+json"
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
    size = write_tar_diffs(writer, old, new)
    writer.close()
    return size


def write_tar_diffs(writer: LayoutWriter, old: Image, new: Image) -> int:
    """Write tar-diffs of all missing layers into a layout that may hold others too."""
    if not new.manifest.data:
        raise Unsupported(f"{new.name}: a tar-diff names the manifest of its target, and archives have none")
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
    annotations = {TAR_DIFF_TARGET: new.manifest.digest}
    config = {"mediaType": TAR_DIFF_CONFIG_TYPE, "digest": writer.blob(b"{}"), "size": 2}
    manifest = compact(
        {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers, "annotations": annotations}
    )
    writer.manifest(manifest, {"annotations": annotations})
    return len(manifest) + sum(int(str(layer["size"])) for layer in layers)


def open_tar_diffs(path: Path) -> list[TarDiff]:
    """The tar-diffs in a layout; an empty list when it has none."""
    found = []
    try:
        for entry in entries_of(path):
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
        raise WrongBase(f"{old.name}: has no layer {delta.source}")
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
        raise WrongBase(f"{old.name}: not the base of this delta, {delta.base_config}")
    tars: list[LayerTar] = [stack.enter_context(open_layer(old, layer)) for layer in range(len(old.layers))]
    return TarBase(tars)
