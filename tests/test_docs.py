"""README names every option and every environment variable that the code reads."""

from __future__ import annotations

import re
from pathlib import Path

from balenapy.config import OPTIONS
from tests.api import routes_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_option_is_in_the_configuration_table() -> None:
    expected = []
    for option in OPTIONS:
        flag = f"`--{option.flag}`" + (f", `-{option.short}`" if option.short else "")
        key = f"`{option.file_key}`" if option.file_key != "-" else ""
        reloadable = " (reloadable)" if option.reloadable else ""
        expected.append(f"| {flag} | {key} | {option.help}{reloadable} |")
    rows = [line for line in README.splitlines() if line.startswith("| `--")]

    assert expected == rows


def test_every_environment_variable_the_code_reads_is_named() -> None:
    read = set()
    for source in (ROOT / "balenapy").rglob("*.py"):
        read |= set(re.findall(r"""environ(?:\.get\(|\.pop\(|\[)["']([A-Z_]+)["']""", source.read_text()))
    internal = {name for name in read if name.startswith("BALENAPY_")} | {"PATH"}

    assert set() == {name for name in read - internal if f"`{name}`" not in README}
    assert read


def test_architecture_lists_every_module_and_no_other() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    tree = text[text.index("    balenapy/\n") : text.index("Still to come")]
    package = ROOT / "balenapy"
    expected = {
        path.name
        for path in package.rglob("*.py")
        if path.name != "__init__.py" and path.relative_to(package).parts[:2] != ("api", "routes")
        if path.relative_to(package).parts[0] != "cli"
    }

    assert expected | {"absent.py"} == set(re.findall(r"\w+\.py", tree))


def test_the_table_of_routes_is_the_applications() -> None:
    """When it fails: `python -m tests.api.routes_table` writes it anew."""
    assert routes_table.section() == routes_table.in_readme()
