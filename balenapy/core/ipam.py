"""Which subnet a network gets and which address an endpoint gets. Pure: callers say what is taken.

A network without a subnet takes the first default pool that overlaps neither another network, a route of
the host, nor a name server of the host; there are none for IPv6. Inside a subnet the gateway is the first address and
endpoints take the lowest free one, inside the IPRange if there is one. An address is free again when its endpoint is
gone; there is no memory of who had it.

Source: libnetwork ipamutils (pools), ipam/allocator.go, network.go ipamAllocateVersion (the words of refusals).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_network,
)

from balenapy.errors import Forbidden, NotFound, SystemFailure

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Subnet = IPv4Network | IPv6Network

# libnetwork ipamutils.PredefinedLocalScopeDefaultNetworks
DEFAULT_POOLS: tuple[str, ...] = (
    *(f"172.{second}.0.0/16:16" for second in range(17, 32)),
    "192.168.0.0/16:20",
)
GATEWAY_KEYS = {4: "DefaultGatewayIPv4", 6: "DefaultGatewayIPv6"}  # of AuxiliaryAddresses: bridge_store.go


@dataclass(frozen=True, slots=True)
class Pool:
    """The addresses of one subnet: where they come from and which are spoken for by configuration."""

    subnet: Subnet
    gateway: Address
    ip_range: Subnet | None = None
    auxiliary: Mapping[str, Address] = field(default_factory=dict)

    @property
    def interface(self) -> Interface:
        """The gateway's own, if the gateway is ours."""
        return self.interface_of(self.gateway)

    def interface_of(self, address: Address) -> Interface:
        text = f"{address}/{self.subnet.prefixlen}"
        return IPv4Interface(text) if address.version == 4 else IPv6Interface(text)

    @property
    def container_gateway(self) -> Address:
        """Where containers send what leaves the network: the gateway, unless an auxiliary address is said to be it."""
        return self.auxiliary.get(GATEWAY_KEYS[self.subnet.version], self.gateway)

    def lowest_free(self, taken: Collection[Address]) -> Address | None:
        """The lowest address an endpoint may have; None when the pool is full."""
        occupied = {self.gateway, *self.auxiliary.values(), *taken}
        return next((one for one in usable(self.subnet, self.ip_range) if one not in occupied), None)

    def check_static(self, address: Address, taken: Collection[Address]) -> None:
        """See whether an endpoint may ask for exactly this address.

        Raises: SystemFailure when it is of another subnet, Forbidden when somebody has it.
        """
        if address not in self.subnet:
            raise not_of_the_network(str(address))
        if address in taken or address in (self.gateway, *_edges(self.subnet)):
            raise Forbidden("Address already in use")


def not_of_the_network(address: str) -> SystemFailure:
    return SystemFailure(f"Invalid address {address}: It does not belong to any of this network's subnets")


def usable(subnet: Subnet, ip_range: Subnet | None = None) -> Iterator[Address]:
    """Addresses to hand out, lowest first; never the network's own nor its broadcast address.

    An IPRange outside the subnet hands out its own addresses: so does the engine we replace.
    """
    edges = _edges(subnet)
    return (one for one in ip_range or subnet if one not in edges)


def _edges(subnet: Subnet) -> tuple[Address, ...]:
    """The first and the last address are nobody's, over there in IPv6 as well, which has no broadcast."""
    if subnet.max_prefixlen - subnet.prefixlen < 2:
        return ()
    return subnet.network_address, subnet.broadcast_address


def expand_pools(pools: Iterable[str], version: int = 4) -> Iterator[Subnet]:
    """`172.30.0.0/15:16` -> 172.30.0.0/16, 172.31.0.0/16; lazily, since a /8 cut in /24 is 65,536 networks.

    Pools of the other version are left out. For IPv4 there are others to take where none are given.
    """
    parted = [pool.rpartition(":") for pool in pools]
    of_version = [(ip_network(base), int(size)) for base, _, size in parted if (":" in base) == (version == 6)]
    if not of_version and version == 4:
        yield from expand_pools(DEFAULT_POOLS)
    for network, size in of_version:
        yield from network.subnets(new_prefix=size)


def choose_subnet(candidates: Iterable[Subnet], taken: Collection[Subnet], version: int = 4) -> Subnet:
    """The first candidate that overlaps nothing taken.

    Raises: NotFound, when all are taken.
    """
    for candidate in candidates:
        if not any(overlap(candidate, other) for other in taken):
            return candidate
    raise NotFound(
        f"could not find an available, non-overlapping IPv{version} address pool among the defaults to assign to the "
        "network"
    )


def overlap(one: Subnet, other: Subnet) -> bool:
    """Like `overlaps`, which will not compare IPv4 with IPv6."""
    return one.version == other.version and one.overlaps(other)


def parse_subnet(text: str) -> Subnet:
    """A subnet as typed; host bits are cut off.

    Raises: SystemFailure (the engine we replace answers 500 here).
    """
    try:
        if "/" not in text:
            raise ValueError(text)
        return ip_network(text, strict=False)
    except ValueError as error:
        raise SystemFailure(f"Invalid subnet {text} : invalid CIDR address: {text}") from error


def make_pool(
    subnet: Subnet,
    ip_range: str = "",
    gateway: str = "",
    auxiliary: Mapping[str, str] | None = None,
    *,
    network: str = "",
) -> Pool:
    """A pool from the words of a request for a network of this name.

    Raises: SystemFailure for addresses that are none or lie outside, Forbidden for an auxiliary one that does.
    """
    asked_gateway = _parse(gateway, f"invalid gateway address {gateway} in Ipam configuration") if gateway else None
    asked_auxiliary = {
        name: _parse(text, f"non parsable secondary ip address ({name}:{text}) passed for network {network}")
        for name, text in (auxiliary or {}).items()
    }
    ranged = _parse_range(subnet, ip_range) if ip_range else None
    if asked_gateway is not None and asked_gateway not in subnet:
        raise SystemFailure(f"failed to allocate gateway ({gateway}): Requested address is out of range")
    # Over there the gateway comes first, and an auxiliary address that is the first one is refused; here it gives way.
    first = next((one for one in usable(subnet, ranged) if one not in asked_auxiliary.values()), None)
    chosen = asked_gateway or first
    if chosen is None:
        raise SystemFailure("failed to allocate gateway (): no available IPv4 addresses on this pool")
    spoken_for: dict[str, Address] = {}
    for name, address in asked_auxiliary.items():
        if address not in subnet:
            raise Forbidden(f"auxiliary address: ({name}:{address}) must belong to the master pool: {subnet}")
        if address == chosen or address in spoken_for.values():
            raise SystemFailure(f"failed to allocate secondary ip address ({name}:{address}): Address already in use")
        spoken_for[name] = address
    return Pool(subnet, chosen, ranged, spoken_for)


def _parse(text: str, refusal: str) -> Address:
    try:
        return ip_address(text)
    except ValueError as error:
        raise SystemFailure(refusal) from error


def _parse_range(subnet: Subnet, text: str) -> Subnet:
    try:
        ranged = ip_network(text, strict=False)
        if ranged.version != subnet.version:
            raise ValueError(text)
        return ranged
    except ValueError as error:
        raise SystemFailure(
            f'failed to parse pool request for address space "LocalDefault" pool "{subnet}" subpool "{text}": '
            "Invalid Address SubPool"
        ) from error


def mac_of(address: IPv4Address) -> str:
    """The address an interface gets unless it asks for one: 02:42 and the four bytes."""
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *address.packed))


def link_local(texts: Iterable[str]) -> tuple[Interface, ...]:
    """Addresses that an endpoint has beside its own, valid on that link only.

    Raises: SystemFailure. Source: libnetwork endpoint.go, CreateOptionIpam; moby daemon/network.go.
    """
    asked = list(texts)
    try:
        found = [ip_address(text) for text in asked if text]
    except ValueError as error:
        raise SystemFailure(f"Invalid link-local IP address: {asked}") from error
    return tuple(IPv4Interface(f"{one}/16") if one.version == 4 else IPv6Interface(f"{one}/64") for one in found)


def address_of_mac(subnet: IPv6Network, mac: str) -> IPv6Address:
    """What an interface has on the default bridge: the subnet, and its hardware address as the last six bytes."""
    return subnet[int(mac.replace(":", ""), 16)]
