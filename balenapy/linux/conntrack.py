"""Forget flows of UDP that the kernel tracks and that would go on to a wrong place after a container started or ended.

NAT rules are asked for the first packet of a flow only, and a sender that never pauses keeps its flow for ever: it
would go on to the host because the container was away, or to the address the container had before. TCP ends by itself.

Speaks ctnetlink (linux/netfilter/nfnetlink_conntrack.h): dump, look at the original and the reply tuple, delete.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from balenapy.core.ipam import Address
from balenapy.errors import SystemFailure
from balenapy.linux.netlink import HEADER, NETFILTER, attributes, messages

_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 1, 4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_CT_NEW, _CT_GET, _CT_DELETE = 0x100, 0x101, 0x102  # subsystem 1 << 8 | message
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY = 1, 2
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_SRC_DST = ((1, 2), (3, 4))  # of IPv4, of IPv6
_CTA_PROTO_NUM, _CTA_PROTO_DST_PORT = 1, 3
_GENERIC = struct.Struct("=BBH")
_RECEIVE_BYTES = 1 << 16
_TIMEOUT_S = 5


@dataclass(frozen=True, slots=True)
class Flow:
    """One tracked flow. `answered_by` differs from `sent_to` when the destination was translated."""

    protocol: int
    sent_to_port: int
    sent_to: Address
    answered_by: Address
    tuple_attribute: bytes  # as the kernel wrote it: names the flow when it is deleted


def forget_udp_to_ports(ports: Collection[int], container: Address) -> int:
    """Forget flows to these ports of the host that do not lead to this container; how many. Blocks.

    Raises: SystemFailure.
    """
    return _forget(container, lambda flow: flow.sent_to_port in ports and flow.answered_by != container)


def forget_udp_to_container(container: Address) -> int:
    """Forget flows that were redirected to this container; how many. Blocks.

    Raises: SystemFailure.
    """
    return _forget(container, lambda flow: flow.answered_by == container != flow.sent_to)


def _forget(container: Address, is_stale: Callable[[Flow], bool]) -> int:
    family = socket.AF_INET if container.version == 4 else socket.AF_INET6
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETFILTER) as netlink:
            netlink.bind((0, 0))
            netlink.settimeout(_TIMEOUT_S)
            stale = [flow for flow in _dump(netlink, family) if flow.protocol == socket.IPPROTO_UDP and is_stale(flow)]
            for flow in stale:
                _delete(netlink, family, flow)
            return len(stale)
    except OSError as error:
        raise SystemFailure(f"cannot change the connection table: {error.strerror or error}") from error


def _dump(netlink: socket.socket, family: int) -> Iterator[Flow]:
    _send(netlink, family, _CT_GET, _NLM_F_DUMP, b"")
    while True:
        for kind, payload in messages(netlink.recv(_RECEIVE_BYTES)):
            if kind == _NLMSG_DONE:
                return
            _check(kind, payload)
            if kind == _CT_NEW and (flow := parse_flow(payload[_GENERIC.size :])) is not None:
                yield flow


def _delete(netlink: socket.socket, family: int, flow: Flow) -> None:
    _send(netlink, family, _CT_DELETE, _NLM_F_ACK, flow.tuple_attribute)
    for kind, payload in messages(netlink.recv(_RECEIVE_BYTES)):
        try:
            _check(kind, payload)
        except FileNotFoundError:
            pass  # it ended meanwhile


def _send(netlink: socket.socket, family: int, kind: int, flags: int, attributes: bytes) -> None:
    body = _GENERIC.pack(family, 0, 0) + attributes
    netlink.send(HEADER.pack(HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, 1, 0) + body)


def _check(kind: int, payload: bytes) -> None:
    if kind == _NLMSG_ERROR:
        (code,) = struct.unpack_from("=i", payload)
        if code:
            raise OSError(-code, os.strerror(-code))


def parse_flow(data: bytes) -> Flow | None:
    """One entry of the table; None when it lacks what we look for."""
    top = {kind: (value, whole) for kind, value, whole in attributes(data)}
    if _CTA_TUPLE_ORIG not in top or _CTA_TUPLE_REPLY not in top:
        return None
    sent, reply = (_parse_tuple(top[kind][0]) for kind in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY))
    if sent is None or reply is None:
        return None
    protocol, port, _, sent_to = sent
    return Flow(protocol, port, sent_to, reply[2], top[_CTA_TUPLE_ORIG][1])


def _parse_tuple(data: bytes) -> tuple[int, int, Address, Address] | None:
    """(protocol, destination port, source, destination)"""
    parts = {kind: {inner: value for inner, value, _ in attributes(nested)} for kind, nested, _ in attributes(data)}
    try:
        addresses, protocol = parts[_CTA_TUPLE_IP], parts[_CTA_TUPLE_PROTO]
        source, destination = next(pair for pair in _CTA_IP_SRC_DST if pair[0] in addresses)
        return (
            protocol[_CTA_PROTO_NUM][0],
            int.from_bytes(protocol.get(_CTA_PROTO_DST_PORT, b"\0\0"), "big"),
            ip_address(addresses[source]),
            ip_address(addresses[destination]),
        )
    except (KeyError, IndexError, ValueError, StopIteration):
        return None
