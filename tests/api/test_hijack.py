"""The contract of raw streams: what attach and exec rely on, whatever Hypercorn does inside."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import trio
import trio.testing

from balenapy.api.app import Answer, App, Request, json_body, route
from balenapy.api.hijack import Hijack, RawStream
from balenapy.api.response import BodyWriter, empty_response, json_response, stream_response, text_response
from balenapy.errors import NotFound
from tests.api.connection import Client, client_of, connected, request_bytes, served
from tests.trio_tests import trio_test

HEAD_101 = (
    b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\n"
    b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
)
HEAD_200 = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n"
UPGRADE = {"Connection": "Upgrade", "Upgrade": "tcp"}
BOTH_FORMS = pytest.mark.parametrize(("headers", "head"), [(UPGRADE, HEAD_101), ({}, HEAD_200)], ids=["101", "200"])


async def echo(stream: trio.abc.HalfCloseableStream) -> None:
    """Upper-case what comes, and a last word after the end of input."""
    async for data in stream:
        await stream.send_all(data.upper())
    await stream.send_all(b"late")


def application() -> App:
    app = App()

    async def ping(request: Request) -> Answer:
        return text_response("OK")

    async def attach(request: Request) -> Answer:
        return Hijack(echo, upgrade="Upgrade" in request.headers)

    async def exec_start(request: Request) -> Answer:
        body = await json_body(request)

        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            await stream.send_all(f"tty={body['Tty']} ".encode())
            await echo(stream)

        return Hijack(serve, upgrade="Upgrade" in request.headers, engine_headers=True)

    async def missing(request: Request) -> Answer:
        raise NotFound("No such container: x")

    async def refused(request: Request) -> Answer:
        return Hijack.refused(409, "Container x is paused")

    route(app, "GET", "/_ping", ping)
    route(app, "POST", "/attach", attach)
    route(app, "POST", "/exec", exec_start)
    route(app, "POST", "/missing", missing)
    route(app, "POST", "/refused", refused)
    return app


@BOTH_FORMS
@trio_test(autojump=True)
async def test_head_is_exact_and_comes_before_any_output(headers: dict[str, str], head: bytes) -> None:
    async with connected(application()) as client:
        await client.send(request_bytes("POST", "/attach", **headers))

        assert await client.receive_exactly(len(head)) == head


@BOTH_FORMS
@trio_test(autojump=True)
async def test_bytes_go_both_ways(headers: dict[str, str], head: bytes) -> None:
    async with connected(application()) as client:
        await client.send(request_bytes("POST", "/attach", **headers))
        await client.receive_exactly(len(head))
        await client.send(b"one")
        assert await client.receive_exactly(3) == b"ONE"
        await client.send(b"two")
        assert await client.receive_exactly(3) == b"TWO"


@BOTH_FORMS
@trio_test(autojump=True)
async def test_stdin_in_the_packet_of_the_head_is_not_lost(headers: dict[str, str], head: bytes) -> None:
    async with connected(application()) as client:
        await client.send(request_bytes("POST", "/attach", **headers) + b"early")

        assert await client.receive_exactly(len(head) + 5) == head + b"EARLY"


@BOTH_FORMS
@trio_test(autojump=True)
async def test_half_closed_stdin_still_delivers_output(headers: dict[str, str], head: bytes) -> None:
    async with connected(application()) as client:
        await client.send(request_bytes("POST", "/attach", **headers))
        await client.receive_exactly(len(head))
        await client.send(b"in")
        await client.stream.send_eof()

        assert await client.receive_to_end() == b"INlate"


@trio_test(autojump=True)
async def test_half_close_before_the_answer_is_the_end_of_stdin() -> None:
    async with connected(application()) as client:
        await client.send(request_bytes("POST", "/attach", **UPGRADE) + b"all")
        await client.stream.send_eof()

        assert await client.receive_to_end() == HEAD_101 + b"ALLlate"


@BOTH_FORMS
@trio_test
async def test_over_a_real_socket_too(tmp_path: Path, headers: dict[str, str], head: bytes) -> None:
    async with served(application(), tmp_path) as path, client_of(path) as client:
        await client.send(request_bytes("POST", "/attach", **headers) + b"a")
        await client.receive_exactly(len(head) + 1)
        await client.send(b"b" * 300_000)
        assert await client.receive_exactly(300_000) == b"B" * 300_000
        await client.stream.send_eof()
        assert await client.receive_to_end() == b"late"


@pytest.mark.parametrize("chunked", [False, True])
@trio_test(autojump=True)
async def test_exec_start_reads_its_json_and_then_goes_raw(chunked: bool) -> None:
    body = b'{"Detach":false,"Tty":true}'
    headers = {**UPGRADE, "Content_Type": "application/json"}
    if chunked:
        request = request_bytes("POST", "/exec", Transfer_Encoding="chunked", **headers)
        request = request.replace(b"Content-Length: 0\r\n", b"")
        request += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        request = request_bytes("POST", "/exec", body, **headers)
    async with connected(application()) as client:
        await client.send(request + b"stdin")
        head = await client.head()
        assert (head.status, head.reason) == (101, "UPGRADED")
        assert await client.receive_exactly(14) == b"tty=True STDIN"


@pytest.mark.parametrize(("upgrade", "name"), [(True, "exec_start_upgrade"), (False, "exec_start_plain")])
@trio_test(autojump=True)
async def test_exec_start_head_carries_the_engine_headers_behind(
    upgrade: bool, name: str, http_heads: dict[str, list[str]]
) -> None:
    expected = [line.partition(":")[0] for line in http_heads[name]]
    async with connected(application()) as client:
        headers = {"Content_Type": "application/json", **(UPGRADE if upgrade else {})}
        await client.send(request_bytes("POST", "/exec", b'{"Tty":false}', **headers))
        head = await client.head()
        assert [f"HTTP/1.1 {head.status} {head.reason}", *head.names] == expected


@trio_test(autojump=True)
async def test_refused_attach_is_plain_text_and_closes() -> None:
    async with connected(application()) as client:
        await client.send(request_bytes("POST", "/refused", **UPGRADE))

        assert await client.receive_to_end() == (
            b"HTTP/1.1 409 Conflict\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\nContainer x is paused\r\n"
        )


@trio_test(autojump=True)
async def test_connection_is_usable_after_an_error_answer_to_an_upgrade() -> None:
    async with connected(application()) as client:
        for _ in range(3):
            answer = await client.request("POST", "/missing", **UPGRADE)
            assert (answer.status, answer.json) == (404, {"message": "No such container: x"})
        assert (await client.request("GET", "/_ping")).body == b"OK"
        await client.send(request_bytes("POST", "/attach", **UPGRADE))
        assert await client.receive_exactly(len(HEAD_101)) == HEAD_101


@trio_test(autojump=True)
async def test_h2c_is_not_spoken() -> None:
    async with connected(application()) as client:
        answer = await client.request("POST", "/session", Connection="Upgrade, HTTP2-Settings", Upgrade="h2c")
        assert (answer.status, answer.json) == (404, {"message": "page not found"})
        answer = await client.request("GET", "/_ping", Connection="Upgrade", Upgrade="h2c")
        assert (answer.status, answer.body) == (200, b"OK")
    async with connected(application()) as client:
        await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert (await client.head()).status == 505


@trio_test(autojump=True)
async def test_output_may_end_while_the_client_still_sends() -> None:
    app = App()

    async def handler(request: Request) -> Answer:
        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            await stream.send_all(b"done")

        return Hijack(serve, upgrade=True)

    route(app, "POST", "/x", handler)
    async with connected(app) as client:
        await client.send(request_bytes("POST", "/x", **UPGRADE))
        await client.send(b"nobody reads this" * 100)
        assert await client.receive_to_end() == HEAD_101 + b"done"


@trio_test(autojump=True)
async def test_send_eof_half_closes_our_side() -> None:
    app = App()
    got: list[bytes] = []

    async def handler(request: Request) -> Answer:
        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            await stream.send_all(b"out")
            await stream.send_eof()
            got.append(await stream.receive_some(3))
            got.append(await stream.receive_some())

        return Hijack(serve)

    route(app, "POST", "/x", handler)
    async with connected(app) as client:
        await client.send(request_bytes("POST", "/x"))
        assert await client.receive_to_end() == HEAD_200 + b"out"
        await client.send(b"still heard")
        await trio.testing.wait_all_tasks_blocked()
        assert got == [b"sti", b"ll heard"]


@trio_test(autojump=True)
async def test_an_error_in_serve_closes_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = App()

    async def handler(request: Request) -> Answer:
        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            raise ValueError("bug")

        return Hijack(serve, upgrade=True)

    route(app, "POST", "/x", handler)
    with caplog.at_level(logging.ERROR):
        async with connected(app) as client:
            await client.send(request_bytes("POST", "/x", **UPGRADE))
            assert await client.receive_to_end() == HEAD_101
    assert "raw stream failed" in caplog.text


# --- clients that leave, dawdle or send too much ----------------------------------------------------------------


class Watched:
    """A handler that waits for ever and tells how that ended."""

    def __init__(self) -> None:
        self.started, self.cancelled = trio.Event(), trio.Event()

    async def wait(self) -> None:
        self.started.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled.set()
            raise


def watched_application(watched: Watched) -> App:
    app = application()

    async def waits(request: Request) -> Answer:
        await watched.wait()
        return empty_response()

    async def streams(request: Request) -> Answer:
        async def produce(write: BodyWriter) -> None:
            await write(b"first")
            await watched.wait()

        return stream_response(produce)

    async def floods(request: Request) -> Answer:
        async def produce(write: BodyWriter) -> None:
            watched.started.set()
            try:
                while True:
                    await write(b"x" * 100_000)
            except trio.Cancelled:
                watched.cancelled.set()
                raise

        return stream_response(produce)

    async def raw(request: Request) -> Answer:
        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            watched.started.set()
            try:
                while True:
                    await stream.send_all(b"x" * 100_000)
            except trio.Cancelled:
                watched.cancelled.set()
                raise

        return Hijack(serve, upgrade=True)

    for method in ("GET", "POST"):
        route(app, method, "/waits", waits)
        route(app, method, "/streams", streams)
        route(app, method, "/floods", floods)
    route(app, "POST", "/raw", raw)
    return app


@pytest.mark.parametrize("path", ["/waits", "/streams", "/floods"])
@pytest.mark.parametrize("body", [b"", b"x" * 300_000])
@trio_test
async def test_handler_is_cancelled_when_its_client_leaves(tmp_path: Path, path: str, body: bytes) -> None:
    watched = Watched()
    async with served(watched_application(watched), tmp_path) as socket_path:
        async with client_of(socket_path) as client:
            await client.send(request_bytes("POST", path, body[:100_000], Content_Length=str(len(body))))
            await watched.started.wait()
        with trio.fail_after(1):
            await watched.cancelled.wait()


@trio_test
async def test_serve_is_cancelled_when_the_connection_breaks(tmp_path: Path) -> None:
    watched = Watched()
    async with served(watched_application(watched), tmp_path) as path:
        async with client_of(path) as client:
            await client.send(request_bytes("POST", "/raw", **UPGRADE))
            await watched.started.wait()
        with trio.fail_after(1):
            await watched.cancelled.wait()


@pytest.mark.parametrize("request_line", [("GET", "/floods", {}), ("POST", "/raw", UPGRADE)])
@trio_test
async def test_shutdown_does_not_wait_for_a_client_that_stopped_reading(
    tmp_path: Path, request_line: tuple[str, str, dict[str, str]]
) -> None:
    method, target, headers = request_line
    watched = Watched()
    with trio.fail_after(2):
        async with served(watched_application(watched), tmp_path) as path:
            client = Client(await trio.open_unix_socket(path))
            await client.send(request_bytes(method, target, **headers))
            await watched.started.wait()
            await trio.sleep(0.05)  # until the socket's buffers are full
        await client.stream.aclose()


@trio_test
async def test_no_descriptor_is_left(tmp_path: Path) -> None:
    watched = Watched()
    before = len(os.listdir("/proc/self/fd"))
    async with served(watched_application(watched), tmp_path) as path:
        clients = [Client(await trio.open_unix_socket(path)) for _ in range(10)]
        for client, target in zip(clients, ["/_ping", "/waits", "/floods", "/nothing", "/streams"] * 2, strict=True):
            await client.send(request_bytes("GET", target))
        await trio.sleep(0.05)
        for client in clients[:5]:
            await client.stream.aclose()
    for client in clients[5:]:
        await client.stream.aclose()
    assert len(os.listdir("/proc/self/fd")) == before


@trio_test
async def test_early_answer_to_a_big_upload_reaches_the_client(tmp_path: Path) -> None:
    async with served(application(), tmp_path) as path:
        for _ in range(3):
            async with client_of(path) as client, trio.open_nursery() as nursery:

                async def upload(client: Client = client) -> None:
                    try:
                        await client.send(request_bytes("POST", "/missing", Content_Length=str(50 << 20)))
                        for _ in range(50):
                            await client.send(b"x" * (1 << 20))
                    except trio.BrokenResourceError:
                        pass

                nursery.start_soon(upload)
                with trio.fail_after(5):
                    answer = await client.answer()
                assert (answer.status, answer.headers["Connection"]) == (404, "close")
                await client.receive_to_end()
        await trio.sleep(0.05)
        assert trio.lowlevel.current_statistics().tasks_living < 20


@trio_test(autojump=True)
async def test_connection_survives_a_small_unread_body() -> None:
    async with connected(application()) as client:
        answer = await client.request("POST", "/missing", b"x" * 10_000)
        assert answer.status == 404
        assert "Connection" not in answer.headers
        assert (await client.request("GET", "/_ping")).status == 200


@trio_test
async def test_upload_waits_for_its_reader(tmp_path: Path) -> None:
    """Nothing is piled up: as long as the handler does not read, the client's send blocks."""
    app, go_on, sent = App(), trio.Event(), 0
    total = 30 << 20

    async def load(request: Request) -> Answer:
        await go_on.wait()
        length = 0
        async for chunk in request.body:
            length += len(chunk)
        return json_response(length)

    route(app, "POST", "/load", load)
    async with served(app, tmp_path) as path, client_of(path) as client, trio.open_nursery() as nursery:

        async def upload() -> None:
            nonlocal sent
            await client.send(request_bytes("POST", "/load", Content_Length=str(total)))
            for _ in range(total >> 16):
                await client.send(b"x" * (1 << 16))
                sent += 1 << 16

        nursery.start_soon(upload)
        await trio.sleep(0.1)
        assert sent < 4 << 20
        go_on.set()
        assert (await client.answer()).json == total


@trio_test(autojump=True)
async def test_a_bad_connection_ends_alone() -> None:
    app = application()
    async with connected(app) as good:
        for garbage in (b"\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET  / x\r\n\r\n", b"x" * (2 << 20)):
            async with connected(app) as bad:
                await bad.send(garbage)
                head = await bad.head()
                assert (head.status, head.reason) in [(400, "Bad Request"), (431, "Request Header Fields Too Large")]
                await bad.receive_to_end()
        assert (await good.request("GET", "/_ping")).status == 200


@trio_test(autojump=True)
async def test_pipelined_requests_are_answered_in_order() -> None:
    async with connected(application()) as client:
        await client.send(request_bytes("GET", "/_ping") + request_bytes("GET", "/no") + request_bytes("GET", "/_ping"))
        assert [(await client.answer()).status for _ in range(3)] == [200, 404, 200]


@trio_test(autojump=True)
async def test_raw_stream_cuts_to_the_size_asked_for() -> None:
    sent: list[object] = []

    async def send(message: object) -> None:
        sent.append(message)

    stream = RawStream(send)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.feed, b"abcdef")
        assert [await stream.receive_some(4), await stream.receive_some(4)] == [b"abcd", b"ef"]
        nursery.start_soon(stream.feed, b"")
        assert [await stream.receive_some(), await stream.receive_some()] == [b"", b""]
    await stream.aclose()
    await stream.feed(b"nobody is there")
