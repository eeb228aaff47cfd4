"""Search: asks a registry's index, and keeps what the filters let through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from balenapy.core.filters import Filters
from balenapy.errors import InvalidParameter, SystemFailure
from balenapy.registry.auth import decode_registry_auth

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

FILTERS = ("is-automated", "is-official", "stars")
DEFAULT_LIMIT, MAX_LIMIT = 25, 100  # moby registry/session.go


async def search(
    engine: Engine, term: str, limit: int, filters: Filters, auth: str, *, upstream_client: str = ""
) -> list[dict[str, Any]]:
    """The entries of `GET /images/search`.

    Raises: InvalidParameter; RegistryError (500).
    Source: moby daemon/images/image_search.go.
    """
    automated, official = filters.boolean("is-automated"), filters.boolean("is-official")
    stars = max((_stars(text) for text in filters.get("stars")), default=0)
    if "://" in term:
        raise SystemFailure('Invalid repository name (ex: "registry.domain.tld/myrepos")')
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidParameter(f"Limit {limit} is outside the range of [1, {MAX_LIMIT}]")
    credentials = decode_registry_auth(auth) if auth else None
    answer = await engine.registry.search(term, limit, credentials, upstream_client=upstream_client)
    results = answer.get("results") if isinstance(answer, dict) else None
    entries = [_show(entry) for entry in results if isinstance(entry, dict)] if isinstance(results, list) else []
    return [
        entry
        for entry in entries
        if automated in (None, entry["is_automated"])
        and official in (None, entry["is_official"])
        and entry["star_count"] >= stars
    ]


def _stars(text: str) -> int:
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise InvalidParameter(f"Invalid filter 'stars={text}'")
    return int(text)


def _show(entry: dict[str, Any]) -> dict[str, Any]:
    """One entry with the types that clients count on, keys in Go's order."""
    stars = entry.get("star_count")
    return {
        "star_count": stars if isinstance(stars, int) and not isinstance(stars, bool) else 0,
        "is_official": entry.get("is_official") is True,
        "name": str(entry.get("name") or ""),
        "is_automated": entry.get("is_automated") is True,
        "description": str(entry.get("description") or ""),
    }
