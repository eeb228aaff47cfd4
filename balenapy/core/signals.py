"""Signal names as Docker spells them: `TERM`, `SIGTERM`, `15`, `RTMIN+3`, in any case."""

from __future__ import annotations

import signal

from balenapy.errors import InvalidParameter

# Linux on every architecture we run on (moby pkg/signal; MIPS numbers some of them otherwise and is not supported).
_NAMES: dict[str, int] = {
    name.removeprefix("SIG"): number.value
    for name, number in signal.Signals.__members__.items()
    if not name.startswith("SIGRT")
}
RTMIN, RTMAX = 34, 64


def parse_signal(text: str) -> int:
    """Raises: InvalidParameter `Invalid signal: X`. Source: moby pkg/signal ParseSignal."""
    try:
        number = int(text) if text.lstrip("-").isascii() and text.lstrip("-").isdigit() else None
    except ValueError:
        number = None
    if number is not None:
        if not 0 < number <= RTMAX:
            raise InvalidParameter(f"Invalid signal: {text}")
        return number
    name = text.upper().removeprefix("SIG")
    if name in _NAMES:
        return _NAMES[name]
    for base, value, sign in (("RTMIN", RTMIN, "+"), ("RTMAX", RTMAX, "-")):
        if name == base:
            return value
        if name.startswith(base + sign):
            rest = name.removeprefix(base + sign)
            if rest.isascii() and rest.isdigit() and 0 < int(rest) <= 15:
                return value + int(rest) if sign == "+" else value - int(rest)
    raise InvalidParameter(f"Invalid signal: {text}")
