"""Command line `balenapy-delta`: reads arguments, calls the makers and readers, prints."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from delta import artifact, librsync, native, sections
from delta.errors import DeltaError, Unsupported, WrongResult
from delta.maker import Settings
from delta.oci import Image, open_image

ABSENT = ("push", "prune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 done, 1 failed, 2 wrong usage."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (DeltaError, OSError) as error:
        print(f"balenapy-delta: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="balenapy-delta", description="Make and apply deltas of images.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    make = verbs.add_parser("make", help="make the delta from image OLD to image NEW")
    make.add_argument("old", metavar="OLD", help="OCI layout folder or docker-archive")
    make.add_argument("new", metavar="NEW", help="OCI layout folder or docker-archive")
    make.add_argument("-o", "--output", type=Path, required=True, help="the delta, an OCI layout")
    make.add_argument("--format", choices=("native", "tar-diff", "librsync", "balena"), default="native")
    make.add_argument("--platform", help="os/architecture[/variant], when an index has several images")
    make.add_argument("--effort", choices=("default", "fast"), default="default")
    make.add_argument("--jobs", type=int, default=1, help="files worked on at once (default: 1)")
    make.add_argument("--codecs", default="bsdiff,zstd", help="what may be used (default: bsdiff,zstd)")
    make.add_argument("-q", "--quiet", action="store_true", help="no progress")
    make.set_defaults(run=_make)

    apply = verbs.add_parser("apply", help="rebuild the changed layers of NEW from DELTA and OLD")
    apply.add_argument("delta", metavar="DELTA", type=Path)
    apply.add_argument("old", metavar="OLD")
    apply.add_argument("-o", "--output", type=Path, required=True, help="folder for the layer tars")
    apply.set_defaults(run=_apply)

    verify = verbs.add_parser("verify", help="check that DELTA and OLD give every layer of its target")
    verify.add_argument("delta", metavar="DELTA", type=Path)
    verify.add_argument("old", metavar="OLD")
    verify.set_defaults(run=_verify)

    inspect = verbs.add_parser("inspect", help="say what is in DELTA")
    inspect.add_argument("delta", metavar="DELTA", type=Path)
    inspect.set_defaults(run=_inspect)

    for verb in (apply, verify):
        verb.add_argument("--platform", help="os/architecture[/variant], when an index has several images")
        verb.add_argument(
            "--device-memory", type=int, default=native.DEFAULT_BUDGET_BYTES >> 20, help="MiB (default: 48)"
        )
    for name in ABSENT:
        absent = verbs.add_parser(name, help="not built yet")
        absent.add_argument("rest", nargs="*")
        absent.set_defaults(run=_absent)
    return parser


def _absent(arguments: argparse.Namespace) -> None:
    raise Unsupported(f"{arguments.verb} is not built yet")


def _image(name: str, platform: str | None) -> Image:
    path = Path(name)
    if not path.exists():
        raise Unsupported(f"{name}: no such file; registry references are not built yet")
    return open_image(path, platform)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f} MB" if size >= 100_000 else f"{size} bytes"


class _Bar:
    """A line that is written over; silent where nobody looks."""

    def __init__(self, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._next = 0.0

    def __call__(self, layer: int, done: int, total: int) -> None:
        if self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.1
            print(f"\rlayer {layer}: {100 * done // max(1, total):3d}%", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            print("\r" + " " * 20 + "\r", end="", file=sys.stderr, flush=True)


def _make(arguments: argparse.Namespace) -> None:
    if arguments.format == "librsync":
        _make_librsync(Path(arguments.old), Path(arguments.new), arguments.output)
        return
    if arguments.format == "balena":
        raise Unsupported("--format balena is not built yet; librsync deltas of files are: --format librsync")
    if arguments.format == "tar-diff":
        old, new = _image(arguments.old, arguments.platform), _image(arguments.new, arguments.platform)
        print(f"delta: {_megabytes(artifact.make_tar_diffs(old, new, arguments.output))}")
        return
    codecs = frozenset(arguments.codecs.split(","))
    if not codecs <= {"bsdiff", "zstd"}:
        raise Unsupported(f"--codecs {arguments.codecs}: only bsdiff and zstd")
    old, new = _image(arguments.old, arguments.platform), _image(arguments.new, arguments.platform)
    bar = _Bar(arguments.quiet)
    settings = Settings(fast=arguments.effort == "fast", jobs=max(1, arguments.jobs), codecs=codecs)
    report = artifact.make(old, new, arguments.output, settings, bar)
    bar.close()
    full = 0
    for layer in report.layers:
        full += layer.blob_bytes
        print(f"layer {layer.layer}: {_megabytes(layer.blob_bytes)} -> {_megabytes(layer.delta_bytes)}")
        ways = Counter(line.how for line in layer.lines)
        print("  " + ", ".join(f"{count} {how}" for how, count in ways.most_common()))
    print(f"delta: {_megabytes(report.delta_bytes)} instead of {_megabytes(full)}")


def _make_librsync(old: Path, new: Path, output: Path) -> None:
    if old.is_dir() or new.is_dir():
        raise Unsupported("librsync deltas of images are not built yet, only of files")
    with old.open("rb") as file:
        signature = librsync.parse_signature(b"".join(librsync.make_signature(file.read)))
    with output.open("wb") as out:
        librsync.delta_from_signature(signature, new.read_bytes(), out.write)


def _apply_librsync(delta: Path, old: Path, output: Path) -> None:
    with old.open("rb") as base, delta.open("rb") as file, output.open("wb") as out:
        fd = base.fileno()
        for piece in librsync.patch(file.read, lambda at, n: os.pread(fd, n, at), os.fstat(fd).st_size):
            out.write(piece)


def _apply(arguments: argparse.Namespace) -> None:
    if arguments.delta.is_file():
        _apply_librsync(arguments.delta, Path(arguments.old), arguments.output)
        return
    budget_bytes = arguments.device_memory << 20
    old = _image(arguments.old, arguments.platform)
    tar_diffs = artifact.open_tar_diffs(arguments.delta)
    for tar_diff in tar_diffs:
        _write_layer(arguments.output, tar_diff.target, artifact.rebuild_tar_diff(tar_diff, old, budget_bytes))
    if tar_diffs:
        return
    opened = artifact.open_delta(arguments.delta)
    with ExitStack() as stack:
        base = artifact.open_base(stack, opened, old)
        for layer in opened.layers:
            pieces = artifact.rebuild(opened, layer, base, budget_bytes)
            _write_layer(arguments.output, opened.target_diff_ids[layer], pieces)


def _write_layer(folder: Path, diff_id: str, pieces: Iterator[bytes]) -> None:
    """Write a layer's tar; only when all of it came out right has it its name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{diff_id.removeprefix('sha256:')}.tar"
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as out:
            for piece in pieces:
                out.write(piece)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(path)


def _verify(arguments: argparse.Namespace) -> None:
    old = _image(arguments.old, arguments.platform)
    tar_diffs = artifact.open_tar_diffs(arguments.delta)
    for tar_diff in tar_diffs:
        size = sum(map(len, artifact.rebuild_tar_diff(tar_diff, old, arguments.device_memory << 20)))
        print(f"{tar_diff.target}: {_megabytes(size)} rebuilt")
    if tar_diffs:
        return
    opened = artifact.open_delta(arguments.delta)
    with ExitStack() as stack:
        base = artifact.open_base(stack, opened, old)
        for layer, diff_id in enumerate(opened.target_diff_ids):
            if layer in opened.layers:
                size = sum(map(len, artifact.rebuild(opened, layer, base, arguments.device_memory << 20)))
                print(f"layer {layer}: {diff_id}: {_megabytes(size)} rebuilt")
            elif diff_id in old.diff_ids:
                print(f"layer {layer}: {diff_id}: in the base")
            else:
                raise WrongResult(f"layer {layer}: {diff_id} is neither in the delta nor in the base")


def _inspect(arguments: argparse.Namespace) -> None:
    opened = artifact.open_delta(arguments.delta)
    print(f"base    {opened.base_config}\ntarget  {opened.target_config}")
    for layer in opened.layers:
        with opened.blob(layer).open("rb") as file:
            fd = file.fileno()
            head, start = native.read_head(lambda offset, length, fd=fd: os.pread(fd, length, offset))  # type: ignore[misc]
            size = os.fstat(fd).st_size
        print(f"layer {layer}: {_megabytes(head.target_bytes)} from {_megabytes(size)}, head {start} bytes")
        print(f"  memory to apply: {(head.memory_bytes + native.OWN_BYTES) / (1 << 20):.1f} MiB")
        for name, section in zip(sections.SECTION_NAMES, head.sections, strict=True):
            codec = ("stored", "lzma", "zstd")[section.codec]
            print(f"  {name:8} {section.plain_bytes:>11} -> {section.stored_bytes:>9} {codec}")


if __name__ == "__main__":
    sys.exit(main())
