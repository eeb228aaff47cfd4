"""Deltas of real pairs of images: bytes, CPU time and memory of making and applying, beside other methods.

    python -m tests.bench.delta PAIRS [--effort fast] [PAIR ...]

PAIRS is a folder of `PAIR/old` and `PAIR/new`, OCI layouts. Every layer is rebuilt and checked against its diff_id.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from delta import artifact, native
from delta.maker import Settings
from delta.oci import open_image


class Reference(NamedTuple):
    """MB of other methods on the same pair, NaN where not measured; the bar of our part of balena's bytes."""

    full: float  # all layers, gzip
    casync: float  # 64 KiB chunks
    balena: float  # librsync delta as balena-engine makes it, gzip
    zstd: float  # -19 --patch-from of the changed tars
    xdelta3: float  # -9, the same
    bsdiff: float  # the same
    bar: float


REFERENCES = {
    "app-few-lines": Reference(69.5, 2.362, 0.0842, 0.0338, 0.0273, 0.0051, 0.03),
    "python-wheels-minor": Reference(93.5, 36.24, 20.98, 9.52, 8.58, math.nan, 0.26),
    "node-runtime-minor": Reference(94.6, 42.13, 14.09, 4.89, 6.79, math.nan, 0.18),
    "debian-security": Reference(69.5, 23.74, 7.394, 3.872, 3.185, math.nan, 0.18),
    "node-red-minor": Reference(95.8, 17.96, 6.047, 3.444, 4.064, math.nan, 0.55),
    "go-binaries": Reference(55.8, 20.87, 15.13, 4.965, 6.819, 2.123, 0.125),
    "rebuild-reordered": Reference(118.0, 17.70, 0.343, 0.287, 0.046, math.nan, 0.04),
}
UNKNOWN = Reference(*[math.nan] * 7)
GEOMETRIC_MEAN_BAR = 0.115
MAKE_CPU_S_BAR = {"default": 120, "fast": 25}


def own_cpu_s() -> float:
    return time.process_time()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def make(old: Path, new: Path, output: Path, effort: str) -> dict[str, Any]:
    report = artifact.make(open_image(old), open_image(new), output, Settings(fast=effort == "fast"))
    sizes = [layer.tar_bytes for layer in report.layers]
    full = sum(layer.blob_bytes for layer in report.layers)
    sums = {"bytes": report.delta_bytes, "config": report.config_bytes, "tar": sum(sizes), "full": full}
    return {**sums, "cpu": own_cpu_s(), "peak": peak_mb()}


def apply(old: Path, delta: Path) -> dict[str, Any]:
    opened = artifact.open_delta(delta)
    with ExitStack() as stack:
        base = artifact.open_base(stack, opened, open_image(old))
        idle = peak_mb()
        started, wall = own_cpu_s(), time.monotonic()
        size = 0
        for layer in opened.layers:
            size += sum(map(len, artifact.rebuild(opened, layer, base, native.DEFAULT_BUDGET_BYTES)))
        cpu = own_cpu_s() - started
        return {"cpu": cpu, "wall": time.monotonic() - wall, "peak": peak_mb(), "idle": idle, "tar": size}


def in_process(*arguments: object) -> dict[str, Any]:
    """One step in a process of its own, for its memory."""
    command = [sys.executable, "-m", "tests.bench.delta", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


def table(pairs: Path, names: list[str], effort: str) -> None:
    print(
        "| pair | changed tar | full gz | changed gz | casync 64k | balena | zstd -19 patch-from | xdelta3 -9 "
        "| whole-tar bsdiff | ours | of balena | bar | make CPU s | make MB | apply CPU s | apply MB/s | apply MB |"
    )
    print("|---" * 17 + "|")
    ratios, missed = [], []
    for name in names or sorted(each.name for each in pairs.iterdir()):
        with tempfile.TemporaryDirectory() as folder:
            made = in_process("--step", "make", pairs / name / "old", pairs / name / "new", folder, "--effort", effort)
            applied = in_process("--step", "apply", pairs / name / "old", folder)
        ours = made["bytes"] / 1e6
        other = REFERENCES.get(name, UNKNOWN)
        ratio = ours / other.balena
        ratios.append(ratio)
        figures = [other.full, made["full"] / 1e6, *other[1:6], ours]
        sizes = " | ".join("–" if math.isnan(each) else f"{each:.4g}" for each in figures)
        speed = applied["tar"] / 1e6 / max(applied["cpu"], 1e-3)
        print(
            f"| {name} | {made['tar'] / 1e6:.0f} | {sizes} | {ratio:.4f} | {other.bar} | {made['cpu']:.1f} "
            f"| {made['peak']:.0f} | {applied['cpu']:.2f} | {speed:.0f} | {applied['peak']:.0f} |",
            flush=True,
        )
        if effort == "default" and (ratio > other.bar or ours > min(other.zstd, other.xdelta3)):
            missed.append(f"{name}: {ours:.4f} MB")
        if made["cpu"] > MAKE_CPU_S_BAR[effort]:
            missed.append(f"{name}: made in {made['cpu']:.0f} CPU s of {MAKE_CPU_S_BAR[effort]}")
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\ngeometric mean of ours/balena: {mean:.4f} (bar {GEOMETRIC_MEAN_BAR})")
    for line in missed:
        print(f"missed: {line}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", choices=("make", "apply"))
    parser.add_argument("--effort", default="default", choices=("default", "fast"))
    parser.add_argument("rest", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "make":
        print(json.dumps(make(*arguments.rest, arguments.effort)))
    elif arguments.step == "apply":
        print(json.dumps(apply(*arguments.rest)))
    else:
        table(arguments.rest[0], [str(each) for each in arguments.rest[1:]], arguments.effort)


if __name__ == "__main__":
    main()
