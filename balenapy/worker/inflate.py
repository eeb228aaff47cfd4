"""Verb `inflate`: compressed bytes on stdin, plain bytes to `output`; the format is told by its first bytes.

Arguments: {"output": descriptor}. Report: {"size_bytes"} of what came out.
"""

from __future__ import annotations

from typing import Any

from balenapy.errors import InvalidParameter
from balenapy.worker import process
from balenapy.worker.unpack import CHUNKS_AHEAD, Ahead, Source


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    output = arguments.get("output")
    if not isinstance(output, int):
        raise InvalidParameter("inflate: `output` must be a descriptor")
    source = Source(0)
    source.begin()
    plain = Ahead(source.pieces(), CHUNKS_AHEAD)
    plain.start()
    size_bytes = 0
    while piece := plain.next():
        process.write_all(output, piece)
        size_bytes += len(piece)
    return {"size_bytes": size_bytes}
