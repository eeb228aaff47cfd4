"""Where people's habits with docker's client meet ours: short flags, groups, templates, exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from balenapy.cli.client import ClientError
from balenapy.cli.containers import create_body
from balenapy.cli.format import print_rows, render
from balenapy.cli.main import _without_group, build_parser, main

ROWS: list[dict[str, Any]] = [{"ID": "4f", "Names": "one"}, {"ID": "5a", "Names": "two"}]


def test_h_is_the_hostname_of_run() -> None:
    body = create_body(build_parser().parse_args(["run", "-h", "box", "busybox"]), detached=False)
    assert body["Hostname"] == "box"


@pytest.mark.parametrize(
    ("typed", "verb"),
    [
        ("container ls -a", "ps -a"),
        ("container rm x", "rm x"),
        ("image ls", "images"),
        ("image rm x", "rmi x"),
        ("-H unix:///x image history y", "-H unix:///x history y"),
        ("run image ls", "run image ls"),
        ("inspect container", "inspect container"),
    ],
)
def test_groups_are_other_names_of_verbs(typed: str, verb: str) -> None:
    assert list(_without_group(typed.split())) == verb.split()


@pytest.mark.parametrize(
    ("typed", "code", "text"),
    [
        ("pull", 1, "'balenapy pull' requires image"),
        ("ps x", 1, "does not take the argument 'x'"),
        ("ps --zz", 125, "unknown flag: --zz"),
        ("zz", 1, "unknown command: balenapy zz"),
        ("run --memory zz busybox", 125, "argument -m/--memory"),
    ],
)
def test_wrong_usage(typed: str, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    assert ended.value.code == code
    assert text in capsys.readouterr().err


def test_a_socket_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-H", f"unix://{tmp_path}/none", "ps"]) == 1
    assert main(["-H", f"unix://{tmp_path}/none", "run", "busybox"]) == 125
    assert "Cannot connect to the engine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{.Name}}", "/x"),
        ("{{ .State.Running }} {{.State.ExitCode}}", "true 3"),
        ("{{json .State}}", '{"Running":true,"ExitCode":3}'),
        ("{{.Args}} {{.Nothing}}", "[a b] <no value>"),
        ("{{json .Args}}", '["a","b"]'),
    ],
)
def test_templates(template: str, expected: str) -> None:
    value = {"Name": "/x", "State": {"Running": True, "ExitCode": 3}, "Args": ["a", "b"], "Nothing": None}
    assert render(template, value) == expected


@pytest.mark.parametrize("template", ["{{.Zz}}", "{{range .Args}}x{{end}}", "{{.A"])
def test_a_template_that_is_not_understood_is_refused(template: str) -> None:
    with pytest.raises(ClientError, match="template parsing error"):
        render(template, {"A": 1})


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("{{.Names}}", "one\ntwo\n"),
        ("{{.ID}}\\t{{.Names}}", "4f\tone\n5a\ttwo\n"),
        ("table {{.Names}}\\t{{.ID}}", "NAMES     THE ID\none       4f\ntwo       5a\n"),
        ("json", '{"ID":"4f","Names":"one"}\n{"ID":"5a","Names":"two"}\n'),
        ("", "THE ID    NAMES\n4f        one\n5a        two\n"),
    ],
)
def test_format_of_lists(form: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, ["ID", "Names"], {"ID": "THE ID"}, form)
    assert capsys.readouterr().out == expected
