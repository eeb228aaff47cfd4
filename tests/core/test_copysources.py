"""What COPY means and what it hashes to: in memory, and the same for files in a directory."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.buildtree import FoundDockerfile, MemoryTree, follow, take_dockerfile
from balenapy.core.copysources import Source, find_sources, has_wildcards, hash_of
from balenapy.engine.buildcontext import read_small
from balenapy.errors import EngineError, InvalidParameter, NotFound
from balenapy.worker.sources import DirectoryTree
from tests.compat.images import directory, file, link, make_tar

FILES = [
    directory("d"),
    file("d/a.txt", b"one"),
    file("d/b.txt", b"two"),
    directory("d/sub"),
    file("d/sub/c", b""),
    file("a.txt", b"three", 0o755),
    link("to-d", "d"),
    link("up", "../../../d/a.txt"),
    link("loop", "loop"),
    link("broken", "nowhere"),
    link("hard", "a.txt", tarfile.LNKTYPE),
]


def tree(entries: Sequence[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]]) -> MemoryTree:
    found = read_small(make_tar(entries))
    assert found is not None
    return found


def paths(found: Sequence[Source]) -> list[str]:
    return [source.path for source in found]


def test_a_hash_says_nothing_of_times() -> None:
    context = tree([file("a", b"x\n")])
    later = file("a", b"x\n")
    later[0].mtime = 1_700_000_000
    assert find_sources(tree([later]), "a") == find_sources(context, "a")
    assert find_sources(tree([file("a", b"x\n", 0o600)]), "a") != find_sources(context, "a")
    assert find_sources(tree([file("a", b"y\n")]), "a") != find_sources(context, "a")


def test_names_directories_and_patterns() -> None:
    context = tree(FILES)
    assert paths(find_sources(context, "/a.txt")) == ["a.txt"]
    assert paths(find_sources(context, "./d")) == ["d"]
    assert find_sources(context, "d")[0].hash.startswith("dir:")
    assert paths(find_sources(context, "*.txt")) == ["a.txt"]
    assert paths(find_sources(context, "d/*")) == ["d/a.txt", "d/b.txt", "d/sub"]
    assert paths(find_sources(context, "*/a*")) == ["d/a.txt"]
    assert find_sources(context, "zz*") == find_sources(context, "[") == []
    assert find_sources(context, "to-d")[0].hash == find_sources(context, "d")[0].hash
    assert find_sources(context, "up")[0].hash == find_sources(context, "d/a.txt")[0].hash
    assert [has_wildcards(text) for text in ("a", "a*", "a?", "[a", "a\\*", "\\\\*")] == [0, 1, 1, 1, 0, 1]


def test_several_sources_have_one_hash() -> None:
    context = tree(FILES)
    two = [*find_sources(context, "a.txt"), *find_sources(context, "d")]
    assert hash_of(two[:1]) == two[0].hash
    assert hash_of(two).startswith("multi:")


def test_what_is_not_there_or_not_inside_is_refused() -> None:
    context = tree(FILES)
    for path in ("nope", "d/nope", "broken", "a.txt/x"):
        with pytest.raises(NotFound, match=f"stat {path}: file does not exist"):
            find_sources(context, path)
    for path in ("..", "../a", "d/../../a"):
        with pytest.raises(InvalidParameter, match="Forbidden path outside the build context"):
            find_sources(context, path)
    with pytest.raises(InvalidParameter, match="too many links"):
        find_sources(context, "loop")
    assert follow(context, "to-d/../a.txt") == "a.txt"  # by its name first, then by its links
    assert follow(context, "") == follow(context, ".") == ""


def test_a_directory_of_real_files_means_the_same(tmp_path: Path) -> None:
    context = tree(FILES)
    with tarfile.open(tmp_path / "tar", "w") as tar:
        for entry in FILES:
            info, data = entry if isinstance(entry, tuple) else (entry, b"")
            (tmp_path / "x").write_bytes(data)
            with (tmp_path / "x").open("rb") as content:
                tar.addfile(info, content)
    (tmp_path / "root").mkdir()
    with tarfile.open(tmp_path / "tar") as tar:
        tar.extractall(tmp_path / "root", filter="fully_trusted")
    sums = {
        path: context.sum(path) for path in ("d", "d/a.txt", "d/b.txt", "d/sub", "d/sub/c", "a.txt", "to-d", "hard")
    }
    real = DirectoryTree(str(tmp_path / "root"), sums)
    try:
        for pattern in ("a.txt", "d", "*", "*/*", "d/sub", "to-d", "up", "hard", "nope", "loop", "../x", "."):
            assert outcome(real, pattern) == outcome(context, pattern), pattern
    finally:
        os.close(real.fd)


def outcome(where: MemoryTree | DirectoryTree, pattern: str) -> object:
    try:
        return find_sources(where, pattern)
    except EngineError as error:
        return type(error), error.message


def test_the_dockerfile_is_found_and_ignored_files_are_taken_out() -> None:
    context = tree([file("Dockerfile", b"FROM x"), file(".dockerignore", b"*"), file("a")])
    assert take_dockerfile(context, "Dockerfile") == FoundDockerfile("Dockerfile", b"FROM x")
    assert context.names("") == ["a"]
    assert take_dockerfile(tree([file("dockerfile", b"x")]), "Dockerfile") == FoundDockerfile("dockerfile", b"x")
    assert take_dockerfile(tree([link("Dockerfile", "/x"), file("x", b"y")]), "Dockerfile").content == b"y"
    assert take_dockerfile(tree([]), "other") == FoundDockerfile("other", None)
    assert take_dockerfile(tree([directory("d")]), "d").problem.endswith("is a directory")
    assert take_dockerfile(tree([file("D", bytes(2 << 20))]), "D").problem == "D is longer than 1 MiB"
    assert take_dockerfile(tree([]), "../d").problem == "Forbidden path outside the build context: ../d ()"


@given(st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=8)), max_size=6), st.integers(0, 12000))
def test_any_tar_is_read_or_left_to_a_worker(changes: list[tuple[int, bytes]], length: int) -> None:
    data = bytearray(make_tar(FILES))
    for at, piece in changes:
        data[at : at + len(piece)] = piece
    found = read_small(bytes(data[:length]))
    if found is not None:
        take_dockerfile(found, "a.txt")
        for pattern in ("*", "d", "."):
            outcome(found, pattern)


def test_what_wants_real_files_is_left_to_a_worker() -> None:
    fifo = tarfile.TarInfo("f")
    fifo.type = tarfile.FIFOTYPE
    for entries in ([fifo], [file("../a")], [link("l", "nowhere", tarfile.LNKTYPE)], [file("a"), file("a/b")]):
        assert read_small(make_tar(entries)) is None
    assert read_small(b"\x1f\x8b" + bytes(600)) is None
    assert read_small(b"no tar" * 200) is None
    assert read_small(b"") is not None
