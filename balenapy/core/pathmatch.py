"""Shell patterns as Go's `path.Match` reads them, and those of `.dockerignore`, which have `**` besides.

Sources: Go src/path/match.go; moby pkg/fileutils/fileutils.go.
"""

from __future__ import annotations

import re

from balenapy.errors import SystemFailure


def path_match(pattern: str, name: str) -> bool:
    """Go's `path.Match`: `*` and `?` stop at a slash; `[a-z]`, `[^a]`; a backslash takes the next literally.

    Raises: SystemFailure `syntax error in pattern`.
    """
    return re.fullmatch(to_expression(pattern), name, re.DOTALL) is not None


def to_expression(pattern: str, *, deep: bool = False) -> str:
    """The regular expression for a whole name.

    Args:
        deep: `**` is any number of components, also none.

    Raises: SystemFailure `syntax error in pattern`.
    """
    expression: list[str] = []
    position = 0
    while position < len(pattern):
        character = pattern[position]
        position += 1
        if deep and character == "*" and pattern.startswith("*", position):
            position += 2 if pattern.startswith("/", position + 1) else 1
            expression.append("(?:.*/)?" if position < len(pattern) else ".*")
        elif character == "*":
            expression.append("[^/]*")
        elif character == "?":
            expression.append("[^/]")
        elif character == "[":
            text, position = _bracket(pattern, position)
            expression.append(text)
        elif character == "\\":
            if position == len(pattern):
                raise SystemFailure("syntax error in pattern")
            expression.append(re.escape(pattern[position]))
            position += 1
        else:
            expression.append(re.escape(character))
    return "".join(expression)


def _bracket(pattern: str, position: int) -> tuple[str, int]:
    negated = pattern[position : position + 1] == "^"
    position += negated
    ranges: list[str] = []
    while True:
        if pattern[position : position + 1] == "]" and ranges:
            break
        low, position = _bracket_character(pattern, position)
        high = low
        if pattern[position : position + 1] == "-":
            high, position = _bracket_character(pattern, position + 1)
        if low > high:
            ranges.append("")  # matches nothing, as in Go
        else:
            ranges.append(f"{re.escape(low)}-{re.escape(high)}")
    inside = "".join(ranges)
    if not inside:
        return ("(?s:.)" if negated else "(?!)"), position + 1
    return f"[{'^' if negated else ''}{inside}]", position + 1


def _bracket_character(pattern: str, position: int) -> tuple[str, int]:
    character = pattern[position : position + 1]
    if character == "\\":
        position += 1
        character = pattern[position : position + 1]
    elif character in ("-", "]"):
        character = ""
    if not character:
        raise SystemFailure("syntax error in pattern")
    return character, position + 1
