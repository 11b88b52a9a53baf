"""The demo's load: one day, replayed in a minute, with a spike in the afternoon."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

TASK_SECONDS = (0.3, 0.5)
"""A task takes between these, evenly spread; 0.4 s on average."""
MEAN = sum(TASK_SECONDS) / 2


@dataclass(frozen=True)
class Day:
    """Tasks per second over a compressed day.

    Attributes:
        length: Seconds that the day takes.
        night: Tasks per second at the quietest hour.
        noon: At the busiest, without the spike.
        spike: Tasks per second while the spike lasts.
        spike_at: When it begins, in seconds from the day's start.
        spike_for: How long it lasts.
    """

    length: float = 50.0
    night: float = 3.0
    noon: float = 12.0
    spike: float = 40.0
    spike_at: float = 20.0
    spike_for: float = 14.0

    def rate(self, at: float) -> float:
        """Tasks per second at a time of the day; none after it."""
        if at >= self.length:
            return 0.0
        if self.spike_at <= at < self.spike_at + self.spike_for:
            return self.spike
        share = (1 - math.cos(2 * math.pi * at / self.length)) / 2
        return self.night + (self.noon - self.night) * share

    @property
    def instances_at_spike(self) -> int:
        """Instances that the spike keeps busy."""
        return math.ceil(self.spike * MEAN)


def task(number: int) -> dict[str, float]:
    """The payload of one task; the same number always gives the same task."""
    rng = random.Random(number)  # noqa: S311 - a load, no secret
    return {"question": number, "seconds": rng.uniform(*TASK_SECONDS)}
