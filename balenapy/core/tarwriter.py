"""Headers of a tar that we make ourselves: the inverse of `tarstream` for one entry.

ustar where everything fits, PAX records before it where something does not. The bytes depend on the fields only (no
time of day, no process number in the PAX name), so the same files always make the same tar.
"""

from __future__ import annotations

from collections.abc import Mapping

from balenapy.core.tarstream import BLOCK, DIRECTORY

END = bytes(2 * BLOCK)
PAX = b"x"
_MAX_OCTAL_7 = 8**7 - 1
_MAX_OCTAL_11 = 8**11 - 1
_PAX_NAME = b"PaxHeaders.0/x"


def encode_header(
    name: bytes,
    kind: bytes,
    *,
    size: int = 0,
    mode: int = 0,
    uid: int = 0,
    gid: int = 0,
    mtime_s: int = 0,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
    xattrs: Mapping[bytes, bytes] | None = None,
    owner: bytes = b"",
) -> bytes:
    """The blocks before an entry's content. A directory's name gets its slash here; `owner` names user and group."""
    if kind == DIRECTORY and not name.endswith(b"/"):
        name += b"/"
    records: dict[bytes, bytes] = {}
    prefix, short = _split_name(name)
    if not short:
        records[b"path"] = name
        short = name[:100].decode("ascii", "replace").encode("ascii", "replace")[:100]
    if len(link) > 100 or not link.isascii():
        records[b"linkpath"] = link
        link = link[:100].decode("ascii", "replace").encode("ascii", "replace")[:100]
    if size > _MAX_OCTAL_11:
        records[b"size"] = b"%d" % size
        size = 0
    if uid > _MAX_OCTAL_7:
        records[b"uid"] = b"%d" % uid
        uid = 0
    if gid > _MAX_OCTAL_7:
        records[b"gid"] = b"%d" % gid
        gid = 0
    if not 0 <= mtime_s <= _MAX_OCTAL_11:
        records[b"mtime"] = b"%d" % mtime_s
        mtime_s = 0
    for key in sorted(xattrs or ()):
        records[b"SCHILY.xattr." + key] = (xattrs or {})[key]
    block = _block(short, kind, size, mode, uid, gid, mtime_s, link, major, minor, prefix, owner)
    if not records:
        return block
    content = b"".join(_pax_record(key, value) for key, value in records.items())
    extension = _block(_PAX_NAME, PAX, len(content), 0o644, 0, 0, 0, b"", 0, 0, b"")
    return extension + content + bytes(-len(content) % BLOCK) + block


def padding(size: int) -> bytes:
    """The zeros after `size` bytes of content."""
    return bytes(-size % BLOCK)


def _split_name(name: bytes) -> tuple[bytes, bytes]:
    """(prefix, name) for the two ustar fields; an empty name when it does not fit or is not ASCII."""
    if not name.isascii():
        return b"", b""
    if len(name) <= 100:
        return b"", name
    cut = name.find(b"/", len(name) - 101)
    if cut <= 0 or cut > 155 or cut == len(name) - 1:
        return b"", b""
    return name[:cut], name[cut + 1 :]


def _block(
    name: bytes,
    kind: bytes,
    size: int,
    mode: int,
    uid: int,
    gid: int,
    mtime_s: int,
    link: bytes,
    major: int,
    minor: int,
    prefix: bytes,
    owner: bytes = b"",
) -> bytes:
    head = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (name.ljust(100, b"\0"), mode, uid, gid, size, mtime_s)
    tail = b"%s%sustar\x0000%s%07o\0%07o\0%s" % (
        kind,
        link.ljust(100, b"\0"),
        owner.ljust(32, b"\0") * 2,
        major,
        minor,
        prefix.ljust(167, b"\0"),
    )
    return b"%s%06o\0 %s" % (head, sum(head) + sum(tail) + 8 * 32, tail)


def _pax_record(key: bytes, value: bytes) -> bytes:
    body = b" %s=%s\n" % (key, value)
    length = len(body) + 1
    while len(body) + len(b"%d" % length) != length:
        length = len(body) + len(b"%d" % length)
    return b"%d%s" % (length, body)
