"""The `filters` query parameter: `{"key": {"value": true}}`, or the older `{"key": ["value"]}`.

Values of one key are alternatives, keys are ANDed, `label` values are ANDed. How a value is compared differs by key and
list: exactly, as a regular expression, as a prefix, as a label; each way is a method here.
Source: moby api/types/filters/parse.go.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from balenapy.core.wire import MalformedJSON, kind_of, parse_json
from balenapy.errors import InvalidParameter


@dataclass(frozen=True, slots=True)
class Filters:
    """Every method is true when the key was not given at all: no filter, no restriction."""

    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return bool(self.values.get(key))

    def __bool__(self) -> bool:
        return any(self.values.values())

    def get(self, key: str) -> tuple[str, ...]:
        return self.values.get(key, ())

    def exact(self, key: str, value: str) -> bool:
        wanted = self.get(key)
        return not wanted or value in wanted

    def prefix(self, key: str, value: str) -> bool:
        """A wanted text begins the value."""
        wanted = self.get(key)
        return not wanted or any(value.startswith(text) for text in wanted)

    def regexp(self, key: str, *candidates: str) -> bool:
        """A wanted text equals a candidate, or is found in it as a regular expression; a broken one matches nothing."""
        wanted = self.get(key)
        return not wanted or any(
            text == candidate or _search(text, candidate) for text in wanted for candidate in candidates
        )

    def labels(self, labels: Mapping[str, str] | None, key: str = "label") -> bool:
        """Every wanted `name` or `name=value` is among the labels."""
        wanted = self.get(key)
        return all(_has_label(labels or {}, text) for text in wanted)

    def without_labels(self, labels: Mapping[str, str] | None, key: str = "label!") -> bool:
        """Not every unwanted label is there (prunes: `label!`)."""
        unwanted = self.get(key)
        return not unwanted or not all(_has_label(labels or {}, text) for text in unwanted)

    def boolean(self, key: str, *, digits: bool = False) -> bool | None:
        """The value of a yes/no filter, None if not given; `digits` admits 1 and 0 too.

        Raises: InvalidParameter `Invalid filter 'dangling=[V]'`.
        """
        wanted = self.get(key)
        if not wanted:
            return None
        if "true" in wanted or (digits and "1" in wanted):
            return True
        if "false" in wanted or (digits and "0" in wanted):
            return False
        raise InvalidParameter(f"Invalid filter '{key}=[{' '.join(wanted)}]'")


NO_FILTERS = Filters()


def parse_filters(text: str, allowed: Collection[str] | None = None) -> Filters:
    """Read the parameter; "" is no filter. `allowed` None admits any key (events).

    Raises:
        MalformedJSON: not JSON of either form (500; volumes wrap it as 400).
        InvalidParameter: `Invalid filter 'K'`.
    """
    if not text:
        return NO_FILTERS
    try:
        document = parse_json(text)
    except MalformedJSON as error:
        # This text is parsed by json.Unmarshal over there, whose word for a cut text differs from the decoder's.
        if error.message in ("EOF", "unexpected EOF"):
            raise MalformedJSON("unexpected end of JSON input") from None
        raise
    filters = Filters(_values(document))
    if allowed is not None:
        for key in filters.values:
            if key not in allowed:
                raise InvalidParameter(f"Invalid filter '{key}'")
    return filters


def _values(document: Any) -> dict[str, tuple[str, ...]]:
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise MalformedJSON(_mismatch(document, "map[string]map[string]bool"))
    if all(entry is None or _is_set(entry) for entry in document.values()):
        return {key: tuple(entry or ()) for key, entry in document.items()}
    if all(entry is None or _is_list(entry) for entry in document.values()):
        return {key: tuple(item or "" for item in entry or ()) for key, entry in document.items()}
    # The first form's complaint is the one that is told.
    wrong = next(entry for entry in document.values() if entry is not None and not _is_set(entry))
    if isinstance(wrong, dict):
        inner = next(item for item in wrong.values() if item is not None and not isinstance(item, bool))
        raise MalformedJSON(_mismatch(inner, "bool"))
    raise MalformedJSON(_mismatch(wrong, "map[string]bool"))


def _is_set(entry: Any) -> bool:
    return isinstance(entry, dict) and all(item is None or isinstance(item, bool) for item in entry.values())


def _is_list(entry: Any) -> bool:
    return isinstance(entry, list) and all(item is None or isinstance(item, str) for item in entry)


def _mismatch(value: Any, go: str) -> str:
    return f"json: cannot unmarshal {kind_of(value)} into Go value of type {go}"


def _search(pattern: str, candidate: str) -> bool:
    try:
        return re.search(pattern, candidate) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _has_label(labels: Mapping[str, str], wanted: str) -> bool:
    name, equals, value = wanted.partition("=")
    return name in labels and (not equals or labels[name] == value)
