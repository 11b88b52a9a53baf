"""How often and how fast a failed call to the outside is repeated. The only place that knows."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from agentfleet.clock import Clock
from agentfleet.errors import BackendUnavailable, Conflict, DeadlineExceeded, Outdated

if TYPE_CHECKING:
    from tenacity import AsyncRetrying, RetryCallState


def transient(
    clock: Clock, rng: random.Random, *, attempts: int = 4, initial: float = 0.2, limit: float = 5.0
) -> AsyncRetrying:
    """Repeat what may work the next time: an unreachable engine, a lost race, an answer that did not come.

    Waits double from `initial` seconds up to `limit`, each drawn from the upper half of its span, so that a thousand
    callers who failed together do not come back together ("equal jitter").

    Args:
        clock: Sleeps between attempts.
        rng: Draws the jitter; seeded in simulations.
        attempts: Calls in all; the last error is raised as it is.
        initial: Seconds before the second attempt, at most.
        limit: Longest wait in seconds.
    """
    from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt  # noqa: PLC0415 - slow to import

    def wait(state: RetryCallState) -> float:
        span = min(limit, initial * 2.0 ** (state.attempt_number - 1))
        return span * (0.5 + rng.random() / 2)

    return AsyncRetrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(attempts),
        wait=wait,
        sleep=clock.sleep,
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may work the next time; what rests on an outdated sight must not."""
    return isinstance(error, (BackendUnavailable, Conflict, DeadlineExceeded)) and not isinstance(error, Outdated)
