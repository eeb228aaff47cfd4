"""Verb `pack`: files become the tar of a layer.

Arguments:
    directory  the snapshot directory; its `diff/` is read, and we are chrooted there
    fresh      false: the exact tar that was unpacked, from `tar-split.zst`
               true: a new tar of what is there, sorted and repeatable, overlay marks written as whiteouts; its
               `tar-split.zst` is made in the same pass, so that the directory can become a layer
    epoch      seconds; of a fresh tar: nothing in it, and nothing of what is there, is younger (optional)
    root       instead of `directory`: a new tar of this directory itself, without a tar-split
    size_first the output begins with the length of the tar, eight bytes big-endian; of exact tars only
    progress   lines `progress BYTES` on stdout, of the tar, before the report
    diff_id    what must come out (optional); DataLoss if it does not
    output     descriptor for the tar (optional); "compression": "none" (default) or "gzip"

Report: {"diff_id", "tar_size" (bytes), "digest", "size" (of what went to output), "size_bytes" (as `unpack` counts; for
an exact tar only when there is no output), "entries"}, and of a fresh one "disk_bytes".

A file that changes while it is read: its entry has the size that it had at first, cut or filled with zeros.

Source of what a fresh tar holds: moby pkg/archive (TarWithOptions, overlayWhiteoutConverter.ConvertWrite): times in
whole seconds, no names of owners, xattrs security.capability (and user.*, which dockerd drops), no sockets.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import zlib
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

from balenapy.core import tarsplit, tarwriter
from balenapy.core.tarsplit import File
from balenapy.core.tarstream import BLOCK_DEVICE, CHAR, DIRECTORY, FIFO, LINK, REGULAR, SYMLINK
from balenapy.errors import DataLoss, InvalidParameter, Unsupported
from balenapy.linux import syscalls
from balenapy.worker import process
from balenapy.worker.extract import OVERLAY_OPAQUE, WHITEOUT, WHITEOUT_OPAQUE
from balenapy.worker.splitfile import NAME, SplitWriter, read_records

READ_BYTES = 256 << 10
PIECES_AHEAD = 16
GZIP_LEVEL = 6  # Go's default: what dockerd pushes
_WINDOW_BITS = {"none": 0, "gzip": 31, "deflate": -15}  # of zlib: the largest window; gzip's header, or none
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_REDIRECTS = frozenset(("trusted.overlay.redirect", "trusted.overlay.metacopy"))


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """See the module."""
    root = arguments.get("root")
    directory = arguments.get("directory") if root is None else root
    if not isinstance(directory, str) or not directory.startswith("/"):
        raise InvalidParameter("pack: `directory` must be an absolute path")
    fresh = bool(arguments.get("fresh"))
    output, tell = arguments.get("output"), bool(arguments.get("progress"))
    sink = Sink(output, str(arguments.get("compression", "none")), tell=tell)
    report: dict[str, Any] = {}
    if root is not None or fresh:
        split = SplitWriter(directory) if root is None else None
        process.enter(os.path.join(directory, "diff") if root is None else directory)
        sink.start()
        packer = Packer(sink, split, epoch_s=arguments.get("epoch"))
        packer.run()
        if split is not None:
            split.close()
        report |= {
            "size_bytes": packer.size_bytes,
            "disk_bytes": packer.disk_bytes,
            "entries": packer.entries,
        }
    else:
        records = os.open(os.path.join(directory, NAME), os.O_RDONLY | os.O_CLOEXEC)
        if arguments.get("size_first") and isinstance(output, int):
            lengths = os.open(os.path.join(directory, NAME), os.O_RDONLY | os.O_CLOEXEC)
            process.write_all(output, tarsplit.tar_length(read_records(lengths)).to_bytes(8, "big"))
        contents = Contents(os.path.join(directory, "displaced"))
        process.enter(os.path.join(directory, "diff"))
        sink.start()
        for piece in tarsplit.join(read_records(records), contents.open):
            sink.put(piece)
        report["entries"] = contents.files
        if output is None:  # a check of the layer, not a transport
            report["size_bytes"] = _tree_size()
    sink.close()
    report |= {
        "diff_id": f"sha256:{sink.tar_hash.hexdigest()}",
        "tar_size": sink.tar_size,
        "digest": f"sha256:{sink.hash.hexdigest()}",
        "size": sink.size,
    }
    expected = arguments.get("diff_id")
    if expected is not None and expected != report["diff_id"]:
        raise DataLoss(f"layer {expected} cannot be rebuilt: its files give {report['diff_id']}")
    if fresh and root is None:
        syscalls.syncfs(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
    return report


class Sink:
    """Takes the tar; hashes it, and in a thread of its own compresses, hashes and writes that."""

    def __init__(self, output: object, compression: str, *, tell: bool = False) -> None:
        if compression not in _WINDOW_BITS:
            raise InvalidParameter(f"pack: unknown compression {compression!r}")
        if output is not None and not isinstance(output, int):
            raise InvalidParameter("pack: `output` must be a descriptor")
        self.tar_hash = hashlib.sha256()
        self.tar_size = 0
        self._tell = tell
        self._output = output
        bits = _WINDOW_BITS[compression]
        self._gzip = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, bits) if bits else None
        self._own_hash = hashlib.sha256()
        self._own_size = 0
        self._ahead: SimpleQueue[bytes | memoryview | None] = SimpleQueue()
        self._room = threading.Semaphore(PIECES_AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._batch: list[bytes | memoryview] = []
        self._batch_size = 0

    @property
    def hash(self) -> Any:
        """Of what went out: the same as the tar's when it is not compressed."""
        return self._own_hash if self._gzip is not None else self.tar_hash

    @property
    def size(self) -> int:
        return self._own_size if self._gzip is not None else self.tar_size

    def start(self) -> None:
        self._thread.start()

    def put(self, piece: bytes | memoryview) -> None:
        """Take the next piece; small ones are gathered."""
        self._batch.append(piece)
        self._batch_size += len(piece)
        if self._batch_size >= READ_BYTES:
            self._flush()

    def close(self) -> None:
        """All is written when this returns. Raises what writing raised."""
        self._flush()
        self._ahead.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _flush(self) -> None:
        if self._error is not None:
            raise self._error
        data = b"".join(self._batch)
        self._batch.clear()
        self._batch_size = 0
        self.tar_hash.update(data)
        self.tar_size += len(data)
        if self._tell:
            process.write_all(1, b"progress %d\n" % self.tar_size)
        if self._output is not None or self._gzip is not None:
            self._room.acquire()
            self._ahead.put(data)

    def _pump(self) -> None:
        while (data := self._ahead.get()) is not None:
            if self._error is None:
                try:
                    self._write(data if self._gzip is None else self._gzip.compress(data))
                except BaseException as error:
                    self._error = error
            self._room.release()
        if self._gzip is not None and self._error is None:
            try:
                self._write(self._gzip.flush())
            except BaseException as error:
                self._error = error

    def _write(self, data: bytes | memoryview) -> None:
        if self._gzip is not None:
            self._own_hash.update(data)
            self._own_size += len(data)
        if self._output is not None:
            process.write_all(self._output, data)


class Contents:
    """Where the contents of a tar-split's files are: among the displaced, or at their path."""

    def __init__(self, displaced: str) -> None:
        self.files = 0
        self._displaced: frozenset[str] = frozenset()
        self._displaced_fd = -1
        try:
            self._displaced_fd = os.open(displaced, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        else:
            self._displaced = frozenset(os.listdir(self._displaced_fd))

    def open(self, file: File) -> Iterator[bytes]:
        """Give the pieces. Raises: DataLoss, when there is no such file any more."""
        self.files += 1
        name = tarsplit.displaced_name(file.size, file.crc)
        try:
            if name in self._displaced:
                fd = os.open(name, _READ, dir_fd=self._displaced_fd)
            else:
                fd = os.open(file.path, _READ)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise process.failed("open", file.path, error) from error
            raise DataLoss(f"{process.show(file.path)} is gone: the layer's tar cannot be rebuilt") from error
        try:
            while piece := os.read(fd, READ_BYTES):
                yield piece
        except OSError as error:
            raise process.failed("read", file.path, error) from error
        finally:
            os.close(fd)


class Packer:
    """Writes a new tar of everything below the root, and its tar-split if there is to be one.

    Args:
        start: what to pack: the content of the root, or one path below it.
        layer: it is the directory of a layer, where some files mean something to overlayfs.
        epoch_s: nothing is younger than this.
    """

    def __init__(
        self,
        sink: Sink,
        split: SplitWriter | None,
        *,
        start: bytes | None = None,
        layer: bool = True,
        epoch_s: int | None = None,
    ) -> None:
        self.entries = 0
        self.size_bytes = 0
        self.disk_bytes = 0  # about what it takes, as `unpack` counts
        self._epoch_s = epoch_s
        self._block = os.statvfs("/").f_frsize
        self._sink = sink
        self._split = split
        self._start = start
        self._layer = layer
        self._links: dict[tuple[int, int], bytes] = {}

    def run(self) -> None:
        """Raises: SystemFailure, Unsupported."""
        pending = [self._start or b""]
        while pending:
            path = pending.pop()
            if path or self._start is not None:
                try:
                    is_directory = self._add(path)
                except FileNotFoundError:
                    continue  # removed meanwhile
                except OSError as error:
                    raise process.failed("pack", path, error) from error
                if not is_directory:
                    continue
            # Sorted, and a directory's content right after it: pushed in reverse, since the last comes first.
            try:
                names = sorted(map(os.fsencode, os.listdir(b"/" + path)), reverse=True)
            except OSError as error:
                raise process.failed("pack", path, error) from error
            pending += [path + b"/" + name if path else name for name in names]
        self._emit(tarwriter.END)

    def _add(self, path: bytes) -> bool:
        """Write the entry of one path; True for a directory."""
        where = path or b"/"
        status = os.lstat(where)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFSOCK:
            return False
        if self._epoch_s is not None and status.st_mtime_ns > self._epoch_s * 1_000_000_000:
            os.utime(where, (self._epoch_s, self._epoch_s), follow_symlinks=False)
            status = os.lstat(where)
        if self._layer and kind == stat.S_IFCHR and status.st_rdev == 0:
            parent, slash, base = path.rpartition(b"/")
            self._header(parent + slash + WHITEOUT + base, REGULAR, status, mode=0o600, xattrs={})
            return False
        xattrs, opaque = _xattrs(where, layer=self._layer)
        if kind == stat.S_IFDIR:
            self._header(path, DIRECTORY, status, xattrs=xattrs)
            self.disk_bytes += self._block
            if opaque:
                self._header(path + b"/" + WHITEOUT_OPAQUE, REGULAR, status, mode=0o600, xattrs={})
            return True
        if status.st_nlink > 1:
            first = self._links.setdefault((status.st_dev, status.st_ino), path)
            if first is not path:
                self._header(path, LINK, status, link=self._name(first), xattrs=xattrs)
                return False
        if kind == stat.S_IFREG:
            self._file(path, xattrs)
        elif kind == stat.S_IFLNK:
            target = os.readlink(path)
            self._header(path, SYMLINK, status, link=target, xattrs=xattrs)
            self.size_bytes += len(target)
        else:
            types = {stat.S_IFCHR: CHAR, stat.S_IFBLK: BLOCK_DEVICE, stat.S_IFIFO: FIFO}
            self._header(path, types[kind], status, xattrs=xattrs)
        return False

    def _file(self, path: bytes, xattrs: dict[bytes, bytes]) -> None:
        fd = os.open(path, _READ)
        try:
            status = os.fstat(fd)
            size = status.st_size
            self._header(path, REGULAR, status, size=size, xattrs=xattrs)
            crc = 0
            left = size
            while left:
                piece = os.read(fd, min(left, READ_BYTES))
                if not piece:
                    piece = bytes(min(left, READ_BYTES))
                crc = zlib.crc32(piece, crc)
                left -= len(piece)
                self._sink.put(piece)
        finally:
            os.close(fd)
        if size:
            if self._split is not None:
                self._split.file(size, crc, path)
            self.size_bytes += size
            self.disk_bytes += size + -size % self._block
            pad = tarwriter.padding(size)
            if pad:
                self._emit(pad)

    def _name(self, path: bytes) -> bytes:
        """What an entry is called in the tar."""
        return path

    def _header(
        self,
        path: bytes,
        kind: bytes,
        status: os.stat_result,
        *,
        xattrs: dict[bytes, bytes],
        size: int = 0,
        mode: int | None = None,
        link: bytes = b"",
    ) -> None:
        device = kind in (CHAR, BLOCK_DEVICE)
        self.entries += 1
        self._emit(
            tarwriter.encode_header(
                self._name(path),
                kind,
                size=size,
                mode=status.st_mode if mode is None else mode,  # with its type, as Go writes it
                uid=status.st_uid,
                gid=status.st_gid,
                mtime_s=status.st_mtime_ns // 1_000_000_000,
                link=link,
                major=os.major(status.st_rdev) if device else 0,
                minor=os.minor(status.st_rdev) if device else 0,
                xattrs=xattrs,
            )
        )

    def _emit(self, raw: bytes) -> None:
        if self._split is not None:
            self._split.segment(raw)
        self._sink.put(raw)


def _tree_size() -> int:
    """What `unpack` reported as size_bytes: contents and link targets, hard links once."""
    total = 0
    seen: set[int] = set()
    pending = ["/"]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
                    status = entry.stat(follow_symlinks=False)
                    if status.st_nlink == 1 or status.st_ino not in seen:
                        total += status.st_size
                    if status.st_nlink > 1:
                        seen.add(status.st_ino)
    return total


def _xattrs(path: bytes, *, layer: bool = True) -> tuple[dict[bytes, bytes], bool]:
    """(xattrs for the tar, whether overlayfs calls it opaque; only a layer's).

    Raises: Unsupported, when overlayfs keeps the content of this path somewhere else.
    """
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}, False
        raise
    found: dict[bytes, bytes] = {}
    opaque = False
    for name in names:
        if name == "security.capability" or (name.startswith("user.") and not name.startswith("user.overlay.")):
            found[os.fsencode(name)] = os.getxattr(path, name, follow_symlinks=False)
        elif not layer:
            continue
        elif name == OVERLAY_OPAQUE.decode():
            opaque = os.getxattr(path, name, follow_symlinks=False) == b"y"
        elif name in _REDIRECTS:
            raise Unsupported(f"/{process.show(path)} has {name}: mount overlays with redirect_dir=off,metacopy=off")
    return found, opaque
