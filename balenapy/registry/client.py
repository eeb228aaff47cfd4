"""What a registry can be asked: manifests, blobs, tags, a login.

A `Session` is one conversation about one repository: endpoints in order (mirrors of docker.io first; for an insecure
registry https, then http), connected at the first request, authorised once, closed at the end. Requests of one session
may run at the same time.

Sources: moby 18.09 registry/{config,service_v2,auth}.go, distribution/{pull,pull_v2,push_v2,registry}.go;
docker/distribution registry/client/{repository,blob_writer}.go.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import quote, quote_plus, urljoin, urlsplit

import trio

from balenapy.core.digest import Digest, sha256_digest
from balenapy.core.manifest import (
    ACCEPTED_MANIFESTS,
    DOCUMENT_MAX_BYTES,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    InvalidDocument,
    platform_of_machine,
)
from balenapy.core.reference import DEFAULT_DOMAIN, LEGACY_DEFAULT_DOMAIN, Reference
from balenapy.errors import DataLoss, EngineError, InvalidParameter, Unauthorized
from balenapy.registry.auth import (
    SMALL_ATTEMPTS,
    AuthConfig,
    Authorizer,
    basic_authorization,
    bearer_of,
    challenges_of,
)
from balenapy.registry.errors import RegistryError, error_of_answer, pull_error, reason_phrase
from balenapy.registry.http import HTTP, Answer, RetryBudget
from balenapy.registry.tls import CERTIFICATE_DIRECTORIES
from balenapy.version import ENGINE_VERSION

log = logging.getLogger(__name__)

DOCKER_HUB_HOST = "registry-1.docker.io"
DOCKER_HUB_SERVER = (
    "https://index.docker.io/v1/"  # registry/config.go IndexServer: what a login without an address means
)
PING_TIMEOUT_S = 15  # registry/auth.go PingV2Registry
ERROR_BODY_MAX_BYTES = 64 << 10
SEARCH_ANSWER_MAX_BYTES = 1 << 20  # 100 entries at most
TAGS_MAX = 10_000
TAGS_PAGES_MAX = 200

_NOT_IN_HOST = re.compile(r"[^A-Za-z0-9._~:\[\]%-]")

T = TypeVar("T")


class RegistryConfig(Protocol):
    """The part of `Config` that is about registries."""

    @property
    def insecure_registries(self) -> tuple[str, ...]: ...

    @property
    def registry_mirrors(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place to ask: `url` without a trailing slash, `host` as certs.d names it."""

    url: str
    host: str
    verify: bool
    mirror: bool = False


@dataclass(frozen=True, slots=True)
class Login:
    """A login that worked. `identity_token` is "" unless the token server gave one to keep."""

    status: str
    identity_token: str


@dataclass(frozen=True, slots=True)
class _Connection:
    endpoint: Endpoint
    http: HTTP
    authorizer: Authorizer


class Registry:
    """All registries, by the configuration."""

    def __init__(
        self,
        config: RegistryConfig,
        *,
        directories: Sequence[Path] = CERTIFICATE_DIRECTORIES,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._directories = tuple(directories)
        self._environment = environment
        self.configure(config)

    def configure(self, config: RegistryConfig) -> None:
        """Take new mirrors and insecure registries; sessions under way keep theirs."""
        self._mirrors = config.registry_mirrors
        self._insecure_names = frozenset(name for name in config.insecure_registries if "/" not in name)
        ranges = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]
        for name in config.insecure_registries:
            try:
                if "/" in name:
                    ranges.append(ipaddress.ip_network(name, strict=False))
            except ValueError:
                log.warning("insecure registry is neither a host nor a range: %s", name)
        self._insecure_ranges = tuple(ranges)

    @asynccontextmanager
    async def session(
        self,
        reference: Reference,
        auth: AuthConfig | None = None,
        *,
        actions: str = "pull",
        also_pull: Sequence[str] = (),
        upstream_client: str = "",
        meta_headers: Mapping[str, str] | None = None,
        translate: Callable[[RegistryError, Reference], EngineError] = pull_error,
    ) -> AsyncIterator[Session]:
        """Talk about one repository. Nothing is sent before the first request.

        Args:
            actions: of the token's scope: `pull`, or `pull,push`, which leaves mirrors out.
            also_pull: paths of other repositories the token is to open, for blobs mounted from there.
            upstream_client: User-Agent of the API client we work for; X-Meta-* headers of its request go along too.
            translate: how a registry's refusal is told; a pull's way unless said otherwise.
        """
        session = Session(
            reference,
            await self._endpoints(reference.domain, mirrors="push" not in actions),
            self._maker(upstream_client, meta_headers),
            auth,
            " ".join([f"repository:{reference.path}:{actions}", *(f"repository:{path}:pull" for path in also_pull)]),
            translate,
        )
        async with session:
            yield session

    async def login(self, auth: AuthConfig, *, upstream_client: str = "") -> Login:
        """Check credentials with the registry they are for; nothing is kept.

        Raises:
            Unauthorized: refused.
            InvalidParameter: the server address is not one.
            RegistryError: it could not be asked.

        Source: moby registry/service.go Auth, registry/auth.go loginV2.
        """
        host = LEGACY_DEFAULT_DOMAIN
        address = auth.serveraddress
        if address and address != DOCKER_HUB_SERVER:
            host = _server_host(address)
        domain = DEFAULT_DOMAIN if host == LEGACY_DEFAULT_DOMAIN else host
        make = self._maker(upstream_client, None)
        refused: RegistryError | None = None
        for endpoint in await self._endpoints(domain, mirrors=False):
            if refused is not None and not refused.no_answer:
                break
            try:
                return await _login(make, endpoint, auth)
            except RegistryError as error:
                refused = error
                log.info("login endpoint=%s error=%s", endpoint.url, error.message)
        assert refused is not None  # there is always one endpoint
        raise Unauthorized(refused.message) if refused.code == "UNAUTHORIZED" else refused

    async def search(
        self, term: str, limit: int, auth: AuthConfig | None = None, *, upstream_client: str = ""
    ) -> object:
        """What a registry's v1 search says of a term, which may begin with the registry's host.

        Raises:
            RegistryError: `Unexpected status code 404`, or nothing answered.

        Source: moby registry/service.go Search, registry/session.go SearchRepositories.
        """
        host, slash, rest = term.partition("/")
        if not slash or not ("." in host or ":" in host or host == "localhost"):
            host, rest = LEGACY_DEFAULT_DOMAIN, term
        if host == LEGACY_DEFAULT_DOMAIN:
            rest = rest.removeprefix("library/")
        headers = {"X-Docker-Token": "true"}
        if auth is not None and auth.username and not auth.identitytoken:
            headers |= basic_authorization(auth)
        make = self._maker(upstream_client, None)
        refused: RegistryError | None = None
        for endpoint in await self._endpoints(host):
            if refused is not None and not refused.no_answer:
                break
            url = f"{endpoint.url}/v1/search?q={quote_plus(rest)}&n={limit}"
            try:
                async with make(endpoint) as http, http.request("GET", url, headers) as answer:
                    if answer.status != 200:
                        raise RegistryError(f"Unexpected status code {answer.status}", status=answer.status)
                    return json.loads(await answer.read(SEARCH_ANSWER_MAX_BYTES))
            except RegistryError as error:
                refused = error
            except (ValueError, RecursionError) as error:
                raise RegistryError(f"unable to decode search results: {error}", status=200) from error
        assert refused is not None  # there is always one endpoint
        raise refused

    async def _endpoints(self, domain: str, *, mirrors: bool = True) -> tuple[Endpoint, ...]:
        if domain == DEFAULT_DOMAIN:
            official = Endpoint(f"https://{DOCKER_HUB_HOST}", DOCKER_HUB_HOST, verify=True)
            return (*(await self._mirror_endpoints() if mirrors else ()), official)
        verify = not await self._is_insecure(domain)
        secure = Endpoint(f"https://{domain}", domain, verify)
        return (secure,) if verify else (secure, Endpoint(f"http://{domain}", domain, verify=False))

    async def _mirror_endpoints(self) -> tuple[Endpoint, ...]:
        endpoints = []
        for mirror in self._mirrors:
            url = mirror if "://" in mirror else f"https://{mirror}"
            host = urlsplit(url).netloc
            verify = not await self._is_insecure(host)
            endpoints.append(Endpoint(url.rstrip("/"), host, verify, mirror=True))
        return tuple(endpoints)

    async def _is_insecure(self, host: str) -> bool:
        """Whether TLS need not be verified (nor spoken): the host is listed, or an address of it lies in a range."""
        if host in self._insecure_names:
            return True
        name = urlsplit(f"//{host}").hostname or ""
        try:
            addresses = [ipaddress.ip_address(name)]
        except ValueError:
            try:
                found = await trio.socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
            except (OSError, UnicodeError, ValueError):
                return False  # a name nobody knows is told by the request itself
        return any(address in network for address in addresses for network in self._insecure_ranges)

    def _maker(self, upstream_client: str, meta_headers: Mapping[str, str] | None) -> Callable[[Endpoint], HTTP]:
        agent = user_agent(upstream_client)

        def make(endpoint: Endpoint) -> HTTP:
            return HTTP(
                user_agent=agent,
                host=endpoint.host,
                verify=endpoint.verify,
                directories=self._directories,
                environment=self._environment,
                headers=meta_headers,
            )

        return make


async def _login(make: Callable[[Endpoint], HTTP], endpoint: Endpoint, auth: AuthConfig) -> Login:
    url = f"{endpoint.url}/v2/"
    async with make(endpoint) as http:
        authorizer = await _ping(http, endpoint, auth, offline=True)
        try:
            headers = await authorizer.headers("")
        except RegistryError as error:
            raise error.within("Get", url) from error
        async with http.request("GET", url, headers) as answer:
            if answer.status == 200:
                return Login("Login Succeeded", authorizer.identity_token)
            raise RegistryError(
                f"login attempt to {url} failed with status: {answer.status} {reason_phrase(answer.status)}",
                code="UNAUTHORIZED" if answer.status == 401 else "",
                status=answer.status,
            )


def _server_host(address: str) -> str:
    """`host[:port]` of a server address, with or without scheme and path."""
    url = address if address.startswith(("https://", "http://")) else f"https://{address}"
    try:
        host = urlsplit(url).netloc
        port_is_good = urlsplit(url).port != 0
    except ValueError as error:
        raise InvalidParameter(f'unable to parse server address: parse "{url}": {error}') from error
    strange = _NOT_IN_HOST.search(host)
    if strange or not port_is_good:
        problem = f'invalid character "{strange[0]}" in host name' if strange else "invalid port"
        raise InvalidParameter(f'unable to parse server address: parse "{url}": {problem}')
    return host


async def _ping(http: HTTP, endpoint: Endpoint, auth: AuthConfig | None, *, offline: bool = False) -> Authorizer:
    """Find out how the registry wants to be asked. Any answer counts: the next request will tell what is wrong."""
    url = f"{endpoint.url}/v2/"
    with trio.move_on_after(PING_TIMEOUT_S):
        async with http.request("GET", url) as answer:
            await answer.read_some(ERROR_BODY_MAX_BYTES)
            challenges = challenges_of(answer) if answer.status == 401 else ()
            return Authorizer(http, auth, challenges, offline=offline)
    problem = "net/http: request canceled (Client.Timeout exceeded while awaiting headers)"
    raise RegistryError(problem).within("Get", url)


async def _error_of(answer: Answer) -> RegistryError:
    body = await answer.read_some(ERROR_BODY_MAX_BYTES)
    return error_of_answer(answer.status, body, bearer_of(challenges_of(answer)), answer.retry_after_s)


class Session:
    """Requests about one repository."""

    def __init__(
        self,
        reference: Reference,
        endpoints: Sequence[Endpoint],
        make: Callable[[Endpoint], HTTP],
        auth: AuthConfig | None,
        scope: str,
        translate: Callable[[RegistryError, Reference], EngineError],
    ) -> None:
        self.reference = reference
        self._endpoints = tuple(endpoints)
        self._make = make
        self._auth = auth
        self._scope = scope
        self._translate = translate
        self._stack = AsyncExitStack()
        self._connections: dict[Endpoint, _Connection] = {}
        self._unreachable: dict[Endpoint, RegistryError] = {}
        self._connecting = trio.Lock()

    async def __aenter__(self) -> Session:
        await self._stack.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    # --- what can be asked

    async def manifest(self, reference: Reference | None = None) -> tuple[bytes, str, Digest]:
        """The manifest or index a tag or digest names: its bytes, Content-Type and digest.

        Raises:
            DataLoss: the bytes do not have the digest they were asked by, or announced with.
        """
        wanted = (reference or self.reference).with_default_tag()
        name = str(wanted.digest) if wanted.digest is not None else wanted.tag
        headers = {"Accept": ", ".join(ACCEPTED_MANIFESTS)}

        async def fetch(connection: _Connection) -> tuple[bytes, str, Digest]:
            async with self._open(connection, "GET", f"manifests/{name}", headers) as answer:
                raw = await answer.read(DOCUMENT_MAX_BYTES)
                announced = _digest_of(answer) if wanted.digest is None else wanted.digest
                if announced is not None and not announced.matches(raw):
                    raise DataLoss(f"manifest verification failed for digest {announced}")
                return raw, answer.headers.get("content-type", ""), announced or sha256_digest(raw)

        return await self._persist(fetch, wanted)

    async def document(self, path: str, absent: Sequence[int] = (404,)) -> bytes | None:
        """A manifest or index that may not be there (`manifests/_deltaindex`, `referrers/sha256:…`), unverified.

        Args:
            absent: the statuses that say so; then the answer is None.
        """

        async def fetch(connection: _Connection) -> bytes | None:
            headers = {"Accept": f"{OCI_INDEX}, {OCI_MANIFEST}"}
            async with self._open(connection, "GET", path, headers, accept=absent) as answer:
                if answer.status in absent:
                    await answer.read_some(ERROR_BODY_MAX_BYTES)
                    return None
                return await answer.read(DOCUMENT_MAX_BYTES)

        return await self._persist(fetch)

    async def config(self, descriptor: Descriptor) -> bytes:
        """A small blob (an image config) whole and verified.

        Raises:
            DataLoss: "image config verification failed for digest D".
            InvalidDocument: longer than 4 MiB.
        """
        if descriptor.size_bytes > DOCUMENT_MAX_BYTES:
            raise InvalidDocument(f"image config exceeds the limit of {DOCUMENT_MAX_BYTES} bytes")

        async def fetch(connection: _Connection) -> bytes:
            async with self._open(connection, "GET", f"blobs/{descriptor.digest}") as answer:
                raw = await answer.read(DOCUMENT_MAX_BYTES)
                if not descriptor.digest.matches(raw):
                    raise DataLoss(f"image config verification failed for digest {descriptor.digest}")
                return raw

        return await self._persist(fetch)

    async def tags(self) -> list[str]:
        """All tags of the repository, in the registry's order. At most 10,000."""

        async def fetch(connection: _Connection) -> list[str]:
            found: list[str] = []
            path = "tags/list"
            for _ in range(TAGS_PAGES_MAX):
                async with self._open(connection, "GET", path) as answer:
                    raw = await answer.read(DOCUMENT_MAX_BYTES)
                    following = _next_page(answer)
                found += _tag_names(raw)
                if following is None or len(found) > TAGS_MAX:
                    break
                path = following
            return found[:TAGS_MAX]

        return await self._persist(fetch)

    @asynccontextmanager
    async def blob(self, digest: Digest, offset: int = 0, *, size_bytes: int | None = None) -> AsyncIterator[Blob]:
        """A blob's bytes from `offset` on, not verified. One try: whoever reads knows what to do with a cut.

        Args:
            size_bytes: the descriptor's length. More than that is refused, less is a cut.

        Raises:
            RegistryError: here or while reading; `retryable` says whether asking again (from a later offset) helps.
            DataLoss: longer than `size_bytes`.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with AsyncExitStack() as stack:

            async def open_(connection: _Connection) -> Blob:
                async with AsyncExitStack() as attempt:
                    answer = await attempt.enter_async_context(
                        self._open(connection, "GET", f"blobs/{digest}", headers, accept=(416,) if offset else ())
                    )
                    blob = Blob(answer, digest, offset, size_bytes)
                    stack.push_async_exit(attempt.pop_all())
                    return blob

            yield await self._somewhere(open_)

    # --- what can be put there

    async def blob_size(self, digest: Digest) -> int | None:
        """How long a blob is that the repository has; None when it has none of that digest."""

        async def ask(connection: _Connection) -> int | None:
            async with self._open(connection, "HEAD", f"blobs/{digest}", accept=(404,)) as answer:
                return None if answer.status == 404 else answer.length or 0

        return await self._persist(ask)

    async def mount(self, digest: Digest, path: str) -> Upload | None:
        """Have a blob taken over from another repository; if the registry will not, the upload it begins instead."""
        return await self._begin(f"?mount={digest}&from={quote(path, safe='')}")

    async def begin_upload(self) -> Upload:
        """Begin an upload. Raises: RegistryError."""
        upload = await self._begin("")
        if upload is None:
            raise RegistryError("registry says it has a blob that nobody named")
        return upload

    async def _begin(self, query: str) -> Upload | None:
        async def begin(connection: _Connection) -> Upload | None:
            async with self._open(connection, "POST", f"blobs/uploads/{query}", content=b"") as answer:
                if answer.status == 201:
                    return None
                return Upload(self, connection, _upload_location(answer))

        return await self._persist(begin)

    async def put_manifest(self, raw: bytes, media_type: str, name: str) -> Digest:
        """Put a manifest under a tag or its digest; the digest the registry gave it."""

        async def put(connection: _Connection) -> Digest:
            headers = {"Content-Type": media_type}
            async with self._open(connection, "PUT", f"manifests/{name}", headers, content=raw) as answer:
                return _digest_of(answer) or sha256_digest(raw)

        return await self._persist(put)

    # --- how it is asked

    async def _persist(self, action: Callable[[_Connection], Awaitable[T]], about: Reference | None = None) -> T:
        """A small request, tried again after a passing failure; `about` is what its refusal names."""
        budget = RetryBudget(SMALL_ATTEMPTS)
        while True:
            try:
                return await self._somewhere(action, about)
            except EngineError as error:
                delay = budget.next_delay(error)
                if delay is None:
                    raise
                log.info("retry repository=%s after_s=%.1f error=%s", self.reference.name, delay, error.message)
            await trio.sleep(delay)

    async def _somewhere(self, action: Callable[[_Connection], Awaitable[T]], about: Reference | None = None) -> T:
        """Do something at the first endpoint that can: a mirror's failure is not the registry's."""
        last: RegistryError | None = None
        for endpoint in self._candidates():
            if last is not None:
                log.info("next endpoint=%s after error=%s", endpoint.url, last.message)
            try:
                return await action(await self._connect(endpoint))
            except RegistryError as error:
                last = error
                if not (endpoint.mirror or error.no_answer):
                    break
        assert last is not None  # there is always one endpoint
        told = self._translate(last, about or self.reference)
        raise told from (None if told is last else last)

    def _candidates(self) -> list[Endpoint]:
        speaking = {endpoint.host for endpoint in self._connections if endpoint.url.startswith("https:")}
        candidates = [
            endpoint
            for endpoint in self._endpoints
            if endpoint not in self._unreachable
            # Who spoke TLS once is not asked in the clear because a later request failed.
            and (endpoint.url.startswith("https:") or endpoint.host not in speaking or endpoint in self._connections)
        ]
        if not candidates:
            self._unreachable.clear()
            return list(self._endpoints)
        return candidates

    async def _connect(self, endpoint: Endpoint) -> _Connection:
        async with self._connecting:
            if endpoint not in self._connections:
                http = await self._stack.enter_async_context(self._make(endpoint))
                # A mirror is another server than the one the credentials are for.
                auth = None if endpoint.mirror else self._auth
                try:
                    authorizer = await _ping(http, endpoint, auth)
                except RegistryError as error:
                    self._unreachable[endpoint] = error
                    raise error.final() from None
                self._connections[endpoint] = _Connection(endpoint, http, authorizer)
        return self._connections[endpoint]

    @asynccontextmanager
    async def _open(
        self,
        connection: _Connection,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        accept: Sequence[int] = (),
        content: bytes | AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[Answer]:
        """An authorised request that succeeded (or has a status in `accept`); a stale token is renewed once.

        Content that is an iterator cannot be sent twice: what fails then may be tried again by whoever has more of it.
        """
        url = path if "://" in path else f"{connection.endpoint.url}/v2/{self.reference.path}/{path}"
        authorizer = connection.authorizer
        # Registries may send uploads to another server; credentials are not for that one.
        foreign = urlsplit(url)[:2] != urlsplit(connection.endpoint.url)[:2]
        for attempt in ("as we are", "renewed"):
            had_token = authorizer.has_token(self._scope)
            try:
                authorization = {} if foreign else await authorizer.headers(self._scope)
            except RegistryError as error:
                raise error.within(method, url) from error
            sent = {**(headers or {}), **authorization}
            async with connection.http.request(method, url, sent, content) as answer:
                if 200 <= answer.status < 300 or answer.status in accept:
                    yield answer
                    return
                refusal = await _error_of(answer)
                learnt = answer.status == 401 and authorizer.learn(challenges_of(answer))
            stale = answer.status == 401 and had_token
            if attempt == "renewed" or not (stale or learnt):
                raise refusal
            authorizer.forget(self._scope)
            if content is not None and not isinstance(content, bytes):
                refusal.retryable = True
                raise refusal


class Upload:
    """A blob that is being put into a repository: `send` what there is, as often as it takes, then `finish`."""

    def __init__(self, session: Session, connection: _Connection, location: str) -> None:
        self._session = session
        self._connection = connection
        self._location = location

    async def send(self, content: AsyncIterator[bytes]) -> None:
        """Append, in one request of unknown length. Raises: RegistryError; `offset` says what arrived."""
        headers = {"Content-Type": "application/octet-stream"}
        async with self._session._open(self._connection, "PATCH", self._location, headers, content=content) as answer:
            self._location = _upload_location(answer, self._location)

    async def offset(self) -> int:
        """How many bytes the registry has. Raises: RegistryError, also when it has forgotten the upload."""
        async with self._session._open(self._connection, "GET", self._location) as answer:
            self._location = _upload_location(answer, self._location)
            first, _, last = answer.headers.get("range", "").rpartition("=")[2].partition("-")
            # `0-0` is what registries say of nothing as well as of one byte.
            return int(last) + 1 if first == "0" and last.isascii() and last.isdigit() and last != "0" else 0

    async def finish(self, digest: Digest, content: bytes = b"") -> None:
        """Append the rest and make it a blob. Raises: RegistryError."""
        joint = "&" if "?" in self._location else "?"
        url = f"{self._location}{joint}digest={digest}"
        headers = {"Content-Type": "application/octet-stream"}
        async with self._session._open(self._connection, "PUT", url, headers, content=content):
            pass

    async def cancel(self) -> None:
        """Have the registry throw away what it has. Best effort."""
        try:
            async with self._session._open(self._connection, "DELETE", self._location, accept=(404, 405)):
                pass
        except RegistryError as error:
            log.info("upload cannot be cancelled location=%s error=%s", self._location, error.message)


def _upload_location(answer: Answer, former: str = "") -> str:
    location = answer.headers.get("location", "")
    if not location and not former:
        raise RegistryError(f"{answer.url}: no Location for an upload", status=answer.status)
    return urljoin(answer.url, location) if location else former


class Blob:
    """A blob on its way: iterate for chunks from `offset` to the end.

    Attributes:
        offset: where the first chunk begins, as asked: if the server ignored Range, what was asked not to be sent is
            read and thrown away.
        range_honoured: whether the server began at `offset` by itself.
        total_bytes: length of the whole blob by the server's word, None if it gave none.
    """

    def __init__(self, answer: Answer, digest: Digest, offset: int, size_bytes: int | None) -> None:
        self.digest = digest
        self.offset = offset
        self._answer = answer
        self._size = size_bytes
        self._position = offset
        self._skip = 0
        self._done = False
        if answer.status == 206:
            start, self.total_bytes = _content_range(answer)
            if start != offset:
                raise RegistryError(
                    f"{answer.url}: asked from byte {offset}, got Content-Range "
                    f"{answer.headers.get('content-range', '')!r}",
                    status=206,
                )
        elif answer.status == 416:
            _, self.total_bytes = _content_range(answer)
            if self.total_bytes != offset:
                raise RegistryError(f"{answer.url}: the blob has no byte {offset}", status=416)
            self._done = True  # the prefix was all of it
        else:
            self.total_bytes = answer.length
            self._skip = offset
        self.range_honoured = self._skip == 0
        if size_bytes is not None and (self.total_bytes or 0) > size_bytes:
            raise self._too_long()

    def __aiter__(self) -> Blob:
        return self

    async def __anext__(self) -> bytes:
        while not self._done:
            try:
                chunk = await anext(self._answer)
            except StopAsyncIteration:
                self._done = True
                if self._skip or (self._size is not None and self._position < self._size):
                    raise RegistryError("unexpected EOF", retryable=True) from None
                break
            if self._skip:
                skipped = min(self._skip, len(chunk))
                self._skip -= skipped
                chunk = chunk[skipped:]
                if not chunk:
                    continue
            self._position += len(chunk)
            if self._size is not None and self._position > self._size:
                raise self._too_long()
            return chunk
        raise StopAsyncIteration

    def _too_long(self) -> DataLoss:
        return DataLoss(f"blob {self.digest} is longer than its descriptor says ({self._size} bytes)")


def _content_range(answer: Answer) -> tuple[int | None, int | None]:
    """First byte and total of `bytes 5-9/10`; None for what is absent or `*`."""
    unit, _, rest = answer.headers.get("content-range", "").strip().partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit.lower() != "bytes":
        return None, None
    return (
        int(first) if first.isascii() and first.isdigit() else None,
        int(total) if total.isascii() and total.isdigit() else None,
    )


def _digest_of(answer: Answer) -> Digest | None:
    try:
        return Digest.parse(answer.headers.get("docker-content-digest", ""))
    except InvalidParameter:
        return None


def _tag_names(raw: bytes) -> list[str]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"unable to decode tags: {error}") from error
    names = document.get("tags") if isinstance(document, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _next_page(answer: Answer) -> str | None:
    """The `Link: <…>; rel="next"` of a list, if it stays on the same server."""
    target, _, relation = answer.headers.get("link", "").partition(";")
    if not target.strip().startswith("<") or "next" not in relation:
        return None
    url = urljoin(answer.url, target.strip().strip("<>"))
    return url if urlsplit(url)[:2] == urlsplit(answer.url)[:2] else None


def user_agent(upstream_client: str = "") -> str:
    """How we name ourselves to registries, and the client we work for.

    Source: balena-engine dockerversion/useragent.go.
    """
    python = ".".join(str(part) for part in sys.version_info[:3])
    machine = os.uname()
    architecture = platform_of_machine(machine.machine).architecture
    ours = f"balenaEngine/{ENGINE_VERSION} python/{python} kernel/{machine.release} os/linux arch/{architecture}"
    client = "".join(character for character in upstream_client if character.isascii() and character.isprintable())
    for character in "\\();":
        client = client.replace(character, f"\\{character}")
    return f"{ours} UpstreamClient({client})" if client else ours
