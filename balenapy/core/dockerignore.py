"""`.dockerignore`: which paths of a build context are not wanted.

One pattern a line, comments begin with `#`. A pattern is cleaned like a path and loses its leading slash; it matches a
path or any directory above it; `!` takes back; the last pattern that matches counts.

Leaving files out is the client's work. The engine asks for two files only, see `unwanted_files`.

Sources: moby builder/dockerignore/dockerignore.go, pkg/fileutils/fileutils.go, builder/remotecontext/detect.go.
"""

from __future__ import annotations

import posixpath
import re

from balenapy.core.gotext import BLANKS
from balenapy.core.pathmatch import to_expression
from balenapy.errors import EngineError, InvalidParameter

FILE_NAME = ".dockerignore"


class Ignored:
    """The patterns of one file."""

    def __init__(self, text: str) -> None:
        """Raises: InvalidParameter, for a pattern that is none."""
        self._patterns: list[tuple[re.Pattern[str], bool]] = []
        for line in text.removeprefix("\ufeff").split("\n"):
            if line.startswith("#"):
                continue
            line = line.strip(BLANKS)
            takes_back = line.startswith("!")
            pattern = line[1:].strip(BLANKS) if takes_back else line
            if not pattern:
                if takes_back:
                    raise InvalidParameter('illegal exclusion pattern: "!"')
                continue
            try:
                expression = re.compile(to_expression(_clean(pattern), deep=True), re.DOTALL)
            except EngineError as error:
                raise InvalidParameter(f"error checking context: {error.message}: {pattern}") from error
            self._patterns.append((expression, takes_back))

    def __contains__(self, path: str) -> bool:
        """Whether a path, relative and clean, is left out."""
        parts = path.split("/")
        candidates = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        found = False
        for expression, takes_back in self._patterns:
            if any(expression.fullmatch(candidate) for candidate in candidates):
                found = not takes_back
        return found


def unwanted_files(ignore_text: str, dockerfile: str) -> list[str]:
    """What the engine itself takes out of a context that it got: the two files, when they are ignored.

    Clients send both whatever the patterns say, since the engine needs them; COPY must not see them then.
    """
    try:
        ignored = Ignored(ignore_text)
    except InvalidParameter:  # a client that knows more: nothing is taken out, there neither
        return []
    return [path for path in (FILE_NAME, _clean(dockerfile)) if path in ignored]


def _clean(pattern: str) -> str:
    clean = posixpath.normpath(pattern)
    while len(clean) > 1 and clean.startswith("/"):
        clean = clean[1:]
    return clean
