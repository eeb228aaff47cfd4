"""What .ci/constraints.txt pins: the engine's own share of it, for the images and for the Yocto layer.

The file pins tests and linters too; `# via` comments say who wants a package. The engine's share is what can be
reached from setup.cfg's `install_requires`.
"""

from __future__ import annotations

import configparser
import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OURSELVES = "balenapy (setup.cfg)"


@dataclass(frozen=True, slots=True)
class Pin:
    name: str  # as the package index writes it: lower case, dashes
    version: str
    hashes: tuple[str, ...]  # sha256 of each file of that version, hex
    via: tuple[str, ...]  # who wants it


def canonical(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_constraints(text: str) -> dict[str, Pin]:
    """Every pin of a constraints file with hashes, by name."""
    pins: dict[str, Pin] = {}
    name = version = ""
    hashes: list[str] = []
    via: list[str] = []

    def finish() -> None:
        if name:
            pins[name] = Pin(name, version, tuple(hashes), tuple(via))

    for line in text.splitlines():
        head = re.match(r"([A-Za-z0-9._-]+)==([^\s\\]+)", line)
        if head:
            finish()
            name, version, hashes, via = canonical(head[1]), head[2], [], []
        elif digest := re.search(r"--hash=sha256:([0-9a-f]{64})", line):
            hashes.append(digest[1])
        elif (wanted := re.match(r"\s+#\s+(?:via\s+)?(\S.*)$", line)) and wanted[1] != "via":
            via.append(wanted[1])
    finish()
    return pins


def engine_pins(repository: Path = REPOSITORY) -> list[Pin]:
    """The packages that a device needs beside the engine, sorted by name."""
    pins = parse_constraints((repository / ".ci" / "constraints.txt").read_text())
    setup = configparser.ConfigParser()
    setup.read(repository / "setup.cfg")
    required = {
        canonical(re.split(r"[<>=!~;\s\[]", line, maxsplit=1)[0])
        for line in setup["options"]["install_requires"].split("\n")
        if line.strip()
    }
    if missing := required - set(pins):
        raise LookupError(f"not pinned in .ci/constraints.txt: {', '.join(sorted(missing))}")
    found: set[str] = set()
    more = required
    while more:
        found |= more
        more = {name for name, pin in pins.items() if name not in found and found & {canonical(v) for v in pin.via}}
    return [pins[name] for name in sorted(found)]


def engine_version(repository: Path = REPOSITORY) -> str:
    text = (repository / "balenapy" / "__init__.py").read_text()
    match = re.search(r'__version__ = "([^"]+)"', text)
    if match is None:
        raise LookupError("balenapy/__init__.py names no version")
    return match[1]
