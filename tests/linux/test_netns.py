"""Network namespaces."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from balenapy.errors import SystemFailure
from balenapy.linux import netns, syscalls

pytestmark = [pytest.mark.root]


def in_thread(call: Callable[[], None]) -> BaseException | None:
    """Run it in a thread of its own; what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def own_namespace() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "netns" / "0123456789ab"


def test_a_namespace_is_made_entered_and_removed(path: Path) -> None:
    seen = []

    def use() -> None:
        home = own_namespace()
        netns.create(path, ["link add one0 type bridge\n"])
        inside = netns.call_inside(path, own_namespace)
        names = netns.call_inside(path, lambda: sorted(name for _, name in socket.if_nameindex()))
        ipv6 = netns.call_inside(path, lambda: Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").read_text())
        seen.append((inside != home, own_namespace() == home, names, ipv6))
        netns.run_steps_inside(path, ["link delete dev one0\n"])

    try:
        assert in_thread(use) is None
        there = netns.exists(path), netns.names(path.parent)
    finally:
        netns.remove(path)
    netns.remove(path)

    assert seen == [(True, True, ["lo", "one0"], "1\n")]
    assert there == (True, ["0123456789ab"])
    assert (netns.exists(path), netns.names(path.parent)) == (False, [])
    assert syscalls.mount_points(path.parent) == []


def test_loopback_answers_inside(path: Path) -> None:
    def use() -> None:
        netns.create(path)
        server = netns.open_socket(path, socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.11", 53))
        client = netns.open_socket(path, socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        with server, client:
            client.sendto(b"?", ("127.0.0.11", 53))
            server.setblocking(True)
            assert server.recv(10) == b"?"

    try:
        assert in_thread(use) is None
    finally:
        netns.remove(path)


def test_a_failed_batch_leaves_nothing_and_says_why(path: Path) -> None:
    def use() -> None:
        home = own_namespace()
        try:
            netns.create(path, ["link add\nnonsense\n"])
        finally:
            assert own_namespace() == home

    error = in_thread(use)

    assert isinstance(error, SystemFailure) and error.message.startswith("ip: ")
    assert not path.exists()
    assert syscalls.mount_points(path.parent) == []


def test_what_is_no_namespace_cannot_be_entered(path: Path) -> None:
    path.parent.mkdir()
    with pytest.raises(SystemFailure, match="cannot open network namespace"):
        netns.call_inside(path, own_namespace)
    path.write_text("")
    with pytest.raises(SystemFailure, match="cannot enter network namespace"):
        netns.call_inside(path, own_namespace)

    assert not netns.exists(path)


def test_a_leftover_of_the_same_name_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("")
    try:
        assert in_thread(lambda: netns.create(path)) is None
        assert in_thread(lambda: netns.create(path)) is None
        assert syscalls.mount_points(path.parent) == [str(path)]
    finally:
        netns.remove(path)
