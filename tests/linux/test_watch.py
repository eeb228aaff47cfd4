from __future__ import annotations

from pathlib import Path

import trio

from balenapy.linux.watch import DirectoryWatcher
from tests.trio_tests import trio_test


@trio_test
async def test_writing_making_and_replacing_a_file_are_told_and_nothing_after_unwatch(tmp_path: Path) -> None:
    watcher = DirectoryWatcher()
    seen: list[str] = []
    send, receive = trio.open_memory_channel[str](100)
    number = watcher.watch(tmp_path, send.send_nowait)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watcher.serve)
        with trio.fail_after(5):
            (tmp_path / "log").write_bytes(b"x")
            seen.append(await receive.receive())
            (tmp_path / "log.tmp").write_bytes(b"x")
            (tmp_path / "log.tmp").rename(tmp_path / "log")
            while seen[-1] != "log" or len(seen) < 2:
                seen.append(await receive.receive())
        watcher.unwatch(number)
        watcher.unwatch(number)
        (tmp_path / "other").write_bytes(b"x")
        with trio.move_on_after(0.2):
            while True:
                seen.append(await receive.receive())
        nursery.cancel_scope.cancel()

    assert seen[0] == "log"
    assert "other" not in seen
