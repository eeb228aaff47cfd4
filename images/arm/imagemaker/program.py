"""Running other programs: what they say is shown when they fail."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class Failed(Exception):
    """The image cannot be made; the text says why."""


def say(text: str) -> None:
    print(f"build: {text}", file=sys.stderr, flush=True)


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> str:
    """Run a program and return its output.

    Raises: Failed, with what it said.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, cwd=cwd, env={**os.environ, "LC_ALL": "C", **(env or {})}, input=stdin, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Failed(f"{words[0]}: not installed (see images/arm/README.md)") from error
    if done.returncode:
        raise Failed(f"{shlex.join(words)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout
