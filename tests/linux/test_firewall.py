"""What the kernel tells of changes to nftables, and what we make of it."""

from __future__ import annotations

import os
import subprocess

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import netplan
from balenapy.core.netplan import BridgeRules
from balenapy.linux import firewall
from balenapy.linux.netlink import HEADER
from tests.leftovers import claim
from tests.trio_tests import trio_test

BRIDGE = f"bptf{os.getpid() % 10000}"
RULES = BridgeRules(BRIDGE, ())


def message(number: int, table: str) -> bytes:
    name = table.encode() + b"\0"
    attribute = (len(name) + 4).to_bytes(2, "little") + (1).to_bytes(2, "little") + name
    body = b"\x02\0\0\0" + attribute + b"\0" * (-len(attribute) % 4)
    return HEADER.pack(HEADER.size + len(body), 10 << 8 | number, 0, 0, 0) + body


def delete(table: str) -> None:
    subprocess.run(["nft", "delete", "table", "ip", table], check=False, capture_output=True)


def test_only_our_tables_and_only_what_they_lose_is_told() -> None:
    data = message(8, "balenapy_br0") + message(2, "filter") + message(6, "balenapy_br0") + message(0, "balenapy_br1")

    assert list(firewall.table_changes(data)) == [("balenapy_br0", False), ("balenapy_br1", True)]
    assert list(firewall.table_changes(message(15, "x"))) == [("", True)]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_to_their_end(data: bytes) -> None:
    for name, whole in firewall.table_changes(data):
        assert isinstance(name, str) and isinstance(whole, bool)


@pytest.mark.root
@trio_test
async def test_changes_of_others_are_told_and_our_own_are_not() -> None:
    claim(BRIDGE)
    table = netplan.table_name(BRIDGE)
    watch = firewall.TableWatch()
    try:
        for _ in range(20):
            await firewall.apply(netplan.ruleset(RULES))
        with trio.move_on_after(0.3):
            while True:
                told = await watch.wait()  # of other engines on this machine, perhaps
                assert told is not None and table not in told
        for command in (
            ["flush", "chain", "ip", table, "guard"],
            ["flush", "table", "ip", table],
            ["delete", "chain", "ip", table, "forward"],
            ["delete", "table", "ip", table],
        ):
            await trio.run_process(["nft", *command])
            with trio.fail_after(30):
                while table not in (await watch.wait() or ()):
                    pass
            await firewall.apply(netplan.ruleset(RULES))
    finally:
        watch.close()
        delete(table)


@pytest.mark.root
@trio_test
async def test_more_changes_than_can_be_kept_are_told_as_such() -> None:
    claim(BRIDGE)
    table = netplan.table_name(BRIDGE)
    many = "".join(f'add rule ip {table} forward oifname "x{number}" drop\n' for number in range(5000))
    await firewall.apply(netplan.ruleset(RULES))
    watch = firewall.TableWatch()
    try:
        await trio.run_process(["nft", "-f", "-"], stdin=many.encode())
        await trio.run_process(["nft", "flush", "table", "ip", table])
        with trio.fail_after(30):
            while (told := await watch.wait()) is not None and table not in told:
                pass
    finally:
        watch.close()
        delete(table)
