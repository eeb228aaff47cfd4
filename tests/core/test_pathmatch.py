"""Go's path.Match."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.pathmatch import path_match
from balenapy.errors import SystemFailure

# Source: Go src/path/match_test.go
CASES = [
    ("abc", "abc", True),
    ("*", "abc", True),
    ("*c", "abc", True),
    ("a*", "a", True),
    ("a*", "abc", True),
    ("a*", "ab/c", False),
    ("a*/b", "abc/b", True),
    ("a*/b", "a/c/b", False),
    ("a*b*c*d*e*/f", "axbxcxdxe/f", True),
    ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", False),
    ("ab[c]", "abc", True),
    ("ab[b-d]", "abc", True),
    ("ab[e-g]", "abc", False),
    ("ab[^c]", "abc", False),
    ("ab[^e-g]", "abc", True),
    ("a\\*b", "a*b", True),
    ("a\\*b", "ab", False),
    ("a?b", "a☺b", True),
    ("a[^a]b", "a☺b", True),
    ("a???b", "a☺b", False),
    ("[a-ζ]*", "α", True),
    ("*[a-ζ]", "A", False),
    ("a?b", "a/b", False),
    ("a*b", "a/b", False),
    ("[\\]a]", "]", True),
    ("[\\-]", "-", True),
    ("[x\\-]", "x", True),
    ("[x\\-]", "z", False),
    ("[\\-x]", "a", False),
    ("*x", "xxx", True),
]
BROKEN = ["[]a]", "[-]", "[x-]", "[-x]", "[a-b-c]", "[", "[^", "[^bc", "a[", "\\"]


@pytest.mark.parametrize(("pattern", "name", "matches"), CASES)
def test_patterns_match_as_in_go(pattern: str, name: str, matches: bool) -> None:
    assert path_match(pattern, name) is matches


@pytest.mark.parametrize("pattern", BROKEN)
def test_a_broken_pattern_is_told(pattern: str) -> None:
    with pytest.raises(SystemFailure) as caught:
        path_match(pattern, "a")
    assert caught.value.message == "syntax error in pattern"


@given(st.text(alphabet="ab-[]^\\*?/"), st.text(alphabet="ab-/"))
def test_any_pattern_matches_or_is_refused(pattern: str, name: str) -> None:
    try:
        path_match(pattern, name)
    except SystemFailure as error:
        assert error.message == "syntax error in pattern"  # noqa: PT017  # either outcome is right
