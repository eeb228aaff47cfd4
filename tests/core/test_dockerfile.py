"""Dockerfiles: lines, splitting, what is refused and in which words; any bytes are read or refused."""

from __future__ import annotations

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from balenapy.core.dockerfile import Dockerfile, Instruction, parse_dockerfile, parse_line, show, trigger_of
from balenapy.errors import InvalidParameter


def steps(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Of a file whose FROM is left out: names and words."""
    return [(one.name, one.words) for one in parse_dockerfile(f"FROM x\n{text}".encode()).instructions]


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidParameter) as caught:
        parse_dockerfile(data)
    return caught.value.message


def test_stages_and_arguments_before_them() -> None:
    file = parse_dockerfile(b"ARG V=1\nFROM a:$V AS One\nRUN x\nfrom --platform=linux/arm b\nLABEL k=v\n")
    assert [one.source for one in file.arguments] == ["ARG V=1"]
    assert [(stage.base, stage.name, stage.platform) for stage in file.stages] == [
        ("a:$V", "one", ""),
        ("b", "", "linux/arm"),
    ]
    assert [one.name for one in file.stages[0].instructions] == ["RUN"]
    assert file.find_stage("ONE") == 0
    assert file.find_stage("0") is file.find_stage("two") is None


def test_lines_go_on_over_comments_and_blank_ones_with_a_warning() -> None:
    file = parse_dockerfile(b"\xef\xbb\xbf# c\nFROM x\r\n  RUN a \\\n# c\n   # d\n\n  b\\\t\n c\nRUN d\n")
    assert [one.words for one in file.stages[0].instructions] == [("a   b c",), ("d",)]
    assert [one.line for one in file.stages[0].instructions] == [3, 9]
    assert file.warnings[0] == "[WARNING]: Empty continuation line found in:\n    RUN a   b c"
    assert len(file.warnings) == 2


def test_the_escape_is_a_directive_of_the_first_lines() -> None:
    assert parse_dockerfile(b"# syntax=any\n# escape=`\nFROM x\nRUN a`\n b\\\n").stages[0].instructions[0].words == (
        "a b\\",
    )
    assert parse_dockerfile(b"# c\n# escape=`\nFROM x\n").escape == "\\"
    assert refusal(b"#escape=z\nFROM x") == "invalid ESCAPE 'z'. Must be ` or \\"
    assert refusal(b"#escape=`\n# ESCAPE = `\nFROM x") == "only one escape parser directive can be used"


def test_each_instruction_splits_by_its_own_rule() -> None:
    assert steps('CMD ["a", "b c"] tail') == [("CMD", ("a", "b c"))]
    assert steps("CMD ['a']") == [("CMD", ("['a']",))]
    assert steps("RUN") == [("RUN", ())]
    assert steps('COPY ["a b", "c"]\nCOPY a  b\tc') == [("COPY", ("a b", "c")), ("COPY", ("a", "b", "c"))]
    assert steps("ENV a=b c='d e' f=$g") == [("ENV", ("a", "b", "c", "'d e'", "f", "$g"))]
    assert steps("ENV a b  c") == [("ENV", ("a", "b  c"))]
    assert steps('ARG a b="c d"') == [("ARG", ("a", 'b="c d"'))]
    assert steps("EXPOSE 90 80/udp") == [("EXPOSE", ("80/udp", "90"))]
    assert steps('VOLUME [" /a "]\nVOLUME /b /c') == [("VOLUME", ("/a",)), ("VOLUME", ("/b", "/c"))]
    assert steps("USER a b") == [("USER", ("a b",))]
    assert steps('HEALTHCHECK --retries=3 CMD ["x"]') == [("HEALTHCHECK", ("CMD", "x"))]
    assert parse_line("COPY --from=a --chown='b' x y").flags == (("from", "a"), ("chown", "b"))
    assert trigger_of(parse_line("onbuild  run a  b")) == "run a  b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("FOO bar", "unknown instruction: FOO"),
        ("RUNN x", "unknown instruction: RUNN (did you mean RUN?)"),
        ("EVN a=b", "unknown instruction: EVN (did you mean ENV?)"),
        ("FROM", "FROM requires either one or three arguments"),
        ("FROM a b", "FROM requires either one or three arguments"),
        ("FROM a AS 1x", 'invalid name for build stage: "1x", name can\'t start with a number or contain symbols'),
        (
            "COPY a",
            "COPY requires at least two arguments, but only one was provided. Destination could not be determined.",
        ),
        ("COPY --zz a b", "Unknown flag: zz"),
        ("COPY --chown=a --chown=b a b", "Duplicate flag specified: chown"),
        ("COPY --chown a b", "Missing a value on flag: chown"),
        ("RUN --mount=x y", "Unknown flag: mount"),
        ("LABEL", "LABEL requires at least one argument"),
        ("ENV =x", "ENV names can not be blank"),
        ("ARG =x", "ARG names can not be blank"),
        ("ARG", "ARG requires at least one argument"),
        ("EXPOSE", "EXPOSE requires at least one argument"),
        ("WORKDIR", "WORKDIR requires exactly one argument"),
        ("VOLUME", "VOLUME requires at least one argument"),
        ('VOLUME [""]', "VOLUME specified can not be an empty string"),
        ("SHELL sh", "SHELL requires the arguments to be in JSON form"),
        ("SHELL []", "SHELL requires at least one argument"),
        ("ONBUILD", "ONBUILD requires at least one argument"),
        ("ONBUILD ONBUILD RUN x", "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"),
        ("ONBUILD maintainer x", "MAINTAINER isn't allowed as an ONBUILD trigger"),
        ("HEALTHCHECK ZZ", 'Unknown type "ZZ" in HEALTHCHECK (try CMD)'),
        ("HEALTHCHECK NONE x", "HEALTHCHECK NONE takes no arguments"),
        ("HEALTHCHECK --interval=1 CMD x", 'time: missing unit in duration "1"'),
        ("HEALTHCHECK --interval=0s CMD x", 'Interval "interval" cannot be less than 1ms'),
        ("HEALTHCHECK --retries=x CMD x", 'strconv.ParseInt: parsing "x": invalid syntax'),
        ("HEALTHCHECK --retries=99999999999 CMD x", 'strconv.ParseInt: parsing "99999999999": value out of range'),
    ],
)
def test_a_wrong_instruction_is_told_with_its_line(line: str, message: str) -> None:
    assert refusal(f"FROM x\n\n{line}\n".encode()) == f"Dockerfile parse error line 3: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "No image was generated. Is your Dockerfile empty?"),
        ("# c\n\n", "No image was generated. Is your Dockerfile empty?"),
        ("ARG a=b", "No image was generated. Is your Dockerfile empty?"),
        ("RUN x\nFROM x", "no build stage in current context"),
        ("FROM x\nENV a", "ENV must have two arguments"),
        ("FROM x\nENV a=b c", 'Syntax error - can\'t find = in "c". Must be of the form: name=value'),
        ("FROM x\nCMD [1]", "when using JSON array syntax, arrays must be comprised of strings only"),
        ("FROM x\nONBUILD ENV a", "ENV must have two arguments"),
        ("FROM x\nRUN " + "a" * 65536, "dockerfile line greater than max allowed size of 65535"),
    ],
)
def test_what_cannot_be_split_is_told_without_a_line(text: str, message: str) -> None:
    assert refusal(text.encode()) == message


LINES = st.one_of(
    st.sampled_from(
        [
            "FROM scratch", "FROM a AS b", "ARG a=b", "RUN x", 'CMD ["a"]', "ENV a=b c=d", "ENV a b", "LABEL x='y z'",
            "COPY --from=0 a b", "ADD a b c/", "ONBUILD RUN x", "HEALTHCHECK --interval=5s CMD x", "HEALTHCHECK NONE",
            'SHELL ["a"]', "EXPOSE 1 2", "VOLUME /a", "USER a", "WORKDIR /", "STOPSIGNAL 9", "MAINTAINER me", "# c", "",
            "RUN a \\", "RUN b \\\\", "  b", "# escape=`", "RUN c `",
        ]
    ),
    st.text(alphabet="aA1 \t\\`'\"$={}[]#-:/,\u00e9\u2028", max_size=12),
)  # fmt: skip


@given(st.lists(LINES, max_size=8), st.sampled_from(["", "FROM x\n"]))
def test_a_file_that_is_printed_and_read_again_is_the_same(lines: list[str], head: str) -> None:
    try:
        file = parse_dockerfile((head + "\n".join(lines)).encode())
    except InvalidParameter:
        event("refused")
        return
    event(f"{min(len(file.instructions), 3)} instructions")
    again = parse_dockerfile(show(file).encode("utf-8", "surrogateescape"))
    assert again == Dockerfile(file.arguments, file.stages, file.escape)


@given(st.binary(max_size=200) | st.lists(LINES, max_size=6).map(lambda lines: "\n".join(["FROM x", *lines]).encode()))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for text in (data, b"FROM x\n" + data, b"FROM x\nRUN " + data):
        try:
            parse_dockerfile(text)
        except InvalidParameter:
            continue


def test_an_instruction_has_its_flags_by_name() -> None:
    assert Instruction("COPY", flags=(("a", "1"),)).flag("a") == "1"
    assert Instruction("COPY").flag("a") == ""
