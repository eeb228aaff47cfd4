"""The registry client of the command line: references, credentials, tokens, and what breaks on the way."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path

import pytest

from delta import registry
from delta.credentials import ANONYMOUS, Credentials, find_credentials
from delta.errors import DeltaError, Malformed, RegistryFailed
from delta.registry import Repository, is_loopback, parse_reference
from tests.registry.fake import FakeRegistry, fake_registry
from tests.registry.real_registry import PASSWORD, USERNAME, make_certificate, real_registry

BLOB = os.urandom(300_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.time, "sleep", lambda seconds: None)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty docker configuration."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "config.json"


def repository(fake: FakeRegistry, **how: str) -> Repository:
    return Repository(parse_reference(f"{fake.host}/team/app"), **how)  # type: ignore[arg-type]


def fetched(fake: FakeRegistry) -> bytes:
    out = io.BytesIO()
    repository(fake).fetch_blob(fake.add_blob(BLOB), len(BLOB), out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("text", "host", "path", "named"),
    [
        ("busybox", "registry-1.docker.io", "library/busybox", "latest"),
        ("docker.io/busybox:1", "registry-1.docker.io", "library/busybox", "1"),
        ("team/app:1.2", "registry-1.docker.io", "team/app", "1.2"),
        ("localhost/app", "localhost", "app", "latest"),
        ("localhost:5000/a/b-c/d__e:x", "localhost:5000", "a/b-c/d__e", "x"),
        ("[::1]:5000/app:1", "[::1]:5000", "app", "1"),
        ("example.org/app:1@sha256:" + "a" * 64, "example.org", "app", "sha256:" + "a" * 64),
    ],
)
def test_references_are_read_as_docker_reads_them(text: str, host: str, path: str, named: str) -> None:
    reference = parse_reference(text)

    assert (reference.host, reference.path, reference.named) == (host, path, named)


@pytest.mark.parametrize("text", ["", "App", "a//b", "app:", "app@sha256:12", "app:x y", "http://example.org/a", "a/"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(Malformed):
        parse_reference(text)


def test_loopback_is_told_from_the_rest() -> None:
    assert [*map(is_loopback, ("localhost:1", "127.0.0.1", "127.9.9.9:80", "[::1]:80"))] == [True, True, True, True]
    assert [*map(is_loopback, ("127.example.org", "10.0.0.1:5000"))] == [False, False]


def test_credentials_of_docker_login_are_found(config: Path) -> None:
    auth = base64.b64encode(b"user:pass:word").decode()
    config.write_text(
        json.dumps({"auths": {"example.org": {"auth": auth}, "https://old.example/v1/": {"identitytoken": "t"}}})
    )

    assert find_credentials("example.org") == Credentials("user", "pass:word")
    assert find_credentials("old.example") == Credentials(identity_token="t")
    assert find_credentials("other.example") == ANONYMOUS
    assert "pass" not in repr(find_credentials("example.org"))


def test_credential_helpers_are_asked(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text(
        '#!/bin/sh\nread -r host\n[ "$host" = example.org ] && echo \'{"Username":"u","Secret":"s"}\' && exit 0\n'
        "echo 'credentials not found in native keychain'; exit 1\n"
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config.write_text(json.dumps({"credsStore": "test"}))

    assert find_credentials("example.org") == Credentials("u", "s")
    assert find_credentials("other.example") == ANONYMOUS
    config.write_text(json.dumps({"credHelpers": {"example.org": "absent"}}))
    with pytest.raises(DeltaError, match="docker-credential-absent"):
        find_credentials("example.org")


@pytest.mark.parametrize("auth", ["basic", "token"])
def test_passwords_and_tokens_open_a_registry(auth: str, config: Path) -> None:
    with fake_registry(auth=auth) as fake:  # type: ignore[arg-type]
        with pytest.raises(RegistryFailed):
            fetched(fake)
        config.write_text(json.dumps({"auths": {fake.host: {"username": fake.username, "password": fake.password}}}))

        assert fetched(fake) == BLOB
        if auth == "token":
            assert set(fake.tokens.values()) == {"repository:team/app:pull"}


def test_an_identity_token_is_traded_for_a_token_and_an_expired_one_renewed(config: Path) -> None:
    with fake_registry(auth="token") as fake:
        config.write_text(json.dumps({"auths": {fake.host: {"identitytoken": fake.new_refresh_token()}}}))
        asked = repository(fake)
        digest = fake.add_blob(BLOB)
        assert asked.has_blob(digest)
        fake.expire_tokens()

        assert asked.has_blob(digest)


def test_a_wrong_password_is_refused_once(config: Path) -> None:
    with fake_registry(auth="basic") as fake:
        config.write_text(json.dumps({"auths": {fake.host: {"username": "user", "password": "wrong"}}}))
        with pytest.raises(RegistryFailed, match=r"refused|401"):
            repository(fake).has_blob(fake.add_blob(BLOB))
        assert len(fake.requests) <= 3


@pytest.mark.parametrize(
    "fault",
    [
        {"cut_at": 100_000, "times": 3},
        {"cut_at": 100_000, "reset": True},
        {"status": 503, "times": 4},
        {"status": 429, "headers": {"Retry-After": "1"}},
        {"cut_at": 100_000, "times": 1, "ignore_range": True},
    ],
)
def test_a_blob_comes_whole_over_a_bad_line(fault: dict[str, object]) -> None:
    with fake_registry() as fake:
        fake.fault("blobs/sha256", **fault)
        if "ignore_range" in fault:
            fake.fault("blobs/sha256", ignore_range=True)

        assert fetched(fake) == BLOB


def test_what_stays_broken_ends() -> None:
    with fake_registry() as fake:
        for fault in ({"status": 503}, {"cut_at": 0}, {"body": b"x" * len(BLOB)}, {"status": 404}):
            fake.faults.clear()
            fake.fault("blobs/sha256", times=99, **fault)
            with pytest.raises(RegistryFailed):
                fetched(fake)


def test_a_manifest_of_another_digest_is_refused() -> None:
    with fake_registry() as fake:
        digest = fake.add_manifest("team/app", "1", registry.MANIFEST, b'{"a":1}')
        assert repository(fake).manifest(digest).data == b'{"a":1}'
        fake.fault("manifests", body=b'{"a":2}', times=9)
        with pytest.raises(RegistryFailed, match="arrived with the digest"):
            repository(fake).manifest(digest)


def test_tags_come_page_by_page() -> None:
    with fake_registry() as fake:
        for number in range(25):
            fake.add_manifest("team/app", f"t{number:02}", registry.MANIFEST, b"{}")
        fake.tags_page = 10

        assert [f"t{number:02}" for number in range(25)] == repository(fake).tags()


def test_a_redirect_is_followed_without_the_password(config: Path) -> None:
    with fake_registry(auth="basic") as fake, fake_registry() as store:
        config.write_text(json.dumps({"auths": {fake.host: {"username": fake.username, "password": fake.password}}}))
        digest = store.add_blob(BLOB)
        fake.add_blob(BLOB)
        elsewhere = f"{store.url}/v2/x/blobs/{digest}"
        fake.fault(f"GET .*blobs/{digest}", status=307, headers={"Location": elsewhere}, times=1)

        assert fetched(fake) == BLOB
        assert "Authorization" not in store.seen("blobs")[0].headers


def test_debians_registry_with_a_password_and_a_certificate_of_its_own(tmp_path: Path, config: Path) -> None:
    certificate = make_certificate(tmp_path / "tls")
    with real_registry(tmp_path / "registry", basic_auth=True, tls=certificate) as real:
        config.write_text(json.dumps({"auths": {real.host: {"username": USERNAME, "password": PASSWORD}}}))
        asked = Repository(parse_reference(f"{real.host}/team/app"), actions="pull,push")
        digest = "sha256:" + registry.hashlib.sha256(BLOB).hexdigest()

        assert asked.put_blob(digest, io.BytesIO(BLOB))
        assert not asked.put_blob(digest, io.BytesIO(BLOB))
        out = io.BytesIO()
        asked.fetch_blob(digest, len(BLOB), out)
        assert out.getvalue() == BLOB
