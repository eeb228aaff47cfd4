"""Files into and out of containers: what `docker cp` does, and what hostile archives and links try."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import socket
import tarfile
import threading
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from balenapy.api.routes.archive import choose_coding, stat_header
from balenapy.core.containerpath import PathStat
from tests.compat import shapes
from tests.engine_process import EngineProcess, Response, wait_until

pytestmark = pytest.mark.root

FILE, DIRECTORY, SYMLINK, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
STAT = "x-docker-container-path-stat"
ARCHIVE = "/containers/{id}/archive"


def make_tar(*members: tuple[str, bytes, str], uid: int = 0, gid: int = 0, mtime: int = 1_700_000_000) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.uid, info.gid, info.mtime = kind, uid, gid, mtime
            info.mode = 0o755 if kind == DIRECTORY else 0o640
            data = content.encode() if kind == FILE else b""
            info.size = len(data)
            if kind in (SYMLINK, LINK):
                info.linkname = content
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member for member in archive}


def content(data: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        file = archive.extractfile(name)
        assert file is not None
        return file.read()


class Files:
    """The archive calls of one container, each answer held against the description."""

    def __init__(self, engine: EngineProcess, container: str) -> None:
        self.engine = engine
        self.container = container

    def call(self, method: str, path: str, body: Any = None, extra: str = "", **headers: str) -> Response:
        target = f"/v1.39/containers/{self.container}/archive?path={urllib.parse.quote(path, safe='')}{extra}"
        answer = self.engine.request(method, target, body, headers=headers)
        if not self.engine.is_reference:
            assert shapes.problems(method, ARCHIVE, answer) == []
        return answer

    def stat(self, path: str) -> dict[str, Any]:
        answer = self.call("HEAD", path)
        assert answer.status == 200, path
        told: dict[str, Any] = json.loads(base64.b64decode(answer.headers[STAT]))
        return told

    def get(self, path: str) -> bytes:
        answer = self.call("GET", path)
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"] == "application/x-tar"
        return answer.body

    def put(self, path: str, data: bytes, extra: str = "") -> None:
        answer = self.call("PUT", path, data, extra)
        assert (answer.status, answer.body) == (200, b"")

    def refused(self, method: str, path: str, body: Any = None, extra: str = "") -> tuple[int, str]:
        answer = self.call(method, path, body, extra)
        return answer.status, answer.message


def create(engine: EngineProcess, image: str, *, start: bool = False, host: Any = None, **config: Any) -> Files:
    body = {"Image": image, "Cmd": ["sleep", "1000"], "HostConfig": {"NetworkMode": "none"} | (host or {}), **config}
    answer = engine.request("POST", "/v1.39/containers/create", body)
    assert answer.status == 201, answer.body
    if start:
        assert engine.request("POST", f"/v1.39/containers/{answer.json['Id']}/start").status == 204
    return Files(engine, answer.json["Id"])


@pytest.fixture(params=["created", "running"])
def files(engine: EngineProcess, busybox: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Files]:
    """A container with a bind, a read-only bind and a volume."""
    bind = tmp_path / "bind"
    (bind / "sub").mkdir(parents=True)
    (bind / "file").write_text("bound")
    host = {"Binds": [f"{bind}:/b", f"{bind}:/ro:ro", "archive-test:/v"]}
    found = create(engine, busybox, start=request.param == "running", host=host)
    yield found
    engine.request("DELETE", f"/v1.39/containers/{found.container}?force=1")
    engine.request("DELETE", "/v1.39/volumes/archive-test")


TREE = make_tar(
    ("d", DIRECTORY, ""),
    ("d/x", FILE, "content of x"),
    ("lnk", SYMLINK, "/etc/passwd"),
    ("dang", SYMLINK, "/nowhere"),
    ("dl", SYMLINK, "d"),
    ("up", SYMLINK, "../../../../etc"),
    ("two", SYMLINK, "lnk"),
    ("h", LINK, "d/x"),
)


def test_what_was_put_in_comes_out_and_is_told(files: Files) -> None:
    files.put("/", TREE)

    assert shapes.differences(files.stat("/etc/passwd"), shapes.recorded("archive_stat.json")[0]["stat"]) == []
    told = {path: files.stat(path) for path in ("/d", "/d/.", "/", "/dl/", "/up/passwd", "/b/file", "/v")}
    assert {path: stat["name"] for path, stat in told.items()} == {
        "/d": "d", "/d/.": ".", "/": "/", "/dl/": "dl", "/up/passwd": "passwd", "/b/file": "file", "/v": "v",
    }  # fmt: skip
    assert {told[path]["mode"] for path in ("/d", "/d/.", "/dl/")} == {1 << 31 | 0o755}
    assert told["/d"]["mtime"] == "2023-11-14T22:13:20Z"
    assert told["/b/file"]["size"] == 5
    assert {path: files.stat(path)["linkTarget"] for path in ("/lnk", "/dang", "/dl", "/up", "/two", "/d")} == {
        "/lnk": "/etc/passwd", "/dang": "/nowhere", "/dl": "/d", "/up": "/etc", "/two": "/etc/passwd", "/d": "",
    }  # fmt: skip
    assert files.stat("/lnk")["mode"] == 134218239
    assert list(members(files.get("/d"))) == ["d", "d/x"]
    assert list(members(files.get("/d/."))) == [".", "./x"]
    assert list(members(files.get("/dl/"))) == ["dl", "dl/x"]
    assert content(files.get("/h"), "h") == b"content of x"
    link = members(files.get("/lnk"))["lnk"]
    assert (link.type, link.linkname) == (SYMLINK, "/etc/passwd")
    whole = members(files.get("/"))
    assert {"", "/bin", "/d/x", "/b/file", "/ro/file", "/v"} <= set(whole)
    assert whole["/h"].type != whole["/d/x"].type  # one of them is a link to the other
    assert not [name for name in whole if name.startswith(("/proc/", "/sys/"))]


def test_paths_that_are_wrong_are_refused_by_name(files: Files) -> None:
    files.put("/", TREE)
    not_found = f"Could not find the file {{}} in container {files.container}"

    for path in ("/nope", "/dang/", "/d/nope/x"):
        assert files.refused("GET", path) == (404, not_found.format(path))
    assert files.call("HEAD", "/nope").status == 404
    for path in ("/etc/passwd/", "/lnk/.", "/d/x/y"):
        status, message = files.refused("GET", path)
        assert (status, message.endswith(": not a directory")) == (500, True), message
    assert files.call("HEAD", "/lnk/").status == 500
    assert files.refused("GET", "") == (400, "bad parameter: pathcannot be empty")
    assert files.refused("PUT", "", TREE) == (400, "bad parameter: pathcannot be empty")
    assert files.call("HEAD", "").status == 400
    for path in ("/lnk", "/h/"):
        assert files.refused("PUT", path, TREE) == (500, "extraction point is not a directory")
    for path in ("/nope", "/dang"):
        assert files.refused("PUT", path, TREE) == (404, not_found.format(path))
    assert files.refused("PUT", "/ro/sub", TREE) == (500, "mounted volume is marked read-only")


def test_volumes_and_binds_are_written_through_links_too(files: Files, tmp_path: Path) -> None:
    files.put("/", make_tar(("into", SYMLINK, "../../b/sub")))
    files.put("/into", make_tar(("n", FILE, "new")))
    files.put("/v", make_tar(("n", FILE, "new")))

    assert (tmp_path / "bind" / "sub" / "n").read_text() == "new"
    assert content(files.get("/v/n"), "n") == b"new"
    assert not Path("/n").exists()


@pytest.mark.parametrize("state", ["pause", "kill"])
def test_paused_and_exited_containers_too(engine: EngineProcess, busybox: str, state: str) -> None:
    files = create(engine, busybox, start=True)
    assert engine.request("POST", f"/v1.39/containers/{files.container}/{state}").status == 204

    files.put("/", TREE)

    assert content(files.get("/d/x"), "x") == b"content of x"


@pytest.mark.parametrize("recorded", shapes.recorded("archive_stat.json"), ids=lambda entry: entry["path"].split()[0])
def test_the_header_has_the_recorded_form(recorded: dict[str, Any]) -> None:
    told = recorded["stat"]
    ours = PathStat(told["name"], told["size"], told["mode"], 1_795_425_994_158_953_788, told["linkTarget"])

    decoded = base64.b64decode(stat_header(ours))

    assert decoded.startswith(b'{"name":')
    assert json.loads(decoded) == told | {"mtime": "2026-11-23T09:26:34.158953788Z"}
    assert json.loads(base64.b64decode(stat_header(ours._replace(mtime_ns=0))))["mtime"] == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("extra", "archive", "message"),
    [
        ("&noOverwriteDirNonDir=1", make_tar(("d/x", DIRECTORY, "")), 'non-directory "/d/x" with directory "/"'),
        ("&noOverwriteDirNonDir=true", make_tar(("d", FILE, "x")), 'directory "/d" with non-directory "/"'),
        ("", make_tar(("../../evil", FILE, "evil")), "is outside of"),
        ("", make_tar(("hl", LINK, "../../etc/passwd")), "is outside of"),
        ("", make_tar(("hl", LINK, "nothing")), "no such file or directory"),
        ("", TREE[:700], "unexpected EOF"),
        ("", b"garbage" * 300, "invalid tar header"),
        ("", gzip.compress(TREE)[:200], "unexpected EOF"),
    ],
    ids=["directory-file", "file-directory", "climbs", "link-climbs", "link-to-nothing", "cut", "no-tar", "cut-gzip"],
)
def test_bad_archives_are_refused_with_their_reason(
    engine: EngineProcess, busybox: str, extra: str, archive: bytes, message: str
) -> None:
    files = create(engine, busybox)
    files.put("/", TREE)

    status, text = files.refused("PUT", "/", archive, extra)

    if engine.is_reference and message == "is outside of":
        message = "is outside of" if "evil" in text else "invalid hardlink"
    assert status == 500
    assert message in text
    assert content(files.get("/d/x"), "x") == b"content of x"


def test_types_are_replaced_unless_that_is_refused(engine: EngineProcess, busybox: str) -> None:
    files = create(engine, busybox, start=True)
    files.put("/", TREE)

    files.put("/", make_tar(("d", FILE, "a file now"), ("etc/group", DIRECTORY, ""), ("etc/group/x", FILE, "")))
    files.put("/", b"")
    files.put("/", make_tar(("lib", FILE, "over a directory of the image")))

    assert content(files.get("/d"), "d") == b"a file now"
    assert list(members(files.get("/etc/group"))) == ["group", "group/x"]


@pytest.mark.parametrize("compress", ["gzip", "bz2", "xz", "zstd"])
def test_compressed_archives_are_taken(engine: EngineProcess, busybox: str, compress: str) -> None:
    if compress == "zstd" and engine.is_reference:
        pytest.skip("dockerd 20.10 knows no zstd")
    import bz2
    import lzma

    import zstandard

    packers = {
        "gzip": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zstd": zstandard.ZstdCompressor().compress,
    }
    files = create(engine, busybox)

    files.put("/tmp", packers[compress](TREE))

    assert content(files.get("/tmp/d/x"), "x") == b"content of x"


def test_owners_are_the_archives_or_the_containers_user(engine: EngineProcess, busybox: str) -> None:
    files = create(engine, busybox, User="nobody")
    theirs = make_tar(("a", FILE, "x"), ("s", SYMLINK, "a"), ("e", DIRECTORY, ""), uid=1234, gid=4321)

    files.put("/tmp", theirs)
    kept = members(files.get("/tmp/."))
    files.put("/tmp", theirs, "&copyUIDGID=1")
    given = members(files.get("/tmp/."))

    for name in ("./a", "./s", "./e"):
        assert (kept[name].uid, kept[name].gid) == (1234, 4321)
        assert given[name].uid == 65534
    assert kept["./a"].mode & 0o7777 == 0o640
    if not engine.is_reference:  # which asks the host's users, and so does not know numbers
        numbered = create(engine, busybox, User="77:88")
        numbered.put("/tmp", theirs, "&copyUIDGID=true")
        a = members(numbered.get("/tmp/a"))["a"]
        assert (a.uid, a.gid) == (77, 88)


def test_a_read_only_root_is_not_written_but_its_binds_are(engine: EngineProcess, busybox: str, tmp_path: Path) -> None:
    host = {"ReadonlyRootfs": True, "Binds": [f"{tmp_path}:/b", f"{tmp_path}:/ro:ro"]}
    files = create(engine, busybox, host=host, start=True)
    archive = make_tar(("n", FILE, "new"))

    for path in ("/", "/tmp", "/b/../etc"):
        assert files.refused("PUT", path, archive) == (500, "container rootfs is marked read-only")
    assert files.refused("PUT", "/ro", archive) == (500, "mounted volume is marked read-only")
    files.put("/b", archive)
    assert (tmp_path / "n").read_text() == "new"


def test_a_mount_inside_a_read_only_one_counts_for_itself(engine: EngineProcess, busybox: str, tmp_path: Path) -> None:
    if engine.is_reference:
        pytest.skip("dockerd takes the first mount it comes by, at random")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    binds = [f"{tmp_path}/outer:/o:ro", f"{tmp_path}/other:/o/inner"]
    files = create(engine, busybox, host={"Binds": binds})

    files.put("/o/inner", make_tar(("n", FILE, "new")))

    assert (tmp_path / "other" / "n").read_text() == "new"
    assert files.refused("PUT", "/o", make_tar(("n", FILE, ""))) == (500, "mounted volume is marked read-only")


def test_network_files_are_those_of_the_run(engine: EngineProcess, busybox: str) -> None:
    files = create(engine, busybox, start=True, Hostname="box")

    assert content(files.get("/etc/hostname"), "hostname") == b"box\n"
    assert b"localhost" in content(files.get("/etc/hosts"), "hosts")
    status, text = files.refused("PUT", "/etc", make_tar(("hostname", FILE, "zz")))
    assert (status, text.endswith("device or resource busy")) == (500, True)


def test_answers_are_compressed_when_the_client_asks(engine: EngineProcess, busybox: str) -> None:
    files = create(engine, busybox)
    plain = files.get("/etc/passwd")

    def coded(accepted: str) -> tuple[str | None, bytes]:
        answer = files.call("GET", "/etc/passwd", **{"Accept-Encoding": accepted})
        assert STAT in answer.headers
        return answer.headers.get("content-encoding"), answer.body

    coding, body = coded("gzip, deflate, br")
    assert (coding, gzip.decompress(body)) == ("gzip", plain)
    coding, body = coded("gzip;q=0.5, deflate")
    assert (coding, zlib.decompress(body, -15)) == ("deflate", plain)
    assert coded("identity") == (None, plain)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("", ""), ("gzip", "gzip"), ("deflate, gzip", "gzip"), ("gzip;q=0", ""), ("*", "gzip"), ("br", ""),
        ("gzip;q=0.5, deflate", "deflate"), ("GZIP", "gzip"), ("gzip;q=x", ""), ("gzip;q=0, *", "gzip"), (",;=", ""),
    ],
)  # fmt: skip
def test_codings_are_chosen_as_the_reference_does(accepted: str, coding: str) -> None:
    assert choose_coding(accepted) == coding


def test_events_say_what_was_copied(engine: EngineProcess, busybox: str) -> None:
    since = time.time()
    files = create(engine, busybox)
    files.put("/tmp", TREE)
    files.get("/tmp/d")
    files.stat("/tmp/d")
    files.refused("GET", "/nope")

    path = f"/v1.39/events?since={since:.9f}&until={time.time():.9f}"
    events = [line for line in engine.request("GET", path).lines if line["Type"] == "container"]

    assert [event["Action"] for event in events] == ["create", "extract-to-dir", "archive-path"]
    assert set(events[1]["Actor"]["Attributes"]) == {"image", "name"}


def test_unknown_containers_are_told(engine: EngineProcess) -> None:
    files = Files(engine, "nope")

    assert files.refused("GET", "/x") == (404, "No such container: nope")
    assert files.refused("PUT", "/x", TREE) == (404, "No such container: nope")
    assert files.call("HEAD", "/x").status == 404


def test_the_cli_copies_both_ways(docker_cli: str, engine: EngineProcess, busybox: str, tmp_path: Path) -> None:
    files = create(engine, busybox)
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "file").write_text("text")
    (source / "link").symlink_to("deep/er/file")
    name = files.container

    engine.docker("cp", str(source), f"{name}:/tmp/copy")
    engine.docker("cp", f"{source}/.", f"{name}:/tmp")
    engine.docker("cp", f"{name}:/tmp/copy", str(tmp_path / "back"))
    engine.docker("cp", f"{name}:/tmp/deep/er/file", str(tmp_path / "one"))
    engine.docker("cp", "-L", f"{name}:/tmp/link", str(tmp_path / "followed"))
    failed = engine.docker("cp", f"{name}:/nope", str(tmp_path), check=False)
    over = engine.docker("cp", str(tmp_path / "one"), f"{name}:/tmp/copy/deep/er/file/x", check=False)

    assert (tmp_path / "back" / "deep" / "er" / "file").read_text() == "text"
    assert os.readlink(tmp_path / "back" / "link") == "deep/er/file"
    assert (tmp_path / "one").read_text() == (tmp_path / "followed").read_text() == "text"
    assert (failed.returncode, "Could not find the file /nope" in failed.stderr) == (1, True)
    assert over.returncode == 1


# -- big, slow, and gone --

MEGABYTE = 1 << 20
BIG = 192 * MEGABYTE


def resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no VmRSS of {pid}")


def test_big_files_go_through_in_little_memory(engine: EngineProcess, busybox: str) -> None:
    files = create(engine, busybox)
    head = tarfile.TarInfo("big")
    head.size = BIG
    block = os.urandom(MEGABYTE)
    before = resident(engine.pid)
    highest = 0
    with engine.raw_connection(timeout_s=120) as connection:
        length = 512 + BIG + 1024
        target = f"/v1.39/containers/{files.container}/archive?path=/tmp"
        connection.sendall(f"PUT {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        connection.sendall(head.tobuf())
        for _ in range(BIG // MEGABYTE):
            connection.sendall(block)
            highest = max(highest, resident(engine.pid))
        connection.sendall(bytes(1024))
        assert b" 200 " in connection.recv(1 << 16)
    with engine.raw_connection(timeout_s=120) as connection:
        target = f"/v1.39/containers/{files.container}/archive?path=/tmp/big"
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received = 0
        while data := connection.recv(MEGABYTE):
            received += len(data)
            highest = max(highest, resident(engine.pid))

    assert received > BIG
    print(f"{BIG >> 20} MiB in and out: {highest - before >> 10} KiB more resident")
    if not engine.is_reference:
        assert highest - before < 24 * MEGABYTE


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_client_that_leaves_leaves_nothing(engine: EngineProcess, busybox: str, method: str) -> None:
    if engine.is_reference:
        pytest.skip("workers are ours")
    files = create(engine, busybox)

    def workers() -> list[int]:
        children = Path(f"/proc/{engine.pid}/task").glob("*/children")
        return [
            int(pid)
            for path in children
            for pid in path.read_text().split()
            if b"balenapy.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    with engine.raw_connection() as connection:
        target = f"/v1.39/containers/{files.container}/archive?path=/"
        extra = "Content-Length: 1000000\r\n" if method == "PUT" else ""
        connection.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\n{extra}\r\n".encode())
        if method == "PUT":
            connection.sendall(make_tar(("a", FILE, "x" * 5000))[:4096])
        wait_until(workers, 30, "a worker")
        connection.shutdown(socket.SHUT_RDWR)

    wait_until(lambda: not workers(), 30, "the worker's end")
    assert engine.request("POST", f"/v1.39/containers/{files.container}/start").status == 204
    assert engine.request("DELETE", f"/v1.39/containers/{files.container}?force=1").status == 204


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_client_that_stalls_keeps_nobody_from_removing(engine: EngineProcess, busybox: str, method: str) -> None:
    if engine.is_reference:
        pytest.skip("dockerd waits for it")
    files = create(engine, busybox)
    with engine.raw_connection() as connection:
        target = f"/v1.39/containers/{files.container}/archive?path=/"
        extra = "Content-Length: 1000000\r\n" if method == "PUT" else ""
        connection.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\n{extra}\r\n".encode())
        if method == "PUT":
            connection.sendall(make_tar(("a", FILE, "x" * 5000))[:4096])
        else:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
            assert engine.request("POST", f"/v1.39/containers/{files.container}/start").status == 204
        time.sleep(0.5)

        assert engine.request("DELETE", f"/v1.39/containers/{files.container}?force=1").status == 204
        if method == "PUT":
            assert connection.recv(4096).startswith(b"HTTP/1.1 409 ")


def test_looking_changes_nothing(engine: EngineProcess, busybox: str, tmp_path: Path) -> None:
    if engine.is_reference:
        pytest.skip("dockerd makes the places of mounts")
    files = create(engine, busybox, host={"Binds": [f"{tmp_path}:/deep/down", f"{tmp_path}/missing:/missing"]})
    before = engine.request("GET", f"/v1.39/containers/{files.container}/changes").json

    assert files.stat("/deep/down")["mode"] & 1 << 31
    assert files.call("HEAD", "/missing").status == 404
    files.get("/deep")

    assert engine.request("GET", f"/v1.39/containers/{files.container}/changes").json == before
    assert not (tmp_path / "missing").exists()


def test_a_start_waits_for_an_archive_and_both_succeed(engine: EngineProcess, busybox: str) -> None:
    files = create(engine, busybox)
    archive = make_tar(("a", FILE, "x" * 200_000))
    started: list[int] = []

    def start() -> None:
        started.append(engine.request("POST", f"/v1.39/containers/{files.container}/start").status)

    with engine.raw_connection() as connection:
        target = f"/v1.39/containers/{files.container}/archive?path=/tmp"
        connection.sendall(f"PUT {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(archive)}\r\n\r\n".encode())
        connection.sendall(archive[:100_000])
        thread = threading.Thread(target=start)
        time.sleep(0.3)
        thread.start()
        time.sleep(0.3)
        connection.sendall(archive[100_000:])
        assert b" 200 " in connection.recv(1 << 16)
        thread.join(60)

    assert started == [204]
    assert files.stat("/tmp/a")["size"] == 200_000
