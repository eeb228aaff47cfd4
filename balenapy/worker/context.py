"""Verb `context`: the tar of a build's context on stdin, packed or not, becomes files.

Arguments: {"directory": its `diff/` takes the files, `sums.json` the hash of each entry; "dockerfile": path of the
Dockerfile in there, as asked for; "" when it comes from somewhere else}. We are chrooted in `diff/`.

Report: {"size_bytes", "dockerfile": its content in base64, null when there is none, "name": under which it was found,
"problem": with its path}. The Dockerfile and `.dockerignore` are taken out when the latter says so.

Nothing is synced: a context does not outlive its build.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from balenapy.core.buildtree import FoundDockerfile, entry_sum, take_dockerfile, to_text
from balenapy.core.tarstream import Entry, InvalidTar, NeedData, TarReader
from balenapy.errors import InvalidParameter, SystemFailure
from balenapy.worker import process
from balenapy.worker.extract import Extractor, clean
from balenapy.worker.sources import DirectoryTree
from balenapy.worker.unpack import CHUNKS_AHEAD, Ahead, Source

SUMS = "sums.json"

Begin = Callable[[Extractor, Entry], int]


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    directory, dockerfile = arguments.get("directory"), arguments.get("dockerfile")
    if not isinstance(directory, str) or not isinstance(dockerfile, str):
        raise InvalidParameter("context: needs directory and dockerfile")
    source = Source(0)
    source.begin()
    sums = os.open(os.path.join(directory, SUMS), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    process.enter(os.path.join(directory, "diff"))
    os.umask(0)
    extractor = Extractor(whiteouts=False)
    found = unpack(source, extractor)
    with open(sums, "w") as file:
        json.dump(found, file)
    taken = take_dockerfile(DirectoryTree("/"), dockerfile) if dockerfile else FoundDockerfile("", None)
    return {
        "size_bytes": extractor.size_bytes,
        "dockerfile": None if taken.content is None else base64.b64encode(taken.content).decode(),
        "name": taken.name,
        "problem": taken.problem,
    }


def unpack(source: Source, extractor: Extractor, begin: Begin = Extractor.begin) -> dict[str, str]:
    """Make all entries of a source that has begun; gives the hash of each by its clean path, the first of several.

    Args:
        begin: makes one entry, and gives the descriptor for its content.
    Raises: SystemFailure; InvalidTar, for a name that climbs above the root.
    """
    plain = Ahead(source.pieces(), CHUNKS_AHEAD)
    plain.start()
    reader = TarReader()
    sums: dict[str, str] = {}
    entry: Entry | None = None
    digest = hashlib.sha256()
    fd, left, ended = -1, 0, False
    while True:
        try:
            event = reader.next_event()
        except InvalidTar as error:  # it is not the request that is wrong, there neither
            raise SystemFailure(error.message) from error
        if isinstance(event, memoryview):
            if fd < 0 and not left:
                continue  # what follows the end
            digest.update(event)
            if fd >= 0:
                try:
                    process.write_all(fd, event)
                except OSError as error:
                    raise process.failed("write", extractor.path, error) from error
            left -= len(event)
        elif isinstance(event, Entry):
            entry, left = event, event.size
            digest = entry_sum(event)
            fd = begin(extractor, event)
        elif isinstance(event, NeedData):
            if ended:
                break
            data = plain.next()
            reader.feed(data)
            ended = not data
            continue
        if entry is not None and not left:
            if fd >= 0:
                extractor.finish(fd, entry)
            sums.setdefault(to_text(clean(b"/" + entry.name)), digest.hexdigest())
            entry, fd = None, -1
    extractor.finish_all()
    return sums
