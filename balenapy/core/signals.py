"""Signal names and numbers as the API takes them.

Source: moby pkg/signal. SIGRTMIN is 34 here as in the C library, which keeps 32 and 33 for itself.
"""

from __future__ import annotations

import re
import signal

from balenapy.errors import InvalidParameter, SystemFailure

SIGRTMIN, SIGRTMAX = 34, 64

NUMBERS: dict[str, int] = {
    item.name.removeprefix("SIG"): item.value for item in signal.Signals if not item.name.startswith("SIGRT")
}
NUMBERS |= {"RTMIN": SIGRTMIN, "RTMAX": SIGRTMAX, "CLD": NUMBERS["CHLD"], "POLL": NUMBERS["IO"]}
NUMBERS |= {f"RTMIN+{n}": SIGRTMIN + n for n in range(1, 16)}
NUMBERS |= {f"RTMAX-{n}": SIGRTMAX - n for n in range(1, 15)}

_NUMBER = re.compile(r"[+-]?\d+", re.ASCII)


def parse_signal(text: str) -> int:
    """`15`, `TERM`, `sigterm`, `SIGRTMIN+3` -> the number.

    Raises: InvalidParameter `Invalid signal: X`. Which numbers exist is asked later, by `check_signal`.
    """
    if _NUMBER.fullmatch(text):
        number = int(text)
        if number == 0:
            raise InvalidParameter(f"Invalid signal: {text}")
        return number
    try:
        return NUMBERS[text.upper().removeprefix("SIG")]
    except KeyError:
        raise InvalidParameter(f"Invalid signal: {text}") from None


def check_signal(number: int) -> None:
    """Raises: SystemFailure for a number that names no signal here."""
    if number not in NUMBERS.values():
        raise SystemFailure(f"The linux daemon does not support signal {number}")
