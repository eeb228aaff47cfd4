"""References: what dockerd 20.10.24 said to each of these, and properties of the grammar."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.digest import Digest
from balenapy.core.reference import Reference, parse_pull_reference, parse_reference
from balenapy.errors import InvalidParameter

A = "a" * 64
DIGEST = f"sha256:{A}"
BAD = "invalid reference format"
UPPER = "invalid reference format: repository name must be lowercase"

GOOD = [
    # as typed, canonical, familiar with the default tag
    ("busybox", "docker.io/library/busybox", "busybox:latest"),
    ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
    ("user/app", "docker.io/user/app", "user/app:latest"),
    ("a/b/c/d", "docker.io/a/b/c/d", "a/b/c/d:latest"),
    ("library/busybox", "docker.io/library/busybox", "busybox:latest"),
    ("docker.io/x", "docker.io/library/x", "x:latest"),
    ("index.docker.io/x", "docker.io/library/x", "x:latest"),
    ("docker.io/library/a/b", "docker.io/library/a/b", "library/a/b:latest"),
    ("localhost", "docker.io/library/localhost", "localhost:latest"),
    ("localhost:5000", "docker.io/library/localhost:5000", "localhost:5000"),  # a tag
    ("localhost/x", "localhost/x", "localhost/x:latest"),
    ("localhost:5000/x:y", "localhost:5000/x:y", "localhost:5000/x:y"),
    ("Host.x/b", "Host.x/b", "Host.x/b:latest"),
    ("127.0.0.1:5000/library/x", "127.0.0.1:5000/library/x", "127.0.0.1:5000/library/x:latest"),
    (f"x@{DIGEST}", f"docker.io/library/x@{DIGEST}", f"x@{DIGEST}"),
    (f"x:tag@{DIGEST}", f"docker.io/library/x:tag@{DIGEST}", f"x:tag@{DIGEST}"),
    ("x:_tag", "docker.io/library/x:_tag", "x:_tag"),
    (f"x:{'t' * 128}", f"docker.io/library/x:{'t' * 128}", f"x:{'t' * 128}"),
    ("a__b", "docker.io/library/a__b", "a__b:latest"),
    ("a---b", "docker.io/library/a---b", "a---b:latest"),
    ("a.b-c_d", "docker.io/library/a.b-c_d", "a.b-c_d:latest"),
    (f"user/{A}", f"docker.io/user/{A}", f"user/{A}:latest"),
    ("under_score.x/app", "under_score.x/app", "under_score.x/app:latest"),  # no host, yet a name
]

REFUSED = [
    ("", BAD),
    ("a:", BAD),
    (":a", BAD),
    ("a:b:c", BAD),
    ("a@b", BAD),
    ("a@", BAD),
    ("a//b", BAD),
    ("/a", BAD),
    ("a/", BAD),
    ("a.b/c/", BAD),
    ("-a", BAD),
    ("a-", BAD),
    ("a.", BAD),
    ("a..b", BAD),
    ("a___b", BAD),
    ("a_.b", BAD),
    ("a b", BAD),
    ("a\n", BAD),
    ("é", BAD),
    ("b:é", BAD),
    ("x:-tag", BAD),
    ("x:.tag", BAD),
    (f"x:{'t' * 129}", BAD),
    ("host:port/x", BAD),
    ("[::1]:5000/x", BAD),
    (f"x@sha256:{'a' * 31}", BAD),
    ("BAD", UPPER),
    ("a/BAD", UPPER),
    ("A/b", UPPER),
    ("h.x:5000/X", UPPER),
    ("A" * 64, UPPER),
    (A, f"invalid repository name ({A}), cannot specify 64-byte hexadecimal strings"),
    ("a" * 300, "repository name must not be more than 255 characters"),
    (f"x@sha256:{'a' * 40}", "invalid checksum digest length"),
    (f"x@sha256:{'A' * 64}", "invalid checksum digest format"),
    (f"x@md5:{'a' * 32}", "unsupported digest algorithm"),
]


@pytest.mark.parametrize(("text", "canonical", "familiar"), GOOD)
def test_a_reference_has_a_canonical_and_a_familiar_form(text: str, canonical: str, familiar: str) -> None:
    reference = parse_reference(text)

    assert canonical == reference.canonical() == str(reference)
    assert familiar == reference.with_default_tag().familiar()


@pytest.mark.parametrize(("text", "problem"), REFUSED)
def test_a_bad_reference_is_refused_in_the_reference_engines_words(text: str, problem: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        parse_reference(text)

    assert problem == caught.value.message


def test_the_longest_name_counts_its_domain() -> None:
    path = "a" * (255 - len("docker.io/library/"))

    assert path == parse_reference(path).familiar_name()
    with pytest.raises(InvalidParameter, match="255"):
        parse_reference(path + "a")


@pytest.mark.parametrize(
    ("image", "tag", "canonical"),
    [
        ("x", "", "docker.io/library/x"),
        ("x:", "", "docker.io/library/x"),
        ("x", "1", "docker.io/library/x:1"),
        ("x:1", "2", "docker.io/library/x:2"),
        ("x:1", DIGEST, f"docker.io/library/x@{DIGEST}"),
        (f"x@{DIGEST}", "2", f"docker.io/library/x:2@{DIGEST}"),
    ],
)
def test_a_pulls_tag_replaces_the_names_and_may_be_a_digest(image: str, tag: str, canonical: str) -> None:
    assert canonical == parse_pull_reference(image, tag).canonical()


@pytest.mark.parametrize("tag", ["a b", f"sha256:{'a' * 40}", "-x", "t" * 129])
def test_a_pulls_bad_tag_is_refused(tag: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^invalid tag format$"):
        parse_pull_reference("x", tag)


component = st.from_regex(r"\A[a-z0-9]{1,8}(?:(?:[._]|__|-{1,3})[a-z0-9]{1,8}){0,3}\Z")
domain = st.from_regex(
    r"\A(?:localhost|[a-zA-Z0-9][a-zA-Z0-9-]{0,6}[a-z0-9]\.[a-z]{2,5}|h:5|[a-z]{2,5})(?::[0-9]{1,5})?\Z"
)
tags = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
digests = st.builds(lambda raw: Digest("sha256", raw.hex()), st.binary(min_size=32, max_size=32))


@given(
    domain.filter(lambda name: "." in name or ":" in name or name == "localhost"),
    st.lists(component, min_size=1, max_size=4).map("/".join),
    st.none() | tags,
    st.none() | digests,
)
def test_reading_the_canonical_form_gives_the_same_reference(
    host: str, path: str, tag: str | None, digest: Digest | None
) -> None:
    if host.count(":") > 1:
        return
    reference = Reference(host, path, tag, digest)

    assert reference == parse_reference(reference.canonical())
    assert reference == parse_reference(reference.familiar())


@given(st.text(alphabet=string.ascii_letters + string.digits + "._-:/@é \n", max_size=80) | st.text())
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidParameter:
        return
    again = parse_reference(reference.canonical()) if reference.domain else reference

    assert reference == again
    assert len(reference.name) <= 255
