"""Which proxy a request goes through, by the environment.

Source: golang.org/x/net/http/httpproxy.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from urllib.parse import urlsplit


def proxy_for(url: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The proxy for this URL by HTTP_PROXY, HTTPS_PROXY and NO_PROXY; loopback is never asked through one."""
    parts = urlsplit(url)
    variable = "HTTPS_PROXY" if parts.scheme == "https" else "HTTP_PROXY"
    proxy = environment.get(variable) or environment.get(variable.lower())
    host = parts.hostname or ""
    if not proxy or _goes_direct(host, parts.port or (443 if parts.scheme == "https" else 80), environment):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _goes_direct(host: str, port: int, environment: Mapping[str, str]) -> bool:
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    exceptions = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    for word in exceptions.lower().replace(",", " ").split():
        if word == "*":
            return True
        name, colon, wanted_port = word.rpartition(":")
        if colon and wanted_port.isdigit() and not (name.count(":") and not name.endswith("]")):
            if int(wanted_port) != port:
                continue
        else:
            name = word
        name = name.strip("[]")
        if address is not None:
            try:
                if address in ipaddress.ip_network(name, strict=False):
                    return True
            except (ValueError, TypeError):
                pass
            continue
        name = name.removeprefix("*")
        if host == name.removeprefix(".") and not name.startswith("."):
            return True
        if host.endswith(name if name.startswith(".") else f".{name}"):
            return True
    return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
