"""What deleting an image does: which names and images go, in order, or which conflict forbids it.

A name given by the client is removed alone as long as others remain; an ID stands for the image. Parents that
nobody names or uses follow, quietly stopping at the first conflict. A hard conflict (children, a running
container) cannot be forced, a soft one (names in several repositories, a stopped container) can.

Source: moby daemon/images/image_delete.go, ImageDelete, imageDeleteHelper, checkImageDeleteConflict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from balenapy.core.reference import Reference, parse_reference
from balenapy.errors import Conflict


@dataclass(frozen=True, slots=True)
class Use:
    """A container made from an image."""

    container_id: str
    running: bool


@dataclass(frozen=True, slots=True)
class Image:
    """What a decision needs to know of an image."""

    image_id: str
    parent: str
    references: tuple[Reference, ...]  # sorted by canonical form
    uses: tuple[Use, ...] = ()


@dataclass(frozen=True, slots=True)
class Untag:
    """Remove a name. `silent`: without an event (a digest that goes along with its last tag)."""

    reference: Reference
    image_id: str
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove an image that has no names left."""

    image_id: str


Step = Untag | Delete


def plan_deletion(
    name: str, image_id: str, images: Mapping[str, Image], *, force: bool, prune_parents: bool
) -> tuple[Step, ...]:
    """Say what `DELETE /images/{name}` does.

    Args:
        name: as given. image_id: what it resolved to.
        images: all images. prune_parents: whether untagged parents go too.
    Raises: Conflict.
    """
    return _Plan(images).run(name, image_id, force, prune_parents)


class _Plan:
    def __init__(self, images: Mapping[str, Image]) -> None:
        self._images = images
        self._steps: list[Step] = []
        self._references: dict[str, list[Reference]] = {}
        self._deleted: set[str] = set()

    def run(self, name: str, image_id: str, force: bool, prune_parents: bool) -> tuple[Step, ...]:
        image = self._images[image_id]
        named_by_id = image_id.startswith(name) or image_id.partition(":")[2].startswith(name)
        if not named_by_id:
            if not force and _is_single(self._names(image_id)) and image.uses:
                raise Conflict(
                    f'conflict: unable to remove repository reference "{name}" (must force) - '
                    f"container {image.uses[0].container_id[:12]} is using its referenced image {_short(image_id)}"
                )
            reference = parse_reference(name).with_default_tag()
            self._untag(reference, image_id)
            if reference.digest is None:
                self._untag_lonely_digests(reference, image_id)
            if self._names(image_id):
                return tuple(self._steps)
        elif _is_single(self._names(image_id)):
            # Its names would go with it, so they are no conflict here.
            self._check(image_id, force=force, names_conflict=False)
            self._untag_all(image_id)
        self._delete(image_id, force, prune_parents, quiet=not named_by_id)
        return tuple(self._steps)

    def _names(self, image_id: str) -> list[Reference]:
        if image_id not in self._references:
            self._references[image_id] = list(self._images[image_id].references)
        return self._references[image_id]

    def _untag(self, reference: Reference, image_id: str, *, silent: bool = False) -> None:
        names = self._names(image_id)
        if reference in names:
            names.remove(reference)
        self._steps.append(Untag(reference, image_id, silent))

    def _untag_all(self, image_id: str) -> None:
        for reference in list(self._names(image_id)):
            self._untag(reference, image_id)

    def _untag_lonely_digests(self, removed: Reference, image_id: str) -> None:
        """When the last tag of a repository goes, its digests go with it."""
        same = [reference for reference in self._names(image_id) if reference.name == removed.name]
        if all(reference.digest is not None for reference in same):
            for reference in same:
                self._untag(reference, image_id, silent=True)

    def _delete(self, image_id: str, force: bool, prune_parents: bool, *, quiet: bool) -> None:
        try:
            self._check(image_id, force=force)
        except _ImageConflict as conflict:
            dangling = not self._names(image_id) and not self._children(image_id)
            if quiet and (not dangling or conflict.used):
                return
            raise
        self._untag_all(image_id)
        self._steps.append(Delete(image_id))
        self._deleted.add(image_id)
        parent = self._images[image_id].parent
        if prune_parents and parent in self._images:
            self._delete(parent, False, True, quiet=True)

    def _children(self, image_id: str) -> bool:
        return any(image.parent == image_id for image in self._images.values() if image.image_id not in self._deleted)

    def _check(self, image_id: str, *, force: bool, names_conflict: bool = True) -> None:
        uses: Sequence[Use] = self._images[image_id].uses
        if self._children(image_id):
            raise _ImageConflict(image_id, "image has dependent child images", hard=True)
        for use in uses:
            if use.running:
                raise _ImageConflict(
                    image_id,
                    f"image is being used by running container {use.container_id[:12]}",
                    hard=True,
                    used=True,
                )
        if force:
            return
        if names_conflict and self._names(image_id):
            raise _ImageConflict(image_id, "image is referenced in multiple repositories")
        for use in uses:
            raise _ImageConflict(
                image_id, f"image is being used by stopped container {use.container_id[:12]}", used=True
            )


class _ImageConflict(Conflict):
    def __init__(self, image_id: str, why: str, *, hard: bool = False, used: bool = False) -> None:
        how = "cannot be forced" if hard else "must be forced"
        super().__init__(f"conflict: unable to delete {_short(image_id)} ({how}) - {why}")
        self.used = used


def _short(image_id: str) -> str:
    return image_id.partition(":")[2][:12]


def _is_single(references: Sequence[Reference]) -> bool:
    """Whether all names are of one repository, with at most one tag; False for none."""
    if len(references) <= 1:
        return len(references) == 1
    tags = [reference for reference in references if reference.digest is None]
    if len(tags) > 1:
        return False
    repositories = {reference.name for reference in references if reference.digest is not None}
    return repositories == {(tags or references)[0].name}
