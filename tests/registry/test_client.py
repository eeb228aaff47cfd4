"""The client against a registry that misbehaves on demand."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.core.digest import Digest, sha256_digest
from balenapy.core.manifest import Descriptor, InvalidDocument, parse_document
from balenapy.core.reference import Reference, parse_reference
from balenapy.errors import DataLoss, EngineError, InvalidParameter, NotFound, Unauthorized
from balenapy.registry import http
from balenapy.registry.auth import AuthConfig
from balenapy.registry.client import Registry, Session, user_agent
from balenapy.registry.errors import RegistryError, plain_error
from tests import images_fixture
from tests.registry.fake import FakeRegistry, fake_registry
from tests.registry.real_registry import PASSWORD, USERNAME, make_certificate
from tests.trio_tests import trio_test

USER = AuthConfig(USERNAME, PASSWORD)
BLOB = bytes(itertools.islice(itertools.cycle(range(251)), 700_000))
BLOB_DIGEST = sha256_digest(BLOB)


@dataclass(frozen=True)
class Settings:
    insecure_registries: tuple[str, ...] = ()
    registry_mirrors: tuple[str, ...] = ()


def client(**settings: Any) -> Registry:
    return Registry(Settings(**settings), directories=(), environment={})


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "RETRY_DELAY_FIRST_S", 0.0)


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        registry.add("team/app", "1", images_fixture.busybox())
        registry.add_blob(BLOB)
        yield registry


def named(fake: FakeRegistry, name: str = "team/app:1") -> Reference:
    return parse_reference(f"{fake.host}/{name}")


async def read(session: Session, offset: int = 0, size: int | None = len(BLOB)) -> bytes:
    async with session.blob(BLOB_DIGEST, offset, size_bytes=size) as blob:
        return b"".join([chunk async for chunk in blob])


# -- manifests


@trio_test
async def test_a_manifest_comes_with_its_type_and_digest(fake: FakeRegistry) -> None:
    image = images_fixture.busybox()

    async with client().session(named(fake)) as session:
        raw, media_type, digest = await session.manifest()
        config = await session.config(parse_document(raw, media_type).config)  # type: ignore[union-attr]

    assert (raw, media_type, str(digest)) == (image.manifest.data, image.manifest.media_type, image.manifest.digest)
    assert config == image.config_blob.data
    accept = fake.seen("manifests")[0].headers["Accept"]
    assert "application/vnd.oci.image.index.v1+json" in accept


@trio_test
async def test_a_manifest_asked_by_digest_must_have_it(fake: FakeRegistry) -> None:
    digest = Digest.parse(images_fixture.busybox().manifest.digest)
    fake.fault("manifests/", body=b'{"schemaVersion":2}')

    async with client().session(named(fake).without_tag().with_digest(digest)) as session:
        with pytest.raises(DataLoss, match=rf"^manifest verification failed for digest {digest}$"):
            await session.manifest()


@trio_test
async def test_a_manifest_must_have_the_digest_it_is_announced_with(fake: FakeRegistry) -> None:
    fake.fault("manifests/", digest_header="sha256:" + "0" * 64)

    async with client().session(named(fake)) as session:
        with pytest.raises(DataLoss, match="manifest verification failed"):
            await session.manifest()


@trio_test
async def test_a_config_must_have_its_digest_and_a_bounded_length(fake: FakeRegistry) -> None:
    blob = images_fixture.busybox().config_blob
    descriptor = Descriptor("", Digest.parse(blob.digest), len(blob.data))
    fake.fault("blobs/", body=b"{}")

    async with client().session(named(fake)) as session:
        with pytest.raises(DataLoss, match=rf"^image config verification failed for digest {blob.digest}$"):
            await session.config(descriptor)
        with pytest.raises(InvalidDocument, match="exceeds the limit"):
            await session.config(Descriptor("", descriptor.digest, 5 << 20))


@pytest.mark.parametrize("chunked", [False, True])
def test_an_endless_manifest_is_refused_at_the_limit(fake: FakeRegistry, chunked: bool) -> None:
    fake.fault("manifests/", body=b" " * (5 << 20), chunked=chunked)

    async def main() -> None:
        async with client().session(named(fake)) as session:
            with pytest.raises(RegistryError, match="exceeds the limit of 4194304 bytes"):
                await session.manifest()

    trio.run(main)


UNKNOWN = b'{"errors":[{"code":"%s","message":"m","detail":1}]}'


def to(location: str) -> dict[str, Any]:
    return {"status": 307, "headers": {"Location": location}, "times": 99}


REFUSALS = [
    ({"status": 404, "body": UNKNOWN % b"MANIFEST_UNKNOWN"}, NotFound, "manifest for {host}/team/app:1 not found"),
    ({"status": 404, "body": UNKNOWN % b"NAME_UNKNOWN"}, NotFound, "repository {host}/team/app not found"),
    (
        {"status": 403, "body": UNKNOWN % b"DENIED"},
        NotFound,
        "pull access denied for {host}/team/app, repository does not exist or may require 'docker login'",
    ),
    (
        {
            "status": 401,
            "headers": {"WWW-Authenticate": 'Bearer realm="http://{host}/token",error="insufficient_scope"'},
        },
        NotFound,
        "pull access denied for {host}/team/app, repository does not exist or may require 'docker login'",
    ),
    ({"status": 401, "body": b"nonsense"}, RegistryError, "unauthorized: authentication required"),
    ({"status": 429, "body": UNKNOWN % b"TOOMANYREQUESTS"}, RegistryError, "toomanyrequests: m"),
    ({"status": 400, "body": UNKNOWN % b"STRANGE"}, RegistryError, "unknown: m"),
    ({"status": 400, "body": b'{"details":"irregular"}'}, RegistryError, "unknown: irregular"),
    ({"status": 500, "times": 9}, RegistryError, "received unexpected HTTP status: 500 Internal Server Error"),
    ({"status": 503, "times": 9}, RegistryError, "received unexpected HTTP status: 503 Service Unavailable"),
    (
        {"status": 404, "body": b"<html>"},
        RegistryError,
        "error parsing HTTP 404 response body: invalid character '<' looking for beginning of value: \"<html>\"",
    ),
    ({"status": 404}, RegistryError, 'error parsing HTTP 404 response body: unexpected end of JSON input: ""'),
    (
        {"status": 400, "body": b"[]"},
        RegistryError,
        "error parsing HTTP 400 response body: json: cannot unmarshal array into Go value of type "
        'struct {{ Errors []errcode.Error }}: "[]"',
    ),
    (
        {"status": 400, "body": b"null"},
        RegistryError,
        'error parsing HTTP 400 response body: no error details found in HTTP response body: "null"',
    ),
    (to("ftp://x/"), RegistryError, 'Get ftp://x/: unsupported protocol scheme "ftp"'),
    (to("http://[x"), RegistryError, "Get http://[x: invalid URL: Invalid IPv6 URL"),
    (
        to("/v2/team/app/manifests/1"),
        RegistryError,
        "Get http://{host}/v2/team/app/manifests/1: stopped after 10 redirects",
    ),
]


@pytest.mark.parametrize(("fault", "kind", "text"), REFUSALS)
def test_a_refusal_is_told_as_the_reference_engine_tells_it(
    fake: FakeRegistry, fault: dict[str, Any], kind: type[EngineError], text: str
) -> None:
    headers = {name: value.replace("{host}", fake.host) for name, value in fault.get("headers", {}).items()}
    fake.fault("manifests/", **{**fault, "headers": headers})

    async def main() -> None:
        async with client().session(named(fake)) as session:
            with pytest.raises(kind) as caught:
                await session.manifest()
            assert text.format(host=fake.host) == caught.value.message
            assert type(caught.value) is kind

    trio.run(main)


@trio_test
async def test_distribution_tells_the_registrys_own_words(fake: FakeRegistry) -> None:
    async with client().session(named(fake, "team/app:no"), translate=plain_error) as session:
        with pytest.raises(NotFound, match=r"^manifest unknown: manifest unknown$"):
            await session.manifest()
    async with client().session(named(fake, "no:no"), translate=plain_error) as session:
        with pytest.raises(NotFound, match=r"^name unknown: no such name$"):
            await session.manifest()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("127.0.0.1:1/x", "Get http://127.0.0.1:1/v2/: dial tcp 127.0.0.1:1: connect: connection refused"),
        ("under_score.x/app", "Get https:///v2/: http: no Host in request URL"),
    ],
)
def test_an_unreachable_registry_is_told_at_once(name: str, text: str) -> None:
    async def main() -> None:
        async with client().session(parse_reference(name)) as session:
            with pytest.raises(RegistryError) as caught:
                await session.manifest()
        assert text == caught.value.message
        assert not caught.value.retryable

    trio.run(main)


@trio_test
async def test_a_passing_failure_of_a_small_request_is_tried_again(fake: FakeRegistry) -> None:
    fake.fault("GET /v2/team/app/manifests", status=503)
    fake.fault("GET /v2/team/app/manifests", cut_at=10)

    async with client().session(named(fake)) as session:
        await session.manifest()

    assert len(fake.seen("manifests")) == 3


@trio_test
async def test_too_many_requests_is_tried_again_only_when_told_when(fake: FakeRegistry) -> None:
    fake.fault("manifests", status=429, headers={"Retry-After": "0"})

    async with client().session(named(fake)) as session:
        await session.manifest()
        assert len(fake.seen("manifests")) == 2
        fake.fault("manifests", status=429, headers={"Retry-After": "86400"})
        with pytest.raises(RegistryError):
            await session.manifest()
        assert len(fake.seen("manifests")) == 3


@trio_test
async def test_tags_are_collected_over_pages(fake: FakeRegistry) -> None:
    for number in range(7):
        fake.add_manifest("many", f"t{number}", "x", b"{}")
    fake.tags_page = 3

    async with client().session(named(fake, "many")) as session:
        assert [f"t{number}" for number in range(7)] == await session.tags()

    assert len(fake.seen("tags/list")) == 3


# -- blobs


@trio_test
async def test_a_blob_arrives_whole_in_large_chunks(fake: FakeRegistry) -> None:
    async with client().session(named(fake)) as session, session.blob(BLOB_DIGEST) as blob:
        chunks = [chunk async for chunk in blob]

    assert b"".join(chunks) == BLOB
    assert blob.total_bytes == len(BLOB)
    assert len(chunks) <= 5


@trio_test
async def test_a_blob_resumes_where_it_was_cut(fake: FakeRegistry) -> None:
    fake.fault("blobs/", cut_at=300_001)
    got = b""

    async with client().session(named(fake)) as session:
        with pytest.raises(RegistryError, match=r"^unexpected EOF$") as caught:
            async with session.blob(BLOB_DIGEST) as blob:
                async for chunk in blob:
                    got += chunk
        assert caught.value.retryable
        assert BLOB[:300_001] == got  # what came before the cut is delivered
        async with session.blob(BLOB_DIGEST, len(got)) as blob:
            assert blob.range_honoured
            async for chunk in blob:
                got += chunk

    assert got == BLOB
    assert fake.seen("blobs")[1].headers["Range"] == "bytes=300001-"


@trio_test
async def test_a_reset_connection_is_worth_another_try(fake: FakeRegistry) -> None:
    fake.fault("blobs/", cut_at=300_000, reset=True)

    async with client().session(named(fake)) as session:
        with pytest.raises(RegistryError) as caught:
            await read(session)
        assert caught.value.retryable
        assert await read(session) == BLOB


@pytest.mark.parametrize("drip", [0, 1000])
@trio_test
async def test_where_range_is_ignored_the_beginning_is_thrown_away(fake: FakeRegistry, drip: int) -> None:
    fake.fault("blobs/", ignore_range=True, drip_bytes=drip)

    async with client().session(named(fake)) as session, session.blob(BLOB_DIGEST, 650_000) as blob:
        assert not blob.range_honoured
        assert BLOB[650_000:] == b"".join([chunk async for chunk in blob])


@trio_test
async def test_resuming_a_complete_blob_gives_nothing(fake: FakeRegistry) -> None:
    async with client().session(named(fake)) as session:
        assert await read(session, len(BLOB)) == b""
        with pytest.raises(RegistryError, match="has no byte"):
            await read(session, len(BLOB) + 1)


@trio_test
async def test_a_range_that_begins_elsewhere_is_refused(fake: FakeRegistry) -> None:
    fake.fault("blobs/", status=206, body=b"x", headers={"Content-Range": f"bytes 0-0/{len(BLOB)}"})

    async with client().session(named(fake)) as session:
        with pytest.raises(RegistryError, match="asked from byte 5"):
            await read(session, 5)


@pytest.mark.parametrize("fault", [{"body": BLOB + b"x"}, {"body": BLOB + b"x", "chunked": True}])
@trio_test
async def test_more_bytes_than_the_descriptor_says_are_refused(fake: FakeRegistry, fault: dict[str, Any]) -> None:
    fake.fault("blobs/", **fault)

    async with client().session(named(fake)) as session:
        with pytest.raises(DataLoss, match="longer than its descriptor says"):
            await read(session)


@pytest.mark.parametrize(
    "fault", [{"body": BLOB[:-1]}, {"body": BLOB[:-1], "chunked": True}, {"content_length": 800_000}]
)
@trio_test
async def test_fewer_bytes_than_promised_are_a_cut(fake: FakeRegistry, fault: dict[str, Any]) -> None:
    fake.fault("blobs/", **fault)

    async with client().session(named(fake)) as session:
        with pytest.raises((RegistryError, DataLoss)):
            await read(session)


@trio_test
async def test_a_stalled_blob_is_given_up_and_worth_another_try(
    fake: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "STALL_TIMEOUT_S", 0.1)
    fake.fault("blobs/", stall_at=1000)

    async with client().session(named(fake)) as session:
        with pytest.raises(RegistryError, match="i/o timeout") as caught:
            await read(session)
        assert caught.value.retryable
        assert await read(session) == BLOB


@trio_test
async def test_leaving_a_blob_early_closes_its_connection(fake: FakeRegistry) -> None:
    fake.fault("blobs/", stall_at=1000)

    async with client().session(named(fake)) as session:
        async with session.blob(BLOB_DIGEST) as blob:
            assert len(await anext(blob)) == 1000
        with trio.move_on_after(0.05) as scope:
            fake.fault("blobs/", stall_at=1000)
            await read(session)
        assert scope.cancelled_caught
        assert await read(session) == BLOB


@trio_test
async def test_blobs_of_one_session_arrive_side_by_side(fake: FakeRegistry) -> None:
    got: list[bytes] = []

    async def one(session: Session) -> None:
        got.append(await read(session))

    async with client().session(named(fake)) as session, trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(one, session)

    assert got == [BLOB] * 4
    assert len(fake.seen("GET /v2/$")) == 1  # one ping for all


# -- redirects


@trio_test
async def test_a_redirect_to_another_host_takes_no_credentials_along(fake: FakeRegistry) -> None:
    with fake_registry(auth="basic") as asked:
        asked.add("team/app", "1", images_fixture.busybox())
        asked.blobs[str(BLOB_DIGEST)] = b"not asked"
        there = f"{fake.url}/v2/team/app/blobs/{BLOB_DIGEST}"
        asked.fault("blobs/", status=307, headers={"Location": there}, times=2)

        async with client().session(named(asked), USER) as session:
            assert BLOB[500_000:] == await read(session, 500_000)

    (followed,) = fake.seen("blobs")
    assert "Authorization" not in followed.headers
    assert followed.headers["Range"] == "bytes=500000-"
    assert "Authorization" in asked.seen("blobs")[0].headers


@trio_test
async def test_a_redirect_within_the_host_keeps_credentials() -> None:
    with fake_registry(auth="basic") as fake:
        fake.add_blob(BLOB)
        fake.fault("blobs/", status=302, headers={"Location": f"/v2/elsewhere/blobs/{BLOB_DIGEST}"})

        async with client().session(named(fake), USER) as session:
            assert await read(session) == BLOB


# -- credentials


@pytest.mark.parametrize("auth", ["basic", "token"])
@trio_test
async def test_credentials_open_a_private_repository(auth: Any) -> None:
    with fake_registry(auth=auth) as fake:
        fake.add("team/app", "1", images_fixture.busybox())

        async with client().session(named(fake), USER) as session:
            await session.manifest()


@trio_test
async def test_one_token_serves_all_requests_of_a_session() -> None:
    with fake_registry(auth="token") as fake:
        fake.add("team/app", "1", images_fixture.busybox())
        fake.add_blob(BLOB)

        async with client().session(named(fake), USER) as session, trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read, session)
                nursery.start_soon(session.manifest)

        (asked,) = fake.seen("/token")
    assert asked.path == "/token?service=fake.service&scope=repository%3Ateam%2Fapp%3Apull&account=user"


@trio_test
async def test_a_public_repository_needs_an_anonymous_token() -> None:
    with fake_registry(auth="token") as fake:
        fake.anonymous_tokens = True
        fake.add("team/app", "1", images_fixture.busybox())

        async with client().session(named(fake)) as session:
            await session.manifest()


@trio_test
async def test_a_token_that_is_no_longer_valid_is_renewed_once() -> None:
    with fake_registry(auth="token") as fake:
        fake.add("team/app", "1", images_fixture.busybox())
        fake.add_blob(BLOB)

        async with client().session(named(fake), USER) as session:
            await session.manifest()
            fake.expire_tokens()
            assert await read(session) == BLOB
            fake.fault("manifests", times=9, status=401)
            with pytest.raises(RegistryError, match="unauthorized"):
                await session.manifest()

        assert len(fake.seen("/token")) == 3


@trio_test
async def test_a_registry_that_asks_late_is_answered() -> None:
    with fake_registry(auth="token") as fake:
        fake.open_ping = True
        fake.add("team/app", "1", images_fixture.busybox())

        async with client().session(named(fake), USER) as session:
            await session.manifest()


@trio_test
async def test_a_registry_token_is_sent_as_it_is() -> None:
    with fake_registry(auth="token") as fake:
        fake.add("team/app", "1", images_fixture.busybox())
        token = fake.new_token("repository:team/app:pull")

        async with client().session(named(fake), AuthConfig(registrytoken=token)) as session:
            await session.manifest()

        assert fake.seen("/token") == []


@trio_test
async def test_an_identity_token_is_traded_for_a_token() -> None:
    with fake_registry(auth="token") as fake:
        fake.add("team/app", "1", images_fixture.busybox())
        identity = fake.new_refresh_token()

        async with client().session(named(fake), AuthConfig(identitytoken=identity)) as session:
            await session.manifest()

        (asked,) = fake.seen("POST /token")
    assert asked.form == {
        "grant_type": "refresh_token",
        "service": "fake.service",
        "client_id": "docker",
        "refresh_token": identity,
        "scope": "repository:team/app:pull",
    }


def test_wrong_credentials_are_told_with_the_request_they_were_for() -> None:
    async def main() -> None:
        with fake_registry(auth="token") as fake:
            url = f"{fake.url}/v2/team/app/manifests/1"
            async with client().session(named(fake), AuthConfig("u", "p")) as session:
                with pytest.raises(RegistryError) as caught:
                    await session.manifest()
            assert f"Get {url}: unauthorized: incorrect username or password" == caught.value.message
            fake.fault("/token", status=403, body=UNKNOWN % b"DENIED", times=9)
            async with client().session(named(fake), USER) as session:
                with pytest.raises(RegistryError) as caught:
                    await session.manifest()
            assert f"Get {url}: denied: m" == caught.value.message  # a token server's word is not translated
        with fake_registry(auth="basic") as fake:
            async with client().session(named(fake)) as session:
                with pytest.raises(RegistryError) as caught:
                    await session.manifest()
            assert f"Get {fake.url}/v2/team/app/manifests/1: no basic auth credentials" == caught.value.message

    trio.run(main)


@pytest.mark.parametrize(
    "answer", [b"nonsense", b"{}", b'{"token":5}', b'{"token":"a\\nb"}', b"[]", b'{"token":"\\u00e9"}']
)
@trio_test
async def test_a_token_server_that_gives_no_token_is_told(answer: bytes) -> None:
    with fake_registry(auth="token") as fake:
        fake.fault("/token", status=200, body=answer)

        async with client().session(named(fake), USER) as session:
            with pytest.raises(RegistryError, match="token"):
                await session.manifest()


@trio_test
async def test_a_bad_registry_token_is_refused_without_being_told() -> None:
    with fake_registry(auth="token") as fake:
        async with client().session(named(fake), AuthConfig(registrytoken="secret\r\nX: y")) as session:
            with pytest.raises(RegistryError, match="invalid header field value") as caught:
                await session.manifest()

    assert "secret" not in caught.value.message


# -- login


@pytest.mark.parametrize(("auth", "token"), [("none", ""), ("basic", ""), ("token", "refresh-2")])
@trio_test
async def test_a_login_succeeds_and_keeps_the_identity_token(auth: Any, token: str) -> None:
    with fake_registry(auth=auth) as fake:
        done = await client().login(AuthConfig(USERNAME, PASSWORD, f"http://{fake.host}/v2/"))

    assert ("Login Succeeded", token) == (done.status, done.identity_token)


@pytest.mark.parametrize(
    ("auth", "text"),
    [
        ("basic", "login attempt to http://{host}/v2/ failed with status: 401 Unauthorized"),
        ("token", "Get http://{host}/v2/: unauthorized: incorrect username or password"),
    ],
)
@trio_test
async def test_a_refused_login_is_unauthorized(auth: Any, text: str) -> None:
    with fake_registry(auth=auth) as fake, pytest.raises(Unauthorized) as caught:
        await client().login(AuthConfig("u", "p", fake.host))

    assert text.format(host=fake.host) == caught.value.message


@pytest.mark.parametrize("address", ["http://h:x", "a b", "http://[x", "h:99999999"])
@trio_test
async def test_a_login_needs_a_server_address(address: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^unable to parse server address: "):
        await client().login(AuthConfig("u", "p", address))


@trio_test
async def test_a_login_to_nobody_says_why() -> None:
    with pytest.raises(RegistryError) as caught:
        await client().login(AuthConfig("u", "p", "127.0.0.1:1"))

    assert caught.value.message == "Get http://127.0.0.1:1/v2/: dial tcp 127.0.0.1:1: connect: connection refused"


# -- endpoints


def official(registry: Registry, fake: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fake` play Docker Hub: everything else about docker.io stays as it is."""
    from balenapy.registry.client import Endpoint

    real = registry._endpoints

    async def endpoints(domain: str, *, mirrors: bool = True) -> tuple[Endpoint, ...]:
        found = await real(domain, mirrors=mirrors)
        return (*found[:-1], Endpoint(fake.url, fake.host, verify=False)) if domain == "docker.io" else found

    monkeypatch.setattr(registry, "_endpoints", endpoints)


@trio_test
async def test_a_mirror_is_asked_first_and_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_registry(auth="basic") as hub, fake_registry() as mirror:
        for one in (hub, mirror):
            one.add("library/app", "1", images_fixture.busybox())
            one.add_blob(BLOB)
        registry = client(registry_mirrors=(mirror.url + "/",))
        official(registry, hub, monkeypatch)

        async with registry.session(parse_reference("app:1"), USER) as session:
            await session.manifest()
            assert await read(session) == BLOB

    assert hub.requests == []
    assert all("Authorization" not in request.headers for request in mirror.requests)


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 404}, {"cut_at": 0}])
@trio_test
async def test_what_a_mirror_cannot_give_the_registry_gives(
    monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]
) -> None:
    with fake_registry(auth="basic") as hub, fake_registry() as mirror:
        hub.add("library/app", "1", images_fixture.busybox())
        hub.add_blob(BLOB)
        mirror.fault("(manifests|blobs)/", times=9, **fault)
        registry = client(registry_mirrors=("http://127.0.0.1:1", mirror.url))
        official(registry, hub, monkeypatch)

        async with registry.session(parse_reference("app:1"), USER) as session:
            await session.manifest()
            assert await read(session) == BLOB

    assert all("Authorization" not in request.headers for request in mirror.requests)


@pytest.mark.parametrize(
    ("host", "insecure", "expected"),
    [
        ("127.9.9.9:5000", (), True),
        ("localhost:5000", (), True),
        ("10.1.2.3:5000", (), False),
        ("10.1.2.3:5000", ("10.0.0.0/8",), True),
        ("10.1.2.3:5000", ("10.1.2.3:5000",), True),
        ("10.1.2.3:5000", ("10.1.2.3",), False),
        ("h.invalid", ("h.invalid",), True),
        ("h.invalid", (), False),
        ("[::1]:5000", (), True),
        ("", (), False),
    ],
)
@trio_test
async def test_loopback_and_listed_registries_are_insecure(
    host: str, insecure: tuple[str, ...], expected: bool
) -> None:
    assert expected == await client(insecure_registries=insecure)._is_insecure(host)


@trio_test
async def test_a_certificate_nobody_vouches_for_is_refused_or_skipped(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    with fake_registry(certificate=made) as fake:
        fake.add("team/app", "1", images_fixture.busybox())
        registry = client()
        async with registry.session(named(fake)) as session:  # loopback is insecure: TLS, unverified
            await session.manifest()
        registry._insecure_ranges = ()
        async with registry.session(named(fake)) as session:
            with pytest.raises(RegistryError) as caught:
                await session.manifest()

    assert f"Get https://{fake.host}/v2/: x509: certificate signed by unknown authority" == caught.value.message


@trio_test
async def test_a_certificate_in_the_hosts_directory_vouches_for_it(tmp_path: Path) -> None:
    made = make_certificate(tmp_path / "made")
    with fake_registry(certificate=made, auth="token") as fake:
        fake.add("team/app", "1", images_fixture.busybox())
        fake.add_blob(BLOB)
        directory = tmp_path / "certs.d" / fake.host
        directory.mkdir(parents=True)
        (directory / "ca.crt").write_bytes(made.certificate.read_bytes())
        registry = Registry(Settings(), directories=(tmp_path / "certs.d",), environment={})
        registry._insecure_ranges = ()

        async with registry.session(named(fake), USER) as session:
            await session.manifest()
            assert await read(session) == BLOB


@trio_test
async def test_a_secure_registry_that_answers_in_the_clear_is_told(fake: FakeRegistry) -> None:
    registry = client()
    registry._insecure_ranges = ()

    async with registry.session(named(fake)) as session:
        with pytest.raises(RegistryError) as caught:
            await session.manifest()

    wanted = f"Get https://{fake.host}/v2/: http: server gave HTTP response to HTTPS client"
    assert wanted == caught.value.message


@trio_test
async def test_an_insecure_registry_that_speaks_tls_is_not_asked_in_the_clear(tmp_path: Path) -> None:
    with fake_registry(certificate=make_certificate(tmp_path)) as fake:
        fake.add_blob(BLOB)
        fake.fault("blobs/", cut_at=0, times=9)

        async with client().session(named(fake)) as session:
            with pytest.raises(RegistryError) as caught:
                await read(session)

    assert caught.value.retryable
    assert "https" in caught.value.message or "EOF" in caught.value.message


@trio_test
async def test_a_proxy_is_used_where_the_environment_says_so(fake: FakeRegistry) -> None:
    """The fake registry plays the proxy: it is asked for a whole URL."""
    environment = {"HTTP_PROXY": fake.url}
    registry = Registry(Settings(insecure_registries=("far.invalid",)), directories=(), environment=environment)

    async with registry.session(parse_reference("far.invalid/team/app:1")) as session:
        await session.manifest()

    assert [request.path for request in fake.seen("manifests")] == ["http://far.invalid/v2/team/app/manifests/1"]


# -- how we name ourselves


def test_the_user_agent_names_engine_and_client() -> None:
    agent = user_agent("Docker-Client/28.0 (linux); é\n")

    assert agent.startswith("balenaEngine/18.9.17 ")
    assert agent.endswith(" UpstreamClient(Docker-Client/28.0 \\(linux\\)\\; )")


@trio_test
async def test_the_clients_meta_headers_go_along(fake: FakeRegistry) -> None:
    registry = client()

    async with registry.session(named(fake), meta_headers={"X-Meta-Owner": "me"}, upstream_client="cli") as session:
        await session.manifest()

    headers = fake.seen("manifests")[0].headers
    assert headers["X-Meta-Owner"] == "me"
    assert "UpstreamClient(cli)" in headers["User-Agent"]
    assert headers["Accept-Encoding"] == "identity"


def test_hashing_while_reading_is_left_to_the_reader(fake: FakeRegistry) -> None:
    """The client does not verify blobs; a wrong one arrives as it is."""
    fake.fault("blobs/", body=b"y" * len(BLOB))

    async def main() -> None:
        async with client().session(named(fake)) as session:
            assert hashlib.sha256(await read(session)).hexdigest() != BLOB_DIGEST.hex

    trio.run(main)


@contextlib.contextmanager
def tunnel_to(host: str) -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy that tunnels everything to one place: its URL and the heads it was sent."""
    heads: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def relay(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        address, port = host.split(":")
        with client, socket.create_connection((address, int(port))) as server:
            heads.append(client.recv(1 << 16).decode())
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=relay, args=(server, client))
            back.start()
            relay(client, server)
            back.join()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://u:p@127.0.0.1:{listener.getsockname()[1]}", heads
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@trio_test
async def test_tls_goes_through_a_proxys_tunnel_to_the_registry_itself(tmp_path: Path) -> None:
    with (
        fake_registry(certificate=make_certificate(tmp_path), auth="basic") as fake,
        tunnel_to(fake.host) as (url, heads),
    ):
        fake.add("team/app", "1", images_fixture.busybox())
        settings = Settings(insecure_registries=("far.invalid",))
        registry = Registry(settings, directories=(), environment={"https_proxy": url})

        async with registry.session(parse_reference("far.invalid/team/app:1"), USER) as session:
            await session.manifest()

    assert all(head.startswith("CONNECT far.invalid:443 HTTP/1.1\r\n") for head in heads)
    assert all("Proxy-Authorization: Basic dTpw\r\n" in head for head in heads)
    assert "Authorization" in fake.seen("manifests")[0].headers
