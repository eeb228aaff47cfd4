"""Joins this process's terminal or pipes to a raw stream of the engine: `run`, `attach`, `exec`, `logs`."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

READ_SIZE = 32 * 1024
HEADER = struct.Struct(">BxxxI")


class Frames:
    """Splits the multiplexed stream and writes each payload to our stdout or stderr."""

    def __init__(self, multiplexed: bool) -> None:
        self._multiplexed = multiplexed
        self._pending = b""

    def write(self, data: bytes) -> None:
        if not self._multiplexed:
            write_all(1, data)
            return
        self._pending += data
        while len(self._pending) >= HEADER.size:
            stream, length = HEADER.unpack_from(self._pending)
            if len(self._pending) < HEADER.size + length:
                return
            write_all(1 if stream == 1 else 2, self._pending[HEADER.size : HEADER.size + length])
            self._pending = self._pending[HEADER.size + length :]


def write_all(descriptor: int, data: bytes) -> None:
    (sys.stdout if descriptor == 1 else sys.stderr).flush()
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextmanager
def raw_terminal(enabled: bool) -> Iterator[None]:
    """Put our terminal into raw mode while a container's terminal is shown on it."""
    if not enabled or not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def window_size() -> tuple[int, int]:
    """Rows and columns of our terminal."""
    columns, rows = os.get_terminal_size(0)
    return rows, columns


@contextmanager
def on_resize(enabled: bool, resize: Callable[[int, int], None]) -> Iterator[None]:
    """Tell the container's terminal our size, now by the caller and on each change by us."""
    if not enabled or not os.isatty(0):
        yield
        return
    before = signal.signal(signal.SIGWINCH, lambda *_: resize(*window_size()))
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


def join(connection: socket.socket, leading: bytes, *, stdin: bool, is_tty: bool) -> None:
    """Copy both ways until the engine ends the stream; our end of input half-closes it."""
    frames = Frames(multiplexed=not is_tty)
    frames.write(leading)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        reading = False
        if stdin:
            try:
                selector.register(0, selectors.EVENT_READ)
                reading = True
            except PermissionError:  # a plain file cannot be waited for: it is always ready
                connection.sendall(sys.stdin.buffer.read())
                connection.shutdown(socket.SHUT_WR)
        while True:
            for key, _ in selector.select():
                if key.fd == 0 and reading:
                    data = os.read(0, READ_SIZE)
                    try:
                        if data:
                            connection.sendall(data)
                            continue
                        connection.shutdown(socket.SHUT_WR)
                    except (BrokenPipeError, ConnectionResetError, OSError):
                        pass
                    selector.unregister(0)
                    reading = False
                else:
                    try:
                        data = connection.recv(READ_SIZE)
                    except ConnectionResetError:
                        data = b""
                    if not data:
                        return
                    frames.write(data)
