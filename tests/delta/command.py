"""`balenapy-delta` in this process."""

from __future__ import annotations

import contextlib
import io

from delta import cli


def run(*arguments: object) -> int:
    """The exit status. Its output is dropped: what passing tests print is told at the end of the suite."""
    with contextlib.redirect_stdout(io.StringIO()):
        return cli.main([*map(str, arguments)])


def output_of(*arguments: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([*map(str, arguments)]) == 0
    return out.getvalue()
