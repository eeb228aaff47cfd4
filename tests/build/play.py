"""Play a case to an engine, and write down what it says in a form that two engines can agree on.

Image IDs become `<image N>` in the order in which they are first named (bases `<busybox>`, `<app>`), so that a step
that hits the cache names the image of the earlier step. IDs of containers, temporary places and addresses become
words. Output of a step is joined: where a stream is cut is nobody's promise. Of an image there is: the config
(without times and IDs), its history, the chain of its parents, and for each layer above the base every entry with
mode, owner, type, size or content, link target, xattrs, and its time where that is an old one.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from tests.build.case import Build, Case
from tests.build.place import BASES, Place
from tests.engine_process import EngineProcess, Response

ANSWER_TIMEOUT_S = 120.0
OLD = datetime(2020, 1, 1, tzinfo=UTC).timestamp()
SHOWN_BYTES = 64
LINE = 116
PROGRESS = {"Downloading", "Extracting", "Verifying Checksum", "Download complete", "Pull complete", "Waiting"}
PROGRESS |= {"Pulling fs layer", "Already exists"}
STDERR_SEAM = "\x1b[0m\x1b[91m"
XATTR = "SCHILY.xattr."


def play(case: Case, place: Place) -> Any:
    """Run every build of the case; afterwards the engine holds what it held."""
    place.server.serve(case.served)
    names = _Names(place)
    builds: list[dict[str, Any]] = []
    shown: dict[str, int] = {}
    try:
        for number, build in enumerate(case.builds):
            answer = _request(build, place)
            record, image_id = _record(answer, names)
            record["containers"] = len(place.engine.request("GET", "/v1.39/containers/json?all=1").json)
            if image_id in shown:
                record["image"] = f"as build {shown[image_id]}"
            elif image_id:
                shown[image_id] = number
                record["image"] = _image(image_id, place, names)
            if not record["containers"]:
                del record["containers"]
            builds.append(record)
    finally:
        _forget(place)
    return {"builds": builds}


def is_missing(engine: EngineProcess) -> str:
    """Why the engine cannot be asked, or nothing."""
    answer = engine.request("POST", "/v1.39/build", b"")
    return answer.message if answer.status == 501 else ""


def _request(build: Build, place: Place) -> Response:
    path, body, headers = build.request(place.names)
    return place.engine.request("POST", path, body, headers=headers, timeout_s=ANSWER_TIMEOUT_S)


class _Names:
    """The words that stand for what differs between two runs."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._images: dict[str, str] = {}

    def learn(self, text: str) -> None:
        known = {image["Id"] for image in self._place.engine.request("GET", "/v1.39/images/json?all=1").json}
        found = re.findall(r"sha256:[0-9a-f]{64}|\b[0-9a-f]{12}\b", text)
        for one in found:
            for image_id in sorted(known):
                if image_id.removeprefix("sha256:").startswith(one.removeprefix("sha256:")):
                    self.image(image_id)

    def image(self, image_id: str) -> str:
        if image_id in self._place.bases:
            return f"<{self._place.bases[image_id]}>"
        return self._images.setdefault(image_id, f"<image {len(self._images) + 1}>")

    def text(self, text: str) -> str:
        for image_id in (*self._images, *self._place.bases):
            name = self.image(image_id)
            digits = image_id.removeprefix("sha256:")
            text = text.replace(image_id, name).replace(digits, name)
            text = re.sub(rf"\b{digits[:12]}\b", name, text)
        for word, value in self._place.names.items():
            text = text.replace(value, f"<{word}>")
        text = re.sub(r"/[^ :\"]*/tmp/(docker|balenapy|build)[-A-Za-z]*[0-9a-z_]+", "<context>", text)
        text = re.sub(rf"{re.escape(str(self._place.engine.data_root))}[^ :\"]*", "<data>", text)
        return re.sub(r"(Running in|intermediate container) [0-9a-f]{12}", r"\1 <container>", text)

    def within(self, value: Any) -> Any:
        return json.loads(self.text(json.dumps(value, ensure_ascii=False)))


# -- the stream


def _record(answer: Response, names: _Names) -> tuple[dict[str, Any], str]:
    """The answer, and the ID of the image it ends in."""
    if answer.status != 200:
        return {"status": answer.status, "message": names.text(answer.message.replace("\r", ""))}, ""
    names.learn(answer.body.decode())
    lines = answer.lines
    image_id = ""
    for line in lines:
        image_id = line.get("aux", {}).get("ID", image_id)
    if lines and not image_id and (quiet := re.fullmatch(r"(sha256:[0-9a-f]{64})\n", lines[-1].get("stream", ""))):
        image_id = quiet[1]
    if lines and "error" in lines[-1]:
        image_id = ""
    return {"status": 200, "stream": _with_newlines([_line(line, names) for line in _joined(lines)])}, image_id


def _joined(lines: list[Any]) -> Iterator[Any]:
    """Output of a RUN as one text; progress once."""
    output: str | None = None
    last_status = ""
    for line in lines:
        text = line.get("stream")
        if line.get("status") in PROGRESS or line.get("id") == "Total":  # our own line of a pull
            status = line.get("status", "")
            if status == "Downloading" and "id" not in line and last_status != "Downloading":
                yield {"status": "Downloading"}
            last_status = status
            continue
        if output is not None:
            if text is not None and not re.match(r"Removing intermediate container | ---> [0-9a-f]*\n", text):
                output += text
                continue
            if output:
                yield {"stream": output.replace(STDERR_SEAM, "")}
            output = None
        yield line
        if text and text.startswith(" ---> Running in "):
            output = ""
    if output:
        yield {"stream": output.replace(STDERR_SEAM, "")}


def _with_newlines(lines: list[Any]) -> list[Any]:
    """A step and the newline that follows it, an object of its own, as one line; a step without one says so."""
    answer = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line == "s" and answer and str(answer[-1]).startswith("# Executing"):
            answer[-1] = str(answer[-1]).replace(" <and no newline>", "") + "s"  # three objects of one line
        elif isinstance(line, str) and re.match("Step |# Exec", line) and not line.endswith("\n") and after != "\n":
            answer.append(f"{line} <and no newline>")
        elif line != "\n":
            answer.append(line)
    return answer


def _line(line: Any, names: _Names) -> Any:
    """`{"stream": text}` as its text alone; an error, which says everything twice, once."""
    replaced = names.within(line)
    if replaced.get("error", "") == replaced.get("errorDetail", {}).get("message"):
        del replaced["errorDetail"]["message"]
        replaced |= replaced.pop("errorDetail")
    return replaced["stream"] if list(replaced) == ["stream"] else replaced


# -- the image


def _image(image_id: str, place: Place, names: _Names) -> Any:
    inspected = place.engine.request("GET", f"/v1.39/images/{image_id}/json").json
    saved = place.engine.request("GET", f"/v1.39/images/{image_id}/get", timeout_s=ANSWER_TIMEOUT_S).body
    with tarfile.open(fileobj=io.BytesIO(saved)) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(name)
            assert member is not None
            return member.read()

        manifest = json.loads(read("manifest.json"))[0]
        config = read(manifest["Config"])
        assert f"sha256:{hashlib.sha256(config).hexdigest()}" == image_id
        document = json.loads(config)
        base = _base(document)
        layers = [_layer(read(name)) for name in manifest["Layers"][len(BASES[base].layers) if base else 0 :]]
    assert inspected["Id"] == image_id
    answer: dict[str, Any] = {"base": base, "layers": layers} | _config(document, base, names)
    answer["parents"] = _parents(inspected["Parent"], place, names)
    if inspected["RepoTags"]:
        answer["tags"] = sorted(names.text(tag) for tag in inspected["RepoTags"])
    return answer


def _base(document: Mapping[str, Any]) -> str:
    """The base whose layers and history are the beginning of this image's: what comes from it is not shown again."""
    for name, base in BASES.items():
        below = json.loads(base.config_bytes)
        layers, history = below["rootfs"]["diff_ids"], below["history"]
        same_layers = document["rootfs"]["diff_ids"][: len(layers)] == layers
        if same_layers and _commands(document["history"])[: len(history)] == _commands(history):
            return name
    return ""


def _commands(history: list[dict[str, Any]]) -> list[str]:
    return [entry.get("created_by", "") for entry in history]


def _parents(parent: str, place: Place, names: _Names) -> list[str]:
    chain = []
    while parent:
        chain.append(names.image(parent))
        answer = place.engine.request("GET", f"/v1.39/images/{parent}/json")
        assert answer.status == 200, f"the parent {parent} is not there"
        parent = answer.json["Parent"]
    return chain


def _other(these: dict[str, Any], those: dict[str, Any]) -> dict[str, Any]:
    """What is other in `these`; null for what only `those` have."""
    return {key: these.get(key) for key in sorted(these | those) if these.get(key) != those.get(key)}


def _config(document: dict[str, Any], base: str, names: _Names) -> dict[str, Any]:
    """The config without times and IDs; `container_config` as what it has other than `config`."""
    document = dict(document)
    for key in ("created", "container", "docker_version"):
        document.pop(key, None)
    history = document.pop("history")
    for entry in history:
        del entry["created"]
    config = _run_config(document.pop("config"), names)
    container = _run_config(document.pop("container_config", None), names)
    answer = {
        "config": config,
        "container_config": _other(container, config),
        "history": [_history(entry, names) for entry in history[_entries(base) :]],
    }
    root = document.pop("rootfs")
    assert root["type"] == "layers"
    assert len(root["diff_ids"]) == sum(not entry.get("empty_layer") for entry in history)
    if document != {"architecture": "amd64", "os": "linux"}:
        answer["more"] = names.within(document)
    return answer


def _entries(base: str) -> int:
    return len(json.loads(BASES[base].config_bytes)["history"]) if base else 0


def _run_config(config: dict[str, Any] | None, names: _Names) -> dict[str, Any]:
    config = dict(config or {})
    # 18.09 writes it for Windows' sake, later engines do not (moby 38541).
    config.pop("ArgsEscaped", None)
    if config.get("Hostname"):
        config["Hostname"] = "<container>"
    if config.get("Image"):
        # A parent that no line of the stream named is one of a trigger's.
        config["Image"] = re.sub("sha256:.*", "<an image>", names.text(config["Image"]))
    # Only what an image sets is worth a line, and which fields are there when they are not the usual ones.
    told = {key: value for key, value in config.items() if value not in (None, "", False)}
    if absent := _ALWAYS - set(config):
        told["absent"] = sorted(absent)
    if empty := set(config) - set(told) - _ALWAYS:
        told["empty"] = sorted(empty)
    return told


_ALWAYS = {"Hostname", "Domainname", "User", "AttachStdin", "AttachStdout", "AttachStderr", "Tty", "OpenStdin"}
_ALWAYS |= {"StdinOnce", "Env", "Cmd", "Image", "Volumes", "WorkingDir", "Entrypoint", "OnBuild", "Labels"}


def _history(entry: Mapping[str, Any], names: _Names) -> Any:
    """The command alone, or with what else there is; `+` marks a step with a layer."""
    rest = names.within({key: value for key, value in entry.items() if key not in ("created_by", "empty_layer")})
    line = f"{' ' if entry.get('empty_layer') else '+'} {names.text(entry.get('created_by', ''))}"
    return line if not rest else [line, rest]


def _layer(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return sorted((_entry(member, archive) for member in archive), key=lambda line: line.split()[2])


def _entry(member: tarfile.TarInfo, archive: tarfile.TarFile) -> str:
    letters = {tarfile.DIRTYPE: "d", tarfile.SYMTYPE: "l", tarfile.LNKTYPE: "h", tarfile.CHRTYPE: "c"}
    letters |= {tarfile.FIFOTYPE: "p", tarfile.BLKTYPE: "b"}
    if member.name.rpartition("/")[2].startswith(".wh."):
        return f"without 0:0 {member.name}"
    mode = member.mode & 0o7777  # some writers put the type there too
    line = f"{letters.get(member.type, '-')}{mode:04o} {member.uid}:{member.gid} {member.name.rstrip('/')}"
    if member.issym() or member.islnk():
        line += f" -> {member.linkname}"
    elif member.isdev() and not member.isfifo():
        line += f" {member.devmajor},{member.devminor}"
    elif member.isreg():
        content = archive.extractfile(member)
        assert content is not None
        data = content.read()
        shown = json.dumps(data.decode("latin-1")) if len(data) <= SHOWN_BYTES else ""
        line += f" {shown or f'{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}'}"
    for key, value in sorted(member.pax_headers.items()):
        if key.startswith(XATTR):
            line += f" {key.removeprefix(XATTR)}={value.encode('utf-8', 'surrogateescape').hex()}"
    if 0 < member.mtime < OLD:
        line += f" @{int(member.mtime)}"
    return line


# -- afterwards


def _forget(place: Place) -> None:
    """Remove what the case made: containers, and every image but the bases."""
    engine = place.engine
    engine.remove_containers()
    for _ in range(20):
        everything = engine.request("GET", "/v1.39/images/json?all=1").json
        made = [image for image in everything if image["Id"] not in place.bases]
        stray = [
            tag
            for image in engine.request("GET", "/v1.39/images/json").json
            for tag in image["RepoTags"] or []
            if image["Id"] in place.bases and tag != f"{place.bases[image['Id']]}:latest"
        ]
        if not made and not stray:
            return
        for name in (*stray, *(image["Id"] for image in made)):
            engine.request("DELETE", f"/v1.39/images/{name}?force=1")
    raise AssertionError(f"images that cannot be removed: {made}")


# -- writing it down


def written(answer: Any) -> str:
    """JSON whose short parts have a line each."""
    return _written(answer, 0) + "\n"


def _written(value: Any, depth: int) -> str:
    short = json.dumps(value, ensure_ascii=False, sort_keys=True)
    if len(short) + depth <= LINE or not isinstance(value, list | dict) or not value:
        return short
    indent = " " * (depth + 1)
    if isinstance(value, list):
        items = [indent + _written(item, depth + 1) for item in value]
    else:
        items = [f"{indent}{json.dumps(key)}: {_written(item, depth + 1)}" for key, item in sorted(value.items())]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return f"{opening}\n" + ",\n".join(items) + f"\n{' ' * depth}{closing}"


def differences(recorded: str, answer: str) -> str:
    """Both as `written`; nothing where they agree."""
    return "".join(difflib.unified_diff(recorded.splitlines(True), answer.splitlines(True), "recorded", "answer", n=1))
