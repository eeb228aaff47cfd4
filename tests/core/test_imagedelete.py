"""What deleting an image does, for every rule of the engine we replace."""

from __future__ import annotations

import pytest

from balenapy.core.imagedelete import Delete, Image, Untag, Use, plan_deletion
from balenapy.core.mark import reachable
from balenapy.core.reference import parse_reference
from balenapy.errors import Conflict

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")
DIGEST = f"app@sha256:{'1' * 64}"


def image(image_id: str, *names: str, parent: str = "", uses: tuple[Use, ...] = ()) -> Image:
    references = sorted((parse_reference(name) for name in names), key=str)
    return Image(image_id, parent, tuple(references), uses)


def plan(name: str, image_id: str, *images: Image, force: bool = False, prune: bool = True) -> list[str]:
    steps = plan_deletion(name, image_id, {one.image_id: one for one in images}, force=force, prune_parents=prune)
    told = []
    for step in steps:
        if isinstance(step, Untag):
            told.append(f"untag {step.reference.familiar()}{' silently' if step.silent else ''}")
        elif isinstance(step, Delete):
            told.append(f"delete {step.image_id[7]}")
    return told


def test_the_last_tag_takes_its_digests_and_the_image_along() -> None:
    assert plan("app:1", A, image(A, "app:1", DIGEST)) == ["untag app:1", f"untag {DIGEST} silently", "delete a"]


def test_another_name_keeps_the_image() -> None:
    assert plan("app:1", A, image(A, "app:1", "app:2", DIGEST)) == ["untag app:1"]
    assert plan("app:1", A, image(A, "app:1", "other:1", DIGEST)) == ["untag app:1", f"untag {DIGEST} silently"]


def test_a_digest_can_be_removed_alone() -> None:
    assert plan(DIGEST, A, image(A, "app:1", DIGEST)) == [f"untag {DIGEST}"]


def test_an_id_stands_for_all_names_of_one_repository() -> None:
    one = image(A, "app:1", DIGEST)
    for name in (A, "a" * 64, "aaaa", "sha256:aaa"):
        assert plan(name, A, one) == ["untag app:1", f"untag {DIGEST}", "delete a"]


def test_an_id_with_names_in_several_repositories_must_be_forced() -> None:
    one = image(A, "app:1", "other:1")
    with pytest.raises(Conflict) as caught:
        plan("aaa", A, one)
    assert caught.value.message == (
        "conflict: unable to delete aaaaaaaaaaaa (must be forced) - image is referenced in multiple repositories"
    )
    assert plan("aaa", A, one, force=True) == ["untag app:1", "untag other:1", "delete a"]


def test_the_last_name_of_a_used_image_must_be_forced() -> None:
    used = image(A, "app:1", uses=(Use("f" * 64, False),))
    with pytest.raises(Conflict) as caught:
        plan("app:1", A, used)
    assert caught.value.message == (
        'conflict: unable to remove repository reference "app:1" (must force) - '
        "container ffffffffffff is using its referenced image aaaaaaaaaaaa"
    )
    assert plan("app:1", A, used, force=True) == ["untag app:1", "delete a"]


def test_force_on_a_name_of_a_running_image_only_untags() -> None:
    assert plan("app:1", A, image(A, "app:1", uses=(Use("f" * 64, True),)), force=True) == ["untag app:1"]


def test_a_running_container_cannot_be_forced_by_id() -> None:
    with pytest.raises(Conflict) as caught:
        plan("aaa", A, image(A, "app:1", uses=(Use("f" * 64, True),)), force=True)
    assert caught.value.message == (
        "conflict: unable to delete aaaaaaaaaaaa (cannot be forced) - "
        "image is being used by running container ffffffffffff"
    )


def test_a_stopped_container_can_be_forced_by_id() -> None:
    used = image(A, "app:1", uses=(Use("f" * 64, False),))
    with pytest.raises(Conflict) as caught:
        plan("aaa", A, used)
    assert caught.value.message.endswith("(must be forced) - image is being used by stopped container ffffffffffff")
    assert plan("aaa", A, used, force=True) == ["untag app:1", "delete a"]


def test_an_image_with_children_cannot_be_forced() -> None:
    parent, child = image(A), image(B, "app:1", parent=A)
    with pytest.raises(Conflict) as caught:
        plan("aaa", A, parent, child, force=True)
    assert caught.value.message == (
        "conflict: unable to delete aaaaaaaaaaaa (cannot be forced) - image has dependent child images"
    )


def test_untagging_an_image_with_children_keeps_it() -> None:
    assert plan("base:1", A, image(A, "base:1"), image(B, "app:1", parent=A)) == ["untag base:1"]


def test_untagged_unused_parents_go_too() -> None:
    images = image(A), image(B, parent=A), image(C, "app:1", parent=B)
    assert plan("app:1", C, *images) == ["untag app:1", "delete c", "delete b", "delete a"]
    assert plan("app:1", C, *images, prune=False) == ["untag app:1", "delete c"]


def test_pruning_stops_at_a_parent_that_is_named_or_used() -> None:
    child = image(C, "app:1", parent=B)
    assert plan("app:1", C, image(A), image(B, "b:1", parent=A), child) == ["untag app:1", "delete c"]
    assert plan("app:1", C, image(A), image(B, parent=A, uses=(Use("f" * 64, False),)), child) == [
        "untag app:1",
        "delete c",
    ]


def test_marking_follows_edges_and_survives_cycles_and_gaps() -> None:
    graph = {"a": ["b", "gone"], "b": ["a"], "c": ["d"]}
    assert reachable(["a"], lambda node: graph.get(node, [])) == {"a", "b", "gone"}
    assert reachable([], lambda node: graph.get(node, [])) == set()
