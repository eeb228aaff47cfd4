"""Headers that we write are read back as they were meant, by us and by others."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balenapy.core import tarwriter
from balenapy.core.tarstream import DIRECTORY, REGULAR, SYMLINK
from tests.core.test_tarstream import only, read

NAMES = st.binary(min_size=1, max_size=400).filter(lambda name: b"\0" not in name and not name.endswith(b"/"))


@given(
    name=NAMES,
    link=st.binary(max_size=300).filter(lambda link: b"\0" not in link),
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 2),
    gid=st.integers(0, 2**32 - 2),
    mtime_s=st.integers(-(2**40), 2**40),
    xattrs=st.dictionaries(
        st.sampled_from([b"user.a", b"user.b=c", b"security.capability"]).filter(lambda key: b"=" not in key),
        st.binary(max_size=50),
    ),
)
@settings(max_examples=150, deadline=None)
def test_the_reader_is_the_inverse(
    name: bytes, link: bytes, mode: int, uid: int, gid: int, mtime_s: int, xattrs: dict[bytes, bytes]
) -> None:
    header = tarwriter.encode_header(
        name, SYMLINK, mode=mode, uid=uid, gid=gid, mtime_s=mtime_s, link=link, xattrs=xattrs
    )
    entry = only(header + tarwriter.END)

    assert len(header) % 512 == 0
    assert (entry.name, entry.link, entry.mode, entry.uid, entry.gid) == (name, link, mode, uid, gid)
    assert entry.mtime_ns == mtime_s * 10**9
    assert entry.xattrs == xattrs


@pytest.mark.parametrize("size", [0, 1, 512, 8**11 - 1, 8**11, 10**15])
def test_sizes_beyond_the_field_are_pax_records(size: int) -> None:
    header = tarwriter.encode_header(b"big", REGULAR, size=size)

    assert tarfile.TarFile.open(fileobj=io.BytesIO(header)).next().size == size  # type: ignore[union-attr]


def test_a_directory_has_its_slash_and_a_long_name_a_prefix() -> None:
    name = b"/".join([b"d" * 30] * 7)
    header = tarwriter.encode_header(name, DIRECTORY, mode=0o755)

    assert len(header) == 512
    assert only(header + tarwriter.END).name == name + b"/"


@given(st.lists(st.tuples(NAMES, st.binary(max_size=1200)), max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_same_files_make_the_same_tar_and_the_standard_library_reads_it(
    members: list[tuple[bytes, bytes]],
) -> None:
    def tar() -> bytes:
        return b"".join(
            tarwriter.encode_header(name, REGULAR, size=len(content), mode=0o644)
            + content
            + tarwriter.padding(len(content))
            for name, content in members
        ) + bytes(tarwriter.END)

    data = tar()
    assert data == tar()
    assert [(entry.name, content) for entry, content in read(data)[0]] == members
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = [(m.name.encode(errors="surrogateescape"), archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    assert [(name.rstrip(b"/"), content) for name, content in members] == [
        (n.rstrip(b"/"), c) for n, c in found
    ]
