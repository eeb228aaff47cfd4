"""Writes the test vectors: for each a folder with `base-N.tar`, `target.tar` and one delta a format.

    python -m tests.delta.make_vectors

Deltas may come out otherwise with another compressor; readers must read those that are kept.
"""

from __future__ import annotations

import io
import random
import tarfile
from dataclasses import replace
from pathlib import Path

from delta import librsync, tardiff
from delta.maker import Settings
from delta.match import BaseIndex
from tests.delta.inverse import make
from tests.delta.programs import grown, link, random_program
from tests.delta.randomtars import Entry, opened, opened_base, tar_of

VECTORS = Path(__file__).parent / "vectors"
LATER = 1_800_000_000


class _Steady(random.Random):
    """No spoiled tars."""

    def randrange(self, *_: int) -> int:  # type: ignore[override]
        return 11


def _text(seed: int, size: int) -> bytes:
    rng = random.Random(seed)
    return b"".join(b"line %d: %x\n" % (n, rng.randrange(1 << 20)) for n in range(size // 16))


def _tar(*entries: Entry, form: int = tarfile.PAX_FORMAT) -> bytes:
    return tar_of(entries, form, _Steady())


def _shuffled(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    random.Random(3).shuffle(lines)
    return b"".join(lines).replace(b"line 1", b"LINE ONE")


def vectors() -> dict[str, tuple[list[bytes], bytes]]:
    """Name to (base layers, target)."""
    rng = random.Random(1)
    binary = rng.randbytes(400) + bytes(600) + rng.randbytes(1000)
    shifted = bytearray(binary[:1200] + rng.randbytes(30) + binary[900:])
    for at in range(0, len(shifted), 97):
        shifted[at] = (shifted[at] + 1) & 0xFF
    files = [Entry(f"etc/conf-{n}", data=_text(n, 300)) for n in range(4)]
    long = [Entry("d/" * 70 + "file", data=b"long"), Entry("link", tarfile.SYMTYPE, link="to/" * 50)]
    lower = _tar(Entry("usr", tarfile.DIRTYPE, mode=0o755), *files)
    upper = _tar(Entry("bin/tool-1.2", data=binary, mode=0o755), Entry("app/main.js", data=_text(9, 900)))
    changed = [
        Entry("bin/tool-1.3", data=bytes(shifted), mode=0o755, mtime=LATER),
        Entry("app/main.js", data=_text(9, 900).replace(b"line 7", b"row 7"), mtime=LATER),
        Entry("app/new.txt", data=_text(10, 200), mtime=LATER),
        Entry("app/empty", mtime=LATER),
        Entry("app/.wh.old", mtime=LATER),
        replace(files[2], name="srv/moved", mtime=LATER),
        replace(files[2], name="srv/hard", kind=tarfile.LNKTYPE, data=b"", link="srv/moved", mtime=LATER),
    ]
    prose = [Entry(f"doc/{n}.txt", data=_text(20 + n, 2500)) for n in range(3)]
    program = random_program(random.Random(2), 24)
    longer = grown(random.Random(7), program)
    spoiled = _tar(Entry("a", data=b"x" * 100), *files) + b"after the end"
    return {
        "times": ([lower], _tar(Entry("usr", tarfile.DIRTYPE, mode=0o755), *(replace(e, mtime=LATER) for e in files))),
        "contents": ([lower, upper], _tar(*changed)),
        "long-names": (
            [_tar(*long), _tar(*long, form=tarfile.GNU_FORMAT)],
            _tar(*(replace(e, mtime=LATER, pax={"SCHILY.xattr.user.x": "y"}) for e in long)),
        ),
        "gnu": ([_tar(*long, form=tarfile.GNU_FORMAT)], _tar(*long, *files, form=tarfile.GNU_FORMAT)),
        "spoiled": ([lower], spoiled[:1030] + b"?" + spoiled[1031:]),
        "empty-layer": ([lower], bytes(1024)),
        "program": ([_tar(Entry("bin/x", data=link(program)))], _tar(Entry("bin/x", data=link(longer), mtime=LATER))),
        "rewritten": ([_tar(*prose)], _tar(*(replace(e, data=_shuffled(e.data), mtime=LATER) for e in prose))),
        "nothing": ([], b""),
    }


def main() -> None:
    for name, (layers, target) in vectors().items():
        folder = VECTORS / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(layers):
            (folder / f"base-{number}.tar").write_bytes(data)
        (folder / "target.tar").write_bytes(target)
        with opened_base(layers) as base, opened(target) as (tar,):
            (folder / "native.delta").write_bytes(make(base, target).data)
            (folder / "native-bsdiff.delta").write_bytes(
                make(base, target, Settings(codecs=frozenset(("bsdiff",)))).data
            )
            out = io.BytesIO()
            tardiff.make(BaseIndex(base), tar, out.write)
            (folder / "tar-diff.delta").write_bytes(out.getvalue())
        signature = librsync.make_signature(io.BytesIO(b"".join(layers)).read)
        out = io.BytesIO()
        librsync.delta_from_signature(librsync.parse_signature(b"".join(signature)), target, out.write)
        (folder / "librsync.delta").write_bytes(out.getvalue())


if __name__ == "__main__":
    main()
