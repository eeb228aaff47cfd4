"""The maker of balena's deltas: librsync, from all layer tars of a base one after the other to one layer's tar.

Theory
------
librsync finds matches by a rolling sum over blocks of the base's signature; that is for a base far away. Here it is
at hand and both are tars, so members are matched as in the native format (`match`): the same content anywhere in the
base is one copy, headers and padding that are alike go with it, and changed files are compared by bsdiff: stretches
of at least MIN_COPY_BYTES that it leaves unchanged are copies, everything else is literal. bsdiff takes sixteen times
the old file in memory, so large files are compared in windows.

What comes out is read by any librsync: commands say nothing of how they were found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from delta.base import Tar
from delta.librsync import DeltaWriter, Write
from delta.maker import bsdiff
from delta.match import BaseIndex, Known, Place, survey

MIN_COPY_BYTES = 24  # a copy takes up to 9 bytes, and literals on both sides a head each
WINDOW_BYTES = 4 << 20  # of the new file; the old one's reaches as far again to both sides: some 220 MB of memory
PIECE_BYTES = 1 << 18
_ZEROS = re.compile(rb"\0{%d,}" % MIN_COPY_BYTES)


class LayerDelta:
    """One target layer against a base."""

    def __init__(self, index: BaseIndex, target: Tar, write: Write, window_bytes: int = WINDOW_BYTES) -> None:
        self._index = index
        self._target = target
        self._writer = DeltaWriter(write)
        self._window = window_bytes
        self._starts = [0]
        for tar in index.base.tars:
            self._starts.append(self._starts[-1] + tar.total)

    def make(self, progress: Callable[[int], object] = lambda done: None) -> None:
        """Write the delta.

        Args:
            progress: called with how many bytes of the target are done.
        """
        position = 0
        for known in survey(self._target):
            member = known.member
            self._between(position, member.content, known)
            position = member.content
            if member.size:
                self._content(known)
                position += member.size
            progress(position)
        while data := self._target.pread(position, PIECE_BYTES):
            self._writer.literal(data)
            position += len(data)
        self._writer.close()
        progress(position)

    def _at(self, place: Place, offset: int) -> int:
        """Where a byte of a member's content is in the base's stream."""
        return self._starts[place.layer] + self._index.at(place).member.content + offset

    def _between(self, start: int, end: int, known: Known) -> None:
        """Padding and header before a member's content: copied if the likest member has the same before its own."""
        data = self._target.pread(start, end - start)
        place = self._index.find_content(known.content) if known.content else self._index.find_like(known)
        if place is not None:
            there = self._index.at(place).member.content
            if there >= len(data) and self._index.base.tars[place.layer].pread(there - len(data), len(data)) == data:
                self._writer.copy(self._at(place, -len(data)), len(data))
                return
        self._writer.literal(data)

    def _content(self, known: Known) -> None:
        size = known.member.size
        same = self._index.find_content(known.content)
        if same is not None:
            self._writer.copy(self._at(same, 0), size)
            return
        like = self._index.find_like(known)
        if like is None or not self._index.at(like).content:
            like = self._index.find_named(known)
        if like is None:
            for offset in range(0, size, PIECE_BYTES):
                self._writer.literal(self._read(known, offset, min(PIECE_BYTES, size - offset)))
            return
        old_size = self._index.at(like).member.size
        for offset in range(0, size, self._window):
            new = self._read(known, offset, min(self._window, size - offset))
            begin = max(0, min(offset, old_size) - self._window)
            old = self._index.base.read(*like, begin, min(3 * self._window, old_size - begin))
            self._changed(self._at(like, begin), old, new)

    def _read(self, known: Known, offset: int, length: int) -> bytes:
        return self._target.pread(known.member.content + offset, length)

    def _changed(self, start: int, old: bytes, new: bytes) -> None:
        """Copies and literals that make `new` out of `old`, which is at `start` in the base's stream."""
        found = bsdiff(old, new)
        at = made = diffed = 0
        for add, extra, seek in found.triples:
            for offset, length, same in _stretches(found.diff[diffed : diffed + add]):
                if same:
                    self._writer.copy(start + at + offset, length)
                else:
                    self._writer.literal(new[made + offset : made + offset + length])
            self._writer.literal(new[made + add : made + add + extra])
            made, diffed, at = made + add + extra, diffed + add, at + add + seek


def _stretches(diff: bytes) -> Iterator[tuple[int, int, bool]]:
    """Cut differences into (offset, length, whether they are all zero): long runs of zeros, and what is between."""
    at = 0
    for run in _ZEROS.finditer(diff):
        if run.start() > at:
            yield at, run.start() - at, False
        yield run.start(), run.end() - run.start(), True
        at = run.end()
    if at < len(diff):
        yield at, len(diff) - at, False
