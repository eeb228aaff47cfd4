"""One repository of a registry: manifests, blobs, tags, referrers. A small client on the standard library.

Theory
------
The first request asks `/v2/`: over https; where the registry is on loopback or called insecure, without looking at
its certificate, and then over http. Whatever answers 401 names how to prove who we are: `Basic` takes user and
password each time, `Bearer` a token that a token server gives for this repository. What breaks on the way (a reset,
502, 503, …) is tried again a few times; a blob goes on where it was cut. All that has a digest is checked.

Sources: OCI distribution-spec 1.1; docker/distribution's token authentication specification.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import ipaddress
import json
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast
from urllib.parse import parse_qsl, quote, urlencode, urljoin, urlsplit, urlunsplit

from delta.credentials import HUB_HOST, Credentials, find_credentials
from delta.errors import Malformed, RegistryFailed

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFESTS = (MANIFEST, DOCKER_MANIFEST)
INDEXES = (INDEX, DOCKER_INDEX)
MAX_DOCUMENT_BYTES = 4 << 20
MAX_TAGS = 10_000
ATTEMPTS = 5
TIMEOUT_S = 60
MAX_WAIT_S = 30
_READ_BYTES = 1 << 18
_PASSING = (408, 429, 500, 502, 503, 504)
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:(?P<host>[A-Za-z0-9.-]+(?::\d+)?|\[[0-9a-fA-F:]+\](?::\d+)?)/)?(?P<path>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_CHALLENGE = re.compile(r'([a-zA-Z]+)="([^"]*)"')

Progress = Callable[[int, int], object]  # (bytes done, bytes in all)


def _no_progress(done: int, total: int) -> None:
    """Nobody looks."""


@dataclass(frozen=True, slots=True)
class Reference:
    """`[HOST/]PATH[:TAG][@DIGEST]` as docker reads it."""

    host: str
    path: str
    tag: str
    digest: str

    @property
    def named(self) -> str:
        """What to ask the registry for."""
        return self.digest or self.tag or "latest"

    @property
    def repository(self) -> str:
        return f"{self.host}/{self.path}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.repository}{tag}{'@' + self.digest if self.digest else ''}"


def parse_reference(text: str) -> Reference:
    """A reference as typed.

    Raises:
        Malformed: it is none.
    """
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise Malformed(f"{text}: neither a file nor a reference of an image")
    host, path = found["host"] or "", found["path"]
    if host and not (set(".:[") & set(host) or host == "localhost"):
        host, path = "", f"{host}/{path}"
    if host in ("", "docker.io", "index.docker.io"):
        host, path = HUB_HOST, path if "/" in path else f"library/{path}"
    return Reference(host, path, found["tag"] or "", found["digest"] or "")


def is_loopback(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as the registry has it."""

    data: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.data).hexdigest()

    def parsed(self) -> dict[str, Any]:
        try:
            document = json.loads(self.data)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"manifest {self.digest}: {error}") from None
        if not isinstance(document, dict):
            raise Malformed(f"manifest {self.digest}: not an object")
        return document


class Repository:
    """A conversation about one repository. `actions` are what a token is asked for."""

    def __init__(
        self,
        reference: Reference,
        *,
        insecure: bool = False,
        actions: str = "pull",
        credentials: Credentials | None = None,
    ) -> None:
        self.host, self.path = reference.host, reference.path
        self._lax = insecure or is_loopback(self.host)
        self._actions = actions
        self._credentials = credentials
        context = ssl.create_default_context()
        if self._lax:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
        if is_loopback(self.host):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._base: str | None = None
        self._authorization: str | None = None

    def __str__(self) -> str:
        return f"{self.host}/{self.path}"

    # Documents

    def find_manifest(self, reference: str) -> Document | None:
        """The manifest or index of a tag or digest, None when the repository has none."""
        accept = ", ".join((*MANIFESTS, *INDEXES))
        answer = self._ask("GET", self._manifest_url(reference), {"Accept": accept}, also=(404,))
        with answer:
            if answer.status == 404:
                return None
            data = answer.read(MAX_DOCUMENT_BYTES + 1)
            media_type = (answer.headers.get("Content-Type") or "").partition(";")[0].strip()
        if len(data) > MAX_DOCUMENT_BYTES:
            raise RegistryFailed(f"{self}: manifest {reference} is larger than {MAX_DOCUMENT_BYTES} bytes")
        document = Document(data, media_type)
        if reference.startswith("sha256:") and document.digest != reference:
            raise RegistryFailed(f"{self}: manifest {reference} arrived with the digest {document.digest}")
        return document

    def manifest(self, reference: str) -> Document:
        document = self.find_manifest(reference)
        if document is None:
            raise RegistryFailed(f"{self}: no manifest {reference}")
        return document

    def has_manifest(self, reference: str) -> bool:
        accept = ", ".join((*MANIFESTS, *INDEXES))
        with self._ask("HEAD", self._manifest_url(reference), {"Accept": accept}, also=(404,)) as answer:
            return bool(answer.status != 404)

    def put_manifest(self, reference: str, document: Document) -> Mapping[str, str]:
        """Store a manifest under a tag or its digest; the headers of the answer."""
        headers = {"Content-Type": document.media_type}
        with self._ask("PUT", self._manifest_url(reference), headers, io.BytesIO(document.data)) as answer:
            return cast(Mapping[str, str], answer.headers)

    def delete_manifest(self, digest: str) -> bool:
        """Remove a manifest; False where the registry allows no deletion."""
        with self._ask("DELETE", self._manifest_url(digest), also=(404, 405, 400)) as answer:
            return answer.status not in (400, 405)

    def referrers(self, digest: str, artifact_type: str) -> list[dict[str, Any]] | None:
        """Descriptors of what refers to a manifest, None where the registry does not know."""
        url = f"referrers/{digest}?" + urlencode({"artifactType": artifact_type})
        found: list[dict[str, Any]] = []
        for data in self._pages(url, missing=(400, 404, 405, 501)):
            if data is None:
                return None
            manifests = data.get("manifests")
            found += [each for each in manifests or () if isinstance(each, dict)]
        return [each for each in found if each.get("artifactType") == artifact_type]

    def tags(self) -> list[str]:
        """All tags; an empty list where there is no such repository."""
        found: list[str] = []
        for data in self._pages("tags/list?n=1000", missing=(404,)):
            found += [str(each) for each in (data or {}).get("tags") or ()]
            if len(found) > MAX_TAGS:
                raise RegistryFailed(f"{self}: more than {MAX_TAGS} tags")
        return found

    def _pages(self, url: str, missing: tuple[int, ...]) -> list[dict[str, Any] | None]:
        pages: list[dict[str, Any] | None] = []
        while url and len(pages) < MAX_TAGS:
            with self._ask("GET", url, {"Accept": f"{INDEX}, application/json"}, also=missing) as answer:
                if answer.status in missing:
                    return [None]
                data = answer.read(MAX_DOCUMENT_BYTES + 1)
                link = re.match(r'<([^>]+)>\s*;\s*rel="?next', answer.headers.get("Link") or "")
                here = answer.url
            try:
                document = json.loads(data)
            except (ValueError, RecursionError):
                document = None
            if not isinstance(document, dict):
                # Proxies and old registries answer unknown paths with a page.
                if missing:
                    return [None]
                raise RegistryFailed(f"{self}: {url}: the answer is no JSON object")
            pages.append(document)
            url = urljoin(here, link[1]) if link else ""
        return pages

    # Blobs

    def has_blob(self, digest: str) -> bool:
        with self._ask("HEAD", f"blobs/{digest}", also=(404,)) as answer:
            return bool(answer.status != 404)

    def fetch_blob(self, digest: str, size: int, out: IO[bytes], progress: Progress = _no_progress) -> None:
        """Write a blob of a known size to a file, checked; goes on after an interruption.

        Raises:
            RegistryFailed: it is not there, or is another.
        """
        summed, done, failures = hashlib.sha256(), 0, 0
        while done < size:
            headers = {"Range": f"bytes={done}-"} if done else {}
            before = done
            with self._ask("GET", f"blobs/{digest}", headers) as answer:
                if done and answer.status != 206:
                    out.seek(0)
                    out.truncate()
                    summed, done = hashlib.sha256(), 0
                try:
                    while data := answer.read(_READ_BYTES):
                        done += len(data)
                        if done > size:
                            raise RegistryFailed(f"{self}: blob {digest} is larger than its {size} bytes")
                        summed.update(data)
                        out.write(data)
                        progress(done, size)
                except (OSError, http.client.HTTPException) as error:
                    reason = f"{error}"
                else:
                    reason = "the registry closed the connection"
            failures = 0 if done > before else failures + 1
            if done < size and failures >= ATTEMPTS:
                raise RegistryFailed(f"{self}: blob {digest}: {reason}")
        if f"sha256:{summed.hexdigest()}" != digest:
            raise RegistryFailed(f"{self}: blob {digest} arrived with the digest sha256:{summed.hexdigest()}")

    def read_blob(self, digest: str, size: int) -> bytes:
        """A small blob."""
        if size > MAX_DOCUMENT_BYTES:
            raise RegistryFailed(f"{self}: blob {digest} is larger than {MAX_DOCUMENT_BYTES} bytes")
        out = io.BytesIO()
        self.fetch_blob(digest, size, out)
        return out.getvalue()

    def put_blob(self, digest: str, data: IO[bytes]) -> bool:
        """Store a blob; False if the registry has it already."""
        if self.has_blob(digest):
            return False
        with self._ask("POST", "blobs/uploads/", {}, io.BytesIO()) as answer:
            location = answer.headers.get("Location")
            if not location:
                raise RegistryFailed(f"{self}: an upload without a location")
            parts = urlsplit(urljoin(answer.url, location))
        query = urlencode([*parse_qsl(parts.query, keep_blank_values=True), ("digest", digest)])
        headers = {"Content-Type": "application/octet-stream"}
        with self._ask("PUT", urlunsplit(parts._replace(query=query)), headers, data):
            return True

    # Requests

    def _manifest_url(self, reference: str) -> str:
        return f"manifests/{quote(reference, safe=':')}"

    def _ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: IO[bytes] | None = None,
        also: tuple[int, ...] = (),
    ) -> http.client.HTTPResponse:
        """An answer of status 2xx or one of `also`."""
        base = self._reach()
        if "://" not in url:
            url = f"{base}/v2/{self.path}/{url}"
        ours = urlsplit(url).netloc == urlsplit(base).netloc
        failures, proved = 0, False
        while True:
            try:
                answer = self._open(method, url, headers or {}, body, self._authorization if ours else None)
            except (OSError, http.client.HTTPException) as error:
                reason: object = getattr(error, "reason", None) or error
                wait_s = 0.0
            else:
                if 200 <= answer.status < 300 or answer.status in also:
                    return answer
                with answer:
                    if answer.status == 401 and ours and not proved:
                        proved = True
                        self._authorize(answer)
                        continue
                    reason = _reason(answer)
                    if answer.status not in _PASSING:
                        raise RegistryFailed(f"{self}: {method} {urlsplit(url).path}: {reason}")
                    wait = answer.headers.get("Retry-After") or ""
                    wait_s = min(MAX_WAIT_S, float(wait)) if wait.isdecimal() else 0.0
            failures += 1
            if failures == ATTEMPTS:
                raise RegistryFailed(f"{self}: {method} {urlsplit(url).path}: {reason}")
            time.sleep(max(wait_s, 0.25 * 2**failures))

    def _open(
        self, method: str, url: str, headers: Mapping[str, str], body: IO[bytes] | None, authorization: str | None
    ) -> http.client.HTTPResponse:
        request = urllib.request.Request(url, method=method, headers={"User-Agent": "balenapy-delta", **headers})
        if authorization:  # not for where a redirect leads to
            request.add_unredirected_header("Authorization", authorization)
        if body is not None:
            request.data = body
            request.add_header("Content-Length", str(body.seek(0, 2)))
            body.seek(0)
        try:
            return cast(http.client.HTTPResponse, self._opener.open(request, timeout=TIMEOUT_S))
        except urllib.error.HTTPError as error:
            return cast(http.client.HTTPResponse, error)

    def _reach(self) -> str:
        """Where the registry answers, asked once."""
        if self._base is not None:
            return self._base
        reasons = []
        for scheme in ("https", "http") if self._lax else ("https",):
            base = f"{scheme}://{self.host}"
            try:
                with self._open("GET", f"{base}/v2/", {}, None, None) as answer:
                    if answer.status == 401:
                        self._base = base
                        self._authorize(answer)
                    elif answer.status not in (200, 403, 404):
                        raise RegistryFailed(f"{self.host}: {_reason(answer)}")
                self._base = base
                return base
            except (OSError, http.client.HTTPException) as error:
                reasons.append(f"{scheme}: {getattr(error, 'reason', None) or error}")
        raise RegistryFailed(f"{self.host}: {'; '.join(reasons)}")

    def _authorize(self, answer: http.client.HTTPResponse) -> None:
        """Take up a challenge."""
        if self._credentials is None:
            self._credentials = find_credentials(self.host)
        for challenge in answer.headers.get_all("WWW-Authenticate") or ():
            scheme, _, rest = challenge.strip().partition(" ")
            parameters = {name.lower(): value for name, value in _CHALLENGE.findall(rest)}
            if scheme.lower() == "bearer" and "realm" in parameters:
                self._authorization = "Bearer " + self._token(parameters, self._credentials)
                return
            if scheme.lower() == "basic":
                if self._credentials.basic is None:
                    raise RegistryFailed(f"{self}: wants a user and a password; log in with docker login {self.host}")
                if self._authorization == self._credentials.basic:
                    raise RegistryFailed(f"{self}: user {self._credentials.user} was refused")
                self._authorization = self._credentials.basic
                return
        raise RegistryFailed(f"{self}: {_reason(answer)}")

    def _token(self, parameters: Mapping[str, str], credentials: Credentials) -> str:
        realm = parameters["realm"]
        if urlsplit(realm).scheme != "https" and not self._lax:
            raise RegistryFailed(f"{self}: the token server {realm} is not reached by https")
        asked = {"scope": f"repository:{self.path}:{self._actions}"}
        if "service" in parameters:
            asked["service"] = parameters["service"]
        try:
            if credentials.identity_token:
                refresh = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token}
                form = urlencode({**asked, **refresh, "client_id": "balenapy-delta"}).encode()
                headers = {"Content-Type": "application/x-www-form-urlencoded"}
                answer = self._open("POST", realm, headers, io.BytesIO(form), None)
            else:
                url = realm + ("&" if "?" in realm else "?") + urlencode(asked)
                answer = self._open("GET", url, {}, None, credentials.basic)
            with answer:
                if answer.status != 200:
                    raise RegistryFailed(f"{self}: the token server {realm} says: {_reason(answer)}")
                document = json.loads(answer.read(MAX_DOCUMENT_BYTES))
                token = document.get("token") or document.get("access_token")
        except (OSError, http.client.HTTPException, ValueError, AttributeError, RecursionError) as error:
            raise RegistryFailed(f"{self}: the token server {realm}: {error}") from None
        if not isinstance(token, str) or not token.isprintable():
            raise RegistryFailed(f"{self}: the token server {realm} gave no token")
        return token


def _reason(answer: http.client.HTTPResponse) -> str:
    """Status and, in the registry's words, why."""
    try:
        errors = json.loads(answer.read(1 << 16))["errors"]
        said = "; ".join(str(each.get("message") or each.get("code")) for each in errors)
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        said = ""
    return f"{answer.status} {answer.reason}" + (f": {said}" if said else "")
