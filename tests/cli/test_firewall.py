"""`firewall clear` where no engine answers: in a namespace of its own, so that nobody else's rules are meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

TABLES = """
add table ip balenapy_br0
add chain ip balenapy_br0 guard { type filter hook prerouting priority -300; }
add table ip6 balenapy_br0
add table ip balenapy_br1
add table ip filter
"""


def clear(directory: Path, *bridges: str) -> tuple[str, str, str]:
    """What the command prints and says, and the tables afterwards."""
    host = f"unix://{directory}/none"
    script = f"""set -e
nft -f - <<'RULES'
{TABLES}
RULES
{sys.executable} -m balenapy.cli.main -H {host} firewall clear {" ".join(bridges)}
nft list tables >&3
"""
    read, write = os.pipe()
    with os.fdopen(read) as tables:
        done = subprocess.run(
            ["unshare", "-n", "bash", "-c", f"exec 3>&{write}\n{script}"],
            pass_fds=[write],
            capture_output=True,
            text=True,
            check=True,
        )
        os.close(write)
        return done.stdout, done.stderr, tables.read()


def test_all_tables_of_ours_go_and_no_other(tmp_path: Path) -> None:
    printed, said, left = clear(tmp_path)

    assert printed.split() == ["balenapy_br0", "balenapy_br1"]
    assert said == "no engine answers: its rules on this machine are taken away\n"
    assert left.splitlines() == ["table ip filter"]


def test_of_named_bridges_only(tmp_path: Path) -> None:
    printed, _, left = clear(tmp_path, "br1")

    assert printed.split() == ["balenapy_br1"]
    assert sorted(left.splitlines()) == ["table ip balenapy_br0", "table ip filter", "table ip6 balenapy_br0"]


def test_an_engine_elsewhere_is_not_cleared_here(capsys: pytest.CaptureFixture[str]) -> None:
    from balenapy.cli.main import main

    assert main(["-H", "tcp://127.0.0.1:1", "firewall", "clear"]) == 1
    assert "Cannot connect to the engine" in capsys.readouterr().err
