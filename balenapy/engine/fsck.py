"""`POST /images/fsck`, an addition of ours: verify images, say what is damaged, mend it.

Query: `name` (repeated; none: every layer there is), `deep`, `repair`; with `repair` the header X-Registry-Auth.
The answer is one JSON object a line:

    {"Layer", "DiffId", "Images": [image_id], "Files", "Bytes", "Bad": [{"Path", "Why"}]}   each layer
    {"Image", "Repaired": bool, "Why"}                                                      each damaged image
    {"Layers", "Files", "Bytes", "Damaged"}                                                 the last: what stays bad
    {"error", "errorDetail"}                                                                instead, when it fails
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from balenapy.engine.lines import Write
from balenapy.errors import EngineError
from balenapy.stores.images import ImageRecord

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine


async def fsck(
    engine: Engine, images: Iterable[ImageRecord] | None, *, deep: bool, repair: bool, auth: str, write: Write
) -> None:
    """See the module. Raises: EngineError. Cancellation: what is mended stays mended."""
    checks = engine.images.checks
    chosen = list(images) if images is not None else engine.images.all()
    layers = checks.layers_of(chosen) if images is not None else list(engine.snapshots.layers())
    count = files = size = 0

    async def tell(line: dict[str, Any]) -> None:
        await write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")

    for layer in layers:
        for check in await checks.check([layer], deep=deep):
            count, files, size = count + 1, files + check.files, size + check.bytes
            await tell(check.json([image.image_id for image in checks.images_with(layer.chain_id)]))
    for image in chosen:
        why = engine.images.corrupt().get(image.image_id)
        if why is None:
            continue
        repaired = False
        if repair:
            try:
                await checks.mend(image, auth)
                repaired, why = True, ""
            except EngineError as error:
                why = error.message
        await tell({"Image": image.image_id, "Repaired": repaired, "Why": why})
    ids = {image.image_id for image in chosen}
    left = {image_id for image_id in engine.images.corrupt() if images is None or image_id in ids}
    orphans = [chain_id for chain_id in checks.damaged() if not checks.images_with(chain_id)] if images is None else []
    await tell({"Layers": count, "Files": files, "Bytes": size, "Damaged": len(left) + len(orphans)})
