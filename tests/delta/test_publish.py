"""Deltas in registries: Debian's docker-registry, which knows no referrers, and a fake that does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from delta.artifact import ARTIFACT_TYPE, BASE_ANNOTATION, LAYER_TYPE, TAR_DIFF_TARGET
from delta.publish import DELTA_INDEX_TAG, fallback_tag, find_deltas
from delta.registry import INDEX, Document, Repository, parse_reference
from tests.delta.command import output_of, run
from tests.delta.layouts import push_layout, write_layout
from tests.delta.make_vectors import vectors
from tests.delta.test_cli import write_archive
from tests.registry.fake import FakeRegistry, fake_registry
from tests.registry_process import running_registry


@pytest.fixture
def real(tmp_path: Path) -> Iterator[str]:
    with running_registry(tmp_path / "registry") as host:
        yield host


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        registry.has_referrers = True
        yield registry


def versions(folder: Path, name: str) -> dict[str, str]:
    """Three versions of an image in a repository: tag -> digest of the manifest."""
    layers, target = vectors()["contents"]
    digests = {}
    for number, top in enumerate((layers[1], vectors()["times"][1], target)):
        tag = f"1.{8 + number}"  # 1.10 is newer than 1.9
        write_layout(folder / tag, [layers[0], top], created=f"2026-0{1 + number}-01T00:00:00Z")
        digests[tag] = push_layout(folder / tag, f"{name}:{tag}")
    return digests


def repository_of(name: str) -> Repository:
    return Repository(parse_reference(name), actions="pull,push,delete")


def test_a_ci_step_publishes_deltas_that_a_device_finds(real: str, tmp_path: Path) -> None:
    name = f"{real}/team/app"
    digests = versions(tmp_path, name)
    (tmp_path / "arm").mkdir()
    write_layout(tmp_path / "arm/v7", [vectors()["contents"][1]], architecture="arm")
    push_layout(tmp_path / "arm/v7", f"{name}:1.9-armv7")

    assert run("make", "--against-last", 2, f"{name}:1.10", "-o", tmp_path / "deltas") == 0
    assert run("push", tmp_path / "deltas", name) == 0

    # What a device does: the tag of the fallback, the manifest, a blob.
    repository = repository_of(name)
    index = repository.manifest(fallback_tag(digests["1.10"]))
    entries = index.parsed()["manifests"]
    assert index.media_type == INDEX
    assert [entry["artifactType"] for entry in entries] == [ARTIFACT_TYPE] * 2
    assert len({entry["annotations"][BASE_ANNOTATION] for entry in entries}) == 2
    for entry in entries:
        document = repository.manifest(entry["digest"])
        assert len(document.data) == entry["size"]
        manifest = document.parsed()
        assert manifest["subject"]["digest"] == digests["1.10"]
        (layer,) = manifest["layers"]
        assert layer["mediaType"] == LAYER_TYPE
        assert repository.read_blob(layer["digest"], layer["size"]).startswith(b"BPDELTA1")
    for tag in ("1.8", "1.9"):
        assert "rebuilt" in output_of("verify", f"{name}:1.10", f"{name}:{tag}")


def test_pushing_again_changes_nothing_and_a_new_delta_replaces_the_old(real: str, tmp_path: Path) -> None:
    name = f"{real}/app"
    digests = versions(tmp_path, name)
    tag = fallback_tag(digests["1.10"])
    repository = repository_of(name)

    assert run("make", f"{name}:1.9", f"{name}:1.10", "-o", tmp_path / "delta") == 0
    assert run("push", tmp_path / "delta", name) == 0
    first = repository.manifest(tag)
    assert run("push", tmp_path / "delta", name) == 0
    assert first == repository.manifest(tag)
    # What others keep there stays.
    (ours,) = first.parsed()["manifests"]
    foreign = {**ours, "artifactType": "application/x.signature"}
    repository.put_manifest(tag, Document(json.dumps({**first.parsed(), "manifests": [foreign, ours]}).encode(), INDEX))
    assert run("make", "--effort", "fast", f"{name}:1.9", f"{name}:1.10", "-o", tmp_path / "fast") == 0
    assert run("push", tmp_path / "fast", name) == 0

    after = repository.manifest(tag).parsed()["manifests"]
    assert after[0] == foreign
    assert [entry["digest"] == ours["digest"] for entry in after[1:]] == [False]


def test_a_registry_that_lists_referrers_needs_no_tag(fake: FakeRegistry, tmp_path: Path) -> None:
    name = f"{fake.host}/app"
    digests = versions(tmp_path, name)

    assert run("make", tmp_path / "1.9", f"{name}:1.10", "-o", tmp_path / "delta") == 0
    assert run("push", tmp_path / "delta", name) == 0

    assert ("app", fallback_tag(digests["1.10"])) not in fake.manifests
    (found,) = find_deltas(repository_of(name), digests["1.10"])
    assert found["artifactType"] == ARTIFACT_TYPE
    assert run("verify", f"{name}@{found['digest']}", tmp_path / "1.9") == 0
    assert run("inspect", f"{name}:1.10") == 0


def test_a_delta_of_an_archive_is_pushed_for_the_tag_it_leads_to(
    real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{real}/app"
    digests = versions(tmp_path, name)
    layers, target = vectors()["contents"]
    config = {"architecture": "arm64", "os": "linux", "created": "2026-03-01T00:00:00Z"}
    write_archive(tmp_path / "new.tar", [layers[0], target], config)
    delta = tmp_path / "delta"

    assert run("make", tmp_path / "1.9", tmp_path / "new.tar", "-o", delta) == 0
    assert run("push", delta, name) == 1
    assert "made from an archive" in capsys.readouterr().err
    assert run("push", delta, f"{name}:1.8") == 1
    assert "not the image that the delta leads to" in capsys.readouterr().err
    assert run("push", delta, f"{name}:1.10") == 0

    assert len(find_deltas(repository_of(name), digests["1.10"])) == 1


def test_tar_diffs_of_several_bases_share_a_manifest(real: str, tmp_path: Path) -> None:
    name = f"{real}/app"
    digests = versions(tmp_path, name)
    for tag in ("1.8", "1.9"):
        out = tmp_path / f"tar-diff-{tag}"
        assert run("make", "--format", "tar-diff", tmp_path / tag, tmp_path / "1.10", "-o", out) == 0
        assert run("push", out, name) == 0

    repository = repository_of(name)
    (entry,) = repository.manifest(DELTA_INDEX_TAG).parsed()["manifests"]
    assert entry["annotations"] == {TAR_DIFF_TARGET: digests["1.10"]}
    manifest = repository.manifest(entry["digest"]).parsed()
    assert {layer["mediaType"] for layer in manifest["layers"]} == {"application/vnd.tar-diff"}
    assert manifest["annotations"] == {TAR_DIFF_TARGET: digests["1.10"]}


def test_a_delta_image_of_balenas_is_pushed_as_an_image(
    real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{real}/app"
    versions(tmp_path, name)
    delta = tmp_path / "delta"
    assert run("make", "--format", "balena", tmp_path / "1.9", tmp_path / "1.10", "-o", delta) == 0

    assert run("push", delta, name) == 1
    assert "under a tag of its own" in capsys.readouterr().err
    assert run("push", delta, f"{name}:delta-1") == 0

    document = repository_of(name).manifest("delta-1")
    assert document.media_type == "application/vnd.docker.distribution.manifest.v2+json"


@pytest.mark.parametrize("gone", ["1.9", "1.10"])
def test_deltas_go_with_their_base_and_their_target(real: str, tmp_path: Path, gone: str) -> None:
    name = f"{real}/app"
    digests = versions(tmp_path, name)
    repository = repository_of(name)
    assert run("make", "--against-last", 2, f"{name}:1.10", "-o", tmp_path / "deltas") == 0
    assert run("push", tmp_path / "deltas", name) == 0
    assert run("make", "--format", "tar-diff", tmp_path / "1.8", tmp_path / "1.10", "-o", tmp_path / "tar-diff") == 0
    assert run("push", tmp_path / "tar-diff", name) == 0
    entries = repository.manifest(fallback_tag(digests["1.10"])).parsed()["manifests"]
    assert run("prune", name) == 0
    assert len(find_deltas(repository, digests["1.10"])) == 2
    assert repository.delete_manifest(digests[gone])

    assert run("prune", "--dry-run", name) == 0
    assert len(repository.manifest(fallback_tag(digests["1.10"])).parsed()["manifests"]) == 2
    assert run("prune", name) == 0

    left = find_deltas(repository, digests["1.10"])
    assert len(left) == (1 if gone == "1.9" else 0)
    assert [repository.has_manifest(entry["digest"]) for entry in entries].count(True) == len(left)
    if gone == "1.10":
        assert not repository.has_manifest(fallback_tag(digests["1.10"]))
        assert not repository.has_manifest(DELTA_INDEX_TAG)


def test_pruning_where_nothing_can_be_deleted_clears_the_lists(fake: FakeRegistry, tmp_path: Path) -> None:
    fake.has_referrers = False
    name = f"{fake.host}/app"
    digests = versions(tmp_path, name)
    assert run("make", f"{name}:1.9", f"{name}:1.10", "-o", tmp_path / "delta") == 0
    assert run("push", tmp_path / "delta", name) == 0
    del fake.manifests["app", "1.9"]
    repository = repository_of(name)
    assert run("prune", name) == 0
    assert len(find_deltas(repository, digests["1.10"])) == 1
    fake.deletes = False

    assert run("prune", "--tagged", name) == 0

    assert find_deltas(repository, digests["1.10"]) == []


def test_a_target_that_the_repository_has_not_is_an_error(
    real: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions(tmp_path, f"{real}/app")
    assert run("make", tmp_path / "1.9", tmp_path / "1.10", "-o", tmp_path / "delta") == 0

    assert run("push", tmp_path / "delta", f"{real}/other") == 1

    assert "push the image first" in capsys.readouterr().err
