"""The Docker CLI with one environment, as the compatibility tests speak to it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from tests.engine_process import EngineProcess
from tests.terminal import Terminal


class Cli:
    def __init__(self, engine: EngineProcess, env: Mapping[str, str]) -> None:
        self.engine = engine
        self._env = env

    def __call__(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run to the end; fails the test unless the exit status is 0 (`check=False`: any)."""
        return self.engine.docker(*arguments, env=self._env, **options)

    def out(self, *arguments: str, **options: Any) -> str:
        """What it prints, without the last newline."""
        return self(*arguments, **options).stdout.strip()

    def lines(self, *arguments: str, **options: Any) -> list[str]:
        return self.out(*arguments, **options).splitlines()

    def fails(self, *arguments: str, status: int = 1, **options: Any) -> str:
        """Run what must end with `status`; what it says on stderr."""
        done = self(*arguments, check=False, **options)
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done.stderr

    def start(self, *arguments: str) -> str:
        """`docker run -d ...`, the container's ID."""
        return self.out("run", "-d", *arguments)

    def state(self, container: str, field: str = "Status") -> str:
        return self.out("inspect", "-f", "{{.State." + field + "}}", container)

    def terminal(self, *arguments: str, **options: Any) -> Terminal:
        return self.engine.docker_terminal(*arguments, env=self._env, **options)

    @contextlib.contextmanager
    def process(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        with self.engine.docker_process(*arguments, env=self._env) as process:
            yield process
