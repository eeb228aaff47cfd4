"""The native format: its inverse on random pairs, its checks, its memory."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from delta import maker, native, sections
from delta.errors import DeltaError, Malformed, OverBudget, Unsupported, WrongBase, WrongResult
from delta.maker import Settings
from delta.native import decode_control, encode_control
from delta.tarmembers import parse_number
from tests.delta import inverse
from tests.delta.fuzz import closed, laid_open
from tests.delta.inverse import apply, make
from tests.delta.make_vectors import VECTORS
from tests.delta.randomtars import Entry, opened, opened_base, tar_of

PAIRS = int(os.environ.get("BALENAPY_DELTA_PAIRS", "10000"))
DAMAGED = int(os.environ.get("BALENAPY_DELTA_DAMAGED", "10000"))


def plain_tar(*entries: Entry, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar as it should be: nothing in it is random."""

    class Steady(random.Random):
        def randrange(self, *arguments: int) -> int:  # type: ignore[override]
            return 11

    return tar_of(entries, form, Steady())


def test_reading_is_the_inverse_of_making() -> None:
    """BALENAPY_DELTA_PAIRS sets how many pairs; `make test-delta` is the long form."""
    print(inverse.run(PAIRS))


def test_damaged_deltas_of_all_formats_give_errors_of_ours() -> None:
    """In a process whose memory is limited; BALENAPY_DELTA_DAMAGED sets how many."""
    command = [sys.executable, "-m", "tests.delta.fuzz", str(DAMAGED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    print(done.stdout.strip())


def random_text(seed: int, size: int) -> bytes:
    rng = random.Random(seed)
    return b" ".join(b"%x" % rng.randrange(1 << 16) for _ in range(size // 5))[:size]


def test_unchanged_files_cost_nothing() -> None:
    files = [Entry(f"usr/lib/file{n}", data=random_text(n, 2000)) for n in range(300)]
    later = [Entry(f"usr/lib/file{n}", data=random_text(n, 2000), mtime=1_800_000_000) for n in range(300)]

    with opened_base([plain_tar(*files)]) as base:
        made = make(base, plain_tar(*later))
        assert apply(base, made.data) == plain_tar(*later)

    assert len(made.data) < 200
    assert {line.how for line in made.lines} == {"same"}


def test_files_are_found_in_other_layers_and_under_other_names() -> None:
    moved = Entry("opt/app/libopenblas-1a2b3c4d.so", data=random_text(1, 9000))
    changed = Entry("opt/app-1.2/main.js", data=random_text(2, 9000))
    target = plain_tar(
        Entry("srv/libopenblas-99887766.so", data=random_text(1, 9000)),
        Entry("opt/app-1.3/main.js", data=random_text(2, 9000).replace(b"a", b"b", 3)),
    )

    with opened_base([plain_tar(moved), plain_tar(changed), plain_tar()]) as base:
        made = make(base, target)
        assert apply(base, made.data) == target

    assert [line.how.replace("bsdiff", "framed") for line in made.lines] == ["same", "framed"]
    assert len(made.data) < 450


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(fast=True), Settings(codecs=frozenset(("zstd",))), Settings(device_bytes=10 << 20)],
)
def test_large_files_go_in_pieces(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a piece, more than a frame, and old ranges far apart."""
    rng = random.Random(5)
    monkeypatch.setattr(maker, "FRAME_PLAIN_BYTES", 1 << 19)
    monkeypatch.setattr(maker, "FRAME_PREFIX_BYTES", 1 << 20)
    monkeypatch.setattr(native, "PIECE_BYTES", 1 << 17)
    old = rng.randbytes(3 << 18)
    new = old[2 << 18 :] + rng.randbytes(170_000) + old[: 2 << 18].replace(b"\x07", b"\x08")
    target = plain_tar(Entry("big", data=new), Entry("after", data=b"x"))

    with opened_base([plain_tar(Entry("big", data=old))]) as base:
        made = make(base, target, settings)
        assert apply(base, made.data, settings.device_bytes) == target


def test_deltas_for_another_base_are_refused() -> None:
    with opened_base([plain_tar(Entry("a", data=b"abc"))]) as base:
        data = make(base, plain_tar(Entry("a", data=b"abd"))).data
        with pytest.raises(WrongBase):
            list(native.apply(lambda at, n: data[at : at + n], base, check=b"12345678"))
    with opened_base([plain_tar(), plain_tar()]) as other, pytest.raises(WrongBase):
        list(native.apply(lambda at, n: data[at : at + n], other))


def test_a_base_with_other_content_does_not_give_a_wrong_result() -> None:
    target = plain_tar(Entry("a", data=b"abc" * 99, mode=0o600))
    with opened_base([plain_tar(Entry("a", data=b"abc" * 99))]) as base:
        data = make(base, target).data

    with opened_base([plain_tar(Entry("a", data=b"abd" * 99))]) as other, pytest.raises(WrongResult):
        list(native.apply(lambda at, n: data[at : at + n], other))


def test_what_needs_more_than_the_budget_is_refused_before_it_is_taken() -> None:
    rng = random.Random(6)
    target = plain_tar(Entry("a", data=rng.randbytes(1 << 20)))
    with opened_base([plain_tar()]) as base:
        data = make(base, target).data
        with pytest.raises(OverBudget):
            apply(base, data + b"", budget_bytes=1 << 20)
        with pytest.raises(Malformed, match="at most"):
            list(native.apply(lambda at, n: data[at : at + n], base, max_bytes=1 << 20))


def test_a_device_of_too_little_memory_is_refused_at_once() -> None:
    with opened_base([plain_tar()]) as base, pytest.raises(OverBudget):
        make(base, plain_tar(), Settings(device_bytes=9 << 20))


def test_strangers_and_later_versions_are_told_apart() -> None:
    with opened_base([]) as base:
        for data, error in ((b"", Malformed), (b"hello world", Malformed), (b"BPDELTA2" + bytes(99), Unsupported)):
            with pytest.raises(error):
                list(native.apply(lambda at, n, data=data: data[at : at + n], base))


def test_runs_without_output_end() -> None:
    """A run of any number of items takes a few bytes; each must make something."""
    with opened_base([]) as base:
        data = make(base, bytes(4096)).data
    head, _ = sections.decode_head(data)
    meta = bytearray()
    column = bytes((1, 2)) + b"\xff" * 7 + b"\x7f"  # RUNS of ZEROS
    sizes = bytes((1, 0)) + b"\xff" * 7 + b"\x7f"
    for number in range(31):
        here = {0: column, 9: sizes}.get(number, b"")
        sections.put(meta, len(here))
        meta += here
    chunk = bytearray()
    sections.put(chunk, len(meta))
    chunk += meta
    bad = closed(head, [bytes(chunk), b"", b"", b"", b"", b""])

    with opened_base([]) as base, pytest.raises(DeltaError, match="item"):
        apply(base, bad)


def test_a_frame_does_not_say_how_much_memory_it_gets() -> None:
    """zstd's decoder would take what the frame's header tells, before it decodes anything."""
    folder = VECTORS / "rewritten"
    head, plain = laid_open((folder / "native.delta").read_bytes())
    assert plain[sections.FRAMES]
    told = b"\xe0" + (1 << 40).to_bytes(8, "little")  # a single segment, eight bytes of size
    plain[sections.FRAMES] = told + plain[sections.FRAMES][len(told) :]
    bad = closed(head, plain)

    with opened_base([(folder / "base-0.tar").read_bytes()]) as base, pytest.raises(Malformed, match="tells its size"):
        list(native.apply(lambda at, n: bad[at : at + n], base))


def test_control_triples_survive_their_planes() -> None:
    rng = random.Random(7)
    sizes = [(rng.randrange(1 << 31), rng.randrange(1 << 20)) for _ in range(5000)]
    triples = [(*each, rng.randrange(-(1 << 31), 1 << 31)) for each in sizes]
    packed = encode_control(triples)

    first = 12 * native.CONTROL_CHUNK
    assert triples == [*decode_control(packed[:first]), *decode_control(packed[first:])]


def test_numbers_of_headers() -> None:
    for field, expected in (
        (b"00000000644\0", 0o644),
        (b"   644 \0", 0o644),
        (b"\0" * 8, 0),
        (b"\x80" + (1 << 40).to_bytes(11, "big"), 1 << 40),
        (b"\xff" * 12, None),
        (b"0x12\0", None),
        (b"-1\0", None),
        (b"1_0\0", None),
        (b"89\0", None),
    ):
        assert expected == parse_number(field)


def test_members_are_cut_as_the_format_says() -> None:
    """A sparse file, a long name, padding that is not zero."""
    long = plain_tar(Entry("n" * 300, data=b"x" * 600), Entry("b"), form=tarfile.GNU_FORMAT)
    spoiled = bytearray(plain_tar(Entry("a", data=b"x"), Entry("b", data=b"y")))
    spoiled[512 + 1] = 1

    with opened(long, bytes(spoiled)) as (first, second):
        assert [tuple(member) for member in first.members()] == [(0, 1536, 600), (2560, 3072, 0)]
        assert len(second) == 0


def test_nothing_of_the_engine_is_imported() -> None:
    for path in Path(native.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("balenapy")], path
