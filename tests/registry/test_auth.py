"""Credentials and challenges as they arrive, whatever arrives."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.registry.auth import (
    AuthConfig,
    Challenge,
    auth_config,
    decode_registry_auth,
    decode_registry_config,
    find_credentials,
    parse_challenges,
)


def encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"username": "u", "password": "p"}, AuthConfig("u", "p")),
        ({"Username": "u", "Password": "p", "serverAddress": "h:5"}, AuthConfig("u", "p", "h:5")),
        ({"identitytoken": "i"}, AuthConfig(identitytoken="i")),
        ({"registrytoken": "r"}, AuthConfig(registrytoken="r")),
        ({"auth": base64.b64encode(b"u:p:q").decode()}, AuthConfig("u", "p:q")),
        ({"username": 5, "other": "x"}, AuthConfig()),
        ([], AuthConfig()),
        (None, AuthConfig()),
    ],
)
def test_a_registry_auth_header_is_read_as_go_reads_it(value: object, expected: AuthConfig) -> None:
    assert expected == decode_registry_auth(encoded(value))


@pytest.mark.parametrize("header", ["", "!", "null", "e", "e30", encoded("x"), "=" * 9, "é", encoded({})[:-2]])
def test_an_unreadable_registry_auth_header_means_anonymous(header: str) -> None:
    assert decode_registry_auth(header).is_anonymous


def test_both_alphabets_and_missing_padding_are_read() -> None:
    value = {"username": "u", "password": "???>>>~~~"}
    raw = json.dumps(value).encode()
    for header in (base64.urlsafe_b64encode(raw).decode(), base64.b64encode(raw).decode().rstrip("=")):
        assert decode_registry_auth(header) == AuthConfig("u", "???>>>~~~")


def test_a_registry_config_header_holds_credentials_by_host() -> None:
    header = encoded({"h:5": {"username": "u", "password": "p"}, "x": None})

    assert decode_registry_config(header) == {"h:5": AuthConfig("u", "p"), "x": AuthConfig()}
    assert decode_registry_config("nonsense") == {}
    assert find_credentials(header, "h:5") == AuthConfig("u", "p")
    assert find_credentials(header, "other") == find_credentials("", "h:5") == AuthConfig()


def test_a_registry_is_found_under_any_of_its_keys() -> None:
    def header(*keys: str) -> str:
        return encoded({key: {"username": key, "password": "p"} for key in keys})

    hub = "https://index.docker.io/v1/"
    assert find_credentials(header("x", hub), "docker.io").username == hub
    assert find_credentials(header("http://h:5/v2/"), "h:5").username == "http://h:5/v2/"
    assert find_credentials(header("h:50"), "h:5").is_anonymous


def test_a_printed_auth_config_shows_no_secret() -> None:
    shown = repr(AuthConfig("u", "hunter2", "h", "identity", "registry"))

    assert not any(secret in shown for secret in ("hunter2", "identity", "registry"))


@given(st.text())
def test_any_header_is_credentials_or_anonymous(text: str) -> None:
    assert isinstance(decode_registry_auth(text), AuthConfig)
    assert isinstance(decode_registry_config(text), dict)


@given(st.recursive(st.none() | st.text() | st.integers(), lambda x: st.dictionaries(st.text(), x) | st.lists(x)))
def test_any_json_is_credentials_or_anonymous(value: object) -> None:
    assert isinstance(auth_config(value), AuthConfig)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (['Basic realm="x"'], [Challenge("basic", {"realm": "x"})]),
        (
            ['Bearer realm="https://h/token",service="s",scope="repository:a/b:pull,push"'],
            [Challenge("bearer", {"realm": "https://h/token", "service": "s", "scope": "repository:a/b:pull,push"})],
        ),
        (["BEARER Realm=x , service = y"], [Challenge("bearer", {"realm": "x", "service": "y"})]),
        (
            ['Basic realm="a \\"b\\"", Bearer realm="c"'],
            [Challenge("basic", {"realm": 'a "b"'}), Challenge("bearer", {"realm": "c"})],
        ),
        (["Negotiate", "Basic"], [Challenge("negotiate", {}), Challenge("basic", {})]),
        (['Bearer realm="unclosed'], [Challenge("bearer", {"realm": "unclosed"})]),
        (["", " , ", '"', "=x"], []),
    ],
)
def test_challenges_are_cut_apart(headers: list[str], expected: list[Challenge]) -> None:
    assert expected == list(parse_challenges(headers))


@given(st.lists(st.text(alphabet='aB="\\, \t;') | st.text()))
def test_any_header_is_challenges_or_nothing(headers: list[str]) -> None:
    for challenge in parse_challenges(headers):
        assert challenge.scheme == challenge.scheme.lower()


@given(st.dictionaries(st.from_regex(r"\A[a-z_]{1,8}\Z"), st.text(alphabet=st.characters(codec="ascii")), min_size=1))
def test_what_was_quoted_is_read_back(parameters: dict[str, str]) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    header = "Bearer " + ",".join(f"{name}={quoted(value)}" for name, value in parameters.items())

    assert parse_challenges([header]) == (Challenge("bearer", parameters),)
