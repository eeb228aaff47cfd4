"""Texts and decisions of the A/B switch: pure. The image builder uses them too.

systemd-boot counts boots in the entry's name: `slot-b+3.conf` may be started three times, `slot-b+2-1.conf` has been
once, `slot-b+0-3.conf` is bad and comes last; `slot-b.conf` is good. A Raspberry Pi has `autoboot.txt`, whose
`[tryboot]` section counts for one boot, if the kernel hands the flag on; else the initrd counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

TRIES = 3
AUTOBOOT_BYTES = 512  # what the firmware reads, and what a card writes at once
BOOT_PARTITIONS = {"a": 2, "b": 3}
_ENTRY = re.compile(r"slot-([ab])(?:\+(\d+)(?:-(\d+))?)?\.conf")


@dataclass(frozen=True, slots=True)
class Entry:
    name: str  # of the file
    slot: str
    tries_left: int | None  # None: good

    @property
    def bad(self) -> bool:
        return self.tries_left == 0


def other(slot: str) -> str:
    return "b" if slot == "a" else "a"


def running_slot(command_line: str) -> str | None:
    match = re.search(r"(?:^|\s)balenapy\.slot=([ab])(?:\s|$)", command_line)
    return match[1] if match else None


def read_entry(name: str) -> Entry | None:
    match = _ENTRY.fullmatch(name)
    return Entry(name, match[1], int(match[2]) if match[2] else None) if match else None


def entries_of(names: Iterable[str], slot: str) -> list[Entry]:
    return [entry for name in sorted(names) if (entry := read_entry(name)) is not None and entry.slot == slot]


def next_sequence(texts: Iterable[str]) -> int:
    """The `version` of the entry to be written: above all that are there."""
    found = [int(match[1]) for text in texts if (match := re.search(r"^version (\d+)$", text, re.MULTILINE))]
    return max(found, default=0) + 1


def loader_entry(slot: str, sequence: int, release: str, command_line: str) -> str:
    """A boot loader entry. The highest `version` is started first."""
    return (
        f"title balenapy {release} (slot {slot.upper()})\nsort-key balenapy\nversion {sequence}\n"
        f"linux /slot-{slot}/linux\ninitrd /slot-{slot}/initrd\noptions {command_line.replace('{slot}', slot)}\n"
    )


def autoboot(slot: str) -> str:
    """Padded to one sector: it is written in place, so that a cut leaves the old or the new."""
    default, tried = BOOT_PARTITIONS[slot], BOOT_PARTITIONS[other(slot)]
    text = f"[all]\ntryboot_a_b=1\nboot_partition={default}\n[tryboot]\nboot_partition={tried}\n"
    return text.ljust(AUTOBOOT_BYTES - 1) + "\n"


def default_slot(autoboot_text: str) -> str | None:
    """The slot an autoboot.txt starts when nothing is tried."""
    section = "all"
    for line in autoboot_text.splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line.strip("[]")
        elif section == "all" and (match := re.fullmatch(r"boot_partition=(\d+)", line)):
            return next((slot for slot, number in BOOT_PARTITIONS.items() if number == int(match[1])), None)
    return None


def delta_name(name: str, release: str) -> str:
    """Where the difference to a release lies, if it is offered: beside the whole."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.from-{release}.{suffix}" if dot else f"{name}.from-{release}"
