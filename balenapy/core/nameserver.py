"""What the name server of a container answers: names of the networks it is on; the rest is forwarded.

A container asks 127.0.0.11. It sees the user-defined networks it is on, each as a `Scope`: who is there under which
names, and its own links there. `decide` is a function of that and of the question, nothing else; scopes are made
anew for each question from what is attached at that moment, so there is no table that could be out of date.

The order in which a name is looked for (libnetwork sandbox.go, ResolveName; names may have dots in them):

    a.b.c   on every network;   a.b on network c;   a on network b.c
    each time the asker's links first, then names and aliases; the first network that knows the name answers,
    with all who have it there

Names are case sensitive, as they are there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address

A, PTR, MX, AAAA = 1, 12, 15, 28
INTERNET = 1

_OF_A_NAME = (A, AAAA, MX)  # what is asked of a name; of the last we know that there is nothing
_REVERSE, _REVERSE6 = ".in-addr.arpa", ".ip6.arpa"


@dataclass(frozen=True, slots=True)
class Question:
    name: str  # without the last dot; "" for the root and for what cannot be one of our names
    kind: int
    network_class: int = INTERNET


@dataclass(frozen=True, slots=True)
class Owner:
    """One container on one network."""

    address: str
    name: str  # "" when nobody chose it: then only the aliases are known
    aliases: tuple[str, ...] = ()
    container_id: str = ""  # whole: too long for a question, but a link may name it
    address6: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases, self.container_id)

    @property
    def pointer(self) -> str:
        """The name its address is known by; "" for none."""
        return self.name or next(iter(self.aliases), "")


@dataclass(frozen=True, slots=True)
class Scope:
    """One network as the asker sees it."""

    network: str
    owners: Sequence[Owner]
    links: Mapping[str, str] = field(default_factory=dict)  # alias -> name of the other, private to the asker


@dataclass(frozen=True, slots=True)
class Answer:
    """Addresses, or the name of an address, or neither: the name exists but has nothing of that kind."""

    addresses: tuple[str, ...] = ()
    pointer: str = ""


@dataclass(frozen=True, slots=True)
class Forward:
    """Not ours: the servers that the container would have without us are asked."""


def decide(
    question: Question,
    scopes: Sequence[Scope],
    *,
    ndots_set: bool = False,
    shuffle: Callable[[list[str]], None] = lambda _: None,
) -> Answer | Forward:
    """Answer, or say who does.

    Args:
        scopes: in the order in which networks are asked.
        ndots_set: the user wants names without dots to be completed, so one that is unknown does not go out.
        shuffle: puts the addresses of a name that several have into another order each time.
    """
    if question.network_class != INTERNET:
        return Forward()
    if question.kind == PTR:
        pointer = _name_of(_reversed_address(question.name), scopes)
        return Answer(pointer=pointer) if pointer else Forward()
    if question.kind in _OF_A_NAME:
        owners = _owners_of(question.name, scopes)
        if owners:
            # A name that is known by IPv4 only has no AAAA: that is known, and nobody else is asked.
            known = {A: [one.address for one in owners], AAAA: [one.address6 for one in owners if one.address6]}
            addresses = known.get(question.kind, [])
            shuffle(addresses)
            return Answer(tuple(addresses))
        if ndots_set and question.kind != MX and "." not in question.name:
            return Answer()
    return Forward()


def _owners_of(name: str, scopes: Sequence[Scope]) -> list[Owner]:
    for short, network in _splits(name):
        asked = [scope for scope in scopes if network in (None, scope.network)]
        for scope in asked:
            if short in scope.links and (found := _lookup(scope.links[short], scope.owners)):
                return found
        for scope in asked:
            # A link hides whoever else has that name there.
            if short not in scope.links and (found := _lookup(short, scope.owners)):
                return found
    return []


def _splits(name: str) -> Iterable[tuple[str, str | None]]:
    yield name, None
    end = name.rfind(".")
    while end != -1:
        yield name[:end], name[end + 1 :]
        end = name.rfind(".", 0, end)


def _lookup(name: str, owners: Iterable[Owner]) -> list[Owner]:
    return [owner for owner in owners if name and name in owner.names]


def _name_of(address: str, scopes: Iterable[Scope]) -> str:
    for scope in scopes:
        for owner in scope.owners:
            if address and address in (owner.address, owner.address6) and owner.pointer:
                return f"{owner.pointer}.{scope.network}"
    return ""


def _reversed_address(name: str) -> str:
    lower = name.lower()
    if lower.endswith(_REVERSE6):
        digits = "".join(reversed(lower.removesuffix(_REVERSE6).split(".")))
        if not re.fullmatch("[0-9a-f]{32}", digits):
            return ""
        return str(IPv6Address(int(digits, 16)))
    return ".".join(reversed(lower.removesuffix(_REVERSE).split("."))) if lower.endswith(_REVERSE) else ""
