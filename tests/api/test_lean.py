"""The contract holds in a process that carries only what a daemon carries.

A test run has loaded asyncio, email, ssl and the rest long before the engine is imported, so nothing is left out
there; here a second one imports the web stack first, as the daemon does.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import sys
from balenapy import lean
lean.load("trio")
import balenapy.api
assert not {"asyncio", "ssl", "h2", "jinja2", "click", "tempfile", "lzma"} & set(sys.modules)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_contract_in_a_lean_process() -> None:
    tests = [f"tests/api/test_{name}.py" for name in ("app", "hijack", "tls", "websocket", "system")]
    # The outer run watches the machine; this one must not wait for it.
    options = ["-q", "-x", "--confcutdir=tests/api", "-p", "no:cacheprovider"]
    # Sockets below it must fit into 107 bytes.
    with tempfile.TemporaryDirectory(prefix="bpt") as directory:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *options, f"--basetemp={directory}/t", *tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
