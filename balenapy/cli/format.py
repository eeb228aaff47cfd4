"""How the command line prints: tables, sizes and ages, in docker's shapes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from balenapy.cli.client import ClientError
from balenapy.core.timefmt import SECOND_NS, human_duration

_ACTION = re.compile(r"\{\{\s*(?:(json)\s+)?((?:\.\w+)+|\.)\s*\}\}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns three blanks apart, at least ten wide. Source: docker's tabwriter(10, 1, 3)."""
    lines = [list(header), *map(list, rows)]
    widths = [max(10, *(len(line[column]) + 3 for line in lines)) for column in range(len(header))]
    return "\n".join(
        "".join(
            cell.ljust(width) if column < len(header) - 1 else cell
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def human_size(size_bytes: float, digits: int = 4) -> str:
    """4.26MB, 0B. Source: docker/go-units HumanSizeWithPrecision."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    index = 0
    while size_bytes >= 1000 and index < len(units) - 1:
        size_bytes /= 1000
        index += 1
    return f"{size_bytes:.{digits}g}{units[index]}"


def age(created_s: float) -> str:
    """`5 minutes ago`."""
    return f"{human_duration(int((time.time() - created_s) * SECOND_NS))} ago"


def short_id(identifier: str) -> str:
    return identifier.rpartition(":")[2][:12]


def ports(entries: Iterable[dict[str, Any]]) -> str:
    """`0.0.0.0:8080->80/tcp, 443/tcp`."""
    return ", ".join(
        f"{one['IP']}:{one['PublicPort']}->{one['PrivatePort']}/{one['Type']}"
        if one.get("PublicPort")
        else f"{one['PrivatePort']}/{one['Type']}"
        for one in sorted(entries, key=lambda one: (one["PrivatePort"], one.get("PublicPort", 0)))
    )


def ellipsis(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def moment(created_s: float) -> str:
    """A time as Go prints it: `2024-01-02 03:04:05 +0000 UTC`."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z %Z", time.localtime(created_s))


def print_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str], titles: Mapping[str, str], form: str) -> None:
    """The table of `columns`, or what `--format` asks for.

    Raises: ClientError.
    """

    def title(column: str) -> str:
        return titles.get(column, column.upper())

    form = form.replace("\\t", "\t").replace("\\n", "\n")
    if form.startswith("table "):
        header = {column: title(column) for row in rows[:1] for column in row} or {one: title(one) for one in columns}
        wanted = form.removeprefix("table ")
        print(table(*_first_and_rest([render(wanted, row).split("\t") for row in [header, *rows]])))
    elif form and form != "table":
        for row in rows:
            print(render("{{json .}}" if form == "json" else form, row))
    else:
        print(table([title(column) for column in columns], [[row[column] for column in columns] for row in rows]))


def _first_and_rest(lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return lines[0], lines[1:]


def render(template: str, value: Any) -> str:
    """Go's text/template as far as people use it on devices: `{{.A.B}}`, `{{json .A}}`, `{{.}}`.

    Raises: ClientError for anything else, and for a field that is not there.
    """

    def fill(match: re.Match[str]) -> str:
        found = value
        for name in match[2].strip(".").split(".") if match[2] != "." else ():
            if not isinstance(found, dict) or name not in found:
                raise ClientError(f"template parsing error: {match[0]}: there is no {name!r}")
            found = found[name]
        return json.dumps(found, separators=(",", ":"), ensure_ascii=False) if match[1] else _go_text(found)

    if "{{" in _ACTION.sub("", template):
        raise ClientError(
            f"template parsing error: {template!r}: only {{{{.Field}}}} and {{{{json .Field}}}} are known"
        )
    return _ACTION.sub(fill, template)


def _go_text(value: Any) -> str:
    """A value as fmt prints it."""
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{' '.join(map(_go_text, value))}]"
    if isinstance(value, dict):
        return f"map[{' '.join(f'{key}:{_go_text(one)}' for key, one in sorted(value.items()))}]"
    return str(value)
