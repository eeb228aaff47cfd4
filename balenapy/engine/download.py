"""One blob from a registry into its ingest, over as many connections as it takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from balenapy.core.manifest import Descriptor
from balenapy.errors import DataLoss
from balenapy.registry.errors import RegistryError
from balenapy.registry.http import RetryBudget

if TYPE_CHECKING:
    from balenapy.registry.client import Session
    from balenapy.stores.content import Ingest

log = logging.getLogger(__name__)


class WrongBlob(DataLoss):
    """The bytes are not what their digest says."""


class Progress(Protocol):
    """Who is told how far it is."""

    def step(self, status: str) -> None: ...

    def advance(self, status: str, current: int, total: int) -> None: ...

    def received(self, count: int) -> None: ...


class Download:
    """See the module."""

    def __init__(
        self,
        session: Session,
        blob: Descriptor,
        progress: Progress,
        *,
        attempts: int,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._session = session
        self._blob = blob
        self._progress = progress
        self._budget = RetryBudget(attempts)
        self._sleep = sleep
        self.answered = False  # whether the registry began to send it when it was asked last

    async def run(self, ingest: Ingest) -> None:
        """Append until it is whole.

        Raises: RegistryError, when there are no retries left or none would help; WrongBlob; NoSpace.
        Cancellation: what arrived is in the ingest.
        """
        digest, total = self._blob.digest, self._blob.size_bytes
        if ingest.received:
            log.info("resuming digest=%s at=%d of=%d", digest, ingest.received, total)
        while ingest.received < total:
            try:
                await self._receive(ingest)
            except RegistryError as error:
                await ingest.flush()
                delay_s = self._budget.next_delay(error)
                if delay_s is None:
                    raise
                log.warning(
                    "download interrupted digest=%s at=%d of=%d retry_in_s=%.1f error=%s",
                    digest,
                    ingest.received,
                    total,
                    delay_s,
                    error.message,
                )
                await self._count_down(delay_s)
        await ingest.flush()
        self._progress.received(total)
        self._progress.step("Verifying Checksum")
        self._progress.step("Download complete")

    async def _receive(self, ingest: Ingest) -> None:
        """One connection's worth."""
        digest, total = self._blob.digest, self._blob.size_bytes
        self.answered = False
        async with self._session.blob(digest, ingest.received, size_bytes=total) as blob:
            self.answered = True
            if blob.total_bytes is not None and blob.total_bytes < total:
                # Asking again would not make it longer.
                raise WrongBlob(
                    f"filesystem layer verification failed for digest {digest}: "
                    f"the registry has {blob.total_bytes} bytes of {total}"
                )
            if not blob.range_honoured:
                log.warning(
                    "registry ignores Range, all of it comes again digest=%s at=%d",
                    digest,
                    ingest.received,
                )
            async for chunk in blob:
                self._budget.progressed()
                await ingest.write(chunk)
                self._progress.advance("Downloading", ingest.received, total)
                self._progress.received(ingest.received)

    async def _count_down(self, delay_s: float) -> None:
        """Wait, and say for how long still."""
        for left in range(math.ceil(delay_s), 0, -1):
            self._progress.step(f"Retrying in {left} second{'s' if left != 1 else ''}")
            await self._sleep(min(1.0, delay_s))
            delay_s -= 1
