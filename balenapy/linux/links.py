"""Links, addresses and routes of the host, through iproute2; and the few /proc/sys/net switches that go with them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path

from balenapy.errors import SystemFailure
from balenapy.linux.process import run_tool

_SYS_NET = Path("/sys/class/net")
_PROC_SYS_NET = Path("/proc/sys/net")
_RTF_UP, _RTF_REJECT = 0x1, 0x200


@dataclass(frozen=True, slots=True)
class Link:
    name: str
    mac: str
    mtu: int
    kind: str  # bridge, veth, ...; "" for hardware
    addresses: tuple[IPv4Interface | IPv6Interface, ...]  # those of IPv6 that are valid on that link only are left out


async def run_batch(batch: str, *, force: bool = False) -> None:
    """Run `ip -batch` lines on the host; with `force` it goes on after a line that fails.

    Raises: SystemFailure, with the words of ip.
    """
    if batch:
        argv = ("ip", "-force", "-batch", "-") if force else ("ip", "-batch", "-")
        await run_tool(argv, input=batch.encode(), check=not force)


async def find_link(name: str) -> Link | None:
    """One link of the host with its addresses; None when there is no such link."""
    if not exists(name):
        return None
    outcome = await run_tool(("ip", "-details", "-json", "address", "show", "dev", name), check=False)
    if outcome.code != 0:
        return None  # gone since
    try:
        (found,) = (entry for entry in json.loads(outcome.stdout) if entry.get("ifname") == name)
        return Link(
            name=name,
            mac=found.get("address", ""),
            mtu=int(found["mtu"]),
            kind=found.get("linkinfo", {}).get("info_kind", ""),
            addresses=tuple(
                (IPv4Interface if one["family"] == "inet" else IPv6Interface)(f"{one['local']}/{one['prefixlen']}")
                for one in found.get("addr_info", ())
                if one.get("family") == "inet" or (one.get("family") == "inet6" and one.get("scope") != "link")
            ),
        )
    except (ValueError, KeyError) as error:
        raise SystemFailure(f"ip printed what we cannot read about {name}: {error}") from error


def exists(name: str) -> bool:
    return os.path.lexists(_SYS_NET / name)


def ports_of(bridge: str) -> list[str]:
    """The links that are ports of a bridge."""
    try:
        return sorted(os.listdir(_SYS_NET / bridge / "brif"))
    except FileNotFoundError:
        return []


def host_networks(except_links: Iterable[str] = ()) -> list[IPv4Network]:
    """Every IPv4 destination the host has a route to, but the default route and those of our own bridges.

    Raises: SystemFailure.
    """
    skipped = set(except_links)
    networks = []
    try:
        lines = Path("/proc/net/route").read_text().splitlines()[1:]
    except OSError as error:
        raise SystemFailure(f"cannot read the host's routes: {error}") from error
    for line in lines:
        link, destination, _, flags, _, _, _, mask, *_ = line.split()
        if link in skipped or int(mask, 16) == 0 or not int(flags, 16) & (_RTF_UP | _RTF_REJECT):
            continue
        # Hexadecimal numbers in the byte order of the machine.
        address, netmask = (IPv4Address(int(text, 16).to_bytes(4, sys.byteorder)) for text in (destination, mask))
        networks.append(IPv4Network(f"{address}/{netmask}", strict=False))
    return networks


def host_networks6(except_links: Iterable[str] = ()) -> list[IPv6Network]:
    """The same for IPv6; what every link has (fe80::, ff00::) is left out. None where the kernel has no IPv6."""
    skipped = set(except_links)
    networks = []
    try:
        lines = Path("/proc/net/ipv6_route").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        destination, prefix, _, _, _, _, _, _, flags, link = line.split()
        network = IPv6Network((int(destination, 16), int(prefix, 16)))
        if link in skipped or not network.prefixlen or network.is_link_local or network.is_multicast:
            continue
        if int(flags, 16) & _RTF_UP and not network.is_loopback:
            networks.append(network)
    return networks


def set_sysctl(name: str, value: str) -> bool:
    """Write /proc/sys/net/<name> unless it is so already; False when it cannot be written."""
    path = _PROC_SYS_NET / name
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError:
        return False
    return True


def read_sysctl(name: str) -> str:
    try:
        return (_PROC_SYS_NET / name).read_text().strip()
    except OSError:
        return ""
