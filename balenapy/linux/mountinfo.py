"""What /proc/self/mountinfo says about one path: the mount it lies on, and how that propagates. proc(5)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

_OCTAL = re.compile(rb"\\([0-7]{3})")  # how mountinfo writes blanks


@dataclass(frozen=True, slots=True)
class Mount:
    mount_point: str
    shared: bool
    slave: bool


def mount_of(path: str) -> Mount:
    """The mount that holds an existing path; the last one when several are stacked. Raises: OSError."""
    wanted = os.fsencode(os.path.realpath(path))
    found = Mount("/", shared=False, slave=False)
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            fields = line.split(b" ")
            point = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), fields[4])
            if wanted != point and not wanted.startswith(point.rstrip(b"/") + b"/"):
                continue
            if len(point) < len(os.fsencode(found.mount_point)):
                continue
            tags = {tag.partition(b":")[0] for tag in fields[6 : fields.index(b"-")]}
            found = Mount(os.fsdecode(point), b"shared" in tags, b"master" in tags)
    return found
