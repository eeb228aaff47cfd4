"""Environment that legacy links bring: `DB_PORT=tcp://10.0.0.2:5432`, `DB_NAME=/web/db`, `DB_ENV_USER=x`.

Source: moby daemon/links/links.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from balenapy.core.ports import ExposedPort

_BUILD_VARIABLES = ("HOME", "PATH")  # say nothing about the linked container


@dataclass(frozen=True, slots=True)
class Link:
    parent: str  # names, without slash
    alias: str
    address: str  # of the child
    ports: Sequence[ExposedPort]  # exposed by the child
    env: Sequence[str]  # the child's Config.Env


def link_env(link: Link) -> list[str]:
    """The variables of one link, in the reference engine's order."""
    # Only the case and the dashes: an alias with a dot makes a name that no shell can read, there too.
    alias = link.alias.upper().replace("-", "_")
    ports = sorted(link.ports, key=lambda port: (port.number, port.protocol != "tcp"))
    env = list(_ranges(alias, link.address, ports))
    if ports:
        env.append(f"{alias}_PORT={ports[0].protocol}://{link.address}:{ports[0].number}")
    for port in ports:
        prefix = _prefix(alias, port)
        env += [
            f"{prefix}={port.protocol}://{link.address}:{port.number}",
            f"{prefix}_ADDR={link.address}",
            f"{prefix}_PORT={port.number}",
            f"{prefix}_PROTO={port.protocol}",
        ]
    env.append(f"{alias}_NAME=/{link.parent}/{link.alias}")
    for entry in link.env:
        key, equals, value = entry.partition("=")
        if equals and key not in _BUILD_VARIABLES:
            env.append(f"{alias}_ENV_{key}={value}")
    return env


def _prefix(alias: str, port: ExposedPort) -> str:
    return f"{alias}_PORT_{port.number}_{port.protocol.upper()}"


def _ranges(alias: str, address: str, ports: Sequence[ExposedPort]) -> Iterable[str]:
    """Ports that follow each other are told as a range as well."""
    index = 0
    while index < len(ports):
        last = index
        while last + 1 < len(ports) and ports[last + 1].number <= ports[index].number + (last + 1 - index):
            last += 1
        if last > index:
            first, end = ports[index], ports[last]
            start = _prefix(alias, first)
            yield f"{start}_START={first.protocol}://{address}:{first.number}"
            yield f"{start}_ADDR={address}"
            yield f"{start}_PROTO={first.protocol}"
            yield f"{start}_PORT_START={first.number}"
            yield f"{_prefix(alias, end)}_END={end.protocol}://{address}:{end.number}"
            yield f"{_prefix(alias, end)}_PORT_END={end.number}"
        index = last + 1
