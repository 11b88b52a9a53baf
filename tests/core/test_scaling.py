"""One concrete case for each rule of the scaling decision as a whole."""

from __future__ import annotations

import pytest

from agentfleet.core.scaling import (
    Limit,
    Memory,
    MetricFailed,
    Observed,
    ResourceAggregate,
    Total,
    committed,
    decide,
    name_of,
)
from agentfleet.core.scaling_behavior import (
    Recommendation,
    ScaleEvent,
)
from agentfleet.core.scaling_samples import (
    Reading,
)
from agentfleet.specs import (
    CpuTarget,
    MemoryTarget,
    MetricTarget,
    QueueTarget,
    ScalingPolicy,
    Target,
)

NOW = 50_000.0


def policy(*targets: Target, low: int = 1, high: int = 100, legacy: bool = False) -> ScalingPolicy:
    return ScalingPolicy(
        min_replicas=low, max_replicas=high, targets=targets or (QueueTarget(length=10),), legacy_limits=legacy
    )


def seen(size: int, *readings: Reading, ready: int | None = None) -> Observed:
    return Observed(size, size, readings, ready=ready)


# ------------------------------------------------------------------------------------------------ before any metric


@pytest.mark.parametrize(
    ("size", "desired", "limit"),
    [(0, 0, Limit.PAUSED), (30, 20, Limit.MAX), (2, 5, Limit.MIN)],
)
def test_some_sizes_need_no_metric(size: int, desired: int, limit: Limit) -> None:
    decision, memory = decide(policy(low=5, high=20), seen(size, MetricFailed("down")), Memory(), NOW)
    assert (decision.desired, decision.limit, decision.proposals) == (desired, limit, ())
    assert memory.recommendations == (Recommendation(size, NOW),)
    assert decision.reasons[0].code == f"scaling.{limit.value}"


def test_sizes_at_the_bounds_are_decided_by_the_metrics() -> None:
    bounded = policy(low=5, high=20)
    assert decide(bounded, seen(20, Total.of(80)), Memory(()), NOW)[0].desired == 8
    assert decide(bounded, seen(5, Total.of(80)), Memory(()), NOW)[0].desired == 8


def test_a_fleet_that_the_scaler_put_to_sleep_wakes_up() -> None:
    asleep = policy(low=0)
    decision, memory = decide(asleep, seen(3, Total.of(0)), Memory((), (), ()), NOW)
    assert decision.desired == 0
    memory = committed(asleep, decision, memory, NOW)
    assert memory.scaled_to_zero
    decision, memory = decide(asleep, seen(0, Total.of(25)), memory, NOW + 15)
    assert decision.desired == 3
    assert not committed(asleep, decision, memory, NOW + 15).scaled_to_zero


def test_a_fleet_without_a_fleet_wide_metric_cannot_wake_up() -> None:
    cpu = policy(CpuTarget(utilization=50), low=0)
    sums = ResourceAggregate.uniform(usage=0, request=1000, ready=3)
    decision, memory = decide(cpu, seen(3, sums), Memory(()), NOW)
    assert decision.desired == 0
    assert not committed(cpu, decision, memory, NOW).scaled_to_zero
    woken, _ = decide(cpu, seen(0, sums), Memory((), scaled_to_zero=True), NOW)
    assert woken.limit is Limit.PAUSED


def test_a_minimum_raised_during_sleep_holds_at_once() -> None:
    decision, _ = decide(policy(low=4), seen(0, Total.of(1)), Memory((), scaled_to_zero=True), NOW)
    assert (decision.desired, decision.limit) == (4, Limit.MIN)


# ------------------------------------------------------------------------------------------------ several metrics


def test_the_largest_proposal_wins() -> None:
    both = policy(QueueTarget(length=10), CpuTarget(utilization=50))
    sums = ResourceAggregate.uniform(usage=10 * 800, request=1000, ready=10)
    decision, _ = decide(both, seen(10, Total.of(120), sums), Memory(), NOW)
    assert [p.replicas for p in decision.proposals] == [12, 16]
    assert (decision.raw, decision.driver, decision.desired, decision.limit) == (16, "cpu", 16, Limit.NONE)


@pytest.mark.parametrize(("queue", "desired", "limit"), [(150, 15, Limit.NONE), (50, 10, Limit.METRICS)])
def test_with_a_failed_metric_the_fleet_grows_but_never_shrinks(queue: float, desired: int, limit: Limit) -> None:
    both = policy(QueueTarget(length=10), CpuTarget(utilization=50))
    decision, _ = decide(both, seen(10, Total.of(queue), MetricFailed("time-out")), Memory((), (), ()), NOW)
    assert (decision.desired, decision.limit) == (desired, limit)
    assert [p.target for p in decision.failed] == ["cpu"]
    assert "time-out" in decision.reasons[-1].text


def test_without_any_metric_nothing_changes_and_nothing_is_remembered() -> None:
    memory = Memory((Recommendation(7, NOW - 5),))
    decision, after = decide(policy(), seen(10, MetricFailed("down")), memory, NOW)
    assert (decision.desired, decision.raw, decision.limit) == (10, None, Limit.METRICS)
    assert after == memory


def test_the_number_of_readings_must_be_right() -> None:
    with pytest.raises(ValueError, match="1 targets need as many readings, got 0"):
        decide(policy(), seen(3), Memory(), NOW)


def test_a_fleet_wide_target_does_not_take_sums() -> None:
    decision, _ = decide(policy(), seen(3, ResourceAggregate(ready=3, usage=3)), Memory(), NOW)
    assert decision.limit is Limit.METRICS


@pytest.mark.parametrize(
    ("target", "number", "desired"),
    [
        (CpuTarget(utilization=50), 75.0, 15),
        (MemoryTarget(utilization=50), 40.0, 10),
        (MetricTarget(metric="m", per_instance=2.0), 3.0, 15),
        (MetricTarget(metric="m", average=2.0), 24.0, 12),
        (MetricTarget(metric="m", value=2.0), 3.0, 12),
    ],
)
def test_one_number_serves_every_kind_of_target(target: Target, number: float, desired: int) -> None:
    decision, _ = decide(policy(target), seen(10, Total.of(number), ready=8), Memory(), NOW)
    assert decision.desired == desired


def test_a_value_target_needs_the_number_of_ready_instances() -> None:
    target = policy(MetricTarget(metric="m", value=2.0))
    assert decide(target, seen(10, Total.of(9)), Memory(), NOW)[0].limit is Limit.METRICS
    assert decide(target, seen(10, Total.of(2.1)), Memory(), NOW)[0].desired == 10


def test_queues_are_divided_by_the_instances_that_exist() -> None:
    decision, _ = decide(policy(), Observed(spec=10, status=5, readings=(Total.of(52),)), Memory(()), NOW)
    assert (decision.raw, decision.desired) == (5, 5)  # 10.4 each is close enough
    ten = MetricTarget(metric="m", per_instance=1)
    decision, _ = decide(policy(ten), Observed(spec=10, status=5, readings=(Total.of(4),)), Memory(()), NOW)
    assert decision.raw == 20


def test_nothing_asks_for_fewer_than_none() -> None:
    decision, memory = decide(policy(low=0), seen(3, Total(-50_000)), Memory(()), NOW)
    assert (decision.raw, decision.desired) == (0, 0)
    assert memory.recommendations == (Recommendation(0, NOW),)


def test_names() -> None:
    targets = (CpuTarget(utilization=1), MemoryTarget(utilization=1), QueueTarget(length=1, source="q"))
    assert [name_of(t) for t in (*targets, MetricTarget(metric="m", value=1))] == ["cpu", "memory", "q", "m"]


# ------------------------------------------------------------------------------------------------ what is told


def test_a_decision_tells_why() -> None:
    decision, _ = decide(policy(high=12), seen(10, Total.of(150)), Memory(), NOW)
    assert [reason.code for reason in decision.reasons] == ["scaling.max", "scaling.target"]
    assert decision.reasons[0].numbers["max"] == 12
    assert decision.reasons[1].numbers["asked"] == 15
    held, _ = decide(policy(), seen(10, Total.of(50)), Memory(), NOW)
    assert [reason.code for reason in held.reasons] == ["scaling.stabilization", "scaling.target"]
    assert held.limit is Limit.STABILIZATION
    quiet, _ = decide(policy(), seen(10, Total.of(105)), Memory(), NOW)
    assert [reason.code for reason in quiet.reasons] == ["scaling.tolerance"]


def test_notebooks_show_a_table_without_markup_from_outside() -> None:
    target = policy(MetricTarget(metric="<b>x</b>", average=1))
    decision, _ = decide(target, seen(10, MetricFailed("<script>")), Memory(), NOW)
    html = decision._repr_html_()
    assert "<caption>10 → 10 instances</caption>" in html
    assert "<b>" not in html
    assert "<script>" not in html
    assert "failed" in html


@pytest.mark.parametrize("data", [{}, {"recommendations": 5}, {"recommendations": [[1]], "added": [], "removed": []}])
def test_other_data_is_no_memory(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not the memory of a scaling decision"):
        Memory.from_dict(data)


def test_memory_round_trips() -> None:
    memory = Memory((Recommendation(3, 1.5),), (ScaleEvent(2, 3.25, outdated=True),), (ScaleEvent(1, 9.0),), True)
    assert Memory.from_dict(memory.to_dict()) == memory
    assert Memory.from_dict(Memory().to_dict()) == Memory()
