"""What collection keeps: everything reachable from the roots. Pure, so that it is tested with literal graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Node = TypeVar("Node")


def reachable(roots: Iterable[Node], references: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """The roots and all that they lead to. Cycles and nodes that do not exist are fine.

    Source: containerd pkg/gc, Tricolor.
    """
    black: set[Node] = set()
    gray = list(roots)
    while gray:
        node = gray.pop()
        if node not in black:
            black.add(node)
            gray.extend(references(node))
    return black
