"""Dockerfile instructions that change an image's config: what each line says, and what it does to the config.

Commit and import take them as `changes`. Everything is a function of the line and the config; nothing is run.

    CMD ENTRYPOINT ENV EXPOSE HEALTHCHECK LABEL ONBUILD STOPSIGNAL USER VOLUME WORKDIR

Variables of the config's environment are put in where Docker does: ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME,
WORKDIR; one instruction sees the values from before it.

Sources: moby 18.09 builder/dockerfile/{parser/line_parsers,parser/split_command,instructions/parse,instructions/bflag,
dispatchers,builder}.go.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from balenapy.core.container import ContainerConfig, HealthConfig
from balenapy.core.shellwords import expand, expand_words, split_words
from balenapy.core.signals import parse_signal
from balenapy.core.timefmt import parse_duration
from balenapy.core.wire import EMPTY
from balenapy.errors import InvalidParameter

DEFAULT_SHELL = ("/bin/sh", "-c")
HEALTH_MIN_NS = 1_000_000  # container.MinimumDuration

_NOT_IN_ONBUILD = {
    "ONBUILD": "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed",
    "FROM": "FROM isn't allowed as an ONBUILD trigger",
    "MAINTAINER": "MAINTAINER isn't allowed as an ONBUILD trigger",
}
_PORT = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_PROTOCOLS = ("tcp", "udp", "sctp")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `name` in capitals, `flags` (`--name=value`) by name, the rest of the line."""

    name: str
    flags: Mapping[str, str]
    rest: str


def split_lines(lines: Iterable[str]) -> list[str]:
    """Logical lines: what ends in a backslash goes on in the next, comments and blank lines are left out."""
    found: list[str] = []
    pending = ""
    for line in "\n".join(lines).split("\n"):
        stripped = line.strip()
        if stripped.startswith("#") or (not stripped and pending):
            continue
        if stripped.endswith("\\"):
            pending += line.rstrip()[:-1].lstrip() if not pending else line.rstrip()[:-1]
            continue
        whole = (pending + line).strip()
        pending = ""
        if whole:
            found.append(whole)
    if pending.strip():
        found.append(pending.strip())
    return found


def parse_instruction(line: str) -> Instruction:
    """Read one logical line. Raises: InvalidParameter."""
    name = line.split(None, 1)[0]
    rest = line[len(name) :].strip()
    flags: dict[str, str] = {}
    while rest.startswith("--"):
        word = split_words(rest)[0]
        if word == "--":
            rest = rest[2:].strip()
            break
        flag, _, value = word[2:].partition("=")
        if flag in flags:
            raise InvalidParameter(f"Duplicate flag specified: {flag}")
        flags[flag] = expand(value, {})
        rest = rest[len(word) :].strip()
    return Instruction(name.upper(), flags, rest)


def json_list(rest: str) -> list[str] | None:
    """The JSON form of CMD and the like; None for the other form.

    Raises: InvalidParameter, for a list with something else in it than strings.
    """
    if not rest.startswith("["):
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(rest)  # what follows is not looked at, there neither
    except (ValueError, RecursionError):
        return None
    if not all(isinstance(item, str) for item in value):
        raise InvalidParameter("when using JSON array syntax, arrays must be comprised of strings only")
    return list(value)


def key_values(rest: str, instruction: str) -> list[tuple[str, str]]:
    """`k=v k=v…`, or the old form `k v`; quotes and variables are still in.

    Raises: InvalidParameter.
    """
    words = split_words(rest)
    if not words:
        raise InvalidParameter(f"{instruction} requires at least one argument")
    if "=" not in words[0]:
        parts = rest.split(None, 1)
        if len(parts) < 2:
            raise InvalidParameter(f"{instruction} must have two arguments")
        return [(parts[0], parts[1])]
    pairs = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            quoted = json.dumps(word, ensure_ascii=False)
            raise InvalidParameter(f"Syntax error - can't find = in {quoted}. Must be of the form: name=value")
        pairs.append((key, value))
    return pairs


def environment_of(config: ContainerConfig) -> dict[str, str]:
    """The variables that instructions see; of one that is there twice the first."""
    found: dict[str, str] = {}
    for entry in config.env or ():
        key, _, value = entry.partition("=")
        found.setdefault(key, value)
    return found


def apply_changes(config: ContainerConfig, changes: Sequence[str]) -> ContainerConfig:
    """The config after these lines; the one given is left as it is.

    Raises: InvalidParameter `run is not a valid change command` and whatever a line has wrong.
    """
    lines = split_lines(changes)
    for line in lines:
        name = line.split(None, 1)[0]
        if name.upper() not in _APPLY:
            raise InvalidParameter(f"{name.lower()} is not a valid change command")
    instructions = [parse_instruction(line) for line in lines]
    config = replace(config)
    command_set = False
    for instruction in instructions:
        unknown = next((flag for flag in instruction.flags if instruction.name != "HEALTHCHECK"), None)
        if unknown is not None:
            raise InvalidParameter(f"Unknown flag: {unknown}")
        if instruction.name == "ENTRYPOINT" and not command_set:
            config.cmd = None  # one that came with the base does not fit the new entrypoint
        command_set = command_set or instruction.name == "CMD"
        _APPLY[instruction.name](config, instruction)
    return config


def command_line(config: ContainerConfig, rest: str) -> list[str] | None:
    """What CMD or ENTRYPOINT stand for: a JSON list as it is, anything else given to the shell."""
    words = json_list(rest)
    if words is not None:
        return words
    return [*(config.shell or DEFAULT_SHELL), rest] if rest else None


def _cmd(config: ContainerConfig, instruction: Instruction) -> None:
    config.cmd = command_line(config, instruction.rest)


def _entrypoint(config: ContainerConfig, instruction: Instruction) -> None:
    config.entrypoint = command_line(config, instruction.rest) or None


def _env(config: ContainerConfig, instruction: Instruction) -> None:
    variables = environment_of(config)
    env = list(config.env or ())
    for key, value in key_values(instruction.rest, "ENV"):
        name = expand(key, variables)
        if not name:
            raise InvalidParameter("ENV names can not be blank")
        entry = f"{name}={expand(value, variables)}"
        for position, known in enumerate(env):
            if known.partition("=")[0] == name:
                env[position] = entry
                break
        else:
            env.append(entry)
    config.env = env


def _label(config: ContainerConfig, instruction: Instruction) -> None:
    variables = environment_of(config)
    labels = dict(config.labels or {})
    for key, value in key_values(instruction.rest, "LABEL"):
        name = expand(key, variables)
        if not name:
            raise InvalidParameter("LABEL names can not be blank")
        labels[name] = expand(value, variables)
    config.labels = labels


def _expose(config: ContainerConfig, instruction: Instruction) -> None:
    variables = environment_of(config)
    words = [word for part in instruction.rest.split() for word in expand_words(part, variables)]
    if not words:
        raise InvalidParameter("EXPOSE requires at least one argument")
    ports = dict(config.exposed_ports or {})
    for word in sorted(words):
        for port in _ports(word):
            ports.setdefault(port, EMPTY)
    config.exposed_ports = ports


def _ports(text: str) -> list[str]:
    """`80`, `80/udp`, `8000-8002/tcp`. Source: go-connections nat.ParsePortSpec."""
    numbers, _, protocol = text.partition("/")
    # A host's part before the container's is read and not used, there too.
    numbers = numbers.rpartition(":")[2]
    protocol = protocol.lower() or "tcp"
    match = _PORT.fullmatch(numbers)
    if match is None:
        raise InvalidParameter(f"Invalid containerPort: {numbers}" if numbers else f"No port specified: {text}<empty>")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last <= 65535:
        raise InvalidParameter(f"Invalid containerPort: {numbers}")
    if protocol not in _PROTOCOLS:
        raise InvalidParameter(f"Invalid proto: {protocol}")
    return [f"{number}/{protocol}" for number in range(first, last + 1)]


def _healthcheck(config: ContainerConfig, instruction: Instruction) -> None:
    words = instruction.rest.split(None, 1)
    if not words:
        raise InvalidParameter("HEALTHCHECK requires at least one argument")
    kind, rest = words[0].upper(), words[1] if len(words) > 1 else ""
    if kind == "NONE":
        if rest:
            raise InvalidParameter("HEALTHCHECK NONE takes no arguments")
        config.healthcheck = HealthConfig(["NONE"])
        return
    flags = dict(instruction.flags)
    interval, timeout, start_period, retries = (
        flags.pop(name, "") for name in ("interval", "timeout", "start-period", "retries")
    )
    if flags:
        raise InvalidParameter(f"Unknown flag: {next(iter(flags))}")
    if kind != "CMD":
        raise InvalidParameter(f'Unknown type "{kind}" in HEALTHCHECK (try CMD)')
    words_of_list = json_list(rest)
    test = ["CMD", *words_of_list] if words_of_list is not None else ["CMD-SHELL", rest]
    if test in (["CMD"], ["CMD-SHELL", ""]):
        raise InvalidParameter("Missing command after HEALTHCHECK CMD")
    config.healthcheck = HealthConfig(
        test,
        _interval("interval", interval),
        _interval("timeout", timeout),
        _interval("start-period", start_period),
        _retries(retries),
    )


def _interval(name: str, text: str) -> int:
    if not text:
        return 0
    try:
        value = parse_duration(text)
    except ValueError as error:
        raise InvalidParameter(f"time: {error}") from error
    if value and value < HEALTH_MIN_NS:
        raise InvalidParameter(f'Interval "{name}" cannot be less than 1ms')
    return value


def _retries(text: str) -> int:
    if not text:
        return 0
    if not re.fullmatch(r"[+-]?\d{1,9}", text, re.ASCII):
        raise InvalidParameter(f'strconv.ParseInt: parsing "{text}": invalid syntax')
    if int(text) < 1:
        raise InvalidParameter(f"--retries must be at least 1 (not {int(text)})")
    return int(text)


def _onbuild(config: ContainerConfig, instruction: Instruction) -> None:
    words = instruction.rest.split(None, 1)
    if not words:
        raise InvalidParameter("ONBUILD requires at least one argument")
    refusal = _NOT_IN_ONBUILD.get(words[0].upper())
    if refusal is not None:
        raise InvalidParameter(refusal)
    config.on_build = [*(config.on_build or ()), instruction.rest]


def _stopsignal(config: ContainerConfig, instruction: Instruction) -> None:
    text = expand(_only(instruction), environment_of(config))
    parse_signal(text)
    config.stop_signal = text


def _user(config: ContainerConfig, instruction: Instruction) -> None:
    config.user = expand(_only(instruction), environment_of(config))


def _volume(config: ContainerConfig, instruction: Instruction) -> None:
    words = json_list(instruction.rest)
    if words is None:
        words = instruction.rest.split()
    if not words:
        raise InvalidParameter("VOLUME requires at least one argument")
    variables = environment_of(config)
    volumes = dict(config.volumes or {})
    for word in words:
        path = expand(word, variables).strip()
        if not path:
            raise InvalidParameter("VOLUME specified can not be an empty string")
        volumes[path] = EMPTY
    config.volumes = volumes


def _workdir(config: ContainerConfig, instruction: Instruction) -> None:
    path = expand(_only(instruction), environment_of(config))
    if not path:
        raise InvalidParameter("cannot normalize nothing")
    clean = posixpath.normpath(posixpath.join("/", config.working_dir, path))
    config.working_dir = f"/{clean.lstrip('/')}"


def _only(instruction: Instruction) -> str:
    if not instruction.rest:
        raise InvalidParameter(f"{instruction.name} requires exactly one argument")
    return instruction.rest


_APPLY: dict[str, Callable[[ContainerConfig, Instruction], None]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "ONBUILD": _onbuild,
    "STOPSIGNAL": _stopsignal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}
