"""A registry that serves whatever a test puts into it, true or not."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.compat.images import CONFIG_TYPE, LAYER_TYPE, MANIFEST_TYPE, compact, digest


class LyingRegistry:
    """`manifests` by "repository:tag or digest" as (media type, bytes), `blobs` by digest."""

    def __init__(self, port: int) -> None:
        self.host = f"127.0.0.1:{port}"
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}

    def add_blob(self, data: bytes, name: str = "") -> str:
        """Keep `data` under its digest, or under the one a lie needs."""
        name = name or digest(data)
        self.blobs[name] = data
        return name

    def add_image(
        self,
        repository: str,
        tars: list[bytes],
        *,
        blobs: list[bytes] | None = None,
        diff_ids: list[str] | None = None,
        blob_digests: list[str] | None = None,
    ) -> str:
        """An image of these tars as `repository:1`; what is given by name replaces the truth. Its reference."""
        packed = blobs if blobs is not None else [gzip.compress(tar, mtime=0) for tar in tars]
        config = compact(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Cmd": ["sh"]},
                "rootfs": {"type": "layers", "diff_ids": diff_ids or [digest(tar) for tar in tars]},
            }
        )
        names = blob_digests or [digest(blob) for blob in packed]
        layers = [
            {"mediaType": LAYER_TYPE, "size": len(blob), "digest": self.add_blob(blob, name)}
            for blob, name in zip(packed, names, strict=True)
        ]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "size": len(config), "digest": self.add_blob(config)},
            "layers": layers,
        }
        return self.add_manifest(repository, compact(manifest))

    def add_manifest(self, repository: str, data: bytes, media_type: str = MANIFEST_TYPE, tag: str = "1") -> str:
        self.manifests[f"{repository}:{tag}"] = (media_type, data)
        separator = "@" if tag.startswith("sha256:") else ":"
        return f"{self.host}/{repository}{separator}{tag}"


@contextlib.contextmanager
def lying_registry() -> Iterator[LyingRegistry]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.removeprefix("/v2/")
            if path == "":
                return self.answer(200, "application/json", b"{}")
            repository, _, rest = path.partition("/manifests/")
            if rest and f"{repository}:{rest}" in registry.manifests:
                return self.answer(200, *registry.manifests[f"{repository}:{rest}"])
            name = path.rpartition("/blobs/")[2]
            if name in registry.blobs:
                return self.answer(200, "application/octet-stream", registry.blobs[name])
            return self.answer(404, "application/json", b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no"}]}')

        do_HEAD = do_GET

        def answer(self, status: int, media_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        registry = LyingRegistry(server.server_port)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()
