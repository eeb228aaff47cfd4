"""config.json of the boot partition -> files of the system. Pure; `configure` writes them.

What is wrong in it is told and left out: a device with a typing error has to come up all the same.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

DATA_ROOT = "/mnt/data/balena-engine"
KEYS = {"hostname", "network", "time_servers", "engine", "containers"}


@dataclass(slots=True)
class Settings:
    hostname: str = ""
    files: dict[str, str] = field(default_factory=dict)  # path -> text
    wifi: list[str] = field(default_factory=list)  # interfaces
    containers: dict[str, dict[str, Any]] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)


def read_settings(text: str, machine_id: str) -> Settings:
    """Never raises: what cannot be used is in `complaints`."""
    settings = Settings()
    try:
        document = json.loads(text) if text.strip() else {}
    except ValueError as error:
        settings.complaints.append(f"config.json: {error}: none of it is used")
        document = {}
    if not isinstance(document, dict):
        settings.complaints.append("config.json: not an object: none of it is used")
        document = {}
    for key in sorted(set(document) - KEYS):
        settings.complaints.append(f"config.json: unknown key {key}")
    hostname = document.get("hostname") or f"balenapy-{machine_id[:6] or 'new'}"
    if not isinstance(hostname, str) or not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", hostname):
        settings.complaints.append(f"config.json: hostname {hostname!r} is none")
        hostname = f"balenapy-{machine_id[:6] or 'new'}"
    settings.hostname = hostname
    _network(settings, document.get("network") or {})
    _time(settings, document.get("time_servers") or [])
    _engine(settings, document.get("engine") or {})
    containers = document.get("containers") or {}
    if isinstance(containers, dict) and all(isinstance(body, dict) for body in containers.values()):
        settings.containers = containers
    else:
        settings.complaints.append("config.json: containers is not an object of objects")
    return settings


def _network(settings: Settings, network: Any) -> None:
    interfaces = network.get("interfaces") or {} if isinstance(network, dict) else None
    if not isinstance(interfaces, dict):
        settings.complaints.append("config.json: network.interfaces is not an object")
        return
    for name, wanted in interfaces.items():
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", name) or not isinstance(wanted, dict):
            settings.complaints.append(f"config.json: network.interfaces.{name} is none")
            continue
        lines = ["[Match]", f"Name={name}", "", "[Network]"]
        addresses = _words(settings, wanted, "address")
        lines.append(f"DHCP={'no' if addresses and not wanted.get('dhcp') else 'yes'}")
        lines += [f"Address={address}" for address in addresses]
        lines += [f"Gateway={address}" for address in _words(settings, wanted, "gateway")]
        lines += [f"DNS={address}" for address in _words(settings, wanted, "dns")]
        settings.files[f"/etc/systemd/network/10-config-{name}.network"] = "\n".join(lines) + "\n"
        if wifi := wanted.get("wifi"):
            _wifi(settings, name, wifi)


def _wifi(settings: Settings, name: str, wifi: Any) -> None:
    ssid = wifi.get("ssid") if isinstance(wifi, dict) else None
    password = wifi.get("password", "") if isinstance(wifi, dict) else None
    country = wifi.get("country", "") if isinstance(wifi, dict) else ""
    if not isinstance(ssid, str) or not isinstance(password, str) or not 0 < len(ssid.encode()) <= 32:
        settings.complaints.append(f"config.json: network.interfaces.{name}.wifi wants ssid and password")
        return
    if password and not (8 <= len(password.encode()) <= 63 and password.isprintable() and '"' not in password):
        settings.complaints.append(f"config.json: network.interfaces.{name}.wifi.password has 8 to 63 characters")
        return
    lines = ["ctrl_interface=/run/wpa_supplicant", "update_config=0"]
    if isinstance(country, str) and re.fullmatch("[A-Z]{2}", country):
        lines.append(f"country={country}")
    key = f'  psk="{password}"' if password else "  key_mgmt=NONE"
    # The name as hex: no quoting to get wrong.
    lines += ["network={", f"  ssid={ssid.encode().hex()}", "  scan_ssid=1", key, "}"]
    settings.files[f"/etc/wpa_supplicant/wpa_supplicant-{name}.conf"] = "\n".join(lines) + "\n"
    settings.wifi.append(name)


def _words(settings: Settings, wanted: dict[str, Any], key: str) -> list[str]:
    value = wanted.get(key) or []
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(
        isinstance(word, str) and re.fullmatch(r"[0-9A-Fa-f:./]+", word) for word in words
    ):
        settings.complaints.append(f"config.json: {key} {value!r} is no address")
        return []
    return words


def _time(settings: Settings, servers: Any) -> None:
    if not isinstance(servers, list) or not all(
        isinstance(server, str) and re.fullmatch(r"[A-Za-z0-9:.-]+", server) for server in servers
    ):
        settings.complaints.append("config.json: time_servers is not a list of names")
        return
    if servers:
        text = f"[Time]\nNTP={' '.join(servers)}\n"
        settings.files["/etc/systemd/timesyncd.conf.d/10-config.conf"] = text


def _engine(settings: Settings, engine: Any) -> None:
    if not isinstance(engine, dict):
        settings.complaints.append("config.json: engine is not an object (of daemon.json's keys)")
        engine = {}
    document = {"data-root": DATA_ROOT, **engine}
    settings.files["/etc/balena-engine/daemon.json"] = json.dumps(document, indent=1) + "\n"
