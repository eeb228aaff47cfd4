"""Subnets and addresses."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import ipam
from balenapy.core.ipam import Pool, make_pool
from balenapy.errors import EngineError, Forbidden, NotFound, SystemFailure


def network(text: str) -> IPv4Network:
    return IPv4Network(text)


subnets = st.builds(
    lambda address, prefix: IPv4Network((address, prefix), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(20, 30),
)


def test_default_pools_are_those_of_the_reference_in_its_order() -> None:
    pools = [str(one) for one in ipam.expand_pools(ipam.DEFAULT_POOLS)]

    assert pools[:2] == ["172.17.0.0/16", "172.18.0.0/16"]
    assert pools[14:17] == ["172.31.0.0/16", "192.168.0.0/20", "192.168.16.0/20"]
    assert (len(pools), pools[-1]) == (31, "192.168.240.0/20")


def test_a_subnet_overlaps_nothing_that_is_taken() -> None:
    pools = list(ipam.expand_pools(ipam.DEFAULT_POOLS))

    assert ipam.choose_subnet(pools, []) == network("172.17.0.0/16")
    assert ipam.choose_subnet(pools, [network("172.17.3.0/24"), network("172.18.0.1/32")]) == network("172.19.0.0/16")
    assert ipam.choose_subnet(pools, [network("172.16.0.0/12")]) == network("192.168.0.0/20")


def test_no_subnet_left_is_not_found() -> None:
    with pytest.raises(NotFound, match="could not find an available, non-overlapping IPv4 address pool"):
        ipam.choose_subnet(ipam.expand_pools(ipam.DEFAULT_POOLS), [network("0.0.0.0/0")])


@given(st.lists(subnets, max_size=20))
def test_a_chosen_subnet_is_always_free(taken: list[IPv4Network]) -> None:
    try:
        chosen = ipam.choose_subnet(ipam.expand_pools(ipam.DEFAULT_POOLS), taken)
    except NotFound:
        return
    assert not any(chosen.overlaps(other) for other in taken)


@given(subnets, st.data())
def test_addresses_come_lowest_first_and_once_until_the_pool_is_full(subnet: IPv4Network, data: st.DataObject) -> None:
    pool = make_pool(subnet)
    taken = set(data.draw(st.lists(st.sampled_from(list(ipam.usable(subnet))), max_size=5)))
    given_out: list[IPv4Address] = []
    while (address := pool.lowest_free(taken)) is not None and len(given_out) < 50:
        given_out.append(address)
        taken.add(address)

    assert given_out == sorted(set(given_out))
    assert all(one in subnet and one != pool.gateway for one in given_out)
    assert all(one not in (subnet.network_address, subnet.broadcast_address) for one in given_out)
    if address is None:
        assert taken | {pool.gateway} == set(ipam.usable(subnet)) | taken


def test_the_gateway_is_the_first_address_and_containers_follow() -> None:
    pool = make_pool(network("10.0.0.0/24"))

    assert str(pool.gateway) == "10.0.0.1"
    assert str(pool.lowest_free(())) == "10.0.0.2"


def test_a_range_auxiliary_addresses_and_a_given_gateway_are_respected() -> None:
    pool = make_pool(
        network("10.99.0.0/16"), "10.99.5.0/24", "10.99.0.254", {"host1": "10.99.5.0", "host2": "10.99.5.1"}
    )

    assert str(pool.gateway) == "10.99.0.254"
    assert str(pool.lowest_free({IPv4Address("10.99.5.2")})) == "10.99.5.3"


def test_a_range_outside_the_subnet_hands_out_its_own_addresses() -> None:
    assert str(make_pool(network("10.0.0.0/24"), "10.9.0.0/24", "10.0.0.1").lowest_free(())) == "10.9.0.0"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("", "10.1.0.1"), SystemFailure, "failed to allocate gateway (10.1.0.1): Requested address is out of range"),
        (("", "zz"), SystemFailure, "invalid gateway address zz in Ipam configuration"),
        (
            ("zz",),
            SystemFailure,
            'failed to parse pool request for address space "LocalDefault" pool "10.0.0.0/24" subpool "zz": '
            "Invalid Address SubPool",
        ),
        (
            ("", "10.0.0.9", {"a": "10.0.0.9"}),
            SystemFailure,
            "failed to allocate secondary ip address (a:10.0.0.9): Address already in use",
        ),
        (
            ("", "", {"a": "10.0.0.9", "b": "10.0.0.9"}),
            SystemFailure,
            "failed to allocate secondary ip address (b:10.0.0.9): Address already in use",
        ),
        (
            ("", "", {"a": "10.1.0.9"}),
            Forbidden,
            "auxiliary address: (a:10.1.0.9) must belong to the master pool: 10.0.0.0/24",
        ),
        (
            ("", "", {"a": "zz"}),
            SystemFailure,
            "non parsable secondary ip address (a:zz) passed for network n",
        ),
        (("", "fd00::1"), SystemFailure, "failed to allocate gateway (fd00::1): Requested address is out of range"),
    ],
)
def test_a_bad_pool_is_refused(arguments: tuple[object, ...], kind: type[EngineError], message: str) -> None:
    with pytest.raises(kind) as caught:
        make_pool(network("10.0.0.0/24"), *arguments, network="n")  # type: ignore[arg-type]

    assert caught.value.message == message


@pytest.mark.parametrize("text", ["", "10.0.0.0", "10.0.0.0/33", "x/8", "::/129"])
def test_a_bad_subnet_is_refused_in_gos_words(text: str) -> None:
    with pytest.raises(SystemFailure) as caught:
        ipam.parse_subnet(text)

    assert caught.value.message == f"Invalid subnet {text} : invalid CIDR address: {text}"


def test_static_addresses_are_checked() -> None:
    pool = Pool(network("10.0.0.0/24"), IPv4Address("10.0.0.1"))
    taken = {IPv4Address("10.0.0.7")}

    pool.check_static(IPv4Address("10.0.0.8"), taken)
    for address in ("10.0.0.7", "10.0.0.1", "10.0.0.0", "10.0.0.255"):
        with pytest.raises(Forbidden, match="Address already in use"):
            pool.check_static(IPv4Address(address), taken)
    with pytest.raises(
        SystemFailure, match=r"Invalid address 10\.1\.0\.1: It does not belong to any of this network's"
    ):
        pool.check_static(IPv4Address("10.1.0.1"), taken)


def test_a_subnet_of_ipv6_gives_addresses_as_one_of_ipv4_does() -> None:
    pool = make_pool(ipam.parse_subnet("fd00:1::7/64"), "fd00:1::100/120")
    pair = make_pool(ipam.parse_subnet("fd00:2::/127"))

    assert (str(pool.subnet), str(pool.gateway)) == ("fd00:1::/64", "fd00:1::100")
    assert str(pool.lowest_free({ip_address("fd00:1::101")})) == "fd00:1::102"
    assert str(make_pool(ipam.parse_subnet("fd00:1::/64")).lowest_free(())) == "fd00:1::2"
    assert (str(pair.gateway), str(pair.lowest_free(()))) == ("fd00:2::", "fd00:2::1")
    with pytest.raises(Forbidden, match="Address already in use"):
        pool.check_static(ip_address("fd00:1::ffff:ffff:ffff:ffff"), ())
    with pytest.raises(NotFound, match="non-overlapping IPv6 address pool among the defaults"):
        ipam.choose_subnet([], [], 6)


def test_pools_of_both_kinds_stand_beside_each_other() -> None:
    pools = ["10.0.0.0/15:16", "fd00::/47:48"]

    assert [str(one) for one in ipam.expand_pools(pools)] == ["10.0.0.0/16", "10.1.0.0/16"]
    assert [str(one) for one in ipam.expand_pools(pools, 6)] == ["fd00::/48", "fd00:0:1::/48"]
    assert next(iter(ipam.expand_pools(pools[1:]))) == network("172.17.0.0/16")
    assert list(ipam.expand_pools(pools[:1], 6)) == []
    assert not ipam.overlap(network("0.0.0.0/0"), ip_network("::/0"))


def test_an_auxiliary_address_may_be_said_to_be_the_containers_gateway() -> None:
    pool = make_pool(network("10.0.0.0/24"), auxiliary={"DefaultGatewayIPv4": "10.0.0.9", "x": "10.0.0.1"})

    assert (str(pool.gateway), str(pool.container_gateway)) == ("10.0.0.2", "10.0.0.9")


def test_a_mac_is_made_of_the_address() -> None:
    assert str(ipam.address_of_mac(IPv6Network("fd00::/64"), "02:42:ac:11:00:02")) == "fd00::242:ac11:2"
    assert ipam.mac_of(IPv4Address("10.99.5.77")) == "02:42:0a:63:05:4d"
