"""`python -m tests.bench.layers [directory]`: what a worker does with one layer, without engine, registry or network.

Two layers, 20,000 small files (215 MB) and one file of 300 MB, each as gzip, zstd and plain: unpacked, packed into the
exact tar, and packed anew; GNU tar beside it. Wall time holds one syncfs, processor time does not depend on the disk.
And what two ways of writing a tar-split come to. Nothing here asserts.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import zstandard

from balenapy.core import tarsplit
from balenapy.core.tarstream import End, Entry, NeedData, TarReader
from balenapy.engine.workers import python_command


def small_files() -> bytes:
    """20,000 files of 10 kB on average, half noise, in 400 directories."""
    chance = random.Random(1)
    text = Path(random.__file__).read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(20_000):
            size = min(int(chance.expovariate(1 / 10_000)) + 1, 200_000)
            at = chance.randrange(len(text) - 5000)
            content = chance.randbytes(size // 3) + (text[at : at + 5000] * (size // 5000 + 1))
            entry = tarfile.TarInfo(f"usr/lib/package{number // 50}/module_{number}.py")
            entry.size, entry.mtime = size, 1_600_000_000 + number
            archive.addfile(entry, io.BytesIO(content[:size]))
    return buffer.getvalue()


def big_file() -> bytes:
    """300 MB that gzip brings to a third, as it does programs."""
    chance = random.Random(2)
    programs = b"".join(Path(path).read_bytes() for path in (sys.executable, os.path.realpath("/bin/bash")))
    content = b""
    while len(content) < 300_000_000:
        content += chance.randbytes(200_000) + programs
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("usr/bin/big")
        entry.size = 300_000_000
        archive.addfile(entry, io.BytesIO(content[: entry.size]))
    return buffer.getvalue()


def measure(name: str, command: list[str], stdin: Path | None, size: int) -> None:
    """Run once and print: seconds, MB/s of uncompressed tar, processor seconds, greatest resident size."""
    begun = time.perf_counter()
    with (
        open(stdin or os.devnull, "rb") as file,
        subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE) as child,
    ):
        assert child.stdout is not None
        child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    assert child.returncode == 0, name
    print(
        f"{name:28} {seconds:6.2f} s {size / seconds / 1e6:6.0f} MB/s  processor {usage.ru_utime:5.2f} + "
        f"{usage.ru_stime:5.2f} s  {usage.ru_maxrss / 1024:4.0f} MiB",
        flush=True,
    )


def worker(verb: str, directory: Path, **arguments: object) -> list[str]:
    return [*python_command(), verb, json.dumps({"directory": str(directory), **arguments})]


def prepare(shape: str, root: Path) -> None:
    """Write the blobs, and compare the two tar-splits."""
    tar = SHAPES[shape]()
    (root / "plain").write_bytes(tar)
    (root / "gzip").write_bytes(gzip.compress(tar, 6))
    (root / "zstd").write_bytes(zstandard.ZstdCompressor(level=3).compress(tar))
    compare_splits(shape, tar)


def bench_layer(shape: str, root: Path) -> None:
    """All of one layer."""
    # In a process of its own: a child is charged with what its parent had resident when it began.
    preparer = multiprocessing.get_context("spawn").Process(target=prepare, args=(shape, root))
    preparer.start()
    preparer.join()
    size = (root / "plain").stat().st_size
    snapshot = root / "snapshot"
    for form in ("gzip", "zstd", "plain"):
        for program in ("worker", *(("tar",) if form == "gzip" else ())):
            shutil.rmtree(snapshot, ignore_errors=True)
            (snapshot / "diff").mkdir(parents=True)
            os.sync()
            gnu = ["tar", "-xzpf", "-", "-C", str(snapshot / "diff")]
            command = worker("unpack", snapshot) if program == "worker" else gnu
            measure(f"{shape} {form}: {'unpack' if program == 'worker' else 'GNU tar -x'}", command, root / form, size)
    measure(f"{shape}: pack exactly", worker("pack", snapshot), None, size)
    measure(f"{shape}: pack, gzip", worker("pack", snapshot, compression="gzip"), None, size)
    measure(f"{shape}: pack anew", worker("pack", snapshot, fresh=True), None, size)
    shutil.rmtree(snapshot)


def compare_splits(name: str, tar: bytes) -> None:
    """Our records and the JSON lines of vbatts/tar-split, made of the same events and compressed alike."""
    reader = TarReader()
    reader.feed(tar)
    raws: list[bytes] = []
    files: dict[int, tuple[int, int, bytes]] = {}
    over = False
    while not isinstance(event := reader.next_event(), NeedData):
        if isinstance(event, Entry | End):
            raws.append(event.raw)
            over = isinstance(event, End)
            path = b"" if over else event.name
        elif not over:
            files[len(raws) - 1] = (len(event), zlib.crc32(event), path)
    begun = time.process_time()
    own = [tarsplit.encode_segment(raw) for raw in raws]
    own += [tarsplit.encode_file(*file) for file in files.values()]
    own_seconds = time.process_time() - begun
    begun = time.process_time()
    lines = []
    for position, raw in enumerate(raws):
        lines.append(json.dumps({"type": 2, "payload": base64.b64encode(raw).decode(), "position": position}))
        if position in files:
            size, crc, path = files[position]
            payload = base64.b64encode(crc.to_bytes(8, "big")).decode()
            lines.append(json.dumps({"type": 1, "name": path.decode(), "size": size, "payload": payload}))
    json_seconds = time.process_time() - begun
    compressor = zstandard.ZstdCompressor(level=3)
    sizes = [len(compressor.compress(data)) for data in (b"".join(own), "\n".join(lines).encode())]
    print(
        f"{name}: tar-split as records {sizes[0]} bytes, {own_seconds:.3f} s; as JSON lines {sizes[1]} bytes, "
        f"{json_seconds:.3f} s"
    )


SHAPES = {"20,000 files": small_files, "one big file": big_file}


def main() -> None:
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    for shape in SHAPES:
        with tempfile.TemporaryDirectory(prefix="bench", dir=where) as root:
            bench_layer(shape, Path(root))
    print(f"{os.cpu_count()} processors")


if __name__ == "__main__":
    main()
