"""The volume: what a client asks for, and the record we keep of it."""

# ruff: noqa: RUF009  (the kinds make dataclass fields)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from balenapy.core.mountspec import LOCAL
from balenapy.core.wire import number, optional, rfc3339nano, text

_SECOND = 1_000_000_000


@dataclass(slots=True)
class VolumeCreate:
    """Body of `POST /volumes/create`."""

    GO: ClassVar[str] = "volume.VolumeCreateBody"
    driver: str = text("Driver")
    driver_opts: dict[str, str] | None = optional("DriverOpts")
    labels: dict[str, str] | None = optional("Labels")
    name: str = text("Name")


@dataclass(slots=True)
class Volume:
    """The record. `removed_ns` is not 0 for a tombstone: its directory is on its way out.

    `made_for` is the container an anonymous volume came with, until that container leaves it behind: whoever finds
    the volume without the container knows that a crash interrupted a create or an `rm -v`.
    """

    name: str = text("Name")
    created_ns: int = number("Created")
    driver_opts: dict[str, str] | None = optional("Options")
    labels: dict[str, str] | None = optional("Labels")
    removed_ns: int = number("Removed", omit=True)
    made_for: str = text("MadeFor", omit=True)

    def describe(self, mountpoint: str) -> dict[str, Any]:
        """The volume as the API shows it, keys in Go's order."""
        return {
            "CreatedAt": rfc3339nano(self.created_ns // _SECOND * _SECOND),
            "Driver": LOCAL,
            "Labels": None if self.labels is None else dict(sorted(self.labels.items())),
            "Mountpoint": mountpoint,
            "Name": self.name,
            "Options": None if self.driver_opts is None else dict(sorted(self.driver_opts.items())),
            "Scope": "local",
        }
