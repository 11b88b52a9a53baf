"""Bounds of what the server does for anybody: sizes, times, numbers; and a rate for each who asks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from agentfleet.errors import SpecError

_IDLE = 1024
"""Connections that nothing is asked on now."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds. Times are in seconds, sizes in bytes.

    Attributes:
        body: Of a request.
        depth: Of JSON.
        headers: Of all names and values together, and of the path.
        upload: Time that a body may take to come.
        deadline: Time that an answer may take; a wait that was asked for comes on top.
        wait: The longest wait that may be asked for.
        at_once: Requests that are answered at the same time; not those that wait, and no streams.
        waits: Requests that wait until an operation has ended, at the same time.
        waits_each: Of these, those of one token.
        streams: Streams of events that are open at the same time.
        streams_each: Of these, those of one token.
        agents: Streams of agents' configuration that are open at the same time.
        stream: Time after which a stream ends, so that clients spread anew over the managers.
        beat: Time between two signs of life on a silent stream.
        page: Items on a page.
        rate: Requests a second of one token, in the long run.
        burst: Requests at once after a rest.
        failures: Failed attempts to say who one is, a minute from one address.
    """

    body: int = 2 * 2**20
    depth: int = 64
    headers: int = 32 * 2**10
    upload: float = 15.0
    deadline: float = 30.0
    wait: float = 60.0
    at_once: int = 256
    waits: int = 1000
    waits_each: int = 200
    streams: int = 1000
    streams_each: int = 50
    agents: int = 20_000
    stream: float = 3600.0
    beat: float = 15.0
    page: int = 1000
    rate: float = 50.0
    burst: int = 200
    failures: int = 30

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise SpecError(f"{name}: must be a number above 0, not {value!r:.40}")

    @property
    def connections(self) -> int:
        """How many may be open at the same time; some are idle."""
        return self.at_once + self.waits + self.streams + self.agents + _IDLE


class Rates:
    """Token buckets by key: `rate` a second in the long run, `burst` at once after a rest.

    Args:
        rate: A second.
        burst: At most at once.
        clock: Monotonic seconds.
        most: Keys that are remembered; the ones that were used longest ago are forgotten, as if they had rested.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float], *, most: int = 10_000) -> None:
        self._rate, self._burst, self._clock, self._most = rate, burst, clock, most
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, times: float = 1.0) -> float:
        """Take one, if there is one; seconds until there is one otherwise.

        Args:
            key: Of the bucket.
            times: How many times as fast and as large as others this bucket is.
        """
        level = self._level(key, times)
        taken = level >= 1
        self._buckets[key] = (level - 1 if taken else level, self._clock())
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (1 - level) / (self._rate * times)

    def empty(self, key: str) -> float:
        """Seconds until there is one; 0 if there is. Nothing is taken."""
        return max(0.0, 1 - self._level(key, 1.0)) / self._rate

    def _level(self, key: str, times: float) -> float:
        level, at = self._buckets.get(key, (self._burst * times, 0.0))
        return min(self._burst * times, level + (self._clock() - at) * self._rate * times)
