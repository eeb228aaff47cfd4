"""Values as Go's fmt writes them into text: `%q`, `%v` and durations. JSON is `core/gojson`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

# What unicode.IsSpace calls a blank; Python's own blanks are some control characters more.
BLANKS = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_ESCAPES = {
    "\a": r"\a", "\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t", "\v": r"\v", "\\": r"\\",
}  # fmt: skip
_PRINTED = frozenset("LMNPS")  # categories of unicode.IsPrint


def quote(text: str) -> str:
    """`%q` of a string. Bytes that are no UTF-8 are surrogates, as `surrogateescape` leaves them."""
    return '"' + "".join(_show(character, '"') for character in text) + '"'


def quote_words(words: Iterable[str]) -> str:
    """`%q` of a list of strings: `["a" "b"]`."""
    return "[" + " ".join(map(quote, words)) + "]"


def quote_rune(number: int) -> str:
    """`%q` of a number, which Go takes for a character: `'\\x00'`."""
    return "'" + _show(chr(number) if 0 <= number < 0x110000 else "\ufffd", "'") + "'"


def show_words(words: Iterable[str]) -> str:
    """`%v` of a list of strings: `[a b]`."""
    return "[" + " ".join(words) + "]"


def duration(ns: int) -> str:
    """`String()` of a time.Duration: `1m30s`, `1.5s`, `100ms`, `0s`."""
    sign, ns = ("-", -ns) if ns < 0 else ("", ns)
    if ns < 1_000_000_000:
        for unit, size in (("ms", 1_000_000), ("µs", 1_000), ("ns", 1)):
            if ns >= size:
                return f"{sign}{_fraction(ns, size)}{unit}"
        return "0s"
    minutes, rest = divmod(ns, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{_fraction(rest, 1_000_000_000)}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{sign}{hours}h{text}" if hours else sign + text


def _fraction(value: int, unit: int) -> str:
    whole, rest = divmod(value, unit)
    digits = str(rest).rjust(len(str(unit)) - 1, "0").rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)


def _show(character: str, mark: str) -> str:
    number = ord(character)
    if character == mark:
        return "\\" + character
    if character in _ESCAPES:
        return _ESCAPES[character]
    if 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number - 0xDC00:02x}"
    if character == " " or unicodedata.category(character)[0] in _PRINTED:
        return character
    if number < 0x80:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
