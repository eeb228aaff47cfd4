"""Published ports: what a container asks for, and which ports of the host are taken.

A binding counts only for a port that is also exposed (a quirk of the engine we replace that clients know: they send
both). `PortTable` is the book of all containers' ports; it does not know about other processes, so a
caller that cannot open a port says `refuse` and asks for the next candidate.

Source: container.BuildCreateEndpointOptions, go-connections nat, libnetwork portallocator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol

from balenapy.errors import InvalidParameter, SystemFailure

PROTOCOLS = ("tcp", "udp", "sctp")
EPHEMERAL_FALLBACK = (49153, 65535)  # libnetwork portallocator: when ip_local_port_range cannot be read
ANY, ANY6, LOOPBACK6 = "0.0.0.0", "::", "::1"


class Binding(Protocol):
    """What `core.container.PortBinding` has."""

    host_ip: str
    host_port: str


@dataclass(frozen=True, slots=True, order=True)
class ExposedPort:
    number: int
    protocol: str

    def __str__(self) -> str:
        return f"{self.number}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class PortRequest:
    """One binding wanted. `first` = `last` = 0 means any port."""

    port: ExposedPort
    host_ip: str = ""
    first: int = 0
    last: int = 0


@dataclass(frozen=True, slots=True)
class PublishedPort:
    """One binding in force."""

    port: ExposedPort
    host_ip: str
    host_port: int


class PortsExhausted(SystemFailure):
    """No port of the wanted range is free."""


def parse_port(text: str) -> tuple[int, int, str]:
    """`80`, `80/udp`, `8000-8010/tcp` -> (first, last, protocol).

    Raises: InvalidParameter `invalid port specification: "X"`.
    """
    numbers, _, protocol = text.partition("/")
    protocol = protocol.lower() or "tcp"
    first, last = _parse_range(numbers, text)
    if protocol not in PROTOCOLS:
        raise InvalidParameter(f'invalid port specification: "{text}"')
    return first, last, protocol


def _parse_range(numbers: str, whole: str) -> tuple[int, int]:
    start, dash, end = numbers.partition("-")
    if not dash:
        end = start
    valid = start.isascii() and start.isdigit() and end.isascii() and end.isdigit()
    if not valid or len(start) > 5 or len(end) > 5 or not int(start) <= int(end) <= 65535:
        raise InvalidParameter(f'invalid port specification: "{whole}"')
    return int(start), int(end)


def expand_exposed(exposed: Iterable[str]) -> list[ExposedPort]:
    """Every port behind the keys of ExposedPorts, in order."""
    found: set[ExposedPort] = set()
    for key in exposed:
        first, last, protocol = parse_port(key)
        found.update(ExposedPort(number, protocol) for number in range(first, last + 1))
    return sorted(found)


def requested_ports(
    exposed: Iterable[str],
    bindings: Mapping[str, Sequence[Binding] | None],
    publish_all: bool,
) -> list[PortRequest]:
    """The bindings a container wants, those with a fixed host port first so that random ones cannot take theirs.

    Raises: SystemFailure for a HostPort that is none (create checks it as well; a record may be older).
    """
    wanted: dict[ExposedPort, list[Binding]] = {}
    for key, entries in bindings.items():
        first, last, protocol = parse_port(key)
        for number in range(first, last + 1):
            wanted.setdefault(ExposedPort(number, protocol), []).extend(entries or ())
    requests: list[PortRequest] = []
    for port in expand_exposed(exposed):
        entries = wanted.get(port, [])
        requests.extend(_request(port, entry) for entry in entries)
        if publish_all and not entries:
            requests.append(PortRequest(port))
    return sorted(requests, key=lambda request: (request.first == 0, request.last != request.first))


def _request(port: ExposedPort, entry: Binding) -> PortRequest:
    try:
        host_ip = str(ip_address(entry.host_ip))  # one address has several spellings in IPv6
    except ValueError:
        host_ip = ""  # net.ParseIP gives nil, which means any
    if not entry.host_port:
        return PortRequest(port, host_ip)
    try:
        first, last = _parse_range(entry.host_port.partition("/")[0], entry.host_port)
    except InvalidParameter as error:
        raise SystemFailure(f"Error parsing HostPort value ({entry.host_port}): {error.message}") from error
    return PortRequest(port, host_ip, first, last)


class PortTable:
    """Which (protocol, host address, port) belong to containers. 0.0.0.0 covers every address of IPv4, :: of IPv6."""

    def __init__(self, ephemeral: tuple[int, int] = EPHEMERAL_FALLBACK) -> None:
        self._first, self._last = ephemeral
        self._next = self._first
        self._taken: dict[tuple[str, int], list[str]] = {}

    def is_free(self, protocol: str, host_ip: str, port: int) -> bool:
        holders = self._taken.get((protocol, port), ())
        return not any(_meet(host_ip, holder) for holder in holders)

    def candidates(self, request: PortRequest, *host_ips: str) -> Iterator[int]:
        """Ports that are free on all these addresses, best first: the one, the range, or next-fit among the ephemeral
        ones.

        Raises: SystemFailure, in the words clients match on, when there is none to begin with.
        """
        protocol = request.port.protocol
        if request.first == 0 == request.last:
            size = self._last - self._first + 1
            ports: Iterable[int] = (self._first + (self._next - self._first + offset) % size for offset in range(size))
        elif request.first == request.last:
            for host_ip in host_ips:
                if not self.is_free(protocol, host_ip, request.first):
                    taken = in_brackets(host_ip)
                    raise SystemFailure(f"Bind for {taken}:{request.first} failed: port is already allocated")
            ports = (request.first,)
        else:
            ports = range(request.first, request.last + 1)
        found = False
        for port in ports:
            if all(self.is_free(protocol, host_ip, port) for host_ip in host_ips):
                found = True
                yield port
        if not found:
            raise PortsExhausted("all ports are allocated")

    def take(self, request: PortRequest, host_ip: str, port: int) -> PublishedPort:
        self._taken.setdefault((request.port.protocol, port), []).append(host_ip)
        if request.first == 0:
            self._next = port + 1 if port < self._last else self._first
        return PublishedPort(request.port, host_ip, port)

    def release(self, published: PublishedPort) -> None:
        """Give a port back. Giving back what nobody has is fine: detach may run twice."""
        key = (published.port.protocol, published.host_port)
        holders = self._taken.get(key, [])
        if published.host_ip in holders:
            holders.remove(published.host_ip)
        if not holders:
            self._taken.pop(key, None)


def parse_ephemeral_range(text: str) -> tuple[int, int]:
    """/proc/sys/net/ipv4/ip_local_port_range -> (first, last)."""
    try:
        first, last = map(int, text.split())
    except ValueError:
        return EPHEMERAL_FALLBACK
    return (first, last) if 0 < first <= last <= 65535 else EPHEMERAL_FALLBACK


def is_unspecified(host_ip: str) -> bool:
    """Whether a binding is for every address of the host."""
    return not host_ip or ip_address(host_ip).is_unspecified


def in_brackets(host_ip: str) -> str:
    """An address as it stands before a port."""
    return f"[{host_ip}]" if ":" in host_ip else host_ip


def _meet(one: str, other: str) -> bool:
    """Whether some packet is to both addresses."""
    same_family = (":" in one) == (":" in other)
    return same_family and (one == other or is_unspecified(one) or is_unspecified(other))
