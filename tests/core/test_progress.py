"""Progress lines are the reference engine's, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core import progress

FIXTURES = Path(__file__).parent.parent / "data" / "fixtures"


def rebuilt(line: dict[str, Any]) -> bytes:
    """The same line made by our functions from its values alone."""
    if "stream" in line:
        return progress.stream(line["stream"])
    if "aux" in line:
        return progress.aux(line["aux"], with_progress="progressDetail" in line)
    detail = line.get("progressDetail")
    if detail is None:
        return progress.message(line["status"], line.get("id", ""))
    if not detail:
        return progress.step(line["id"], line["status"])
    return progress.advance(line["id"], line.get("status", ""), detail.get("current", 0), detail.get("total", 0))


@pytest.mark.parametrize(
    "name",
    [
        "pull_new",
        "pull_up_to_date",
        "pull_balena_shape",
        "push_new",
        "push_exists",
        "load_progress",
        "load_quiet",
        "import",
    ],
)
def test_recorded_streams_are_made_byte_for_byte(name: str) -> None:
    for recorded in (FIXTURES / f"{name}.jsonl").read_bytes().splitlines():
        assert recorded + b"\r\n" == rebuilt(json.loads(recorded))


def test_an_error_line_names_the_message_twice() -> None:
    assert progress.error("no <b>") == (
        b'{"errorDetail":{"message":"no \\u003cb\\u003e"},"error":"no \\u003cb\\u003e"}\r\n'
    )


def test_nothing_done_yet_leaves_current_out() -> None:
    assert json.loads(progress.advance("a", "Downloading", 0, 10)) == {
        "status": "Downloading",
        "progressDetail": {"total": 10},
        "progress": "[>" + " " * 50 + "]       0B/10B",
        "id": "a",
    }


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (999, "999B"), (1000, "1kB"), (33792, "33.79kB"), (1984287, "1.984MB"), (999999, "1000kB")],
)
def test_sizes_have_four_digits_in_decimal_units(size: int, text: str) -> None:
    assert progress.human_size(size) == text


@given(st.integers(-1, 1 << 62), st.integers(-1, 1 << 62))
def test_the_bar_never_grows(current: int, total: int) -> None:
    text = progress.progress_text(current, total)

    assert not text.startswith("[") or text.index("]") == progress.BAR_CELLS + 2


def test_updates_are_held_back_until_time_and_bytes_have_passed() -> None:
    limit = progress.UpdateLimit()

    assert limit.allows("a", 1, 1000, 0.0)
    assert not limit.allows("a", 500, 1000, 0.05)  # too soon
    assert not limit.allows("a", 5, 1000, 0.5)  # too little
    assert limit.allows("a", 11, 1000, 0.5)
    assert limit.allows("b", 1, 1000, 0.5)  # another layer
    assert limit.allows("a", 1000, 1000, 0.5)  # the last one always
