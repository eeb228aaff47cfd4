"""What we rely on in conmon and the runtime, against the real ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from balenapy.linux import conmon
from balenapy.linux.conmon import STDERR, STDOUT, AttachSocket, RuntimeRefused
from tests.real_container import RealContainer, real_container
from tests.trio_tests import trio_test

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces and cgroups"),
]


async def _read_all(attached: AttachSocket) -> dict[int, bytes]:
    found = {STDOUT: b"", STDERR: b""}
    while True:
        stream, data = await attached.receive()
        if not data:
            attached.close()
            return found
        found[stream] += data


async def _start(container: RealContainer, *, keep_stdin: bool = False) -> AttachSocket:
    await container.create(keep_stdin=keep_stdin)
    attached = await AttachSocket.connect(container.bundle)
    await container.runtime.start(container.cid)
    return attached


@trio_test
async def test_output_exit_code_and_log_arrive(tmp_path: Path) -> None:
    with real_container(tmp_path, ["sh", "-c", "echo out; echo err >&2; printf part; exit 7"]) as container:
        attached = await _start(container)
        output = await _read_all(attached)
        code = await container.wait()

        assert output == {STDOUT: b"out\npart", STDERR: b"err\n"}
        assert code == 7
        text = container.bundle.spool.read_bytes()
        assert b" stdout F out\n" in text
        assert b" stderr F err\n" in text
        assert b" stdout P part\n" in text


@trio_test
async def test_what_is_written_before_start_is_read_by_the_process_and_half_close_ends_its_input(
    tmp_path: Path,
) -> None:
    data = os.urandom(200_000)
    with real_container(tmp_path, ["sh", "-c", "cat; echo late"]) as container:
        attached = await _start(container)
        output: dict[int, bytes] = {}
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                output.update(await _read_all(attached))

            nursery.start_soon(read)
            await attached.send(data)
            attached.send_eof()

        assert output[STDOUT] == data + b"late\n"
        assert await container.wait() == 0


@trio_test
async def test_a_terminal_has_the_size_it_was_given_and_keeps_its_input_open(tmp_path: Path) -> None:
    with real_container(tmp_path, ["sh", "-c", "stty size; cat"], tty=True) as container:
        await container.create(keep_stdin=True)
        assert conmon.resize(container.bundle, 33, 101)
        attached = await AttachSocket.connect(container.bundle)
        await container.runtime.start(container.cid)
        assert await attached.receive() == (STDOUT, b"33 101\r\n")
        attached.close()  # the client leaves, the shell stays

        again = await AttachSocket.connect(container.bundle)
        await again.send(b"hi\n\x04")
        assert (await _read_all(again))[STDOUT] == b"hi\r\nhi\r\n"
        assert await container.wait() == 0
        assert not conmon.resize(container.bundle, 24, 80)


@trio_test
async def test_a_runtime_that_refuses_says_why(tmp_path: Path) -> None:
    with real_container(tmp_path, ["nosuch"]) as container:
        with pytest.raises(RuntimeRefused) as caught:
            await container.create()

        assert 'exec: "nosuch": executable file not found in $PATH' in caught.value.message
        await container.runtime.delete(container.cid)


@trio_test
async def test_paths_too_long_for_a_socket_address_or_with_a_colon_work(tmp_path: Path) -> None:
    directory = "a:b/" + "/".join(["long" * 10] * 4)
    with real_container(tmp_path, ["sh", "-c", "echo x; tty"], tty=True, directory=directory) as container:
        attached = await _start(container)

        assert (await _read_all(attached))[STDOUT] == b"x\r\n/dev/pts/0\r\n"
        assert await container.wait() == 0
        assert container.bundle.spool.exists()


@trio_test
async def test_delete_leaves_neither_state_nor_cgroup_and_can_be_repeated(tmp_path: Path) -> None:
    with real_container(tmp_path, ["true"]) as container:
        (await _start(container)).close()
        await container.wait()
        assert container.cgroup.exists()

        await container.runtime.delete(container.cid, container.cgroup)
        await container.runtime.delete(container.cid, container.cgroup)
        await container.runtime.delete(container.cid)

        assert not container.cgroup.exists()
        assert not (container.runtime.root / container.cid).exists()


@trio_test
async def test_delete_kills_what_still_runs(tmp_path: Path) -> None:
    with real_container(tmp_path, ["sleep", "1000"]) as container:
        (await _start(container)).close()
        assert len(container.cgroup.pids()) == 1

        await container.runtime.delete(container.cid)

        assert await container.wait() == 137
        assert not container.cgroup.exists()


@trio_test
async def test_a_full_spool_begins_anew_and_the_old_one_can_be_read_to_its_end(tmp_path: Path) -> None:
    script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; read x"
    with real_container(tmp_path, ["sh", "-c", script]) as container:
        await container.create(log=["--log-path", "k8s-file:log", "--log-size-max", "60000"])
        attached = await AttachSocket.connect(container.bundle)
        old = os.open(container.bundle.spool, os.O_RDONLY)
        await container.runtime.start(container.cid)
        seen = b""
        while not seen.endswith(b"line 1999\n"):
            seen += (await attached.receive())[1]
        try:
            assert os.fstat(old).st_nlink == 0
            first = os.read(old, 1 << 20)
            assert 50_000 < len(first) <= 60_000
            assert first.endswith(b"\n")
        finally:
            os.close(old)
        attached.send_eof()
        assert await container.wait() == 1
        attached.close()


@trio_test
async def test_an_oom_kill_is_counted_and_leaves_its_mark(tmp_path: Path) -> None:
    script = "head -c 64000000 /dev/zero | wc -c; dd if=/dev/zero of=/dev/null bs=64M count=1; echo $?"
    with real_container(tmp_path, ["sh", "-c", script], memory_bytes=20_000_000) as container:
        attached = await _start(container)
        output = await _read_all(attached)
        await container.wait()

        assert b"137" in output[STDOUT]
        assert container.cgroup.oom_kills() == 1
        assert container.bundle.oom.exists()


@trio_test
async def test_pause_stops_and_resume_goes_on(tmp_path: Path) -> None:
    with real_container(tmp_path, ["sleep", "1000"]) as container:
        (await _start(container)).close()

        await container.runtime.pause(container.cid)
        assert "FROZEN" in container.cgroup.read("freezer", "freezer.state") or "1" in container.cgroup.read(
            "pids", "cgroup.freeze"
        )
        await container.runtime.resume(container.cid)
        await container.runtime.update(container.cid, {"memory": {"limit": 50_000_000}})
        assert 49_000_000 < container.cgroup.read_number("memory", "memory.limit_in_bytes") <= 50_000_000


def test_sync_lines_of_any_form_are_understood() -> None:
    assert conmon.parse_sync(b'{"data": 42}\n') == (42, "")
    assert conmon.parse_sync(b'{"data": -1, "message": "a\\u001bb"}\n') == (-1, "a\x1bb")
    assert conmon.parse_sync(b"nonsense") == (-1, "nonsense")
    assert conmon.parse_sync(b"[]") == (-1, "[]")


def test_the_last_error_of_a_runtime_is_its_message() -> None:
    lines = '{"level":"warning","msg":"a"}\n{"level":"error","msg":"b"}\nplain'
    assert conmon.runtime_message(lines) == "b"
    assert conmon.runtime_message("plain words\n") == "plain words"
