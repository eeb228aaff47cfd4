"""Sidecars: what is written is read again, and anything else is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.digest import Digest, sha256_digest
from balenapy.core.reference import parse_reference
from balenapy.core.sidecar import (
    ImageSidecar,
    InvalidSidecar,
    LayerSidecar,
    SidecarDocument,
    decode_image,
    decode_layer,
)

digests = st.binary(max_size=8).map(sha256_digest)
layers = st.builds(
    LayerSidecar,
    chain_id=digests,
    parent=st.none() | digests,
    diff_id=digests,
    blob=digests,
    blob_size=st.integers(0, 2**63 - 1),
    media_type=st.text(),
)


def image(*raw: bytes) -> ImageSidecar:
    documents = tuple(SidecarDocument(sha256_digest(data), "a/b", data) for data in raw)
    names = (parse_reference("app:1"), parse_reference(f"app@{sha256_digest(b'm')}"))
    return ImageSidecar(documents[0].digest, documents, tuple((name, "m", "i") for name in names))


@given(layers)
def test_a_layer_is_read_as_it_was_written(layer: LayerSidecar) -> None:
    assert decode_layer(layer.encode()) == layer


@given(st.lists(st.binary(), min_size=1, max_size=4))
def test_an_image_is_read_as_it_was_written(raw: list[bytes]) -> None:
    assert decode_image(image(*raw).encode()) == image(*raw)


@given(
    st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_anything_else_is_refused(data: bytes) -> None:
    for decode in (decode_layer, decode_image):
        with pytest.raises(InvalidSidecar):
            decode(data)


@given(st.data())
def test_one_damaged_byte_is_refused_or_changes_no_document(data: st.DataObject) -> None:
    whole = image(b"config", b"manifest")
    text = bytearray(whole.encode())
    position = data.draw(st.integers(0, len(text) - 1))
    text[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = decode_image(bytes(text))
    except InvalidSidecar:
        return
    assert [document.raw for document in read.documents] == [b"config", b"manifest"]
    assert read.image_id == Digest.parse(str(whole.image_id))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(InvalidSidecar):
        decode_layer(b"[" * 100_000)
