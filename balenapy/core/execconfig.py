"""What a client asks of an exec, and how one is shown."""

# ruff: noqa: RUF009  (the kinds make dataclass fields)

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from balenapy.core.wire import flag, optional, text


@dataclass(slots=True)
class ExecConfig:
    """Body of `POST /containers/{id}/exec`."""

    GO: ClassVar[str] = "types.ExecConfig"
    user: str = text("User")
    privileged: bool = flag("Privileged")
    tty: bool = flag("Tty")
    attach_stdin: bool = flag("AttachStdin")
    attach_stderr: bool = flag("AttachStderr")
    attach_stdout: bool = flag("AttachStdout")
    detach: bool = flag("Detach")
    detach_keys: str = text("DetachKeys")
    env: list[str] | None = optional("Env")
    working_dir: str = text("WorkingDir")
    cmd: list[str] | None = optional("Cmd")  # not a StrSlice: a bare string is refused


@dataclass(slots=True)
class ExecStart:
    """Body of `POST /exec/{id}/start`."""

    GO: ClassVar[str] = "types.ExecStartCheck"
    detach: bool = flag("Detach")
    tty: bool = flag("Tty")
