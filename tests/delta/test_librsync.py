"""The librsync codec, by itself and against Debian's rdiff."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from delta import librsync
from delta.errors import DeltaError, Malformed, WrongBase

needs_rdiff = pytest.mark.skipif(shutil.which("rdiff") is None, reason="rdiff is not installed")


def apply(delta: bytes, base: bytes, limit: int | None = None) -> bytes:
    pieces = librsync.patch(io.BytesIO(delta).read, lambda at, n: base[at : at + n], len(base), limit)
    return b"".join(pieces)


def delta_of(base: bytes, new: bytes, block: int = 64) -> bytes:
    signature = b"".join(librsync.make_signature(io.BytesIO(base).read, block))
    out = io.BytesIO()
    librsync.delta_from_signature(librsync.parse_signature(signature), new, out.write)
    return out.getvalue()


def edited(rng: random.Random, base: bytes) -> bytes:
    new = bytearray(base)
    for _ in range(rng.randrange(5)):
        at = rng.randrange(len(new) + 1)
        end = at + rng.randrange(300)
        new[at:end] = rng.randbytes(rng.randrange(300))
    return bytes(new)


def pairs(count: int, seed: int = 1) -> list[tuple[bytes, bytes]]:
    rng = random.Random(seed)
    bases = [rng.randbytes(rng.choice((0, 1, 63, 64, 65, 700, 5000))) for _ in range(count)]
    return [(base, edited(rng, base)) for base in bases]


def test_patch_is_the_inverse_of_delta() -> None:
    for base, new in pairs(100):
        assert new == apply(delta_of(base, new), base)


def test_unchanged_base_is_one_copy() -> None:
    base = random.Random(2).randbytes(6400)

    assert bytes.fromhex("72730236") + b"\x46\x00\x19\x00\x00" == delta_of(base, base)


@pytest.mark.parametrize(
    ("body", "new"),
    [
        (b"\x03abc\x00", b"abc"),
        (b"\x40" + b"x" * 64 + b"\x00", b"x" * 64),
        (b"\x41\x02ab\x00", b"ab"),
        (b"\x42\x00\x02ab\x00", b"ab"),
        (b"\x43\x00\x00\x00\x02ab\x00", b"ab"),
        (b"\x44" + bytes(7) + b"\x02ab\x00trailing", b"ab"),
        (b"\x45\x01\x02\x00", b"12"),
        (b"\x54" + bytes(7) + b"\x03" + bytes(7) + b"\x04\x00", b"3456"),
        (b"\x4d\x00\x00\x00\x00\x0a\x00", b"0123456789"),
    ],
)
def test_every_command_is_read(body: bytes, new: bytes) -> None:
    assert new == apply(bytes.fromhex("72730236") + body, b"0123456789")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", Malformed),  # no END
        (b"\x55\x00", Malformed),
        (b"\xff\x00", Malformed),
        (b"\x05abc", Malformed),
        (b"\x45\x01", Malformed),
        (b"\x44" + b"\xff" * 8 + b"abc", Malformed),
        (b"\x45\x05\x06\x00", WrongBase),
        (b"\x54" + b"\xff" * 16 + b"\x00", WrongBase),
    ],
)
def test_what_cannot_be_is_refused(body: bytes, error: type[DeltaError]) -> None:
    with pytest.raises(error):
        apply(bytes.fromhex("72730236") + body, b"0123456789")


def test_output_is_bounded() -> None:
    with pytest.raises(Malformed):
        apply(bytes.fromhex("72730236") + b"\x45\x00\x0a" * 3 + b"\x00", b"0123456789", 29)


def test_damaged_signatures_are_refused() -> None:
    good = b"".join(librsync.make_signature(io.BytesIO(bytes(1000)).read))
    for bad in (b"", good[:11], good[:-1], b"rs\x016" + good[3:], good[:4] + b"\xff" * 8 + good[12:]):
        with pytest.raises(Malformed):
            librsync.parse_signature(bad)


def test_long_literals_are_cut() -> None:
    out = io.BytesIO()
    writer = librsync.DeltaWriter(out.write)
    data = bytes(librsync.LITERAL_FLUSH_BYTES + 5)
    writer.literal(data)
    writer.close()

    assert data == apply(out.getvalue(), b"")
    assert out.getvalue().count(b"\x43\x01\x00\x00\x00") == 1


@needs_rdiff
def test_rdiff_and_we_agree(tmp_path: Path) -> None:
    """Signatures are equal, and each side applies what the other makes."""
    base_path, new_path, sig, made, back = (tmp_path / name for name in ("base", "new", "sig", "delta", "back"))

    def rdiff(*arguments: object) -> None:
        subprocess.run(["rdiff", "-f", *map(str, arguments)], check=True, stdin=subprocess.DEVNULL)

    for base, new in pairs(30, seed=3):
        base_path.write_bytes(base)
        new_path.write_bytes(new)
        rdiff("-b", 64, "-S", 32, "-H", "blake2", "-R", "rollsum", "signature", base_path, sig)
        ours = b"".join(librsync.make_signature(io.BytesIO(base).read, 64))
        assert sig.read_bytes() == ours
        rdiff("delta", sig, new_path, made)
        assert new == apply(made.read_bytes(), base)
        made.write_bytes(delta_of(base, new))
        rdiff("patch", base_path, made, back)
        assert new == back.read_bytes()
