"""The client against Debian's docker-registry: anonymous, with passwords, with TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from balenapy.core.digest import Digest
from balenapy.core.manifest import Index, Manifest, Platform, choose_platform, parse_document, parse_image_config
from balenapy.core.reference import parse_reference
from balenapy.errors import NotFound, Unauthorized
from balenapy.registry.auth import AuthConfig
from balenapy.registry.client import Registry
from balenapy.registry.errors import RegistryError
from tests import images_fixture
from tests.registry.real_registry import PASSWORD, USERNAME, RealRegistry, make_certificate, real_registry
from tests.registry.test_client import Settings, client
from tests.registry_process import REGISTRY
from tests.trio_tests import trio_test

pytestmark = pytest.mark.skipif(REGISTRY is None, reason="no docker-registry on this machine")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with real_registry(tmp_path_factory.mktemp("real"), basic_auth=True) as running:
        for family in ("oci", "docker"):
            for name, image in (
                ("many", images_fixture.multi_platform(family)),
                ("layers", images_fixture.layered(family)),
            ):
                images_fixture.push(running.host, f"{family}/{name}", "1", image, credentials=running.credentials)
        yield running


@pytest.mark.parametrize("family", ["oci", "docker"])
@trio_test
async def test_an_image_of_this_platform_is_found_and_fetched(
    registry: RealRegistry, family: images_fixture.Family
) -> None:
    reference = parse_reference(f"{registry.host}/{family}/many:1")

    async with client().session(reference, AuthConfig(USERNAME, PASSWORD)) as session:
        raw, media_type, _ = await session.manifest()
        index = parse_document(raw, media_type)
        assert isinstance(index, Index)
        chosen = choose_platform(index, Platform("linux", "arm", "v7"))
        raw, media_type, digest = await session.manifest(reference.with_digest(chosen.digest))
        manifest = parse_document(raw, media_type)
        assert isinstance(manifest, Manifest)
        config = parse_image_config(await session.config(manifest.config))

    assert digest == chosen.digest
    assert (config.architecture, config.variant) == ("arm", "v7")


@trio_test
async def test_layers_resume_at_any_byte(registry: RealRegistry) -> None:
    image = images_fixture.layered()
    reference = parse_reference(f"{registry.host}/oci/layers:1")

    async with client().session(reference, AuthConfig(USERNAME, PASSWORD)) as session:
        for layer in image.layers:
            for offset in (0, 1, len(layer.data) - 1, len(layer.data)):
                async with session.blob(Digest.parse(layer.digest), offset, size_bytes=len(layer.data)) as blob:
                    assert layer.data[offset:] == b"".join([chunk async for chunk in blob])
                    assert blob.range_honoured


@trio_test
async def test_tags_and_unknown_names(registry: RealRegistry) -> None:
    auth = AuthConfig(USERNAME, PASSWORD)
    reference = parse_reference(f"{registry.host}/oci/layers")

    async with client().session(reference, auth) as session:
        assert await session.tags() == ["1"]
        with pytest.raises(NotFound, match=r"^manifest for 127\.0\.0\.1:\d+/oci/layers:2 not found$"):
            await session.manifest(reference.with_tag("2"))
    async with client().session(parse_reference(f"{registry.host}/no/such"), auth) as session:
        with pytest.raises(NotFound, match=r"^repository 127\.0\.0\.1:\d+/no/such not found$"):
            await session.tags()


@trio_test
async def test_logins_and_strangers(registry: RealRegistry) -> None:
    done = await client().login(AuthConfig(USERNAME, PASSWORD, registry.host))
    assert (done.status, done.identity_token) == ("Login Succeeded", "")

    with pytest.raises(Unauthorized, match=r"failed with status: 401 Unauthorized$"):
        await client().login(AuthConfig(USERNAME, "wrong", registry.host))
    reference = parse_reference(f"{registry.host}/oci/layers:1")
    async with client().session(reference) as session:
        with pytest.raises(RegistryError, match="no basic auth credentials"):
            await session.manifest()
    async with client().session(reference, AuthConfig("u", "p")) as session:
        with pytest.raises(RegistryError, match=r"^unauthorized: authentication required$"):
            await session.manifest()


@trio_test
async def test_tls_with_the_registrys_own_authority(tmp_path: Path) -> None:
    made = make_certificate(tmp_path / "made")
    with real_registry(tmp_path / "registry", tls=made) as running:
        directory = tmp_path / "certs.d" / running.host
        directory.mkdir(parents=True)
        (directory / "ca.crt").write_bytes(made.certificate.read_bytes())
        trusting = Registry(Settings(), directories=(tmp_path / "certs.d",), environment={})
        trusting._insecure_ranges = ()

        async with trusting.session(parse_reference(f"{running.host}/x:1")) as session:
            with pytest.raises(NotFound):  # the registry was reached; it is empty
                await session.manifest()
