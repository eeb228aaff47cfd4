"""The ways a delta can fail; all of them are `DeltaError`. Nothing else leaves this package for bad input."""

from __future__ import annotations


class DeltaError(Exception):
    """The delta cannot be made or applied; the message says what, which and why."""


class Malformed(DeltaError):
    """The bytes of the delta (or of a tar, a layout) are not what their format allows."""


class WrongBase(DeltaError):
    """The delta is for another base, or the base has less than the delta reads."""


class OverBudget(DeltaError):
    """Applying would take more memory than the caller allows."""


class WrongResult(DeltaError):
    """What came out does not have the digest it must have."""


class Unsupported(DeltaError):
    """Not built, or of a later version of the format."""


class RegistryFailed(DeltaError):
    """The registry could not be reached, or said no."""
