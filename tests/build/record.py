"""`python -m tests.build.record [names]`: ask Debian's dockerd for the answers of the corpus, and write them down.

Without names, every case. It runs dockerd privately, with its own containerd and without firewall rules, and needs
root. `--new` records only cases that have no answer yet; `--check` compares and writes nothing.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.build.case import load_cases
from tests.build.place import prepare, running_server
from tests.build.play import play
from tests.engine_process import running_engine
from tests.registry_process import running_registry

LINE = 116


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.build.record", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CASE")
    parser.add_argument("--new", action="store_true", help="only cases without an answer")
    parser.add_argument("--check", action="store_true", help="say what would change, write nothing")
    arguments = parser.parse_args()
    cases = [case for case in load_cases(tuple(arguments.names)) if not case.skip_reference]
    if arguments.new:
        cases = [case for case in cases if not case.expected_path.exists()]
    changed = 0
    with tempfile.TemporaryDirectory(prefix="balenapy-record-") as directory:
        root = Path(directory)
        with (
            running_registry(root / "registry") as registry,
            running_server() as server,
            running_engine(root / "engine", "--experimental", program="dockerd") as engine,
        ):
            place = prepare(engine, registry, server)
            for case in cases:
                text = written(play(case, place))
                before = case.expected_path.read_text() if case.expected_path.exists() else ""
                changed += text != before
                print(f"{'same' if text == before else 'changed' if before else 'new'}: {case.name}", flush=True)
                if arguments.check:
                    sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), text.splitlines(True), n=1))
                if not arguments.check:
                    case.expected_path.write_text(text)
    print(f"{len(cases)} cases, {changed} of them other than before")
    return 1 if arguments.check and changed else 0


def written(answer: Any) -> str:
    """JSON whose short parts have a line each."""
    return _written(answer, 0) + "\n"


def _written(value: Any, depth: int) -> str:
    short = json.dumps(value, ensure_ascii=False, sort_keys=True)
    if len(short) + depth <= LINE or not isinstance(value, list | dict) or not value:
        return short
    indent = " " * (depth + 1)
    if isinstance(value, list):
        items = [indent + _written(item, depth + 1) for item in value]
    else:
        items = [f"{indent}{json.dumps(key)}: {_written(item, depth + 1)}" for key, item in sorted(value.items())]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return f"{opening}\n" + ",\n".join(items) + f"\n{' ' * depth}{closing}"


if __name__ == "__main__":
    sys.exit(main())
