"""How often and how fast anything is asked of an API server again. The only place in this package that knows.

Waits double and are drawn from the upper half of their span ("equal jitter"), as in `agentfleet.retries`: a thousand
callers who failed together do not come back together. What is particular here: a server's own Retry-After counts.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio

from agentfleet.backends.kubernetes.errors import Overloaded, Unreachable
from agentfleet.clock import Clock
from agentfleet.errors import BackendUnavailable, DeadlineExceeded

if TYPE_CHECKING:
    from tenacity import AsyncRetrying, RetryCallState

__all__ = ["Backoff", "again"]


class Backoff:
    """The waits of one loop that goes on for ever.

    Args:
        clock: Sleeps.
        rng: Draws the jitter.
        initial: Longest first wait in seconds.
        limit: Longest wait in seconds, except that a server's own Retry-After is kept up to `patience`.
        patience: Longest Retry-After that is kept, in seconds.
    """

    def __init__(
        self, clock: Clock, rng: random.Random, *, initial: float = 0.2, limit: float = 8.0, patience: float = 60.0
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._initial = initial
        self._limit = limit
        self._patience = patience
        self.failures = 0
        """Waits since the last success."""

    def reset(self) -> None:
        """It worked: the next wait is a short one."""
        self.failures = 0

    def next(self, error: BaseException | None = None) -> float:
        """Seconds to wait after one more failure."""
        span = min(self._limit, self._initial * 2.0 ** min(self.failures, 30))
        self.failures += 1
        wait = span * (0.5 + self._rng.random() / 2)
        asked = error.retry_after if isinstance(error, Overloaded) else None
        if asked is not None:  # later than asked for, never earlier, and not everybody at the same moment
            wait = min(asked, self._patience) + wait / 2
        return wait

    async def wait(self, error: BaseException | None = None) -> None:
        """Sleep as long as `next` says."""
        await self._clock.sleep(self.next(error))


def again(
    clock: Clock, rng: random.Random, *, idempotent: bool, attempts: int, deadline: float, hold: float = 60.0
) -> AsyncRetrying:
    """Repeat one call as long as another attempt can help and fits in before its deadline.

    Args:
        clock: Sleeps between attempts.
        rng: Draws the jitter.
        idempotent: Whether doing it twice is the same as doing it once. If not, it is repeated only where it certainly
            was not done: it was never sent, or the server asked to be left alone before it looked at it (429).
        attempts: Calls in all; the last error is raised as it is.
        deadline: When to give up, in the event loop's time.
        hold: Longest Retry-After that is kept, in seconds.
    """
    from tenacity import AsyncRetrying, retry_if_exception  # noqa: PLC0415 - slow to import

    backoff = Backoff(clock, rng, initial=0.1, limit=4.0, patience=hold)

    def worth_it(error: BaseException) -> bool:
        if isinstance(error, Unreachable) or (isinstance(error, Overloaded) and error.unserved):
            return True
        return idempotent and isinstance(error, BackendUnavailable | DeadlineExceeded)

    def wait(state: RetryCallState) -> float:
        return backoff.next(state.outcome.exception() if state.outcome is not None else None)

    def too_late(state: RetryCallState) -> bool:
        return state.attempt_number >= attempts or anyio.current_time() + state.upcoming_sleep >= deadline

    return AsyncRetrying(
        retry=retry_if_exception(worth_it),
        stop=too_late,
        wait=wait,
        sleep=clock.sleep,
        reraise=True,
    )
