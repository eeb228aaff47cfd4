"""Build arguments: which value is seen where."""

from __future__ import annotations

from balenapy.core.buildargs import BuildArgs


def test_scopes_and_defaults() -> None:
    arguments = BuildArgs({"given": "g", "null": None})
    arguments.declare_outer("outer", "o")
    arguments.declare_outer("given", "default")
    assert arguments.for_from() == {"outer": "o", "given": "g"}
    arguments.begin_stage()
    assert arguments.for_stage() == {}
    arguments.declare("outer", None)
    arguments.declare("null", "n")
    arguments.declare("unset", None)
    assert arguments.for_stage() == {"outer": "o", "null": "n"}
    arguments.begin_stage()
    assert arguments.for_stage() == {}


def test_variables_of_the_image_win_and_only_what_was_declared_is_told() -> None:
    arguments = BuildArgs({"HTTP_PROXY": "p", "a": "1", "lost": "x"})
    arguments.declare("a", None)
    arguments.declare("b", "2")
    assert arguments.environment({"b"}) == {"HTTP_PROXY": "p", "a": "1"}
    environment = arguments.environment(())
    assert arguments.marked(environment, ["sh", "-c", "x"]) == ["|2", "a=1", "b=2", "sh", "-c", "x"]
    assert arguments.marked({"HTTP_PROXY": "p"}, ["x"]) == ["|0", "x"]
    assert arguments.marked({}, ["x"]) == ["x"]
    arguments.declare("HTTP_PROXY", None)
    assert arguments.marked(arguments.environment(()), ["x"]) == ["|3", "HTTP_PROXY=p", "a=1", "b=2", "x"]
    assert arguments.unused() == ["lost"]
    assert BuildArgs({"SOURCE_DATE_EPOCH": "1"}).unused() == []
