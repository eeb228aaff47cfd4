"""Trees of files as a build sees them: its context, or the files of an image.

Names are text with `surrogateescape`; "" is the root. Links are followed inside the tree only. Each path has a hash
that says nothing of times; what they are for is `core/copysources`.

Sources: moby builder/remotecontext/{archive,detect,filehash}.go, pkg/tarsum/versioning.go.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from balenapy.core.dockerignore import FILE_NAME, unwanted_files
from balenapy.core.tarstream import DIRECTORY, LINK, REGULAR, SYMLINK, Entry
from balenapy.errors import InvalidParameter

DOCKERFILE = "Dockerfile"
DOCKERFILE_MAX_BYTES = 1 << 20  # ours: it is read in one go by the daemon
# What messages call the root of a context. The engine we replace names a directory that is gone when one reads it.
PLACE = "/var/tmp/docker-builder0"
MAX_LINKS = 255  # moby pkg/symlink


def to_bytes(path: str) -> bytes:
    """A name as the file system has it."""
    return path.encode("utf-8", "surrogateescape")


def to_text(name: bytes) -> str:
    """A name of any bytes as text."""
    return name.decode("utf-8", "surrogateescape")


class Kind(Enum):
    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"  # symbolic


class Tree(Protocol):
    """Files, by their path below the root. Nothing here follows links."""

    def kind(self, path: str) -> Kind | None:
        """None: there is nothing."""

    def target(self, path: str) -> str:
        """Where a symbolic link leads, as it stands there."""

    def names(self, path: str) -> list[str]:
        """What a directory holds."""

    def sum(self, path: str) -> str:
        """The hash of one path, without what is in it; the path itself where nobody knows better, as there."""

    def content(self, path: str) -> bytes | None:
        """Of a file; None when it is none. Raises: InvalidParameter, when it is too long for that."""

    def remove(self, path: str) -> None:
        """Take something out, with all below it."""


@dataclass(frozen=True, slots=True)
class FoundDockerfile:
    """The Dockerfile of a context, or why there is none ("": it is not there)."""

    name: str
    content: bytes | None
    problem: str = ""


def take_dockerfile(tree: Tree, asked: str) -> FoundDockerfile:
    """Read it, and take it and `.dockerignore` out when the latter says so."""
    try:
        found = _find_dockerfile(tree, asked)
    except InvalidParameter as error:
        return FoundDockerfile(asked, None, error.message)
    ignore = tree.content(FILE_NAME) if found.content is not None else None
    if ignore is not None:
        for path in unwanted_files(to_text(ignore), found.name):
            tree.remove(path)
    return found


def _find_dockerfile(tree: Tree, asked: str) -> FoundDockerfile:
    for name in (asked, asked.lower()) if asked == DOCKERFILE else (asked,):
        try:
            path = follow(tree, name.lstrip("/"))
        except InvalidParameter as error:
            raise InvalidParameter(f"Forbidden path outside the build context: {name} ()") from error
        if tree.kind(path) is Kind.DIRECTORY:
            raise InvalidParameter(f"unexpected error reading Dockerfile: read {name}: is a directory")
        content = tree.content(path)
        if content is not None and len(content) > DOCKERFILE_MAX_BYTES:
            raise InvalidParameter(f"{name} is longer than {DOCKERFILE_MAX_BYTES >> 20} MiB")
        if content is not None:
            return FoundDockerfile(name, content)
    return FoundDockerfile(asked, None)


def follow(tree: Tree, path: str) -> str:
    """Where a path leads when links are followed inside the tree; what does not exist stays as it is.

    Raises: InvalidParameter, when it climbs above the root by itself, or links go in a circle.
    """
    clean = posixpath.normpath(path) if path else "."
    if clean == ".." or clean.startswith("../"):
        raise InvalidParameter(f"Forbidden path outside the build context: {path} ()")
    pending = [part for part in reversed(clean.split("/")) if part not in ("", ".")]
    here: list[str] = []
    links = 0
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            here = here[:-1]
            continue
        at = "/".join([*here, part])
        if tree.kind(at) is not Kind.LINK:
            here.append(part)
            continue
        links += 1
        if links > MAX_LINKS:
            raise InvalidParameter(f"too many links in {path}")
        target = tree.target(at)
        if target.startswith("/"):
            here = []
        pending += reversed(target.split("/"))
    return "/".join(here)


def header_sum(
    name: bytes,
    kind: bytes,
    *,
    mode: int,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    link: bytes = b"",
    uname: bytes = b"",
    gname: bytes = b"",
    major: int = 0,
    minor: int = 0,
    xattrs: Mapping[bytes, bytes] | None = None,
) -> hashlib._Hash:
    """The hash of a header, to go on with the content."""
    fields = (
        (b"name", name), (b"mode", b"%d" % mode), (b"uid", b"%d" % uid), (b"gid", b"%d" % gid),
        (b"size", b"%d" % size), (b"typeflag", kind), (b"linkname", link), (b"uname", uname), (b"gname", gname),
        (b"devmajor", b"%d" % major), (b"devminor", b"%d" % minor), *sorted((xattrs or {}).items()),
    )  # fmt: skip
    return hashlib.sha256(b"".join(key + value for key, value in fields))


def entry_sum(entry: Entry) -> hashlib._Hash:
    """The same of a tar's entry."""
    return header_sum(
        entry.name,
        entry.type,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        size=entry.size,
        link=entry.link,
        uname=entry.uname,
        gname=entry.gname,
        major=entry.major,
        minor=entry.minor,
        xattrs=entry.xattrs,
    )


# --- a small context, in memory -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Node:
    kind: Kind
    target: str = ""
    content: bytes = b""
    children: dict[str, _Node] = field(default_factory=dict)


class MemoryTree:
    """A tree made of a tar's entries. It takes plain files, directories and links; anything else is for a worker."""

    def __init__(self) -> None:
        self._root = _Node(Kind.DIRECTORY)
        self._sums: dict[str, str] = {}

    def add(self, entry: Entry, content: bytes) -> bool:
        """Take an entry; False when it is one that wants real files."""
        path = posixpath.normpath(to_text(entry.name))
        if entry.xattrs or b"\0" in entry.name or path == ".." or path.startswith(("../", "/")):
            return False  # a name with something special to it
        digest = entry_sum(entry)
        digest.update(content)
        self._sums.setdefault(path, digest.hexdigest())
        if path == ".":
            return entry.type == DIRECTORY
        parent = self._parent(path)
        if parent is None:
            return False
        name = posixpath.basename(path)
        if entry.type == DIRECTORY:
            present = parent.children.get(name)
            if present is None or present.kind is not Kind.DIRECTORY:
                parent.children[name] = _Node(Kind.DIRECTORY)
        elif entry.type == SYMLINK:
            parent.children[name] = _Node(Kind.LINK, to_text(entry.link))
        elif entry.type == LINK:
            first = self._node(posixpath.normpath(to_text(entry.link)))
            if first is None or first.kind is Kind.DIRECTORY:
                return False
            parent.children[name] = first
        elif entry.type == REGULAR:
            parent.children[name] = _Node(Kind.FILE, content=content)
        else:
            return False
        return True

    def _parent(self, path: str) -> _Node | None:
        """The directory of a path, made where it is missing; None when something else is in its place."""
        at = self._root
        for part in path.split("/")[:-1]:
            at = at.children.setdefault(part, _Node(Kind.DIRECTORY))
            if at.kind is not Kind.DIRECTORY:
                return None
        return at

    def _node(self, path: str) -> _Node | None:
        at: _Node | None = self._root
        for part in path.split("/") if path else ():
            at = at.children.get(part) if at is not None else None
        return at

    def kind(self, path: str) -> Kind | None:
        node = self._node(path)
        return node.kind if node is not None else None

    def target(self, path: str) -> str:
        node = self._node(path)
        return node.target if node is not None else ""

    def names(self, path: str) -> list[str]:
        node = self._node(path)
        return list(node.children) if node is not None else []

    def sum(self, path: str) -> str:
        return self._sums.get(path, path)

    def content(self, path: str) -> bytes | None:
        node = self._node(path)
        return node.content if node is not None and node.kind is Kind.FILE else None

    def remove(self, path: str) -> None:
        parent = self._node(posixpath.dirname(path))
        if parent is not None:
            parent.children.pop(posixpath.basename(path), None)
