"""Load and save: any layout and order, all or nothing."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import zstandard

from balenapy.core.filters import NO_FILTERS
from balenapy.engine.engine import Engine
from balenapy.engine.load import load
from balenapy.errors import DataLoss, NotFound
from tests.compat.images import digest, directory, file, make_tar
from tests.engine.archives import (
    Body,
    archive,
    docker_members,
    layout_members,
    load_bytes,
    load_error,
    members_of,
    save_bytes,
)
from tests.engine.image_engine import NO_ROWS, NOTHING_ON_DISK, image_engine, on_disk, rows, settle
from tests.images_fixture import ImageFixture, busybox, layered
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


def small(*contents: bytes) -> ImageFixture:
    """One layer with one file for each content."""
    return ImageFixture(tuple(make_tar([file("f", content)]) for content in contents), {"Cmd": ["true"]})


async def files_of(engine: Engine, name: str) -> dict[str, bytes]:
    async with engine.snapshots.view(engine.images.resolve(name).chain_id) as root:
        paths = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
        return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def event_names(engine: Engine) -> list[tuple[str, str]]:
    return [(event.action, event.attributes["name"]) for event in engine.events._kept]


@trio_test
async def test_what_was_saved_is_loaded_again_and_saved_the_same(tmp_path: Path) -> None:
    image = layered("docker")
    async with image_engine(tmp_path / "a") as engine:
        assert await load_bytes(engine, archive(docker_members(image))) == [{"stream": "Loaded image: app:1\n"}]
        saved = await save_bytes(engine, "app:1")
        files = await files_of(engine, "app:1")
        assert engine.images.resolve("app:1").image_id == image.image_id
    async with image_engine(tmp_path / "b") as engine:
        await load_bytes(engine, saved)
        assert await save_bytes(engine, "app:1") == saved
        assert await files_of(engine, "app:1") == files
    tars = [content for name, content in members_of(saved).items() if name.endswith("/layer.tar")]
    assert sorted(map(digest, tars)) == sorted(map(digest, image.tars))  # type: ignore[arg-type]


@trio_test
async def test_members_may_come_in_any_order_and_pieces(tmp_path: Path) -> None:
    image = small(b"one", b"two")
    members = docker_members(image)
    async with image_engine(tmp_path) as engine:
        for number, order in enumerate(itertools.permutations(members)):
            if number % 5:
                continue
            await load_bytes(engine, archive(order), piece=random.Random(number).randrange(1, 5000))
            assert engine.images.resolve("app:1").image_id == image.image_id
            await engine.images.remove("app:1")
            await settle(engine)
        assert on_disk(engine) == NOTHING_ON_DISK
        assert rows(engine) == NO_ROWS


@pytest.mark.parametrize(
    "compress",
    [gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress],
    ids=["gzip", "bzip2", "xz", "zstd"],
)
def test_archives_and_layers_may_be_compressed(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    image = small(os.urandom(300_000), b"top")

    async def main() -> None:
        async with image_engine(tmp_path) as engine:
            layers = [compress(image.tars[0]), image.tars[1]]
            await load_bytes(engine, compress(archive(docker_members(image, layers=layers))), piece=1000)
            assert engine.images.resolve("app:1").image_id == image.image_id

    trio.run(main)


@trio_test
async def test_a_compressed_archive_that_is_cut_says_so(tmp_path: Path) -> None:
    packed = gzip.compress(archive(docker_members(small(os.urandom(100_000)))))
    async with image_engine(tmp_path) as engine:
        assert await load_error(engine, packed[:-5000]) == "unexpected EOF"
        await settle(engine)
        assert on_disk(engine) == NOTHING_ON_DISK


@trio_test
async def test_an_oci_layout_is_loaded(tmp_path: Path) -> None:
    image = layered("oci")
    async with image_engine(tmp_path) as engine:
        named = archive(layout_members(image, {"io.containerd.image.name": "docker.io/team/app:2"}))
        assert await load_bytes(engine, named) == [{"stream": "Loaded image: team/app:2\n"}]
        bare = archive(layout_members(image, {"org.opencontainers.image.ref.name": "latest"}))
        assert await load_bytes(engine, bare) == [{"stream": f"Loaded image ID: {image.image_id}\n"}]
        assert engine.images.resolve("team/app:2").image_id == image.image_id


@trio_test
async def test_the_layout_before_manifests_is_loaded(tmp_path: Path) -> None:
    """With `repositories` alone: parents are followed, a config is made of the v1 images."""
    tars = [make_tar([file("a", b"a")]), make_tar([file("b", b"b")])]
    base = {"id": "1" * 64, "created": "2015-01-01T00:00:00Z", "container_config": {"Cmd": ["/bin/sh", "-c", "x"]}}
    top = {
        "id": "2" * 64,
        "parent": "1" * 64,
        "created": "2015-01-02T00:00:00Z",
        "config": {"Cmd": ["true"]},
        "architecture": "amd64",
        "os": "linux",
        "comment": "c",
        "Size": 1,
    }
    data = archive(
        [
            ("repositories", json.dumps({"old/app": {"3": "2" * 64}}).encode()),
            *(
                member
                for document, tar in zip((top, base), reversed(tars), strict=True)
                for member in (
                    (f"{document['id']}/VERSION", b"1.0"),
                    (f"{document['id']}/json", json.dumps(document).encode()),
                    (f"{document['id']}/layer.tar", tar),
                )
            ),
        ]
    )
    async with image_engine(tmp_path) as engine:
        assert await load_bytes(engine, data) == [{"stream": "Loaded image: old/app:3\n"}]
        config = json.loads(engine.images.resolve("old/app:3").config.raw)
        assert await files_of(engine, "old/app:3") == {"a": b"a", "b": b"b"}
    assert config == {
        "architecture": "amd64",
        "comment": "c",
        "config": {"Cmd": ["true"]},
        "created": "2015-01-02T00:00:00Z",
        "history": [
            {"created": "2015-01-01T00:00:00Z", "created_by": "/bin/sh -c x"},
            {"created": "2015-01-02T00:00:00Z", "comment": "c"},
        ],
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar in tars]},
    }


@trio_test
async def test_a_layer_that_stands_in_several_places_is_unpacked_once(tmp_path: Path) -> None:
    """The same diff_id twice in one image, saved as a link, and again in another image on another base."""
    shared = make_tar([file("s", b"shared")])
    twice = ImageFixture((shared, make_tar([file("x", b"x")]), shared))
    other = ImageFixture((make_tar([file("y", b"y")]), shared))
    async with image_engine(tmp_path / "a") as engine:
        for image, name in ((twice, "twice:1"), (other, "other:1")):
            await load_bytes(engine, archive(docker_members(image, [name])))
        saved = await save_bytes(engine, "twice:1", "other:1")
    members = members_of(saved)
    assert [content for name, content in members.items() if name.endswith("/layer.tar")].count(shared) == 1
    assert sum(isinstance(content, str) and content.startswith("../") for content in members.values()) == 2
    async with image_engine(tmp_path / "b") as engine:
        await load_bytes(engine, saved)
        assert await files_of(engine, "twice:1") == {"s": b"shared", "x": b"x"}
        assert await files_of(engine, "other:1") == {"s": b"shared", "y": b"y"}
        assert len(list(engine.snapshots.layers())) == 5
        await settle(engine)
        assert len(on_disk(engine)["snapshots"]) == 5


@trio_test
async def test_a_known_layer_is_recognised_by_its_name_and_not_read(tmp_path: Path) -> None:
    image = small(b"known", b"new")
    async with image_engine(tmp_path) as engine:
        await load_bytes(engine, archive(docker_members(ImageFixture(image.tars[:1]), ["base:1"])))
        name = f"{digest(image.tars[0])[7:]}.tar"
        manifest = [{"Config": "config.json", "RepoTags": ["app:1"], "Layers": [name, "new.tar"]}]
        members = [
            (name, b"no tar at all, and nobody looks"),
            ("new.tar", image.tars[1]),
            ("config.json", image.config_blob.data),
            ("manifest.json", json.dumps(manifest).encode()),
        ]
        await load_bytes(engine, archive(members))
        assert await files_of(engine, "app:1") == {"f": b"new"}


@trio_test
async def test_progress_lines_unless_quiet(tmp_path: Path) -> None:
    image = small(b"data")
    size = len(image.tars[0])
    async with image_engine(tmp_path) as engine:
        lines = await load_bytes(engine, archive(docker_members(image)), quiet=False)
        again = await load_bytes(engine, archive(docker_members(image)), quiet=False)
    assert lines == [
        {
            "status": "Loading layer",
            "progressDetail": {"current": size, "total": size},
            "progress": lines[0]["progress"],
            "id": digest(image.tars[0])[7:19],
        },
        {"stream": "Loaded image: app:1\n"},
    ]
    assert again == lines[1:]


@trio_test
async def test_a_tag_that_moves_is_told(tmp_path: Path) -> None:
    old, new = small(b"old"), small(b"new")
    async with image_engine(tmp_path) as engine:
        await load_bytes(engine, archive(docker_members(old)))
        lines = await load_bytes(engine, archive(docker_members(new)))
        names = {row["Id"]: row["RepoTags"] for row in engine.images.summaries(NO_FILTERS)}
        events = event_names(engine)
    assert lines == [
        {"stream": f"The image app:1 already exists, renaming the old one with ID {old.image_id} to empty string\n"},
        {"stream": "Loaded image: app:1\n"},
    ]
    assert names == {new.image_id: ["app:1"], old.image_id: ["<none>:<none>"]}
    assert events == [("load", old.image_id), ("load", new.image_id)]


@trio_test
async def test_what_cannot_be_loaded_changes_nothing(tmp_path: Path) -> None:
    image = small(b"one", b"two")
    members = dict(docker_members(image))
    manifest = json.loads(members["manifest.json"])

    def with_manifest(**changes: object) -> bytes:
        return archive({**members, "manifest.json": json.dumps([{**manifest[0], **changes}]).encode()}.items())

    windows = json.loads(members["config.json"]) | {"os": "windows"}
    wrong = digest(image.tars[1]), digest(image.tars[0])
    cases = {
        b"": "open repositories: no such file or directory",
        archive([]): "open repositories: no such file or directory",
        archive([("repositories", b"[]")]): (
            "json: cannot unmarshal array into Go value of type map[string]tarexport.repository"
        ),
        archive([("manifest.json", b"{nope")]): "invalid character 'n' looking for beginning of object key string",
        with_manifest(Layers=["layer0.tar"]): "invalid manifest, layers length mismatch: expected 1, got 2",
        with_manifest(Layers=["layer1.tar", "layer0.tar"]): (
            f'invalid diffID for layer 0: expected "{wrong[1]}", got "{wrong[0]}"'
        ),
        with_manifest(Layers=["layer0.tar", "gone.tar"]): "open gone.tar: no such file or directory",
        with_manifest(Config="../../etc/passwd"): "open ../../etc/passwd: no such file or directory",
        with_manifest(RepoTags=["app"]): 'invalid tag "app"',
        with_manifest(RepoTags=["App:1"]): "invalid reference format: repository name must be lowercase",
        archive({**members, "config.json": json.dumps(windows).encode()}.items()): (
            "cannot load windows image on linux"
        ),
        archive({**members, "layer1.tar": b"x" * 2000}.items()): (
            "archive/tar: invalid tar header: bad number (entry 1, byte 0)"
        ),
        archive(members.items())[:3000]: "unexpected EOF",
        b"x" * 2000: "archive/tar: invalid tar header: bad number (entry 1, byte 0)",
    }
    async with image_engine(tmp_path) as engine:
        for data, words in cases.items():
            assert await load_error(engine, data) == words
        await settle(engine)
        assert on_disk(engine) == NOTHING_ON_DISK
        assert rows(engine) == NO_ROWS
        assert event_names(engine) == []


@trio_test
async def test_links_never_lead_out_of_the_archive(tmp_path: Path) -> None:
    image = small(b"one")
    link = tarfile.TarInfo("x/layer.tar")
    link.type, link.linkname = tarfile.SYMTYPE, "../../../../layer0.tar"
    loop = tarfile.TarInfo("loop")
    loop.type, loop.linkname = tarfile.SYMTYPE, "loop"
    members = dict(docker_members(image))

    def with_layer(name: str) -> bytes:
        manifest = [{"Config": "config.json", "RepoTags": None, "Layers": [name]}]
        return archive([*({**members, "manifest.json": json.dumps(manifest).encode()}.items()), link, loop])

    async with image_engine(tmp_path) as engine:
        assert await load_bytes(engine, with_layer("x/layer.tar")) == [
            {"stream": f"Loaded image ID: {image.image_id}\n"}
        ]
        assert await load_error(engine, with_layer("loop")) == "open loop: too many levels of symbolic links"


@trio_test
async def test_a_client_that_leaves_leaves_nothing(tmp_path: Path) -> None:
    image = small(os.urandom(500_000), os.urandom(500_000))
    data = archive(docker_members(image))
    async with image_engine(tmp_path) as engine:
        body = Body(data, stall_at=len(data) - 20_000)

        async def write(line: bytes) -> None:
            raise AssertionError(line)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: load(engine, body, quiet=True, write=write))
            await body.stalled.wait()
            nursery.cancel_scope.cancel()
        await settle(engine)
        assert on_disk(engine) == NOTHING_ON_DISK
        assert rows(engine) == NO_ROWS


@trio_test
async def test_several_images_and_their_parents(tmp_path: Path) -> None:
    base, child = small(b"one"), small(b"one", b"two")
    manifest = [
        {"Config": "a.json", "RepoTags": ["base:1", "base:2"], "Layers": ["0.tar"]},
        {"Config": "b.json", "RepoTags": None, "Layers": ["0.tar", "1.tar"], "Parent": base.image_id},
    ]
    members = [
        ("a.json", base.config_blob.data),
        ("b.json", child.config_blob.data),
        ("0.tar", child.tars[0]),
        ("1.tar", child.tars[1]),
        ("manifest.json", json.dumps(manifest).encode()),
    ]
    async with image_engine(tmp_path) as engine:
        lines = await load_bytes(engine, archive(members))
        assert engine.images.get(child.image_id).parent == base.image_id
        by_name = members_of(await save_bytes(engine, "base"))
        both = members_of(await save_bytes(engine, "base:2", child.image_id))
        nothing = members_of(await save_bytes(engine))
        for missing in ("nope", "base:3", "sha256:" + "0" * 64):
            with pytest.raises(NotFound):
                await save_bytes(engine, missing)
        events = event_names(engine)
    assert [line["stream"] for line in lines] == [
        "Loaded image: base:1\n",
        "Loaded image: base:2\n",
        f"Loaded image ID: {child.image_id}\n",
    ]
    assert json.loads(by_name["manifest.json"])[0]["RepoTags"] == ["base:1", "base:2"]
    saved = json.loads(both["manifest.json"])
    assert [entry["RepoTags"] for entry in saved] == [["base:2"], None]
    assert [entry.get("Parent") for entry in saved] == [None, base.image_id]
    assert json.loads(both["repositories"]) == {"base": {"2": saved[0]["Layers"][0].partition("/")[0]}}
    assert nothing == {"manifest.json": b"null\n"}
    assert events == [
        ("load", base.image_id),
        ("load", child.image_id),
        ("save", base.image_id),
        ("save", base.image_id),
        ("save", child.image_id),
    ]


@trio_test
async def test_a_layer_that_was_changed_gives_no_whole_archive(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        await load_bytes(engine, archive(docker_members(small(b"right"))))
        layer = next(iter(engine.snapshots.layers()))
        (layer.diff / "f").write_bytes(b"wrong")
        with pytest.raises(DataLoss, match="was changed after it was unpacked"):
            await save_bytes(engine, "app:1")


@trio_test
async def test_a_lost_database_finds_loaded_images_again(tmp_path: Path) -> None:
    from balenapy.engine.rebuild import rebuild

    image = layered("docker")
    async with image_engine(tmp_path) as engine:
        await load_bytes(engine, archive(docker_members(image)))
    for path in (tmp_path / "data").glob("meta*"):
        path.unlink()
    async with image_engine(tmp_path) as engine:
        await rebuild(engine)
        assert engine.images.resolve("app:1").image_id == image.image_id


@trio_test
async def test_directories_and_odd_members_are_passed_over(tmp_path: Path) -> None:
    image = busybox()
    members = docker_members(image)
    extra = [directory("sub"), ("sub/readme.txt", b"hello\n" * 500), ("./sub/../notes.json", b"{}")]
    async with image_engine(tmp_path) as engine:
        await load_bytes(engine, archive([*extra, *members]))  # type: ignore[list-item]
        image_id = engine.images.resolve("app:1").image_id
        await settle(engine)
        assert len(on_disk(engine)["snapshots"]) == 1
    assert image_id == f"sha256:{hashlib.sha256(image.config_blob.data).hexdigest()}"
