"""Which member of a base a member of the target is likest: by content, by path, by name without its version."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from delta.base import Tar, TarBase
from delta.tarmembers import BLOCK, Member

# What changes in a file's name when its version does: `numpy-1.26.2.dist-info`, `libopenblas-1a2b3c4d.so`,
# `chunk.3fa9c1d2e4.js`, `libcrypto.so.3`.
_VERSION = re.compile(rb"[0-9a-f]{8,}(?=[^0-9a-zA-Z]|$)|\d+(?:[._]\d+)*")
_READ_BYTES = 1 << 20


class Place(NamedTuple):
    """A member of the base."""

    layer: int
    ordinal: int


class Known(NamedTuple):
    """What the maker knows of a member."""

    member: Member
    path: bytes
    kind: bytes  # type flag
    content: bytes  # digest, b"" without content


def unversioned(path: bytes) -> bytes:
    return _VERSION.sub(b"#", path)


def path_of(header: bytes) -> bytes:
    """A member's path, with the long names of PAX and GNU tar; never an error."""
    main = header[-BLOCK:]
    name = main[:100].partition(b"\0")[0]
    if main[257:263] == b"ustar\0" and main[345]:
        name = main[345:500].partition(b"\0")[0] + b"/" + name
    at = 0
    while at + BLOCK < len(header):
        kind, size = header[at + 156 : at + 157], int(header[at + 124 : at + 135].strip(b"\0 ") or b"0", 8)
        content = header[at + BLOCK : at + BLOCK + size]
        if kind == b"L":
            name = content.partition(b"\0")[0]
        elif kind == b"x":
            found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", content)
            name = found[1] if found else name
        at += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
    return name.removeprefix(b"./").strip(b"/")


def survey(tar: Tar) -> Iterator[Known]:
    """All members of a tar, their contents digested."""
    for member in tar.members():
        header = tar.pread(member.start, member.content - member.start)
        content = b""
        if member.size:
            digest = hashlib.sha256()
            for offset in range(0, member.size, _READ_BYTES):
                digest.update(tar.pread(member.content + offset, min(_READ_BYTES, member.size - offset)))
            content = digest.digest()
        try:
            path = path_of(header)
        except ValueError:
            path = b""
        yield Known(member, path, header[-BLOCK:][156:157], content)


class BaseIndex:
    """All members of a base by what they can be found by. Of several, the highest layer's wins."""

    def __init__(self, base: TarBase) -> None:
        self.base = base
        self.known = [list(survey(tar)) for tar in base.tars]
        self._by_content: dict[bytes, Place] = {}
        self._by_path: dict[tuple[bool, bytes], Place] = {}
        self._by_unversioned: dict[tuple[bool, bytes], list[Place]] = {}
        self._by_name: dict[bytes, list[Place]] = {}
        for layer, members in enumerate(self.known):
            for ordinal, known in enumerate(members):
                place = Place(layer, ordinal)
                if known.content:
                    self._by_content[known.content] = place
                    self._by_name.setdefault(self._name(known.path), []).append(place)
                # A file's best reference is a file: directories and links go by themselves.
                self._by_path[bool(known.content), known.path] = place
                key = bool(known.content), unversioned(known.path)
                self._by_unversioned.setdefault(key, []).append(place)

    @staticmethod
    def _name(path: bytes) -> bytes:
        return unversioned(path.rpartition(b"/")[2])

    def at(self, place: Place) -> Known:
        return self.known[place.layer][place.ordinal]

    def find_content(self, content: bytes) -> Place | None:
        return self._by_content.get(content)

    def find_like(self, known: Known) -> Place | None:
        """The member whose header, and content, are likest by path."""
        has = bool(known.content)
        place = self._by_path.get((has, known.path)) or self._by_path.get((not has, known.path))
        if place:
            return place
        return self._closest(self._by_unversioned.get((has, unversioned(known.path)), []), known)

    def find_named(self, known: Known) -> Place | None:
        """The file of the same name elsewhere that is closest in size."""
        return self._closest(self._by_name.get(self._name(known.path), []), known)

    def _closest(self, places: list[Place], known: Known) -> Place | None:
        size = known.member.size
        return min(places[-64:], key=lambda place: abs(self.at(place).member.size - size), default=None)
