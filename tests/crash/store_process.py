"""A process that does one thing to a store and dies at a chosen durable step.

`StoreProcess` starts an interpreter once; for each run it forks there, and the child opens the store, does the thing
and dies before its k-th step (`os._exit`, as a SIGKILL would end it), or ends well if there is no such step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

DIED = 77
FAILED = 78


class StoreProcess:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, root: Path, action: str, *, die_at: int = 0, **arguments: Any) -> tuple[bool, list[str]]:
        """Do `action`; whether it died, and the names of the steps it came to (the last one did not happen)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"root": str(root), "action": action, "die_at": die_at, **arguments}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["code"] in (0, DIED), f"{action} failed: {answer}"
        return answer["code"] == DIED, answer["steps"]


@contextmanager
def store_process() -> Iterator[StoreProcess]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.crash.store_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    try:
        yield StoreProcess(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


# --- in the other process


async def _pull(engine: Any, request: dict[str, Any]) -> None:
    from tests.engine.image_engine import pull

    await pull(engine, request["name"])


async def _remove(engine: Any, request: dict[str, Any]) -> None:
    await engine.images.remove(request["name"])


async def _tag(engine: Any, request: dict[str, Any]) -> None:
    await engine.images.tag(request["name"], request["repository"], request["tag"])


async def _container(engine: Any, request: dict[str, Any]) -> None:
    """Create a writable layer and remove it again."""
    image = engine.images.resolve(request["name"])
    await engine.snapshots.prepare(request["key"], image.chain_id)
    await engine.snapshots.remove(request["key"])


async def _load(engine: Any, request: dict[str, Any]) -> None:
    from tests.engine.archives import load_bytes

    await load_bytes(engine, await trio.Path(request["archive"]).read_bytes())


async def _commit(engine: Any, request: dict[str, Any]) -> None:
    """Commit a container that has changed a file."""
    from balenapy.engine.containerfiles import CommitRequest, commit_container
    from tests.engine.image_engine import stopped_container

    engine.containers.records = [await stopped_container(engine, request["name"], request["key"])]
    await commit_container(engine, CommitRequest(request["key"], "committed", "1"))


ACTIONS: dict[str, Callable[[Any, dict[str, Any]], Awaitable[None]]] = {
    "pull": _pull,
    "remove": _remove,
    "tag": _tag,
    "container": _container,
    "load": _load,
    "commit": _commit,
}


def _child(request: dict[str, Any], report: int) -> None:
    from balenapy.linux import durable
    from balenapy.stores import content
    from tests.engine.image_engine import image_engine, settle

    if request.get("slow_link"):  # stage durably from the first byte
        content.STAGE_AFTER_S = -1.0
        content.SYNC_BYTES = 64 << 10
        content.SYNC_INTERVAL_S = -1.0
    count = 0

    def step(name: str) -> None:
        nonlocal count
        count += 1
        number = count  # another thread may come to its step while this one writes
        os.write(report, f"{name}\n".encode())
        if number == request["die_at"]:
            os._exit(DIED)

    async def main() -> None:
        async with image_engine(Path(request["root"])) as engine:
            durable.listen(step)
            await ACTIONS[request["action"]](engine, request)
            await settle(engine)
            durable.listen(None)

    trio.run(main)


def serve() -> None:
    """Fork for each line of stdin."""
    # Imported before the first fork: each child is ready at once.
    import tests.engine.image_engine  # noqa: F401

    for line in sys.stdin:
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = FAILED
            try:
                os.close(receive)
                _child(json.loads(line), send)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            os._exit(code)
        os.close(send)
        with open(receive) as names:
            steps = names.read().split("\n")[:-1]
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "steps": steps}), flush=True)


if __name__ == "__main__":
    serve()
