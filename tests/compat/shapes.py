"""Whether an answer has the shape that clients were written for: the API's description and recorded answers.

    assert shapes.problems("GET", "/containers/{id}/json", answer) == []          # status, headers, types of v1.39.yaml
    assert shapes.differences(answer.json, "container_inspect_running.json", {    # same keys, same kinds of values
        "HostConfig.CgroupnsMode": "20.10 only",                                  # each difference with its reason
    }) == []

Both return what is wrong as lines of text, so that a failing test says all of it at once.

A *kind* is null, boolean, number, object, array, or one of several sorts of text: a time, an id (64 hex digits), a
digest, a MAC or IP address, other text. Empty text is of every sort of text. Of an array the recorded elements
together say what an element may be. Objects whose keys are data (labels, networks by name, ports) are told by `MAPS`.

A difference is named by its path: `HostConfig.PidsLimit`, `Mounts[].Name`, and below a map
`NetworkSettings.Networks{}.Links`. One that is listed must be there: no list keeps excuses for what has been mended.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

DATA = Path(__file__).parent.parent / "data"
FIXTURES = DATA / "fixtures"

ENGINE_HEADERS = {"api-version": "1.39", "ostype": "linux", "docker-experimental": "false"}

# Statuses that every engine of this line answers, whatever the description says. (method, path) -> {status: why}
UNDESCRIBED_STATUSES: Mapping[tuple[str, str], Mapping[int, str]] = {
    ("POST", "/exec/{id}/resize"): {200: "the description says 201"},
    ("POST", "/images/delta"): {200: "the description does not have it"},
    ("POST", "/images/{name}/tag"): {500: "bad references are not classified"},
}

# What Go leaves out of its promises: pointers, which are null when not set.
NULLABLE = frozenset(("MemorySwappiness", "OomKillDisable", "ExitCode", "StopTimeout", "Init"))
# Where the description is wrong: what stands there is not looked at.
MISDESCRIBED = {"/system/df Containers[]": "a list of lists; they are entries of a container list"}

# Objects whose keys are data, by the last part of their path.
MAPS = frozenset(
    ("Labels", "Networks", "Ports", "PortBindings", "ExposedPorts", "Volumes", "Options", "Containers", "Sysctls",
     "Tmpfs", "StorageOpt", "Runtimes", "IndexConfigs", "Attributes", "LogConfig.Config", "GraphDriver.Data",
     "EndpointsConfig", "AuxiliaryAddresses", "networks", "memory_stats.stats", "DriverOpts")
)  # fmt: skip

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")
_ID = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")


class Answer(Protocol):
    """What is looked at of an answer; `tests.engine_process.Response` is one."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case."""

    @property
    def body(self) -> bytes: ...


# --- the description ------------------------------------------------------------------------------------------


@functools.cache
def description() -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document: dict[str, Any] = yaml.load((DATA / "v1.39.yaml").read_text(), loader)
    return document


def operations() -> Iterator[tuple[str, str]]:
    """Every (method, path) of the description."""
    for path, entry in description()["paths"].items():
        for method in entry:
            if method in ("get", "head", "post", "put", "delete"):
                yield method.upper(), path


def problems(method: str, path: str, answer: Answer, *, statuses: Collection[int] = ()) -> list[str]:
    """What of an answer the description does not know.

    Args:
        path: as the description has it: `/containers/{id}/json`.
        statuses: more that this case may answer (the code decides, not the description: ENDPOINTS).
    """
    found = list(_header_problems(answer))
    responses = description()["paths"][path][method.lower()]["responses"]
    known = {int(status) for status in responses} | UNDESCRIBED_STATUSES.get((method, path), {}).keys() | set(statuses)
    if answer.status not in known:
        found.append(f"status {answer.status} is not among {sorted(known)}")
    if answer.status in (204, 304) or method == "HEAD":
        if answer.body:
            found.append(f"{answer.status} with a body: {answer.body[:80]!r}")
        return found
    if answer.status >= 400:
        return found + list(_error_problems(answer))
    schema = responses.get(answer.status, {}).get("schema")
    if schema is None or schema.get("format") == "binary" or not answer.body:
        return found
    if answer.headers.get("content-type") == "application/json":
        wrong = [text.removeprefix(f"{path} ") for text in MISDESCRIBED if text.startswith(f"{path} ")]
        for line in mismatches(json.loads(answer.body), schema):
            if not any(line.startswith(text) for text in wrong):
                found.append(line)
    elif resolve(schema).get("type") in ("object", "array"):
        found.append(f"Content-Type {answer.headers.get('content-type')} for JSON")
    return found


def _header_problems(answer: Answer) -> Iterator[str]:
    for name, value in ENGINE_HEADERS.items():
        if answer.headers.get(name) != value:
            yield f"header {name}: {answer.headers.get(name)!r}, not {value!r}"
    if not re.fullmatch(r"Docker/\S+ \(linux\)", answer.headers.get("server", "")):
        yield f"header server: {answer.headers.get('server')!r}"


def _error_problems(answer: Answer) -> Iterator[str]:
    if answer.headers.get("content-type") != "application/json":
        yield f"an error as {answer.headers.get('content-type')}"
        return
    value = json.loads(answer.body)
    if not isinstance(value, dict) or list(value) != ["message"] or not isinstance(value["message"], str):
        yield f"not an error object: {answer.body[:200]!r}"
    if not answer.body.endswith(b"\n"):
        yield "an error object without its newline"


def resolve(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema itself, with references followed and `allOf` joined."""
    while "$ref" in schema:
        *_, name = schema["$ref"].split("/")
        schema = description()["definitions"][name]
    if "allOf" in schema:
        joined: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
        for part in map(resolve, schema["allOf"]):
            joined["properties"] |= part.get("properties", {})
            joined["required"] += part.get("required", [])
        return joined
    return schema


def mismatches(value: Any, schema: Mapping[str, Any], at: str = "") -> list[str]:
    """Where a value is not what a schema says: types, required fields, enumerations."""
    return list(_mismatches(value, schema, at))


def _mismatches(value: Any, schema: Mapping[str, Any], at: str) -> Iterator[str]:
    schema = resolve(schema)
    wanted = schema.get("type", "object" if "properties" in schema else None)
    if value is None:
        # Go writes null for a slice, map or pointer that was never made; the description rarely says so.
        named = at.rpartition(".")[2] in NULLABLE
        if wanted not in ("array", "object", None) and not schema.get("x-nullable") and not named:
            yield f"{at or 'the answer'}: null, not {wanted}"
        return
    if wanted is not None and not _is_of(value, wanted):
        yield f"{at or 'the answer'}: {value!r:.60} is not {wanted}"
        return
    if "enum" in schema and value not in schema["enum"] and value != "":  # the zero value of every Go string
        yield f"{at}: {value!r} is none of {schema['enum']}"
    if wanted == "array":
        for element in value:
            yield from _mismatches(element, schema.get("items", {}), f"{at}[]")
    elif wanted == "object":
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{_join(at, name)} is missing"
        named = schema.get("properties", {})
        others = schema.get("additionalProperties")
        for key, each in value.items():
            if key in named:
                yield from _mismatches(each, named[key], _join(at, key))
            elif isinstance(others, dict):
                yield from _mismatches(each, others, f"{at}{{}}")


def _is_of(value: Any, wanted: str) -> bool:
    if wanted == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, {"string": str, "boolean": bool, "array": list, "object": dict}[wanted])


# --- recorded answers -----------------------------------------------------------------------------------------


@functools.cache
def _text(name: str) -> str:
    return (FIXTURES / name).read_text()


def recorded(name: str) -> Any:
    """A fixture: one JSON value, or of a .jsonl file the list of its lines."""
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in _text(name).splitlines() if line.strip()]
    return json.loads(_text(name))


def differences(
    value: Any, fixture: Any, listed: Mapping[str, str] | None = None, *, maps: Collection[str] = ()
) -> list[str]:
    """Where a value has other keys, or other kinds of values, than a recorded one.

    Args:
        fixture: the name of a file of tests/data/fixtures, or what was recorded itself.
        listed: path -> why it differs; no such path may be listed in vain.
        maps: further paths of objects whose keys are data.
    """
    if isinstance(fixture, str):
        fixture = recorded(fixture)
    listed = listed or {}
    found = dict(_differences(value, [fixture], "", MAPS | set(maps)))
    lines = [f"{path or 'the answer'}: {text}" for path, text in found.items() if path not in listed]
    lines += [f"{path}: is listed, but does not differ" for path in listed if path not in found]
    return lines


def _differences(value: Any, recorded: list[Any], at: str, maps: Collection[str]) -> Iterator[tuple[str, str]]:
    kinds = {kind(each) for each in recorded}
    if not _same_kind(kind(value), kinds):
        yield at, f"{kind(value)} ({value!r:.60}), recorded as {' or '.join(sorted(kinds))}"
        return
    if isinstance(value, dict):
        objects = [each for each in recorded if isinstance(each, dict)]
        if _is_map(at, maps):
            values = [each for one in objects for each in one.values()]
            if values:
                for each in value.values():
                    yield from _differences(each, values, f"{at}{{}}", maps)
            return
        always = set.intersection(*(set(each) for each in objects))
        ever = set.union(*(set(each) for each in objects))
        for key in sorted(always - set(value)):
            yield _join(at, key), "missing"
        for key, each in value.items():
            if key not in ever:
                yield _join(at, key), f"not recorded ({each!r:.60})"
            else:
                yield from _differences(each, [one[key] for one in objects if key in one], _join(at, key), maps)
    elif isinstance(value, list):
        elements = [element for each in recorded if isinstance(each, list) for element in each]
        if elements:
            for each in value:
                yield from _differences(each, elements, f"{at}[]", maps)


def _is_map(at: str, maps: Collection[str]) -> bool:
    return any(at == name or at.endswith(("." + name, "}" + name, "]." + name)) for name in maps)


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "array"
    return _sort_of(value)


def _sort_of(text: str) -> str:
    for name, pattern in (("time", _TIME), ("id", _ID), ("digest", _DIGEST), ("mac", _MAC)):
        if pattern.fullmatch(text):
            return f"text: {name}"
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        return "text" if text else "text: empty"
    return "text: address" if "." in text or ":" in text else "text"


def _same_kind(ours: str, recorded: Iterable[str]) -> bool:
    recorded = set(recorded)
    if ours in recorded:
        return True
    texts = {each for each in recorded if each.startswith("text")}
    return ours.startswith("text") and (bool(texts) and (ours == "text: empty" or "text: empty" in texts))
