"""The phi-accrual failure detector: how suspicious a silence is, given the rhythm of the beats before it.

After Hayashibara, Défago, Yared and Katayama, "The φ accrual failure detector" (SRDS 2004): phi is -log10 of the
probability that a beat comes later than this. The paper keeps a window of intervals; here mean and variance are
exponentially weighted, so that a rhythm is four numbers however long it is observed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

_WINDOW = 64
"""Beats after which an interval's weight stops falling: the memory of the estimate."""
_LEAST_DEVIATION = 0.1
"""Standard deviation as a share of the mean that is assumed at least: no agent beats like a crystal."""
_FIRST_DEVIATION = 0.25
"""The same before anything was measured."""
_MOST_PHI = 300.0  # float's smallest probability is about 10^-308


@dataclass(frozen=True, slots=True)
class Rhythm:
    """What is known about the beats of one instance.

    Attributes:
        last: When the last beat came, or when listening began, in seconds since the epoch; moved forward by time in
            which the observer could not hear.
        mean: Of the intervals, in seconds.
        variance: Of the intervals, in seconds squared.
        count: Beats heard.
    """

    last: float
    mean: float
    variance: float
    count: int = 0

    @property
    def deviation(self) -> float:
        """Standard deviation that is calculated with, in seconds."""
        return max(math.sqrt(self.variance), self.mean * _LEAST_DEVIATION)

    def heard(self, at: float, most: float) -> Rhythm:
        """The rhythm after a beat at `at`.

        An interval counts for at most `most` seconds: an outage must not teach the detector that outages are normal,
        while an agent that really has become slower is followed step by step.
        """
        if self.count == 0:
            return Rhythm(at, self.mean, self.variance, 1)
        interval = min(max(0.0, at - self.last), most)
        count = min(self.count + 1, _WINDOW)  # the expected interval it began with counts as the first
        weight = 1 / count
        difference = interval - self.mean
        return Rhythm(
            max(self.last, at),
            self.mean + weight * difference,
            (1 - weight) * (self.variance + weight * difference * difference),
            count,
        )

    def excused(self, lag: float, now: float) -> Rhythm:
        """The rhythm when the observer itself was deaf for `lag` seconds of the present silence."""
        return Rhythm(min(now, self.last + lag), self.mean, self.variance, self.count)


def expected(interval: float, now: float) -> Rhythm:
    """What to believe at `now` before the first beat, from the interval that the policy expects."""
    return Rhythm(now, interval, (interval * _FIRST_DEVIATION) ** 2)


def phi(silence: float, mean: float, deviation: float) -> float:
    """Suspicion after `silence` seconds without a beat, at most 300."""
    return _phi_of((silence - mean) / deviation)


def silence_for(threshold: float, mean: float, deviation: float) -> float:
    """The silence in seconds at which phi reaches `threshold`; never less than zero."""
    return max(0.0, mean + _deviations(threshold) * deviation)


def _phi_of(deviations: float) -> float:
    later = math.erfc(deviations / math.sqrt(2)) / 2
    return min(_MOST_PHI, -math.log10(later)) if later > 0 else _MOST_PHI


@functools.lru_cache(maxsize=256)
def _deviations(threshold: float) -> float:
    """How many standard deviations beyond the mean phi reaches `threshold`; by bisection, as phi is monotonic."""
    low, high = -40.0, 40.0
    for _ in range(64):
        middle = (low + high) / 2
        if _phi_of(middle) < threshold:
            low = middle
        else:
            high = middle
    return high
