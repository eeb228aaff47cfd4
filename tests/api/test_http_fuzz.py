"""Whatever is sent, and however it is cut, a connection answers or ends; the engine stays."""

from __future__ import annotations

import logging
import re
from itertools import pairwise

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from balenapy.api.app import App
from tests.api.connection import connected, request_bytes
from tests.api.test_hijack import HEAD_101, HEAD_200, UPGRADE, application

APP = application()
JSON = {"Content_Type": "application/json"}
CHUNKED = (
    b"POST /exec HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    b'Connection: Upgrade\r\nUpgrade: tcp\r\n\r\nc\r\n{"Tty":false\r\n1\r\n}\r\n0\r\n\r\n'
)
ORDINARY = (
    request_bytes("GET", "/_ping"),
    request_bytes("GET", "/nowhere"),
    request_bytes("POST", "/missing", b"x" * 50),
    request_bytes("POST", "/missing", **UPGRADE),
)
RAW = (
    (request_bytes("POST", "/attach", **UPGRADE), HEAD_101 + b"STDINlate"),
    (request_bytes("POST", "/attach"), HEAD_200 + b"STDINlate"),
    (CHUNKED, b"tty=False STDINlate"),
)


class Complaints(logging.Handler):
    """What was logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record.getMessage())

    def __enter__(self) -> Complaints:
        logging.getLogger("balenapy").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("balenapy").removeHandler(self)


def talk(app: App, pieces: list[bytes]) -> bytes:
    """Send pieces one by one, half-close; everything that comes back."""

    async def main() -> bytes:
        async with connected(app) as client:
            for piece in pieces:
                await client.send(piece)
                await trio.testing.wait_all_tasks_blocked()
            await client.stream.send_eof()
            return await client.receive_to_end()

    clock = trio.testing.MockClock(autojump_threshold=0)
    return re.sub(rb"Date: [^\r]*\r\n", b"", trio.run(main, clock=clock))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(ORDINARY), max_size=4),
    st.sampled_from(RAW),
    st.lists(st.integers(0, 10_000), max_size=8),
)
def test_cutting_the_input_changes_nothing(before: list[bytes], raw: tuple[bytes, bytes], places: list[int]) -> None:
    request, expected = raw
    data = b"".join(before) + request + b"stdin"
    with Complaints() as complaints:
        assert talk(APP, cut(data, places)).endswith(expected)
    assert complaints.records == []


REQUEST_BITS = st.sampled_from(
    [b"GET", b"POST", b" ", b"/", b"/_ping", b"/v1.39", b"HTTP/1.1", b"\r\n", b"\n", b"Host: x", b"Content-Length: ",
     b"Transfer-Encoding: chunked", b"Upgrade: tcp", b"Connection: Upgrade", b"Expect: 100-continue", b"0", b"5", b"-1",
     b"//", b"/..", b"%", b"%zz", b"%00", b"?", b"\xff", b"\x00", b"attach", b"exec", b"h2c", b"websocket"]
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.lists(REQUEST_BITS | st.binary(max_size=8), max_size=40))
def test_garbage_is_no_bug_of_ours(bits: list[bytes]) -> None:
    with Complaints() as complaints:
        talk(APP, [b"".join(bits)])
    assert complaints.records == []


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "X"]), st.binary(max_size=30))
def test_any_target_is_answered(method: str, target: bytes) -> None:
    target = bytes(byte for byte in target if 0x20 < byte < 0x7F)
    with Complaints() as complaints:
        answer = talk(APP, [f"{method} /".encode() + target + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"])
    assert complaints.records == []
    assert re.match(rb"HTTP/1.1 (200|301|400|404) ", answer)
