"""What `docker login` left behind: user and password of a registry, out of config.json or a credential helper."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta.errors import DeltaError

HUB_HOST = "registry-1.docker.io"
HUB_KEY = "https://index.docker.io/v1/"  # what a login without an address is filed under
HELPER_TIMEOUT_S = 60
_TOKEN_USER = "<token>"  # docker-credential-helpers: the secret is an identity token


@dataclass(frozen=True, slots=True)
class Credentials:
    """All empty: anonymous."""

    user: str = ""
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:  # secrets do not belong into messages
        return f"Credentials({self.user!r}, …)"

    @property
    def basic(self) -> str | None:
        """The value of an Authorization header."""
        if not self.user:
            return None
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


ANONYMOUS = Credentials()


def config_path() -> Path:
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else Path.home() / ".docker") / "config.json"


def find_credentials(host: str) -> Credentials:
    """What docker's client would send to a registry.

    Raises:
        DeltaError: config.json cannot be read, or the credential helper it names fails.
    """
    path = config_path()
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return ANONYMOUS
    except (OSError, ValueError, RecursionError) as error:
        raise DeltaError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise DeltaError(f"{path}: not an object")
    key = HUB_KEY if host == HUB_HOST else host
    helper = _section(document, "credHelpers").get(key) or document.get("credsStore")
    if isinstance(helper, str) and helper:
        found = _ask_helper(helper, key)
        if found != ANONYMOUS:
            return found
    for name, entry in _section(document, "auths").items():
        if isinstance(entry, dict) and (name == key or _host(name) == _host(key)):
            return _entry(entry)
    return ANONYMOUS


def _section(document: dict[str, Any], name: str) -> dict[str, Any]:
    section = document.get(name)
    return section if isinstance(section, dict) else {}


def _host(name: str) -> str:
    return name.partition("://")[2].partition("/")[0] if "://" in name else name.partition("/")[0]


def _entry(entry: dict[str, Any]) -> Credentials:
    user, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if not user and entry.get("auth"):
        try:
            plain = base64.b64decode(str(entry["auth"])).decode()
        except (binascii.Error, UnicodeDecodeError):
            plain = ""
        user, _, password = plain.partition(":")
    return Credentials(user, password.rstrip("\0"), str(entry.get("identitytoken") or ""))


def _ask_helper(helper: str, key: str) -> Credentials:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", helper):
        raise DeltaError(f"{config_path()}: no name of a credential helper: {helper!r}")
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=key.encode(), capture_output=True, timeout=HELPER_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeltaError(f"{program}: {error}") from None
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()
        if "not found" in said:  # credentials.ErrCredentialsNotFound: it has none, which is no failure
            return ANONYMOUS
        raise DeltaError(f"{program}: {said or f'exit status {done.returncode}'}")
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DeltaError(f"{program}: its answer cannot be read") from None
    return Credentials(identity_token=secret) if user == _TOKEN_USER else Credentials(user, secret)
