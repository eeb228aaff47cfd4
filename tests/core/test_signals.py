from __future__ import annotations

import pytest

from balenapy.core.signals import check_signal, parse_signal
from balenapy.errors import InvalidParameter, SystemFailure


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("15", 15),
        ("TERM", 15),
        ("SIGTERM", 15),
        ("sigterm", 15),
        ("SIGRTMIN+3", 37),
        ("RTMIN", 34),
        ("RTMAX-14", 50),
        ("rtmax", 64),
        ("63", 63),
        ("WINCH", 28),
        ("SIGCLD", 17),
        ("99", 99),
    ],
)
def test_names_and_numbers_are_read(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "0", "NOPE", "SIGRTMIN+16", "SIGSIGTERM", "1.5", "TERM "])
def test_what_is_no_signal_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match=f"Invalid signal: {text}".replace("+", r"\+")):
        parse_signal(text)


def test_a_number_without_a_signal_is_found_when_it_is_sent() -> None:
    check_signal(64)
    with pytest.raises(SystemFailure, match="The linux daemon does not support signal 99"):
        check_signal(99)
