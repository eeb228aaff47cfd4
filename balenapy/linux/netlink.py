"""The frame of netlink messages: headers and attributes (linux/netlink.h), as iterators over received bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator

NETFILTER = 12  # the protocol of sockets
HEADER = struct.Struct("=IHHII")  # length, kind, flags, sequence, sender
_TYPE_MASK = 0x3FFF  # without the bits for nested and byte order


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, what follows the header) of each message."""
    position = 0
    while position + HEADER.size <= len(data):
        length, kind, _, _, _ = HEADER.unpack_from(data, position)
        if length < HEADER.size:
            return
        yield kind, data[position + HEADER.size : position + length]
        position += (length + 3) & ~3


def attributes(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(type, value, the attribute as it stands) of each attribute."""
    position = 0
    while position + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, position)
        if length < 4:
            return
        yield kind & _TYPE_MASK, data[position + 4 : position + length], data[position : position + (length + 3 & ~3)]
        position += (length + 3) & ~3
