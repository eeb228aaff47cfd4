"""What a container gets, as the OCI runtime is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import wire
from balenapy.core.container import Container, ContainerConfig, HostConfig
from balenapy.core.creation import HostDefaults, fill_host_config
from balenapy.core.ociconfig import (
    ALL_CAPABILITIES,
    DEFAULT_CAPABILITIES,
    DEFAULT_MASKED_PATHS,
    DEFAULT_READONLY_PATHS,
    RLIM_INFINITY,
    DeviceNode,
    HostFacts,
    SpecInputs,
    User,
    build_env,
    build_spec,
    find_user,
    merge_env,
    merge_tmpfs_options,
    parse_security_options,
)
from balenapy.errors import InvalidParameter, SystemFailure

ID = "0123456789ab" + "c" * 52
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Bind:
    source: str
    destination: str
    options: tuple[str, ...] = ("rbind", "rprivate")
    type: str = "bind"


def container(config: dict[str, Any] | None = None, **host_config: Any) -> Container:
    made = Container(
        id=ID,
        name="web",
        path="sleep",
        args=["1000"],
        config=wire.decode(ContainerConfig, {"Hostname": "box", **(config or {})}),
        host_config=wire.decode(HostConfig, host_config),
    )
    fill_host_config(made.host_config, HostDefaults())
    return made


def inputs(**given: Any) -> SpecInputs:
    values = {
        "rootfs": "/run/root",
        "facts": HostFacts(),
        "netns_path": "/run/netns/x",
        "hosts_path": "/c/hosts",
        "hostname_path": "/c/hostname",
        "resolv_conf_path": "/c/resolv.conf",
        "shm_path": "/c/shm",
        "init_path": "/usr/bin/tini",
    }
    return SpecInputs(**{**values, **given})


def spec_of(config: dict[str, Any] | None = None, given: SpecInputs | None = None, **host_config: Any) -> Any:
    spec = build_spec(container(config, **host_config), given or inputs())
    json.dumps(spec)  # is JSON all through
    return spec


def mounts_of(spec: dict[str, Any]) -> dict[str, list[str]]:
    return {mount["destination"]: mount["options"] for mount in spec["mounts"]}


def namespaces_of(spec: dict[str, Any]) -> dict[str, str]:
    return {each["type"]: each.get("path", "") for each in spec["linux"]["namespaces"]}


# --- process --------------------------------------------------------------------------------------------------


def test_a_plain_container() -> None:
    spec = spec_of()
    process = spec["process"]

    assert process["args"] == ["sleep", "1000"]
    assert process["env"] == [PATH, "HOSTNAME=box"]
    assert process["cwd"] == "/"
    assert process["user"] == {"uid": 0, "gid": 0, "additionalGids": [0]}
    assert (process["terminal"], process["noNewPrivileges"], process["oomScoreAdj"]) == (False, False, 0)
    assert spec["root"] == {"path": "/run/root", "readonly": False}
    assert spec["hostname"] == "box"
    assert namespaces_of(spec) == {"mount": "", "network": "/run/netns/x", "uts": "", "pid": "", "ipc": ""}
    assert spec["linux"]["cgroupsPath"] == f"/docker/{ID}"
    assert tuple(spec["linux"]["maskedPaths"]) == DEFAULT_MASKED_PATHS
    assert tuple(spec["linux"]["readonlyPaths"]) == DEFAULT_READONLY_PATHS
    assert "hooks" not in spec


def test_the_environment_is_merged_in_order() -> None:
    config = {"Env": ["B=2", "PATH=/x", "HOSTNAME", "B=3", "EMPTY="], "Tty": True}
    spec = spec_of(config, inputs(link_env=["DB_PORT=1"]))

    assert spec["process"]["env"] == ["PATH=/x", "TERM=xterm", "DB_PORT=1", "B=2", "B=3", "EMPTY="]
    assert spec["process"]["terminal"] is True


@given(st.lists(st.text("AB=x", max_size=4)), st.lists(st.text("AB=x", max_size=4)))
def test_an_override_wins_and_nothing_else_is_lost(defaults: list[str], overrides: list[str]) -> None:
    merged = merge_env(defaults, overrides)

    last = {entry.partition("=")[0]: entry for entry in overrides}
    for entry in merged:
        assert entry in defaults or entry in overrides
    for entry in defaults:
        if entry.partition("=")[0] not in last:
            assert entry in merged


def test_exec_decides_about_term_by_itself() -> None:
    assert "TERM=xterm" in build_env(ContainerConfig(tty=False), tty=True)
    assert "TERM=xterm" not in build_env(ContainerConfig(tty=True), tty=False)


def test_init_is_process_one_where_the_pid_namespace_is_private() -> None:
    spec = spec_of(Init=True)
    assert spec["process"]["args"] == ["/dev/init", "--", "sleep", "1000"]
    assert spec["mounts"][-1] == {
        "destination": "/dev/init", "type": "bind", "source": "/usr/bin/tini", "options": ["bind", "ro"],
    }  # fmt: skip

    by_default = inputs(init_default=True)
    assert spec_of(given=by_default)["process"]["args"][0] == "/dev/init"
    assert spec_of(given=by_default, Init=False)["process"]["args"] == ["sleep", "1000"]
    assert spec_of(Init=True, PidMode="host")["process"]["args"] == ["sleep", "1000"]


def test_the_terminal_has_the_size_asked_for() -> None:
    assert spec_of({"Tty": True}, ConsoleSize=[24, 80])["process"]["consoleSize"] == {"height": 24, "width": 80}
    assert "consoleSize" not in spec_of(ConsoleSize=[24, 80])["process"]


# --- user -----------------------------------------------------------------------------------------------------

PASSWD = """root:x:0:0:root:/root:/bin/sh
# comment
bad line
nobody:x:65534:65533:nobody:/nonexistent:/bin/false
app:x:1000:1001::/home/app:/bin/sh
"""
GROUP = "root:x:0:root\nwheel:x:10:root,app\nstaff:x:50:app\napp:x:1001:\n"


@pytest.mark.parametrize(
    ("spec", "user"),
    [
        ("", User(0, 0, (0, 10), "/root")),
        ("root", User(0, 0, (0, 10), "/root")),
        ("app", User(1000, 1001, (1001, 10, 50), "/home/app")),
        ("1000", User(1000, 1001, (1001, 10, 50), "/home/app")),
        ("app:staff", User(1000, 50, (50,), "/home/app")),
        ("app:7", User(1000, 7, (7,), "/home/app")),
        ("4242", User(4242, 0, (0,), "/")),
        ("4242:4243", User(4242, 4243, (4243,), "/")),
        (":wheel", User(0, 10, (10,), "/root")),
    ],
)
def test_users_are_found_in_the_containers_files(spec: str, user: User) -> None:
    assert user == find_user(spec, PASSWD, GROUP)


def test_without_files_numbers_do() -> None:
    assert find_user("", "", "") == User(0, 0, (0,))
    assert find_user("7:8", "", "", ["9", "9"]) == User(7, 8, (8, 9))
    assert find_user("app", PASSWD, GROUP, ["wheel", "33"]).additional_gids == (1001, 10, 50, 33)


@pytest.mark.parametrize(
    ("spec", "added", "message"),
    [
        ("zz", [], "unable to find user zz: no matching entries in passwd file"),
        ("zz:0", [], "unable to find user zz: no matching entries in passwd file"),
        ("app:zz", [], "unable to find group zz: no matching entries in group file"),
        ("", ["zz"], "Unable to find group zz: no matching entries in group file"),
        ("4294967295", [], "uids and gids must be in range 0-2147483647"),
        ("0:4294967295", [], "uids and gids must be in range 0-2147483647"),
    ],
)
def test_unknown_users_and_groups_are_refused(spec: str, added: list[str], message: str) -> None:
    with pytest.raises(SystemFailure) as caught:
        find_user(spec, PASSWD, GROUP, added)

    assert message == caught.value.message


@given(st.text(), st.text(":root0x\n9#"), st.text(":root0,x\n9#"))
def test_any_file_gives_a_user_or_a_refusal(spec: str, passwd: str, group: str) -> None:
    try:
        user = find_user(spec, passwd, group)
    except SystemFailure:
        return
    assert user.uid >= 0
    assert user.gid >= 0


# --- capabilities and confinement -----------------------------------------------------------------------------


def bounding(**host_config: Any) -> list[str]:
    caps: list[str] = spec_of(**host_config)["process"]["capabilities"]["bounding"]
    return caps


def test_capabilities_are_the_defaults_plus_added_minus_dropped() -> None:
    assert bounding() == list(DEFAULT_CAPABILITIES)
    assert bounding(CapAdd=["NET_ADMIN", "cap_sys_time"]) == [*DEFAULT_CAPABILITIES, "CAP_NET_ADMIN", "CAP_SYS_TIME"]
    assert "CAP_CHOWN" not in bounding(CapDrop=["cap_chown"])
    assert bounding(CapDrop=["ALL"], CapAdd=["KILL"]) == ["CAP_KILL"]
    everything_but = [name for name in ALL_CAPABILITIES if name != "CAP_SYS_ADMIN"]
    assert bounding(CapAdd=["all"], CapDrop=["SYS_ADMIN"]) == everything_but
    assert bounding(Privileged=True, CapDrop=["ALL"]) == list(ALL_CAPABILITIES)


def test_nobody_gets_what_we_do_not_have() -> None:
    facts = HostFacts(capabilities=frozenset(ALL_CAPABILITIES) - {"CAP_SYS_RESOURCE", "CAP_MKNOD"})
    given = inputs(facts=facts)

    spec = spec_of(given=given, CapAdd=["SYS_RESOURCE"])
    assert not {"CAP_SYS_RESOURCE", "CAP_MKNOD"} & set(spec["process"]["capabilities"]["bounding"])
    assert given.warnings == ["not available on this machine: CAP_SYS_RESOURCE"]
    privileged = spec_of(given=inputs(facts=facts), Privileged=True)
    assert set(privileged["process"]["capabilities"]["bounding"]) == facts.capabilities


def test_only_root_has_effective_capabilities_and_nobody_inherits() -> None:
    root = spec_of()["process"]["capabilities"]
    user = spec_of({"User": "1000"})["process"]["capabilities"]

    assert root["effective"] == root["permitted"] == root["bounding"]
    assert user["effective"] == user["permitted"] == []
    assert user["bounding"] == root["bounding"]
    assert root["inheritable"] == root["ambient"] == []


@pytest.mark.parametrize(
    ("host_config", "message"),
    [
        ({"CapAdd": ["x"]}, 'linux spec capabilities: Unknown capability to add: "CAP_X"'),
        ({"CapDrop": ["x"]}, 'linux spec capabilities: Unknown capability drop: "X"'),
        ({"DeviceCgroupRules": ["zz"]}, "invalid device cgroup rule format: 'zz'"),
        ({"Tmpfs": {"/x": "zz"}}, 'invalid tmpfs option ["zz"]'),
        ({"Tmpfs": {"/x": "a=b"}}, 'invalid tmpfs option ["a" "b"]'),
        ({"IpcMode": "zz"}, "invalid IPC mode: zz"),
        ({"Ulimits": [{"Name": "zz", "Soft": 1, "Hard": 1}]}, "invalid ulimit type: zz"),
        ({"Ulimits": [{"Name": "nofile", "Soft": 2, "Hard": 1}]},
         "ulimit soft limit must be less than or equal to hard limit: 2 > 1"),
        ({"BlkioDeviceReadBps": [{"Path": "/dev/x", "Rate": 1}]}, "no such device: /dev/x"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(host_config: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemFailure) as caught:
        spec_of(**host_config)

    assert message == caught.value.message


def test_privileged_has_nothing_hidden() -> None:
    nodes = [DeviceNode("/dev/sda", "b", 8, 0, 0o660, 0, 6)]
    spec = spec_of(given=inputs(host_devices=nodes), Privileged=True)
    linux, mounts = spec["linux"], mounts_of(spec)

    assert "maskedPaths" not in linux
    assert "readonlyPaths" not in linux
    assert "seccomp" not in linux
    assert "ro" not in mounts["/sys"] + mounts["/sys/fs/cgroup"]
    assert linux["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert linux["devices"] == [
        {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0, "fileMode": 0o660, "uid": 0, "gid": 6}
    ]


def test_seccomp_may_be_off_or_a_clients() -> None:
    assert spec_of()["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert "seccomp" not in spec_of(SecurityOpt=["seccomp=unconfined"])["linux"]
    own = '{"defaultAction": "SCMP_ACT_ALLOW"}'
    assert spec_of(SecurityOpt=[f"seccomp={own}"])["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ALLOW"
    assert spec_of(given=inputs(seccomp_profile=own))["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ALLOW"
    without = inputs(facts=HostFacts(seccomp=False))
    assert "seccomp" not in spec_of(given=without)["linux"]
    with pytest.raises(SystemFailure, match="seccomp is not enabled"):
        spec_of(given=without, SecurityOpt=[f"seccomp={own}"])


def test_security_options() -> None:
    options = parse_security_options(["no-new-privileges", "label:type:x", "apparmor=p", "seccomp=unconfined"])
    assert (options.no_new_privileges, options.labels, options.apparmor) == (True, ("type:x",), "p")
    assert parse_security_options(["no-new-privileges:false"]).no_new_privileges is False
    assert spec_of(SecurityOpt=["no-new-privileges"])["process"]["noNewPrivileges"] is True
    assert spec_of(given=inputs(no_new_privileges=True))["process"]["noNewPrivileges"] is True
    for option, number in (("zz", 1), ("zz=1", 2), ("no-new-privileges=zz", 2)):
        with pytest.raises(SystemFailure) as caught:
            parse_security_options([option])
        assert caught.value.message == f'invalid --security-opt {number}: "{option}"'


def test_apparmor_where_the_kernel_has_it() -> None:
    given = inputs(facts=HostFacts(apparmor=True))

    assert spec_of(given=given)["process"]["apparmorProfile"] == "docker-default"
    assert spec_of(given=given, Privileged=True)["process"]["apparmorProfile"] == "unconfined"
    assert spec_of(given=given, SecurityOpt=["apparmor=x"])["process"]["apparmorProfile"] == "x"
    assert "apparmorProfile" not in spec_of()["process"]
    unloaded = inputs(facts=HostFacts(apparmor=True, apparmor_default=False))
    assert "apparmorProfile" not in spec_of(given=unloaded)["process"]
    assert spec_of(given=unloaded, SecurityOpt=["apparmor=x"])["process"]["apparmorProfile"] == "x"


def test_a_given_list_of_paths_replaces_the_default() -> None:
    linux = spec_of(MaskedPaths=[], ReadonlyPaths=["/proc/x"])["linux"]

    assert (linux["maskedPaths"], linux["readonlyPaths"]) == ([], ["/proc/x"])


# --- namespaces -----------------------------------------------------------------------------------------------


def test_host_modes_leave_namespaces_out() -> None:
    spec = spec_of(given=inputs(netns_path=None), PidMode="host", IpcMode="host", UTSMode="host")

    assert namespaces_of(spec) == {"mount": ""}
    assert "hostname" not in spec


def test_joined_namespaces_are_paths() -> None:
    given = inputs(pid_namespace="/proc/7/ns/pid", ipc_namespace="/proc/7/ns/ipc")
    spec = spec_of(given=given, PidMode=f"container:{ID}", IpcMode=f"container:{ID}")

    assert namespaces_of(spec)["pid"] == "/proc/7/ns/pid"
    assert namespaces_of(spec)["ipc"] == "/proc/7/ns/ipc"


def test_cgroup_v2_has_a_namespace_of_its_own() -> None:
    assert "cgroup" in namespaces_of(spec_of(given=inputs(facts=HostFacts(cgroup_version=2))))
    assert "cgroup" not in namespaces_of(spec_of())


@pytest.mark.parametrize(
    ("driver", "daemon", "own", "path"),
    [
        ("cgroupfs", "", "", f"/docker/{ID}"),
        ("cgroupfs", "/p", "", f"/p/{ID}"),
        ("cgroupfs", "/p", "/own/", f"/own/{ID}"),
        ("systemd", "", "", f"system.slice:docker:{ID}"),
        ("systemd", "a.slice", "b.slice", f"b.slice:docker:{ID}"),
    ],
)
def test_the_cgroup_is_below_the_nearest_parent_named(driver: str, daemon: str, own: str, path: str) -> None:
    given = inputs(cgroup_driver=driver, cgroup_parent=daemon)

    assert spec_of(given=given, CgroupParent=own)["linux"]["cgroupsPath"] == path


def test_a_domain_name_is_part_of_the_host_name() -> None:
    assert spec_of({"Hostname": "a", "Domainname": "b.c"})["hostname"] == "a.b.c"


# --- mounts ---------------------------------------------------------------------------------------------------


def test_default_mounts() -> None:
    assert mounts_of(spec_of()) == {
        "/proc": ["nosuid", "noexec", "nodev"],
        "/dev": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        "/dev/pts": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        "/sys": ["nosuid", "noexec", "nodev", "ro"],
        "/sys/fs/cgroup": ["ro", "nosuid", "noexec", "nodev"],
        "/dev/mqueue": ["nosuid", "noexec", "nodev"],
        "/dev/shm": ["rbind", "rprivate"],
        "/etc/resolv.conf": ["rbind", "rprivate"],
        "/etc/hostname": ["rbind", "rprivate"],
        "/etc/hosts": ["rbind", "rprivate"],
    }


def test_shm_follows_the_ipc_mode() -> None:
    private = spec_of(given=inputs(shm_path=""), IpcMode="private", ShmSize=1 << 20)
    assert mounts_of(private)["/dev/shm"] == ["nosuid", "noexec", "nodev", "mode=1777", "size=1048576"]
    assert "/dev/shm" not in mounts_of(spec_of(IpcMode="none"))


def test_user_mounts_replace_defaults_and_come_sorted_by_depth() -> None:
    mounts = (Bind("/b", "/a/b/c"), Bind("/h", "/etc/hosts"), Bind("/a", "/a"), Bind("/s", "/dev/shm"))
    spec = spec_of(given=inputs(mounts=mounts), Tmpfs={"/t": "size=1m,exec"})

    order = [mount["destination"] for mount in spec["mounts"]]
    assert order[-7:] == ["/a", "/t", "/etc/hosts", "/dev/shm", "/a/b/c", "/etc/resolv.conf", "/etc/hostname"]
    assert order.count("/dev/shm") == order.count("/etc/hosts") == 1
    assert mounts_of(spec)["/t"] == ["nosuid", "nodev", "rprivate", "size=1m", "exec"]


def test_a_tmpfs_hides_a_volume_but_not_another_tmpfs() -> None:
    spec = spec_of(given=inputs(mounts=(Bind("/volume", "/v"),)), Tmpfs={"/v": ""})
    assert [mount["source"] for mount in spec["mounts"] if mount["destination"] == "/v"] == ["tmpfs"]

    twice = inputs(mounts=(Bind("tmpfs", "/v", (), "tmpfs"),))
    with pytest.raises(InvalidParameter, match="Duplicate mount point: /v"):
        spec_of(given=twice, Tmpfs={"/v": ""})


def test_a_user_mount_on_dev_drops_what_is_below() -> None:
    spec = spec_of(given=inputs(mounts=(Bind("/dev", "/dev"),)))

    assert [each for each in mounts_of(spec) if each.startswith("/dev")] == ["/dev"]


def test_a_read_only_root_makes_default_mounts_read_only_but_not_proc_and_dev() -> None:
    spec = spec_of(given=inputs(mounts=(Bind("/v", "/v"),)), ReadonlyRootfs=True)

    writable = [path for path, options in mounts_of(spec).items() if "ro" not in options]
    assert sorted(writable) == ["/dev", "/dev/mqueue", "/dev/pts", "/dev/shm", "/proc", "/v"]
    assert spec["root"]["readonly"] is True


@pytest.mark.parametrize(
    ("propagations", "root"),
    [(("rprivate",), None), (("rslave",), "rslave"), (("slave", "shared"), "shared"), (("rshared",), "shared")],
)
def test_the_root_propagates_as_its_mounts_demand(propagations: tuple[str, ...], root: str | None) -> None:
    mounts = tuple(Bind("/x", f"/{word}", ("rbind", word)) for word in propagations)

    assert spec_of(given=inputs(mounts=mounts))["linux"].get("rootfsPropagation") == root


@given(st.lists(st.sampled_from(["ro", "rw", "exec", "noexec", "size=1m", "size=2m", "mode=700", "shared", "private"])))
def test_merged_tmpfs_options_are_a_fixed_point(options: list[str]) -> None:
    merged = merge_tmpfs_options(options)

    assert merged == merge_tmpfs_options(merged)
    assert set(options[-1:]) <= set(merged)


# --- resources ------------------------------------------------------------------------------------------------


def test_resources_of_a_plain_container() -> None:
    resources = spec_of()["linux"]["resources"]

    assert resources["cpu"] == {"shares": 0}
    assert "pids" not in resources
    assert resources["memory"] == {"disableOOMKiller": False}
    assert resources["devices"][0] == {"allow": False, "access": "rwm"}
    assert resources["devices"][-1] == {"allow": False, "type": "c", "major": 10, "minor": 229, "access": "rwm"}


def test_limits_are_written_as_the_table_says() -> None:
    spec = spec_of(
        given=inputs(device_numbers={"/dev/sda": (8, 0)}),
        Memory=8 << 20, MemoryReservation=4 << 20, MemorySwap=-1, MemorySwappiness=10, CpuShares=512,
        NanoCpus=1_500_000_000, CpusetCpus="0", CpusetMems="0", PidsLimit=7, BlkioWeight=100,
        BlkioWeightDevice=[{"Path": "/dev/sda", "Weight": 10}], BlkioDeviceReadBps=[{"Path": "/dev/sda", "Rate": 5}],
        Sysctls={"net.core.somaxconn": "1024"},
    )  # fmt: skip

    assert spec["linux"]["resources"] | {"devices": None} == {
        "memory": {"limit": 8 << 20, "reservation": 4 << 20, "swappiness": 10, "disableOOMKiller": False},
        "cpu": {"shares": 512, "period": 100_000, "quota": 150_000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 7},
        "blockIO": {
            "weight": 100,
            "weightDevice": [{"major": 8, "minor": 0, "weight": 10}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 5}],
        },
        "devices": None,
    }
    assert spec["linux"]["sysctl"] == {"net.core.somaxconn": "1024"}
    twice = spec_of(Memory=8 << 20)
    assert twice["linux"]["resources"]["memory"]["swap"] == 16 << 20


def test_devices_are_made_and_allowed() -> None:
    nodes = [(DeviceNode("/dev/x", "c", 1, 2, 0o600), "r")]
    linux = spec_of(given=inputs(devices=nodes), DeviceCgroupRules=["c 4:* rw", "a *:* rwm"])["linux"]

    assert [node["path"] for node in linux["devices"]] == ["/dev/x"]
    assert linux["resources"]["devices"][-3:] == [
        {"allow": True, "type": "c", "major": 1, "minor": 2, "access": "r"},
        {"allow": True, "type": "c", "major": 4, "minor": -1, "access": "rw"},
        {"allow": True, "type": "a", "major": -1, "minor": -1, "access": "rwm"},
    ]


def test_rlimits_are_cut_where_we_may_not_raise_them() -> None:
    ulimits = [{"Name": "nofile", "Soft": 500, "Hard": 5000}, {"Name": "core", "Soft": -1, "Hard": -1}]
    assert spec_of(Ulimits=ulimits)["process"]["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "hard": 5000, "soft": 500},
        {"type": "RLIMIT_CORE", "hard": RLIM_INFINITY, "soft": RLIM_INFINITY},
    ]

    given = inputs(facts=HostFacts(can_raise_limits=False, hard_limits={"nofile": 1000}))
    assert spec_of(given=given, Ulimits=ulimits[:1])["process"]["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "hard": 1000, "soft": 500}
    ]
    assert given.warnings == ["ulimit nofile cut to 1000: the engine may not raise it"]


def test_the_oom_score_is_not_below_our_own_where_we_may_not() -> None:
    assert spec_of(OomScoreAdj=-500)["process"]["oomScoreAdj"] == -500
    given = inputs(facts=HostFacts(can_raise_limits=False, oom_score_adj=-10))
    assert spec_of(given=given, OomScoreAdj=-500)["process"]["oomScoreAdj"] == -10
    assert spec_of(given=given, OomScoreAdj=500)["process"]["oomScoreAdj"] == 500
    assert len(given.warnings) == 1
