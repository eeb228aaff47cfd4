"""What a native delta does with each file of its target: for a table that people read.

A delta names files of the base by number, and headers by their differences: only who has the base can say more than
how large its sections are. The layer is rebuilt on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from delta import native, program
from delta.match import BaseIndex, Place, path_of
from delta.native import Player
from delta.program import Chunk
from delta.sections import Head, ReadAt, SectionReader


@dataclass(frozen=True, slots=True)
class FileLine:
    """One file of the target."""

    path: bytes
    size: int
    how: str  # copied, patched, new
    why: str
    delta_bytes: int  # about: a section's bytes are shared out by what they make


class _Observer(Player):
    """Plays a delta and writes down what becomes of each member."""

    def __init__(self, head: Head, readers: list[SectionReader], index: BaseIndex) -> None:
        super().__init__(head, readers, index.base)
        self._readers, self._index = readers, index
        self._rates = [
            section.stored_bytes / section.plain_bytes if section.plain_bytes else 0.0 for section in head.sections
        ]
        self.lines: list[FileLine] = []

    def _member(self, chunk: Chunk) -> Iterator[bytes]:
        before = [reader.left for reader in self._readers]
        pieces = super()._member(chunk)
        header = next(pieces)
        yield header
        yield from pieces
        kind, size, origin = self.told
        if not size:
            return
        left = [reader.left for reader in self._readers]
        taken = sum((old - new) * rate for old, new, rate in zip(before, left, self._rates, strict=True))
        try:
            path = path_of(header)
        except ValueError:  # an odd header
            path = b""
        how, why = self._words(kind, path, Place(*origin))
        self.lines.append(FileLine(path, size, how, why, round(taken)))

    def _words(self, kind: int, path: bytes, origin: Place) -> tuple[str, str]:
        if kind == program.FRAMED:
            return "patched", "much is new, compressed after old files; the first of a frame stands for all"
        if kind == program.LITERAL_CONTENT:
            return "new", "nothing like it in the base is of use"
        there = self._index.at(origin).path
        where = "the same path" if there == path else f"{there.decode(errors='replace')} in layer {origin.layer}"
        if kind in (program.EXPECTED, program.COPY):
            return "copied", f"same content as {where}"
        if kind in (program.MOVED, program.MOVED_REF):
            return "patched", f"differences from {where}, addresses foretold"
        return "patched", f"differences from {where}"


def inspect(read_at: ReadAt, index: BaseIndex, budget_bytes: int = native.DEFAULT_BUDGET_BYTES) -> list[FileLine]:
    """All files of a delta's target, in order.

    Raises: as `native.apply`.
    """
    observer = _Observer(*native.open_sections(read_at, index.base, budget_bytes), index)
    for _ in observer.play():
        pass
    return observer.lines
