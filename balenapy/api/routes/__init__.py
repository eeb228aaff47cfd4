"""One file a resource: `register(app, engine)` in each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from balenapy.api.app import App
    from balenapy.engine.engine import Engine

# `absent` comes last: it answers for every route of the API that nobody registered before it.
RESOURCES = (
    "system", "images", "build", "fsck", "distribution", "containers", "archive", "process", "networks", "firewall",
    "volumes", "absent",
)  # fmt: skip


def register_all(app: App, engine: Engine) -> None:
    for name in RESOURCES:
        import_module(f"{__name__}.{name}").register(app, engine)
