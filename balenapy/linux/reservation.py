"""Keep a port of the host for a container: a bound socket that never listens, so nobody else gets the port.

The traffic itself is redirected by nftables before it reaches the socket. SO_REUSEADDR is on only while binding:
connections of a former owner in TIME_WAIT then do not count as one, but whoever comes later with it is refused.
"""

from __future__ import annotations

import errno
import socket

from balenapy.core.ports import in_brackets
from balenapy.errors import SystemFailure

_KINDS = {
    "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "sctp": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}
_WORDS = {
    errno.EADDRINUSE: "address already in use",
    errno.EADDRNOTAVAIL: "cannot assign requested address",
    errno.EACCES: "permission denied",
}


class PortTaken(SystemFailure):
    """Another process of the host has it."""


def reserve(protocol: str, host_ip: str, port: int) -> socket.socket | None:
    """Bind the port; close the socket to give it back. None: the kernel has no such protocol, nothing to collide with.

    Raises: PortTaken; SystemFailure for an address that is not the host's. Both in the words clients know.
    """
    kind, number = _KINDS[protocol]
    try:
        family = socket.AF_INET6 if ":" in host_ip else socket.AF_INET
        held = socket.socket(family, kind | socket.SOCK_CLOEXEC, number)
    except OSError:
        return None
    try:
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if protocol == "udp":
            # Datagrams that come before the redirection is in place would lie here for ever: let there be few.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        else:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host_ip, port))
        if protocol != "udp":
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        held.close()
        words = _WORDS.get(error.errno or 0, (error.strerror or str(error)).lower())
        kind_of = PortTaken if error.errno == errno.EADDRINUSE else SystemFailure
        # There is no userland proxy; its words are what clients match on.
        where = f"{in_brackets(host_ip)}:{port}"
        raise kind_of(f"Error starting userland proxy: listen {protocol} {where}: bind: {words}") from error
    return held
