"""The steps of a build: stages and their instructions, one after the other. What they are for is in engine/build."""

from __future__ import annotations

import logging
import posixpath
import re
import secrets
import time
from codecs import getincrementaldecoder
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import trio

from balenapy.core import creation, progress, wire
from balenapy.core.buildargs import SOURCE_DATE_EPOCH, BuildArgs
from balenapy.core.buildcache import continues, is_step, same_config
from balenapy.core.buildtree import PLACE
from balenapy.core.container import Container, ContainerConfig, HealthConfig, LogConfig
from balenapy.core.copysources import Source, hash_of
from balenapy.core.creation import CreateRequest
from balenapy.core.dockerfile import Dockerfile, Instruction, Stage, parse_line
from balenapy.core.gotext import show_words
from balenapy.core.imageconfig import EMPTY_TAR, Child, child_config, restored_config, squashed_config
from balenapy.core.instructions import Variables, apply, changes_config, command_line, environment_of, shell_of
from balenapy.core.manifest import parse_image_config, parse_platform
from balenapy.core.mountspec import parse_bind
from balenapy.core.reference import parse_reference
from balenapy.core.stdcopy import FrameReader, Stream
from balenapy.core.timefmt import parse_http_date
from balenapy.engine.assembly import Assembly, NewImage, Unpacked
from balenapy.engine.buildcontext import find_in_directory
from balenapy.engine.fetch import open_url
from balenapy.errors import EngineError, InvalidParameter, NotFound, SystemFailure
from balenapy.registry.auth import find_credentials

if TYPE_CHECKING:
    from balenapy.engine.build import BuildRequest, Output
    from balenapy.engine.buildcontext import Context
    from balenapy.engine.engine import Engine
    from balenapy.engine.workers import WorkerFamily
    from balenapy.stores.images import ImageRecord

log = logging.getLogger(__name__)

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SCRATCH = "scratch"
CLEAN_UP_TIMEOUT_S = 30
KNOWN_SUMS = 1024


class CommandFailed(SystemFailure):
    """A RUN ended with something else than 0."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class _State:
    """Where a stage is."""

    name: str = ""
    base: ImageRecord | None = None  # None: FROM scratch
    image: ImageRecord | None = None  # of its last step; None: nothing yet, FROM scratch
    config: ContainerConfig = field(default_factory=ContainerConfig)
    author: str = ""
    command_set: bool = False
    cache_missed: bool = False

    @property
    def image_id(self) -> str:
        return self.image.image_id if self.image is not None else ""

    @property
    def chain_id(self) -> str:
        return self.image.chain_id if self.image is not None else ""


@dataclass(frozen=True, slots=True)
class _Found:
    """A source of COPY or ADD."""

    source: Source
    root: Callable[[], Awaitable[Path]]  # makes the directory it is in, if there is none yet
    unpack: bool = False
    keep_owner: bool = False  # unless one is asked for


@dataclass(slots=True)
class _Origin:
    """An image whose files are copied."""

    image_id: str
    chain_id: str
    root: Path | None = None


class Steps:
    """All steps of one build."""

    def __init__(
        self,
        engine: Engine,
        request: BuildRequest,
        context: Context,
        family: WorkerFamily,
        work: Assembly,
        output: Output,
        dockerfile: Dockerfile,
    ) -> None:
        self._engine = engine
        self._request = request
        self._context = context
        self._family = family
        self._work = work
        self._output = output
        self._escape = dockerfile.escape
        self._arguments = BuildArgs(request.build_args)
        self._epoch_s = _epoch(request.build_args)
        self._stages: list[_State] = []
        self._containers: list[str] = []  # of the present step: ids, to be told of when they go
        self._state = _State()
        self._cache_sources: list[ImageRecord] | None = None

    async def run(self, dockerfile: Dockerfile) -> ImageRecord:
        """Take every step; gives the last one's image.

        Raises: EngineError.
        Cancellation: the container that runs is removed.
        """
        if dockerfile.warnings:
            await self._output.warn("\n".join(dockerfile.warnings) + "\n")
        total = len(dockerfile.arguments) + sum(1 + len(stage.instructions) for stage in dockerfile.stages)
        number = 0

        async def announce(source: str) -> None:
            nonlocal number
            number += 1
            await self._output.say(f"Step {number}/{total} : {source}")
            await self._output.say("\n")

        for one in dockerfile.arguments:
            await announce(one.source)
            self._declare_outer(one)
        for stage in dockerfile.stages:
            if stage.name and any(known.name == stage.name for known in self._stages):
                raise InvalidParameter(f"{stage.name} stage name already used")
            await announce(stage.source)
            await self._begin_stage(stage)
            await self._tell_image()
            for one in stage.instructions:
                await announce(one.source)
                await self._step(one)
                await self._tell_image()
            if self._state.image is not None:
                await self._output.line(progress.aux({"ID": self._state.image_id}))
            self._stages.append(self._state)
        unused = self._arguments.unused()
        if unused:
            await self._output.say(f"[Warning] One or more build-args {show_words(unused)} were not consumed\n")
        if self._state.image is None:
            raise SystemFailure("No image was generated. Is your Dockerfile empty?")
        return self._state.image

    async def _tell_image(self) -> None:
        short = self._state.image.short_id if self._state.image is not None else ""
        await self._output.say(f" ---> {short}\n")

    # --- stages

    def _declare_outer(self, one: Instruction) -> None:
        variables = Variables(self._arguments.for_stage(), self._escape)
        for name, value in _argument_words(one, variables):
            self._arguments.declare_outer(name, value)

    async def _begin_stage(self, stage: Stage) -> None:
        variables = Variables(self._arguments.for_from(), self._escape)
        name = variables.word(stage.base)
        if not name:
            raise InvalidParameter(f"base name ({stage.base}) should not be blank")
        known = next((state for state in self._stages if state.name and state.name == name.lower()), None)
        if known is not None:
            image = known.image
        elif name == SCRATCH:
            image = None
        else:
            image = await self._image(name, variables.word(stage.platform))
        if image is not None:
            await self._work.hold(image.chain_id)
        config = wire.decode(ContainerConfig, dict(image.config.config)) if image is not None else ContainerConfig()
        if "PATH" not in environment_of(config.env):
            config.env = [*(config.env or ()), DEFAULT_PATH]
        config.open_stdin = config.stdin_once = False
        self._state = _State(stage.name, image, image, config)
        self._arguments.begin_stage()
        triggers, config.on_build = config.on_build or [], None
        if triggers:
            await self._output.say(f"# Executing {len(triggers)} build trigger")
            if len(triggers) > 1:
                await self._output.say("s")
            await self._output.say("\n")
        for text in triggers:
            await self._step(parse_line(text))
        config.image = self._state.image_id

    async def _image(self, name: str, platform: str = "") -> ImageRecord:
        """The image of that name, pulled when it is missing or newer ones are wanted."""
        images = self._engine.images
        if not self._request.pull:
            try:
                return images.resolve(name)
            except NotFound:
                pass
        reference = parse_reference(name).with_default_tag()
        wanted = platform or self._request.platform
        pulls = self._engine.pulls
        auth = find_credentials(self._request.registry_config, reference.domain)
        await pulls.pull(
            reference, auth, parse_platform(wanted, pulls.platform) if wanted else None, self._output.line
        )
        return images.resolve(name)

    # --- one step

    async def _step(self, one: Instruction) -> None:
        self._containers.clear()
        state = self._state
        state.config.image = state.image_id
        try:
            await self._take(one)
        except EngineError:
            if self._request.force_remove:
                await self._tell_removed()
            raise
        if self._request.remove or self._request.force_remove:
            await self._tell_removed()

    async def _tell_removed(self) -> None:
        while self._containers:
            await self._output.say(f"Removing intermediate container {self._containers.pop()[:12]}\n")

    async def _take(self, one: Instruction) -> None:
        environment = self._arguments.environment(environment_of(self._state.config.env).keys())
        variables = Variables({**environment, **environment_of(self._state.config.env)}, self._escape)
        match one.name:
            case "RUN":
                await self._run(one, environment)
            case "COPY" | "ADD":
                await self._copy(one, variables)
            case "ARG":
                words = _argument_words(one, variables)
                for name, value in words:
                    self._arguments.declare(name, value)
                shown = [name if value is None else f"{name}={value}" for name, value in words]
                await self._change(" ".join(["ARG", *shown]))
            case "MAINTAINER":
                self._state.author = one.words[0]
                await self._change(f"MAINTAINER {one.words[0]}")
            case "WORKDIR":
                comment = apply(self._state.config, one, variables, command_set=False)
                await self._workdir(comment)
            case _ if changes_config(one):
                await self._tell_former_health(one)
                comment = apply(self._state.config, one, variables, command_set=self._state.command_set)
                await self._change(comment)
                self._state.command_set = self._state.command_set or (one.name == "CMD" and bool(one.words))
            case _:
                raise InvalidParameter(f"unknown instruction: {one.name}")

    async def _tell_former_health(self, one: Instruction) -> None:
        health = self._state.config.healthcheck
        if one.name == "HEALTHCHECK" and health is not None and health.test and health.test[0] != "NONE":
            await self._output.say(f"Note: overriding previous HEALTHCHECK: {show_words(health.test)}\n")

    # --- steps that change the config only

    def _with_command(self, command: Sequence[str]) -> ContainerConfig:
        config = deepcopy(self._state.config)
        config.cmd = list(command)
        return config

    async def _change(self, comment: str) -> None:
        config = self._with_command([*shell_of(self._state.config), "#(nop) ", comment])
        if await self._find_cached(config):
            return
        container_id = await self._make_up_container(config)
        await self._commit(config, None, container_id)

    async def _workdir(self, comment: str) -> None:
        config = self._with_command([*shell_of(self._state.config), f"#(nop) {comment}"])
        if await self._find_cached(config):
            return
        placed = await self._place(config.working_dir, ())
        container_id = await self._make_up_container(config)
        await self._commit(config, placed, container_id)

    async def _make_up_container(self, config: ContainerConfig) -> str:
        """What a step that runs nothing has for a container: a name, and its config filled from the image.

        When containers stay, there really is one.
        """
        creation.check_config(config)
        if not (self._request.remove or self._request.force_remove):
            container, warnings = await self._create(deepcopy(config), managed=False)
            container_id = container.id
            await self._announce(container_id, warnings)
        else:
            container_id = secrets.token_hex(32)
            await self._announce(container_id)
        creation.merge_config(config, self._parent_config())
        self._state.config.healthcheck = config.healthcheck  # one object there
        config.hostname = container_id[:12]
        return container_id

    def _parent_config(self) -> ContainerConfig | None:
        image = self._state.image
        return wire.decode(ContainerConfig, dict(image.config.config)) if image is not None else None

    # --- RUN

    async def _run(self, one: Instruction, environment: Mapping[str, str]) -> None:
        state = self._state
        command = command_line(state.config, one)
        known = self._with_command(self._arguments.marked(environment, command))
        known.entrypoint = None
        if await self._find_cached(known):
            return
        config = self._with_command(command)
        config.env = [*(config.env or ()), *(f"{name}={value}" for name, value in environment.items())]
        config.entrypoint = [""]
        config.healthcheck = HealthConfig(["NONE"])
        self._check_binds()
        self._family.start()
        container, warnings = await self._create(config, managed=True)
        taken = False
        try:
            await self._announce(container.id, warnings)
            await self._run_container(container, command)
            await self._engine.supervisors.wait_until_cleaned_up(container)
            taken = True
            await self._commit(known, await self._take_changes(container), container.id)
        except EngineError:
            # For a look at what it did; one whose files are a layer by now has none.
            await self._dispose(container, keep=not self._request.force_remove and not taken)
            raise
        except BaseException:
            await self._dispose(container, keep=False)
            raise
        await self._dispose(container, keep=not (self._request.remove or self._request.force_remove))

    def _check_binds(self) -> None:
        """Raises: InvalidParameter."""
        for text in self._request.host_config.binds or ():
            if parse_bind(text).type != "bind":
                raise InvalidParameter(f"Cannot use non-bind mount during build: {text}")

    async def _create(self, config: ContainerConfig, *, managed: bool) -> tuple[Container, list[str]]:
        """Make a container for a step. One that is not `managed` is everybody's to see, and stays."""
        host_config = deepcopy(self._request.host_config)
        host_config.log_config = LogConfig("none")
        host_config.network_mode = host_config.network_mode or "default"
        return await self._engine.containers.create(CreateRequest(config, host_config), managed=managed)

    async def _announce(self, container_id: str, warnings: Sequence[str] = ()) -> None:
        for warning in warnings:
            await self._output.say(f" ---> [Warning] {warning}\n")
        self._containers.append(container_id)
        await self._output.say(f" ---> Running in {container_id[:12]}\n")

    async def _run_container(self, container: Container, command: Sequence[str]) -> None:
        """Raises: CommandFailed; whatever kept it from starting."""
        supervisors = self._engine.supervisors
        async with supervisors.attachments.output(container) as client:
            waiter = supervisors.wait(container, "next-exit")
            try:
                await supervisors.start(container)
                output = _ToOutput(self._output)
                await client.send_to(output)
                await output.finish()
                code, _ = await waiter.result()
            finally:
                supervisors.forget_waiter(container, waiter)
        if code:
            raise CommandFailed(f"The command '{' '.join(command)}' returned a non-zero code: {code}", code)

    async def _take_changes(self, container: Container) -> Unpacked:
        diff = self._engine.snapshots.get(container.id).diff
        if self._request.remove or self._request.force_remove:
            return await self._work.adopt(diff, self._epoch_s)
        return await self._work.repack({"root": str(diff), "epoch": self._epoch_s})

    async def _dispose(self, container: Container, *, keep: bool) -> None:
        """Remove a step's container, or leave it for everybody to see."""
        containers = self._engine.containers
        with trio.move_on_after(CLEAN_UP_TIMEOUT_S, shield=True):
            try:
                if keep:
                    container.managed = False
                    await containers.store.update_record(container)
                else:
                    await containers.remove(container.id, force=True, remove_volumes=True)
            except EngineError as error:
                log.error("cannot remove a build's container id=%s error=%s", container.short_id, error.message)

    # --- COPY and ADD

    async def _copy(self, one: Instruction, variables: Variables) -> None:
        *patterns, destination = variables.words(one.words)
        owner = variables.word(one.flag("chown"))
        async with AsyncExitStack() as stack:
            found = await self._find_sources(stack, one, patterns, destination)
            if len(found) > 1 and not destination.endswith("/"):
                raise InvalidParameter(
                    f"When using {one.name} with more than one source file, the destination must be a directory "
                    "and end with a /"
                )
            chown = f"--chown={owner}" if owner else ""
            comment = f"{one.name} {chown}{hash_of([each.source for each in found])} in {destination} "
            config = self._with_command([*shell_of(self._state.config), f"#(nop) {comment}"])
            if await self._find_cached(config):
                return
            sources = [
                {
                    "root": str(await root()),
                    "paths": [each.source.path for each in group],
                    "unpack": unpack,
                    "keep_owner": keep_owner and not owner,
                }
                for (root, unpack, keep_owner), group in groupby(
                    found, lambda each: (each.root, each.unpack, each.keep_owner)
                )
            ]
            await self._commit(config, await self._place(destination, sources, owner=owner), "")

    async def _find_sources(
        self, stack: AsyncExitStack, one: Instruction, patterns: Sequence[str], destination: str
    ) -> list[_Found]:
        """What is to be copied. What had to be made for that is gone with the stack."""
        found: list[_Found] = []
        image = await self._image_of(one.flag("from")) if one.flag("from") else None
        try:
            for pattern in patterns:
                if pattern.startswith(("http://", "https://")):
                    if one.name == "COPY":
                        raise InvalidParameter("source can't be a URL for COPY")
                    found.append(await self._download(stack, pattern, destination))
                elif image is not None:
                    found += await self._find_in_image(stack, image, pattern)
                else:
                    sources = await self._context.find([pattern])
                    unpack = one.name == "ADD"
                    found += [_Found(source, self._context.root, unpack=unpack) for source in sources]
        except NotFound as error:
            message = error.message
            if image is None and message.startswith("stat "):
                path = message.removeprefix("stat ").removesuffix(": file does not exist")
                message = f"stat {PLACE}/{path}: no such file or directory"
            raise InvalidParameter(f"{one.name} failed: {message}") from error
        except EngineError as error:
            raise InvalidParameter(f"{one.name} failed: {error.message}") from error
        if not found:
            raise InvalidParameter(f"{one.name} failed: no source files were specified")
        return found

    async def _image_of(self, name: str) -> _Origin:
        """The files that `--from` means: a stage by its name or number, else an image."""
        try:
            for number, state in enumerate(self._stages):
                if name.lower() == state.name or name == str(number):
                    return _Origin(state.image_id, state.chain_id)
            if re.fullmatch(r"[+-]?[0-9]+", name):
                own = int(name) == len(self._stages)
                raise InvalidParameter("refers to current build stage" if own else "index out of bounds")
            image = await self._image(name)
        except EngineError as error:
            raise InvalidParameter(f"invalid from flag value {name}: {error.message}") from error
        return _Origin(image.image_id, image.chain_id)

    async def _find_in_image(self, stack: AsyncExitStack, origin: _Origin, pattern: str) -> list[_Found]:
        """What a pattern means in an image. What was found there before is known: an image does not change."""

        async def root() -> Path:
            if origin.root is None:
                origin.root = await stack.enter_async_context(self._engine.snapshots.view(origin.chain_id))
            return origin.root

        known = self._engine.builds.sums
        sources = known.get((origin.image_id, pattern))
        if sources is None:
            sources = await find_in_directory(
                self._family, await root(), [pattern], host_names=self._epoch_s is None
            )
            if origin.image_id:
                known[origin.image_id, pattern] = sources
            while len(known) > KNOWN_SUMS:
                del known[next(iter(known))]
        return [_Found(source, root, keep_owner=True) for source in sources]

    async def _download(self, stack: AsyncExitStack, url: str, destination: str) -> _Found:
        """Fetch a file for ADD. It is private, and has the time that the server says."""
        answer = await open_url(stack, url)
        name = _file_name(url, answer.headers.get("content-disposition", ""))
        if not name and destination.endswith("/"):
            raise InvalidParameter(f"cannot determine filename for source {url}")
        name = name or "__unnamed__"
        directory = await self._engine.snapshots.new_directory()
        stack.push_async_callback(self._engine.snapshots.discard, directory)

        async def feed(stdin: trio.abc.SendStream) -> None:
            await self._output.download(answer, "", "Downloading", stdin.send_all)

        root = directory / "diff"
        mtime_s = parse_http_date(answer.headers.get("last-modified", "")) or 0
        arguments = {"directory": str(root), "name": name, "mtime": mtime_s}
        report = await self._family.run("receive", arguments, feed=feed)
        await self._output.say("\n")

        async def where() -> Path:
            return root

        return _Found(Source(name, str(report["sum"])), where)

    async def _place(
        self, destination: str, sources: Sequence[Mapping[str, object]], *, owner: str = ""
    ) -> Unpacked:
        """Put files on top of the present image; see worker/place."""
        if not destination.startswith("/"):
            slash = "/" if destination.endswith("/") else ""
            destination = posixpath.normpath(f"/{self._state.config.working_dir}/{destination}") + slash
        layers = self._engine.snapshots.chain(self._state.chain_id)
        return await self._work.make(
            "place",
            {
                "lower": [str(layer.diff) for layer in layers],
                "destination": destination,
                "sources": sources,
                "owner": owner,
                "epoch": self._epoch_s,
            },
        )

    # --- squash

    async def squash(self) -> ImageRecord:
        """Make one layer of all that the last stage added to its base. Source: moby daemon/images/image_squash.go."""
        image, base = self._state.image, self._state.base
        assert image is not None
        chain = self._engine.snapshots.chain(image.chain_id)  # top first
        added = len(chain) - len(base.config.diff_ids if base is not None else ())
        layer = await self._work.make(
            "squash",
            {
                "layers": [str(layer.diff) for layer in reversed(chain[:added])],
                "lower": [str(layer.diff) for layer in chain[added:]],
                "epoch": self._epoch_s,
            },
        )
        raw = squashed_config(
            image.config,
            image.parent,
            base.config if base is not None else None,
            layer.diff_id,
            time.time_ns() if self._epoch_s is None else self._epoch_s * 10**9,
        )
        (squashed,) = await self._work.commit([NewImage(parse_image_config(raw))], described=False)
        await self._output.line(progress.aux({"ID": squashed.image_id}, id="moby.image.id"))
        return squashed

    # --- cache and commit

    async def _find_cached(self, config: ContainerConfig) -> bool:
        """Go on with an image that this step made before, if there is one."""
        state = self._state
        if self._request.no_cache or state.cache_missed:
            return False
        image = self._local_match(config)
        if self._request.cache_from:
            image = await self._foreign_match(config, image)
        if image is None:
            state.cache_missed = True
            return False
        await self._work.hold(image.chain_id)
        state.image = image
        await self._output.say(" ---> Using cache\n")
        return True

    def _local_match(self, config: ContainerConfig) -> ImageRecord | None:
        found = [
            image
            for image in self._engine.images.store.children(self._state.image_id)
            if (self._epoch_s is None or image.created_ns == self._epoch_s * 10**9)
            and same_config(wire.decode(ContainerConfig, dict(image.config.container_config)), config)
        ]
        return max(found, key=lambda image: image.created_ns, default=None)

    async def _foreign_match(self, config: ContainerConfig, local: ImageRecord | None) -> ImageRecord | None:
        """What the images of `cachefrom` know of this step; one found here counts only as their ancestor."""
        store = self._engine.images.store
        if self._cache_sources is None:
            self._cache_sources = self._resolve_cache_sources()
        parent = self._state.image
        ancestors = {each for source in self._cache_sources for each in store.ancestry(source.image_id)}
        if local is not None and local.image_id in ancestors:
            return local
        length = len(parent.config.history) if parent is not None else 0
        for source in self._cache_sources:
            target = source.config
            if not continues(target, parent.config if parent is not None else None):
                continue
            if not is_step(target.history[length], config.cmd or ()):
                continue
            if length == len(target.history) - 1:
                if parent is not None:
                    await store.set_parent(source.image_id, parent.image_id)
                return source
            raw = restored_config(parent.config if parent is not None else None, target, config)
            image = NewImage(parse_image_config(raw), parent=self._state.image_id)
            self._cache_sources = [source]  # no jumping between them
            (restored,) = await self._work.commit([image], described=False)
            return restored
        return None

    def _resolve_cache_sources(self) -> list[ImageRecord]:
        found = []
        for name in self._request.cache_from:
            try:
                found.append(self._engine.images.resolve(name))
            except EngineError as error:
                log.warning("cannot take the cache from image=%s error=%s", name, error.message)
        return found

    async def _commit(self, container_config: ContainerConfig, layer: Unpacked | None, container_id: str) -> None:
        state = self._state
        parent = state.image
        if self._epoch_s is not None:  # what is chosen at random has no place in an image that can be made again
            container_id, container_config.hostname = "", ""
        child = Child(
            layer.diff_id if layer is not None else EMPTY_TAR,
            container_id,
            container_config,
            deepcopy(state.config),
            state.author,
            "",
            time.time_ns() if self._epoch_s is None else self._epoch_s * 10**9,
        )
        raw = child_config(parent.config if parent is not None else None, child, self._engine.pulls.platform)
        image = NewImage(parse_image_config(raw), parent=state.image_id)
        (state.image,) = await self._work.commit([image], described=False)


class _ToOutput(trio.abc.SendStream):
    """Where an attached container's frames become lines of the build."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._frames = FrameReader()
        # A character may lie across two writes.
        self._decoders = {stream: getincrementaldecoder("utf-8")("replace") for stream in Stream}

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._frames.feed(bytes(data))
        while (frame := self._frames.next_frame()) is not None:
            await self._tell(*frame)

    async def finish(self) -> None:
        """Tell what the output ended with, if that was half a character."""
        for stream in self._decoders:
            await self._tell(stream, b"", final=True)

    async def _tell(self, stream: Stream, data: bytes, *, final: bool = False) -> None:
        text = self._decoders[stream].decode(data, final)
        if text:
            await (self._output.warn(text) if stream is Stream.STDERR else self._output.say(text))

    async def wait_send_all_might_not_block(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


def _file_name(url: str, disposition: str) -> str:
    """What a download is called; "" when nobody says. Source: moby builder/dockerfile/copy.go."""
    path = unquote(urlsplit(url).path)
    if path and not path.endswith("/"):
        return posixpath.basename(path)
    match = re.search(r';\s*filename="?([^";]*)', disposition, re.IGNORECASE)
    return posixpath.basename(match[1]) if match is not None and not match[1].endswith("/") else ""


def _argument_words(one: Instruction, variables: Variables) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for word in one.words:
        name, equals, value = word.partition("=")
        found.append((variables.word(name), variables.word(value) if equals else None))
    return found


def _epoch(arguments: Mapping[str, str | None]) -> int | None:
    """Raises: InvalidParameter."""
    text = arguments.get(SOURCE_DATE_EPOCH)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise InvalidParameter(f"invalid {SOURCE_DATE_EPOCH}: {text}: seconds since 1970 are wanted")
    return int(text)
