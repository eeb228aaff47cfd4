"""Import the web stack without the parts that a daemon never uses: 37 MB resident become 24.

Trio, Hypercorn and Quart import at their top what only their other uses need: command line tools, templates, test
clients, the asyncio twins, HTTP/2, OpenSSL. None of it can be left out by an option, and nothing of theirs is changed
here. While they are imported, and only then, three kinds of module are found by a finder of ours:

    ABSENT    an empty stand-in; every name in it is an inert class, good for subclassing and annotations. Forgotten
              afterwards, so that whoever needs the real module later imports it as ever.
    DEFERRED  the same meanwhile, but what was bound to it becomes the real module at the first use: TLS.
    BLOCKED   not importable; the importers have a way without it (hashlib has digests of its own beside OpenSSL's,
              shutil does without some archive formats).

A stand-in that is called says which module it stands for. `tests/api` runs over this. The lists were made with the
versions that setup.cfg pins; with another version the worst case is a module too many or an error at start.
Only modules that are not loaded yet are concerned: in a process that has asyncio, asyncio is used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ABSENT = frozenset(
    """
    asyncio multiprocessing tempfile tomllib logging.config urllib.request http.client http.cookiejar http.server
    html.entities importlib.metadata uuid email
    aiofiles click itsdangerous jinja2
    flask.cli flask.testing quart.cli quart.debug quart.testing quart_trio.testing
    werkzeug.debug werkzeug.serving werkzeug.test
    h2 hypercorn.asyncio hypercorn.protocol.h2 hypercorn.protocol.ws_stream hypercorn.statsd
    hypercorn.trio.lifespan hypercorn.trio.run hypercorn.trio.statsd hypercorn.trio.udp_server
    """.split()
)
DEFERRED = frozenset(("ssl",))
BLOCKED = ("_hashlib", "lzma", "bz2")
BLOCKED_FOR = ("hashlib", "hmac", "shutil")

# Made by `QuartTrio()` itself, and never asked for anything.
_HARMLESS = frozenset(("AppGroup",))

_loading = False


def load(*modules: str) -> None:
    """Import modules, those named above left out. Not thread-safe: for start."""
    with _without():
        for name in modules:
            import_module(name)


@contextmanager
def _without() -> Iterator[None]:
    global _loading
    finder = _Finder()
    blocked = [name for name in BLOCKED if name not in sys.modules]
    sys.meta_path.insert(0, finder)
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]  # None: the import system refuses them
    _loading = True
    try:
        for name in BLOCKED_FOR:
            import_module(name)
        yield
    finally:
        _loading = False
        sys.meta_path.remove(finder)
        for name in blocked:
            del sys.modules[name]
        _forget()


def _forget() -> None:
    """Take stand-ins, and then modules of the standard library that hold some, out of the import system's sight."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, _StandIn):
            _remove(name)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in sys.stdlib_module_names and any(map(_is_stand_in, vars(module).values())):
            _remove(name)


def _remove(name: str) -> None:
    module = sys.modules.pop(name)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
        delattr(sys.modules[parent], child)


def _is_stand_in(value: object) -> bool:
    return isinstance(value, _StandIn | _Inert)


class _Inert(type):
    """The type of every name of a stand-in."""

    stands_for: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _inert(f"{cls.stands_for}.{name}")

    def __getitem__(cls, parameters: object) -> _Inert:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not (_loading or cls.__name__ in _HARMLESS):
            raise RuntimeError(f"{cls.stands_for} was left out of this process (balenapy.lean)")
        return type.__call__(cls)


def _inert(stands_for: str) -> _Inert:
    return _Inert(stands_for.rpartition(".")[2], (), {"stands_for": stands_for})


class _StandIn(ModuleType):
    __path__: list[str] = []  # noqa: RUF012  # a package, with nothing in it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _inert(f"{self.__name__}.{name}")


class _Deferred(_StandIn):
    """The real module, from its first use on."""

    def __getattr__(self, name: str) -> Any:
        if _loading:
            return super().__getattr__(name)
        real = import_module(self.__name__)
        # Ours stays bound where it was imported, so it takes over the contents.
        vars(self).update(vars(real))
        return getattr(real, name)


class _Finder:
    """Finds stand-ins; a meta path finder and their loader in one."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        parts = name.split(".")
        if name in DEFERRED or any(".".join(parts[:count]) in ABSENT for count in range(1, len(parts) + 1)):
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Deferred(spec.name) if spec.name in DEFERRED else _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
