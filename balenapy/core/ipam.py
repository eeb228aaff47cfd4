"""Which subnet a network gets and which address an endpoint gets. Pure: callers say what is taken.

A network without a subnet takes the first default pool that overlaps neither another network, a route of
the host, nor a name server of the host. Inside a subnet the gateway is the first address and endpoints take the
lowest free one, inside the IPRange if there is one. An address is free again when its endpoint is gone; there is no
memory of who had it.

Source: libnetwork ipamutils (pools), ipam/allocator.go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError

from balenapy.errors import Forbidden, NotFound, SystemFailure

# libnetwork ipamutils.PredefinedLocalScopeDefaultNetworks
DEFAULT_POOLS: tuple[str, ...] = (
    *(f"172.{second}.0.0/16:16" for second in range(17, 32)),
    "192.168.0.0/16:20",
)


@dataclass(frozen=True, slots=True)
class Pool:
    """The addresses of one network: where they come from and which are spoken for by configuration."""

    subnet: IPv4Network
    gateway: IPv4Address
    ip_range: IPv4Network | None = None
    auxiliary: Mapping[str, IPv4Address] = field(default_factory=dict)

    def lowest_free(self, taken: Collection[IPv4Address]) -> IPv4Address | None:
        """The lowest address an endpoint may have; None when the pool is full."""
        occupied = {self.gateway, *self.auxiliary.values(), *taken}
        return next((one for one in usable(self.subnet, self.ip_range) if one not in occupied), None)

    def check_static(self, address: IPv4Address, taken: Collection[IPv4Address]) -> None:
        """See whether an endpoint may ask for exactly this address.

        Raises: SystemFailure when it is of another subnet, Forbidden when somebody has it.
        """
        if address not in self.subnet:
            raise SystemFailure(f"Invalid address {address}: It does not belong to any of this network's subnets")
        if address in taken or address in (
            self.gateway,
            self.subnet.network_address,
            self.subnet.broadcast_address,
        ):
            raise Forbidden("Address already in use")


def usable(subnet: IPv4Network, ip_range: IPv4Network | None = None) -> Iterator[IPv4Address]:
    """Addresses to hand out, lowest first; never the network's own nor its broadcast address.

    An IPRange outside the subnet hands out its own addresses: so does the engine we replace.
    """
    source = ip_range or subnet
    edges = (subnet.network_address, subnet.broadcast_address) if subnet.prefixlen < 31 else ()
    return (one for one in source if one not in edges)


def expand_pools(pools: Iterable[str]) -> Iterator[IPv4Network]:
    """`172.30.0.0/15:16` -> 172.30.0.0/16, 172.31.0.0/16; lazily, since a /8 cut in /24 is 65,536 networks."""
    for pool in pools:
        base, _, size = pool.rpartition(":")
        yield from IPv4Network(base).subnets(new_prefix=int(size))


def choose_subnet(candidates: Iterable[IPv4Network], taken: Collection[IPv4Network]) -> IPv4Network:
    """The first candidate that overlaps nothing taken.

    Raises: NotFound, when all are taken.
    """
    for candidate in candidates:
        if not any(candidate.overlaps(other) for other in taken):
            return candidate
    raise NotFound(
        "could not find an available, non-overlapping IPv4 address pool among the defaults to assign to the network"
    )


def parse_subnet(text: str) -> IPv4Network:
    """A subnet as typed; host bits are cut off.

    Raises: SystemFailure (the engine we replace answers 500 here).
    """
    try:
        if "/" not in text:
            raise AddressValueError(text)
        return IPv4Network(text, strict=False)
    except (AddressValueError, NetmaskValueError) as error:
        raise SystemFailure(f"Invalid subnet {text} : invalid CIDR address: {text}") from error


def make_pool(
    subnet: IPv4Network,
    ip_range: str = "",
    gateway: str = "",
    auxiliary: Mapping[str, str] | None = None,
) -> Pool:
    """A pool from the words of a request.

    Raises: SystemFailure for addresses that are none or lie outside, Forbidden for one that is given twice.
    """
    ranged = _parse_range(ip_range) if ip_range else None
    spoken_for: dict[str, IPv4Address] = {}
    for name, text in (auxiliary or {}).items():
        address = _parse_member(text, subnet, f"failed to allocate secondary ip address ({name}:{text})")
        if address in spoken_for.values():
            raise Forbidden(f"failed to allocate secondary ip address ({name}:{text}): Address already in use")
        spoken_for[name] = address
    if gateway:
        chosen = _parse_member(gateway.partition("/")[0], subnet, f"failed to allocate gateway ({gateway})")
        if chosen in spoken_for.values():
            raise Forbidden(f"failed to allocate gateway ({gateway}): Address already in use")
    else:
        first = next((one for one in usable(subnet, ranged) if one not in spoken_for.values()), None)
        if first is None:
            raise SystemFailure("failed to allocate gateway (): no available IPv4 addresses on this pool")
        chosen = first
    return Pool(subnet, chosen, ranged, spoken_for)


def _parse_range(text: str) -> IPv4Network:
    try:
        return IPv4Network(text, strict=False)
    except ValueError as error:
        raise SystemFailure(f"invalid CIDR address: {text}") from error


def _parse_member(text: str, subnet: IPv4Network, what: str) -> IPv4Address:
    try:
        address = IPv4Address(text)
    except AddressValueError as error:
        raise SystemFailure(f"{what}: invalid address") from error
    if address not in subnet:
        raise SystemFailure(f"{what}: Requested address is out of range")
    return address


def mac_of(address: IPv4Address) -> str:
    """The address an interface gets unless it asks for one: 02:42 and the four bytes."""
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *address.packed))
