"""The registry's documents: manifest, index, image config; and which platform of an index is ours.

Raw bytes are kept beside the parsed form, because digests are of bytes: the digest of the config bytes is the
image ID. A document comes from outside, so every function here is total: it returns a value or raises one
of our errors, whatever the bytes.

Sources: OCI image-spec (manifest.md, image-index.md, config.md); docker/distribution manifest/*; moby
distribution/pull_v2*.go and image/image.go for the texts; containerd platforms/ (compare.go, database.go) as
balena-engine v20.10 has it for the platform order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from balenapy.core.digest import Digest, chain_ids, sha256_digest
from balenapy.errors import DataLoss, InvalidParameter, NotFound, SystemFailure

DOCUMENT_MAX_BYTES = 4 << 20  # docker/distribution's limit for a manifest; configs get the same

SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
SCHEMA1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"
SCHEMA2 = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"

DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"

GZIP_LAYERS = frozenset((DOCKER_LAYER, "application/vnd.oci.image.layer.v1.tar+gzip"))

# What we ask for, best first.
ACCEPTED_MANIFESTS = (SCHEMA2, MANIFEST_LIST, OCI_MANIFEST, OCI_INDEX)

# moby distribution/registry.go ImageTypes: some registries and old engines wrote other types into `config`.
_CONFIG_TYPES = frozenset((DOCKER_CONFIG, OCI_CONFIG, "application/octet-stream", "application/json", "text/html", ""))
_PLUGIN_CONFIG = "application/vnd.docker.plugin.v1+json"
_FOREIGN_LAYERS = (
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
)


class InvalidDocument(SystemFailure):
    """A registry sent a document that is not what it must be. Asking again does not help."""


@dataclass(frozen=True, slots=True)
class Platform:
    """Operating system and architecture in Go's words; `variant` matters for arm only."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Names a blob or another document by media type, digest and length."""

    media_type: str
    digest: Digest
    size_bytes: int
    urls: tuple[str, ...] = ()
    annotations: Mapping[str, str] | None = None
    platform: Platform | None = None
    artifact_type: str = ""

    @property
    def is_foreign(self) -> bool:
        """Whether registries do not carry this layer (Windows base layers): only `urls` do."""
        return self.media_type.startswith(_FOREIGN_LAYERS)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image: its config and its layers, bottom first. Layer digests are of the compressed bytes."""

    media_type: str
    digest: Digest
    raw: bytes
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """Manifests of one image for several platforms (Docker says manifest list)."""

    media_type: str
    digest: Digest
    raw: bytes
    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A manifest of something that is no image: what it is tells `artifact_type`, or its config's media type."""

    digest: Digest
    artifact_type: str
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]
    subject: Digest | None = None  # the manifest that it refers to


def parse_artifact(raw: bytes) -> Artifact:
    """Read an OCI manifest whatever its config is.

    Raises:
        InvalidDocument: it is none, or too long.
    """
    if len(raw) > DOCUMENT_MAX_BYTES:
        raise InvalidDocument(f"manifest exceeds the limit of {DOCUMENT_MAX_BYTES} bytes")
    document = _object(raw, "manifest")
    if document.get("schemaVersion") != 2 or document.get("manifests") is not None:
        raise InvalidDocument("invalid manifest: not of an artifact")
    kind = _string(document, "artifactType", "manifest")
    config = document.get("config")
    if not kind and isinstance(config, dict):
        kind = _string(config, "mediaType", "config")
    subject = document.get("subject")
    return Artifact(
        sha256_digest(raw),
        kind,
        tuple(_descriptors(document, "layers")),
        _string_map(document, "annotations") or {},
        _descriptor(subject, "subject").digest if isinstance(subject, dict) else None,
    )


def parse_document(raw: bytes, media_type: str) -> Manifest | Index:
    """Read a manifest or an index. `media_type` is the Content-Type; parameters are ignored.

    Raises:
        InvalidDocument: not a document of that type, too long, schema 1, or not a container image.
    """
    if len(raw) > DOCUMENT_MAX_BYTES:
        raise InvalidDocument(f"manifest exceeds the limit of {DOCUMENT_MAX_BYTES} bytes")
    document = _object(raw, "manifest")
    digest = sha256_digest(raw)
    kind = _kind(document, media_type.partition(";")[0].strip().lower())
    # Two readings of one digest (CVE-2021-41190) are refused, not guessed.
    if kind in (SCHEMA2, OCI_MANIFEST):
        if document.get("manifests") is not None:
            words = "schema2: expected manifest but found list"
            raise InvalidDocument(words if kind == SCHEMA2 else "ocimanifest: expected manifest but found index")
        return Manifest(
            media_type=kind,
            digest=digest,
            raw=raw,
            config=_config_descriptor(document),
            layers=tuple(_descriptors(document, "layers")),
            annotations=_string_map(document, "annotations"),
        )
    if document.get("config") is not None or document.get("layers") is not None:
        words = "manifestlist: expected list but found manifest"
        raise InvalidDocument(words if kind == MANIFEST_LIST else "index: expected index but found manifest")
    return Index(
        media_type=kind,
        digest=digest,
        raw=raw,
        manifests=tuple(_descriptors(document, "manifests")),
    )


def encode_manifest(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """A schema 2 manifest as docker/distribution writes it: indented by three blanks."""

    def show(descriptor: Descriptor) -> dict[str, Any]:
        return {
            "mediaType": descriptor.media_type,
            "size": descriptor.size_bytes,
            "digest": str(descriptor.digest),
        }

    document = {
        "schemaVersion": 2,
        "mediaType": SCHEMA2,
        "config": show(config),
        "layers": [show(layer) for layer in layers],
    }
    return json.dumps(document, indent=3).encode()


def _kind(document: Mapping[str, Any], content_type: str) -> str:
    """Decide which of the four types this is; the document's own word must not contradict the header's."""
    own = _string(document, "mediaType", "manifest")
    schema = document.get("schemaVersion")
    if isinstance(schema, bool):  # which Python counts as a number and JSON does not
        raise InvalidDocument("unsupported schema version")
    if content_type in (SCHEMA1, SCHEMA1_SIGNED) or own in (SCHEMA1, SCHEMA1_SIGNED) or schema == 1:
        raise InvalidDocument(
            f"manifest schema 1 ({content_type or SCHEMA1}) is not supported: push the image again as schema 2 or OCI"
        )
    if schema != 2:
        raise InvalidDocument("unsupported schema version")
    if content_type in ACCEPTED_MANIFESTS:
        if own and own != content_type:
            words = "if present, mediaType" if content_type.startswith("application/vnd.oci.") else "mediaType"
            raise InvalidDocument(f"{words} in manifest should be '{content_type}' not '{own}'")
        return content_type
    # Static file servers and some proxies say application/json, text/plain or nothing.
    if own:
        if own not in ACCEPTED_MANIFESTS:
            raise InvalidDocument(f"unsupported manifest media type and no default available: {own}")
        return own
    if content_type not in ("", "application/json", "application/octet-stream", "text/plain"):
        raise InvalidDocument(f"unsupported manifest media type and no default available: {content_type}")
    return OCI_INDEX if document.get("manifests") is not None else OCI_MANIFEST


def _config_descriptor(document: Mapping[str, Any]) -> Descriptor:
    value = document.get("config")
    if not isinstance(value, dict):
        raise InvalidDocument("invalid manifest: config is missing")
    descriptor = _descriptor(value, "config")
    if descriptor.media_type not in _CONFIG_TYPES:
        kind = "plugin" if descriptor.media_type == _PLUGIN_CONFIG else "unknown"
        raise InvalidDocument(f'Encountered remote "{descriptor.media_type}"({kind}) when fetching')
    return descriptor


def _descriptors(document: Mapping[str, Any], key: str) -> Iterator[Descriptor]:
    values = document.get(key)
    if values is None:
        return
    if not isinstance(values, list):
        raise InvalidDocument(f"invalid manifest: {key} is not a list")
    for position, value in enumerate(values):
        where = f"{key}[{position}]"
        if not isinstance(value, dict):
            raise InvalidDocument(f"invalid manifest: {where} is not an object")
        yield _descriptor(value, where)


def _descriptor(value: Mapping[str, Any], where: str) -> Descriptor:
    size = value.get("size")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 63:
        raise InvalidDocument(f"invalid manifest: {where}.size is not a length")
    try:
        digest = Digest.parse(_string(value, "digest", where))
    except InvalidParameter as error:
        raise InvalidDocument(f"invalid manifest: {where}.digest: {error.message}") from error
    urls = value.get("urls")
    if urls is not None and not (isinstance(urls, list) and all(isinstance(url, str) for url in urls)):
        raise InvalidDocument(f"invalid manifest: {where}.urls is not a list of strings")
    platform = value.get("platform")
    if platform is not None and not isinstance(platform, dict):
        raise InvalidDocument(f"invalid manifest: {where}.platform is not an object")
    return Descriptor(
        media_type=_string(value, "mediaType", where),
        digest=digest,
        size_bytes=size,
        urls=tuple(urls or ()),
        annotations=_string_map(value, "annotations"),
        platform=None if platform is None else _platform(platform, f"{where}.platform"),
        artifact_type=_string(value, "artifactType", where),
    )


def _platform(value: Mapping[str, Any], where: str) -> Platform:
    return Platform(
        os=_string(value, "os", where),
        architecture=_string(value, "architecture", where),
        variant=_string(value, "variant", where),
        os_version=_string(value, "os.version", where),
    )


# --- platform choice


def platform_of_machine(machine: str, *, bits: int = 64) -> Platform:
    """This machine's platform from uname's machine and the width of our own pointers.

    A 32-bit user space on a 64-bit kernel (32-bit Raspberry Pi OS images) runs 32-bit images, as the
    reference engine built for it does.
    """
    architecture, variant = _ALIASES.get(machine, (machine, ""))
    if machine.startswith("armv"):
        architecture, variant = "arm", f"v{min(int(machine[4]), 8)}" if machine[4:5].isdigit() else "v7"
    if bits == 32:
        if architecture == "arm64":
            architecture, variant = "arm", "v8"
        elif architecture == "amd64":
            architecture = "386"
    return Platform("linux", architecture, variant)


def parse_platform(text: str, host: Platform) -> Platform:
    """Read `os[/architecture[/variant]]` or a bare architecture; what is left out is the host's.

    Raises:
        InvalidParameter: with containerd's words.
    """
    if "*" in text:
        raise InvalidParameter(f'"{text}": wildcards not yet supported: invalid argument')
    parts = text.split("/")
    for part in parts:
        if not _PLATFORM_PART.fullmatch(part):
            raise InvalidParameter(
                f'"{part}" is an invalid component of "{text}": platform specifier component must match '
                f'"^[A-Za-z0-9_-]+$": invalid argument'
            )
    if len(parts) > 3:
        raise InvalidParameter(f'"{text}": cannot parse platform specifier: invalid argument')
    os = _OS_ALIASES.get(parts[0].lower(), parts[0].lower())
    if len(parts) == 1:
        if os in _KNOWN_OS:
            platform = Platform(os, host.architecture, host.variant)
        else:
            platform = normalize_platform(Platform(host.os, parts[0]))
            if platform.architecture not in _KNOWN_ARCHITECTURES:
                raise InvalidParameter(f'"{text}": unknown operating system or architecture: invalid argument')
    else:
        platform = normalize_platform(Platform(os, parts[1], parts[2] if len(parts) == 3 else ""))
    return platform


def normalize_platform(platform: Platform) -> Platform:
    """Bring spelling variants together: `aarch64` is arm64, arm without variant is v7, arm64/v8 is arm64."""
    architecture, variant = platform.architecture.lower(), platform.variant.lower()
    if architecture in _ALIASES:
        architecture, implied = _ALIASES[architecture]
        variant = variant or implied
    if architecture == "arm":
        variant = f"v{variant}" if variant in ("5", "6", "7", "8") else variant or "v7"
    elif (architecture == "arm64" and variant in ("8", "v8")) or (architecture == "amd64" and variant == "v1"):
        variant = ""
    os = _OS_ALIASES.get(platform.os.lower(), platform.os.lower())
    return Platform(os, architecture, variant, platform.os_version)


def platform_order(platform: Platform) -> tuple[Platform, ...]:
    """What this platform can run, best first.

    armv7 runs v7, v6, v5; arm64 runs arm64, then arm v8 down to v5; amd64 runs 386.
    """
    platform = normalize_platform(platform)
    order = [platform]
    if platform.architecture == "arm64":
        order.append(Platform(platform.os, "arm", "v8"))
    elif platform.architecture == "amd64":
        order.append(Platform(platform.os, "386"))
    last = order[-1]
    if last.architecture == "arm" and last.variant[1:].isdigit():
        order += [Platform(last.os, "arm", f"v{n}") for n in range(int(last.variant[1:]) - 1, 4, -1)]
    return tuple(order)


def choose_platform(index: Index, platform: Platform) -> Descriptor:
    """The manifest of an index that this platform runs best.

    Raises:
        NotFound: "no matching manifest for linux/arm/v7 in the manifest list entries".
    """
    platform = normalize_platform(platform)
    offered = [
        (normalize_platform(entry.platform), entry)
        for entry in index.manifests
        # An entry without a platform is one for any; buildkit's attestations say unknown/unknown.
        if entry.platform is not None and entry.media_type in ("", SCHEMA2, OCI_MANIFEST)
    ]
    for wanted in platform_order(platform):
        for have, entry in offered:
            if (have.os, have.architecture, have.variant) == (
                wanted.os,
                wanted.architecture,
                wanted.variant,
            ):
                return entry
    if platform.architecture == "arm":
        # Lists made before variants were compared carry one arm entry with any variant (moby pull_v2_unix.go).
        for have, entry in offered:
            if (have.os, have.architecture) == (platform.os, "arm"):
                return entry
    alone = [entry for entry in index.manifests if entry.platform is None]
    if len(index.manifests) == 1 and alone:
        return alone[0]
    raise NotFound(f"no matching manifest for {platform} in the manifest list entries")


_PLATFORM_PART = re.compile(r"[A-Za-z0-9_-]+")
_OS_ALIASES = {"macos": "darwin"}
_ALIASES = {
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
}
_KNOWN_OS = frozenset(
    "aix android darwin dragonfly freebsd hurd illumos js linux nacl netbsd openbsd plan9 solaris windows zos".split()
)
_KNOWN_ARCHITECTURES = frozenset(
    "386 amd64 amd64p32 arm armbe arm64 arm64be ppc64 ppc64le loong64 mips mipsle mips64 mips64le mips64p32 "
    "mips64p32le ppc riscv riscv64 s390 s390x sparc sparc64 wasm".split()
)


# --- image config


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One step of the image's making; an empty layer has no diff_id."""

    created: str
    created_by: str
    comment: str
    author: str
    empty_layer: bool


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """A parsed image config. `raw` are the bytes `image_id` is the digest of."""

    raw: bytes
    image_id: Digest
    diff_ids: tuple[Digest, ...]
    architecture: str
    os: str
    os_version: str
    variant: str
    created: str  # RFC 3339 as written, "" if absent
    author: str
    comment: str
    docker_version: str
    container: str
    config: Mapping[str, Any]  # the `Config` object with Go's key names; {} when null
    container_config: Mapping[str, Any]
    history: tuple[HistoryEntry, ...]

    @property
    def chain_ids(self) -> tuple[Digest, ...]:
        return chain_ids(self.diff_ids)

    @property
    def chain_id(self) -> str:
        """Chain ID of the whole stack, "" for an image without layers (FROM scratch, metadata only)."""
        return str(self.chain_ids[-1]) if self.diff_ids else ""

    @property
    def created_ns(self) -> int | None:
        """`created` as nanoseconds since 1970; None when absent."""
        return _nanoseconds(self.created) if self.created else None

    @property
    def platform(self) -> Platform:
        return Platform(self.os, self.architecture, self.variant, self.os_version)


def parse_image_config(raw: bytes) -> ImageConfig:
    """Read an image config (Docker's or OCI's, they are the same).

    Raises:
        InvalidDocument: not JSON, no rootfs, or a value of the wrong type.
    """
    if len(raw) > DOCUMENT_MAX_BYTES:
        raise InvalidDocument(f"image config exceeds the limit of {DOCUMENT_MAX_BYTES} bytes")
    document = _object(raw, "image config")
    rootfs = document.get("rootfs")
    if rootfs is None:
        raise InvalidDocument("invalid image JSON, no RootFS key")
    if not isinstance(rootfs, dict) or rootfs.get("type") not in ("layers", None):
        raise InvalidDocument("invalid rootfs in image configuration")
    created = _string(document, "created", "image config")
    if created:
        _nanoseconds(created)
    return ImageConfig(
        raw=raw,
        image_id=sha256_digest(raw),
        diff_ids=tuple(_diff_ids(rootfs.get("diff_ids"))),
        architecture=_string(document, "architecture", "image config"),
        os=_string(document, "os", "image config") or "linux",  # moby image.OperatingSystem: absent is ours
        os_version=_string(document, "os.version", "image config"),
        variant=_string(document, "variant", "image config"),
        created=created,
        author=_string(document, "author", "image config"),
        comment=_string(document, "comment", "image config"),
        docker_version=_string(document, "docker_version", "image config"),
        container=_string(document, "container", "image config"),
        config=_run_config(document, "config"),
        container_config=_run_config(document, "container_config"),
        history=tuple(_history(document.get("history"))),
    )


def check_layers(manifest: Manifest, config: ImageConfig) -> None:
    """Hold the manifest and the config to the same number of layers.

    Raises:
        DataLoss: "layers from manifest don't match image configuration".
    """
    if len(manifest.layers) != len(config.diff_ids):
        raise DataLoss("layers from manifest don't match image configuration")


def _diff_ids(value: object) -> Iterator[Digest]:
    if value is None:
        return
    if not isinstance(value, list):
        raise InvalidDocument("invalid rootfs in image configuration")
    for text in value:
        if not isinstance(text, str):
            raise InvalidDocument("invalid rootfs in image configuration")
        try:
            yield Digest.parse(text)
        except InvalidParameter as error:
            raise InvalidDocument(f"invalid rootfs in image configuration: {error.message}") from error


_RUN_CONFIG_STRINGS = ("Hostname", "Domainname", "User", "Image", "WorkingDir", "MacAddress", "StopSignal")
_RUN_CONFIG_LISTS = ("Env", "Cmd", "Entrypoint", "OnBuild", "Shell")
_RUN_CONFIG_SETS = ("ExposedPorts", "Volumes")


def _run_config(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The container defaults. Types are checked here once, so that nobody downstream meets `"Env": 5`."""
    config = document.get(key)
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise InvalidDocument(f"invalid image config: {key} is not an object")
    for name in _RUN_CONFIG_STRINGS:
        _string(config, name, key)
    for name in _RUN_CONFIG_LISTS:
        items = config.get(name)
        # strslice: a bare string is a list of one
        if isinstance(items, str) and name in ("Cmd", "Entrypoint", "Shell"):
            continue
        if items is not None and not _is_string_list(items):
            raise InvalidDocument(f"invalid image config: {key}.{name} is not a list of strings")
    for name in _RUN_CONFIG_SETS:
        if not isinstance(config.get(name), dict | None):
            raise InvalidDocument(f"invalid image config: {key}.{name} is not an object")
    _string_map(config, "Labels")
    if not isinstance(config.get("Healthcheck"), dict | None):
        raise InvalidDocument(f"invalid image config: {key}.Healthcheck is not an object")
    return config


def _history(value: object) -> Iterator[HistoryEntry]:
    if value is None:
        return
    if not isinstance(value, list):
        raise InvalidDocument("invalid image config: history is not a list")
    for position, entry in enumerate(value):
        where = f"history[{position}]"
        if not isinstance(entry, dict):
            raise InvalidDocument(f"invalid image config: {where} is not an object")
        created = _string(entry, "created", where)
        if created:
            _nanoseconds(created)
        yield HistoryEntry(
            created=created,
            created_by=_string(entry, "created_by", where),
            comment=_string(entry, "comment", where),
            author=_string(entry, "author", where),
            empty_layer=entry.get("empty_layer") is True,
        )


# --- JSON from outside

_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:[.,](\d+))?(?:Z|([+-])(\d\d):(\d\d))", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _object(raw: bytes, what: str) -> dict[str, Any]:
    """Decode a JSON object as Go does: bytes that are not UTF-8, and halves of surrogates, become U+FFFD."""
    try:
        value = json.loads(raw.decode("utf-8", "replace"), parse_constant=_refuse_constant)
        if _LONE_SURROGATE.search(raw):
            value = _without_surrogates(value)
    except RecursionError as error:
        raise InvalidDocument(f"invalid {what}: exceeded max depth") from error
    except ValueError as error:
        raise InvalidDocument(f"invalid {what}: {error}") from error
    if not isinstance(value, dict):
        raise InvalidDocument(f"invalid {what}: not an object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"invalid character '{name[0]}' looking for beginning of value")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def _string(value: Mapping[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InvalidDocument(f"invalid {where}: {key} is not a string")
    return text


def _string_map(value: Mapping[str, Any], key: str) -> Mapping[str, str] | None:
    mapping = value.get(key)
    if mapping is None:
        return None
    if not isinstance(mapping, dict) or not _is_string_list(list(mapping.values())):
        raise InvalidDocument(f"invalid document: {key} is not an object of strings")
    return mapping


def _is_string_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value)


def _nanoseconds(text: str) -> int:
    """RFC 3339 to nanoseconds since 1970; year 1 (Go's zero time) is a large negative number."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise InvalidDocument(f"invalid time {text[:64]!r}: not RFC 3339")
    year, month, day, hour, minute, second, fraction, sign, off_h, off_m = match.groups()
    try:
        moment = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second), tzinfo=_EPOCH.tzinfo)
    except ValueError as error:
        raise InvalidDocument(f"invalid time {text!r}: {error}") from error
    offset = timedelta(hours=int(off_h), minutes=int(off_m)) if sign else timedelta()
    elapsed = moment - _EPOCH - (offset if sign != "-" else -offset)
    seconds = elapsed.days * 86400 + elapsed.seconds
    return seconds * 1_000_000_000 + int((fraction or "").ljust(9, "0")[:9])
