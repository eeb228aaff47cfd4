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
from typing import Any

from delta import artifact, native
from delta.maker import Settings
from delta.oci import open_image

# MB of other methods on the same pairs: a gzip'd librsync delta as balena-engine makes it, zstd -19 --patch-from and
# xdelta3 -9 of the whole changed tars; then the bar of our part of balena's bytes.
REFERENCES: dict[str, tuple[float, float, float, float]] = {
    "app-few-lines": (0.0842, 0.0338, 0.0273, 0.03),
    "python-wheels-minor": (20.98, 9.52, 8.58, 0.26),
    "node-runtime-minor": (14.09, 4.89, 6.79, 0.18),
    "debian-security": (7.394, 3.872, 3.185, 0.18),
    "node-red-minor": (6.047, 3.444, 4.064, 0.55),
    "go-binaries": (15.13, 4.965, 6.819, 0.125),
    "rebuild-reordered": (0.343, 0.287, 0.046, 0.04),
}
GEOMETRIC_MEAN_BAR = 0.115


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
        "| pair | changed tar MB | changed gz MB | balena | zstd | xdelta3 | ours | ours/balena | bar "
        "| make CPU s | make MB | apply CPU s | apply MB/s | apply MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    ratios = []
    for name in names or sorted(each.name for each in pairs.iterdir()):
        with tempfile.TemporaryDirectory() as folder:
            made = in_process("--step", "make", pairs / name / "old", pairs / name / "new", folder, "--effort", effort)
            applied = in_process("--step", "apply", pairs / name / "old", folder)
        ours = made["bytes"] / 1e6
        balena, zstd, xdelta, bar = REFERENCES.get(name, (math.nan,) * 4)
        ratios.append(ours / balena)
        print(
            f"| {name} | {made['tar'] / 1e6:.0f} | {made['full'] / 1e6:.3f} | {balena} | {zstd} | {xdelta} "
            f"| {ours:.4f} | {ratios[-1]:.4f} | {bar} | {made['cpu']:.1f} | {made['peak']:.0f} "
            f"| {applied['cpu']:.2f} | {applied['tar'] / 1e6 / max(applied['cpu'], 1e-3):.0f} "
            f"| {applied['peak']:.0f} |",
            flush=True,
        )
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\ngeometric mean of ours/balena: {mean:.4f} (bar {GEOMETRIC_MEAN_BAR})")


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
