"""Networks on the real kernel: what clients of a published port, other networks and the next daemon find."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest
import trio
import trio.testing

from balenapy.core.container import EndpointSettings, IPAMConfig, PortBinding, SandboxState, Status
from balenapy.core.filters import parse_filters
from balenapy.core.network import IPAM, IPAMConfigEntry, Network, NetworkCreate
from balenapy.errors import Conflict, Forbidden, InvalidParameter, NotFound, SystemFailure
from balenapy.linux import firewall, links, netns
from tests.engine.network_rig import Rig, answering, ask, network_rig
from tests.other_machine import other_machine
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root]


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def ruleset_of(bridge: str) -> str:
    return subprocess.run(
        ["nft", "list", "table", "ip", f"balenapy_{bridge}"], capture_output=True, text=True, check=True
    ).stdout


def run_in(path: str, *command: str) -> str:
    """A program's output, run in a namespace; it may fail."""
    return subprocess.run(["nsenter", f"--net={path}", *command], capture_output=True, text=True, check=False).stdout


def read(path: str) -> str:
    return Path(path).read_text()


async def tables_of(rig: Rig) -> list[str]:
    return [name for name in await firewall.tables() if rig.bridge in name]


def interfaces(path: str) -> dict[str, list[str]]:
    """Links of a namespace and their IPv4 addresses."""
    shown = run_in(path, "ip", "-o", "-4", "address")
    found: dict[str, list[str]] = {}
    for line in shown.splitlines():
        fields = line.split()
        found.setdefault(fields[1], []).append(fields[3])
    return found


def default_gateway(path: str) -> str:
    found = re.search(r"via (\S+)", run_in(path, "ip", "route", "show", "default"))
    return found[1] if found else ""


# -- published ports --


@trio_test
async def test_a_published_port_answers_from_the_host_on_every_address(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        container = rig.container(publish={"80/tcp": [("", "")], "81/udp": [("", "")], "82/tcp": []})
        path = await rig.start(container)
        ports = container.sandbox.ports
        tcp, udp = ports["80/tcp"] or [], ports["81/udp"] or []
        with answering(path, 80), answering(path, 81, socket.SOCK_DGRAM):
            answers = [ask(address, int(tcp[0].host_port)) for address in ("127.0.0.1", "127.9.9.9", rig.gateway)]
            answers += [
                ask(address, int(udp[0].host_port), kind=socket.SOCK_DGRAM) for address in ("127.0.0.1", rig.gateway)
            ]

        assert list(ports) == ["80/tcp", "81/udp", "82/tcp"]
        assert ports["82/tcp"] is None
        assert tcp[0].host_ip == udp[0].host_ip == "0.0.0.0"
        assert answers == [rig.gateway] * 5


@trio_test
async def test_a_published_port_answers_to_another_machine_and_unpublished_ones_do_not(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        port = free_port()
        container = rig.container(publish={"80/tcp": [("", str(port))]})
        path = await rig.start(container)
        address = container.endpoints["bridge"].ip_address
        with other_machine(tmp_path, rig.third_byte) as machine, answering(path, 80), answering(path, 81):
            published = await trio.to_thread.run_sync(lambda: ask(machine.host, port, inside=machine.path))
            direct = await trio.to_thread.run_sync(lambda: ask(address, 81, inside=machine.path, timeout_s=0.3))
            outward = await trio.to_thread.run_sync(lambda: ask(machine.address, 9, inside=path))

        assert published == machine.address  # the container sees who asks
        assert direct == "TimeoutError"
        assert outward == "ConnectionRefusedError"  # there and back through the masquerade


@trio_test
async def test_a_port_on_one_address_answers_on_no_other(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        port = free_port()
        container = rig.container(publish={"80/tcp": [("127.0.0.1", str(port))]})
        path = await rig.start(container)
        with other_machine(tmp_path, rig.third_byte) as machine, answering(path, 80):
            local = ask("127.0.0.1", port)
            other = ask(rig.gateway, port)
            remote = await trio.to_thread.run_sync(lambda: ask(machine.host, port, inside=machine.path))

        assert (local, other, remote) == (rig.gateway, "ConnectionRefusedError", "ConnectionRefusedError")


@trio_test
async def test_containers_reach_published_ports_by_the_hosts_address_their_own_too(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        port = free_port()
        server = rig.container(publish={"80/tcp": [("", str(port))]})
        client = rig.container()
        path, client_path = await rig.start(server), await rig.start(client)
        with answering(path, 80):
            from_client = await trio.to_thread.run_sync(lambda: ask(rig.gateway, port, inside=client_path))
            from_itself = await trio.to_thread.run_sync(lambda: ask(rig.gateway, port, inside=path))
            directly = await trio.to_thread.run_sync(lambda: ask(rig.address(2), 80, inside=client_path))

        assert (from_client, from_itself, directly) == (rig.gateway, rig.gateway, rig.address(3))


@trio_test
async def test_a_containers_127_0_0_1_is_not_the_hosts(tmp_path: Path) -> None:
    """route_localnet is on for our bridge; the guard keeps containers from making use of it."""
    async with network_rig(tmp_path) as rig:
        path = await rig.start(rig.container())
        run_in(path, "ip", "route", "replace", "127.0.0.1", "via", rig.gateway, "dev", "eth0", "table", "local")
        run_in(path, "ip", "route", "del", "local", "127.0.0.1")
        with socket.socket() as service:
            service.bind(("127.0.0.1", 0))
            service.listen()
            port = service.getsockname()[1]
            answer = await trio.to_thread.run_sync(lambda: ask("127.0.0.1", port, inside=path, timeout_s=0.3))

        assert answer in ("TimeoutError", "ConnectionRefusedError", "OSError")
        assert f'iifname "{rig.bridge}" ip daddr 127.0.0.0/8 drop' in ruleset_of(rig.bridge)


@trio_test
async def test_a_port_of_another_container_is_refused_in_dockers_words(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        port = free_port()
        await rig.start(rig.container(publish={"80/tcp": [("", str(port))]}))
        second = rig.container("second", publish={"80/tcp": [("127.0.0.1", str(port))]})

        with pytest.raises(SystemFailure) as caught:
            await rig.start(second)

        assert re.fullmatch(
            r"driver failed programming external connectivity on endpoint second \([0-9a-f]{64}\): "
            rf"Bind for 127\.0\.0\.1:{port} failed: port is already allocated",
            caught.value.message,
        )
        assert second.endpoints["bridge"].ip_address == second.endpoints["bridge"].endpoint_id == ""
        assert netns.names(tmp_path / "exec" / "netns") == [rig.records.all()[0].sandbox.sandbox_id[:12]]


@trio_test
async def test_a_port_of_another_process_is_refused_in_dockers_words(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        with socket.socket() as service:
            service.bind(("0.0.0.0", 0))
            service.listen()
            port = service.getsockname()[1]
            container = rig.container("mine", publish={"80/tcp": [("", str(port))]})
            with pytest.raises(SystemFailure) as caught:
                await rig.start(container)

        assert caught.value.message.startswith(
            "driver failed programming external connectivity on endpoint mine ("
        ) and caught.value.message.endswith(
            f"): Error starting userland proxy: listen tcp 0.0.0.0:{port}: bind: address already in use"
        )
        await rig.start(container)  # the process is gone


@trio_test
async def test_a_port_in_use_cannot_be_taken_by_a_process_until_the_container_stops(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        port = free_port()
        container = rig.container(publish={"80/tcp": [("", str(port))]})

        def try_listening() -> str:
            with socket.socket() as service:
                service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    service.bind(("0.0.0.0", port))
                    service.listen()
                except OSError as error:
                    return type(error).__name__
            return "listens"

        await rig.start(container)
        during = try_listening()
        await rig.stop(container)

        assert (during, try_listening()) == ("OSError", "listens")


@trio_test
async def test_a_range_gives_the_first_free_port(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        with socket.socket() as service:
            service.bind(("0.0.0.0", 0))
            service.listen()
            first = min(int(service.getsockname()[1]), 65500)
            container = rig.container(publish={"80/tcp": [("", f"{first}-{first + 30}")]})
            await rig.start(container)

        bindings = container.sandbox.ports["80/tcp"] or []
        assert first < int(bindings[0].host_port) <= first + 30


@trio_test
async def test_a_sender_of_udp_that_never_pauses_finds_the_container_after_its_restart(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        port = free_port()
        container = rig.container(publish={"80/udp": [("", str(port))]})
        blocker = rig.container()
        answers = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:

            def send(timeout_s: float) -> str:
                sender.settimeout(timeout_s)
                try:
                    sender.sendto(b"?", (rig.gateway, port))
                    return sender.recv(100).decode()
                except OSError as error:
                    return type(error).__name__

            answers.append(send(0.3))
            for _ in range(2):
                path = await rig.start(container)
                with answering(path, 80, socket.SOCK_DGRAM):
                    answers.append(send(4))
                await rig.stop(container)
                answers.append(send(0.3))
                if blocker.state.status is Status.CREATED:
                    await rig.start(blocker)  # takes the address

        assert answers == ["TimeoutError", rig.gateway, "TimeoutError", rig.gateway, "TimeoutError"]


# -- sandboxes --


@trio_test
async def test_a_container_on_the_default_bridge_looks_as_inspect_shows_it(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        container = rig.container("box")
        path = await rig.start(container)
        network = rig.networks.get("bridge")
        described = rig.networks.describe(network, containers=True)
        settings = container.endpoints["bridge"]

        number = f"{rig.third_byte:02x}"
        assert settings == EndpointSettings(
            network_id=network.id,
            endpoint_id=settings.endpoint_id,
            gateway=rig.gateway,
            ip_address=rig.address(2),
            ip_prefix_len=24,
            mac_address=f"02:42:0a:d5:{number}:02",
        )
        assert container.sandbox == SandboxState(
            sandbox_id=container.sandbox.sandbox_id,
            sandbox_key=f"{tmp_path}/exec/netns/{container.sandbox.sandbox_id[:12]}",
            resolv_conf_path=f"{tmp_path}/exec/containers/{container.id}/resolv.conf",
            hostname_path=f"{tmp_path}/exec/containers/{container.id}/hostname",
            hosts_path=f"{tmp_path}/exec/containers/{container.id}/hosts",
        )
        assert described["Containers"] == {
            container.id: {
                "Name": "box",
                "EndpointID": settings.endpoint_id,
                "MacAddress": settings.mac_address,
                "IPv4Address": f"{rig.address(2)}/24",
                "IPv6Address": "",
            }
        }
        assert interfaces(path) == {"lo": ["127.0.0.1/8"], "eth0": [f"{rig.address(2)}/24"]}
        assert default_gateway(path) == rig.gateway
        assert read(container.sandbox.hosts_path).endswith(f"\n{rig.address(2)}\tbox\n")
        assert read(container.sandbox.hostname_path) == "box\n"
        assert "nameserver" in read(container.sandbox.resolv_conf_path)
        assert rig.events.seen[-1] == (
            "network", "connect", network.id, {"container": container.id, "name": "bridge", "type": "bridge"},
        )  # fmt: skip


@trio_test
async def test_a_stop_leaves_nothing_and_keeps_what_inspect_shows_of_a_stopped_container(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        tables, rules = await tables_of(rig), ruleset_of(rig.bridge)
        container = rig.container(publish={"80/tcp": [("", "")]})
        await rig.start(container)
        network_id = container.endpoints["bridge"].network_id
        sandbox_id = container.sandbox.sandbox_id
        await rig.stop(container)
        await rig.networks.detach(container)

        assert await rig.links_left() == set()
        assert await tables_of(rig) == tables
        assert ruleset_of(rig.bridge) == rules
        assert netns.names(tmp_path / "exec" / "netns") == []
        assert container.endpoints == {"bridge": EndpointSettings(network_id=network_id)}
        assert (container.sandbox.sandbox_id, container.sandbox.ports) == (sandbox_id, {})
        assert rig.events.actions == ["network connect", "network disconnect"]


@trio_test
async def test_an_address_is_free_again_at_once(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        answers = []
        for _ in range(5):
            container = rig.container()
            path = await rig.start(container)
            with answering(path, 80):
                answers.append(ask(rig.address(2), 80))
            await rig.stop(container)

        assert answers == [rig.gateway] * 5


@trio_test
async def test_none_has_loopback_only_and_host_has_the_hosts_namespace(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        none, host = rig.container(network_mode="none"), rig.container(network_mode="host")
        path = await rig.start(none)
        attachment = await rig.networks.attach(host)

        assert interfaces(path) == {"lo": ["127.0.0.1/8"]}
        assert attachment.netns_path is None
        assert host.sandbox.sandbox_key == f"{tmp_path}/exec/netns/default"
        assert list(host.endpoints) == ["host"]
        assert read(attachment.hosts_path) == read("/etc/hosts")


@trio_test
async def test_container_mode_shares_the_others_sandbox_and_files(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        first = rig.container("first")
        path = await rig.start(first)
        second = rig.container(network_mode=f"container:{first.id}")
        attachment = await rig.networks.attach(second)
        await rig.networks.detach(second)
        alive = netns.exists(Path(path))
        await rig.stop(first)
        with pytest.raises(Conflict, match=f"cannot join network of a non running container: {first.id}"):
            await rig.networks.attach(second)

        assert (attachment.netns_path, attachment.hosts_path) == (path, first.sandbox.hosts_path)
        assert (second.sandbox.sandbox_id, second.sandbox.sandbox_key, second.endpoints) == ("", "", {})
        assert alive


@trio_test
async def test_containers_without_inter_container_communication_see_the_gateway_only(tmp_path: Path) -> None:
    async with network_rig(tmp_path, icc=False) as rig:
        server, client = rig.container(), rig.container()
        path, client_path = await rig.start(server), await rig.start(client)
        with answering(path, 80):
            from_host = ask(rig.address(2), 80)
            from_client = await trio.to_thread.run_sync(
                lambda: ask(rig.address(2), 80, inside=client_path, timeout_s=0.3)
            )

        assert from_host == rig.gateway
        assert from_client in ("TimeoutError", "OSError")


@trio_test
async def test_a_full_network_says_so(tmp_path: Path) -> None:
    async with network_rig(tmp_path, fixed_cidr="") as rig:
        network, _ = await rig.networks.create(
            NetworkCreate(name="tiny", ipam=IPAM(config=[IPAMConfigEntry(f"10.215.{rig.third_byte}.0/30")]))
        )
        await rig.start(rig.container(network_mode="tiny"))
        with pytest.raises(SystemFailure) as caught:
            await rig.start(rig.container(network_mode="tiny"))

        assert caught.value.message == (
            f"no available IPv4 addresses on this network's address pools: tiny ({network.id})"
        )


@trio_test
async def test_a_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        for delay_s in (0, 0.001, 0.003, 0.006, 0.01, 0.02):
            container = rig.container(publish={"80/tcp": [("", "")]})
            with trio.move_on_after(delay_s):
                await rig.networks.attach(container)
            await rig.networks.detach(container)

        assert await rig.links_left() == set()
        assert netns.names(tmp_path / "exec" / "netns") == []
        assert "dnat" not in ruleset_of(rig.bridge).replace("ct status dnat", "")


@trio_test
async def test_many_start_at_once_and_nobody_shares_an_address_or_a_port(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        containers = [rig.container(publish={"80/tcp": [("", "")]}) for _ in range(12)]
        async with trio.open_nursery() as nursery:
            for container in containers:
                nursery.start_soon(rig.start, container)
        ports = {(each.sandbox.ports["80/tcp"] or [PortBinding()])[0].host_port for each in containers}
        rules = ruleset_of(rig.bridge)

        assert {each.endpoints["bridge"].ip_address for each in containers} == {rig.address(n) for n in range(2, 14)}
        assert len(ports) == 12
        assert all(f"tcp dport {port} dnat to" in rules for port in ports)
        async with trio.open_nursery() as nursery:
            for container in containers:
                nursery.start_soon(rig.stop, container)
        assert "dport" not in ruleset_of(rig.bridge)


# -- the next daemon --


@trio_test
async def test_the_next_daemon_finds_running_containers_as_they_were(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        port = free_port()
        container = rig.container("box", publish={"80/tcp": [("", str(port))]})
        path = await rig.start(container)
        stray = rig.container()
        await rig.networks.attach(stray)  # its start was never committed
        identity = [network.id for network in rig.networks.all()]
        with answering(path, 80):
            rig = await rig.again()
            answer = ask("127.0.0.1", port)
        other = rig.container(publish={"80/tcp": [("", str(port))]})
        with pytest.raises(SystemFailure, match="port is already allocated"):
            await rig.start(other)
        third = rig.container()
        await rig.start(third)
        await rig.stop(container)

        assert [network.id for network in rig.networks.all()] == identity
        assert answer == rig.gateway
        assert third.endpoints["bridge"].ip_address == rig.address(3)
        assert netns.names(tmp_path / "exec" / "netns") == [third.sandbox.sandbox_id[:12]]
        assert "dport" not in ruleset_of(rig.bridge)


@trio_test
async def test_a_container_that_died_with_the_daemon_is_cleaned_up(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        container = rig.container(publish={"80/tcp": [("", "")]})
        await rig.start(container)
        rig = await rig.again()
        await rig.stop(container)  # what recovery does when it finds no process

        assert netns.names(tmp_path / "exec" / "netns") == []
        assert container.endpoints["bridge"].ip_address == ""
        assert "dport" not in ruleset_of(rig.bridge)


# -- networks --


@trio_test
async def test_networks_are_listed_and_described_as_recorded(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        shown = {network.name: rig.networks.describe(network, containers=True) for network in rig.networks.all()}

        def names(filters: str) -> list[str]:
            return sorted(network.name for network in rig.networks.matching(parse_filters(filters)))

        assert [shown[name]["Driver"] for name in ("bridge", "host", "none")] == ["bridge", "host", "null"]
        assert shown["bridge"]["IPAM"] == {
            "Driver": "default",
            "Options": None,
            "Config": [{"Subnet": f"10.213.{rig.third_byte}.0/24", "Gateway": rig.gateway}],
        }
        assert shown["bridge"]["Options"] == {
            "com.docker.network.bridge.default_bridge": "true",
            "com.docker.network.bridge.enable_icc": "true",
            "com.docker.network.bridge.enable_ip_masquerade": "true",
            "com.docker.network.bridge.host_binding_ipv4": "0.0.0.0",
            "com.docker.network.bridge.name": rig.bridge,
            "com.docker.network.driver.mtu": "1500",
        }
        assert shown["host"]["IPAM"] == {"Driver": "default", "Options": None, "Config": []}
        assert names('{"driver":["null"]}') == ["none"]
        assert names('{"name":["o"]}') == ["host", "none"]
        assert names('{"type":["custom"]}') == []
        with pytest.raises(SystemFailure, match="invalid filter: 'type'='x'"):
            names('{"type":["x"]}')


@trio_test
async def test_a_user_defined_network_is_made_used_and_removed(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        subnet = f"10.215.{rig.third_byte}"
        entry = IPAMConfigEntry(f"{subnet}.0/24", f"{subnet}.128/25", f"{subnet}.254", {"host1": f"{subnet}.128"})
        network, warning = await rig.networks.create(NetworkCreate(name="mine", ipam=IPAM(config=[entry])))
        fixed = rig.container(network_mode="mine")
        fixed.endpoints["mine"] = EndpointSettings(ipam_config=IPAMConfig(ipv4_address=f"{subnet}.77"), aliases=["box"])
        free = rig.container(network_mode=network.id)
        await rig.start(fixed)
        await rig.start(free)
        with pytest.raises(Forbidden) as in_use:
            await rig.networks.remove("mine")
        clash = rig.container(network_mode="mine")
        clash.endpoints["mine"] = EndpointSettings(ipam_config=IPAMConfig(ipv4_address=f"{subnet}.77"))
        with pytest.raises(Forbidden, match="Address already in use"):
            await rig.start(clash)
        await rig.stop(fixed)
        await rig.stop(free)
        await rig.networks.remove("mine")
        with pytest.raises(NotFound, match="network mine not found"):
            await rig.start(free)

        assert warning == ""
        assert fixed.endpoints["mine"].aliases == ["box", fixed.short_id]
        assert list(free.endpoints) == ["mine"]
        assert in_use.value.message == (
            f"error while removing network: network mine id {network.id} has active endpoints"
        )
        assert not links.exists(f"br-{network.id[:12]}")
        assert f"balenapy_br/2d{network.id[:12]}" not in await firewall.tables()
        assert rig.events.actions[0] == "network create"
        assert rig.events.actions[-1] == "network destroy"


@trio_test
async def test_networks_are_isolated_from_each_other_but_for_published_ports(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        subnet = f"10.215.{rig.third_byte}"
        await rig.networks.create(NetworkCreate(name="other", ipam=IPAM(config=[IPAMConfigEntry(f"{subnet}.0/24")])))
        port = free_port()
        server = rig.container(publish={"80/tcp": [("", str(port))]})
        client = rig.container(network_mode="other")
        path, client_path = await rig.start(server), await rig.start(client)
        with answering(path, 80):
            direct = await trio.to_thread.run_sync(lambda: ask(rig.address(2), 80, inside=client_path, timeout_s=0.3))
            published = await trio.to_thread.run_sync(lambda: ask(f"{subnet}.1", port, inside=client_path))

        assert direct == "TimeoutError"
        assert published == rig.gateway  # it left its network, so it hides behind the host


@trio_test
async def test_an_internal_network_reaches_nothing_outside(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        subnet = f"10.215.{rig.third_byte}"
        config = IPAM(config=[IPAMConfigEntry(f"{subnet}.0/24")])
        await rig.networks.create(NetworkCreate(name="inner", internal=True, ipam=config))
        one, two = rig.container(network_mode="inner"), rig.container(network_mode="inner")
        path, other_path = await rig.start(one), await rig.start(two)
        with answering(other_path, 80), other_machine(tmp_path, rig.third_byte) as machine:
            inside = await trio.to_thread.run_sync(lambda: ask(f"{subnet}.3", 80, inside=path))
            outside = await trio.to_thread.run_sync(lambda: ask(machine.host, 9, inside=path, timeout_s=0.3))

        assert inside == f"{subnet}.2"
        assert outside == "OSError"  # network is unreachable
        assert (default_gateway(path), one.endpoints["inner"].gateway) == ("", "")


@trio_test
async def test_creating_networks_refuses_what_the_reference_refuses(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        taken = IPAM(config=[IPAMConfigEntry(f"10.213.{rig.third_byte}.128/25")])
        outside = IPAM(config=[IPAMConfigEntry(f"10.215.{rig.third_byte}.0/24", gateway="10.1.1.1")])
        cases: list[tuple[NetworkCreate, type[Exception], str]] = [
            (NetworkCreate(name="host"), Forbidden, "operation is not permitted on predefined host network "),
            (NetworkCreate(name=" "), SystemFailure, "invalid name:  "),
            (NetworkCreate(name="n", driver="zz"), NotFound, 'plugin "zz" not found'),
            (NetworkCreate(name="n", driver="host"), Forbidden, 'only one instance of "host" network is allowed'),
            (NetworkCreate(name="n", ipam=IPAM("zz")), NotFound, 'plugin "zz" not found'),
            (
                NetworkCreate(name="n", ipam=IPAM(config=[IPAMConfigEntry("zz")])),
                SystemFailure,
                "Invalid subnet zz : invalid CIDR address: zz",
            ),
            (NetworkCreate(name="n", ipam=taken), Forbidden, "Pool overlaps with other one on this address space"),
            (
                NetworkCreate(name="n", ipam=outside),
                SystemFailure,
                "failed to allocate gateway (10.1.1.1): Requested address is out of range",
            ),
            (
                NetworkCreate(name="n", options={"com.docker.network.bridge.enable_icc": "zz"}),
                SystemFailure,
                'failed to parse com.docker.network.bridge.enable_icc value: zz (strconv.ParseBool: parsing "zz": '
                "invalid syntax)",
            ),
            (
                NetworkCreate(name="n", options={"com.docker.network.bridge.name": 'x" drop; #'}),
                InvalidParameter,
                "invalid interface name: 'x\" drop; #'",
            ),
            *(
                (
                    # Settings below /proc/sys/net/*/conf are all interfaces' under these names.
                    NetworkCreate(name="n", options={"com.docker.network.bridge.name": name}),
                    InvalidParameter,
                    f"invalid interface name: '{name}'",
                )
                for name in ("all", "default")
            ),
        ]
        for body, kind, message in cases:
            with pytest.raises(kind) as caught:
                await rig.networks.create(body)
            assert str(caught.value) == message
        with pytest.raises(Forbidden, match="bridge is a pre-defined network and cannot be removed"):
            await rig.networks.remove("bridge")

        assert [network.name for network in rig.networks.all()] == ["bridge", "host", "none"]


@trio_test
async def test_an_interface_that_was_there_before_is_used_and_stays(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        name, subnet = f"bptf{rig.third_byte}", f"10.215.{rig.third_byte}"
        await links.run_batch(f"link add name {name} type bridge\n")
        try:
            options = {"com.docker.network.bridge.name": name}
            config = IPAM(config=[IPAMConfigEntry(f"{subnet}.0/24")])
            await rig.networks.create(NetworkCreate(name="mine", options=options, ipam=config))
            container = rig.container(network_mode="mine")
            path = await rig.start(container)
            shown = interfaces(path)
            await rig.stop(container)
            with pytest.raises(Forbidden, match="same bridge name"):
                await rig.networks.create(NetworkCreate(name="other", options=options))
            await rig.networks.remove("mine")
            left = links.exists(name)
        finally:
            await links.run_batch(f"link delete dev {name}\n", force=True)

        assert shown == {"lo": ["127.0.0.1/8"], "eth0": [f"{subnet}.2/24"]}
        assert left


@trio_test
async def test_names_are_not_unique_and_ambiguity_is_told(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        byte = rig.third_byte
        bodies = [
            NetworkCreate(name="twin", ipam=IPAM(config=[IPAMConfigEntry(f"10.215.{byte}.{start}/26")]))
            for start in (0, 64)
        ]
        first, _ = await rig.networks.create(bodies[0])
        _, warning = await rig.networks.create(bodies[1])
        with pytest.raises(Conflict, match="network with name twin already exists"):
            await rig.networks.create(NetworkCreate(name="twin", check_duplicate=True))
        with pytest.raises(InvalidParameter) as inspect:
            rig.networks.get("twin")
        with pytest.raises(InvalidParameter) as remove:
            await rig.networks.remove("twin")
        pruned = await rig.networks.prune(parse_filters(""))

        assert warning == f"Network with name twin (id : {first.id}) already exists"
        assert inspect.value.message == "2 matches found based on name: network twin is ambiguous"
        assert remove.value.message == "network twin is ambiguous (2 matches found based on name)"
        assert pruned == ["twin", "twin"]


@trio_test
async def test_a_network_without_a_subnet_gets_one_that_nobody_has(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        network, _ = await rig.networks.create(NetworkCreate(name="any"))
        shown = rig.networks.describe(network, containers=False)["IPAM"]["Config"]
        rig = await rig.again()
        await rig.networks.remove("any")

        (pool,) = network.pools
        assert shown == [{"Subnet": pool.subnet, "Gateway": pool.gateway}]
        assert pool.subnet not in [str(route) for route in links.host_networks()]


@trio_test
async def test_connecting_and_disconnecting_a_running_container(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        subnet = f"10.215.{rig.third_byte}"
        # Its name sorts before `bridge`, so it takes the default route.
        await rig.networks.create(NetworkCreate(name="another", ipam=IPAM(config=[IPAMConfigEntry(f"{subnet}.0/24")])))
        port = free_port()
        container = rig.container("box", publish={"80/tcp": [("", str(port))]})
        path = await rig.start(container)
        await rig.networks.connect("another", "box", EndpointSettings(aliases=["alias"], ip_address="9.9.9.9"))
        both = interfaces(path), default_gateway(path), read(container.sandbox.hosts_path)
        with pytest.raises(Forbidden, match="endpoint with name box already exists in network another"):
            await rig.networks.connect("another", "box", None)
        await rig.networks.disconnect("bridge", "box", force=False)
        with answering(path, 80):
            moved = interfaces(path), default_gateway(path), ask("127.0.0.1", port)
        with pytest.raises(SystemFailure, match=f"container {container.id} is not connected to network bridge"):
            await rig.networks.disconnect("bridge", "box", force=False)
        await rig.stop(container)

        assert both[0] == {
            "lo": ["127.0.0.1/8"], "eth0": [f"{rig.address(2)}/24"], "eth1": [f"{subnet}.2/24"],
        }  # fmt: skip
        assert both[1] == f"{subnet}.1"
        assert both[2].endswith(f"{rig.address(2)}\tbox\n{subnet}.2\tbox\n")
        assert moved == ({"lo": ["127.0.0.1/8"], "eth1": [f"{subnet}.2/24"]}, f"{subnet}.1", f"{subnet}.1")
        assert container.endpoints["another"].aliases == ["alias", container.short_id]
        assert list(container.endpoints) == ["another"]
        assert len(rig.records.stored) == 2


@trio_test
async def test_disconnecting_the_default_route_moves_it(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        config = IPAM(config=[IPAMConfigEntry(f"10.215.{rig.third_byte}.0/24")])
        await rig.networks.create(NetworkCreate(name="another", ipam=config))
        container = rig.container("box")
        path = await rig.start(container)
        await rig.networks.connect("another", "box", None)
        rig = await rig.again()  # what was connected is found by the next daemon too
        await rig.networks.disconnect("another", "box", force=False)

        assert (interfaces(path), default_gateway(path)) == (
            {"lo": ["127.0.0.1/8"], "eth0": [f"{rig.address(2)}/24"]},
            rig.gateway,
        )


@trio_test
async def test_connecting_refuses_what_the_reference_refuses(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        config = IPAM(config=[IPAMConfigEntry(f"10.215.{rig.third_byte}.0/24")])
        await rig.networks.create(NetworkCreate(name="mine", ipam=config))
        for mode in ("none", "host", "bridge"):
            rig.container(mode, network_mode=mode).endpoints[mode] = EndpointSettings()
        rig.container("sharing", network_mode="container:bridge")
        static = EndpointSettings(ipam_config=IPAMConfig(ipv4_address="10.1.1.1"))
        cases: list[tuple[str, str, EndpointSettings | None, type[Exception], str]] = [
            ("mine", "none", None, InvalidParameter, "container cannot be connected to multiple networks with one of"),
            ("mine", "host", None, InvalidParameter, "container sharing network namespace with another container or"),
            ("mine", "sharing", None, InvalidParameter, "container sharing network namespace with another container"),
            ("host", "bridge", None, InvalidParameter, "container cannot be disconnected from host network or"),
            ("bridge", "bridge", static, InvalidParameter, "user specified IP address is supported on user defined"),
            ("mine", "bridge", static, SystemFailure, "Invalid address 10.1.1.1: It does not belong to any of this"),
            ("nope", "bridge", None, NotFound, "network nope not found"),
            ("mine", "nobody", None, NotFound, "No such container: nobody"),
        ]
        for network, container, settings, kind, message in cases:
            with pytest.raises(kind) as caught:
                await rig.networks.connect(network, container, settings)
            assert str(caught.value).startswith(message)

        assert rig.records.stored == []


@trio_test
async def test_a_stopped_container_is_connected_from_its_next_start_on(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        subnet = f"10.215.{rig.third_byte}"
        await rig.networks.create(NetworkCreate(name="mine", ipam=IPAM(config=[IPAMConfigEntry(f"{subnet}.0/24")])))
        container = rig.container("box")
        container.endpoints["bridge"] = EndpointSettings()
        wanted = EndpointSettings(ipam_config=IPAMConfig(ipv4_address=f"{subnet}.9"))
        await rig.networks.connect("mine", "box", wanted)
        events = list(rig.events.actions)
        path = await rig.start(container)

        assert events == ["network create"]
        assert interfaces(path) == {
            "lo": ["127.0.0.1/8"], "eth0": [f"{rig.address(2)}/24"], "eth1": [f"{subnet}.9/24"],
        }  # fmt: skip


@trio_test
async def test_one_prune_at_a_time(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        await rig.networks.create(NetworkCreate(name="one"))
        pruned: list[list[str]] = []

        async def prune() -> None:
            pruned.append(await rig.networks.prune(parse_filters("")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(prune)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(Conflict, match="a prune operation is already running"):
                await rig.networks.prune(parse_filters(""))
        await prune()

        assert pruned == [["one"], []]


# -- options of the bridge driver --


def redirected_while_bridged() -> bool:
    """Whether packets between ports of a bridge meet our rules: this host's setting, for other programs' sake."""
    try:
        return read("/proc/sys/net/bridge/bridge-nf-call-iptables").strip() == "1"
    except FileNotFoundError:
        return False


async def optioned(rig: Rig, name: str, part: int, **options: str) -> Network:
    """A user-defined network; options by the last parts of their names, with `_` for the dots."""
    given = {f"com.docker.network.{key.replace('__', '.')}": value for key, value in options.items()}
    body = NetworkCreate(
        name=name,
        ipam=IPAM(config=[IPAMConfigEntry(f"10.215.{rig.third_byte}.{part * 32}/27")]),
        options={"com.docker.network.bridge.name": f"bptn{rig.third_byte}-{part}"} | given,
    )
    return (await rig.networks.create(body))[0]


@trio_test
async def test_sizes_names_and_host_addresses_are_as_the_options_say(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        network = await optioned(
            rig,
            "own",
            1,
            driver__mtu="1280",
            container_iface_prefix="wan",
            bridge__host_binding_ipv4="127.0.0.2",
            anything__else="kept",
        )
        container = rig.container(network_mode="own", publish={"80/tcp": [("", "")], "81/tcp": [("127.0.0.3", "")]})
        path = await rig.start(container)
        bridge = await links.find_link(f"bptn{rig.third_byte}-1")
        ports = {key: [one.host_ip for one in each or ()] for key, each in container.sandbox.ports.items()}
        first, last = map(int, read("/proc/sys/net/ipv4/ip_local_port_range").split())
        (published,) = container.sandbox.ports["80/tcp"] or []
        with answering(path, 80):
            answers = [ask(address, int(published.host_port)) for address in ("127.0.0.2", "127.0.0.1")]

        assert bridge is not None and bridge.mtu == 1280
        assert "mtu 1280" in run_in(path, "ip", "link", "show", "wan0")
        assert ports == {"80/tcp": ["127.0.0.2"], "81/tcp": ["127.0.0.3"]}
        assert first <= int(published.host_port) <= last
        assert answers == [f"10.215.{rig.third_byte}.33", "ConnectionRefusedError"]
        assert network.options["com.docker.network.anything.else"] == "kept"


@trio_test
async def test_containers_are_seen_by_their_own_address_where_nothing_masks_them(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        await optioned(rig, "bare", 1, bridge__enable_ip_masquerade="false")
        await optioned(rig, "masked", 2)
        bare, masked = rig.container(network_mode="bare"), rig.container(network_mode="masked")
        paths = [await rig.start(bare), await rig.start(masked)]
        with other_machine(tmp_path, rig.third_byte) as machine, answering(machine.path, 90):
            seen = [
                await trio.to_thread.run_sync(lambda path=path: ask(machine.address, 90, inside=path)) for path in paths
            ]

        assert seen == [bare.endpoints["bare"].ip_address, machine.host]


@trio_test
async def test_containers_that_may_not_talk_to_each_other_do_so_by_published_ports_only(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        await optioned(rig, "apart", 1, bridge__enable_icc="false")
        port = free_port()
        server = rig.container(network_mode="apart", publish={"80/tcp": [("", str(port))]})
        client = rig.container(network_mode="apart")
        path, client_path = await rig.start(server), await rig.start(client)
        address, gateway = server.endpoints["apart"].ip_address, server.endpoints["apart"].gateway
        with answering(path, 80):
            direct = await trio.to_thread.run_sync(lambda: ask(address, 80, inside=client_path, timeout_s=0.5))
            published = await trio.to_thread.run_sync(lambda: ask(gateway, port, inside=client_path))
            itself = await trio.to_thread.run_sync(lambda: ask(gateway, port, inside=path))

        assert direct in ("TimeoutError", "OSError")
        assert itself in (gateway, "TimeoutError")
        if not redirected_while_bridged():
            assert (published, itself) == (gateway, gateway)


@trio_test
async def test_static_addresses_ranges_and_reserved_ones_are_respected(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        prefix = f"10.215.{rig.third_byte}"
        entry = IPAMConfigEntry(
            f"{prefix}.0/24",
            f"{prefix}.64/29",
            f"{prefix}.254",
            {"router": f"{prefix}.64", "DefaultGatewayIPv4": f"{prefix}.200"},
        )
        body = NetworkCreate(
            name="own",
            ipam=IPAM(config=[entry]),
            options={"com.docker.network.bridge.name": f"bptn{rig.third_byte}-1"},
        )
        await rig.networks.create(body)
        static, taken, free = (rig.container(name, network_mode="own") for name in ("static", "taken", "free"))
        static.endpoints["own"].ipam_config = IPAMConfig(ipv4_address=f"{prefix}.65")
        taken.endpoints["own"].ipam_config = IPAMConfig(ipv4_address=f"{prefix}.65")
        static.config.mac_address = "02:42:11:22:33:44"
        path = await rig.start(static)
        with pytest.raises(Forbidden, match="Address already in use"):
            await rig.start(taken)
        await rig.start(free)

        assert interfaces(path)["eth0"] == [f"{prefix}.65/24"]
        assert "02:42:11:22:33:44" in run_in(path, "ip", "link", "show", "eth0")
        assert default_gateway(path) == f"{prefix}.200"
        assert static.endpoints["own"].gateway == f"{prefix}.200"
        assert free.endpoints["own"].ip_address == f"{prefix}.66"
        shown = rig.networks.describe(rig.networks.get("own"), containers=False)["IPAM"]["Config"]
        assert shown == [
            {
                "Subnet": f"{prefix}.0/24",
                "IPRange": f"{prefix}.64/29",
                "Gateway": f"{prefix}.254",
                "AuxiliaryAddresses": entry.auxiliary,
            }
        ]
