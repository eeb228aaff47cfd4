"""The base a delta is applied to: the members of its layers, read at random. Here, out of layer tars.

An engine has no layer tars: it serves the same interface from unpacked files and what it kept of the headers.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

from delta.errors import WrongBase
from delta.tarmembers import Member, scan


class Base(Protocol):
    """Layers, lowest first, each a list of members as `tarmembers` counts them.

    Every method raises WrongBase when there is no such layer, member or range.
    """

    @property
    def layers(self) -> int: ...

    def header(self, layer: int, ordinal: int) -> bytes:
        """All header blocks of a member."""

    def size(self, layer: int, ordinal: int) -> int:
        """The length of a member's content."""

    def read(self, layer: int, ordinal: int, offset: int, length: int) -> bytes:
        """Exactly that range of a member's content."""


class Tar(Protocol):
    """One uncompressed layer tar, and where its members lie."""

    @property
    def total(self) -> int: ...

    def __len__(self) -> int: ...

    def member(self, ordinal: int) -> Member: ...

    def members(self) -> list[Member]: ...

    def pread(self, offset: int, length: int) -> bytes:
        """That range, shorter at the end."""


class LayerTar:
    """One uncompressed layer tar in an open file, and where its members lie."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.total: int = os.fstat(fd).st_size
        # Three numbers a member: 24 bytes instead of some 200 as objects.
        self._places = array("q")
        for member in scan(self._read_at_buffered(), self.total):
            self._places.extend(member)

    def __len__(self) -> int:
        return len(self._places) // 3

    def member(self, ordinal: int) -> Member:
        return Member(*self._places[3 * ordinal : 3 * ordinal + 3])

    def members(self) -> list[Member]:
        return [self.member(ordinal) for ordinal in range(len(self))]

    @property
    def members_end(self) -> int:
        return self.member(len(self) - 1).end if len(self) else 0

    def pread(self, offset: int, length: int) -> bytes:
        data = os.pread(self.fd, length, offset)
        while len(data) < length:
            more = os.pread(self.fd, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _read_at_buffered(self) -> _Buffered:
        return _Buffered(self)


class _Buffered:
    """Reads a tar's headers without a system call for each of them."""

    def __init__(self, tar: LayerTar) -> None:
        self._tar, self._start, self._data = tar, 0, b""

    def __call__(self, offset: int, length: int) -> bytes:
        at = offset - self._start
        if at < 0 or at + length > len(self._data):
            self._start, at = offset, 0
            self._data = self._tar.pread(offset, max(length, 1 << 15))
        return self._data[at : at + length]


class TarBase:
    """A base out of layer tars, lowest first."""

    def __init__(self, tars: Sequence[Tar]) -> None:
        self.tars: tuple[Tar, ...] = tuple(tars)

    @property
    def layers(self) -> int:
        return len(self.tars)

    def _member(self, layer: int, ordinal: int) -> tuple[Tar, Member]:
        if not (0 <= layer < len(self.tars) and 0 <= ordinal < len(self.tars[layer])):
            raise WrongBase(f"the base has no member {ordinal} in layer {layer}")
        return self.tars[layer], self.tars[layer].member(ordinal)

    def header(self, layer: int, ordinal: int) -> bytes:
        tar, member = self._member(layer, ordinal)
        return tar.pread(member.start, member.content - member.start)

    def size(self, layer: int, ordinal: int) -> int:
        return self._member(layer, ordinal)[1].size

    def read(self, layer: int, ordinal: int, offset: int, length: int) -> bytes:
        tar, member = self._member(layer, ordinal)
        if offset < 0 or length < 0 or offset + length > member.size:
            raise WrongBase(
                f"member {ordinal} of layer {layer} has {member.size} bytes, not {length} at {offset}"
            )
        data = tar.pread(member.content + offset, length)
        if len(data) != length:
            raise WrongBase(f"layer {layer} of the base is cut")
        return data


class Stream:
    """The tars of several layers, one after the other: the base of librsync deltas."""

    def __init__(self, tars: Sequence[Tar]) -> None:
        self._tars = tars
        self._starts = [0]
        for tar in tars:
            self._starts.append(self._starts[-1] + tar.total)

    @property
    def total(self) -> int:
        return self._starts[-1]

    def pread(self, position: int, length: int) -> bytes:
        """That range, at most to the end of the layer it begins in. Raises: WrongBase, when it is beyond the end."""
        number = bisect_right(self._starts, position) - 1
        if not 0 <= number < len(self._tars):
            raise WrongBase(f"the base has no byte {position}")
        return self._tars[number].pread(position - self._starts[number], length)
