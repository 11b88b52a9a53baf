"""Time is injected: everything that waits or dates something asks a `Clock`.

`SystemClock` dates with wall-clock seconds but advances with the event loop's monotonic time, so a corrected or
jumping wall clock never moves a deadline (fault scenario 30). Under a virtual event loop
(`agentfleet.testing.run_virtual`, trio's `MockClock`) the very same clock is virtual, because
its progress is the loop's.
"""

from __future__ import annotations

import time
from typing import Protocol

import anyio

_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock(Protocol):
    """Where the loops get the time from."""

    def now(self) -> float:
        """Seconds since the epoch; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait `seconds`; zero or less only yields to other tasks."""
        ...


class SystemClock:
    """Wall-clock dates, monotonic progress.

    Args:
        epoch: The date of the first reading in seconds since the epoch; the machine's own wall clock when omitted.
            Simulations pass a fixed date to be reproducible.
    """

    __slots__ = ("_epoch", "_start")

    def __init__(self, epoch: float | None = None) -> None:
        self._epoch = epoch
        self._start: float | None = None

    def now(self) -> float:
        """Seconds since the epoch. Must be called inside a running event loop."""
        loop_time = anyio.current_time()
        if self._start is None:
            if self._epoch is None:
                self._epoch = time.time()
            self._start = loop_time
        assert self._epoch is not None
        return self._epoch + (loop_time - self._start)

    async def sleep(self, seconds: float) -> None:
        """Wait on the event loop's time."""
        await anyio.sleep(max(0.0, seconds))


class BootClock:
    """Seconds since the machine started, time asleep included: a suspended leader wakes up knowing that it is late."""

    def now(self) -> float:
        """Seconds since the machine started."""
        return time.clock_gettime(_BOOT)

    async def sleep(self, seconds: float) -> None:
        """Wait on the event loop's time."""
        await anyio.sleep(max(0.0, seconds))
