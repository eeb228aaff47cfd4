"""Our nftables tables: put in place by one atomic `nft -f -`, taken away again. Nobody else's table is ever touched."""

from __future__ import annotations

import json

from balenapy.core.netplan import TABLE_PREFIX
from balenapy.errors import SystemFailure
from balenapy.linux.process import run_tool


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
