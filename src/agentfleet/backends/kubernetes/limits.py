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
        self._qps = qps
        self._burst = burst
        self._tokens = float(burst)
        self._at = float("-inf")
        self._closed_until = float("-inf")
        self.waited = 0.0
        """Seconds that callers have waited here in all."""

    async def take(self) -> None:
        """Wait for this caller's turn. A caller that is cancelled while it waits gives its turn back."""
        now = anyio.current_time()
        self._tokens = min(float(self._burst), self._tokens + (now - self._at) * self._qps)
        self._at = now
        self._tokens -= 1.0
        wait = max(-self._tokens / self._qps, self._closed_until - now)
        if wait <= 0:
            return
        try:
            await anyio.sleep(wait)
        except BaseException:
            self._tokens += 1.0
            raise
        finally:
            self.waited += anyio.current_time() - now

    def hold(self, seconds: float) -> None:
        """Let nobody pass for `seconds`: the server asked to be left alone, and that holds for all callers."""
        self._closed_until = max(self._closed_until, anyio.current_time() + seconds)
