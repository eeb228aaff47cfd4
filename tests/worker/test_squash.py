"""Squash: one layer in the place of several shows the same files, whatever lies below."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
from pathlib import Path

import pytest

from balenapy.engine.workers import python_command
from balenapy.linux import syscalls

pytestmark = pytest.mark.root

NAMES = ("a", "b", "c")
SEEDS = 12


def run(verb: str, arguments: dict[str, object]) -> dict[str, object]:
    done = subprocess.run(
        [*python_command(), verb, json.dumps(arguments)], capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    report = json.loads(done.stdout)
    assert "error" not in report, (report, done.stderr)
    return dict(report)


def random_changes(root: Path, chance: random.Random) -> None:
    """Make, change and remove things in a mounted tree, as a step of a build would."""
    for _ in range(12):
        path = root.joinpath(*(chance.choice(NAMES) for _ in range(chance.randint(1, 3))))
        if not path.parent.is_dir() or path.parent.is_symlink():
            continue
        what = chance.randrange(6)
        if os.path.lexists(path):
            if what < 3:
                subprocess.run(["rm", "-rf", path], check=True)
            elif path.is_dir() and not path.is_symlink():
                os.chmod(path, chance.choice((0o700, 0o755)))
            continue
        if what < 2:
            path.mkdir(0o755)
        elif what == 2:
            path.symlink_to("a")
        elif what == 3:
            files = [one for one in root.rglob("*") if one.is_file() and not one.is_symlink()]
            if files:
                os.link(chance.choice(sorted(files)), path)
        else:
            path.write_text(f"{chance.random()}")


def shown(root: Path) -> dict[str, tuple[object, ...]]:
    """What is seen in a tree."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        target = os.readlink(path) if path.is_symlink() else ""
        found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, content, target)
    return found


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_squashed_layer_shows_what_its_layers_show(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    merged = tmp_path / "merged"
    merged.mkdir()
    layers: list[Path] = []
    for number in range(5):
        upper, work = tmp_path / f"upper{number}", tmp_path / f"work{number}"
        upper.mkdir()
        work.mkdir()
        lower = layers[::-1] or [tmp_path / "empty"]
        lower[0].mkdir(exist_ok=True)
        syscalls.mount_overlay(merged, lower, upper, work)
        try:
            random_changes(merged, chance)
            wanted = shown(merged)
        finally:
            syscalls.umount2(merged)
        layers.append(upper)
    below, above = layers[: seed % 3], layers[seed % 3 :]
    snapshot = tmp_path / "snapshot"
    (snapshot / "diff").mkdir(parents=True)
    arguments = {"directory": str(snapshot), "layers": [*map(str, above)], "lower": [*map(str, below[::-1])]}
    report = run("squash", arguments)
    assert str(report["diff_id"]).startswith("sha256:")
    assert sorted(os.listdir(snapshot)) == ["diff", "tar-split.zst"]

    syscalls.mount_overlay(merged, [snapshot / "diff", *below[::-1], tmp_path / "empty"])
    try:
        assert shown(merged) == wanted
    finally:
        syscalls.umount2(merged)
