"""What can go wrong with a registry, and whether asking again helps.

A registry's error has a code (`MANIFEST_UNKNOWN`) and a status; an error of the way there has neither. The texts are
those of the reference engine (Go's net/http and docker/distribution), because clients match on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from balenapy.core.reference import Reference
from balenapy.errors import EngineError, NotFound, SystemFailure, Unauthorized

# docker/distribution registry/api/errcode and api/v2: what a code says when the registry adds no message
_MESSAGES = {
    "UNKNOWN": "unknown error",
    "UNSUPPORTED": "The operation is unsupported.",
    "UNAUTHORIZED": "authentication required",
    "DENIED": "requested access to the resource is denied",
    "UNAVAILABLE": "service unavailable",
    "TOOMANYREQUESTS": "too many requests",
    "DIGEST_INVALID": "provided digest did not match uploaded content",
    "SIZE_INVALID": "provided length did not match content length",
    "NAME_INVALID": "invalid repository name",
    "TAG_INVALID": "manifest tag did not match URI",
    "NAME_UNKNOWN": "repository name not known to registry",
    "MANIFEST_UNKNOWN": "manifest unknown",
    "MANIFEST_INVALID": "manifest invalid",
    "MANIFEST_UNVERIFIED": "manifest failed signature verification",
    "MANIFEST_BLOB_UNKNOWN": "blob unknown to registry",
    "BLOB_UNKNOWN": "blob unknown to registry",
    "BLOB_UPLOAD_UNKNOWN": "blob upload unknown to registry",
    "BLOB_UPLOAD_INVALID": "blob upload invalid",
}

# Asking again changes nothing (moby distribution/errors.go retryOnError, and balena's additions).
_FINAL_CODES = frozenset(("UNAUTHORIZED", "DENIED", "UNSUPPORTED", "NAME_UNKNOWN", "MANIFEST_UNKNOWN", "BLOB_UNKNOWN"))
_RETRYABLE_STATUSES = frozenset((408, 425, 500, 502, 503, 504))


class RegistryError(SystemFailure):
    """A registry refused, or could not be reached.

    Attributes:
        code: the registry's first error code, "" when there is none.
        status: the HTTP status, 0 when no answer came.
        retry_after_s: how long the registry asked us to wait, None if it did not.
        wrapped: worded by `within`. The reference engine translates only what is not: a token server's "denied"
            is shown as it is.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        status: int = 0,
        retryable: bool = False,
        retry_after_s: float | None = None,
        wrapped: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.wrapped = wrapped

    @property
    def no_answer(self) -> bool:
        """Whether nothing answered: another scheme or another mirror may."""
        return self.status == 0

    def within(self, method: str, url: str) -> RegistryError:
        """The same error as Go's http.Client words it: `Get https://H/v2/: …`."""
        return RegistryError(
            f"{method.capitalize()} {url}: {self.message}",
            code=self.code,
            status=self.status,
            retryable=self.retryable,
            retry_after_s=self.retry_after_s,
            wrapped=True,
        )

    def final(self) -> RegistryError:
        """The same error, where another try is not worth the client's waiting."""
        self.retryable = False
        return self


def error_of_answer(
    status: int, body: bytes, bearer: Mapping[str, str] | None = None, retry_after_s: float | None = None
) -> RegistryError:
    """Read an error answer.

    Args:
        bearer: parameters of the answer's Bearer challenge, if it has one: RFC 6750 puts an error there too.

    Source: docker/distribution registry/client/errors.go.
    """
    code, message = "", ""
    if not 400 <= status < 500:
        text = f"received unexpected HTTP status: {status} {reason_phrase(status)}"
    else:
        bearer_code = {"invalid_token": "UNAUTHORIZED", "insufficient_scope": "DENIED"}.get(
            (bearer or {}).get("error", "")
        )
        if bearer_code:
            code, message = bearer_code, (bearer or {}).get("error_description", "")
        else:
            code, message, problem = _first_error(status, body)
            if problem and status == 401:
                code, message = "UNAUTHORIZED", ""
            elif problem:
                shown = json.dumps(body.decode("utf-8", "replace"), ensure_ascii=False)
                text = f"error parsing HTTP {status} response body: {problem}: {shown}"
        if code:
            text = f"{code.lower().replace('_', ' ')}: {message or _MESSAGES[code]}"
    if status == 429 and not code:
        code = "TOOMANYREQUESTS"
    # Too many requests is only worth another try when the registry says when.
    retryable = status in _RETRYABLE_STATUSES or (status == 429 and retry_after_s is not None)
    return RegistryError(
        text,
        code=code,
        status=status,
        retryable=retryable and code not in _FINAL_CODES,
        retry_after_s=retry_after_s,
    )


def _first_error(status: int, body: bytes) -> tuple[str, str, str]:
    """Code and message of the first error in the body, else why there is none."""
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        if not body.strip():
            return "", "", "unexpected end of JSON input"
        first = body.lstrip().decode("utf-8", "replace")[:1]
        return "", "", f"invalid character {_go_rune(first)} looking for beginning of value"
    if not isinstance(document, dict | None):
        kind = _GO_KINDS.get(type(document), "number")
        return "", "", f"json: cannot unmarshal {kind} into Go value of type struct {{ Errors []errcode.Error }}"
    document = document or {}
    details = document.get("details")
    if isinstance(details, str) and details:  # Docker Hub's and old registries' irregular form
        known = {401: "UNAUTHORIZED", 429: "TOOMANYREQUESTS"}
        return known.get(status, "UNKNOWN"), details, ""
    errors = document.get("errors")
    entry = errors[0] if isinstance(errors, list) and errors else None
    if not isinstance(entry, dict):
        return "", "", "no error details found in HTTP response body"
    code, message = entry.get("code"), entry.get("message")
    return (
        code if isinstance(code, str) and code in _MESSAGES else "UNKNOWN",
        message if isinstance(message, str) else "",
        "",
    )


_GO_KINDS = {list: "array", str: "string", bool: "bool"}


def _go_rune(character: str) -> str:
    return "'\\''" if character == "'" else f"'{character}'"


def reason_phrase(status: int) -> str:
    """`Not Found` for 404, "" for a number nobody knows."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def pull_error(error: RegistryError, reference: Reference) -> EngineError:
    """What a pull of this reference says instead.

    Source: moby 18.09 distribution/errors.go, TranslatePullError: without the registry's words behind.
    """
    if error.wrapped:
        return error
    if error.code == "DENIED":
        return NotFound(
            f"pull access denied for {reference.familiar_name()}, "
            "repository does not exist or may require 'docker login'"
        )
    if error.code == "MANIFEST_UNKNOWN":
        return NotFound(f"manifest for {reference.familiar()} not found")
    if error.code == "NAME_UNKNOWN":
        return NotFound(f"repository {reference.familiar_name()} not found")
    return error


def plain_error(error: RegistryError, _reference: Reference) -> EngineError:
    """The registry's own words and status (`/distribution`)."""
    if error.wrapped:
        return error
    if error.code in ("UNAUTHORIZED", "DENIED"):
        return Unauthorized(error.message)
    if error.status == 404:
        return NotFound(error.message)
    return error
