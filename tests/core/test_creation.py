# ruff: noqa: E501
"""What a create request is refused for, in the reference engine's words, and what is filled in."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import creation, wire
from balenapy.core.container import (
    ContainerConfig,
    HostConfig,
    LogConfig,
    RestartPolicy,
    Ulimit,
    UpdateConfig,
)
from balenapy.core.creation import HostDefaults, KernelSupport, parse_create
from balenapy.core.mountspec import resolve_mount
from balenapy.errors import Conflict, EngineError, InvalidParameter, SystemFailure

SUPPORT = KernelSupport(cpus="0-1", mems="0", cpu_count=2)
RECORDED = [
    entry
    for entry in json.loads((Path(__file__).parent.parent / "data/fixtures/errors.json").read_text())
    if entry["path"] == "/containers/create" and "HostConfig_or_Config" in entry
]
# 18.09 words these otherwise (BEHAVIOUR 4.2 and 15).
IN_18_09 = {
    "Minimum memory limit allowed is 6MB": "Minimum memory limit allowed is 4MB",
    "Minimum kernel memory limit allowed is 6MB": "Minimum kernel memory limit allowed is 4MB",
    "Container cannot be connected to network endpoints: b, a": (
        "Container cannot be connected to network endpoints: a, b"  # random in Go
    ),
    "Invalid isolation: \"zz\" - linux only supports 'default'": "invalid isolation 'zz' on linux",
    'error looking up logging plugin zz: plugin "zz" not found': ("logger: no log driver named 'zz' is registered"),
}
# Checked elsewhere: in the engine, in volumes, in ociconfig, or at start in 18.09.
NOT_HERE = ("CapAdd", "CapDrop", "Binds", "Links", "VolumesFrom", "PidMode", "StorageOpt", "SecurityOpt")
CONFIG_KEYS = {"Healthcheck", "StopSignal", "Env", "WorkingDir", "NetworkingConfig", "Hostname", "HostConfig"}


def check(body: dict[str, Any], support: KernelSupport = SUPPORT) -> list[str]:
    """All checks in the engine's order."""
    request = parse_create(body)
    host_config = request.host_config
    creation.check_modes(request.config, host_config)
    creation.check_config(request.config)
    creation.check_auto_remove(host_config)
    for mount in host_config.mounts or ():
        resolve_mount(mount)
    creation.check_host_config(host_config)
    warnings = creation.check_resources(host_config, support)
    warnings += creation.check_limits_of_host(host_config, support, cgroup_driver="cgroupfs", runtimes=["runc"])
    creation.check_networking(request.networking)
    creation.fill_log_config(host_config.log_config, HostDefaults())
    creation.check_log_config(host_config.log_config)
    return warnings


def recorded_cases() -> list[Any]:
    cases = []
    for entry in RECORDED:
        given = entry["HostConfig_or_Config"]
        (key, *_) = given
        exists = "bind source path does not exist" in entry["message"]  # the file system is asked by volumes
        if key not in NOT_HERE and not exists and "Duplicate" not in entry["message"]:
            cases.append(pytest.param(given, entry["message"], id=entry["message"][:60]))
    return cases


@pytest.mark.parametrize(("given", "message"), recorded_cases())
def test_recorded_refusals(given: dict[str, Any], message: str) -> None:
    body: dict[str, Any] = {"Image": "busybox"}
    if CONFIG_KEYS & given.keys():
        body |= given
    else:
        body["HostConfig"] = given

    with pytest.raises(EngineError) as caught:
        check(body)

    assert IN_18_09.get(message, message) == caught.value.message


CONFLICT = "conflicting options: "


@pytest.mark.parametrize(
    ("config", "host_config", "message"),
    [
        ({"Hostname": "h"}, {"NetworkMode": "container:x"}, CONFLICT + "hostname and the network mode"),
        ({}, {"NetworkMode": "container:x", "Links": ["a"]},
         CONFLICT + "container type network can't be used with links. This would result in undefined behavior"),
        ({}, {"NetworkMode": "container:x", "Dns": ["1.1.1.1"]}, CONFLICT + "dns and the network mode"),
        ({}, {"NetworkMode": "container:x", "ExtraHosts": ["a:1.1.1.1"]},
         CONFLICT + "custom host-to-IP mapping and the network mode"),
        ({"MacAddress": "x"}, {"NetworkMode": "host"}, CONFLICT + "mac-address and the network mode"),
        ({}, {"NetworkMode": "container:x", "PublishAllPorts": True},
         CONFLICT + "port publishing and the container type network mode"),
        ({"ExposedPorts": {"80/tcp": {}}}, {"NetworkMode": "container:x"},
         CONFLICT + "port exposing and the container type network mode"),
        ({"Hostname": "h"}, {"UTSMode": "host"}, CONFLICT + "hostname and the UTS mode"),
        ({}, {"MemoryReservation": 1}, "Minimum memory reservation allowed is 4MB"),
        ({}, {"Memory": 8 << 20, "MemoryReservation": 16 << 20},
         "Minimum memory limit can not be less than memory reservation limit, see usage"),
        ({}, {"BlkioWeight": 5}, "Range of blkio weight is from 10 to 1000"),
        ({}, {"CpusetMems": "1"}, "Requested memory nodes are not available - requested 1, available: 0"),
        ({}, {"ExtraHosts": ["a:zz"]}, 'invalid IP address in add-host: "zz"'),
        ({}, {"PortBindings": {"x/tcp": []}}, 'invalid port specification: "x/tcp"'),
        ({}, {"PortBindings": {"80/tcp": [{"HostPort": "1/udp"}]}}, 'invalid port specification: "1/udp"'),
        ({}, {"Tmpfs": {"/": ""}}, "invalid specification: destination can't be '/'"),
        ({}, {"Tmpfs": {"x": ""}}, "invalid mount path: 'x' mount path must be absolute"),
        ({"Healthcheck": {"Timeout": 5}}, {}, "Timeout in Healthcheck cannot be less than 1ms"),
        ({"Healthcheck": {"StartPeriod": 5}}, {}, "StartPeriod in Healthcheck cannot be less than 1ms"),
        ({"NetworkingConfig": {"EndpointsConfig": {"a": {"IPAMConfig": {"IPv6Address": "1.2.3.4"}}}}}, {},
         "invalid IPv6 address: 1.2.3.4"),
        ({"NetworkingConfig": {"EndpointsConfig": {"a": None}}}, {}, "no EndpointSettings for a"),
    ],
)  # fmt: skip
def test_other_refusals(config: dict[str, Any], host_config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        check({"Image": "busybox", "HostConfig": host_config, **config})

    assert message == caught.value.message


def test_what_is_allowed_passes_without_a_word() -> None:
    host_config = {
        "ExtraHosts": ["a:1.2.3.4", "b:::1"],
        "PortBindings": {"80/tcp": [{"HostPort": ""}, {"HostPort": "8000-8010"}, {"HostIp": "zz", "HostPort": "1"}]},
        "RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3},
        "Memory": 4 << 20,
        "MemorySwap": -1,
        "NanoCpus": 2_000_000_000,
        "CpusetCpus": "0-1",
        "Isolation": "default",
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "x", "mode": "non-blocking", "max-buffer-size": "1m"}},
    }  # fmt: skip

    assert check({"Image": "busybox", "Env": ["A"], "StopSignal": "RTMIN+3", "HostConfig": host_config}) == []


def test_what_the_kernel_cannot_do_is_reset_with_a_warning() -> None:
    support = KernelSupport(**dict.fromkeys(("memory_limit", "memory_reservation", "kernel_memory", "oom_kill_disable", "memory_swappiness", "cpu_shares", "cpu_cfs_period", "cpu_cfs_quota", "cpuset", "blkio_weight", "blkio_weight_device", "blkio_throttle", "pids_limit", "ipv4_forwarding"), False))  # fmt: skip
    host_config = {
        "Memory": 8 << 20, "MemoryReservation": 8 << 20, "KernelMemory": 8 << 20, "OomKillDisable": True,
        "MemorySwappiness": 5, "CpuShares": 5, "CpuPeriod": 5000, "CpuQuota": 5000, "CpusetCpus": "7",
        "BlkioWeight": 10, "BlkioWeightDevice": [{}], "BlkioDeviceReadBps": [{}], "BlkioDeviceWriteBps": [{}],
        "BlkioDeviceReadIOps": [{}], "BlkioDeviceWriteIOps": [{}], "PidsLimit": 3,
    }  # fmt: skip
    request = parse_create({"Image": "x", "HostConfig": host_config})

    warnings = creation.check_resources(request.host_config, support)

    limits = request.host_config
    assert (limits.memory, limits.memory_swap, limits.memory_reservation, limits.kernel_memory) == (0, -1, 0, 0)
    assert (limits.oom_kill_disable, limits.memory_swappiness, limits.cpu_shares) == (None, None, 0)
    assert (limits.cpu_period, limits.cpu_quota, limits.cpuset_cpus, limits.pids_limit) == (0, 0, "", 0)
    assert limits.blkio_weight == 0
    assert not limits.blkio_device_read_bps
    assert len(warnings) == 16
    assert warnings[0] == (
        "Your kernel does not support memory limit capabilities or the cgroup is not mounted. Limitation discarded."
    )
    assert check({"Image": "x"}, support) == ["IPv4 forwarding is disabled. Networking will not work."]


def test_a_limit_without_swap_accounting_has_no_swap() -> None:
    request = parse_create({"Image": "x", "HostConfig": {"Memory": 8 << 20}})

    (warning,) = creation.check_resources(request.host_config, replace(SUPPORT, swap_limit=False))

    assert request.host_config.memory_swap == -1
    assert warning == (
        "Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited without swap."
    )


def test_the_oom_killer_is_not_switched_off_quietly() -> None:
    assert check({"Image": "x", "HostConfig": {"OomKillDisable": True}}) == [
        "OOM killer is disabled for the container, but no memory limit is set, "
        "this can result in the system running out of resources."
    ]
    assert check({"Image": "x", "HostConfig": {"NetworkMode": "host", "PortBindings": {"80/tcp": []}}}) == [
        "Published ports are discarded when using host network mode"
    ]


# --- the body -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, {}, {"HostConfig": {}}, {"HostConfig": {"Memory": 1}}, {"Image": None}])
def test_a_body_without_a_config_is_refused(body: Any) -> None:
    with pytest.raises(InvalidParameter, match="Config cannot be empty in order to create a container"):
        parse_create(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "json: cannot unmarshal array into Go value of type runconfig.ContainerConfigWrapper"),
        ({"Image": 1}, "json: cannot unmarshal number into Go struct field ContainerConfigWrapper.Image of type string"),
        ({"HostConfig": {"Memory": "x"}},
         "json: cannot unmarshal string into Go struct field HostConfig.HostConfig.Memory of type int64"),
        ({"NetworkingConfig": 1}, "json: cannot unmarshal number into Go struct field "
         "ContainerConfigWrapper.NetworkingConfig of type network.NetworkingConfig"),
    ],
)  # fmt: skip
def test_a_body_of_wrong_types_is_refused(body: Any, message: str) -> None:
    with pytest.raises(wire.MalformedJSON) as caught:
        parse_create(body)

    assert message == caught.value.message


def test_old_clients_put_host_settings_beside_the_config() -> None:
    inside = parse_create({"Image": "x", "Memory": 5, "VolumeDriver": "d", "HostConfig": {"Memory": 7}})
    outside = parse_create({"Image": "x", "Memory": 5, "Privileged": True})

    assert (inside.host_config.memory, inside.host_config.volume_driver) == (7, "d")
    assert (outside.host_config.memory, outside.host_config.privileged) == (5, True)
    assert inside.host_config.network_mode == "default"


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=6)
bodies = st.dictionaries(
    st.sampled_from([*wire.encode(ContainerConfig()), "HostConfig", "NetworkingConfig", "Memory"]),
    scalars
    | st.lists(scalars, max_size=3)
    | st.dictionaries(
        st.sampled_from(list(wire.encode(HostConfig()))) | st.text(max_size=4), scalars | st.lists(scalars), max_size=3
    ),
    max_size=5,
)


@given(bodies)
def test_any_body_passes_or_is_refused_by_kind(body: dict[str, Any]) -> None:
    with suppress(EngineError):
        check(body)


# --- what is filled in ----------------------------------------------------------------------------------------


def test_defaults_of_the_daemon_are_filled_in() -> None:
    host_config = HostConfig(ulimits=[Ulimit("nofile", 2, 1)])
    defaults = HostDefaults(ipc_mode="private", shm_size=5, ulimits=[Ulimit("nofile", 9, 9), Ulimit("core", 3, 3)])
    creation.fill_host_config(host_config, defaults)

    assert (host_config.ipc_mode, host_config.shm_size, host_config.runtime) == ("private", 5, "runc")
    assert host_config.ulimits == [Ulimit("nofile", 2, 1), Ulimit("core", 3, 3)]
    assert host_config.oom_kill_disable is False
    assert host_config.masked_paths
    assert host_config.security_opt is None


def test_privileged_containers_hide_nothing_and_say_so() -> None:
    host_config = HostConfig(privileged=True)
    creation.fill_host_config(host_config, HostDefaults())

    assert (host_config.masked_paths, host_config.readonly_paths) == (None, None)
    assert host_config.security_opt == ["label=disable"]


def test_log_options_of_the_daemon_go_with_its_driver_only() -> None:
    defaults = HostDefaults(log_driver="json-file", log_opts={"max-size": "1m"})
    unnamed, named, other = LogConfig(), LogConfig("json-file", {"max-file": "2"}), LogConfig("local")
    creation.fill_log_config(unnamed, defaults)
    creation.fill_log_config(named, defaults)
    creation.fill_log_config(other, defaults)

    assert (unnamed.type, unnamed.config) == ("json-file", {"max-size": "1m"})
    assert (named.type, named.config) == ("json-file", {"max-size": "1m", "max-file": "2"})
    assert (other.type, other.config) == ("local", {})


def test_an_image_never_overrides_the_request() -> None:
    image = wire.decode(ContainerConfig, {"Env": ["A=1"], "Cmd": ["x"], "Labels": {"l": "1"}, "Volumes": {"/v": {}}})
    config = wire.decode(ContainerConfig, {"Volumes": {}, "Labels": None})
    creation.merge_config(config, image)

    assert config.env == ["A=1"]
    assert wire.encode(config)["Volumes"] == {"/v": {}}
    assert config.labels == {"l": "1"}
    assert creation.command_of(config) == ("x", [])
    assert image.labels == {"l": "1"}


def test_the_container_id_variable_must_not_begin_another() -> None:
    config = ContainerConfig(env=["SELFISH=1"])
    with pytest.raises(Conflict, match="Error environment variable SELF already defined"):
        creation.fill_container_id_env(config, "SELF", "id")

    creation.fill_container_id_env(config, "ME", "id")
    assert config.env == ["SELFISH=1", "ME=id"]


@pytest.mark.parametrize(
    ("text", "link"), [("a", ("a", "a")), ("a:b", ("a", "b")), ("/a:/this/b", ("a", "b")), ("zz:", ("zz", ""))]
)
def test_links_are_read(text: str, link: tuple[str, str]) -> None:
    assert link == creation.parse_link(text)


@given(st.text("0123456789,-x", max_size=10))
def test_number_lists_are_read_or_refused(text: str) -> None:
    with suppress(ValueError):
        assert creation.parse_number_list(text)


# --- update ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "changes", "message"),
    [
        (HostConfig(cpu_period=1000), UpdateConfig(nano_cpus=1),
         "Conflicting options: Nano CPUs cannot be updated as CPU Period has already been set"),
        (HostConfig(cpu_quota=1000), UpdateConfig(nano_cpus=1),
         "Conflicting options: Nano CPUs cannot be updated as CPU Quota has already been set"),
        (HostConfig(nano_cpus=1), UpdateConfig(cpu_period=1000),
         "Conflicting options: CPU Period cannot be updated as NanoCPUs has already been set"),
        (HostConfig(nano_cpus=1), UpdateConfig(cpu_quota=1000),
         "Conflicting options: CPU Quota cannot be updated as NanoCPUs has already been set"),
        (HostConfig(memory_swap=5), UpdateConfig(memory=6),
         "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time"),
        (HostConfig(auto_remove=True), UpdateConfig(restart_policy=RestartPolicy("always")),
         "Restart policy cannot be updated because AutoRemove is enabled for the container"),
        (HostConfig(), UpdateConfig(kernel_memory=5),
         "Can not update kernel memory to a running container, please stop it first."),
    ],
)  # fmt: skip
def test_updates_that_do_not_fit_are_refused(present: HostConfig, changes: UpdateConfig, message: str) -> None:
    before = wire.encode(present)

    with pytest.raises(Conflict) as caught:
        creation.apply_update(present, changes, changes.restart_policy, running=True)

    assert message == caught.value.message
    assert before == wire.encode(present)


def test_zero_means_unchanged() -> None:
    host_config = HostConfig(cpu_shares=5, memory_swap=9)
    creation.apply_update(host_config, UpdateConfig(memory=8), RestartPolicy(), running=False)

    assert (host_config.cpu_shares, host_config.memory, host_config.restart_policy.name) == (5, 8, "")


def test_real_time_values_are_the_servers_fault_as_over_there() -> None:
    with pytest.raises(SystemFailure):
        check({"Image": "x", "HostConfig": {"CpuRealtimePeriod": 1, "CpuRealtimeRuntime": 2}})
