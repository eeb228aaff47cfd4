"""Paths of archive calls: cleaned as Go does, and told as Go tells them."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.containerpath import base_name, clean_path, follows_last, go_file_mode


@pytest.mark.parametrize(
    ("path", "cleaned", "base"),
    [
        ("/etc/passwd", "/etc/passwd", "passwd"),
        ("etc//x", "/etc/x", "x"),
        ("/", "/", "/"),
        (".", "/.", "."),
        ("/.", "/.", "."),
        ("/d/", "/d/", "d"),
        ("/d/.", "/d/.", "."),
        ("/d/./", "/d/./", "."),
        ("d/../etc/passwd", "/etc/passwd", "passwd"),
        ("../../x", "/x", "x"),
        ("/..", "/", "/"),
        ("/a/..", "/", "/"),
        ("//a", "/a", "a"),
    ],
)
def test_paths_are_cleaned_by_their_letters_and_keep_their_end(path: str, cleaned: str, base: str) -> None:
    assert clean_path(path) == cleaned
    assert base_name(cleaned) == base


@given(st.text("ab/.", min_size=1))
def test_a_cleaned_path_is_absolute_without_dots_in_it_and_stays_as_it_is(path: str) -> None:
    cleaned = clean_path(path)

    assert cleaned.startswith("/")
    assert ".." not in cleaned.split("/")
    assert "//" not in cleaned
    assert clean_path(cleaned) == cleaned
    assert follows_last(cleaned) == cleaned.endswith(("/", "/."))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (stat.S_IFREG | 0o644, 0o644),
        (stat.S_IFDIR | 0o1777, 1 << 31 | 1 << 20 | 0o777),
        (stat.S_IFLNK | 0o777, 134218239),
        (stat.S_IFREG | 0o4755, 1 << 23 | 0o755),
        (stat.S_IFREG | 0o2755, 1 << 22 | 0o755),
        (stat.S_IFCHR | 0o666, 1 << 26 | 1 << 21 | 0o666),
        (stat.S_IFBLK | 0o660, 1 << 26 | 0o660),
        (stat.S_IFIFO | 0o600, 1 << 25 | 0o600),
        (stat.S_IFSOCK | 0o600, 1 << 24 | 0o600),
    ],
)
def test_modes_are_those_of_go(mode: int, expected: int) -> None:
    assert go_file_mode(mode) == expected


