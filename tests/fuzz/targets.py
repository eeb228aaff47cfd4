"""What is fuzzed: each target has good inputs, words of its format, and a function that reads one and uses it all."""

from __future__ import annotations

import contextlib
import io
import os
import random
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import zstandard

from balenapy.core import manifest, sidecar, tarsplit
from balenapy.core.digest import Digest, chain_id, sha256_digest
from balenapy.core.reference import parse_pull_reference, parse_reference
from balenapy.core.tarstream import MAX_PENDING_BYTES, End, Entry, NeedData, TarReader
from balenapy.errors import EngineError
from balenapy.worker.splitfile import read_records
from tests.compat.images import device, directory, file, link, make_tar
from tests.fuzz.mutate import damage, damage_json
from tests.images_fixture import layered, multi_platform

HERE = manifest.platform_of_machine("armv7l", bits=32)


@dataclass(frozen=True)
class Target:
    read: Callable[[bytes, random.Random], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()
    mutate: Callable[..., bytes] = damage
    memory_bytes: int = 16 << 20  # beyond the input, whatever it says
    refusals: tuple[type[Exception], ...] = field(default=(EngineError,))


# --- tar


def _read_tar(data: bytes, choose: random.Random) -> None:
    """In pieces of any size; all bytes come out again."""
    reader = TarReader()
    at = seen = 0
    size = choose.choice((len(data) + 1, 512, 7, 10_000))
    while True:
        event = reader.next_event()
        if isinstance(event, NeedData):
            piece = data[at : at + size]
            at += len(piece)
            reader.feed(piece)
            if not piece:
                if seen != len(data) and isinstance(reader.next_event(), NeedData):
                    raise AssertionError(f"{len(data) - seen} bytes did not come out")
                return
        elif isinstance(event, Entry | End):
            seen += len(event.raw)
        else:
            seen += len(event)


def _tars() -> tuple[bytes, ...]:
    long = "d/" * 80 + "x" * 120
    pax = tarfile.TarInfo(long)
    pax.pax_headers = {"SCHILY.xattr.user.a": "b", "mtime": "1700000000.123456789", "size": "3", "path": long}
    entries = [
        directory("d"), file("d/f", b"content" * 200), link("l", "d/f"), link("h", "d/f", tarfile.LNKTYPE),
        device("null", 1, 3), file("empty"), pax,
    ]  # fmt: skip
    made = [make_tar(entries)]
    for form in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            one = tarfile.TarInfo(long if form == tarfile.GNU_FORMAT else "short")
            one.size = 5
            archive.addfile(one, io.BytesIO(b"12345"))
        made.append(buffer.getvalue())
    return tuple(made)


# --- tar-split


def _split_of(tar: bytes) -> bytes:
    records = [tarsplit.MAGIC]
    reader = TarReader()
    reader.feed(tar)
    reader.feed(b"")
    entry: Entry | None = None
    content = b""

    def finish() -> None:
        if entry is not None and content:
            records.append(tarsplit.encode_file(len(content), zlib.crc32(content), entry.name))

    while True:
        event = reader.next_event()
        if isinstance(event, NeedData):
            finish()
            return b"".join(records)
        if isinstance(event, Entry | End):
            finish()
            content = b""
            entry = event if isinstance(event, Entry) else None
            records.append(tarsplit.encode_segment(event.raw))
        else:
            content += bytes(event)


def _read_split(data: bytes, choose: random.Random) -> None:
    reader = tarsplit.SplitReader()
    size = choose.choice((len(data) + 1, 1000, 13))
    records = [record for at in range(0, len(data), size) for record in reader.feed(data[at : at + size])]
    reader.close()
    with contextlib.suppress(EngineError):  # other contents than the records say
        for _ in tarsplit.join(records, lambda one: [b"content" * 200][: one.size > 0]):
            pass


def _read_split_file(data: bytes, _choose: random.Random) -> None:
    """Compressed, as it lies on the disk."""
    descriptor = os.memfd_create("split")
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    for _ in read_records(descriptor):
        pass


# --- documents


def _read_document(data: bytes, choose: random.Random) -> None:
    media_type = choose.choice(("", *_MEDIA_TYPES))
    document = manifest.parse_document(data, media_type)
    if isinstance(document, manifest.Index):
        manifest.choose_platform(document, HERE)
        return
    for layer in document.layers:
        assert layer.size_bytes >= 0, "a negative size"
        assert isinstance(layer.is_foreign, bool)
        assert layer.digest.short
    assert document.digest == sha256_digest(data)


def _read_config(data: bytes, _choose: random.Random) -> None:
    config = manifest.parse_image_config(data)
    assert config.image_id == sha256_digest(data)
    assert config.chain_id == (str(chain_id(config.diff_ids)) if config.diff_ids else "")
    assert len(config.chain_ids) == len(config.diff_ids)
    assert config.created_ns is None or isinstance(config.created_ns, int)
    assert str(config.platform)
    config.config.get("Labels")


_MEDIA_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
    "application/json",
)
_WORDS = (b"sha256:", b"-1", b"1e999", b"null", b"{}", b"[]", b"\\u0000", b"\\ud800", b'"mediaType":', b"linux", b"NaN")


def _read_reference(data: bytes, choose: random.Random) -> None:
    """What is parsed comes back from its canonical form."""
    text = data.decode("utf-8", "surrogateescape")
    found = (
        parse_pull_reference(text, choose.choice(("", "1", text))) if choose.random() < 0.3 else parse_reference(text)
    )
    assert parse_reference(found.canonical()).canonical() == found.canonical()
    # `docker.io/a.b/c` is shown as `a.b/c`, which means another registry: so it is in the engine we replace.
    if "." not in found.path.partition("/")[0] and not found.path.startswith("localhost/"):
        assert parse_reference(found.familiar()).canonical() == found.canonical()


_DIGEST = sha256_digest(b"config")
_REFERENCES = (
    b"busybox", b"busybox:1.0", b"registry.local:5000/team/app:v1", b"localhost/x", b"docker.io/library/x:latest",
    f"a/b/c@{_DIGEST}".encode(), f"team/app:1@{_DIGEST}".encode(), b"[::1]:5000/x:y", b"a" * 64,
)  # fmt: skip


def _read_sidecars(data: bytes, _choose: random.Random) -> None:
    try:
        assert sidecar.decode_layer(data).encode()
    except sidecar.InvalidSidecar:
        again = sidecar.decode_image(data)
        assert again.file_name
        assert sidecar.decode_image(again.encode()) == again


def _sidecars() -> tuple[bytes, ...]:
    image = layered()
    digest = Digest.parse(image.layers[0].digest)
    config = manifest.parse_image_config(image.config_blob.data)
    layer = sidecar.LayerSidecar(config.chain_ids[1], config.chain_ids[0], config.diff_ids[1], digest, 123, "x/y")
    papers = tuple(
        sidecar.SidecarDocument(Digest.parse(blob.digest), blob.media_type, blob.data)
        for blob in (image.config_blob, image.manifest)
    )
    name = (parse_reference("local/x:1"), image.manifest.digest, "")
    return (layer.encode(), sidecar.ImageSidecar(config.image_id, papers, (name,)).encode())


def targets() -> dict[str, Target]:
    tars = _tars()
    splits = tuple(_split_of(tar) for tar in tars)
    packed = tuple(zstandard.ZstdCompressor().compress(split) for split in splits)
    index = multi_platform()
    image = layered()
    return {
        "tar": Target(
            _read_tar, tars, (b"ustar\0" b"00", b"ustar  \0", b"././@LongLink", b"30 mtime=1.5\n", b"\xff" * 8),
            memory_bytes=4 * MAX_PENDING_BYTES,
        ),
        "tar-split": Target(_read_split, splits, (tarsplit.MAGIC,)),
        "tar-split file": Target(_read_split_file, packed, (b"\x28\xb5\x2f\xfd",)),
        "manifest": Target(
            _read_document,
            (image.manifest.data, index.manifest.data, layered("docker").manifest.data),
            _WORDS,
            damage_json,
        ),
        "config": Target(_read_config, (image.config_blob.data, _RICH_CONFIG), _WORDS, damage_json),
        "reference": Target(_read_reference, _REFERENCES, (b":", b"@", b"/", b".", b"//", b"sha256:", b"\xc3\xa9")),
        "sidecar": Target(_read_sidecars, _sidecars(), _WORDS, damage_json, memory_bytes=64 << 20),
    }  # fmt: skip


_RICH_CONFIG = b"""{"architecture":"arm","variant":"v7","os":"linux","author":"x","created":"2024-01-02T03:04:05.678Z",
"config":{"Env":["A=b"],"Cmd":["sh"],"Labels":{"a":"b"},"ExposedPorts":{"80/tcp":{}},"Volumes":{"/d":{}},"User":"1:1",
"Healthcheck":{"Test":["CMD","x"],"Interval":1000000000,"Retries":3},"OnBuild":["RUN x"],"StopSignal":"SIGTERM",
"Entrypoint":["/e"],"WorkingDir":"/w","Shell":["/bin/sh","-c"]},"history":[{"created":"2024-01-02T03:04:05Z",
"created_by":"x","empty_layer":true},{"comment":"c","author":"a"}],"rootfs":{"type":"layers","diff_ids":[
"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]}}"""
