"""The network: what a client asks for, and the record we keep of it. Its live side is `engine.bridges`."""

# ruff: noqa: RUF009  (the kinds make dataclass fields)

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, ClassVar

from balenapy.core.container import EndpointSettings
from balenapy.core.ipam import Pool
from balenapy.core.wire import flag, number, optional, parse_bool, struct, text
from balenapy.errors import InvalidParameter, SystemFailure

BRIDGE, HOST, NONE = "bridge", "host", "none"
BUILTIN = (BRIDGE, HOST, NONE)
DRIVERS = {BRIDGE: "bridge", HOST: "host", NONE: "null"}  # of the built-in networks
MACVLAN, IPVLAN = "macvlan", "ipvlan"
SHARED_LINK = {  # drivers whose endpoints share a link of the host: option -> (default, others)
    MACVLAN: ("macvlan_mode", ("bridge", "private", "vepa", "passthru")),
    IPVLAN: ("ipvlan_mode", ("l2", "l3")),
}

OPTION_NAME = "com.docker.network.bridge.name"
OPTION_ICC = "com.docker.network.bridge.enable_icc"
OPTION_MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
OPTION_HOST_IP = "com.docker.network.bridge.host_binding_ipv4"
OPTION_DEFAULT = "com.docker.network.bridge.default_bridge"
OPTION_MTU = "com.docker.network.driver.mtu"
OPTION_PREFIX = "com.docker.network.container_iface_prefix"
OPTION_PARENT = "parent"

MTU_MIN, MTU_MAX = 68, 65535  # what links of the kernel take
_INTERFACE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")  # IFNAMSIZ; what nft and ip read as one word


@dataclass(slots=True)
class IPAMConfigEntry:
    GO: ClassVar[str] = "network.IPAMConfig"
    subnet: str = text("Subnet", omit=True)
    ip_range: str = text("IPRange", omit=True)
    gateway: str = text("Gateway", omit=True)
    auxiliary: dict[str, str] | None = optional("AuxiliaryAddresses", omit=True)


@dataclass(slots=True)
class IPAM:
    GO: ClassVar[str] = "network.IPAM"
    driver: str = text("Driver")
    options: dict[str, str] | None = optional("Options")
    config: list[IPAMConfigEntry] | None = optional("Config")


@dataclass(slots=True)
class ConfigReference:
    GO: ClassVar[str] = "network.ConfigReference"
    network: str = text("Network")


@dataclass(slots=True)
class NetworkCreate:
    """Body of `POST /networks/create`."""

    GO: ClassVar[str] = "types.NetworkCreateRequest"
    check_duplicate: bool = flag("CheckDuplicate")
    driver: str = text("Driver")
    scope: str = text("Scope")
    enable_ipv6: bool = flag("EnableIPv6")
    ipam: IPAM | None = optional("IPAM")
    internal: bool = flag("Internal")
    attachable: bool = flag("Attachable")
    ingress: bool = flag("Ingress")
    config_only: bool = flag("ConfigOnly")
    config_from: ConfigReference | None = optional("ConfigFrom")
    options: dict[str, str] | None = optional("Options")
    labels: dict[str, str] | None = optional("Labels")
    name: str = text("Name")


@dataclass(slots=True)
class NetworkConnect:
    GO: ClassVar[str] = "types.NetworkConnect"
    container: str = text("Container")
    endpoint_config: EndpointSettings | None = optional("EndpointConfig")


@dataclass(slots=True)
class NetworkDisconnect:
    GO: ClassVar[str] = "types.NetworkDisconnect"
    container: str = text("Container")
    force: bool = flag("Force")


@dataclass(slots=True)
class PoolRecord:
    """A `Pool` as it is kept."""

    subnet: str = text("Subnet")
    ip_range: str = text("IPRange", omit=True)
    gateway: str = text("Gateway")
    auxiliary: dict[str, str] = struct("Auxiliary", dict, omit=True)
    chosen: bool = flag("Chosen", omit=True)  # by us: nobody asked for this subnet

    @classmethod
    def of(cls, pool: Pool, *, chosen: bool) -> PoolRecord:
        return cls(
            str(pool.subnet),
            str(pool.ip_range) if pool.ip_range else "",
            str(pool.gateway),
            {name: str(address) for name, address in pool.auxiliary.items()},
            chosen,
        )

    @property
    def pool(self) -> Pool:
        return Pool(
            ip_network(self.subnet),
            ip_address(self.gateway),
            ip_network(self.ip_range) if self.ip_range else None,
            {name: ip_address(address) for name, address in self.auxiliary.items()},
        )


@dataclass(slots=True, eq=False)
class Network:
    """The record. `pools` are those in force; `ipam` is what inspect shows."""

    id: str = text("Id")
    name: str = text("Name")
    created_ns: int = number("Created")
    driver: str = text("Driver")
    enable_ipv6: bool = flag("EnableIPv6")
    internal: bool = flag("Internal")
    attachable: bool = flag("Attachable")
    ingress: bool = flag("Ingress")
    config_only: bool = flag("ConfigOnly")
    config_from: str = text("ConfigFrom")
    ipam: IPAM = struct("IPAM", IPAM)
    options: dict[str, str] = struct("Options", dict)
    labels: dict[str, str] = struct("Labels", dict)
    pools: list[PoolRecord] = struct("Pools", list)  # in force; none for host, none and configuration-only networks
    foreign: bool = flag("Foreign", omit=True)  # the interface was there before us: it keeps its addresses and stays

    @property
    def builtin(self) -> bool:
        return self.name in BUILTIN

    @property
    def user_defined(self) -> bool:
        return not self.builtin

    @property
    def bridge(self) -> str:
        """The interface on the host; "" where there is none."""
        if self.driver != "bridge" or self.config_only:
            return ""
        return self.options.get(OPTION_NAME) or f"br-{self.id[:12]}"

    @property
    def parent(self) -> str:
        """The link of the host that endpoints of macvlan and ipvlan share; one of ours where none was named."""
        if self.driver not in SHARED_LINK or self.config_only:
            return ""
        prefix = "dm" if self.driver == MACVLAN else "di"
        return self.options.get(OPTION_PARENT) or f"{prefix}-{self.id[:12]}"

    def check(self) -> None:
        """See that what was kept can be used. Raises: ValueError, EngineError."""
        pools = [record.pool for record in self.pools]
        # The built-in one may be switched off.
        if (self.bridge or self.parent) and self.user_defined and not any(pool.subnet.version == 4 for pool in pools):
            raise ValueError("it has no subnet")
        if self.bridge:
            parse_bridge_options(self.options)
        elif self.parent:
            parse_shared_link_options(self.driver, self.options)

    @property
    def bridge_options(self) -> BridgeOptions:
        return parse_bridge_options(self.options)


@dataclass(frozen=True, slots=True)
class BridgeOptions:
    """Of the bridge driver; macvlan and ipvlan have the last two as well."""

    icc: bool = True
    masquerade: bool = True
    host_ip: str = ""
    mtu: int = 1500
    prefix: str = "eth"


def parse_bridge_options(options: dict[str, str]) -> BridgeOptions:
    """Read the driver options we know; others are kept and mean nothing.

    Raises: SystemFailure for a value that cannot be read, InvalidParameter for a name no interface can have.
    """
    name = options.get(OPTION_NAME, "")
    if name:
        check_interface_name(name)
    prefix = options.get(OPTION_PREFIX) or "eth"
    check_interface_name(f"{prefix}0")
    _flag(options, OPTION_DEFAULT)
    host_ip = options.get(OPTION_HOST_IP, "")
    if host_ip:
        try:
            ip_address(host_ip)
        except ValueError as error:
            raise SystemFailure(f"failed to parse {OPTION_HOST_IP} value: {host_ip} (nil ip)") from error
    return BridgeOptions(
        icc=_flag(options, OPTION_ICC),
        masquerade=_flag(options, OPTION_MASQUERADE),
        host_ip=host_ip,
        mtu=_mtu(options) or 1500,
        prefix=prefix,
    )


def _mtu(options: dict[str, str]) -> int:
    """0 where none is set. Over there a size that no link can have is noticed when a container starts."""
    value = options.get(OPTION_MTU, "")
    if not re.fullmatch(r"[+-]?[0-9]{1,18}|", value):
        raise SystemFailure(
            f'failed to parse {OPTION_MTU} value: {value} (strconv.Atoi: parsing "{value}": invalid syntax)'
        )
    mtu = int(value or 0)
    if mtu and not MTU_MIN <= mtu <= MTU_MAX:
        raise SystemFailure(f"invalid MTU number: {mtu}")
    return mtu


@dataclass(frozen=True, slots=True)
class SharedLinkOptions:
    """Of macvlan and ipvlan."""

    parent: str = ""
    mode: str = ""
    mtu: int = 0  # 0: the parent's
    prefix: str = "eth"


def parse_shared_link_options(driver: str, options: dict[str, str]) -> SharedLinkOptions:
    """Read the options of a macvlan or ipvlan network.

    Raises: SystemFailure in the words of the engine we replace, InvalidParameter for a name no interface can have.
    """
    parent = options.get(OPTION_PARENT, "")
    if parent:
        check_interface_name(parent)
    if parent == "lo":
        raise SystemFailure(f"loopback interface is not a valid {driver} parent link")
    key, modes = SHARED_LINK[driver]
    mode = options.get(key) or modes[0]
    if mode not in modes:
        raise SystemFailure(
            f"requested {driver} mode '{mode}' is not valid, '{modes[0]}' mode is the {driver} driver default"
        )
    prefix = options.get(OPTION_PREFIX) or "eth"
    check_interface_name(f"{prefix}0")
    return SharedLinkOptions(parent, mode, _mtu(options), prefix)


def parse_vlan_name(parent: str) -> tuple[str, int]:
    """`eth0.10` -> (eth0, 10): the link that a network with this parent makes.

    Raises: SystemFailure. Source: libnetwork drivers/macvlan/macvlan_setup.go parseVlan.
    """
    link, _, number = parent.rpartition(".")
    if not link or "." in link or not (number.isascii() and number.isdigit()):
        raise SystemFailure(f"invalid subinterface vlan name {parent}, example formatting is eth0.10")
    vlan = int(number)
    if not 1 <= vlan <= 4094:
        raise SystemFailure(f"vlan id must be between 1-4094, received: {vlan}")
    return link, vlan


def _flag(options: dict[str, str], key: str) -> bool:
    value = options.get(key, "")
    wanted = parse_bool(value) if value else True
    if wanted is None:
        problem = f'strconv.ParseBool: parsing "{value}": invalid syntax'
        raise SystemFailure(f"failed to parse {key} value: {value} ({problem})")
    return wanted


def check_interface_name(name: str) -> None:
    """Refuse what could mean something else to `ip`, nft or below /proc/sys/net.

    Raises: InvalidParameter.
    """
    if not _INTERFACE_NAME.fullmatch(name) or name in (".", "..", "all", "default"):
        raise InvalidParameter(f"invalid interface name: {name!r}")


def describe(network: Network, created: str, containers: dict[str, Any]) -> dict[str, Any]:
    """The network as inspect and list show it, keys in Go's order."""
    ipam = network.ipam
    return {
        "Name": network.name,
        "Id": network.id,
        "Created": created,
        "Scope": "local",
        "Driver": network.driver,
        "EnableIPv6": network.enable_ipv6,
        "IPAM": {
            "Driver": ipam.driver,
            "Options": ipam.options,
            "Config": [_describe_config(entry) for entry in ipam.config or ()],
        },
        "Internal": network.internal,
        "Attachable": network.attachable,
        "Ingress": network.ingress,
        "ConfigFrom": {"Network": network.config_from},
        "ConfigOnly": network.config_only,
        "Containers": containers,
        "Options": dict(sorted(network.options.items())),
        "Labels": dict(sorted(network.labels.items())),
    }


def _describe_config(entry: IPAMConfigEntry) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "Subnet": entry.subnet,
        "IPRange": entry.ip_range,
        "Gateway": entry.gateway,
        "AuxiliaryAddresses": entry.auxiliary,
    }
    return {key: value for key, value in shown.items() if value}
