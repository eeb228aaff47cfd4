"""Networks, and the attachment of containers to them: a sandbox (network namespace) and its endpoints.

A start calls `attach`, an exit `detach`; both may be repeated. `attach` changes the kernel and the container's record
(`endpoints`, `sandbox`), which the supervisor stores with the state it commits; so what is adopted after a crash
is exactly what was told to a client. What was attached by an engine that died before that commit is
found by name (`<exec-root>/netns`) and removed at the next start.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core import hostfiles, ipam, netplan, wire
from balenapy.core.container import Container, EndpointSettings, PortBinding, SandboxState
from balenapy.core.filters import Filters
from balenapy.core.netplan import Forward
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
    describe,
)
from balenapy.core.ports import ExposedPort, PublishedPort, expand_exposed, requested_ports
from balenapy.engine.bridges import Bridge, Endpoint, default_endpoint
from balenapy.engine.published import PublishedPorts
from balenapy.errors import Conflict, EngineError, InvalidParameter, NotFound, SystemFailure
from balenapy.linux import firewall, links, netns
from balenapy.stores.networks import NetworkStore

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

DEFAULT_BRIDGE = "balena0"
UNDO_TIMEOUT_S = 10

_RESOLV_CONF = Path("/etc/resolv.conf")
_RESOLVED_STUB = ("127.0.0.53",)
_RESOLVED_CONF = Path("/run/systemd/resolve/resolv.conf")  # the servers behind systemd-resolved's stub


@dataclass(frozen=True, slots=True)
class NetworkAttachment:
    """What the runtime and the mounts of a starting container need. `netns_path` None is the host's namespace."""

    netns_path: str | None
    hosts_path: str
    hostname_path: str
    resolv_path: str


@dataclass(slots=True, eq=False)
class Sandbox:
    """The live side of one running container's network."""

    container_id: str
    path: Path | None  # None: the host's namespace
    endpoints: list[Endpoint] = field(default_factory=list)


class Networks:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = NetworkStore(engine.db)
        self._netns_dir = engine.config.exec_root / "netns"
        self._bridges: dict[str, Bridge] = {}  # by network id
        self._sandboxes: dict[str, Sandbox] = {}  # by container id
        self._ports = PublishedPorts()

    # -- start of the daemon --

    async def restore(self) -> None:
        """Bring bridges, firewall tables, ports and sandboxes to what the rows want. Idempotent.

        Raises: SystemFailure when the default bridge cannot be had.
        """
        await self._restore_builtin()
        if self._engine.config.ip_forward and not links.set_sysctl("ip_forward", "1"):
            log.warning("IPv4 forwarding cannot be switched on: containers reach no other machine")
        for network in self._store.all():
            if network.bridge and network.subnet and not self._is_disabled(network):
                self._bridges[network.id] = self._make_bridge(network)
        kept = set()
        for container in self._engine.containers.all():
            if container.state.running and self._adopt(container):
                kept.add(container.sandbox.sandbox_key)
        for bridge in self._bridges.values():
            try:
                await bridge.bring_up()
            except EngineError as error:
                if bridge.network.builtin:
                    raise
                log.error("network cannot be restored network=%s error=%s", bridge.network.name, error.message)
        for name in netns.names(self._netns_dir):
            path = self._netns_dir / name
            if str(path) not in kept:
                log.info("removing leftover network namespace name=%s", name)
                await self._in_netns_thread(netns.remove, path)
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
                "another firewall drops what is forwarded unless it allows it; allow our bridges there tables=%s",
                ",".join(tables),
            )

    async def _restore_builtin(self) -> None:
        known = {network.name: network for network in self._store.all() if network.name in BUILTIN}
        wanted = []
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
                wanted.append(network)
        if wanted:
            await self._store.save(*wanted)

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
            taken = self._taken_subnets(except_link=name)
            if network.subnet and not any(IPv4Network(network.subnet).overlaps(other) for other in taken):
                subnet = IPv4Network(network.subnet)
            else:
                subnet = ipam.choose_subnet(self._pools(), taken)
            interface = IPv4Interface(f"{next(ipam.usable(subnet))}/{subnet.prefixlen}")
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

    def _taken_subnets(self, except_link: str = "") -> list[IPv4Network]:
        own = [network.bridge for network in self._store.all() if network.bridge]
        taken = links.host_networks(except_links=[*own, except_link])
        taken += [
            IPv4Network(network.subnet)
            for network in self._store.all()
            if network.subnet and network.bridge != except_link
        ]
        for server in self._host_resolv_conf().nameservers:
            try:
                taken.append(IPv4Network(server))
            except ValueError:
                pass  # IPv6
        return taken

    def _adopt(self, container: Container) -> bool:
        """Take over the endpoints and ports of a container that runs; False when its sandbox is not ours or is gone."""
        key = container.sandbox.sandbox_key
        mode = container.host_config.network_mode
        if mode.startswith("container:") or not key:
            return False
        path = None if mode == HOST else Path(key)
        if path is not None and not netns.exists(path):
            return False
        sandbox = self._sandboxes[container.id] = Sandbox(container.id, path)
        for index, (name, settings) in enumerate(self._in_start_order(container)):
            bridge = self._bridges.get(settings.network_id)
            if bridge is None or not settings.endpoint_id or not settings.ip_address:
                continue
            endpoint = Endpoint(
                id=settings.endpoint_id,
                container_id=container.id,
                bridge=bridge,
                address=IPv4Interface(f"{settings.ip_address}/{settings.ip_prefix_len}"),
                mac=settings.mac_address,
                inside_name=f"{bridge.options.prefix}{index}",
            )
            bridge.adopt(endpoint)
            sandbox.endpoints.append(endpoint)
            log.debug("adopted endpoint container=%s network=%s", container.short_id, name)
        published = list(_published_in(container.sandbox.ports))
        if published:
            self._ports.adopt(container.id, published)
            self._set_forwards(sandbox)
        return True

    # -- start and end of a container --

    async def attach(self, container: Container) -> NetworkAttachment:
        """Make the container's sandbox, its endpoints, its published ports and its files in /etc.

        Raises: NotFound (network, other container), Conflict, InvalidParameter, Forbidden, SystemFailure.
        Cancellation: undone, as after a failure.
        """
        mode = container.host_config.network_mode
        if mode.startswith("container:"):
            return self._share(container, mode.removeprefix("container:"))
        if container.id in self._sandboxes:
            await self.detach(container)
        sandbox_id = secrets.token_hex(32)
        host = mode == HOST and not container.config.network_disabled
        path = None if host else self._netns_dir / sandbox_id[:12]
        chosen = self._chosen_networks(container)
        sandbox = self._sandboxes[container.id] = Sandbox(container.id, path)
        try:
            self._allocate(container, sandbox, chosen)
            self._publish(container, sandbox)
            if path is not None:
                await self._build(path, sandbox)
            self._fill_record(container, sandbox, sandbox_id, chosen)
            attachment = self._write_files(container, sandbox)
        except BaseException as error:
            with trio.move_on_after(UNDO_TIMEOUT_S, shield=True):
                await self._dismantle(container, sandbox)
            if isinstance(error, OSError):
                raise SystemFailure(f"cannot set up the network of {container.id}: {error}") from error
            raise
        for network, _ in chosen:
            self._publish_event("connect", network, container.id)
        return attachment

    async def detach(self, container: Container) -> None:
        """Undo `attach`; again is fine. The namespace goes at once, its links follow a moment later by themselves."""
        sandbox = self._sandboxes.get(container.id)
        if sandbox is None:
            sandbox = Sandbox(container.id, self._own_path(container.sandbox.sandbox_key))
        connected = [
            network
            for _, settings in self._in_start_order(container)
            if settings.endpoint_id and (network := self._store.find(settings.network_id)) is not None
        ]
        with trio.CancelScope(shield=True):
            await self._dismantle(container, sandbox)
        for network in connected:
            self._publish_event("disconnect", network, container.id)

    def _own_path(self, sandbox_key: str) -> Path | None:
        path = Path(sandbox_key) if sandbox_key else None
        return path if path is not None and path.parent == self._netns_dir and path.name != "default" else None

    def _chosen_networks(self, container: Container) -> list[tuple[Network, EndpointSettings]]:
        """The networks of a starting container, that of its network mode first.

        Raises: NotFound; InvalidParameter for what an endpoint may not ask for there.
        """
        if container.config.network_disabled:
            return []
        mode = self._mode(container)
        if not container.endpoints:
            container.endpoints[mode] = EndpointSettings()
        chosen = []
        for name, settings in self._in_start_order(container):
            network = self.find(settings.network_id) if settings.network_id else None
            network = network or self.find(name)
            if network is None or self._is_disabled(network):
                raise NotFound(f"network {name} not found")
            _check_settings(network, settings)
            chosen.append((network, settings))
        return chosen

    def _mode(self, container: Container) -> str:
        mode = container.host_config.network_mode
        if mode in ("", "default"):
            return NONE if self._engine.config.bridge == "none" else BRIDGE
        return mode

    def _in_start_order(self, container: Container) -> list[tuple[str, EndpointSettings]]:
        mode = self._mode(container)
        return sorted(container.endpoints.items(), key=lambda item: (item[0] != mode, item[0]))

    def _allocate(
        self, container: Container, sandbox: Sandbox, chosen: Sequence[tuple[Network, EndpointSettings]]
    ) -> None:
        for network, settings in chosen:
            bridge = self._bridges.get(network.id)
            if bridge is not None:
                self._allocate_one(container, sandbox, bridge, settings)

    def _allocate_one(
        self, container: Container, sandbox: Sandbox, bridge: Bridge, settings: EndpointSettings
    ) -> Endpoint:
        names = {endpoint.inside_name for endpoint in sandbox.endpoints}
        prefix = bridge.options.prefix
        inside_name = next(name for index in range(1000) if (name := f"{prefix}{index}") not in names)
        endpoint = bridge.allocate(
            container.id,
            inside_name,
            address=settings.ipam_config.ipv4_address if settings.ipam_config else "",
            mac=container.config.mac_address if not sandbox.endpoints else "",
        )
        sandbox.endpoints.append(endpoint)
        return endpoint

    def _publish(self, container: Container, sandbox: Sandbox) -> None:
        """Reserve the published ports; they lead to the first endpoint that is not on an internal network."""
        target = _port_target(sandbox)
        if target is None:
            return
        requests = requested_ports(
            container.config.exposed_ports or (),
            container.host_config.port_bindings or {},
            container.host_config.publish_all_ports,
        )
        if not requests:
            return
        try:
            self._ports.publish(container.id, requests, target.bridge.options.host_ip or self._engine.config.ip)
        except SystemFailure as error:
            raise SystemFailure(
                "driver failed programming external connectivity on endpoint "
                f"{container.name} ({target.id}): {error.message}"
            ) from error
        self._set_forwards(sandbox)

    def _set_forwards(self, sandbox: Sandbox) -> None:
        target = _port_target(sandbox)
        for endpoint in sandbox.endpoints:
            endpoint.forwards = (
                tuple(Forward(one, endpoint.address.ip) for one in self._ports.of(sandbox.container_id))
                if endpoint is target
                else ()
            )

    async def _build(self, path: Path, sandbox: Sandbox) -> None:
        """Make the namespace and its links, and meanwhile the firewall rules of its ports."""
        for endpoint in sandbox.endpoints:
            await endpoint.bridge.clear_way(endpoint)
        forwarding = {endpoint.bridge for endpoint in sandbox.endpoints if endpoint.forwards}
        plans = _plans(sandbox)
        home = netns.home_handle()

        async def make_links() -> None:
            inside = "".join(netplan.inside_batch(plan, home) for plan in plans)
            await self._in_netns_thread(netns.create, path, inside)
            await links.run_batch("".join(map(netplan.outside_batch, plans)))

        if not forwarding:
            await make_links()
            return
        try:
            # nft waits for the kernel some 20 ms without using the processor.
            async with trio.open_nursery() as nursery:
                for bridge in forwarding:
                    nursery.start_soon(bridge.refresh)
                await make_links()
        except BaseExceptionGroup as group:
            raise _first_of(group) from None

    async def _dismantle(self, container: Container, sandbox: Sandbox) -> None:
        """Give everything back. Failures are logged: the next start of the daemon cleans up by name."""
        self._sandboxes.pop(container.id, None)
        self._ports.release(container.id)
        forwarding = {endpoint.bridge for endpoint in sandbox.endpoints if endpoint.forwards}
        for endpoint in sandbox.endpoints:
            endpoint.bridge.release(endpoint)
        for settings in container.endpoints.values():
            _clear(settings)
        container.sandbox.ports = {}
        try:
            if sandbox.path is not None:
                await self._in_netns_thread(netns.remove, sandbox.path)
            for bridge in forwarding:
                await bridge.refresh()
        except SystemFailure as error:
            log.error("network is not undone container=%s error=%s", container.short_id, error.message)

    def _share(self, container: Container, name: str) -> NetworkAttachment:
        """Join the sandbox of another container.

        Raises: NotFound, Conflict.
        """
        other = self._engine.containers.find(name)
        if other.id == container.id:
            raise SystemFailure("cannot join own network")  # moby daemon/container_operations.go
        if not other.state.running:
            raise Conflict(f"cannot join network of a non running container: {other.id}")
        container.endpoints.clear()
        container.sandbox = replace(other.sandbox, sandbox_id="", sandbox_key="", ports={})
        shares_host = self._mode(other) == HOST
        return NetworkAttachment(
            None if shares_host else other.sandbox.sandbox_key,
            other.sandbox.hosts_path,
            other.sandbox.hostname_path,
            other.sandbox.resolv_conf_path,
        )

    # -- the record --

    def _fill_record(
        self,
        container: Container,
        sandbox: Sandbox,
        sandbox_id: str,
        chosen: Sequence[tuple[Network, EndpointSettings]],
    ) -> None:
        by_network = {endpoint.bridge.network.id: endpoint for endpoint in sandbox.endpoints}
        for network, settings in chosen:
            _fill_settings(settings, network, by_network.get(network.id))
        directory = self._engine.config.exec_root / "containers" / container.id
        container.sandbox = SandboxState(
            sandbox_id=sandbox_id,
            sandbox_key=str(sandbox.path or self._netns_dir / "default"),
            ports=self._ports_in_force(container, sandbox),
            resolv_conf_path=str(directory / "resolv.conf"),
            hostname_path=str(directory / "hostname"),
            hosts_path=str(directory / "hosts"),
        )

    def _ports_in_force(self, container: Container, sandbox: Sandbox) -> dict[str, list[PortBinding] | None]:
        if not sandbox.endpoints:
            return {}
        shown: dict[str, list[PortBinding] | None] = {
            str(port): None for port in expand_exposed(container.config.exposed_ports or ())
        }
        for one in self._ports.of(container.id):
            bindings = shown.setdefault(str(one.port), None) or []
            shown[str(one.port)] = [*bindings, PortBinding(one.host_ip, str(one.host_port))]
        return shown

    # -- files --

    def _write_files(self, container: Container, sandbox: Sandbox) -> NetworkAttachment:
        """hosts, hostname and resolv.conf, made anew at every start, on the exec root: memory, not flash."""
        state = container.sandbox
        Path(state.hosts_path).parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        for path, content in (
            (state.hosts_path, self._hosts_text(container, sandbox)),
            (state.hostname_path, f"{container.config.hostname}\n"),
            (state.resolv_conf_path, self._resolv_conf_text(container, sandbox)),
        ):
            file = Path(path)
            file.unlink(missing_ok=True)  # a former start's may be mounted in a container that shares the network
            file.write_text(content)
            file.chmod(0o644)
        return NetworkAttachment(
            str(sandbox.path) if sandbox.path else None, state.hosts_path, state.hostname_path, state.resolv_conf_path
        )

    def _hosts_text(self, container: Container, sandbox: Sandbox) -> str:
        extra = [hostfiles.parse_extra_host(text) for text in container.host_config.extra_hosts or ()]
        if sandbox.path is None and not extra:
            return _read("/etc/hosts")
        own = hostfiles.own_names(container.config.hostname, container.config.domainname)
        lines = [*extra, *self._link_lines(container)]
        lines += [(str(endpoint.address.ip), own) for endpoint in sandbox.endpoints]
        return hostfiles.hosts_text(lines)

    def _link_lines(self, container: Container) -> Iterable[tuple[str, str]]:
        """Legacy links: the other container's address under its alias, id and name."""
        for link in container.host_config.links or ():
            name, _, alias = link.partition(":")
            try:
                other = self._engine.containers.find(name)
            except NotFound:
                continue
            settings = other.endpoints.get(BRIDGE)
            if settings is not None and settings.ip_address:
                names = (alias or other.name, other.config.hostname, other.name)
                yield settings.ip_address, " ".join(dict.fromkeys(names))

    def _resolv_conf_text(self, container: Container, sandbox: Sandbox) -> str:
        host_config, config = container.host_config, self._engine.config
        if sandbox.path is None and not (host_config.dns or host_config.dns_search or host_config.dns_options):
            return _read(_RESOLV_CONF)
        return hostfiles.container_resolv_conf(
            self._host_resolv_conf(),
            host_config.dns or config.dns,
            host_config.dns_search or config.dns_search,
            host_config.dns_options or config.dns_opts,
        ).render()

    def _host_resolv_conf(self) -> hostfiles.ResolvConf:
        found = hostfiles.parse_resolv_conf(_read(_RESOLV_CONF))
        if found.nameservers == _RESOLVED_STUB and _RESOLVED_CONF.exists():
            return hostfiles.parse_resolv_conf(_read(_RESOLVED_CONF))
        return found

    # -- lookup and description --

    def all(self) -> list[Network]:
        """Every network that exists, oldest first."""
        shown = [network for network in self._store.all() if not self._is_disabled(network)]
        return sorted(shown, key=lambda network: network.created_ns)

    def find(self, name: str) -> Network | None:
        """By full id, then exact name, then id prefix; None when there is none.

        Raises: InvalidParameter when several match.
        """
        if (network := self._store.find(name)) is not None:
            return network
        for matches, how in (
            ([network for network in self.all() if network.name == name], "name"),
            ([network for network in self.all() if name and network.id.startswith(name)], "ID prefix"),
        ):
            if len(matches) > 1:
                raise InvalidParameter(f"network {name} is ambiguous ({len(matches)} matches found based on {how})")
            if matches:
                return matches[0]
        return None

    def get(self, name: str) -> Network:
        """`find` that raises NotFound."""
        network = self.find(name)
        if network is None:
            raise NotFound(f"network {name} not found")
        return network

    def describe(self, network: Network, *, containers: bool) -> dict[str, Any]:
        """The network as the API shows it; the list leaves containers out."""
        return describe(
            network, wire.rfc3339nano(network.created_ns), self._describe_containers(network) if containers else {}
        )

    def _describe_containers(self, network: Network) -> dict[str, Any]:
        shown = {}
        for container in self._engine.containers.all():
            for settings in container.endpoints.values():
                if settings.network_id == network.id and settings.endpoint_id:
                    shown[container.id] = {
                        "Name": container.name,
                        "EndpointID": settings.endpoint_id,
                        "MacAddress": settings.mac_address,
                        "IPv4Address": f"{settings.ip_address}/{settings.ip_prefix_len}" if settings.ip_address else "",
                        "IPv6Address": "",
                    }
        return dict(sorted(shown.items()))

    def matching(self, filters: Filters) -> list[Network]:
        """The networks that match.

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

    # -- plumbing --

    def _publish_event(self, action: str, network: Network, container_id: str = "") -> None:
        attributes = {"container": container_id} if container_id else {}
        attributes |= {"name": network.name, "type": network.driver}
        self._engine.events.publish("network", action, network.id, attributes)

    async def _in_netns_thread(self, call: Any, *arguments: Any) -> None:
        await trio.to_thread.run_sync(call, *arguments, limiter=self._engine.limiters.netns)


def _plans(sandbox: Sandbox) -> list[netplan.EndpointPlan]:
    default = default_endpoint(sandbox.endpoints)
    return [endpoint.plan(default_route=endpoint is default) for endpoint in sandbox.endpoints]


def _port_target(sandbox: Sandbox) -> Endpoint | None:
    return next((one for one in sandbox.endpoints if not one.bridge.network.internal), None)


def _check_settings(network: Network, settings: EndpointSettings) -> None:
    """What an endpoint may ask for on this network.

    Raises: InvalidParameter.
    Source: moby daemon/container_operations.go validateNetworkingConfig.
    """
    static = settings.ipam_config is not None and (
        settings.ipam_config.ipv4_address or settings.ipam_config.ipv6_address or settings.ipam_config.link_local_ips
    )
    if network.builtin:
        if static:
            raise InvalidParameter("user specified IP address is supported on user defined networks only")
        if settings.aliases:
            raise InvalidParameter("network-scoped alias is supported only for containers in user defined networks")
    elif static and not any(entry.subnet for entry in network.ipam.config or ()):
        raise InvalidParameter(
            "user specified IP address is supported only when connecting to networks with user configured subnets"
        )


def _fill_settings(settings: EndpointSettings, network: Network, endpoint: Endpoint | None) -> None:
    settings.network_id = network.id
    settings.endpoint_id = endpoint.id if endpoint else secrets.token_hex(32)
    if endpoint is not None:
        settings.gateway = str(endpoint.gateway) if endpoint.gateway is not None else ""
        settings.ip_address = str(endpoint.address.ip)
        settings.ip_prefix_len = endpoint.address.network.prefixlen
        settings.mac_address = endpoint.mac


def _clear(settings: EndpointSettings) -> None:
    """What an endpoint shows when its container does not run: the network and what was asked for."""
    settings.endpoint_id = settings.gateway = settings.ip_address = settings.mac_address = ""
    settings.ipv6_gateway = settings.global_ipv6_address = ""
    settings.ip_prefix_len = settings.global_ipv6_prefix_len = 0


def _published_in(shown: Mapping[str, Sequence[PortBinding] | None]) -> Iterable[PublishedPort]:
    for key, bindings in shown.items():
        number, _, protocol = key.partition("/")
        for binding in bindings or ():
            yield PublishedPort(ExposedPort(int(number), protocol), binding.host_ip, int(binding.host_port))


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that caused the others to be cancelled: callers know kinds, not groups."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            error = _first_of(error)
        if not isinstance(error, trio.Cancelled):
            return error
    return group.exceptions[0]
