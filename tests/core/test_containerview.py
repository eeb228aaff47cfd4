from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from balenapy.core import wire
from balenapy.core.container import (
    Container,
    ContainerConfig,
    EndpointSettings,
    Health,
    HealthResult,
    HostConfig,
    MountPoint,
    PortBinding,
    SandboxState,
    State,
    Status,
)
from balenapy.core.containerview import command_text, list_ports, show_container, show_state, show_summary, status_text

FIXTURES = Path(__file__).parent.parent / "data" / "fixtures"
SECOND = 10**9
NOW = 1_000_000 * SECOND


def load(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text())


def shown_again(recorded: dict[str, Any]) -> dict[str, Any]:
    """What we show of a container that is as the recorded answer says."""
    settings, state = recorded["NetworkSettings"], recorded["State"]
    container = Container(
        id=recorded["Id"],
        name=recorded["Name"].removeprefix("/"),
        created_ns=wire.parse_rfc3339(recorded["Created"]),
        path=recorded["Path"],
        args=recorded["Args"],
        image_id=recorded["Image"],
        config=wire.decode(ContainerConfig, recorded["Config"]),
        host_config=wire.decode(HostConfig, recorded["HostConfig"]),
        state=State(
            Status(state["Status"]),
            pid=state["Pid"],
            exit_code=state["ExitCode"],
            started_ns=wire.parse_rfc3339(state["StartedAt"]),
            finished_ns=wire.parse_rfc3339(state["FinishedAt"]),
        ),
        endpoints={name: wire.decode(EndpointSettings, value) for name, value in settings["Networks"].items()},
        sandbox=SandboxState(
            settings["SandboxID"],
            settings["SandboxKey"],
            {},
            recorded["ResolvConfPath"],
            recorded["HostnamePath"],
            recorded["HostsPath"],
        ),
    )
    return show_container(
        container,
        links=[],
        exec_ids=[],
        graph_driver=recorded["GraphDriver"]["Data"],
        log_path=recorded["LogPath"],
        apparmor_profile="",
        sizes=None,
    )


@pytest.mark.parametrize("name", ["created", "running", "exited"])
def test_inspect_shows_what_the_reference_showed(name: str) -> None:
    recorded = load(f"container_inspect_{name}.json")
    shown = shown_again(recorded)

    assert list(recorded) == list(shown)
    host_config, recorded_host_config = shown.pop("HostConfig"), recorded.pop("HostConfig")
    assert recorded == shown
    # Section 15: 20.10 has more, writes no PidsLimit; 18.09-balena has DiskQuota and ContainerIDEnv.
    for key in ("CgroupnsMode", "DeviceRequests", "KernelMemoryTCP"):
        recorded_host_config.pop(key)
    recorded_host_config["PidsLimit"] = recorded_host_config["PidsLimit"] or 0
    assert host_config.pop("DiskQuota") == 0
    assert host_config.pop("ContainerIDEnv") == ""
    assert list(recorded_host_config) == list(host_config)
    assert recorded_host_config == host_config


def test_the_flat_network_fields_are_those_of_the_network_named_bridge() -> None:
    recorded = load("container_inspect_network.json")["NetworkSettings"]
    base = load("container_inspect_running.json")
    base["NetworkSettings"] = recorded
    shown = shown_again(base)["NetworkSettings"]

    recorded["Ports"] = {}
    assert recorded == shown


def test_mounts_show_what_belongs_to_their_type() -> None:
    recorded = load("container_inspect_mounts.json")["Mounts"]
    mounts = [wire.decode(MountPoint, each) for each in recorded]
    container = Container(id="a" * 64, mounts=mounts)

    entry = show_summary(container, names=[], image="", now_ns=NOW, sizes=None)

    assert recorded == entry["Mounts"]
    assert [list(each) for each in recorded] == [list(each) for each in entry["Mounts"]]


def test_an_unhealthy_state_is_shown_with_its_log() -> None:
    recorded = load("container_state_unhealthy.json")
    health = Health(
        recorded["Health"]["Status"],
        recorded["Health"]["FailingStreak"],
        [
            HealthResult(
                wire.parse_rfc3339(each["Start"]), wire.parse_rfc3339(each["End"]), each["ExitCode"], each["Output"]
            )
            for each in recorded["Health"]["Log"]
        ],
    )
    started = wire.parse_rfc3339(recorded["StartedAt"])

    assert recorded == show_state(State(Status.RUNNING, pid=4901, started_ns=started, health=health))


def test_a_restarting_container_counts_as_running() -> None:
    shown = show_state(State(Status.RESTARTING, exit_code=3))

    assert (shown["Status"], shown["Running"], shown["Restarting"], shown["Pid"]) == ("restarting", True, True, 0)


def state(status: Status, **values: Any) -> State:
    return State(status, **{"started_ns": NOW - 300 * SECOND, "finished_ns": NOW - 7200 * SECOND, **values})


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (State(), "Created"),
        (state(Status.RUNNING), "Up 5 minutes"),
        (state(Status.PAUSED), "Up 5 minutes (Paused)"),
        (state(Status.RUNNING, health=Health("starting")), "Up 5 minutes (health: starting)"),
        (state(Status.RUNNING, health=Health("healthy")), "Up 5 minutes (healthy)"),
        (state(Status.RUNNING, health=Health("unhealthy")), "Up 5 minutes (unhealthy)"),
        (state(Status.RESTARTING, exit_code=1), "Restarting (1) 2 hours ago"),
        (state(Status.EXITED, exit_code=137), "Exited (137) 2 hours ago"),
        (state(Status.REMOVING), "Removal In Progress"),
        (state(Status.DEAD), "Dead"),
    ],
)
def test_status_texts(state: State, text: str) -> None:
    assert text == status_text(state, NOW)


def test_arguments_with_spaces_are_quoted_in_the_command() -> None:
    assert command_text(Container(path="sh", args=["-c", "echo a b", "x"])) == "sh -c 'echo a b' x"


def test_ports_are_listed_by_binding_and_exposed_ones_without() -> None:
    recorded = load("container_list_ports.json")[0]["Ports"]
    ports = {
        "80/tcp": [PortBinding("0.0.0.0", "32768"), PortBinding("127.0.0.1", "48123")],
        "81/udp": None,
    }

    shown = list_ports(Container(sandbox=SandboxState(ports=ports)))

    assert [each for each in recorded if each.get("IP") != "::"] == shown  # 18.09: no "::"


def test_sizes_that_are_zero_are_left_out_of_a_list() -> None:
    recorded = load("container_list_size.json")[0]

    entry = show_summary(Container(), names=["/x"], image="busybox", now_ns=NOW, sizes=(0, 1984287))

    assert list(recorded) == list(entry)
    assert entry["SizeRootFs"] == 1984287
