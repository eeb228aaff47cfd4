"""Small real images made from Debian's static busybox, and pushed to a registry on loopback.

Everything is honest unless a test asks otherwise: `Layer` and `Image` let it lie about digests, diff IDs and sizes.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"
CREATED = "2024-01-02T03:04:05.678Z"
BUSYBOX = shutil.which("busybox") or "/bin/busybox"


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Layer:
    """One layer: its tar and what the documents say of it."""

    tar: bytes
    created_by: str = "layer"
    diff_id: str = ""  # empty: the true one

    @property
    def blob(self) -> bytes:
        return gzip.compress(self.tar, mtime=0)

    @property
    def stated_diff_id(self) -> str:
        return self.diff_id or digest(self.tar)


@dataclass(frozen=True)
class Image:
    layers: tuple[Layer, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = "amd64"

    @property
    def config_bytes(self) -> bytes:
        return compact(
            {
                "architecture": self.architecture,
                "config": dict(self.config),
                "created": CREATED,
                "history": [
                    *({"created": CREATED, "created_by": layer.created_by} for layer in self.layers),
                    {"created": CREATED, "created_by": '/bin/sh -c #(nop)  CMD ["sh"]', "empty_layer": True},
                ],
                "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": [layer.stated_diff_id for layer in self.layers]},
            }
        )

    @property
    def image_id(self) -> str:
        return digest(self.config_bytes)

    @property
    def manifest(self) -> bytes:
        def descriptor(media_type: str, data: bytes) -> dict[str, Any]:
            return {"mediaType": media_type, "size": len(data), "digest": digest(data)}

        return compact(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "config": descriptor(CONFIG_TYPE, self.config_bytes),
                "layers": [descriptor(LAYER_TYPE, layer.blob) for layer in self.layers],
            }
        )

    @property
    def blobs(self) -> list[bytes]:
        return [self.config_bytes, *(layer.blob for layer in self.layers)]


# -- tars --


def directory(name: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, uid, gid
    return entry


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.mode = kind, target, 0o777
    return entry


def device(name: str, major: int, minor: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.devmajor, entry.devminor, entry.mode = tarfile.CHRTYPE, major, minor, 0o666
    return entry


def file(name: str, data: bytes = b"", mode: int = 0o644, uid: int = 0, gid: int = 0) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.uid, entry.gid = len(data), mode, uid, gid
    return entry, data


def make_tar(entries: Iterable[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for item in entries:
            entry, data = item if isinstance(item, tuple) else (item, b"")
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def busybox_layer() -> Layer:
    """A root file system of one static program and its names."""
    with open(BUSYBOX, "rb") as program:
        binary = program.read()
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    entries: list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]] = [
        directory("bin"),
        file("bin/busybox", binary, 0o755),
        *(link(f"bin/{name}", "busybox") for name in sorted(set(applets) - {"busybox"})),
        directory("dev"),
        directory("etc"),
        file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n"),
        file("etc/group", b"root:x:0:\naudio:x:29:nobody\nnogroup:x:65534:\n"),
        directory("home", uid=65534, gid=65534),
        directory("proc"),
        directory("root", 0o700),
        directory("sys"),
        directory("tmp", 0o1777),
        directory("var"),
    ]
    return Layer(make_tar(entries), "/bin/sh -c #(nop) ADD file:busybox in / ")


PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def busybox_image() -> Image:
    """What everybody calls busybox: a shell, a PATH, `sh` as its command; two layers."""
    notes = make_tar([directory("etc"), file("etc/note", b"second layer\n")])
    return Image(
        (busybox_layer(), Layer(notes, "/bin/sh -c echo second layer > /etc/note")),
        {"Env": [PATH], "Cmd": ["sh"]},
    )


def app_image() -> Image:
    """An image that sets everything an image can set."""
    content = make_tar(
        [
            directory("data", 0o750, 65534, 65534),
            file("data/seed", b"from the image\n", 0o640, 65534, 65534),
            directory("srv"),
            file("srv/entry", b'#!/bin/sh\necho "entry $*"\nexec "$@"\n', 0o755),
            file("srv/plain", b"not executable\n"),
        ]
    )
    config = {
        "Env": [PATH, "FROM_IMAGE=image", "OVERRIDDEN=image"],
        "Entrypoint": ["/srv/entry"],
        "Cmd": ["echo", "default"],
        "User": "nobody",
        "WorkingDir": "/srv",
        "Labels": {"from.image": "yes", "overridden": "image"},
        "ExposedPorts": {"8080/tcp": {}},
        "Volumes": {"/data": {}},
        "StopSignal": "SIGUSR1",
    }
    return Image((busybox_layer(), Layer(content, "/bin/sh -c #(nop) COPY dir:app in / ")), config)


# -- pushing --


def push(registry: str, repository: str, tag: str, image: Image) -> str:
    """Put an image into a registry that needs no credentials (`host:port`); the digest of its manifest."""
    connection = http.client.HTTPConnection(registry, timeout=30)

    def call(method: str, path: str, body: bytes = b"", **headers: str) -> http.client.HTTPResponse:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer

    try:
        for blob in image.blobs:
            name = digest(blob)
            if call("HEAD", f"/v2/{repository}/blobs/{name}").status == 200:
                continue
            location = call("POST", f"/v2/{repository}/blobs/uploads/").headers["Location"]
            location = location.split(registry, 1)[-1]
            upload = f"{location}{'&' if '?' in location else '?'}digest={name}"
            answer = call("PUT", upload, blob, **{"Content-Type": "application/octet-stream"})
            assert answer.status == 201, f"{upload}: {answer.status} {answer.reason}"
        answer = call("PUT", f"/v2/{repository}/manifests/{tag}", image.manifest, **{"Content-Type": MANIFEST_TYPE})
        assert answer.status == 201, f"{repository}:{tag}: {answer.status} {answer.reason}"
        return digest(image.manifest)
    finally:
        connection.close()
