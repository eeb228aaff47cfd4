"""`python -I -m balenapy.worker VERB '<json arguments>'`: one piece of heavy work in a process of its own.

Data comes on stdin, one line of JSON goes to stdout at the end: the report, or `{"error": {"kind", "message"}}`
and exit code 1. A worker has low priority and bounded memory, and dies with its parent.
"""

from __future__ import annotations

import os
import sys

from balenapy.worker import parent, process

# Verb -> module with `run(arguments) -> report`. Imported by need: a start costs what its verb costs.
VERBS = {
    "archive": "balenapy.worker.archive",
    "changes": "balenapy.worker.changes",
    "context": "balenapy.worker.context",
    "copy": "balenapy.worker.copy",
    "inflate": "balenapy.worker.inflate",
    "makedelta": "balenapy.worker.makedelta",
    "mend": "balenapy.worker.mend",
    "pack": "balenapy.worker.pack",
    "patch": "balenapy.worker.patch",
    "place": "balenapy.worker.place",
    "receive": "balenapy.worker.receive",
    "sources": "balenapy.worker.sources",
    "squash": "balenapy.worker.squash",
    "unpack": "balenapy.worker.unpack",
    "verify": "balenapy.worker.verify",
}


def main() -> None:
    """Run the verb of the command line and leave the process."""
    process.bind_to_parent()
    process.yield_to_others()
    if sys.argv[1:2] == [parent.VERB]:
        parent.serve(int(sys.argv[2]), VERBS)
    process.bound_memory()
    code = process.report_outcome(sys.argv[1:], VERBS)
    # Not through the interpreter's own end: a thread may still sit in a read, and there is nothing to tidy.
    os._exit(code)


if __name__ == "__main__":
    main()
