"""Our nftables tables: put in place by one atomic `nft -f -`, taken away again. Nobody else's table is ever touched.

The kernel tells every change of the ruleset to whoever listens (linux/netfilter/nf_tables.h), so it is known at once
when somebody flushes ours, and nothing is looked at meanwhile. Our own changes delete a table and make it anew in one
transaction: one that ends without the table, or with less in it, was somebody else's.
"""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator

import trio

from balenapy.core.netplan import TABLE_PREFIX
from balenapy.errors import SystemFailure
from balenapy.linux.netlink import NETFILTER, attributes, messages
from balenapy.linux.process import run_tool

_GROUPS = 1 << (7 - 1)  # NFNLGRP_NFTABLES
_SUBSYSTEM = 10 << 8
_NEW_TABLE, _DEL_TABLE, _DEL_CHAIN, _DEL_RULE, _NEW_GENERATION = (_SUBSYSTEM | number for number in (0, 2, 5, 8, 15))
_TABLE_NAME = 1  # the first attribute of a table, a chain and a rule alike
_GENERIC_BYTES = 4  # family, version, resource
_RECEIVE_BYTES = 64 << 10


async def apply(text: str) -> None:
    """Run one nft transaction: all of it or nothing.

    Raises: SystemFailure, with the words of nft.
    Cancellation: it may have happened; apply the wanted state again.
    """
    await run_tool(("nft", "-f", "-"), input=text.encode())


async def tables() -> list[str]:
    """The names of all our tables on this host, also those of other engines."""
    found = await _list("tables", "table")
    return sorted(
        entry["name"] for entry in found if entry["family"] == "ip" and entry["name"].startswith(TABLE_PREFIX)
    )


async def foreign_forward_drops() -> list[str]:
    """Tables that are not ours and drop by default what is forwarded: ours cannot overrule them."""
    return sorted(
        f"{entry['family']} {entry['table']}"
        for entry in await _list("chains", "chain")
        if entry.get("hook") == "forward"
        and entry.get("policy") == "drop"
        and not entry["table"].startswith(TABLE_PREFIX)
    )


async def _list(what: str, kind: str) -> list[dict[str, str]]:
    outcome = await run_tool(("nft", "--json", "list", what))
    try:
        return [entry[kind] for entry in json.loads(outcome.stdout)["nftables"] if kind in entry]
    except (ValueError, KeyError) as error:
        raise SystemFailure(f"nft printed what we cannot read: {error}") from error


class TableWatch:
    """Says when one of our tables was taken away or emptied by others."""

    def __init__(self) -> None:
        """Raises: SystemFailure."""
        try:
            plain = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETFILTER)
            try:
                plain.bind((0, _GROUPS))
            except OSError:
                plain.close()
                raise
        except OSError as error:
            raise SystemFailure(f"cannot watch the firewall: {error.strerror}") from error
        plain.setblocking(False)
        self._socket = plain
        self._damaged: set[str] = set()
        self._in_transaction = False

    def close(self) -> None:
        self._socket.close()

    async def wait(self) -> set[str] | None:
        """The names of the tables, when there are some; None when changes came faster than they were read."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            lost = False
            while True:
                try:
                    data = self._socket.recv(_RECEIVE_BYTES)
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    lost = True
                    continue
                for name, whole in table_changes(data):
                    self._in_transaction = bool(name)
                    (self._damaged.discard if whole else self._damaged.add)(name)
            if lost:
                self._damaged.clear()
                return None
            if self._damaged and not self._in_transaction:
                damaged, self._damaged = self._damaged, set()
                return damaged


def table_changes(data: bytes) -> Iterator[tuple[str, bool]]:
    """What the kernel told: names of tables of ours, and whether they are new (True) or lost something.

    The end of a transaction comes as `("", True)`.
    """
    for kind, payload in messages(data):
        if kind == _NEW_GENERATION:
            yield "", True
        if kind not in (_NEW_TABLE, _DEL_TABLE, _DEL_CHAIN, _DEL_RULE):
            continue
        for attribute, value, _ in attributes(payload[_GENERIC_BYTES:]):
            if attribute == _TABLE_NAME:
                name = value.rstrip(b"\0").decode(errors="replace")
                if name.startswith(TABLE_PREFIX):
                    yield name, kind == _NEW_TABLE
