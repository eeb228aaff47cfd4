"""Published ports: what is asked for, and the book of what is taken."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from balenapy.core import ports
from balenapy.core.container import PortBinding
from balenapy.core.ports import ExposedPort, PortRequest, PortTable, PublishedPort, parse_port, requested_ports
from balenapy.errors import EngineError, InvalidParameter, SystemFailure

TCP_80 = ExposedPort(80, "tcp")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", (80, 80, "tcp")),
        ("80/UDP", (80, 80, "udp")),
        ("8000-8010/sctp", (8000, 8010, "sctp")),
        ("0/tcp", (0, 0, "tcp")),
    ],
)
def test_ports_are_read(text: str, expected: tuple[int, int, str]) -> None:
    assert parse_port(text) == expected


@pytest.mark.parametrize("text", ["", "x", "80/zz", "65536", "9-8", "-1", "1-", "８０", "80/tcp/x", "999999999999"])
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        parse_port(text)

    assert caught.value.message == f'invalid port specification: "{text}"'


@given(st.text(max_size=12))
def test_any_text_is_a_port_or_refused(text: str) -> None:
    try:
        first, last, protocol = parse_port(text)
    except EngineError:
        return
    assert 0 <= first <= last <= 65535 and protocol in ports.PROTOCOLS


def test_a_binding_counts_only_for_an_exposed_port() -> None:
    bindings = {"80/tcp": [PortBinding("", "8080")], "81/tcp": [PortBinding("", "8081")]}

    assert requested_ports(["80/tcp"], bindings, False) == [PortRequest(TCP_80, "", 8080, 8080)]


def test_an_exposed_port_without_protocol_is_tcp() -> None:
    assert requested_ports(["80"], {"80/tcp": [PortBinding("", "8080")]}, False) == [
        PortRequest(TCP_80, "", 8080, 8080)
    ]


def test_publish_all_gives_a_random_port_to_what_has_no_binding() -> None:
    requests = requested_ports(["80/tcp", "81/udp"], {"80/tcp": [PortBinding("1.2.3.4", "")]}, True)

    assert requests == [PortRequest(TCP_80, "1.2.3.4"), PortRequest(ExposedPort(81, "udp"))]


def test_fixed_ports_come_before_ranges_and_random_ones() -> None:
    bindings = {
        "80/tcp": [PortBinding("", "")], "81/tcp": [PortBinding("", "9000-9010")], "82/tcp": [PortBinding("", "9000")],
    }  # fmt: skip

    assert [request.port.number for request in requested_ports(list(bindings), bindings, False)] == [82, 81, 80]


def test_a_host_address_that_is_none_means_any() -> None:
    assert requested_ports(["80"], {"80": [PortBinding("zz", "0")]}, False) == [PortRequest(TCP_80)]


def test_a_bad_host_port_fails_the_start() -> None:
    with pytest.raises(SystemFailure, match=r"Error parsing HostPort value \(x\)"):
        requested_ports(["80"], {"80": [PortBinding("", "x")]}, False)


def first_of(table: PortTable, request: PortRequest, host_ip: str = "0.0.0.0") -> int:
    return next(iter(table.candidates(request, host_ip)))


def test_a_taken_port_is_refused_in_dockers_words() -> None:
    table = PortTable()
    request = PortRequest(TCP_80, "", 8080, 8080)
    table.take(request, "0.0.0.0", 8080)

    for host_ip in ("0.0.0.0", "10.0.0.1"):
        with pytest.raises(SystemFailure) as caught:
            first_of(table, request, host_ip)
        assert caught.value.message == f"Bind for {host_ip}:8080 failed: port is already allocated"
    assert first_of(table, PortRequest(ExposedPort(80, "udp"), "", 8080, 8080)) == 8080


def test_two_addresses_may_have_the_same_port() -> None:
    table = PortTable()
    request = PortRequest(TCP_80, "", 8080, 8080)
    published = table.take(request, "10.0.0.1", 8080)

    assert first_of(table, request, "10.0.0.2") == 8080
    assert not table.is_free("tcp", "0.0.0.0", 8080)
    table.release(published)
    table.release(published)
    assert table.is_free("tcp", "0.0.0.0", 8080)


def test_a_range_gives_what_is_free_and_says_when_nothing_is() -> None:
    table = PortTable()
    request = PortRequest(TCP_80, "", 9000, 9002)
    table.take(request, "0.0.0.0", 9000)
    left = list(table.candidates(request, "0.0.0.0"))
    for port in left:
        table.take(request, "0.0.0.0", port)

    assert left == [9001, 9002]
    with pytest.raises(SystemFailure, match="all ports are allocated"):
        first_of(table, request)


def test_random_ports_are_next_fit_and_start_over_at_the_end() -> None:
    table = PortTable((32768, 32770))
    request = PortRequest(TCP_80)
    given_out = []
    for _ in range(3):
        given_out.append(table.take(request, "0.0.0.0", first_of(table, request)))
    table.release(given_out[0])
    again = table.take(request, "0.0.0.0", first_of(table, request))
    table.release(given_out[1])

    assert [one.host_port for one in given_out] == [32768, 32769, 32770]
    assert again.host_port == 32768
    assert list(islice(table.candidates(request, "0.0.0.0"), 2)) == [32769]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("32768\t60999\n", (32768, 60999)), ("", ports.EPHEMERAL_FALLBACK), ("9 5", ports.EPHEMERAL_FALLBACK)],
)
def test_the_kernels_range_is_read(text: str, expected: tuple[int, int]) -> None:
    assert ports.parse_ephemeral_range(text) == expected


class TableMachine(RuleBasedStateMachine):
    """The table against a plain list of what was given out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PortTable((100, 104))
        self.given: list[PublishedPort] = []

    @rule(
        host_ip=st.sampled_from(["0.0.0.0", "10.0.0.1", "10.0.0.2"]),
        wanted=st.sampled_from([(0, 0), (100, 100), (102, 106)]),
        protocol=st.sampled_from(["tcp", "udp"]),
    )
    def take(self, host_ip: str, wanted: tuple[int, int], protocol: str) -> None:
        request = PortRequest(ExposedPort(80, protocol), host_ip, *wanted)
        try:
            port = first_of(self.table, request, host_ip)
        except SystemFailure:
            return
        self.given.append(self.table.take(request, host_ip, port))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.given:
            self.table.release(self.given.pop(data.draw(st.integers(0, len(self.given) - 1))))

    @invariant()
    def nobody_shares_a_port(self) -> None:
        for index, one in enumerate(self.given):
            for other in self.given[index + 1 :]:
                same = (one.port.protocol, one.host_port) == (other.port.protocol, other.host_port)
                assert not (same and (one.host_ip == other.host_ip or "0.0.0.0" in (one.host_ip, other.host_ip)))

    @invariant()
    def what_nobody_has_is_free(self) -> None:
        if not self.given:
            assert all(
                self.table.is_free(protocol, "0.0.0.0", port) for protocol in ("tcp", "udp") for port in range(90, 110)
            )


TestTable = TableMachine.TestCase


def test_a_port_is_free_on_all_addresses_or_not_offered() -> None:
    table = PortTable((50000, 50003))
    any_port = PortRequest(ExposedPort(80, "tcp"))
    table.take(PortRequest(ExposedPort(80, "tcp"), "fd00::1", 50000, 50000), "fd00::1", 50000)
    table.take(PortRequest(ExposedPort(80, "tcp"), "10.0.0.1", 50001, 50001), "10.0.0.1", 50001)

    assert list(table.candidates(any_port, "0.0.0.0", "::")) == [50002, 50003]
    assert list(table.candidates(any_port, "0.0.0.0")) == [50000, 50002, 50003]
    with pytest.raises(SystemFailure, match=r"Bind for \[::\]:50000 failed: port is already allocated"):
        list(table.candidates(PortRequest(ExposedPort(80, "tcp"), "::", 50000, 50000), "::"))
