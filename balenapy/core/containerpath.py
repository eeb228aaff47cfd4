"""Paths inside a container as `archive` calls name them, and what is told of what lies there.

A path is taken as absolute and cleaned of `.` and `..` by its letters alone, before any link is followed. A slash or a
`.` at its end is kept: it says that the last part is followed if it is a link, and that it must be a directory.

Source: moby container/archive.go ResolvePath and StatPath, pkg/archive/copy.go PreserveTrailingDotOrSeparator.
"""

from __future__ import annotations

import posixpath
import stat
from typing import NamedTuple

# Go's FileMode (io/fs): what is not permissions sits at the top.
_GO_TYPES = {
    stat.S_IFDIR: 1 << 31,
    stat.S_IFLNK: 1 << 27,
    stat.S_IFBLK: 1 << 26,
    stat.S_IFCHR: 1 << 26 | 1 << 21,
    stat.S_IFIFO: 1 << 25,
    stat.S_IFSOCK: 1 << 24,
}
_GO_BITS = ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20))


def clean_path(path: str) -> str:
    """`d/../etc/` -> `/etc/`: absolute, without `..`, its end kept."""
    cleaned = posixpath.normpath("/" + path.lstrip("/"))
    base = path.rstrip("/").rpartition("/")[2]
    if base == ".":
        cleaned = cleaned.rstrip("/") + "/."
    if path.endswith("/") and not cleaned.endswith("/"):
        cleaned += "/"
    return cleaned


def base_name(path: str) -> str:
    """Go's filepath.Base of a cleaned path: `/` for the root, `.` for `/d/.`."""
    return path.rstrip("/").rpartition("/")[2] or "/"


def follows_last(path: str) -> bool:
    """Whether the last part of a cleaned path is followed when it is a link."""
    return path.endswith(("/", "/."))


def go_file_mode(mode: int) -> int:
    """The mode of stat(2) as Go has it."""
    result = mode & 0o777 | _GO_TYPES.get(stat.S_IFMT(mode), 0)
    for bit, go_bit in _GO_BITS:
        if mode & bit:
            result |= go_bit
    return result


class PathStat(NamedTuple):
    """What an archive call tells of a path."""

    name: str
    size: int
    mode: int  # of Go
    mtime_ns: int
    link_target: str  # of a link: where it leads in the end, also when nothing is there
