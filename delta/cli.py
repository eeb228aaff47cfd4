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
from tempfile import TemporaryDirectory

from delta import artifact, balenaimage, librsync, native, publish, sections
from delta.errors import DeltaError, Malformed, Unsupported, WrongBase, WrongResult
from delta.inspection import inspect
from delta.maker import Settings
from delta.match import BaseIndex
from delta.oci import Image, LayoutWriter, fetch_image, open_image
from delta.registry import Reference, Repository, parse_reference

BAR_CELLS = 30

def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 done, 1 failed, 2 wrong usage."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (DeltaError, OSError) as error:
        print(f"balenapy-delta: {error}", file=sys.stderr)
        return 1
    return 0


IMAGE = "OCI layout folder, docker-archive, or reference in a registry"
DELTA = "OCI layout folder, or reference in a registry: of a delta, or of the image it leads to"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="balenapy-delta", description="Make, publish and apply deltas of images.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    make = verbs.add_parser("make", help="make the delta from image OLD to image NEW")
    make.add_argument("old", metavar="OLD", nargs="?", help=f"{IMAGE}; left out with --against-last")
    make.add_argument("new", metavar="NEW", help=IMAGE)
    make.add_argument("-o", "--output", type=Path, required=True, help="the delta, an OCI layout")
    make.add_argument(
        "--against-last", type=int, metavar="N", help="make those from the N newest other images of NEW's repository"
    )
    make.add_argument("--tags", default="*", metavar="PATTERN", help="of which tags these may be (default: *)")
    make.add_argument("--format", choices=("native", "tar-diff", "librsync", "balena"), default="native")
    make.add_argument("--effort", choices=("default", "fast"), default="default")
    make.add_argument("--jobs", type=int, default=1, help="files worked on at once (default: 1)")
    make.add_argument("--codecs", default="bsdiff,zstd", help="what may be used (default: bsdiff,zstd)")
    make.set_defaults(run=_make)

    apply = verbs.add_parser("apply", help="rebuild the changed layers of NEW from DELTA and OLD")
    apply.add_argument("delta", metavar="DELTA", help=DELTA)
    apply.add_argument("old", metavar="OLD", help=IMAGE)
    apply.add_argument("-o", "--output", type=Path, required=True, help="folder for the layer tars")
    apply.set_defaults(run=_apply)

    verify = verbs.add_parser("verify", help="check that DELTA and OLD give every layer of its target")
    verify.add_argument("delta", metavar="DELTA", help=DELTA)
    verify.add_argument("old", metavar="OLD", help=IMAGE)
    verify.set_defaults(run=_verify)

    inspecting = verbs.add_parser("inspect", help="say what is in DELTA")
    inspecting.add_argument("delta", metavar="DELTA", help=DELTA)
    inspecting.add_argument("old", metavar="OLD", nargs="?", help=f"{IMAGE}: then every file is told of, and why")
    inspecting.add_argument("--all", action="store_true", help="also files that are copied from the same path")
    inspecting.set_defaults(run=_inspect)

    push = verbs.add_parser("push", help="upload the deltas in DELTA to the repository of the image they lead to")
    push.add_argument("delta", metavar="DELTA", type=Path, help="OCI layout folder")
    push.add_argument("repository", metavar="REPOSITORY[:TAG]", help="the image's; its tag, if it came from an archive")
    push.set_defaults(run=_push)

    prune = verbs.add_parser("prune", help="drop the deltas whose base or target is gone from a repository")
    prune.add_argument("repository", metavar="REPOSITORY")
    prune.add_argument("--tagged", action="store_true", help="an image that no tag leads to counts as gone")
    prune.add_argument("--dry-run", action="store_true", help="only say which")
    prune.set_defaults(run=_prune)

    for verb in (make, apply, verify, inspecting):
        verb.add_argument("--platform", help="os/architecture[/variant], when an index has several images")
        verb.add_argument(
            "--device-memory",
            type=int,
            default=native.DEFAULT_BUDGET_BYTES >> 20,
            metavar="MIB",
            help="what applying may take (default: 48)",
        )
    for verb in (make, apply, verify, inspecting, push, prune):
        verb.add_argument("--insecure", action="store_true", help="take any certificate, or plain HTTP")
        verb.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser


class _Images:
    """Opens what the command line names; what comes out of registries lies in a folder that goes with the command."""

    def __init__(self, stack: ExitStack, arguments: argparse.Namespace) -> None:
        self._stack = stack
        self._insecure = arguments.insecure
        self._platform = getattr(arguments, "platform", None)
        self.bar = stack.enter_context(_Bar(arguments.quiet))
        self._folder: Path | None = None

    def folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="balenapy-delta-")))
        return self._folder

    def repository(self, name: str, actions: str = "pull") -> tuple[Repository, Reference]:
        reference = parse_reference(name)
        return Repository(reference, insecure=self._insecure, actions=actions), reference

    def open(self, name: str) -> Image:
        if _is_local(name):
            return open_image(Path(name), self._platform)
        repository, reference = self.repository(name)
        return self.fetch(repository, reference.named)

    def fetch(self, repository: Repository, named: str) -> Image:
        return fetch_image(
            repository, named, self.folder(), self._platform, lambda done, total: self.bar("fetching", done, total)
        )

    def delta(self, name: str) -> Path:
        """A layout with the delta in it."""
        if _is_local(name):
            return Path(name)
        repository, reference = self.repository(name)
        folder = self.folder() / "delta"
        publish.fetch(repository, reference.named, folder)
        return folder


def _is_local(name: str) -> bool:
    """A file, or nothing but one."""
    return Path(name).exists() or name.startswith(("/", "./", "../"))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f} MB" if size >= 100_000 else f"{size} bytes"


class _Bar:
    """A line that is written over; silent where nobody looks."""

    def __init__(self, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._next = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self._shown or (time.monotonic() < self._next and done < total):
            return
        self._next = time.monotonic() + 0.1
        full = BAR_CELLS * done // max(1, total)
        cells = "#" * full + "." * (BAR_CELLS - full)
        line = f"{what} [{cells}] {100 * done // max(1, total):3d}% of {total / 1e6:.1f} MB"
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def layer(self, layer: int, done: int, total: int) -> None:
        self(f"layer {layer}", done, total)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _make(arguments: argparse.Namespace) -> None:
    if arguments.format == "librsync":
        _make_librsync(Path(arguments.old), Path(arguments.new), arguments.output)
        return
    codecs = frozenset(arguments.codecs.split(","))
    if not codecs <= {"bsdiff", "zstd"}:
        raise Unsupported(f"--codecs {arguments.codecs}: only bsdiff and zstd")
    settings = Settings(
        fast=arguments.effort == "fast",
        jobs=max(1, arguments.jobs),
        codecs=codecs,
        device_bytes=arguments.device_memory << 20,
    )
    with ExitStack() as stack:
        images = _Images(stack, arguments)
        new = images.open(arguments.new)
        writer = LayoutWriter(arguments.output)
        for name, old in _bases(images, arguments, new):
            if arguments.format == "tar-diff":
                print(f"from {name}\n  delta: {_megabytes(artifact.write_tar_diffs(writer, old, new))}")
                continue
            if arguments.format == "balena":
                print(f"from {name}\n  delta: {_megabytes(balenaimage.write(writer, old, new))}")
                continue
            report = artifact.write(writer, old, new, settings, images.bar.layer)
            images.bar.clear()
            _print_report(name, report)
        writer.close()


def _bases(images: _Images, arguments: argparse.Namespace, new: Image) -> Iterator[tuple[str, Image]]:
    """The images that deltas are to lead from."""
    if arguments.against_last is None:
        if arguments.old is None:
            raise Unsupported("make: name OLD and NEW, or --against-last N and NEW")
        yield arguments.old, images.open(arguments.old)
        return
    if arguments.old is not None or arguments.against_last < 1 or _is_local(arguments.new):
        raise Unsupported("make: --against-last N needs one reference in a registry, NEW, and N of at least 1")
    repository, _ = images.repository(arguments.new)
    found = publish.latest(repository, arguments.tags, new.config, arguments.against_last)
    for tagged in found:
        yield f"{repository}:{tagged.tag}", images.fetch(repository, tagged.manifest)
    if not found:
        print(f"{repository}: no other image of this platform: nothing to do")


def _print_report(name: str, report: artifact.Report) -> None:
    print(f"from {name}")
    full = 0
    for layer in report.layers:
        full += layer.blob_bytes
        print(f"  layer {layer.layer}: {_megabytes(layer.blob_bytes)} -> {_megabytes(layer.delta_bytes)}")
        ways = Counter(line.how for line in layer.lines)
        print("    " + ", ".join(f"{count} {how}" for how, count in ways.most_common()))
    print(f"  delta: {_megabytes(report.delta_bytes)} instead of {_megabytes(full)}")


def _push(arguments: argparse.Namespace) -> None:
    with ExitStack() as stack:
        repository, reference = _Images(stack, arguments).repository(arguments.repository, "pull,push")
        for pushed in publish.push(arguments.delta, repository, reference.tag):
            print(f"{pushed.digest}: leads to {pushed.target}, found by {pushed.found_by}")
            print(f"  {_megabytes(pushed.blob_bytes)} of blobs sent")


def _prune(arguments: argparse.Namespace) -> None:
    with ExitStack() as stack:
        repository, _ = _Images(stack, arguments).repository(arguments.repository, "pull,push,delete")
        deletes = publish.prune(
            repository,
            tagged=arguments.tagged,
            dry_run=arguments.dry_run,
            report=lambda dropped: print(f"{dropped.digest}: {dropped.why}"),
        )
        if not deletes:
            print(f"{repository}: the registry deletes no manifests; only the indexes were cleared", file=sys.stderr)


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
    if Path(arguments.delta).is_file():
        _apply_librsync(Path(arguments.delta), Path(arguments.old), arguments.output)
        return
    with ExitStack() as stack:
        for diff_id, pieces in _rebuilt(stack, arguments):
            if pieces is not None:
                _write_layer(arguments.output, diff_id, pieces)


def _rebuilt(stack: ExitStack, arguments: argparse.Namespace) -> Iterator[tuple[str, Iterator[bytes] | None]]:
    """(diff_id, pieces of the tar) of the target's layers; no pieces of those that the base has."""
    images = _Images(stack, arguments)
    path, old = images.delta(arguments.delta), images.open(arguments.old)
    budget_bytes = arguments.device_memory << 20
    delta_image = balenaimage.find(path)
    if delta_image is not None:
        yield from balenaimage.rebuild(delta_image, old)
        return
    tar_diffs = artifact.open_tar_diffs(path)
    for tar_diff in tar_diffs:
        if tar_diff.source in old.diff_ids:
            yield tar_diff.target, artifact.rebuild_tar_diff(tar_diff, old, budget_bytes)
    if tar_diffs:
        return
    opened = artifact.open_delta(path, old.diff_ids)
    base = artifact.open_base(stack, opened, old)
    for layer, diff_id in enumerate(opened.target_diff_ids):
        if layer in opened.layers:
            yield diff_id, artifact.rebuild(opened, layer, base, budget_bytes)
        elif diff_id in old.diff_ids:
            yield diff_id, None
        else:
            raise WrongResult(f"layer {layer}: {diff_id} is neither in the delta nor in the base")


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
    with ExitStack() as stack:
        verified = 0
        for diff_id, pieces in _rebuilt(stack, arguments):
            verified += 1
            if pieces is None:
                print(f"{diff_id}: in the base")
            else:
                print(f"{diff_id}: {_megabytes(sum(map(len, pieces)))} rebuilt")
        if not verified:
            raise WrongBase(f"{arguments.delta}: nothing of it is for this base")


def _inspect(arguments: argparse.Namespace) -> None:
    with ExitStack() as stack:
        images = _Images(stack, arguments)
        path = images.delta(arguments.delta)
        deltas = artifact.open_deltas(path)
        old = images.open(arguments.old) if arguments.old else None
        if old:
            deltas = [artifact.open_delta(path, old.diff_ids)]
        for opened in deltas:
            _print_delta(opened)
        if old:
            _print_files(stack, deltas[0], old, arguments.all)
        if not deltas:
            raise Malformed(f"{path}: no delta")


def _print_delta(opened: artifact.Delta) -> None:
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


def _print_files(stack: ExitStack, opened: artifact.Delta, old: Image, everything: bool) -> None:
    index = BaseIndex(artifact.open_base(stack, opened, old))
    for layer in opened.layers:
        with opened.blob(layer).open("rb") as file:
            fd = file.fileno()
            lines = inspect(lambda offset, length, fd=fd: os.pread(fd, length, offset), index)  # type: ignore[misc]
        print(f"\nlayer {layer}\n{'':8} {'bytes':>11} {'in delta':>9}  file")
        untold = 0
        for line in lines:
            if line.how == "copied" and line.why.endswith("the same path") and not everything:
                untold += 1
                continue
            path = line.path.decode(errors="replace")
            print(f"{line.how:8} {line.size:>11} {line.delta_bytes:>9}  {path}: {line.why}")
        if untold:
            print(f"copied   and {untold} files with the same content at the same path")


if __name__ == "__main__":
    sys.exit(main())
