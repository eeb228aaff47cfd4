"""Build arguments: which are set where.

An argument means something from its ARG to the end of the stage. Before the first FROM it means something to FROMs,
and its value is what a later `ARG name` without one gets. `--build-arg` beats every default. Proxies need no ARG, and
without one they are kept out of history and cache.

Source: moby builder/dockerfile/buildargs.go, dispatchers.go prependEnvOnCmd.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

PREDEFINED = frozenset(
    (
        "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "FTP_PROXY", "ftp_proxy", "NO_PROXY", "no_proxy",
    )
)  # fmt: skip
# Ours: it says what time it is for the whole build, see engine/build.
SOURCE_DATE_EPOCH = "SOURCE_DATE_EPOCH"


class BuildArgs:
    """The arguments of one build. `None` is: named, but without a value."""

    def __init__(self, given: Mapping[str, str | None]) -> None:
        self._given = dict(given)
        self._outer: dict[str, str | None] = {}  # of ARGs before the first FROM
        self._inner: dict[str, str | None] = {}  # of the present stage
        self._mentioned: set[str] = {SOURCE_DATE_EPOCH}

    def begin_stage(self) -> None:
        self._inner.clear()

    def declare_outer(self, name: str, default: str | None) -> None:
        self.declare(name, default)
        self._outer[name] = default

    def declare(self, name: str, default: str | None) -> None:
        self._inner[name] = default
        self._mentioned.add(name)

    def for_from(self) -> dict[str, str]:
        """What FROM sees."""
        return self._values(self._outer)

    def for_stage(self) -> dict[str, str]:
        """What instructions see at this place of the stage."""
        return self._values(self._inner)

    def environment(self, env: Collection[str]) -> dict[str, str]:
        """What RUN gets beside the image's own variables, which win."""
        return {name: value for name, value in self.for_stage().items() if name not in env}

    def marked(self, environment: Mapping[str, str], command: Sequence[str]) -> list[str]:
        """The command as cache and history know it: `|2 A=1 B=2 …`; no RUN begins like that."""
        if not environment:
            return list(command)
        told = [f"{name}={value}" for name, value in environment.items() if self._is_told(name)]
        return [f"|{len(told)}", *sorted(told), *command]

    def unused(self) -> list[str]:
        """What was given for nothing."""
        return sorted(name for name in self._given if name not in self._mentioned and name not in PREDEFINED)

    def _is_told(self, name: str) -> bool:
        return name in self._inner or name not in PREDEFINED

    def _values(self, declared: Mapping[str, str | None]) -> dict[str, str]:
        values = {name: self._value(name, declared.get(name)) for name in sorted({*declared, *PREDEFINED})}
        return {name: value for name, value in values.items() if value is not None}

    def _value(self, name: str, default: str | None) -> str | None:
        given = self._given.get(name)
        if given is not None:
            return given
        return default if default is not None else self._outer.get(name)
