"""WebSocket attach, from the handshake to the goodbye."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Ping, Pong, Request, TextMessage

from balenapy.api import app as api
from balenapy.api.app import Answer, App, route
from balenapy.api.websocket import websocket
from balenapy.errors import NotFound
from tests.api.connection import Client, connected
from tests.trio_tests import trio_test

HANDSHAKE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec_WebSocket_Version": "13",
}


def application() -> App:
    app = App()

    async def attach(request: api.Request, name: str) -> Answer:
        if name != "x":
            raise NotFound(f"No such container: {name}")

        async def serve(stream: trio.abc.HalfCloseableStream) -> None:
            async for data in stream:
                await stream.send_all(data.upper())
                if data == b"quit":
                    return

        return websocket(request, serve)

    route(app, "GET", "/containers/<path:name>/attach/ws", attach)
    return app


async def next_events(client: Client, peer: WSConnection) -> list[object]:
    peer.receive_data(await client.stream.receive_some(1 << 16) or None)
    return list(peer.events())


async def opened(client: Client) -> WSConnection:
    peer = WSConnection(ConnectionType.CLIENT)
    await client.send(peer.send(Request(host="docker", target="/v1.39/containers/x/attach/ws?stream=1")))
    (accepted,) = await next_events(client, peer)
    assert isinstance(accepted, AcceptConnection)
    return peer


@trio_test(autojump=True)
async def test_handshake_is_exact() -> None:
    async with connected(application()) as client:
        answer = await client.request("GET", "/containers/x/attach/ws", **HANDSHAKE)
    assert (answer.status, answer.reason) == (101, "Switching Protocols")
    assert answer.fields == [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
    ]


@pytest.mark.parametrize("kind", [TextMessage, BytesMessage])
@trio_test(autojump=True)
async def test_either_frame_in_binary_frames_out(kind: type) -> None:
    async with connected(application()) as client:
        peer = await opened(client)
        await client.send(peer.send(kind(data="hi" if kind is TextMessage else b"hi")))
        assert await next_events(client, peer) == [BytesMessage(data=b"HI")]
        await client.send(peer.send(Ping(payload=b"1")))
        assert await next_events(client, peer) == [Pong(payload=b"1")]


@trio_test(autojump=True)
async def test_frames_cut_anywhere_arrive_whole() -> None:
    async with connected(application()) as client:
        peer = await opened(client)
        for byte in peer.send(BytesMessage(data=b"slow")):
            await client.send(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
        got = b""
        while got != b"SLOW":
            for event in await next_events(client, peer):
                assert isinstance(event, BytesMessage)
                got += event.data


@trio_test(autojump=True)
async def test_end_of_output_says_goodbye_and_closes() -> None:
    async with connected(application()) as client:
        peer = await opened(client)
        await client.send(peer.send(BytesMessage(data=b"quit")))
        events = await next_events(client, peer)
        while len(events) < 2:
            events += await next_events(client, peer)
        assert events == [BytesMessage(data=b"QUIT"), CloseConnection(code=1000, reason="")]
        assert await client.receive_to_end() == b""


@trio_test(autojump=True)
async def test_clients_goodbye_is_the_end_of_input() -> None:
    async with connected(application()) as client:
        peer = await opened(client)
        await client.send(peer.send(CloseConnection(code=1000)))
        assert await next_events(client, peer) == [CloseConnection(code=1000, reason="")]
        assert await client.receive_to_end() == b""


@trio_test(autojump=True)
async def test_errors_before_the_upgrade() -> None:
    async with connected(application()) as client:
        answer = await client.request("GET", "/containers/y/attach/ws", **HANDSHAKE)
        assert (answer.status, answer.json) == (404, {"message": "No such container: y"})
        await client.send(b"GET /containers/x/attach/ws HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await client.receive_to_end() == b"HTTP/1.1 400 Bad Request\r\n\r\nnot websocket protocol"
