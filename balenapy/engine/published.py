"""Published ports of all containers: which are whose, and the sockets that keep them from other processes."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from balenapy.core import ports
from balenapy.core.ports import ANY, ANY6, LOOPBACK6, PortRequest, PortTable, PublishedPort, in_brackets
from balenapy.errors import SystemFailure
from balenapy.linux import reservation
from balenapy.linux.reservation import PortTaken

log = logging.getLogger(__name__)

MAX_RANDOM_TRIES = 10  # libnetwork bridge: maxAllocatePortAttempts
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(slots=True)
class _Held:
    ports: list[PublishedPort] = field(default_factory=list)
    sockets: list[socket.socket | None] = field(default_factory=list)  # of each port


class PublishedPorts:
    def __init__(self) -> None:
        try:
            text = _EPHEMERAL.read_text()
        except OSError:
            text = ""
        self._table = PortTable(ports.parse_ephemeral_range(text))
        self._held: dict[str, _Held] = {}

    def of(self, container_id: str) -> Sequence[PublishedPort]:
        held = self._held.get(container_id)
        return held.ports if held else ()

    def publish(
        self, container_id: str, requests: Iterable[PortRequest], default_host_ip: str, *, ipv6: bool = False
    ) -> list[PublishedPort]:
        """Give a container every port it asks for, or none.

        Args:
            ipv6: the container has an IPv6 address: a port that is for any address is for those of IPv6 as well.

        Raises: SystemFailure in the words of the engine we replace, without the sentence around them.
        """
        self.release(container_id)
        held = self._held[container_id] = _Held()
        try:
            for request in requests:
                host_ips = [request.host_ip or default_host_ip]
                if ipv6 and not request.host_ip and default_host_ip == ANY:
                    host_ips.append(ANY6)
                _refuse_unreachable(host_ips[0], request, ipv6=ipv6)
                self._open(held, request, host_ips)
        except BaseException:
            self.release(container_id)
            raise
        return list(held.ports)

    def _open(self, held: _Held, request: PortRequest, host_ips: Sequence[str]) -> None:
        """Take one port, the same on all these addresses."""
        tries = 0
        refusal: SystemFailure | None = None
        for port in self._table.candidates(request, *host_ips):
            before = len(held.ports)
            try:
                for host_ip in host_ips:
                    self._hold(held, request, host_ip, port)
            except PortTaken as error:
                self._let_go(held, before)
                tries += 1
                refusal = error
                if request.first == 0 and tries == MAX_RANDOM_TRIES:
                    raise
            else:
                return
        # `candidates` raises when it has none; otherwise the last one was refused.
        assert refusal is not None
        raise refusal

    def _hold(self, held: _Held, request: PortRequest, host_ip: str, port: int) -> None:
        reserved = reservation.reserve(request.port.protocol, host_ip, port)
        held.sockets.append(reserved)
        held.ports.append(self._table.take(request, host_ip, port))

    def adopt(self, container_id: str, published: Iterable[PublishedPort]) -> None:
        """Take over the ports of a container that runs already. A port somebody took meanwhile is only logged: the
        redirection comes before that process anyway."""
        self.release(container_id)
        held = self._held[container_id] = _Held()
        for one in published:
            request = PortRequest(one.port, one.host_ip, one.host_port, one.host_port)
            try:
                self._hold(held, request, one.host_ip, one.host_port)
            except SystemFailure as error:
                log.warning("port is not ours any more container=%s error=%s", container_id[:12], error)
                held.sockets.append(None)
                held.ports.append(self._table.take(request, one.host_ip, one.host_port))

    def release(self, container_id: str) -> None:
        """Give back every port of a container. Again is fine."""
        held = self._held.pop(container_id, None)
        if held is None:
            return
        self._let_go(held, 0)

    def _let_go(self, held: _Held, keep: int) -> None:
        """Give back all ports but the first few."""
        for one in held.ports[keep:]:
            self._table.release(one)
        for reserved in held.sockets[keep:]:
            if reserved is not None:
                reserved.close()
        del held.ports[keep:], held.sockets[keep:]


def _refuse_unreachable(host_ip: str, request: PortRequest, *, ipv6: bool) -> None:
    """What only a proxy could do: kernels translate neither from IPv6 to IPv4 nor from ::1. Raises: SystemFailure."""
    if ":" not in host_ip or (ipv6 and host_ip != LOOPBACK6):
        return
    why = "use 127.0.0.1, ::1 cannot be redirected" if host_ip == LOOPBACK6 else "the container has no IPv6 address"
    raise SystemFailure(f"Bind for {in_brackets(host_ip)}:{request.first} failed: {why}")
