"""Binds, Mounts, volumes-from: the grammar and its complaints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import mountspec
from balenapy.core.container import BindOptions, Mount, TmpfsOptions, VolumeDriver, VolumeOptions
from balenapy.errors import EngineError, InvalidParameter, SystemFailure


def bind(text: str) -> tuple[str, str, str, str, bool, str]:
    point = mountspec.parse_bind(text)
    return point.type, point.name, point.source, point.destination, point.rw, point.propagation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/host:/c", ("bind", "", "/host", "/c", True, "rprivate")),
        ("/host//x/../y/:/c/./d/:ro", ("bind", "", "/host/y", "/c/d", False, "rprivate")),
        ("/host:/c:rw,slave", ("bind", "", "/host", "/c", True, "slave")),
        ("//host:/c:Z,cached", ("bind", "", "/host", "/c", True, "rprivate")),
        ("vol:/c:nocopy,ro", ("volume", "vol", "", "/c", False, "")),
        ("/c", ("volume", "", "", "/c", True, "")),
        ("./rel:/c", ("volume", "./rel", "", "/c", True, "")),
    ],
)
def test_binds_are_read(text: str, expected: tuple[str, str, str, str, bool, str]) -> None:
    assert bind(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid volume specification: ''"),
        (":/c", "invalid volume specification: ':/c'"),
        ("/c:ro", "invalid volume specification: '/c:ro'"),
        ("a:/b:ro:x", "invalid volume specification: 'a:/b:ro:x'"),
        ("a:/b:zz", "invalid mode: zz"),
        ("a:/b:ro,rw", "invalid mode: ro,rw"),
        (
            "/a:/",
            "invalid volume specification: '/a:/': invalid mount config for type \"bind\": "
            "invalid specification: destination can't be '/'",
        ),
        (
            "/a:b",
            "invalid volume specification: '/a:b': invalid mount config for type \"bind\": "
            "invalid mount path: 'b' mount path must be absolute",
        ),
        (
            "/a:/b:nocopy",
            "invalid volume specification: '/a:/b:nocopy': invalid mount config for type \"bind\": "
            "field VolumeOptions must not be specified",
        ),
        (
            "a:/b:shared",
            "invalid volume specification: 'a:/b:shared': invalid mount config for type \"volume\": "
            "field BindOptions must not be specified",
        ),
    ],
)
def test_bad_binds_are_refused_in_the_references_words(text: str, message: str) -> None:
    with pytest.raises(SystemFailure) as caught:
        mountspec.parse_bind(text)

    assert caught.value.message == message


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        (Mount("zz", "", "/t"), 'invalid mount config for type "zz": mount type unknown'),
        (Mount("bind", "/s", ""), 'invalid mount config for type "bind": field Target must not be empty'),
        (Mount("bind", "", "/t"), 'invalid mount config for type "bind": field Source must not be empty'),
        (
            Mount("bind", "s", "/t"),
            "invalid mount config for type \"bind\": invalid mount path: 's' mount path must be absolute",
        ),
        (
            Mount("bind", "/s", "/t", bind_options=BindOptions("zz")),
            'invalid mount config for type "bind": invalid propagation mode: zz',
        ),
        (
            Mount("volume", "", "/t", True),
            'invalid mount config for type "volume": must not set ReadOnly mode when using anonymous volumes',
        ),
        (
            Mount("volume", "v", "/t", bind_options=BindOptions()),
            'invalid mount config for type "volume": field BindOptions must not be specified',
        ),
        (
            Mount("volume", "v", "/t", volume_options=VolumeOptions(subpath="a/b")),
            'invalid mount config for type "volume": VolumeOptions.Subpath needs API v1.45 or newer',
        ),
        (Mount("tmpfs", "s", "/t"), 'invalid mount config for type "tmpfs": field Source must not be specified'),
        (
            Mount("tmpfs", "", "//"),
            "invalid mount config for type \"tmpfs\": invalid specification: destination can't be '/'",
        ),
    ],
)
def test_bad_mounts_are_refused_in_the_references_words(mount: Mount, message: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        mountspec.resolve_mount(mount)

    assert caught.value.message == message


def test_mounts_are_resolved() -> None:
    options = VolumeOptions(True, {"a": "b"}, VolumeDriver("local", {"type": "tmpfs"}))

    volume = mountspec.resolve_mount(Mount("volume", "v", "/t/", True, volume_options=options))
    source = mountspec.resolve_mount(Mount("bind", "/s/", "/t", bind_options=BindOptions("rshared")))
    assert (volume.name, volume.destination, volume.rw, volume.no_copy, volume.driver) == (
        "v", "/t", False, True, "local",
    )  # fmt: skip
    assert (source.source, source.propagation, source.must_exist) == ("/s", "rshared", True)


@given(st.text(alphabet="ab:/.,rowz ", max_size=20))
def test_any_bind_is_read_or_refused(text: str) -> None:
    try:
        point = mountspec.parse_bind(text)
    except EngineError:
        return
    assert point.destination.startswith("/") and point.destination != "/"
    assert "//" not in point.destination and ".." not in point.destination.split("/")


@pytest.mark.parametrize(("text", "expected"), [("c", ("c", True)), ("c:ro", ("c", False)), ("c:rw,z", ("c", True))])
def test_volumes_from_is_read(text: str, expected: tuple[str, bool]) -> None:
    assert mountspec.parse_volumes_from(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "volumes-from specification cannot be an empty string"),
        ("c:zz", "invalid mode: zz"),
        ("c:nocopy", "invalid mode: nocopy"),
        ("c:shared", "invalid mode: shared"),
    ],
)
def test_bad_volumes_from_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        mountspec.parse_volumes_from(text)

    assert caught.value.message == message


@pytest.mark.parametrize(
    ("options", "read_only", "expected"),
    [
        (None, False, []),
        (TmpfsOptions(1 << 20, 0o1770), True, ["ro", "mode=1770", "size=1m"]),
        (TmpfsOptions(1000), False, ["size=1000"]),
        (TmpfsOptions(2048), False, ["size=2k"]),
    ],
)
def test_options_of_a_tmpfs(options: TmpfsOptions | None, read_only: bool, expected: list[str]) -> None:
    assert mountspec.tmpfs_mount_options(options, read_only=read_only)[4:] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, "")),
        ("ro,nosuid,size=1m,uid=1000", (3, "size=1m,uid=1000")),
        ("ro,rw", (0, "")),
        ("bind", (4096, "")),
        ("rbind,addr=1.2.3.4", (4096 | 16384, "addr=1.2.3.4")),
    ],
)
def test_mount_options_become_flags_and_data(text: str, expected: tuple[int, str]) -> None:
    assert mountspec.parse_mount_options(text) == expected


def test_paths_of_image_volumes() -> None:
    assert mountspec.volume_path("/a//b/") == "/a/b"
    for text in ("/a:/b", "rel", "/", "//."):
        with pytest.raises(SystemFailure, match="invalid volume specification"):
            mountspec.volume_path(text)
