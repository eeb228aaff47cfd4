# ruff: noqa: E501, RUF009

from __future__ import annotations

import json
import string
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.container import (
    Container,
    ContainerConfig,
    HostConfig,
    LogConfig,
    Mount,
    NetworkingConfig,
    State,
    UpdateConfig,
)
from balenapy.core.wire import (
    ZERO_TIME,
    MalformedJSON,
    decode,
    encode,
    flag,
    has_any_key,
    number,
    optional,
    parse_json,
    parse_rfc3339,
    rfc3339nano,
    text,
    words,
)

CLASSES = (Container, ContainerConfig, HostConfig, Mount, NetworkingConfig, State, UpdateConfig)
WRAPPER = ("ContainerConfigWrapper", "")
INNER = ("ContainerConfigWrapper", "HostConfig")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def keys_of(cls: type[Any]) -> list[str]:
    return [field.metadata["json"] for field in fields(cls) if "json" in field.metadata]


@dataclass(slots=True)
class Sample:
    GO: ClassVar[str] = "test.Sample"
    name: str = text("Name")
    size: int = number("Size", omit=True)
    on: bool | None = optional("On", omit=True)
    off: bool = flag("Off", omit=True)
    items: list[str] | None = optional("List", omit=True)
    command: list[str] | None = words("Command")
    table: dict[str, int] | None = optional("Table")


def test_keys_match_without_regard_to_case_and_unknown_ones_are_ignored() -> None:
    assert Sample(name="a", size=1) == decode(Sample, {"NAME": "a", "siZe": 1, "Other": {"x": []}})


def test_null_leaves_the_zero_value() -> None:
    assert Sample() == decode(Sample, {"Name": None, "Size": None, "List": None, "Command": None})
    assert Sample() == decode(Sample, None)
    assert Sample(items=["", "a"]) == decode(Sample, {"List": [None, "a"]})


def test_a_pointer_is_omitted_only_when_nil_and_a_value_when_zero() -> None:
    assert encode(Sample(items=[])) == {"Name": "", "Command": None, "Table": None}
    assert encode(Sample(on=False))["On"] is False
    assert "Off" not in encode(Sample(off=False))


def test_maps_are_written_sorted() -> None:
    assert list(encode(Sample(table={"b": 1, "a": 2}))["Table"]) == ["a", "b"]


def test_a_string_may_stand_for_a_list_of_words() -> None:
    assert decode(Sample, {"Command": "sleep 1"}).command == ["sleep 1"]
    assert decode(Sample, {"Command": ["sleep", "1"]}).command == ["sleep", "1"]


@pytest.mark.parametrize(
    ("cls", "value", "within", "message"),
    [
        (HostConfig, {"Memory": "x"}, INNER, "string into Go struct field HostConfig.HostConfig.Memory of type int64"),
        (HostConfig, {"Memory": 1.5}, INNER, "number 1.5 into Go struct field HostConfig.HostConfig.Memory of type int64"),
        (HostConfig, {"BlkioWeight": 70000}, INNER,
         "number 70000 into Go struct field HostConfig.HostConfig.BlkioWeight of type uint16"),
        (HostConfig, {"LogConfig": {"Type": 1}}, INNER,
         "number into Go struct field LogConfig.HostConfig.LogConfig.Type of type string"),
        (HostConfig, {"Privileged": "yes"}, INNER, "string into Go struct field HostConfig.HostConfig.Privileged of type bool"),
        (HostConfig, [], INNER, "array into Go struct field ContainerConfigWrapper.HostConfig of type container.HostConfig"),
        (HostConfig, {"PortBindings": []}, INNER,
         "array into Go struct field HostConfig.HostConfig.PortBindings of type nat.PortMap"),
        (ContainerConfig, {"Env": [1]}, WRAPPER, "number into Go struct field ContainerConfigWrapper.Env of type string"),
        (ContainerConfig, {"Env": "A=1"}, WRAPPER, "string into Go struct field ContainerConfigWrapper.Env of type []string"),
        (ContainerConfig, {"Cmd": {}}, WRAPPER, "object into Go struct field ContainerConfigWrapper.Cmd of type string"),
        (ContainerConfig, {"Labels": {"a": True}}, WRAPPER,
         "bool into Go struct field ContainerConfigWrapper.Labels of type string"),
        (LogConfig, "x", ("", ""), "string into Go value of type container.LogConfig"),
    ],
)  # fmt: skip
def test_wrong_types_are_told_in_gos_words(cls: type[Any], value: Any, within: tuple[str, str], message: str) -> None:
    with pytest.raises(MalformedJSON) as caught:
        decode(cls, value, within=within)

    assert f"json: cannot unmarshal {message}" == caught.value.message


@given(st.sampled_from(CLASSES), st.data())
def test_any_json_is_decoded_or_refused_in_words(cls: type[Any], data: st.DataObject) -> None:
    value = data.draw(st.dictionaries(st.sampled_from(keys_of(cls)), json_values, max_size=6) | json_values)

    with suppress(MalformedJSON):
        written = encode(decode(cls, value))
        assert written == encode(decode(cls, json.loads(json.dumps(written))))


def test_an_embedded_struct_is_there_when_any_of_its_keys_is() -> None:
    assert has_any_key(ContainerConfig, {"image": "x"})
    assert not has_any_key(ContainerConfig, {"Image": None, "HostConfig": {}})


# --- texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "EOF"),
        (" \n", "EOF"),
        ('{"a":', "unexpected EOF"),
        ('"abc', "unexpected EOF"),
        ("zz", "invalid character 'z' looking for beginning of value"),
        ("NaN", "invalid character 'N' looking for beginning of value"),
        ('{"a" 1}', "invalid character '1' after object key"),
        ("[1 2]", "invalid character '2' after array element"),
        ('{"a":1 2}', "invalid character '2' after object key:value pair"),
        ("{a:1}", "invalid character 'a' looking for beginning of object key string"),
        ("[1,]", "invalid character ']' looking for beginning of value"),
    ],
)
def test_broken_json_is_told_in_gos_words(source: str, message: str) -> None:
    with pytest.raises(MalformedJSON) as caught:
        parse_json(source)

    assert message == caught.value.message


@given(st.text(alphabet=string.printable) | st.binary())
def test_any_text_is_parsed_or_refused(source: str | bytes) -> None:
    with suppress(MalformedJSON):
        parse_json(source)


@given(json_values)
def test_what_is_json_is_read_as_json(value: Any) -> None:
    assert value == parse_json(json.dumps(value))


@pytest.mark.parametrize(
    ("ns", "shown"),
    [
        (0, ZERO_TIME),
        (1_795_425_889_767_665_093, "2026-11-23T09:24:49.767665093Z"),
        (1_795_425_889_000_000_000, "2026-11-23T09:24:49Z"),
        (1_795_425_889_500_000_000, "2026-11-23T09:24:49.5Z"),
    ],
)
def test_times_are_shown_as_go_shows_them(ns: int, shown: str) -> None:
    assert shown == rfc3339nano(ns)


@given(st.integers(min_value=0, max_value=2**62))
def test_times_are_read_back(ns: int) -> None:
    assert ns == parse_rfc3339(rfc3339nano(ns))


def test_zones_are_taken_into_account() -> None:
    assert parse_rfc3339("2026-11-23T09:24:49Z") == parse_rfc3339("2026-11-23T11:24:49+02:00")
    for bad in ("2026-11-23", "2026-13-01T00:00:00Z", "2026-11-23T09:24:49", "x"):
        with pytest.raises(ValueError, match="not an RFC 3339 time"):
            parse_rfc3339(bad)
