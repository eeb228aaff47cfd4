"""Instructions that change an image's config: what each does to it, and what history says of it.

Builds use them, and commit and import take them as `changes`. Everything is a function of the instruction and the
config; nothing is run.

    CMD ENTRYPOINT ENV EXPOSE HEALTHCHECK LABEL ONBUILD SHELL STOPSIGNAL USER VOLUME WORKDIR

Variables are put in where Docker does: ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR (and in ADD, ARG, COPY,
which are not here); one instruction sees the values from before it.

Sources: moby 18.09 builder/dockerfile/{dispatchers,evaluator,builder}.go.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from balenapy.core.container import ContainerConfig, HealthConfig
from balenapy.core.dockerfile import Instruction, check, parse_health, parse_lines, trigger_of
from balenapy.core.gotext import duration, quote, quote_rune, quote_words, show_words
from balenapy.core.shellwords import ESCAPE, expand, expand_words
from balenapy.core.signals import parse_signal
from balenapy.core.wire import EMPTY
from balenapy.errors import InvalidParameter

DEFAULT_SHELL = ("/bin/sh", "-c")

_PORT = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_PROTOCOLS = ("tcp", "udp", "sctp")


@dataclass(frozen=True, slots=True)
class Variables:
    """What `$name` means, and the character that takes the meaning from the next one."""

    values: Mapping[str, str]
    escape: str = ESCAPE

    def word(self, text: str) -> str:
        """Raises: InvalidParameter."""
        return expand(text, self.values, self.escape)

    def words(self, texts: Iterable[str]) -> list[str]:
        """Raises: InvalidParameter."""
        return [self.word(text) for text in texts]


def environment_of(env: Sequence[str] | None) -> dict[str, str]:
    """The variables that instructions see; of one that is there twice the first."""
    found: dict[str, str] = {}
    for entry in env or ():
        key, _, value = entry.partition("=")
        found.setdefault(key, value)
    return found


def apply_changes(config: ContainerConfig, changes: Sequence[str]) -> ContainerConfig:
    """The config after these lines; the one given is left as it is.

    Raises: InvalidParameter `run is not a valid change command` and whatever a line has wrong.
    """
    instructions = parse_lines("\n".join(changes))
    for one in instructions:
        if one.name not in _CHANGES:
            raise InvalidParameter(f"{one.name.lower()} is not a valid change command")
    config = replace(config)
    command_set = False
    for one in map(check, instructions):
        apply(config, one, Variables(environment_of(config.env)), command_set=command_set)
        command_set = command_set or (one.name == "CMD" and bool(one.words))
    return config


def changes_config(one: Instruction) -> bool:
    """Whether `apply` does all that the instruction means."""
    return one.name in _APPLY


def apply(config: ContainerConfig, one: Instruction, variables: Variables, *, command_set: bool) -> str:
    """Change the config; fields get new values, lists and maps are not changed in place.

    Args:
        command_set: a CMD came before in the same file: an ENTRYPOINT keeps it.
    Returns: what history says.
    Raises: InvalidParameter.
    """
    if one.name == "ENTRYPOINT" and not command_set:
        config.cmd = None  # one that came with the base does not fit the new entrypoint
    return _APPLY[one.name](config, one, variables)


def command_line(config: ContainerConfig, one: Instruction) -> list[str]:
    """What RUN, CMD or ENTRYPOINT stand for: a JSON list as it is, anything else given to the shell."""
    return list(one.words) if one.is_json else [*shell_of(config), *one.words]


def shell_of(config: ContainerConfig) -> list[str]:
    return list(config.shell or DEFAULT_SHELL)


def _cmd(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    config.cmd = command_line(config, one)
    return f"CMD {quote_words(config.cmd)}"


def _entrypoint(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    config.entrypoint = command_line(config, one) if one.words else None
    return f"ENTRYPOINT {quote_words(config.entrypoint or ())}"


def _expanded(one: Instruction, variables: Variables) -> list[tuple[str, str]]:
    if one.literal:
        return one.pairs
    return [(variables.word(key), variables.word(value)) for key, value in one.pairs]


def _env(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    env = list(config.env or ())
    entries = []
    for name, value in _expanded(one, variables):
        entry = f"{name}={value}"
        entries.append(entry)
        for position, known in enumerate(env):
            if known.partition("=")[0] == name:
                env[position] = entry
                break
        else:
            env.append(entry)
    config.env = env
    return " ".join(["ENV", *entries])


def _label(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    pairs = _expanded(one, variables)
    config.labels = {**(config.labels or {}), **dict(pairs)}
    return " ".join(["LABEL", *(f"{name}={value}" for name, value in pairs)])


def _expose(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    words = [word for part in one.words for word in expand_words(part, variables.values, variables.escape)]
    ports = dict(config.exposed_ports or {})
    for word in words:
        for port in _ports(word):
            ports.setdefault(port, EMPTY)
    config.exposed_ports = ports
    return " ".join(["EXPOSE", *words])


def _ports(text: str) -> list[str]:
    """`80`, `80/udp`, `8000-8002/tcp`. Source: go-connections nat.ParsePortSpec."""
    numbers, _, protocol = text.partition("/")
    # A host's part before the container's is read and not used, there too.
    numbers = numbers.rpartition(":")[2]
    protocol = protocol.lower() or "tcp"
    match = _PORT.fullmatch(numbers)
    if match is None:
        raise InvalidParameter(f"Invalid containerPort: {numbers}" if numbers else f"No port specified: {text}<empty>")
    first, last = (int(part[:9]) for part in (match[1], match[2] or match[1]))
    if not first <= last <= 65535:
        raise InvalidParameter(f"Invalid containerPort: {numbers}")
    if protocol not in _PROTOCOLS:
        raise InvalidParameter(f"Invalid proto: {protocol}")
    return [f"{number}/{protocol}" for number in range(first, last + 1)]


def _healthcheck(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    config.healthcheck = parse_health(one)
    return f"HEALTHCHECK {_show_health(config.healthcheck)}"


def _show_health(health: HealthConfig) -> str:
    """`%q` of the struct's address: every field by its own kind."""
    times = [quote(duration(ns)) for ns in (health.interval, health.timeout, health.start_period)]
    return f"&{{{' '.join([quote_words(health.test or ()), *times, quote_rune(health.retries)])}}}"


def _onbuild(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    trigger = trigger_of(one)
    config.on_build = [*(config.on_build or ()), trigger]
    return f"ONBUILD {trigger}"


def _shell(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    config.shell = list(one.words)
    return f"SHELL {show_words(config.shell)}"


def _stopsignal(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    text = variables.word(one.words[0])
    parse_signal(text)
    config.stop_signal = text
    return f"STOPSIGNAL {text}"


def _user(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    config.user = variables.word(one.words[0])
    return f"USER {config.user}"


def _volume(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    paths = variables.words(one.words)
    if not all(paths):
        raise InvalidParameter("VOLUME specified can not be an empty string")
    config.volumes = {**(config.volumes or {}), **dict.fromkeys(paths, EMPTY)}
    return f"VOLUME {show_words(paths)}"


def _workdir(config: ContainerConfig, one: Instruction, variables: Variables) -> str:
    path = variables.word(one.words[0])
    if not path:
        raise InvalidParameter("cannot normalize nothing")
    if not path.startswith("/"):
        clean = posixpath.normpath(posixpath.join("/", config.working_dir, path))
        path = f"/{clean.lstrip('/')}"
    config.working_dir = path
    return f"WORKDIR {path}"


_APPLY: dict[str, Callable[[ContainerConfig, Instruction, Variables], str]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "ONBUILD": _onbuild,
    "SHELL": _shell,
    "STOPSIGNAL": _stopsignal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}
_CHANGES = frozenset(_APPLY) - {"SHELL"}
