"""What the data root takes on disk, by what it is for: the sum is what `du` says.

The sizes that dockerd tells are sums of file lengths, of which a disk knows nothing. These are blocks. Layers are
told by their records, which were made when they were unpacked; everything else is walked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trio

from balenapy.linux import durable

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

OTHERS = ("trash", "quarantine", "volumes")


async def disk_use(engine: Engine) -> dict[str, int]:
    """Bytes on disk: Layers, Containers, Volumes, Ingests, Database, Quarantine, Trash.

    Raises: OSError.
    """
    root = engine.config.data_root
    layers = sum(layer.disk_bytes for layer in engine.snapshots.layers())
    writable = [active.path for active in engine.snapshots.active()]

    def walk() -> dict[str, int]:
        found = {name.capitalize(): durable.tree_size(root / name)[1] for name in OTHERS}
        return {
            "Layers": layers,
            "Containers": sum(durable.tree_size(path)[1] for path in (*writable, root / "containers")),
            "Ingests": durable.tree_size(root / "ingest")[1],
            "Database": _files(root),
            **found,
        }

    return await trio.to_thread.run_sync(walk, limiter=engine.limiters.files)


def _files(directory: Path) -> int:
    """The plain files in it: the database, its log, its copies."""
    return sum(path.lstat().st_blocks * 512 for path in directory.iterdir() if not path.is_dir())
