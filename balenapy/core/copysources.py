"""Which files COPY and ADD mean, and what they hash to: the cache's idea of "the same files".

    find_sources(tree, "src/*.py")  ->  [Source("src/a.py", "file:…"), Source("src/b.py", "file:…")]

A hash is of a tar header without times, and of the content, so that a checkout of another day is the same. It is kept
to the byte as the engine we replace makes it: it stands in the history of images.

    file   sha256 of name, mode, owner, size, type, link, owner's names, device, xattrs, and the content
    dir    sha256 of the sorted hashes of everything in it, itself too
    multi  sha256 of the hashes of several sources

Sources: moby builder/dockerfile/copy.go, builder/remotecontext/{archive,lazycontext}.go, pkg/tarsum/versioning.go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from balenapy.core.buildtree import Kind, Tree, follow, to_bytes
from balenapy.core.pathmatch import path_match
from balenapy.errors import EngineError, NotFound, SystemFailure


@dataclass(frozen=True, slots=True)
class Source:
    """One thing to copy: a file, or a directory with its contents."""

    path: str
    hash: str


def find_sources(tree: Tree, pattern: str) -> list[Source]:
    """What one word before the destination means: a path, or all that a pattern matches.

    Raises: NotFound `stat x: file does not exist`; InvalidParameter for a path above the root.
    """
    pattern = pattern.removeprefix("/").removeprefix("./")
    if not has_wildcards(pattern):
        return [_source(tree, pattern)]
    return [_source(tree, path) for path in _walk(tree, "") if path and _matches(pattern, path)]


def hash_of(sources: Sequence[Source]) -> str:
    """The hash that a step is known by."""
    return sources[0].hash if len(sources) == 1 else _hash_list("multi", [source.hash for source in sources])


def has_wildcards(path: str) -> bool:
    position = 0
    while position < len(path):
        if path[position] == "\\":
            position += 1
        elif path[position] in "*?[":
            return True
        position += 1
    return False


def _source(tree: Tree, path: str) -> Source:
    full = follow(tree, path)
    kind = tree.kind(full)
    if kind is None:
        raise NotFound(f"stat {path}: file does not exist")
    if kind is not Kind.DIRECTORY:
        return Source(path, f"file:{_sum(tree, path)}")
    sums = []
    for inside in _walk(tree, full):
        if inside:
            try:
                sums.append(_sum(tree, inside))
            except EngineError:  # links in a circle: not counted, there neither
                continue
    return Source(path, _hash_list("dir", sorted(sums)))


def _sum(tree: Tree, path: str) -> str:
    """Of what a link leads to: that is what would be copied if it were named."""
    full = follow(tree, path)
    found = tree.sum(full)
    return path if found == full else found


def _walk(tree: Tree, path: str) -> Iterator[str]:
    """A path and all below it, in the order of Go's filepath.Walk."""
    pending = [path]
    while pending:
        at = pending.pop()
        yield at
        if tree.kind(at) is Kind.DIRECTORY:
            names = sorted(tree.names(at), key=to_bytes, reverse=True)
            pending += [f"{at}/{name}" if at else name for name in names]


def _matches(pattern: str, path: str) -> bool:
    try:
        return path_match(pattern, path)
    except SystemFailure:  # a pattern that is none matches nothing
        return False


def _hash_list(prefix: str, hashes: Sequence[str]) -> str:
    return f"{prefix}:{hashlib.sha256(to_bytes(','.join(hashes))).hexdigest()}"
