"""README's table of routes, made from the application: `python -m tests.api.routes_table` prints it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from balenapy.api.app import App
from balenapy.api.routes import absent, register_all
from balenapy.engine.engine import Engine
from tests.compat import shapes

README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- routes: made by python -m tests.api.routes_table -->\n", "<!-- end of routes -->\n"
HEAD = ["resource", "full", "answered for good as by balena-engine", "501"]


class _Anything:
    """An engine whose parts are there and are not asked."""

    def __getattr__(self, name: str) -> _Anything:
        return self


def application() -> App:
    app = App()
    register_all(app, cast(Engine, _Anything()))
    return app


def kinds(app: App) -> dict[str, str]:
    """`METHOD /path` -> `full`, `for good` or `501`: every route of the description, and those we have besides."""
    found = {}
    trivial = {f"{method} {path}" for method, path, _ in absent._TRIVIAL}
    for endpoint, handler in app.view_functions.items():
        kind = "for good" if endpoint in trivial else "full"
        if cast(Any, handler).__qualname__ == absent._absent.__qualname__ + ".<locals>.absent":
            kind = "501"
        found[_shown(endpoint)] = kind
    for method, path in shapes.operations():
        found.setdefault(_shown(f"{method} {path}"), "for good")
    return found


def _shown(endpoint: str) -> str:
    return re.sub(r"<[^>]*>|\{[^}]*\}", "{name}", endpoint)


def lines(app: App) -> Iterator[str]:
    table: dict[str, dict[str, list[str]]] = {}
    for route, kind in sorted(kinds(app).items(), key=lambda item: (item[0].split()[1], item[0])):
        resource = route.split()[1].split("/")[1]
        table.setdefault(resource, {}).setdefault(kind, []).append(f"`{route}`")
    yield f"| {' | '.join(HEAD)} |"
    yield "|" + " --- |" * len(HEAD)
    for resource, columns in sorted(table.items()):
        cells = ["<br>".join(columns.get(kind, ())) for kind in ("full", "for good", "501")]
        yield f"| {resource} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def section() -> str:
    return BEGIN + "\n".join(lines(application())) + "\n" + END


def in_readme() -> str:
    text = README.read_text()
    return text[text.index(BEGIN) : text.index(END) + len(END)]


if __name__ == "__main__":
    text = README.read_text()
    README.write_text(text.replace(in_readme(), section()) if BEGIN in text else text)
    print(section())
