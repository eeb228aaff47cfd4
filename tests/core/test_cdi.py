"""A vendor's CDI files become part of a container's spec."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from balenapy.core import cdi
from balenapy.core.ociconfig import DeviceNode, build_spec
from balenapy.errors import SystemFailure
from tests.core.test_ociconfig import container, inputs

# As `nvidia-ctk cdi generate` writes it on a Jetson, shortened.
JETSON = """---
cdiVersion: 0.5.0
kind: nvidia.com/gpu
containerEdits:
  env:
  - NVIDIA_VISIBLE_DEVICES=void
  hooks:
  - args:
    - nvidia-cdi-hook
    - update-ldcache
    - --folder
    - /usr/lib/aarch64-linux-gnu/nvidia
    hookName: createContainer
    path: /usr/bin/nvidia-cdi-hook
  mounts:
  - containerPath: /usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1.1
    hostPath: /usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1.1
    options:
    - ro
    - nosuid
    - nodev
    - bind
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvhost-gpu
    - hostPath: /dev/nvmap-real
      path: /dev/nvmap
      permissions: rw
    additionalGIDs: []
  name: all
- name: "0"
  containerEdits:
    deviceNodes:
      - path: /dev/x
"""
NODES = {"/dev/nvhost-gpu": (505, 1), "/dev/nvmap-real": (10, 52), "/dev/x": (1, 2)}


def look_up(path: str) -> DeviceNode:
    if path not in NODES:
        raise SystemFailure(f"{path}: no such file or directory")
    return DeviceNode(path, "c", *NODES[path], 0o660, 0, 44)


def injected(names: list[str], files: list[cdi.Text], **host_config: Any) -> dict[str, Any]:
    spec = build_spec(container({"Env": ["NVIDIA_VISIBLE_DEVICES=all", "A=1"]}, **host_config), inputs())
    cdi.apply(spec, cdi.select(names, files), look_up)
    return spec


def test_a_jetsons_file_gives_nodes_mounts_hooks_and_environment() -> None:
    spec = injected(["nvidia.com/gpu=all"], [("/etc/cdi/nvidia.yaml", JETSON)])

    assert spec["process"]["env"][-2:] == ["A=1", "NVIDIA_VISIBLE_DEVICES=void"]
    assert spec["linux"]["devices"] == [
        {"path": "/dev/nvhost-gpu", "type": "c", "major": 505, "minor": 1, "fileMode": 0o660, "uid": 0, "gid": 44},
        {"path": "/dev/nvmap", "type": "c", "major": 10, "minor": 52, "fileMode": 0o660, "uid": 0, "gid": 44},
    ]
    assert spec["linux"]["resources"]["devices"][-2:] == [
        {"allow": True, "type": "c", "major": 505, "minor": 1, "access": "rwm"},
        {"allow": True, "type": "c", "major": 10, "minor": 52, "access": "rw"},
    ]
    assert spec["mounts"][-1] == {
        "destination": "/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1.1", "type": "bind",
        "source": "/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1.1", "options": ["ro", "nosuid", "nodev", "bind"],
    }  # fmt: skip
    (hook,) = spec["hooks"]["createContainer"]
    assert hook["args"][:2] == ["nvidia-cdi-hook", "update-ldcache"]


def test_json_says_the_same_as_yaml() -> None:
    document = cdi.read_yaml(JETSON)

    assert cdi.parse_kind("x", json.dumps(document)) == cdi.parse_kind("x", JETSON)
    assert [device["name"] for device in document["devices"]] == ["all", "0"]


def test_what_the_kind_needs_comes_once_for_two_devices() -> None:
    spec = injected(["nvidia.com/gpu=all", "nvidia.com/gpu=0"], [("/etc/cdi/nvidia.yaml", JETSON)])

    assert len(spec["hooks"]["createContainer"]) == 1
    assert [device["path"] for device in spec["linux"]["devices"]] == ["/dev/nvhost-gpu", "/dev/nvmap", "/dev/x"]


def test_the_later_directory_wins() -> None:
    other = json.dumps({
        "cdiVersion": "0.6.0", "kind": "nvidia.com/gpu",
        "devices": [{"name": "all", "containerEdits": {"additionalGIDs": [44, 0], "env": ["X=2"]}}],
    })  # fmt: skip
    spec = injected(["nvidia.com/gpu=all"], [("/etc/cdi/a.yaml", JETSON), ("/var/run/cdi/a.json", other)])

    assert spec["linux"]["devices"] == []
    assert spec["process"]["user"]["additionalGids"] == [0, 44]


def test_a_device_no_file_has_is_named_with_what_is_wrong_with_the_files() -> None:
    with pytest.raises(SystemFailure, match=r"unresolvable CDI devices nvidia.com/gpu=7 \(/etc/cdi/b: no kind\)"):
        cdi.select(["nvidia.com/gpu=7"], [("/etc/cdi/a", JETSON), ("/etc/cdi/b", '{"cdiVersion": "0.5.0"}')])


def test_a_node_that_is_not_there_stops_the_start() -> None:
    with pytest.raises(SystemFailure, match=r"/dev/none: no such file"):
        injected(["a.b/c=d"], [("f", '{"cdiVersion":"0.5.0","kind":"a.b/c","devices":[{"name":"d","containerEdits":'
                                     '{"deviceNodes":[{"path":"/dev/none"}]}}]}')])  # fmt: skip


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("/dev/ttyS0", False), ("nvidia.com/gpu=all", True), ("nvidia.com/gpu=GPU-8d:1", True), ("gpu=all", False),
        ("nvidia.com/gpu", False), ("/dev/a=b", False), ("vendor.com/class=", False), ("v/c=1\n", False),
    ],
)  # fmt: skip
def test_names_and_paths_are_told_apart(text: str, named: bool) -> None:
    assert cdi.is_name(text) is named


@pytest.mark.parametrize(
    "text",
    [
        "a: &b c", "a: [1, 2]", "a: |\n  x", "a: b\n c: d", "a", "- a\nb: c", "a: 'x", 'a: "x', "a: 1\na: 2", "\ta: b",
    ],
)  # fmt: skip
def test_yaml_beyond_the_subset_is_refused_by_its_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"line [0-9]"):
        cdi.read_yaml(text)


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]))
SCALARS = st.none() | st.booleans() | st.integers(-(10**15), 10**15) | TEXTS
KEYS = st.from_regex("[a-z][a-zA-Z0-9.]{0,8}", fullmatch=True)


def containers(inner: Any) -> Any:
    return st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)


@given(st.recursive(SCALARS, containers, max_leaves=12))
def test_what_a_block_style_encoder_writes_is_read_back_or_refused(value: Any) -> None:
    yaml = pytest.importorskip("yaml")
    text = yaml.safe_dump(value, default_flow_style=False, width=10**9, allow_unicode=True)
    assume(isinstance(value, (dict, list)) and value)
    try:
        found = cdi.read_yaml(text)
    except ValueError as error:
        found = value
        refused = str(error)
    else:
        refused = ""

    assert found == value
    assert re.fullmatch("(line [0-9]+: .*(escape|KEY|more YAML|not expected|end).*)?", refused)


@given(st.text(max_size=200) | st.text(alphabet="a-: \n\"'{}[]#", max_size=60))
def test_any_text_is_read_or_refused_as_our_error(text: str) -> None:
    told = "f: "
    try:
        cdi.parse_kind("f", text)
    except SystemFailure as error:
        told = str(error)

    assert told.startswith("f: ")
