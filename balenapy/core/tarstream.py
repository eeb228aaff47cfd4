"""Push reader for tar streams: bytes in, typed events out, every byte accounted for.

    reader.feed(b"...")  ->  reader.next_event()  ->  Entry | memoryview | End | NEED_DATA

Theory
------
A tar is a sequence of 512-byte blocks. An *entry* is one header block, then its content, then zeros up to the next
block border. An entry of type x, g, L or K is not a file: its content is more header for the entry that follows
(PAX records, or GNU's long name and long link). Two blocks of zeros end the archive; what follows them is
kept but means nothing. A stream may also simply stop at the border of an entry.

    state      next_event() gives                           then
    HEADER     Entry (a whole header has arrived)           CONTENT, or HEADER when it has no content
               End (two zero blocks, or end of input)       TRAILER
    CONTENT    memoryview, until `size` bytes have gone by  HEADER
    TRAILER    memoryview of what follows the end           TRAILER
    any        NEED_DATA: feed more, or feed b"" once at the end of input

Every byte of the input is in exactly one event, in order: `Entry.raw` (padding of the entry before, extension
entries, header block), content, `End.raw`, trailer. So the concatenation of all events is the input, which is what
`tarsplit` builds on, and no cut of the input into pieces changes the entries.

What is understood is what Go's archive/tar understands, since the layers of the world were made by it and read by
it: v7, ustar, star, PAX (with `SCHILY.xattr.`), GNU with base-256 numbers; the header left by Go < 1.8 that has a
prefix where GNU has times. Sparse files are refused by name: their content is not what the file holds. An input
either parses or raises `InvalidTar`; nothing else.

Entry is a NamedTuple and not a dataclass: a layer has tens of thousands, and a frozen dataclass takes five times as
long to make (2.6 against 0.5 us).
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

from balenapy.errors import InvalidParameter

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20  # Go archive/tar maxSpecialFileSize
MAX_PENDING_BYTES = 4 << 20  # one entry with L, K, x of the greatest size, and its header; nobody needs more
MAX_EXTENSIONS = 16  # before one entry; writers use three at most. Each is read again when more input arrives
MAX_INT64 = (1 << 63) - 1

REGULAR, REGULAR_OLD, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = (
    b"0", b"\0", b"1", b"2", b"3", b"4", b"5", b"6",
)  # fmt: skip
GLOBAL_HEADER = b"g"
_HEADER_ONLY = frozenset((LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO))
_SPARSE = b"S"
_XATTR = b"SCHILY.xattr."

_ZEROS = bytes(BLOCK)
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")
_NO_XATTRS: dict[bytes, bytes] = {}


class InvalidTar(InvalidParameter):
    """The stream is not a tar, or one that nobody should have made."""


class TruncatedTar(InvalidTar):
    """The stream ended inside an entry."""


class Entry(NamedTuple):
    """One member: its fields as they were meant, after extensions; names are bytes as they stand in the tar."""

    name: bytes
    type: bytes  # one of the constants above, or another letter that the caller may refuse
    size: int  # bytes of content that follow; 0 for types that have none
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    atime_ns: int | None
    link: bytes
    uname: bytes
    gname: bytes
    major: int
    minor: int
    xattrs: dict[bytes, bytes]
    raw: bytes


class End(NamedTuple):
    """The archive is over. `raw`: padding of the last entry and the zero blocks, as far as they were there."""

    raw: bytes


class NeedData:
    """The one value NEED_DATA."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "NEED_DATA"


NEED_DATA: Final = NeedData()
Event = Entry | End | NeedData | memoryview

# States. Small integers: `next_event` runs twice an entry.
_IN_HEADER, _IN_CONTENT, _IN_TRAILER = range(3)


class TarReader:
    """See the module's theory. `feed` takes any piece; it may be called whenever NEED_DATA was given."""

    __slots__ = (
        "_at",
        "_buffer",
        "_eof",
        "_left",
        "_offset",
        "_pad",
        "_state",
        "_view",
        "_xattr_memo",
        "entries",
    )

    def __init__(self) -> None:
        self.entries = 0  # seen so far; for messages
        self._state = _IN_HEADER
        self._buffer = b""
        self._view = memoryview(b"")
        self._at = 0  # what is before it has gone out in events
        self._offset = 0  # of the buffer's first byte in the stream; for messages
        self._left = 0  # bytes of content still to come
        self._pad = 0  # zeros between the last content and the next header
        self._eof = False

    def feed(self, data: bytes) -> None:
        """Take the next piece of the stream; b"" says that it is over."""
        if self._eof:
            raise ValueError("fed after the end of input")
        if not data:
            self._eof = True
            return
        at = self._at
        self._offset += at
        # What is kept is less than one header with its extensions, so this copies little.
        self._buffer = self._buffer[at:] + data if at < len(self._buffer) else data
        self._view = memoryview(self._buffer)
        self._at = 0

    def next_event(self) -> Event:
        """The next event that the bytes fed so far allow.

        Raises: InvalidTar, TruncatedTar. The reader is of no use afterwards.
        """
        if self._state == _IN_HEADER:
            return self._read_header()
        at = self._at
        here = len(self._buffer) - at
        if self._state == _IN_TRAILER:
            if not here:
                return NEED_DATA
            self._at = at + here
            return self._view[at:]
        left = self._left
        if here >= left:
            self._state = _IN_HEADER
            self._at = at + left
            return self._view[at : at + left]
        if here:
            self._left = left - here
            self._at = at + here
            return self._view[at:]
        if self._eof:
            raise TruncatedTar("unexpected EOF")
        return NEED_DATA

    def _read_header(self) -> Event:
        buffer = self._buffer
        start = self._at
        at = start + self._pad
        pax: dict[bytes, bytes] | None = None
        long_name = long_link = b""
        extensions = 0
        while True:
            end = at + BLOCK
            if end > len(buffer):
                return self._wait_for_header(at > start + self._pad)
            block = buffer[at:end]
            fields = _HEADER.unpack(block)
            kind = fields[7]
            if fields[0][0] == 0 and block == _ZEROS:
                if end + BLOCK > len(buffer):
                    return self._wait_for_header(False)
                if buffer[end : end + BLOCK] != _ZEROS:
                    raise self._invalid("one block of zeros inside the archive", at)
                return self._end(end + BLOCK)
            checksum = self._number(fields[6], at)
            # The sum of all bytes, the checksum itself counted as eight blanks. The low half of Adler-32 is one more
            # than the sum, modulo a prime that the sum of a header hardly reaches: a tenth of the time of sum().
            added = zlib.adler32(block) & 0xFFFF == (checksum - 255 + sum(fields[6])) % 65521
            if not added and not _is_signed_sum(checksum, block):
                raise self._invalid("bad checksum", at)
            size = self._number(fields[4], at)
            if size < 0:
                raise self._invalid("negative size", at)
            if kind not in (b"x", b"g", b"L", b"K"):
                break
            extensions += 1
            if extensions > MAX_EXTENSIONS:
                raise self._invalid("too many extended headers", at)
            if size > MAX_EXTENSION_BYTES or at + size - start > MAX_PENDING_BYTES:
                raise self._invalid("extended header is too long", at)
            content_end = end + size
            at = content_end + -size % BLOCK
            if kind == b"g" and pax is None and not long_name and not long_link:
                # Means nothing to us (nor to Docker); an event of its own, so that any number of them is no burden.
                if at > len(buffer):
                    return self._wait_for_header(True)
                self._pad, self._at = 0, at
                return Entry(b"", kind, 0, 0, 0, 0, 0, None, b"", b"", b"", 0, 0, _NO_XATTRS, buffer[start:at])
            if content_end > len(buffer):
                return self._wait_for_header(True)
            content = buffer[end:content_end]
            if kind == b"x":
                pax = self._pax_records(content, end)
            elif kind == b"L":
                long_name = content.partition(b"\0")[0]
            elif kind == b"K":
                long_link = content.partition(b"\0")[0]
        entry = self._entry(fields, kind, size, pax, long_name, long_link, buffer[start:end], at)
        self.entries += 1
        self._at = end
        size = entry.size
        self._pad = -size % BLOCK
        if size:
            self._left = size
            self._state = _IN_CONTENT
        return entry

    def _entry(
        self,
        fields: tuple[bytes, ...],
        kind: bytes,
        size: int,
        pax: dict[bytes, bytes] | None,
        long_name: bytes,
        long_link: bytes,
        raw: bytes,
        at: int,
    ) -> Entry:
        name = fields[0].partition(b"\0")[0]
        mode = self._number(fields[1], at)
        uid = self._number(fields[2], at)
        gid = self._number(fields[3], at)
        mtime_ns = self._number(fields[5], at) * 1_000_000_000
        atime_ns: int | None = None
        link = fields[8].partition(b"\0")[0]
        uname = gname = b""
        major = minor = 0
        xattrs = _NO_XATTRS
        magic = fields[9]
        if magic[:6] == b"ustar\0" or magic == b"ustar  \0":
            uname = fields[10].partition(b"\0")[0]
            gname = fields[11].partition(b"\0")[0]
            if fields[12][0] | fields[13][0]:
                major = self._number(fields[12], at)
                minor = self._number(fields[13], at)
            prefix = fields[14]
            if prefix[0]:
                if magic == b"ustar  \0":
                    atime_ns, prefix = _gnu_times(prefix)
                elif fields[15][8:] == b"tar\0":  # star: 131 bytes of prefix, then two times
                    prefix = prefix[:131]
                prefix = prefix.partition(b"\0")[0]
                if prefix:
                    name = prefix + b"/" + name
        if pax is not None:
            for key, value in pax.items():
                if key.startswith(_XATTR):
                    if xattrs is _NO_XATTRS:
                        xattrs = {}
                    xattrs[key[len(_XATTR) :]] = value
                elif not value:
                    continue  # "keep the original ustar value", as Go reads POSIX
                elif key == b"path":
                    name = value
                elif key == b"linkpath":
                    link = value
                elif key == b"size":
                    size = self._decimal(value, at)
                    if size < 0:
                        raise self._invalid("negative size", at)
                elif key == b"uid":
                    uid = self._decimal(value, at)
                elif key == b"gid":
                    gid = self._decimal(value, at)
                elif key == b"mtime":
                    mtime_ns = self._pax_time(value, at)
                elif key == b"atime":
                    atime_ns = self._pax_time(value, at)
                elif key == b"uname":
                    uname = value
                elif key == b"gname":
                    gname = value
                elif key.startswith(b"GNU.sparse."):
                    kind = _SPARSE
        name = long_name or name
        link = long_link or link
        if kind == REGULAR_OLD:
            kind = DIRECTORY if name.endswith(b"/") else REGULAR
        if kind in _HEADER_ONLY:
            size = 0  # whatever the field says: Go's isHeaderOnly
        elif kind == _SPARSE:
            raise InvalidTar(f"sparse files are not supported: {_show(name)}")
        return Entry(
            name, kind, size, mode, uid, gid, mtime_ns, atime_ns, link, uname, gname, major, minor, xattrs, raw
        )  # fmt: skip

    def _wait_for_header(self, inside_extension: bool) -> Event:
        """Not enough bytes for a header: wait, or at the end of input decide what that means."""
        here = len(self._buffer) - self._at
        if not self._eof:
            if here > MAX_PENDING_BYTES + 2 * BLOCK:
                raise self._invalid("extended header is too long", self._at)
            return NEED_DATA
        after_padding = here - self._pad
        rest = self._buffer[self._at + self._pad :]
        # Padding that is missing or cut short, and one zero block instead of two, are common in old archives.
        if not inside_extension and (after_padding <= 0 or rest == _ZEROS):
            return self._end(len(self._buffer))
        raise TruncatedTar("unexpected EOF")

    def _end(self, upto: int) -> End:
        raw = self._buffer[self._at : upto]
        self._at = upto
        self._pad = 0
        self._state = _IN_TRAILER
        return End(raw)

    def _pax_records(self, content: bytes, at: int) -> dict[bytes, bytes]:
        """`LENGTH key=value\\n`, where LENGTH counts itself."""
        records: dict[bytes, bytes] = {}
        position = 0
        total = len(content)
        while position < total:
            blank = content.find(b" ", position, position + 20)
            if blank < 0:
                raise self._invalid("bad PAX record", at)
            digits = content[position:blank]
            if not digits.isdigit():
                raise self._invalid("bad PAX record", at)
            end = position + int(digits)
            record = content[blank + 1 : end]
            if end > total or end <= blank + 1 or record[-1:] != b"\n":
                raise self._invalid("bad PAX record", at)
            key, equals, value = record[:-1].partition(b"=")
            names = key in (b"path", b"linkpath", b"uname", b"gname")
            if not key or not equals or b"\0" in key or (names and b"\0" in value):
                raise self._invalid("bad PAX record", at)
            records[key] = value
            position = end
        return records

    def _number(self, field: bytes, at: int) -> int:
        """Octal digits among blanks and zeros; or base 256 when the first bit is set."""
        if field[0] & 0x80:
            bits = 8 * len(field) - 1
            value = int.from_bytes(field, "big") & ((1 << bits) - 1)
            if field[0] & 0x40:
                value -= 1 << bits
            if not -MAX_INT64 <= value <= MAX_INT64:
                raise self._invalid("number is too large", at)
            return value
        digits = field.strip(b" \0").partition(b"\0")[0]
        if not digits:
            return 0
        if digits.isdigit():  # int() alone would take "0o7", "+7" and "1_0"
            try:
                return int(digits, 8)
            except ValueError:
                pass
        raise self._invalid("bad number", at)

    def _decimal(self, value: bytes, at: int) -> int:
        if len(value) < 20 and value.removeprefix(b"-").isdigit():
            number = int(value)
            if -MAX_INT64 <= number <= MAX_INT64:
                return number
        raise self._invalid("bad number in a PAX record", at)

    def _pax_time(self, value: bytes, at: int) -> int:
        """Seconds with an optional fraction, to nanoseconds; digits beyond are dropped."""
        whole, _, fraction = value.partition(b".")
        if fraction and not fraction.isdigit():
            raise self._invalid("bad time in a PAX record", at)
        nanoseconds = int(fraction[:9].ljust(9, b"0"))
        seconds = self._decimal(whole, at)
        return seconds * 1_000_000_000 + (-nanoseconds if whole.startswith(b"-") else nanoseconds)

    def _invalid(self, why: str, at: int) -> InvalidTar:
        return InvalidTar(
            f"archive/tar: invalid tar header: {why} (entry {self.entries + 1}, byte {self._offset + at})"
        )


def _gnu_times(field: bytes) -> tuple[int | None, bytes]:
    """GNU's atime, which lies where ustar has the prefix; or the prefix that Go < 1.8 put there."""
    times = (field[:12], field[12:24])
    for time in times:
        digits = time.strip(b" \0").partition(b"\0")[0]
        if time[0] and not time[0] & 0x80 and digits and digits.strip(b"01234567"):
            text = field.partition(b"\0")[0]
            return None, text if text.isascii() else b""
    access = times[0]
    if access[0] & 0x80:
        value = int.from_bytes(access, "big", signed=False) & ((1 << 95) - 1)
        return (value * 1_000_000_000 if value <= MAX_INT64 else None), b""
    digits = access.strip(b" \0").partition(b"\0")[0]
    return (int(digits, 8) * 1_000_000_000 if digits else None), b""


def _is_signed_sum(checksum: int, block: bytes) -> bool:
    """Some old tars added up signed bytes."""
    rest = block[:148] + block[156:]
    return checksum == sum(rest) + 8 * 32 - 256 * sum(byte >> 7 for byte in rest)


def _show(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
