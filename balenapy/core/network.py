"""The network: what a client asks for, and the record we keep of it. Its live side is `engine.bridges`."""

# ruff: noqa: RUF009  (the kinds make dataclass fields)

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, ClassVar

from balenapy.core.container import EndpointSettings
from balenapy.core.ipam import Pool
from balenapy.core.wire import flag, number, optional, struct, text
from balenapy.errors import InvalidParameter, SystemFailure

BRIDGE, HOST, NONE = "bridge", "host", "none"
BUILTIN = (BRIDGE, HOST, NONE)
DRIVERS = {BRIDGE: "bridge", HOST: "host", NONE: "null"}  # of the built-in networks

OPTION_NAME = "com.docker.network.bridge.name"
OPTION_ICC = "com.docker.network.bridge.enable_icc"
OPTION_MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
OPTION_HOST_IP = "com.docker.network.bridge.host_binding_ipv4"
OPTION_DEFAULT = "com.docker.network.bridge.default_bridge"
OPTION_MTU = "com.docker.network.driver.mtu"
OPTION_PREFIX = "com.docker.network.container_iface_prefix"

_INTERFACE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")  # IFNAMSIZ; what nft and ip read as one word
_TRUE = ("1", "t", "T", "TRUE", "true", "True")  # Go strconv.ParseBool
_FALSE = ("0", "f", "F", "FALSE", "false", "False")


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


@dataclass(slots=True, eq=False)
class Network:
    """The record. `subnet` and `gateway` are those in force; `ipam` is what inspect shows."""

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
    subnet: str = text("Subnet")  # "" for host, none and configuration-only networks
    ip_range: str = text("IPRange")
    gateway: str = text("Gateway")
    auxiliary: dict[str, str] = struct("Auxiliary", dict)
    foreign: bool = flag("Foreign", omit=True)  # the interface was there before us: it keeps its addresses and stays

    @property
    def builtin(self) -> bool:
        return self.name in BUILTIN

    @property
    def user_defined(self) -> bool:
        return not self.builtin

    @property
    def pool(self) -> Pool | None:
        if not self.subnet:
            return None
        return Pool(
            IPv4Network(self.subnet),
            IPv4Address(self.gateway),
            IPv4Network(self.ip_range) if self.ip_range else None,
            {name: IPv4Address(address) for name, address in self.auxiliary.items()},
        )

    @property
    def bridge(self) -> str:
        """The interface on the host; "" where there is none."""
        if self.driver != "bridge" or self.config_only:
            return ""
        return self.options.get(OPTION_NAME) or f"br-{self.id[:12]}"

    @property
    def bridge_options(self) -> BridgeOptions:
        return parse_bridge_options(self.options)


@dataclass(frozen=True, slots=True)
class BridgeOptions:
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
    mtu = options.get(OPTION_MTU, "")
    if mtu and not (mtu.isascii() and mtu.isdigit()):
        raise SystemFailure(
            f'failed to parse {OPTION_MTU} value: {mtu} (strconv.Atoi: parsing "{mtu}": invalid syntax)'
        )
    host_ip = options.get(OPTION_HOST_IP, "")
    if host_ip:
        try:
            IPv4Address(host_ip)
        except ValueError as error:
            raise SystemFailure(f"failed to parse {OPTION_HOST_IP} value: {host_ip} (invalid ip)") from error
    return BridgeOptions(
        icc=_flag(options, OPTION_ICC),
        masquerade=_flag(options, OPTION_MASQUERADE),
        host_ip=host_ip,
        mtu=int(mtu or 0) or 1500,
        prefix=prefix,
    )


def _flag(options: dict[str, str], key: str) -> bool:
    value = options.get(key, "")
    if value in _FALSE:
        return False
    if value in _TRUE or not value:
        return True
    raise SystemFailure(f'failed to parse {key} value: {value} (strconv.ParseBool: parsing "{value}": invalid syntax)')


def check_interface_name(name: str) -> None:
    """Refuse what could mean something else to `ip` or nft.

    Raises: InvalidParameter.
    """
    if not _INTERFACE_NAME.fullmatch(name) or name in (".", ".."):
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
