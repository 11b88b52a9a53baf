"""DECIDE how many instances a fleet should have: target tracking that equals Kubernetes' HorizontalPodAutoscaler.

`decide(policy, observed, memory, now)` takes one reading per target (aggregates, samples per instance, or a number) and
answers with the size to have, what each target asked for, and why. After the size was really changed, `committed` notes
it in the memory, from which the rate limits count. Decision for decision this is the HPA of Kubernetes 1.36, roundings
included (KEP-853 behaviour, KEP-4951 tolerances, KEP-2021 scale to zero); a metric that fails never shrinks a fleet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agentfleet.core.reason import Reason
from agentfleet.core.scaling_behavior import (
    Limit,
    Limited,
    Recommendation,
    Recommendations,
    ScaleEvent,
    ScaleEvents,
    limit_change,
    limit_legacy,
    stabilize,
    stabilize_legacy,
    store_event,
)
from agentfleet.core.scaling_explain import Outline, explain, table
from agentfleet.core.scaling_proposals import (
    Estimate,
    Step,
    Tolerance,
    average_usage,
    average_value,
    utilization,
    value,
)
from agentfleet.core.scaling_samples import (
    InstanceSamples,
    MetricFailed,
    Reading,
    ResourceAggregate,
    Startup,
    Total,
    aggregate,
    milli,
)
from agentfleet.specs import CpuTarget, MemoryTarget, MetricTarget, QueueTarget, ScalingPolicy, Target


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen of the fleet and its metrics."""

    spec: int
    """Instances asked for."""
    status: int
    """Instances that exist."""
    readings: tuple[Reading, ...]
    """One for each of the policy's targets, in their order."""
    ready: int | None = None
    """Instances that run and are ready; only `value` targets need it. None: not known."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the next decision must know of the earlier ones. Times are seconds."""

    recommendations: Recommendations | None = None
    """None: there never was one; the first decision then notes the size it found."""
    added: ScaleEvents = ()
    removed: ScaleEvents = ()
    scaled_to_zero: bool = False
    """The last change was this scaler's own, from some to none; so it may wake the fleet up again."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form that `from_dict` reads back."""
        log = self.recommendations
        return {
            "recommendations": None if log is None else [[entry.replicas, entry.at] for entry in log],
            "added": [[event.change, event.at, event.outdated] for event in self.added],
            "removed": [[event.change, event.at, event.outdated] for event in self.removed],
            "scaled_to_zero": self.scaled_to_zero,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Memory:
        """Read back what `to_dict` wrote.

        Raises:
            ValueError: The data is something else.
        """
        try:
            log = data["recommendations"]
            return cls(
                recommendations=None if log is None else tuple(Recommendation(int(n), float(at)) for n, at in log),
                added=_events(data["added"]),
                removed=_events(data["removed"]),
                scaled_to_zero=bool(data["scaled_to_zero"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is not the memory of a scaling decision: {error!r}") from error


def _events(rows: Any) -> ScaleEvents:
    return tuple(ScaleEvent(int(change), float(at), bool(outdated)) for change, at, outdated in rows)


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one target asks for: an estimate, or why there is none."""

    target: str
    outcome: Estimate | MetricFailed

    @property
    def replicas(self) -> int | None:
        """Instances asked for; None if the metric failed."""
        return self.outcome.replicas if isinstance(self.outcome, Estimate) else None


@dataclass(frozen=True, slots=True)
class Decision:
    """How many instances to have, and the way there."""

    current: int
    desired: int
    limit: Limit
    """What last changed `desired` from what the metrics asked for; NONE if nothing did."""
    proposals: tuple[Proposal, ...] = ()
    """One for each target; none where no metric was looked at."""
    raw: int | None = None
    """The largest proposal; None if there was no usable one or no metric was looked at."""
    stabilized: int | None = None
    """`raw` after the stabilisation windows; None if it did not come to that."""
    driver: str | None = None
    """The target whose proposal is `raw`."""
    reasons: tuple[Reason, ...] = ()
    """Most decisive first."""

    @property
    def change(self) -> int:
        """Instances to add (positive) or to remove (negative)."""
        return self.desired - self.current

    @property
    def failed(self) -> tuple[Proposal, ...]:
        """The targets that could not be evaluated."""
        return tuple(p for p in self.proposals if isinstance(p.outcome, MetricFailed))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form for journals and answers."""
        return {
            "current": self.current,
            "desired": self.desired,
            "limit": self.limit.value,
            "raw": self.raw,
            "stabilized": self.stabilized,
            "driver": self.driver,
            "proposals": {p.target: p.replicas for p in self.proposals},
        }

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        rows = [(p.target, "failed" if p.replicas is None else str(p.replicas)) for p in self.proposals]
        return table(f"{self.current} → {self.desired} instances", rows, self.reasons)


def decide(policy: ScalingPolicy, observed: Observed, memory: Memory, now: float) -> tuple[Decision, Memory]:
    """How many instances to have now, by the HPA's rules.

    Args:
        policy: What was asked for.
        observed: The fleet's size and one reading per target.
        memory: The memory that the previous call returned (passed through `committed` if the size was then changed).
        now: Seconds, on the same clock as all times in `observed` and `memory`.

    Returns:
        The decision, and the memory for the next one.

    Raises:
        ValueError: The number of readings is not the number of targets.
    """
    if len(observed.readings) != len(policy.targets):
        raise ValueError(f"{len(policy.targets)} targets need as many readings, got {len(observed.readings)}")
    current = observed.spec
    if memory.recommendations is None:
        memory = replace(memory, recommendations=(Recommendation(current, now),))

    shortcut = _without_metrics(policy, current, memory)
    if shortcut is not None:
        return _decided(policy, current, shortcut.replicas, shortcut.limit), memory

    proposals = tuple(
        [
            Proposal(name_of(target), _propose(policy, target, reading, observed, now))
            for target, reading in zip(policy.targets, observed.readings, strict=True)
        ]
    )
    best = _largest(proposals)
    raw = None if best is None else best.replicas
    if raw is None or (raw < current and any(p.replicas is None for p in proposals)):
        return _decided(policy, current, current, Limit.METRICS, proposals=proposals, best=best, raw=raw), memory

    asked = max(raw, 0)
    stable, log, limited = _limited(policy, current, asked, memory, now)
    desired, limit = limited.replicas, limited.limit
    if limit is Limit.NONE and stable != asked:
        limit = Limit.STABILIZATION
    if current == 0 and desired < policy.min_replicas:
        desired, limit = policy.min_replicas, Limit.MIN  # the lower bound was raised while the fleet slept
    decision = _decided(policy, current, desired, limit, proposals=proposals, best=best, raw=asked, stabilized=stable)
    return decision, Memory(log, memory.added, memory.removed, memory.scaled_to_zero)


def committed(policy: ScalingPolicy, decision: Decision, memory: Memory, now: float) -> Memory:
    """The memory after the decision's change was carried out: rate limits count it from now on.

    To be called after the engine accepted the new size and only then: a change that failed uses up no allowance.
    """
    if decision.change == 0:
        return memory
    slept = decision.desired == 0 and policy.min_replicas == 0 and any(_fleet_wide(t) for t in policy.targets)
    memory = replace(memory, scaled_to_zero=slept)
    if policy.legacy_limits:
        return memory
    if decision.change > 0:
        return replace(memory, added=store_event(memory.added, decision.change, rules=policy.up.rules, now=now))
    return replace(memory, removed=store_event(memory.removed, -decision.change, rules=policy.down.rules, now=now))


def name_of(target: Target) -> str:
    """The metric source that a target reads: "cpu", "memory", or the name that the target gives."""
    match target:
        case QueueTarget():
            return target.source
        case MetricTarget():
            return target.metric
        case _:
            return target.kind


def _fleet_wide(target: Target) -> bool:
    """Whether the metric exists without instances, so that it can wake up a fleet of none."""
    return isinstance(target, QueueTarget) or (isinstance(target, MetricTarget) and target.per_instance is None)


def _without_metrics(policy: ScalingPolicy, current: int, memory: Memory) -> Limited | None:
    """The cases that the HPA settles before it looks at any metric."""
    if current == 0:
        wakes = memory.scaled_to_zero and (policy.min_replicas > 0 or any(_fleet_wide(t) for t in policy.targets))
        return None if wakes else Limited(0, Limit.PAUSED)
    if current > policy.max_replicas:
        return Limited(policy.max_replicas, Limit.MAX)
    if current < policy.min_replicas:
        return Limited(policy.min_replicas, Limit.MIN)
    return None


def _limited(
    policy: ScalingPolicy, current: int, asked: int, memory: Memory, now: float
) -> tuple[int, Recommendations, Limited]:
    """Stabilised number, the log with the new recommendation, and the number after all limits."""
    log = memory.recommendations or ()
    bounds = (policy.min_replicas, policy.max_replicas)
    if policy.legacy_limits:
        stable, log = stabilize_legacy(log, desired=asked, window=policy.down.stabilization, now=now)
        return stable, log, limit_legacy(stable, current=current, bounds=bounds)
    windows = policy.up.stabilization, policy.down.stabilization
    stable, log = stabilize(log, current=current, desired=asked, up_window=windows[0], down_window=windows[1], now=now)
    limited = limit_change(
        stable,
        current=current,
        bounds=bounds,
        up=policy.up,
        down=policy.down,
        added=memory.added,
        removed=memory.removed,
        now=now,
    )
    return stable, log, limited


def _largest(proposals: tuple[Proposal, ...]) -> Proposal | None:
    """The largest proposal, the first one among equals; None if every metric failed."""
    best: Proposal | None = None
    most = 0
    for proposal in proposals:
        replicas = proposal.replicas
        if replicas is not None and (best is None or replicas > most):
            best, most = proposal, replicas
    return best


def _propose(
    policy: ScalingPolicy, target: Target, reading: Reading, observed: Observed, now: float
) -> Estimate | MetricFailed:
    if isinstance(reading, MetricFailed):
        return reading
    tolerance = Tolerance(up=policy.up.tolerance, down=policy.down.tolerance)
    current = observed.spec
    match target:
        case CpuTarget() | MemoryTarget():
            sums = _sums(policy, reading, observed, now, cpu=isinstance(target, CpuTarget), percent=True)
            return utilization(sums, target=target.utilization, current=current, tolerance=tolerance)
        case MetricTarget(per_instance=float(goal)):
            sums = _sums(policy, reading, observed, now, cpu=False, percent=False)
            return average_usage(sums, target=milli(goal), current=current, tolerance=tolerance)
    if not isinstance(reading, Total):
        return MetricFailed(f"this target needs one number for the fleet, not {type(reading).__name__}")
    if isinstance(target, MetricTarget) and target.value is not None:
        return value(
            reading.milli, target=milli(target.value), current=current, ready=observed.ready, tolerance=tolerance
        )
    each = target.length if isinstance(target, QueueTarget) else target.average
    assert each is not None
    return average_value(reading.milli, target=milli(each), status=observed.status, tolerance=tolerance)


def _sums(
    policy: ScalingPolicy,
    reading: ResourceAggregate | InstanceSamples | Total,
    observed: Observed,
    now: float,
    *,
    cpu: bool,
    percent: bool,
) -> ResourceAggregate:
    """Any reading as an aggregate. One number is the average of all instances (in percent for utilisation)."""
    if isinstance(reading, ResourceAggregate):
        return reading
    if isinstance(reading, InstanceSamples):
        startup = Startup(policy.cpu_initialization, policy.readiness_delay) if cpu or reading.cpu else None
        return aggregate(reading, startup=startup, now=now)
    request = 100_000 if percent else 0  # thousandths of a percent
    return ResourceAggregate.uniform(usage=reading.milli * observed.status, request=request, ready=observed.status)


def _decided(
    policy: ScalingPolicy,
    current: int,
    desired: int,
    limit: Limit,
    *,
    proposals: tuple[Proposal, ...] = (),
    best: Proposal | None = None,
    raw: int | None = None,
    stabilized: int | None = None,
) -> Decision:
    """The decision with its reasons."""
    driver = None if best is None else best.target
    estimate = None if best is None else best.outcome
    reasons = explain(
        policy,
        Outline(current, desired, raw, stabilized, limit),
        driver=driver,
        estimate=estimate if isinstance(estimate, Estimate) else None,
        failures=[(p.target, p.outcome.reason) for p in proposals if isinstance(p.outcome, MetricFailed)],
    )
    return Decision(current, desired, limit, proposals, raw, stabilized, driver, reasons)


__all__ = [
    "Decision",
    "Estimate",
    "InstanceSamples",
    "Limit",
    "Memory",
    "MetricFailed",
    "Observed",
    "Proposal",
    "Reading",
    "ResourceAggregate",
    "Step",
    "Total",
    "committed",
    "decide",
    "name_of",
]
