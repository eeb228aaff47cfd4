"""Containers as records: create, find, list, inspect, update, rename, remove, prune. What runs is the supervisors'.

A name belongs to its container from the moment `create` begins: two creates cannot get the same one, and a failed
create gives it back. A container is in `store` once its transaction is committed; until then it is among
`_creating`, so that the image it stands on counts as used.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from balenapy.core import containerview, creation, lifecycle, mountspec, wire
from balenapy.core.container import (
    Container,
    ContainerConfig,
    EndpointSettings,
    HostConfig,
    Status,
    Ulimit,
    UpdateConfig,
)
from balenapy.core.filters import NO_FILTERS, Filters
from balenapy.core.links import Link, link_env
from balenapy.core.names import generate_name
from balenapy.core.ociconfig import apparmor_profile, build_resources, parse_security_options
from balenapy.core.ports import expand_exposed, parse_port
from balenapy.core.timefmt import parse_until
from balenapy.errors import Conflict, EngineError, InvalidParameter, NotFound, SystemFailure
from balenapy.linux.hostfacts import read_host_facts, read_kernel_support
from balenapy.stores.containers import ContainerStore

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.stores.images import ImageRecord

log = logging.getLogger(__name__)

LIST_FILTERS = (
    "ancestor", "before", "exited", "expose", "health", "id", "is-task", "isolation", "label", "name", "network",
    "publish", "since", "status", "volume",
)  # fmt: skip
PRUNE_FILTERS = ("label", "label!", "until")
NAME_TRIES = 6  # moby daemon/names.go
HEALTH_STATES = ("starting", "healthy", "unhealthy", "none")


class Containers:
    def __init__(self, engine: Engine) -> None:
        """Load the records. Blocks: for start."""
        self._engine = engine
        self.store = ContainerStore(engine.db)
        cgroups = engine.runtimes.cgroups
        self.host_facts = read_host_facts(cgroups)
        self.kernel_support = read_kernel_support(cgroups)
        self._names: dict[str, str] = {}  # name -> id, reserved ones too
        self._creating: dict[str, Container] = {}
        self._removing: set[str] = set()
        self._until_removed: dict[str, set[trio.CancelScope]] = {}
        self._pruning = False
        self._random = random.SystemRandom()
        for container in self.store.all():
            self._names[container.name] = container.id
            if container.state.status is Status.REMOVING:
                container.state.status = Status.DEAD  # its removal was cut off

    def recover(self) -> None:
        """Complete the init layers that a power cut has thinned out: nothing waits for them at create.

        Blocks: for start.
        """
        snapshots = self._engine.snapshots
        for container in self.store.all():
            try:
                active = snapshots.get(container.id)
                if container.host_config.runtime != "bare":
                    _InitLayer([layer.diff for layer in snapshots.chain(active.parent)]).complete(active.init)
            except EngineError as error:  # removed but for its row, or a layer is damaged
                log.warning("cannot check init layer container=%s error=%s", container.short_id, error.message)
            except OSError as error:
                log.error("cannot complete init layer container=%s error=%s", container.short_id, error)

    # --- look-up --------------------------------------------------------------------------------------------

    def all(self) -> list[Container]:
        return self.store.all()

    def find(self, name: str) -> Container:
        """The container somebody means: full id, exact name, unique id prefix, in this order.

        Raises: NotFound, InvalidParameter, SystemFailure (ambiguous). Source: moby daemon/container.go GetContainer.
        """
        if not name:
            raise InvalidParameter('invalid name or ID supplied: ""')
        container = self.store.find(name) or self._by_name(name.removeprefix("/"))
        if container is not None:
            return container
        found = [each for each in self.store.all() if each.id.startswith(name)]
        if len(found) > 1:
            raise SystemFailure(f"Multiple IDs found with provided prefix: {name}")
        if not found:
            raise NotFound(f"No such container: {name}")
        return found[0]

    def _by_name(self, name: str) -> Container | None:
        own = self.store.find(self._names.get(name, ""))
        if own is not None or "/" not in name:
            return own
        parent, _, alias = name.partition("/")
        holder = self._by_name(parent)
        return dict(self._links_of(holder)).get(alias) if holder is not None else None

    def _links_of(self, container: Container) -> list[tuple[str, Container]]:
        """Legacy links: (alias, child). The record has `<id>:alias`."""
        links = (text.partition(":") for text in container.host_config.links or ())
        return [(alias, child) for child_id, _, alias in links if (child := self.store.find(child_id)) is not None]

    def names_of(self, container: Container) -> list[str]:
        """Its name, and `/parent/alias` of each link to it."""
        names = ["/" + container.name]
        for parent in self.store.all():
            if parent.host_config.links:
                names += [f"/{parent.name}/{alias}" for alias, child in self._links_of(parent) if child is container]
        return names

    def link_env(self, container: Container) -> list[str]:
        """The variables that legacy links bring to a start; links work on the default bridge only.

        Raises: SystemFailure, when a linked container does not run or is on other networks.
        """
        env: list[str] = []
        for alias, child in self._links_of(container):
            if not child.state.running:
                raise SystemFailure(
                    f"Cannot link to a non running container: /{child.name} AS /{container.name}/{alias}"
                )
            if "bridge" not in child.endpoints:
                raise SystemFailure(f"Cannot link to /{child.name}, as it does not belong to the default network")
            address = child.endpoints["bridge"].ip_address
            if address:
                ports = expand_exposed(child.config.exposed_ports or ())
                env += link_env(Link(container.name, alias, address, ports, child.config.env or ()))
        return env

    def using_image(self, image_id: str) -> list[Container]:
        """Containers made from an image, those under way too."""
        return [each for each in (*self.store.all(), *self._creating.values()) if each.image_id == image_id]

    # --- create ---------------------------------------------------------------------------------------------

    async def create(
        self, request: creation.CreateRequest, name: str = "", *, managed: bool = False
    ) -> tuple[Container, list[str]]:
        """Make a container; returns it with the warnings for the client.

        Args:
            managed: made by the engine itself (a build step).

        Raises: what BEHAVIOUR of `POST /containers/create` names, by kind.
        Cancellation: nothing is left, but for named volumes that were made.
        """
        config, host_config = request.config, request.host_config
        warnings = self._check(request)
        creation.fill_host_config(host_config, self._defaults())
        self._resolve_modes(host_config)
        image = self._engine.images.resolve(config.image) if config.image else None
        creation.merge_config(config, _image_config(image))
        creation.fill_log_config(host_config.log_config, self._defaults())
        creation.check_log_config(host_config.log_config)
        config.labels = config.labels or {}
        container = self._new(config, host_config, image, name, managed=managed)
        try:
            creation.fill_container_id_env(config, host_config.container_id_env, container.id)
            parse_security_options(host_config.security_opt)
            _check_storage_options(host_config.storage_opt)
            self._register_links(container)
            container.endpoints = self._initial_endpoints(container, request)
            await self._make(container)
        except BaseException:
            self._release_name(container)
            raise
        finally:
            self._creating.pop(container.id, None)
        if not managed:
            self._engine.events.container(container, "create")
        return container, warnings

    def _check(self, request: creation.CreateRequest) -> list[str]:
        config, host_config = request.config, request.host_config
        creation.check_modes(config, host_config)
        creation.check_config(config)
        creation.check_auto_remove(host_config)
        for mount in host_config.mounts or ():
            mountspec.resolve_mount(mount)
        creation.check_host_config(host_config)
        support = replace(self.kernel_support, ipv4_forwarding=_ipv4_forwarding())
        warnings = creation.check_resources(host_config, support)
        warnings += creation.check_limits_of_host(
            host_config,
            support,
            cgroup_driver=self._engine.config.cgroup_driver,
            runtimes=tuple(self._engine.runtimes.paths),
        )
        creation.check_networking(request.networking)
        return warnings

    def _defaults(self) -> creation.HostDefaults:
        config = self._engine.config
        return creation.HostDefaults(
            ipc_mode=config.default_ipc_mode,
            shm_size=config.default_shm_size,
            runtime=config.default_runtime,
            log_driver=config.log_driver,
            log_opts=config.log_opts,
            ulimits=[Ulimit(each.name, each.hard, each.soft) for each in config.default_ulimits.values()],
        )

    def _resolve_modes(self, host_config: HostConfig) -> None:
        """`container:name` becomes `container:ID`; a network's that is not there yet is found at start."""
        for attribute, kind in (("pid_mode", InvalidParameter), ("ipc_mode", InvalidParameter), ("network_mode", None)):
            name = creation.container_of_mode(getattr(host_config, attribute))
            if not name:
                continue
            try:
                setattr(host_config, attribute, f"container:{self.find(name).id}")
            except EngineError as error:
                if kind is not None:
                    raise kind(error.message) from error

    def _new(
        self,
        config: ContainerConfig,
        host_config: HostConfig,
        image: ImageRecord | None,
        name: str,
        *,
        managed: bool,
    ) -> Container:
        """The record, with its name reserved."""
        container_id = self._new_id()
        name_generated = not name
        name = self._reserve_name(name, container_id)
        if not config.hostname:
            config.hostname = os.uname().nodename if host_config.network_mode == "host" else container_id[:12]
        path, arguments = creation.command_of(config)
        container = Container(
            id=container_id,
            name=name,
            created_ns=time.time_ns(),
            path=path,
            args=arguments,
            image_id=image.image_id if image else "",
            chain_id=image.chain_id if image else "",
            config=config,
            host_config=host_config,
            managed=managed,
            name_generated=name_generated,
        )
        self._creating[container_id] = container
        return container

    def _new_id(self) -> str:
        while True:
            container_id = secrets.token_hex(32)
            # A short id of digits only could be taken for a number. Source: moby pkg/stringid.
            if not container_id[:12].isdigit() and self.store.find(container_id) is None:
                return container_id

    def _reserve_name(self, name: str, container_id: str) -> str:
        if name:
            name = creation.check_name(name)
            self._take_name(name, container_id)
            return name
        for attempt in range(NAME_TRIES):
            name = generate_name(self._random.randrange, attempt)
            if name not in self._names:
                break
        else:
            name = container_id[:12]
        self._take_name(name, container_id)
        return name

    def _take_name(self, name: str, container_id: str) -> None:
        holder = self._names.get(name)
        if holder is not None:
            raise Conflict(
                f'Conflict. The container name "/{name}" is already in use by container "{holder}". '
                "You have to remove (or rename) that container to be able to reuse that name."
            )
        self._names[name] = container_id

    def _release_name(self, container: Container) -> None:
        if self._names.get(container.name) == container.id:
            del self._names[container.name]

    def _register_links(self, container: Container) -> None:
        """Rewrite HostConfig.Links to `<id>:alias`.

        On a user-defined network they mean nothing: the endpoint has its own (moby daemon_unix.go, registerLinks).
        """
        if creation.is_user_network(container.host_config.network_mode):
            container.host_config.links = None
        if not container.host_config.links:
            return
        resolved = []
        for text in container.host_config.links:
            name, alias = creation.parse_link(text)
            try:
                child = self.find(name)
                while joined := creation.container_of_mode(child.host_config.network_mode):
                    child = self.find(joined)
            except EngineError as error:
                raise type(error)(f"could not get container for {name}: {error.message}") from error
            if child.host_config.network_mode == "host":
                raise InvalidParameter(
                    "conflicting options: host type networking can't be used with links. "
                    "This would result in undefined behavior"
                )
            resolved.append(f"{child.id}:{alias}")
        container.host_config.links = resolved

    def _initial_endpoints(self, container: Container, request: creation.CreateRequest) -> dict[str, EndpointSettings]:
        """By network name: what the request says, or an empty one on the network of its mode.

        Source: moby daemon/container_operations.go updateContainerNetworkSettings.
        """
        mode = container.host_config.network_mode
        if container.config.network_disabled or mode.startswith("container:"):
            return {}
        default = "none" if self._engine.config.bridge == "none" else "bridge"
        name = default if mode == "default" else mode
        network = self._engine.networks.find(name) if creation.is_user_network(mode) else None
        if network is not None:
            name = network.name
        asked = (request.networking.endpoints_config if request.networking else None) or {}
        endpoints = {key: value or EndpointSettings() for key, value in asked.items()}
        if not endpoints:
            return {name: EndpointSettings()}
        for alias in ("default", network.id if network is not None else ""):
            if alias in endpoints and name not in endpoints:
                endpoints[name] = endpoints.pop(alias)
        return endpoints

    async def _make(self, container: Container) -> None:
        """Volumes, then one transaction: the writable layer with its init layer, and the rows."""
        engine = self._engine
        container.mounts = await engine.volumes.prepare(
            container.id, container.config, container.host_config, container.chain_id, managed=container.managed
        )
        try:
            fill: Callable[[Path], None] | None = None
            if container.host_config.runtime != "bare":
                layers = [layer.diff for layer in engine.snapshots.chain(container.chain_id)]
                fill = _InitLayer(layers, container.config.working_dir).fill
            await engine.snapshots.prepare(
                container.id,
                container.chain_id,
                fill=fill,
                also=lambda connection: self.store.write(connection, container),
            )
        except BaseException:
            with trio.CancelScope(shield=True):
                await engine.volumes.discard(container.id, container.mounts)
            raise
        self.store.adopt(container)

    # --- list and inspect -----------------------------------------------------------------------------------

    async def summaries(
        self, filters: Filters = NO_FILTERS, *, everything: bool = False, limit: int = 0, size: bool = False
    ) -> list[dict[str, Any]]:
        """`GET /containers/json`, newest first.

        Raises: InvalidParameter, SystemFailure (a container that `before` or `since` names does not exist).
        """
        selection = _Selection(self, filters, everything=everything, limit=limit)
        now_ns = time.time_ns()
        entries = []
        meanings: dict[str, str] = {}  # most containers have their image's name in common with others
        for container in selection.chosen():
            sizes = await self._sizes(container) if size else None
            entries.append(
                containerview.show_summary(
                    container,
                    names=self.names_of(container),
                    image=self._image_name(container, meanings),
                    now_ns=now_ns,
                    sizes=sizes,
                )
            )
        return entries

    def _image_name(self, container: Container, meanings: dict[str, str]) -> str:
        """As given at create, if that still means the same image. `meanings`: the names that were looked up already."""
        name = container.config.image
        if name not in meanings:
            try:
                meanings[name] = self._engine.images.resolve(name).image_id
            except EngineError:
                meanings[name] = ""
        return name if meanings[name] == container.image_id else container.image_id

    async def _sizes(self, container: Container) -> tuple[int, int]:
        try:
            rw = await self._engine.snapshots.size_rw(container.id)
            return rw, rw + self._engine.snapshots.size_bytes(container.chain_id)
        except EngineError:  # dead, or removed meanwhile, or a layer is lost
            return 0, 0

    async def inspect(self, name: str, *, size: bool = False) -> dict[str, Any]:
        """`GET /containers/{name}/json`. Raises: NotFound and kin of `find`."""
        container = self.find(name)
        sizes = await self._sizes(container) if size else None
        started = container.state.started_ns != 0
        apparmor = ""
        if started:
            host_config = container.host_config
            security = parse_security_options(host_config.security_opt)
            apparmor = apparmor_profile(security, self.host_facts, privileged=host_config.privileged)
        return containerview.show_container(
            container,
            links=[f"/{child.name}:/{container.name}/{alias}" for alias, child in self._links_of(container)],
            exec_ids=self._engine.execs.ids_of(container),
            graph_driver=self._graph_driver(container),
            log_path=str(self._engine.logs.path(container)) if started else "",
            apparmor_profile=apparmor,
            sizes=sizes,
        )

    def _graph_driver(self, container: Container) -> dict[str, str]:
        try:
            dirs = self._engine.snapshots.mounts(container.id)
        except EngineError:  # dead, or a layer is lost: inspect still answers
            return {"LowerDir": "", "MergedDir": "", "UpperDir": "", "WorkDir": ""}
        merged = self._engine.config.exec_root / "containers" / container.id / "rootfs"
        return {
            "LowerDir": ":".join(map(str, dirs.lower)),
            "MergedDir": str(merged),
            "UpperDir": str(dirs.upper),
            "WorkDir": str(dirs.work),
        }

    # --- update and rename ----------------------------------------------------------------------------------

    async def update(self, name: str, changes: UpdateConfig) -> list[str]:
        """Change limits and the restart policy; at once for a running container. Returns warnings.

        Raises: InvalidParameter, Conflict, SystemFailure; nothing is changed then.
        """
        container = self.find(name)
        creation.check_restart_policy(changes.restart_policy)
        warnings = creation.check_resources(changes, self.kernel_support, update=True)
        async with self._engine.locks(f"container/{container.id}"):
            if lifecycle.being_removed(container.state):
                raise Conflict(
                    f'Cannot update container {container.id}: container is marked for removal and cannot be "update"'
                )
            before = container.host_config
            after = replace(before)
            running = container.state.running and container.state.status is not Status.RESTARTING
            try:
                creation.apply_update(after, changes, changes.restart_policy, running=running)
                if running:
                    await self._update_cgroup(container, before, after)
            except EngineError as error:
                raise type(error)(f"Cannot update container {container.id}: {error.message}") from error
            container.host_config = after
            await self.store.update_record(container)
        self._engine.events.container(container, "update")
        return warnings

    async def _update_cgroup(self, container: Container, before: HostConfig, after: HostConfig) -> None:
        wanted, present = build_resources(after), build_resources(before)
        if wanted == present:
            return
        runtime = self._engine.runtimes.get(after.runtime)
        await runtime.update(container.id, wanted)

    async def rename(self, name: str, new_name: str) -> None:
        """Raises: InvalidParameter, Conflict and the look-up's kinds."""
        if not name or not new_name:
            raise InvalidParameter("Neither old nor new names may be empty")
        container = self.find(name)
        async with self._engine.locks(f"container/{container.id}"):
            old_name, name_generated = container.name, container.name_generated
            if new_name.removeprefix("/") == old_name:
                raise InvalidParameter("Renaming a container with the same name as its current name")
            try:
                new_name = creation.check_name("/" + new_name.removeprefix("/"))
                self._take_name(new_name, container.id)
            except EngineError as error:
                raise type(error)(f"Error when allocating new name: {error.message}") from error
            container.name, container.name_generated = new_name, False
            try:
                await self.store.update_record(container)
            except BaseException:
                container.name, container.name_generated = old_name, name_generated
                del self._names[new_name]
                raise
            self._names.pop(old_name, None)
        self._engine.events.container(container, "rename", oldName=f"/{old_name}")

    # --- remove and prune -----------------------------------------------------------------------------------

    async def remove(self, name: str, *, force: bool = False, remove_volumes: bool = False, link: bool = False) -> None:
        """`DELETE /containers/{name}`.

        Raises: NotFound, Conflict, SystemFailure.
        Cancellation: the container is still there, or dead (remove it again with force), or gone.
        """
        container = self.find(name)
        if link:
            await self._remove_link(name, container)
            return
        async with self._one_removal(container, name):
            removed = False
            while not removed:
                lifecycle.check_remove(container, force=force)
                if container.state.running:
                    await self._engine.supervisors.kill_for_removal(container)
                removed = await self._remove(container, remove_volumes=remove_volumes)

    async def remove_after_exit(self, container: Container) -> None:
        """Auto-remove: of a container that has ended, with its anonymous volumes."""
        async with self._one_removal(container, container.id):
            await self._remove(container, remove_volumes=True)

    @asynccontextmanager
    async def _one_removal(self, container: Container, name: str) -> AsyncIterator[None]:
        if container.id in self._removing:
            raise Conflict(f"removal of container {name} is already in progress")
        self._removing.add(container.id)
        for scope in self._until_removed.get(container.id, ()):
            scope.cancel()
        try:
            yield
        finally:
            self._removing.discard(container.id)

    @contextmanager
    def until_removed(self, container: Container) -> Iterator[trio.CancelScope]:
        """A scope that is cancelled when somebody begins to remove the container."""
        scopes = self._until_removed.setdefault(container.id, set())
        with trio.CancelScope() as scope:
            scopes.add(scope)
            try:
                yield scope
            finally:
                scopes.discard(scope)
                if not scopes:
                    self._until_removed.pop(container.id, None)

    async def _remove(self, container: Container, *, remove_volumes: bool) -> bool:
        """False when it was started meanwhile: a start that was under way had the lock before us."""
        engine = self._engine
        async with engine.locks(f"container/{container.id}"):
            if container.state.running:
                return False
            lifecycle.move(container.state, Status.REMOVING)
            try:
                await engine.supervisors.remove_process(container)
                if not remove_volumes:
                    await engine.volumes.leave_behind(container)
                await engine.snapshots.remove(
                    container.id, also=lambda connection: self.store.erase(connection, container.id)
                )
            except BaseException:
                lifecycle.move(container.state, Status.DEAD)
                raise
            self.store.forget(container.id)
            self._release_name(container)
            self._drop_links_to(container)
        await engine.volumes.release(container, remove_anonymous=remove_volumes)
        engine.supervisors.tell_removed(container)
        engine.events.container(container, "destroy")
        return True

    def _drop_links_to(self, container: Container) -> None:
        for parent in self.store.all():
            if parent.host_config.links:
                kept = [text for text in parent.host_config.links if not text.startswith(container.id)]
                parent.host_config.links = kept or None

    async def _remove_link(self, name: str, child: Container) -> None:
        """`rm --link parent/alias`: only the link goes."""
        parent_name, slash, alias = name.removeprefix("/").partition("/")
        if not slash:
            raise SystemFailure("Conflict, cannot remove the default link name of the container")
        parent = self.find(parent_name)
        async with self._engine.locks(f"container/{parent.id}"):
            links = [text for text in parent.host_config.links or () if text != f"{child.id}:{alias}"]
            parent.host_config.links = links or None
            await self.store.update_record(parent)

    async def remove_managed(self) -> None:
        """After a start: the containers of steps whose build did not outlive the last daemon."""
        for container in self.store.all():
            if container.managed:
                try:
                    await self.remove(container.id, force=True, remove_volumes=True)
                except EngineError as error:
                    log.error("cannot remove a build's container id=%s error=%s", container.short_id, error.message)

    async def prune(self, filters: Filters) -> tuple[list[str], int]:
        """Remove what is stopped; returns ids and the bytes of their writable layers.

        Raises: Conflict, when a prune is under way already.
        """
        until = filters.get("until")
        if len(until) > 1:
            raise SystemFailure("more than one until filter specified")
        before_ns = parse_until(until[0], time.time_ns()) if until else None
        if self._pruning:
            raise Conflict("a prune operation is already running")
        self._pruning = True
        try:
            return await self._prune(filters, before_ns)
        finally:
            self._pruning = False

    async def _prune(self, filters: Filters, before_ns: int | None) -> tuple[list[str], int]:
        removed, reclaimed = [], 0
        for container in self.store.all():
            labels = container.config.labels
            if (
                container.state.running
                or (before_ns is not None and container.created_ns > before_ns)
                or not filters.labels(labels)
                or not filters.without_labels(labels)
            ):
                continue
            try:
                size, _ = await self._sizes(container)
                await self.remove(container.id)
            except EngineError as error:
                log.warning("not pruned container=%s error=%s", container.short_id, error.message)
                continue
            removed.append(container.id)
            reclaimed += size
        return removed, reclaimed


# --- choosing for a list --------------------------------------------------------------------------------------


class _Selection:
    """Which containers a list shows. Source: moby daemon/list.go."""

    def __init__(self, containers: Containers, filters: Filters, *, everything: bool, limit: int) -> None:
        self._containers = containers
        self._filters = filters
        self._limit = max(limit, 0)
        self._everything = everything or limit > 0 or "status" in filters
        for status in filters.get("status"):
            if status not in {each.value for each in Status}:
                raise InvalidParameter(f"Invalid filter 'status={status}'")
        for health in filters.get("health"):
            if health not in HEALTH_STATES:
                raise InvalidParameter(f"Unrecognised filter value for health: {health}")
        self._is_task = filters.boolean("is-task")
        self._exit_codes = frozenset(_number(text) for text in filters.get("exited"))
        self._images = self._ancestors() if "ancestor" in filters else None
        self._published = _ports("publish", filters)
        self._exposed = _ports("expose", filters)
        self._ids = frozenset(map(self._by_prefix, filters.get("id")))
        self._before = self._edge("before")
        self._since = self._edge("since")

    def _by_prefix(self, prefix: str) -> str:
        """The one id that begins so; "" for none and for several."""
        found = [container.id for container in self._containers.all() if container.id.startswith(prefix)]
        return found[0] if prefix and len(found) == 1 else ""

    def _edge(self, key: str) -> str:
        edge = ""
        for name in self._filters.get(key):
            try:
                edge = self._containers.find(name).id
            except NotFound:
                raise SystemFailure(f"no such container {name}") from None
        return edge

    def _ancestors(self) -> frozenset[str]:
        """The images named, with all that descend from them."""
        images = self._containers._engine.images
        found: set[str] = set()
        pending = []
        for name in self._filters.get("ancestor"):
            try:
                pending.append(images.resolve(name).image_id)
            except EngineError:
                log.debug("no such ancestor image=%s", name)
        while pending:
            image_id = pending.pop()
            if image_id not in found:
                found.add(image_id)
                pending += [child.image_id for child in images.store.children(image_id)]
        return frozenset(found)

    def chosen(self) -> list[Container]:
        result: list[Container] = []
        before = self._before
        newest_first = sorted(self._containers.all(), key=lambda each: each.created_ns, reverse=True)
        for container in newest_first:
            if container.managed:
                continue
            if before:
                if container.id == before:
                    before = ""
                continue
            if container.id == self._since or (self._limit and len(result) == self._limit):
                break
            if self._matches(container):
                result.append(container)
        return result

    def _matches(self, container: Container) -> bool:
        filters, state = self._filters, container.state
        if not state.running and not self._everything:
            return False
        exited = not state.running and state.started_ns != 0 and state.exit_code in self._exit_codes
        health = state.health.status if state.health is not None else ""
        return (
            filters.regexp("name", "/" + container.name, container.name)
            and ("id" not in filters or container.id in self._ids)
            and not self._is_task
            and filters.labels(container.config.labels)
            and filters.exact("isolation", container.host_config.isolation or "default")
            and filters.exact("health", health or "none")
            and (not self._exit_codes or exited)
            and filters.exact("status", state.status.value)
            and self._matches_volume(container)
            and (self._images is None or container.image_id in self._images)
            and self._matches_network(container)
            and (
                not self._published
                or any(port in self._published for port in container.host_config.port_bindings or ())
            )
            and (not self._exposed or any(port in self._exposed for port in container.config.exposed_ports or ()))
        )

    def _matches_volume(self, container: Container) -> bool:
        wanted = self._filters.get("volume")
        return not wanted or any(
            mount.destination in wanted or (mount.name or mount.source) in wanted for mount in container.mounts
        )

    def _matches_network(self, container: Container) -> bool:
        wanted = self._filters.get("network")
        return not wanted or any(
            name == text or (endpoint.network_id and endpoint.network_id.startswith(text))
            for text in wanted
            for name, endpoint in container.endpoints.items()
        )


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SystemFailure(f'strconv.Atoi: parsing "{text}": invalid syntax') from None


def _ports(key: str, filters: Filters) -> frozenset[str]:
    """`80`, `80/udp`, `8000-8010/tcp` -> the keys of PortBindings and ExposedPorts they mean."""
    found: set[str] = set()
    for text in filters.get(key):
        if text.startswith(":"):
            raise SystemFailure(f"filter for '{key}' should not contain ':': {text}")
        try:
            first, last, protocol = parse_port(text)
        except InvalidParameter as error:
            raise SystemFailure(f"error while looking up for {key} {text}: {error.message}") from None
        found.update(f"{number}/{protocol}" for number in range(first, last + 1))
    return frozenset(found)


# --- the pieces of a create -----------------------------------------------------------------------------------


def _image_config(image: ImageRecord | None) -> ContainerConfig | None:
    return wire.decode(ContainerConfig, dict(image.config.config)) if image is not None else None


def _ipv4_forwarding() -> bool:
    # Read each time: the daemon itself switches it on after it read the rest.
    try:
        with open("/proc/sys/net/ipv4/ip_forward", "rb") as file:
            return file.read(1) != b"0"
    except OSError:
        return True


def _check_storage_options(options: dict[str, str] | None) -> None:
    for key in options or ():
        if key.lower() != "size":
            raise SystemFailure(f"Unknown option {key}")
        raise SystemFailure("--storage-opt is supported only for overlay over xfs with 'pquota' mount option")


class _InitLayer:
    """The layer between the image and the container's own: places for what is mounted over it later.

    It is a lower layer like the image's, so a directory here would hide the mode and owner that the image gave to
    it: they are taken over from the topmost layer that has the directory.
    Source: moby daemon/initlayer/setup_unix.go.
    """

    DIRECTORIES = ("dev/pts", "dev/shm", "proc", "sys")
    FILES = ("dev/console", "etc/hostname", "etc/hosts", "etc/resolv.conf", ".dockerenv")
    LINKS = (("etc/mtab", "/proc/mounts"),)

    def __init__(self, layers: Sequence[Path], working_dir: str = "") -> None:
        self._layers = layers  # the image's diffs, top first
        self._working_dir = working_dir

    def fill(self, root: Path) -> None:
        """Blocks; for a thread. Raises: SystemFailure, when the working directory is something else in the image."""
        self._check_working_dir()
        self.complete(root)

    def complete(self, root: Path) -> None:
        """Make what is missing. Blocks."""
        for name in ("dev", "etc", *self.DIRECTORIES):
            self._make_directory(root, name)
        for name in self.FILES:
            fd = os.open(root / name, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o755)
            try:
                os.fchmod(fd, 0o755)
            finally:
                os.close(fd)
        for name, target in self.LINKS:
            if not os.path.lexists(root / name):
                os.symlink(target, root / name)

    def _check_working_dir(self) -> None:
        """A missing one is made by the runtime; a link is left to it as well."""
        parts = [part for part in os.path.normpath("/" + self._working_dir).split("/") if part]
        for layer in self._layers:
            path = layer
            for part in parts:
                path = path / part
                try:
                    status = os.lstat(path)
                except FileNotFoundError:
                    break
                if stat.S_ISCHR(status.st_mode) or stat.S_ISLNK(status.st_mode):  # a whiteout, or a link
                    return
                if not stat.S_ISDIR(status.st_mode):
                    raise SystemFailure(f"Cannot mkdir: {self._working_dir} is not a directory")
                if _is_opaque(path):
                    return
            else:
                return

    def _make_directory(self, root: Path, name: str) -> None:
        path = root / name
        path.mkdir(exist_ok=True)
        for found in self._statuses(name):
            if stat.S_ISDIR(found.st_mode):
                os.chown(path, found.st_uid, found.st_gid)
                os.chmod(path, stat.S_IMODE(found.st_mode))
                return
            break  # a whiteout, or something that is not a directory: ours replaces it
        path.chmod(0o755)

    def _statuses(self, name: str) -> Iterable[os.stat_result]:
        for layer in self._layers:
            try:
                yield os.lstat(layer / name)
            except (FileNotFoundError, NotADirectoryError):
                continue


def _is_opaque(directory: Path) -> bool:
    try:
        return os.getxattr(directory, "trusted.overlay.opaque") == b"y"
    except OSError:
        return False
