"""The name servers of containers on user-defined networks: one each, at 127.0.0.11 inside the container's namespace.

Two sockets of the daemon live in the namespace, on a port of the kernel's choice; rules in there send what is asked of
port 53 to it, so port 53 stays free for the container, and nothing ever listens on the host's. What to answer is
decided by `core.nameserver` from what is attached at that moment: rename, connect and disconnect need no word to us.
What we do not know is asked of the container's servers, by bytes as they came. A server costs two sleeping tasks.

Rules and port outlive the daemon (`SandboxState.nameserver_port`): the next one binds the same port, and only when
somebody in the container took it meanwhile are the rules written anew.
"""

from __future__ import annotations

import errno
import itertools
import logging
import random
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from balenapy.core import dnswire, nameserver, netplan
from balenapy.core.container import Container
from balenapy.core.hostfiles import EMBEDDED_NAMESERVER, Forwarder
from balenapy.core.nameserver import Forward, Owner, Scope
from balenapy.errors import NotFound, SystemFailure
from balenapy.linux import netns

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.engine.netfiles import NetworkFiles
    from balenapy.engine.sandboxes import Sandbox

log = logging.getLogger(__name__)

Address = tuple[str, int]

DNS_PORT = 53
FORWARDERS_MAX = 3  # libnetwork resolver.go, maxExtDNS
FORWARDER_TIMEOUT_S = 4  # libnetwork resolver.go, extIOTimeout
AT_ONCE_MAX = 100  # libnetwork resolver.go, maxConcurrent; here of one container, its TCP connections counted
IDLE_TIMEOUT_S = 10  # of a TCP connection that asks nothing
QUERY_MAX_BYTES = 4096  # over UDP; queries have one question and are a tenth of that
_BIND_TRIES = 10


class Nameservers:
    def __init__(self, engine: Engine, files: NetworkFiles) -> None:
        self._engine = engine
        self._files = files
        self._servers: dict[str, Nameserver] = {}  # by container id

    async def serve(self, container: Container, sandbox: Sandbox, former_port: int = 0) -> int:
        """Answer what the container asks, until `stop`.

        Args:
            former_port: the rules in its namespace lead there, if it is not 0.

        Returns: the port the rules lead to; 0 when there is no server, which is logged.
        Cancellation: `stop` undoes it.
        """
        path = sandbox.path
        assert path is not None
        self.stop(container.id)
        thread = self._engine.limiters.netns
        try:
            udp, tcp = await trio.to_thread.run_sync(_open_sockets, path, former_port, limiter=thread)
            self._servers[container.id] = server = Nameserver(self._engine, self._files, container, sandbox, udp, tcp)
            self._engine.nursery.start_soon(server.run, name=f"nameserver {container.short_id}")
            port: int = udp.getsockname()[1]
            if port != former_port:
                if former_port:
                    # Should we die between the rules and the record, the next daemon must not trust the record.
                    container.sandbox.nameserver_port = 0
                    await self._engine.containers.store.update_state(container)
                rules = netplan.nameserver_ruleset(EMBEDDED_NAMESERVER, port)
                await trio.to_thread.run_sync(netns.apply_rules_inside, path, rules, limiter=thread)
        except (SystemFailure, OSError) as error:
            # As the reference engine does: a container without names is better than none.
            log.error("container resolves no names container=%s error=%s", container.short_id, error)
            self.stop(container.id)
            return 0
        return port

    def stop(self, container_id: str) -> None:
        """End the container's server; again is fine. Its sockets close a moment later."""
        server = self._servers.pop(container_id, None)
        if server is not None:
            server.scope.cancel()


class Nameserver:
    """That of one container. It keeps nothing but its sockets."""

    __slots__ = ("_busy", "_container", "_engine", "_files", "_sandbox", "_tcp", "_udp", "scope")

    def __init__(
        self,
        engine: Engine,
        files: NetworkFiles,
        container: Container,
        sandbox: Sandbox,
        udp: socket.socket,
        tcp: socket.socket,
    ) -> None:
        self._engine = engine
        self._files = files
        self._container = container
        self._sandbox = sandbox
        self._udp = trio.socket.from_stdlib_socket(udp)
        self._tcp = trio.socket.from_stdlib_socket(tcp)
        self._busy = 0
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        """Serve until `scope` is cancelled."""
        try:
            with self.scope, self._udp, self._tcp:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._accept, nursery)
                    await self._serve_datagrams(nursery)
        except Exception:  # the wall of a container: the engine goes on
            log.exception("name server failed container=%s", self._container.short_id)

    # -- questions --

    async def _serve_datagrams(self, nursery: trio.Nursery) -> None:
        while True:
            packet, peer = await self._udp.recvfrom(QUERY_MAX_BYTES)
            reply, query = self._decide(packet, tcp=False)
            if query is None:
                await self._send_datagram(reply, peer)
            elif self._busy < AT_ONCE_MAX:
                self._busy += 1
                nursery.start_soon(self._forward_datagram, packet, query, peer)
            else:
                await self._send_datagram(dnswire.failure(query, dnswire.SERVER_FAILURE), peer)

    async def _forward_datagram(self, packet: bytes, query: dnswire.Query, peer: Address) -> None:
        try:
            await self._send_datagram(await self._forward(packet, query, tcp=False), peer)
        finally:
            self._busy -= 1

    async def _send_datagram(self, reply: bytes, peer: Address) -> None:
        if not reply:
            return
        try:
            await self._udp.sendto(reply, peer)
        except OSError as error:  # the container's own firewall, say
            log.debug("answer not sent container=%s error=%s", self._container.short_id, error)

    async def _accept(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                connection, _ = await self._tcp.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED):
                    raise
                await trio.sleep(0.1)  # as trio.serve_listeners does
                continue
            if self._busy < AT_ONCE_MAX:
                self._busy += 1
                nursery.start_soon(self._serve_connection, trio.SocketStream(connection))
            else:
                connection.close()

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                while True:
                    with trio.fail_after(IDLE_TIMEOUT_S):
                        packet = await _receive_message(stream)
                    reply, query = self._decide(packet, tcp=True)
                    if query is not None:
                        reply = await self._forward(packet, query, tcp=True)
                    if not reply:
                        return
                    with trio.fail_after(IDLE_TIMEOUT_S):
                        await _send_message(stream, reply)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError):
            pass  # gone, or has nothing more to ask
        except Exception:  # the wall of a connection
            log.exception("name server: connection failed container=%s", self._container.short_id)
        finally:
            self._busy -= 1

    def _decide(self, packet: bytes, *, tcp: bool) -> tuple[bytes, dnswire.Query | None]:
        """The reply, or b"" and the query that is to be forwarded; or b"" and None for what gets no reply."""
        try:
            query = dnswire.parse_query(packet)
        except dnswire.Malformed as error:
            return error.reply, None
        decision = nameserver.decide(
            query.question,
            self._scopes(),
            ndots_set=self._files.wants_search_domains(self._container),
            shuffle=random.shuffle,
        )
        if isinstance(decision, Forward):
            return b"", query
        limit = dnswire.MESSAGE_MAX_BYTES if tcp else query.udp_max_bytes
        return dnswire.render_answer(query, decision, limit), None

    def _scopes(self) -> list[Scope]:
        """The user-defined networks of the container, and who is on them now. Asked in the order of default routes."""
        endpoints = [one for one in self._sandbox.endpoints if one.segment.network.user_defined]
        endpoints.sort(key=lambda one: (one.segment.network.internal, one.segment.network.name))
        scopes = []
        for endpoint in endpoints:
            network, owners = endpoint.segment.network, []
            for other in endpoint.segment.endpoints.values():
                try:
                    container = self._engine.containers.find(other.container_id)
                except NotFound:
                    continue
                settings = next((one for one in container.endpoints.values() if one.endpoint_id == other.id), None)
                owners.append(
                    Owner(
                        str(other.address.ip),
                        "" if container.name_generated else container.name,
                        tuple(settings.aliases or ()) if settings is not None else (),
                        container.id,
                        str(other.address6.ip) if other.address6 is not None else "",
                    )
                )
            scopes.append(Scope(network.name, owners, self._links(endpoint.id)))
        return scopes

    def _links(self, endpoint_id: str) -> dict[str, str]:
        """`name:alias` of the endpoint, by alias; without an alias it is the name, which everybody knows."""
        for settings in self._container.endpoints.values():
            if settings.endpoint_id == endpoint_id:
                parts = [link.removeprefix("/").partition(":") for link in settings.links or ()]
                return {alias: name for name, _, alias in parts if alias}
        return {}

    # -- other servers --

    async def _forward(self, packet: bytes, query: dnswire.Query, *, tcp: bool) -> bytes:
        """What the first server that can says; that nobody can, otherwise."""
        reply = dnswire.failure(query, dnswire.SERVER_FAILURE)
        servers = self._files.forwarders(self._container, ipv6=self._sandbox.has_ipv6)
        for server in servers[:FORWARDERS_MAX]:
            try:
                with trio.fail_after(FORWARDER_TIMEOUT_S):
                    answer = await (self._ask_by_tcp if tcp else self._ask_by_udp)(server, packet)
            except (OSError, SystemFailure, trio.BrokenResourceError, trio.TooSlowError) as error:
                log.debug("name server %s: %r", server.address, error)
                continue
            reply = dnswire.with_id(answer, packet[:2])
            if dnswire.response_code(reply) != dnswire.SERVER_FAILURE:
                break
        return reply

    async def _ask_by_udp(self, server: Forwarder, packet: bytes) -> bytes:
        id = secrets.token_bytes(2)  # with the port of a fresh socket, hard to guess for who would answer in its place
        with await self._open_socket(server, socket.SOCK_DGRAM) as sender:
            await sender.connect((server.address, DNS_PORT))
            await sender.send(dnswire.with_id(packet, id))
            while True:
                reply = await sender.recv(dnswire.MESSAGE_MAX_BYTES)
                if dnswire.is_reply_to(reply, id):
                    return reply

    async def _ask_by_tcp(self, server: Forwarder, packet: bytes) -> bytes:
        connection = await self._open_socket(server, socket.SOCK_STREAM)
        try:
            await connection.connect((server.address, DNS_PORT))
        except BaseException:
            connection.close()
            raise
        async with trio.SocketStream(connection) as stream:
            await _send_message(stream, packet)
            reply = await _receive_message(stream)
        if not dnswire.is_reply_to(reply, packet[:2]):
            raise trio.BrokenResourceError("the answer is to another question")
        return reply

    async def _open_socket(self, server: Forwarder, kind: int) -> trio.socket.SocketType:
        family, anywhere = (socket.AF_INET6, "::") if ":" in server.address else (socket.AF_INET, "0.0.0.0")
        if server.from_host:
            return trio.socket.socket(family, kind)
        path = self._sandbox.path
        assert path is not None
        opened = await trio.to_thread.run_sync(
            netns.open_socket, path, family, kind, (anywhere, 0), limiter=self._engine.limiters.netns
        )
        return trio.socket.from_stdlib_socket(opened)


def _open_sockets(path: Path, former_port: int) -> tuple[socket.socket, socket.socket]:
    """UDP and TCP on one port, the former one if it is free.

    Raises: SystemFailure, OSError.
    """
    for port in itertools.chain([former_port] if former_port else [], [0] * _BIND_TRIES):
        udp = tcp = None
        try:
            udp = netns.open_socket(path, socket.AF_INET, socket.SOCK_DGRAM, (EMBEDDED_NAMESERVER, port))
            tcp = netns.open_socket(path, socket.AF_INET, socket.SOCK_STREAM, udp.getsockname())
            tcp.listen()
        except OSError as error:
            for opened in (udp, tcp):
                if opened is not None:
                    opened.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        return udp, tcp
    raise SystemFailure(f"no port is free at {EMBEDDED_NAMESERVER}")


async def _receive_message(stream: trio.SocketStream) -> bytes:
    """A message over TCP: its length, then itself. Raises: BrokenResourceError when it is not whole."""
    return await _receive_exactly(stream, int.from_bytes(await _receive_exactly(stream, 2), "big"))


async def _receive_exactly(stream: trio.SocketStream, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        data = await stream.receive_some(count - len(received))
        if not data:
            raise trio.BrokenResourceError("the connection ended within a message")
        received += data
    return bytes(received)


async def _send_message(stream: trio.SocketStream, message: bytes) -> None:
    await stream.send_all(len(message).to_bytes(2, "big") + message)
