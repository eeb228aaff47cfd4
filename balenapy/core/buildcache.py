"""Which image a build step finds made already.

A step is known by its parent and by the config that its container would have: the command above all, which holds the
instruction, the arguments and the hash of files. Of several the youngest is taken.

With `cachefrom` images are asked instead that may have been built elsewhere: their history must begin as the parent's,
and go on with the step.

Source: moby image/cache/{cache,compare}.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from balenapy.core.container import ContainerConfig
from balenapy.core.manifest import HistoryEntry, ImageConfig


class Candidate(Protocol):
    """A local image whose parent is the one in question."""

    @property
    def config(self) -> ImageConfig: ...

    @property
    def created_ns(self) -> int: ...


def same_config(one: ContainerConfig, other: ContainerConfig) -> bool:
    """Whether two configs are the same step. Names of hosts and the like do not count."""
    return (
        not one.open_stdin
        and not other.open_stdin
        and (one.attach_stdout, one.attach_stderr, one.user, one.tty)
        == (other.attach_stdout, other.attach_stderr, other.user, other.tty)
        and (one.cmd or []) == (other.cmd or [])
        and (one.env or []) == (other.env or [])
        and (one.entrypoint or []) == (other.entrypoint or [])
        and (one.labels or {}) == (other.labels or {})
        and set(one.exposed_ports or ()) == set(other.exposed_ports or ())
        and set(one.volumes or ()) == set(other.volumes or ())
    )


def continues(target: ImageConfig, parent: ImageConfig | None) -> bool:
    """Whether an image may have been built on this parent: history and layers begin the same."""
    if not target.history:
        return False
    if parent is None or not (parent.history or parent.diff_ids):
        return True
    length = len(parent.history)
    return (
        length < len(target.history)
        and tuple(parent.history) == tuple(target.history[:length])
        and tuple(parent.diff_ids) == tuple(target.diff_ids[: len(parent.diff_ids)])
    )


def is_step(entry: HistoryEntry, command: Sequence[str]) -> bool:
    """Whether an entry of history is the step with this command."""
    return entry.created_by == " ".join(command)


def layers_before(history: Iterable[HistoryEntry], length: int) -> int:
    """How many layers the first `length` entries have."""
    return sum(not entry.empty_layer for entry in list(history)[:length])
