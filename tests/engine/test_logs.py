"""Logs of real containers."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import trio

from balenapy.config import Config
from balenapy.core.conmonlog import STDOUT, LogPart, format_line
from balenapy.core.container import Container
from balenapy.core.logview import LogOptions
from balenapy.core.ringlog import Ring
from balenapy.engine.logs import RingReader, ring_size
from balenapy.errors import InvalidParameter, SystemFailure, Unsupported
from balenapy.linux import durable
from balenapy.stores.ringfile import SpoolDrain
from tests.engine.process_rig import Rig, frames, open_rig
from tests.trio_tests import trio_test

pytestmark = pytest.mark.root


async def _finished(rig: Rig, *command: str, **body: object) -> Container:
    container = await rig.run(*command, **body)
    await rig.wait(container)
    await rig.settled(container)
    return container


@trio_test
async def test_tail_since_until_and_streams_choose(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await _finished(rig, "sh", "-c", "for i in 1 2 3 4 5 6; do echo $i; sleep 0.02; done; echo e >&2")

        assert frames(await rig.output(container)) == {1: b"1\n2\n3\n4\n5\n6\n", 2: b"e\n"}
        assert frames(await rig.output(container, stderr=False)) == {1: b"1\n2\n3\n4\n5\n6\n"}
        assert frames(await rig.output(container, tail=3)) == {1: b"5\n6\n", 2: b"e\n"}
        assert frames(await rig.output(container, tail=3, stdout=False)) == {2: b"e\n"}
        assert await rig.output(container, tail=0) == b""
        stamped = frames(await rig.output(container, timestamps=True, stderr=False))[1].splitlines()
        assert all(re.fullmatch(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z \d", line) for line in stamped)
        third = _parse(stamped[2])
        assert frames(await rig.output(container, since_ns=third)) == {1: b"3\n4\n5\n6\n", 2: b"e\n"}
        assert frames(await rig.output(container, until_ns=third)) == {1: b"1\n2\n3\n"}
        assert frames(await rig.output(container, since_ns=third, until_ns=third)) == {1: b"3\n"}


def _parse(line: bytes) -> int:
    from balenapy.core.conmonlog import parse_time

    found = parse_time(line[:29] + b"+00:00")
    assert found is not None
    return found


@trio_test
async def test_long_lines_are_cut_and_a_last_line_without_end_is_kept(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        script = "head -c 40000 /dev/zero | tr '\\0' x; echo; printf last"
        container = await _finished(rig, "sh", "-c", script)
        text = frames(await rig.output(container))[1]

        assert text == b"x" * 40000 + b"\nlast"
        assert frames(await rig.output(container, tail=1)) == {1: b"last"}
        assert len(frames(await rig.output(container, tail=2))[1]) == 40000 - 32768 + 1 + 4


@trio_test
async def test_binary_output_comes_back_as_it_was(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await _finished(rig, "head", "-c", "100000", "/bin/busybox")

        expected = Path("/usr/bin/busybox").read_bytes()[:100000]  # noqa: ASYNC240
        assert frames(await rig.output(container))[1] == expected


@trio_test
async def test_a_terminal_has_no_frames(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await _finished(rig, "echo", "hi", Tty=True)

        assert await rig.output(container) == b"hi\r\n"


@trio_test
async def test_since_the_start_shows_all_of_the_run(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await _finished(rig, "echo", "at once")
        output = await rig.output(container, since_ns=container.state.started_ns)
        assert frames(output) == {1: b"at once\n"}


@trio_test
async def test_details_show_labels_and_variables_by_name(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        options = {"labels": "b,missing", "env": "A", "env-regex": "^D", "tag": "{{.Name}}/{{ .ID }}"}
        config = {"Type": "json-file", "Config": options}
        container = await _finished(
            rig, "echo", "x", Env=["A=1 2", "C=3", "D2=4"], Labels={"b": "x&y"}, HostConfig={"LogConfig": config}
        )

        tag = f"{container.name}%2F{container.short_id}"
        expected = {1: f"A=1+2,D2=4,b=x%26y,tag={tag} x\n".encode()}
        assert frames(await rig.output(container, details=True)) == expected
        plain = await _finished(rig, "echo", "x")
        assert frames(await rig.output(plain, details=True)) == {1: b" x\n"}


@trio_test
async def test_following_sees_lines_as_they_come_and_ends_with_the_run(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        script = "echo one; while read x; do echo $x; done"
        container = await rig.run("sh", "-c", script, OpenStdin=True, StdinOnce=True)
        send, receive = trio.open_memory_channel[bytes](0)
        from tests.engine.test_attach import attached

        async def follow() -> None:
            async with send:
                await rig.logs.read(container, LogOptions(follow=True), send.send)

        async with trio.open_nursery() as nursery, attached(rig, container) as client:
            nursery.start_soon(follow)
            with trio.fail_after(10):
                assert frames(await receive.receive()) == {1: b"one\n"}
                started = trio.current_time()
                await client.send_all(b"two\n")
                assert frames(await receive.receive()) == {1: b"two\n"}
                assert trio.current_time() - started < 0.5
                await client.send_eof()
                assert [chunk async for chunk in receive] == []
        assert not rig.logs._running


@trio_test
async def test_a_slow_follower_does_not_stop_the_container(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await rig.create("seq", "100000")
        blocked = trio.Event()

        async def never(_: bytes) -> None:
            blocked.set()
            await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            await rig.supervisors.start(container)
            nursery.start_soon(rig.logs.read, container, LogOptions(follow=True), never)
            assert await rig.wait(container) == 0
            nursery.cancel_scope.cancel()
        await rig.settled(container)
        assert frames(await rig.output(container, tail=1)) == {1: b"100000\n"}


@trio_test
async def test_nothing_is_lost_of_what_a_ring_can_hold(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        options = {"Type": "json-file", "Config": {"max-size": "8m", "max-file": "2"}}
        container = await _finished(rig, "seq", "200000", HostConfig={"LogConfig": options})

        text = frames(await rig.output(container))[1]
        assert text == b"".join(b"%d\n" % number for number in range(1, 200001))
        size = rig.logs.path(container).stat().st_size
        assert 15 << 20 < size <= 16 << 20


@trio_test
async def test_a_container_without_output_has_no_file(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await _finished(rig, "true")
        assert not rig.logs.path(container).exists()
        assert await rig.output(container) == b""


@trio_test
async def test_drivers_that_cannot_be_read(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        container = await _finished(rig, "echo", "x", HostConfig={"LogConfig": {"Type": "none"}})
        with pytest.raises(Unsupported, match="configured logging driver does not support reading"):
            await rig.output(container)
        container.host_config.log_config.type = "zzz"
        with pytest.raises(SystemFailure, match="no log driver named 'zzz' is registered"):
            await rig.supervisors.start(container)


@trio_test
async def test_an_idle_log_is_drained_in_batches(tmp_path: Path) -> None:
    async with open_rig(tmp_path, log_flush_interval_s=0.1) as rig:
        container = await rig.run("sh", "-c", "echo x; sleep 1000")
        path = rig.logs.path(container)
        with trio.fail_after(30):
            while not path.exists() or rig.logs._running[container.id].drain.waiting_bytes:  # noqa: ASYNC110
                await trio.sleep(0.02)


@trio_test
async def test_a_line_is_durable_within_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut may cost: at most ten seconds, if nothing is said."""
    assert Config().log_flush_interval_s < 10
    durable_at: dict[bytes, float] = {}
    sync_file = durable.sync_file

    def sync(fd: int) -> None:
        sync_file(fd)
        now = time.time()
        if os.readlink(f"/proc/self/fd/{fd}").endswith("ring.log"):
            with open(f"/proc/self/fd/{fd}", "rb") as file:  # what is in the file by now has reached the disk
                for found in set(re.findall(rb"line-\d+", file.read())) - set(durable_at):
                    durable_at[found] = now

    monkeypatch.setattr(durable, "sync_file", sync)
    async with open_rig(tmp_path, log_flush_interval_s=1.0) as rig:
        script = "for i in 1 2 3 4 5 6 7 8; do echo line-$i; sleep 0.3; done; sleep 1000"
        container = await rig.run("sh", "-c", script)
        with trio.fail_after(30):
            while b"line-8" not in durable_at:  # noqa: ASYNC110
                await trio.sleep(0.05)
        lines = frames(await rig.output(container, timestamps=True))[1].splitlines()
    written_at = {line.split()[1]: _parse(line) / 1e9 for line in lines}
    late = [durable_at[name] - moment for name, moment in written_at.items()]
    assert len(late) == 8
    assert max(late) < 1.0 + 2.0  # a machine that is busy with other things
    assert len(set(durable_at.values())) <= 5  # in batches, not one by one


@trio_test
async def test_the_rings_of_all_containers_stay_within_their_budget(tmp_path: Path) -> None:
    async with open_rig(tmp_path, log_budget=3 << 20) as rig:
        sizes = []
        for _ in range(5):
            container = await _finished(rig, "echo", "x")
            assert frames(await rig.output(container)) == {1: b"x\n"}
            sizes.append(rig.logs.path(container).stat().st_size)
        assert [size > 900_000 for size in sizes] == [True, True, True, False, False]
        assert sizes[4] < 80_000


@trio_test
async def test_compressed_logs_hold_several_times_as_much(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        line = 'echo "GET /v1/device/$i/state 200 12ms agent/$((i % 7))"'
        script = f"i=0; while [ $i -lt 90000 ]; do {line}; i=$((i+1)); done"
        found = {}
        for compress in ("false", "true"):
            options = {"Type": "local", "Config": {"compress": compress}}
            container = await _finished(rig, "sh", "-c", script, HostConfig={"LogConfig": options})
            assert rig.logs.path(container).stat().st_size <= 1 << 20
            text = frames(await rig.output(container))[1].splitlines()
            assert text[-1].startswith(b"GET /v1/device/89999/")
            found[compress] = sum(map(len, text))
        print(f"1 MiB holds {found['false']} bytes of lines, compressed {found['true']}")
        assert found["true"] > 2 * found["false"]


def test_sizes_of_log_options() -> None:
    assert ring_size({}) == 1 << 20
    assert ring_size({"max-size": "10m"}) == 10 << 20
    assert ring_size({"max-size": "10m", "max-file": "3"}) == 30 << 20
    assert ring_size({"max-size": "1g", "max-file": "3"}) == 64 << 20
    with pytest.raises(InvalidParameter, match=r"^invalid size: 'zz'$"):
        ring_size({"max-size": "zz"})


def test_what_is_written_while_a_block_is_read_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer fills the block that was just read, and begins the next, before the reader looks for a next one."""
    spool, path = tmp_path / "log", tmp_path / "ring.log"
    spool.touch()
    drain = SpoolDrain(spool, path, 1 << 20, adopt=False)
    written = 0

    def write_more() -> None:
        nonlocal written
        with spool.open("ab") as file:
            for number in range(written + 1, written + 101):
                file.write(format_line(LogPart(10**18 + number, STDOUT, True, b"%050d" % number)))
        written += 100
        while drain.drain_some():
            pass

    read_block = Ring.read_block

    def read_block_and_be_overtaken(ring: Ring, number: int, after: int = 0) -> object:
        records = list(read_block(ring, number, after))
        if written < 2000:
            write_more()
        return records

    monkeypatch.setattr(Ring, "read_block", read_block_and_be_overtaken)
    write_more()
    container = Container(id="1" * 64, name="silent_reader")
    reader = RingReader(path, container, LogOptions(stderr=False, follow=True))
    output = bytearray()
    while data := reader.read_some():
        output += data
    reader.close()
    drain.close()

    assert frames(bytes(output))[1].splitlines() == [b"%050d" % number for number in range(1, written + 1)]
