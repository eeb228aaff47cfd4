"""JSON the way Go's encoding/json reads and writes it: the same bytes out, the same words about broken input.

Clients show these words, and some match on them, so a syntax error carries Go's text and not Python's.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


class JSONError(ValueError):
    """The text is not JSON; the message is the one Go's decoder would give."""


def dumps(value: Any) -> bytes:
    """Encode compactly, without HTML escaping and without a trailing newline."""
    text = _encode(value)
    # Go escapes these two always: they end a line in JavaScript.
    if "\u2028" in text or "\u2029" in text:
        text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    try:
        return text.encode()
    except UnicodeEncodeError:  # lone surrogates: file names that are not UTF-8
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def dumps_escaped(value: Any) -> bytes:
    """Encode as Go's streaming encoders do: `<`, `>` and `&` escaped."""
    return dumps(value).replace(b"<", b"\\u003c").replace(b">", b"\\u003e").replace(b"&", b"\\u0026")


def loads(data: bytes) -> Any:
    """Decode the first JSON value of `data`; what follows it is ignored, as `json.Decoder` does.

    Raises: JSONError; its text is `EOF` when there is nothing but blanks.
    """
    try:
        # Go replaces what is not UTF-8 inside strings.
        text = data.decode("utf-8", "replace")
    except UnicodeDecodeError as error:  # pragma: no cover - "replace" never raises
        raise JSONError(str(error)) from error
    start = len(text) - len(text.lstrip(" \t\r\n"))
    if start == len(text):
        raise JSONError("EOF")
    try:
        value, _ = _decode(text, start)
    except json.JSONDecodeError as error:
        raise JSONError(_words(error)) from None
    except RecursionError:
        raise JSONError("exceeded max depth") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise JSONError(f"invalid character {name[0]!r} looking for beginning of value")


_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_decode = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode

_LITERALS = ("true", "false", "null")


def _words(error: json.JSONDecodeError) -> str:
    text, position = error.doc, error.pos
    if error.msg.startswith("Unterminated string"):
        return "unexpected EOF"
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    if position >= len(text):
        return "unexpected EOF"
    found = _quote(text[position])
    if error.msg == "Expecting value":
        for literal in _LITERALS:
            if text[position] == literal[0]:
                return _broken_literal(text, position, literal)
        return f"invalid character {found} looking for beginning of value"
    if error.msg.startswith("Expecting property name") or error.msg.startswith("Illegal trailing comma"):
        return f"invalid character {found} looking for beginning of object key string"
    if error.msg.startswith("Expecting ':'"):
        return f"invalid character {found} after object key"
    if error.msg.startswith("Expecting ','"):
        return f"invalid character {found} after {_container_at(text, error.pos)}"
    if error.msg.startswith("Invalid control character"):
        return f"invalid character {found} in string literal"
    if error.msg.startswith("Invalid \\u"):
        return "invalid character in \\u hexadecimal character escape"
    if error.msg.startswith("Invalid \\"):
        escaped = text[error.pos + 1 : error.pos + 2] if text[position] == "\\" else text[position]
        return f"invalid character {_quote(escaped)} in string escape code" if escaped else "unexpected EOF"
    return f"invalid character {found} looking for beginning of value"


def _broken_literal(text: str, position: int, literal: str) -> str:
    for offset in range(1, len(literal)):
        if position + offset >= len(text):
            return "unexpected EOF"
        if text[position + offset] != literal[offset]:
            found = _quote(text[position + offset])
            return f"invalid character {found} in literal {literal} (expecting {_quote(literal[offset])})"
    return f"invalid character {_quote(literal[0])} looking for beginning of value"


def _container_at(text: str, position: int) -> str:
    """Say what kind of element ended just before `position`: the innermost bracket still open decides."""
    depth, in_string, index = [], False, 0
    while index < position:
        character = text[index]
        if in_string:
            if character == "\\":
                index += 1
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth.append(character)
        elif character in "]}" and depth:
            depth.pop()
        index += 1
    return "array element" if depth and depth[-1] == "[" else "object key:value pair"


def _quote(character: str) -> str:
    """Go's quoteChar."""
    if character == "'":
        return "'\\''"
    if character == '"':
        return "'\"'"
    escapes = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
    if character in escapes:
        return f"'{escapes[character]}'"
    if ord(character) < 0x20 or ord(character) == 0x7F:
        return f"'\\x{ord(character):02x}'"
    return f"'{character}'"
