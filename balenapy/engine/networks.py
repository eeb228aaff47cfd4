"""Networks: the built-in ones, those that users make, who is on them. What a start does is in `sandboxes`."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterable
from ipaddress import ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core import ipam, wire
from balenapy.core.container import Container, EndpointSettings, Status
from balenapy.core.filters import Filters
from balenapy.core.ipam import Pool, Subnet
from balenapy.core.network import (
    BRIDGE,
    BUILTIN,
    DRIVERS,
    HOST,
    IPAM,
    MACVLAN,
    NONE,
    OPTION_DEFAULT,
    OPTION_HOST_IP,
    OPTION_ICC,
    OPTION_MASQUERADE,
    OPTION_MTU,
    OPTION_NAME,
    OPTION_PARENT,
    SHARED_LINK,
    IPAMConfigEntry,
    Network,
    NetworkCreate,
    PoolRecord,
    describe,
    parse_bridge_options,
    parse_shared_link_options,
)
from balenapy.core.timefmt import parse_until
from balenapy.engine.bridges import Bridge
from balenapy.engine.netfiles import host_resolv_conf
from balenapy.engine.sandboxes import CONFIGURATION_ONLY, NetworkAttachment, Sandboxes, add_short_id, check_settings
from balenapy.engine.segments import Segment
from balenapy.engine.sharedlinks import SharedLink
from balenapy.errors import Conflict, EngineError, Forbidden, InvalidParameter, NotFound, SystemFailure
from balenapy.linux import firewall, links
from balenapy.stores.networks import NetworkStore

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

__all__ = ["NetworkAttachment", "Networks"]

log = logging.getLogger(__name__)

DEFAULT_BRIDGE = "balena0"
LOCAL_SCOPE = "local"
MEND_PAUSE_S = 0.2


class Networks:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = NetworkStore(engine.db)
        self._segments: dict[str, Segment] = {}  # by network id
        self._sandboxes = Sandboxes(engine, self)
        self._firewall_cleared = False  # on request
        self._pruning = False

    # -- start of the daemon --

    async def restore(self) -> None:
        """Bring bridges, firewall tables, ports and sandboxes to what the rows want. Idempotent.

        Raises: SystemFailure when the default bridge cannot be had.
        """
        await self._restore_builtin()
        if self._engine.config.ip_forward and not links.set_sysctl("ipv4/ip_forward", "1"):
            log.warning("IPv4 forwarding cannot be switched on: containers reach no other machine")
        for network in self.all():
            if network.pools:
                self._segments[network.id] = self._make_segment(network)
        # Who runs comes first: the tables are then written with his ports, and no packet finds them missing.
        kept = {
            container.id
            for container in self._engine.containers.all()
            if container.state.running and self._sandboxes.adopt(container)
        }
        for segment in self._segments.values():
            try:
                await segment.bring_up()
            except EngineError as error:
                if segment.network.builtin:
                    raise
                log.error("network cannot be restored network=%s error=%s", segment.network.name, error.message)
        await self._sandboxes.remove_strays(kept)
        await self._sandboxes.serve_names()
        if self._engine.config.iptables:
            self._engine.nursery.start_soon(self._warn_of_foreign_drops)
            self._engine.nursery.start_soon(self._keep_firewall)

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

    # -- firewall --

    async def _keep_firewall(self) -> None:
        """Write tables again that somebody flushed, for as long as we run."""
        try:
            watch = firewall.TableWatch()
        except SystemFailure as error:
            log.warning("rules that others flush are not written again error=%s", error.message)
            return
        with contextlib.closing(watch):
            while True:
                damaged = await watch.wait()
                if self._firewall_cleared:
                    continue
                for bridge in self._bridges():
                    if damaged is None or bridge.table in damaged:
                        await self._mend(bridge, told=damaged is not None)
                await trio.sleep(MEND_PAUSE_S)  # against somebody who flushes without end

    async def _mend(self, bridge: Bridge, *, told: bool) -> None:
        if told:
            log.warning("somebody flushed firewall rules of ours: written again bridge=%s", bridge.name)
        try:
            await bridge.restore_rules()
        except SystemFailure as error:
            log.error("firewall rules cannot be written bridge=%s error=%s", bridge.name, error.message)

    def _bridges(self) -> list[Bridge]:
        """Those that have firewall rules of ours."""
        if not self._engine.config.iptables:
            return []
        return [segment for segment in self._segments.values() if isinstance(segment, Bridge)]

    async def clear_firewall(self) -> list[str]:
        """Take every rule of ours away, until `restore_firewall` or the next daemon; the names of the tables.

        Raises: SystemFailure.
        """
        self._firewall_cleared = True
        log.warning("firewall rules are taken away on request: published ports do not answer")
        for bridge in self._bridges():
            await bridge.clear_rules()
        return [bridge.table for bridge in self._bridges()]

    async def restore_firewall(self) -> list[str]:
        """Write every rule of ours anew; the names of the tables. Raises: SystemFailure."""
        self._firewall_cleared = False
        for bridge in self._bridges():
            await bridge.restore_rules()
        return [bridge.table for bridge in self._bridges()]

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
        former = next((one.pool for one in network.pools if one.pool.subnet.version == 4), None)
        there = [address for address in link.addresses if address.version == 4] if link is not None else []
        if config.bip:
            interface = ip_interface(config.bip)
            shown_gateway = str(interface.ip)
        elif there:
            interface = there[0]
            shown_gateway = str(interface.ip)
        else:
            taken = self._taken_subnets(but=network)
            if former is not None and not any(ipam.overlap(former.subnet, other) for other in taken):
                subnet = former.subnet
            else:
                subnet = ipam.choose_subnet(self._pools(), taken)
            interface = ip_interface(f"{next(ipam.usable(subnet))}/{subnet.prefixlen}")
        network.foreign = name != DEFAULT_BRIDGE  # --bridge names somebody's
        auxiliary = {ipam.GATEWAY_KEYS[4]: config.default_gateway} if config.default_gateway else {}
        pool = PoolRecord(str(interface.network), config.fixed_cidr, str(interface.ip), auxiliary)
        network.pools = [pool]
        network.options = {
            OPTION_DEFAULT: "true",
            OPTION_ICC: str(config.icc).lower(),
            OPTION_MASQUERADE: str(config.ip_masq).lower(),
            OPTION_HOST_IP: config.ip,
            OPTION_NAME: name,
            OPTION_MTU: str(config.mtu),
        }
        shown = [IPAMConfigEntry(pool.subnet, pool.ip_range, shown_gateway, auxiliary or None)]
        network.enable_ipv6 = config.ipv6
        if config.ipv6:
            subnet6 = ip_network(config.fixed_cidr_v6, strict=False)
            auxiliary6 = {ipam.GATEWAY_KEYS[6]: config.default_gateway_v6} if config.default_gateway_v6 else {}
            there6 = next((one for one in link.addresses if one.ip in subnet6), None) if link is not None else None
            gateway6 = there6.ip if there6 is not None else next(ipam.usable(subnet6))
            network.pools.append(PoolRecord(str(subnet6), "", str(gateway6), auxiliary6))
            shown.append(
                IPAMConfigEntry(str(subnet6), "", str(gateway6) if there6 is not None else "", auxiliary6 or None)
            )
        network.ipam = IPAM("default", None, shown)

    def _make_segment(self, network: Network) -> Segment:
        if network.driver in SHARED_LINK:
            return SharedLink(network)
        return Bridge(network, use_firewall=self._engine.config.iptables, cleared=self._firewall_cleared)

    def _pools(self) -> Iterable[Subnet]:
        return ipam.expand_pools(self._engine.config.default_address_pools)

    def _pools6(self) -> Iterable[Subnet]:
        return ipam.expand_pools(self._engine.config.default_address_pools, 6)

    def _taken_subnets(self, but: Network | None = None) -> list[Subnet]:
        """What a new subnet must not overlap: our networks, routes of the host, its name servers."""
        own = [network for network in self._store.all() if network.pools]
        own += [segment.network for segment in self._segments.values() if segment.network not in own]
        bridges = [network.bridge for network in own]
        taken: list[Subnet] = [*links.host_networks(except_links=bridges), *links.host_networks6(except_links=bridges)]
        taken += [ip_network(pool.subnet) for network in own if network is not but for pool in network.pools]
        for server in host_resolv_conf().nameservers:
            try:
                taken.append(ip_network(server.partition("%")[0]))
            except ValueError:
                pass  # whoever reads the file will say so
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
            # As it is worded there: moby daemon/network.go, FindNetwork.
            found = "on name" if how == "name" else f"based on {how}"
            raise InvalidParameter(f"network {name} is ambiguous ({matches} matches found {found})")
        return network

    def get(self, name: str, scope: str = "") -> Network:
        """The network that inspect means. Raises: NotFound, InvalidParameter (in inspect's own words)."""
        network, matches, how = self._look_up(name) if scope in ("", LOCAL_SCOPE) else (None, 0, "")
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

    def find_segment(self, network_id: str) -> Segment | None:
        """The live side of a network that gives addresses."""
        return self._segments.get(network_id)

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
                "IPv6Address": (
                    f"{settings.global_ipv6_address}/{settings.global_ipv6_prefix_len}"
                    if settings.global_ipv6_address
                    else ""
                ),
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
            and filters.exact("scope", LOCAL_SCOPE)
            and filters.labels(network.labels)
            and (not kinds or ("builtin" if network.builtin else "custom") in kinds)
        ]

    # -- create and remove --

    async def create(self, body: NetworkCreate) -> tuple[Network, str]:
        """Make a user-defined network; the network and a warning ("" if none).

        Raises: Forbidden, Conflict, NotFound (driver), SystemFailure, InvalidParameter.
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
        segment = None
        if network.pools:
            segment = self._segments[network.id] = self._make_segment(network)  # from here on its subnet is taken
        try:
            await self._store.save(network)
            if segment is not None:
                await segment.bring_up()
        except BaseException:
            await self._forget(network, segment)
            raise
        self.announce("create", network)
        return network, warning

    def _make_record(self, body: NetworkCreate) -> Network:
        driver = body.driver or BRIDGE
        if driver in (HOST, "null"):
            raise Forbidden(f'only one instance of "{driver}" network is allowed')
        if driver != BRIDGE and driver not in SHARED_LINK:
            raise NotFound(f'plugin "{driver}" not found')
        asked = body.ipam or IPAM()
        if asked.driver not in ("", "default"):
            raise NotFound(f'plugin "{asked.driver}" not found')
        if body.scope == "swarm":
            raise Forbidden("cannot create a swarm scoped network when swarm is not active")
        if body.ingress:
            raise Forbidden("Ingress network can only be global scope network")
        network = Network(
            id=secrets.token_hex(32),
            name=body.name,
            created_ns=time.time_ns(),
            driver=driver,
            enable_ipv6=body.enable_ipv6,
            internal=body.internal,
            attachable=body.attachable,
            options=body.options or {},
            labels=body.labels or {},
        )
        if body.config_from is not None and body.config_from.network:
            asked = self._take_configuration(network, body.config_from.network, body)
        if body.config_only:
            network.config_only, network.driver = True, DRIVERS[NONE]
            network.ipam = IPAM("default", asked.options, asked.config)
            return network
        if driver == BRIDGE:
            parse_bridge_options(network.options)
            network.foreign = links.exists(network.bridge)
        else:
            parse_shared_link_options(driver, network.options)
            network.internal = network.internal or not network.options.get(OPTION_PARENT)
            network.foreign = links.exists(network.parent)
        self._refuse_shared_names(network)
        self._give_pools(network, asked)
        return network

    def _take_configuration(self, network: Network, name: str, body: NetworkCreate) -> IPAM:
        """Make a network of the configuration of another. Source: libnetwork network.go, applyConfigurationTo.

        Raises: Forbidden, NotFound.
        """
        if body.config_only:
            raise Forbidden("a configuration network cannot depend on another configuration network")
        source = next((one for one in self.all() if name in (one.name, one.id) and one.config_only), None)
        if source is None:
            raise NotFound(f'configuration network "{name}" does not exist')
        if body.ipam is not None and (body.ipam.config or body.ipam.options):
            raise Forbidden(
                "user specified configurations are not supported if the network depends on a configuration network"
            )
        if network.options:
            raise Forbidden(
                "network driver options are not supported if the network depends on a configuration network"
            )
        network.config_from = source.name
        network.enable_ipv6 = source.enable_ipv6
        network.options = dict(source.options)
        network.labels = source.labels | network.labels
        return source.ipam

    def _refuse_shared_names(self, network: Network) -> None:
        """Two networks cannot have one link of the host. Raises: Forbidden, SystemFailure."""
        for segment in self._segments.values():
            other = segment.network
            if network.bridge and other.bridge == network.bridge:
                raise Forbidden(
                    f"cannot create network {network.id} ({network.bridge}): conflicts with network "
                    f"{other.id} ({other.bridge}): same bridge name"
                )
            if network.driver in SHARED_LINK and other.driver == network.driver and other.parent == network.parent:
                prefix = "dm" if other.driver == MACVLAN else "di"
                raise SystemFailure(
                    f"network {prefix}-{other.id[:12]} is already using parent interface {network.parent}"
                )

    def _give_pools(self, network: Network, asked: IPAM) -> None:
        """Give a network its subnets. Raises: Forbidden, NotFound, SystemFailure."""
        entries = asked.config or []
        subnets = [ipam.parse_subnet(entry.subnet) for entry in entries]
        taken = [subnet for segment in self._segments.values() for subnet in segment.subnets]
        pools: list[Pool] = []
        chosen: list[Pool] = []
        shown: dict[int, list[IPAMConfigEntry]] = {4: [], 6: []}
        for entry, subnet in zip(entries, subnets, strict=True):
            shown[subnet.version].append(entry)
            if subnet.version == 6 and not network.enable_ipv6:
                continue  # shown, and not used: so it is over there
            if any(ipam.overlap(subnet, other) for other in (*taken, *(pool.subnet for pool in pools))):
                raise Forbidden("Pool overlaps with other one on this address space")
            pools.append(ipam.make_pool(subnet, entry.ip_range, entry.gateway, entry.auxiliary, network=network.name))
        for version, candidates in ((4, self._pools()), (6, self._pools6())):
            if (version == 6 and not network.enable_ipv6) or any(one.subnet.version == version for one in pools):
                continue
            taken_now = [*self._taken_subnets(), *(pool.subnet for pool in pools)]
            pool = ipam.make_pool(ipam.choose_subnet(candidates, taken_now, version))
            pools.append(pool)
            chosen.append(pool)
            gateway = str(pool.gateway) if version == 4 else str(pool.interface)  # as it is shown over there
            shown[version].append(IPAMConfigEntry(subnet=str(pool.subnet), gateway=gateway))
        if network.driver == BRIDGE and any(
            len([one for one in pools if one.subnet.version == version]) > 1 for version in (4, 6)
        ):
            raise Forbidden("bridge driver doesn't support multiple subnets")
        network.ipam = IPAM("default", asked.options, [*shown[4], *shown[6]])
        network.pools = [PoolRecord.of(pool, chosen=pool in chosen) for pool in pools]

    async def remove(self, name: str) -> None:
        """Remove a network on which nobody runs.

        Raises: NotFound, InvalidParameter, Forbidden.
        """
        network, matches, how = self._look_up(name)
        if matches > 1:
            raise InvalidParameter(f"network {name} is ambiguous ({matches} matches found based on {how})")
        if network is None:
            raise NotFound(f"network {name} not found")
        if network.builtin:
            raise Forbidden(f"{network.name} is a pre-defined network and cannot be removed")
        if network.config_only and any(one.config_from == network.name for one in self.all()):
            raise Forbidden(f'error while removing network: configuration network "{network.name}" is in use')
        segment = self._segments.get(network.id)
        if self._attached(network) or (segment is not None and segment.endpoints):
            raise Forbidden(
                f"error while removing network: network {network.name} id {network.id} has active endpoints"
            )
        await self._forget(network, segment)
        self.announce("destroy", network)

    async def _forget(self, network: Network, segment: Segment | None) -> None:
        """Take a network away. From the first line on no container starts on it.

        Cancellation: completes all the same.
        """
        self._segments.pop(network.id, None)
        with trio.CancelScope(shield=True):
            await self._store.delete(network.id)
            if segment is not None:
                try:
                    await segment.bring_down()
                except SystemFailure as error:
                    log.error("network is not undone network=%s error=%s", network.name, error.message)

    async def prune(self, filters: Filters) -> list[str]:
        """Remove user-defined networks on which nobody runs; their names.

        Raises: SystemFailure, Conflict when a prune is under way already.
        """
        until = filters.get("until")
        if len(until) > 1:
            raise SystemFailure("more than one until filter specified")
        before_ns = parse_until(until[0], time.time_ns()) if until else None
        if self._pruning:
            raise Conflict("a prune operation is already running")
        self._pruning = True
        try:
            return await self._prune(filters, before_ns)
        finally:
            self._pruning = False

    async def _prune(self, filters: Filters, before_ns: int | None) -> list[str]:
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
        container = self._engine.containers.find(container_name)
        network = self.find(name)
        if network is None:
            raise NotFound(f"network {name} not found")
        if network.config_only:
            raise Forbidden(CONFIGURATION_ONLY)
        asked = settings or EndpointSettings()
        wanted = EndpointSettings(
            ipam_config=asked.ipam_config, links=asked.links, aliases=asked.aliases, driver_opts=asked.driver_opts
        )
        async with self._engine.locks(f"container/{container.id}"):
            _refuse_leaving(container)
            check_settings(network, wanted)
            self._check_addresses(network, wanted)
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
        try:
            container = self._engine.containers.find(container_name)
        except NotFound as error:
            if not force:
                raise
            # An endpoint may outlive its container over there; here there is none to be forgotten.
            raise NotFound(f"endpoint {container_name} not found") from error
        network = self.find(name)
        if network is None and not force:
            raise NotFound(f"network {name} not found")
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

    def _check_addresses(self, network: Network, settings: EndpointSettings) -> None:
        asked = settings.ipam_config
        segment = self._segments.get(network.id)
        if asked is None or segment is None:
            return
        for version, address in ((4, asked.ipv4_address), (6, asked.ipv6_address)):
            try:
                if address and ip_address(address).version != version:
                    raise ValueError(address)
            except ValueError as error:
                raise InvalidParameter(f"invalid IPv{version} address: {address}") from error
            if address:
                segment.check_static(address)
        ipam.link_local(asked.link_local_ips or ())

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
