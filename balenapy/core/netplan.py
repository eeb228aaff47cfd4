"""What the kernel is told: `ip -batch` lines for links, and the nftables ruleset of a bridge, both as text.

Each bridge has one table of its own, `ip balenapy_<bridge>` (and `ip6 balenapy_<bridge>` if it has IPv6; an `inet`
table could hold both, but takes NAT only since kernel 5.2), always replaced whole in one transaction; so several
engines on one host never meet, nothing is patched, and a half-written state cannot exist. Its chains:

    guard        what a container sends to 127.0.0.0/8 is dropped before NAT: route_localnet (see below) would let it
                 reach services that listen on the host's loopback only
    prerouting   from other machines and containers: to a published port -> DNAT
    output       from the host itself: the same; to 127.0.0.1 as well, which is why the bridge has route_localnet=1
    postrouting  what leaves the bridge hides behind the host; what comes from 127.0.0.1 or returns to its own
                 bridge through a published port (hairpin) hides too, or the answer would not come back this way
    forward      nobody reaches a container uninvited: only replies and published ports pass into the bridge, which
                 also keeps networks apart. An internal network passes nothing in or out.

IPv6 is treated the same: hidden behind the host, and reached by published ports only. But ::1 leads nowhere: there is
no route_localnet for it, answers that come back to it are dropped by the kernel. So it is left alone, and who asks it
is refused at once, by the socket that holds the port, and goes on to 127.0.0.1.

`accept` in our chain cannot overrule a `drop` in another table: on a host whose firewall has policy DROP for
FORWARD, its owner must allow the bridge there. Containers on one bridge without inter-container communication are
separated by port isolation of the bridge (kernel 4.18), which needs no netfilter at all. Where somebody has switched
net.bridge.bridge-nf-call-iptables on, their packets to published ports of each other are redirected while they are
bridged, and isolated too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface

from balenapy.core.ipam import Address, Interface, Subnet
from balenapy.core.ports import PublishedPort, is_unspecified

TABLE_PREFIX = "balenapy_"

# Numbers, not the names nft has for them: `dstnat` is not accepted in the output hook before nft 1.0.7.
PRIORITY_RAW, PRIORITY_DSTNAT, PRIORITY_FILTER, PRIORITY_SRCNAT = -300, -100, 0, 100


@dataclass(frozen=True, slots=True)
class Forward:
    """One published port and where it leads."""

    published: PublishedPort
    address: Address


@dataclass(frozen=True, slots=True)
class BridgeRules:
    """Everything the table of one bridge depends on."""

    bridge: str
    subnets: tuple[Subnet, ...]
    masquerade: bool = True
    internal: bool = False
    forwards: tuple[Forward, ...] = field(default=())


def table_name(bridge: str) -> str:
    """nft names are letters, digits, `/`, `\\`, `_` and `.`; interface names may hold more."""
    return TABLE_PREFIX + re.sub(r"[^A-Za-z0-9_.]", lambda match: f"/{ord(match[0]):x}", bridge)


@dataclass(frozen=True, slots=True)
class _Family:
    """What is written differently in the two."""

    name: str
    loopback: str
    version: int


_IP, _IP6 = _Family("ip", "127.0.0.0/8", 4), _Family("ip6", "::1", 6)


def ruleset(rules: BridgeRules) -> str:
    """The text for `nft -f -` that puts the bridge's tables in the wanted state, whatever they were before."""
    return "".join(_table(rules, family) for family in _families(any(one.version == 6 for one in rules.subnets)))


def removal(bridge: str, *, ipv6: bool = False) -> str:
    """The text for `nft -f -` that leaves nothing of the bridge's tables."""
    return "".join(_table_gone(f"table {family.name} {table_name(bridge)}") for family in _families(ipv6))


def _families(ipv6: bool) -> Iterable[_Family]:
    return (_IP, _IP6) if ipv6 else (_IP,)


def _table_gone(table: str) -> str:
    # `delete` needs the table to exist: declare it, delete it, all in one transaction.
    return f"{table}\ndelete {table}\n"


def _table(rules: BridgeRules, family: _Family) -> str:
    table = f"table {family.name} {table_name(rules.bridge)}"
    forwards = [forward for forward in rules.forwards if forward.address.version == family.version]
    chains = []
    if family is _IP:
        guard = f'iifname "{rules.bridge}" ip daddr {family.loopback} drop'
        chains.append(_chain("guard", "filter", "prerouting", PRIORITY_RAW, [guard]))
    chains.append(_chain("forward", "filter", "forward", PRIORITY_FILTER, list(_forward_rules(rules))))
    if forwards:
        # Only the host itself may say 127.0.0.1, and that passes `output`.
        incoming = [f"{family.name} daddr {family.loopback} return", "fib daddr type local jump published"]
        outgoing = incoming[1:] if family is _IP else incoming
        chains += [
            _block("chain published", (_dnat(forward, family) for forward in forwards)),
            _chain("prerouting", "nat", "prerouting", PRIORITY_DSTNAT, incoming),
            _chain("output", "nat", "output", PRIORITY_DSTNAT, outgoing),
        ]
    hidden = list(_postrouting_rules(rules, family, publishes=bool(forwards)))
    if hidden:
        chains.append(_chain("postrouting", "nat", "postrouting", PRIORITY_SRCNAT, hidden))
    return _table_gone(table) + _block(table, chains)


def nameserver_ruleset(address: str, port: int) -> str:
    """For a container's own namespace: who asks port 53 there is served on another one, so 53 stays free for it.

    Answers find back by the kernel's connection tracking.
    """
    table = f"table ip {TABLE_PREFIX}dns"
    rules = [f"ip daddr {address} {protocol} dport 53 dnat to {address}:{port}" for protocol in ("udp", "tcp")]
    return _table_gone(table) + _block(table, [_chain("output", "nat", "output", PRIORITY_DSTNAT, rules)])


def _forward_rules(rules: BridgeRules) -> Iterable[str]:
    bridge = rules.bridge
    if rules.internal:
        yield f'iifname "{bridge}" oifname != "{bridge}" drop'
        yield f'oifname "{bridge}" iifname != "{bridge}" drop'
        return
    yield "ct state established,related accept"
    yield f'oifname "{bridge}" ct status dnat accept'
    yield f'oifname "{bridge}" iifname != "{bridge}" drop'


def _postrouting_rules(rules: BridgeRules, family: _Family, *, publishes: bool) -> Iterable[str]:
    bridge, name = rules.bridge, family.name
    if publishes and family is _IP:
        yield f'oifname "{bridge}" {name} saddr {family.loopback} masquerade'
    for subnet in rules.subnets:
        if subnet.version != family.version:
            continue
        if publishes:
            yield f'oifname "{bridge}" {name} saddr {subnet} ct status dnat masquerade'
        if rules.masquerade and not rules.internal:
            yield f'oifname != "{bridge}" {name} saddr {subnet} masquerade'


def _dnat(forward: Forward, family: _Family) -> str:
    published = forward.published
    host = "" if is_unspecified(published.host_ip) else f"{family.name} daddr {published.host_ip} "
    address = f"[{forward.address}]" if family is _IP6 else forward.address
    return f"{host}{published.port.protocol} dport {published.host_port} dnat to {address}:{published.port.number}"


def _chain(name: str, kind: str, hook: str, priority: int, rules: Sequence[str]) -> str:
    return _block(f"chain {name}", [f"type {kind} hook {hook} priority {priority}; policy accept;", *rules])


def _block(head: str, lines: Iterable[str]) -> str:
    body = "".join(f"\t{line}\n" for text in lines for line in text.rstrip("\n").split("\n"))
    return f"{head} {{\n{body}}}\n"


# --- links ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """A switch of the kernel, below /proc/sys/net."""

    name: str
    value: str


Step = str | Setting  # lines for `ip -batch`, or a switch between them


@dataclass(frozen=True, slots=True)
class EndpointPlan:
    """One interface of a container, and what it hangs on: a bridge, or a link of the host that it shares."""

    host_name: str
    inside_name: str
    host_link: str
    address: IPv4Interface
    mac: str
    gateway: Address | None = None  # None: no default route through this interface
    address6: IPv6Interface | None = None
    gateway6: Address | None = None
    link_local: tuple[Interface, ...] = ()  # more addresses, asked for by name
    mtu: int = 1500  # 0: that of the link it shares
    isolated: bool = False  # from other ports of the bridge
    hairpin: bool = False  # may be sent what it sent itself: its own published port, where bridged packets meet NAT
    kind: str = "veth"  # or macvlan, ipvlan
    mode: str = ""  # of macvlan and ipvlan
    routed: bool = False  # everything goes out here, to no gateway: ipvlan l3

    @property
    def shares_link(self) -> bool:
        return self.kind != "veth"


def bridge_batch(bridge: str, addresses: Iterable[Interface], mac: str, mtu: int, *, create: bool) -> str:
    """Make a bridge or bring an existing one into the wanted state.

    The bridge gets a MAC of its own, or it would take that of its lowest port and change as containers come and go.
    """
    lines = [f"link add name {bridge} address {mac} type bridge"] if create else []
    lines += [f"address replace {_full(address)} dev {bridge}" for address in addresses]
    lines.append(f"link set dev {bridge} mtu {mtu} up" if create else f"link set dev {bridge} up")
    return _lines(lines)


def _full(address: Interface) -> str:
    """Nobody but us gives addresses there, so there is nobody to ask whether one is taken."""
    return f"{address} nodad" if address.version == 6 else f"{address} broadcast {address.network.broadcast_address}"


def forget_addresses_batch(bridge: str, addresses: Iterable[Interface]) -> str:
    return _lines(f"address delete {address} dev {bridge}" for address in addresses)


def inside_steps(plan: EndpointPlan, host_netns: str) -> list[Step]:
    """Inside the sandbox: make the pair and hand its other end to the host (a shared link is there already, see
    `shared_link_batch`), set addresses and default routes."""
    inside = plan.inside_name
    lines = []
    steps: list[Step] = []
    if not plan.shares_link:
        lines.append(
            f"link add name {inside} mtu {plan.mtu} address {plan.mac} type veth"
            f" peer name {plan.host_name} mtu {plan.mtu} netns {host_netns}"
        )
    if plan.address6 is not None or any(one.version == 6 for one in plan.link_local):
        # IPv6 is off in a sandbox until then: `netns.create`.
        steps += [_lines(lines), *(Setting(f"ipv6/conf/{name}/disable_ipv6", "0") for name in ("lo", inside))]
        lines = []
    if plan.address6 is not None:
        lines.append(f"address add {_full(plan.address6)} dev {inside}")
    lines += [f"address add {_full(one)} dev {inside}" for one in plan.link_local]
    lines += [f"address add {_full(plan.address)} dev {inside}", f"link set dev {inside} up"]
    return [*steps, _lines([*lines, *_default_routes(plan)])]


def _default_routes(plan: EndpointPlan) -> Iterable[str]:
    if plan.routed:
        yield f"route replace default dev {plan.inside_name}"
    for gateway, address in ((plan.gateway, plan.address), (plan.gateway6, plan.address6)):
        if gateway is None or address is None:
            continue
        if gateway not in address.network:
            yield f"route replace {gateway} dev {plan.inside_name}"
        yield f"route replace default via {gateway} dev {plan.inside_name}"


def shared_link_batch(plan: EndpointPlan, sandbox: str) -> str:
    """Run on the host, before `inside_steps`: put an interface on a link of the host into the sandbox."""
    mtu = f" mtu {plan.mtu}" if plan.mtu else ""
    address = f" address {plan.mac}" if plan.mac else ""
    return _lines(
        [
            f"link add link {plan.host_link} name {plan.inside_name} netns {sandbox}{address}{mtu}"
            f" type {plan.kind} mode {plan.mode}"
        ]
    )


def outside_batch(plan: EndpointPlan) -> str:
    """Run on the host, after `inside_steps`: put the other end on the bridge."""
    if plan.shares_link:
        return ""
    host = plan.host_name
    lines = [f"link set dev {host} master {plan.host_link}"]
    options = [word for word, wanted in (("isolated on", plan.isolated), ("hairpin on", plan.hairpin)) if wanted]
    if options:
        lines.append(f"link set dev {host} type bridge_slave {' '.join(options)}")
    return _lines([*lines, f"link set dev {host} up"])


def gateway_batch(plan: EndpointPlan) -> str:
    """Run inside a living sandbox: let the default routes go through this endpoint's gateways, whatever its link is
    called there."""
    gateways = (plan.gateway, plan.gateway6)
    return _lines(f"route replace default via {gateway}" for gateway in gateways if gateway is not None)


def parent_batch(parent: str, *, vlan: tuple[str, int] | None) -> str:
    """Make the link that endpoints of macvlan or ipvlan share: a VLAN of another, or one that leads nowhere."""
    if vlan is None:
        return _lines([f"link add name {parent} type dummy", f"link set dev {parent} up"])
    link, number = vlan
    return _lines([f"link add link {link} name {parent} type vlan id {number}", f"link set dev {parent} up"])


def delete_batch(name: str) -> str:
    return _lines([f"link delete dev {name}"])


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
