"""Image references: `name[:tag][@digest]` as typed, and its canonical form.

A name is `domain/path`. What people type leaves parts out, so parsing normalises first: no domain means
docker.io, and a single component there lives under `library/`. The first component is a domain if it holds
`.` or `:` or is `localhost`; nothing else tells `host/image` from `user/image`. The *familiar* form is the
inverse: the shortest text that normalises to the same reference (except where docker.io has a path whose
first part looks like a host, `docker.io/a.b/c`, or 64 hex digits: as in the reference engine).

    reference      := name [ ":" tag ] [ "@" digest ]
    name           := [domain "/"] component ["/" component]*
    domain         := domain-part ["." domain-part]* [":" [0-9]+]
    domain-part    := [a-zA-Z0-9] | [a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]
    component      := [a-z0-9]+ [separator [a-z0-9]+]*
    separator      := [_.] | "__" | "-"+
    tag            := [A-Za-z0-9_][A-Za-z0-9_.-]{0,127}
    digest         := algorithm ":" hex{32,}

Source: docker/distribution reference/{regexp,reference,normalize}.go 2.7, which also has the error texts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from balenapy.core.digest import Digest
from balenapy.errors import InvalidParameter

DEFAULT_DOMAIN = "docker.io"
LEGACY_DEFAULT_DOMAIN = "index.docker.io"
OFFICIAL_REPOSITORY = "library"
DEFAULT_TAG = "latest"
NAME_MAX = 255  # distribution NameTotalLengthMax: domain and path together

_DOMAIN_PART = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*(?::[0-9]+)?"
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_PATH = rf"{_COMPONENT}(?:/{_COMPONENT})*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"

_REFERENCE = re.compile(rf"(?:({_DOMAIN})/)?({_PATH})(?::({_TAG}))?(?:@({_DIGEST}))?")
_TAG_ONLY = re.compile(_TAG)
_IDENTIFIER = re.compile(r"[a-f0-9]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised reference.

    `domain` is empty only for oddities like `under_score.x/app`: the first part reads as a host but is none.
    Such a reference is valid (nothing is found under it) and has no registry.
    """

    domain: str
    path: str
    tag: str | None = None
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """The repository without tag and digest: `docker.io/library/busybox`."""
        return f"{self.domain}/{self.path}" if self.domain else self.path

    def familiar_name(self) -> str:
        """The repository as shown: `busybox`, `user/app`, `host:5000/app`."""
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        first, _, rest = self.path.partition("/")
        return rest if first == OFFICIAL_REPOSITORY and rest and "/" not in rest else self.path

    def familiar(self) -> str:
        """The whole reference as shown: `busybox:latest`."""
        return self.familiar_name() + self._suffix()

    def canonical(self) -> str:
        """The whole reference with nothing left out: `docker.io/library/busybox:latest`."""
        return self.name + self._suffix()

    def __str__(self) -> str:
        return self.canonical()

    def _suffix(self) -> str:
        tag = f":{self.tag}" if self.tag is not None else ""
        return f"{tag}@{self.digest}" if self.digest is not None else tag

    @property
    def is_name_only(self) -> bool:
        return self.tag is None and self.digest is None

    def without_tag(self) -> Reference:
        """The repository alone."""
        return Reference(self.domain, self.path)

    def with_default_tag(self) -> Reference:
        """Add `:latest` if there is neither tag nor digest."""
        return replace(self, tag=DEFAULT_TAG) if self.is_name_only else self

    def with_tag(self, tag: str) -> Reference:
        """Put this tag in place of the present one; a digest stays.

        Raises:
            InvalidParameter: "invalid tag format".
        """
        if not _TAG_ONLY.fullmatch(tag):
            raise InvalidParameter("invalid tag format")
        return replace(self, tag=tag)

    def with_digest(self, digest: Digest) -> Reference:
        """Put this digest in place of the present one; a tag stays."""
        return replace(self, digest=digest)


def parse_reference(text: str) -> Reference:
    """Read a reference as people type it.

    Raises:
        InvalidParameter: with dockerd's words.
    """
    if _IDENTIFIER.fullmatch(text):
        raise InvalidParameter(f"invalid repository name ({text}), cannot specify 64-byte hexadecimal strings")
    domain, remainder = _split_domain(text)
    remote_name = remainder.partition(":")[0]
    if remote_name.lower() != remote_name:
        raise InvalidParameter("invalid reference format: repository name must be lowercase")
    normal = f"{domain}/{remainder}"
    match = _REFERENCE.fullmatch(normal)
    if match is None:
        # Only a tag or a digest can still hold capitals here, and they may: what is lower-cased by the
        # reference engine at this point is the whole text, so a bad domain can come out as this error.
        if _REFERENCE.fullmatch(normal.lower()):
            raise InvalidParameter("repository name must be lowercase")
        raise InvalidParameter("invalid reference format")
    matched_domain, path, tag, digest = match.groups()
    reference = Reference(matched_domain or "", path, tag)
    if len(reference.name) > NAME_MAX:
        raise InvalidParameter("repository name must not be more than 255 characters")
    return reference if digest is None else reference.with_digest(Digest.parse(digest))


def parse_pull_reference(image: str, tag: str) -> Reference:
    """Read `fromImage` and `tag` of a pull or import: `tag` may be a digest, and replaces what `image` has.

    The result has neither tag nor digest if none was given anywhere ("all tags").

    Source: moby daemon/images/image_pull.go, PullImage.
    """
    reference = parse_reference(image.removesuffix(":"))
    if not tag:
        return reference
    try:
        digest = Digest.parse(tag)
    except InvalidParameter:
        return reference.with_tag(tag)
    return reference.without_tag().with_digest(digest)


def _split_domain(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    if not slash or (not ("." in first or ":" in first) and first != "localhost"):
        domain, remainder = DEFAULT_DOMAIN, text
    else:
        domain, remainder = first, rest
    if domain == LEGACY_DEFAULT_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in remainder:
        remainder = f"{OFFICIAL_REPOSITORY}/{remainder}"
    return domain, remainder
