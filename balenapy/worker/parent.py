"""Verb `parent`: forks a worker for each request that comes, so that only one Python has to start.

    engine                                     here
    ------                                     ----
    a message of descriptors: a file with
    {"verb", "arguments", "environment"},
    stdin, stdout, stderr[, output]       ->   fork; the child runs the verb as a worker started by itself would
                                          <-   the pid, and a pidfd

The socket has whole messages (SOCK_SEQPACKET); its end is ours. What several verbs need is imported before the first
fork. We are never confined and do nothing ourselves: whatever is confined is a child, for one verb.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

from balenapy.linux import syscalls
from balenapy.worker import process

VERB = "parent"
MAX_FDS = 5
PREPARED = ("context", "pack", "place", "sources")


def serve(fd: int, verbs: Mapping[str, str]) -> NoReturn:
    """Until the engine closes the socket."""
    with socket.socket(fileno=fd) as requests:
        for verb in PREPARED:
            importlib.import_module(verbs[verb])
        while True:
            data, fds, _, _ = socket.recv_fds(requests, 1, MAX_FDS)
            _reap(0 if not data else os.WNOHANG)
            if not data:
                os._exit(0)
            pid = os.fork()
            if not pid:
                requests.close()
                _run(fds, verbs)
            for fd in fds:
                os.close(fd)
            # Before anybody can reap it: so the number is still that of this child.
            pidfd = os.pidfd_open(pid)
            with suppress(BrokenPipeError):
                socket.send_fds(requests, [b"%d" % pid], [pidfd])
            os.close(pidfd)


def _run(fds: list[int], verbs: Mapping[str, str]) -> NoReturn:
    syscalls.set_parent_death_signal(signal.SIGKILL)
    with open(fds[0], "rb") as file:
        file.seek(0)
        request = json.load(file)
    for target, fd in enumerate(fds[1:4]):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.update(request["environment"])
    arguments = request["arguments"]
    if len(fds) > 4:
        arguments["output"] = fds[4]
    process.bound_memory()
    os._exit(process.report_outcome([request["verb"], json.dumps(arguments)], verbs))


def _reap(flags: int) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, flags)[0]:
            pass
