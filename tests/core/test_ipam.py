"""Subnets and addresses."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

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
        (("", "zz"), SystemFailure, "failed to allocate gateway (zz): invalid address"),
        (("zz",), SystemFailure, "invalid CIDR address: zz"),
        (
            ("", "10.0.0.9", {"a": "10.0.0.9"}),
            Forbidden,
            "failed to allocate gateway (10.0.0.9): Address already in use",
        ),
        (
            ("", "", {"a": "10.0.0.9", "b": "10.0.0.9"}),
            Forbidden,
            "failed to allocate secondary ip address (b:10.0.0.9): Address already in use",
        ),
    ],
)
def test_a_bad_pool_is_refused(arguments: tuple[object, ...], kind: type[EngineError], message: str) -> None:
    with pytest.raises(kind) as caught:
        make_pool(network("10.0.0.0/24"), *arguments)  # type: ignore[arg-type]

    assert caught.value.message == message


@pytest.mark.parametrize("text", ["", "10.0.0.0", "10.0.0.0/33", "x/8", "::/64"])
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


def test_a_mac_is_made_of_the_address() -> None:
    assert ipam.mac_of(IPv4Address("10.99.5.77")) == "02:42:0a:63:05:4d"
