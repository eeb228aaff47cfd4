"""Verb `makedelta`: librsync deltas of layers, as the layers of balena's delta images.

Arguments: {"base": [snapshot directories, lowest first], "layers": [{"source": snapshot directory, "directory": new}]}.
Each new directory becomes a layer whose tar has one entry: `delta`, mode 0600, owner 0:0, time 0. Nothing else of it is
made: the caller puts sidecars beside it. All is synced before the report: {"layers": [as of `unpack`, with the tar's
own digest and size], "target_bytes"} (the length of all sources' tars).

Lines `progress N`: N = 1000 * (the number of the step) + thousandths of it; step 0 reads the base, step n makes the
layer n - 1.
"""

from __future__ import annotations

import hashlib
import os
import resource
import zlib
from typing import Any

from balenapy.core import tarwriter
from balenapy.core.tarstream import REGULAR
from balenapy.errors import InvalidParameter, SystemFailure
from balenapy.linux import syscalls
from balenapy.worker import process
from balenapy.worker.layertar import UnpackedTar
from balenapy.worker.splitfile import SplitWriter
from delta.balena import WINDOW_BYTES, LayerDelta
from delta.base import TarBase
from delta.errors import DeltaError
from delta.match import BaseIndex

NAME = "delta"
MODE = 0o600
TELL_BYTES = 4 << 20
READ_BYTES = 256 << 10
MEMORY_TIMES = 64  # of a window: bsdiff takes sixteen times three of them, and the index of the base some


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    base, layers = arguments.get("base"), arguments.get("layers")
    if not isinstance(base, list) or not isinstance(layers, list) or not layers:
        raise InvalidParameter("makedelta: needs base and layers")
    made = [Made(str(layer["source"]), str(layer["directory"])) for layer in layers]
    tars = [Told(str(directory)) for directory in base]
    process.enter(os.path.join(str(layers[0]["directory"]), "diff"))
    os.umask(0)
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    window_bytes = min(WINDOW_BYTES, max(1 << 18, limit // MEMORY_TIMES))
    total = sum(tar.total for tar in tars)
    for tar in tars:
        tar.tell_up_to(total)
    try:
        index = BaseIndex(TarBase(tars))
        for tar in tars:
            tar.tell_up_to(0)
        tell(0, 1, 1)
        reports = [layer.make(index, number, window_bytes) for number, layer in enumerate(made, 1)]
    except DeltaError as error:
        raise SystemFailure(str(error)) from error
    syscalls.syncfs(made[0].directory)
    return {"layers": reports, "target_bytes": sum(layer.source.total for layer in made)}


def tell(step: int, done: int, total: int) -> None:
    process.write_all(1, b"progress %d\n" % (1000 * step + min(999, 999 * done // max(1, total))))


class Told(UnpackedTar):
    """A layer of the base, whose reading is told."""

    _read = _told = _total_bytes = 0

    def tell_up_to(self, total_bytes: int) -> None:
        Told._total_bytes = total_bytes

    def pread(self, offset: int, length: int) -> bytes:
        data = super().pread(offset, length)
        Told._read += len(data)
        if Told._total_bytes and Told._read - Told._told >= TELL_BYTES:
            Told._told = Told._read
            tell(0, Told._read, Told._total_bytes)
        return data


class Made:
    """One layer of the delta image. Its files are opened before the process is confined."""

    def __init__(self, source: str, directory: str) -> None:
        self.source = UnpackedTar(source)
        self.directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        path = os.path.join(directory, "diff", NAME)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        self._split = SplitWriter(directory)
        self._size = 0

    def make(self, index: BaseIndex, step: int, window_bytes: int) -> dict[str, Any]:
        """Write the delta and what else is needed to give back the layer's tar."""
        told = 0

        def progress(done: int) -> None:
            nonlocal told
            if done - told >= TELL_BYTES:
                told = done
                tell(step, done, self.source.total)

        LayerDelta(index, self.source, self._write, window_bytes).make(progress)
        tell(step, 1, 1)
        os.fchmod(self._fd, MODE)
        os.utime(self._fd, (0, 0))
        return self._report()

    def _write(self, data: bytes) -> None:
        process.write_all(self._fd, data)
        self._size += len(data)

    def _report(self) -> dict[str, Any]:
        header = tarwriter.encode_header(NAME.encode(), REGULAR, size=self._size, mode=MODE, uid=0, gid=0, mtime_s=0)
        rest = tarwriter.padding(self._size) + tarwriter.END
        digest = hashlib.sha256(header)
        crc = position = 0
        while data := os.pread(self._fd, READ_BYTES, position):
            digest.update(data)
            crc = zlib.crc32(data, crc)
            position += len(data)
        digest.update(rest)
        self._split.segment(header)
        self._split.file(self._size, crc, NAME.encode())
        self._split.segment(rest)
        self._split.close()
        name = f"sha256:{digest.hexdigest()}"
        return {
            "digest": name,
            "size": len(header) + self._size + len(rest),
            "diff_id": name,
            "size_bytes": self._size,
            "disk_bytes": self._size + -self._size % 4096,
            "entries": 1,
        }
