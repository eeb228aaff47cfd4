"""Command line `balenapy-delta`: reads arguments, calls the makers and readers, prints."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from delta import librsync
from delta.errors import DeltaError, Unsupported


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="balenapy-delta", description="Make and apply deltas of images.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="make a delta from OLD to NEW")
    make.add_argument("old", type=Path)
    make.add_argument("new", type=Path)
    apply = verbs.add_parser("apply", help="apply a delta to OLD")
    apply.add_argument("delta", type=Path)
    apply.add_argument("old", type=Path)
    for verb in (make, apply):
        verb.add_argument("-o", "--output", type=Path, required=True)
        verb.add_argument("--format", choices=("librsync",), default="librsync")
    arguments = parser.parse_args(argv)
    try:
        {"make": _make, "apply": _apply}[arguments.verb](arguments)
    except (DeltaError, OSError) as error:
        print(f"balenapy-delta: {error}", file=sys.stderr)
        return 1
    return 0


def _make(arguments: argparse.Namespace) -> None:
    if arguments.old.is_dir() or arguments.new.is_dir():
        raise Unsupported("deltas of image layouts are not built yet")
    with arguments.old.open("rb") as old:
        signature = librsync.parse_signature(b"".join(librsync.make_signature(old.read)))
    with arguments.output.open("wb") as out:
        librsync.delta_from_signature(signature, arguments.new.read_bytes(), out.write)


def _apply(arguments: argparse.Namespace) -> None:
    with arguments.old.open("rb") as old, arguments.delta.open("rb") as delta, arguments.output.open("wb") as out:
        fd = old.fileno()
        pieces = librsync.patch(delta.read, lambda at, n: os.pread(fd, n, at), os.fstat(fd).st_size)
        for piece in pieces:
            out.write(piece)


if __name__ == "__main__":
    sys.exit(main())
