"""The comparers themselves: what they must find, and what not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from tests.compat import shapes

ID = "ab" * 32
HEADERS = {
    "api-version": "1.39",
    "ostype": "linux",
    "docker-experimental": "false",
    "server": "Docker/18.9.17 (linux)",
    "content-type": "application/json",
}


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: dict(HEADERS))


def test_an_answer_as_described_has_no_problems() -> None:
    body = json.dumps({"Id": ID, "Warnings": []}).encode()

    assert shapes.problems("POST", "/containers/create", Answer(201, body)) == []
    assert shapes.problems("POST", "/containers/{id}/start", Answer(204)) == []
    assert shapes.problems("GET", "/containers/{id}/json", Answer(404, b'{"message":"No such container: x"}\n')) == []


@pytest.mark.parametrize(
    ("method", "path", "answer", "problem"),
    [
        ("POST", "/containers/{id}/start", Answer(418, b'{"message":"x"}\n'), "status 418"),
        ("POST", "/containers/{id}/start", Answer(204, b"x"), "with a body"),
        ("POST", "/containers/{id}/start", Answer(404, b'{"message":"x"}'), "without its newline"),
        ("POST", "/containers/{id}/start", Answer(404, b'{"error":"x"}\n'), "not an error object"),
        ("POST", "/containers/create", Answer(201, b'{"Id": 1, "Warnings": null}'), "Id: 1 is not string"),
        ("POST", "/containers/create", Answer(201, b'{"Warnings": null}'), "Id is missing"),
        ("POST", "/containers/create", Answer(201, b'{"Id": null, "Warnings": []}'), "Id: null, not string"),
        ("GET", "/containers/json", Answer(200, b'[{"Names": "x"}]'), "[].Names: 'x' is not array"),
        ("POST", "/containers/{id}/start", Answer(204, headers={}), "header api-version"),
    ],
)
def test_what_the_description_does_not_have_is_found(method: str, path: str, answer: Answer, problem: str) -> None:
    found = shapes.problems(method, path, answer)

    assert any(problem in line for line in found), found


def test_every_recorded_answer_is_like_itself() -> None:
    for entry in shapes.recorded("INDEX.json")["files"]:
        assert shapes.differences(shapes.recorded(entry["file"]), entry["file"]) == []


def test_keys_and_kinds_that_differ_are_found_and_may_be_listed() -> None:
    recorded = {"Id": ID, "Labels": {"a": "b"}, "List": [{"x": 1}, {"x": 2, "y": None}], "When": "2024-01-02T03:04:05Z"}
    ours = {"Id": "word", "Labels": {"c": 1}, "List": [{"x": "1"}], "When": "", "More": True}

    found = shapes.differences(ours, recorded)

    assert [line.partition(":")[0] for line in found] == ["Id", "Labels{}", "List[].x", "More"]
    listed = dict.fromkeys(("Id", "Labels{}", "List[].x", "More"), "why")
    assert shapes.differences(ours, recorded, listed) == []
    assert shapes.differences(recorded, recorded, {"Id": "why"}) == ["Id: is listed, but does not differ"]


def test_null_is_not_an_empty_list() -> None:
    assert shapes.differences({"a": None}, {"a": []}) != []
    assert shapes.differences({"a": [1]}, {"a": []}) == []
    assert shapes.differences({}, {"a": []}) == ["a: missing"]
