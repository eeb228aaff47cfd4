"""--preload: the data partition has images from the start, and an engine on the device finds them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.arm import sources  # noqa: F401 - the paths
from tests.compat import images
from tests.engine_process import running_engine

from imagemaker import disk, preload  # isort: skip
from imagemaker.program import Failed  # isort: skip
from imagemaker.targets import GENERIC_ARM64_UEFI, MIB  # isort: skip

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def archive(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `docker save` writes."""
    directory = tmp_path_factory.mktemp("archive")
    images.push(registry, "field/app", "v3", images.app_image())
    name = f"{registry}/field/app:v3"
    path = directory / "app.tar"
    with running_engine(directory / "engine", "--insecure-registry", registry) as engine:
        engine.client().images.pull(name)
        engine.client().images.get(name).tag("field/app", "v3")
        with path.open("wb") as out:
            for piece in engine.client().api.get_image("field/app:v3"):
                out.write(piece)
    return path


def test_an_archive_and_a_reference_are_there_without_a_network(
    archive: Path, registry: str, busybox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALENAPY_PRELOAD_INSECURE", registry)
    (tmp_path / "work").mkdir()
    tree = preload.data_tree(GENERIC_ARM64_UEFI, [str(archive), busybox], tmp_path / "work")

    assert [path.name for path in tree.iterdir()] == [preload.DATA_ROOT]
    partition = GENERIC_ARM64_UEFI.partition("data")
    image = tmp_path / "data.ext4"
    size = (partition.mib + preload.mib(tree)) * MIB
    disk.make_ext4(GENERIC_ARM64_UEFI, partition, tree, image, 1_795_000_000, size)
    command = ["debugfs", "-R", f"ls -p /{preload.DATA_ROOT}", image]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "meta.db" in listed.stdout
    # The same files at another place, as on the device; the registry is not known to this engine.
    engine_root = tmp_path / "device"
    engine_root.mkdir()
    (tree / preload.DATA_ROOT).rename(engine_root / "data")
    with running_engine(engine_root) as engine:
        client = engine.client()
        tags = {tag for image in client.images.list() for tag in image.tags}
        assert tags == {"field/app:v3", busybox}
        container = client.containers.run("field/app:v3", ["echo", "started"], detach=True, network_mode="none")
        assert container.wait()["StatusCode"] == 0
        assert container.logs().decode().splitlines() == ["entry echo started", "started"]
        container.remove(v=True)


def test_an_image_that_cannot_be_had_stops_the_build(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"preload 127.0.0.1:1/none"):
        preload.data_tree(GENERIC_ARM64_UEFI, ["127.0.0.1:1/none:latest"], tmp_path)
