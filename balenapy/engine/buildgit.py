"""A build's context out of a git repository: `remote=URL#ref:directory`, fetched by the host's git.

Source: moby builder/remotecontext/git/gitutils.go, urlutil.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from balenapy.core.buildtree import PLACE
from balenapy.engine.assembly import CHUNK_BYTES
from balenapy.engine.nurseries import one_error
from balenapy.errors import SystemFailure
from balenapy.linux import syscalls
from balenapy.linux.process import TOOL_ENV, run_tool

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.engine.workers import WorkerFamily

_PREFIXES = ("git://", "github.com/", "git@")
_SUFFIX = re.compile(r"\.git(?:#.+)?$")
# Nobody is asked, no configuration of this machine is read, and only real transports are used.
_ENVIRONMENT = {
    **TOOL_ENV,
    "HOME": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ALLOW_PROTOCOL": "http:https:git:ssh",
}


@dataclass(frozen=True, slots=True)
class Repository:
    """What to fetch."""

    url: str
    ref: str = "HEAD"
    directory: str = ""


def is_git_url(text: str) -> bool:
    if text.startswith(("http://", "https://")):
        return _SUFFIX.search(text) is not None
    return text.startswith(_PREFIXES)


def parse_git_url(text: str) -> Repository:
    """Read `URL[#[ref][:directory]]`."""
    url, _, fragment = text.partition("#")
    if url.startswith("github.com/"):
        url = f"https://{url}"
    ref, _, directory = fragment.partition(":")
    return Repository(url, ref or "HEAD", directory)


@asynccontextmanager
async def open_repository(
    engine: Engine, family: WorkerFamily, repository: Repository
) -> AsyncIterator[trio.MemoryReceiveChannel[bytes]]:
    """The tar of its files.

    Raises: SystemFailure, with git's words.
    """
    path = await engine.snapshots.new_directory()
    try:
        root = await _check_out(repository, path / "diff")
        send, receive = trio.open_memory_channel[bytes](0)

        async def drain(stream: trio.abc.ReceiveStream) -> None:
            while data := await stream.receive_some(CHUNK_BYTES):
                await send.send(bytes(data))

        async def pack() -> None:
            await family.run("pack", {"root": str(root)}, drain=drain)
            send.close()  # only now: an end that comes because packing failed is not the end of a tar

        async with one_error(), trio.open_nursery() as nursery:
            nursery.start_soon(pack)
            yield receive
            nursery.cancel_scope.cancel()
    finally:
        await engine.snapshots.discard(path)


async def _check_out(repository: Repository, root: Path) -> Path:
    """Fetch it; gives the directory that is asked for."""
    if shutil.which("git", path=TOOL_ENV["PATH"]) is None:
        raise SystemFailure('unable to find git: exec: "git": executable file not found in $PATH')
    await _git(root, "failed to init repo at", "init", "-q", ".")
    await _git(root, "failed add origin repo at", "remote", "add", "origin", repository.url)
    fetch = ("fetch", "--recurse-submodules=yes", "--depth", "1", "origin", "--", repository.ref)
    try:
        await _git(root, "error fetching", *fetch)
    except SystemFailure as error:
        if "does not support shallow" not in error.message:
            raise
        await _git(root, "error fetching", *(word for word in fetch if word not in ("--depth", "1")))
    await _git(root, "error checking out", "checkout", "-q", "FETCH_HEAD")
    await _git(
        root, "error initializing submodules", "submodule", "update", "--init", "--recursive", "--depth=1"
    )
    return _directory_in(root, repository.directory)


def _directory_in(root: Path, directory: str) -> Path:
    """A directory of the repository; links lead about in there only."""
    if not directory:
        return root
    try:
        fd = syscalls.open_in_root(root, directory, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        raise SystemFailure(f"stat {PLACE}/{directory}: no such file or directory") from None
    except OSError:
        raise SystemFailure(f"error setting git context, not a directory: {directory}") from None
    try:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


async def _git(root: Path, what: str, *arguments: str) -> None:
    """Raises: SystemFailure. Cancellation: git is killed."""
    done = await run_tool(["git", *arguments], cwd=root, env=_ENVIRONMENT, check=False)
    if done.code:
        text = (done.stdout + done.stderr).decode(errors="replace")
        raise SystemFailure(f"{what}: {text}: exit status {done.code}")
