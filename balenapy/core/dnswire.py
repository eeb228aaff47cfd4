"""DNS messages as bytes: one question in, an answer out. RFC 1035 and, of RFC 6891, the size a sender can take.

The only module that knows dnslib, and imported when the first container on a user-defined network starts: together
they take 0.6 MB. Of a query nothing but header and question is parsed: what is forwarded goes on as the bytes it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from dnslib import AAAA as Address6Data
from dnslib import PTR as PointerData
from dnslib import RR, DNSBuffer, DNSError, DNSHeader, DNSLabel, DNSQuestion, DNSRecord
from dnslib import A as AddressData
from dnslib.label import DNSLabelError

from balenapy.core.nameserver import AAAA, PTR, A, Answer, Question
from balenapy.errors import InvalidParameter

TTL_S = 600  # libnetwork resolver.go, respTTL
UDP_MAX_BYTES = 512  # RFC 1035 2.3.4, for who does not say more
MESSAGE_MAX_BYTES = 65535  # the length before a message over TCP has 16 bits
HEADER_BYTES = 12
LABEL_MAX_BYTES, NAME_MAX_BYTES = 63, 253  # RFC 1035 2.3.4, without the first length and the root

NO_ERROR, FORMAT_ERROR, SERVER_FAILURE, NOT_IMPLEMENTED = 0, 1, 2, 4

_RESPONSE = 0x80  # in the third byte
_OPT_RECORD = b"\0\0\x29"  # the root's name, then type 41


class Malformed(InvalidParameter):
    """Not a query. `reply` is what its sender is told: b"" for nothing."""

    def __init__(self, message: str, reply: bytes = b"") -> None:
        super().__init__(message)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Query:
    id: int
    question: Question
    labels: tuple[bytes, ...]  # the name as it was written
    recursion_desired: bool
    udp_max_bytes: int


def parse_query(packet: bytes) -> Query:
    """Read a query. Raises: Malformed."""
    if len(packet) < HEADER_BYTES or packet[2] & _RESPONSE:
        raise Malformed("not a query")  # an answer to what is an answer already could go on for ever
    buffer = DNSBuffer(packet)
    header = DNSHeader.parse(buffer)
    if header.opcode:
        raise Malformed(f"operation {header.opcode}", _refusal(header, NOT_IMPLEMENTED))
    if header.q != 1:
        raise Malformed(f"{header.q} questions", _refusal(header, FORMAT_ERROR))
    try:
        question = DNSQuestion.parse(buffer)
    # Pointers laid crosswise send dnslib round and round until the interpreter stops it.
    except (DNSError, RecursionError) as error:
        raise Malformed(f"question: {error}", _refusal(header, FORMAT_ERROR)) from error
    labels = tuple(question.qname.label)
    if len(question.qname) > NAME_MAX_BYTES or any(len(label) > LABEL_MAX_BYTES for label in labels):
        raise Malformed("the name is too long", _refusal(header, FORMAT_ERROR))
    return Query(
        header.id,
        Question(_text(labels), question.qtype, question.qclass),
        labels,
        bool(header.rd),
        _udp_max_bytes(packet, buffer.offset, header),
    )


def render_answer(query: Query, answer: Answer, max_bytes: int) -> bytes:
    """The reply; one that has no room for every address has as many as go in, and says so."""
    name = DNSLabel(query.labels)
    reply = _reply(query, NO_ERROR)
    try:
        if answer.pointer:
            reply.add_answer(RR(name, PTR, ttl=TTL_S, rdata=PointerData(DNSLabel(_labels(answer.pointer)))))
        for address in answer.addresses:
            packed_address = ip_address(address).packed
            kind, data = (A, AddressData) if len(packed_address) == 4 else (AAAA, Address6Data)
            reply.add_answer(RR(name, kind, ttl=TTL_S, rdata=data(tuple(packed_address))))
        packed = bytes(reply.pack())
    except DNSLabelError:  # a container may have a name that DNS cannot hold
        return failure(query, NO_ERROR)
    if len(packed) > max_bytes:
        bare = len(failure(query, NO_ERROR))
        each = (len(packed) - bare) // len(reply.rr)
        del reply.rr[(max_bytes - bare) // each :]
        reply.header.tc = 1
        packed = bytes(reply.pack())
    return packed


def failure(query: Query, code: int) -> bytes:
    """A reply without an answer."""
    return bytes(_reply(query, code).pack())


def response_code(message: bytes) -> int:
    return message[3] & 0x0F


def is_reply_to(message: bytes, id: bytes) -> bool:
    """Whether a message from a server has the id we gave the question."""
    return len(message) >= HEADER_BYTES and message[:2] == id and bool(message[2] & _RESPONSE)


def with_id(message: bytes, id: bytes) -> bytes:
    return id + message[2:]


def _reply(query: Query, code: int) -> DNSRecord:
    header = DNSHeader(id=query.id, qr=1, ra=1, rd=int(query.recursion_desired), rcode=code)
    question = DNSQuestion(DNSLabel(query.labels), query.question.kind, query.question.network_class)
    return DNSRecord(header, q=question)


def _refusal(header: DNSHeader, code: int) -> bytes:
    buffer = DNSBuffer()
    DNSHeader(id=header.id, opcode=header.opcode, qr=1, ra=1, rd=header.rd, rcode=code).pack(buffer)
    return bytes(buffer.data)


def _text(labels: tuple[bytes, ...]) -> str:
    if any(b"." in label for label in labels):
        return ""  # not what the text with dots means
    return b".".join(labels).decode(errors="surrogateescape")


def _labels(name: str) -> list[bytes]:
    # As bytes: of a str dnslib makes IDNA, with half a megabyte of tables.
    return name.encode(errors="surrogateescape").split(b".")


def _udp_max_bytes(packet: bytes, end: int, header: DNSHeader) -> int:
    """What the sender can take: said by an OPT record, which stubs send as the only record."""
    if header.a or header.auth or not header.ar or packet[end : end + 3] != _OPT_RECORD:
        return UDP_MAX_BYTES
    return max(UDP_MAX_BYTES, int.from_bytes(packet[end + 3 : end + 5], "big"))
