"""Digests: what exact bytes are called.

`diff_id` is the digest of one uncompressed layer tar, `chain_id` the name of a stack of them:
ChainID(L0) = DiffID(L0); ChainID(L0..Ln) = sha256(ChainID(L0..Ln-1) + " " + DiffID(Ln)).
Source: OCI image-spec config.md "Layer ChainID"; error texts: opencontainers/go-digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from balenapy.errors import InvalidParameter

# hex characters of each algorithm go-digest registers
HEX_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}

_GRAMMAR = re.compile(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[a-zA-Z0-9=_-]+")
_LOWER_HEX = re.compile(r"[a-f0-9]+")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """`algorithm:hex`. Made by `Digest.parse`, `sha256_digest` or from a hash object's hexdigest."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read `algorithm:hex`.

        Raises:
            InvalidParameter: with go-digest's words for what is wrong.
        """
        algorithm, colon, encoded = text.partition(":")
        if not colon or not algorithm or not encoded:
            raise InvalidParameter("invalid checksum digest format")
        length = HEX_LENGTHS.get(algorithm)
        if length is None:
            known = "unsupported digest algorithm" if _GRAMMAR.fullmatch(text) else None
            raise InvalidParameter(known or "invalid checksum digest format")
        # Go measures bytes; anything outside ASCII fails either way.
        if len(encoded.encode("utf-8", "replace")) != length:
            raise InvalidParameter("invalid checksum digest length")
        if not _LOWER_HEX.fullmatch(encoded):
            raise InvalidParameter("invalid checksum digest format")
        return cls(algorithm, encoded)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    @property
    def short(self) -> str:
        """The 12 characters progress lines and logs show."""
        return self.hex[:12]

    def matches(self, data: bytes) -> bool:
        """Whether these bytes have this digest."""
        return hashlib.new(self.algorithm, data).hexdigest() == self.hex


def sha256_digest(data: bytes) -> Digest:
    """The sha256 of bytes in memory."""
    return Digest("sha256", hashlib.sha256(data).hexdigest())


def chain_id(diff_ids: Sequence[Digest]) -> Digest:
    """Name the stack of these layers, bottom first. A stack has at least one layer."""
    return chain_ids(diff_ids)[-1]


def chain_ids(diff_ids: Sequence[Digest]) -> tuple[Digest, ...]:
    """The chain ID of every prefix: `chain_ids(d)[n]` names layers 0..n."""
    chains: list[Digest] = []
    for diff_id in diff_ids:
        chains.append(sha256_digest(f"{chains[-1]} {diff_id}".encode()) if chains else diff_id)
    return tuple(chains)
