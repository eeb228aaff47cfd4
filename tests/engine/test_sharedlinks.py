"""macvlan and ipvlan on the real kernel: containers on a wire of the host, beside another machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from balenapy.core.container import EndpointSettings, IPAMConfig
from balenapy.core.network import IPAM, IPAMConfigEntry, Network, NetworkCreate
from balenapy.errors import EngineError, SystemFailure
from balenapy.linux import links, netns
from tests.engine.network_rig import Rig, answering, ask, network_rig
from tests.engine.test_nameservers import resolve
from tests.engine.test_networks import default_gateway, free_port, interfaces, run_in
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root]


def kernel_has(kind: str) -> bool:
    """Whether the kernel makes links of a kind: tried in a namespace of its own."""
    trial = f"ip link add v0 type veth peer name v1 && ip link add t0 link v0 type {kind}"
    if kind in ("dummy",):
        trial = f"ip link add t0 type {kind}"
    if kind == "vlan":
        trial += " id 5"
    return subprocess.run(["unshare", "-n", "sh", "-c", trial], capture_output=True, check=False).returncode == 0


needs_macvlan = pytest.mark.skipif(os.geteuid() == 0 and not kernel_has("macvlan"), reason="the kernel has no macvlan")
needs_ipvlan = pytest.mark.skipif(os.geteuid() == 0 and not kernel_has("ipvlan"), reason="the kernel has no ipvlan")
needs_dummy = pytest.mark.skipif(os.geteuid() == 0 and not kernel_has("dummy"), reason="the kernel has no dummy links")
needs_vlan = pytest.mark.skipif(os.geteuid() == 0 and not kernel_has("vlan"), reason="the kernel has no VLANs")


@contextlib.contextmanager
def wire(rig: Rig, tmp_path: Path) -> Iterator[tuple[str, str, str]]:
    """A cable: the host's end, the namespace of the machine at the other one, and that machine's address."""
    path, parent = tmp_path / "neighbour", f"bptw{rig.third_byte}"
    address = f"10.217.{rig.third_byte}.1"
    steps = [
        f"link add name out0 type veth peer name {parent} netns {netns.home_handle()}\n"
        f"address add {address}/24 dev out0\nlink set dev out0 up\n"
    ]
    thread = threading.Thread(target=netns.create, args=(path, steps))
    thread.start()
    thread.join()
    try:
        subprocess.run(["ip", "link", "set", "dev", parent, "up"], check=True)
        yield parent, str(path), address
    finally:
        subprocess.run(["ip", "link", "delete", "dev", parent], check=False)
        netns.remove(path)


async def on_wire(rig: Rig, parent: str, name: str = "wire", **more: object) -> Network:
    options = {"parent": parent} | dict(more.pop("options", {}))  # type: ignore[call-overload]
    body = NetworkCreate(
        name=name,
        driver=str(more.pop("driver", "macvlan")),
        options=options,
        ipam=IPAM(config=[IPAMConfigEntry(f"10.217.{rig.third_byte}.0/24", gateway=f"10.217.{rig.third_byte}.1")]),
        **more,  # type: ignore[arg-type]
    )
    return (await rig.networks.create(body))[0]


@needs_macvlan
@trio_test
async def test_containers_are_on_the_wire_of_the_host_and_know_each_other_by_name(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        with wire(rig, tmp_path) as (parent, machine, address):
            network = await on_wire(rig, parent, options={"com.docker.network.driver.mtu": "1400"})
            one = rig.container("one", network_mode="wire", publish={"80/tcp": [("", str(free_port()))]})
            two = rig.container("two", network_mode="wire")
            two.endpoints["wire"].ipam_config = IPAMConfig(ipv4_address=f"10.217.{rig.third_byte}.77")
            two.config.mac_address = "02:42:99:99:99:99"
            path, other = await rig.start(one), await rig.start(two)
            with answering(path, 80), answering(machine, 81):
                from_machine = await trio.to_thread.run_sync(
                    partial(ask, f"10.217.{rig.third_byte}.2", 80, inside=machine)
                )
                to_machine = await trio.to_thread.run_sync(partial(ask, address, 81, inside=other))
                neighbour = await trio.to_thread.run_sync(partial(ask, f"10.217.{rig.third_byte}.2", 80, inside=other))
            named = await resolve(other, "one")
            link = run_in(other, "ip", "-d", "link", "show", "eth0")
            shown = rig.networks.describe(network, containers=True)["Containers"]
            await rig.stop(one)
            await rig.stop(two)
            await rig.networks.remove("wire")
            kept = links.exists(parent)

    assert from_machine == address
    assert (to_machine, neighbour) == (f"10.217.{rig.third_byte}.77", f"10.217.{rig.third_byte}.77")
    assert named == [f"10.217.{rig.third_byte}.2"]
    assert "mtu 1400" in link and "02:42:99:99:99:99" in link and "macvlan mode bridge" in link
    assert shown[two.id]["IPv4Address"] == f"10.217.{rig.third_byte}.77/24"
    assert one.sandbox.ports == {}
    assert kept


@needs_macvlan
@trio_test
async def test_an_address_on_the_wire_is_free_at_once_when_its_container_stops(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        with wire(rig, tmp_path) as (parent, machine, address):
            await on_wire(rig, parent)
            seen = []
            for _ in range(5):
                container = rig.container(network_mode="wire")
                path = await rig.start(container)
                with answering(machine, 81):
                    seen.append(await trio.to_thread.run_sync(partial(ask, address, 81, inside=path)))
                await rig.stop(container)

    assert seen == [f"10.217.{rig.third_byte}.2"] * 5


@needs_macvlan
@trio_test
async def test_a_running_container_is_put_on_the_wire_and_taken_off_by_the_next_daemon(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        with wire(rig, tmp_path) as (parent, machine, address):
            await on_wire(rig, parent)
            container = rig.container("box")
            path = await rig.start(container)
            await rig.networks.connect("wire", "box", EndpointSettings())
            there = interfaces(path)
            with answering(machine, 81):
                answer = await trio.to_thread.run_sync(partial(ask, address, 81, inside=path))
            rig = await rig.again()
            await rig.networks.disconnect("wire", "box", force=False)
            left = interfaces(path)
            gateway = default_gateway(path)
            await rig.stop(container)
            await rig.networks.remove("wire")

    assert there["eth1"] == [f"10.217.{rig.third_byte}.2/24"]
    assert answer == f"10.217.{rig.third_byte}.2"
    assert (sorted(left), gateway) == (["eth0", "lo"], rig.gateway)


@needs_macvlan
@trio_test
async def test_an_internal_network_on_the_wire_has_no_default_route(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        with wire(rig, tmp_path) as (parent, _, _):
            await on_wire(rig, parent, internal=True, options={"macvlan_mode": "private"})
            one, two = rig.container(network_mode="wire"), rig.container(network_mode="wire")
            path, other = await rig.start(one), await rig.start(two)
            with answering(path, 80):
                apart = await trio.to_thread.run_sync(
                    partial(ask, one.endpoints["wire"].ip_address, 80, inside=other, timeout_s=0.5)
                )
            gateway = default_gateway(path)

    assert (gateway, one.endpoints["wire"].gateway) == ("", "")
    assert apart in ("TimeoutError", "OSError")  # mode private


@trio_test
async def test_creating_networks_on_a_wire_refuses_what_the_reference_refuses(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        with wire(rig, tmp_path) as (parent, _, _):
            first = await on_wire(rig, parent)
            refusals = []
            for driver, options in (
                ("macvlan", {"parent": "lo"}),
                ("macvlan", {"parent": "nosuch0"}),
                ("macvlan", {"parent": "nosuch.5"}),
                ("macvlan", {"parent": f"{parent}.9999"}),
                ("macvlan", {"parent": parent, "macvlan_mode": "zz"}),
                ("ipvlan", {"parent": parent, "ipvlan_mode": "l3s"}),
                ("macvlan", {"parent": parent}),
                ("macvlan", {"parent": "a b"}),
            ):
                body = NetworkCreate(name="n", driver=driver, options=options)
                with pytest.raises(EngineError) as caught:
                    await rig.networks.create(body)
                refusals.append(caught.value.message)
            left = [network.name for network in rig.networks.all() if network.user_defined]
            await rig.networks.remove("wire")

    assert refusals == [
        "loopback interface is not a valid macvlan parent link",
        "invalid subinterface vlan name nosuch0, example formatting is eth0.10",
        "-o parent interface does was not found on the host: nosuch",
        "vlan id must be between 1-4094, received: 9999",
        "requested macvlan mode 'zz' is not valid, 'bridge' mode is the macvlan driver default",
        "requested ipvlan mode 'l3s' is not valid, 'l2' mode is the ipvlan driver default",
        f"network dm-{first.id[:12]} is already using parent interface {parent}",
        "invalid interface name: 'a b'",
    ]
    assert left == ["wire"]


@pytest.mark.skipif(os.geteuid() == 0 and kernel_has("ipvlan"), reason="the kernel can do it all")
@trio_test
async def test_what_the_kernel_cannot_do_fails_and_leaves_nothing(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        with wire(rig, tmp_path) as (parent, _, _):
            await on_wire(rig, parent, "iv", driver="ipvlan")
            container = rig.container(network_mode="iv")
            with pytest.raises(SystemFailure, match="Unknown device type"):
                await rig.start(container)
            await rig.stop(container)
            left = await rig.links_left()
            await rig.networks.remove("iv")

    assert left == set()


@needs_ipvlan
@trio_test
async def test_containers_of_an_ipvlan_have_the_hardware_address_of_the_wire(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        with wire(rig, tmp_path) as (parent, machine, address):
            await on_wire(rig, parent, driver="ipvlan")
            container = rig.container(network_mode="wire")
            path = await rig.start(container)
            with answering(machine, 81):
                answer = await trio.to_thread.run_sync(partial(ask, address, 81, inside=path))
            link = await links.find_link(parent)
            mac = run_in(path, "ip", "link", "show", "eth0")

    assert link is not None and link.mac in mac
    assert answer == f"10.217.{rig.third_byte}.2"
    assert container.endpoints["wire"].mac_address == ""


@needs_dummy
@trio_test
async def test_without_a_parent_the_network_is_internal_and_has_a_link_of_ours(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        network, _ = await rig.networks.create(NetworkCreate(name="inner", driver="macvlan"))
        made = links.exists(network.parent)
        await rig.networks.remove("inner")

        assert (network.internal, made, links.exists(network.parent)) == (True, True, False)


@needs_vlan
@trio_test
async def test_a_vlan_of_a_link_is_made_and_goes_with_its_network(tmp_path: Path) -> None:
    async with network_rig(tmp_path) as rig:
        with wire(rig, tmp_path) as (parent, _, _):
            await on_wire(rig, f"{parent}.7")
            made = links.exists(f"{parent}.7")
            await rig.networks.remove("wire")

            assert (made, links.exists(f"{parent}.7"), links.exists(parent)) == (True, False, True)
