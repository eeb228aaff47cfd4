"""Dockerfiles: text into stages of instructions. What an instruction does is `core/instructions` and the engine.

    parse_dockerfile(bytes)  ->  Dockerfile: arguments before the first FROM, stages, warnings
    parse_lines(text)        ->  instructions without stages, as `commit --change` has them
    parse_line(text)         ->  one instruction: a trigger of ONBUILD

Two passes, as in the engine we replace, because they fail in different words. The first makes lines and splits each by
the rule of its instruction:

    a line is a comment when it begins with `#`; the first comments may be directives (`# escape=`)
    the escape character at the end of a line joins the next; comments between are left out, blank lines too, with a
    warning
    JSON, else words       ADD COPY VOLUME             (invalid JSON is the other form, silently)
    JSON, else one text    CMD ENTRYPOINT RUN SHELL, HEALTHCHECK after its first word
    name=value…            ENV LABEL; the old form `name value`
    words with quotes      ARG
    words                  EXPOSE FROM
    one text               MAINTAINER STOPSIGNAL USER WORKDIR
    an instruction         ONBUILD

The second looks at the number of arguments and at flags, and says the line. Variables are put in later still.

Source: moby 18.09 builder/dockerfile/{parser,instructions}; directives as 20.10 has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from balenapy.core.container import HealthConfig
from balenapy.core.gotext import BLANKS, quote
from balenapy.core.shellwords import ESCAPE, split_words
from balenapy.core.timefmt import parse_duration
from balenapy.errors import EngineError, InvalidParameter

LINE_MAX_BYTES = 65535  # bufio.MaxScanTokenSize - 1
HEALTH_MIN_NS = 1_000_000  # container.MinimumDuration

_BLANK_RUN = re.compile(r"[\t\v\f\r ]+")
_DIRECTIVE = re.compile(r"#[ \t]*([a-zA-Z][a-zA-Z0-9]*)[ \t]*=[ \t]*(.+?)[ \t]*", re.ASCII)
_ONBUILD = re.compile(r"\s*ONBUILD\s*", re.IGNORECASE | re.ASCII)
_STAGE_NAME = re.compile(r"[a-z][a-z0-9\-_.]*")
_NOT_IN_ONBUILD = {
    "ONBUILD": "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed",
    "FROM": "FROM isn't allowed as an ONBUILD trigger",
    "MAINTAINER": "MAINTAINER isn't allowed as an ONBUILD trigger",
}
_FLAGS = {
    "ADD": ("chown",),
    "COPY": ("chown", "from"),
    "FROM": ("platform",),
    "HEALTHCHECK": ("interval", "timeout", "start-period", "retries"),
}
_UNCHECKED_FLAGS = frozenset(("ARG", "STOPSIGNAL"))  # whose flags nobody looks at, there neither


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        name: in capitals.
        words: its arguments as they were split, quotes and variables still in; of ENV and LABEL name, value, name, …
        flags: (`name`, `value`) of `--name=value`, in order.
        is_json: they were a JSON list.
        source: the line as it was written, joined.
        line: where it begins, from 1; 0 for one that stands in no file.
        literal: variables are not put in.
    """

    name: str
    words: tuple[str, ...] = ()
    flags: tuple[tuple[str, str], ...] = ()
    is_json: bool = False
    source: str = ""
    line: int = field(default=0, compare=False)
    literal: bool = False

    def flag(self, name: str) -> str:
        """The value of a flag; "" when it is not there."""
        return next((value for key, value in self.flags if key == name), "")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Of ENV and LABEL."""
        return list(zip(self.words[::2], self.words[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class Stage:
    """What follows one FROM."""

    base: str
    name: str
    platform: str
    source: str
    instructions: tuple[Instruction, ...] = ()


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """A whole file, checked."""

    arguments: tuple[Instruction, ...]  # ARG before the first FROM
    stages: tuple[Stage, ...]
    escape: str = ESCAPE
    warnings: tuple[str, ...] = ()

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """All, without the FROMs."""
        return (*self.arguments, *(one for stage in self.stages for one in stage.instructions))

    def find_stage(self, name: str) -> int | None:
        """The number of the stage that `target` means; only names count."""
        return next((n for n, stage in enumerate(self.stages) if stage.name and stage.name == name.lower()), None)


def parse_dockerfile(data: bytes) -> Dockerfile:
    """Read a Dockerfile.

    Raises: InvalidParameter, and nothing else whatever the bytes.
    """
    reader = _Reader(data)
    instructions = list(reader.instructions())
    reader.check_end()
    arguments: list[Instruction] = []
    stages: list[tuple[Stage, list[Instruction]]] = []
    for one in instructions:
        try:
            one = check(one)
        except InvalidParameter as error:
            raise InvalidParameter(f"Dockerfile parse error line {one.line}: {error.message}") from error
        if one.name == "FROM":
            stages.append((_stage(one), []))
        elif stages:
            stages[-1][1].append(one)
        elif one.name == "ARG":
            arguments.append(one)
        else:
            raise InvalidParameter("no build stage in current context")
    if not stages:
        raise InvalidParameter("No image was generated. Is your Dockerfile empty?")
    whole = tuple(replace(stage, instructions=tuple(inside)) for stage, inside in stages)
    return Dockerfile(tuple(arguments), whole, reader.escape, tuple(reader.warnings))


def parse_lines(text: str) -> list[Instruction]:
    """Instructions as they follow each other, split and not yet checked. Raises: InvalidParameter."""
    return list(_Reader(text.encode("utf-8", "surrogateescape")).instructions())


def parse_line(text: str) -> Instruction:
    """One instruction, checked. Raises: InvalidParameter."""
    found = parse_lines(text)
    if len(found) != 1:
        raise InvalidParameter("onbuild trigger should be a single expression")
    return check(found[0])


def show(dockerfile: Dockerfile) -> str:
    """A text that means the same."""
    lines = [] if dockerfile.escape == ESCAPE else [f"# escape={dockerfile.escape}"]
    lines += [one.source for one in dockerfile.arguments]
    for stage in dockerfile.stages:
        lines += [stage.source, *(one.source for one in stage.instructions)]
    text = "\n".join(lines)
    # Only the last line can end like this, in a file that ends where it should go on.
    return text + dockerfile.escape if _continues(text, dockerfile.escape) else text


def json_words(rest: str) -> list[str] | None:
    """A JSON list of strings; None for anything else, also for what only begins like one.

    Raises: InvalidParameter, for a list with something else in it.
    """
    rest = rest.lstrip(BLANKS)
    if not rest.startswith("["):
        return None
    try:
        value, _ = _JSON.raw_decode(rest)  # what follows is not looked at, there neither
    except (ValueError, RecursionError):
        return None
    if not all(isinstance(item, str) for item in value):
        raise InvalidParameter("when using JSON array syntax, arrays must be comprised of strings only")
    return list(value)


def _no_constant(_: str) -> Any:
    raise ValueError("no JSON")


_JSON = json.JSONDecoder(parse_constant=_no_constant)


# --- lines ----------------------------------------------------------------------------------------------------


class _Reader:
    """The first pass."""

    def __init__(self, data: bytes) -> None:
        self.escape = ESCAPE
        self.warnings: list[str] = []
        self._too_long = False
        self._lines = self._split(data.removeprefix(b"\xef\xbb\xbf"))
        self._number = 0
        self._directives: set[str] | None = set()  # None: their time is over

    def _split(self, data: bytes) -> Iterator[str]:
        for line in data.split(b"\n") if not data.endswith(b"\n") else data[:-1].split(b"\n"):
            if len(line) > LINE_MAX_BYTES:
                self._too_long = True
                return
            if data:
                yield line.removesuffix(b"\r").decode("utf-8", "surrogateescape")

    def check_end(self) -> None:
        """Raises: InvalidParameter."""
        if self._too_long:
            raise InvalidParameter(f"dockerfile line greater than max allowed size of {LINE_MAX_BYTES}")

    def instructions(self) -> Iterator[Instruction]:
        """Raises: InvalidParameter."""
        for line in self._lines:
            self._number += 1
            start = self._number
            line = line.lstrip(BLANKS)
            self._directive(line)
            if line.startswith("#") or not line:
                continue
            whole, goes_on = self._cut(line)
            whole, blank = self._join(whole) if goes_on else (whole, False)
            if blank:
                self.warnings.append(f"[WARNING]: Empty continuation line found in:\n    {whole}")
            yield replace(_split_instruction(whole, self.escape), line=start)
        if self.warnings:
            self.warnings.append("[WARNING]: Empty continuation lines will become errors in a future release.")

    def _join(self, whole: str) -> tuple[str, bool]:
        """Take the lines that a line goes on in; says whether a blank one was between."""
        blank = False
        for line in self._lines:
            self._number += 1
            self._directives = None
            if line.lstrip(BLANKS).startswith("#"):
                continue
            if not line.strip(BLANKS):
                blank = True
                continue
            part, goes_on = self._cut(line)
            whole += part
            if not goes_on:
                break
        return whole, blank

    def _cut(self, line: str) -> tuple[str, bool]:
        if not _continues(line, self.escape):
            return line, False
        return line.rstrip(" \t")[:-1], True

    def _directive(self, line: str) -> None:
        if self._directives is None:
            return
        match = _DIRECTIVE.fullmatch(line)
        if match is None:
            self._directives = None
            return
        key, value = match[1].lower(), match[2]
        if key not in ("escape", "syntax"):
            return
        if key in self._directives:
            raise InvalidParameter(f"only one {key} parser directive can be used")
        self._directives.add(key)
        if key == "escape":
            if value[0] not in "`\\":
                raise InvalidParameter(f"invalid ESCAPE '{value[0]}'. Must be ` or \\")
            self.escape = value[0]


def _continues(line: str, escape: str) -> bool:
    return line.rstrip(" \t").endswith(escape)


# --- the first pass: splitting --------------------------------------------------------------------------------


def _split_instruction(line: str, escape: str) -> Instruction:
    """Raises: InvalidParameter."""
    source = line.strip(BLANKS)
    parts = _BLANK_RUN.split(source, maxsplit=1)
    name = parts[0].upper()
    flags, rest = _split_flags(parts[1]) if len(parts) == 2 else ([], "")
    split = _SPLIT.get(name)
    words, is_json = split(rest.strip(BLANKS), escape) if split is not None else ([], False)
    return Instruction(name, tuple(words), tuple(flags), is_json, source)


def _split_flags(text: str) -> tuple[list[tuple[str, str]], str]:
    """`--name=value` words, and what follows them. A flag without a value has "\\0" for it, which none can have."""
    flags: list[tuple[str, str]] = []
    position = 0
    while True:
        while position < len(text) and text[position] in BLANKS:
            position += 1
        if not text.startswith("--", position):
            return flags, text[position:]
        word, position = _flag_word(text, position)
        if word == "--":
            return flags, text[position:]
        if word:
            name, equals, value = word[2:].partition("=")
            flags.append((name, value if equals else _NO_VALUE))


_NO_VALUE = "\0"


def _flag_word(text: str, position: int) -> tuple[str, int]:
    """One word with its quotes taken away, and where it ends. Here the escape is always a backslash."""
    word = mark = ""
    while position < len(text):
        character = text[position]
        if not mark and character in BLANKS:
            break
        position += 1
        if character == mark:
            mark = ""
        elif not mark and character in "'\"":
            mark = character
        elif character == "\\":
            word += text[position : position + 1]
            position += 1
        else:
            word += character
    return word, position


Split = Callable[[str, str], tuple[list[str], bool]]


def _split_maybe_json(rest: str, _: str) -> tuple[list[str], bool]:
    if not rest:
        return [], False
    words = json_words(rest)
    return ([rest], False) if words is None else (words, True)


def _split_maybe_json_words(rest: str, escape: str) -> tuple[list[str], bool]:
    words = json_words(rest)
    return _split_blanks(rest, escape) if words is None else (words, True)


def _split_blanks(rest: str, _: str) -> tuple[list[str], bool]:
    return (_BLANK_RUN.split(rest) if rest else []), False


def _split_nothing(rest: str, _: str) -> tuple[list[str], bool]:
    return ([rest] if rest else []), False


def _split_quoted(rest: str, escape: str) -> tuple[list[str], bool]:
    return split_words(rest, escape), False


def _split_pairs(name: str) -> Split:
    def split(rest: str, escape: str) -> tuple[list[str], bool]:
        words = split_words(rest, escape)
        if not words:
            return [], False
        if "=" not in words[0]:
            parts = _BLANK_RUN.split(rest, maxsplit=1)
            if len(parts) < 2:
                raise InvalidParameter(f"{name} must have two arguments")
            return parts, False
        pairs: list[str] = []
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise InvalidParameter(f"Syntax error - can't find = in {quote(word)}. Must be of the form: name=value")
            pairs += key, value
        return pairs, False

    return split


def _split_health(rest: str, escape: str) -> tuple[list[str], bool]:
    if not rest:
        return [], False
    kind, after = rest, ""
    for position, character in enumerate(rest):
        if character in BLANKS:
            kind, after = rest[:position], rest[position:].lstrip(BLANKS)
            break
    words, is_json = _split_maybe_json(after, escape)
    return [kind, *words], is_json


def _split_trigger(rest: str, escape: str) -> tuple[list[str], bool]:
    """What it says is looked at when the image is used; only what cannot be split fails now."""
    if not rest:
        return [], False
    trigger = _split_instruction(rest, escape)
    return [trigger.name, *trigger.words], False


_SPLIT: dict[str, Split] = {
    "ADD": _split_maybe_json_words,
    "ARG": _split_quoted,
    "CMD": _split_maybe_json,
    "COPY": _split_maybe_json_words,
    "ENTRYPOINT": _split_maybe_json,
    "ENV": _split_pairs("ENV"),
    "EXPOSE": _split_blanks,
    "FROM": _split_blanks,
    "HEALTHCHECK": _split_health,
    "LABEL": _split_pairs("LABEL"),
    "MAINTAINER": _split_nothing,
    "ONBUILD": _split_trigger,
    "RUN": _split_maybe_json,
    "SHELL": _split_maybe_json,
    "STOPSIGNAL": _split_nothing,
    "USER": _split_nothing,
    "VOLUME": _split_maybe_json_words,
    "WORKDIR": _split_nothing,
}


# --- the second pass: checking --------------------------------------------------------------------------------


def check(one: Instruction) -> Instruction:
    """Look at the arguments and flags of an instruction that was split; gives it with what follows from them.

    Raises: InvalidParameter.
    """
    checker = _CHECK.get(one.name)
    if checker is None:
        raise InvalidParameter(f"unknown instruction: {one.name}{_did_you_mean(one.name)}")
    return checker(one)


def _check_flags(one: Instruction) -> None:
    if one.name in _UNCHECKED_FLAGS:
        return
    known = _FLAGS.get(one.name, ())
    seen: set[str] = set()
    for name, value in one.flags:
        if name not in known:
            raise InvalidParameter(f"Unknown flag: {name}")
        if name in seen:
            raise InvalidParameter(f"Duplicate flag specified: {name}")
        if value == _NO_VALUE:
            raise InvalidParameter(f"Missing a value on flag: {name}")
        seen.add(name)


def _any(one: Instruction) -> Instruction:
    _check_flags(one)
    return one


def _at_least_one(one: Instruction) -> Instruction:
    if not one.words:
        raise InvalidParameter(f"{one.name} requires at least one argument")
    _check_flags(one)
    return one


def _exactly_one(one: Instruction) -> Instruction:
    if len(one.words) != 1:
        raise InvalidParameter(f"{one.name} requires exactly one argument")
    _check_flags(one)
    return one


def _with_destination(one: Instruction) -> Instruction:
    if len(one.words) < 2:
        raise InvalidParameter(
            f"{one.name} requires at least two arguments, but only one was provided. "
            "Destination could not be determined."
        )
    _check_flags(one)
    return one


def _check_pairs(one: Instruction) -> Instruction:
    _check_flags(one)
    if not one.words:
        raise InvalidParameter(f"{one.name} requires at least one argument")
    if not all(key for key, _ in one.pairs):
        raise InvalidParameter(f"{one.name} names can not be blank")
    return one


def _check_argument(one: Instruction) -> Instruction:
    if not one.words:
        raise InvalidParameter("ARG requires at least one argument")
    if any(word.startswith("=") for word in one.words):
        raise InvalidParameter("ARG names can not be blank")
    return one


def _check_from(one: Instruction) -> Instruction:
    words = one.words
    if len(words) == 3 and words[1].lower() == "as":
        if _STAGE_NAME.fullmatch(words[2].lower()) is None:
            raise InvalidParameter(
                f"invalid name for build stage: {quote(words[2].lower())}, "
                "name can't start with a number or contain symbols"
            )
    elif len(words) != 1:
        raise InvalidParameter("FROM requires either one or three arguments")
    _check_flags(one)
    return one


def _stage(one: Instruction) -> Stage:
    name = one.words[2].lower() if len(one.words) == 3 else ""
    return Stage(one.words[0], name, one.flag("platform"), one.source)


def _check_health(one: Instruction) -> Instruction:
    if not one.words:
        raise InvalidParameter("HEALTHCHECK requires at least one argument")
    parse_health(one)
    return one


def parse_health(one: Instruction) -> HealthConfig:
    """What a HEALTHCHECK says. Raises: InvalidParameter."""
    kind, arguments = one.words[0].upper(), list(one.words[1:])
    if kind == "NONE":
        if arguments:
            raise InvalidParameter("HEALTHCHECK NONE takes no arguments")
        return HealthConfig(["NONE"])
    _check_flags(one)
    if kind != "CMD":
        raise InvalidParameter(f"Unknown type {quote(kind)} in HEALTHCHECK (try CMD)")
    if not arguments:
        raise InvalidParameter("Missing command after HEALTHCHECK CMD")
    return HealthConfig(
        ["CMD" if one.is_json else "CMD-SHELL", *arguments],
        _interval("interval", one.flag("interval")),
        _interval("timeout", one.flag("timeout")),
        _interval("start-period", one.flag("start-period")),
        _retries(one.flag("retries")),
    )


def _interval(name: str, text: str) -> int:
    if not text:
        return 0
    try:
        value = parse_duration(text)
    except (ValueError, EngineError):
        unit = re.fullmatch(r"[+-]?[0-9.]+", text)
        why = "missing unit in duration" if unit else "invalid duration"
        raise InvalidParameter(f"time: {why} {quote(text)}") from None
    if value < HEALTH_MIN_NS:
        raise InvalidParameter(f'Interval "{name}" cannot be less than 1ms')
    return value


def _retries(text: str) -> int:
    if not text:
        return 0
    if not re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        raise InvalidParameter(f"strconv.ParseInt: parsing {quote(text)}: invalid syntax")
    if len(text) > 11 or not -(1 << 31) <= int(text) < 1 << 31:
        raise InvalidParameter(f"strconv.ParseInt: parsing {quote(text)}: value out of range")
    if int(text) < 1:
        raise InvalidParameter(f"--retries must be at least 1 (not {int(text)})")
    return int(text)


def _check_onbuild(one: Instruction) -> Instruction:
    if not one.words:
        raise InvalidParameter("ONBUILD requires at least one argument")
    _check_flags(one)
    refusal = _NOT_IN_ONBUILD.get(one.words[0].strip(BLANKS))
    if refusal is not None:
        raise InvalidParameter(refusal)
    return one


def trigger_of(one: Instruction) -> str:
    """The text of an ONBUILD's trigger."""
    return _ONBUILD.sub("", one.source, count=1)


def _check_shell(one: Instruction) -> Instruction:
    _check_flags(one)
    if not one.words:
        raise InvalidParameter("SHELL requires at least one argument")
    if not one.is_json:
        raise InvalidParameter("SHELL requires the arguments to be in JSON form")
    return one


def _check_volume(one: Instruction) -> Instruction:
    _at_least_one(one)
    words = tuple(word.strip(BLANKS) for word in one.words)
    if not all(words):
        raise InvalidParameter("VOLUME specified can not be an empty string")
    return replace(one, words=words)


def _check_expose(one: Instruction) -> Instruction:
    _at_least_one(one)
    return replace(one, words=tuple(sorted(one.words)))


_CHECK: dict[str, Callable[[Instruction], Instruction]] = {
    "ADD": _with_destination,
    "ARG": _check_argument,
    "CMD": _any,
    "COPY": _with_destination,
    "ENTRYPOINT": _any,
    "ENV": _check_pairs,
    "EXPOSE": _check_expose,
    "FROM": _check_from,
    "HEALTHCHECK": _check_health,
    "LABEL": _check_pairs,
    "MAINTAINER": _exactly_one,
    "ONBUILD": _check_onbuild,
    "RUN": _any,
    "SHELL": _check_shell,
    "STOPSIGNAL": _exactly_one,
    "USER": _exactly_one,
    "VOLUME": _check_volume,
    "WORKDIR": _exactly_one,
}


def _did_you_mean(name: str) -> str:
    """Names one instruction that is a slip of the finger away; ours, the engine we replace leaves you alone."""
    if len(name) < 3:
        return ""
    near = [known for known in _CHECK if _distance(name, known) == 1]
    return f" (did you mean {near[0]}?)" if len(near) == 1 else ""


def _distance(one: str, other: str) -> int:
    """1 for one letter more, less, other, or two that changed places; 2 for anything beyond; 0 for the same."""
    if one == other:
        return 0
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    end = 0
    while end < min(len(one), len(other)) - start and one[-1 - end] == other[-1 - end]:
        end += 1
    left, right = one[start : len(one) - end], other[start : len(other) - end]
    if len(left) <= 1 and len(right) <= 1:
        return 1
    return 1 if len(left) == len(right) == 2 and left == right[::-1] else 2
