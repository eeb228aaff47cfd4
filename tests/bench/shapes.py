"""Images of two shapes that stress a pull in different ways."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from dataclasses import dataclass

from tests.compat.images import CONFIG_TYPE, CREATED, LAYER_TYPE, MANIFEST_TYPE, compact, digest


@dataclass(frozen=True)
class Packed:
    """Documents and blobs made once, with what `images.push` asks of an image."""

    blobs: list[bytes]
    manifest: bytes


def pack(tars: list[bytes]) -> Packed:
    layers = [gzip.compress(tar, 1, mtime=0) for tar in tars]
    config = compact(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["true"]},
            "created": CREATED,
            "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar in tars]},
        }
    )

    def descriptor(media_type: str, data: bytes) -> dict[str, object]:
        return {"mediaType": media_type, "size": len(data), "digest": digest(data)}

    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": descriptor(CONFIG_TYPE, config),
        "layers": [descriptor(LAYER_TYPE, layer) for layer in layers],
    }
    return Packed([config, *layers], compact(manifest))


def content(chance: random.Random, size: int) -> bytes:
    """Bytes that gzip halves, as programs and libraries are."""
    noise = chance.randbytes(size // 2)
    return b"".join(noise[at : at + 512] + b"\0" * 512 for at in range(0, len(noise), 512))[:size]


def tar(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def big_files() -> Packed:
    """300 MB in twelve files, in three layers."""
    chance = random.Random(300)
    return pack([tar([(f"big/{n}-{i}", content(chance, 25_000_000)) for i in range(4)]) for n in range(3)])


def small_files() -> Packed:
    """20,000 files of 500 to 8,000 bytes in 400 directories, in two layers."""
    chance = random.Random(20_000)
    layers = []
    for n in range(2):
        files = [(f"srv/{n}/{i % 200}/{i}", content(chance, chance.randrange(500, 8000))) for i in range(10_000)]
        layers.append(tar(files))
    return pack(layers)
