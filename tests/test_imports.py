"""The arrows of the architecture, and what a daemon at rest must not carry.

api > engine > stores, registry > linux > core
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "balenapy"

# What each package may import of ours. `errors`, `version` and the package itself are for everybody.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "linux": {"core"},
    "registry": {"core"},
    "stores": {"core", "linux"},
    "engine": {"core", "linux", "stores", "registry", "config"},
    "api": {"core", "engine"},
    "worker": {"core", "linux"},
    "cli": {"core", "config"},
    "config": set(),
}
EVERYBODY = {"errors", "version", "lean", ""}
# `core` decides without I/O: what does I/O, or tells the time, or is random, has no place there.
NOT_IN_CORE = {"trio", "os", "socket", "subprocess", "random", "secrets", "threading", "asyncio", "httpx", "quart"}
# Only for annotations, or only at the edge between two layers, with the reason.
EXCEPTIONS = {
    ("api/server.py", "config"),  # hosts and TLS of the listeners
    ("api/routes/system.py", "registry"),  # credentials in the body of /auth
}
# Imported in a function, at the first use of what not everybody uses.
LATE = {
    ("stores/ringfile.py", "zstandard"),  # compressed logs
    ("cli/observe.py", "zstandard"),
    ("cli/observe.py", "tarfile"),  # support bundles
    ("cli/observe.py", "gzip"),
    ("cli/copy.py", "tarfile"),
}
HEAVY = ("tarfile", "zstandard", "bsdiff4", "gzip", "lzma", "bz2", "zipfile", "httpx", "httpcore", "pyroute2", "dnslib")


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imported(path: Path) -> set[str]:
    """Dotted names a file imports, wherever in it; those under TYPE_CHECKING aside."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for other in node.orelse:
                    visit(other)
                return
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                names.update(f"{module}.{alias.name}" for alias in node.names)
            case ast.ImportFrom():
                raise AssertionError(f"{path}: relative import")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    package = path.relative_to(PACKAGE).parts[0]
    allowed = ALLOWED[package] | EVERYBODY | {package}
    for name in imported(path):
        if name == "balenapy" or name.startswith("balenapy."):
            target = name.removeprefix("balenapy").removeprefix(".").partition(".")[0]
            if target.startswith("__") or (str(path.relative_to(PACKAGE)), target) in EXCEPTIONS:
                continue
            assert target in allowed, f"{package} must not import {name}"
        if package == "core":
            assert name.split(".")[0] not in NOT_IN_CORE, f"core must not import {name}"
        if package not in ("worker",) and (str(path.relative_to(PACKAGE)), name) not in LATE:
            assert name.split(".")[0] not in ("tarfile", "zstandard", "bsdiff4", "gzip", "lzma"), name


def test_delta_imports_nothing_of_the_engine() -> None:
    for path in (ROOT / "delta").rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == "balenapy"], path


def test_workers_know_no_trio_and_no_quart() -> None:
    for path in (PACKAGE / "worker").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"trio", "quart", "hypercorn", "httpx"}, path


def test_daemon_at_rest_carries_nothing_heavy() -> None:
    program = f"""
import sys
import balenapy.__main__
from balenapy import lean
lean.load("trio")
import balenapy.config, balenapy.daemon
from balenapy.api import server
from balenapy.api.app import App
from balenapy.api.routes import register_all

class Anything:
    def __getattr__(self, name):
        return self

register_all(App(), Anything())
print(*[name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run(program) == ""


def test_what_was_left_out_can_be_had_later() -> None:
    program = """
import balenapy.api, sys
names = ("ssl", "asyncio", "tempfile", "email.utils", "html", "urllib.request", "click", "jinja2", "_hashlib")
assert not [name for name in names if name in sys.modules], [name for name in names if name in sys.modules]
import trio._ssl, trio._dtls
bound = trio._ssl._stdlib_ssl
import ssl, asyncio, tempfile, email.utils, html, urllib.request, click, jinja2, _hashlib
assert bound.SSLEOFError is ssl.SSLEOFError
assert bound.MemoryBIO is ssl.MemoryBIO
assert html.unescape("&lt;") == "<"
assert asyncio.run(asyncio.sleep(0, "ran")) == "ran"
assert trio._dtls.hmac.digest(b"k", b"m", "sha256") == _hashlib.hmac_digest(b"k", b"m", "sha256")
import logging
assert logging is sys.modules["logging"] is sys.modules["hypercorn.logging"].logging
"""
    assert run(program) == ""


def test_a_stand_in_that_is_called_says_what_it_stands_for() -> None:
    program = """
import balenapy.api
import quart.app
try:
    quart.app.asyncio.Event()
except RuntimeError as error:
    print(error)
"""
    assert run(program) == "asyncio.Event was left out of this process (balenapy.lean)"


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr == ""
    return done.stdout.strip()
