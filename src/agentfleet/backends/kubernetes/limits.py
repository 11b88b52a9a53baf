"""How fast we may ask: a token bucket in front of every call to one API server."""

from __future__ import annotations

import anyio

from agentfleet.errors import SpecError

__all__ = ["TokenBucket"]


class TokenBucket:
    """Lets `burst` calls pass at once and `qps` a second in the long run, in the order in which they came.

    Args:
        qps: Calls a second in the long run; more than 0.
        burst: Calls that may pass at once after a rest; at least 1.

    Raises:
        SpecError: An argument is out of its range.
    """

    def __init__(self, qps: float, burst: int) -> None:
        if not qps > 0 or burst < 1:
            raise SpecError(f"the rate limit needs qps > 0 and burst >= 1, not qps={qps}, burst={burst}")
        self._step = 1.0 / qps
        self._ahead = (burst - 1) * self._step
        self._due = float("-inf")
        """When a next call would be due at the rate alone; a burst is that much `_ahead` of it."""
        self._turn = anyio.Lock(fast_acquire=True)
        self.waited = 0.0
        """Seconds that callers have waited here in all."""

    async def take(self) -> None:
        """Wait for this caller's turn. A caller that is cancelled while it waits takes none."""
        came = anyio.current_time()
        try:
            async with self._turn:  # one waits for the time, the others behind it
                while (wait := self._due - self._ahead - anyio.current_time()) > 0:  # noqa: ASYNC110 - for time
                    await anyio.sleep(wait)
                self._due = max(self._due, anyio.current_time()) + self._step
        finally:
            self.waited += anyio.current_time() - came

    def hold(self, seconds: float) -> None:
        """Let nobody pass for `seconds`, and afterwards one at a time, at the rate.

        The server asked to be left alone: that holds for all callers, also for those who wait already.
        """
        self._due = max(self._due, anyio.current_time() + seconds + self._ahead)
