"""CRC-32C, as SSE 4.2 and ARMv8 compute it in hardware: `crc32c(data, before=0)`.

Python's own CRC-32 is another polynomial. The package's `__init__` brings `importlib.metadata`, `email` and 1.1 MB for
its version number and its command line; only its C module is wanted here, and that is loaded alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec


def _load() -> Callable[..., int]:
    package = find_spec("crc32c")
    places = package.submodule_search_locations if package is not None else None
    spec = PathFinder.find_spec("crc32c._crc32c", places)
    if spec is None or spec.loader is None:
        raise ImportError("the package crc32c is not installed", name="crc32c")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., int] = module.crc32c
    return found


crc32c = _load()
