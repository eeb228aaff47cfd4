"""Sandboxes: the network namespace of a running container, its endpoints and its published ports.

A start calls `attach`, an exit `detach`; both may be repeated. `attach` changes the kernel and the container's record
(`endpoints`, `sandbox`), which the supervisor stores with the state it commits; so what is adopted after a crash
is exactly what was told to a client. What was attached by an engine that died before that commit is
found by name (`<exec-root>/netns`) and removed at the next start.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Interface, IPv6Interface, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import trio

from balenapy.core import ipam, netplan
from balenapy.core.container import Container, EndpointSettings, IPAMConfig, PortBinding, SandboxState
from balenapy.core.netplan import EndpointPlan, Forward, Step
from balenapy.core.network import BRIDGE, HOST, NONE, Network
from balenapy.core.ports import ExposedPort, PublishedPort, expand_exposed, requested_ports
from balenapy.engine.netfiles import NetworkFiles
from balenapy.engine.published import PublishedPorts
from balenapy.engine.segments import Endpoint, Segment, defaults_of
from balenapy.errors import Conflict, Forbidden, InvalidParameter, NotFound, SystemFailure
from balenapy.linux import conntrack, links, netns

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.engine.nameservers import Nameservers
    from balenapy.engine.networks import Networks

log = logging.getLogger(__name__)

T = TypeVar("T")

UNDO_TIMEOUT_S = 10
CONFIGURATION_ONLY = "cannot create endpoint on configuration-only network"
_MAX_INTERFACES = 1000


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

    @property
    def port_target(self) -> Endpoint | None:
        """Where published ports lead: the first endpoint on a bridge that is not internal."""
        return next((one for one in self.endpoints if one.segment.publishes), None)

    @property
    def addresses(self) -> list[str]:
        return [str(address.ip) for endpoint in self.endpoints for address in endpoint.addresses]

    @property
    def has_ipv6(self) -> bool:
        return any(endpoint.address6 is not None for endpoint in self.endpoints)

    @property
    def resolves_names(self) -> bool:
        """Whether other containers have names here: on user-defined networks."""
        return any(endpoint.segment.network.user_defined for endpoint in self.endpoints)


class Sandboxes:
    def __init__(self, engine: Engine, networks: Networks) -> None:
        self._engine = engine
        self._networks = networks
        self._netns_dir = engine.config.exec_root / "netns"
        self._files = NetworkFiles(engine)
        self._sandboxes: dict[str, Sandbox] = {}  # by container id
        self._ports = PublishedPorts()
        self._nameservers: Nameservers | None = None

    # -- start of the daemon --

    def adopt(self, container: Container) -> bool:
        """Take over the endpoints and ports of a container that runs; False when its sandbox is not ours or is gone."""
        path = self._path_of(container)
        host = self._mode(container) == HOST
        if not host and (path is None or not netns.exists(path)):
            return False
        sandbox = self._sandboxes[container.id] = Sandbox(container.id, path)
        for settings in container.endpoints.values():
            segment = self._networks.find_segment(settings.network_id)
            if segment is None or not settings.endpoint_id or not settings.ip_address:
                continue
            address6 = f"{settings.global_ipv6_address}/{settings.global_ipv6_prefix_len}"
            endpoint = Endpoint(
                id=settings.endpoint_id,
                container_id=container.id,
                segment=segment,
                address=IPv4Interface(f"{settings.ip_address}/{settings.ip_prefix_len}"),
                mac=settings.mac_address,
                inside_name="",  # looked up when it is needed
                address6=IPv6Interface(address6) if settings.global_ipv6_address else None,
            )
            segment.adopt(endpoint)
            sandbox.endpoints.append(endpoint)
        self._ports.adopt(container.id, _published_in(container.sandbox.ports))
        self._set_forwards(sandbox)
        return True

    async def serve_names(self) -> None:
        """Answer again what adopted containers ask. Call it when all of them are adopted."""
        for sandbox in list(self._sandboxes.values()):
            container = self._engine.containers.find(sandbox.container_id)
            if sandbox.path is None or not (sandbox.resolves_names or container.sandbox.nameserver_port):
                continue
            former = container.sandbox.nameserver_port
            port = await self._names.serve(container, sandbox, former)
            if port != former:
                container.sandbox.nameserver_port = port
                await self._engine.containers.store.update_state(container)

    @property
    def _names(self) -> Nameservers:
        if self._nameservers is None:
            # With the first container that needs it: it brings the DNS library.
            from balenapy.engine.nameservers import Nameservers

            self._nameservers = Nameservers(self._engine, self._files)
        return self._nameservers

    async def remove_strays(self, keep: Collection[str]) -> None:
        """Remove every namespace of ours but those of these containers."""
        kept = {sandbox.path for container_id, sandbox in self._sandboxes.items() if container_id in keep}
        for name in netns.names(self._netns_dir):
            if self._netns_dir / name not in kept:
                log.info("removing leftover network namespace name=%s", name)
                await self._in_netns_thread(netns.remove, self._netns_dir / name)

    # -- start and end of a container --

    async def attach(self, container: Container) -> NetworkAttachment:
        """Make the container's sandbox, its endpoints, its published ports and its files in /etc.

        Raises: NotFound (network, other container), Conflict, InvalidParameter, Forbidden, SystemFailure.
        Cancellation: undone, as after a failure.
        """
        if self._mode(container).startswith("container:"):
            return self._share(container)
        if container.id in self._sandboxes:
            await self.detach(container)
        chosen = self._chosen_networks(container)
        sandbox_id = secrets.token_hex(32)
        host = any(network.name == HOST for network, _ in chosen)
        path = None if host else self._netns_dir / sandbox_id[:12]
        sandbox = self._sandboxes[container.id] = Sandbox(container.id, path)
        try:
            for network, settings in chosen:
                self._allocate(container, sandbox, network, settings)
            self._publish(container, sandbox)
            nameserver_port = await self._build(path, container, sandbox) if path is not None else 0
            container.endpoints = {network.name: settings for network, settings in chosen}
            container.sandbox = SandboxState(sandbox_id, str(path or self._netns_dir / "default"))
            container.sandbox.nameserver_port = nameserver_port
            container.sandbox.ports = self._ports_in_force(container, sandbox)
            self._files.place(container, container.sandbox)
            self._files.write(
                container, sandbox.addresses, host=host, embedded=sandbox.resolves_names, ipv6=sandbox.has_ipv6
            )
        except BaseException as error:
            with trio.move_on_after(UNDO_TIMEOUT_S, shield=True):
                await self._dismantle(container, sandbox)
            if isinstance(error, OSError):
                raise SystemFailure(f"cannot set up the network of {container.id}: {error}") from error
            raise
        for network, _ in chosen:
            self._networks.announce("connect", network, container.id)
        return _attachment(container.sandbox, None if host else str(path))

    async def detach(self, container: Container) -> None:
        """Undo `attach`; again is fine. The namespace goes at once, its links follow a moment later by themselves."""
        sandbox = self._sandboxes.get(container.id) or Sandbox(container.id, self._path_of(container))
        connected = [settings.network_id for settings in container.endpoints.values() if settings.endpoint_id]
        with trio.CancelScope(shield=True):
            await self._dismantle(container, sandbox)
        for network_id in connected:
            network = self._networks.find(network_id)
            if network is not None:
                self._networks.announce("disconnect", network, container.id)

    def _share(self, container: Container) -> NetworkAttachment:
        """Join the sandbox of another container.

        Raises: NotFound, Conflict, SystemFailure.
        """
        other = self._engine.containers.find(self._mode(container).removeprefix("container:"))
        if other is container:
            raise SystemFailure("cannot join own network")
        if not other.state.running:
            raise Conflict(f"cannot join network of a non running container: {other.id}")
        container.endpoints.clear()
        container.sandbox = replace(other.sandbox, sandbox_id="", sandbox_key="", ports={}, nameserver_port=0)
        return _attachment(container.sandbox, None if self._mode(other) == HOST else other.sandbox.sandbox_key)

    def _path_of(self, container: Container) -> Path | None:
        """The namespace that the record names, if it is one of ours."""
        path = Path(container.sandbox.sandbox_key or "/")
        return path if path.parent == self._netns_dir and path.name != "default" else None

    def _mode(self, container: Container) -> str:
        mode = container.host_config.network_mode
        if mode in ("", "default"):
            return NONE if self._engine.config.bridge == "none" else BRIDGE
        return mode

    def _chosen_networks(self, container: Container) -> list[tuple[Network, EndpointSettings]]:
        """The networks of a starting container, that of its network mode first.

        Raises: NotFound; InvalidParameter for what an endpoint may not ask for there.
        """
        if container.config.network_disabled:
            return []
        mode = self._mode(container)
        wanted = container.endpoints or {mode: EndpointSettings()}
        chosen = []
        for name, settings in sorted(wanted.items(), key=lambda item: (item[0] != mode, item[0])):
            network = (self._networks.find(settings.network_id) if settings.network_id else None) or (
                self._networks.find(name)
            )
            if network is None or (network.pools and self._networks.find_segment(network.id) is None):
                raise NotFound(f"network {name} not found")
            if network.config_only:
                raise Forbidden(CONFIGURATION_ONLY)
            check_settings(network, settings)
            add_short_id(network, settings, container)
            chosen.append((network, settings))
        return sorted(chosen, key=lambda pair: mode not in (pair[0].name, pair[0].id))

    def _allocate(
        self,
        container: Container,
        sandbox: Sandbox,
        network: Network,
        settings: EndpointSettings,
        used_names: Collection[str] = (),
    ) -> Endpoint | None:
        """Give the container its endpoint on a network and write it into the settings."""
        _clear(settings)
        settings.network_id = network.id
        settings.endpoint_id = secrets.token_hex(32)
        segment = self._networks.find_segment(network.id)
        if segment is None:
            return None
        names = {endpoint.inside_name for endpoint in sandbox.endpoints} | set(used_names)
        asked = settings.ipam_config or IPAMConfig()
        link_local = ipam.link_local(asked.link_local_ips or ())
        endpoint = segment.allocate(
            settings.endpoint_id,
            container.id,
            next(name for index in range(_MAX_INTERFACES) if (name := f"{segment.prefix}{index}") not in names),
            address=asked.ipv4_address,
            address6=asked.ipv6_address,
            mac="" if sandbox.endpoints else container.config.mac_address,
        )
        endpoint.link_local = link_local
        sandbox.endpoints.append(endpoint)
        settings.gateway = "" if endpoint.gateway is None else str(endpoint.gateway)
        settings.ip_address = str(endpoint.address.ip)
        settings.ip_prefix_len = endpoint.address.network.prefixlen
        if endpoint.address6 is not None:
            settings.ipv6_gateway = "" if endpoint.gateway6 is None else str(endpoint.gateway6)
            settings.global_ipv6_address = str(endpoint.address6.ip)
            settings.global_ipv6_prefix_len = endpoint.address6.network.prefixlen
        settings.mac_address = endpoint.mac
        return endpoint

    async def _build(self, path: Path, container: Container, sandbox: Sandbox) -> int:
        """Make the namespace, its links and its name server, and meanwhile the firewall rules of its ports.

        Returns: the port of the name server; 0 if it has none.
        """
        nameserver_port = 0
        for endpoint in sandbox.endpoints:
            await endpoint.segment.clear_way(endpoint)
        defaults, publishes = defaults_of(sandbox.endpoints), bool(self._ports.of(sandbox.container_id))
        plans = [one.plan(defaults=defaults, hairpin=publishes) for one in sandbox.endpoints]
        sharing = [plan for plan in plans if plan.shares_link]

        async def make_links() -> None:
            inside = [step for plan in plans if not plan.shares_link for step in _inside(plan)]
            await self._in_netns_thread(netns.create, path, inside)
            await self._add_shared_links(path, sharing)
            outside = "".join(map(netplan.outside_batch, plans))
            await _together(lambda: links.run_batch(outside), *([serve_names] if sandbox.resolves_names else []))

        async def serve_names() -> None:
            nonlocal nameserver_port
            nameserver_port = await self._names.serve(container, sandbox)

        await _together(make_links, *(segment.refresh for segment in _forwarding(sandbox)))
        await self._forget_flows(sandbox, begins=True)
        return nameserver_port

    async def _add_shared_links(self, path: Path, plans: Sequence[EndpointPlan]) -> None:
        """Put interfaces on links of the host into a sandbox: macvlan and ipvlan."""
        if plans:
            await links.run_batch("".join(netplan.shared_link_batch(plan, str(path)) for plan in plans))
            inside = [step for plan in plans for step in _inside(plan)]
            await self._in_netns_thread(netns.run_steps_inside, path, inside)

    async def _remove_shared_links(self, path: Path, endpoints: Sequence[Endpoint]) -> None:
        """Interfaces on links of the host go before their namespace: their hardware addresses are free at once."""
        if endpoints and netns.exists(path):
            await self._in_netns_thread(netns.delete_links_with, path, [str(one.address.ip) for one in endpoints])

    async def _dismantle(self, container: Container, sandbox: Sandbox) -> None:
        """Give everything back. Failures are logged: the next start of the daemon cleans up by name."""
        self._sandboxes.pop(container.id, None)
        if self._nameservers is not None:
            self._nameservers.stop(container.id)
        self._ports.release(container.id)
        forwarding = _forwarding(sandbox)
        for endpoint in sandbox.endpoints:
            endpoint.segment.release(endpoint)
        for settings in container.endpoints.values():
            _clear(settings)
        container.sandbox.ports = {}
        try:
            if sandbox.path is not None:
                await self._remove_shared_links(sandbox.path, _sharing(sandbox.endpoints))
                await self._in_netns_thread(netns.remove, sandbox.path)
            for segment in forwarding:
                await segment.refresh()
            await self._forget_flows(sandbox, begins=False)
        except SystemFailure as error:
            log.error("network is not undone container=%s error=%s", container.short_id, error.message)

    async def _forget_flows(self, sandbox: Sandbox, *, begins: bool) -> None:
        """Have UDP flows that began before the redirections changed ask them again."""
        target = sandbox.port_target
        if target is None:
            return
        ports = {one.published.host_port for one in target.forwards if one.published.port.protocol == "udp"}
        if not ports:
            return
        try:
            for address in target.addresses:
                if begins:
                    await self._in_netns_thread(conntrack.forget_udp_to_ports, ports, address.ip)
                else:
                    await self._in_netns_thread(conntrack.forget_udp_to_container, address.ip)
        except SystemFailure as error:
            log.warning("senders may reach a wrong place for a while error=%s", error.message)

    # -- a running container --

    async def connect(self, container: Container, network: Network, settings: EndpointSettings) -> None:
        """Add an endpoint to a running container. The caller checked that it may be and holds its lock.

        Raises: SystemFailure, Forbidden.
        Cancellation: undone, as after a failure.
        """
        sandbox = self._running(container)
        if sandbox.path is None:
            raise SystemFailure(f"container {container.id} has the host's network")
        used = await self._in_netns_thread(_interface_names, sandbox.path)
        before = _forwarding(sandbox)
        endpoint = self._allocate(container, sandbox, network, settings, used)
        if endpoint is None:
            return
        try:
            await endpoint.segment.clear_way(endpoint)
            if not self._ports.of(container.id):
                self._publish(container, sandbox)
            defaults, publishes = defaults_of(sandbox.endpoints), bool(self._ports.of(container.id))
            plan = endpoint.plan(defaults=defaults, hairpin=publishes)
            if plan.shares_link:
                await self._add_shared_links(sandbox.path, [plan])
            else:
                await self._in_netns_thread(netns.run_steps_inside, sandbox.path, _inside(plan))
            await links.run_batch(netplan.outside_batch(plan))
            self._set_forwards(sandbox)
            for segment in before | _forwarding(sandbox):
                await segment.refresh()
            if network.user_defined and not container.sandbox.nameserver_port:
                port = container.sandbox.nameserver_port = await self._names.serve(container, sandbox)
                if port:
                    self._files.use_embedded(container, ipv6=sandbox.has_ipv6)
        except BaseException as error:
            with trio.move_on_after(UNDO_TIMEOUT_S, shield=True):
                await self._remove_endpoint(container, sandbox, endpoint)
                _clear(settings)
            if isinstance(error, OSError):
                raise SystemFailure(f"cannot write the resolv.conf of {container.id}: {error}") from error
            raise
        container.endpoints[network.name] = settings
        self._refresh_record(container, sandbox)

    async def disconnect(self, container: Container, network: Network) -> None:
        """Remove an endpoint of a running container. The caller holds its lock.

        Raises: SystemFailure.
        """
        sandbox = self._running(container)
        settings = container.endpoints.pop(network.name)
        endpoint = next((one for one in sandbox.endpoints if one.id == settings.endpoint_id), None)
        if endpoint is not None:
            with trio.CancelScope(shield=True):
                await self._remove_endpoint(container, sandbox, endpoint)
        self._refresh_record(container, sandbox)

    def _running(self, container: Container) -> Sandbox:
        sandbox = self._sandboxes.get(container.id)
        if sandbox is None:
            raise SystemFailure(f"container {container.id} has no network of its own")
        return sandbox

    async def _remove_endpoint(self, container: Container, sandbox: Sandbox, endpoint: Endpoint) -> None:
        touched = _forwarding(sandbox)
        sandbox.endpoints.remove(endpoint)
        endpoint.segment.release(endpoint)
        if sandbox.port_target is None:
            self._ports.release(container.id)
        self._set_forwards(sandbox)
        if links.exists(endpoint.host_link):
            await links.run_batch(netplan.delete_batch(endpoint.host_link), force=True)
        if sandbox.path is not None:
            await self._remove_shared_links(sandbox.path, _sharing([endpoint]))
            # The link took the default routes with it, if it had them; an address names the right interface.
            defaults = defaults_of(sandbox.endpoints)
            leading = {one.id: one for one in (defaults.ipv4, defaults.ipv6) if one is not None}
            batch = "".join(netplan.gateway_batch(one.plan(defaults=defaults)) for one in leading.values())
            await self._in_netns_thread(netns.run_steps_inside, sandbox.path, [batch])
        for segment in touched | _forwarding(sandbox):
            await segment.refresh()

    def _refresh_record(self, container: Container, sandbox: Sandbox) -> None:
        container.sandbox.ports = self._ports_in_force(container, sandbox)
        try:
            self._files.rewrite_hosts(container, sandbox.addresses)
        except OSError as error:
            log.error("cannot rewrite hosts file container=%s error=%s", container.short_id, error)

    # -- ports --

    def _publish(self, container: Container, sandbox: Sandbox) -> None:
        """Reserve the published ports.

        Raises: SystemFailure, in the words clients match on.
        """
        target = sandbox.port_target
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
            self._ports.publish(
                container.id,
                requests,
                target.segment.network.bridge_options.host_ip or self._engine.config.ip,
                ipv6=target.address6 is not None,
            )
        except SystemFailure as error:
            raise SystemFailure(
                "driver failed programming external connectivity on endpoint "
                f"{container.name} ({target.id}): {error.message}"
            ) from error
        self._set_forwards(sandbox)

    def _set_forwards(self, sandbox: Sandbox) -> None:
        target = sandbox.port_target
        for endpoint in sandbox.endpoints:
            endpoint.forwards = ()
        if target is not None:
            by_version = {one.version: one.ip for one in target.addresses}
            target.forwards = tuple(
                Forward(published, by_version[version])
                for published in self._ports.of(sandbox.container_id)
                if (version := ip_address(published.host_ip).version) in by_version
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

    async def _in_netns_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await trio.to_thread.run_sync(call, *arguments, limiter=self._engine.limiters.netns)


def check_settings(network: Network, settings: EndpointSettings) -> None:
    """What an endpoint may ask for on this network.

    Raises: InvalidParameter. Source: moby daemon/container_operations.go updateNetworkConfig.
    """
    asked = settings.ipam_config or IPAMConfig()
    if network.builtin:
        if asked.ipv4_address or asked.ipv6_address or asked.link_local_ips:
            raise InvalidParameter("user specified IP address is supported on user defined networks only")
        if settings.aliases:
            raise InvalidParameter("network-scoped alias is supported only for containers in user defined networks")
        return
    configured = {record.pool.subnet.version for record in network.pools if not record.chosen}
    if (asked.ipv4_address and 4 not in configured) or (asked.ipv6_address and 6 not in configured):
        raise InvalidParameter(
            "user specified IP address is supported only when connecting to networks with user configured subnets"
        )


def add_short_id(network: Network, settings: EndpointSettings, container: Container) -> None:
    """On user-defined networks a container is also known by its short id."""
    if network.user_defined and container.short_id not in (settings.aliases or ()):
        settings.aliases = [*(settings.aliases or ()), container.short_id]


def _attachment(state: SandboxState, netns_path: str | None) -> NetworkAttachment:
    return NetworkAttachment(netns_path, state.hosts_path, state.hostname_path, state.resolv_conf_path)


def _forwarding(sandbox: Sandbox) -> set[Segment]:
    return {endpoint.segment for endpoint in sandbox.endpoints if endpoint.forwards}


def _sharing(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """Those whose interfaces are on a link of the host."""
    return [endpoint for endpoint in endpoints if endpoint.segment.shares_link]


def _inside(plan: EndpointPlan) -> list[Step]:
    return netplan.inside_steps(plan, netns.home_handle())


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


def _interface_names(path: Path) -> list[str]:
    return netns.call_inside(path, lambda: [name for _, name in socket.if_nameindex()])


async def _together(*calls: Callable[[], object]) -> None:
    """Run coroutine functions at the same time. nft waits for the kernel some 20 ms without using the processor.

    Raises: what the first one to fail raised, not a group.
    """
    if len(calls) == 1:
        await calls[0]()  # type: ignore[misc]
        return
    try:
        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(call)  # type: ignore[arg-type]
    except BaseExceptionGroup as group:
        raise _cause_in(group) from None


def _cause_in(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure because of which the others were cancelled: callers know kinds, not groups."""
    leaves = [_cause_in(error) if isinstance(error, BaseExceptionGroup) else error for error in group.exceptions]
    return next((error for error in leaves if not isinstance(error, trio.Cancelled)), leaves[0])
