"""A registry on loopback that can misbehave on demand.

It serves what tests put in (`add`), asks for credentials the way it is told to, remembers every request, and applies
faults to chosen ones: cut, stall, drip, error statuses, lies about length and content, an ignored Range, redirects,
tokens that expire. It runs in threads, so it serves code under Trio and engines in other processes alike.

    with fake_registry(auth="token") as registry:
        registry.add("team/app", "1", busybox())
        registry.fault(r"blobs/sha256:", cut_at=1000, times=2)
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import select
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from tests.compat.images import digest
from tests.images_fixture import ImageFixture, IndexFixture
from tests.registry.real_registry import PASSWORD, USERNAME, Certificate

Auth = Literal["none", "basic", "token"]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD /path` holds a match of `pattern`.

    Attributes:
        status, headers, body: answer this instead; headers alone are added to the right answer.
        cut_at: close the connection after so many bytes of the body; the head has promised all of them.
        reset: make that cut a reset instead of an orderly end.
        stall_at: send so many bytes and then nothing until the client goes; a shorter body comes whole.
        drip_bytes: send the body in pieces of this size, as separate packets.
        content_length: announce this length; the body ends where it ends.
        chunked: announce no length.
        ignore_range: answer 200 with everything.
        digest_header: lie in Docker-Content-Digest.
        take_at: of an upload, keep so many bytes more and cut the connection.
    """

    pattern: str
    times: int = 1
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    cut_at: int | None = None
    reset: bool = False
    stall_at: int | None = None
    drip_bytes: int = 0
    content_length: int | None = None
    chunked: bool = False
    ignore_range: bool = False
    digest_header: str = ""
    take_at: int | None = None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    form: Mapping[str, str]


class FakeRegistry:
    """What the registry holds and how it behaves; change it at any time."""

    def __init__(self, host: str, auth: Auth, scheme: str) -> None:
        self.host = host
        self.url = f"{scheme}://{host}"
        self.auth = auth
        self.username, self.password = USERNAME, PASSWORD
        self.anonymous_tokens = False  # whether the token server gives tokens without a password
        self.open_ping = False  # whether /v2/ answers 200 without credentials
        self.token_realm = f"{self.url}/token"
        self.token_lifetime_s = 300
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.tags_page = 1000
        self.homes: dict[str, set[str]] | None = None  # repository -> its blobs; None: every one has all
        self.mounts = True  # whether blobs are taken over from other repositories
        self.has_referrers = False  # whether it lists what refers to a manifest (OCI 1.1)
        self.deletes = True  # whether manifests may be deleted
        self.uploads: dict[str, bytearray] = {}
        self.received_bytes = 0  # of uploads
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.tokens: dict[str, str] = {}  # token -> scope
        self.refresh_tokens: set[str] = set()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def add(self, repository: str, tag: str, image: ImageFixture | IndexFixture) -> str:
        """Hold an image under a tag and its digests; the digest of what the tag names."""
        for blob in image.blobs:
            self.blobs[blob.digest] = blob.data
        for document in image.manifests:
            self.manifests[repository, document.digest] = (document.media_type, document.data)
        named = image.manifest
        self.manifests[repository, tag] = (named.media_type, named.data)
        return named.digest

    def add_blob(self, data: bytes) -> str:
        name = digest(data)
        self.blobs[name] = data
        return name

    def add_manifest(self, repository: str, name: str, media_type: str, data: bytes) -> str:
        """Hold any bytes as a manifest, under `name` and under their digest."""
        self.manifests[repository, name] = self.manifests[repository, digest(data)] = (media_type, data)
        return digest(data)

    def fault(self, pattern: str, **what: Any) -> Fault:
        made = Fault(pattern, **what)
        with self._lock:
            self.faults.append(made)
        return made

    def expire_tokens(self) -> None:
        """Refuse every token given until now."""
        self.tokens.clear()

    def seen(self, pattern: str) -> list[Request]:
        """The requests whose `METHOD /path` holds a match."""
        return [one for one in self.requests if re.search(pattern, f"{one.method} {one.path}")]

    def take_fault(self, line: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    def new_token(self, scope: str) -> str:
        token = f"token-{next(self._numbers)}"
        self.tokens[token] = scope
        return token

    def new_refresh_token(self) -> str:
        token = f"refresh-{next(self._numbers)}"
        self.refresh_tokens.add(token)
        return token


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = True
    registry: FakeRegistry

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is half of what this registry is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PATCH(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def do_DELETE(self) -> None:
        self._handle()

    def _handle(self) -> None:
        registry = self.server.registry
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._body = body
        form = {name: values[0] for name, values in parse_qs(body.decode("latin-1")).items()}
        registry.requests.append(Request(self.command, self.path, dict(self.headers), form))
        fault = registry.take_fault(f"{self.command} {self.path}") or Fault("")
        if fault.status:
            for _ in self._pieces():
                pass
            self._answer(fault.status, fault.body or b"", fault.headers, fault)
            return
        path = urlsplit(self.path).path
        if path == "/token":
            self._token(form)
        elif not self._authorised(path):
            self._challenge()
        elif path == "/v2/":
            self._answer(200, b"{}", fault.headers, fault)
        elif found := re.fullmatch(r"/v2/(.+)/blobs/uploads/(.*)", path):
            self._upload(found[1], found[2], fault)
        elif (found := re.fullmatch(r"/v2/(.+)/manifests/(.+)", path)) and self.command == "PUT":
            name = registry.add_manifest(found[1], found[2], self.headers["Content-Type"], body)
            subject = json.loads(body).get("subject") if registry.has_referrers else None
            referring = {"OCI-Subject": subject["digest"]} if subject else {}
            self._answer(201, b"", {"Docker-Content-Digest": name, **referring, **fault.headers}, fault)
        elif (found := re.fullmatch(r"/v2/(.+)/manifests/(.+)", path)) and self.command == "DELETE":
            self._delete(found[1], found[2])
        elif (found := re.fullmatch(r"/v2/(.+)/referrers/(.+)", path)) and registry.has_referrers:
            self._referrers(found[1], found[2], fault)
        elif found := re.fullmatch(r"/v2/(.+)/manifests/(.+)", path):
            self._manifest(found[1], found[2], fault)
        elif found := re.fullmatch(r"/v2/(.+)/blobs/(.+)", path):
            self._blob(found[1], found[2], fault)
        elif found := re.fullmatch(r"/v2/(.+)/tags/list", path):
            self._tags(found[1], fault)
        else:
            self._error(404, "UNSUPPORTED", "no such thing")

    # -- who asks

    def _authorised(self, path: str) -> bool:
        registry = self.server.registry
        given = self.headers.get("Authorization", "")
        if registry.auth == "none" or (registry.open_ping and path == "/v2/"):
            return True
        if registry.auth == "basic":
            return given == self._basic()
        scope = registry.tokens.get(given.removeprefix("Bearer "))
        if scope is None:
            return False
        repository = re.match(r"/v2/(.+)/(?:manifests|blobs|tags|referrers)/", path)
        return repository is None or f"repository:{repository[1]}:" in scope

    def _basic(self) -> str:
        pair = f"{self.server.registry.username}:{self.server.registry.password}"
        return "Basic " + base64.b64encode(pair.encode()).decode()

    def _challenge(self) -> None:
        registry = self.server.registry
        challenge = 'Basic realm="fake"'
        if registry.auth == "token":
            challenge = f'Bearer realm="{registry.token_realm}",service="fake.service"'
            if self.headers.get("Authorization"):
                challenge += ',error="invalid_token"'
        self._error(401, "UNAUTHORIZED", "authentication required", {"WWW-Authenticate": challenge})

    def _token(self, form: Mapping[str, str]) -> None:
        registry = self.server.registry
        query = {name: " ".join(values) for name, values in parse_qs(urlsplit(self.path).query).items()}
        known = self.headers.get("Authorization") == self._basic()
        if self.command == "POST":
            known = form.get("refresh_token", "") in registry.refresh_tokens
            query = dict(form)
        if not known and (self.headers.get("Authorization") or self.command == "POST" or not registry.anonymous_tokens):
            self._error(401, "UNAUTHORIZED", "incorrect username or password")
            return
        answer: dict[str, Any] = {
            "token": registry.new_token(query.get("scope", "")),
            "expires_in": registry.token_lifetime_s,
        }
        if query.get("offline_token") == "true":
            answer["refresh_token"] = registry.new_refresh_token()
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    # -- what is asked

    def _manifest(self, repository: str, name: str, fault: Fault) -> None:
        registry = self.server.registry
        found = registry.manifests.get((repository, name))
        if found is None:
            known = any(held == repository for held, _ in registry.manifests)
            self._error(404, *(("MANIFEST_UNKNOWN", "manifest unknown") if known else ("NAME_UNKNOWN", "no such name")))
            return
        media_type, data = found
        data = data if fault.body is None else fault.body
        headers = {
            "Content-Type": media_type,
            "Docker-Content-Digest": fault.digest_header or digest(data),
            **fault.headers,
        }
        self._answer(200, data, headers, fault)

    def _delete(self, repository: str, name: str) -> None:
        """Remove a manifest and the tags that lead to it."""
        registry = self.server.registry
        if not registry.deletes:
            self._error(405, "UNSUPPORTED", "the operation is unsupported")
            return
        found = registry.manifests.get((repository, name))
        if found is None:
            self._error(404, "MANIFEST_UNKNOWN", "manifest unknown")
            return
        for key in [key for key, held in registry.manifests.items() if key[0] == repository and held == found]:
            del registry.manifests[key]
        self._answer(202, b"", {})

    def _referrers(self, repository: str, subject: str, fault: Fault) -> None:
        wanted = parse_qs(urlsplit(self.path).query).get("artifactType")
        descriptors = []
        for (held, name), (media_type, data) in self.server.registry.manifests.items():
            document = json.loads(data)
            if held != repository or ":" not in name or (document.get("subject") or {}).get("digest") != subject:
                continue
            descriptor = {"mediaType": media_type, "digest": name, "size": len(data)}
            descriptor |= {key: document[key] for key in ("artifactType", "annotations") if key in document}
            if wanted is None or descriptor.get("artifactType") in wanted:
                descriptors.append(descriptor)
        media_type = "application/vnd.oci.image.index.v1+json"
        body = json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": descriptors}).encode()
        headers = {"Content-Type": media_type, **({"OCI-Filters-Applied": "artifactType"} if wanted else {})}
        self._answer(200, body if fault.body is None else fault.body, {**headers, **fault.headers}, fault)

    def _pieces(self) -> Iterator[bytes]:
        """The body of an upload as it comes."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self._body
            return
        while length := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()

    def _upload(self, repository: str, name: str, fault: Fault) -> None:
        registry = self.server.registry
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        if self.command == "POST":
            wanted = query.get("mount", "")
            homes = registry.homes if registry.homes is not None else {}
            if registry.mounts and wanted in homes.get(query.get("from", ""), ()):
                homes.setdefault(repository, set()).add(wanted)
                self._answer(201, b"", {"Docker-Content-Digest": wanted})
                return
            name = f"upload-{next(registry._numbers)}"
            registry.uploads[name] = bytearray()
        upload = registry.uploads.get(name)
        if upload is None:
            self._error(404, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry")
            return
        if self.command in ("PATCH", "PUT"):
            left = fault.take_at
            for piece in self._pieces():
                kept = piece if left is None else piece[:left]
                upload += kept
                registry.received_bytes += len(kept)
                if left is not None:
                    left -= len(kept)
                    if not left:
                        self._cut(fault.reset)
                        return
        if self.command == "PUT":
            del registry.uploads[name]
            if digest(bytes(upload)) != query["digest"]:
                self._error(400, "DIGEST_INVALID", "provided digest did not match uploaded content")
                return
            registry.add_blob(bytes(upload))
            if registry.homes is not None:
                registry.homes.setdefault(repository, set()).add(query["digest"])
        elif self.command == "DELETE":
            del registry.uploads[name]
        status = {"POST": 202, "PATCH": 202, "PUT": 201}.get(self.command, 204)
        end = max(len(upload) - 1, 0)
        headers = {"Location": f"/v2/{repository}/blobs/uploads/{name}", "Range": f"0-{end}", **fault.headers}
        self._answer(status, b"", headers, fault)

    def _blob(self, repository: str, name: str, fault: Fault) -> None:
        registry = self.server.registry
        data = registry.blobs.get(name)
        if data is None or (registry.homes is not None and name not in registry.homes.get(repository, ())):
            self._error(404, "BLOB_UNKNOWN", "blob unknown to registry")
            return
        data = data if fault.body is None else fault.body
        headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": name, **fault.headers}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None or fault.ignore_range:
            self._answer(200, data, headers, fault)
            return
        start = int(wanted[1])
        if start >= len(data):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}", **headers}
        self._answer(206, data[start:], headers, fault)

    def _tags(self, repository: str, fault: Fault) -> None:
        registry = self.server.registry
        tags = sorted(name for held, name in registry.manifests if held == repository and ":" not in name)
        if not tags:
            self._error(404, "NAME_UNKNOWN", "no such name")
            return
        query = parse_qs(urlsplit(self.path).query)
        rest = [tag for tag in tags if tag > query.get("last", [""])[0]]
        page = rest[: registry.tags_page]
        headers = {"Content-Type": "application/json"}
        if len(rest) > len(page):
            headers["Link"] = f'</v2/{repository}/tags/list?last={page[-1]}>; rel="next"'
        self._answer(200, json.dumps({"name": repository, "tags": page}).encode(), {**headers, **fault.headers}, fault)

    # -- how it is answered

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps({"errors": [{"code": code, "message": message, "detail": {"path": self.path}}]}).encode()
        self._answer(status, body, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str], fault: Fault | None = None) -> None:
        fault = fault or Fault("")
        self.send_response(status)
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        for name, value in headers.items():
            self.send_header(name, value)
        if fault.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            length = len(body) if fault.content_length is None else fault.content_length
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        ends = [at for at in (fault.cut_at, fault.stall_at, len(body)) if at is not None]
        self._send(body[: min(ends)], fault)
        if fault.stall_at is not None and fault.stall_at <= len(body):
            self._wait_for_client_to_leave()
            self.close_connection = True
        elif fault.cut_at is not None or fault.content_length is not None:
            self._cut(fault.reset)
        elif fault.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _send(self, body: bytes, fault: Fault) -> None:
        size = fault.drip_bytes or 1 << 20
        if fault.drip_bytes:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(body), size):
            piece = body[start : start + size]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if fault.chunked else piece)
            if self.server.registry.stopping.is_set():
                return

    def _cut(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            os.close(self.connection.detach())  # at once: an orderly shutdown would come first otherwise
        else:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
        self.close_connection = True

    def _wait_for_client_to_leave(self) -> None:
        while not self.server.registry.stopping.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.05)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                return


@contextlib.contextmanager
def fake_registry(
    *, auth: Auth = "none", certificate: Certificate | None = None, port: int = 0
) -> Iterator[FakeRegistry]:
    """Serve on a loopback port (0: a free one) until the block ends."""
    server = _Server(("127.0.0.1", port), _Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.certificate, certificate.key)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    registry = FakeRegistry(f"127.0.0.1:{server.server_port}", auth, "https" if certificate else "http")
    server.registry = registry
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield registry
    finally:
        registry.stopping.set()
        server.shutdown()
        thread.join()
        server.socket.close()
