"""What a registry says of an image, without pulling it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from balenapy.core.manifest import Index, Platform, parse_document, parse_image_config
from balenapy.core.reference import Reference, parse_reference
from balenapy.errors import EngineError, InvalidParameter, SystemFailure
from balenapy.registry.auth import decode_registry_auth
from balenapy.registry.errors import plain_error

if TYPE_CHECKING:
    from balenapy.core.manifest import Manifest
    from balenapy.registry.client import Registry, Session

_FULL_ID = re.compile(r"(?:sha256:)?[0-9a-f]{64}")


async def inspect_remote(registry: Registry, name: str, auth: str, *, upstream_client: str = "") -> dict[str, Any]:
    """Descriptor of what a reference names, and the platforms it is for (None if nobody knows).

    Args:
        auth: the request's X-Registry-Auth.

    Raises:
        SystemFailure: a bad reference: this route has no better status for it.
        NotFound, Unauthorized, RegistryError: with the registry's words.

    Source: moby 18.09 api/server/router/distribution/distribution_routes.go.
    """
    reference = _parse(name)
    credentials = decode_registry_auth(auth)
    async with registry.session(
        reference, credentials, translate=plain_error, upstream_client=upstream_client
    ) as session:
        raw, media_type, digest = await session.manifest()
        document = parse_document(raw, media_type)
        if isinstance(document, Index):
            platforms = [entry.platform for entry in document.manifests if entry.platform is not None]
        else:
            platforms = await _platform_of_config(session, document)
    return {
        "Descriptor": {"mediaType": document.media_type, "digest": str(digest), "size": len(raw)},
        "Platforms": [_encode(platform) for platform in platforms] or None,
    }


def _parse(name: str) -> Reference:
    if _FULL_ID.fullmatch(name):
        raise SystemFailure("no manifest found for full image ID")
    try:
        return parse_reference(name).with_default_tag()
    except InvalidParameter as error:
        raise SystemFailure(error.message) from error


async def _platform_of_config(session: Session, manifest: Manifest) -> list[Platform]:
    try:
        return [parse_image_config(await session.config(manifest.config)).platform]
    except EngineError:
        return []  # the descriptor is an answer by itself


def _encode(platform: Platform) -> dict[str, str]:
    fields = {
        "architecture": platform.architecture,
        "os": platform.os,
        "os.version": platform.os_version,
        "variant": platform.variant,
    }
    return {name: value for name, value in fields.items() if value or name in ("architecture", "os")}
