"""The text of /etc/hosts and /etc/resolv.conf of a container.

Source: libnetwork etchosts, resolvconf; BEHAVIOUR of the default bridge: no DNS server of our own there, the
container gets the host's name servers minus those it could not reach.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

DEFAULT_NAMESERVERS = ("8.8.8.8", "8.8.4.4")  # libnetwork resolvconf.defaultIPv4Dns
EMBEDDED_NAMESERVER = "127.0.0.11"

_HOSTS_HEAD = (
    ("127.0.0.1", "localhost"),
    ("::1", "localhost ip6-localhost ip6-loopback"),
    ("fe00::0", "ip6-localnet"),
    ("ff00::0", "ip6-mcastprefix"),
    ("ff02::1", "ip6-allnodes"),
    ("ff02::2", "ip6-allrouters"),
)


@dataclass(frozen=True, slots=True)
class ResolvConf:
    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def render(self) -> str:
        lines = [f"search {' '.join(self.search)}"] if self.search else []
        lines += [f"nameserver {server}" for server in self.nameservers]
        lines += [f"options {' '.join(self.options)}"] if self.options else []
        return "".join(f"{line}\n" for line in lines)


def parse_resolv_conf(text: str) -> ResolvConf:
    """Read what matters of a resolv.conf; the last `search` (or `domain`) line wins, as in libc."""
    servers: list[str] = []
    search: tuple[str, ...] = ()
    options: list[str] = []
    for line in text.splitlines():
        word, *rest = re.split(r"[#;]", line, maxsplit=1)[0].split() or [""]
        if word == "nameserver" and rest:
            servers.append(rest[0])
        elif word in ("search", "domain") and rest:
            search = tuple(rest)
        elif word == "options":
            options += rest
    return ResolvConf(tuple(servers), search, tuple(options))


def container_resolv_conf(
    host: ResolvConf,
    dns: Sequence[str] = (),
    search: Sequence[str] = (),
    options: Sequence[str] = (),
    *,
    ipv6: bool = False,
) -> ResolvConf:
    """What a container on the default bridge resolves with; what it (or the daemon) sets replaces the host's."""
    servers = tuple(dns) or tuple(one for one in host.nameservers if _is_reachable(one, ipv6)) or DEFAULT_NAMESERVERS
    chosen_search = tuple(search) or host.search
    return ResolvConf(
        servers,
        () if chosen_search == (".",) else chosen_search,  # "." means: none
        tuple(options) or host.options,
    )


def embedded_resolv_conf(conf: ResolvConf) -> ResolvConf:
    """The same for a container that asks us: ours is the only server, and short names come to it as they are."""
    options = conf.options if _ndots(conf.options) is not None else (*conf.options, "ndots:0")
    return ResolvConf((EMBEDDED_NAMESERVER,), conf.search, options)


def wants_search_domains(conf: ResolvConf) -> bool:
    """Whether the user set ndots to something: names without dots then belong to the search domains."""
    return bool(_ndots(conf.options))


def _ndots(options: Iterable[str]) -> int | None:
    found = [option.partition(":")[2] for option in options if option.startswith("ndots:")]
    return int(found[-1]) if found and found[-1].isdecimal() else None


@dataclass(frozen=True, slots=True)
class Forwarder:
    """A server that is asked what we do not know."""

    address: str
    from_host: bool = False  # it listens on the host's loopback, so it is asked from the host's namespace


def forwarders(host: ResolvConf, dns: Sequence[str] = (), *, ipv6: bool = False) -> tuple[Forwarder, ...]:
    """The servers behind ours: those that the user set, else the host's.

    Args:
        ipv6: the container has IPv6.

    Source: libnetwork sandbox_dns_unix.go, setExternalResolvers.
    """
    if dns:
        # Ours among them would ask itself.
        versions = (4, 6) if ipv6 else (4,)
        return tuple(Forwarder(one) for one in dns if _version(one) in versions and one != EMBEDDED_NAMESERVER)
    servers = []
    for server in host.nameservers:
        if _is_loopback(server):
            servers.append(Forwarder(server, from_host=True))
        elif _is_reachable(server, ipv6):
            servers.append(Forwarder(server))
    return tuple(servers) or tuple(map(Forwarder, DEFAULT_NAMESERVERS))


def _version(server: str) -> int:
    try:
        return ip_address(server).version
    except ValueError:
        return 0


def _is_loopback(server: str) -> bool:
    try:
        return ip_address(server).is_loopback
    except ValueError:
        return False


def _is_reachable(server: str, ipv6: bool) -> bool:
    try:
        address = ip_address(server.partition("%")[0])
    except ValueError:
        return False
    return not address.is_loopback and (address.version == 4 or ipv6)


def hosts_text(lines: Iterable[tuple[str, str]]) -> str:
    """/etc/hosts with these (address, names) behind the fixed head."""
    return "".join(f"{address}\t{names}\n" for address, names in (*_HOSTS_HEAD, *lines))


def own_names(hostname: str, domainname: str) -> str:
    """`host.domain host`, or just `host`: the whole name, split at the first dot. Source: libnetwork etchosts.Build."""
    full = f"{hostname}.{domainname}" if domainname else hostname
    short = full.partition(".")[0]
    return full if full == short else f"{full} {short}"


def parse_extra_host(text: str) -> tuple[str, str]:
    """`name:address` -> (address, name). The form was checked at create."""
    name, _, address = text.partition(":")
    return address, name
