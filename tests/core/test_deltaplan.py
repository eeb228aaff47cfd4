"""What is asked of a pull about deltas, what is offered, and what is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

import balenapy.config
from balenapy.core import deltaimage, deltaplan
from balenapy.core.deltaplan import Base, DeltaRequest, Way, choose, entries_for, native_ways, parse_request
from balenapy.core.digest import sha256_digest
from balenapy.core.manifest import Artifact, Descriptor, Index, Manifest, parse_image_config
from balenapy.errors import InvalidParameter, SystemFailure
from delta import artifact, publish

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def request(default: str = "auto", **headers: str) -> DeltaRequest:
    given = {f"X-Balena-Delta{'-' if name else ''}{name}": value for name, value in headers.items()}
    given["X-Balena-Delta"] = given.pop("X-Balena-Delta-Mode", "")
    return parse_request(lambda name: given.get(name, ""), default)


def test_both_packages_mean_the_same_documents() -> None:
    assert (deltaplan.ARTIFACT_TYPE, deltaplan.LAYER_TYPE) == (artifact.ARTIFACT_TYPE, artifact.LAYER_TYPE)
    assert deltaplan.BASE_ANNOTATION == artifact.BASE_ANNOTATION
    assert deltaplan.TARGET_ANNOTATION == artifact.TARGET_ANNOTATION
    assert deltaplan.CODECS_ANNOTATION == artifact.CODECS_ANNOTATION
    assert deltaplan.TAR_DIFF_TYPE == artifact.TAR_DIFF_TYPE
    assert deltaplan.TAR_DIFF_TARGET == artifact.TAR_DIFF_TARGET
    assert (deltaplan.TAR_DIFF_FROM, deltaplan.TAR_DIFF_TO) == (artifact.TAR_DIFF_FROM, artifact.TAR_DIFF_TO)
    assert deltaplan.DELTA_INDEX_TAG == publish.DELTA_INDEX_TAG
    assert balenapy.config.DELTA_MODES == deltaplan.MODES


def test_without_headers_a_pull_does_what_the_configuration_says() -> None:
    assert request() == DeltaRequest()
    assert request("off").mode == "off"


def test_headers_are_read() -> None:
    found = request(
        "off",
        Mode="require",
        Base=f"app:1, {A},0123abcd",
        From="registry.example:5000/deltas",
        Codecs="zstd, bsdiff",
        **{"Max-Bytes": "1000"},
    )

    assert found == DeltaRequest(
        "require",
        ("app:1", A, "0123abcd"),
        "registry.example:5000/deltas",
        frozenset(("bsdiff", "zstd")),
        1000,
    )
    assert request(From="oci-layout:/mnt/stick").layout == request(From="/mnt/stick").layout == "/mnt/stick"
    assert found.layout == ""


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Mode", "always"),
        ("Mode", "AUTO"),
        ("Base", "Not A Reference"),
        ("Base", "app:1,UPPER/case"),
        ("From", "oci-layout:relative"),
        ("From", "./relative"),
        ("From", "oci-layout:"),
        ("Codecs", "gzip"),
        ("Codecs", "bsdiff,brotli"),
        ("Max-Bytes", "-1"),
        ("Max-Bytes", "1MB"),
        ("Max-Bytes", "9" * 30),
        ("Max-Bytes", "١"),
    ],
)
def test_an_unknown_value_is_refused_by_its_header(header: str, value: str) -> None:
    name = "X-Balena-Delta" if header == "Mode" else f"X-Balena-Delta-{header}"

    with pytest.raises(InvalidParameter, match=f"^{name}: "):
        request(**{header: value})


def blob(size: int, kind: str = deltaplan.LAYER_TYPE) -> Descriptor:
    return Descriptor(kind, sha256_digest(str(size).encode()), size)


def manifest(*sizes: int) -> Manifest:
    raw = b"{}"
    return Manifest("", sha256_digest(raw), raw, blob(1), tuple(blob(size) for size in sizes))


BASE = Base(A, ("one", "two"), ("chain-one", "chain-two"))
TARGET = sha256_digest(b"manifest")
ARTIFACT = Artifact(
    sha256_digest(b""),
    deltaplan.ARTIFACT_TYPE,
    (blob(10), blob(20)),
    {deltaplan.BASE_ANNOTATION: A, deltaplan.TARGET_ANNOTATION: C},
)


def test_a_native_delta_has_a_blob_for_each_layer_that_its_base_lacks() -> None:
    offers = native_ways(ARTIFACT, TARGET, C, ["one", "new", "two", "newer"], [BASE], DeltaRequest())

    assert offers == {
        "new": [Way("native", A, "chain-two", blob(10))],
        "newer": [Way("native", A, "chain-two", blob(20))],
    }


@pytest.mark.parametrize(
    ("target", "diff_ids", "bases", "codecs"),
    [
        (B, ["one", "new", "newer"], [BASE], "bsdiff,zstd"),  # for another target
        (C, ["one", "new", "newer"], [], "bsdiff,zstd"),  # the base is not here
        (C, ["one", "new", "newer"], [BASE], "bsdiff"),  # a codec too few
        (C, ["one", "new"], [BASE], "bsdiff,zstd"),  # a blob too many
        (C, ["one", "new", "newer", "newest"], [BASE], "bsdiff,zstd"),
    ],
)
def test_a_native_delta_that_does_not_fit_offers_nothing(
    target: str, diff_ids: list[str], bases: list[Base], codecs: str
) -> None:
    assert native_ways(ARTIFACT, TARGET, target, diff_ids, bases, request(Codecs=codecs)) == {}


def test_a_delta_of_another_manifest_offers_nothing() -> None:
    of_another = replace(ARTIFACT, subject=sha256_digest(b"another"))
    of_this = replace(ARTIFACT, subject=TARGET, annotations={deltaplan.BASE_ANNOTATION: A})

    assert native_ways(of_another, TARGET, C, ["new", "newer"], [BASE], DeltaRequest()) == {}
    assert native_ways(of_this, TARGET, C, ["new", "newer"], [BASE], DeltaRequest()) != {}


def test_a_delta_may_say_which_codecs_it_has() -> None:
    said = Artifact(
        ARTIFACT.digest,
        ARTIFACT.artifact_type,
        ARTIFACT.layers,
        {**ARTIFACT.annotations, deltaplan.CODECS_ANNOTATION: "bsdiff"},
    )

    assert native_ways(said, TARGET, C, ["new", "newer"], [BASE], request(Codecs="bsdiff")) != {}
    assert native_ways(said, TARGET, C, ["new", "newer"], [BASE], request(Codecs="zstd")) == {}


def test_entries_of_other_bases_are_not_looked_at_and_their_number_is_bounded() -> None:
    def entry(number: int, base: str) -> Descriptor:
        annotations = {deltaplan.BASE_ANNOTATION: base} if base else {}
        return Descriptor("", sha256_digest(str(number).encode()), 1, annotations=annotations)

    other = Base(B, ("x",), ("x",))
    known, silent, better = entry(1, A), entry(2, ""), entry(3, B)
    entries = [known, entry(4, C), silent, better]

    assert entries_for(entries, [other, BASE]) == [better, known, silent]
    assert len(entries_for([silent] * 100, [BASE])) == deltaplan.ENTRIES_MAX
    index = Index("", sha256_digest(b""), b"", (known,))
    assert deltaplan.native_entries(index) == [known]


def test_the_cheapest_way_of_each_layer_is_chosen() -> None:
    cheap, dear, equal = (Way("native", base, "c", blob(size)) for base, size in ((A, 5), (B, 50), (A, 70)))
    offers = {"x": [dear, cheap], "z": [equal]}

    plan = choose(manifest(100, 80, 70), ["x", "y", "z"], [0, 1, 2], offers, DeltaRequest(), "")

    assert plan.ways == {0: cheap}
    assert (plan.fetched_bytes, plan.full_bytes, plan.replaced_bytes) == (155, 250, 100)
    assert plan.aux(peak_disk_bytes=1, peak_memory_bytes=2)["Delta"] == {
        "Base": A,
        "Codec": "native",
        "DeltaBytes": 5,
        "FullBytes": 100,
        "Layers": 1,
        "PeakDiskBytes": 1,
        "PeakMemoryBytes": 2,
    }


def test_a_plan_says_why_it_has_no_delta() -> None:
    way = {"x": [Way("native", A, "c", blob(5))]}
    big = {"x": [Way("native", A, "c", blob(500))]}
    layers = manifest(100)

    assert choose(layers, ["x"], [0], {}, DeltaRequest(), "because").why_none == "because"
    assert choose(layers, ["x"], [0], big, DeltaRequest(), "").why_none == "the deltas are no smaller than the layers"
    bounded = choose(layers, ["x"], [0], way, DeltaRequest(max_bytes=4), "")
    assert (bounded.ways, bounded.why_none) == ({}, "the cheapest plan needs 5 bytes of at most 4")
    assert choose(layers, ["x"], [0], way, DeltaRequest(max_bytes=5), "").ways != {}


def test_a_base_that_is_no_digest_is_refused() -> None:
    config = parse_image_config(b'{"config":{"Labels":{"io.resin.delta.base":"x"}},"rootfs":{"type":"layers"}}')
    with pytest.raises(SystemFailure, match=r'^parsing base image "x": '):
        deltaimage.delta_image(config)
