"""How fast a fleet may change: stabilisation windows, rate limits, bounds, and the logs that they rest on.

The rules are those of Kubernetes' HorizontalPodAutoscaler (1.36, `horizontal.go`; KEP-853 for the behaviour block).
The logs keep the HPA's slot rule: a new entry takes the place of the last outdated one, or is appended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from agentfleet.core.scaling_samples import INT32_MAX
from agentfleet.specs import ScalingBehavior, ScalingRule


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What the metrics asked for at one time, before any limit."""

    replicas: int
    at: float


@dataclass(frozen=True, slots=True)
class ScaleEvent:
    """A change that was carried out: how many instances (always positive), and when."""

    change: int
    at: float
    outdated: bool = False
    """Older than every rule's period when last looked at: its slot may be used again."""


Recommendations = tuple[Recommendation, ...]
ScaleEvents = tuple[ScaleEvent, ...]


class Limit(StrEnum):
    """What kept the decision from being what the metrics asked for."""

    NONE = "none"
    STABILIZATION = "stabilization"
    RATE_UP = "rate_up"
    RATE_DOWN = "rate_down"
    MAX = "max"
    MIN = "min"
    METRICS = "metrics"
    """Too little is known to act."""
    PAUSED = "paused"
    """Somebody set the size to zero."""


@dataclass(frozen=True, slots=True)
class Limited:
    """A number after its limits, and the limit that changed it last."""

    replicas: int
    limit: Limit
    bound: int | None = None
    """The limit's own value, where one applied."""


def stabilize(
    log: Recommendations, *, current: int, desired: int, up_window: float, down_window: float, now: float
) -> tuple[int, Recommendations]:
    """Growth to the least, shrinkage to the most that was asked for within the direction's window (seconds).

    Returns:
        The stabilised number, and the log with the new recommendation.
    """
    low = high = desired
    up_cutoff, down_cutoff = now - up_window, now - down_window
    slot: int | None = None
    for index, entry in enumerate(log):
        if entry.at > up_cutoff and entry.replicas < low:
            low = entry.replicas
        if entry.at > down_cutoff and entry.replicas > high:
            high = entry.replicas
        if entry.at < up_cutoff and entry.at < down_cutoff:
            slot = index
    # Staying is always allowed between the two; so a falling number never grows the fleet, nor the reverse.
    stable = min(max(current, low), high)
    return stable, _put(log, slot, Recommendation(desired, now))


def stabilize_legacy(log: Recommendations, *, desired: int, window: float, now: float) -> tuple[int, Recommendations]:
    """The most that was asked for within the window (seconds): the rule without a behaviour block.

    Returns:
        The stabilised number, and the log with the new recommendation.
    """
    cutoff = now - window
    stable, slot = desired, None
    for index, entry in enumerate(log):
        if entry.at < cutoff:
            slot = index
        elif entry.replicas > stable:
            stable = entry.replicas
    return stable, _put(log, slot, Recommendation(desired, now))


def _put(log: Recommendations, slot: int | None, entry: Recommendation) -> Recommendations:
    return (*log, entry) if slot is None else (*log[:slot], entry, *log[slot + 1 :])


def change_within(events: Sequence[ScaleEvent], period: float, now: float) -> int:
    """Instances added (or removed) less than `period` seconds ago."""
    cutoff = now - period
    return sum(event.change for event in events if event.at > cutoff)


def up_limit(behavior: ScalingBehavior, *, current: int, added: ScaleEvents, removed: ScaleEvents, now: float) -> int:
    """The most instances that the rules for growing allow now; may be less than `current`."""

    def allowed(rule: ScalingRule) -> int:
        base = current - change_within(added, rule.period, now) + change_within(removed, rule.period, now)
        if rule.count is not None:
            return base + rule.count
        assert rule.percent is not None
        return math.ceil(float(base) * (1 + float(rule.percent) / 100))  # up: else one instance would never grow

    choices: dict[str, Callable[[list[int]], int]] = {"max": max, "min": min}
    return _choose(behavior, current, allowed, choices)


def down_limit(behavior: ScalingBehavior, *, current: int, added: ScaleEvents, removed: ScaleEvents, now: float) -> int:
    """The fewest instances that the rules for shrinking allow now; may be more than `current`."""

    def allowed(rule: ScalingRule) -> int:
        base = current - change_within(added, rule.period, now) + change_within(removed, rule.period, now)
        if rule.count is not None:
            return base - rule.count
        assert rule.percent is not None
        return math.trunc(float(base) * (1 - float(rule.percent) / 100))

    choices: dict[str, Callable[[list[int]], int]] = {"max": min, "min": max}  # the largest change leaves the fewest
    return _choose(behavior, current, allowed, choices)


def _choose(
    behavior: ScalingBehavior,
    current: int,
    allowed: Callable[[ScalingRule], int],
    choices: dict[str, Callable[[list[int]], int]],
) -> int:
    if behavior.select == "disabled":
        return current
    return min(choices[behavior.select]([allowed(rule) for rule in behavior.rules]), INT32_MAX)


def limit_change(
    desired: int,
    *,
    current: int,
    bounds: tuple[int, int],
    up: ScalingBehavior,
    down: ScalingBehavior,
    added: ScaleEvents,
    removed: ScaleEvents,
    now: float,
) -> Limited:
    """Rate limits and the one bound (`(min, max)`) that lies in the direction of the change."""
    low, high = bounds
    if desired > current:
        rate = max(up_limit(up, current=current, added=added, removed=removed, now=now), current)
        ceiling, limit = (rate, Limit.RATE_UP) if rate < high else (high, Limit.MAX)
        if desired > ceiling:
            return Limited(ceiling, limit, ceiling)
    elif desired < current:
        rate = min(down_limit(down, current=current, added=added, removed=removed, now=now), current)
        floor, limit = (rate, Limit.RATE_DOWN) if rate > low else (low, Limit.MIN)
        if desired < floor:
            return Limited(floor, limit, floor)
    return Limited(desired, Limit.NONE)


def limit_legacy(desired: int, *, current: int, bounds: tuple[int, int]) -> Limited:
    """Bounds, and at most twice the size (at least 4) upwards: the rule without a behaviour block."""
    low, high = bounds
    rate = max(2 * current, 4)
    ceiling, limit = (rate, Limit.RATE_UP) if rate < high else (high, Limit.MAX)
    if desired < low:
        return Limited(low, Limit.MIN, low)
    if desired > ceiling:
        return Limited(ceiling, limit, ceiling)
    return Limited(desired, Limit.NONE)


def store_event(events: ScaleEvents, change: int, *, rules: Sequence[ScalingRule], now: float) -> ScaleEvents:
    """The log with one more change, in the last outdated slot if there is one."""
    cutoff = now - max((rule.period for rule in rules), default=0.0)
    marked = [replace(e, outdated=True) if e.at < cutoff and not e.outdated else e for e in events]
    slots = [index for index, event in enumerate(marked) if event.outdated]
    if slots:
        marked[slots[-1]] = ScaleEvent(change, now)
    else:
        marked.append(ScaleEvent(change, now))
    return tuple(marked)
