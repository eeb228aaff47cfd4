"""The kinds of failure. `api/errors.py` maps each kind to one HTTP status.

A new failure is a new message, or a subclass where someone must catch it; rarely a new kind.
"""


class EngineError(Exception):
    """Base of every error that has a meaning to a client.

    `retryable` says whether doing the same again may help (a reset connection: yes; a full disk: no).
    """

    retryable = False

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class InvalidParameter(EngineError):
    """The caller's request is wrong (400)."""


class Unauthorized(EngineError):
    """The caller, or we towards a registry, did not prove who we are (401)."""


class Forbidden(EngineError):
    """Understood and refused (403)."""


class NotFound(EngineError):
    """What was named does not exist (404)."""


class Conflict(EngineError):
    """The state of an object does not allow this now (409)."""


class NotModified(EngineError):
    """Nothing to do: it is so already (304, empty body)."""


class Unsupported(EngineError):
    """This engine does not do that (501)."""


class Unavailable(EngineError):
    """Not now: a peer or the engine itself is not ready (503)."""

    retryable = True


class SystemFailure(EngineError):
    """The machine, the kernel or a tool failed (500)."""


class DataLoss(SystemFailure):
    """Stored or received bytes are not what their digest says (500)."""


# By name: as errors cross the border of a process.
KINDS: dict[str, type[EngineError]] = {
    name: kind for name, kind in globals().items() if isinstance(kind, type) and issubclass(kind, EngineError)
}
