"""A case of the corpus: what is sent to `POST /build`, as `cases/NAME/case.toml` tells it.

    what = "one sentence: what must hold"
    dockerfile = '''
    FROM busybox
    COPY a /a
    '''
    query = {target = "x", buildargs = {A = "1"}}   # maps are sent as JSON, lists as repeated names

    [files]                                # the context, beside the Dockerfile
    a = "its text"
    b = {text = "x", mode = 0o750, uid = 5, gid = 6, mtime = 1}
    c = {link = "a"}                       # or: hard, fifo, dir, hex, xattrs, tar (files again) with compress
    [served]                               # what http://{server}/NAME answers
    "x.txt" = {text = "x", type = "text/plain", modified = 86400, status = 200}
    [[builds]]                             # one after the other; without any: the same build twice
    query = {nocache = true}               # what it has instead of the case's own: dockerfile, query, files, ...

`{server}` and `{registry}` in a Dockerfile, a query or an extra header stand for addresses on loopback. Every file
of a context has the same old time, so that a time which was kept is seen.

`[[differs]]` tables name where the engine we replace (18.09) answers other than the 20.10 that was recorded:
`reason`, and `recorded` and `expected`: parts of texts (with `pattern`, a regular expression), or with
`at = "builds.0.status"` whole values. `differs.toml` has what is so in every case.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import zstandard

__all__ = ["CASES", "CONTEXT_TIME", "Build", "Case", "load_cases"]

CASES = Path(__file__).parent / "cases"
CONTEXT_TIME = 981173106  # 2001-02-03 04:05:06
GENERAL = Path(__file__).parent / "differs.toml"
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}
KINDS = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}


@dataclass(frozen=True)
class Build:
    """One request."""

    dockerfile: str | None  # None: the context has none
    name: str = "Dockerfile"  # of the Dockerfile in the context
    query: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    compress: str = ""
    body: str | None = None  # sent as it is, in place of a context

    def request(self, places: Mapping[str, str]) -> tuple[str, bytes, dict[str, str]]:
        """The path with its query, the body and the headers; `places` fills what stands in braces."""
        values = {name: _query_value(value, places) for name, value in self.query.items()}
        path = "/v1.39/build?" + urlencode(values, doseq=True)
        headers = {"Content-Type": "application/x-tar"}
        headers |= {name: fill(value, places) for name, value in self.headers.items()}
        if self.body is not None:
            return path, fill(self.body, places).encode(), headers
        return path, COMPRESSORS[self.compress](self.context(places)), headers

    def context(self, places: Mapping[str, str]) -> bytes:
        files = dict(self.files)
        if self.dockerfile is not None:
            files[self.name] = fill(self.dockerfile, places)
        return pack(files)


@dataclass(frozen=True)
class Case:
    name: str
    what: str
    builds: tuple[Build, ...]
    served: Mapping[str, Any]
    differs: tuple[Mapping[str, Any], ...]
    skip_reference: str  # why 20.10 cannot tell what is true here; then the answer was written by hand

    @property
    def expected_path(self) -> Path:
        return CASES / self.name / "expected.json"

    def recorded(self) -> Any:
        return json.loads(self.expected_path.read_text())

    def expected(self) -> Any:
        """What was recorded, with 18.09's answers where 20.10 gives others."""
        answer = self.recorded()
        for difference in self.differs:
            assert difference["reason"], "a difference needs its reason"
            changed = _differ(answer, difference)
            assert changed != answer, f"{self.name}: nothing recorded is like {difference}"
            answer = changed
        for difference in tomllib.loads(GENERAL.read_text())["differs"]:
            answer = _differ(answer, difference)
        return answer


def load_cases(names: tuple[str, ...] = ()) -> list[Case]:
    """All cases by name, or those that are named."""
    return [_load(path) for path in sorted(CASES.glob("*/case.toml")) if not names or path.parent.name in names]


def fill(text: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def pack(files: Mapping[str, Any]) -> bytes:
    """A tar of them, with the directories on their way, in the order of names (links last)."""
    described = {name: {"text": what} if isinstance(what, str) else what for name, what in files.items()}
    for name in list(described):
        for parent in Path(name).parents:
            if str(parent) not in (".", "/", "..") and ".." not in parent.parts:
                described.setdefault(str(parent), {"dir": True})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(described, key=lambda one: ("hard" in described[one], one)):
            archive.addfile(*_member(name, described[name]))
    return buffer.getvalue()


def _member(name: str, what: Mapping[str, Any]) -> tuple[tarfile.TarInfo, io.BytesIO]:
    member = tarfile.TarInfo(name)
    member.mtime = what.get("mtime", CONTEXT_TIME)
    member.uid, member.gid = what.get("uid", 0), what.get("gid", 0)
    member.mode = what.get("mode", 0o755 if "dir" in what else 0o644)
    for key, value in what.get("xattrs", {}).items():
        # Python writes pax headers as UTF-8; values here are plain text or given as latin-1 bytes below 0x80.
        member.pax_headers[f"SCHILY.xattr.{key}"] = value
    data = b""
    if "dir" in what:
        member.type = tarfile.DIRTYPE
    elif "fifo" in what:
        member.type = tarfile.FIFOTYPE
    elif kind := next((one for one in KINDS if one in what), None):
        member.type, member.linkname = KINDS[kind], what[kind]
    elif "tar" in what:
        data = COMPRESSORS[what.get("compress", "")](pack(what["tar"]))
    elif "hex" in what:
        data = bytes.fromhex(what["hex"])
    else:
        data = (what.get("text", "") + what.get("more", "") * what.get("times", 0)).encode()
    member.size = len(data)
    return member, io.BytesIO(data)


def _load(path: Path) -> Case:
    document = tomllib.loads(path.read_text())
    common = {key: document.pop(key) for key in list(document) if key in Build.__dataclass_fields__}
    common.setdefault("dockerfile", None)
    builds = []
    for own in document.pop("builds", [{}, {}]):
        merged = {**common, **own}
        for key in ("files", "query"):
            merged[key] = {**common.get(key, {}), **own.get(key, {})}
        merged["files"] = {name: what for name, what in merged["files"].items() if what != {}}
        if merged["dockerfile"] is False:
            merged["dockerfile"] = None
        builds.append(Build(**merged))
    case = Case(
        path.parent.name,
        document.pop("what"),
        tuple(builds),
        document.pop("served", {}),
        tuple(document.pop("differs", [])),
        document.pop("skip_reference", ""),
    )
    assert not document, f"{path}: what is {sorted(document)}?"
    return case


def _query_value(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [fill(str(item), places) for item in value]
    if isinstance(value, dict):
        return fill(json.dumps({key: None if item is False else item for key, item in value.items()}), places)
    if isinstance(value, bool):
        return int(value)
    return fill(str(value), places)


def _differ(answer: Any, difference: Mapping[str, Any]) -> Any:
    if "at" in difference:
        return _replace_at(answer, difference["at"].split("."), difference["expected"])
    old = difference["recorded"]
    return _replace_text(answer, re.compile(old if difference.get("pattern") else re.escape(old)), difference)


def _replace_at(value: Any, keys: list[str], new: Any) -> Any:
    if not keys:
        return new
    first, *rest = keys
    if isinstance(value, list):
        place = int(first)
        return [*value[:place], _replace_at(value[place], rest, new), *value[place + 1 :]]
    return {**value, first: _replace_at(value.get(first), rest, new)}


def _replace_text(value: Any, old: re.Pattern[str], difference: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        new = difference["expected"]
        return old.sub(new if difference.get("pattern") else lambda _: new, value)
    if isinstance(value, list):
        return [_replace_text(item, old, difference) for item in value]
    if isinstance(value, dict):
        return {key: _replace_text(item, old, difference) for key, item in value.items()}
    return value
