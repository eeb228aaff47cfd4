"""How the API shows a container: the answers of inspect and list, made from the record alone.

Key order and what is omitted follow balena-engine 18.09. What depends on more than the record (image names, sizes,
running execs, where the layers are) comes in as plain values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from balenapy.core.container import (
    Container,
    ContainerConfig,
    EndpointSettings,
    Health,
    HostConfig,
    MountPoint,
    State,
    Status,
)
from balenapy.core.ports import expand_exposed
from balenapy.core.timefmt import human_duration
from balenapy.core.wire import encode, rfc3339nano


def show_health(health: Health) -> dict[str, Any]:
    return {
        "Status": health.status,
        "FailingStreak": health.failing_streak,
        "Log": [
            {
                "Start": rfc3339nano(result.start_ns),
                "End": rfc3339nano(result.end_ns),
                "ExitCode": result.exit_code,
                "Output": result.output,
            }
            for result in health.log
        ],
    }


def show_state(state: State) -> dict[str, Any]:
    result: dict[str, Any] = {
        "Status": state.status.value,
        "Running": state.running,
        "Paused": state.status is Status.PAUSED,
        "Restarting": state.status is Status.RESTARTING,
        "OOMKilled": state.oom_killed,
        "Dead": state.status is Status.DEAD,
        "Pid": state.pid,
        "ExitCode": state.exit_code,
        "Error": state.error,
        "StartedAt": rfc3339nano(state.started_ns),
        "FinishedAt": rfc3339nano(state.finished_ns),
    }
    if state.health is not None:
        result["Health"] = show_health(state.health)
    return result


def show_mount(mount: MountPoint) -> dict[str, Any]:
    result: dict[str, Any] = {"Type": mount.type}
    if mount.name:
        result["Name"] = mount.name
    result |= {"Source": mount.source, "Destination": mount.destination}
    if mount.driver:
        result["Driver"] = mount.driver
    return result | {"Mode": mount.mode, "RW": mount.rw, "Propagation": mount.propagation}


def show_network_settings(container: Container) -> dict[str, Any]:
    """The flat fields are those of the network named `bridge`."""
    sandbox = container.sandbox
    bridge = container.endpoints.get("bridge", _NO_ENDPOINT)
    return {
        "Bridge": "",
        "SandboxID": sandbox.sandbox_id,
        "HairpinMode": False,
        "LinkLocalIPv6Address": "",
        "LinkLocalIPv6PrefixLen": 0,
        "Ports": {port: encode(sandbox.ports[port]) for port in sorted(sandbox.ports)},
        "SandboxKey": sandbox.sandbox_key,
        "SecondaryIPAddresses": None,
        "SecondaryIPv6Addresses": None,
        "EndpointID": bridge.endpoint_id,
        "Gateway": bridge.gateway,
        "GlobalIPv6Address": bridge.global_ipv6_address,
        "GlobalIPv6PrefixLen": bridge.global_ipv6_prefix_len,
        "IPAddress": bridge.ip_address,
        "IPPrefixLen": bridge.ip_prefix_len,
        "IPv6Gateway": bridge.ipv6_gateway,
        "MacAddress": bridge.mac_address,
        "Networks": encode(container.endpoints),
    }


_NO_ENDPOINT = EndpointSettings()


def show_host_config(host_config: HostConfig, links: Sequence[str] | None) -> dict[str, Any]:
    """`links` as inspect has them: `/child:/this/alias`."""
    result: dict[str, Any] = encode(host_config)
    result["Links"] = list(links) if links else None
    return result


def show_config(config: ContainerConfig) -> dict[str, Any]:
    result: dict[str, Any] = encode(config)
    return result


def show_container(
    container: Container,
    *,
    links: Sequence[str],
    exec_ids: Sequence[str] | None,
    graph_driver: Mapping[str, str],
    log_path: str,
    apparmor_profile: str,
    sizes: tuple[int, int] | None,
) -> dict[str, Any]:
    """The answer of `GET /containers/{id}/json`.

    Args:
        graph_driver: LowerDir, MergedDir, UpperDir, WorkDir.
        sizes: (SizeRw, SizeRootFs), None when not asked for.
    """
    sandbox = container.sandbox
    result: dict[str, Any] = {
        "Id": container.id,
        "Created": rfc3339nano(container.created_ns),
        "Path": container.path,
        "Args": list(container.args),
        "State": show_state(container.state),
        "Image": container.image_id,
        "ResolvConfPath": sandbox.resolv_conf_path,
        "HostnamePath": sandbox.hostname_path,
        "HostsPath": sandbox.hosts_path,
        "LogPath": log_path,
        "Name": "/" + container.name,
        "RestartCount": container.state.restart_count,
        "Driver": "overlay2",
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": apparmor_profile,
        "ExecIDs": list(exec_ids) if exec_ids else None,
        "HostConfig": show_host_config(container.host_config, links),
        "GraphDriver": {"Data": dict(graph_driver), "Name": "overlay2"},
    }
    if sizes is not None:
        result["SizeRw"], result["SizeRootFs"] = sizes
    return result | {
        "Mounts": [show_mount(mount) for mount in container.mounts],
        "Config": show_config(container.config),
        "NetworkSettings": show_network_settings(container),
    }


# --- list -----------------------------------------------------------------------------------------------------


def status_text(state: State, now_ns: int) -> str:
    """`Up 5 minutes (healthy)`, `Exited (0) 2 days ago`. Source: moby container/state.go String."""
    if state.status is Status.RESTARTING:
        return f"Restarting ({state.exit_code}) {human_duration(now_ns - state.finished_ns)} ago"
    if state.running:
        up = f"Up {human_duration(now_ns - state.started_ns)}"
        if state.status is Status.PAUSED:
            return f"{up} (Paused)"
        health = state.health.status if state.health is not None else ""
        if not health or health == "none":
            return up
        return f"{up} (health: starting)" if health == "starting" else f"{up} ({health})"
    if state.status is Status.REMOVING:
        return "Removal In Progress"
    if state.status is Status.DEAD:
        return "Dead"
    if state.started_ns == 0:
        return "Created"
    if state.finished_ns == 0:
        return ""
    return f"Exited ({state.exit_code}) {human_duration(now_ns - state.finished_ns)} ago"


def command_text(container: Container) -> str:
    """Path and Args; an argument holding a space is wrapped in single quotes."""
    arguments = [f"'{argument}'" if " " in argument else argument for argument in container.args]
    return " ".join([container.path, *arguments])


def list_ports(container: Container) -> list[dict[str, Any]]:
    """One entry a binding in force, one without PublicPort for an exposed port without any."""
    entries: list[dict[str, Any]] = []
    for key, bindings in sorted(container.sandbox.ports.items()):
        for port in expand_exposed((key,)):
            if not bindings:
                entries.append({"PrivatePort": port.number, "Type": port.protocol})
            for binding in bindings or ():
                entry: dict[str, Any] = {"IP": binding.host_ip, "PrivatePort": port.number}
                if binding.host_port.isdigit():
                    entry["PublicPort"] = int(binding.host_port)
                entries.append(entry | {"Type": port.protocol})
    return entries


def _list_endpoint(endpoint: EndpointSettings) -> dict[str, Any]:
    # The snapshot that lists are made of leaves these out (moby container/view.go).
    result: dict[str, Any] = encode(endpoint)
    return result | {"Links": None, "Aliases": None, "DriverOpts": None}


def show_summary(
    container: Container, *, names: Sequence[str], image: str, now_ns: int, sizes: tuple[int, int] | None
) -> dict[str, Any]:
    """An entry of `GET /containers/json`; sizes that are zero are left out."""
    result: dict[str, Any] = {
        "Id": container.id,
        "Names": list(names),
        "Image": image,
        "ImageID": container.image_id,
        "Command": command_text(container),
        "Created": container.created_ns // 1_000_000_000,
        "Ports": list_ports(container),
    }
    for key, size in zip(("SizeRw", "SizeRootFs"), sizes or (), strict=False):
        if size:
            result[key] = size
    return result | {
        "Labels": encode(container.config.labels or {}),
        "State": container.state.status.value,
        "Status": status_text(container.state, now_ns),
        "HostConfig": {"NetworkMode": container.host_config.network_mode},
        "NetworkSettings": {
            "Networks": {name: _list_endpoint(container.endpoints[name]) for name in sorted(container.endpoints)}
        },
        "Mounts": [show_mount(mount) for mount in container.mounts],
    }
