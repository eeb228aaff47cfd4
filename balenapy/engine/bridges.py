"""Bridge networks: the interface on the host, its ports, and the firewall table.

When an endpoint goes, its links vanish with the namespace some 20 ms later, by the kernel's own pace; waiting for that
would make every stop slower. So the address is free at once and `_leaving` remembers the link that had it; whoever
gets the address next removes that link first if it is still there.
"""

from __future__ import annotations

import logging
import secrets

import trio

from balenapy.core import netplan
from balenapy.core.ipam import Address, Interface
from balenapy.core.netplan import BridgeRules, EndpointPlan
from balenapy.core.network import BridgeOptions, Network
from balenapy.engine.segments import Defaults, Endpoint, Segment
from balenapy.errors import SystemFailure
from balenapy.linux import firewall, links

log = logging.getLogger(__name__)


class Bridge(Segment):
    """One bridge of ours: its interface, its endpoints, its table."""

    def __init__(self, network: Network, *, use_firewall: bool, cleared: bool = False) -> None:
        super().__init__(network)
        self.name = network.bridge
        self.options: BridgeOptions = network.bridge_options
        self.prefix = self.options.prefix
        self.publishes = not network.internal
        self._use_firewall = use_firewall
        self._cleared = cleared  # somebody wants no rules of ours
        self._leaving: dict[Address, str] = {}
        self._applied = ""
        self._lock = trio.Lock()

    @property
    def table(self) -> str:
        return netplan.table_name(self.name)

    @property
    def interfaces(self) -> list[Interface]:
        """The addresses of the host on it."""
        return [pool.interface for pool in (*self.pools, *self.pools6)]

    def plan(self, endpoint: Endpoint, defaults: Defaults, *, hairpin: bool) -> EndpointPlan:
        return EndpointPlan(
            host_name=endpoint.host_link,
            inside_name=endpoint.inside_name,
            host_link=self.name,
            address=endpoint.address,
            mac=endpoint.mac,
            gateway=endpoint.gateway if endpoint is defaults.ipv4 else None,
            address6=endpoint.address6,
            gateway6=endpoint.gateway6 if endpoint is defaults.ipv6 else None,
            mtu=self.options.mtu,
            link_local=endpoint.link_local,
            isolated=not self.options.icc,
            hairpin=hairpin,
        )

    def release(self, endpoint: Endpoint) -> None:
        if endpoint.id in self.endpoints:
            self._leaving.update((one.ip, endpoint.host_link) for one in endpoint.addresses)
        super().release(endpoint)

    async def clear_way(self, endpoint: Endpoint) -> None:
        """Remove the link of whoever had this address before, if the kernel has not got to it yet."""
        for link in {self._leaving.pop(one.ip, "") for one in endpoint.addresses}:
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
        if self.pools6:
            self._switch_ipv6_on()
        batch = netplan.bridge_batch(self.name, self.interfaces, mac, self.options.mtu, create=link is None)
        if link is not None and not self.network.foreign:
            former = [address for address in link.addresses if address not in self.interfaces]
            batch += netplan.forget_addresses_batch(self.name, former)
        await links.run_batch(batch)
        if self._use_firewall:
            # The rule that keeps containers away from the host's loopback comes first.
            await self.refresh()
            if not links.set_sysctl(f"ipv4/conf/{self.name}/route_localnet", "1"):
                log.warning("published ports do not answer on 127.0.0.1 bridge=%s", self.name)

    def _switch_ipv6_on(self) -> None:
        """Source: libnetwork drivers/bridge/setup_ipv6.go and setup_ip_forwarding.go."""
        for name in ("default", "all"):
            if not links.set_sysctl(f"ipv6/conf/{name}/forwarding", "1"):
                log.warning("IPv6 forwarding cannot be switched on: containers reach no other machine by IPv6")

    async def bring_down(self) -> None:
        """Remove the interface and the table. Again is fine."""
        async with self._lock:
            self._applied = ""
            if self._use_firewall:
                await firewall.apply(netplan.removal(self.name, ipv6=bool(self.pools6)))
        if not self.network.foreign and links.exists(self.name):
            await links.run_batch(netplan.delete_batch(self.name), force=True)

    # -- firewall --

    def rules(self) -> BridgeRules:
        return BridgeRules(
            bridge=self.name,
            subnets=tuple(self.subnets),
            masquerade=self.options.masquerade,
            internal=self.network.internal,
            forwards=tuple(forward for endpoint in self.endpoints.values() for forward in endpoint.forwards),
        )

    async def clear_rules(self) -> None:
        """Take the table away until `restore_rules` or the next daemon."""
        self._cleared = True
        async with self._lock:
            self._applied = ""
            if self._use_firewall:
                await firewall.apply(netplan.removal(self.name, ipv6=bool(self.pools6)))

    async def restore_rules(self) -> None:
        """Write the table whatever we think it is: somebody changed it."""
        self._cleared = False
        self._applied = ""
        await self.refresh()

    async def refresh(self) -> None:
        """Bring the table into the state that the endpoints want; nothing is run when it is so already.

        Cancellation: the table has the old or the new state; the next refresh writes it again.
        """
        if not self._use_firewall or self._cleared:
            return
        async with self._lock:
            wanted = netplan.ruleset(self.rules())
            if wanted != self._applied:
                self._applied = ""
                await firewall.apply(wanted)
                self._applied = wanted

