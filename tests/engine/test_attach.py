"""Attached clients of real containers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from balenapy.core.container import Container, Status
from balenapy.engine import attach
from tests.engine.process_rig import Rig, attach_options, frames, open_rig
from tests.trio_tests import trio_test

pytestmark = pytest.mark.root


@asynccontextmanager
async def attached(rig: Rig, container: Container, **options: Any) -> AsyncIterator[trio.StapledStream]:
    """The client's side of an attach."""
    ours, theirs = trio.testing.memory_stream_pair()
    wanted = attach_options(container, **options)

    async def serve() -> None:
        await rig.supervisors.attachments.serve(container, wanted, theirs)
        await theirs.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await trio.testing.wait_all_tasks_blocked(0.01)
        with trio.fail_after(20):
            yield ours
        nursery.cancel_scope.cancel()


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    with trio.fail_after(20):
        return b"".join([bytes(chunk) async for chunk in stream])


async def read_until(stream: trio.abc.ReceiveStream, text: bytes) -> bytes:
    found = b""
    with trio.fail_after(20):
        while text not in found:
            found += await stream.receive_some()
    return found


@trio_test
async def test_attached_before_the_start_no_byte_is_lost(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sh", "-c", "seq 20000; echo err >&2")
        async with attached(rig, container) as client:
            await rig.supervisors.start(container)
            found = frames(await read_all(client))

        assert found[1] == b"".join(b"%d\n" % number for number in range(1, 20001))
        assert found[2] == b"err\n"
        assert "attach" in rig.actions


@trio_test
async def test_piped_stdin_ends_and_late_output_still_comes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 2000
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sh", "-c", "cat; echo end", OpenStdin=True, StdinOnce=True)
        async with attached(rig, container) as client:
            await rig.supervisors.start(container)
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await client.send_all(data)
                    await client.send_eof()

                nursery.start_soon(send)
                found = frames(await read_all(client))

        assert found == {1: data + b"end\n"}
        assert container.state.exit_code == 0


@trio_test
async def test_the_end_of_input_ends_an_attach_whose_stdin_is_to_stay_open(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("cat", OpenStdin=True)
        async with attached(rig, container) as client:
            await client.send_all(b"one\n")
            await read_until(client, b"one\n")
            await client.send_eof()
            assert await read_all(client) == b""
        async with attached(rig, container) as client:
            await client.send_all(b"two\n")
            assert frames(await read_until(client, b"two\n")) == {1: b"two\n"}
        assert container.state.status is Status.RUNNING


@trio_test
async def test_a_terminal_is_raw_and_its_detach_keys_leave_it_running(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sh", "-c", "stty -echo; cat", Tty=True, OpenStdin=True, StdinOnce=True)
        await trio.sleep(0.1)
        async with attached(rig, container, detach_keys=b"\x10\x11") as client:
            await client.send_all(b"hello\n")
            assert await read_until(client, b"hello\r\n") == b"hello\r\n"
            await client.send_all(b"\x10")
            await client.send_all(b"\x11")
            assert await read_all(client) == b""
        assert "detach" in rig.actions
        assert container.state.status is Status.RUNNING
        async with attached(rig, container, detach_keys=b"\x10\x11") as client:
            await client.send_all(b"\x04")
            await read_all(client)
        assert await rig.wait(container) == 0


@trio_test
async def test_resize_reaches_the_terminal(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sh", "-c", "read x; stty size", Tty=True, OpenStdin=True)
        async with attached(rig, container) as client:
            rig.supervisors.resize(container, 33, 111)
            await trio.sleep(0.1)
            await client.send_all(b"\n")
            assert b"33 111" in await read_all(client)
        event = rig.event("resize")
        assert (event.attributes["height"], event.attributes["width"]) == ("33", "111")


@trio_test
async def test_the_last_of_quick_sizes_holds(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sh", "-c", "read x; stty size", Tty=True, OpenStdin=True)
        async with attached(rig, container) as client:
            for size in ((34, 112), (33, 111), (32, 110)):
                rig.supervisors.resize(container, *size)
            await trio.sleep(0.3)
            await client.send_all(b"\n")
            assert b"32 110" in await read_all(client)


@trio_test
async def test_every_client_gets_what_it_asked_for(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("sh", "-c", "echo out; echo err >&2")
        async with (
            attached(rig, container, stdin=False, stderr=False) as first,
            attached(rig, container, stdin=False, stdout=False) as second,
        ):
            await rig.supervisors.start(container)
            assert frames(await read_all(first)) == {1: b"out\n"}
            assert frames(await read_all(second)) == {2: b"err\n"}


@trio_test
async def test_a_second_client_does_not_close_stdin_of_the_first(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("cat", OpenStdin=True, StdinOnce=True)
        async with attached(rig, container) as first:
            async with attached(rig, container, stdin=False) as second:
                await first.send_all(b"a\n")
                await read_until(second, b"a\n")
            await first.send_all(b"b\n")
            await read_until(first, b"b\n")
            await first.send_eof()
            await read_all(first)
        assert await rig.wait(container) == 0


@trio_test
async def test_logs_come_first_when_asked_for(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sh", "-c", "echo before; read x; echo after", OpenStdin=True, StdinOnce=True)
        await trio.sleep(0.1)
        async with attached(rig, container, logs=True) as client:
            await read_until(client, b"before\n")
            await client.send_all(b"\n")
            assert frames(await read_all(client)) == {1: b"after\n"}
        async with attached(rig, container, logs=True, stream=False) as client:
            assert frames(await read_all(client)) == {1: b"before\nafter\n"}


@trio_test
async def test_an_attach_without_streams_ends_at_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("sleep", "1000")
        async with attached(rig, container, stdin=False, stdout=False, stderr=False) as client:
            assert await read_all(client) == b""


@trio_test
async def test_an_attach_to_a_stopped_container_waits_for_the_next_run(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.run("echo", "again")
        await rig.wait(container)
        await rig.settled(container)
        async with attached(rig, container, stdin=False) as client:
            await rig.supervisors.start(container)
            assert frames(await read_all(client)) == {1: b"again\n"}


@trio_test
async def test_a_client_that_does_not_read_is_cut_off_and_the_container_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "STALL_S", 0.1)
    monkeypatch.setattr(attach, "QUEUE_MAX_BYTES", 10_000)
    async with open_rig(tmp_path) as rig:
        container = await rig.create("seq", "100000")
        client = attach.Client(attach_options(container))
        hub = await rig.supervisors.attachments._join(container, client)  # nobody sends what is queued
        async with attached(rig, container) as reader:
            await rig.supervisors.start(container)
            found = frames(await read_all(reader))

        assert found[1].endswith(b"100000\n")
        assert client.ended
        assert await rig.wait(container) == 0
        rig.supervisors.attachments._leave(container, hub, client)


@trio_test
async def test_a_failed_start_ends_the_attach(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("nosuch")
        async with attached(rig, container) as client:
            with pytest.raises(Exception, match="executable file not found"):
                await rig.supervisors.start(container)
            assert await read_all(client) == b""
