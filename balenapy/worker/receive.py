"""Verb `receive`: stdin becomes one file, as ADD has it from a URL: private, with the time that the server gave.

Arguments: {"directory": of the file; "name"; "mtime": seconds}. Report: {"sum": its hash as a source of COPY}.
"""

from __future__ import annotations

import os
from typing import Any

from balenapy.errors import InvalidParameter
from balenapy.worker import process
from balenapy.worker.sources import DirectoryTree

READ_BYTES = 256 << 10


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    directory, name = arguments.get("directory"), arguments.get("name")
    if not isinstance(directory, str) or not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        raise InvalidParameter("receive: needs directory, and a plain name")
    process.enter(directory)
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        while piece := os.read(0, READ_BYTES):
            process.write_all(fd, piece)
        mtime_s = int(arguments.get("mtime") or 0)
        os.utime(fd, (mtime_s, mtime_s))
    except OSError as error:
        raise process.failed("write", os.fsencode(name), error) from error
    finally:
        os.close(fd)
    return {"sum": DirectoryTree("/").sum(name)}
