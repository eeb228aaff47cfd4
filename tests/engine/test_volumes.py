"""Volumes: what a create resolves and fills, what is in use, what a removal leaves."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from balenapy.core.container import Container, Mount, TmpfsOptions, VolumeDriver, VolumeOptions
from balenapy.core.filters import parse_filters
from balenapy.engine.volumes import ResolvedMount
from balenapy.errors import Conflict, InvalidParameter, NotFound, SystemFailure
from balenapy.linux import syscalls
from tests.engine.volume_rig import volume_rig
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root]


@trio_test
async def test_a_new_volume_takes_content_owner_and_mode_of_the_images_directory(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        source = rig.image / "data"
        (source / "below").mkdir(parents=True)
        (source / "below" / "file").write_text("content")
        os.symlink("/etc/passwd", source / "link")
        os.chown(source / "below" / "file", 12, 34)
        os.chown(source, 7, 8)
        os.chmod(source, 0o1770)

        await rig.create(binds=["vol:/data"])

        data = rig.data("vol")
        file = (data / "below" / "file").stat()
        assert (data / "below" / "file").read_text() == "content"
        assert os.readlink(data / "link") == "/etc/passwd"
        assert (file.st_uid, file.st_gid) == (12, 34)
        assert (data.stat().st_uid, data.stat().st_gid, stat.S_IMODE(data.stat().st_mode)) == (7, 8, 0o1770)
        assert [entry.name for entry in data.parent.iterdir()] == ["_data"]


@trio_test
async def test_an_empty_directory_gives_its_owner_and_mode(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        (rig.image / "data").mkdir()
        os.chown(rig.image / "data", 7, 8)
        os.chmod(rig.image / "data", 0o700)

        await rig.create(binds=["vol:/data"])

        status = rig.data("vol").stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (7, 8, 0o700)


@trio_test
async def test_a_link_in_the_image_does_not_lead_out_of_it(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "secret").write_text("host")
        os.symlink(outside, rig.image / "absolute")
        os.symlink("../outside", rig.image / "relative")

        await rig.create(binds=["one:/absolute", "two:/relative"])

        assert list(rig.data("one").iterdir()) == []
        assert list(rig.data("two").iterdir()) == []


@trio_test
async def test_what_is_not_empty_or_not_to_be_copied_stays_as_it_is(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        (rig.image / "data").mkdir()
        (rig.image / "data" / "new").write_text("")
        await rig.volumes.create("full", "", None, None)
        (rig.data("full") / "old").write_text("")

        await rig.create(binds=["full:/data"])
        await rig.create(binds=["plain:/data:nocopy"])

        assert os.listdir(rig.data("full")) == ["old"]
        assert os.listdir(rig.data("plain")) == []


@trio_test
async def test_mount_points_look_as_inspect_shows_them(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        container = await rig.create(
            binds=["vol:/v", "ro:/r:ro", "/tmp:/host//dir/:ro,rslave", "/anonymous", "plain:/etc:nocopy"],
            mounts=[
                Mount("volume", "mm", "/m"),
                Mount("tmpfs", "", "/t", tmpfs_options=TmpfsOptions(1 << 20, 0o700)),
            ],
            volumes=("/image",),
        )

        shown = {
            one.destination: (one.type, one.name, one.mode, one.rw, one.propagation, one.anonymous)
            for one in container.mounts
        }
        anonymous = {one.destination: one.name for one in container.mounts if one.anonymous}
        assert shown == {
            "/v": ("volume", "vol", "z", True, "", False),
            "/r": ("volume", "ro", "ro", False, "", False),
            "/host/dir": ("bind", "", "ro,rslave", False, "rslave", False),
            "/anonymous": ("volume", anonymous["/anonymous"], "z", True, "", True),
            "/etc": ("volume", "plain", "nocopy", True, "", False),
            "/m": ("volume", "mm", "z", True, "", False),
            "/t": ("tmpfs", "", "", True, "", False),
            "/image": ("volume", anonymous["/image"], "", True, "", True),
        }
        assert {len(name) for name in anonymous.values()} == {64}


@trio_test
async def test_a_start_gets_mounts_for_the_runtime_and_makes_missing_host_directories(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        missing = tmp_path / "made" / "here"
        container = await rig.create(
            binds=["vol:/v:ro", f"{missing}:/h"],
            mounts=[Mount("tmpfs", "", "/t", True, tmpfs_options=TmpfsOptions(1 << 20, 0o700))],
        )

        mounts = await rig.start(container)
        await rig.stop(container)
        await rig.volumes.unmount(container)

        assert sorted(mounts, key=lambda mount: mount.destination) == [
            ResolvedMount(str(missing), "/h", ("rbind", "rprivate"), "bind"),
            ResolvedMount(
                "tmpfs", "/t", ("noexec", "nosuid", "nodev", "rprivate", "ro", "mode=700", "size=1m"), "tmpfs"
            ),
            ResolvedMount(str(rig.data("vol")), "/v", ("rbind", "rprivate", "ro"), "bind"),
        ]
        assert missing.is_dir()
        assert rig.events.actions == ["volume create", "volume mount", "volume unmount"]
        assert rig.events.seen[1][3] == {
            "driver": "local", "container": container.id, "destination": "/v", "read/write": "false", "propagation": "",
        }  # fmt: skip


@trio_test
async def test_a_source_of_mounts_must_exist(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        mount = Mount("bind", str(tmp_path / "no"), "/x")

        with pytest.raises(InvalidParameter) as caught:
            await rig.create(mounts=[mount])
        (tmp_path / "no").mkdir()
        container = await rig.create(mounts=[mount])
        (tmp_path / "no").rmdir()
        with pytest.raises(InvalidParameter) as later:
            await rig.start(container)

        expected = f'invalid mount config for type "bind": bind source path does not exist: {tmp_path}/no'
        assert caught.value.message == later.value.message == expected


@trio_test
async def test_a_failed_create_leaves_no_anonymous_volume_and_keeps_named_ones(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        (rig.image / "file").write_text("")

        with pytest.raises(SystemFailure, match="cannot mount volume over existing file, file exists /file"):
            await rig.create(binds=["named:/n", "/a"], volumes=("/file",))

        assert [volume.name for volume in rig.volumes.matching(parse_filters(""))] == ["named"]
        assert os.listdir(rig.engine.config.data_root / "volumes") == ["named"]
        assert rig.volumes.users("named") == []


@trio_test
async def test_targets_may_be_named_once(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        for host in (
            {"binds": ["a:/x", "b:/x/"]},
            {"binds": ["a:/x"], "mounts": [Mount("volume", "b", "/x")]},
            {"binds": ["a:/x"], "tmpfs": {"/x": ""}},
        ):
            with pytest.raises(InvalidParameter, match="Duplicate mount point: /x"):
                await rig.create(**host)


@trio_test
async def test_volumes_from_shares_the_same_volumes_and_may_be_read_only(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        first = await rig.create("first", binds=["vol:/v", "/tmp:/host", "/own"])
        second = await rig.create(volumes_from=["first:ro"], volumes=("/own",))
        with pytest.raises(NotFound, match="No such container: nobody"):
            await rig.create(volumes_from=["nobody"])

        assert {(one.destination, one.source, one.rw) for one in second.mounts} == {
            (one.destination, one.source, False) for one in first.mounts
        }
        await rig.remove(first, volumes=True)
        assert len(rig.volumes.matching(parse_filters(""))) == 2
        await rig.remove(second, volumes=True)
        assert [volume.name for volume in rig.volumes.matching(parse_filters(""))] == ["vol"]


@trio_test
async def test_a_volume_in_use_is_not_removed_and_is_not_dangling(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        container = await rig.create(binds=["used:/v"])
        await rig.volumes.create("idle", "", None, {"a": "b"})

        with pytest.raises(Conflict) as caught:
            await rig.volumes.remove("used", force=True)

        def names(filters: str) -> list[str]:
            return sorted(volume.name for volume in rig.volumes.matching(parse_filters(filters)))

        assert caught.value.message == f"remove used: volume is in use - [{container.id}]"
        assert names('{"dangling":["true"]}') == ["idle"]
        assert names('{"dangling":["0"]}') == ["used"]
        assert names('{"name":["^us"]}') == ["used"]
        assert names('{"label":["a=b"]}') == ["idle"]
        assert await rig.volumes.prune(parse_filters("")) == (["idle"], 0)
        assert names("") == ["used"]


@trio_test
async def test_creates_and_removals_of_one_volume_at_once_agree(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        (rig.image / "data").mkdir()
        (rig.image / "data" / "file").write_text("content")
        containers: list[Container] = []

        async def create() -> None:
            containers.append(await rig.create(binds=["shared:/data"]))

        async def remove() -> None:
            with contextlib.suppress(Conflict):
                await rig.volumes.remove("shared", force=True)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(create)
                nursery.start_soon(remove)

        assert rig.volumes.users("shared") == sorted(container.id for container in containers)
        assert len(containers) == 4
        assert (rig.data("shared") / "file").read_text() == "content"
        for container in containers:
            await rig.start(container)


@trio_test
async def test_removing_what_does_not_exist_is_an_error_unless_forced(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        with pytest.raises(NotFound, match="get nope: no such volume"):
            await rig.volumes.remove("nope", force=False)
        await rig.volumes.remove("nope", force=True)

        assert rig.events.seen == []


@trio_test
async def test_creating_twice_returns_the_first_unchanged(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        first = await rig.volumes.create("vol", "local", None, {"a": "b"})
        second = await rig.volumes.create("vol", "", {}, {"c": "d"})

        shown = rig.volumes.describe(second)
        assert second is first
        assert list(shown) == ["CreatedAt", "Driver", "Labels", "Mountpoint", "Name", "Options", "Scope"]
        assert shown["Labels"] == {"a": "b"}
        assert shown["Mountpoint"] == str(rig.data("vol"))


@trio_test
async def test_a_volume_is_not_returned_as_one_with_other_options(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        options = {"type": "tmpfs", "device": "tmpfs", "o": "size=1m"}
        first = await rig.volumes.create("ram", "", options, None)
        same = (dict(reversed(options.items())), None, {})
        again = [await rig.volumes.create("ram", "", each, None) for each in same]
        for other in ({"type": "tmpfs"}, options | {"o": "size=2m"}):
            with pytest.raises(Conflict) as caught:
                await rig.volumes.create("ram", "", other, None)
            assert caught.value.message == "create ram: volume 'ram' exists already with other driver options"

        assert again == [first] * 3
        assert list(rig.volumes.describe(first)["Options"]) == ["device", "o", "type"]


@trio_test
async def test_usage_leaves_out_what_is_kept_elsewhere(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        await rig.volumes.create("ram", "", {"type": "tmpfs", "device": "tmpfs"}, None)
        await rig.volumes.create("disk", "", {}, None)
        (rig.data("disk") / "file").write_text("x" * 5000)

        assert [(one.volume.name, one.references) for one in await rig.volumes.usage()] == [("disk", 0)]
        assert (await rig.volumes.usage())[0].size_bytes >= 5000


@pytest.mark.parametrize(
    ("options", "mounted"),
    [
        (
            {"type": "nfs", "o": "addr=localhost,rw,nolock,vers=3", "device": ":/export"},
            (":/export", "nfs", 0, "addr=127.0.0.1,nolock,vers=3"),
        ),
        (
            {"type": "nfs4", "o": "addr=192.0.2.1,ro,hard", "device": ":/"},
            (":/", "nfs4", 1, "addr=192.0.2.1,hard"),
        ),
        ({"type": "nfs", "o": "addr=fd00::1", "device": ":/"}, (":/", "nfs", 0, "addr=fd00::1")),
        ({"type": "cifs", "o": "addr=nas,guest", "device": "//nas/x"}, ("//nas/x", "cifs", 0, "addr=nas,guest")),
        ({"type": "none", "o": "bind,ro", "device": "/srv"}, ("/srv", "none", 4097, "")),
    ],
)  # fmt: skip
@trio_test
async def test_options_reach_the_kernel_as_mount_would_give_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], mounted: tuple[str, str, int, str]
) -> None:
    calls = []

    def mount(source: str, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
        calls.append((target, (source, kind, flags, data)))

    async with volume_rig(tmp_path) as rig:
        await rig.volumes.create("far", "", options, None)
        container = await rig.create(binds=["far:/v:nocopy"])
        with monkeypatch.context() as patched:
            patched.setattr(syscalls, "mount", mount)
            await rig.start(container)
        await rig.stop(container)

        assert calls == [(rig.data("far"), mounted)]


@trio_test
async def test_a_server_whose_name_nobody_knows_fails_the_start(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        options = {"type": "nfs", "o": "addr=no such host,rw", "device": ":/export"}
        await rig.volumes.create("far", "", options, None)
        container = await rig.create(binds=["far:/v:nocopy"])

        with pytest.raises(SystemFailure, match="error while mounting volume with options: type='nfs' device=':/e"):
            await rig.start(container)


@trio_test
async def test_bad_names_drivers_and_options_are_refused(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        for name in ("a", "../x", "a/b", "-ab", "a b", ""):
            if name:
                with pytest.raises(InvalidParameter, match=r"^create"):
                    await rig.volumes.create(name, "", None, None)
        with pytest.raises(InvalidParameter, match='create vol: invalid option key: "k"'):
            await rig.volumes.create("vol", "", {"k": "v"}, None)
        with pytest.raises(NotFound, match='plugin "zz" not found'):
            await rig.volumes.create("vol", "zz", None, None)

        assert rig.volumes.matching(parse_filters("")) == []


@trio_test
async def test_a_volume_with_a_device_is_mounted_while_somebody_uses_it(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        options = {"type": "tmpfs", "device": "tmpfs", "o": "size=1m,mode=700,nosuid"}
        await rig.volumes.create("ram", "", options, None)
        one, two = await rig.create(binds=["ram:/v"]), await rig.create(binds=["ram:/v"])
        data = rig.data("ram")

        await rig.start(one)
        (data / "file").write_text("")
        await rig.start(two)
        await rig.stop(one)
        still = syscalls.is_mount_point(data), os.listdir(data)
        rig = rig.again()  # the daemon dies; the container lives
        await rig.stop(two)

        assert still == (True, ["file"])
        assert not syscalls.is_mount_point(data)


@trio_test
async def test_a_device_that_cannot_be_mounted_fails_the_start(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        driver = VolumeDriver("local", {"type": "ext4", "device": str(tmp_path / "none"), "o": "ro"})
        mount = Mount("volume", "disk", "/v", volume_options=VolumeOptions(no_copy=True, driver_config=driver))
        container = await rig.create(mounts=[mount])

        with pytest.raises(SystemFailure) as caught:
            await rig.start(container)

        assert caught.value.message == (
            f"error while mounting volume with options: type='ext4' device='{tmp_path}/none' o='ro': "
            "no such file or directory"
        )


@trio_test
async def test_a_bind_that_shows_our_own_mounts_follows_their_end(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        root = rig.engine.config.data_root
        syscalls.mount("tmpfs", tmp_path, "tmpfs")
        try:
            root.mkdir(parents=True)
            syscalls.mount("none", tmp_path, flags=syscalls.MS_PRIVATE)
            container = await rig.create(binds=[f"{tmp_path}:/above", f"{root}/x:/below:ro", f"{tmp_path}/other:/o"])
            asked = await rig.create(binds=[f"{tmp_path}:/above:rprivate"])
            private = await rig.start(container)
            await rig.volumes.unmount(container)
            syscalls.mount("none", tmp_path, flags=syscalls.MS_SHARED)
            shared = await rig.start(container) + await rig.start(asked)
        finally:
            syscalls.umount2(tmp_path, syscalls.MNT_DETACH)

    assert [point.propagation for point in container.mounts] == ["rslave", "rslave", "rprivate"]
    assert [mount.options[1] for mount in private] == ["rprivate"] * 3
    assert [mount.options[1] for mount in shared] == ["rslave", "rslave", "rprivate", "rprivate"]


@trio_test
async def test_propagation_needs_a_shared_source(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        source = tmp_path / "source"
        source.mkdir()
        syscalls.mount("tmpfs", source, "tmpfs")
        try:
            syscalls.mount("none", source, flags=syscalls.MS_PRIVATE)
            shared = await rig.create(binds=[f"{source}:/x:rshared"])
            slave = await rig.create(binds=[f"{source}:/x:slave"])
            with pytest.raises(SystemFailure) as for_shared:
                await rig.start(shared)
            with pytest.raises(SystemFailure) as for_slave:
                await rig.start(slave)
            syscalls.mount("none", source, flags=syscalls.MS_SHARED)
            mounts = await rig.start(shared) + await rig.start(slave)
        finally:
            syscalls.umount2(source)

        lost = f"path {source} is mounted on {source} but it is not"
        assert for_shared.value.message == f"{lost} a shared mount"
        assert for_slave.value.message == f"{lost} a shared or slave mount"
        assert [mount.options for mount in mounts] == [("rbind", "rshared"), ("rbind", "slave")]


@trio_test
async def test_a_volume_survives_a_restart_and_a_removed_one_does_not_come_back(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        await rig.volumes.create("kept", "", None, None)
        await rig.volumes.create("gone", "", None, None)
        await rig.volumes.remove("gone", force=False)
        rig.data("gone").mkdir(parents=True)  # as a power cut may have it

        rig = rig.again()

        assert [volume.name for volume in rig.volumes.matching(parse_filters(""))] == ["kept"]
        assert os.listdir(rig.engine.config.data_root / "volumes") == ["kept"]


@trio_test
async def test_a_crash_between_a_volume_and_its_container_leaves_no_volume(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        kept = await rig.create(binds=["/kept", "named:/n"])
        left = await rig.create(binds=["/left"])
        await rig.remove(left)
        interrupted = await rig.create(binds=["/create", "named:/n"])
        shared = await rig.create(binds=["/shared"])
        user = await rig.create(volumes_from=[shared.id])
        for container in (interrupted, shared):  # their rows were not written, or are gone already
            del rig.records.by_id[container.id]

        rig = rig.again()
        await rig.volumes.recover()

        names = {volume.name for volume in rig.volumes.matching(parse_filters(""))}
        assert names == {"named", *(one.mounts[0].name for one in (kept, left, user))}


@trio_test
async def test_a_volume_made_again_after_its_removal_is_new(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        await rig.volumes.create("vol", "", None, {"old": ""})
        (rig.data("vol") / "file").write_text("")
        await rig.volumes.remove("vol", force=False)
        await rig.volumes.create("vol", "", None, None)

        rig = rig.again()

        assert rig.volumes.get("vol").labels is None
        assert os.listdir(rig.data("vol")) == []


@trio_test
async def test_volumes_of_another_engine_are_taken_over_once(tmp_path: Path) -> None:
    (tmp_path / "data" / "volumes" / "theirs" / "_data").mkdir(parents=True)
    async with volume_rig(tmp_path) as rig:
        (rig.data("later")).mkdir(parents=True)
        rig = rig.again()

        assert [volume.name for volume in rig.volumes.matching(parse_filters(""))] == ["theirs"]
        assert rig.data("later").is_dir()


@trio_test
async def test_one_prune_at_a_time(tmp_path: Path) -> None:
    async with volume_rig(tmp_path) as rig:
        await rig.volumes.create("one", "", None, None)
        pruned: list[list[str]] = []

        async def prune() -> None:
            pruned.append((await rig.volumes.prune(parse_filters("")))[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(prune)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(Conflict, match="a prune operation is already running"):
                await rig.volumes.prune(parse_filters(""))
        await prune()

        assert pruned == [["one"], []]
