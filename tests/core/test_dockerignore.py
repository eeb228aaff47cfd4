"""`.dockerignore`: what patterns leave out, held against a model that has nothing but loops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.dockerignore import Ignored, unwanted_files
from balenapy.errors import InvalidParameter


@pytest.mark.parametrize(
    ("text", "ignored", "kept"),
    [
        ("a", ["a", "a/b", "a/b/c"], ["b", "b/a", "aa"]),
        ("/a", ["a"], ["b/a"]),
        ("*/a", ["b/a", "b/a/c"], ["a", "b/c/a"]),
        ("**/a", ["a", "b/a", "b/c/a", "b/a/d"], ["b", "ba"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["a/x", "b"]),
        ("*.md\n!R.md", ["a.md"], ["R.md", "d/a.md"]),
        ("d\n!d/keep", ["d", "d/a"], ["d/keep", "d/keep/x"]),
        ("!a\na", ["a"], []),
        ("# c\n\n  a  \n", ["a"], ["c"]),
        ("a?\n[x-z]", ["ab", "x"], ["a", "abc", "w"]),
        ("./a//b/../c", ["a/c"], ["a/b"]),
        ("a\\*", ["a*"], ["ab"]),
        ("a.b(c)", ["a.b(c)"], ["axb(c)"]),
    ],
)
def test_patterns(text: str, ignored: list[str], kept: list[str]) -> None:
    patterns = Ignored(text)
    assert [path for path in ignored if path not in patterns] == []
    assert [path for path in kept if path in patterns] == []


def test_a_pattern_that_is_none_is_refused() -> None:
    for text in ("!", "[", "a\\"):
        with pytest.raises(InvalidParameter):
            Ignored(text)
    assert unwanted_files("[", "Dockerfile") == []


def test_the_two_files_that_the_engine_asked_for() -> None:
    assert unwanted_files("*", "Dockerfile") == [".dockerignore", "Dockerfile"]
    assert unwanted_files("*\n!Dockerfile", "Dockerfile") == [".dockerignore"]
    assert unwanted_files("sub", "./sub/Dockerfile") == ["sub/Dockerfile"]
    assert unwanted_files("", "Dockerfile") == []


def model(lines: list[str], path: str) -> bool:
    """Each pattern against the path and each directory above it, component by component."""
    parts = path.split("/")
    above = [parts[:count] for count in range(1, len(parts) + 1)]
    ignored = False
    for line in lines:
        pattern = line.removeprefix("!")
        if any(_match(pattern.split("/"), candidate) for candidate in above):
            ignored = not line.startswith("!")
    return ignored


def _match(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(path)
        return any(_match(pattern[1:], path[start:]) for start in range(len(path) + 1))
    return bool(path) and _match_name(pattern[0], path[0]) and _match(pattern[1:], path[1:])


def _match_name(pattern: str, name: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(_match_name(pattern[1:], name[start:]) for start in range(len(name) + 1))
    return bool(name) and pattern[0] in (name[0], "?") and _match_name(pattern[1:], name[1:])


NAME = st.text(alphabet="abA.", min_size=1, max_size=3).filter(lambda name: name.strip("."))
PATH = st.lists(NAME, min_size=1, max_size=4).map("/".join)
# One star never beside another: `a**` within a component is another thing in Go's words.
PART = (
    st.just("**")
    | st.text(alphabet="ab.?", min_size=1, max_size=3).filter(lambda name: name.strip("."))
    | st.sampled_from(["*", "a*", "*b", "*.a", "a*b", "?*"])
)
PATTERN = st.lists(PART, min_size=1, max_size=4).map("/".join).filter(lambda text: not text.startswith("**/**"))


@given(st.lists(st.tuples(st.booleans(), PATTERN), max_size=4), PATH)
def test_it_agrees_with_a_plain_model(patterns: list[tuple[bool, str]], path: str) -> None:
    lines = [("!" if back else "") + pattern for back, pattern in patterns]
    assert (path in Ignored("\n".join(lines))) == model(lines, path)


@given(st.text(max_size=40), PATH)
def test_any_text_is_read_or_refused(text: str, path: str) -> None:
    try:
        assert (path in Ignored(text)) in (True, False)
    except InvalidParameter:
        pass
