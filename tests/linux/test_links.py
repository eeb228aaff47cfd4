"""Links, firewall tables and the connection table of this machine; ports kept for containers."""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import IPv4Interface, IPv4Network, ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import netplan
from balenapy.errors import SystemFailure
from balenapy.linux import conntrack, firewall, links, mountinfo, reservation, syscalls
from balenapy.linux.reservation import PortTaken
from tests.trio_tests import trio_test

BRIDGE = f"bptl{os.getpid() % 10000}"


@pytest.mark.root
@trio_test
async def test_a_bridge_is_made_found_and_removed() -> None:
    interface = IPv4Interface("10.213.3.1/24")
    try:
        await links.run_batch(netplan.bridge_batch(BRIDGE, [interface], "02:42:00:00:00:01", 1400, create=True))
        link = await links.find_link(BRIDGE)
        networks = links.host_networks(), links.host_networks(except_links=[BRIDGE])
    finally:
        await links.run_batch(netplan.delete_batch(BRIDGE), force=True)

    assert link == links.Link(BRIDGE, "02:42:00:00:00:01", 1400, "bridge", (interface,))
    assert [interface.network in each for each in networks] == [True, False]
    assert await links.find_link(BRIDGE) is None
    assert links.ports_of(BRIDGE) == []


@pytest.mark.root
@trio_test
async def test_a_batch_that_fails_says_why() -> None:
    with pytest.raises(SystemFailure, match="Cannot find device"):
        await links.run_batch(netplan.delete_batch("bptnothing"))
    await links.run_batch(netplan.delete_batch("bptnothing"), force=True)


@pytest.mark.root
@trio_test
async def test_a_table_is_replaced_whole_and_a_broken_one_changes_nothing() -> None:
    rules = netplan.BridgeRules(BRIDGE, (IPv4Network("10.213.3.0/24"),))
    name = netplan.table_name(BRIDGE)
    try:
        await firewall.apply(netplan.ruleset(rules))
        await firewall.apply(netplan.ruleset(rules))
        with pytest.raises(SystemFailure, match="nft"):
            await firewall.apply(netplan.removal(BRIDGE) + "nonsense\n")
        there = await firewall.tables()
    finally:
        await firewall.apply(netplan.removal(BRIDGE))
        await firewall.apply(netplan.removal(BRIDGE))

    assert name in there
    assert name not in await firewall.tables()


@pytest.mark.root
@trio_test
async def test_a_foreign_firewall_that_drops_by_default_is_noticed() -> None:
    table = f"ip bptforeign{os.getpid()}"
    hook = "type filter hook forward priority 5; policy drop;"
    try:
        # It must not harm what else runs here: everything is accepted, only the policy is a drop.
        await firewall.apply(f"table {table} {{\nchain forward {{\n{hook}\naccept\n}}\n}}\n")
        found = await firewall.foreign_forward_drops()
    finally:
        await firewall.apply(f"delete table {table}\n")

    assert table in found


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_is_kept_from_others_while_it_is_reserved(protocol: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    held = reservation.reserve(protocol, "127.0.0.1", port)
    assert held is not None
    with held, pytest.raises(PortTaken) as caught:
        reservation.reserve(protocol, "0.0.0.0", port)
    again = reservation.reserve(protocol, "0.0.0.0", port)
    assert again is not None
    again.close()

    assert caught.value.message == (
        f"Error starting userland proxy: listen {protocol} 0.0.0.0:{port}: bind: address already in use"
    )


def test_connections_of_a_former_owner_do_not_count() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # this end waits now
        client.close()
    held = reservation.reserve("tcp", "127.0.0.1", port)

    assert held is not None
    held.close()


def test_an_address_that_is_not_the_hosts_cannot_be_had() -> None:
    with pytest.raises(SystemFailure, match=r"listen tcp 203\.0\.113\.1:80: bind: cannot assign requested address"):
        reservation.reserve("tcp", "203.0.113.1", 80)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def flow_tuple(source: str, destination: str, port: int) -> bytes:
    first = 1 if "." in source else 3
    addresses = attribute(first, ip_address(source).packed) + attribute(first + 1, ip_address(destination).packed)
    protocol = attribute(1, b"\x11") + attribute(2, b"\x04\x00") + attribute(3, port.to_bytes(2, "big"))
    return attribute(0x8001, addresses) + attribute(0x8002, protocol)


@pytest.mark.parametrize(
    ("sender", "host", "container"), [("10.0.0.9", "10.0.0.1", "10.213.0.2"), ("fd00::9", "fd00::1", "fd42::2")]
)
def test_a_flow_of_the_connection_table_is_read(sender: str, host: str, container: str) -> None:
    there, back = flow_tuple(sender, host, 53), flow_tuple(container, sender, 1024)
    flow = conntrack.parse_flow(attribute(0x8001, there) + attribute(0x8002, back) + attribute(3, b"\0\0\0\1"))

    assert flow is not None
    assert (flow.protocol, flow.sent_to_port, str(flow.sent_to), str(flow.answered_by)) == (
        17, 53, host, container,
    )  # fmt: skip
    assert flow.tuple_attribute == attribute(0x8001, there)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_flow_or_none(data: bytes) -> None:
    conntrack.parse_flow(data)


@pytest.mark.root
def test_the_mount_of_a_path_and_its_propagation(tmp_path: Path) -> None:
    target = tmp_path / "with blank"
    (target / "below").mkdir(parents=True)
    syscalls.mount("tmpfs", target, "tmpfs")
    try:
        (target / "below").mkdir()
        syscalls.mount("none", target, flags=syscalls.MS_SHARED)
        shared = mountinfo.mount_of(str(target / "below"))
        syscalls.mount("none", target, flags=syscalls.MS_PRIVATE)
        private = mountinfo.mount_of(str(target))
    finally:
        syscalls.umount2(target)

    assert shared == mountinfo.Mount(str(target), shared=True, slave=False)
    assert private == mountinfo.Mount(str(target), shared=False, slave=False)
    assert mountinfo.mount_of(str(tmp_path)).mount_point != str(target)
