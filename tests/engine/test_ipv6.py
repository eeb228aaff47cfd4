"""Networks with IPv6 on the real kernel: addresses, names, published ports, and who is kept away from whom."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio

from balenapy.core.container import IPAMConfig, Status
from balenapy.core.netplan import table_name
from balenapy.core.network import IPAM, IPAMConfigEntry, Network, NetworkCreate
from balenapy.errors import EngineError, SystemFailure
from tests.engine.network_rig import Rig, answering, ask, network_rig
from tests.engine.test_nameservers import resolve
from tests.engine.test_networks import free_port, read, run_in
from tests.other_machine import IPV6, other_machine
from tests.trio_tests import trio_test

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not IPV6.exists(), reason="the kernel has no IPv6"),
]


async def six(
    rig: Rig, name: str, part: int, *, internal: bool = False, options: dict[str, str] | None = None
) -> Network:
    """A network with both kinds of addresses."""
    prefix = f"fd42:{rig.third_byte}:{part}"
    entries = [IPAMConfigEntry(f"10.215.{rig.third_byte}.{part * 32}/27"), IPAMConfigEntry(f"{prefix}::/64")]
    bridge = {"com.docker.network.bridge.name": f"bptn{rig.third_byte}-{part}"}
    body = NetworkCreate(
        name=name,
        enable_ipv6=True,
        internal=internal,
        ipam=IPAM(config=entries),
        options=bridge | (options or {}),
    )
    network, _ = await rig.networks.create(body)
    return network


async def in_thread(call: Callable[[], str]) -> str:
    return await trio.to_thread.run_sync(call)


@trio_test
async def test_containers_have_addresses_names_and_routes_of_ipv6(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        network = await six(rig, "six", 1)
        prefix = f"fd42:{rig.third_byte}:1"
        one, two = rig.container("one", network_mode="six"), rig.container("two", network_mode="six")
        one.endpoints["six"].ipam_config = IPAMConfig(ipv6_address=f"{prefix}::77")
        path, other = await rig.start(one), await rig.start(two)
        settings = two.endpoints["six"]
        with answering(path, 80, address="::"):
            answer = await in_thread(partial(ask, f"{prefix}::77", 80, inside=other))
        named = await resolve(other, "one", "AAAA")
        reverse = await resolve(other, ip_address(f"{prefix}::77").reverse_pointer, "PTR")
        shown = rig.networks.describe(network, containers=True)

        assert (settings.global_ipv6_address, settings.global_ipv6_prefix_len) == (f"{prefix}::2", 64)
        assert settings.ipv6_gateway == f"{prefix}::1"
        assert answer == f"{prefix}::2"
        assert (named, reverse) == ([f"{prefix}::77"], ["one.six."])
        assert f"{prefix}::2\tbox\n" in read(two.sandbox.hosts_path)
        assert f"default via {prefix}::1 dev eth0" in run_in(other, "ip", "-6", "route")
        assert shown["EnableIPv6"] is True
        assert shown["IPAM"]["Config"][1] == {"Subnet": f"{prefix}::/64"}
        assert shown["Containers"][one.id]["IPv6Address"] == f"{prefix}::77/64"


@trio_test
async def test_a_published_port_answers_by_ipv6_and_unpublished_ones_do_not(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        await six(rig, "six", 1)
        port = free_port()
        container = rig.container(publish={"80/tcp": [("", str(port))]}, network_mode="six")
        client = rig.container(network_mode="six")
        path, client_path = await rig.start(container), await rig.start(client)
        address = container.endpoints["six"].global_ipv6_address
        gateway = container.endpoints["six"].ipv6_gateway
        ports = container.sandbox.ports["80/tcp"] or []
        with (
            other_machine(tmp_path, rig.third_byte) as machine,
            answering(path, 80, address="::"),
            answering(path, 81, address="::"),
            answering(machine.path, 90, address="::"),
        ):
            by_ipv4 = ask("127.0.0.1", port)
            by_loopback, by_gateway = ask("::1", port), ask(gateway, port)
            remote = await in_thread(partial(ask, machine.host6, port, inside=machine.path))
            direct = await in_thread(partial(ask, address, 81, inside=machine.path, timeout_s=0.5))
            hairpin = await in_thread(partial(ask, gateway, port, inside=path))
            neighbour = await in_thread(partial(ask, gateway, port, inside=client_path))
            outward = await in_thread(partial(ask, machine.address6, 90, inside=path))

        assert [(one.host_ip, one.host_port) for one in ports] == [("0.0.0.0", str(port)), ("::", str(port))]
        assert by_ipv4 == "::ffff:" + container.endpoints["six"].gateway
        assert (by_loopback, by_gateway) == ("ConnectionRefusedError", gateway)
        assert remote == machine.address6  # the container sees who asks
        assert direct == "TimeoutError"
        assert (hairpin, neighbour) == (gateway, gateway)
        assert outward == machine.host6  # hidden behind the host


@trio_test
async def test_bindings_to_one_address_and_random_ports_are_the_same_port_for_both(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        await six(rig, "six", 1)
        port = free_port()
        any_port = rig.container(publish={"80/tcp": [("", "")]}, network_mode="six")
        gateway = f"fd42:{rig.third_byte}:1::1"
        one_address = rig.container(publish={"80/tcp": [(gateway, str(port))]}, network_mode="six")
        loopback = rig.container(publish={"80/tcp": [("0:0::1", str(port))]}, network_mode="six")
        without = rig.container("old", publish={"80/tcp": [("::", str(port))]})
        taken = rig.container("taken", publish={"80/tcp": [("::", str(port))]}, network_mode="six")
        path = await rig.start(one_address)
        await rig.start(any_port)
        with pytest.raises(SystemFailure, match="the container has no IPv6 address"):
            await rig.start(without)
        with pytest.raises(SystemFailure, match=rf"Bind for \[::1\]:{port} failed: use 127.0.0.1"):
            await rig.start(loopback)
        with pytest.raises(SystemFailure, match=rf"Bind for \[::\]:{port} failed: port is already allocated"):
            await rig.start(taken)
        with answering(path, 80, address="::"):
            there, elsewhere = ask(gateway, port), ask("::1", port)
        bindings = any_port.sandbox.ports["80/tcp"] or []

        assert (there, elsewhere) == (gateway, "ConnectionRefusedError")
        assert [one.host_ip for one in bindings] == ["0.0.0.0", "::"]
        assert len({one.host_port for one in bindings}) == 1
        with (
            socket.socket(socket.AF_INET6) as late,
            pytest.raises(OSError, match="Address already in use"),
        ):
            late.bind(("::", int(bindings[0].host_port)))


@trio_test
async def test_networks_with_ipv6_are_isolated_and_internal_ones_reach_nothing(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        await six(rig, "first", 1)
        await six(rig, "second", 2)
        await six(rig, "inner", 3, internal=True)
        one, two, inner = (rig.container(network_mode=name) for name in ("first", "second", "inner"))
        paths = [await rig.start(container) for container in (one, two, inner)]
        addresses = [
            container.endpoints[name].global_ipv6_address
            for container, name in ((one, "first"), (two, "second"), (inner, "inner"))
        ]
        with contextlib.ExitStack() as stack:
            for path in paths:
                stack.enter_context(answering(path, 80, address="::"))
            across = await in_thread(partial(ask, addresses[1], 80, inside=paths[0], timeout_s=0.5))
            inward = await in_thread(partial(ask, addresses[2], 80, inside=paths[0], timeout_s=0.5))
            outward = await in_thread(partial(ask, addresses[0], 80, inside=paths[2], timeout_s=0.5))
            from_host = ask(addresses[2], 80)

        assert (across, inward) == ("TimeoutError", "TimeoutError")
        assert outward == "OSError"  # no route at all
        assert from_host == f"fd42:{rig.third_byte}:3::1"
        assert inner.endpoints["inner"].ipv6_gateway == ""


@trio_test
async def test_the_default_bridge_has_ipv6_where_the_flags_say_so(tmp_path: Path) -> None:
    async with network_rig(tmp_path, ipv6=True, fixed_cidr_v6="fd44:99::/64") as rig:
        container = rig.container()
        path = await rig.start(container)
        settings = container.endpoints["bridge"]
        config = rig.networks.describe(rig.networks.get("bridge"), containers=False)["IPAM"]["Config"]

        assert settings.global_ipv6_address == f"fd44:99::242:ad5:{rig.third_byte:x}02"  # of 02:42:0a:d5:..:02
        assert settings.ipv6_gateway == "fd44:99::1"
        assert [entry["Subnet"] for entry in config] == [f"10.213.{rig.third_byte}.0/24", "fd44:99::/64"]
        assert "fd44:99::1/64" in run_in("/proc/self/ns/net", "ip", "-6", "address", "show", "dev", rig.bridge)
        assert ask("fd44:99::1", 9, inside=path) == "ConnectionRefusedError"


@trio_test
async def test_subnets_of_ipv6_are_taken_from_a_pool_where_one_is_named(tmp_path: Path) -> None:
    async with network_rig(tmp_path, default_address_pools=("fd45:76::/47:48",)) as rig:
        made = []
        for number in (1, 2):
            options = {"com.docker.network.bridge.name": f"bptn{rig.third_byte}-{number}"}
            body = NetworkCreate(name=f"pooled{number}", enable_ipv6=True, options=options)
            made.append((await rig.networks.create(body))[0])

        shown = [rig.networks.describe(one, containers=False)["IPAM"]["Config"] for one in made]
        assert [config[1] for config in shown] == [
            {"Subnet": "fd45:76::/48", "Gateway": "fd45:76::1/48"},
            {"Subnet": "fd45:76:1::/48", "Gateway": "fd45:76:1::1/48"},
        ]
        assert all(config[0]["Subnet"].endswith(("/16", "/20")) for config in shown)


@trio_test
async def test_link_local_addresses_are_added_to_the_interface(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        await six(rig, "six", 1)
        container = rig.container("box", network_mode="six")
        container.endpoints["six"].ipam_config = IPAMConfig(link_local_ips=["169.254.7.7", "fe80::77"])
        wrong = rig.container("wrong", network_mode="six")
        wrong.endpoints["six"].ipam_config = IPAMConfig(link_local_ips=["zz"])
        path = await rig.start(container)
        with pytest.raises(SystemFailure, match="Invalid link-local IP address"):
            await rig.start(wrong)
        addresses = run_in(path, "ip", "address", "show", "dev", "eth0")

        assert "169.254.7.7/16" in addresses
        assert "fe80::77/64" in addresses


@trio_test
async def test_the_next_daemon_goes_on_with_ipv6(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        await six(rig, "six", 1)
        port = free_port()
        container = rig.container("web", publish={"80/tcp": [("", str(port))]}, network_mode="six")
        path = await rig.start(container)
        rig = await rig.again()
        with answering(path, 80, address="::"):
            answers = [ask(f"fd42:{rig.third_byte}:1::1", port), ask("127.0.0.1", port)]
        second = rig.container("second", network_mode="six")
        await rig.start(second)
        await rig.stop(container)
        table = run_in("/proc/self/ns/net", "nft", "list", "table", "ip6", table_name(f"bptn{rig.third_byte}-1"))

        assert answers == [f"fd42:{rig.third_byte}:1::1", f"::ffff:10.215.{rig.third_byte}.33"]
        assert second.endpoints["six"].global_ipv6_address == f"fd42:{rig.third_byte}:1::3"
        assert "chain forward" in table and "dnat to" not in table


@trio_test
async def test_creating_networks_with_ipv6_refuses_what_the_reference_refuses(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        await six(rig, "six", 1)
        refusals = []
        for name, entries in (
            ("six2", []),
            ("overlap", [IPAMConfigEntry(f"fd42:{rig.third_byte}:1::/80")]),
            ("two", [IPAMConfigEntry("fd45:1::/64"), IPAMConfigEntry("fd45:2::/64")]),
            ("gateway", [IPAMConfigEntry("fd45:1::/64", gateway="fd46::1")]),
        ):
            body = NetworkCreate(name=name, enable_ipv6=True, ipam=IPAM(config=entries))
            with pytest.raises(EngineError) as caught:
                await rig.networks.create(body)
            refusals.append(caught.value.message)
        unused, _ = await rig.networks.create(
            NetworkCreate(name="unused", ipam=IPAM(config=[IPAMConfigEntry(f"fd42:{rig.third_byte}:1::/64")]))
        )
        stranger = rig.container(network_mode="six")
        stranger.endpoints["six"].ipam_config = IPAMConfig(ipv6_address="fd99::1")
        with pytest.raises(SystemFailure, match="Invalid address fd99::1: It does not belong"):
            await rig.start(stranger)

        assert refusals == [
            "could not find an available, non-overlapping IPv6 address pool among the defaults "
            "to assign to the network",
            "Pool overlaps with other one on this address space",
            "bridge driver doesn't support multiple subnets",
            "failed to allocate gateway (fd46::1): Requested address is out of range",
        ]
        # Without EnableIPv6 such a subnet is shown and means nothing.
        assert [entry.subnet for entry in unused.ipam.config or ()][1] == f"fd42:{rig.third_byte}:1::/64"
        assert len(unused.pools) == 1
        await rig.networks.remove("unused")


@trio_test
async def test_a_sender_of_udp_that_never_pauses_finds_the_container_after_its_restart(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        await six(rig, "six", 1)
        port, gateway = free_port(), f"fd42:{rig.third_byte}:1::1"
        container = rig.container(publish={"80/udp": [("", str(port))]}, network_mode="six")
        blocker = rig.container(network_mode="six")
        answers = []
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:

            def send(timeout_s: float) -> str:
                sender.settimeout(timeout_s)
                try:
                    sender.sendto(b"?", (gateway, port))
                    return sender.recv(100).decode()
                except OSError as error:
                    return type(error).__name__

            answers.append(send(0.3))
            for _ in range(2):
                path = await rig.start(container)
                with answering(path, 80, socket.SOCK_DGRAM, "::"):
                    answers.append(send(4))
                await rig.stop(container)
                answers.append(send(0.3))
                if blocker.state.status is Status.CREATED:
                    await rig.start(blocker)  # takes the address

        assert answers == ["TimeoutError", gateway, "TimeoutError", gateway, "TimeoutError"]
