"""Where cases are built: an engine with two base images in it, a registry, and a server for what builds download."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.build.case import CONTEXT_TIME, pack
from tests.compat import images
from tests.engine_process import EngineProcess

BASES = {"busybox": images.busybox_image(), "app": images.app_image()}


@dataclass
class Place:
    """What a case is built with."""

    engine: EngineProcess
    registry: str
    server: Server
    bases: dict[str, str]  # image ID -> name

    @property
    def names(self) -> dict[str, str]:
        """What stands in braces in a case."""
        return {"registry": self.registry, "server": self.server.address}


@dataclass
class Server:
    """HTTP on loopback: what a case serves, and 404 for the rest."""

    address: str
    served: dict[str, Served] = field(default_factory=dict)

    def serve(self, files: Mapping[str, Any]) -> None:
        self.served = {}
        for name, what in files.items():
            if "git" in what:
                self.served |= _repository(name, what)
            else:
                self.served[f"/{name}"] = Served.of(what)


@dataclass(frozen=True)
class Served:
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, what: Any) -> Served:
        if isinstance(what, str):
            what = {"text": what}
        headers = {"Content-Type": what.get("type", "application/octet-stream")}
        if "modified" in what:
            headers["Last-Modified"] = formatdate(what["modified"], usegmt=True)
        headers |= what.get("headers", {})
        body = pack(what["tar"]) if "tar" in what else what.get("text", "").encode()
        return cls(body, what.get("status", 200), headers)


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = server.served.get(self.path.split("?")[0], Served(b"404: not here\n", 404))
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer.body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server = Server(f"127.0.0.1:{listener.server_port}")
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


def prepare(engine: EngineProcess, registry: str, server: Server) -> Place:
    """Put the bases into the engine under their short names, and one more image into the registry."""
    bases = {}
    for name, image in BASES.items():
        images.push(registry, name, "latest", image)
        for method, path in (
            ("POST", f"/v1.39/images/create?fromImage={registry}/{name}&tag=latest"),
            ("POST", f"/v1.39/images/{registry}/{name}:latest/tag?repo={name}&tag=latest"),
            ("DELETE", f"/v1.39/images/{registry}/{name}:latest"),
        ):
            answer = engine.request(method, path)
            assert answer.status < 300 and b"errorDetail" not in answer.body, answer.body
        bases[image.image_id] = name
    note = images.make_tar([images.file("note", b"from the registry\n")])
    images.push(registry, "pulled", "1", images.Image((images.busybox_layer(), images.Layer(note)), {"Cmd": ["sh"]}))
    return Place(engine, registry, server, bases)


def _repository(name: str, what: Mapping[str, Any]) -> dict[str, Served]:
    """A repository for git's plain HTTP: `git` holds the files of its commit, `branch` and `tag` name it."""
    with tempfile.TemporaryDirectory() as directory:
        work, bare = Path(directory, "work"), Path(directory, "bare")
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": directory,
            "GIT_CONFIG_NOSYSTEM": "1",
            **{f"GIT_{who}_{key}": value for who in ("AUTHOR", "COMMITTER") for key, value in _PERSON.items()},
        }

        def git(*arguments: str) -> None:
            subprocess.run(["git", *arguments], cwd=directory, env=environment, check=True, capture_output=True)

        git("init", "-q", "-b", what.get("branch", "master"), str(work))
        for path, text in what["git"].items():
            target = work / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        git("-C", str(work), "add", "-A")
        git("-C", str(work), "commit", "-q", "-m", "one")
        if "tag" in what:
            git("-C", str(work), "tag", what["tag"])
        git("clone", "-q", "--bare", str(work), str(bare))
        git("-C", str(bare), "update-server-info")
        return {
            f"/{name}/{path.relative_to(bare)}": Served(path.read_bytes(), headers={"Content-Type": "text/plain"})
            for path in bare.rglob("*")
            if path.is_file()
        }


_PERSON = {"NAME": "nobody", "EMAIL": "nobody@example.org", "DATE": f"{CONTEXT_TIME} +0000"}
