"""firewall clear, firewall restore. Clearing works without an engine as well: rules outlive it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from balenapy.cli.client import Client, ClientError, NoEngine
from balenapy.core import netplan


def add_verbs(verbs: Any) -> None:
    firewall = verbs.add_parser("firewall", help="the engine's firewall rules as a whole")
    actions = firewall.add_subparsers(dest="what", required=True)
    clear = actions.add_parser("clear", help="take them away, until restore or the engine's next start")
    clear.add_argument("bridge", nargs="*", help="without an engine: of these bridges only")
    clear.set_defaults(run=run_clear)
    actions.add_parser("restore", help="write them anew").set_defaults(run=run_restore)


def run_clear(client: Client, options: argparse.Namespace) -> int:
    try:
        names = client.call("POST", "/firewall/clear")["Tables"]
    except NoEngine:
        if not client.host.startswith("unix://"):
            raise
        print("no engine answers: its rules on this machine are taken away", file=sys.stderr)
        names = clear_by_hand({netplan.table_name(bridge) for bridge in options.bridge})
    print("".join(f"{name}\n" for name in names), end="")
    return 0


def run_restore(client: Client, options: argparse.Namespace) -> int:
    names = client.call("POST", "/firewall/restore")["Tables"]
    print("".join(f"{name}\n" for name in names), end="")
    return 0


def clear_by_hand(wanted: set[str]) -> list[str]:
    """Delete our tables, or those of them that are wanted; their names.

    Raises: ClientError.
    """
    listed = json.loads(_nft("--json", "list", "tables"))["nftables"]
    found = [
        entry["table"] for entry in listed if entry.get("table", {}).get("name", "").startswith(netplan.TABLE_PREFIX)
    ]
    chosen = [(table["family"], table["name"]) for table in found if not wanted or table["name"] in wanted]
    _nft("-f", "-", text="".join(f"delete table {family} {name}\n" for family, name in chosen))
    return sorted({name for _, name in chosen})


def _nft(*arguments: str, text: str = "") -> str:
    try:
        done = subprocess.run(["nft", *arguments], input=text, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ClientError(f"cannot run nft: {error.strerror}") from error
    if done.returncode:
        raise ClientError(f"nft: {done.stderr.strip()}")
    return done.stdout
