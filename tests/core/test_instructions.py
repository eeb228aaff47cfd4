"""Lines that change a config: what dockerd makes of them, and its words for what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import wire
from balenapy.core.container import ContainerConfig
from balenapy.core.dockerfile import parse_lines
from balenapy.core.instructions import apply_changes
from balenapy.core.shellwords import expand, expand_words, split_words
from balenapy.errors import InvalidParameter

VARIABLES = {"A": "one", "B": "two words", "EMPTY": "", "C3": "three"}


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("plain", "plain"),
        ("$A", "one"),
        ("${A}x", "onex"),
        ("$A$C3", "onethree"),
        ("$NOPE", ""),
        ("$", "$"),
        ("a$ b", "a$ b"),
        (r"\$A", "$A"),
        ("'$A'", "$A"),
        ('"$A \'x\'"', "one 'x'"),
        (r'"\$A \" \n"', r'$A " \n'),
        ("${NOPE:-else}", "else"),
        ("${A:-else}", "one"),
        ("${EMPTY:-$B}", "two words"),
        ("${A:+yes}", "yes"),
        ("${NOPE:+yes}", ""),
        ("$1x", "x"),
        ("a\\", "a"),
    ],
)
def test_words_are_expanded(word: str, wanted: str) -> None:
    assert expand(word, VARIABLES) == wanted


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("${", "syntax error: missing '}'"),
        ("${A", "missing ':' in substitution"),
        ("${}", "syntax error: bad substitution"),
        ("${A:-x", "syntax error: missing '}'"),
        ("${A:?x}", "unsupported modifier (?) in substitution"),
        ("${A?x}", "missing ':' in substitution"),
        ("'a", "unexpected end of statement while looking for matching single-quote"),
        ('"a', "unexpected end of statement while looking for matching double-quote"),
    ],
)
def test_bad_words_are_named(word: str, problem: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        expand(word, VARIABLES)
    shown = word.replace('"', '\\"')
    assert caught.value.message == f'failed to process "{shown}": {problem}'


def test_words_split_at_blanks_that_variables_bring_but_not_at_quoted_ones() -> None:
    assert expand_words("$B", VARIABLES) == ["two", "words"]
    assert expand_words('"$B"', VARIABLES) == ["two words"]
    assert split_words(r"""a="x y" b='p q' c=r\ s  d""") == ['a="x y"', "b='p q'", r"c=r\ s", "d"]


@given(st.text())
def test_any_text_is_expanded_or_refused(text: str) -> None:
    try:
        expand(text, VARIABLES)
        expand_words(text, VARIABLES)
    except InvalidParameter:
        pass
    split_words(text)


def changed(*changes: str, **config: Any) -> dict[str, Any]:
    """What of an empty config (or one with these fields) the lines change."""
    before = ContainerConfig(**config)
    shown_before = wire.encode(before)
    after = wire.encode(apply_changes(before, changes))
    assert wire.encode(before) == shown_before
    return {key: value for key, value in after.items() if value != shown_before.get(key)}


def test_each_instruction() -> None:
    shell = ["/bin/sh", "-c"]
    assert changed('CMD ["a","b c"]') == {"Cmd": ["a", "b c"]}
    assert changed("cmd echo $A") == {"Cmd": [*shell, "echo $A"]}
    assert changed("CMD x", shell=["/bin/bash"]) == {"Cmd": ["/bin/bash", "x"]}
    assert changed('ENTRYPOINT ["e"]', cmd=["old"]) == {"Entrypoint": ["e"], "Cmd": None}
    assert changed("CMD new", 'ENTRYPOINT ["e"]') == {"Entrypoint": ["e"], "Cmd": [*shell, "new"]}
    assert changed("ENV A=1 B='two words' C=$A", env=["A=0", "P=/bin"]) == {
        "Env": ["A=1", "P=/bin", "B=two words", "C=0"]
    }
    assert changed("ENV A 1 2 3") == {"Env": ["A=1 2 3"]}
    assert changed("LABEL a=b", "LABEL c d", labels={"a": "x"}) == {"Labels": {"a": "b", "c": "d"}}
    assert changed("EXPOSE 80 53/udp 8000-8001") == {
        "ExposedPorts": {"53/udp": {}, "8000/tcp": {}, "8001/tcp": {}, "80/tcp": {}}
    }
    assert changed("EXPOSE $P", env=["P=1 2"]) == {"ExposedPorts": {"1/tcp": {}, "2/tcp": {}}}
    assert changed("USER nobody:users") == {"User": "nobody:users"}
    assert changed("WORKDIR a", "WORKDIR ../b") == {"WorkingDir": "/b"}
    assert changed("WORKDIR $D/x", env=["D=/srv"]) == {"WorkingDir": "/srv/x"}
    assert changed("VOLUME /a /b") == changed('VOLUME ["/a","/b"]') == {"Volumes": {"/a": {}, "/b": {}}}
    assert changed("STOPSIGNAL SIGUSR1") == {"StopSignal": "SIGUSR1"}
    assert changed("ONBUILD RUN make", "ONBUILD COPY . /") == {"OnBuild": ["RUN make", "COPY . /"]}
    assert changed("HEALTHCHECK NONE") == {"Healthcheck": {"Test": ["NONE"]}}
    assert changed("HEALTHCHECK --interval=5s --retries=2 CMD curl localhost") == {
        "Healthcheck": {"Test": ["CMD-SHELL", "curl localhost"], "Interval": 5 * 10**9, "Retries": 2}
    }
    assert changed('HEALTHCHECK CMD ["x"]') == {"Healthcheck": {"Test": ["CMD", "x"]}}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("RUN x", "run is not a valid change command"),
        ("foo", "foo is not a valid change command"),
        ("ENV", "ENV requires at least one argument"),
        ("ENV A", "ENV must have two arguments"),
        ("ENV A=1 b", 'Syntax error - can\'t find = in "b". Must be of the form: name=value'),
        ("ENV =1", "ENV names can not be blank"),
        ("LABEL =1", "LABEL names can not be blank"),
        ("EXPOSE", "EXPOSE requires at least one argument"),
        ("EXPOSE zz", "Invalid containerPort: zz"),
        ("EXPOSE 80/zz", "Invalid proto: zz"),
        ("USER", "USER requires exactly one argument"),
        ("USER --x a", "Unknown flag: x"),
        ("VOLUME", "VOLUME requires at least one argument"),
        ('VOLUME [""]', "VOLUME specified can not be an empty string"),
        ("CMD [1]", "when using JSON array syntax, arrays must be comprised of strings only"),
        ("STOPSIGNAL NOPE", "Invalid signal: NOPE"),
        ("ONBUILD ONBUILD RUN x", "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"),
        ("ONBUILD FROM x", "FROM isn't allowed as an ONBUILD trigger"),
        ("HEALTHCHECK", "HEALTHCHECK requires at least one argument"),
        ("HEALTHCHECK NONE x", "HEALTHCHECK NONE takes no arguments"),
        ("HEALTHCHECK ZZ", 'Unknown type "ZZ" in HEALTHCHECK (try CMD)'),
        ("HEALTHCHECK CMD", "Missing command after HEALTHCHECK CMD"),
        ("HEALTHCHECK --retries=-1 CMD x", "--retries must be at least 1 (not -1)"),
        ("HEALTHCHECK --retries=1 --retries=2 CMD x", "Duplicate flag specified: retries"),
        ("HEALTHCHECK --interval=1us CMD x", 'Interval "interval" cannot be less than 1ms'),
        ("WORKDIR $NOPE", "cannot normalize nothing"),
        ("USER ${", "failed to process \"${\": syntax error: missing '}'"),
    ],
)
def test_what_is_wrong_is_said_in_the_reference_engines_words(line: str, problem: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        apply_changes(ContainerConfig(), ["ENV X=1", line])
    assert caught.value.message == problem


def test_nothing_is_changed_by_a_line_before_a_bad_name() -> None:
    config = ContainerConfig()
    with pytest.raises(InvalidParameter, match="run is not a valid change command"):
        apply_changes(config, ["ENV X=1", "RUN x"])
    assert config == ContainerConfig()


def test_lines_go_on_after_a_backslash() -> None:
    lines = parse_lines("ENV A=1 \\\n # comment\n B=2\n\n# c\nUSER u")
    assert [(one.name, one.words, one.line) for one in lines] == [("ENV", ("A", "1", "B", "2"), 1), ("USER", ("u",), 6)]


@given(st.lists(st.text(), max_size=4))
def test_any_lines_are_applied_or_refused(lines: list[str]) -> None:
    try:
        apply_changes(ContainerConfig(), lines)
    except InvalidParameter:
        pass
