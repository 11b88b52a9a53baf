"""Tells the store how the fleets stand that are led here: one write for all of them, now and then and when asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import anyio
import anyio.lowlevel

from agentfleet.clock import Clock
from agentfleet.errors import BackendUnavailable, DeadlineExceeded
from agentfleet.managed import Managed
from agentfleet.selfmetrics import SelfMetrics
from agentfleet.stores.fleets import FleetRecords

log = logging.getLogger(__name__)

_REST = 0.05
"""Seconds between two reports at least, however many ask."""


_ROWS = 500.0
"""Rows that are written anew in a second for what instances use and that they were heard, however many there are."""


class Reporter:
    """Reports once a period, and sooner when somebody waits for it.

    Args:
        records: Where to.
        managed: The fleets that there are now.
        clock: Times it.
        period: Seconds between two reports at most.
        own: Where failures are counted.
    """

    def __init__(
        self,
        records: FleetRecords,
        managed: Callable[[], Iterable[Managed]],
        *,
        clock: Clock,
        period: float,
        own: SelfMetrics,
    ) -> None:
        self._records = records
        self._managed = managed
        self._clock = clock
        self._period = period
        self._own = own
        self._asked = anyio.Event()
        self._told = anyio.Event()
        self._begun = self._ended = 0

    async def caught_up(self) -> None:
        """Wait until what is so now has been told."""
        wanted = self._begun + 1
        self._asked.set()
        while self._ended < wanted:
            await self._told.wait()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            with anyio.move_on_after(self._period):
                await self._asked.wait()
            self._asked = anyio.Event()
            self._begun += 1
            if await self._report():
                self._ended = self._begun
                told, self._told = self._told, anyio.Event()
                told.set()
            else:
                self._asked.set()  # try again, for those who wait
                await self._clock.sleep(self._period)
            await self._clock.sleep(_REST)

    async def _report(self) -> bool:
        """Write what has changed; False if that failed, and is to be told the next time."""
        now = self._clock.now()
        pictures, written = [], []
        everyone = tuple(self._managed())
        share = min(1.0, _ROWS / max(1.0, sum(each.rate for each in everyone)))
        for managed in everyone:
            if (looked := managed.look(now, share=share)) is not None:
                pictures.append(looked[0])
                written.append(looked[1])
            await anyio.lowlevel.checkpoint()  # so that a hundred fleets do not hold up whoever asks
        try:
            if pictures:
                await self._records.report(pictures, at=now)
        except (BackendUnavailable, DeadlineExceeded) as error:
            self._own.store_failed()
            log.warning("how the fleets stand could not be told: %s", error)
            return False
        for each in written:
            each()
        return True
