"""Images as the API sees them: look-up by name, list, inspect, history, tag, delete, prune, disk usage."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from balenapy.core import imagedelete, wire
from balenapy.core.container import ContainerConfig
from balenapy.core.filters import NO_FILTERS, Filters
from balenapy.core.pathmatch import path_match
from balenapy.core.reference import Reference, parse_reference
from balenapy.core.timefmt import parse_until
from balenapy.engine.checks import Checks
from balenapy.errors import Conflict, EngineError, InvalidParameter, NotFound, SystemFailure
from balenapy.stores.collect import Collector
from balenapy.stores.content import Content
from balenapy.stores.images import ImageRecord, ImageStore, ReferenceRecord
from balenapy.stores.leases import Leases

if TYPE_CHECKING:
    from balenapy.engine.engine import Engine

log = logging.getLogger(__name__)

LIST_FILTERS = ("dangling", "label", "before", "since", "reference")
PRUNE_FILTERS = ("dangling", "label", "label!", "until")
GO_ZERO_TIME_S = -62135596800  # time.Time{}.Unix()

_FULL_ID = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_ID_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{1,64})")


@dataclass(slots=True)
class ImageRow:
    """One entry of `GET /images/json`, keys in Go's order."""

    containers: int
    created_s: int
    image_id: str
    labels: dict[str, str] | None
    parent: str
    digests: list[str] | None
    tags: list[str] | None
    shared_size: int
    size_bytes: int

    def json(self) -> dict[str, Any]:
        return {
            "Containers": self.containers,
            "Created": self.created_s,
            "Id": self.image_id,
            "Labels": self.labels,
            "ParentId": self.parent,
            "RepoDigests": self.digests,
            "RepoTags": self.tags,
            "SharedSize": self.shared_size,
            "Size": self.size_bytes,
            "VirtualSize": self.size_bytes,
        }


class Images:
    """The images of this engine."""

    def __init__(self, engine: Engine) -> None:
        """Load the images. Blocks: for start."""
        self._engine = engine
        self.store = ImageStore(engine.db)
        self.leases = Leases(engine.db)
        self.content = Content(engine.db, engine.config.data_root, engine.limiters.files, boot_id())
        self.collector = Collector(engine.db, engine.snapshots, self.content)
        self.checks = Checks(engine)
        self._pruning = False

    def recover(self) -> None:
        """Bring staged content to what the rows say, and tell which images and rows are damaged. Blocks: for start."""
        self.content.recover()
        for image_id in self.corrupt():
            image = self.store.find(image_id)
            labels = (image.labels or {}) if image is not None else {}
            self._engine.events.publish("image", "corrupt", image_id, {**labels, "name": image_id})
        for row in self._engine.db.damaged:
            if row.kind != "reference":
                self._engine.events.publish(row.kind, "corrupt", row.name, {"name": row.name})

    def corrupt(self) -> dict[str, str]:
        """Damaged images by ID, and what is wrong. Pulling one again heals it."""
        damaged = {layer.chain_id for layer in self._engine.snapshots.corrupt()}
        found = dict(self.store.unreadable)
        for image in self.store.images() if damaged else ():
            lost = [
                layer.diff_id for layer in self._engine.snapshots.stack(image.chain_id) if layer.chain_id in damaged
            ]
            if lost:
                found[image.image_id] = f"layer {', '.join(lost)} is damaged"
        for image in self.store.images():
            if image.image_id not in found:
                for name, diff_id in zip(image.config.chain_ids, image.config.diff_ids, strict=True):
                    if self._engine.snapshots.find(str(name)) is None:
                        found[image.image_id] = f"layer {diff_id} is missing"
                        break
        for chain_id, check in self.checks.damaged().items():
            for image in self.checks.images_with(chain_id):
                found.setdefault(image.image_id, f"layer {check.layer.diff_id}: {check.summary()}")
        return found

    def warnings(self) -> list[str]:
        """What `/info` says of damaged images."""
        damaged = [f"WARNING: image {image_id} is damaged: {why}" for image_id, why in sorted(self.corrupt().items())]
        return damaged + [f"WARNING: {row.kind} {row.name} is damaged: {row.why}" for row in self._engine.db.damaged]

    # --- by name

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
            return self.get(f"sha256:{full[1]}")
        reference = parse_reference(name).with_default_tag()
        record = self.store.find_reference(reference)
        if record is not None:
            return self.get(record.image_id)
        prefix = _ID_PREFIX.fullmatch(name)
        if prefix is not None:
            found = self.store.with_prefix(prefix[1])
            if len(found) == 1:
                return found[0]
        raise NotFound(f"No such image: {reference.familiar()}")

    # --- reading

    def summaries(self, filters: Filters = NO_FILTERS, *, everything: bool = False) -> list[dict[str, Any]]:
        """The entries of `GET /images/json`, newest first.

        Raises: NotFound, for an unknown image in `before` or `since`; InvalidParameter.
        Source: moby daemon/images/images.go, Images. Several `reference` patterns are alternatives (there only
        the last one counts, by mistake).
        """
        dangling = filters.boolean("dangling")
        before = [self.resolve(name).created_ns for name in filters.get("before")]
        since = [self.resolve(name).created_ns for name in filters.get("since")]
        rows = []
        for image in self.store.images():
            if (before and image.created_ns >= before[-1]) or (since and image.created_ns <= since[-1]):
                continue
            if not filters.labels(image.labels):
                continue
            row = self._row(image, filters.get("reference"))
            if row.digests is None and row.tags is None:
                if not (everything or not self.store.children(image.image_id)):
                    continue
                if dangling is False or "reference" in filters:
                    continue
                row.digests, row.tags = ["<none>@<none>"], ["<none>:<none>"]
            elif dangling and row.tags:
                continue
            if dangling and self.store.children(image.image_id):
                continue
            rows.append(row)
        rows.sort(key=lambda row: row.created_s, reverse=True)
        return [row.json() for row in rows]

    def _row(self, image: ImageRecord, patterns: tuple[str, ...] = ()) -> ImageRow:
        shown = [
            record.reference
            for record in self.store.references_of(image.image_id)
            if not patterns or any(familiar_match(pattern, record.reference) for pattern in patterns)
        ]
        return ImageRow(
            containers=-1,
            created_s=created_seconds(image),
            image_id=image.image_id,
            labels=image.labels,
            parent=image.parent,
            digests=[reference.familiar() for reference in shown if reference.digest is not None] or None,
            tags=[reference.familiar() for reference in shown if reference.digest is None] or None,
            shared_size=-1,
            size_bytes=image.size_bytes,
        )

    def inspect(self, name: str) -> dict[str, Any]:
        """`GET /images/{name}/json`. Raises: NotFound, InvalidParameter."""
        try:
            image = self.resolve(name)
        except (NotFound, InvalidParameter) as error:
            raise type(error)(f"no such image: {name}: {error.message}") from error
        config, document = image.config, self.store.references_of(image.image_id)
        comment = config.comment or (config.history[-1].comment if config.history else "")
        return {
            "Id": image.image_id,
            "RepoTags": [record.reference.familiar() for record in document if record.reference.digest is None],
            "RepoDigests": [record.reference.familiar() for record in document if record.reference.digest],
            "Parent": image.parent,
            "Comment": comment,
            "Created": go_time(config.created, config.created_ns),
            "Container": config.container,
            "ContainerConfig": wire.encode(wire.decode(ContainerConfig, config.container_config)),
            "DockerVersion": config.docker_version,
            "Author": config.author,
            "Config": wire.encode(wire.decode(ContainerConfig, config.config)),
            "Architecture": config.architecture,
            "Os": config.os,
            **({"OsVersion": config.os_version} if config.os_version else {}),
            "Size": image.size_bytes,
            "VirtualSize": image.size_bytes,
            "GraphDriver": self._graph_driver(image),
            "RootFS": {
                "Type": "layers",
                **({"Layers": [str(diff_id) for diff_id in config.diff_ids]} if config.diff_ids else {}),
            },
            "Metadata": {"LastTagTime": wire.rfc3339nano(image.last_tagged_ns)},
        }

    def _graph_driver(self, image: ImageRecord) -> dict[str, Any]:
        """The directories, as tools that look behind the API expect them."""
        layers = self._engine.snapshots.stack(image.chain_id)
        if not layers:
            return {"Data": None, "Name": "overlay2"}
        top = layers[0].path
        data = {"MergedDir": f"{top}/merged", "UpperDir": f"{top}/diff", "WorkDir": f"{top}/work"}
        if len(layers) > 1:
            data = {"LowerDir": ":".join(str(layer.diff) for layer in layers[1:]), **data}
        return {"Data": data, "Name": "overlay2"}

    def history(self, name: str) -> list[dict[str, Any]]:
        """`GET /images/{name}/history`: newest first. Raises: NotFound, InvalidParameter."""
        image = self.resolve(name)
        chain_ids = [str(chain_id) for chain_id in image.config.chain_ids]
        entries: list[dict[str, Any]] = []
        layers_seen = 0
        for step in image.config.history:
            size_bytes = 0
            if not step.empty_layer:
                if layers_seen >= len(chain_ids):
                    raise SystemFailure("too many non-empty layers in History section")
                layer = self._engine.snapshots.find(chain_ids[layers_seen])
                size_bytes = layer.size_bytes if layer is not None else 0
                layers_seen += 1
            entries.append(
                {
                    "Comment": step.comment,
                    "Created": GO_ZERO_TIME_S
                    if step.created in ("", wire.ZERO_TIME)
                    else wire.parse_rfc3339(step.created) // 10**9,
                    "CreatedBy": step.created_by,
                    "Id": "<missing>",
                    "Size": size_bytes,
                    "Tags": None,
                }
            )
        entries.reverse()
        ancestor: ImageRecord | None = image
        for entry in entries:
            if ancestor is None:
                break
            entry["Id"] = ancestor.image_id
            entry["Tags"] = self._row(ancestor).tags
            ancestor = self.store.find(ancestor.parent)
        return entries

    def disk_usage(self) -> tuple[int, list[dict[str, Any]]]:
        """`LayersSize` and `Images` of `GET /system/df`, from the records alone."""
        snapshots = self._engine.snapshots
        layers_size = sum(layer.size_bytes for layer in snapshots.layers())
        shown = [image for image in self.store.images() if image.references or not self.store.children(image.image_id)]
        users = Counter(layer.chain_id for image in shown for layer in snapshots.stack(image.chain_id))
        rows = []
        for image in shown:
            row = self._row(image)
            if row.digests is None and row.tags is None:
                row.digests, row.tags = ["<none>@<none>"], ["<none>:<none>"]
            row.shared_size = sum(
                layer.size_bytes for layer in snapshots.stack(image.chain_id) if users[layer.chain_id] > 1
            )
            row.containers = len(self._engine.containers.using_image(image.image_id))
            rows.append(row)
        rows.sort(key=lambda row: row.created_s, reverse=True)
        return layers_size, [row.json() for row in rows]

    def ingests(self) -> list[dict[str, Any]]:
        """Parts of blobs that unfinished pulls have staged: our own addition to `GET /system/df`."""
        return [
            {"Digest": record.digest, "Size": staged, "TotalSize": record.size_bytes}
            for record, staged in self.content.usage()
            if staged
        ]

    # --- changing

    async def tag(self, name: str, repository: str, tag: str) -> None:
        """Point `repository[:tag]` at an image, silently taking it from another.

        Raises: NotFound; InvalidParameter for what is no tag; SystemFailure for a bad reference (500 there too).
        Source: moby daemon/images/image_tag.go, reference/store.go AddTag.
        """
        image = self.resolve(name)
        try:
            reference = parse_reference(repository)
            if tag:
                reference = reference.without_tag().with_tag(tag)
        except InvalidParameter as error:
            raise SystemFailure(error.message) from error
        if reference.digest is not None:
            raise InvalidParameter("refusing to create a tag with a digest reference")
        if reference.familiar_name() == "sha256":
            raise InvalidParameter("refusing to create an ambiguous tag using digest algorithm as name")
        record = ReferenceRecord(reference.with_default_tag(), image.image_id)
        if not await self.store.tag(record, time.time_ns()):
            raise NotFound(f"No such image: {name}")
        self.publish(image, "tag", reference.familiar())

    def publish(self, image: ImageRecord, action: str, name: str) -> None:
        """Send an image event: the image's labels, and `name`."""
        self._engine.events.publish("image", action, image.image_id, {**(image.labels or {}), "name": name})

    async def remove(self, name: str, *, force: bool = False, prune_parents: bool = True) -> list[dict[str, str]]:
        """`DELETE /images/{name}`: what was untagged and deleted, in order.

        Raises: NotFound, InvalidParameter, Conflict.
        """
        if not name:
            raise InvalidParameter("image name cannot be blank")
        image = self.resolve(name)
        steps = imagedelete.plan_deletion(
            name, image.image_id, self._deletable(), force=force, prune_parents=prune_parents
        )
        deleted = [self.get(step.image_id) for step in steps if isinstance(step, imagedelete.Delete)]
        layers = self._released(deleted)
        await self.store.remove(
            [step.reference for step in steps if isinstance(step, imagedelete.Untag)],
            [image.image_id for image in deleted],
        )
        if deleted:
            self.collector.wake()
        return self._tell(steps, layers)

    def _deletable(self) -> dict[str, imagedelete.Image]:
        """All images as the planner wants them."""
        found = {}
        for image in self.store.images():
            containers = self._engine.containers.using_image(image.image_id)
            found[image.image_id] = imagedelete.Image(
                image.image_id,
                image.parent,
                tuple(record.reference for record in self.store.references_of(image.image_id)),
                tuple(imagedelete.Use(container.id, container.state.running) for container in containers),
            )
        return found

    def _released(self, images: list[ImageRecord]) -> dict[str, list[str]]:
        """For each image that goes, the chain_ids of the layers that go with it, top first."""
        snapshots = self._engine.snapshots
        users: Counter[str] = Counter()
        for image in self.store.images():
            users.update(layer.chain_id for layer in snapshots.stack(image.chain_id))
        for active in snapshots.active():
            users.update(layer.chain_id for layer in snapshots.stack(active.parent))
        released = {}
        for image in images:
            chain = [layer.chain_id for layer in snapshots.stack(image.chain_id)]
            users.subtract(chain)
            released[image.image_id] = [chain_id for chain_id in chain if users[chain_id] == 0]
        return released

    def _tell(self, steps: tuple[imagedelete.Step, ...], layers: dict[str, list[str]]) -> list[dict[str, str]]:
        """Render the answer and send the events."""
        answer = []
        for step in steps:
            if isinstance(step, imagedelete.Untag):
                answer.append({"Untagged": step.reference.familiar()})
                image = self.store.find(step.image_id)
                if not step.silent:
                    labels = (image.labels or {}) if image is not None else {}
                    self._engine.events.publish("image", "untag", step.image_id, {**labels, "name": step.image_id})
            else:
                answer.append({"Deleted": step.image_id})
                answer += [{"Deleted": chain_id} for chain_id in layers[step.image_id]]
                self._engine.events.publish("image", "delete", step.image_id, {"name": step.image_id})
        return answer

    async def prune(self, filters: Filters) -> dict[str, Any]:
        """`POST /images/prune`: untagged images, or with `dangling=false` all that no container uses.

        Staged parts of unfinished pulls go too, and the leases of pulls that nobody continues.
        Raises: InvalidParameter, Conflict.
        Source: moby daemon/images/image_prune.go.
        """
        if self._pruning:
            raise Conflict("a prune operation is already running")
        self._pruning = True
        try:
            return await self._prune(filters)
        finally:
            self._pruning = False

    async def _prune(self, filters: Filters) -> dict[str, Any]:
        dangling = filters.boolean("dangling", digits=True) is not False
        until = [parse_until(text, time.time_ns()) for text in filters.get("until")]
        layer_sizes = {layer.chain_id: layer.size_bytes for layer in self._engine.snapshots.layers()}
        answer: list[dict[str, str]] = []
        for image in self.all():
            if until and image.created_ns > min(until):
                continue
            if not filters.labels(image.labels) or not filters.without_labels(image.labels):
                continue
            for name in self._prunable_names(image, dangling):
                try:
                    answer += await self.remove(name)
                except EngineError as error:
                    log.info("prune keeps image name=%s why=%s", name, error.message)
        freed = sum(layer_sizes.get(entry.get("Deleted", ""), 0) for entry in answer)
        freed += await self.drop_unfinished()
        return {"ImagesDeleted": answer or None, "SpaceReclaimed": freed}

    def _prunable_names(self, image: ImageRecord, dangling: bool) -> list[str]:
        """By which names prune deletes an image; none when it stays."""
        if self.store.find(image.image_id) is None:  # went as a parent of another
            return []
        references = self.store.references_of(image.image_id)
        if not references:
            return [] if self.store.children(image.image_id) else [image.image_id.partition(":")[2]]
        if dangling and any(record.reference.digest is None for record in references):
            return []
        return [record.reference.canonical() for record in references]

    async def drop_unfinished(self) -> int:
        """Give up what unfinished pulls have left that nobody works on: leases, layers, staged bytes.

        Returns: the bytes of the staged parts.
        """
        await self._engine.pulls.drop_idle_leases()
        self.collector.wake()
        return await self.content.drop_idle()


def boot_id() -> str:
    """Names this boot of the machine: what the kernel holds in memory is lost when it changes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def created_seconds(image: ImageRecord) -> int:
    """`Created` of lists: unix seconds."""
    created_ns = image.config.created_ns
    return GO_ZERO_TIME_S if created_ns is None else created_ns // 10**9


def go_time(text: str, created_ns: int | None) -> str:
    """A config's time as Go writes it again; one without a time, or of the year 1, is Go's zero time."""
    if created_ns is None or created_ns // 10**9 <= GO_ZERO_TIME_S:
        return wire.ZERO_TIME
    return wire.rfc3339nano(created_ns) if created_ns else "1970-01-01T00:00:00Z"


def familiar_match(pattern: str, reference: Reference) -> bool:
    """Go's `path.Match` of a pattern on the familiar reference or its name.

    Raises: InvalidParameter, for a broken pattern.
    Source: docker/distribution reference/helpers.go FamiliarMatch.
    """
    return path_match(pattern, reference.familiar()) or path_match(pattern, reference.familiar_name())
