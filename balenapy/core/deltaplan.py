"""Which layers of a pull come as deltas: what was asked for, what is offered, what is cheapest.

Theory
------
A missing layer can arrive in several *ways*: as its blob, as a delta from layers that are here, or as a copy of a layer
that stands in another stack. A way says how many bytes cross the network and nothing of the result, which is the
target's in any case. So planning is a minimum for each layer over what discovery found, and everything else is reading:

    request headers            -> DeltaRequest
    referrers, or tag sha256-… -> entries; an entry's manifest -> ways  (native)
    _deltaindex                -> entries; an entry's manifest -> ways  (tar-diff)
    ways, missing layers       -> DeltaPlan

Sources: delta/FORMAT.md section 8; OCI distribution-spec "Listing Referrers", "Referrers Tag Schema"; the image deltas
specification (containers/image) for `_deltaindex`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from balenapy.core.digest import Digest
from balenapy.core.manifest import Artifact, Descriptor, Index, Manifest
from balenapy.core.reference import parse_reference
from balenapy.errors import EngineError, InvalidParameter

AUTO, REQUIRE, OFF = MODES = ("auto", "require", "off")
CODECS = ("bsdiff", "zstd", "librsync")

NATIVE, TAR_DIFF, LIBRSYNC, COPY = "native", "tar-diff", "librsync", "copy"
# What a format may make use of. Which of both a native delta does, its annotation may tell.
CODECS_OF = {NATIVE: ("bsdiff", "zstd"), TAR_DIFF: ("bsdiff", "zstd"), LIBRSYNC: ("librsync",), COPY: ()}

# delta/artifact.py has these too: it imports nothing of balenapy. A test compares.
ARTIFACT_TYPE = "application/vnd.balenapy.image.delta.v1"
LAYER_TYPE = "application/vnd.balenapy.layer.delta.v1"
BASE_ANNOTATION = "vnd.balenapy.delta.base"
TARGET_ANNOTATION = "vnd.balenapy.delta.target"
CODECS_ANNOTATION = "vnd.balenapy.delta.codecs"
TAR_DIFF_TYPE = "application/vnd.tar-diff"
TAR_DIFF_TARGET = "io.github.containers.delta.target"
TAR_DIFF_FROM = "io.github.containers.delta.from"
TAR_DIFF_TO = "io.github.containers.delta.to"
DELTA_INDEX_TAG = "_deltaindex"

ENTRIES_MAX = 16  # manifests fetched of one list of deltas

HEADER = "X-Balena-Delta"
BASE_HEADER, FROM_HEADER = f"{HEADER}-Base", f"{HEADER}-From"
CODECS_HEADER, MAX_BYTES_HEADER = f"{HEADER}-Codecs", f"{HEADER}-Max-Bytes"
LAYOUT_PREFIX = "oci-layout:"


@dataclass(frozen=True, slots=True)
class DeltaRequest:
    """What a pull is to do about deltas."""

    mode: str = AUTO
    bases: tuple[str, ...] = ()  # images that may be bases; none named: every one that is here
    source: str = ""  # where deltas lie: a repository, or a folder; "": in the target's repository
    codecs: frozenset[str] = frozenset(CODECS)
    max_bytes: int | None = None

    @property
    def layout(self) -> str:
        """The folder of an OCI layout that holds the deltas; "" when they are in a registry."""
        path = self.source.removeprefix(LAYOUT_PREFIX)
        return path if path.startswith("/") else ""

    def allows(self, codecs: Sequence[str]) -> bool:
        return self.codecs.issuperset(codecs)


def parse_request(header: Callable[[str], str], default_mode: str) -> DeltaRequest:
    """Read a pull's headers.

    Args:
        header: gives the value of one, "" when there is none.
    Raises: InvalidParameter, naming the header.
    """
    mode = header(HEADER).strip() or default_mode
    if mode not in MODES:
        raise InvalidParameter(f"{HEADER}: {mode!r} is none of {', '.join(MODES)}")
    bases = _list(header(BASE_HEADER))
    for base in bases:
        if not _is_image_id(base):
            _reference(base, BASE_HEADER)
    source = header(FROM_HEADER).strip()
    if source.startswith(LAYOUT_PREFIX):
        if not source.removeprefix(LAYOUT_PREFIX).startswith("/"):
            raise InvalidParameter(f"{FROM_HEADER}: {source!r}: the path must be absolute")
    elif source and not source.startswith("/"):
        _reference(source, FROM_HEADER)
    codecs = frozenset(_list(header(CODECS_HEADER))) or frozenset(CODECS)
    unknown = sorted(codecs - set(CODECS))
    if unknown:
        raise InvalidParameter(f"{CODECS_HEADER}: {unknown[0]!r} is none of {', '.join(CODECS)}")
    most = header(MAX_BYTES_HEADER).strip()
    if most and not (most.isascii() and most.isdigit() and len(most) < 19):
        raise InvalidParameter(f"{MAX_BYTES_HEADER}: {most!r} is no number of bytes")
    return DeltaRequest(mode, bases, source, codecs, int(most) if most else None)


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _is_image_id(text: str) -> bool:
    digits = text.removeprefix("sha256:")
    return 0 < len(digits) <= 64 and not digits.strip("0123456789abcdef")


def _reference(text: str, header: str) -> None:
    try:
        parse_reference(text)
    except EngineError as error:
        raise InvalidParameter(f"{header}: {text!r}: {error.message}") from error


# --- what is here, what is offered


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """A layer in another store than ours. `split` is its tar-split as other engines write it; "": ours, beside it."""

    diff_id: str
    directory: str  # of the layer; of its files, if there is a `split`
    split: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """An image whose layers are all here; `places` says where, when that is another store."""

    image_id: str
    diff_ids: tuple[str, ...]
    chain_ids: tuple[str, ...]
    places: tuple[LayerPlace, ...] = ()

    @property
    def chain_id(self) -> str:
        return self.chain_ids[-1] if self.chain_ids else ""


@dataclass(frozen=True, slots=True)
class Way:
    """One way for a layer to arrive. `blob` is None for a copy: nothing is fetched."""

    format: str
    base: str  # image_id, or the diff_id of the one layer
    base_chain: str  # the stack to read; of a copy only its top layer
    blob: Descriptor | None = None
    places: tuple[LayerPlace, ...] = ()  # the layers to read, when they are in another store

    @property
    def size_bytes(self) -> int:
        return self.blob.size_bytes if self.blob is not None else 0


Offers = dict[str, list[Way]]  # by the diff_id of the layer that comes out


def native_entries(index: Index) -> list[Descriptor]:
    """The deltas in a list of referrers. Entries that do not say what they are may be some."""
    return [entry for entry in index.manifests if entry.artifact_type in ("", ARTIFACT_TYPE)]


def entries_for(entries: Sequence[Descriptor], bases: Sequence[Base]) -> list[Descriptor]:
    """Those that may start from one of the bases: they say so, or say nothing. Better bases first."""
    order = {base.image_id: number for number, base in enumerate(bases)}
    found = []
    for entry in entries:
        base = (entry.annotations or {}).get(BASE_ANNOTATION, "")
        if not base or base in order:
            found.append((order.get(base, len(order)), entry))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])][:ENTRIES_MAX]


def native_ways(
    artifact: Artifact,
    manifest: Digest,
    target: str,
    target_diff_ids: Sequence[str],
    bases: Sequence[Base],
    request: DeltaRequest,
) -> Offers:
    """What a native delta offers; nothing when it is for another base or target, or does not say enough.

    Args:
        manifest, target: the target's manifest, and its image ID: the delta names one of them.
    """
    annotations = artifact.annotations
    base = next((base for base in bases if base.image_id == annotations.get(BASE_ANNOTATION)), None)
    codecs = _list(annotations.get(CODECS_ANNOTATION, "")) or CODECS_OF[NATIVE]
    if (
        base is None
        or artifact.artifact_type != ARTIFACT_TYPE
        or annotations.get(TARGET_ANNOTATION, target) != target
        or artifact.subject not in (None, manifest)
        or not request.allows(codecs)
    ):
        return {}
    changed = [diff_id for diff_id in target_diff_ids if diff_id not in base.diff_ids]
    blobs = [layer for layer in artifact.layers if layer.media_type == LAYER_TYPE]
    if len(changed) != len(blobs):
        return {}
    return {
        diff_id: [Way(NATIVE, base.image_id, base.chain_id, blob, base.places)]
        for diff_id, blob in zip(changed, blobs, strict=True)
    }


def tar_diff_entries(index: Index, target: Digest) -> list[Descriptor]:
    """The entries of a `_deltaindex` for a target's manifest."""
    found = [entry for entry in index.manifests if (entry.annotations or {}).get(TAR_DIFF_TARGET) == str(target)]
    return found[:ENTRIES_MAX]


def tar_diff_ways(artifact: Artifact, bases: Sequence[Base], request: DeltaRequest) -> Offers:
    """What a manifest of tar-diffs offers: from one layer, wherever it is in a base, to one layer."""
    offers: Offers = {}
    if not request.allows(CODECS_OF[TAR_DIFF]):
        return offers
    for blob in artifact.layers:
        annotations = blob.annotations or {}
        source, target = annotations.get(TAR_DIFF_FROM, ""), annotations.get(TAR_DIFF_TO, "")
        base = next((base for base in bases if source in base.diff_ids), None)
        if blob.media_type == TAR_DIFF_TYPE and base is not None and target:
            layer = base.diff_ids.index(source)
            way = Way(TAR_DIFF, source, base.chain_ids[layer], blob, base.places[: layer + 1])
            offers.setdefault(target, []).append(way)
    return offers


def merge(offers: Offers, more: Offers) -> None:
    """Add `more` to `offers`, behind what is there."""
    for diff_id, ways in more.items():
        offers.setdefault(diff_id, []).extend(ways)


# --- the plan


@dataclass(frozen=True, slots=True)
class DeltaPlan:
    """How the missing layers come, by their position: those that are not in `ways` as their blobs."""

    ways: Mapping[int, Way] = field(default_factory=dict)
    fetched_bytes: int = 0  # of all missing layers
    full_bytes: int = 0  # of all missing layers, if there were no deltas
    replaced_bytes: int = 0  # of the layers in `ways`, if there were no deltas
    why_none: str = ""

    @property
    def delta_bytes(self) -> int:
        return sum(way.size_bytes for way in self.ways.values())

    @property
    def base_of_image(self) -> str:
        """The stack that a delta image's layers start from; "" for other plans."""
        own = (way.base_chain for way in self.ways.values() if way.format == LIBRSYNC and not way.places)
        return next(own, "")

    def aux(self, *, peak_disk_bytes: int, peak_memory_bytes: int) -> dict[str, Any]:
        """The line that tells clients of it."""
        return {
            "Delta": {
                "Base": ",".join(dict.fromkeys(way.base for way in self.ways.values())),
                "Codec": ",".join(dict.fromkeys(way.format for way in self.ways.values())),
                "DeltaBytes": self.delta_bytes,
                "FullBytes": self.replaced_bytes,
                "Layers": len(self.ways),
                "PeakDiskBytes": peak_disk_bytes,
                "PeakMemoryBytes": peak_memory_bytes,
            }
        }


def choose(
    manifest: Manifest, diff_ids: Sequence[str], missing: Sequence[int], offers: Offers, request: DeltaRequest, why: str
) -> DeltaPlan:
    """The cheapest way for each missing layer.

    Args:
        why: what discovery has to say if nothing is offered.
    """
    ways: dict[int, Way] = {}
    for position in missing:
        best = min(offers.get(diff_ids[position], ()), key=lambda way: way.size_bytes, default=None)
        if best is not None and best.size_bytes < manifest.layers[position].size_bytes:
            ways[position] = best
    full = sum(manifest.layers[position].size_bytes for position in missing)
    replaced = sum(manifest.layers[position].size_bytes for position in ways)
    fetched = full - replaced + sum(way.size_bytes for way in ways.values())
    if not ways:
        offered = any(diff_ids[position] in offers for position in missing)
        return DeltaPlan({}, full, full, 0, "the deltas are no smaller than the layers" if offered else why)
    if request.max_bytes is not None and fetched > request.max_bytes:
        return DeltaPlan({}, full, full, 0, f"the cheapest plan needs {fetched} bytes of at most {request.max_bytes}")
    return DeltaPlan(ways, fetched, full, replaced)


def event_attributes(came: Sequence[tuple[Way, int]]) -> dict[str, str]:
    """What the event of a pull says of the layers that came as deltas.

    Args:
        came: how, and the size of the blob that was not fetched.
    """
    if not came:
        return {}
    fetched = sum(way.size_bytes for way, _ in came)
    found = {"delta.base": ",".join(dict.fromkeys(way.base for way, _ in came)), "delta.bytes": str(fetched)}
    saved = sum(size for way, size in came if way.format != LIBRSYNC) - fetched
    # The blobs of a delta image are the deltas: nobody knows what the layers would have taken.
    return found if any(way.format == LIBRSYNC for way, _ in came) else {**found, "delta.saved": str(saved)}
