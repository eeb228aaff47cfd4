"""The live side of a bridge network: the interface, who has which address, and the firewall table.

Addresses are given and taken in plain functions, so two starts never get the same one. When an endpoint goes, its
links vanish with the namespace some 20 ms later, by the kernel's own pace; waiting for that would make every
stop slower. So the address is free at once and `_leaving` remembers the link that had it; whoever gets the
address next removes that link first if it is still there.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface

import trio

from balenapy.core import ipam, netplan
from balenapy.core.ipam import Pool
from balenapy.core.netplan import BridgeRules, EndpointPlan, Forward
from balenapy.core.network import BridgeOptions, Network
from balenapy.errors import SystemFailure
from balenapy.linux import firewall, links

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Endpoint:
    """One container's attachment to one bridge network."""

    id: str
    container_id: str
    bridge: Bridge
    address: IPv4Interface
    mac: str
    inside_name: str
    forwards: tuple[Forward, ...] = ()

    @property
    def host_link(self) -> str:
        return f"veth{self.id[:7]}"

    @property
    def gateway(self) -> IPv4Address | None:
        return self.bridge.container_gateway

    def plan(self, *, default_route: bool, hairpin: bool = False) -> EndpointPlan:
        options = self.bridge.options
        return EndpointPlan(
            host_name=self.host_link,
            inside_name=self.inside_name,
            bridge=self.bridge.name,
            address=self.address,
            mac=self.mac,
            gateway=self.gateway if default_route else None,
            mtu=options.mtu,
            isolated=not options.icc,
            hairpin=hairpin,
        )


class Bridge:
    """One bridge of ours: its interface, its endpoints, its table."""

    def __init__(self, network: Network, *, use_firewall: bool, container_gateway: IPv4Address | None = None) -> None:
        pool = network.pool
        assert pool is not None
        self.network = network
        self.name = network.bridge
        self.pool: Pool = pool
        self.options: BridgeOptions = network.bridge_options
        self.container_gateway = None if network.internal else container_gateway or pool.gateway
        self.endpoints: dict[str, Endpoint] = {}
        self._use_firewall = use_firewall
        self._leaving: dict[IPv4Address, str] = {}
        self._applied = ""
        self._lock = trio.Lock()

    @property
    def interface(self) -> IPv4Interface:
        return IPv4Interface(f"{self.pool.gateway}/{self.pool.subnet.prefixlen}")

    # -- addresses --

    def allocate(
        self, endpoint_id: str, container_id: str, inside_name: str, *, address: str = "", mac: str = ""
    ) -> Endpoint:
        """Give a container an endpoint: the address it asks for, or the lowest free one.

        Raises: SystemFailure, Forbidden.
        """
        taken = {endpoint.address.ip for endpoint in self.endpoints.values()}
        if address:
            chosen = IPv4Address(address)
            self.pool.check_static(chosen, taken)
        else:
            lowest = self.pool.lowest_free(taken)
            if lowest is None:
                raise SystemFailure(
                    "no available IPv4 addresses on this network's address pools: "
                    f"{self.network.name} ({self.network.id})"
                )
            chosen = lowest
        endpoint = Endpoint(
            id=endpoint_id,
            container_id=container_id,
            bridge=self,
            address=IPv4Interface(f"{chosen}/{self.pool.subnet.prefixlen}"),
            mac=mac or ipam.mac_of(chosen),
            inside_name=inside_name,
        )
        self.endpoints[endpoint.id] = endpoint
        return endpoint

    def adopt(self, endpoint: Endpoint) -> None:
        """Take over an endpoint that an earlier daemon made."""
        self.endpoints[endpoint.id] = endpoint

    def release(self, endpoint: Endpoint) -> None:
        """Take the address back. Again is fine."""
        if self.endpoints.pop(endpoint.id, None) is not None:
            self._leaving[endpoint.address.ip] = endpoint.host_link

    async def clear_way(self, endpoint: Endpoint) -> None:
        """Remove the link of whoever had this address before, if the kernel has not got to it yet."""
        link = self._leaving.pop(endpoint.address.ip, "")
        if link and links.exists(link):
            # It may vanish meanwhile; then there is nothing to delete.
            await links.run_batch(netplan.delete_batch(link), force=True)

    # -- interface --

    async def bring_up(self) -> None:
        """Make the interface, or bring the one that exists into the wanted state.

        Raises: SystemFailure.
        """
        link = await links.find_link(self.name)
        if link is not None and link.kind != "bridge":
            raise SystemFailure(f"cannot use {self.name} as a bridge: it is a {link.kind or 'network card'}")
        mac = ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *secrets.token_bytes(4)))
        batch = netplan.bridge_batch(self.name, self.interface, mac, self.options.mtu, create=link is None)
        if link is not None and not self.network.foreign:
            former = [address for address in link.addresses if address != self.interface]
            batch += netplan.forget_addresses_batch(self.name, former)
        await links.run_batch(batch)
        if self._use_firewall:
            # The rule that keeps containers away from the host's loopback comes first.
            await self.refresh()
            if not links.set_sysctl(f"conf/{self.name}/route_localnet", "1"):
                log.warning("published ports do not answer on 127.0.0.1 bridge=%s", self.name)

    async def bring_down(self) -> None:
        """Remove the interface and the table. Again is fine."""
        async with self._lock:
            self._applied = ""
            if self._use_firewall:
                await firewall.apply(netplan.removal(self.name))
        if not self.network.foreign and links.exists(self.name):
            await links.run_batch(netplan.delete_batch(self.name), force=True)

    # -- firewall --

    def rules(self) -> BridgeRules:
        return BridgeRules(
            bridge=self.name,
            subnets=(self.pool.subnet,),
            masquerade=self.options.masquerade,
            internal=self.network.internal,
            forwards=tuple(forward for endpoint in self.endpoints.values() for forward in endpoint.forwards),
        )

    async def refresh(self) -> None:
        """Bring the table into the state that the endpoints want; nothing is run when it is so already.

        Cancellation: the table has the old or the new state; the next refresh writes it again.
        """
        if not self._use_firewall:
            return
        async with self._lock:
            wanted = netplan.ruleset(self.rules())
            if wanted != self._applied:
                self._applied = ""
                await firewall.apply(wanted)
                self._applied = wanted


def default_endpoint(endpoints: Iterable[Endpoint]) -> Endpoint | None:
    """The endpoint the default route goes through: not internal before internal, then by network name.

    Source: libnetwork sandbox.go, epHeap.Less.
    """
    with_gateway = [endpoint for endpoint in endpoints if endpoint.gateway is not None]
    return min(with_gateway, key=lambda endpoint: endpoint.bridge.network.name, default=None)
