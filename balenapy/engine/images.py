"""Images as the API sees them: look-up by name, list, inspect, history, tag, delete, prune."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from balenapy.core.reference import parse_reference
from balenapy.errors import InvalidParameter, NotFound
from balenapy.stores.images import ImageRecord, ImageStore

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

_FULL_ID = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_ID_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{1,64})")


class Images:
    """The images of this engine."""

    def __init__(self, engine: Engine) -> None:
        """Load the images. Blocks: for start."""
        self._engine = engine
        self.store = ImageStore(engine.db)

    def all(self) -> list[ImageRecord]:
        return list(self.store.images())

    def get(self, image_id: str) -> ImageRecord:
        """The image of this full ID. Raises: NotFound."""
        image = self.store.find(image_id)
        if image is None:
            raise NotFound(f"No such image: {image_id}")
        return image

    def resolve(self, name: str) -> ImageRecord:
        """The image somebody means: a full ID, else a reference, else a unique ID prefix.

        Raises: NotFound, InvalidParameter: with dockerd's words.
        Source: moby daemon/images/image.go, GetImage.
        """
        full = _FULL_ID.fullmatch(name)
        if full is not None:
            image = self.store.find(f"sha256:{full[1]}")
            if image is None:
                raise NotFound(f"No such image: {name}")
            return image
        prefix = _ID_PREFIX.fullmatch(name)
        try:
            reference = parse_reference(name).with_default_tag()
        except InvalidParameter:
            if not name.startswith("sha256:") or prefix is None:
                raise
            reference = None
        if reference is not None:
            record = self.store.find_reference(reference)
            if record is not None:
                return self.get(record.image_id)
        if prefix is not None:
            found = self.store.with_prefix(prefix[1])
            if len(found) == 1:
                return found[0]
        raise NotFound(f"No such image: {name if reference is None else reference.familiar()}")
