"""Texts for `ip -batch` and nft."""

from __future__ import annotations

import os
import shutil
import subprocess
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balenapy.core import netplan
from balenapy.core.netplan import BridgeRules, EndpointPlan, Forward
from balenapy.core.ports import ExposedPort, PublishedPort

SUBNET = IPv4Network("10.213.0.0/24")


def forward(protocol: str = "tcp", host_ip: str = "0.0.0.0", host_port: int = 8080) -> Forward:
    return Forward(PublishedPort(ExposedPort(80, protocol), host_ip, host_port), IPv4Address("10.213.0.2"))


def plan(**changes: object) -> EndpointPlan:
    settings: dict[str, object] = {
        "host_name": "vethabc",
        "inside_name": "eth0",
        "host_link": "br0",
        "address": IPv4Interface("10.213.0.2/24"),
        "mac": "02:42:0a:d5:00:02",
        "gateway": IPv4Address("10.213.0.1"),
    }
    return EndpointPlan(**(settings | changes))  # type: ignore[arg-type]


def test_the_table_of_a_bridge_with_a_published_port() -> None:
    assert netplan.ruleset(BridgeRules("br0", (SUBNET,), forwards=(forward(), forward("udp", "127.0.0.1", 53)))) == (
        """table ip balenapy_br0
delete table ip balenapy_br0
table ip balenapy_br0 {
	chain guard {
		type filter hook prerouting priority -300; policy accept;
		iifname "br0" ip daddr 127.0.0.0/8 drop
	}
	chain forward {
		type filter hook forward priority 0; policy accept;
		ct state established,related accept
		oifname "br0" ct status dnat accept
		oifname "br0" iifname != "br0" drop
	}
	chain published {
		tcp dport 8080 dnat to 10.213.0.2:80
		ip daddr 127.0.0.1 udp dport 53 dnat to 10.213.0.2:80
	}
	chain prerouting {
		type nat hook prerouting priority -100; policy accept;
		ip daddr 127.0.0.0/8 return
		fib daddr type local jump published
	}
	chain output {
		type nat hook output priority -100; policy accept;
		fib daddr type local jump published
	}
	chain postrouting {
		type nat hook postrouting priority 100; policy accept;
		oifname "br0" ip saddr 127.0.0.0/8 masquerade
		oifname "br0" ip saddr 10.213.0.0/24 ct status dnat masquerade
		oifname != "br0" ip saddr 10.213.0.0/24 masquerade
	}
}
"""
    )


def test_an_internal_network_passes_nothing_and_hides_nothing() -> None:
    text = netplan.ruleset(BridgeRules("br0", (SUBNET,), internal=True))

    assert 'iifname "br0" oifname != "br0" drop' in text
    assert "masquerade" not in text and "accept\n" not in text.replace("policy accept", "")


def test_the_name_of_a_table_is_one_word_and_its_own() -> None:
    names = ["balena0", "br-0123456789ab", "br.0123456789ab", "br_0123456789ab"]

    assert len({netplan.table_name(name) for name in names}) == len(names)
    assert netplan.table_name("br-1") == "balenapy_br/2d1"


protocols = st.sampled_from(["tcp", "udp", "sctp"])
forwards = st.builds(forward, protocols, st.sampled_from(["0.0.0.0", "127.0.0.1", "192.0.2.1"]), st.integers(1, 65535))


@pytest.mark.root
@settings(max_examples=20)
@pytest.mark.skipif(shutil.which("nft") is None or os.geteuid() != 0, reason="asks nft")
@given(
    st.lists(
        st.builds(
            BridgeRules,
            st.sampled_from(["br0", "br-0123456789ab", "a.b_c"]),
            st.just((SUBNET,)),
            st.booleans(),
            st.booleans(),
            st.lists(forwards, max_size=5).map(tuple),
        ),
        min_size=20,
        max_size=20,
    )
)
def test_nft_understands_every_table(many: list[BridgeRules]) -> None:
    text = "".join(netplan.ruleset(rules) + netplan.removal(rules.bridge) for rules in many)

    done = subprocess.run(["nft", "--check", "-f", "-"], input=text, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_the_two_ends_of_an_endpoint() -> None:
    assert netplan.inside_steps(plan(), "/proc/1/ns/net") == [
        "link add name eth0 mtu 1500 address 02:42:0a:d5:00:02 type veth"
        " peer name vethabc mtu 1500 netns /proc/1/ns/net\n"
        "address add 10.213.0.2/24 broadcast 10.213.0.255 dev eth0\n"
        "link set dev eth0 up\n"
        "route replace default via 10.213.0.1 dev eth0\n"
    ]
    assert netplan.outside_batch(plan()) == "link set dev vethabc master br0\nlink set dev vethabc up\n"
    assert netplan.outside_batch(plan(isolated=True, hairpin=True)) == (
        "link set dev vethabc master br0\n"
        "link set dev vethabc type bridge_slave isolated on hairpin on\n"
        "link set dev vethabc up\n"
    )


def test_no_gateway_is_no_default_route_and_a_gateway_elsewhere_is_reached_by_the_link() -> None:
    (without,) = netplan.inside_steps(plan(gateway=None), "/x")
    (elsewhere,) = netplan.inside_steps(plan(gateway=IPv4Address("10.9.9.9")), "/x")

    assert "route" not in str(without)
    assert str(elsewhere).splitlines()[-2:] == [
        "route replace 10.9.9.9 dev eth0",
        "route replace default via 10.9.9.9 dev eth0",
    ]


def test_ipv6_is_switched_on_between_the_link_and_its_addresses() -> None:
    steps = netplan.inside_steps(
        plan(address6=IPv6Interface("fd00::2/64"), gateway6=IPv6Address("fd00::1")), "/proc/1/ns/net"
    )

    assert [type(step).__name__ for step in steps] == ["str", "Setting", "Setting", "str"]
    assert steps[1:3] == [
        netplan.Setting("ipv6/conf/lo/disable_ipv6", "0"),
        netplan.Setting("ipv6/conf/eth0/disable_ipv6", "0"),
    ]
    assert str(steps[3]).splitlines() == [
        "address add fd00::2/64 nodad dev eth0",
        "address add 10.213.0.2/24 broadcast 10.213.0.255 dev eth0",
        "link set dev eth0 up",
        "route replace default via 10.213.0.1 dev eth0",
        "route replace default via fd00::1 dev eth0",
    ]


def test_a_link_that_is_shared_with_the_host_comes_from_outside() -> None:
    shared = plan(host_link="eth7", kind="macvlan", mode="private", mtu=1400)
    routed = plan(host_link="eth7", kind="ipvlan", mode="l3", mtu=0, mac="", gateway=None, routed=True)

    assert netplan.shared_link_batch(shared, "/run/x") == (
        "link add link eth7 name eth0 netns /run/x address 02:42:0a:d5:00:02 mtu 1400 type macvlan mode private\n"
    )
    assert netplan.outside_batch(shared) == ""
    assert "type" not in str(netplan.inside_steps(shared, "/x"))
    assert netplan.shared_link_batch(routed, "/run/x") == (
        "link add link eth7 name eth0 netns /run/x type ipvlan mode l3\n"
    )
    assert "route replace default dev eth0\n" in str(netplan.inside_steps(routed, "/x")[-1])


def test_a_bridge_with_ipv6_has_a_table_for_it_with_what_leads_there() -> None:
    subnet6 = IPv6Network("fd00:1::/64")
    six = Forward(PublishedPort(ExposedPort(80, "tcp"), "::", 8080), IPv6Address("fd00:1::2"))
    one = Forward(PublishedPort(ExposedPort(80, "tcp"), "fd00:9::1", 81), IPv6Address("fd00:1::2"))
    text = netplan.ruleset(BridgeRules("br0", (SUBNET, subnet6), forwards=(forward(), six, one)))
    first, second = text.split("table ip6 balenapy_br0\ndelete", 1)

    assert "tcp dport 8080 dnat to 10.213.0.2:80" in first and "fd00" not in first
    assert "tcp dport 8080 dnat to [fd00:1::2]:80" in second and "10.213" not in second
    assert "ip6 daddr fd00:9::1 tcp dport 81 dnat to [fd00:1::2]:80" in second
    assert 'oifname != "br0" ip6 saddr fd00:1::/64 masquerade' in second
    assert 'oifname "br0" iifname != "br0" drop' in second
    assert second.count("ip6 daddr ::1 return") == 2 and "saddr ::1" not in second
    assert netplan.removal("br0", ipv6=True) == "".join(
        f"table {family} balenapy_br0\ndelete table {family} balenapy_br0\n" for family in ("ip", "ip6")
    )


def test_a_bridge_is_made_once_and_adjusted_later() -> None:
    interface = IPv4Interface("10.213.0.1/24")

    made = netplan.bridge_batch("br0", [interface], "02:42:00:00:00:01", 1400, create=True)
    kept = netplan.bridge_batch("br0", [interface], "02:42:00:00:00:01", 1400, create=False)
    assert made == (
        "link add name br0 address 02:42:00:00:00:01 type bridge\n"
        "address replace 10.213.0.1/24 broadcast 10.213.0.255 dev br0\n"
        "link set dev br0 mtu 1400 up\n"
    )
    assert "link add" not in kept and "mtu" not in kept


def test_rules_of_a_name_server_lead_port_53_to_its_own() -> None:
    assert netplan.nameserver_ruleset("127.0.0.11", 4711) == (
        "table ip balenapy_dns\n"
        "delete table ip balenapy_dns\n"
        "table ip balenapy_dns {\n"
        "\tchain output {\n"
        "\t\ttype nat hook output priority -100; policy accept;\n"
        "\t\tip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:4711\n"
        "\t\tip daddr 127.0.0.11 tcp dport 53 dnat to 127.0.0.11:4711\n"
        "\t}\n"
        "}\n"
    )
