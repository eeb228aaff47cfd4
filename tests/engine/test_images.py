"""List, inspect, history, tag, delete, prune: against what the engine we replace answered."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.core import wire
from balenapy.core.container import Container, ContainerConfig
from balenapy.core.digest import chain_ids
from balenapy.core.filters import parse_filters
from balenapy.core.lifecycle import Status
from balenapy.core.manifest import parse_image_config
from balenapy.core.reference import parse_reference
from balenapy.engine.engine import Engine
from balenapy.engine.images import LIST_FILTERS
from balenapy.errors import Conflict, InvalidParameter, NotFound, SystemFailure
from balenapy.stores.images import ImageRecord, ReferenceRecord
from balenapy.stores.snapshots import Layer
from tests.engine.image_engine import image_engine, settle
from tests.trio_tests import trio_test

FIXTURES = Path(__file__).parent.parent / "data/fixtures"


def fixture(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text())


def fake_digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


async def add_image(
    engine: Engine,
    *names: str,
    layers: Sequence[tuple[str, int]] = (("base", 1000),),
    parent: str = "",
    created: str = "2024-01-02T03:04:05.5Z",
    labels: dict[str, str] | None = None,
    **more: Any,
) -> ImageRecord:
    """Store an image without a registry; its layers are (diff_id or seed, size)."""
    diff_ids = [name if name.startswith("sha256:") else fake_digest(name) for name, _ in layers]
    document = {
        "architecture": "amd64",
        "config": {"Labels": labels},
        "created": created,
        "history": [{"created": created, "created_by": name} for name, _ in layers],
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        **more,
    }
    config = parse_image_config(json.dumps(document).encode())
    below = ""
    for chain_id, diff_id, (_, size) in zip(chain_ids(config.diff_ids), diff_ids, layers, strict=True):
        if engine.snapshots.find(str(chain_id)) is None:
            path = await engine.snapshots.new_directory()
            await engine.snapshots.commit(Layer(path, str(chain_id), below, diff_id, size, size))
        below = str(chain_id)
    image = ImageRecord(
        str(config.image_id), config, parent=parent, size_bytes=engine.snapshots.size_bytes(config.chain_id)
    )
    await engine.images.store.add(image, [ReferenceRecord(parse_reference(name), image.image_id) for name in names])
    return image


def use(engine: Engine, image: ImageRecord, *, running: bool = False) -> str:
    container = Container(id=hashlib.sha256(image.image_id.encode()).hexdigest(), image_id=image.image_id)
    container.state.status = Status.RUNNING if running else Status.EXITED
    engine.containers.records.append(container)  # type: ignore[attr-defined]
    return container.id


@trio_test
async def test_an_image_is_found_by_id_name_and_prefix(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        image = await add_image(engine, "app:latest", f"app@{fake_digest('manifest')}")
        hex_id = image.image_id[7:]
        for name in (
            image.image_id,
            hex_id,
            "app",
            "app:latest",
            "docker.io/library/app",
            hex_id[:12],
            hex_id[:1],
            f"sha256:{hex_id[:12]}",
            f"app@{fake_digest('manifest')}",
            f"app:whatever@{fake_digest('manifest')}",
        ):
            assert engine.images.resolve(name) is image


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nope", NotFound, "No such image: nope:latest"),
        ("nope:1", NotFound, "No such image: nope:1"),
        ("a/b", NotFound, "No such image: a/b:latest"),
        ("0" * 64, NotFound, f"No such image: sha256:{'0' * 64}"),
        (f"sha256:{'0' * 64}", NotFound, f"No such image: sha256:{'0' * 64}"),
        (f"app@sha256:{'0' * 64}", NotFound, f"No such image: app@sha256:{'0' * 64}"),
        ("57ae6bcbdead", NotFound, "No such image: 57ae6bcbdead:latest"),
        ("NOPE", InvalidParameter, "invalid reference format: repository name must be lowercase"),
        ("a//b", InvalidParameter, "invalid reference format"),
    ],
)
@trio_test
async def test_what_is_not_found_is_told_in_the_right_words(
    tmp_path: Path, name: str, kind: type[Exception], message: str
) -> None:
    async with image_engine(tmp_path) as engine:
        await add_image(engine, "app:latest")
        with pytest.raises(kind) as caught:
            engine.images.resolve(name)
        assert str(caught.value) == message
        with pytest.raises(kind) as caught:
            engine.images.inspect(name)
        assert str(caught.value) == f"no such image: {name}: {message}"


@trio_test
async def test_a_tag_that_looks_like_an_id_prefix_wins(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        one = await add_image(engine, "app:latest")
        other = await add_image(engine, f"{one.image_id[7:19]}:latest", layers=[("other", 1)])
        assert engine.images.resolve(one.image_id[7:19]) is other


@trio_test
async def test_inspect_has_the_keys_and_values_of_the_reference_engine(tmp_path: Path) -> None:
    wanted = fixture("image_inspect_pulled.json")
    async with image_engine(tmp_path) as engine:
        image = await add_image(
            engine,
            wanted["RepoTags"][0],
            wanted["RepoDigests"][0],
            layers=[(diff_id, 571072) for diff_id in wanted["RootFS"]["Layers"]],
            created=wanted["Created"],
            author=wanted["Author"],
            config=wanted["Config"],
            container=wanted["Container"],
            container_config=wanted["ContainerConfig"],
            docker_version=wanted["DockerVersion"],
            history=[],
        )
        answer = engine.images.inspect("registry.example:5000/bpy/t:1")

        assert list(answer) == list(wanted)
        directories = answer.pop("GraphDriver")
        expected_driver = wanted.pop("GraphDriver")
        assert list(directories["Data"]) == list(expected_driver["Data"])
        assert directories["Name"] == "overlay2"
        assert directories["Data"]["LowerDir"].count(":") == 2
        for key in ("Id", "Size", "VirtualSize"):
            wanted.pop(key)
        assert answer.pop("Id") == image.image_id
        assert answer.pop("Size") == answer.pop("VirtualSize") == 4 * 571072
        assert answer == wanted
        assert list(answer["Config"]) == list(wanted["Config"])


@trio_test
async def test_times_that_configs_may_have(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        for number, (created, shown, seconds) in enumerate(
            [
                ("", "0001-01-01T00:00:00Z", -62135596800),
                ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z", -62135596800),
                ("1970-01-01T00:00:00Z", "1970-01-01T00:00:00Z", 0),
                ("2024-01-02T03:04:05.120+01:00", "2024-01-02T02:04:05.12Z", 1704161045),
            ]
        ):
            image = await add_image(engine, f"app:{number}", created=created, layers=[(f"l{number}", 1)])
            assert engine.images.inspect(image.image_id)["Created"] == shown
            (row,) = engine.images.summaries(parse_filters(json.dumps({"reference": [f"app:{number}"]})))
            assert row["Created"] == seconds
            assert engine.images.history(image.image_id)[0]["Created"] == seconds


@trio_test
async def test_the_list_has_the_entries_of_the_reference_engine(tmp_path: Path) -> None:
    """Two untagged images, a tagged one, and its untagged parent that only `all` shows."""
    async with image_engine(tmp_path) as engine:
        parent = await add_image(engine, created="2026-11-23T09:04:25Z")
        tagged = await add_image(
            engine,
            "busybox:latest",
            "registry.example:5000/library/busybox:latest",
            f"registry.example:5000/library/busybox@{fake_digest('m')}",
            created="2026-11-23T09:04:25.5Z",
            parent=parent.image_id,
        )
        for number in range(2):
            await add_image(
                engine,
                created="2026-11-23T09:26:47Z",
                parent=tagged.image_id,
                layers=[("base", 1000), (f"l{number}", 5)],
                labels={},
            )

        rows = engine.images.summaries()
        wanted = fixture("image_list.json")
        assert [list(row) for row in rows] == [list(row) for row in wanted]
        for row, expected in zip(rows, wanted, strict=True):
            for key in ("Containers", "Created", "Labels", "RepoTags", "SharedSize"):
                expected_value = sorted(expected[key]) if key == "RepoTags" else expected[key]
                assert row[key] == expected_value
        assert rows[0]["RepoDigests"] == ["<none>@<none>"]
        assert [row["Size"] for row in rows] == [1005, 1005, 1000]
        assert len(engine.images.summaries(everything=True)) == 4


def listed(engine: Engine, **filters: list[str]) -> list[str]:
    rows = engine.images.summaries(parse_filters(json.dumps(filters), LIST_FILTERS))
    return sorted(tag for row in rows for tag in row["RepoTags"] or row["RepoDigests"])


@trio_test
async def test_lists_can_be_filtered(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        await add_image(engine, "a:1", "team/a:1", created="2024-01-01T00:00:00Z", labels={"x": "1", "y": "2"})
        await add_image(engine, "b:1", created="2024-01-02T00:00:00Z", layers=[("b", 1)], labels={"x": "2"})
        await add_image(engine, created="2024-01-03T00:00:00Z", layers=[("c", 1)])
        await add_image(engine, f"d@{fake_digest('d')}", created="2024-01-04T00:00:00Z", layers=[("d", 1)])

        none, d = "<none>:<none>", f"d@{fake_digest('d')}"
        assert listed(engine) == sorted([none, "a:1", "b:1", d, "team/a:1"])
        assert listed(engine, dangling=["true"]) == sorted([none, d])
        assert listed(engine, dangling=["false"]) == sorted(["a:1", "b:1", d, "team/a:1"])
        assert listed(engine, label=["x"]) == ["a:1", "b:1", "team/a:1"]
        assert listed(engine, label=["x=2"]) == ["b:1"]
        assert listed(engine, label=["x", "y=2"]) == ["a:1", "team/a:1"]
        assert listed(engine, before=["b:1"]) == ["a:1", "team/a:1"]
        assert listed(engine, since=["b:1"]) == sorted([none, d])
        assert listed(engine, reference=["a"]) == ["a:1"]
        assert listed(engine, reference=["*/a", "b"]) == ["b:1", "team/a:1"]
        assert listed(engine, reference=["?:1"]) == ["a:1", "b:1"]
        with pytest.raises(NotFound) as missing:
            listed(engine, before=["nope"])
        assert missing.value.message == "No such image: nope:latest"
        with pytest.raises(InvalidParameter) as wrong:
            listed(engine, dangling=["zz"])
        assert wrong.value.message == "Invalid filter 'dangling=[zz]'"
        with pytest.raises(InvalidParameter) as unknown:
            listed(engine, nope=["zz"])
        assert unknown.value.message == "Invalid filter 'nope'"


@trio_test
async def test_history_is_newest_first_with_sizes_of_layers(tmp_path: Path) -> None:
    wanted = fixture("image_history_pulled.json")
    steps = [
        {
            "created": wire.rfc3339nano(entry["Created"] * 10**9),
            "created_by": entry["CreatedBy"],
            **({} if entry["Size"] or "RUN" in entry["CreatedBy"] else {"empty_layer": True}),
        }
        for entry in reversed(wanted)
    ]
    with_layers = [entry["Size"] for entry in reversed(wanted) if entry["Size"]]
    steps = [
        {**step, "empty_layer": True} if "empty_layer" in step or entry["Size"] == 0 else step
        for step, entry in zip(steps, reversed(wanted), strict=True)
    ]
    async with image_engine(tmp_path) as engine:
        image = await add_image(
            engine,
            "registry.example:5000/bpy/t:1",
            layers=[(f"l{number}", size) for number, size in enumerate(with_layers)],
            history=steps,
        )
        answer = engine.images.history(image.image_id)
        wanted[0]["Id"] = image.image_id
        assert answer == wanted
        assert list(answer[0]) == list(wanted[0])


@trio_test
async def test_a_tag_moves_silently(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        one = await add_image(engine, "one:1", labels={"a": "b"})
        two = await add_image(engine, "two:1", layers=[("two", 1)])
        await engine.images.tag("one:1", "app", "1")
        await engine.images.tag("two:1", "app:1", "")
        assert engine.images.resolve("app:1") is two
        assert one.references == ["docker.io/library/one:1"]
        await engine.images.tag("one:1", "other:9", "2")
        assert engine.images.resolve("other:2") is one
        assert one.last_tagged_ns > time.time_ns() - 60 * 10**9
        event = engine.events._kept[-1]
        assert (event.action, event.actor_id) == ("tag", one.image_id)
        assert event.attributes == {"a": "b", "name": "other:2"}
    async with image_engine(tmp_path) as engine:
        assert engine.images.resolve("app:1").image_id == two.image_id


@pytest.mark.parametrize(
    ("repository", "tag", "kind", "message"),
    [
        ("", "", SystemFailure, "invalid reference format"),
        ("a", "b c", SystemFailure, "invalid tag format"),
        (
            f"t@sha256:{'0' * 64}",
            "",
            InvalidParameter,
            "refusing to create a tag with a digest reference",
        ),
        (
            "0" * 64,
            "",
            SystemFailure,
            f"invalid repository name ({'0' * 64}), cannot specify 64-byte hexadecimal strings",
        ),
        (
            "sha256",
            "x",
            InvalidParameter,
            "refusing to create an ambiguous tag using digest algorithm as name",
        ),
    ],
)
@trio_test
async def test_bad_tags_are_refused_in_the_right_words(
    tmp_path: Path, repository: str, tag: str, kind: type[Exception], message: str
) -> None:
    async with image_engine(tmp_path) as engine:
        await add_image(engine, "app:latest")
        with pytest.raises(kind) as caught:
            await engine.images.tag("app", repository, tag)
        assert str(caught.value) == message
        with pytest.raises(NotFound):
            await engine.images.tag("nope", "a", "b")


@trio_test
async def test_deleting_tells_names_image_and_layers_in_order(tmp_path: Path) -> None:
    """The shape of the recorded answer: tag, digest, image, its own layers from the top."""
    async with image_engine(tmp_path) as engine:
        base = await add_image(engine, "base:1")
        layers = [("base", 1000), ("x", 10), ("y", 20)]
        image = await add_image(engine, "r.example/t:1", f"r.example/t@{fake_digest('m')}", layers=layers)
        answer = await engine.images.remove("r.example/t:1")

        chain = [str(chain_id) for chain_id in chain_ids(image.config.diff_ids)]
        assert answer == [
            {"Untagged": "r.example/t:1"},
            {"Untagged": f"r.example/t@{fake_digest('m')}"},
            {"Deleted": image.image_id},
            {"Deleted": chain[2]},
            {"Deleted": chain[1]},
        ]
        assert [event.action for event in engine.events._kept] == ["untag", "delete"]
        assert [event.actor_id for event in engine.events._kept] == [image.image_id] * 2
        await settle(engine)
        assert [layer.chain_id for layer in engine.snapshots.layers()] == [chain[0]]
        assert len(list((engine.config.data_root / "snapshots").iterdir())) == 1
        assert engine.images.all() == [base]


@trio_test
async def test_layers_of_a_container_outlive_their_image(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        image = await add_image(engine, "app:1")
        await engine.snapshots.prepare("c" * 64, image.chain_id)
        answer = await engine.images.remove("app:1", force=True)
        assert answer == [{"Untagged": "app:1"}, {"Deleted": image.image_id}]
        await settle(engine)
        assert engine.snapshots.mounts("c" * 64).lower[1].is_dir()
        await engine.snapshots.remove("c" * 64)
        await settle(engine)
        assert list((engine.config.data_root / "snapshots").iterdir()) == []


@trio_test
async def test_a_used_image_is_kept(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        image = await add_image(engine, "app:1")
        container_id = use(engine, image, running=True)
        with pytest.raises(Conflict) as caught:
            await engine.images.remove(image.short_id, force=True)
        assert caught.value.message == (
            f"conflict: unable to delete {image.short_id} (cannot be forced) - "
            f"image is being used by running container {container_id[:12]}"
        )
        with pytest.raises(InvalidParameter) as blank:
            await engine.images.remove("")
        assert blank.value.message == "image name cannot be blank"


@trio_test
async def test_prune_deletes_untagged_images_or_all_unused(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        used = await add_image(engine, "used:1", layers=[("u", 1)])
        use(engine, used)
        tagged = await add_image(engine, "tagged:1", layers=[("t", 30)])
        loose = await add_image(engine, layers=[("l", 500)], labels={"keep": "no"})
        assert await engine.images.prune(parse_filters('{"label":["nope"]}')) == {
            "ImagesDeleted": None,
            "SpaceReclaimed": 0,
        }
        answer = await engine.images.prune(parse_filters(""))
        assert answer == {
            "ImagesDeleted": [{"Deleted": loose.image_id}, {"Deleted": loose.chain_id}],
            "SpaceReclaimed": 500,
        }
        answer = await engine.images.prune(parse_filters('{"dangling":["false"]}'))
        assert answer == {
            "ImagesDeleted": [
                {"Untagged": "tagged:1"},
                {"Deleted": tagged.image_id},
                {"Deleted": tagged.chain_id},
            ],
            "SpaceReclaimed": 30,
        }
        assert engine.images.all() == [used]
        with pytest.raises(InvalidParameter) as wrong:
            await engine.images.prune(parse_filters('{"dangling":["zz"]}'))
        assert wrong.value.message == "Invalid filter 'dangling=[zz]'"


@trio_test
async def test_prune_until_keeps_what_is_newer(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        await add_image(engine, created="2024-01-01T00:00:00Z", layers=[("a", 1)])
        newer = await add_image(engine, created="2024-03-01T00:00:00Z", layers=[("b", 2)])
        answer = await engine.images.prune(parse_filters('{"until":["2024-02-01"]}'))
        assert answer["SpaceReclaimed"] == 1
        assert engine.images.all() == [newer]


@trio_test
async def test_disk_usage_tells_shared_and_unique_bytes(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        one = await add_image(engine, "one:1", layers=[("base", 1000), ("x", 10)])
        await add_image(engine, "two:1", layers=[("base", 1000), ("y", 20)], created="2023-01-01T00:00:00Z")
        use(engine, one)
        layers_size, rows = engine.images.disk_usage()
        assert layers_size == 1030
        told = [(row["RepoTags"], row["Size"], row["SharedSize"], row["Containers"]) for row in rows]
        assert told == [(["one:1"], 1010, 1000, 1), (["two:1"], 1020, 1000, 0)]
        assert list(rows[0]) == list(fixture("system_df.json")["Images"][0])


@trio_test
async def test_a_view_keeps_its_layers_from_collection(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        image = await add_image(engine, "app:1")
        async with engine.snapshots.pinned(image.chain_id):
            await engine.images.remove("app:1")
            await settle(engine)
            assert engine.snapshots.find(image.chain_id) is not None
        await settle(engine)
        assert engine.snapshots.find(image.chain_id) is None


@trio_test
async def test_an_image_without_config_is_not_listed_and_harms_no_other(tmp_path: Path) -> None:
    async with image_engine(tmp_path) as engine:
        bad = await add_image(engine, "bad:1")
        await add_image(engine, "good:1", layers=[("good", 1)])
        engine.db.query("UPDATE document SET bytes = ? WHERE digest = ?", (b"{}", bad.image_id))
    async with image_engine(tmp_path) as engine:
        assert [row["RepoTags"] for row in engine.images.summaries()] == [["good:1"]]
        assert list(engine.images.store.unreadable) == [bad.image_id]
        with pytest.raises(NotFound):
            engine.images.resolve("bad:1")


def test_config_of_zero_value_is_encoded_whole() -> None:
    assert list(wire.encode(ContainerConfig()))[:3] == ["Hostname", "Domainname", "User"]


@trio_test
async def test_records_follow_the_order_of_commits(tmp_path: Path) -> None:
    """Many tasks move one tag at once: memory and rows end up saying the same."""
    async with image_engine(tmp_path) as engine:
        for number in range(10):
            await add_image(engine, f"i{number}:1", layers=[(f"l{number}", 1)])
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(engine.images.tag, f"i{number}:1", "app", "1")
        ((stored,),) = engine.db.query("SELECT image_id FROM reference WHERE name = 'docker.io/library/app:1'")
        assert engine.images.resolve("app:1").image_id == stored
