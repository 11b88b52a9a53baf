"""How many instances one metric asks for: the proportional rule of Kubernetes' HorizontalPodAutoscaler (1.36).

Each function takes whole thousandths and returns an `Estimate`, or `MetricFailed` where the HPA reports an error.
Roundings are the HPA's: whole-number division of the sums first, then float64 ratios, then the ceiling.
Source: `pkg/controller/podautoscaler/replica_calculator.go` and `metrics/utilization.go`, read as an algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from agentfleet.core.scaling_samples import INT32_MAX, INT64_MAX, MetricFailed, ResourceAggregate


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Deviations of the ratio from 1 that are ignored, by direction; 0.1 is 10 %."""

    up: float = 0.1
    down: float = 0.1

    def covers(self, ratio: float) -> bool:
        """Whether the ratio is close enough to 1 to leave things alone. Both bounds are inside; NaN never is."""
        return 1.0 - self.down <= ratio <= 1.0 + self.up


class Step(StrEnum):
    """Which rule gave an estimate."""

    PROPORTIONAL = "proportional"
    TOLERANCE = "tolerance"
    """Too close to the target to act."""
    COMPLETED = "completed"
    """Proportional, with assumptions filled in for instances without a usable sample."""
    DOUBT = "doubt"
    """The assumptions turned the direction around, so nothing is done."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one metric asks for."""

    replicas: int
    ratio: float
    """Measured over target before any assumption: 1.2 is 20 % too much load an instance."""
    usage: int
    """What was measured: whole percent for utilisation, thousandths otherwise (the HPA's `currentMetrics`)."""
    average: int
    """Thousandths an instance."""
    step: Step


def utilization(sums: ResourceAggregate, *, target: int, current: int, tolerance: Tolerance) -> Estimate | MetricFailed:
    """For a target in whole percent of the requests (HPA: `Resource` with `averageUtilization`)."""
    if sums.ready + sums.stray == 0:
        return _no_samples(sums)
    if sums.unrequested:
        return MetricFailed(f"{sums.unrequested} instances have no request to take a percentage of")
    if sums.requests == 0:
        return MetricFailed("no sample belongs to an instance with a request")
    if sums.missing and not sums.missing_requests:
        return MetricFailed(f"the requests of {sums.missing} instances without a sample are not known")
    percent = max(100, target)
    measured = _quotient(sums.usage * 100, sums.requests)
    return _track(
        sums,
        lambda usage, requests, _count: float(_quotient(usage * 100, requests)) / float(target),
        usage=sums.usage,
        fallback=sum(_quotient(request * percent, 100) * count for request, count in sums.missing_requests),
        reported=(measured, _quotient(sums.usage, sums.ready) if sums.ready else 0),
        current=current,
        tolerance=tolerance,
    )


def average_usage(
    sums: ResourceAggregate, *, target: int, current: int, tolerance: Tolerance
) -> Estimate | MetricFailed:
    """For a target in thousandths an instance, one sample each (HPA: `Pods`, and `Resource` with `averageValue`)."""
    count = sums.ready + sums.stray
    if count == 0:
        return _no_samples(sums)
    usage = sums.usage + sums.stray_usage
    measured = _quotient(usage, count)
    return _track(
        sums,
        lambda usage, _requests, count: float(_quotient(usage, count)) / float(target),
        usage=usage,
        fallback=sums.missing * target,
        reported=(measured, measured),
        current=current,
        tolerance=tolerance,
    )


def value(usage: int, *, target: int, current: int, ready: int | None, tolerance: Tolerance) -> Estimate | MetricFailed:
    """For a fleet-wide metric held at a value (HPA: `Object` or `External` with `value`).

    Args:
        usage: The metric, thousandths.
        target: The value, thousandths.
        current: Replicas asked for now; at 0 neither tolerance nor readiness counts.
        ready: Instances that run and are ready: the ratio multiplies these. None: it is not known.
        tolerance: See `Tolerance`.
    """
    ratio = float(usage) / float(target)
    if current == 0:
        return Estimate(_ceil(ratio), ratio, usage, usage, Step.PROPORTIONAL)
    average = _per_instance(usage, current)
    if tolerance.covers(ratio):
        return Estimate(current, ratio, usage, average, Step.TOLERANCE)
    if ready is None:
        return MetricFailed("the number of ready instances is not known")
    return Estimate(_ceil(ratio * float(ready)), ratio, usage, average, Step.PROPORTIONAL)


def average_value(usage: int, *, target: int, status: int, tolerance: Tolerance) -> Estimate:
    """For a fleet-wide metric divided by the instances (HPA: `Object` or `External` with `averageValue`; queues).

    Args:
        usage: The metric, thousandths.
        target: Thousandths an instance.
        status: Instances that exist, which the HPA takes from `status.replicas`.
        tolerance: See `Tolerance`.
    """
    denominator = float(target) * float(status)
    ratio = float(usage) / denominator if denominator else (math.inf if usage else math.nan)
    average = _per_instance(usage, status)
    if tolerance.covers(ratio):
        return Estimate(status, ratio, average, average, Step.TOLERANCE)
    return Estimate(_ceil(float(usage) / float(target)), ratio, average, average, Step.PROPORTIONAL)


_Formula = Callable[[int, int, int], float]
"""Sum of usage, sum of requests and number of samples to the ratio of measured over target."""


def _track(
    sums: ResourceAggregate,
    formula: _Formula,
    *,
    usage: int,
    fallback: int,
    reported: tuple[int, int],
    current: int,
    tolerance: Tolerance,
) -> Estimate:
    """The rule that utilisation and per-instance averages share."""
    count, requests = sums.ready + sums.stray, sums.requests
    ratio = formula(usage, requests, count)

    def estimate(replicas: int, step: Step) -> Estimate:
        return Estimate(replicas, ratio, reported[0], reported[1], step)

    growing_unready = sums.unready > 0 and ratio > 1.0
    if not growing_unready and sums.missing == 0:
        if tolerance.covers(ratio):
            return estimate(current, Step.TOLERANCE)
        return estimate(_ceil(ratio * float(sums.ready)), Step.PROPORTIONAL)

    # Fill in the cautious guess: whoever is not measured is busy when shrinking and idle when growing.
    if sums.missing and ratio != 1.0:
        usage += fallback if ratio < 1.0 else 0
        requests += sum(request * n for request, n in sums.missing_requests)
        count += sums.missing
    if growing_unready:
        requests += sums.unready_requests
        count += sums.unready
    cautious = formula(usage, requests, count)
    if tolerance.covers(cautious):
        return estimate(current, Step.TOLERANCE)
    if (ratio < 1.0 < cautious) or (cautious < 1.0 < ratio):
        return estimate(current, Step.DOUBT)
    replicas = _ceil(cautious * float(count))
    if (cautious < 1.0 and replicas > current) or (cautious > 1.0 and replicas < current):
        return estimate(current, Step.DOUBT)
    return estimate(replicas, Step.COMPLETED)


def _no_samples(sums: ResourceAggregate) -> MetricFailed:
    return MetricFailed(
        f"no usable sample: {sums.unready} instances are not ready, {sums.missing} have no sample, "
        f"{sums.ignored} are on their way out"
    )


def _ceil(number: float) -> int:
    """The ceiling, capped at int32's maximum. Kubernetes casts; where it would overflow, the cap is what it meant."""
    return INT32_MAX if number > INT32_MAX else math.ceil(number)


def _quotient(numerator: int, denominator: int) -> int:
    """Whole-number division towards zero, as Go's; Python's rounds down."""
    return numerator // denominator if numerator >= 0 else -(-numerator // denominator)


def _per_instance(usage: int, count: int) -> int:
    return min(math.ceil(float(usage) / float(count)), INT64_MAX) if count else 0
