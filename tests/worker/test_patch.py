"""Patching layers: every format, every odd tar, and deltas that are damaged or lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.compat.images import directory, file, make_tar
from tests.worker.conftest import Worker, sha256

pytestmark = pytest.mark.root

VECTORS = Path(__file__).parent.parent / "delta/vectors"


class Device:
    """Unpacks layers with real workers, and patches them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0

    def worker(self) -> Worker:
        self.count += 1
        place = self.root / str(self.count)
        place.mkdir()
        return Worker(place)

    def base(self, layers: Sequence[bytes]) -> list[dict[str, str]]:
        """The layers unpacked, as an argument of `patch`."""
        found = []
        for tar in layers:
            worker = self.worker()
            worker.unpack(tar)
            found.append({"directory": str(worker.snapshot), "diff_id": sha256(tar)})
        return found

    def patch(
        self, delta: bytes, form: str, base: list[dict[str, str]], diff_id: str, **more: object
    ) -> dict[str, Any]:
        self.worker_used = self.worker()
        path = self.root / "delta"
        path.write_bytes(delta)
        arguments: dict[str, object] = {"delta": str(path), "digest": sha256(delta), "diff_id": diff_id, **more}
        return self.worker_used.run(
            "patch", directory=str(self.worker_used.snapshot), format=form, base=base, **arguments
        )


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def vector_base(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("base-*.tar"))]


BUILT = sorted(path for path in VECTORS.iterdir() if path.name != "spoiled")


@pytest.mark.parametrize("folder", BUILT, ids=lambda path: path.name)
def test_every_vector_becomes_its_layer(device: Device, folder: Path) -> None:
    target = (folder / "target.tar").read_bytes()
    layers = device.base(vector_base(folder))
    # What the vectors' makers called the base's layers.
    named = [{**layer, "diff_id": str(number)} for number, layer in enumerate(layers)]
    formats = {"native": "native", "native-bsdiff": "native", "tar-diff": "tar-diff", "librsync": "librsync-file"}
    for name, form in formats.items():
        delta = (folder / f"{name}.delta").read_bytes()

        report = device.patch(delta, form, named, sha256(target))

        assert report["diff_id"] == sha256(target), (name, report)
        assert device.worker_used.pack() == target
        assert device.worker_used.damage(sha256(target)) == []


def test_a_layer_is_copied_from_where_it_stands_in_another_stack(device: Device) -> None:
    tar = make_tar([directory("d"), file("d/one", b"1" * 1000), file("d/one", b"2" * 700), file("empty")])
    base = device.base([tar])

    report = device.patch(b"", "copy", base, sha256(tar))

    assert report["diff_id"] == sha256(tar)
    assert device.worker_used.pack() == tar
