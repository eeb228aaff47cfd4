"""macvlan and ipvlan networks: containers are on the network of a link of the host, beside the host itself.

Their interfaces come from that link, the parent. It is the host's, or a VLAN of one that we make (`eth0.10`), or, where
none is named, one of ours that leads nowhere; what we made goes with the network. Nothing of ours filters or hides
there, and no port of the host leads there: who shares the wire reaches the container by its own address.

An interface whose hardware address another one on the parent has does not come up, and one that dies with its
namespace stays for a moment. So whoever leaves deletes its interface first (`netns.delete_links_with`).

Source: libnetwork drivers/macvlan, drivers/ipvlan.
"""

from __future__ import annotations

import logging
from ipaddress import IPv4Address

from balenapy.core import ipam, netplan
from balenapy.core.netplan import EndpointPlan
from balenapy.core.network import IPVLAN, Network, parse_shared_link_options, parse_vlan_name
from balenapy.engine.segments import Defaults, Endpoint, Segment
from balenapy.errors import SystemFailure
from balenapy.linux import links

log = logging.getLogger(__name__)


class SharedLink(Segment):
    """One macvlan or ipvlan network."""

    shares_link = True

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.options = parse_shared_link_options(network.driver, network.options)
        self.parent = network.parent
        self.prefix = self.options.prefix

    @property
    def is_routed(self) -> bool:
        """Containers are behind the parent by routes, not on its wire: there is no gateway to ask for."""
        return self.network.driver == IPVLAN and self.options.mode == "l3"

    def mac_of(self, address: IPv4Address) -> str:
        # All of an ipvlan have the parent's.
        return "" if self.network.driver == IPVLAN else super().mac_of(address)

    def gateway_of(self, address: ipam.Interface) -> ipam.Address | None:
        return None if self.is_routed else super().gateway_of(address)

    def leads_out(self, endpoint: Endpoint) -> bool:
        return (self.is_routed and not self.network.internal) or super().leads_out(endpoint)

    def plan(self, endpoint: Endpoint, defaults: Defaults, *, hairpin: bool) -> EndpointPlan:
        is_default = endpoint is defaults.ipv4
        return EndpointPlan(
            host_name="",
            inside_name=endpoint.inside_name,
            host_link=self.parent,
            address=endpoint.address,
            mac="" if self.network.driver == IPVLAN else endpoint.mac,
            gateway=endpoint.gateway if is_default else None,
            address6=endpoint.address6,
            gateway6=endpoint.gateway6 if endpoint is defaults.ipv6 else None,
            link_local=endpoint.link_local,
            mtu=self.options.mtu,
            kind=self.network.driver,
            mode=self.options.mode,
            routed=is_default and self.is_routed,
        )

    async def bring_up(self) -> None:
        """See that the parent is there. Raises: SystemFailure."""
        if links.exists(self.parent):
            return
        vlan = parse_vlan_name(self.parent) if self.options.parent else None
        if vlan is not None and not links.exists(vlan[0]):
            raise SystemFailure(f"-o parent interface does was not found on the host: {vlan[0]}")
        try:
            await links.run_batch(netplan.parent_batch(self.parent, vlan=vlan))
        except SystemFailure as error:
            kind = "dummy" if vlan is None else "vlan"
            raise SystemFailure(f"failed to create {self.parent} {kind} link: {error.message}") from error
        self.network.foreign = False

    async def bring_down(self) -> None:
        """Remove the parent if we made it. Again is fine."""
        if not self.network.foreign and links.exists(self.parent):
            await links.run_batch(netplan.delete_batch(self.parent), force=True)
