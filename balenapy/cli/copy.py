"""`cp`: files into and out of a container, with docker's rules for what a path at either end means.

The rules are `cp -r`'s: into a directory that exists goes the source under its own name, or with `/.` at its end what
is in it; a name that does not exist yet is what the source will be called; a file is replaced by a file only.
Source: moby pkg/archive/copy.go (CopyInfo, PrepareArchiveCopy), docker/cli cli/command/container/cp.go.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import posixpath
import sys
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from balenapy.cli.client import Client, ClientError, EngineAnswer

if TYPE_CHECKING:
    import tarfile

READ_BYTES = 64 << 10
STAT = "x-docker-container-path-stat"
GO_DIRECTORY, GO_LINK = 1 << 31, 1 << 27


def add_verbs(verbs: Any) -> None:
    cp = verbs.add_parser("cp", help="copy files into and out of a container")
    cp.add_argument("-a", "--archive", action="store_true", help="what is copied in belongs to the container's user")
    cp.add_argument("-L", "--follow-link", action="store_true", help="copy what a link at the source leads to")
    cp.add_argument("source", help="CONTAINER:PATH, PATH, or - for a tar on stdin")
    cp.add_argument("destination", help="CONTAINER:PATH, PATH, or - for a tar on stdout")
    cp.set_defaults(run=run_cp)


def run_cp(client: Client, options: argparse.Namespace) -> int:
    source, path = _split(options.source)
    destination, target = _split(options.destination)
    if source and destination:
        raise ClientError("copying between containers is not supported")
    if source:
        return _copy_out(client, source, path, target, follow=options.follow_link)
    if destination:
        return _copy_in(client, path, destination, target, options)
    raise ClientError("must specify at least one container source")


def _split(text: str) -> tuple[str, str]:
    """(container, path); a path with a colon is told from it by a slash or a dot at its beginning."""
    container, colon, path = text.partition(":")
    if text.startswith(("/", ".")) or not colon or text == "-":
        return "", text
    return container, path or "/"


def _stat(client: Client, container: str, path: str) -> dict[str, Any] | None:
    """None: there is nothing. Raises: ClientError."""
    try:
        response = client.request("HEAD", f"/containers/{container}/archive", {"path": path})
    except EngineAnswer as error:
        if error.status != 404:
            raise
        client.call("GET", f"/containers/{container}/json")  # says so if it is the container that is missing
        return None
    return _decode(response.headers[STAT])


def _decode(header: str) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(base64.b64decode(header)))


def _place(target: str, *, there: bool, directory: bool, source: str, source_directory: bool) -> tuple[str, str]:
    """(directory to put it into, name it gets there; "" for what is in it). Raises: ClientError."""
    if there and directory:
        return target, "" if source.endswith("/.") or source == "." else os.path.basename(source.rstrip("/"))
    if source_directory and there:
        raise ClientError(f"cannot copy directory to {target}: not a directory")
    if not source_directory and target.endswith("/"):
        raise ClientError(f"no such directory: {target}")
    parent, _, name = target.rstrip("/").rpartition("/")
    return parent or ("/" if target.startswith("/") else "."), name


# --- out --------------------------------------------------------------------------------------------------------


def _copy_out(client: Client, container: str, path: str, target: str, *, follow: bool) -> int:
    import tarfile  # by need: it doubles the time that the client takes to start

    if follow and target != "-":
        told = _stat(client, container, path)
        if told is not None and told["linkTarget"]:
            path = told["linkTarget"]
    response = client.request("GET", f"/containers/{container}/archive", {"path": path})
    if target == "-":
        for piece in response.chunks():
            sys.stdout.buffer.write(piece)
        return 0
    told = _decode(response.headers[STAT])
    directory, name = _place(
        target,
        there=os.path.exists(target),
        directory=os.path.isdir(target),
        source=path,
        source_directory=bool(told["mode"] & GO_DIRECTORY),
    )
    root = "" if told["name"] == "/" else told["name"]
    with tarfile.open(fileobj=cast(IO[bytes], _Reader(response.chunks())), mode="r|") as archive:
        for member in archive:
            _extract(archive, member, root, directory, name)
    return 0


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, root: str, directory: str, name: str) -> None:
    """One member, below `directory` under its new name, and nowhere else. Raises: ClientError."""

    def rename(old: str) -> str:
        return posixpath.join(name, old.removeprefix(root).lstrip("/")).strip("/")

    member.name = rename(member.name)
    if member.islnk():
        member.linkname = rename(member.linkname)
    if not member.name:
        return  # the directory that is there already
    base = os.path.realpath(directory)
    parent = os.path.realpath(os.path.join(directory, os.path.dirname(member.name)))
    if parent != base and not parent.startswith(base.rstrip("/") + "/"):
        raise ClientError(f"{member.name!r} would be put outside of {directory}")
    place = os.path.join(directory, member.name)
    if os.path.lexists(place) and not (member.isdir() and os.path.isdir(place)):
        os.unlink(place)
    try:
        # Names and links are checked above; modes and owners are to stay as they are.
        archive.extract(member, directory, numeric_owner=True, filter="fully_trusted")
    except OSError as error:
        raise ClientError(f"{place}: {error.strerror or error}") from error


class _Reader:
    """The pieces of an answer as a file that tarfile reads."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (piece := next(self._pieces, b"")):
            self._rest += piece
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


# --- in ---------------------------------------------------------------------------------------------------------


def _copy_in(client: Client, path: str, container: str, target: str, options: argparse.Namespace) -> int:
    import tarfile

    query = {"noOverwriteDirNonDir": True, "copyUIDGID": options.archive}
    if path == "-":

        def write(put: Callable[[bytes], None]) -> None:
            while data := sys.stdin.buffer.read(READ_BYTES):
                put(data)

        client.upload("PUT", f"/containers/{container}/archive", {"path": target, **query}, write)
        return 0
    if not os.path.lexists(path):
        raise ClientError(f"lstat {path}: no such file or directory")
    if options.follow_link and not path.endswith("/."):
        path = os.path.realpath(path)
    told = _stat(client, container, target)
    if told is not None and told["mode"] & GO_LINK:
        target = told["linkTarget"]
        told = _stat(client, container, target)
    directory, name = _place(
        target,
        there=told is not None,
        directory=told is not None and bool(told["mode"] & GO_DIRECTORY),
        source=path if os.path.basename(path) not in ("", "..") else os.path.realpath(path),
        source_directory=os.path.isdir(path) and not os.path.islink(path.rstrip("/")),
    )

    def write_tree(put: Callable[[bytes], None]) -> None:
        with tarfile.open(fileobj=cast(IO[bytes], _Writer(put)), mode="w|", format=tarfile.PAX_FORMAT) as archive:
            archive.add(path, name or ".")

    client.upload("PUT", f"/containers/{container}/archive", {"path": directory, **query}, write_tree)
    return 0


class _Writer:
    """A file for tarfile that sends what is written."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put

    def write(self, data: bytes) -> int:
        self._put(data)
        return len(data)
