"""One concrete case for each rule by which a metric proposes a size."""

from __future__ import annotations

import math

import pytest

from agentfleet.core.scaling import (
    InstanceSamples,
    Memory,
    MetricFailed,
    Observed,
    ResourceAggregate,
    Total,
    decide,
)
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
    INT32_MAX,
    INT64_MAX,
    Group,
    Member,
    MemberPhase,
    Reading,
    Sample,
    Startup,
    aggregate,
    classify,
    member_of,
    milli,
    ready_count,
)
from agentfleet.instances import Instance, Phase
from agentfleet.specs import (
    CpuTarget,
    MemoryTarget,
    MetricTarget,
    QueueTarget,
    ScalingPolicy,
    Target,
)

NOW = 50_000.0
EXACT = Tolerance(up=0.0, down=0.0)


def policy(*targets: Target, low: int = 1, high: int = 100, legacy: bool = False) -> ScalingPolicy:
    return ScalingPolicy(
        min_replicas=low, max_replicas=high, targets=targets or (QueueTarget(length=10),), legacy_limits=legacy
    )


def seen(size: int, *readings: Reading, ready: int | None = None) -> Observed:
    return Observed(size, size, readings, ready=ready)


# ------------------------------------------------------------------------------------------------ proposals


def replicas(outcome: Estimate | MetricFailed) -> int:
    assert isinstance(outcome, Estimate)
    return outcome.replicas


@pytest.mark.parametrize(
    ("usage", "expected", "step"),
    [
        (4_400, 5, Step.TOLERANCE),
        (4_500, 6, Step.PROPORTIONAL),
        (3_600, 5, Step.TOLERANCE),
        (3_599, 5, Step.PROPORTIONAL),
    ],
)
def test_utilization_is_cut_to_whole_percent_before_the_ratio(usage: int, expected: int, step: Step) -> None:
    sums = ResourceAggregate.uniform(usage=usage, request=1000, ready=5)
    outcome = utilization(sums, target=80, current=5, tolerance=Tolerance())
    assert isinstance(outcome, Estimate)
    assert (outcome.replicas, outcome.step, outcome.usage) == (expected, step, usage * 100 // 5000)


def test_both_tolerance_bounds_are_inside_and_differ_by_direction() -> None:
    tolerance = Tolerance(up=0.5, down=0.25)
    assert [tolerance.covers(r) for r in (0.7499, 0.75, 1.5, 1.5001, math.nan)] == [False, True, True, False, False]


def test_growing_counts_starting_instances_as_idle() -> None:
    sums = ResourceAggregate.uniform(usage=8 * 900, request=1000, ready=8, unready=2)
    outcome = utilization(sums, target=50, current=10, tolerance=Tolerance())
    assert isinstance(outcome, Estimate)
    assert (outcome.replicas, outcome.step) == (15, Step.COMPLETED)  # 72 % of 10, not 90 % of 8


def test_shrinking_counts_unmeasured_instances_as_fully_used() -> None:
    sums = ResourceAggregate.uniform(usage=8 * 100, request=1000, ready=8, missing=2)
    assert replicas(utilization(sums, target=50, current=10, tolerance=Tolerance())) == 6  # 28 % of 10
    assert replicas(utilization(sums, target=200, current=10, tolerance=Tolerance())) == 3  # they count as 200 %


def test_each_missing_instance_is_rounded_by_itself() -> None:
    sums = ResourceAggregate(ready=1, usage=0, requests=100, missing=3, missing_requests=((1, 3),))
    outcome = utilization(sums, target=150, current=4, tolerance=EXACT)
    assert replicas(outcome) == 1  # 3 x floor(1.5) of 103, which is 2 %


def test_assumptions_never_turn_the_direction_around() -> None:
    sums = ResourceAggregate.uniform(usage=450, request=1000, ready=1, missing=1)
    outcome = utilization(sums, target=50, current=2, tolerance=EXACT)
    assert isinstance(outcome, Estimate)
    assert (outcome.replicas, outcome.step) == (2, Step.DOUBT)


def test_shrinking_does_not_look_at_starting_instances() -> None:
    sums = ResourceAggregate.uniform(usage=8 * 480, request=1000, ready=8, unready=2)
    assert replicas(utilization(sums, target=50, current=10, tolerance=Tolerance())) == 10  # 48 % of 8


def test_more_instances_than_asked_for_do_not_turn_the_direction_around() -> None:
    few = ResourceAggregate.uniform(usage=400, request=2000, ready=2, missing=1)
    assert replicas(utilization(few, target=50, current=2, tolerance=Tolerance())) == 2  # 40 % of 3 would be 3
    many = ResourceAggregate.uniform(usage=4_000, request=2000, ready=2, missing=1)
    assert replicas(utilization(many, target=50, current=5, tolerance=Tolerance())) == 5  # 66 % of 3 would be 4


@pytest.mark.parametrize(
    "sums",
    [
        ResourceAggregate(ready=0, usage=0, unready=5),
        ResourceAggregate(ready=5, usage=5, requests=5, unrequested=1),
        ResourceAggregate(ready=5, usage=5),
        ResourceAggregate(ready=5, usage=5, requests=5, missing=1),
    ],
)
def test_utilization_that_cannot_be_computed_is_a_failure(sums: ResourceAggregate) -> None:
    assert isinstance(utilization(sums, target=50, current=5, tolerance=EXACT), MetricFailed)


def test_averages_count_samples_of_strangers() -> None:
    sums = ResourceAggregate(ready=2, usage=20, stray=1, stray_usage=40, missing=1)
    outcome = average_usage(sums, target=10, current=3, tolerance=EXACT)
    assert isinstance(outcome, Estimate)
    assert (outcome.usage, outcome.replicas) == (20, 6)  # 60 over 4, rounded down to 15
    assert isinstance(average_usage(ResourceAggregate(0, 0), target=1, current=1, tolerance=EXACT), MetricFailed)


def test_values_multiply_ready_instances_except_at_zero() -> None:
    assert replicas(value(30, target=10, current=5, ready=2, tolerance=EXACT)) == 6
    assert replicas(value(25, target=10, current=0, ready=0, tolerance=EXACT)) == 3
    assert replicas(value(INT64_MAX, target=1, current=5, ready=2, tolerance=EXACT)) == INT32_MAX


def test_average_values_divide_by_existing_instances() -> None:
    assert average_value(100, target=10, status=9, tolerance=Tolerance(up=0.2)).replicas == 9
    assert average_value(100, target=10, status=0, tolerance=Tolerance()).replicas == 10
    assert average_value(0, target=10, status=0, tolerance=Tolerance()).replicas == 0


def test_thousandths() -> None:
    assert [milli(x) for x in (15.3, 0.0001, 7, 1e30)] == [15_300, 1, 7_000, INT64_MAX]
    assert Total.of_series([INT64_MAX, 5]).milli == INT64_MAX
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not a measurement"):
            milli(bad)


def test_an_aggregate_accounts_for_its_missing_instances() -> None:
    with pytest.raises(ValueError, match="must account for 3 instances"):
        ResourceAggregate(ready=1, usage=1, missing=3, missing_requests=((100, 2),))


# ------------------------------------------------------------------------------------------------ samples


def test_the_cpu_of_starting_instances_is_doubted_and_their_memory_is_not() -> None:
    members = [Member("old"), Member("new", started_at=NOW - 60, ready_changed_at=NOW - 20)]
    samples = {"old": Sample(500, NOW, 15), "new": Sample(3_000, NOW, 30)}
    reading = InstanceSamples(members, samples, 1000)
    cpu, _ = decide(policy(CpuTarget(utilization=50)), seen(2, reading), Memory(), NOW)
    assert cpu.desired == 2
    memory, _ = decide(policy(MemoryTarget(utilization=50)), seen(2, reading), Memory(), NOW)
    assert memory.raw == 7
    later, _ = decide(policy(CpuTarget(utilization=50)), seen(2, reading), Memory(), NOW + 600)
    assert later.raw == 7


@pytest.mark.parametrize(
    ("member", "sample", "group"),
    [
        (Member("a", started_at=NOW - 300, ready_changed_at=NOW), Sample(1, 0.0), Group.READY),
        (Member("a", started_at=NOW - 299, ready_changed_at=NOW - 60), Sample(1, NOW - 30, 30), Group.READY),
        (Member("a", started_at=NOW - 299, ready_changed_at=NOW - 60), Sample(1, NOW - 31, 30), Group.UNREADY),
        (Member("a", ready=None, started_at=NOW - 9, ready_changed_at=NOW - 60), Sample(1, NOW, 30), Group.READY),
        (Member("a", ready=False, started_at=NOW - 9, ready_changed_at=NOW - 60), Sample(1, NOW, 30), Group.UNREADY),
        (Member("a", ready=False, started_at=NOW - 999, ready_changed_at=NOW - 969), Sample(1, NOW), Group.READY),
        (Member("a", ready=False, started_at=NOW - 999, ready_changed_at=NOW - 970), Sample(1, NOW), Group.UNREADY),
        (Member("a", started_at=None), Sample(1, NOW), Group.UNREADY),
        (Member("a", ready_changed_at=None), Sample(1, NOW), Group.UNREADY),
    ],
)
def test_the_edges_of_doubt(member: Member, sample: Sample, group: Group) -> None:
    assert classify(member, sample, startup=Startup(), now=NOW) is group
    sums = aggregate(InstanceSamples([member], {"a": sample}, 1), startup=Startup(), now=NOW)
    assert (sums.ready, sums.unready) == (int(group is Group.READY), int(group is Group.UNREADY))


def test_a_per_instance_metric_may_ask_for_the_doubts_of_cpu() -> None:
    reading = InstanceSamples(
        [Member("a"), Member("b", ready=False, ready_changed_at=NOW - 9, started_at=NOW - 9)],
        {"a": Sample(4_000, NOW), "b": Sample(9_000, NOW)},
        cpu=True,
    )
    decision, _ = decide(policy(MetricTarget(metric="cores", per_instance=2)), seen(2, reading), Memory(), NOW)
    assert decision.proposals[0].replicas == 2


def test_an_instance_that_lost_its_request_is_reported() -> None:
    reading = InstanceSamples([Member("a"), Member("b")], {"a": Sample(1)}, {"a": 5})
    assert aggregate(reading, startup=None, now=NOW).unrequested == 1


def test_ready_count_includes_instances_on_their_way_out() -> None:
    members = [Member("a"), Member("b", deleting=True), Member("c", ready=None), Member("d", phase=MemberPhase.PENDING)]
    assert ready_count(members) == 2


@pytest.mark.parametrize(
    ("phase", "ready", "ready_at", "expected"),
    [
        (Phase.RUNNING, True, 110.0, "ready"),
        (Phase.RUNNING, False, None, "unready"),
        (Phase.RUNNING, False, 110.0, "ready"),  # lost its readiness later: no starter
        (Phase.RUNNING, False, 50.0, "unready"),  # ready in an earlier life only
        (Phase.PENDING, False, None, "unready"),
        (Phase.DRAINING, True, 110.0, "ignored"),
    ],
)
def test_instances_become_members(phase: Phase, ready: bool, ready_at: float | None, expected: str) -> None:
    instance = Instance("a", "f", 0, 1, "1", phase, created_at=40, started_at=100, ready=ready, ready_at=ready_at)
    sums = aggregate(InstanceSamples([member_of(instance)], {"a": Sample(10, NOW)}, 1), startup=Startup(), now=NOW)
    assert getattr(sums, expected) == 1


@pytest.mark.parametrize("phase", [Phase.EXITED, Phase.LOST])
def test_crashed_instances_count_as_missing_so_that_a_crash_does_not_shrink_the_fleet(phase: Phase) -> None:
    instance = Instance("a", "f", 0, 1, "1", phase, created_at=40, started_at=100)
    sums = aggregate(InstanceSamples([member_of(instance)], {}, 1), startup=Startup(), now=NOW)
    assert sums.missing == 1
