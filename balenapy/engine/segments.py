"""The live side of a network: who is on it, under which addresses. What its links are is for its driver to say.

Addresses are given and taken in plain functions, so two starts never get the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, IPv6Network, ip_address

from balenapy.core import ipam
from balenapy.core.ipam import Address, Interface, Pool
from balenapy.core.netplan import EndpointPlan, Forward
from balenapy.core.network import BRIDGE, Network
from balenapy.errors import SystemFailure

DERIVED_PREFIX_MAX = 80  # libnetwork: a hardware address has 48 bits


@dataclass(slots=True, eq=False)
class Endpoint:
    """One container's attachment to one network."""

    id: str
    container_id: str
    segment: Segment
    address: IPv4Interface
    mac: str
    inside_name: str
    address6: IPv6Interface | None = None
    link_local: tuple[Interface, ...] = ()
    forwards: tuple[Forward, ...] = ()

    @property
    def host_link(self) -> str:
        return f"veth{self.id[:7]}"

    @property
    def addresses(self) -> tuple[Interface, ...]:
        return (self.address,) if self.address6 is None else (self.address, self.address6)

    @property
    def gateway(self) -> Address | None:
        return self.segment.gateway_of(self.address)

    @property
    def gateway6(self) -> Address | None:
        return self.segment.gateway_of(self.address6) if self.address6 is not None else None

    def plan(self, *, defaults: Defaults, hairpin: bool = False) -> EndpointPlan:
        """What the kernel is told about it."""
        return self.segment.plan(self, defaults, hairpin=hairpin)


@dataclass(frozen=True, slots=True)
class Defaults:
    """The endpoints that the default routes of a container go through."""

    ipv4: Endpoint | None = None
    ipv6: Endpoint | None = None


class Segment:
    """A network that gives its containers addresses."""

    publishes = False  # whether ports of the host can lead there
    shares_link = False  # whether interfaces inside come from a link of the host
    prefix = "eth"  # of interface names inside

    def __init__(self, network: Network) -> None:
        self.network = network
        pools = [record.pool for record in network.pools]
        self.pools = [pool for pool in pools if pool.subnet.version == 4]
        self.pools6 = [pool for pool in pools if pool.subnet.version == 6]
        self.endpoints: dict[str, Endpoint] = {}

    # -- what a driver adds --

    async def bring_up(self) -> None:
        """Make the links of the network, or bring those that exist into the wanted state. Raises: SystemFailure."""

    async def bring_down(self) -> None:
        """Remove the links of the network. Again is fine."""

    async def clear_way(self, endpoint: Endpoint) -> None:
        """See that nothing is left of whoever had this address before."""

    async def refresh(self) -> None:
        """Bring the firewall to what the endpoints want."""

    def plan(self, endpoint: Endpoint, defaults: Defaults, *, hairpin: bool) -> EndpointPlan:
        raise NotImplementedError

    def leads_out(self, endpoint: Endpoint) -> bool:
        """Whether a default route may go through here."""
        return endpoint.gateway is not None

    def mac_of(self, address: IPv4Address) -> str:
        """What an interface gets that asks for no hardware address."""
        return ipam.mac_of(address)

    # -- addresses --

    @property
    def subnets(self) -> list[ipam.Subnet]:
        return [pool.subnet for pool in (*self.pools, *self.pools6)]

    def gateway_of(self, address: Interface) -> Address | None:
        """None when the network is internal."""
        if self.network.internal:
            return None
        pool = next((pool for pool in (*self.pools, *self.pools6) if address.network == pool.subnet), None)
        return pool.container_gateway if pool is not None else None

    def check_static(self, address: str) -> None:
        """See whether an address is of this network. Raises: SystemFailure."""
        parsed = ip_address(address)
        if not any(parsed in subnet for subnet in self.subnets):
            raise ipam.not_of_the_network(address)

    def allocate(
        self,
        endpoint_id: str,
        container_id: str,
        inside_name: str,
        *,
        address: str = "",
        address6: str = "",
        mac: str = "",
    ) -> Endpoint:
        """Give a container an endpoint: the addresses it asks for, or the lowest free ones.

        Raises: SystemFailure, Forbidden.
        """
        taken = {one.ip for endpoint in self.endpoints.values() for one in endpoint.addresses}
        chosen = self._choose(self.pools, address, taken)
        assert isinstance(chosen, IPv4Interface)
        mac = mac or self.mac_of(chosen.ip)
        chosen6: Interface | None = None
        if self.pools6:
            derived = self._derived(mac, taken) if not address6 else None
            chosen6 = derived or self._choose(self.pools6, address6, taken)
        elif address6:
            raise ipam.not_of_the_network(address6)
        assert chosen6 is None or isinstance(chosen6, IPv6Interface)
        endpoint = Endpoint(endpoint_id, container_id, self, chosen, mac, inside_name, chosen6)
        self.endpoints[endpoint.id] = endpoint
        return endpoint

    def _choose(self, pools: Iterable[Pool], asked: str, taken: set[Address]) -> Interface:
        if asked:
            address = ip_address(asked)
            self.check_static(asked)
            pool = next(pool for pool in pools if address in pool.subnet)
            pool.check_static(address, taken)
            return pool.interface_of(address)
        for pool in pools:
            lowest = pool.lowest_free(taken)
            if lowest is not None:
                return pool.interface_of(lowest)
        version = next((pool.subnet.version for pool in pools), 4)
        raise SystemFailure(
            f"no available IPv{version} addresses on this network's address pools: "
            f"{self.network.name} ({self.network.id})"
        )

    def _derived(self, mac: str, taken: set[Address]) -> IPv6Interface | None:
        """On the default bridge an address is made of the hardware address, if there is room: it stays the same.

        Source: moby daemon_unix.go initBridgeDriver, deferIPv6Alloc.
        """
        (pool, *_) = self.pools6
        if self.network.name != BRIDGE or not mac or pool.subnet.prefixlen > DERIVED_PREFIX_MAX:
            return None
        assert isinstance(pool.subnet, IPv6Network)
        address: IPv6Address = ipam.address_of_mac(pool.subnet, mac)
        interface = pool.interface_of(address)
        return interface if address not in taken and isinstance(interface, IPv6Interface) else None

    def adopt(self, endpoint: Endpoint) -> None:
        """Take over an endpoint that an earlier daemon made."""
        self.endpoints[endpoint.id] = endpoint

    def release(self, endpoint: Endpoint) -> None:
        """Take the addresses back. Again is fine."""
        self.endpoints.pop(endpoint.id, None)


def defaults_of(endpoints: Iterable[Endpoint]) -> Defaults:
    """Where the default routes go: not internal before internal, then by network name. IPv6 may go another way.

    Source: libnetwork sandbox.go, epHeap.Less.
    """
    endpoints = list(endpoints)

    def first(suitable: Callable[[Endpoint], object]) -> Endpoint | None:
        return min(filter(suitable, endpoints), key=lambda endpoint: endpoint.segment.network.name, default=None)

    return Defaults(
        first(lambda endpoint: endpoint.segment.leads_out(endpoint)),
        first(lambda endpoint: endpoint.address6 is not None and endpoint.segment.leads_out(endpoint)),
    )
