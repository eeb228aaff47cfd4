"""CDI, the Container Device Interface: `--device nvidia.com/gpu=all` -> what the vendor's files say a container gets.

A vendor's tool writes files into /etc/cdi and /var/run/cdi: a `kind` (`nvidia.com/gpu`), devices by name, and for each,
and for the kind as a whole, `containerEdits`: device nodes, mounts, hooks, environment, groups. A Jetson's container
toolkit makes one out of its CSV lists, since a GPU there is two dozen device nodes and a hundred libraries.

Pure: files arrive as texts, device nodes that name no numbers are looked up by the caller. The files are JSON, or YAML
as Go's encoder writes it (block style, no anchors); a YAML library would cost more memory than everything else here.
Source: CDI specification 0.6 (SPEC.md, schema.json), pkg/cdi container-edits.go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from balenapy.core.ociconfig import DeviceNode
from balenapy.errors import SystemFailure

DIRECTORIES = ("/etc/cdi", "/var/run/cdi")  # the later ones win
MAX_FILE_BYTES = 4 << 20
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z][A-Za-z0-9_-]*)=([A-Za-z0-9][A-Za-z0-9_.:-]*)", re.ASCII)
_HOOKS = {
    "prestart": "prestart", "createRuntime": "createRuntime", "createContainer": "createContainer",
    "startContainer": "startContainer", "poststart": "poststart", "poststop": "poststop",
}  # fmt: skip

Text = tuple[str, str]  # path of a file, its contents


@dataclass(slots=True)
class Edits:
    """What is added to a container."""

    env: list[str] = field(default_factory=list)
    device_nodes: list[dict[str, Any]] = field(default_factory=list)
    mounts: list[dict[str, Any]] = field(default_factory=list)
    hooks: list[dict[str, Any]] = field(default_factory=list)
    additional_gids: list[int] = field(default_factory=list)

    def add(self, other: Edits) -> None:
        self.env += other.env
        self.device_nodes += other.device_nodes
        self.mounts += other.mounts
        self.hooks += other.hooks
        self.additional_gids += other.additional_gids


@dataclass(frozen=True, slots=True)
class Kind:
    """One file: a kind, its devices, and what every one of them needs."""

    path: str
    kind: str
    devices: Mapping[str, Edits]
    edits: Edits


def is_name(text: str) -> bool:
    """Whether a device is named by CDI: `vendor.com/class=name`. A path never looks so."""
    return _NAME.fullmatch(text) is not None


# --- files ----------------------------------------------------------------------------------------------------


def parse_kind(path: str, text: str) -> Kind:
    """A file of a vendor.

    Raises: SystemFailure naming the file and what is wrong with it.
    """
    try:
        document = json.loads(text) if text.lstrip().startswith("{") else read_yaml(text)
        if not isinstance(document, dict):
            raise ValueError("not an object")
        kind = document["kind"]
        if not isinstance(document.get("cdiVersion"), str) or not isinstance(kind, str) or not is_name(f"{kind}=x"):
            raise ValueError("cdiVersion and kind are wanted")
        devices = {}
        for device in _objects(document.get("devices"), "devices"):
            name = str(device["name"])
            if name in devices:
                raise ValueError(f"device {name} is there twice")
            devices[name] = _edits(device.get("containerEdits"))
        return Kind(path, kind, devices, _edits(document.get("containerEdits")))
    except KeyError as error:
        raise SystemFailure(f"{path}: no {error.args[0]}") from error
    except (ValueError, RecursionError) as error:
        raise SystemFailure(f"{path}: {error}") from error


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{what}: a list of objects is wanted")
    return value


def _strings(value: Any, what: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{what}: a list of strings is wanted")
    return value


def _edits(value: Any) -> Edits:
    if value is None:
        return Edits()
    if not isinstance(value, dict):
        raise ValueError("containerEdits: an object is wanted")
    edits = Edits(
        _strings(value.get("env"), "env"),
        _objects(value.get("deviceNodes"), "deviceNodes"),
        _objects(value.get("mounts"), "mounts"),
        _objects(value.get("hooks"), "hooks"),
    )
    gids = value.get("additionalGIDs") or []
    if not isinstance(gids, list) or not all(isinstance(gid, int) and gid >= 0 for gid in gids):
        raise ValueError("additionalGIDs: a list of numbers is wanted")
    edits.additional_gids = gids
    if bad := [entry for entry in edits.env if "=" not in entry.lstrip("=")]:
        raise ValueError(f"env: {bad[0]!r} is no NAME=VALUE")
    for node in edits.device_nodes:
        _wants(node, "deviceNodes", "path")
    for mount in edits.mounts:
        _wants(mount, "mounts", "hostPath", "containerPath")
        _strings(mount.get("options"), "mounts.options")
    for hook in edits.hooks:
        _wants(hook, "hooks", "hookName", "path")
        if hook["hookName"] not in _HOOKS:
            raise ValueError(f"hooks: there is no {hook['hookName']}")
        _strings(hook.get("args"), "hooks.args")
        _strings(hook.get("env"), "hooks.env")
    return edits


def _wants(value: Mapping[str, Any], what: str, *keys: str) -> None:
    for key in keys:
        if not isinstance(value.get(key), str) or not value[key]:
            raise ValueError(f"{what}: {key} is wanted")


# --- choosing and applying ------------------------------------------------------------------------------------


def select(names: Sequence[str], files: Sequence[Text]) -> Edits:
    """The edits of the named devices; a kind's own once, before those of its devices.

    A file that cannot be read matters only when a wanted device is in none of the others.
    Raises: SystemFailure `unresolvable CDI devices X` with what is wrong with the files.
    """
    kinds: list[Kind] = []
    faults: list[str] = []
    for path, text in files:
        try:
            kinds.append(parse_kind(path, text))
        except SystemFailure as error:
            faults.append(str(error))
    missing = []
    edits = Edits()
    opened: set[str] = set()
    for name in dict.fromkeys(names):
        wanted_kind, _, device = name.partition("=")
        found = next((kind for kind in reversed(kinds) if kind.kind == wanted_kind and device in kind.devices), None)
        if found is None:
            missing.append(name)
            continue
        if found.path not in opened:
            opened.add(found.path)
            edits.add(found.edits)
        edits.add(found.devices[device])
    if missing:
        why = f" ({'; '.join(faults)})" if faults else ""
        raise SystemFailure(f"CDI device injection failed: unresolvable CDI devices {', '.join(missing)}{why}")
    return edits


def apply(spec: dict[str, Any], edits: Edits, look_up: Callable[[str], DeviceNode]) -> None:
    """Put edits into an OCI runtime spec.

    Args:
        look_up: the device node at a path of the host; raises SystemFailure.
    """
    process, linux = spec["process"], spec["linux"]
    kept = {entry.partition("=")[0] for entry in edits.env}
    process["env"] = [entry for entry in process["env"] if entry.partition("=")[0] not in kept] + edits.env
    if edits.additional_gids:
        gids = process["user"].setdefault("additionalGids", [])
        gids += [gid for gid in dict.fromkeys(edits.additional_gids) if gid and gid not in gids]
    rules = linux["resources"].setdefault("devices", [])
    for wanted in edits.device_nodes:
        device = _device(wanted, look_up)
        linux["devices"] = [each for each in linux["devices"] if each["path"] != device["path"]] + [device]
        if device["type"] != "p":
            access = str(wanted.get("permissions") or "rwm")
            rules.append({"allow": True, "type": device["type"], "major": device["major"], "minor": device["minor"],
                          "access": access})  # fmt: skip
    places = {mount["containerPath"] for mount in edits.mounts}
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] not in places]
    for mount in {each["containerPath"]: each for each in edits.mounts}.values():
        options = list(mount.get("options") or ("ro", "nosuid", "nodev", "bind"))
        if not {"bind", "rbind"} & set(options) and mount.get("type", "bind") in ("", "bind"):
            options.append("bind")
        spec["mounts"].append({
            "destination": mount["containerPath"], "type": mount.get("type") or "bind", "source": mount["hostPath"],
            "options": options,
        })  # fmt: skip
    for hook in edits.hooks:
        entry: dict[str, Any] = {"path": hook["path"]}
        for key in ("args", "env", "timeout"):
            if hook.get(key):
                entry[key] = hook[key]
        spec.setdefault("hooks", {}).setdefault(_HOOKS[hook["hookName"]], []).append(entry)


def _device(wanted: Mapping[str, Any], look_up: Callable[[str], DeviceNode]) -> dict[str, Any]:
    """Numbers that the file leaves out are the host's."""
    kind, major, minor = wanted.get("type") or "", wanted.get("major"), wanted.get("minor")
    mode, uid, gid = wanted.get("fileMode"), wanted.get("uid"), wanted.get("gid")
    if kind not in ("c", "b", "u", "p") or ((major is None or minor is None) and kind != "p"):
        node = look_up(str(wanted.get("hostPath") or wanted["path"]))
        kind, major, minor = node.kind, node.major, node.minor
        mode = node.mode if mode is None else mode
        uid, gid = node.uid if uid is None else uid, node.gid if gid is None else gid
    return {
        "path": wanted["path"], "type": "c" if kind == "u" else kind, "major": major or 0, "minor": minor or 0,
        "fileMode": 0o666 if mode is None else mode, "uid": uid or 0, "gid": gid or 0,
    }  # fmt: skip


# --- YAML, as Go's encoder writes it --------------------------------------------------------------------------

_MAX_DEPTH = 32
_KEY = re.compile(r'("(?:[^"\\]|\\.)*"|[^\s"\'\[\]{}&*!|>%@`#-][^:#]*?|-[^\s:#][^:#]*?):(?:\s+(.*))?$')
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    indent: int
    text: str


def read_yaml(text: str) -> Any:
    """Block mappings and sequences of plain and quoted scalars.

    Raises: ValueError naming the line, for everything else that YAML has.
    """
    lines: list[_Line] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#") or (stripped == "---" and not lines):
            continue
        if "\t" in line[: len(line) - len(line.lstrip())]:
            raise ValueError(f"line {number}: a tab in the indentation")
        lines.append(_Line(number, len(line) - len(line.lstrip(" ")), stripped))
    if not lines:
        return None
    value, rest = _block(lines, 0, lines[0].indent, 0)
    if rest != len(lines):
        raise ValueError(f"line {lines[rest].number}: not expected here")
    return value


def _block(lines: list[_Line], at: int, indent: int, depth: int) -> tuple[Any, int]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"line {lines[at].number}: too deep")
    if lines[at].text == "-" or lines[at].text.startswith("- "):
        return _sequence(lines, at, indent, depth)
    return _mapping(lines, at, indent, depth)


def _sequence(lines: list[_Line], at: int, indent: int, depth: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    while at < len(lines) and lines[at].indent == indent and re.match(r"-(\s|$)", lines[at].text):
        line = lines[at]
        rest = line.text[1:].lstrip()
        if not rest:
            value, at = _nested(lines, at, indent, depth)
        elif re.match(r"-(\s|$)", rest) or _KEY.match(rest):
            # What stands behind the dash begins a block there.
            inner = indent + len(line.text) - len(rest)
            lines[at] = _Line(line.number, inner, rest)
            value, at = _block(lines, at, inner, depth + 1)
        else:
            value, at = _scalar(rest, line.number), at + 1
        items.append(value)
    return items, at


def _mapping(lines: list[_Line], at: int, indent: int, depth: int) -> tuple[dict[str, Any], int]:
    result: dict[str, Any] = {}
    while at < len(lines) and lines[at].indent == indent and not re.match(r"-(\s|$)", lines[at].text):
        line = lines[at]
        match = _KEY.match(line.text)
        if match is None:
            raise ValueError(f"line {line.number}: KEY: VALUE is expected")
        key = str(_scalar(match[1].strip(), line.number))
        if key in result:
            raise ValueError(f"line {line.number}: {key} is there twice")
        value_text = (match[2] or "").strip()
        if value_text and not value_text.startswith("#"):
            result[key], at = _scalar(value_text, line.number), at + 1
        elif at + 1 < len(lines) and lines[at + 1].indent == indent and re.match(r"-(\s|$)", lines[at + 1].text):
            result[key], at = _sequence(lines, at + 1, indent, depth + 1)  # a list may stand as deep as its key
        else:
            result[key], at = _nested(lines, at, indent, depth)
    return result, at


def _nested(lines: list[_Line], at: int, indent: int, depth: int) -> tuple[Any, int]:
    if at + 1 < len(lines) and lines[at + 1].indent > indent:
        return _block(lines, at + 1, lines[at + 1].indent, depth + 1)
    return None, at + 1


def _scalar(text: str, number: int) -> Any:
    if text.startswith('"'):
        match = re.match(r'"(?:[^"\\]|\\.)*"', text)
        if match is None or not re.fullmatch(r"\s*(#.*)?", text[match.end() :]):
            raise ValueError(f"line {number}: a string that does not end")
        try:
            return json.loads(match[0])
        except ValueError:
            raise ValueError(f"line {number}: an escape that is not JSON's") from None
    if text.startswith("'"):
        match = re.match(r"'((?:[^']|'')*)'\s*(#.*)?$", text)
        if match is None:
            raise ValueError(f"line {number}: a string that does not end")
        return match[1].replace("''", "'")
    text = re.sub(r"\s+#.*$", "", text)
    if text in ("[]", "{}"):
        return [] if text == "[]" else {}
    if text[:1] in ("[", "{", "&", "*", "!", "|", ">", "%", "@", "`"):
        raise ValueError(f"line {number}: {text[0]!r} is more YAML than is read here: convert the file to JSON")
    if text in ("true", "false"):
        return text == "true"
    if text in ("null", "~", ""):
        return None
    if _INTEGER.fullmatch(text) and len(text) < 20:
        return int(text)
    return text
