"""Import: a tar of files, from the request's body or a URL, becomes an image of one layer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from balenapy.core.container import ContainerConfig
from balenapy.core.imageconfig import imported_config
from balenapy.core.instructions import apply_changes
from balenapy.core.manifest import Platform, parse_image_config
from balenapy.core.reference import Reference, parse_reference
from balenapy.engine.assembly import Assembly, NewImage
from balenapy.engine.fetch import open_url
from balenapy.engine.lines import Lines, Write, write_during
from balenapy.errors import InvalidParameter, SystemFailure

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

Body = AsyncIterable[bytes]


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What is asked for, checked. `source` is `-` for the body, or a URL."""

    source: str
    reference: Reference | None
    message: str
    config: ContainerConfig
    platform: Platform


def check_import(
    source: str, repository: str, tag: str, message: str, changes: Sequence[str], platform: Platform
) -> ImportRequest:
    """Read the parameters. Raises: InvalidParameter.

    Source: moby daemon/images/image_import.go.
    """
    reference = None
    if repository:
        reference = parse_reference(repository)
        if reference.digest is not None:
            raise InvalidParameter("cannot import digest reference")
        reference = reference.with_tag(tag) if tag else reference
    config = apply_changes(ContainerConfig(), changes)
    if source != "-" and "://" not in source:
        source = f"http://{source}"
    return ImportRequest(source, reference, message or f"Imported from {source}", config, platform)


async def import_image(engine: Engine, request: ImportRequest, body: Body, write: Write) -> None:
    """Make the image; the last line is its ID.

    Raises: EngineError; nothing was changed then.
    Cancellation: the image is there or not.
    """
    lines = Lines(write)

    async def work() -> None:
        lines.message(await _import(engine, request, body, lines))

    await write_during(lines, work)


async def _import(engine: Engine, request: ImportRequest, body: Body, lines: Lines) -> str:
    async with AsyncExitStack() as stack:
        total = 0
        if request.source != "-":
            body = answer = await open_url(stack, request.source)
            total = answer.length or 0
            lines.message(f"Downloading from {request.source}")
        work = await stack.enter_async_context(Assembly(engine))

        async def feed(stdin: trio.abc.SendStream) -> None:
            position = 0
            async for data in body:
                await stdin.send_all(data)
                position += len(data)
                if request.source != "-":
                    lines.advance("", "Importing", position, total)

        try:
            unpacked = await work.unpack(feed)
        except InvalidParameter as error:  # of the tar; unclassified there
            raise SystemFailure(error.message) from error
        now_ns = time.time_ns()
        raw = imported_config(unpacked.diff_id, request.config, request.message, now_ns, request.platform)
        names = (request.reference.with_default_tag(),) if request.reference is not None else ()
        (image,) = await work.commit([NewImage(parse_image_config(raw), names, tagged_ns=now_ns if names else 0)])
    if request.reference is not None:
        engine.images.publish(image, "tag", request.reference.familiar())
    engine.images.publish(image, "import", image.image_id)
    engine.images.collector.wake()
    return image.image_id
