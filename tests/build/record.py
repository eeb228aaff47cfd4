"""`python -m tests.build.record [names]`: ask Debian's dockerd for the answers of the corpus, and write them down.

Without names, every case. It runs dockerd privately, with its own containerd and without firewall rules, and needs
root. `--new` records only cases that have no answer yet; `--check` compares and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.build.case import load_cases
from tests.build.place import prepare, running_server
from tests.build.play import differences, play, written
from tests.engine_process import running_engine
from tests.registry_process import running_registry


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
                    sys.stdout.write(differences(before, text))
                if not arguments.check:
                    case.expected_path.write_text(text)
    print(f"{len(cases)} cases, {changed} of them other than before")
    return 1 if arguments.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
