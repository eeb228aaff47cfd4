"""Shell patterns as Go's `path.Match` reads them: the `reference` filter of the image list.

Source: Go src/path/match.go.
"""

from __future__ import annotations

import re

from balenapy.errors import SystemFailure


def path_match(pattern: str, name: str) -> bool:
    """Go's `path.Match`: `*` and `?` stop at a slash; `[a-z]`, `[^a]`; a backslash takes the next literally.

    Raises: SystemFailure `syntax error in pattern`.
    """
    expression, position = [], 0
    while position < len(pattern):
        character = pattern[position]
        position += 1
        if character == "*":
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
    return re.fullmatch("".join(expression), name, re.DOTALL) is not None


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
