"""Containers as records, on a real database and real directories."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.core.container import RestartPolicy, Status, UpdateConfig
from balenapy.core.filters import parse_filters
from balenapy.engine.containers import _InitLayer
from balenapy.errors import Conflict, InvalidParameter, NotFound, SystemFailure
from tests.engine.container_rig import Rig, open_rig
from tests.trio_tests import trio_test

FIXTURES = Path(__file__).parent.parent / "data" / "fixtures"
PATH_ENV = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# BEHAVIOUR of 18.09 where the recording is of 20.10.
ONLY_IN_RECORDING = {"CgroupnsMode", "DeviceRequests", "KernelMemoryTCP"}
ONLY_IN_18_09 = {"ContainerIDEnv", "DiskQuota", "Runtime"}  # Runtime: there only from the first start on


def load(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text())


async def inspect_ids(rig: Rig, filters: str, **options: Any) -> list[str]:
    shown = await rig.containers.summaries(parse_filters(filters), **options)
    return [entry["Names"][0].removeprefix("/") for entry in shown]


# --- create ---------------------------------------------------------------------------------------------------


@trio_test
async def test_a_created_container_is_found_by_id_name_and_prefix(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        container = await rig.create("web")

        for name in (container.id, "web", "/web", container.id[:5], container.short_id):
            assert rig.containers.find(name) is container
        assert rig.actions == ["container create"]


@trio_test
async def test_inspect_of_a_created_container_has_the_keys_and_values_of_the_reference(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image(Env=[PATH_ENV], Cmd=["sh"])
        container = await rig.create("bpyref-plain")
        expected = load("container_inspect_created.json")

        shown = await rig.containers.inspect("bpyref-plain")

        assert list(expected) == list(shown)
        host_config = shown.pop("HostConfig")
        recorded = expected.pop("HostConfig")
        kept = [key for key in recorded if key not in ONLY_IN_RECORDING]
        assert kept == [key for key in host_config if key not in ONLY_IN_18_09]
        differing = {key for key in kept if recorded[key] != host_config[key]}
        # 18.09: shareable; PidsLimit is a number. Ours: the blkio weight stays what was sent.
        assert {"IpcMode", "PidsLimit"} == differing
        for key in ("Config", "State", "NetworkSettings"):
            assert list(expected[key]) == list(shown[key])
        for key in ("Id", "Created", "Image", "GraphDriver"):
            assert type(expected.pop(key)) is type(shown.pop(key))
        expected["Config"]["Hostname"] = container.short_id
        assert expected == shown


@trio_test
async def test_every_key_of_the_host_config_is_in_the_order_of_18_09(tmp_path: Path) -> None:
    order = """Binds ContainerIDFile ContainerIDEnv LogConfig NetworkMode PortBindings RestartPolicy AutoRemove
    VolumeDriver VolumesFrom CapAdd CapDrop Dns DnsOptions DnsSearch ExtraHosts GroupAdd IpcMode Cgroup Links
    OomScoreAdj PidMode Privileged PublishAllPorts ReadonlyRootfs SecurityOpt Tmpfs UTSMode UsernsMode ShmSize
    Sysctls Runtime ConsoleSize Isolation CpuShares Memory NanoCpus CgroupParent BlkioWeight BlkioWeightDevice
    BlkioDeviceReadBps BlkioDeviceWriteBps BlkioDeviceReadIOps BlkioDeviceWriteIOps CpuPeriod CpuQuota
    CpuRealtimePeriod CpuRealtimeRuntime CpusetCpus CpusetMems Devices DeviceCgroupRules DiskQuota KernelMemory
    MemoryReservation MemorySwap MemorySwappiness OomKillDisable PidsLimit Ulimits CpuCount CpuPercent
    IOMaximumIOps IOMaximumBandwidth Mounts MaskedPaths ReadonlyPaths Init""".split()
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        host_config = {
            "Tmpfs": {"/t": ""},
            "Sysctls": {"net.core.somaxconn": "1"},
            "Init": False,
            "Mounts": [{"Type": "tmpfs", "Target": "/m"}],
        }
        container = await rig.create(HostConfig=host_config)

        shown = await rig.containers.inspect(container.id)

        assert order == list(shown["HostConfig"])


@trio_test
async def test_image_settings_fill_what_the_request_leaves_open(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        image = {
            "Env": ["A=image", "B=image"],
            "Entrypoint": ["/entry"],
            "Cmd": ["image"],
            "Labels": {"a": "image", "b": "image"},
            "User": "nobody",
            "WorkingDir": "/work",
            "ExposedPorts": {"80/tcp": {}},
            "StopSignal": "SIGINT",
            "Healthcheck": {"Test": ["CMD", "true"], "Interval": 5_000_000_000},
        }
        await rig.add_image(**image)
        container = await rig.create(
            Cmd=None, Env=["A=own"], Labels={"a": "own"}, ExposedPorts={"81/udp": {}}, Healthcheck={"Retries": 7}
        )
        config = container.config

        assert (container.path, container.args) == ("/entry", ["image"])
        assert config.env == ["A=own", "B=image"]
        assert config.labels == {"a": "own", "b": "image"}
        assert sorted(config.exposed_ports or ()) == ["80/tcp", "81/udp"]
        assert (config.user, config.working_dir, config.stop_signal) == ("nobody", "/work", "SIGINT")
        assert config.healthcheck is not None
        assert config.healthcheck.test == ["CMD", "true"]
        assert (config.healthcheck.interval, config.healthcheck.retries) == (5_000_000_000, 7)


@trio_test
async def test_an_entrypoint_drops_the_images_command_and_an_empty_one_needs_a_command(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image(Entrypoint=["/entry"], Cmd=["image"])
        container = await rig.create(Entrypoint=["/own"], Cmd=None)
        assert (container.path, container.args) == ("/own", [])

        cleared = await rig.create(Entrypoint=[""], Cmd=["x"])
        assert (cleared.path, cleared.args) == ("x", [])
        with pytest.raises(InvalidParameter, match="No command specified"):
            await rig.create(Entrypoint=[""], Cmd=None, Image="", Hostname="h")


@trio_test
async def test_a_name_in_use_is_refused_in_the_words_clients_know(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        first = await rig.create("web")
        text = (
            f'Conflict. The container name "/web" is already in use by container "{first.id}". '
            "You have to remove (or rename) that container to be able to reuse that name."
        )

        with pytest.raises(Conflict) as caught:
            await rig.create("web")

        assert text == caught.value.message
        for bad in ("a", "a b", "/x//y", "-ab"):
            with pytest.raises(InvalidParameter) as invalid:
                await rig.create(bad)
            expected = f"Invalid container name ({bad}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
            assert expected == invalid.value.message


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ({"Image": "nope"}, NotFound, "No such image: nope:latest"),
        ({"HostConfig": {"SecurityOpt": ["zz"]}}, SystemFailure, 'invalid --security-opt 1: "zz"'),
        ({"HostConfig": {"SecurityOpt": ["zz=1"]}}, SystemFailure, 'invalid --security-opt 2: "zz=1"'),
        (
            {"HostConfig": {"Links": ["nope-x:y"]}},
            NotFound,
            "could not get container for nope-x: No such container: nope-x",
        ),
        ({"HostConfig": {"VolumesFrom": ["nope-x"]}}, NotFound, "No such container: nope-x"),
        ({"HostConfig": {"PidMode": "container:nope-x"}}, InvalidParameter, "No such container: nope-x"),
        ({"HostConfig": {"Binds": ["/a:/b:zz"]}}, SystemFailure, "invalid mode: zz"),
        ({"HostConfig": {"Binds": ["/a:/b", "/c:/b"]}}, InvalidParameter, "Duplicate mount point: /b"),
        ({"HostConfig": {"StorageOpt": {"zz": "1"}}}, SystemFailure, "Unknown option zz"),
        (
            {"HostConfig": {"ContainerIDEnv": "A"}, "Env": ["ABC=1"]},
            Conflict,
            "Error environment variable A already defined",
        ),
    ],
)
def test_a_failed_create_leaves_nothing_behind(
    tmp_path: Path, body: dict[str, Any], kind: type[Exception], message: str
) -> None:
    async def main() -> None:
        async with open_rig(tmp_path) as rig:
            await rig.add_image()
            before = rig.rows()

            with pytest.raises(kind) as caught:
                await rig.create("web", Volumes={"/v": {}}, **body)

            assert message == str(caught.value)
            assert before == rig.rows()
            assert not any((rig.engine.config.data_root / "snapshots").iterdir())
            assert rig.containers.all() == []
            await rig.create("web")  # the name is free again

    trio.run(main)


@trio_test
async def test_a_cancelled_create_leaves_nothing_behind(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        before = rig.rows()

        with trio.CancelScope() as scope:
            scope.cancel()
            await rig.create("web", Volumes={"/v": {}})

        assert scope.cancelled_caught
        assert before == rig.rows()
        assert rig.containers.all() == []
        await rig.create("web")


@trio_test
async def test_the_container_id_variable_is_appended(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image(Env=["A=1"])
        container = await rig.create(HostConfig={"ContainerIDEnv": "SELF"})

        assert container.config.env == ["A=1", f"SELF={container.id}"]
        assert container.host_config.container_id_env == "SELF"


@trio_test
async def test_the_init_layer_has_stubs_and_keeps_the_images_directory_modes(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        container = await rig.create()
        root = rig.engine.snapshots.get(container.id).init
        found = sorted(str(path.relative_to(root)) for path in root.rglob("*"))

        assert found == [
            ".dockerenv", "dev", "dev/console", "dev/pts", "dev/shm", "etc", "etc/hostname", "etc/hosts", "etc/mtab",
            "etc/resolv.conf", "proc", "sys",
        ]  # fmt: skip
        assert (root / "etc/mtab").readlink() == Path("/proc/mounts")

        bare = await rig.create(HostConfig={"Runtime": "bare"})
        assert list(rig.engine.snapshots.get(bare.id).init.iterdir()) == []


@trio_test
async def test_records_survive_the_engine(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image(Labels={"a": "b"})
        container = await rig.create("web", HostConfig={"Binds": ["data:/v"], "Memory": 8 << 20})
        rig.supervisors.start(container)
        container.state.conmon_pid = 7
        await rig.containers.store.update_state(container)
        shown = await rig.containers.inspect("web")

    async with open_rig(tmp_path) as rig:
        again = rig.containers.find("web")

        assert shown == await rig.containers.inspect("web")
        assert (again.state.status, again.state.conmon_pid) == (Status.RUNNING, 7)
        assert again.host_config.memory_swap == 16 << 20
        with pytest.raises(Conflict):
            await rig.create("web")


@trio_test
async def test_the_endpoint_is_that_of_the_network_mode(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        other = await rig.create("other")
        default = await rig.create()
        host = await rig.create(HostConfig={"NetworkMode": "host"})
        joined = await rig.create(HostConfig={"NetworkMode": "container:other"})
        asked = {"EndpointsConfig": {"net": {"Aliases": ["x"]}}}
        own = await rig.create(HostConfig={"NetworkMode": "net"}, NetworkingConfig=asked)

        assert list(default.endpoints) == ["bridge"]
        assert default.host_config.network_mode == "default"
        assert list(host.endpoints) == ["host"]
        assert joined.endpoints == {}
        assert joined.host_config.network_mode == f"container:{other.id}"
        assert own.endpoints["net"].aliases == ["x"]


@trio_test
async def test_links_name_the_child_twice_and_are_shown_by_inspect(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        child = await rig.create("db")
        parent = await rig.create("web", HostConfig={"Links": ["db:store"]})

        shown = await rig.containers.inspect("web")
        assert shown["HostConfig"]["Links"] == ["/db:/web/store"]
        assert rig.containers.names_of(child) == ["/db", "/web/store"]
        assert rig.containers.find("/web/store") is child

        await rig.containers.remove("web/store", link=True)
        assert rig.containers.names_of(child) == ["/db"]
        with pytest.raises(SystemFailure, match="Conflict, cannot remove the default link name of the container"):
            await rig.containers.remove("db", link=True)
        assert parent.host_config.links is None


@trio_test
async def test_an_image_counts_as_used_while_a_create_is_under_way(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        image = await rig.add_image()
        seen: list[int] = []
        prepare = rig.engine.volumes.prepare

        async def watching(*arguments: Any, **keywords: Any) -> Any:
            seen.append(len(rig.containers.using_image(image.image_id)))
            return await prepare(*arguments, **keywords)

        rig.engine.volumes.prepare = watching  # type: ignore[method-assign]
        await rig.create()

        assert seen == [1]
        assert len(rig.containers.using_image(image.image_id)) == 1


@trio_test
async def test_links_bring_variables_while_the_child_runs(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        child = await rig.create("db", ExposedPorts={"5432/tcp": {}}, Env=["USER=x"])
        parent = await rig.create("web", HostConfig={"Links": ["db:store"]})

        with pytest.raises(SystemFailure) as caught:
            rig.containers.link_env(parent)
        assert caught.value.message == "Cannot link to a non running container: /db AS /web/store"

        rig.supervisors.start(child)
        child.endpoints["bridge"].ip_address = "10.0.0.2"
        env = rig.containers.link_env(parent)
        assert "STORE_PORT=tcp://10.0.0.2:5432" in env
        assert env[-2:] == ["STORE_NAME=/web/store", "STORE_ENV_USER=x"]


@pytest.mark.parametrize(
    ("working_dir", "good"),
    [
        ("/", True),
        ("/dir", True),
        ("/new/dir", True),
        ("/link", True),
        ("/file", False),
        ("/file/below", False),
        ("/gone/file", True),
        ("/opaque/file", True),
        ("/dir/../file", False),
        ("/../../../../../../../etc/passwd", True),
    ],
)
@pytest.mark.root
def test_a_working_directory_must_not_be_a_file_of_the_image(tmp_path: Path, working_dir: str, good: bool) -> None:
    top, bottom = tmp_path / "top", tmp_path / "bottom"
    for path in (top / "dir", top / "opaque", bottom / "dir", bottom / "gone", bottom / "opaque", tmp_path / "init"):
        path.mkdir(parents=True)
    for name in ("file", "gone/file", "opaque/file"):
        (bottom / name).write_text("")
    os.mknod(top / "gone", stat.S_IFCHR, 0)
    (top / "link").symlink_to("file")
    os.setxattr(top / "opaque", "trusted.overlay.opaque", b"y")
    layer = _InitLayer([top, bottom], working_dir)

    if good:
        layer.fill(tmp_path / "init")
    else:
        with pytest.raises(SystemFailure) as caught:
            layer.fill(tmp_path / "init")
        assert caught.value.message == f"Cannot mkdir: {working_dir} is not a directory"


# --- find -----------------------------------------------------------------------------------------------------


@trio_test
async def test_look_up_refuses_what_is_empty_unknown_or_ambiguous(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        containers = [await rig.create() for _ in range(17)]  # two of them begin with the same digit
        first = {container.id[0] for container in containers}
        shared = next(digit for digit in first if sum(each.id[0] == digit for each in containers) > 1)

        for name, kind, message in (
            ("", InvalidParameter, 'invalid name or ID supplied: ""'),
            ("nope", NotFound, "No such container: nope"),
            (shared, SystemFailure, f"Multiple IDs found with provided prefix: {shared}"),
        ):
            with pytest.raises(kind) as caught:
                rig.containers.find(name)
            assert message == str(caught.value)


@trio_test
async def test_a_name_wins_over_an_id_prefix(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        first = await rig.create()
        named = await rig.create(first.id[:6])

        assert rig.containers.find(first.id[:6]) is named


# --- list -----------------------------------------------------------------------------------------------------


@trio_test
async def test_list_entries_have_the_keys_of_the_reference(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        container = await rig.create("bpyref-plain")
        rig.supervisors.start(container)
        (expected,) = load("container_list.json")

        (shown,) = await rig.containers.summaries()

        assert list(expected) == list(shown)
        assert list(expected["NetworkSettings"]["Networks"]["bridge"]) == list(
            shown["NetworkSettings"]["Networks"]["bridge"]
        )
        for key in ("Names", "Image", "Command", "Ports", "Labels", "State", "Status", "HostConfig", "Mounts"):
            assert expected[key] == shown[key]


@trio_test
async def test_list_shows_running_ones_newest_first_unless_asked_otherwise(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        one, _, three = [await rig.create(name) for name in ("one", "two", "three")]
        rig.supervisors.start(one)
        rig.supervisors.start(three)

        assert await inspect_ids(rig, "") == ["three", "one"]
        assert await inspect_ids(rig, "", everything=True) == ["three", "two", "one"]
        assert await inspect_ids(rig, "", limit=2) == ["three", "two"]
        assert await inspect_ids(rig, '{"status":["created"]}') == ["two"]


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ('{"name":["^/?on"]}', ["one"]),
        ('{"name":["o"]}', ["two", "one"]),
        ('{"label":["a"]}', ["three", "one"]),
        ('{"label":["a=1","b"]}', ["one"]),
        ('{"label":{"a=2":true}}', ["three"]),
        ('{"status":["exited"]}', ["two"]),
        ('{"exited":["3"]}', ["two"]),
        ('{"exited":["0"]}', []),
        ('{"ancestor":["busybox"]}', ["three", "two", "one"]),
        ('{"ancestor":["child"]}', ["three"]),
        ('{"ancestor":["unknown"]}', []),
        ('{"before":["two"]}', ["one"]),
        ('{"since":["two"]}', ["three"]),
        ('{"volume":["/v"]}', ["one"]),
        ('{"volume":["data"]}', ["one"]),
        ('{"network":["host"]}', ["two"]),
        ('{"publish":["8000-8100/tcp"]}', ["one"]),
        ('{"publish":["80"]}', []),
        ('{"expose":["53/udp"]}', ["three"]),
        ('{"health":["none"]}', ["three", "two", "one"]),
        ('{"is-task":["true"]}', []),
        ('{"is-task":["false"]}', ["three", "two", "one"]),
        ('{"isolation":["hyperv"]}', []),
        ('{"isolation":["default"]}', ["three", "two", "one"]),
    ],
)
def test_list_filters(tmp_path: Path, filters: str, names: list[str]) -> None:
    async def main() -> None:
        async with open_rig(tmp_path) as rig:
            image = await rig.add_image()
            await rig.add_image("child", parent=image.image_id)
            await rig.create(
                "one",
                Labels={"a": "1", "b": ""},
                HostConfig={"Binds": ["data:/v"], "PortBindings": {"8080/tcp": [{}]}},
            )
            two = await rig.create("two", HostConfig={"NetworkMode": "host"})
            await rig.create("three", Image="child", Labels={"a": "2"}, ExposedPorts={"53/udp": {}})
            rig.supervisors.start(two)
            rig.supervisors.stop(two, 3)

            assert names == await inspect_ids(rig, filters, everything=True)

    trio.run(main)


@pytest.mark.parametrize(
    ("filters", "kind", "message"),
    [
        ('{"status":["zz"]}', InvalidParameter, "Invalid filter 'status=zz'"),
        ('{"health":["zz"]}', InvalidParameter, "Unrecognised filter value for health: zz"),
        ('{"before":["nope"]}', SystemFailure, "no such container nope"),
        ('{"exited":["zz"]}', SystemFailure, 'strconv.Atoi: parsing "zz": invalid syntax'),
        ('{"is-task":["zz"]}', InvalidParameter, "Invalid filter 'is-task=[zz]'"),
    ],
)
def test_bad_filter_values_are_refused(tmp_path: Path, filters: str, kind: type[Exception], message: str) -> None:
    async def main() -> None:
        async with open_rig(tmp_path) as rig:
            with pytest.raises(kind) as caught:
                await rig.containers.summaries(parse_filters(filters))
            assert message == str(caught.value)

    trio.run(main)


@trio_test
async def test_list_shows_the_image_id_once_the_name_means_another_image(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        old = await rig.add_image()
        await rig.create("web")
        await rig.add_image(Cmd=["new"])

        (shown,) = await rig.containers.summaries(everything=True)

        assert shown["Image"] == old.image_id


# --- update, rename -------------------------------------------------------------------------------------------


@trio_test
async def test_update_changes_what_is_not_zero_and_reaches_a_running_container(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        container = await rig.create(HostConfig={"CpuShares": 512})
        await rig.containers.update(container.id, UpdateConfig(memory=64 << 20, memory_swap=128 << 20))
        assert rig.runtime.updates == []

        rig.supervisors.start(container)
        policy = RestartPolicy("on-failure", 3)
        await rig.containers.update(container.id, UpdateConfig(cpu_shares=256, restart_policy=policy))

        assert container.host_config.memory == 64 << 20
        assert container.host_config.restart_policy == policy
        (update,) = rig.runtime.updates
        assert update["cpu"]["shares"] == 256
        assert update["memory"]["limit"] == 64 << 20
        assert rig.actions[-2:] == ["container update", "container update"]


@trio_test
async def test_a_refused_update_changes_nothing(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        container = await rig.create(HostConfig={"Memory": 8 << 20, "AutoRemove": True})
        rig.supervisors.start(container)
        before = json.dumps(await rig.containers.inspect(container.id))
        wrapped = f"Cannot update container {container.id}: "
        for changes, kind, message in (
            (
                UpdateConfig(memory=1 << 30),
                Conflict,
                wrapped
                + "Memory limit should be smaller than already set memoryswap limit, "
                + "update the memoryswap at the same time",
            ),
            (
                UpdateConfig(restart_policy=RestartPolicy("always")),
                Conflict,
                wrapped + "Restart policy cannot be updated because AutoRemove is enabled for the container",
            ),
            (UpdateConfig(memory=1), InvalidParameter, "Minimum memory limit allowed is 4MB"),
            (
                UpdateConfig(restart_policy=RestartPolicy("foo")),
                InvalidParameter,
                "invalid restart policy 'foo'",
            ),
        ):
            with pytest.raises(kind) as caught:
                await rig.containers.update(container.id, changes)
            assert message == str(caught.value)

        rig.runtime.error = SystemFailure("runc update failed: no")
        with pytest.raises(SystemFailure) as failed:
            await rig.containers.update(container.id, UpdateConfig(cpu_shares=5))

        assert failed.value.message == wrapped + "runc update failed: no"
        assert before == json.dumps(await rig.containers.inspect(container.id))


@trio_test
async def test_rename_moves_the_name_and_tells_both(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        container = await rig.create("old")
        await rig.create("taken")
        for old, new, kind, message in (
            ("old", "", InvalidParameter, "Neither old nor new names may be empty"),
            ("old", "/old", InvalidParameter, "Renaming a container with the same name as its current name"),
            (
                "old",
                "x y",
                InvalidParameter,
                "Error when allocating new name: Invalid container name (/x y), "
                "only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed",
            ),
        ):
            with pytest.raises(kind) as caught:
                await rig.containers.rename(old, new)
            assert message == str(caught.value)
        with pytest.raises(Conflict, match=r"^Error when allocating new name: Conflict\. The container name"):
            await rig.containers.rename("old", "taken")

        await rig.containers.rename("old", "new")

        assert rig.containers.find("new") is container
        event = rig.events[-1]
        assert (event.action, event.attributes["oldName"], event.attributes["name"]) == ("rename", "/old", "new")
        await rig.create("old")


# --- remove, prune --------------------------------------------------------------------------------------------


@trio_test
async def test_remove_deletes_rows_layer_name_and_anonymous_volumes(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        before = rig.rows()
        await rig.create("web", Volumes={"/anonymous": {}}, HostConfig={"Binds": ["named:/n"]})
        rig.events.clear()

        await rig.containers.remove("web", remove_volumes=True)

        assert rig.rows() == before | {"volume": 1}
        assert rig.actions == ["volume destroy", "container destroy"]
        with pytest.raises(NotFound):
            rig.containers.find("web")
        await rig.create("web")


@trio_test
async def test_remove_without_v_keeps_anonymous_volumes(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        await rig.create("web", Volumes={"/anonymous": {}})

        await rig.containers.remove("web")

        assert rig.rows()["volume"] == 1


@trio_test
async def test_a_running_container_is_removed_only_by_force(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        container = await rig.create("web")
        rig.supervisors.start(container)
        text = (
            f"You cannot remove a running container {container.id}. "
            "Stop the container before attempting removal or force remove"
        )

        with pytest.raises(Conflict) as caught:
            await rig.containers.remove("web")
        assert text == caught.value.message

        await rig.containers.remove("web", force=True)
        assert rig.supervisors.calls == ["kill web", "remove_process web", "tell_removed web"]


@trio_test
async def test_a_second_removal_at_the_same_time_is_refused(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        await rig.create("web")
        refused: list[str] = []

        async def remove() -> None:
            try:
                await rig.containers.remove("web")
            except Conflict as error:
                refused.append(error.message)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(remove)
            nursery.start_soon(remove)

        assert refused == ["removal of container web is already in progress"]


@trio_test
async def test_a_removal_that_fails_leaves_it_dead_and_removable(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        container = await rig.create("web")
        remove_process = rig.supervisors.remove_process

        async def fail(_: object) -> None:
            await trio.lowlevel.checkpoint()
            raise SystemFailure("busy")

        rig.supervisors.remove_process = fail  # type: ignore[method-assign]
        with pytest.raises(SystemFailure, match="busy"):
            await rig.containers.remove("web")
        assert container.state.status is Status.DEAD

        rig.supervisors.remove_process = remove_process  # type: ignore[method-assign]
        await rig.containers.remove("web", force=True)
        assert rig.containers.all() == []


@trio_test
async def test_prune_removes_what_is_stopped_and_matches(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        running = await rig.create("running")
        kept = await rig.create("kept", Labels={"keep": "yes"})
        old = await rig.create("old")
        old.created_ns -= 7200 * 10**9
        new = await rig.create("new")
        rig.supervisors.start(running)
        (rig.engine.snapshots.get(old.id).diff / "file").write_bytes(b"x" * 1000)

        removed, reclaimed = await rig.containers.prune(parse_filters('{"until":["1h"],"label!":["keep"]}'))
        assert (removed, reclaimed) == ([old.id], 1000)

        removed, _ = await rig.containers.prune(parse_filters('{"label!":["keep=yes"]}'))
        assert removed == [new.id]
        assert {each.id for each in rig.containers.all()} == {running.id, kept.id}


@trio_test
async def test_an_init_layer_that_a_power_cut_has_thinned_out_is_completed_at_start(tmp_path: Path) -> None:
    """Its files are made without waiting for the disk, so a cut may take any of them after the rows are durable."""
    async with open_rig(tmp_path) as rig:
        await rig.add_image()
        container = await rig.create("box")
        init = rig.engine.snapshots.get(container.id).init
        (init / ".dockerenv").unlink()
        (init / "etc" / "mtab").unlink()
        (init / "dev" / "shm").rmdir()
        (init / "sys").rmdir()

        rig.containers.recover()

        assert (init / ".dockerenv").is_file()
        assert os.readlink(init / "etc" / "mtab") == "/proc/mounts"
        assert (init / "dev" / "shm").is_dir()
        assert (init / "sys").is_dir()
