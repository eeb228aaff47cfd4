from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.timefmt import (
    SECOND_NS,
    MalformedTime,
    human_duration,
    parse_duration,
    parse_unix,
    parse_until,
    show_duration,
)
from balenapy.core.wire import parse_rfc3339

MINUTE, HOUR, DAY = 60, 3600, 86400
NOW = 1_795_425_889 * SECOND_NS


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "Less than a second"),
        (0.9, "Less than a second"),
        (1, "1 second"),
        (59, "59 seconds"),
        (MINUTE, "About a minute"),
        (2 * MINUTE, "2 minutes"),
        (59 * MINUTE, "59 minutes"),
        (HOUR, "About an hour"),
        (HOUR + 30 * MINUTE, "2 hours"),
        (47 * HOUR, "47 hours"),
        (2 * DAY, "2 days"),
        (13 * DAY, "13 days"),
        (14 * DAY, "2 weeks"),
        (59 * DAY, "8 weeks"),
        (60 * DAY, "2 months"),
        (729 * DAY, "24 months"),
        (730 * DAY, "2 years"),
    ],
)
def test_durations_are_shown_as_docker_shows_them(seconds: float, shown: str) -> None:
    assert shown == human_duration(int(seconds * SECOND_NS))


@pytest.mark.parametrize(
    ("text", "seconds"), [("24h", DAY), ("1h30m", 5400), ("1.5s", 1.5), ("-10m", -600), ("0", 0), ("100ms", 0.1)]
)
def test_go_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == int(seconds * SECOND_NS)


@given(st.text(alphabet="0123456789.hmsuµn+-", max_size=12))
def test_any_text_is_a_duration_or_refused(text: str) -> None:
    with suppress(ValueError):
        parse_duration(text)


def test_seconds_with_a_fraction_are_read() -> None:
    assert parse_unix("10") == 10 * SECOND_NS
    assert parse_unix("10.5") == 10 * SECOND_NS + SECOND_NS // 2
    assert parse_unix("1.000000001") == SECOND_NS + 1
    with pytest.raises(MalformedTime) as caught:
        parse_unix("zz")
    assert caught.value.message == 'strconv.ParseInt: parsing "zz": invalid syntax'


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("24h", "2026-11-22T09:24:49Z"),
        ("2026-11-23", "2026-11-23T00:00:00Z"),
        ("2026-11-23T09", "2026-11-23T09:00:00Z"),
        ("2026-11-23T09:24", "2026-11-23T09:24:00Z"),
        ("2026-11-23T09:24:49", "2026-11-23T09:24:49Z"),
        ("2026-11-23T09:24:49.5", "2026-11-23T09:24:49.5Z"),
        ("2026-11-23T09:24:49.123456789+01:00", "2026-11-23T08:24:49.123456789Z"),
        ("1795425889", "2026-11-23T09:24:49Z"),
    ],
)
def test_until_has_many_forms(text: str, moment: str) -> None:
    assert parse_until(text, NOW) == parse_rfc3339(moment)


@pytest.mark.parametrize("text", ["zz", "", "2026-13-01", "h"])
def test_until_refuses_the_rest(text: str) -> None:
    with pytest.raises(MalformedTime) as caught:
        parse_until(text, NOW)

    assert caught.value.message == f'failed to parse value as time or duration: "{text}"'


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1_500, "1.5µs"),
        (500_000_000, "500ms"),
        (1_000_000_000, "1s"),
        (1_500_000_000, "1.5s"),
        (30_000_000_000, "30s"),
        (60_000_000_000, "1m0s"),
        (3_600_000_000_000, "1h0m0s"),
        (3_723_000_000_001, "1h2m3.000000001s"),
        (-1_500_000, "-1.5ms"),
    ],
)
def test_durations_are_shown_as_go_does(ns: int, text: str) -> None:
    assert show_duration(ns) == text
    assert parse_duration(text) == ns
