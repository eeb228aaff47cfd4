"""Snapshots: the directories that overlay mounts are made of.

A snapshot is *committed* (one layer's diff, never changed again, named by its chain_id) or *active* (a
container's writable layer, named by its key). Each is a directory with a random name:

    snapshots/<random>/diff/            the files; upper layer of an active snapshot
    snapshots/<random>/work/            active: overlayfs's work directory
    snapshots/<random>/init/            active: a layer just under `diff` that its creator fills
    snapshots/<random>/tar-split.zst    committed: rebuilds the layer's exact tar
    snapshots/<random>/*.json           committed: what it is, if the rows are lost (core/sidecar)

The row makes it a snapshot. A directory without a row is unfinished or abandoned and goes to the trash at start.
A layer that is damaged is put aside into `quarantine/`, never deleted; its row stays, as *corrupt*, so that the layers
below are kept, and gives way when the layer is committed anew.

Journey of a layer: `new_directory`, unpack into it and sync it (the worker does), `commit` in one transaction,
or `discard`. Journey of a container: `prepare`, `mounts`, `remove`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from balenapy.core.sidecar import LAYER_FILE
from balenapy.errors import Conflict, DataLoss, NotFound, SystemFailure
from balenapy.linux import durable, syscalls
from balenapy.stores.content import file_error
from balenapy.stores.db import Database, Origin
from balenapy.stores.trash import Trash

log = logging.getLogger(__name__)

_DIRECTORY_NAME = re.compile(r"[\w.-]+")

Commit = Callable[[sqlite3.Connection], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """A committed snapshot: one layer on top of its parent's chain."""

    path: Path
    chain_id: str
    parent: str  # chain_id, "" for the bottom layer
    diff_id: str
    size_bytes: int  # sum of the regular files in the diff
    disk_bytes: int  # what the directory takes on disk

    @property
    def diff(self) -> Path:
        return self.path / "diff"

    @property
    def tar_split(self) -> Path:
        return self.path / "tar-split.zst"


@dataclass(frozen=True, slots=True)
class ActiveSnapshot:
    """A container's writable layer on top of a chain."""

    path: Path
    key: str
    parent: str  # chain_id, "" for an image without layers

    @property
    def diff(self) -> Path:
        return self.path / "diff"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def init(self) -> Path:
        return self.path / "init"


@dataclass(frozen=True, slots=True)
class OverlayDirs:
    """What one overlay mount is made of; `lower` is top first, its first entry the init layer."""

    lower: tuple[Path, ...]
    upper: Path
    work: Path


class Snapshots:
    """All snapshots. Reads are of records in memory; each change is one transaction."""

    def __init__(self, db: Database, data_root: Path, exec_root: Path, limiter: trio.CapacityLimiter) -> None:
        """Load the rows. Blocks: for start.

        Args:
            limiter: the threads for work on files.
        """
        self._db = db
        self._root = data_root / "snapshots"
        self._quarantine = data_root / "quarantine"
        self._views = exec_root / "views"
        self._limiter = limiter
        self.trash = Trash(data_root / "trash", limiter)
        self._root.mkdir(mode=0o710, parents=True, exist_ok=True)
        self._layers: dict[str, Layer] = {}
        self._corrupt: dict[str, Layer] = {}
        self._active: dict[str, ActiveSnapshot] = {}
        self._pins: Counter[str] = Counter()  # chain_ids that somebody reads at the moment
        self._unclaimed: list[Path] = []
        self._strayed: list[str] = []  # directories in damaged rows
        self._unfinished: set[str] = set()  # directories without a row that somebody is writing
        self._load()

    def _load(self) -> None:
        rows = self._db.query(
            "SELECT directory, kind, chain_id, key, parent, diff_id, size_bytes, disk_bytes FROM snapshot"
        )
        for directory, kind, chain_id, key, parent, diff_id, size_bytes, disk_bytes in rows:
            why = _row_damage(directory, kind, chain_id, key, parent, diff_id)
            if why:
                self._db.found_damaged("layer", chain_id or key, why)
                self._strayed.append(str(directory))
                continue
            if kind == "active":
                self._active[str(key)] = ActiveSnapshot(self._root / str(directory), str(key), str(parent))
                continue
            root, layers = (self._quarantine, self._corrupt) if kind == "corrupt" else (self._root, self._layers)
            layers[str(chain_id)] = Layer(
                root / str(directory),
                str(chain_id),
                str(parent),
                str(diff_id),
                size_bytes if isinstance(size_bytes, int) else 0,
                disk_bytes if isinstance(disk_bytes, int) else 0,
            )

    # --- start

    def recover(self) -> None:
        """Bring the disk to what the rows say: names only, so it is fast. Blocks: for start.

        Directories without a row go to the trash; but when rows were lost, a layer waits to be told by its sidecar
        (`unclaimed`) and a container's files are put aside. An active snapshot whose directories a power cut took is
        given empty ones: nothing was written there that had been made durable.
        """
        self._unmount_views()
        known = {layer.path.name for layer in self._layers.values()}
        known.update(active.path.name for active in self._active.values())
        with os.scandir(self._root) as entries:
            abandoned = [Path(entry.path) for entry in entries if entry.name not in known]
        lost = [layer for layer in self._layers.values() if not layer.diff.is_dir()]
        if self._strayed:
            self._db.transaction_nowait(self._delete_strayed)
        if self._db.origin is not Origin.KEPT or self._strayed or lost:
            self._unclaimed = [path for path in abandoned if (path / LAYER_FILE).exists()]
            for path in abandoned:
                if path not in self._unclaimed:
                    self.put_aside_nowait(path)
            abandoned = []
            if not self._unclaimed and self._db.origin is not Origin.KEPT:
                self._db.settled_nowait()
        for path in abandoned:
            log.info("abandoned snapshot directory path=%s", path)
        self.trash.discard_nowait(*abandoned)
        self.trash.wake()
        for active in self._active.values():
            if _make_active(active):
                log.warning("writable layer was missing and is empty now key=%s path=%s", active.key, active.path)
        for layer in lost:
            self.quarantine_nowait(layer, "its files are missing")

    def _delete_strayed(self, connection: sqlite3.Connection) -> None:
        """What they were about is told by the sidecars in their directories, which are verified before they count."""
        connection.executemany("DELETE FROM snapshot WHERE directory = ?", [(name,) for name in self._strayed])

    def quarantine_nowait(self, layer: Layer, why: str) -> None:
        """Put a damaged layer aside: nothing mounts it any more, the next pull of its image replaces it. Blocks."""
        log.error("layer is damaged chain_id=%s path=%s error=%s", layer.chain_id, layer.path, why)

        def mark(connection: sqlite3.Connection) -> None:
            durable.step("quarantine layer")
            connection.execute(
                "UPDATE snapshot SET kind = 'corrupt' WHERE chain_id = ? AND kind = 'committed'", (layer.chain_id,)
            )

        self._db.transaction_nowait(mark)
        del self._layers[layer.chain_id]
        self._corrupt[layer.chain_id] = replace(layer, path=self.put_aside_nowait(layer.path))

    def put_aside_nowait(self, path: Path) -> Path:
        """Move a directory that cannot be used into quarantine; where it is then. Blocks."""
        self._quarantine.mkdir(mode=0o700, exist_ok=True)
        aside = self._quarantine / path.name
        try:
            durable.replace(path, aside)
            log.warning("put aside path=%s to=%s", path, aside)
        except FileNotFoundError:
            pass
        return aside

    async def put_aside(self, path: Path) -> None:
        """`put_aside_nowait` of a directory that is given up. Clean-up, done although the caller is cancelled."""
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(self.put_aside_nowait, path, limiter=self._limiter)
            except OSError as error:  # no row names it: the next start finds it
                log.error("cannot put aside path=%s error=%s", path, error)
        self._unfinished.discard(path.name)

    @property
    def unclaimed(self) -> tuple[Path, ...]:
        """Directories of layers whose rows were lost; `commit` or `put_aside_nowait` each, then `claimed`."""
        return tuple(self._unclaimed)

    async def claimed(self) -> None:
        """Say that every unclaimed directory has been dealt with."""
        self._unclaimed = []
        await self._db.settled()

    def _unmount_views(self) -> None:
        self._views.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in syscalls.mount_points(self._views):
            syscalls.umount2(path)
        for view in self._views.iterdir():
            view.rmdir()

    # --- committed layers

    def find(self, chain_id: str) -> Layer | None:
        """The committed layer of that name."""
        return self._layers.get(chain_id)

    def chain(self, chain_id: str) -> tuple[Layer, ...]:
        """The layers of a stack, top first; empty for "".

        Raises: SystemFailure, when a layer is not there or is damaged.
        """
        layers = []
        while chain_id:
            layer = self._layers.get(chain_id)
            if layer is None:
                raise self._absent(chain_id)
            layers.append(layer)
            chain_id = layer.parent
        return tuple(layers)

    def _absent(self, chain_id: str) -> SystemFailure:
        if chain_id in self._corrupt:
            return DataLoss(f"layer is damaged, pull its image again: {chain_id}")
        return SystemFailure(f"layer does not exist: {chain_id}")

    def stack(self, chain_id: str) -> tuple[Layer, ...]:
        """Like `chain`, but with damaged layers and as far down as is known: for accounting."""
        layers = []
        while layer := self._layers.get(chain_id) or self._corrupt.get(chain_id):
            layers.append(layer)
            chain_id = layer.parent
        return tuple(layers)

    def corrupt(self) -> tuple[Layer, ...]:
        """Layers in quarantine."""
        return tuple(self._corrupt.values())

    def size_bytes(self, chain_id: str) -> int:
        """Sum of the layers' diffs: what the API calls the size of an image."""
        return sum(layer.size_bytes for layer in self.stack(chain_id))

    def layers(self) -> Iterator[Layer]:
        return iter(self._layers.values())

    async def new_directory(self, sidecars: Mapping[str, bytes] | None = None) -> Path:
        """Make `snapshots/<random>/` for a layer that is about to be unpacked. No row names it yet.

        Args:
            sidecars: files to put beside the layer's own, so that it can be told without a row (core/sidecar).
        Raises: SystemFailure, NoSpace.
        Cancellation: nothing is left.
        """
        path = self._root / secrets.token_hex(8)

        def make() -> None:
            path.mkdir(mode=0o710)
            (path / "diff").mkdir()
            (path / "diff").chmod(0o755)  # whatever our umask
            for name, data in (sidecars or {}).items():
                (path / name).write_bytes(data)

        self._unfinished.add(path.name)
        try:
            await trio.to_thread.run_sync(make, limiter=self._limiter)
        except BaseException as error:
            await self.discard(path)
            if isinstance(error, OSError):
                raise file_error(f"cannot make {path}", error) from error
            raise
        return path

    async def discard(self, path: Path) -> None:
        """Give up a directory that `new_directory` made."""
        await self.trash.discard(path)
        self._unfinished.discard(path.name)

    async def commit(self, layer: Layer, also: Commit | None = None) -> None:
        """Make a synced directory a layer: one transaction, together with what `also` does.

        Raises: Conflict, when the chain_id exists; SystemFailure, when its parent does not.
        """

        def insert(connection: sqlite3.Connection) -> None:
            durable.step("commit layer")
            self.insert(connection, layer)
            if also is not None:
                also(connection)

        await self._db.change(insert, lambda _: self.inserted(layer))

    async def replace(self, layer: Layer, also: Commit | None = None) -> None:
        """Put a synced directory in the place of a committed layer's damaged one, which goes into quarantine.

        Raises: SystemFailure, when there is no such layer.
        """
        former: list[Path] = []

        def update(connection: sqlite3.Connection) -> None:
            durable.step("replace layer")
            updated = connection.execute(
                "UPDATE snapshot SET directory = ?, size_bytes = ?, disk_bytes = ? "
                "WHERE chain_id = ? AND kind = 'committed'",
                (layer.path.name, layer.size_bytes, layer.disk_bytes, layer.chain_id),
            )
            if updated.rowcount == 0:
                raise self._absent(layer.chain_id)
            if also is not None:
                also(connection)

        def apply(_: None) -> None:
            former.append(self._layers[layer.chain_id].path)
            self._layers[layer.chain_id] = layer
            self._unfinished.discard(layer.path.name)

        await self._db.change(update, apply)
        for path in former:
            await self.put_aside(path)

    def insert(self, connection: sqlite3.Connection, layer: Layer) -> None:
        """Make a synced directory a layer, inside a transaction; `inserted` follows it. Errors as for `commit`."""
        self._check_parent(connection, layer.parent)
        connection.execute("DELETE FROM snapshot WHERE chain_id = ? AND kind = 'corrupt'", (layer.chain_id,))
        try:
            connection.execute(
                "INSERT INTO snapshot(directory, kind, chain_id, parent, diff_id, size_bytes, disk_bytes) "
                "VALUES(?, 'committed', ?, ?, ?, ?, ?)",
                (
                    layer.path.name,
                    layer.chain_id,
                    layer.parent,
                    layer.diff_id,
                    layer.size_bytes,
                    layer.disk_bytes,
                ),
            )
        except sqlite3.IntegrityError as error:
            raise Conflict(f"layer exists already: {layer.chain_id}") from error

    def inserted(self, layer: Layer) -> None:
        """Follow `insert` in memory."""
        self._layers[layer.chain_id] = layer
        healed = self._corrupt.pop(layer.chain_id, None)
        if healed is not None:
            log.warning("layer is whole again chain_id=%s damaged_one=%s", layer.chain_id, healed.path)
        self._unfinished.discard(layer.path.name)

    def _check_parent(self, connection: sqlite3.Connection, chain_id: str) -> None:
        """A collection may have come between the caller's look at the records and this transaction."""
        if chain_id and not has_layer(connection, chain_id):
            raise self._absent(chain_id)

    # --- containers' layers

    async def prepare(
        self,
        key: str,
        parent: str,
        *,
        fill: Callable[[Path], None] | None = None,
        also: Commit | None = None,
    ) -> ActiveSnapshot:
        """Make a writable layer on top of a chain, all in one durable step.

        Args:
            key: the container's id. parent: chain_id of its image, "" for none.
            fill: writes into the init layer, in a thread.
            also: what else the same transaction writes (the container's own rows). What it raises undoes all.
        Raises: Conflict, when the key exists; SystemFailure, when the parent does not.
        Cancellation: nothing is left.
        """
        active = ActiveSnapshot(self._root / secrets.token_hex(8), key, parent)

        def insert(connection: sqlite3.Connection) -> None:
            durable.step("prepare snapshot")
            try:
                connection.execute(
                    "INSERT INTO snapshot(directory, kind, key, parent) VALUES(?, 'active', ?, ?)",
                    (active.path.name, key, parent),
                )
            except sqlite3.IntegrityError as error:
                raise Conflict(f"snapshot exists already: {key}") from error
            self._check_parent(connection, parent)
            if also is not None:
                also(connection)
            try:
                _make_active(active)
                if fill is not None:
                    fill(active.init)
            except OSError as error:
                raise file_error(f"cannot make {active.path}", error) from error

        def apply(_: None) -> None:
            self._active[key] = active

        try:
            await self._db.change(insert, apply)
        except Exception:
            await self.trash.discard(active.path)
            raise
        return active

    def get(self, key: str) -> ActiveSnapshot:
        """Raises: NotFound."""
        try:
            return self._active[key]
        except KeyError:
            raise NotFound(f"snapshot does not exist: {key}") from None

    def mounts(self, key: str) -> OverlayDirs:
        """What to mount for this key. Raises: NotFound; SystemFailure, when a layer is not there."""
        active = self.get(key)
        lower = (active.init, *(layer.diff for layer in self.chain(active.parent)))
        return OverlayDirs(lower, active.diff, active.work)

    async def remove(self, key: str, also: Commit | None = None) -> None:
        """Remove a writable layer; one that is gone already is fine. The transaction first, the files later.

        Args:
            also: what else the same transaction does (delete the container's rows).
        """
        active = self._active.get(key)

        def delete(connection: sqlite3.Connection) -> None:
            durable.step("remove snapshot")
            connection.execute("DELETE FROM snapshot WHERE key = ?", (key,))
            if also is not None:
                also(connection)

        def apply(_: None) -> None:
            self._active.pop(key, None)

        await self._db.change(delete, apply)
        if active is not None:
            await self.trash.discard(active.path)

    def active(self) -> Iterator[ActiveSnapshot]:
        return iter(self._active.values())

    async def size_rw(self, key: str) -> int:
        """Sum of the regular files in the writable layer, by walking it."""
        path = self.get(key).diff
        apparent, _ = await trio.to_thread.run_sync(durable.tree_size, path, limiter=self._limiter)
        return apparent

    # --- reading an image's files

    @asynccontextmanager
    async def view(self, chain_id: str) -> AsyncIterator[Path]:
        """Mount a stack read-only for as long as the block lasts.

        Raises: SystemFailure.
        """
        async with self.pinned(chain_id), self._mounted([layer.diff for layer in self.chain(chain_id)]) as path:
            yield path

    @asynccontextmanager
    async def view_container(self, key: str, *, changes: bool) -> AsyncIterator[Path]:
        """Mount a container's files read-only: as they are, or without the changes of its writable layer.

        Raises: NotFound, SystemFailure.
        """
        active = self.get(key)
        async with self.pinned(active.parent):
            lower = [active.init, *(layer.diff for layer in self.chain(active.parent))]
            async with self._mounted([active.diff, *lower] if changes else lower) as path:
                yield path

    @asynccontextmanager
    async def _mounted(self, lower: list[Path]) -> AsyncIterator[Path]:
        target = self._views / secrets.token_hex(8)
        await trio.to_thread.run_sync(partial(_mount_view, target, lower), limiter=self._limiter)
        try:
            yield target
        finally:
            # Lazy, so it never blocks; whoever still holds a file open keeps it until he closes it.
            syscalls.unmount_if_mounted(target)
            target.rmdir()

    @asynccontextmanager
    async def pinned(self, chain_id: str) -> AsyncIterator[None]:
        """Keep a stack from being collected for as long as the block lasts."""
        async with self._db.ordered():  # no collection is between its decision and its commit
            self.chain(chain_id)
            self._pins[chain_id] += 1
        try:
            yield
        finally:
            self._pins[chain_id] -= 1
            self._pins += Counter()  # drops zeros

    @asynccontextmanager
    async def pinned_layers(self, layers: Iterable[Layer]) -> AsyncIterator[list[Layer]]:
        """Those of the layers that are still there, kept from being collected for as long as the block lasts."""
        async with self._db.ordered():
            present = [layer for layer in layers if self._layers.get(layer.chain_id) == layer]
            self._pins.update(layer.chain_id for layer in present)
        try:
            yield present
        finally:
            self._pins.subtract(layer.chain_id for layer in present)
            self._pins += Counter()

    # --- collection

    def pins(self) -> tuple[str, ...]:
        """Chains that are being read."""
        return tuple(self._pins)

    def forget(self, chain_ids: list[str]) -> list[Layer]:
        """Drop the records of layers whose rows a collection deleted; their directories are the caller's."""
        return [
            layers.pop(chain_id)
            for layers in (self._layers, self._corrupt)
            for chain_id in chain_ids
            if chain_id in layers
        ]


def _row_damage(directory: object, kind: object, chain_id: object, key: object, parent: object, diff_id: object) -> str:
    """What is wrong with a row by itself: a layer's names follow from each other."""
    if not (isinstance(directory, str) and isinstance(parent, str) and _DIRECTORY_NAME.fullmatch(directory)):
        return "its directory is no name"
    if kind == "active":
        return "" if isinstance(key, str) else "it has no key"
    if kind not in ("committed", "corrupt"):
        return "it is of no kind"
    if not isinstance(chain_id, str) or not isinstance(diff_id, str):
        return "it has no name"
    if not (diff_id.startswith("sha256:") and len(diff_id) == 71) and not chain_id.startswith("sha256:"):
        return ""  # no digests: nothing follows from them
    above = f"sha256:{hashlib.sha256(f'{parent} {diff_id}'.encode()).hexdigest()}" if parent else diff_id
    return "" if above == chain_id else "its names do not fit each other"


def has_layer(connection: sqlite3.Connection, chain_id: str) -> bool:
    """Whether a layer is there and whole. Inside a transaction."""
    row = connection.execute("SELECT 1 FROM snapshot WHERE chain_id = ? AND kind = 'committed'", (chain_id,))
    return row.fetchone() is not None


def _make_active(active: ActiveSnapshot) -> bool:
    """Make what is missing of an active snapshot's directories; says whether anything was."""
    made = False
    for path, mode in ((active.path, 0o710), (active.diff, 0o755), (active.work, 0o700), (active.init, 0o755)):
        try:
            # At once: a power cut may take the `chmod`, which is for an odd umask. The mode of `diff` is that of `/`.
            path.mkdir(mode)
            path.chmod(mode)
            made = True
        except FileExistsError:
            continue
    return made


def _mount_view(target: Path, lower: list[Path]) -> None:
    try:
        target.mkdir(mode=0o700)
        if lower:
            syscalls.mount_overlay(target, lower)
    except OSError as error:
        target.rmdir()
        raise SystemFailure(f"cannot mount {target}: {error.strerror}") from error
