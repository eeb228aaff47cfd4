"""Query strings read with Go's rules (moby api/server/httputils/form.go)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from balenapy.core.filters import Filters, parse_filters
from balenapy.core.timefmt import parse_unix
from balenapy.errors import EngineError, SystemFailure

FALSE = frozenset(("", "0", "no", "false", "none"))
INT_MAX = 2**63 - 1


def boolean(args: Mapping[str, str], name: str, default: bool = False) -> bool:
    """False is exactly `""`, `0`, `no`, `false`, `none`; the default counts only when the key is absent."""
    if name not in args:
        return default
    return args[name].strip().lower() not in FALSE


def integer(
    args: Mapping[str, str],
    name: str,
    default: int | None = 0,
    *,
    refuse: type[EngineError] = SystemFailure,
) -> int:
    """An optional decimal number; `default=None` makes it required (an empty one is then refused too).

    Raises: `refuse`, with the words of Go's Atoi (500 almost everywhere, 400 for resize).
    """
    text = args.get(name, "")
    if text == "" and default is not None:
        return default
    return atoi(text, refuse=refuse)


def atoi(text: str, *, refuse: type[EngineError] = SystemFailure) -> int:
    """Go's strconv.Atoi."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not (digits.isascii() and digits.isdigit()):
        raise refuse(f'strconv.Atoi: parsing "{text}": invalid syntax')
    if len(digits.lstrip("0")) > 19 or not -INT_MAX - 1 <= (value := int(text)) <= INT_MAX:
        raise refuse(f'strconv.Atoi: parsing "{text}": value out of range')
    return value


def timestamp_ns(args: Mapping[str, str], name: str) -> int | None:
    """`seconds[.nanoseconds]` as nanoseconds since the epoch; None when absent or empty.

    Raises: MalformedTime (500) `strconv.ParseInt: parsing "V": invalid syntax`.
    """
    text = args.get(name, "")
    return parse_unix(text) if text else None


def filters(args: Mapping[str, str], allowed: Collection[str] | None = None) -> Filters:
    """The `filters` parameter; `allowed` None admits any key.

    Raises: MalformedJSON (500), InvalidParameter `Invalid filter 'K'`.
    """
    return parse_filters(args.get("filters", ""), allowed)
