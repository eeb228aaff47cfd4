"""JSON of the API <-> dataclasses, with the habits of Go's encoding/json.

Reading: keys match without regard to case, unknown keys are ignored, `null` leaves the zero value, a wrong type is an
error in Go's words. Writing: keys in the order of the fields, maps sorted by key, `null` for a nil slice, map or
pointer, and fields marked `omit` (Go's omitempty) left out when zero.

A field is declared by its kind, which also sets its zero value; its type comes from the annotation:

    @dataclass(slots=True)
    class LogConfig:
        GO: ClassVar[str] = "container.LogConfig"      # its Go type, for error texts
        type: str = text("Type")
        config: dict[str, str] | None = optional("Config")

Records that are stored use the same two functions.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
import types
import typing
from calendar import timegm
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from balenapy.errors import EngineError

T = TypeVar("T")

ZERO_TIME = "0001-01-01T00:00:00Z"  # Go's time.Time{}; our 0 nanoseconds


class MalformedJSON(EngineError):
    """A text that is not JSON, or JSON of the wrong shape, in the words of Go's decoder.

    Unclassified (500) as the engine we replace has it for container create; routes that answer 400 re-raise it.
    """


# --- declaring fields -----------------------------------------------------------------------------------------


def text(name: str, *, omit: bool = False, go: str = "string") -> Any:
    """A string."""
    return dataclasses.field(default="", metadata={"json": name, "omit": omit, "go": go})


def flag(name: str, *, omit: bool = False) -> Any:
    """A boolean."""
    return dataclasses.field(default=False, metadata={"json": name, "omit": omit, "go": "bool"})


def number(name: str, *, omit: bool = False, go: str = "int64", default: int = 0) -> Any:
    """An integer of the Go type `go`, which bounds it."""
    return dataclasses.field(default=default, metadata={"json": name, "omit": omit, "go": go})


def optional(name: str, *, omit: bool = False, go: str = "") -> Any:
    """A pointer, slice or map: `None` is null."""
    return dataclasses.field(default=None, metadata={"json": name, "omit": omit, "go": go})


def words(name: str, *, omit: bool = False) -> Any:
    """A `strslice.StrSlice`: a list of strings that may be written as one string."""
    return dataclasses.field(
        default=None, metadata={"json": name, "omit": omit, "go": "strslice.StrSlice", "words": True}
    )


def struct(name: str, factory: Callable[[], Any], *, omit: bool = False) -> Any:
    """A nested object, map or list that is never null."""
    return dataclasses.field(default_factory=factory, metadata={"json": name, "omit": omit, "go": ""})


@dataclasses.dataclass(frozen=True, slots=True)
class Empty:
    """Go's `struct{}`: the value of a map that is used as a set."""

    GO: typing.ClassVar[str] = "struct {}"


EMPTY = Empty()

# --- reading --------------------------------------------------------------------------------------------------

_RANGES = {
    "int": (-(2**63), 2**63 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint": (0, 2**64 - 1),
    "uint64": (0, 2**64 - 1),
    "uint32": (0, 2**32 - 1),
    "uint16": (0, 2**16 - 1),
}


class _Mismatch(Exception):
    def __init__(self, value: Any, go: str) -> None:
        super().__init__(value, go)
        self.word = _word(value, go)
        self.go = go
        self.struct = ""
        self.path: list[str] = []

    def message(self) -> str:
        where = f"struct field {self.struct}.{'.'.join(self.path)}" if self.path else "value"
        return f"json: cannot unmarshal {self.word} into Go {where} of type {self.go}"


def _word(value: Any, go: str) -> str:
    kind = kind_of(value)
    return f"number {json.dumps(value)}" if kind == "number" and go in _RANGES else kind


def kind_of(value: Any) -> str:
    """What Go's decoder calls a JSON value."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


_Decoder = Callable[[Any], Any]


def _decode_text(go: str) -> _Decoder:
    def decode_text(value: Any) -> str:
        if not isinstance(value, str):
            raise _Mismatch(value, go)
        return value

    return decode_text


def _decode_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Mismatch(value, "bool")
    return value


def _decode_number(go: str) -> _Decoder:
    low, high = _RANGES.get(go, _RANGES["int64"])

    def decode_number(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _Mismatch(value, go)
        return value

    return decode_number


def _decode_words(value: Any) -> list[str]:
    # strslice.StrSlice: tries a list first, then a string; the error is that of the string.
    if isinstance(value, list) and all(item is None or isinstance(item, str) for item in value):
        return [item or "" for item in value]
    if isinstance(value, str):
        return [value]
    raise _Mismatch(value, "string")


def _zero(hint: Any) -> Any:
    if hint in (str, int, bool):
        return hint()
    if dataclasses.is_dataclass(hint):
        return cast(Callable[[], Any], hint)()
    return None


def _decode_list(hint: Any, go: str, item: _Decoder) -> _Decoder:
    zero = _zero(hint)

    def decode_list(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise _Mismatch(value, go)
        return [zero if entry is None else item(entry) for entry in value]

    return decode_list


def _decode_map(hint: Any, go: str, item: _Decoder) -> _Decoder:
    zero = _zero(hint)

    def decode_map(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _Mismatch(value, go)
        return {key: zero if entry is None else item(entry) for key, entry in value.items()}

    return decode_map


def _decode_fixed(hints: tuple[Any, ...], go: str) -> _Decoder:
    items = [_decoder_of(hint, go) for hint in hints]

    def decode_fixed(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _Mismatch(value, f"[{len(items)}]{go}")
        padded = (value + [0] * len(items))[: len(items)]
        return tuple(0 if entry is None else item(entry) for item, entry in zip(items, padded, strict=True))

    return decode_fixed


def _go_name(hint: Any, go: str = "") -> str:
    if go:
        return go
    if hint in (str, int, bool):
        return {str: "string", int: "int64", bool: "bool"}[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return "[]" + _go_name(arguments[0])
    if origin is dict:
        return "map[string]" + _go_name(arguments[1])
    return str(getattr(hint, "GO", getattr(hint, "__name__", "interface {}")))


def _decoder_of(hint: Any, go: str = "") -> _Decoder:
    if hint is str:
        return _decode_text(go or "string")
    if hint is bool:
        return _decode_flag
    if hint is int:
        return _decode_number(go or "int64")
    if hint is Any or hint is object:
        return lambda value: value
    if dataclasses.is_dataclass(hint):
        return lambda value: _decode_struct(cast(type[Any], hint), value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        decode_inner = _decoder_of(inner, go)
        return lambda value: None if value is None else decode_inner(value)
    if origin is list:
        return _decode_list(arguments[0], _go_name(hint, go), _decoder_of(arguments[0]))
    if origin is dict:
        return _decode_map(arguments[1], _go_name(hint, go), _decoder_of(arguments[1]))
    if origin is tuple:
        return _decode_fixed(arguments, go or "int64")
    raise TypeError(f"no JSON form for {hint!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    attribute: str
    name: str
    omit: bool
    plain: bool  # its value is its own JSON
    decode: _Decoder


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    fields: tuple[_Field, ...]
    by_key: Mapping[str, _Field]
    go: str
    empty: bool  # `Empty` and its like


_plans: dict[type[Any], _Plan] = {}


def _ordered(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    # Go may embed a struct in the middle of another: BASE_AFTER names the field behind which inherited fields stand.
    fields = list(dataclasses.fields(cls))
    after = getattr(cls, "BASE_AFTER", None)
    if after is None:
        return fields
    inherited = {each.name for each in dataclasses.fields(cls.__bases__[0])}
    own = [each for each in fields if each.name not in inherited]
    position = next(index for index, each in enumerate(own, 1) if each.name == after)
    return own[:position] + [each for each in fields if each.name in inherited] + own[position:]


def _plan(cls: type[Any]) -> _Plan:
    plan = _plans.get(cls)
    if plan is None:
        hints = typing.get_type_hints(cls)
        fields = tuple(
            _Field(
                attribute=each.name,
                name=each.metadata["json"],
                omit=each.metadata["omit"],
                plain=hints[each.name] in (str, int, bool),
                decode=_decode_words
                if "words" in each.metadata
                else _decoder_of(hints[each.name], each.metadata["go"]),
            )
            for each in _ordered(cls)
            if "json" in each.metadata
        )
        by_key = {field.name.lower(): field for field in fields}
        plan = _plans[cls] = _Plan(fields, by_key, _go_name(cls), not fields)
    return plan


def _decode_struct(cls: type[T], value: Any) -> T:
    plan = _plan(cls)
    if not isinstance(value, dict):
        raise _Mismatch(value, plan.go)
    arguments: dict[str, Any] = {}
    for key, entry in value.items():
        field = plan.by_key.get(key.lower())
        if field is None or entry is None:
            continue
        try:
            arguments[field.attribute] = field.decode(entry)
        except _Mismatch as mismatch:
            mismatch.path.insert(0, field.name)
            mismatch.struct = mismatch.struct or plan.go.rpartition(".")[2]
            raise
    return cls(**arguments)


def decode(cls: type[T], value: Any, *, within: tuple[str, str] = ("", "")) -> T:
    """Make a `cls` of parsed JSON; None (null) gives the zero value.

    Args:
        within: (Go struct, field) that holds the value, for error texts: ("ContainerConfigWrapper", "HostConfig").

    Raises: MalformedJSON, in Go's words.
    """
    if value is None:
        return cls()
    try:
        return _decode_struct(cls, value)
    except _Mismatch as mismatch:
        holder, field = within
        if field:
            mismatch.path.insert(0, field)
        if holder and (not field or len(mismatch.path) == 1):
            mismatch.struct = holder
        raise MalformedJSON(mismatch.message()) from None


def has_any_key(cls: type[Any], value: Mapping[str, Any]) -> bool:
    """Say whether an object sets any field of `cls` (Go: whether an embedded pointer is not nil)."""
    by_key = _plan(cls).by_key
    return any(key.lower() in by_key and entry is not None for key, entry in value.items())


# --- writing --------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """The JSON value (dict, list, str, ...) of a dataclass made of the kinds above, or of a container of such."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {key: encode(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [encode(entry) for entry in value]
    result: dict[str, Any] = {}
    for field in _plan(type(value)).fields:
        entry = getattr(value, field.attribute)
        if field.omit and _is_empty(entry, field.plain):
            continue
        result[field.name] = entry if field.plain else encode(entry)
    return result


def _is_empty(value: Any, plain: bool) -> bool:
    # Go's omitempty: false, 0, "", nil, and empty maps and slices. A pointer (`bool | None`) is empty only if nil.
    return value is None or (not value if plain else value in ([], {}))


# --- texts ----------------------------------------------------------------------------------------------------


def parse_json(data: bytes | str) -> Any:
    """Parse one JSON value; trailing white space is allowed.

    Raises: MalformedJSON in the words of Go's decoder: `EOF`, `unexpected EOF`, `invalid character 'x' looking ...`.
    """
    if isinstance(data, bytes):
        data = data.decode("utf-8", "replace")
    if not data.strip(" \t\r\n"):
        raise MalformedJSON("EOF")
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise MalformedJSON("exceeded max depth") from None
    except json.JSONDecodeError as error:
        raise MalformedJSON(_go_syntax_error(data, error)) from None
    except ValueError:  # a number of thousands of digits
        raise MalformedJSON("json: cannot unmarshal number into Go value of type int64") from None


def _refuse_constant(name: str) -> Any:
    # NaN and Infinity are JSON to Python only.
    raise json.JSONDecodeError("Expecting value", name, 0)


def _quote(character: str) -> str:
    return {"'": r"'\''", '"': "'\"'", "\n": r"'\n'", "\t": r"'\t'", "\r": r"'\r'"}.get(
        character, f"'{character}'" if character.isprintable() else f"'\\x{ord(character):02x}'"
    )


def _go_syntax_error(data: str, error: json.JSONDecodeError) -> str:
    position = error.pos
    while position < len(error.doc) and error.doc[position] in " \t\r\n":
        position += 1
    if position >= len(error.doc) or "Unterminated" in error.msg:
        return "unexpected EOF"
    character = _quote(error.doc[position])
    if error.msg.startswith("Extra data"):
        return f"invalid character {character} after top-level value"
    if error.msg.startswith("Expecting value"):
        return f"invalid character {character} looking for beginning of value"
    if "property name" in error.msg:
        return f"invalid character {character} looking for beginning of object key string"
    if "':' delimiter" in error.msg:
        return f"invalid character {character} after object key"
    if "',' delimiter" in error.msg:
        inside = "array element" if _innermost_bracket(error.doc[:position]) == "[" else "object key:value pair"
        return f"invalid character {character} after {inside}"
    if "control character" in error.msg:
        return f"invalid character {character} in string literal"
    return f"invalid character {character} in string escape code"


def _innermost_bracket(text_before: str) -> str:
    stack: list[str] = []
    in_string = escaped = False
    for character in text_before:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in "[{":
            stack.append(character)
        elif character in "]}" and stack:
            stack.pop()
    return stack[-1] if stack else ""


def parse_bool(value: str) -> bool | None:
    """Go's strconv.ParseBool; None for what is neither."""
    if value in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    return False if value in ("0", "f", "F", "FALSE", "false", "False") else None


def rfc3339nano(ns: int) -> str:
    """Nanoseconds since 1970 as Go prints a UTC time: trailing zeros of the fraction cut; 0 is Go's zero time."""
    if ns == 0:
        return ZERO_TIME
    seconds, fraction = divmod(ns, 1_000_000_000)
    base = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    if fraction == 0:
        return base + "Z"
    return f"{base}.{fraction:09d}".rstrip("0") + "Z"


_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,9})\d*)?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII
)


def parse_rfc3339(value: str) -> int:
    """RFC 3339 text as nanoseconds since 1970; Go's zero time is 0.

    Raises: ValueError.
    """
    if value == ZERO_TIME:
        return 0
    match = _TIME.fullmatch(value)
    if match is None:
        raise ValueError(f"not an RFC 3339 time: {value!r}")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    if not (1 <= month <= 12 and 1 <= day <= 31 and hour <= 23 and minute <= 59 and second <= 60):
        raise ValueError(f"not an RFC 3339 time: {value!r}")
    seconds = timegm((year, month, day, hour, minute, second))
    if match[8]:
        offset_s = int(match[9]) * 3600 + int(match[10]) * 60
        seconds -= offset_s if match[8] == "+" else -offset_s
    return seconds * 1_000_000_000 + int((match[7] or "").ljust(9, "0"))
