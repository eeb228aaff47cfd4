"""DNS messages: whatever comes is a query or is Malformed, and answers say what was meant."""

from __future__ import annotations

import struct

import pytest
from dnslib import EDNS0, QTYPE, RCODE, DNSHeader, DNSQuestion, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import dnswire
from balenapy.core.dnswire import Malformed, Query, parse_query, render_answer
from balenapy.core.nameserver import AAAA, PTR, A, Answer, Question


def packet(name: str = "web", kind: int = A, *, size: int = 0) -> bytes:
    query = DNSRecord(DNSHeader(id=4660, rd=1), q=DNSQuestion(name.encode().split(b"."), kind))
    if size:
        query.add_ar(EDNS0(udp_len=size))
    return bytes(query.pack())


def asked(name: str = "web", kind: int = A, *, size: int = 0) -> Query:
    return parse_query(packet(name, kind, size=size))


def test_a_query_is_read() -> None:
    query = asked("Web.Front", AAAA)

    assert Question("Web.Front", AAAA) == query.question
    assert (query.recursion_desired, query.udp_max_bytes) == (True, 512)
    assert (asked(size=4096).udp_max_bytes, asked(size=100).udp_max_bytes) == (4096, 512)


def test_addresses_are_answered() -> None:
    query = asked("www.front")

    reply = DNSRecord.parse(render_answer(query, Answer(("10.0.0.2", "10.0.0.3")), 512))

    assert query.id == reply.header.id
    assert (reply.header.qr, reply.header.ra, reply.header.rd, reply.header.tc) == (1, 1, 1, 0)
    assert str(reply.q.qname) == "www.front."
    assert [(str(record.rname), QTYPE[record.rtype], record.ttl, str(record.rdata)) for record in reply.rr] == [
        ("www.front.", "A", 600, "10.0.0.2"),
        ("www.front.", "A", 600, "10.0.0.3"),
    ]


def test_addresses_of_ipv6_are_answered() -> None:
    reply = DNSRecord.parse(render_answer(asked("www", AAAA), Answer(("fd00::2",)), 512))

    assert [(QTYPE[record.rtype], str(record.rdata)) for record in reply.rr] == [("AAAA", "fd00::2")]


def test_a_pointer_is_answered() -> None:
    reply = DNSRecord.parse(render_answer(asked("2.0.0.10.in-addr.arpa", PTR), Answer(pointer="web.front"), 512))

    assert [str(record.rdata) for record in reply.rr] == ["web.front."]


def test_no_answer_is_no_error() -> None:
    reply = DNSRecord.parse(render_answer(asked(kind=AAAA), Answer(), 512))

    assert (RCODE[reply.header.rcode], reply.rr) == ("NOERROR", [])
    assert dnswire.response_code(dnswire.failure(asked(), dnswire.SERVER_FAILURE)) == dnswire.SERVER_FAILURE


def test_a_name_that_dns_cannot_hold_is_left_out() -> None:
    reply = DNSRecord.parse(render_answer(asked("2.0.0.10.in-addr.arpa", PTR), Answer(pointer="x" * 64), 512))

    assert reply.rr == []


@given(st.integers(0, 300), st.integers(512, 2000))
def test_a_reply_is_never_too_long_and_says_when_it_is_not_whole(count: int, size: int) -> None:
    addresses = tuple(f"10.0.{number // 250}.{number % 250}" for number in range(count))
    raw = render_answer(asked("a-name-of-some-length.front"), Answer(addresses), size)
    reply = DNSRecord.parse(raw)

    assert len(raw) <= size
    assert list(addresses[: len(reply.rr)]) == [str(record.rdata) for record in reply.rr]
    assert bool(reply.header.tc) == (len(reply.rr) < count)
    assert len(raw) + 16 > size or len(reply.rr) == count


HEADER = struct.pack("!HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0)
# Two ways to read the same bytes, each of which ends in a pointer to where the other begins.
CROSSED = HEADER + (b"\x3f" + b"a" * 63) * 14 + b"\3\4aa\xc3\x8d\xc3\x8c"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", None),
        (HEADER[:11], None),
        (struct.pack("!HHHHHH", 1, 0x8100, 1, 0, 0, 0) + b"\0\0\1\0\1", None),  # a reply
        (struct.pack("!HHHHHH", 1, 0x2800, 1, 0, 0, 0) + b"\0\0\1\0\1", dnswire.NOT_IMPLEMENTED),  # an update
        (struct.pack("!HHHHHH", 1, 0x0100, 0, 0, 0, 0), dnswire.FORMAT_ERROR),
        (struct.pack("!HHHHHH", 1, 0x0100, 2, 0, 0, 0) + b"\0\0\1\0\1" * 2, dnswire.FORMAT_ERROR),
        (HEADER, dnswire.FORMAT_ERROR),
        (HEADER + b"\3we", dnswire.FORMAT_ERROR),
        (HEADER + b"\xc0\x0c\0\1\0\1", dnswire.FORMAT_ERROR),
        (HEADER + b"\x40" + b"a" * 64 + b"\0\0\1\0\1", dnswire.FORMAT_ERROR),
        (HEADER + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1", dnswire.FORMAT_ERROR),
        (CROSSED, dnswire.FORMAT_ERROR),
    ],
)
def test_what_is_no_query_is_told_so_or_ignored(raw: bytes, code: int | None) -> None:
    with pytest.raises(Malformed) as caught:
        parse_query(raw)

    assert code == (dnswire.response_code(caught.value.reply) if caught.value.reply else None)
    assert caught.value.reply[:2] in (b"", raw[:2])


@given(
    st.binary(max_size=600)
    | st.builds(lambda rest: HEADER + rest, st.binary(max_size=300))
    | st.builds(
        lambda cut, byte, at: _damaged(packet("web.front.example", size=1232), cut, byte, at),
        st.integers(0, 60),
        st.integers(0, 255),
        st.integers(0, 60),
    )
)
def test_any_bytes_are_a_query_that_can_be_answered_or_malformed(raw: bytes) -> None:
    try:
        query = parse_query(raw)
    except Malformed as error:
        told = len(error.reply)
        assert told in (0, 12)
        return

    reply = render_answer(query, Answer(("10.0.0.1",)), 512)
    assert raw[:2] == reply[:2]
    assert 12 < len(reply) <= 512


def _damaged(raw: bytes, cut: int, byte: int, at: int) -> bytes:
    return (raw[:at] + bytes([byte]) + raw[at + 1 :])[: len(raw) - cut]


def test_a_message_keeps_its_askers_id() -> None:
    reply = dnswire.failure(asked(), dnswire.SERVER_FAILURE)

    assert dnswire.with_id(reply, b"xy")[:2] == b"xy"
    assert dnswire.is_reply_to(reply, reply[:2])
    assert not dnswire.is_reply_to(reply, b"\0\0" if reply[:2] != b"\0\0" else b"\0\1")
    assert not dnswire.is_reply_to(packet(), packet()[:2])
