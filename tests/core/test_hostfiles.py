"""/etc/hosts and /etc/resolv.conf of containers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import hostfiles
from balenapy.core.hostfiles import (
    Forwarder,
    ResolvConf,
    container_resolv_conf,
    embedded_resolv_conf,
    forwarders,
    parse_resolv_conf,
    wants_search_domains,
)


def test_hosts_begin_as_in_the_reference() -> None:
    assert hostfiles.hosts_text([("10.0.0.2", "host.domain host")]) == (
        "127.0.0.1\tlocalhost\n"
        "::1\tlocalhost ip6-localhost ip6-loopback\n"
        "fe00::0\tip6-localnet\n"
        "ff00::0\tip6-mcastprefix\n"
        "ff02::1\tip6-allnodes\n"
        "ff02::2\tip6-allrouters\n"
        "10.0.0.2\thost.domain host\n"
    )


@pytest.mark.parametrize(
    ("hostname", "domainname", "expected"),
    [("box", "", "box"), ("box", "lan", "box.lan box"), ("box.lan", "", "box.lan box"), ("box.a", "b", "box.a.b box")],
)
def test_own_names(hostname: str, domainname: str, expected: str) -> None:
    assert hostfiles.own_names(hostname, domainname) == expected


def test_extra_hosts_may_be_ipv6() -> None:
    assert hostfiles.parse_extra_host("name:fe80::1") == ("fe80::1", "name")


def test_resolv_conf_is_read_as_libc_reads_it() -> None:
    text = "# a\nnameserver 1.1.1.1 # b\ndomain x\nsearch a b\n;c\noptions ndots:2\noptions rotate\nsortlist z\n"
    text += "nameserver\n"

    assert parse_resolv_conf(text) == ResolvConf(("1.1.1.1",), ("a", "b"), ("ndots:2", "rotate"))


def test_servers_a_container_cannot_reach_are_left_out() -> None:
    host = ResolvConf(("127.0.0.53", "1.1.1.1", "fe80::1%eth0", "::1"), ("lan",), ("ndots:2",))

    assert container_resolv_conf(host) == ResolvConf(("1.1.1.1",), ("lan",), ("ndots:2",))
    assert container_resolv_conf(ResolvConf(("127.0.0.1",))).nameservers == ("8.8.8.8", "8.8.4.4")


def test_what_a_container_sets_replaces_each_of_the_hosts() -> None:
    host = ResolvConf(("1.1.1.1",), ("lan",), ("ndots:2",))

    assert container_resolv_conf(host, dns=["127.0.0.1"]).nameservers == ("127.0.0.1",)
    assert container_resolv_conf(host, search=["."]).search == ()
    assert container_resolv_conf(host, options=["rotate"]) == ResolvConf(("1.1.1.1",), ("lan",), ("rotate",))


@pytest.mark.parametrize(
    ("options", "expected", "wants"),
    [
        ((), ("ndots:0",), False),
        (("rotate",), ("rotate", "ndots:0"), False),
        (("ndots:2", "rotate"), ("ndots:2", "rotate"), True),
        (("ndots:0",), ("ndots:0",), False),
        (("ndots:x",), ("ndots:x", "ndots:0"), False),
    ],
)
def test_on_a_users_network_ours_is_the_only_server(
    options: tuple[str, ...], expected: tuple[str, ...], wants: bool
) -> None:
    conf = ResolvConf(("1.1.1.1",), ("lan",), options)

    assert embedded_resolv_conf(conf) == ResolvConf(("127.0.0.11",), ("lan",), expected)
    assert wants_search_domains(conf) is wants


def test_servers_behind_ours_are_the_users_or_the_hosts() -> None:
    host = ResolvConf(("127.0.0.1", "1.1.1.1", "fe80::1%eth0", "::1", "nonsense"))

    assert forwarders(host) == (Forwarder("127.0.0.1", True), Forwarder("1.1.1.1"), Forwarder("::1", True))
    assert forwarders(ResolvConf(("fe80::1",))) == (Forwarder("8.8.8.8"), Forwarder("8.8.4.4"))
    assert forwarders(host, ["127.0.0.1", "127.0.0.11", "::1", "9.9.9.9"]) == (
        Forwarder("127.0.0.1"),
        Forwarder("9.9.9.9"),
    )


words = st.from_regex(r"[a-z0-9.:-]{1,12}", fullmatch=True)


@given(st.lists(words, max_size=3), st.lists(words, max_size=3), st.lists(words, max_size=3))
def test_writing_and_reading_are_inverse(servers: list[str], search: list[str], options: list[str]) -> None:
    conf = ResolvConf(tuple(servers), tuple(search), tuple(options))

    assert parse_resolv_conf(conf.render()) == conf


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    container_resolv_conf(parse_resolv_conf(text))
