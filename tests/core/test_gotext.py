"""Values as Go prints them, checked against what Go prints."""

from __future__ import annotations

import pytest

from balenapy.core.gotext import duration, quote, quote_rune, quote_words, show_words


def test_quoted_text() -> None:
    assert quote('a "b" \\ \n\t\x01\x7f é \u2028 \U0001f600 \U000e0001') == (
        '"a \\"b\\" \\\\ \\n\\t\\x01\\x7f é \\u2028 \U0001f600 \\U000e0001"'
    )
    assert quote(b"\xff".decode("utf-8", "surrogateescape")) == '"\\xff"'
    assert quote_words(["a", "b c"]) == '["a" "b c"]'
    assert quote_words([]) == "[]"
    assert show_words(["a", "b c"]) == "[a b c]"
    assert [quote_rune(number) for number in (0, 3, 39, 65, 10)] == ["'\\x00'", "'\\x03'", "'\\''", "'A'", "'\\n'"]


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1_500, "1.5µs"),
        (100_000_000, "100ms"),
        (1_500_000_000, "1.5s"),
        (90_000_000_000, "1m30s"),
        (3_600_000_000_000, "1h0m0s"),
        (-5_000_000_000, "-5s"),
        (3_661_000_000_001, "1h1m1.000000001s"),
    ],
)
def test_durations(ns: int, text: str) -> None:
    assert duration(ns) == text
