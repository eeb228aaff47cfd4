"""Digests name exact bytes; the grammar and its refusals are go-digest's."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.digest import HEX_LENGTHS, Digest, chain_id, chain_ids, sha256_digest
from balenapy.errors import InvalidParameter

A = "a" * 64


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "invalid checksum digest format"),
        ("sha256", "invalid checksum digest format"),
        ("sha256:", "invalid checksum digest format"),
        (f":{A}", "invalid checksum digest format"),
        ("sha256:abc", "invalid checksum digest length"),
        (f"sha256:{A}a", "invalid checksum digest length"),
        (f"sha256:{'A' * 64}", "invalid checksum digest format"),
        (f"sha256:{'g' * 64}", "invalid checksum digest format"),
        (f"sha512:{A}", "invalid checksum digest length"),
        (f"md5:{'a' * 32}", "unsupported digest algorithm"),
        (f"MD5:{'a' * 32}", "invalid checksum digest format"),
        (f"sha256:{'a' * 62}é", "invalid checksum digest format"),  # 64 bytes in UTF-8
    ],
)
def test_a_bad_digest_is_refused_in_the_reference_engines_words(text: str, problem: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        Digest.parse(text)

    assert caught.value.message == problem


@given(st.sampled_from(sorted(HEX_LENGTHS)), st.binary())
def test_reading_what_was_written_gives_the_same_digest(algorithm: str, data: bytes) -> None:
    digest = Digest(algorithm, hashlib.new(algorithm, data).hexdigest())

    assert digest == Digest.parse(str(digest))
    assert digest.matches(data)
    assert not digest.matches(data + b"x")


@given(st.text())
def test_any_text_is_a_digest_or_refused(text: str) -> None:
    try:
        digest = Digest.parse(text)
    except InvalidParameter:
        return
    assert text == str(digest)


def test_chain_ids_are_those_of_the_image_spec() -> None:
    one, two, three = (sha256_digest(name) for name in (b"1", b"2", b"3"))
    second = sha256_digest(f"{one} {two}".encode())
    third = sha256_digest(f"{second} {three}".encode())

    assert (one, second, third) == chain_ids((one, two, three))
    assert third == chain_id((one, two, three))
    assert chain_ids(()) == ()
