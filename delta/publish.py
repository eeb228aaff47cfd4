"""Deltas in a registry: putting them where a device looks, finding them, dropping those that are of no more use.

Theory
------
A delta is a manifest that refers to its target (`subject`), in the target's repository. A registry with the referrers
API lists it by itself and says so when the manifest is stored (`OCI-Subject`). For one without, whoever stores it
keeps an index under the tag `sha256-HEX` of the target, in which the same descriptors stand. tar-diffs are found
through one index for the whole repository, tagged `_deltaindex`, which has one manifest for each target.

These indexes are read, changed and written back. Two who do that at once may lose one change, so what was written is
read again, and written again if need be.

Sources: OCI distribution-spec 1.1, "Pushing manifests with subject"; the image deltas specification (tar-diff).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta import artifact
from delta.artifact import ARTIFACT_TYPE, BASE_ANNOTATION, TAR_DIFF_FROM, TAR_DIFF_TARGET, TAR_DIFF_TO
from delta.balenaimage import BASE_LABEL
from delta.errors import Malformed, RegistryFailed
from delta.oci import LayoutWriter, blob_path, compact, parse_json, read_blob, sha256
from delta.registry import INDEX, INDEXES, MANIFEST, Document, Repository

DELTA_INDEX_TAG = "_deltaindex"
_FALLBACK_TAG = re.compile(r"sha256-[0-9a-f]{64}")
_MANIFEST_KEY = "baseManifest"
WRITES = 5  # of an index that others write too
TAGS_AT_ONCE = 8

Descriptor = dict[str, Any]


def fallback_tag(digest: str) -> str:
    return digest.replace(":", "-", 1)


# Pushing


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of one delta."""

    digest: str
    target: str  # the manifest it leads to
    blob_bytes: int  # sent; what the registry had is not
    found_by: str  # how a device finds it


def push(path: Path, repository: Repository, tag: str = "") -> list[Pushed]:
    """Upload all deltas of a layout.

    Args:
        tag: the image that they lead to, for a delta whose target's manifest is not known or is another one there;
            for a delta image of balena's, its own.

    Raises:
        RegistryFailed: the registry has not the image that a delta leads to, or refuses.
    """
    pushed = []
    for entry in artifact.entries_of(path):
        if entry.get("artifactType") == ARTIFACT_TYPE:
            pushed.append(_push_native(path, str(entry.get("digest")), repository, tag))
        elif TAR_DIFF_TARGET in (entry.get("annotations") or {}):
            pushed.append(_push_tar_diffs(path, str(entry.get("digest")), repository))
        elif BASE_LABEL in (entry.get("annotations") or {}):
            pushed.append(_push_delta_image(path, entry, repository, tag))
    if not pushed:
        raise Malformed(f"{path}: no delta")
    return pushed


def _push_native(path: Path, digest: str, repository: Repository, tag: str) -> Pushed:
    document = Document(read_blob(path, digest), MANIFEST)
    manifest = document.parsed()
    subject = manifest.get("subject")
    if subject is None or not repository.has_manifest(subject["digest"]):
        config = parse_json(read_blob(path, manifest["config"]["digest"]), f"{path}: config")
        subject = _subject_in(repository, tag, manifest, str(config["target"]))
        document = Document(compact({**manifest, "subject": subject}), MANIFEST)
    sent = _push_blobs(path, repository, [manifest["config"], *manifest["layers"]])
    answered = repository.put_manifest(document.digest, document)
    found_by = "referrers"
    if answered.get("OCI-Subject") != subject["digest"]:
        found_by = fallback_tag(subject["digest"])
        descriptor = {
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT_TYPE,
            "digest": document.digest,
            "size": len(document.data),
            "annotations": manifest["annotations"],
        }
        _rewrite_index(repository, found_by, lambda entries: _replaced(entries, descriptor))
    return Pushed(document.digest, subject["digest"], sent, found_by)


def _subject_in(repository: Repository, tag: str, manifest: dict[str, Any], target: str) -> Descriptor:
    """The manifest in the repository that has the delta's target as its config."""
    subject = manifest.get("subject")
    if not tag:
        what = f"manifest {subject['digest']}" if subject else "name of its target (it was made from an archive)"
        raise RegistryFailed(f"{repository}: no {what}; push the image first, and name its tag: {repository}:TAG")
    for document in _images_of(repository, repository.manifest(tag)):
        if document.parsed().get("config", {}).get("digest") == target:
            return artifact.subject_of(document)
    raise RegistryFailed(f"{repository}:{tag}: not the image that the delta leads to, {target}")


def _replaced(entries: list[Descriptor], new: Descriptor) -> list[Descriptor]:
    """An index with a delta in it; an older one between the same two images gives way."""
    if new in entries:
        return entries

    def ends(entry: Descriptor) -> tuple[object, object]:
        return entry.get("artifactType"), (entry.get("annotations") or {}).get(BASE_ANNOTATION)

    return [*(each for each in entries if ends(each) != ends(new)), new]


def _push_blobs(path: Path, repository: Repository, descriptors: Sequence[Descriptor]) -> int:
    sent = 0
    for descriptor in descriptors:
        digest = str(descriptor["digest"])
        with blob_path(path, digest).open("rb") as file:
            if repository.put_blob(digest, file):
                sent += file.seek(0, 2)
    return sent


def _push_tar_diffs(path: Path, digest: str, repository: Repository) -> Pushed:
    document = Document(read_blob(path, digest), MANIFEST)
    manifest = document.parsed()
    target = manifest["annotations"][TAR_DIFF_TARGET]
    if not repository.has_manifest(target):
        raise RegistryFailed(f"{repository}: no manifest {target}; push the image first")
    sent = _push_blobs(path, repository, [manifest["config"], *manifest["layers"]])
    made = document

    def add(entries: list[Descriptor]) -> list[Descriptor]:
        nonlocal made
        others = [each for each in entries if (each.get("annotations") or {}).get(TAR_DIFF_TARGET) != target]
        layers = {_ends(layer): layer for layer in manifest["layers"]}
        for each in entries:
            if each not in others:
                there = repository.find_manifest(str(each["digest"]))
                for layer in there.parsed().get("layers", ()) if there else ():
                    layers.setdefault(_ends(layer), layer)
        # In a fixed order, so that a second push changes nothing.
        made = Document(compact({**manifest, "layers": [layers[key] for key in sorted(layers)]}), MANIFEST)
        repository.put_manifest(made.digest, made)
        annotations = {TAR_DIFF_TARGET: target}
        descriptor = {"mediaType": MANIFEST, "digest": made.digest, "size": len(made.data), "annotations": annotations}
        return [*others, descriptor]

    _rewrite_index(repository, DELTA_INDEX_TAG, add)
    return Pushed(made.digest, target, sent, DELTA_INDEX_TAG)


def _push_delta_image(path: Path, entry: Descriptor, repository: Repository, tag: str) -> Pushed:
    """balena's: an image as any other, found by whoever is told its name."""
    if not tag:
        raise RegistryFailed(f"{repository}: a delta image is pushed under a tag of its own: {repository}:TAG")
    document = Document(read_blob(path, str(entry["digest"])), str(entry["mediaType"]))
    manifest = document.parsed()
    sent = _push_blobs(path, repository, [manifest["config"], *manifest["layers"]])
    repository.put_manifest(tag, document)
    return Pushed(document.digest, "its target", sent, f"{repository}:{tag}")


def _ends(layer: Descriptor) -> tuple[str, str]:
    annotations = layer.get("annotations") or {}
    return str(annotations.get(TAR_DIFF_FROM)), str(annotations.get(TAR_DIFF_TO))


def _index(repository: Repository, tag: str) -> tuple[Document | None, list[Descriptor]]:
    document = repository.find_manifest(tag)
    if document is None:
        return None, []
    entries = document.parsed().get("manifests")
    if document.media_type != INDEX or not isinstance(entries, list):
        raise RegistryFailed(f"{repository}:{tag}: not an OCI image index")
    return document, [each for each in entries if isinstance(each, dict)]


def _rewrite_index(
    repository: Repository, tag: str, change: Callable[[list[Descriptor]], list[Descriptor]]
) -> None:
    """Change an index under a tag until the change is in what the registry has."""
    for _ in range(WRITES):
        document, entries = _index(repository, tag)
        wanted = change(entries)
        if wanted == entries and document is not None:
            return
        rest = document.parsed() if document else {"schemaVersion": 2, "mediaType": INDEX}
        repository.put_manifest(tag, Document(compact({**rest, "manifests": wanted}), INDEX))
    raise RegistryFailed(f"{repository}:{tag}: others write this index all the time")


# Finding


def _images_of(repository: Repository, document: Document) -> Iterator[Document]:
    """The image manifests under a manifest or index."""
    if document.media_type not in INDEXES:
        yield document
        return
    for entry in document.parsed().get("manifests", ()):
        below = repository.find_manifest(str(entry.get("digest")))
        if below is not None and below.media_type not in INDEXES:
            yield below


def find_deltas(repository: Repository, target: str) -> list[Descriptor]:
    """Descriptors of the native deltas that lead to a manifest."""
    found = {str(each.get("digest")): each for each in repository.referrers(target, ARTIFACT_TYPE) or ()}
    for each in _index(repository, fallback_tag(target))[1]:
        if each.get("artifactType") == ARTIFACT_TYPE:
            found.setdefault(str(each.get("digest")), each)
    return list(found.values())


def fetch(repository: Repository, reference: str, folder: Path) -> None:
    """Bring deltas into a layout: the one that a reference names, or all that lead to the image it names.

    Raises:
        RegistryFailed: there are none.
    """
    document = repository.manifest(reference)
    if document.parsed().get("artifactType") == ARTIFACT_TYPE:
        documents = [document]
    else:
        documents = [
            repository.manifest(str(each["digest"]))
            for image in _images_of(repository, document)
            for each in find_deltas(repository, image.digest)
        ]
    if not documents:
        raise RegistryFailed(f"{repository}: no delta leads to {reference}")
    writer = LayoutWriter(folder)
    for each in documents:
        manifest = each.parsed()
        for descriptor in (manifest["config"], *manifest["layers"]):
            path = blob_path(folder, str(descriptor["digest"]))
            with path.open("wb") as out:
                repository.fetch_blob(str(descriptor["digest"]), int(descriptor["size"]), out)
        writer.manifest(each.data, {"artifactType": ARTIFACT_TYPE})
    writer.close()


@dataclass(frozen=True, slots=True)
class Tagged:
    """An image that a tag leads to."""

    tag: str
    manifest: str
    config: str
    created: str


def image_tags(repository: Repository, pattern: str = "*") -> list[str]:
    """Tags of images: not those that deltas and other referrers are kept under."""
    tags = [tag for tag in repository.tags() if not _FALLBACK_TAG.fullmatch(tag) and tag != DELTA_INDEX_TAG]
    return [tag for tag in tags if fnmatch.fnmatchcase(tag, pattern)]


def latest(repository: Repository, pattern: str, target: bytes, count: int) -> list[Tagged]:
    """The newest images of a repository that a delta may lead from, newest first, each under one of its tags.

    Args:
        target: the config of the image that it leads to; those of another platform do not count.
    """
    wanted, own = _platform(parse_json(target, "config")), sha256(target)

    def look(tag: str) -> list[Tagged]:
        document = repository.find_manifest(tag)
        found = []
        for image in _images_of(repository, document) if document else ():
            descriptor = image.parsed().get("config", {})
            if descriptor.get("mediaType") == artifact.CONFIG_TYPE or "digest" not in descriptor:
                continue
            config = parse_json(repository.read_blob(descriptor["digest"], int(descriptor["size"])), tag)
            if _platform(config) == wanted and "rootfs" in config:
                found.append(Tagged(tag, image.digest, descriptor["digest"], str(config.get("created") or "")))
        return found

    with ThreadPoolExecutor(TAGS_AT_ONCE) as pool:
        images = [image for found in pool.map(look, image_tags(repository, pattern)) for image in found]
    images.sort(key=lambda image: (image.created, _natural(image.tag)), reverse=True)
    newest: dict[str, Tagged] = {}
    for image in images:
        if image.config != own:
            newest.setdefault(image.config, image)
    return list(newest.values())[:count]


def _platform(config: dict[str, Any]) -> tuple[str, str, str]:
    return str(config.get("os") or ""), str(config.get("architecture") or ""), str(config.get("variant") or "")


def _natural(tag: str) -> list[tuple[int, str]]:
    """Orders 1.9 before 1.10."""
    return [(int(digits or -1), letters) for letters, digits in re.findall(r"(\D*)(\d*)", tag)]


# Dropping


@dataclass(frozen=True, slots=True)
class Dropped:
    """A delta that is of no more use, and why."""

    digest: str
    why: str


def prune(
    repository: Repository, *, tagged: bool = False, dry_run: bool = False, report: Callable[[Dropped], object]
) -> bool:
    """Drop the deltas whose base or target is gone from a repository.

    Args:
        tagged: an image that no tag leads to counts as gone, not only one whose manifest is.

    Returns: False if the registry allows no deletion, so that only the indexes were cleared.
    """
    pruner = _Pruner(repository, tagged, dry_run, report)
    pruner.run()
    return pruner.deletes


class _Pruner:
    def __init__(
        self, repository: Repository, tagged: bool, dry_run: bool, report: Callable[[Dropped], object]
    ) -> None:
        self._repository, self._dry_run, self._report = repository, dry_run, report
        self.deletes = True
        self._there: dict[str, bool] = {}
        self._tagged: set[str] | None = None
        self._targets: list[str] = []  # manifests that tags lead to
        for tag in image_tags(repository):
            document = repository.find_manifest(tag)
            for image in _images_of(repository, document) if document else ():
                self._targets.append(image.digest)
        if tagged:
            self._tagged = set(self._targets)

    def run(self) -> None:
        for target in dict.fromkeys(self._targets):
            for descriptor in self._repository.referrers(target, ARTIFACT_TYPE) or ():
                why = self._why(str(descriptor["digest"]), target)
                if why:
                    self._drop(str(descriptor["digest"]), why)
        for tag in self._repository.tags():
            if _FALLBACK_TAG.fullmatch(tag):
                self._prune_index(tag, tag.replace("-", ":", 1))
            elif tag == DELTA_INDEX_TAG:
                self._prune_index(tag, "")

    def _gone(self, manifest: str) -> bool:
        if self._tagged is not None:
            return manifest not in self._tagged
        if manifest not in self._there:
            self._there[manifest] = self._repository.has_manifest(manifest)
        return not self._there[manifest]

    def _why(self, digest: str, target: str) -> str:
        """Why a delta is to be dropped, or nothing."""
        if self._gone(target):
            return f"its target {target} is gone"
        document = self._repository.find_manifest(digest)
        if document is None:
            return "it is gone itself"
        config = document.parsed().get("config", {})
        data = self._repository.read_blob(str(config["digest"]), int(config["size"]))
        base = parse_json(data, f"config of {digest}").get(_MANIFEST_KEY)
        if isinstance(base, str) and self._gone(base):
            return f"its base {base} is gone"
        return ""

    def _drop(self, digest: str, why: str) -> None:
        self._report(Dropped(digest, why))
        if not self._dry_run and not self._repository.delete_manifest(digest):
            self.deletes = False

    def _prune_index(self, tag: str, target: str) -> None:
        """Take out of an index what leads nowhere; an index that ends empty goes itself."""
        document, entries = _index(self._repository, tag)
        if document is None:
            return
        reasons = {}
        for entry in entries:
            digest = str(entry.get("digest"))
            leads_to = target or str((entry.get("annotations") or {}).get(TAR_DIFF_TARGET))
            if target and entry.get("artifactType") != ARTIFACT_TYPE:
                continue  # a signature, an attestation: not ours
            if not target and TAR_DIFF_TARGET not in (entry.get("annotations") or {}):
                continue
            why = self._why(digest, leads_to) if target else self._why_not_led_to(leads_to)
            if why:
                reasons[digest] = why
        if not reasons:
            return
        if not self._dry_run:
            left = [entry for entry in entries if str(entry.get("digest")) not in reasons]
            if left or not self._repository.delete_manifest(document.digest):
                self.deletes = self.deletes and bool(left)
                _rewrite_index(
                    self._repository,
                    tag,
                    lambda entries: [each for each in entries if str(each.get("digest")) not in reasons],
                )
        for digest, why in reasons.items():
            self._drop(digest, why)

    def _why_not_led_to(self, target: str) -> str:
        return f"its target {target} is gone" if self._gone(target) else ""
