"""The tar reader: every format it knows, every way to lie to it."""

from __future__ import annotations

import itertools
import random
import tarfile
import time
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balenapy.core import tarstream
from balenapy.core.tarstream import End, Entry, InvalidTar, NeedData, TarReader, TruncatedTar
from tests.core import tars

Contents = list[tuple[Entry, bytes]]


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    borders = sorted({0, len(data), *(cut for cut in cuts if 0 < cut < len(data))})
    return [data[a:b] for a, b in itertools.pairwise(borders)]


def read(data: bytes, cuts: Iterable[int] = ()) -> tuple[Contents, bytes]:
    """All entries with their contents, and the concatenation of everything that came out."""
    reader = TarReader()
    entries: Contents = []
    everything = bytearray()
    over = False
    waiting = [*pieces(data, cuts), b""]
    while True:
        event = reader.next_event()
        if isinstance(event, NeedData):
            if not waiting:
                return entries, bytes(everything)
            reader.feed(waiting.pop(0))
        elif isinstance(event, Entry):
            entries.append((event, b""))
            everything += event.raw
        elif isinstance(event, End):
            everything += event.raw
            over = True
        else:
            everything += event
            if not over:
                entries[-1] = (entries[-1][0], entries[-1][1] + bytes(event))


def only(data: bytes) -> Entry:
    entries, everything = read(data)
    assert everything == data
    assert len(entries) == 1
    return entries[0][0]


def test_plain_entries_give_fields_and_content() -> None:
    data = tars.directory(b"d/") + tars.file(b"d/f", b"hello", mode=0o4755, uid=7, gid=8) + tars.END

    entries, everything = read(data)

    assert data == everything
    (first, _), (second, content) = entries
    assert (first.name, first.type, first.mode) == (b"d/", tarstream.DIRECTORY, 0o755)
    assert (
        second.name, second.mode, second.uid, second.gid, second.size, content,
    ) == (b"d/f", 0o4755, 7, 8, 5, b"hello")  # fmt: skip
    assert second.mtime_ns == 1_600_000_000_000_000_000


def test_ustar_prefix_is_put_before_the_name() -> None:
    assert only(tars.header(b"name", prefix=b"a/b") + tars.END).name == b"a/b/name"


def test_v7_header_has_no_prefix_and_a_trailing_slash_means_directory() -> None:
    entry = only(tars.header(b"old/", b"\0", magic=b"\0" * 8, fields={345: b"junk"}) + tars.END)

    assert (entry.name, entry.type) == (b"old/", tarstream.DIRECTORY)


def test_posix_type_0_with_trailing_slash_stays_a_file_as_in_go() -> None:
    assert only(tars.header(b"x/", b"0") + tars.END).type == tarstream.REGULAR


def test_star_prefix_is_131_bytes() -> None:
    fields = {345: b"p" * 131, 476: b"00000000017\0", 488: b"00000000017\0", 508: b"tar\0"}
    assert only(tars.header(b"n", fields=fields) + tars.END).name == b"p" * 131 + b"/n"


def test_gnu_times_are_not_a_prefix() -> None:
    entry = only(tars.header(b"n", magic=b"ustar  \0", fields={345: b"00000000017\0"}) + tars.END)

    assert (entry.name, entry.atime_ns) == (b"n", 15_000_000_000)


def test_gnu_header_of_old_go_has_a_prefix_where_times_belong() -> None:
    assert only(tars.header(b"n", magic=b"ustar  \0", prefix=b"usr/lib") + tars.END).name == b"usr/lib/n"


def test_gnu_long_name_and_link() -> None:
    name, link = b"n" * 300, b"l" * 5000
    data = tars.gnu_long(b"K", link) + tars.gnu_long(b"L", name) + tars.symlink(b"short", b"short") + tars.END

    entry = only(data)

    assert (name, link) == (entry.name, entry.link)


def test_pax_overrides_everything() -> None:
    records = (
        (b"path", "ünïcode/name".encode()), (b"linkpath", b"to"), (b"uid", b"3000000"), (b"gid", b"3000001"),
        (b"mtime", b"1234.5678901239"), (b"atime", b"-1.25"), (b"uname", b"u"), (b"gname", b"g"),
        (b"SCHILY.xattr.user.x", b"\0\xff="), (b"comment", b"nothing"), (b"size", b"3"),
    )  # fmt: skip
    data = tars.pax(*records) + tars.header(b"f", size=9) + tars.padded(b"abc") + tars.END

    entries, everything = read(data)

    assert data == everything
    entry, content = entries[0]
    assert content == b"abc"
    assert (entry.name.decode(), entry.uid, entry.gid) == ("ünïcode/name", 3000000, 3000001)
    assert (entry.mtime_ns, entry.atime_ns) == (1_234_567_890_123, -1_250_000_000)
    assert entry.xattrs == {b"user.x": b"\0\xff="}


def test_pax_record_with_empty_value_changes_nothing() -> None:
    assert only(tars.pax((b"path", b"")) + tars.header(b"kept") + tars.END).name == b"kept"


def test_pax_does_not_reach_the_entry_after_the_next() -> None:
    entries, _ = read(tars.pax((b"path", b"long")) + tars.header(b"a") + tars.header(b"b") + tars.END)

    assert [entry.name for entry, _ in entries] == [b"long", b"b"]


def test_global_header_is_an_entry_of_its_own_and_changes_nothing() -> None:
    entries, everything = read(
        data := tars.pax((b"path", b"x"), (b"comment", b"c"), kind=b"g") + tars.header(b"a") + tars.END
    )

    assert data == everything
    assert [entry.type for entry, _ in entries] == [b"g", b"0"]
    assert entries[1][0].name == b"a"


def test_base_256_numbers() -> None:
    fields = {108: b"\x80" + (2**31).to_bytes(7, "big"), 136: b"\xff" * 11 + b"\xfe"}
    entry = only(tars.header(b"n", fields=fields) + tars.END)

    assert (entry.uid, entry.mtime_ns) == (2**31, -2_000_000_000)


def test_numbers_with_blanks_zeros_and_nothing() -> None:
    fields = {100: b"   755 \0", 108: b"\0\0\0\0\0\0\0\0", 116: b"\0  12\0xx"}
    entry = only(tars.header(b"n", fields=fields) + tars.END)

    assert (entry.mode, entry.uid, entry.gid) == (0o755, 0, 0o12)


@pytest.mark.parametrize(
    "text", [b"0o7\0\0\0\0\0", b"+7\0\0\0\0\0\0", b"1_0\0\0\0\0\0", b"-1\0\0\0\0\0\0", b"9\0\0\0\0\0\0\0"]
)
def test_what_only_python_calls_an_octal_number_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidTar):
        read(tars.header(b"n", fields={108: text}))


def test_types_without_content_ignore_their_size() -> None:
    entries, _ = read(tars.header(b"d", b"5", size=5000) + tars.header(b"l", b"1", size=1, link=b"x") + tars.END)

    assert [entry.size for entry, _ in entries] == [0, 0]


def test_devices() -> None:
    entry = only(tars.header(b"null", b"3", major=1, minor=3) + tars.END)

    assert (entry.major, entry.minor) == (1, 3)


def test_signed_checksum_of_old_tars_is_taken() -> None:
    block = bytearray(tars.header("ü".encode("latin1") + b"mlaut"))
    total = sum(block[:148]) + sum(block[156:]) + 256 - 256
    block[148:156] = b"%06o\0 " % total

    assert only(bytes(block) + tars.END).name == b"\xfcmlaut"


def test_bytes_after_the_end_are_given_and_mean_nothing() -> None:
    data = tars.file(b"a", b"1") + tars.END + b"garbage" + tars.header(b"b") * 3

    entries, everything = read(data)

    assert data == everything
    assert len(entries) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        tars.header(b"a"),
        tars.file(b"a", b"x"),
        tars.file(b"a", b"x")[:-1],
        tars.file(b"a", b"x")[:513],
        tars.header(b"a") + bytes(512),
        bytes(1024),
        bytes(512),
    ],
    ids=[
        "empty",
        "no end",
        "padding, no end",
        "short padding",
        "no padding",
        "one zero block",
        "end",
        "one zero",
    ],
)
def test_input_may_stop_at_the_border_of_an_entry(data: bytes) -> None:
    assert read(data)[1] == data


@pytest.mark.parametrize(
    "data",
    [
        b"x" * 511,
        tars.header(b"a", size=1),
        tars.file(b"a", b"x" * 600)[: 512 + 599],
        tars.header(b"a") + bytes(513),
        tars.header(b"a") + tars.header(b"b")[:100],
        tars.pax((b"path", b"x")),
        tars.pax((b"path", b"x"))[:600],
        tars.header(b"a", size=10_000_000_000) + b"short",
    ],
)
def test_input_that_stops_inside_an_entry_is_truncated(data: bytes) -> None:
    with pytest.raises(TruncatedTar, match="unexpected EOF"):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x01" * 512,
        tars.header(b"a")[:-1] + b"x",
        bytes(512) + tars.header(b"a"),
        tars.header(b"a", fields={124: b"\xff" * 12}),
        tars.header(b"a", fields={124: b"\x80" + b"\xff" * 11}),
        tars.header(b"x", b"x", size=tarstream.MAX_EXTENSION_BYTES + 1),
        tars.header(b"x", b"L", size=10_000_000_000),
        tars.pax((b"path", b"a\0b")) + tars.header(),
        tars.pax((b"size", b"-1")) + tars.header(),
        tars.pax((b"size", b"9" * 30)) + tars.header(),
        tars.pax((b"size", b"0x10")) + tars.header(),
        tars.pax((b"mtime", b"1.x")) + tars.header(),
        tars.pax((b"mtime", b".5")) + tars.header(),
        tars.pax((b"a\0b", b"c")) + tars.header(),
        tars.header(b"x", b"x", size=9) + tars.padded(b"9 path=x ") + tars.header(),
        tars.header(b"x", b"x", size=9) + tars.padded(b"99 path=x") + tars.header(),
        tars.header(b"x", b"x", size=9) + tars.padded(b"0 path=x\n") + tars.header(),
        tars.header(b"x", b"x", size=9) + tars.padded(b"pathpathp") + tars.header(),
        tars.header(b"x", b"x", size=7) + tars.padded(b"7 path\n") + tars.header(),
        tars.header(b"x", b"x", size=5) + tars.padded(b"5 =x\n") + tars.header(),
        tars.pax((b"path", b"x")) * (tarstream.MAX_EXTENSIONS + 1) + tars.header(),
    ],
)
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidTar, match="invalid tar header"):
        read(data + tars.END)


@pytest.mark.parametrize(
    "data",
    [
        tars.header(b"holes", b"S", magic=b"ustar  \0"),
        tars.pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + tars.header(b"holes"),
        tars.pax((b"GNU.sparse.size", b"1")) + tars.header(b"holes"),
    ],
)
def test_sparse_files_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(InvalidTar, match="sparse files are not supported: holes"):
        read(data + tars.END)


def test_any_number_of_global_headers_takes_no_memory() -> None:
    reader = TarReader()
    block = tars.pax((b"comment", b"c" * 1000), kind=b"g")
    for _ in range(10_000):
        reader.feed(block)
        assert isinstance(reader.next_event(), Entry)
        assert isinstance(reader.next_event(), NeedData)
    assert reader.entries == 0


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Tars as the standard library writes them, in each of its formats."""
    members = []
    for name in draw(st.lists(NAMES, max_size=5)):
        info = tarfile.TarInfo(name)
        info.mode = draw(st.integers(0, 0o7777))
        info.uid = draw(st.integers(0, 0o7777777))
        info.mtime = draw(st.integers(0, 2**33 - 1))
        content = b""
        info.type = draw(st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]))
        if info.type == tarfile.REGTYPE:
            content = draw(st.binary(max_size=1500))
        elif info.type != tarfile.DIRTYPE:
            info.linkname = draw(NAMES)
        members.append((info, content))
    return tars.by_tarfile(members, draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])))


@given(archives(), st.lists(st.integers(0, 20_000), max_size=30))
@settings(max_examples=60, deadline=None)
def test_events_concatenate_to_the_input_and_any_cut_gives_the_same_entries(data: bytes, cuts: list[int]) -> None:
    whole, everything = read(data)

    assert data == everything
    assert (whole, data) == read(data, cuts)
    assert (whole, data) == read(data, range(0, len(data), 511))


@given(archives())
@settings(max_examples=60, deadline=None)
def test_the_standard_library_reads_the_same(data: bytes) -> None:
    import io

    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [
            (
                m.name.encode(errors="surrogateescape"),
                m.type,
                m.mode,
                m.uid,
                int(m.mtime),
                m.linkname.encode(),
            )
            for m in tar
        ]

    actual = [(e.name.rstrip(b"/"), e.type, e.mode, e.uid, e.mtime_ns // 10**9, e.link) for e, _ in read(data)[0]]
    assert [(e[0].rstrip(b"/"), *e[1:]) for e in expected] == actual


def test_arbitrary_damage_parses_or_raises_our_error() -> None:
    """Ten thousand damaged archives; the checksum is mended in most, so that the damage gets past it."""
    random_ = random.Random(7)
    seeds = [
        tars.directory(b"d") + tars.file(b"d/f", b"x" * 700) + tars.symlink(b"s", b"d/f") + tars.END,
        tars.pax((b"path", b"p" * 200), (b"mtime", b"1.5"), (b"SCHILY.xattr.user.a", b"b"))
        + tars.file(b"p", b"y" * 20),
        tars.gnu_long(b"L", b"n" * 200) + tars.file(b"n", b"z") + tars.END + b"trailer",
        tars.header(b"n", magic=b"ustar  \0", prefix=b"usr") + tars.pax((b"comment", b"g"), kind=b"g") + tars.END,
    ]
    started = time.monotonic()
    parsed = refused = 0
    for _ in range(10_000):
        data = bytearray(random_.choice(seeds))
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(len(data))
            choice = random_.random()
            if choice < 0.7:
                data[at] = random_.choice(b"\0 0179\xff/x=\n\x80gxLKS")
            elif choice < 0.85:
                del data[at : at + random_.choice((1, 512, 600))]
            else:
                data[at:at] = random_.randbytes(random_.choice((1, 512)))
            if not data:
                data += b"x"
        if random_.random() < 0.8:
            for block in range(0, len(data) - 511, 512):
                if data[block + 257 : block + 262] == b"ustar":
                    data[block + 148 : block + 156] = b" " * 8
                    data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
        try:
            _, everything = read(bytes(data), [random_.randrange(len(data)) for _ in range(3)])
        except InvalidTar:
            refused += 1
        else:
            parsed += 1
            assert everything == data
    print(f"tarstream fuzz: {parsed} parsed, {refused} refused, {time.monotonic() - started:.1f} s")
    assert parsed > 1000
    assert refused > 1000
