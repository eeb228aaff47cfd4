"""What the kernel is told: `ip -batch` lines for links, and the nftables ruleset of a bridge, both as text.

Each bridge has one table of its own, `ip balenapy_<bridge>`, always replaced whole in one transaction; so
several engines on one host never meet, nothing is patched, and a half-written state cannot exist. Its chains:

    guard        what a container sends to 127.0.0.0/8 is dropped before NAT: route_localnet (see below) would let it
                 reach services that listen on the host's loopback only
    prerouting   from other machines and containers: to a published port -> DNAT
    output       from the host itself: the same; to 127.0.0.1 as well, which is why the bridge has route_localnet=1
    postrouting  what leaves the bridge hides behind the host; what comes from 127.0.0.1 or returns to its own
                 bridge through a published port (hairpin) hides too, or the answer would not come back this way
    forward      nobody reaches a container uninvited: only replies and published ports pass into the bridge, which
                 also keeps networks apart. An internal network passes nothing in or out.

`accept` in our chain cannot overrule a `drop` in another table: on a host whose firewall has policy DROP for
FORWARD, its owner must allow the bridge there. Containers on one bridge without inter-container communication are
separated by port isolation of the bridge (kernel 4.18), which needs no netfilter at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from balenapy.core.ports import PublishedPort, is_unspecified

TABLE_PREFIX = "balenapy_"

# Numbers, not the names nft has for them: `dstnat` is not accepted in the output hook before nft 1.0.7.
PRIORITY_RAW, PRIORITY_DSTNAT, PRIORITY_FILTER, PRIORITY_SRCNAT = -300, -100, 0, 100


@dataclass(frozen=True, slots=True)
class Forward:
    """One published port and where it leads."""

    published: PublishedPort
    address: IPv4Address


@dataclass(frozen=True, slots=True)
class BridgeRules:
    """Everything the table of one bridge depends on."""

    bridge: str
    subnets: tuple[IPv4Network, ...]
    masquerade: bool = True
    internal: bool = False
    forwards: tuple[Forward, ...] = field(default=())


def table_name(bridge: str) -> str:
    """nft names are letters, digits, `/`, `\\`, `_` and `.`; interface names may hold more."""
    return TABLE_PREFIX + re.sub(r"[^A-Za-z0-9_.]", lambda match: f"/{ord(match[0]):x}", bridge)


def ruleset(rules: BridgeRules) -> str:
    """The text for `nft -f -` that puts the bridge's table in the wanted state, whatever it was before."""
    table = f"table ip {table_name(rules.bridge)}"
    chains = [
        _chain(
            "guard",
            "filter",
            "prerouting",
            PRIORITY_RAW,
            [f'iifname "{rules.bridge}" ip daddr 127.0.0.0/8 drop'],
        ),
        _chain("forward", "filter", "forward", PRIORITY_FILTER, list(_forward_rules(rules))),
    ]
    if rules.forwards:
        chains += [
            _block("chain published", map(_dnat, rules.forwards)),
            # Only the host itself may say 127.0.0.1, and that passes `output`.
            _chain(
                "prerouting",
                "nat",
                "prerouting",
                PRIORITY_DSTNAT,
                ["ip daddr 127.0.0.0/8 return", "fib daddr type local jump published"],
            ),
            _chain("output", "nat", "output", PRIORITY_DSTNAT, ["fib daddr type local jump published"]),
        ]
    hidden = list(_postrouting_rules(rules))
    if hidden:
        chains.append(_chain("postrouting", "nat", "postrouting", PRIORITY_SRCNAT, hidden))
    # `delete` needs the table to exist: declare it, delete it, write it anew, all in one transaction.
    return f"{table}\ndelete {table}\n{_block(table, chains)}"


def removal(bridge: str) -> str:
    """The text for `nft -f -` that leaves nothing of the bridge's table."""
    table = f"table ip {table_name(bridge)}"
    return f"{table}\ndelete {table}\n"


def nameserver_ruleset(address: str, port: int) -> str:
    """For a container's own namespace: who asks port 53 there is served on another one, so 53 stays free for it.

    Answers find back by the kernel's connection tracking.
    """
    table = f"table ip {TABLE_PREFIX}dns"
    rules = [f"ip daddr {address} {protocol} dport 53 dnat to {address}:{port}" for protocol in ("udp", "tcp")]
    return f"{table}\ndelete {table}\n{_block(table, [_chain('output', 'nat', 'output', PRIORITY_DSTNAT, rules)])}"


def _forward_rules(rules: BridgeRules) -> Iterable[str]:
    bridge = rules.bridge
    if rules.internal:
        yield f'iifname "{bridge}" oifname != "{bridge}" drop'
        yield f'oifname "{bridge}" iifname != "{bridge}" drop'
        return
    yield "ct state established,related accept"
    yield f'oifname "{bridge}" ct status dnat accept'
    yield f'oifname "{bridge}" iifname != "{bridge}" drop'


def _postrouting_rules(rules: BridgeRules) -> Iterable[str]:
    bridge = rules.bridge
    if rules.forwards:
        yield f'oifname "{bridge}" ip saddr 127.0.0.0/8 masquerade'
    for subnet in rules.subnets:
        if rules.forwards:
            yield f'oifname "{bridge}" ip saddr {subnet} ct status dnat masquerade'
        if rules.masquerade and not rules.internal:
            yield f'oifname != "{bridge}" ip saddr {subnet} masquerade'


def _dnat(forward: Forward) -> str:
    published = forward.published
    host = "" if is_unspecified(published.host_ip) else f"ip daddr {published.host_ip} "
    protocol = published.port.protocol
    return f"{host}{protocol} dport {published.host_port} dnat to {forward.address}:{published.port.number}"


def _chain(name: str, kind: str, hook: str, priority: int, rules: Sequence[str]) -> str:
    return _block(f"chain {name}", [f"type {kind} hook {hook} priority {priority}; policy accept;", *rules])


def _block(head: str, lines: Iterable[str]) -> str:
    body = "".join(f"\t{line}\n" for text in lines for line in text.rstrip("\n").split("\n"))
    return f"{head} {{\n{body}}}\n"


# --- links ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EndpointPlan:
    """One interface of a container and its other end on a bridge of the host."""

    host_name: str
    inside_name: str
    bridge: str
    address: IPv4Interface
    mac: str
    gateway: IPv4Address | None = None  # None: no default route through this interface
    mtu: int = 1500
    isolated: bool = False  # from other ports of the bridge
    hairpin: bool = False  # may be sent what it sent itself: its own published port, where bridged packets meet NAT


def bridge_batch(bridge: str, address: IPv4Interface, mac: str, mtu: int, *, create: bool) -> str:
    """Make a bridge or bring an existing one into the wanted state.

    The bridge gets a MAC of its own, or it would take that of its lowest port and change as containers come and go.
    """
    lines = [f"link add name {bridge} address {mac} type bridge"] if create else []
    lines.append(f"address replace {address} broadcast {address.network.broadcast_address} dev {bridge}")
    lines.append(f"link set dev {bridge} mtu {mtu} up" if create else f"link set dev {bridge} up")
    return _lines(lines)


def forget_addresses_batch(bridge: str, addresses: Iterable[IPv4Interface]) -> str:
    return _lines(f"address delete {address} dev {bridge}" for address in addresses)


def inside_batch(plan: EndpointPlan, host_netns: str) -> str:
    """Run inside the sandbox: make the pair, hand its other end to the host, set addresses and the default route."""
    inside = plan.inside_name
    lines = [
        f"link add name {inside} mtu {plan.mtu} address {plan.mac} type veth"
        f" peer name {plan.host_name} mtu {plan.mtu} netns {host_netns}",
        f"address add {plan.address} broadcast {plan.address.network.broadcast_address} dev {inside}",
        f"link set dev {inside} up",
    ]
    return _lines([*lines, *default_route(plan)])


def default_route(plan: EndpointPlan) -> list[str]:
    if plan.gateway is None:
        return []
    lines = []
    if plan.gateway not in plan.address.network:
        lines.append(f"route replace {plan.gateway} dev {plan.inside_name}")
    return [*lines, f"route replace default via {plan.gateway} dev {plan.inside_name}"]


def outside_batch(plan: EndpointPlan) -> str:
    """Run on the host, after `inside_batch`: put the other end on the bridge."""
    host = plan.host_name
    lines = [f"link set dev {host} master {plan.bridge}"]
    options = [word for word, wanted in (("isolated on", plan.isolated), ("hairpin on", plan.hairpin)) if wanted]
    if options:
        lines.append(f"link set dev {host} type bridge_slave {' '.join(options)}")
    return _lines([*lines, f"link set dev {host} up"])


def gateway_batch(plan: EndpointPlan) -> str:
    """Run inside a living sandbox: let the default route go through this endpoint's gateway, whatever its link is
    called there."""
    return _lines([f"route replace default via {plan.gateway}"] if plan.gateway is not None else [])


def delete_batch(name: str) -> str:
    return _lines([f"link delete dev {name}"])


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
