"""`balenapy cp` does with files what docker's client does."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from balenapy.cli.client import ClientError
from balenapy.cli.copy import _extract, _place, _split
from tests.engine_process import DOCKER, EngineProcess


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("box:/etc", ("box", "/etc")), ("box:etc", ("box", "etc")), ("box:", ("box", "/")), ("/a:b", ("", "/a:b")),
        ("./a:b", ("", "./a:b")), ("a", ("", "a")), ("-", ("", "-")),
    ],
)  # fmt: skip
def test_containers_are_told_from_paths(text: str, expected: tuple[str, str]) -> None:
    assert _split(text) == expected


def test_members_that_would_leave_the_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / "link").symlink_to(tmp_path)
    member = tarfile.TarInfo("root/link/file")
    with tarfile.open(fileobj=io.BytesIO(), mode="w") as archive, pytest.raises(ClientError, match="outside"):
        _extract(archive, member, "root", str(tmp_path / "into"), "")


@pytest.mark.parametrize(
    ("target", "there", "directory", "source_directory"), [("/f", True, False, True), ("/new/", False, False, False)]
)
def test_places_that_do_not_fit_are_refused(target: str, there: bool, directory: bool, source_directory: bool) -> None:
    with pytest.raises(ClientError):
        _place(target, there=there, directory=directory, source="s", source_directory=source_directory)


CLIENTS = {"balenapy": [sys.executable, "-m", "balenapy.cli.main"], "docker": [DOCKER or "docker"]}


def snapshot(directory: Path) -> dict[str, tuple[int, str]]:
    """Every path with its mode and its content."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        text = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""
        found[str(path.relative_to(directory))] = (stat.S_IMODE(status.st_mode) if not path.is_symlink() else 0, text)
    return found


@pytest.mark.root
def test_copies_are_those_of_docker(engine: EngineProcess, busybox: str, tmp_path: Path) -> None:
    if DOCKER is None:
        pytest.skip("no docker CLI on this machine")
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_text("text")
    (source / "deep" / "file").chmod(0o640)
    (source / "link").symlink_to("deep/file")
    results = {}
    for client, command in CLIENTS.items():
        body = {"Image": busybox, "Cmd": ["true"]}
        box = engine.request("POST", "/v1.39/containers/create", body).json["Id"]
        out = tmp_path / client
        (out / "there").mkdir(parents=True)

        def cp(*arguments: str, data: bytes | None = None, command: list[str] = command) -> tuple[int, bytes]:
            done = subprocess.run(
                [*command, "cp", *arguments], input=data, capture_output=True, env=engine.environment, check=False,
                cwd=Path(__file__).parent.parent.parent, timeout=120,
            )  # fmt: skip
            return done.returncode, done.stdout

        codes = [
            cp(str(source), f"{box}:/tmp")[0],  # into a directory
            cp(str(source), f"{box}:/tmp/new")[0],  # under a new name
            cp(f"{source}/.", f"{box}:/var")[0],  # its content
            cp(f"{source}/deep/file", f"{box}:/tmp/one")[0],
            cp(str(source), f"{box}:/tmp/one")[0],  # over a file
            cp(f"{source}/deep/file", f"{box}:/tmp/missing/")[0],
            cp(f"{box}:/tmp/.", str(out / "there"))[0],
            cp(f"{box}:/tmp/source", str(out / "renamed"))[0],
            cp(f"{box}:/tmp/source", str(out))[0],
            cp(f"{box}:/var/link", str(out / "link"))[0],
            cp("-L", f"{box}:/var/link", str(out / "followed"))[0],
            cp(f"{box}:/nope", str(out))[0],
            cp(str(source), str(out))[0],
        ]
        code, data = cp(f"{box}:/tmp/new", "-")
        codes += [code, cp("-", f"{box}:/home", data=data)[0], cp(f"{box}:/home/new/deep/file", str(out / "again"))[0]]
        results[client] = ([int(code != 0) for code in codes], snapshot(out))

    assert results["balenapy"][1]["renamed/deep/file"] == (0o640, "text")
    assert results["balenapy"] == results["docker"]
