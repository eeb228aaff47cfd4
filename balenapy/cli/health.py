"""`balenapy healthcheck`: whether the engine answers. For OS units: standard library only, quick to begin."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence

DEFAULT_HOST = "unix:///var/run/balena-engine.sock"
USAGE = "usage: balenapy healthcheck [-H HOST] [--timeout SECONDS]"


def run(arguments: Sequence[str]) -> int:
    """0 when the engine answers a ping in time, else 1 with a word on stderr; 125 for wrong arguments."""
    host = os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    timeout_s = 5.0
    rest = list(arguments)
    try:
        while rest:
            name, _, value = rest.pop(0).partition("=")
            if name in ("-h", "--help"):
                print(USAGE)
                return 0
            value = value or rest.pop(0)
            if name in ("-H", "--host"):
                host = value
            elif name == "--timeout":
                timeout_s = float(value)
            else:
                raise ValueError
    except (ValueError, IndexError):
        print(USAGE, file=sys.stderr)
        return 125
    try:
        answer = ping(host, timeout_s)
    except (OSError, ValueError) as error:
        print(f"unhealthy: {host}: {error}", file=sys.stderr)
        return 1
    if not answer.startswith(b"HTTP/1.1 200 "):
        print(f"unhealthy: {host}: {answer[:100]!r}", file=sys.stderr)
        return 1
    return 0


def ping(host: str, timeout_s: float) -> bytes:
    """The head of the answer to `GET /_ping`. Raises: OSError, ValueError."""
    deadline = time.monotonic() + timeout_s
    scheme, _, place = host.partition("://")
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        try:
            connection.connect(place)
        except BaseException:
            connection.close()
            raise
    elif scheme == "tcp":
        name, _, port = place.rpartition(":")
        connection = socket.create_connection((name.strip("[]"), int(port)), timeout_s)
    else:
        raise ValueError("unix://PATH or tcp://HOST:PORT")
    with connection:
        connection.sendall(b"GET /_ping HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n\r\n")
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < 65536:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            data = connection.recv(4096)
            if not data:
                break
            answer += data
        return answer
