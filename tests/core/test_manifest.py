"""Registry documents: read or refused, whatever the bytes; and which platform of an index is chosen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import manifest as m
from balenapy.core.digest import sha256_digest
from balenapy.errors import DataLoss, InvalidParameter, NotFound
from tests import images_fixture

ZERO = "sha256:" + "0" * 64
DOCKER_CONFIG = {"mediaType": m.DOCKER_CONFIG, "size": 2, "digest": ZERO}


def encoded(**document: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, **document}).encode()


@pytest.mark.parametrize("family", ["oci", "docker"])
def test_a_manifest_keeps_its_bytes_beside_its_meaning(family: images_fixture.Family) -> None:
    image = images_fixture.layered(family)

    parsed = m.parse_document(image.manifest.data, image.manifest.media_type + "; charset=utf-8")

    assert isinstance(parsed, m.Manifest)
    assert image.manifest.data == parsed.raw
    assert image.manifest.digest == str(parsed.digest)
    assert image.image_id == str(parsed.config.digest)
    assert [layer.digest for layer in image.layers] == [str(layer.digest) for layer in parsed.layers]
    assert [len(layer.data) for layer in image.layers] == [layer.size_bytes for layer in parsed.layers]


@pytest.mark.parametrize("family", ["oci", "docker"])
def test_an_index_lists_manifests_with_their_platforms(family: images_fixture.Family) -> None:
    index = images_fixture.multi_platform(family)

    parsed = m.parse_document(index.manifest.data, index.manifest.media_type)

    assert isinstance(parsed, m.Index)
    assert [str(entry.platform) for entry in parsed.manifests] == [
        "linux/arm/v5",
        "linux/arm/v6",
        "linux/arm/v7",
        "linux/arm64/v8",
        "linux/amd64",
    ]


@pytest.mark.parametrize("content_type", ["", "application/json", "text/plain", "application/octet-stream"])
def test_a_server_that_does_not_know_the_type_is_not_in_the_way(content_type: str) -> None:
    image, index = images_fixture.busybox("docker"), images_fixture.multi_platform("docker")

    assert m.parse_document(image.manifest.data, content_type).media_type == m.SCHEMA2
    assert m.parse_document(index.manifest.data, content_type).media_type == m.MANIFEST_LIST


REFUSED = [
    (b"", m.SCHEMA2, "invalid manifest: "),
    (b"[]", m.SCHEMA2, "invalid manifest: not an object"),
    (b"[" * 100_000, m.SCHEMA2, "invalid manifest: "),
    (b'{"schemaVersion": NaN}', m.SCHEMA2, "invalid manifest: invalid character 'N'"),
    (b'{"schemaVersion":1}', m.SCHEMA1_SIGNED, "manifest schema 1 (application/vnd.docker.distribution.manifest.v1"),
    (b'{"schemaVersion":1}', "application/json", "manifest schema 1 (application/json) is not supported"),
    (b"{}", m.SCHEMA2, "unsupported schema version"),
    (b'{"schemaVersion":true}', m.SCHEMA2, "unsupported schema version"),
    (encoded(), "application/x-y", "unsupported manifest media type and no default available: application/x-y"),
    (encoded(mediaType="x/y"), "", "unsupported manifest media type and no default available: x/y"),
    (
        encoded(mediaType=m.OCI_MANIFEST),
        m.SCHEMA2,
        f"mediaType in manifest should be '{m.SCHEMA2}' not '{m.OCI_MANIFEST}'",
    ),
    (
        encoded(mediaType=m.SCHEMA2),
        m.OCI_MANIFEST,
        f"if present, mediaType in manifest should be '{m.OCI_MANIFEST}' not '{m.SCHEMA2}'",
    ),
    (encoded(manifests=[], config={}), m.OCI_MANIFEST, "ocimanifest: expected manifest but found index"),
    (encoded(manifests=[], config={}), m.SCHEMA2, "schema2: expected manifest but found list"),
    (encoded(manifests=[], config={}), m.OCI_INDEX, "index: expected index but found manifest"),
    (encoded(manifests=[], layers=[]), m.MANIFEST_LIST, "manifestlist: expected list but found manifest"),
    (encoded(layers=[]), m.OCI_MANIFEST, "invalid manifest: config is missing"),
    (
        encoded(config={"mediaType": "application/vnd.docker.plugin.v1+json", "size": 2, "digest": ZERO}),
        m.SCHEMA2,
        'Encountered remote "application/vnd.docker.plugin.v1+json"(plugin) when fetching',
    ),
    (
        encoded(config={"mediaType": "application/vnd.oci.empty.v1+json", "size": 2, "digest": ZERO}),
        m.OCI_MANIFEST,
        'Encountered remote "application/vnd.oci.empty.v1+json"(unknown) when fetching',
    ),
    (encoded(config={**DOCKER_CONFIG, "size": -1}), m.SCHEMA2, "invalid manifest: config.size is not a length"),
    (encoded(config={**DOCKER_CONFIG, "size": "1"}), m.SCHEMA2, "invalid manifest: config.size is not a length"),
    (encoded(config={**DOCKER_CONFIG, "size": 1 << 63}), m.SCHEMA2, "invalid manifest: config.size is not a length"),
    (
        encoded(config={**DOCKER_CONFIG, "digest": "sha256:../../etc"}),
        m.SCHEMA2,
        "invalid manifest: config.digest: invalid checksum digest length",
    ),
    (encoded(config=DOCKER_CONFIG, layers={}), m.SCHEMA2, "invalid manifest: layers is not a list"),
    (encoded(config=DOCKER_CONFIG, layers=[1]), m.SCHEMA2, "invalid manifest: layers[0] is not an object"),
    (b" " * (m.DOCUMENT_MAX_BYTES + 1), m.SCHEMA2, "manifest exceeds the limit of 4194304 bytes"),
]


@pytest.mark.parametrize(("raw", "media_type", "problem"), REFUSED)
def test_a_bad_manifest_is_refused_by_name(raw: bytes, media_type: str, problem: str) -> None:
    with pytest.raises(m.InvalidDocument) as caught:
        m.parse_document(raw, media_type)

    assert caught.value.message.startswith(problem)


ARM = ("arm", "v5"), ("arm", "v6"), ("arm", "v7"), ("arm64", "v8"), ("amd64", "")


def index_of(*platforms: tuple[str, str]) -> m.Index:
    wanted = [m.Platform("linux", architecture, variant) for architecture, variant in platforms]
    entries = tuple(m.Descriptor(m.OCI_MANIFEST, sha256_digest(str(one).encode()), 1, platform=one) for one in wanted)
    return m.Index(m.OCI_INDEX, sha256_digest(b""), b"", entries)


@pytest.mark.parametrize(
    ("platform", "offered", "chosen"),
    [
        (m.Platform("linux", "amd64"), ARM, ("amd64", "")),
        (m.Platform("linux", "arm64"), ARM, ("arm64", "v8")),
        (m.Platform("linux", "arm64", "v8"), (("arm64", ""), *ARM), ("arm64", "")),
        (m.Platform("linux", "arm64"), ARM[:3], ("arm", "v7")),
        (m.Platform("linux", "arm64"), (("arm", "v8"), *ARM[:3]), ("arm", "v8")),
        (m.Platform("linux", "arm", "v8"), ARM, ("arm", "v7")),
        (m.Platform("linux", "arm", "v7"), ARM, ("arm", "v7")),
        (m.Platform("linux", "arm"), ARM, ("arm", "v7")),
        (m.Platform("linux", "arm", "v7"), ARM[:2], ("arm", "v6")),
        (m.Platform("linux", "arm", "v7"), ARM[:1], ("arm", "v5")),
        (m.Platform("linux", "arm", "v6"), ARM, ("arm", "v6")),
        (m.Platform("linux", "arm", "v6"), (("arm", ""),), ("arm", "")),  # lists older than variants
        (m.Platform("linux", "amd64"), (("386", ""),), ("386", "")),
    ],
)
def test_the_best_platform_this_machine_runs_is_chosen(
    platform: m.Platform, offered: tuple[tuple[str, str], ...], chosen: tuple[str, str]
) -> None:
    entry = m.choose_platform(index_of(*offered), platform)

    assert m.Platform("linux", *chosen) == entry.platform


@pytest.mark.parametrize(
    ("platform", "named"),
    [
        (m.Platform("linux", "arm", "v7"), "linux/arm/v7"),
        (m.Platform("linux", "arm64", "v8"), "linux/arm64"),
        (m.Platform("windows", "amd64"), "windows/amd64"),
    ],
)
def test_without_a_match_the_wanted_platform_is_named(platform: m.Platform, named: str) -> None:
    with pytest.raises(NotFound) as caught:
        m.choose_platform(index_of(("s390x", ""), ("unknown", "")), platform)

    assert f"no matching manifest for {named} in the manifest list entries" == caught.value.message


@pytest.mark.parametrize(
    ("machine", "bits", "platform"),
    [
        ("x86_64", 64, "linux/amd64"),
        ("x86_64", 32, "linux/386"),
        ("aarch64", 64, "linux/arm64"),
        ("aarch64", 32, "linux/arm/v8"),
        ("armv7l", 32, "linux/arm/v7"),
        ("armv6l", 32, "linux/arm/v6"),
        ("armv5tejl", 32, "linux/arm/v5"),
        ("armv8l", 32, "linux/arm/v8"),
        ("riscv64", 64, "linux/riscv64"),
    ],
)
def test_the_machine_says_the_platform(machine: str, bits: int, platform: str) -> None:
    assert platform == str(m.platform_of_machine(machine, bits=bits))


HOST = m.Platform("linux", "arm", "v7")


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux", "linux/arm/v7"),
        ("linux/arm64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("arm64", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("armhf", "linux/arm/v7"),
        ("Linux/x86_64", "linux/amd64"),
        ("windows", "windows/arm/v7"),
    ],
)
def test_a_platform_may_be_given_in_part(text: str, platform: str) -> None:
    assert platform == str(m.parse_platform(text, HOST))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("*", '"*": wildcards not yet supported: invalid argument'),
        (
            "linux/a b",
            '"a b" is an invalid component of "linux/a b": platform specifier component must match '
            '"^[A-Za-z0-9_-]+$": invalid argument',
        ),
        ("a/b/c/d", '"a/b/c/d": cannot parse platform specifier: invalid argument'),
        ("nonsense", '"nonsense": unknown operating system or architecture: invalid argument'),
    ],
)
def test_a_bad_platform_is_refused_in_the_reference_engines_words(text: str, problem: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        m.parse_platform(text, HOST)

    assert problem == caught.value.message


# -- image config


def test_an_image_config_is_read_and_its_id_is_of_its_bytes() -> None:
    image = images_fixture.layered()

    config = m.parse_image_config(image.config_blob.data)

    assert image.image_id == str(config.image_id)
    assert [images_fixture.digest(tar) for tar in image.tars] == [str(diff_id) for diff_id in config.diff_ids]
    assert config.chain_id == str(config.chain_ids[-1])
    assert (config.os, config.architecture, config.config) == ("linux", "amd64", {"Cmd": ["true"]})
    assert config.created_ns == 1704164645678000000
    assert [entry.created_by for entry in config.history] == ["layer 0", "layer 1", "layer 2", "layer 3"]


def test_absent_values_are_zero_values() -> None:
    config = m.parse_image_config(b'{"rootfs":{"type":"layers"},"config":null,"history":null}')

    assert (
        config.diff_ids,
        config.chain_id,
        config.config,
        config.history,
        config.created_ns,
    ) == ((), "", {}, (), None)
    assert config.os == "linux"


def test_gos_zero_time_is_read() -> None:
    config = m.parse_image_config(b'{"rootfs":{},"created":"0001-01-01T00:00:00Z"}')

    assert config.created_ns == -62135596800 * 10**9


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"{}", "invalid image JSON, no RootFS key"),
        (b'{"rootfs":5}', "invalid rootfs in image configuration"),
        (b'{"rootfs":{"type":"bricks"}}', "invalid rootfs in image configuration"),
        (b'{"rootfs":{"diff_ids":["x"]}}', "invalid rootfs in image configuration: invalid checksum"),
        (b'{"rootfs":{"diff_ids":[null]}}', "invalid rootfs in image configuration"),
        (b'{"rootfs":{},"config":[]}', "invalid image config: config is not an object"),
        (b'{"rootfs":{},"config":{"Env":"A=1"}}', "invalid image config: config.Env is not a list of strings"),
        (b'{"rootfs":{},"config":{"Cmd":[1]}}', "invalid image config: config.Cmd is not a list of strings"),
        (b'{"rootfs":{},"config":{"Volumes":[]}}', "invalid image config: config.Volumes is not an object"),
        (b'{"rootfs":{},"config":{"User":0}}', "invalid config: User is not a string"),
        (b'{"rootfs":{},"created":"yesterday"}', "invalid time 'yesterday': not RFC 3339"),
        (b'{"rootfs":{},"created":"2024-13-01T00:00:00Z"}', "invalid time"),
        (b'{"rootfs":{},"history":{}}', "invalid image config: history is not a list"),
    ],
)
def test_a_bad_image_config_is_refused_by_name(raw: bytes, problem: str) -> None:
    with pytest.raises(m.InvalidDocument) as caught:
        m.parse_image_config(raw)

    assert caught.value.message.startswith(problem)


def test_manifest_and_config_must_have_the_same_layers() -> None:
    image, other = images_fixture.layered(), images_fixture.busybox()
    parsed = m.parse_document(image.manifest.data, image.manifest.media_type)
    assert isinstance(parsed, m.Manifest)

    m.check_layers(parsed, m.parse_image_config(image.config_blob.data))
    with pytest.raises(DataLoss, match=r"^layers from manifest don't match image configuration$"):
        m.check_layers(parsed, m.parse_image_config(other.config_blob.data))


# -- totality

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(ZERO)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
KEYS = (
    "schemaVersion mediaType config layers manifests annotations size digest urls platform os architecture variant "
    "rootfs diff_ids type created history created_by empty_layer Env Cmd Labels Healthcheck Volumes User"
).split()
documents = st.recursive(
    values, lambda inner: st.dictionaries(st.sampled_from(KEYS), inner, max_size=6) | st.lists(inner, max_size=3)
)
media_types = st.sampled_from((*m.ACCEPTED_MANIFESTS, "", "application/json"))


@given(documents, st.sampled_from((1, 2)), media_types)
def test_any_document_is_read_or_refused(document: Any, version: int, media_type: str) -> None:
    if isinstance(document, dict):
        document.setdefault("schemaVersion", version)
    raw = json.dumps(document).encode()
    for read in (lambda: m.parse_document(raw, media_type), lambda: m.parse_image_config(raw)):
        try:
            read()
        except m.InvalidDocument:
            pass


@given(st.binary(max_size=200), media_types)
def test_any_bytes_are_read_or_refused(raw: bytes, media_type: str) -> None:
    for read in (lambda: m.parse_document(raw, media_type), lambda: m.parse_image_config(raw)):
        try:
            read()
        except m.InvalidDocument:
            pass


def test_halves_of_surrogates_do_not_travel_on() -> None:
    config = m.parse_image_config(rb'{"rootfs":{},"author":"a\ud800b","comment":"\ud83d\ude00"}')

    assert (config.author, config.comment) == ("a\ufffdb", "\U0001f600")
