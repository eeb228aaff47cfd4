"""Builds: a Dockerfile and its context become an image, step by step; `POST /build`.

    body -> context -> Dockerfile -> stages
    each step: variables put in; the cache asked; else a container that runs, or files that are placed; layer; image
    the last step's image: described, tagged

Images of steps stay as the cache. A step that only changes the config makes no container: the one that clients read of
has a name only. What a step changed is moved out of its container and becomes a layer as it lies there.

Nothing of a build is seen by others before its step is committed, and all of that is whole; so a crash leaves nothing
but steps that the next build finds in the cache. Its containers are `managed`, and removed at the next start.

With the build argument SOURCE_DATE_EPOCH no time of day gets into the image: the same context on the same base gives
the same image ID, on another machine too.

Source: moby 18.09 builder/dockerfile, api/server/backend/build.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import trio

from balenapy.core import progress
from balenapy.core.buildtree import DOCKERFILE_MAX_BYTES, FoundDockerfile
from balenapy.core.container import HostConfig
from balenapy.core.copysources import Source
from balenapy.core.dockerfile import Dockerfile, Instruction, parse_dockerfile
from balenapy.core.reference import Reference, parse_reference
from balenapy.engine.assembly import Assembly, NewImage
from balenapy.engine.buildcontext import Context
from balenapy.engine.buildgit import is_git_url, open_repository, parse_git_url
from balenapy.engine.buildsteps import Steps
from balenapy.engine.fetch import open_url
from balenapy.errors import EngineError, InvalidParameter, SystemFailure
from balenapy.registry.http import Answer

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine
    from balenapy.engine.workers import WorkerFamily
    from balenapy.stores.images import ImageRecord

log = logging.getLogger(__name__)

SNIFFED_BYTES = 100  # moby maxPreambleLength
TEXT = "text/plain"
_ACCEPTED = re.compile(r"application/(?:(?:x-)?tar|octet-stream|(?:x-)?(?:gzip|bzip2?|xz))|text/plain")
QUIET_MAX_BYTES = 1 << 20  # of output kept for the case that a quiet build fails
STDERR_COLOUR, NO_COLOUR = "\x1b[91m", "\x1b[0m"

Write = Callable[[bytes], Awaitable[None]]
Body = AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What is asked for, checked."""

    tags: tuple[Reference, ...] = ()
    dockerfile: str = "Dockerfile"
    remote: str = ""
    quiet: bool = False
    no_cache: bool = False
    pull: bool = False
    remove: bool = True
    force_remove: bool = False
    squash: bool = False
    target: str = ""
    build_args: Mapping[str, str | None] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    cache_from: Sequence[str] = ()
    platform: str = ""
    host_config: HostConfig = field(default_factory=HostConfig)
    registry_config: str = ""  # the header X-Registry-Config


def check_tags(names: Sequence[str]) -> tuple[Reference, ...]:
    """The names of the result, each once. Raises: SystemFailure."""
    found: dict[str, Reference] = {}
    for name in names:
        if not name:
            continue
        try:
            reference = parse_reference(name)
        except InvalidParameter as error:  # unclassified there
            raise SystemFailure(error.message) from error
        if reference.digest is not None:
            raise SystemFailure("build tag cannot contain a digest")
        reference = reference.with_default_tag()
        found.setdefault(reference.canonical(), reference)
    return tuple(found.values())


class Output:
    """The stream of lines that a client reads; a quiet one gets them only when the build fails."""

    def __init__(self, write: Write, *, quiet: bool) -> None:
        self._write = write
        self._quiet = quiet
        self._kept: list[bytes] = []
        self._kept_bytes = 0

    async def line(self, line: bytes) -> None:
        """One that was made elsewhere."""
        if not self._quiet:
            await self._write(line)
            return
        self._kept.append(line)
        self._kept_bytes += len(line)
        while self._kept_bytes > QUIET_MAX_BYTES:
            self._kept_bytes -= len(self._kept.pop(0))

    async def say(self, text: str) -> None:
        """Text, as one write."""
        await self.line(progress.stream(text))

    async def download(
        self,
        answer: Answer,
        id: str,
        status: str,
        put: Callable[[bytes], Awaitable[None]],
        *,
        head: bytes = b"",
        total: int | None = None,
    ) -> None:
        """Give all that a server sends to `put`, and tell how far it is."""
        limit, position = progress.UpdateLimit(), 0
        total = (answer.length or 0) if total is None else total
        if head:
            position = len(head)
            await put(head)
        async for data in answer:
            await put(data)
            position += len(data)
            if position != total and limit.allows(id, position, total, trio.current_time()):
                await self.line(progress.advance(id, status, position, total))
        await self.line(progress.advance(id, status, position, total))

    async def warn(self, text: str) -> None:
        """The same in red."""
        await self.say(f"{STDERR_COLOUR}{text}{NO_COLOUR}")

    async def result(self, text: str) -> None:
        """All that a quiet client sees of a build that worked."""
        self._kept.clear()
        await self._write(progress.stream(text))

    async def tell_kept(self) -> None:
        """What was kept, before an error."""
        while self._kept:
            await self._write(self._kept.pop(0))


class Builds:
    """Builds of this engine, and what they know of images: hashes of files that were copied out of them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.sums: dict[tuple[str, str], list[Source]] = {}  # (image_id, pattern) -> what it means there

    async def build(self, request: BuildRequest, body: Body, write: Write) -> None:
        """See `build`."""
        await build(self._engine, request, body, write)


async def build(engine: Engine, request: BuildRequest, body: Body, write: Write) -> None:
    """Build an image. Nothing is written before the body was read.

    Raises: EngineError; steps before it stay in the cache.
    Cancellation: the step that runs is ended and nothing of it is left.
    """
    output = Output(write, quiet=request.quiet)
    try:
        async with AsyncExitStack() as stack:
            family = await stack.enter_async_context(engine.workers.family())
            context = Context(engine, family)
            stack.push_async_callback(context.close)
            dockerfile = await _take(engine, request, body, context, family, output)
            number = _target(dockerfile, request.target)
            work = await stack.enter_async_context(Assembly(engine, family))
            steps = Steps(engine, request, context, family, work, output, dockerfile)
            image = await steps.run(_stages(dockerfile, number, request.labels))
            if request.squash:
                image = await steps.squash()
            await _finish(engine, request, work, image, output)
    except Exception:
        await output.tell_kept()
        raise


async def _take(
    engine: Engine, request: BuildRequest, body: Body, context: Context, family: WorkerFamily, output: Output
) -> Dockerfile:
    """The Dockerfile; its context is taken on the way."""
    if not request.remote:
        found = await context.take(body, request.dockerfile)
    elif is_git_url(request.remote):
        async with open_repository(engine, family, parse_git_url(request.remote)) as tar:
            found = await context.take(tar, request.dockerfile)
    elif request.remote.startswith(("http://", "https://")):
        found = await _take_remote(request, context, output)
    else:
        raise SystemFailure(f"remoteURL ({request.remote}) could not be recognized as URL")
    if found.content is None:
        raise SystemFailure(found.problem or f"Cannot locate specified Dockerfile: {found.name}")
    if not found.content:
        raise InvalidParameter(f"the Dockerfile ({found.name}) cannot be empty")
    return parse_dockerfile(found.content)


async def _take_remote(request: BuildRequest, context: Context, output: Output) -> FoundDockerfile:
    """What is at a URL: text is the Dockerfile, and there is no context; else it is the context's tar."""
    url = request.remote
    async with AsyncExitStack() as stack:
        try:
            answer = await open_url(stack, url)
        except EngineError as error:
            raise type(error)(f"error downloading remote context {url}: {error.message}") from error
        head = await anext(aiter(answer), b"")
        kind = _remote_kind(answer.headers.get("content-type", ""), head[:SNIFFED_BYTES])
        if kind == TEXT:
            content = bytearray()

            async def keep(data: bytes) -> None:
                content.extend(data)
                if len(content) > DOCKERFILE_MAX_BYTES:
                    raise InvalidParameter(f"{url} is longer than {DOCKERFILE_MAX_BYTES >> 20} MiB")

            await output.download(answer, "Downloading context", url, keep, head=head, total=0)
            await output.line(progress.blank())
            return FoundDockerfile(url, bytes(content))
        return await context.take(_with_head(head, answer), request.dockerfile)


async def _with_head(head: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield head
    async for data in rest:
        yield data


def _remote_kind(content_type: str, head: bytes) -> str:
    """`text/plain`, or "" for what may be a tar. Raises: SystemFailure, for anything else.

    Source: moby builder/remotecontext/remote.go inspectResponse.
    """
    if not head:
        raise SystemFailure("empty response")
    kind = content_type
    if not kind or kind == "application/octet-stream":
        # What Go's http.DetectContentType takes for binary.
        binary = any(byte < 9 or (14 <= byte < 32 and byte != 27) or byte == 11 for byte in head)
        kind = "application/octet-stream" if binary else TEXT
    match = _ACCEPTED.search(kind)
    if match is None:
        raise SystemFailure(f'unsupported Content-Type "{content_type}"')
    return TEXT if match[0] == TEXT else ""


def _target(dockerfile: Dockerfile, target: str) -> int:
    """The number of the last stage to be built. Raises: InvalidParameter."""
    if not target:
        return len(dockerfile.stages) - 1
    number = dockerfile.find_stage(target)
    if number is None:
        raise InvalidParameter(f"failed to reach build target {target} in Dockerfile")
    return number


def _stages(dockerfile: Dockerfile, number: int, labels: Mapping[str, str]) -> Dockerfile:
    """The stages up to that one, with labels of the request as steps at its end."""
    last = dockerfile.stages[number]
    added = tuple(
        Instruction("LABEL", (name, labels[name]), source=f"LABEL {name}={labels[name]}", literal=True)
        for name in sorted(labels)
    )
    last = replace(last, instructions=(*last.instructions, *added))
    return replace(dockerfile, stages=(*dockerfile.stages[:number], last))


async def _finish(engine: Engine, request: BuildRequest, work: Assembly, image: ImageRecord, output: Output) -> None:
    if work.layers or request.tags:
        layers = {
            layer.chain_id: (layer, work.layers[layer.chain_id])
            for layer in engine.snapshots.stack(image.chain_id)
            if layer.chain_id in work.layers
        }
        await work.describe([NewImage(image.config, request.tags, image.parent)], layers)
    if request.quiet:
        await output.result(f"{image.image_id}\n")
    else:
        await output.say(f"Successfully built {image.short_id}\n")
    for reference in request.tags:
        await engine.images.tag(image.image_id, reference.canonical(), "")
        if not request.quiet:
            await output.say(f"Successfully tagged {reference.familiar()}\n")
