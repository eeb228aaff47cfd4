from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.filters import Filters, parse_filters
from balenapy.core.wire import MalformedJSON
from balenapy.errors import EngineError, InvalidParameter

values = st.dictionaries(st.text(max_size=5), st.lists(st.text(max_size=5), max_size=3, unique=True), max_size=3)


@given(values)
def test_both_forms_mean_the_same(wanted: dict[str, list[str]]) -> None:
    new = json.dumps({key: dict.fromkeys(entries, True) for key, entries in wanted.items()})

    assert parse_filters(json.dumps(wanted)) == parse_filters(new)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(EngineError):
        parse_filters(text, ["name"])


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("zz", MalformedJSON, "invalid character 'z' looking for beginning of value"),
        ("{", MalformedJSON, "unexpected end of JSON input"),
        ("[]", MalformedJSON, "json: cannot unmarshal array into Go value of type map[string]map[string]bool"),
        ('{"name":1}', MalformedJSON, "json: cannot unmarshal number into Go value of type map[string]bool"),
        ('{"name":{"a":1}}', MalformedJSON, "json: cannot unmarshal number into Go value of type bool"),
        ('{"zz":["1"]}', InvalidParameter, "Invalid filter 'zz'"),
    ],
)
def test_what_is_wrong_is_told(text: str, kind: type[EngineError], message: str) -> None:
    with pytest.raises(kind) as caught:
        parse_filters(text, ["name"])

    assert message == caught.value.message


def filters(**wanted: Any) -> Filters:
    return parse_filters(json.dumps(wanted))


def test_no_filter_matches_everything() -> None:
    none = parse_filters("")

    assert not none
    assert none.exact("a", "x")
    assert none.prefix("a", "x")
    assert none.regexp("a", "x")
    assert none.labels({})
    assert none.without_labels({"a": "b"})
    assert none.boolean("a") is None


def test_ways_to_match() -> None:
    wanted = filters(a=["one", "^tw.$"], p=["exec_"])

    assert wanted.exact("a", "one")
    assert not wanted.exact("a", "two")
    assert wanted.regexp("a", "two")
    assert wanted.regexp("a", "/x", "one")
    assert not wanted.regexp("a", "three")
    assert wanted.prefix("p", "exec_create: sh")
    assert not wanted.prefix("p", "die")


def test_a_broken_regular_expression_matches_only_itself() -> None:
    wanted = filters(a=["("])

    assert wanted.regexp("a", "(")
    assert not wanted.regexp("a", "x(")


def test_labels_are_anded_and_may_name_a_value() -> None:
    labels = {"a": "1", "b": ""}

    assert filters(label=["a", "a=1", "b="]).labels(labels)
    assert not filters(label=["a", "c"]).labels(labels)
    assert not filters(label=["a=2"]).labels(labels)
    assert not filters(label=["a"]).labels(None)
    assert filters(**{"label!": ["a", "c"]}).without_labels(labels)
    assert not filters(**{"label!": ["a=1"]}).without_labels(labels)


def test_booleans_are_exactly_true_or_false() -> None:
    assert filters(dangling=["true"]).boolean("dangling") is True
    assert filters(dangling={"false": True}).boolean("dangling") is False
    assert filters(dangling=["1"]).boolean("dangling", digits=True) is True
    assert filters(dangling=["0"]).boolean("dangling", digits=True) is False
    with pytest.raises(InvalidParameter, match=r"Invalid filter 'dangling=\[1\]'"):
        filters(dangling=["1"]).boolean("dangling")
