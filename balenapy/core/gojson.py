"""Values written as Go's encoding/json writes them. Reading is `core/wire.py`."""

from __future__ import annotations

import json
from typing import Any


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


_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
