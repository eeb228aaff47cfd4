"""Push: nothing twice, resumed where it was cut, refused in the reference engine's words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from balenapy.core.reference import parse_reference
from balenapy.engine.engine import Engine
from balenapy.engine.push import credentials
from balenapy.errors import DataLoss, EngineError, InvalidParameter
from balenapy.registry.auth import AuthConfig
from tests.compat.images import digest, file, make_tar
from tests.engine.archives import archive, docker_members, load_bytes
from tests.engine.image_engine import image_engine, pull, settle
from tests.images_fixture import ImageFixture, layered
from tests.registry.fake import FakeRegistry, fake_registry
from tests.registry.real_registry import PASSWORD, USERNAME
from tests.trio_tests import trio_test

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

MIB = 1 << 20


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as registry:
        registry.homes = {}
        yield registry


async def push(engine: Engine, name: str, auth: AuthConfig | None = None) -> list[dict[str, Any]]:
    """Push; the objects of the answer."""
    lines: list[dict[str, Any]] = []

    async def write(line: bytes) -> None:
        await trio.lowlevel.checkpoint()
        lines.append(json.loads(line))

    await engine.pushes.push(parse_reference(name), auth, write)
    return lines


async def push_error(engine: Engine, name: str, auth: AuthConfig | None = None) -> str:
    with pytest.raises(EngineError) as caught:
        await push(engine, name, auth)
    return caught.value.message


def steps(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The last status of each layer."""
    return {line["id"]: line["status"] for line in lines if "id" in line}


def big_image(size: int = 4 * MIB) -> ImageFixture:
    return ImageFixture((make_tar([file("big", os.urandom(size))]), make_tar([file("small", b"x")])))


async def load_as(engine: Engine, image: ImageFixture, *names: str) -> None:
    await load_bytes(engine, archive(docker_members(image, names)))


def short(tar: bytes) -> str:
    return digest(tar)[7:19]


@trio_test
async def test_a_push_tells_of_layers_manifest_and_digest(tmp_path: Path, registry: FakeRegistry) -> None:
    image, name = layered("docker"), f"{registry.host}/team/app:1"
    async with image_engine(tmp_path) as engine:
        await load_as(engine, image, name)
        lines = await push(engine, name)
        record = engine.images.store.find_reference(parse_reference(name))
        names = [each.reference.familiar() for each in engine.images.store.references_of(image.image_id)]
        event = engine.events._kept[-1]
    media_type, raw = registry.manifests["team/app", "1"]
    manifest = json.loads(raw)
    ids = [short(tar) for tar in image.tars]
    assert record is not None
    assert lines[0] == {"status": f"The push refers to repository [{registry.host}/team/app]"}
    assert [line["id"] for line in lines[1:5]] == ids[::-1]
    assert {line["status"] for line in lines[1:5]} == {"Preparing"}
    assert steps(lines) == dict.fromkeys(ids, "Pushed")
    assert lines[-2:] == [
        {"status": f"1: digest: {digest(raw)} size: {len(raw)}"},
        {"progressDetail": {}, "aux": {"Tag": "1", "Digest": digest(raw), "Size": len(raw)}},
    ]
    assert media_type == manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert raw == json.dumps(manifest, indent=3).encode()
    assert manifest["config"] == image.config_blob.descriptor
    assert registry.blobs[image.image_id] == image.config_blob.data
    assert names == [name, f"{registry.host}/team/app@{digest(raw)}"]
    assert (event.action, event.actor_id, event.attributes["name"]) == ("push", name, name.rpartition(":")[0])


@trio_test
async def test_what_was_pushed_is_pulled_as_the_same_image(tmp_path: Path, registry: FakeRegistry) -> None:
    image, name = layered("docker"), f"{registry.host}/team/app:1"
    async with image_engine(tmp_path / "a") as engine:
        await load_as(engine, image, name)
        await push(engine, name)
    async with image_engine(tmp_path / "b") as engine:
        await pull(engine, name)
        assert engine.images.resolve(name).image_id == image.image_id


@trio_test
async def test_a_layer_is_uploaded_once(tmp_path: Path, registry: FakeRegistry) -> None:
    """To one repository; to another it is mounted; another registry is asked by digest before anything is sent."""
    image = big_image(MIB)
    here, there = f"{registry.host}/team/app", f"{registry.host}/other/app"
    with fake_registry() as second:
        second.homes = {}
        async with image_engine(tmp_path) as engine:
            await load_as(engine, image, f"{here}:1", f"{here}:2", f"{there}:1", f"{second.host}/x/y:1")
            await push(engine, here)
            sent = registry.received_bytes
            again = await push(engine, f"{here}:2")
            assert registry.received_bytes == sent
            mounted = await push(engine, f"{there}:1")
            assert registry.received_bytes == sent + len(image.config_blob.data)
            second.blobs |= registry.blobs
            second.homes["x/y"] = set(registry.blobs)
            elsewhere = await push(engine, f"{second.host}/x/y:1")
            assert second.received_bytes == 0
            del second.homes["x/y"]
            second.blobs.clear()
            await push(engine, f"{second.host}/x/y:1")
            assert second.received_bytes == sent
    ids = [short(tar) for tar in image.tars]
    assert steps(again) == steps(elsewhere) == dict.fromkeys(ids, "Layer already exists")
    assert steps(mounted) == dict.fromkeys(ids, "Mounted from team/app")
    assert second.blobs == registry.blobs  # the same layers, the same bytes


@trio_test
async def test_what_was_pulled_need_not_be_uploaded(tmp_path: Path, registry: FakeRegistry) -> None:
    image = big_image(MIB)
    registry.add("team/base", "1", image)
    registry.homes = {"team/base": set(registry.blobs)}
    async with image_engine(tmp_path) as engine:
        await pull(engine, f"{registry.host}/team/base:1")
        await engine.images.tag(f"{registry.host}/team/base:1", f"{registry.host}/team/app", "1")
        lines = await push(engine, f"{registry.host}/team/app:1")
    assert steps(lines) == {short(tar): "Mounted from team/base" for tar in image.tars}
    assert registry.received_bytes == len(image.config_blob.data)


@trio_test
async def test_a_registry_that_does_not_mount_gets_an_upload(tmp_path: Path, registry: FakeRegistry) -> None:
    image = big_image(MIB)
    registry.mounts = False
    async with image_engine(tmp_path) as engine:
        await load_as(engine, image, f"{registry.host}/a/a:1", f"{registry.host}/b/b:1")
        await push(engine, f"{registry.host}/a/a:1")
        lines = await push(engine, f"{registry.host}/b/b:1")
    assert steps(lines) == {short(tar): "Pushed" for tar in image.tars}
    assert registry.uploads == {}


@pytest.mark.parametrize("reset", [False, True])
def test_an_upload_goes_on_where_it_was_cut(tmp_path: Path, registry: FakeRegistry, reset: bool) -> None:
    image = big_image()
    name = f"{registry.host}/team/app:1"

    async def main() -> None:
        async with image_engine(tmp_path) as engine:
            await load_as(engine, ImageFixture(image.tars[:1]), name)
            for place in (MIB, MIB // 2, MIB):
                registry.fault("^PATCH", take_at=place, reset=reset)
            lines = await push(engine, name)
            assert steps(lines) == {short(image.tars[0]): "Pushed"}
            assert {line["status"] for line in lines if "Retrying" in line.get("status", "")} >= {
                "Retrying in 5 seconds",
                "Retrying in 1 second",
                "Retrying in 15 seconds",
            }

    trio.run(main)
    blob = json.loads(registry.manifests["team/app", "1"][1])["layers"][0]
    config = json.loads(registry.manifests["team/app", "1"][1])["config"]
    assert registry.received_bytes == blob["size"] + config["size"], "something was sent twice"


@trio_test
async def test_an_upload_the_registry_forgot_begins_anew(tmp_path: Path, registry: FakeRegistry) -> None:
    image, name = big_image(MIB), f"{registry.host}/team/app:1"
    registry.fault("^PATCH", take_at=MIB // 2)
    registry.fault("^GET .*/uploads/", status=404, body=b'{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}')
    async with image_engine(tmp_path) as engine:
        await load_as(engine, image, name)
        assert steps(await push(engine, name)) == {short(tar): "Pushed" for tar in image.tars}


@trio_test
async def test_the_answer_to_the_end_may_get_lost(tmp_path: Path, registry: FakeRegistry) -> None:
    image, name = ImageFixture((make_tar([file("f", b"f")]),)), f"{registry.host}/team/app:1"
    registry.fault("^PUT .*digest=", status=503)  # and it was done
    async with image_engine(tmp_path) as engine:
        await load_as(engine, image, name)
        assert steps(await push(engine, name)) == {short(image.tars[0]): "Pushed"}


@trio_test
async def test_attempts_end(tmp_path: Path, registry: FakeRegistry) -> None:
    image, name = ImageFixture((make_tar([file("f", b"f")]),)), f"{registry.host}/team/app:1"
    registry.fault("^PATCH", status=503, times=100)
    async with image_engine(tmp_path, max_upload_attempts=3) as engine:
        await load_as(engine, image, name)
        assert await push_error(engine, name) == "received unexpected HTTP status: 503 Service Unavailable"
    assert len(registry.seen("^PATCH")) == 3


@trio_test
async def test_refusals(tmp_path: Path, registry: FakeRegistry) -> None:
    name = f"{registry.host}/team/app"
    async with image_engine(tmp_path) as engine:
        await load_as(engine, ImageFixture((make_tar([file("f", b"f")]),)), f"{name}:1")
        assert await push_error(engine, "nope:1") == "An image does not exist locally with the tag: nope"
        assert await push_error(engine, f"{name}:2") == f"tag does not exist: {name}:2"
        assert await push_error(engine, f"{name}@{digest(b'')}") == "cannot push a digest reference"
        registry.fault("^POST", status=403, body=b'{"errors":[{"code":"DENIED","message":"no"}]}')
        assert await push_error(engine, name) == "denied: no"
        layer = next(iter(engine.snapshots.layers()))
        (layer.diff / "f").write_bytes(b"g")
        with pytest.raises(DataLoss, match="was changed after it was unpacked"):
            await push(engine, name)
    assert ("team/app", "1") not in registry.manifests


@trio_test
async def test_tokens_that_expire_in_the_middle_are_renewed(tmp_path: Path) -> None:
    with fake_registry(auth="token") as registry:
        registry.homes = {}
        image, name = big_image(), f"{registry.host}/team/app:1"
        auth = AuthConfig(USERNAME, PASSWORD)
        async with image_engine(tmp_path) as engine:
            await load_as(engine, image, name)
            registry.fault("^PATCH", status=401, body=b'{"errors":[{"code":"UNAUTHORIZED"}]}')
            assert steps(await push(engine, name, auth)) == {short(tar): "Pushed" for tar in image.tars}
            await engine.images.tag(name, f"{registry.host}/other/app", "1")
            lines = await push(engine, f"{registry.host}/other/app:1", auth)
            assert steps(lines) == {short(tar): "Mounted from team/app" for tar in image.tars}
            refused = await push_error(engine, name, AuthConfig(USERNAME, "wrong"))
        scopes = [scope for scope in registry.tokens.values() if "other" in scope]
    assert "unauthorized: incorrect username or password" in refused
    assert scopes[0].split() == ["repository:other/app:pull,push", "repository:team/app:pull"]


@trio_test
async def test_a_client_that_leaves_ends_the_push(tmp_path: Path, registry: FakeRegistry) -> None:
    image, name = big_image(), f"{registry.host}/team/app:1"
    registry.fault("^PATCH", take_at=10**9)
    registry.fault("^POST", status=500, times=10**9)
    async with image_engine(tmp_path) as engine:
        engine.pushes.sleep = trio.sleep
        await load_as(engine, image, name)
        with trio.move_on_after(1) as scope:
            await push(engine, name)
        assert scope.cancelled_caught
        assert engine.images.resolve(name).references == [name]


def test_credentials_come_in_the_header_or_the_body() -> None:
    assert credentials("", b'{"username":"u","password":"p"}') == AuthConfig("u", "p")
    assert credentials("e30=", b"") == AuthConfig()
    with pytest.raises(InvalidParameter, match="Bad parameters and missing X-Registry-Auth: EOF"):
        credentials("", b"")


@trio_test
async def test_a_layer_deleted_and_loaded_again_is_not_uploaded(tmp_path: Path, registry: FakeRegistry) -> None:
    image, name = big_image(MIB), f"{registry.host}/team/app:1"
    async with image_engine(tmp_path) as engine:
        await load_as(engine, image, name)
        await push(engine, name)
        sent = registry.received_bytes
        await engine.images.remove(image.image_id, force=True)
        await settle(engine)
        await load_as(engine, image, name)
        lines = await push(engine, name)
    assert steps(lines) == {short(tar): "Layer already exists" for tar in image.tars}
    assert registry.received_bytes == sent
