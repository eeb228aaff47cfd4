from __future__ import annotations

import pytest

from balenapy.api import query
from balenapy.errors import EngineError, InvalidParameter, SystemFailure


@pytest.mark.parametrize("text", ["", "0", "no", "false", "none", "NO", "False", " none ", "NONE"])
def test_these_are_false(text: str) -> None:
    assert query.boolean({"a": text}, "a", default=True) is False


@pytest.mark.parametrize("text", ["1", "true", "zz", "yes", "2", "off", "-"])
def test_everything_else_is_true(text: str) -> None:
    assert query.boolean({"a": text}, "a") is True


def test_default_counts_only_when_the_key_is_absent() -> None:
    assert query.boolean({}, "a", default=True) is True
    assert query.boolean({"a": ""}, "a", default=True) is False
    assert query.boolean({}, "a") is False


def test_integers() -> None:
    assert query.integer({"t": "10"}, "t") == 10
    assert query.integer({"t": "-1"}, "t") == -1
    assert query.integer({"t": "+007"}, "t") == 7
    assert query.integer({}, "t", 5) == 5
    assert query.integer({"t": ""}, "t", 5) == 5


@pytest.mark.parametrize("text", ["x", "1.5", "1e3", " 1", "0x10", "1_0", "--1", "-", "٣"])
def test_bad_integer_has_gos_words(text: str) -> None:
    with pytest.raises(SystemFailure) as caught:
        query.integer({"t": text}, "t")
    assert caught.value.message == f'strconv.Atoi: parsing "{text}": invalid syntax'


def test_integer_out_of_range_and_required() -> None:
    with pytest.raises(SystemFailure, match="value out of range"):
        query.integer({"t": "9" * 4000}, "t")
    with pytest.raises(SystemFailure, match="value out of range"):
        query.integer({"t": str(2**63)}, "t")
    with pytest.raises(InvalidParameter) as caught:
        query.integer({}, "h", None, refuse=InvalidParameter)
    assert caught.value.message == 'strconv.Atoi: parsing "": invalid syntax'


def test_timestamps() -> None:
    assert query.timestamp_ns({}, "since") is None
    assert query.timestamp_ns({"since": ""}, "since") is None
    assert query.timestamp_ns({"since": "0"}, "since") == 0
    assert query.timestamp_ns({"since": "1.5"}, "since") == 1_500_000_000
    assert query.timestamp_ns({"since": "1.000000001"}, "since") == 1_000_000_001
    with pytest.raises(EngineError) as caught:
        query.timestamp_ns({"since": "yesterday"}, "since")
    assert caught.value.message == 'strconv.ParseInt: parsing "yesterday": invalid syntax'


def test_filters() -> None:
    assert query.filters({}).get("label") == ()
    assert query.filters({"filters": '{"label":["a"]}'}).get("label") == ("a",)
    with pytest.raises(InvalidParameter, match="Invalid filter 'x'"):
        query.filters({"filters": '{"x":["a"]}'}, ("label",))
