"""An engine with nothing but networks: real kernel, real database, containers that are only records.

Processes are played by sockets that live in a container's namespace. Whatever happens in the block, bridge, tables and
namespaces are removed. (Forwarding is put back by the session's fixture.)
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import trio
import trio.testing

from balenapy.config import Config
from balenapy.core import netplan
from balenapy.core.container import Container, ContainerConfig, EndpointSettings, HostConfig, PortBinding, State, Status
from balenapy.core.wire import EMPTY
from balenapy.engine.engine import Engine, Limiters
from balenapy.engine.networks import Networks
from balenapy.errors import NotFound
from balenapy.linux import firewall, links, netns
from balenapy.stores.db import Database

_numbers = itertools.count()


class RecordedEvents:
    """What the event bus is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str, dict[str, str]]] = []

    def publish(self, type: str, action: str, actor_id: str, attributes: dict[str, str]) -> None:
        self.seen.append((type, action, actor_id, attributes))

    def network(self, network_id: str, action: str, attributes: dict[str, str]) -> None:
        self.publish("network", action, network_id, attributes)

    def volume(self, name: str, action: str, attributes: dict[str, str]) -> None:
        self.publish("volume", action, name, attributes)

    @property
    def actions(self) -> list[str]:
        return [f"{type} {action}" for type, action, _, _ in self.seen]


class Records:
    """The containers of this rig."""

    def __init__(self) -> None:
        self.by_id: dict[str, Container] = {}
        self.stored: list[str] = []

    def all(self) -> list[Container]:
        return list(self.by_id.values())

    def find(self, name: str) -> Container:
        for container in self.by_id.values():
            if name in (container.id, container.name):
                return container
        raise NotFound(f"No such container: {name}")

    @property
    def store(self) -> Records:
        return self

    async def update_state(self, container: Container) -> None:
        self.stored.append(container.id)


class Rig:
    """Networks, and helpers to play containers and their peers."""

    def __init__(self, engine: Engine, bridge: str, third_byte: int) -> None:
        self.engine = engine
        self.bridge = bridge
        self.third_byte = third_byte
        self.gateway = f"10.213.{third_byte}.1"
        self.networks = engine.networks
        self.records = cast(Records, engine.containers)
        self.events = cast(RecordedEvents, engine.events)
        self._links: set[str] = set()  # of all endpoints that were ever made
        self._remember_links()

    def _remember_links(self) -> None:
        sandboxes = self.networks._sandboxes
        allocate = sandboxes._allocate

        def remembering(*arguments: Any) -> Any:
            endpoint = allocate(*arguments)
            if endpoint is not None:
                self._links.add(endpoint.host_link)
            return endpoint

        sandboxes._allocate = remembering  # type: ignore[method-assign]

    async def links_left(self) -> set[str]:
        """The links of endpoints that do not go within a while: the kernel removes those of a namespace later."""
        deadline = trio.current_time() + 15
        while True:
            left = {name for name in self._links if links.exists(name)}
            if not left or trio.current_time() > deadline:
                return left
            await trio.sleep(0.01)

    def address(self, last_byte: int) -> str:
        return f"10.213.{self.third_byte}.{last_byte}"

    def container(
        self, name: str = "", publish: dict[str, list[tuple[str, str]]] | None = None, **host: Any
    ) -> Container:
        """A record with these `{"80/tcp": [(host_ip, host_port)]}` bindings."""
        ports = publish or {}
        mode = host.pop("network_mode", "default")
        container = Container(
            id=secrets.token_hex(32),
            name=name or f"c{secrets.token_hex(3)}",
            config=ContainerConfig(hostname="box", exposed_ports=dict.fromkeys(ports, EMPTY)),
            host_config=HostConfig(
                network_mode=mode,
                port_bindings={key: [PortBinding(*one) for one in each] for key, each in ports.items()},
                **host,
            ),
        )
        if not mode.startswith("container:"):
            container.endpoints = {"bridge" if mode == "default" else mode: EndpointSettings()}
        self.records.by_id[container.id] = container
        return container

    async def start(self, container: Container) -> str:
        """Attach, and say it runs; the path of its namespace."""
        attachment = await self.networks.attach(container)
        container.state = State(status=Status.RUNNING, pid=os.getpid())
        return attachment.netns_path or ""

    async def stop(self, container: Container) -> None:
        container.state = State(status=Status.EXITED)
        await self.networks.detach(container)

    async def again(self) -> Rig:
        """What a new daemon finds after this one was killed: same rows, same records, nothing in memory."""
        _let_go(self.networks)
        await trio.testing.wait_all_tasks_blocked()
        self.engine.networks = Networks(self.engine)
        await self.engine.networks.restore()
        return Rig(self.engine, self.bridge, self.third_byte)


def _let_go(networks: Networks) -> None:
    networks._segments.clear()  # a dead daemon writes no rules again
    # The kernel closes the sockets of a killed process.
    ports = networks._sandboxes._ports
    for container_id in list(ports._held):
        ports.release(container_id)
    names = networks._sandboxes._nameservers
    for container_id in list(names._servers) if names is not None else ():
        names.stop(container_id)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def answering(path: str, port: int, kind: int = socket.SOCK_STREAM, address: str = "0.0.0.0") -> Iterator[None]:
    """In the namespace at `path`, answer everyone on `port` with the address they come from."""
    listener = netns.open_socket(Path(path), _family(address), kind, (address, port))
    listener.setblocking(True)
    listener.settimeout(0.05)
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            with contextlib.suppress(TimeoutError, ConnectionError):
                if kind == socket.SOCK_DGRAM:
                    _, peer = listener.recvfrom(100)
                    listener.sendto(peer[0].encode(), peer)
                else:
                    connection, peer = listener.accept()
                    with connection:
                        connection.sendall(peer[0].encode())

    if kind == socket.SOCK_STREAM:
        listener.listen()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        listener.close()


def ask(address: str, port: int, *, kind: int = socket.SOCK_STREAM, inside: str = "", timeout_s: float = 4.0) -> str:
    """Connect from the host, or from a namespace; the answer, or the name of the error."""

    def talk() -> str:
        try:
            with socket.socket(_family(address), kind) as client:
                client.settimeout(timeout_s)
                client.connect((address, port))
                if kind == socket.SOCK_DGRAM:
                    client.send(b"?")
                return client.recv(100).decode()
        except OSError as error:
            return type(error).__name__

    return netns.call_inside(Path(inside), talk) if inside else talk()


@contextlib.contextmanager
def _number_of_our_own() -> Iterator[int]:
    """One that no other rig on this machine has: the kernel keeps it for us. Engines as processes have 100 and more."""
    for offset in range(70):
        number = 20 + (os.getpid() * 7 + next(_numbers) + offset) % 70
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reservation:
            try:
                reservation.bind(f"\0balenapy-test-rig-{number}")
            except OSError:
                continue
            yield number
            return
    raise AssertionError("no number left for another rig")


@contextlib.asynccontextmanager
async def network_rig(tmp_path: Path, **flags: Any) -> AsyncIterator[Rig]:
    with _number_of_our_own() as number:
        async with _network_rig(tmp_path, number, flags) as rig:
            yield rig


@contextlib.asynccontextmanager
async def _network_rig(tmp_path: Path, number: int, flags: dict[str, Any]) -> AsyncIterator[Rig]:
    bridge = f"bptn{number}"
    settings: dict[str, Any] = {"bridge": bridge, "bip": f"10.213.{number}.1/24"}
    config = Config(data_root=tmp_path / "data", exec_root=tmp_path / "exec", **(settings | flags))
    config.data_root.mkdir(exist_ok=True)
    db = Database.open(config.data_root / "meta.db")
    bridges: set[str] = {bridge}
    try:
        async with trio.open_nursery() as nursery:
            limiters = Limiters(files=trio.CapacityLimiter(4), netns=trio.CapacityLimiter(1))
            engine = Engine(config, db, limiters, nursery)
            engine.events = cast(Any, RecordedEvents())
            engine.containers = cast(Any, Records())
            engine.networks = Networks(engine)
            await engine.networks.restore()
            try:
                yield Rig(engine, bridge, number)
            finally:
                with trio.CancelScope(shield=True):
                    _let_go(engine.networks)
                    bridges |= {network.bridge for network in engine.networks.all() if network.bridge}
                    for name in netns.names(config.exec_root / "netns"):
                        netns.remove(config.exec_root / "netns" / name)
                    for name in bridges:
                        await firewall.apply(netplan.removal(name, ipv6=True))
                        await links.run_batch(netplan.delete_batch(name), force=True)
                nursery.cancel_scope.cancel()
    finally:
        db.close()
