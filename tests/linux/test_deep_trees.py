"""Trees that nest deeper than a path, recursion or descriptors reach: any container can make one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from balenapy.linux import durable


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """3,000 directories in each other, with a file and a link in each hundredth."""
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    top = tmp_path / "top"
    top.mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    os.chdir(top)
    try:
        for number in range(3000):
            os.mkdir("d")
            os.chdir("d")
            if number % 100 == 0:
                Path("file").write_text("x" * 100)
                Path("link").symlink_to(tmp_path / "kept")
    finally:
        os.fchdir(here)
        os.close(here)
    yield top
    kept = (tmp_path / "kept/file").exists()
    durable.remove_tree(tmp_path)  # what a failed test leaves is too deep for pytest
    assert kept


def test_a_deep_tree_is_removed_with_few_descriptors(deep: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 150, hard))
    try:
        durable.remove_tree(deep)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert not deep.exists()


def test_the_size_of_a_deep_tree_is_that_of_what_a_path_reaches(deep: Path) -> None:
    apparent, _ = durable.tree_size(deep)

    assert 1000 <= apparent <= 3000
    durable.remove_tree(deep)


def test_many_names_in_one_directory(tmp_path: Path) -> None:
    directory = tmp_path / "wide"
    directory.mkdir()
    for number in range(5000):
        (directory / f"{number}").touch() if number % 50 else (directory / f"{number}").mkdir()

    durable.remove_tree(directory)

    assert not directory.exists()
