"""HTTP towards registries: redirects, stalls, retry budget, errors worded as Go's.

httpcore, the transport under httpx, is used directly (on Trio): redirects, credentials, cookies and proxies are decided
here, so httpx would only be switched off part by part, and it costs 2.7 MB (http.client, urllib.request and email come
with it) where httpcore costs 1. It is imported at the first use, in a thread: an engine that never pulls does not
pay for it, and one that does is not stopped for as long as a slow board takes to import it.

An `HTTP` object belongs to one session with one registry and holds that session's connections; nothing stays open
after it.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urljoin, urlsplit

import trio

from balenapy.errors import Unsupported
from balenapy.registry.errors import RegistryError
from balenapy.registry.proxy import proxy_for
from balenapy.registry.tls import CERTIFICATE_DIRECTORIES, tls_context

if TYPE_CHECKING:
    import ssl

    import httpcore

CONNECT_TIMEOUT_S = 30  # moby registry/registry.go NewTransport: Dialer.Timeout
STALL_TIMEOUT_S = 30  # without one byte; a slow link that still moves is left alone
REDIRECTS_MAX = 10  # net/http defaultCheckRedirect
RECEIVE_BUFFER_BYTES = 512 << 10  # the kernel takes twice as much, for its own needs
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
CHUNK_BYTES = 256 << 10  # what a reader gets at once on a fast link
RETRY_DELAY_FIRST_S = 1.0
RETRY_DELAY_MAX_S = 60.0
RETRY_JITTER = 0.2  # a fleet that lost one registry must not come back as one

# --- retry budget


class RetryBudget:
    """How often one download may fail before it gives up. Bytes that arrive refill it.

    `next_delay` is asked after each failure and answers with seconds to wait, or None: give up. The answer is
    the registry's Retry-After where it sent one, else 1 s, doubled up to a minute; both with jitter.
    """

    __slots__ = ("_failures", "_random", "attempts")

    def __init__(self, attempts: int, random_unit: Callable[[], float] = random.random) -> None:
        self.attempts = attempts
        self._failures = 0
        self._random = random_unit

    def progressed(self) -> None:
        """Something arrived: what failed before no longer counts."""
        self._failures = 0

    def next_delay(self, error: Exception) -> float | None:
        if not getattr(error, "retryable", False):
            return None
        self._failures += 1
        if self._failures >= self.attempts:
            return None
        wanted: float | None = getattr(error, "retry_after_s", None)
        if wanted is not None and wanted > RETRY_DELAY_MAX_S:
            return None  # hours of a rate limit are for the caller to wait, not for a request
        delay = RETRY_DELAY_FIRST_S * 2 ** min(self._failures - 1, 16) if wanted is None else wanted
        delay = min(delay, RETRY_DELAY_MAX_S)
        spread = RETRY_JITTER * self._random()
        # Never earlier than asked; without a wish, around the nominal delay.
        return delay * (1 + spread) if wanted is not None else delay * (1 - RETRY_JITTER / 2 + spread)


# --- requests


def _receive_buffer() -> tuple[int, int, int]:
    """A socket option that bounds what the kernel holds for us.

    When a connection is reset, what it holds and we have not read is gone, and is fetched twice: left to itself that
    grows to 6 MiB on a slow board. The bound that anybody may ask for (net.core.rmem_max) is too small for long links.
    """
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        except PermissionError:
            return socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES
    return socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES


class HTTP:
    """Requests of one session. `async with` it; its connections live no longer than that."""

    def __init__(
        self,
        *,
        user_agent: str,
        host: str,
        verify: bool,
        directories: Sequence[Path] = CERTIFICATE_DIRECTORIES,
        environment: Mapping[str, str] = os.environ,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._headers = {"User-Agent": user_agent, "Accept-Encoding": "identity", **(headers or {})}
        self._host = host
        self._verify = verify
        self._directories = directories
        self._environment = environment
        self._context: ssl.SSLContext | None = None
        self._pools: dict[tuple[str | None, bool], httpcore.AsyncConnectionPool] = {}

    async def __aenter__(self) -> HTTP:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pools, self._pools = list(self._pools.values()), {}
        with trio.move_on_after(5, shield=True):
            for pool in pools:
                await pool.aclose()

    async def _pool(self, url: str) -> httpcore.AsyncConnectionPool:
        key = proxy_for(url, self._environment), urlsplit(url).scheme == "https"
        pool = self._pools.get(key)
        if pool is None:
            made = await trio.to_thread.run_sync(self._make_pool, *key)
            # Another task of the session may have made one meanwhile; ours holds no connection yet.
            pool = self._pools.setdefault(key, made)
        return pool

    def _make_pool(self, proxy: str | None, secure: bool) -> httpcore.AsyncConnectionPool:
        """Connections of one kind. Blocks: imports httpcore, reads certificates."""
        library = _import_httpcore()
        if secure and self._context is None:
            self._context = self._make_context(self._host, self._verify)
        options: dict[str, Any] = {
            "ssl_context": self._context if secure else None,
            "max_connections": None,
            "socket_options": [_receive_buffer()],
        }
        if proxy is None:
            pool: httpcore.AsyncConnectionPool = library.AsyncConnectionPool(**options)
            return pool
        parts = urlsplit(proxy)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Unsupported(f'proxy scheme "{parts.scheme}" is not supported: use http or https')
        host = parts.netloc.rpartition("@")[2]
        if parts.username is not None:
            options["proxy_auth"] = (unquote(parts.username).encode(), unquote(parts.password or "").encode())
        if parts.scheme == "https":
            # The proxy is another server: what is excused for the registry is not excused for it.
            options["proxy_ssl_context"] = self._make_context(host, verify=True)
        tunnels: httpcore.AsyncHTTPProxy = library.AsyncHTTPProxy(f"{parts.scheme}://{host}", **options)
        return tunnels

    def _make_context(self, host: str, verify: bool) -> ssl.SSLContext:
        return tls_context(host, verify=verify, directories=self._directories, environment=self._environment)

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[Answer]:
        """Send a request and follow its redirects; the answer's body is readable inside the block.

        Authorization goes to the host it was made for and nowhere else. A body that is an iterator is not sent
        again, so such a request must not be redirected.

        Raises:
            RegistryError: nothing usable answered. Its text begins as Go's: `Get https://H/v2/: …`.
        """
        asked = url
        sent = {**self._headers, **(headers or {})}
        for _ in range(REDIRECTS_MAX):
            answer = await self._send(method, url, sent, content)
            try:
                target = answer.redirect_target
                if target is None:
                    yield answer
                    return
            finally:
                await answer.aclose()
            problem = _refusal(target)
            if problem:
                raise RegistryError(problem, status=answer.status).within(method, target)
            if _origin(target) != _origin(url):
                sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
            if answer.status == 303 and method != "HEAD":
                method, content = "GET", None
            url = target
        raise RegistryError(f"stopped after {REDIRECTS_MAX} redirects").within(method, asked)

    async def _send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | AsyncIterator[bytes] | None
    ) -> Answer:
        pool = await self._pool(url)
        try:
            request = _request(method, url, headers, content)
        except ValueError as error:
            raise _worded(error, url).within(method, url) from error
        try:
            response = await pool.handle_async_request(request)
        except _transport_errors() as error:
            raise _worded(error, url).within(method, url) from error
        return Answer(method, url, response)


def _request(
    method: str, url: str, headers: Mapping[str, str], content: bytes | AsyncIterator[bytes] | None
) -> httpcore.Request:
    library = sys.modules["httpcore"]
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    path = quote(parts.path or "/", safe=_URL_SAFE) + (f"?{quote(parts.query, safe=_URL_SAFE)}" if parts.query else "")
    fields = {"Host": host, **headers}
    if isinstance(content, bytes):
        fields["Content-Length"] = str(len(content))
    elif content is not None:
        fields["Transfer-Encoding"] = "chunked"
    timeouts = {"connect": CONNECT_TIMEOUT_S, "read": STALL_TIMEOUT_S, "write": STALL_TIMEOUT_S, "pool": None}
    request: httpcore.Request = library.Request(
        method,
        library.URL(scheme=parts.scheme, host=parts.hostname or "", port=parts.port, target=path),
        headers=[(name.encode("ascii"), value.encode("ascii")) for name, value in fields.items()],
        content=content,
        extensions={"timeout": timeouts},
    )
    return request


# What a URL may hold as it is; a redirect's target is often written carelessly.
_URL_SAFE = "!$%&'()*+,/:;=?@[]~"


def _transport_errors() -> tuple[type[Exception], ...]:
    """Everything that says the transport failed."""
    library = sys.modules["httpcore"]
    return (
        library.NetworkError,
        library.ProtocolError,
        library.ProxyError,
        library.TimeoutException,
        library.UnsupportedProtocol,
        OSError,
    )


class Answer:
    """One answer: its head, and its body as chunks or whole.

    Iterating gives what has arrived, up to about 256 KiB at once: whoever stores, hashes or pipes it pays per chunk,
    and httpcore reads 64 KiB (16 under TLS).
    """

    def __init__(self, method: str, url: str, response: httpcore.Response) -> None:
        self.method = method
        self.url = url
        self.status = response.status
        self.headers: dict[str, str] = {}  # by lower-case name; of repeated ones the first
        self._repeated = [(name.decode("latin-1").lower(), text.decode("latin-1")) for name, text in response.headers]
        for name, text in self._repeated:
            self.headers.setdefault(name, text)
        self._response = response
        self._raw: Any = None  # httpcore's iterator over the body, None until read
        self._ended = False

    def all_headers(self, name: str) -> list[str]:
        """Every value of a header that may be repeated."""
        return [text for found, text in self._repeated if found == name]

    @property
    def redirect_target(self) -> str | None:
        location = self.headers.get("location")
        if self.status not in (301, 302, 303, 307, 308) or not location:
            return None
        try:
            return urljoin(self.url, location)
        except ValueError:
            return location  # not a URL; refused by its scheme

    @property
    def length(self) -> int | None:
        """Content-Length, None when the answer does not say."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() else None

    @property
    def retry_after_s(self) -> float | None:
        """Retry-After in seconds; the date form is not understood (a device's clock may be anywhere)."""
        text = self.headers.get("retry-after", "").strip()
        return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body.

        Raises:
            RegistryError: longer than `limit_bytes`, or cut.
        """
        if (self.length or 0) > limit_bytes and self.method != "HEAD":
            raise RegistryError(f"{self.url}: answer exceeds the limit of {limit_bytes} bytes", status=self.status)
        parts: list[bytes] = []
        size = 0
        async for chunk in self:
            size += len(chunk)
            if size > limit_bytes:
                raise RegistryError(f"{self.url}: answer exceeds the limit of {limit_bytes} bytes", status=self.status)
            parts.append(chunk)
        return b"".join(parts)

    async def read_some(self, limit_bytes: int) -> bytes:
        """As much of the body as fits: for error texts."""
        parts: list[bytes] = []
        size = 0
        try:
            async for chunk in self:
                parts.append(chunk)
                size += len(chunk)
                if size >= limit_bytes:
                    break
        except RegistryError:
            pass  # half of an error's text is still the better text
        return b"".join(parts)[:limit_bytes]

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        first = await self._receive()
        if first is None:
            raise StopAsyncIteration
        size = len(first)
        if size >= CHUNK_BYTES:
            return first
        parts = [first]
        # Bytes in hand never wait for bytes that have not come: on a slow link each piece goes on by itself.
        network = self._response.extensions["network_stream"]
        while size < CHUNK_BYTES and network.get_extra_info("is_readable"):
            try:
                part = await self._receive()
            except RegistryError:
                # What came before the cut is good, and worth keeping; the next call meets the cut again.
                break
            if part is None:
                break
            parts.append(part)
            size += len(part)
        return b"".join(parts)

    async def _receive(self) -> bytes | None:
        if self._ended:
            return None
        if isinstance(self._raw, RegistryError):
            raise self._raw
        if self._raw is None:
            stream: Any = self._response.stream
            self._raw = stream.__aiter__()
        try:
            part: bytes = await self._raw.__anext__()
        except StopAsyncIteration:
            self._ended = True
            return None
        except _transport_errors() as error:
            cut = _worded(error, self.url, reading=True)
            self._raw = cut
            raise cut from error
        return part

    async def aclose(self) -> None:
        """Give the connection back, or close it if the body was not read to its end."""
        with trio.move_on_after(5, shield=True):
            await self._response.aclose()
            if self._raw is None or self._ended or isinstance(self._raw, RegistryError):
                return
            # A chain of generators is parked in httpcore's body. Closing the outer one leaves the inner ones to the
            # garbage collector, which Trio warns of; asking for more from the closed connection ends them all.
            try:
                await self._raw.__anext__()
            except StopAsyncIteration:
                pass
            except _transport_errors():
                pass
            self._ended = True


def _import_httpcore() -> Any:
    """Import httpcore without what it can do and we do not: HTTP/2, anyio, a bundle of authorities (2 MB of 4)."""
    stand_ins: dict[str, Any] = {"h2": None, "anyio": None}  # None: the import fails, and httpcore has a way without it
    stand_ins["certifi"] = ModuleType("certifi")  # wanted at import, used only where no TLS context is given
    stand_ins = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        import httpcore
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
    return httpcore


def _refusal(url: str) -> str:
    """Why a redirect to this URL is not followed, "" if it is."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            return f'unsupported protocol scheme "{parts.scheme}"'
        return "" if parts.hostname and parts.port != 0 else "http: no Host in request URL"
    except ValueError as error:
        return f"invalid URL: {error}"


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


# --- wording


def _worded(error: BaseException, url: str, *, reading: bool = False) -> RegistryError:
    """Say as Go's net package does what happened on the way. All of it may pass by itself except bad TLS."""
    import ssl

    library = sys.modules["httpcore"]
    causes = list(_causes(error))
    parts = urlsplit(url)
    if not parts.hostname:
        return RegistryError("http: no Host in request URL")
    if isinstance(error, library.LocalProtocolError | UnicodeError):
        # Their own words quote the value, which may be a token.
        return RegistryError("net/http: invalid header field value")
    if isinstance(error, library.UnsupportedProtocol) or type(error) is ValueError:
        return RegistryError(f"invalid URL: {error}")
    address = f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RegistryError(_certificate_problem(cause, parts.hostname))
        if isinstance(cause, ssl.SSLError) and (cause.reason or "") in _NOT_TLS:
            return RegistryError("http: server gave HTTP response to HTTPS client")
    if isinstance(error, library.ConnectTimeout):
        return RegistryError(f"dial tcp {address}: i/o timeout", retryable=True)
    if isinstance(error, library.TimeoutException):
        waiting = "read tcp: i/o timeout" if reading else "net/http: timeout awaiting response headers"
        return RegistryError(f"{waiting} ({STALL_TIMEOUT_S} s without a byte)", retryable=True)
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return RegistryError(f"dial tcp: lookup {parts.hostname}: {_lookup_problem(cause)}", retryable=True)
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            return RegistryError(f"tls: {(cause.reason or str(cause)).lower().replace('_', ' ')}", retryable=True)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno:
            text = os.strerror(cause.errno).lower()
            if isinstance(error, library.ConnectError):
                return RegistryError(f"dial tcp {address}: connect: {text}", retryable=True)
            return RegistryError(f"read tcp {address}: read: {text}", retryable=cause.errno != errno.ENOSPC)
    if isinstance(error, library.ProxyError):
        return RegistryError(f"proxyconnect tcp: {error}", retryable=True)
    if isinstance(error, library.RemoteProtocolError) and not _is_cut(error):
        return RegistryError(f"malformed HTTP response: {error}")
    return RegistryError("unexpected EOF" if reading else "EOF", retryable=True)


# How OpenSSL versions name the first bytes of an HTTP answer
_NOT_TLS = frozenset(("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"))


def _is_cut(error: BaseException) -> bool:
    """h11 says with one class that the peer closed early and that it sent nonsense; only the words differ."""
    text = str(error)
    return "closed connection" in text or "without sending" in text or "disconnected" in text


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, everything it came from, and the members of groups (Trio's attempts at several addresses)."""
    pending: list[BaseException] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, BaseExceptionGroup):
            pending.extend(current.exceptions)
        pending.extend(cause for cause in (current.__cause__, current.__context__) if cause is not None)


def _certificate_problem(error: ssl.SSLCertVerificationError, host: str) -> str:
    # X509_V_ERR_*: 10 expired, 9 not yet valid, 62/64 host or address mismatch, 18..21 unknown authority
    if error.verify_code in (9, 10):
        return "x509: certificate has expired or is not yet valid"
    if error.verify_code in (62, 64):
        return f"x509: certificate is not valid for {host}"
    if error.verify_code in (2, 18, 19, 20, 21):
        return "x509: certificate signed by unknown authority"
    return f"x509: {error.verify_message}"


def _lookup_problem(error: socket.gaierror) -> str:
    if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
        return "no such host"
    return (error.strerror or str(error)).lower()
