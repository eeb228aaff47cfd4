"""Image archives: what `docker save` writes and `docker load` reads, without the layers' bytes.

Three layouts are read, in this order:

    manifest.json    [{"Config", "RepoTags", "Layers", "Parent"}]: files named by it, anywhere in the archive
    index.json       an OCI image layout: documents and layers are `blobs/<algorithm>/<hex>`; the names of images are
                     annotations. Archives of newer engines have both, and the first counts
    repositories     {"repo": {"tag": id}}; each `<id>/` has `json` (a v1 image) and `layer.tar`

An archive is read in one pass: documents (small, JSON) are kept, layers unpacked as they come, links remembered. When
its end has come, `read_images` says which images there are. Names lead nowhere outside the archive.

Written is the first layout with the files of the third beside it, entry by entry as dockerd does, so that any engine
since 1.6 loads it.

Sources: moby image/tarexport/{save,load,tarexport}.go, image/v1/imagev1.go; OCI image-layout.md, annotations.md.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from balenapy.core import gojson, wire
from balenapy.core.container import ContainerConfig
from balenapy.core.digest import Digest, chain_ids, sha256_digest
from balenapy.core.manifest import (
    DOCUMENT_MAX_BYTES,
    Descriptor,
    ImageConfig,
    Index,
    Platform,
    choose_platform,
    parse_document,
    parse_image_config,
)
from balenapy.core.reference import Reference, parse_reference
from balenapy.errors import EngineError, SystemFailure

DOCUMENTS_MAX_BYTES = 64 << 20  # all documents of one archive
HEAD_BYTES = 512  # enough to tell a document from a layer, and whether an archive is compressed
LINKS_MAX = 40  # as the kernel has it

_PACKED = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\0")
_DOCUMENT_NAMES = frozenset(("manifest.json", "repositories", "index.json", "oci-layout", "json", "VERSION"))
_IMAGE_NAME = "io.containerd.image.name"
_REF_NAME = "org.opencontainers.image.ref.name"


# --- reading


class InvalidArchive(SystemFailure):
    """An archive that no image can be made of."""


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """One image of an archive; `layers` are names of entries, bottom first."""

    config: ImageConfig
    tags: tuple[Reference, ...]
    layers: tuple[str, ...]
    parent: str = ""  # image_id, if the parent is in the archive too


@dataclass(frozen=True, slots=True)
class Contents:
    """What an archive held: documents by name, the diff_id of each layer by name, links by name.

    `failures` says of members that could not be unpacked why; that matters only if an image wants them.
    """

    documents: Mapping[str, bytes]
    layers: Mapping[str, Digest]
    links: Mapping[str, str]
    failures: Mapping[str, str]

    def layer(self, name: str) -> Digest:
        """Raises: InvalidArchive."""
        if name not in self.layers:
            raise InvalidArchive(self.failures.get(name, f"open {name}: no such file or directory"))
        return self.layers[name]

    def resolve(self, name: str) -> str:
        """The entry that a name leads to, through links, never out of the archive."""
        name = clean_name(name)
        for _ in range(LINKS_MAX):
            if name not in self.links:
                return name
            name = clean_name(self.links[name])
        raise InvalidArchive(f"open {name}: too many levels of symbolic links")

    def document(self, name: str) -> bytes:
        """Raises: InvalidArchive."""
        raw = self.documents.get(self.resolve(name))
        if raw is None:
            raise InvalidArchive(f"open {name}: no such file or directory")
        return raw


def clean_name(name: str) -> str:
    """A member's name as a path below the archive's root, however it is written."""
    return posixpath.normpath("/" + name).lstrip("/")


def link_target(name: str, target: str, *, symbolic: bool) -> str:
    """The name a link leads to. Hard links name their target from the root."""
    return clean_name(posixpath.join(posixpath.dirname(name), target) if symbolic else target)


def is_packed(head: bytes) -> bool:
    """Whether the bytes begin like one of the compressions that layers and archives come in."""
    if head[257:262] == b"ustar":
        return False
    return head.startswith(_PACKED) or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50)


def is_document(name: str, head: bytes, size: int) -> bool:
    """Whether a member is kept as it is; what else there is may be a layer."""
    if size > DOCUMENT_MAX_BYTES or head[257:262] == b"ustar":
        return False
    return posixpath.basename(name) in _DOCUMENT_NAMES or head.lstrip()[:1] in (b"{", b"[")


def read_images(contents: Contents, platform: Platform) -> list[ArchivedImage]:
    """The images of an archive that has been read to its end.

    Raises: EngineError, with dockerd's words where it has any.
    """
    if "manifest.json" in contents.documents:
        images = _read_manifest(contents)
    elif "index.json" in contents.documents:
        images = _read_layout(contents, platform)
    else:
        images = _read_repositories(contents)
    for image in images:
        _check(image, contents)
    return images


def _check(image: ArchivedImage, contents: Contents) -> None:
    if image.config.os != "linux":
        raise InvalidArchive(f"cannot load {image.config.os} image on linux")
    wanted = image.config.diff_ids
    if len(image.layers) != len(wanted):
        raise InvalidArchive(
            f"invalid manifest, layers length mismatch: expected {len(image.layers)}, got {len(wanted)}"
        )
    for position, (name, diff_id) in enumerate(zip(image.layers, wanted, strict=True)):
        found = contents.layer(name)
        if found != diff_id:
            raise InvalidArchive(f'invalid diffID for layer {position}: expected "{diff_id}", got "{found}"')


def _read_manifest(contents: Contents) -> list[ArchivedImage]:
    images = []
    for item in _objects(_parse(contents.documents["manifest.json"]), "tarexport.manifestItem"):
        config = parse_image_config(contents.document(_text(item, "Config")))
        tags = []
        for text in _texts(item, "RepoTags"):
            reference = parse_reference(text)
            if reference.tag is None or reference.digest is not None:
                raise InvalidArchive(f'invalid tag "{text}"')
            tags.append(reference)
        layers = tuple(contents.resolve(name) for name in _texts(item, "Layers"))
        images.append(ArchivedImage(config, tuple(tags), layers, _text(item, "Parent")))
    here = {str(image.config.image_id) for image in images}
    return [
        ArchivedImage(image.config, image.tags, image.layers, image.parent if image.parent in here else "")
        for image in images
    ]


def _read_layout(contents: Contents, platform: Platform) -> list[ArchivedImage]:
    """An OCI layout. Entries of `index.json` that differ in nothing but the platform are one image."""
    index = parse_document(contents.documents["index.json"], "")
    if not isinstance(index, Index):
        raise InvalidArchive("index.json is not an index")
    named: dict[tuple[str, ...], list[Descriptor]] = {}
    for entry in index.manifests:
        annotations = entry.annotations or {}
        name = annotations.get(_IMAGE_NAME) or annotations.get(_REF_NAME) or ""
        alone = "" if entry.platform is not None else str(entry.digest)
        named.setdefault((name, alone), []).append(entry)
    images: dict[str, ArchivedImage] = {}
    for (name, _), entries in named.items():
        chosen = entries[0] if len(entries) == 1 else choose_platform(_index_of(index, entries), platform)
        image = _read_blobs(contents, chosen, platform, _layout_tags(name))
        known = images.get(str(image.config.image_id))
        tags = (*(known.tags if known is not None else ()), *image.tags)
        images[str(image.config.image_id)] = ArchivedImage(image.config, tags, image.layers)
    return list(images.values())


def _index_of(index: Index, entries: Sequence[Descriptor]) -> Index:
    return Index(index.media_type, index.digest, index.raw, tuple(entries))


def _layout_tags(name: str) -> tuple[Reference, ...]:
    """A full reference is a name; a bare tag, which the layout allows, says nothing about the repository."""
    if ":" not in name and "/" not in name:
        return ()
    try:
        reference = parse_reference(name)
    except EngineError:
        return ()
    return (reference.with_default_tag(),) if reference.digest is None else ()


def _read_blobs(
    contents: Contents, descriptor: Descriptor, platform: Platform, tags: tuple[Reference, ...]
) -> ArchivedImage:
    document = parse_document(_verified(contents, descriptor), descriptor.media_type)
    if isinstance(document, Index):
        chosen = choose_platform(document, platform)
        document = parse_document(_verified(contents, chosen), chosen.media_type)
        if isinstance(document, Index):
            raise InvalidArchive("unsupported manifest format")
    config = parse_image_config(_verified(contents, document.config))
    return ArchivedImage(config, tags, tuple(contents.resolve(_blob_name(layer)) for layer in document.layers))


def _blob_name(descriptor: Descriptor) -> str:
    return f"blobs/{descriptor.digest.algorithm}/{descriptor.digest.hex}"


def _verified(contents: Contents, descriptor: Descriptor) -> bytes:
    raw = contents.document(_blob_name(descriptor))
    if not descriptor.digest.matches(raw):
        raise InvalidArchive(f"blob {descriptor.digest} does not have that digest")
    return raw


def _read_repositories(contents: Contents) -> list[ArchivedImage]:
    """The layout before `manifest.json`: images are their parents and one layer more."""
    repositories = _parse(contents.document("repositories"))
    images: dict[str, ArchivedImage] = {}
    for repository, tags in _objects_by_name(repositories):
        for tag, v1_id in tags.items():
            if not isinstance(v1_id, str):
                raise InvalidArchive("json: cannot unmarshal repositories: an ID is not a string")
            image = _read_v1(contents, v1_id)
            reference = parse_reference(repository).with_tag(tag)
            known = images.get(str(image.config.image_id), image)
            images[str(image.config.image_id)] = ArchivedImage(image.config, (*known.tags, reference), image.layers)
    return list(images.values())


def _read_v1(contents: Contents, v1_id: str) -> ArchivedImage:
    """Make an image of a v1 image and its parents."""
    chain: list[dict[str, Any]] = []
    layers: list[str] = []
    seen: set[str] = set()
    while v1_id:
        if v1_id in seen or "/" in v1_id:
            raise InvalidArchive(f"invalid parent {v1_id}")
        seen.add(v1_id)
        document = _parse(contents.document(f"{v1_id}/json"))
        if not isinstance(document, dict):
            raise InvalidArchive(f"{v1_id}/json is not an object")
        chain.append(document)
        layers.append(contents.resolve(f"{v1_id}/layer.tar"))
        v1_id = _text(document, "parent")
    chain.reverse()
    layers.reverse()
    diff_ids = [str(contents.layer(name)) for name in layers]
    dropped = ("id", "parent", "Size", "parent_id", "layer_id", "throwaway")
    config = {key: value for key, value in chain[-1].items() if key not in dropped}
    config["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    config["history"] = [_v1_history(document) for document in chain]
    raw = gojson.dumps_escaped({key: config[key] for key in sorted(config)})
    return ArchivedImage(parse_image_config(raw), (), tuple(layers))


def _v1_history(document: Mapping[str, Any]) -> dict[str, Any]:
    ran = document.get("container_config")
    command = ran.get("Cmd") if isinstance(ran, dict) else None
    words = [word for word in command if isinstance(word, str)] if isinstance(command, list) else []
    entry = {
        "created": document.get("created") or wire.ZERO_TIME,
        "author": document.get("author"),
        "created_by": " ".join(words),
        "comment": document.get("comment"),
    }
    return {key: value for key, value in entry.items() if value}


def _parse(raw: bytes) -> Any:
    try:
        return wire.parse_json(raw)
    except wire.MalformedJSON as error:
        raise InvalidArchive(error.message) from error


def _objects(value: Any, kind: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidArchive(f"json: cannot unmarshal {wire.kind_of(value)} into Go value of type []{kind}")
    for item in value:
        if not isinstance(item, dict):
            raise InvalidArchive(f"json: cannot unmarshal {wire.kind_of(item)} into Go value of type {kind}")
    return value


def _objects_by_name(value: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
        raise InvalidArchive(
            f"json: cannot unmarshal {wire.kind_of(value)} into Go value of type map[string]tarexport.repository"
        )
    return value.items()


def _text(item: Mapping[str, Any], key: str) -> str:
    text = item.get(key)
    if text is not None and not isinstance(text, str):
        raise InvalidArchive(f"json: cannot unmarshal {wire.kind_of(text)} into Go struct field {key} of type string")
    return text or ""


def _texts(item: Mapping[str, Any], key: str) -> list[str]:
    texts = item.get(key)
    if texts is None:
        return []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        kind = wire.kind_of(texts)
        raise InvalidArchive(f"json: cannot unmarshal {kind} into Go struct field {key} of type []string")
    return texts


# --- writing


@dataclass(frozen=True, slots=True)
class SavedImage:
    """One image to be saved, and the tags it is asked for by."""

    config: ImageConfig
    tags: tuple[Reference, ...]
    parent: str = ""  # image_id


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of an archive: a directory, a link (`link`), a document (`data`) or a layer (`chain_id`)."""

    name: str
    created_ns: int
    data: bytes = b""
    link: str = ""
    chain_id: str = ""


def plan_archive(images: Sequence[SavedImage]) -> list[Member]:
    """All members of the archive that holds these images, sorted by name as a walk of a directory gives them."""
    members: dict[str, Member] = {}
    paths: dict[Digest, str] = {}  # diff_id -> where it is
    manifest = []
    repositories: dict[str, dict[str, str]] = {}
    ids = {str(image.config.image_id) for image in images}
    for image in images:
        if not image.config.diff_ids:
            raise SystemFailure("empty export - not implemented")
        layers = _add_image(image.config, members, paths)
        manifest.append(
            {
                "Config": f"{image.config.image_id.hex}.json",
                "RepoTags": [tag.familiar() for tag in image.tags] or None,
                "Layers": [f"{v1_id}/layer.tar" for v1_id in layers],
                **({"Parent": image.parent} if image.parent in ids else {}),
            }
        )
        for tag in image.tags:
            repositories.setdefault(tag.familiar_name(), {})[tag.tag or ""] = layers[-1]
    members["manifest.json"] = Member("manifest.json", 0, gojson.dumps_escaped(manifest or None) + b"\n")
    if repositories:
        document = {name: dict(sorted(tags.items())) for name, tags in sorted(repositories.items())}
        members["repositories"] = Member("repositories", 0, gojson.dumps_escaped(document) + b"\n")
    return [members[name] for name in sorted(members, key=lambda name: name.split("/"))]


def _add_image(config: ImageConfig, members: dict[str, Member], paths: dict[Digest, str]) -> list[str]:
    """Add the members of one image; returns the v1 IDs of its layers."""
    created_ns = config.created_ns or 0
    parent = ""
    v1_ids: list[str] = []
    last = len(config.diff_ids) - 1
    for position, (diff_id, chain_id) in enumerate(zip(config.diff_ids, chain_ids(config.diff_ids), strict=True)):
        image = _v1_of(config) if position == last else _v1_bare()
        v1_id = _v1_id(image, chain_id, parent)
        document = {"id": v1_id, **({"parent": parent} if parent else {}), **image, "os": config.os}
        if v1_id not in members:
            path = f"{v1_id}/layer.tar"
            members[v1_id] = Member(v1_id, created_ns)
            members[f"{v1_id}/VERSION"] = Member(f"{v1_id}/VERSION", created_ns, b"1.0")
            members[f"{v1_id}/json"] = Member(f"{v1_id}/json", created_ns, gojson.dumps_escaped(document))
            if diff_id in paths:
                members[path] = Member(path, created_ns, link=f"../{paths[diff_id]}")
            else:
                members[path] = Member(path, created_ns, chain_id=str(chain_id))
                paths[diff_id] = path
        v1_ids.append(v1_id)
        parent = v1_id
    name = f"{config.image_id.hex}.json"
    members[name] = Member(name, created_ns, config.raw)
    return v1_ids


def _v1_bare() -> dict[str, Any]:
    """What a layer below the top has: Go's zero values, made in 1970."""
    return {"created": "1970-01-01T00:00:00Z", "container_config": wire.encode(ContainerConfig())}


def _v1_of(config: ImageConfig) -> dict[str, Any]:
    """moby image/image.go V1Image, keys in its order."""
    run_config = wire.encode(wire.decode(ContainerConfig, config.config)) if config.config else None
    optional: Callable[[str, str], dict[str, str]] = lambda key, text: {key: text} if text else {}  # noqa: E731
    return {
        **optional("comment", config.comment),
        "created": config.created or wire.ZERO_TIME,
        **optional("container", config.container),
        "container_config": wire.encode(wire.decode(ContainerConfig, config.container_config)),
        **optional("docker_version", config.docker_version),
        **optional("author", config.author),
        **({"config": run_config} if run_config is not None else {}),
        **optional("architecture", config.architecture),
        **optional("variant", config.variant),
        **optional("os", config.os),
    }


def _v1_id(image: Mapping[str, Any], chain_id: Digest, parent: str) -> str:
    """Source: moby image/v1/imagev1.go CreateID: the hash of the JSON, keys sorted."""
    document = {**image, "layer_id": str(chain_id), **({"parent": f"sha256:{parent}"} if parent else {})}
    return sha256_digest(gojson.dumps_escaped({key: document[key] for key in sorted(document)})).hex
