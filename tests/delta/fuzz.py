"""Damaged deltas of the three formats: an error of ours or the right target, and never over the budget of memory.

    python -m tests.delta.fuzz [COUNT [FIRST_SEED]]

Native deltas are damaged as they lie, and with their sections laid open first: what is behind the compression and
the digest is reached that way. The address space is limited to what there was before and the budget.
"""

from __future__ import annotations

import io
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from delta import librsync, native, sections, tardiff
from delta.base import TarBase
from delta.errors import DeltaError
from delta.match import BaseIndex
from delta.sections import STORED, Head, Section, SectionReader
from tests.delta.inverse import make
from tests.delta.randomtars import opened, opened_base, random_pair

BUDGET_BYTES = 32 << 20
SLACK_BYTES = 24 << 20  # the allocator's arenas, and the interpreter's own growth
MUTATIONS = 40  # of each pair


def damaged(rng: random.Random, data: bytes) -> bytes:
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(new) + 1)
        match rng.randrange(6):
            case 0:
                del new[at : at + rng.randrange(9)]
            case 1:
                new[at:at] = rng.randbytes(rng.randrange(9))
            case 2:
                new[at : at + 1] = b"\xff\xff\xff\xff\xff\x07"
            case 3:
                del new[at:]
            case 4:
                new[at : at + 1] = bytes((rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF)),))
            case _:
                new[at : at + 1] = rng.randbytes(1)
    return bytes(new)


def laid_open(data: bytes) -> tuple[Head, list[bytes]]:
    """A delta's head and the plain bytes of its sections."""
    head, start = sections.decode_head(data)
    plain = []
    for name, section in zip(sections.SECTION_NAMES, head.sections, strict=True):
        reader = SectionReader(name, lambda at, n: data[at : at + n], start, section)
        plain.append(reader.read(section.plain_bytes))
        start += section.stored_bytes
    return head, plain


def closed(head: Head, plain: Iterable[bytes]) -> bytes:
    plain = list(plain)
    stored = tuple(Section(STORED, len(each), len(each), 0, 0) for each in plain)
    return Head(*(getattr(head, name) for name in Head.__slots__[:-1]), stored).encode() + b"".join(plain)


def take(pieces: Iterable[bytes], limit: int) -> bytes:
    out = bytearray()
    for piece in pieces:
        out += piece
        assert len(out) <= limit, "more than was announced"
    return bytes(out)


def fuzz_native(rng: random.Random, base: TarBase, target: bytes, counts: Counter[str]) -> None:
    data = make(base, target).data
    head, plain = laid_open(data)
    check = native.base_check([str(layer) for layer in range(base.layers)])
    for turn in range(MUTATIONS):
        if turn % 4:
            which = rng.choice([0, 0, 0, *range(sections.SECTIONS)])
            bad = closed(head, [damaged(rng, each) if n == which else each for n, each in enumerate(plain)])
        else:
            bad = damaged(rng, data)
        try:
            pieces = native.apply(lambda at, n, bad=bad: bad[at : at + n], base, budget_bytes=BUDGET_BYTES, check=check)
            out = take(pieces, max(len(target), 1 << 24))
        except DeltaError as error:
            counts[f"native {type(error).__name__}"] += 1
        else:
            assert out == target, "a wrong result"
            counts["native right all the same"] += 1


def fuzz_tardiff(rng: random.Random, base: TarBase, target: bytes, counts: Counter[str]) -> None:
    index = BaseIndex(base)
    made = io.BytesIO()
    with opened(target) as (tar,):
        tardiff.make(index, tar, made.write, level=3)
    files = tardiff.MergedFiles(index)
    operations = tardiff.zstandard.ZstdDecompressor().decompressobj().decompress(made.getvalue()[8:])
    for turn in range(MUTATIONS):
        if turn % 4:
            bad = tardiff.MAGIC + tardiff.zstandard.ZstdCompressor(level=1).compress(damaged(rng, operations))
        else:
            bad = damaged(rng, made.getvalue())
        limit = len(target)
        try:
            take(tardiff.apply(io.BytesIO(bad).read, files, max_bytes=limit, budget_bytes=BUDGET_BYTES), limit)
            counts["tar-diff applied"] += 1
        except DeltaError as error:
            counts[f"tar-diff {type(error).__name__}"] += 1


def fuzz_librsync(rng: random.Random, base: bytes, target: bytes, counts: Counter[str]) -> None:
    signature = librsync.parse_signature(b"".join(librsync.make_signature(io.BytesIO(base).read)))
    made = io.BytesIO()
    librsync.delta_from_signature(signature, target[:4096], made.write)
    for _ in range(MUTATIONS):
        bad = damaged(rng, made.getvalue())
        limit = len(target)
        try:
            pieces = librsync.patch(io.BytesIO(bad).read, lambda at, n: base[at : at + n], len(base), limit)
            take(pieces, limit)
            counts["librsync applied"] += 1
        except DeltaError as error:
            counts[f"librsync {type(error).__name__}"] += 1


def run(count: int, first: int, counts: Counter[str]) -> None:
    """`count` damaged deltas, a third of each format."""
    seed = first
    while sum(counts.values()) < count:
        rng = random.Random(seed)
        layers, target = random_pair(seed)
        with opened_base(layers) as base:
            try:
                fuzz_native(rng, base, target, counts)
                fuzz_tardiff(rng, base, target, counts)
                fuzz_librsync(rng, layers[0], target, counts)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r}") from error
        seed += 1


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    warm: Counter[str] = Counter()
    run(100, 10**9, warm)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BUDGET_BYTES + SLACK_BYTES,) * 2)
    counts: Counter[str] = Counter()
    started = time.monotonic()
    run(count, first, counts)
    done, took_s = sum(counts.values()), time.monotonic() - started
    print(f"{done} damaged deltas from seed {first}, {took_s:.0f} s: {dict(counts)}")


if __name__ == "__main__":
    main()
