"""Proving who we are: credentials as clients send them, challenges as registries send them, tokens.

A registry answers 401 with one or more challenges. `Basic` takes user and password on each request. `Bearer` names a
token server (`realm`) and what to tell it (`service`); it is asked once for each scope and gives a token for a while:

    GET  realm?service=…&scope=repository:library/x:pull     (with Basic if there are a user and a password)
    POST realm  grant_type=refresh_token…                    (with an identity token from an earlier login)

Sources: docker/distribution registry/client/auth (session.go, challenge/authchallenge.go), RFC 6750, RFC 7235.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode, urlsplit

import trio

from balenapy.registry.errors import RegistryError, error_of_answer
from balenapy.registry.http import HTTP, Answer, RetryBudget

CLIENT_ID = "docker"  # registry/auth.go AuthClientID; token servers know it
TOKEN_ANSWER_MAX_BYTES = 1 << 20
TOKEN_LIFETIME_MIN_S = 60  # auth/session.go minimumTokenLifetimeSeconds
TOKEN_MARGIN_S = 5  # a token that ends while the request travels is no use
SMALL_ATTEMPTS = 3  # of a request whose client sees nothing meanwhile


# --- credentials


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """What a client knows about a registry. All empty is anonymous."""

    username: str = ""
    password: str = ""
    serveraddress: str = ""
    identitytoken: str = ""
    registrytoken: str = ""

    @property
    def is_anonymous(self) -> bool:
        return not (self.username or self.password or self.identitytoken or self.registrytoken)

    def __repr__(self) -> str:  # secrets do not belong into logs and tracebacks
        return f"AuthConfig(username={self.username!r}, serveraddress={self.serveraddress!r}, …)"


def auth_config(value: object) -> AuthConfig:
    """Read one decoded AuthConfig object; keys are matched without regard to case, as Go does.

    `auth` (base64 of user:password) is used when the two are absent: docker-py and old clients send it.
    """
    if not isinstance(value, dict):
        return AuthConfig()
    fields = {str(key).lower(): text for key, text in value.items() if isinstance(text, str)}
    username, password = fields.get("username", ""), fields.get("password", "")
    if not username and not password and fields.get("auth"):
        decoded = _base64(fields["auth"])
        user, _, secret = (decoded or b"").decode("utf-8", "replace").partition(":")
        username, password = user, secret.rstrip("\0")
    return AuthConfig(
        username,
        password,
        fields.get("serveraddress", ""),
        fields.get("identitytoken", ""),
        fields.get("registrytoken", ""),
    )


def decode_registry_auth(header: str) -> AuthConfig:
    """Read `X-Registry-Auth` (base64url of JSON). What cannot be read means anonymous."""
    return auth_config(_decode_json(header))


def decode_registry_config(header: str) -> dict[str, AuthConfig]:
    """Read `X-Registry-Config`: credentials of several registries, by host. What cannot be read means none."""
    value = _decode_json(header)
    if not isinstance(value, dict):
        return {}
    return {str(host): auth_config(entry) for host, entry in value.items()}


def find_credentials(config: str, domain: str) -> AuthConfig:
    """What an `X-Registry-Config` has for a registry; keys may be hosts or URLs. Source: moby registry/auth.go."""
    names = (domain, "index.docker.io") if domain == "docker.io" else (domain,)
    for key, auth in decode_registry_config(config).items():
        if key.removeprefix("https://").removeprefix("http://").partition("/")[0] in names:
            return auth
    return AuthConfig()


def _decode_json(header: str) -> Any:
    raw = _base64(header.strip())
    if not raw:
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _base64(text: str) -> bytes | None:
    """Decode base64 in either alphabet, padded or not."""
    plain = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


# --- challenges


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way a server accepts: `scheme` in lower case, parameter names in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(headers: Iterable[str]) -> tuple[Challenge, ...]:
    """Read WWW-Authenticate headers; one header may hold several challenges. Total: what makes no sense is skipped."""
    challenges: list[Challenge] = []
    for header in headers:
        scheme: str | None = None
        parameters: dict[str, str] = {}
        for name, value in _tokens(header):
            if value is None:
                if scheme is not None:
                    challenges.append(Challenge(scheme, parameters))
                scheme, parameters = name, {}
            elif scheme is not None:
                parameters.setdefault(name, value)
        if scheme is not None:
            challenges.append(Challenge(scheme, parameters))
    return tuple(challenges)


def _tokens(header: str) -> Iterable[tuple[str, str | None]]:
    """Cut a header into schemes (`name`, None) and parameters (`name`, value)."""
    position, end = 0, len(header)
    while position < end:
        if header[position] in " \t,":
            position += 1
            continue
        start = position
        while position < end and header[position] not in ' \t,="':
            position += 1
        name = header[start:position].lower()
        after = position
        while after < end and header[after] in " \t":
            after += 1
        if after >= end or header[after] != "=":
            if name:
                yield name, None
            else:
                position += 1  # a quote where a name must be
            continue
        position = after + 1
        while position < end and header[position] in " \t":
            position += 1
        if position < end and header[position] == '"':
            value, position = _quoted(header, position + 1)
        else:
            start = position
            while position < end and header[position] not in " \t,":
                position += 1
            value = header[start:position]
        yield name, value


def _quoted(header: str, position: int) -> tuple[str, int]:
    characters: list[str] = []
    while position < len(header):
        character = header[position]
        position += 1
        if character == '"':
            break
        if character == "\\" and position < len(header):
            character = header[position]
            position += 1
        characters.append(character)
    return "".join(characters), position


def challenges_of(answer: Answer) -> tuple[Challenge, ...]:
    return parse_challenges(answer.all_headers("www-authenticate"))


def bearer_of(challenges: Iterable[Challenge]) -> Mapping[str, str] | None:
    """The parameters of the Bearer challenge, if there is one."""
    return next((one.parameters for one in challenges if one.scheme == "bearer"), None)


# --- authorization


@dataclass(frozen=True, slots=True)
class _Token:
    value: str
    expires_at: float  # trio.current_time(): a device's wall clock may be decades off


class Authorizer:
    """Makes the Authorization header for one registry, from its challenges and the client's credentials."""

    def __init__(
        self, http: HTTP, auth: AuthConfig | None, challenges: Iterable[Challenge], *, offline: bool = False
    ) -> None:
        """`offline`: ask token servers for an identity token too (a login wants one to keep)."""
        self._http = http
        self._auth = auth or AuthConfig()
        self._challenges = tuple(challenges)
        self._offline = offline
        self._tokens: dict[str, _Token] = {}
        self._lock = trio.Lock()

    @property
    def identity_token(self) -> str:
        """The identity token given, or received by now."""
        return self._auth.identitytoken

    async def headers(self, scope: str) -> dict[str, str]:
        """The header for a request within `scope` ("" for none).

        Raises:
            RegistryError: the token server refused, or the registry wants a password and we have none.
        """
        made: dict[str, str] = {}
        for challenge in self._challenges:
            if challenge.scheme == "bearer":
                made = {"Authorization": f"Bearer {await self._bearer(challenge.parameters, scope)}"}
            elif challenge.scheme == "basic" and not made:
                if self._auth.registrytoken:
                    continue
                if not (self._auth.username or self._auth.password):
                    raise RegistryError("no basic auth credentials", status=401)
                made = {"Authorization": _basic(self._auth)}
        return made

    def has_token(self, scope: str) -> bool:
        """Whether `headers` would use a token from before: refused, it may only be stale."""
        return scope in self._tokens

    def forget(self, scope: str) -> None:
        """Drop the token of this scope because the registry refused it."""
        self._tokens.pop(scope, None)

    def learn(self, challenges: tuple[Challenge, ...]) -> bool:
        """Take challenges that come late, from a registry whose `/v2/` is open to all; whether they are news."""
        # A challenge with an error in it judges what was sent; it does not ask for something else.
        if self._challenges or not challenges or any("error" in one.parameters for one in challenges):
            return False
        self._challenges = challenges
        return True

    async def _bearer(self, parameters: Mapping[str, str], scope: str) -> str:
        if self._auth.registrytoken:
            return self._auth.registrytoken
        async with self._lock:  # layers start together: one asks, the others wait for its answer
            token = self._tokens.get(scope)
            if token is None or token.expires_at <= trio.current_time():
                token = await self._fetch(parameters, scope)
                self._tokens[scope] = token
            return token.value

    async def _fetch(self, parameters: Mapping[str, str], scope: str) -> _Token:
        realm, service = parameters.get("realm", ""), parameters.get("service", "")
        if urlsplit(realm).scheme not in ("http", "https") or not urlsplit(realm).hostname:
            problem = "no realm specified for token auth challenge"
            raise RegistryError(f"invalid token auth challenge realm: {realm}" if realm else problem)
        budget = RetryBudget(SMALL_ATTEMPTS)
        while True:
            try:
                if self._auth.identitytoken:
                    return await self._fetch_with_identity(realm, service, scope)
                return await self._fetch_with_password(realm, service, scope)
            except RegistryError as error:
                delay = budget.next_delay(error)
                if delay is None:
                    raise
                await trio.sleep(delay)

    async def _fetch_with_password(self, realm: str, service: str, scope: str) -> _Token:
        query = [("service", service)] if service else []
        query += [("scope", one) for one in scope.split()]
        if self._offline:
            query += [("offline_token", "true"), ("client_id", CLIENT_ID)]
        headers = {}
        if self._auth.username and self._auth.password:
            query.append(("account", self._auth.username))
            headers["Authorization"] = _basic(self._auth)
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}" if query else realm
        async with self._http.request("GET", url, headers) as answer:
            return await self._token_of(answer)

    async def _fetch_with_identity(self, realm: str, service: str, scope: str) -> _Token:
        form = {
            "grant_type": "refresh_token",
            "service": service,
            "client_id": CLIENT_ID,
            "refresh_token": self._auth.identitytoken,
            **({"scope": scope} if scope else {}),
            **({"access_type": "offline"} if self._offline else {}),
        }
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        async with self._http.request("POST", realm, headers, urlencode(form).encode()) as answer:
            return await self._token_of(answer)

    async def _token_of(self, answer: Answer) -> _Token:
        if not 200 <= answer.status < 300:
            body = await answer.read_some(TOKEN_ANSWER_MAX_BYTES)
            raise error_of_answer(answer.status, body, bearer_of(challenges_of(answer)), answer.retry_after_s)
        body = await answer.read(TOKEN_ANSWER_MAX_BYTES)
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RegistryError(f"unable to decode token response: {error}") from error
        fields = document if isinstance(document, dict) else {}
        value = fields.get("access_token") or fields.get("token")
        if not isinstance(value, str) or not value.isprintable() or not value.isascii():
            raise RegistryError("authorization server did not include a token in the response")
        refresh = fields.get("refresh_token")
        if isinstance(refresh, str) and refresh:
            self._auth = replace(self._auth, identitytoken=refresh)
        lifetime = fields.get("expires_in")
        seconds = lifetime if isinstance(lifetime, int | float) else 0
        lasts = min(max(seconds, TOKEN_LIFETIME_MIN_S), 86400) - TOKEN_MARGIN_S
        return _Token(value, trio.current_time() + lasts)


def basic_authorization(auth: AuthConfig) -> dict[str, str]:
    """The header of Basic authorization."""
    return {"Authorization": _basic(auth)}


def _basic(auth: AuthConfig) -> str:
    pair = f"{auth.username}:{auth.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"
