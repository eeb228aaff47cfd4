"""Random bases and targets: tars of every sort that a layer may be, and some that it may not."""

from __future__ import annotations

import os
import random
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from delta.base import LayerTar, TarBase
from tests.delta.programs import grown, link, random_program

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
WORDS = ("usr", "lib", "etc", "node_modules", "libssl.so.3", "numpy-1.26.2", "app.js", "main.cpython-311.pyc", "x")


@dataclass(frozen=True)
class Entry:
    """One member to be."""

    name: str
    kind: bytes = tarfile.REGTYPE
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    mtime: int = 1_700_000_000
    link: str = ""
    pax: dict[str, str] = field(default_factory=dict)


def tar_of(entries: Sequence[Entry], form: int, rng: random.Random) -> bytes:
    out = []
    for entry in entries:
        info = tarfile.TarInfo(entry.name)
        info.type, info.mode, info.uid, info.mtime = entry.kind, entry.mode, entry.uid, entry.mtime
        info.linkname = entry.link
        info.size = len(entry.data) if entry.kind == tarfile.REGTYPE else 0
        info.pax_headers = dict(entry.pax) if form == tarfile.PAX_FORMAT else {}
        try:
            out.append(info.tobuf(form, "utf-8", "surrogateescape"))
        except ValueError:  # a name too long for the format
            continue
        out.append(entry.data[: info.size] + bytes(-info.size % tarfile.BLOCKSIZE))
    data = b"".join(out) + bytes(2 * tarfile.BLOCKSIZE)
    data += bytes(-len(data) % tarfile.RECORDSIZE)
    match rng.randrange(12):
        case 0:
            return data.rstrip(b"\0")  # no trailer, the last padding cut
        case 1:
            return data + rng.randbytes(rng.randrange(2000))
        case 2:
            return data[: rng.randrange(len(data) + 1)]
        case 3:  # broken in some place
            at = rng.randrange(len(data))
            return data[:at] + rng.randbytes(rng.randrange(40)) + data[at + 1 :]
        case _:
            return data


PROGRAMS = 8  # and each of them grown twice


def _programs() -> list[list[bytes]]:
    rng = random.Random(64)
    found = []
    for number in range(PROGRAMS):
        program = random_program(rng, 6 + 6 * number)
        longer = grown(rng, program)
        found.append([*map(link, (program, longer, grown(rng, longer)))])
    return found


_PROGRAMS = _programs()


def content(rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return rng.choice(rng.choice(_PROGRAMS))
    match rng.randrange(6):
        case 0:
            return b""
        case 1:
            return rng.randbytes(rng.choice((1, 511, 512, 513, 3000)))
        case 2:
            return bytes(rng.randrange(3000))  # sparse-looking
        case 3:
            return bytes(rng.randrange(2000)) + rng.randbytes(200) + bytes(rng.randrange(2000))
        case _:
            lines = [b"value %d = %d\n" % (n, rng.randrange(9)) for n in range(rng.randrange(200))]
            return b"".join(lines)


def edited(rng: random.Random, data: bytes) -> bytes:
    new = bytearray(data)
    if data.startswith(b"\x7fELF"):
        versions = next((each for each in _PROGRAMS if data in each), [data])
        new = bytearray(rng.choice(versions))
        if rng.random() < 0.5:
            return bytes(new)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(new) + 1)
        new[at : at + rng.randrange(60)] = rng.randbytes(rng.randrange(60))
    if rng.random() < 0.2:  # bsdiff seeks backwards
        cut = rng.randrange(len(new) + 1)
        new = new[cut:] + new[:cut]
    return bytes(new)


def name(rng: random.Random) -> str:
    parts = [rng.choice(WORDS) for _ in range(rng.randrange(1, 5))]
    if rng.random() < 0.1:
        parts.append("long" * rng.randrange(10, 80))
    if rng.random() < 0.05:
        parts.append("päth\udcff")
    parts.append(rng.choice((".wh.", "", "", "")) + f"f{rng.randrange(1000)}")
    return "/".join(parts)


def entry(rng: random.Random, names: Sequence[str]) -> Entry:
    kind = rng.choice((tarfile.REGTYPE,) * 6 + (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE))
    made = Entry(name(rng), kind, content(rng) if kind == tarfile.REGTYPE else b"", mode=rng.choice((0o644, 0o755)))
    if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        made = replace(made, link=rng.choice(names) if names else "to" * rng.randrange(90))
    if rng.random() < 0.1:
        made = replace(made, pax={"SCHILY.xattr.security.capability": "x" * rng.randrange(900)})
    if rng.random() < 0.1:
        made = replace(made, uid=rng.choice((1000, 2**21 - 1)), mtime=rng.choice((0, 1, 2**33 - 1)))
    return made


def layer(rng: random.Random) -> list[Entry]:
    entries: list[Entry] = []
    for _ in range(rng.choice((0, 1, 3, 8))):
        entries.append(entry(rng, [each.name for each in entries]))
    return entries


def changed(rng: random.Random, layers: Sequence[Sequence[Entry]]) -> list[Entry]:
    """A target layer, mostly of what is in the base."""
    pool = [each for entries in layers for each in entries]
    entries = list(rng.choice(layers)) if rng.random() < 0.7 else rng.sample(pool, rng.randrange(len(pool) + 1))
    stamp = rng.choice((None, 1_800_000_000))
    out = []
    for each in entries:
        match rng.randrange(10):
            case 0:
                continue
            case 1:
                each = replace(each, name=name(rng))
            case 2:
                each = replace(each, mode=each.mode ^ 0o111)
            case 3 | 4 | 5 if each.kind == tarfile.REGTYPE:
                each = replace(each, data=edited(rng, each.data))
            case 6:
                out.append(each)  # a path that occurs twice
        out.append(replace(each, mtime=stamp) if stamp else each)
    if rng.random() < 0.3:
        out += layer(rng)
    if rng.random() < 0.3:
        rng.shuffle(out)
    return out


def random_pairs(seed: int, count: int) -> tuple[list[bytes], list[bytes]]:
    """(the layers of a base, so many target layers), always the same for a seed."""
    rng = random.Random(seed)
    layers = [layer(rng) for _ in range(rng.randrange(1, 4))]
    form = rng.choice(FORMATS)
    targets = [tar_of(changed(rng, layers), rng.choice((form, form, *FORMATS)), rng) for _ in range(count)]
    return [tar_of(each, form, rng) for each in layers], targets


def random_pair(seed: int) -> tuple[list[bytes], bytes]:
    """(the layers of a base, a target layer), always the same for a seed."""
    layers, (target,) = random_pairs(seed, 1)
    return layers, target


@contextmanager
def opened(*tars: bytes) -> Iterator[list[LayerTar]]:
    """Tars as files."""
    fds: list[int] = []
    try:
        for data in tars:
            fd = os.memfd_create("tar")
            fds.append(fd)
            os.write(fd, data)
        yield [LayerTar(fd) for fd in fds]
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def opened_base(layers: Sequence[bytes]) -> Iterator[TarBase]:
    with opened(*layers) as tars:
        yield TarBase(tars)
