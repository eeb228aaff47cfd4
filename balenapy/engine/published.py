"""Published ports of all containers: which are whose, and the sockets that keep them from other processes."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from balenapy.core import ports
from balenapy.core.ports import PortRequest, PortTable, PublishedPort
from balenapy.errors import SystemFailure
from balenapy.linux import reservation
from balenapy.linux.reservation import PortTaken

log = logging.getLogger(__name__)

MAX_RANDOM_TRIES = 10  # libnetwork bridge: maxAllocatePortAttempts
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(slots=True)
class _Held:
    ports: list[PublishedPort] = field(default_factory=list)
    sockets: list[socket.socket] = field(default_factory=list)


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

    def publish(self, container_id: str, requests: Iterable[PortRequest], default_host_ip: str) -> list[PublishedPort]:
        """Give a container every port it asks for, or none.

        Raises: SystemFailure in the words of the engine we replace, without the sentence around them.
        """
        self.release(container_id)
        held = self._held[container_id] = _Held()
        try:
            for request in requests:
                self._open(held, request, request.host_ip or default_host_ip)
        except BaseException:
            self.release(container_id)
            raise
        return list(held.ports)

    def _open(self, held: _Held, request: PortRequest, host_ip: str) -> None:
        if ":" in host_ip:
            raise SystemFailure(f"Bind for [{host_ip}]:{request.first} failed: IPv6 host addresses are not supported")
        tries = 0
        refusal: SystemFailure | None = None
        for port in self._table.candidates(request, host_ip):
            try:
                self._hold(held, request, host_ip, port)
            except PortTaken as error:
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
        if reserved is not None:
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
                held.ports.append(self._table.take(request, one.host_ip, one.host_port))

    def release(self, container_id: str) -> None:
        """Give back every port of a container. Again is fine."""
        held = self._held.pop(container_id, None)
        if held is None:
            return
        for one in held.ports:
            self._table.release(one)
        for reserved in held.sockets:
            reserved.close()
