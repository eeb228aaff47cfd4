"""Volumes, and the mounts of containers: what create resolves, what a start mounts, what an exit gives back.

A create calls `prepare`: it resolves Binds, Mounts, VolumesFrom and the image's volumes to mount points, makes the
volumes that are missing and fills new ones from the image. Until the container is among the records, the volumes
are held for it under its id; when the create fails after all, `discard` undoes it. A start calls `mount`, an
exit `unmount`, a removal `release`; all of them may be repeated.

Who uses a volume is read from the records; there is no count that could be wrong.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core import mountspec
from balenapy.core.container import Container, ContainerConfig, HostConfig, MountPoint
from balenapy.core.filters import Filters
from balenapy.core.mountspec import LOCAL
from balenapy.core.volume import Volume
from balenapy.errors import Conflict, EngineError, InvalidParameter, NotFound, SystemFailure
from balenapy.linux import durable, syscalls
from balenapy.linux.mountinfo import mount_of
from balenapy.stores.volumes import VolumeStore

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

ANONYMOUS = re.compile(r"[0-9a-f]{64}")  # a name that this engine made up


@dataclass(frozen=True, slots=True)
class ResolvedMount:
    """One mount of a starting container, as the OCI runtime gets it."""

    source: str
    destination: str
    options: tuple[str, ...]
    type: str


@dataclass(frozen=True, slots=True)
class VolumeUsage:
    """A volume as `system df` shows it."""

    volume: Volume
    references: int
    size_bytes: int


class Volumes:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        snapshots = engine.snapshots
        self._store = VolumeStore(engine.db, engine.config.data_root, snapshots.trash, engine.limiters.files)
        self._held: dict[str, set[str]] = {}  # container id -> names, of creates that are under way
        self._mounted: dict[str, set[str]] | None = None
        self._pruning = False

    def _holders(self) -> dict[str, set[str]]:
        """Container id -> names of the volumes that are mounted for it; at first, of those that ran before we did."""
        if self._mounted is None:
            self._mounted = {
                container.id: {point.name for point in container.mounts if point.type == "volume"}
                for container in self._engine.containers.all()
                if container.state.running
            }
        return self._mounted

    # -- create --

    async def prepare(
        self,
        container_id: str,
        config: ContainerConfig,
        host_config: HostConfig,
        chain_id: str,
        *,
        managed: bool = False,
    ) -> list[MountPoint]:
        """Resolve the mounts of a container that is being created.

        Args:
            config: already merged with the image's. chain_id: the image's filesystem, "" for none.
            managed: a build step: its volumes are not announced.

        Raises: InvalidParameter, NotFound (volumes-from), SystemFailure (a bad Bind, a volume over a file).
        Cancellation: undone, but for named volumes that were made.
        """
        self._held[container_id] = set()
        made: list[str] = []
        try:
            points = self._from_others(host_config)
            points |= self._from_request(host_config)
            image_volumes = {path for path in map(mountspec.volume_path, config.volumes or ()) if path not in points}
            for path in sorted(image_volumes):
                points[path] = MountPoint(
                    type="volume", destination=path, driver=host_config.volume_driver, rw=True, anonymous=True
                )
            await self._make_volumes(container_id, points.values(), image_volumes, made, announce=not managed)
            await self._fill(points.values(), image_volumes, chain_id)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._forget(container_id, made)
            raise
        return list(points.values())

    async def discard(self, container_id: str, mounts: Sequence[MountPoint]) -> None:
        """Undo `prepare`: the create failed. Named volumes stay, as in the engine we replace."""
        await self._forget(container_id, [mount.name for mount in mounts if mount.anonymous])

    async def _forget(self, container_id: str, anonymous: Sequence[str]) -> None:
        self._held.pop(container_id, None)
        await self._store.remove(*(name for name in anonymous if not self.users(name)))

    def _from_others(self, host_config: HostConfig) -> dict[str, MountPoint]:
        points = {}
        for text in host_config.volumes_from or ():
            name, writable = mountspec.parse_volumes_from(text)
            for point in self._engine.containers.find(name).mounts:
                # The same volume, not filled again, and still removed with whoever is last to go.
                points[point.destination] = replace(point, rw=point.rw and writable, mode="", no_copy=True)
        return points

    def _from_request(self, host_config: HostConfig) -> dict[str, MountPoint]:
        points: dict[str, MountPoint] = {}
        for text in host_config.binds or ():
            point = mountspec.parse_bind(text, host_config.volume_driver)
            if point.destination in points or point.destination in (host_config.tmpfs or {}):
                raise mountspec.duplicate(point.destination)
            self._follow_our_unmounts(point)
            points[point.destination] = point
        for mount in host_config.mounts or ():
            point = mountspec.resolve_mount(mount)
            if point.destination in points:
                raise mountspec.duplicate(mount.target)
            if point.must_exist and not os.path.lexists(point.source):
                raise _missing_source(point.source)
            self._follow_our_unmounts(point)
            points[point.destination] = point
        return points

    def _follow_our_unmounts(self, point: MountPoint) -> None:
        """A bind of `/` and the like shows our own mounts; as a slave it does not hold what we unmount later.

        Source: moby validateBindDaemonRoot.
        """
        config = self._engine.config
        if point.type != "bind" or mountspec.has_own_propagation(point):
            return
        if any(_overlap(Path(point.source), root) for root in (config.data_root, config.exec_root)):
            point.propagation = "rslave"

    async def _make_volumes(
        self,
        container_id: str,
        points: Iterable[MountPoint],
        image_volumes: Collection[str],
        made: list[str],
        *,
        announce: bool,
    ) -> None:
        """Give every volume mount its volume: one transaction for all that are new."""
        points = [point for point in points if point.type == "volume"]
        async with AsyncExitStack() as stack:
            # Nobody removes one of them between our look and our hold.
            for name in sorted({point.name for point in points if not point.anonymous}):
                await stack.enter_async_context(self._engine.locks(f"volume/{name}"))
            found = await self._make_and_hold(container_id, points, image_volumes, made)
        for name in found if announce else ():
            self._engine.events.volume(name, "create", {"driver": LOCAL})

    async def _make_and_hold(
        self, container_id: str, points: Collection[MountPoint], image_volumes: Collection[str], made: list[str]
    ) -> list[str]:
        """Returns the names of the volumes that were asked for, found or made."""
        new: dict[str, Volume] = {}
        found = []
        for point in points:
            if point.source:  # another container's
                self._held[container_id].add(point.name)
                continue
            if point.anonymous:
                point.name = secrets.token_hex(32)
            options = point.spec.volume_options if point.spec else None
            driver_options = options.driver_config.options if options and options.driver_config else None
            self._check_create(point.name, point.driver, driver_options)
            if self._store.find(point.name) is None and point.name not in new:
                new[point.name] = Volume(
                    point.name,
                    time.time_ns(),
                    driver_options,
                    options.labels if options else None,
                    made_for=container_id if point.anonymous else "",
                )
                if point.anonymous:
                    made.append(point.name)
            found.append(point.name)
            point.driver = LOCAL
            point.source = str(self._store.mountpoint(point.name))
            self._held[container_id].add(point.name)
            if not point.mode and point.destination not in image_volumes:
                point.mode = "z"  # moby setBindModeIfNull
        if new:
            await self._store.insert(*new.values())
        return found

    # -- filling from the image --

    async def _fill(self, points: Collection[MountPoint], image_volumes: Collection[str], chain_id: str) -> None:
        """Copy what the image has at the place of each volume into it, if the volume is empty."""
        wanted = [point for point in points if point.type == "volume" and not point.no_copy]
        if not wanted or not chain_id:
            return
        async with self._engine.snapshots.view(chain_id) as root:
            for point in wanted:
                found = await self._in_thread(_look_at, root, point.destination)
                if found is None:
                    continue
                if not stat.S_ISDIR(found.mode):
                    if point.destination in image_volumes:
                        raise SystemFailure(f"cannot mount volume over existing file, file exists {point.destination}")
                    continue
                async with self._engine.locks(f"volume/{point.name}"):
                    await self._fill_one(point, root, found)

    async def _fill_one(self, point: MountPoint, root: Path, found: _Found) -> None:
        volume = self._store.find(point.name)
        directory = self._store.mountpoint(point.name)
        if volume is not None and _has_device(volume):
            holder = f"fill-{secrets.token_hex(4)}"
            await self._mount_device(volume, holder)
            try:
                await self._copy(root, point.destination, directory)
            finally:
                with trio.CancelScope(shield=True):
                    await self._unmount_device(volume, holder)
            return
        if not await self._in_thread(_is_empty, directory):
            return
        if found.empty:
            await self._in_thread(_copy_attributes, found, directory)
            return
        if self._is_mounted(point.name):
            await self._copy(root, point.destination, directory)
            return
        # Filled under another name, so that a power cut leaves it empty or full.
        filling = directory.with_name(f"filling-{secrets.token_hex(4)}")
        try:
            await self._in_thread(os.mkdir, filling, 0o755)
            await self._copy(root, point.destination, filling)  # syncs at its end
            await self._in_thread(durable.replace, filling, directory)
        except BaseException:
            await self._engine.snapshots.trash.discard(filling)
            raise

    async def _copy(self, root: Path, source: str, destination: Path) -> None:
        await self._engine.workers.run(
            "copy",
            {
                "source_root": str(root),
                "source": source,
                "destination_root": str(destination),
                "destination": "/",
                "if_empty": True,
            },
        )

    # -- start and end of a container --

    async def mount(self, container: Container) -> list[ResolvedMount]:
        """Make everything ready that the container mounts, and say how the runtime mounts it.

        Raises: InvalidParameter (a source that must exist does not), SystemFailure.
        Cancellation: undone.
        """
        propagations: dict[str, str] = {}
        held = self._holders().setdefault(container.id, set())
        try:
            for point in container.mounts:
                if point.type == "volume":
                    await self._mount_volume(container, point, held)
                elif point.type == "bind":
                    propagations[point.destination] = await self._in_thread(_prepare_bind, point)
            return [_resolved(point, propagations.get(point.destination, "")) for point in container.mounts]
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.unmount(container)
            raise

    async def _mount_volume(self, container: Container, point: MountPoint, held: set[str]) -> None:
        volume = self._store.find(point.name)
        if volume is None:
            raise NotFound(f"get {point.name}: no such volume")
        # Not while somebody fills it: the full directory takes the place of the empty one.
        async with self._engine.locks(f"volume/{volume.name}"):
            await self._in_thread(self._store.make_directory, volume.name)
            if _has_device(volume):
                await self._mount_device(volume, container.id)
            held.add(volume.name)
        self._engine.events.volume(
            volume.name,
            "mount",
            {
                "driver": LOCAL,
                "container": container.id,
                "destination": point.destination,
                "read/write": str(point.rw).lower(),
                "propagation": point.propagation,
            },
        )

    def needs_mount(self, container: Container) -> bool:
        """Whether something of it is to be seen only while it is mounted."""
        volumes = (self._store.find(point.name) for point in container.mounts if point.type == "volume")
        return any(volume is not None and _has_device(volume) for volume in volumes)

    async def unmount(self, container: Container) -> None:
        """Give back what `mount` made. Again is fine; it also cleans up after an engine that died."""
        held = self._holders().pop(container.id, None)
        for point in container.mounts:
            if point.type != "volume" or (held is not None and point.name not in held):
                continue
            volume = self._store.find(point.name)
            if volume is not None and _has_device(volume):
                async with self._engine.locks(f"volume/{volume.name}"):
                    await self._unmount_device(volume, container.id)
            if held is not None:
                self._engine.events.volume(point.name, "unmount", {"driver": LOCAL, "container": container.id})

    async def _mount_device(self, volume: Volume, holder: str) -> None:
        """Mount what the volume's options name, unless it is mounted already."""
        target = self._store.mountpoint(volume.name)
        if await self._in_thread(syscalls.is_mount_point, target):
            return
        options = volume.driver_opts or {}
        kind, words, device = options.get("type", ""), options.get("o", ""), options.get("device", "")
        try:
            if not device:
                raise InvalidParameter("missing device in volume options")
            await self._in_thread(_mount_device, kind, words, device, target)
        except OSError as error:
            raise SystemFailure(
                f"error while mounting volume with options: type='{kind}' device='{device}' o='{words}': "
                f"{(error.strerror or str(error)).lower()}"
            ) from error
        log.debug("mounted volume name=%s for=%s", volume.name, holder[:12])

    async def _unmount_device(self, volume: Volume, holder: str) -> None:
        if self._is_mounted(volume.name, but=holder):
            return
        await self._in_thread(syscalls.unmount_if_mounted, self._store.mountpoint(volume.name))

    def _is_mounted(self, name: str, but: str = "") -> bool:
        return any(name in names and container_id != but for container_id, names in self._holders().items())

    async def recover(self) -> None:
        """Remove what a create or an `rm -v` that the last engine did not finish has left. Blocks: for start."""
        # By the rows: a container whose record cannot be read still has its volumes.
        known = {container_id for (container_id,) in self._engine.db.query("SELECT id FROM container")}
        orphans = [
            volume.name
            for volume in self._store.all()
            if volume.made_for and volume.made_for not in known and not self.users(volume.name)
        ]
        if orphans:
            log.info("removing volumes without their container count=%d", len(orphans))
            await self._store.remove(*orphans)

    async def leave_behind(self, container: Container) -> None:
        """Before a container goes without its volumes: from now on nobody takes them for forgotten."""
        await self._store.leave_behind(*(point.name for point in container.mounts if point.type == "volume"))

    async def release(self, container: Container, *, remove_anonymous: bool) -> None:
        """Let go of a container's volumes, which is no longer among the records; with `rm -v` its anonymous ones go.

        A volume somebody else uses stays.
        """
        self._held.pop(container.id, None)
        if not remove_anonymous:
            return
        gone = [
            point.name
            for point in container.mounts
            if point.type == "volume"
            and point.anonymous
            and self._store.find(point.name) is not None
            and not self.users(point.name, but=container.id)
        ]
        await self._store.remove(*gone)
        for name in gone:
            self._engine.events.volume(name, "destroy", {"driver": LOCAL})

    # -- volumes by themselves --

    async def create(
        self, name: str, driver: str, options: Mapping[str, str] | None, labels: Mapping[str, str] | None
    ) -> Volume:
        """Make a volume, or return the one that has this name, unchanged.

        Raises: InvalidParameter, NotFound (driver), Conflict when the one that is there has other options. (The engine
        we replace then returns it all the same, and whoever asked writes to another place than he thinks.)
        """
        name = name or secrets.token_hex(32)
        self._check_create(name, driver, options)
        async with self._engine.locks(f"volume/{name}"):
            volume = self._store.find(name)
            if volume is None:
                volume = Volume(
                    name,
                    time.time_ns(),
                    None if options is None else dict(options),
                    None if labels is None else dict(labels),
                )
                await self._store.insert(volume)
            elif options and dict(options) != (volume.driver_opts or {}):
                raise Conflict(f"create {name}: volume '{name}' exists already with other driver options")
        self._engine.events.volume(name, "create", {"driver": LOCAL})
        return volume

    def _check_create(self, name: str, driver: str, options: Mapping[str, str] | None) -> None:
        if driver not in ("", LOCAL):
            raise NotFound(f'create {name}: error looking up volume plugin {driver}: plugin "{driver}" not found')
        if self._store.find(name) is None:
            mountspec.check_volume_name(name)
            mountspec.check_driver_options(name, list(options or ()))

    def get(self, name: str) -> Volume:
        """Raises: NotFound."""
        volume = self._store.find(name)
        if volume is None:
            raise NotFound(f"get {name}: no such volume")
        return volume

    def describe(self, volume: Volume) -> dict[str, Any]:
        """The volume as the API shows it."""
        return volume.describe(str(self._store.mountpoint(volume.name)))

    def matching(self, filters: Filters) -> list[Volume]:
        """The volumes a list shows.

        Raises: InvalidParameter.
        """
        dangling = filters.boolean("dangling", digits=True)
        return [
            volume
            for volume in self._store.all()
            if filters.regexp("name", volume.name)
            and filters.exact("driver", LOCAL)
            and filters.labels(volume.labels)
            and (dangling is None or dangling is not bool(self.users(volume.name)))
        ]

    async def remove(self, name: str, *, force: bool) -> None:
        """Remove a volume nobody uses; `force` only hides that it does not exist.

        Raises: NotFound, Conflict.
        """
        async with self._engine.locks(f"volume/{name}"):
            if self._store.find(name) is None:
                if force:
                    return
                raise NotFound(f"get {name}: no such volume")
            users = self.users(name)
            if users:
                raise Conflict(f"remove {name}: volume is in use - [{', '.join(users)}]")
            await self._store.remove(name)
        self._engine.events.volume(name, "destroy", {"driver": LOCAL})

    async def prune(self, filters: Filters, *, named: bool = True) -> tuple[list[str], int]:
        """Remove every unused volume without options; the names and the bytes that are free now.

        Args:
            named: also those that somebody gave a name.

        Raises: Conflict when a prune is under way already.
        """
        if self._pruning:
            raise Conflict("a prune operation is already running")
        self._pruning = True
        try:
            return await self._prune(filters, named=named)
        finally:
            self._pruning = False

    async def _prune(self, filters: Filters, *, named: bool) -> tuple[list[str], int]:
        removed = []
        reclaimed = 0
        for volume in self._store.all():
            chosen = not volume.driver_opts and filters.labels(volume.labels) and filters.without_labels(volume.labels)
            if not chosen or self.users(volume.name) or not (named or ANONYMOUS.fullmatch(volume.name)):
                continue
            size_bytes, _ = await self._in_thread(durable.tree_size, self._store.mountpoint(volume.name))
            try:
                await self.remove(volume.name, force=True)
            except Conflict:
                continue  # somebody began to use it while we measured
            removed.append(volume.name)
            reclaimed += size_bytes
        return removed, reclaimed

    async def usage(self) -> list[VolumeUsage]:
        """Every volume without options, its size and how many containers use it: walks the trees.

        Source: moby volume/service LocalVolumesSize: what is mounted from elsewhere takes no room here.
        """
        found = []
        for volume in self._store.all():
            if volume.driver_opts:
                continue
            size_bytes, _ = await self._in_thread(durable.tree_size, self._store.mountpoint(volume.name))
            found.append(VolumeUsage(volume, len(self.users(volume.name)), size_bytes))
        return found

    def users(self, name: str, *, but: str = "") -> list[str]:
        """Ids of the containers that use a volume, running or not, and of those being created."""
        containers = self._engine.containers.all()
        for container in containers:  # what is in the records need not be held any more
            self._held.pop(container.id, None)
        using = {container.id for container in containers if _uses(container, name)}
        using |= {container_id for container_id, names in self._held.items() if name in names}
        return sorted(using - {but})

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await trio.to_thread.run_sync(call, *arguments, limiter=self._engine.limiters.files)
        except OSError as error:
            if call is _mount_device:
                raise
            raise SystemFailure(f"volumes: {error}") from error


@dataclass(frozen=True, slots=True)
class _Found:
    """What an image has at some path."""

    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    empty: bool


def _look_at(root: Path, path: str) -> _Found | None:
    """What the image has there; links are followed inside the image only. None: nothing."""
    try:
        fd = syscalls.open_in_root(root, path, os.O_PATH)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        status = os.fstat(fd)
        empty = stat.S_ISDIR(status.st_mode) and not os.listdir(f"/proc/self/fd/{fd}")
        return _Found(status.st_mode, status.st_uid, status.st_gid, status.st_atime_ns, status.st_mtime_ns, empty)
    finally:
        os.close(fd)


def _copy_attributes(found: _Found, directory: Path) -> None:
    os.chown(directory, found.uid, found.gid)
    os.chmod(directory, stat.S_IMODE(found.mode))
    os.utime(directory, ns=(found.atime_ns, found.mtime_ns))


def _is_empty(directory: Path) -> bool:
    try:
        for name in os.listdir(directory.parent):
            if name.startswith("filling-"):  # a power cut ended that
                durable.remove_tree(directory.parent / name)
        return not os.listdir(directory)
    except FileNotFoundError:
        directory.mkdir(mode=0o755, parents=True)
        return True


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _prepare_bind(point: MountPoint) -> str:
    """See that the source is there, and that it can propagate what is asked for; returns how it is mounted.

    Raises: InvalidParameter, SystemFailure.
    """
    if not os.path.lexists(point.source):
        if point.must_exist:
            raise _missing_source(point.source)
        try:
            os.makedirs(point.source, 0o755, exist_ok=True)
        except OSError as error:
            raise SystemFailure(
                f"error while creating mount source path '{point.source}': mkdir {point.source}: "
                f"{(error.strerror or '').lower()}"
            ) from error
    word = point.propagation.removeprefix("r")
    if word in ("shared", "slave"):
        mount = mount_of(point.source)
        if not (mount.shared or (word == "slave" and mount.slave)):
            if not mountspec.has_own_propagation(point):
                return mountspec.DEFAULT_PROPAGATION  # nobody asked for it but we
            needed = "a shared" if word == "shared" else "a shared or slave"
            raise SystemFailure(f"path {point.source} is mounted on {mount.mount_point} but it is not {needed} mount")
    return point.propagation


def _missing_source(source: str) -> EngineError:
    return InvalidParameter(f'invalid mount config for type "bind": bind source path does not exist: {source}')


def _resolved(point: MountPoint, propagation: str) -> ResolvedMount:
    if point.type == "tmpfs":
        options = mountspec.tmpfs_mount_options(
            point.spec.tmpfs_options if point.spec else None, read_only=not point.rw
        )
        return ResolvedMount("tmpfs", point.destination, tuple(options), "tmpfs")
    words = ["rbind", propagation or mountspec.DEFAULT_PROPAGATION]
    if not point.rw:
        words.append("ro")
    return ResolvedMount(point.source, point.destination, tuple(words), "bind")


def _has_device(volume: Volume) -> bool:
    return any((volume.driver_opts or {}).get(key) for key in ("type", "o", "device"))


def _uses(container: Container, name: str) -> bool:
    return any(point.type == "volume" and point.name == name for point in container.mounts)


def _mount_device(kind: str, words: str, device: str, target: Path) -> None:
    """Mount by options of the local driver. Raises: OSError."""
    flags, data = mountspec.parse_mount_options(words)
    if kind in ("nfs", "nfs4"):
        data = ",".join(map(_with_address, data.split(",")))
    syscalls.mount(device, target, kind, flags, data)


def _with_address(word: str) -> str:
    """`addr=name` -> `addr=address`: the kernel's nfs does not resolve names. Raises: OSError."""
    key, _, value = word.partition("=")
    if key != "addr":
        return word
    return f"addr={socket.getaddrinfo(value, None, type=socket.SOCK_STREAM)[0][4][0]}"
