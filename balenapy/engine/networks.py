"""Networks: the built-in ones, those that users make, who is on them. What a start does is in `sandboxes`."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core import ipam, wire
from balenapy.core.container import Container, EndpointSettings, Status
from balenapy.core.filters import Filters
from balenapy.core.network import (
    BRIDGE,
    BUILTIN,
    DRIVERS,
    HOST,
    IPAM,
    NONE,
    OPTION_DEFAULT,
    OPTION_HOST_IP,
    OPTION_ICC,
    OPTION_MASQUERADE,
    OPTION_MTU,
    OPTION_NAME,
    IPAMConfigEntry,
    Network,
    NetworkCreate,
    describe,
    parse_bridge_options,
)
from balenapy.core.timefmt import parse_until
from balenapy.engine.bridges import Bridge
from balenapy.engine.netfiles import host_resolv_conf
from balenapy.engine.sandboxes import NetworkAttachment, Sandboxes, add_short_id, check_settings
from balenapy.errors import Conflict, EngineError, Forbidden, InvalidParameter, NotFound, SystemFailure, Unsupported
from balenapy.linux import firewall, links
from balenapy.stores.networks import NetworkStore

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

__all__ = ["NetworkAttachment", "Networks"]

log = logging.getLogger(__name__)

DEFAULT_BRIDGE = "balena0"


class Networks:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = NetworkStore(engine.db)
        self._bridges: dict[str, Bridge] = {}  # by network id
        self._sandboxes = Sandboxes(engine, self)

    # -- start of the daemon --

    async def restore(self) -> None:
        """Bring bridges, firewall tables, ports and sandboxes to what the rows want. Idempotent.

        Raises: SystemFailure when the default bridge cannot be had.
        """
        await self._restore_builtin()
        if self._engine.config.ip_forward and not links.set_sysctl("ip_forward", "1"):
            log.warning("IPv4 forwarding cannot be switched on: containers reach no other machine")
        for network in self.all():
            if network.bridge:
                self._bridges[network.id] = self._make_bridge(network)
        # Who runs comes first: the tables are then written with his ports, and no packet finds them missing.
        kept = {
            container.id
            for container in self._engine.containers.all()
            if container.state.running and self._sandboxes.adopt(container)
        }
        for bridge in self._bridges.values():
            try:
                await bridge.bring_up()
            except EngineError as error:
                if bridge.network.builtin:
                    raise
                log.error("network cannot be restored network=%s error=%s", bridge.network.name, error.message)
        await self._sandboxes.remove_strays(kept)
        await self._sandboxes.serve_names()
        if self._engine.config.iptables:
            self._engine.nursery.start_soon(self._warn_of_foreign_drops)

    async def _warn_of_foreign_drops(self) -> None:
        try:
            tables = await firewall.foreign_forward_drops()
        except SystemFailure as error:
            log.warning("cannot look at the firewall error=%s", error.message)
            return
        if tables:
            log.warning(
                "another firewall drops what is forwarded by default: it must allow our bridges tables=%s",
                ",".join(tables),
            )

    async def _restore_builtin(self) -> None:
        known = {network.name: network for network in self._store.all() if network.name in BUILTIN}
        changed = []
        for name in BUILTIN:
            network = known.get(name)
            before = wire.encode(network) if network is not None else None
            if network is None:
                network = Network(
                    id=secrets.token_hex(32),
                    name=name,
                    created_ns=time.time_ns(),
                    driver=DRIVERS[name],
                    ipam=IPAM("default", None, []),
                )
            if name == BRIDGE and not self._is_disabled(network):
                await self._configure_default_bridge(network)
            if wire.encode(network) != before:
                changed.append(network)
        if changed:
            await self._store.save(*changed)

    def _is_disabled(self, network: Network) -> bool:
        return network.name == BRIDGE and self._engine.config.bridge == "none"

    async def _configure_default_bridge(self, network: Network) -> None:
        """Give the default bridge the flags of this start, and a subnet that it keeps while nobody else has it."""
        config = self._engine.config
        name = config.bridge or DEFAULT_BRIDGE
        link = await links.find_link(name)
        shown_gateway = ""
        if config.bip:
            interface = IPv4Interface(config.bip)
            shown_gateway = str(interface.ip)
        elif link is not None and link.addresses:
            interface = link.addresses[0]
            shown_gateway = str(interface.ip)
        else:
            taken = self._taken_subnets(but=network)
            if network.subnet and not any(IPv4Network(network.subnet).overlaps(other) for other in taken):
                subnet = IPv4Network(network.subnet)
            else:
                subnet = ipam.choose_subnet(self._pools(), taken)
            interface = IPv4Interface(f"{next(ipam.usable(subnet))}/{subnet.prefixlen}")
        network.foreign = name != DEFAULT_BRIDGE  # --bridge names somebody's
        network.subnet = str(interface.network)
        network.gateway = str(interface.ip)
        network.ip_range = config.fixed_cidr
        network.auxiliary = {"DefaultGatewayIPv4": config.default_gateway} if config.default_gateway else {}
        network.options = {
            OPTION_DEFAULT: "true",
            OPTION_ICC: str(config.icc).lower(),
            OPTION_MASQUERADE: str(config.ip_masq).lower(),
            OPTION_HOST_IP: config.ip,
            OPTION_NAME: name,
            OPTION_MTU: str(config.mtu),
        }
        shown = IPAMConfigEntry(network.subnet, network.ip_range, shown_gateway, network.auxiliary or None)
        network.ipam = IPAM("default", None, [shown])

    def _make_bridge(self, network: Network) -> Bridge:
        default_gateway = self._engine.config.default_gateway if network.name == BRIDGE else ""
        return Bridge(
            network,
            use_firewall=self._engine.config.iptables,
            container_gateway=IPv4Address(default_gateway) if default_gateway else None,
        )

    def _pools(self) -> Iterable[IPv4Network]:
        return ipam.expand_pools(self._engine.config.default_address_pools or ipam.DEFAULT_POOLS)

    def _taken_subnets(self, but: Network | None = None) -> list[IPv4Network]:
        """What a new subnet must not overlap: our networks, routes of the host, its name servers."""
        own = [network for network in self._store.all() if network.bridge]
        own += [bridge.network for bridge in self._bridges.values() if bridge.network not in own]
        taken = links.host_networks(except_links=[network.bridge for network in own])
        taken += [IPv4Network(network.subnet) for network in own if network.subnet and network is not but]
        for server in host_resolv_conf().nameservers:
            try:
                taken.append(IPv4Network(server))
            except ValueError:
                pass  # IPv6
        return taken

    # -- start and end of a container --

    async def attach(self, container: Container) -> NetworkAttachment:
        """See `Sandboxes.attach`."""
        return await self._sandboxes.attach(container)

    async def detach(self, container: Container) -> None:
        """See `Sandboxes.detach`."""
        await self._sandboxes.detach(container)

    # -- lookup and description --

    def all(self) -> list[Network]:
        """Every network that exists, oldest first."""
        shown = [network for network in self._store.all() if not self._is_disabled(network)]
        return sorted(shown, key=lambda network: network.created_ns)

    def find(self, name: str) -> Network | None:
        """By full id, then exact name, then id prefix; None when there is none.

        Raises: InvalidParameter when several match.
        """
        network, matches, how = self._look_up(name)
        if matches > 1:
            raise InvalidParameter(f"network {name} is ambiguous ({matches} matches found based on {how})")
        return network

    def get(self, name: str) -> Network:
        """The network that inspect means. Raises: NotFound, InvalidParameter (in inspect's own words)."""
        network, matches, how = self._look_up(name)
        if matches > 1:
            raise InvalidParameter(f"{matches} matches found based on {how}: network {name} is ambiguous")
        if network is None:
            raise NotFound(f"network {name} not found")
        return network

    def _look_up(self, name: str) -> tuple[Network | None, int, str]:
        networks = self.all()
        for network in networks:
            if network.id == name:
                return network, 1, "ID"
        for matches, how in (
            ([network for network in networks if network.name == name], "name"),
            ([network for network in networks if name and network.id.startswith(name)], "ID prefix"),
        ):
            if matches:
                return matches[0], len(matches), how
        return None, 0, ""

    def find_bridge(self, network_id: str) -> Bridge | None:
        """The live side of a bridge network."""
        return self._bridges.get(network_id)

    def describe(self, network: Network, *, containers: bool) -> dict[str, Any]:
        """The network as the API shows it; the list leaves containers out."""
        return describe(
            network, wire.rfc3339nano(network.created_ns), self._describe_containers(network) if containers else {}
        )

    def _describe_containers(self, network: Network) -> dict[str, Any]:
        shown = {}
        for container, settings in self._attached(network):
            shown[container.id] = {
                "Name": container.name,
                "EndpointID": settings.endpoint_id,
                "MacAddress": settings.mac_address,
                "IPv4Address": f"{settings.ip_address}/{settings.ip_prefix_len}" if settings.ip_address else "",
                "IPv6Address": "",
            }
        return dict(sorted(shown.items()))

    def _attached(self, network: Network) -> list[tuple[Container, EndpointSettings]]:
        """Containers with a living endpoint there."""
        return [
            (container, settings)
            for container in self._engine.containers.all()
            for settings in container.endpoints.values()
            if settings.network_id == network.id and settings.endpoint_id
        ]

    def matching(self, filters: Filters) -> list[Network]:
        """The networks that a list shows.

        Raises: SystemFailure for a type that is none.
        """
        kinds = filters.get("type")
        for kind in kinds:
            if kind not in ("custom", "builtin"):
                raise SystemFailure(f"invalid filter: 'type'='{kind}'")
        return [
            network
            for network in self.all()
            if filters.exact("driver", network.driver)
            and filters.regexp("name", network.name)
            and filters.regexp("id", network.id)
            and filters.exact("scope", "local")
            and filters.labels(network.labels)
            and (not kinds or ("builtin" if network.builtin else "custom") in kinds)
        ]

    # -- create and remove --

    async def create(self, body: NetworkCreate) -> tuple[Network, str]:
        """Make a user-defined bridge network; the network and a warning ("" if none).

        Raises: Forbidden, Conflict, NotFound (driver), SystemFailure, InvalidParameter, Unsupported.
        Cancellation: undone.
        """
        name = body.name
        if name in (*BUILTIN, "default"):
            raise Forbidden(f"operation is not permitted on predefined {name} network ")
        if not name.strip():
            raise SystemFailure(f"invalid name: {name}")
        warning = ""
        same = next((network for network in self.all() if network.name == name), None)
        if same is not None:
            if body.check_duplicate:
                raise Conflict(f"network with name {name} already exists")
            warning = f"Network with name {same.name} (id : {same.id}) already exists"
        network = self._make_record(body)
        bridge = self._bridges[network.id] = self._make_bridge(network)  # from here on its subnet is taken
        try:
            await self._store.save(network)
            await bridge.bring_up()
        except BaseException:
            await self._forget(network, bridge)
            raise
        self.announce("create", network)
        return network, warning

    def _make_record(self, body: NetworkCreate) -> Network:
        driver = body.driver or BRIDGE
        if driver in (HOST, "null"):
            raise Forbidden(f'only one instance of "{driver}" network is allowed')
        if driver != BRIDGE:
            raise NotFound(f'plugin "{driver}" not found')
        asked = body.ipam or IPAM()
        if asked.driver not in ("", "default"):
            raise NotFound(f'plugin "{asked.driver}" not found')
        if body.config_only or (body.config_from and body.config_from.network):
            raise Unsupported("configuration-only networks are not supported")
        if body.enable_ipv6 or any(":" in entry.subnet for entry in asked.config or ()):
            raise Unsupported("IPv6 networks are not supported")
        options = body.options or {}
        parse_bridge_options(options)
        network = Network(
            id=secrets.token_hex(32),
            name=body.name,
            created_ns=time.time_ns(),
            driver=driver,
            internal=body.internal,
            attachable=body.attachable,
            ingress=body.ingress,
            options=options,
            labels=body.labels or {},
        )
        for other in self._bridges.values():
            if other.name == network.bridge:
                raise Forbidden(
                    f"cannot create network {network.id} ({network.bridge}): conflicts with network "
                    f"{other.network.id} ({other.name}): same bridge name"
                )
        self._give_pool(network, asked)
        network.foreign = links.exists(network.bridge)
        return network

    def _give_pool(self, network: Network, asked: IPAM) -> None:
        entries = [entry for entry in asked.config or () if entry != IPAMConfigEntry()]
        if len(entries) > 1:
            raise Forbidden("bridge driver doesn't support multiple subnets")
        taken = [bridge.pool.subnet for bridge in self._bridges.values()]
        if entries:
            (entry,) = entries
            subnet = ipam.parse_subnet(entry.subnet)
            if any(subnet.overlaps(other) for other in taken):
                raise Forbidden("Pool overlaps with other one on this address space")
            pool = ipam.make_pool(subnet, entry.ip_range, entry.gateway, entry.auxiliary)
            shown = entries
        else:
            pool = ipam.make_pool(ipam.choose_subnet(self._pools(), self._taken_subnets()))
            shown = [IPAMConfigEntry(subnet=str(pool.subnet), gateway=str(pool.gateway))]
        network.ipam = IPAM("default", asked.options, shown)
        network.subnet = str(pool.subnet)
        network.ip_range = str(pool.ip_range) if pool.ip_range else ""
        network.gateway = str(pool.gateway)
        network.auxiliary = {name: str(address) for name, address in pool.auxiliary.items()}

    async def remove(self, name: str) -> None:
        """Remove a network on which nobody runs.

        Raises: NotFound, InvalidParameter, Forbidden.
        """
        network = self.find(name)
        if network is None:
            raise NotFound(f"network {name} not found")
        if network.builtin:
            raise Forbidden(f"{network.name} is a pre-defined network and cannot be removed")
        bridge = self._bridges.get(network.id)
        if self._attached(network) or (bridge is not None and bridge.endpoints):
            raise Forbidden(
                f"error while removing network: network {network.name} id {network.id} has active endpoints"
            )
        await self._forget(network, bridge)
        self.announce("destroy", network)

    async def _forget(self, network: Network, bridge: Bridge | None) -> None:
        """Take a network away. From the first line on no container starts on it.

        Cancellation: completes all the same.
        """
        self._bridges.pop(network.id, None)
        with trio.CancelScope(shield=True):
            await self._store.delete(network.id)
            if bridge is not None:
                try:
                    await bridge.bring_down()
                except SystemFailure as error:
                    log.error("network is not undone network=%s error=%s", network.name, error.message)

    async def prune(self, filters: Filters) -> list[str]:
        """Remove user-defined networks on which nobody runs; their names."""
        until = filters.get("until")
        if len(until) > 1:
            raise SystemFailure("more than one until filter specified")
        before_ns = parse_until(until[0], time.time_ns()) if until else None
        removed = []
        for network in self.all():
            if (
                network.builtin
                or (before_ns is not None and network.created_ns > before_ns)
                or not filters.labels(network.labels)
                or not filters.without_labels(network.labels)
            ):
                continue
            try:
                await self.remove(network.id)
            except (Forbidden, NotFound):
                continue
            removed.append(network.name)
        return removed

    # -- connect and disconnect --

    async def connect(self, name: str, container_name: str, settings: EndpointSettings | None) -> None:
        """Put a container on a network: at once if it runs, else from its next start on.

        Raises: NotFound, InvalidParameter, Forbidden, SystemFailure.
        """
        network = self.find(name)
        if network is None:
            raise NotFound(f"network {name} not found")
        container = self._engine.containers.find(container_name)
        asked = settings or EndpointSettings()
        wanted = EndpointSettings(
            ipam_config=asked.ipam_config, links=asked.links, aliases=asked.aliases, driver_opts=asked.driver_opts
        )
        async with self._engine.locks(f"container/{container.id}"):
            _refuse_leaving(container)
            check_settings(network, wanted)
            self._check_address(network, wanted)
            known = next((one for one in container.endpoints.values() if self._is_of(one, network)), None)
            running = container.state.running
            if network.name in container.endpoints or known is not None:
                if running:
                    raise Forbidden(f"endpoint with name {container.name} already exists in network {network.name}")
                container.endpoints[network.name] = wanted
            else:
                _check_combination(container, network)
            add_short_id(network, wanted, container)
            if running:
                await self._sandboxes.connect(container, network, wanted)
                self.announce("connect", network, container.id)
            else:
                container.endpoints[network.name] = wanted
            await self._engine.containers.store.update_state(container)

    async def disconnect(self, name: str, container_name: str, *, force: bool) -> None:
        """Take a container off a network.

        Raises: NotFound, InvalidParameter, SystemFailure.
        """
        network = self.find(name)
        if network is None and not force:
            raise NotFound(f"network {name} not found")
        container = self._engine.containers.find(container_name)
        async with self._engine.locks(f"container/{container.id}"):
            _refuse_leaving(container)
            key = network.name if network is not None else name
            if network is not None and network.name == HOST and container.state.running:
                raise InvalidParameter(_HOST)
            if key not in container.endpoints:
                raise SystemFailure(f"container {container.id} is not connected to network {key}")
            if container.state.running and network is not None:
                await self._sandboxes.disconnect(container, network)
            else:
                del container.endpoints[key]
            await self._engine.containers.store.update_state(container)
        if network is not None:
            self.announce("disconnect", network, container.id)

    def _is_of(self, settings: EndpointSettings, network: Network) -> bool:
        return settings.network_id == network.id

    def _check_address(self, network: Network, settings: EndpointSettings) -> None:
        address = settings.ipam_config.ipv4_address if settings.ipam_config else ""
        bridge = self._bridges.get(network.id)
        if address and bridge is not None:
            try:
                inside = IPv4Address(address) in bridge.pool.subnet
            except ValueError as error:
                raise InvalidParameter(f"invalid IPv4 address: {address}") from error
            if not inside:
                raise SystemFailure(f"Invalid address {address}: It does not belong to any of this network's subnets")

    # -- events --

    def announce(self, action: str, network: Network, container_id: str = "") -> None:
        attributes = {"container": container_id} if container_id else {}
        self._engine.events.network(network.id, action, attributes | {"name": network.name, "type": network.driver})


_HOST = "container cannot be disconnected from host network or connected to host network"


def _refuse_leaving(container: Container) -> None:
    if container.state.status in (Status.REMOVING, Status.DEAD):
        raise Forbidden(
            f"Container {container.id} is marked for removal and cannot be connected or disconnected to the network"
        )


def _check_combination(container: Container, network: Network) -> None:
    """Which networks go together in one container.

    Raises: InvalidParameter. Source: moby daemon/container_operations.go updateNetworkSettings.
    """
    mode = container.host_config.network_mode
    shares = mode.startswith("container:")
    if network.name == HOST and mode != HOST:
        raise InvalidParameter(_HOST)
    if shares or mode == HOST or HOST in container.endpoints:
        raise InvalidParameter(
            "container sharing network namespace with another container or host "
            "cannot be connected to any other network"
        )
    if container.endpoints and (NONE in container.endpoints or network.name == NONE):
        raise InvalidParameter(
            "container cannot be connected to multiple networks with one of the networks in private (none) mode"
        )
