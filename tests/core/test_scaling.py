"""One concrete case for each rule of the scaling decision."""

from __future__ import annotations

import math

import pytest

from agentfleet.core.scaling import (
    InstanceSamples,
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
    change_within,
    down_limit,
    limit_change,
    limit_legacy,
    stabilize,
    stabilize_legacy,
    store_event,
    up_limit,
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
    Member,
    MemberPhase,
    Reading,
    Sample,
    Startup,
    aggregate,
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
    ScalingBehavior,
    ScalingPolicy,
    ScalingRule,
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


def behavior(*rules: ScalingRule, stabilization: float = 0.0) -> ScalingBehavior:
    return ScalingBehavior(stabilization=stabilization, rules=rules)


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


def test_names() -> None:
    targets = (CpuTarget(utilization=1), MemoryTarget(utilization=1), QueueTarget(length=1, source="q"))
    assert [name_of(t) for t in (*targets, MetricTarget(metric="m", value=1))] == ["cpu", "memory", "q", "m"]


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


# ------------------------------------------------------------------------------------------------ limits


def test_a_falling_number_never_grows_the_fleet() -> None:
    log = (Recommendation(20, NOW - 10),)
    stable, after = stabilize(log, current=10, desired=15, up_window=0, down_window=300, now=NOW)
    assert stable == 15
    stable, _ = stabilize(log, current=18, desired=15, up_window=0, down_window=300, now=NOW)
    assert stable == 18
    assert after == (Recommendation(20, NOW - 10), Recommendation(15, NOW))


def test_the_log_reuses_the_last_slot_that_is_older_than_both_windows() -> None:
    log = (Recommendation(1, NOW - 900), Recommendation(2, NOW - 800), Recommendation(3, NOW - 100))
    _, after = stabilize(log, current=3, desired=9, up_window=60, down_window=300, now=NOW)
    assert [entry.replicas for entry in after] == [1, 9, 3]
    stable, after = stabilize_legacy(log, desired=2, window=300, now=NOW)
    assert (stable, [entry.replicas for entry in after]) == (3, [1, 2, 3])


def test_window_edges_are_outside_of_one_rule_and_inside_of_the_other() -> None:
    log = (Recommendation(9, NOW - 300),)
    assert stabilize(log, current=9, desired=2, up_window=0, down_window=300, now=NOW)[0] == 2
    assert stabilize_legacy(log, desired=2, window=300, now=NOW)[0] == 9


def test_rates_count_from_the_start_of_the_period() -> None:
    added, removed = (ScaleEvent(6, NOW - 10), ScaleEvent(50, NOW - 60)), (ScaleEvent(2, NOW - 30),)
    assert change_within(added, 60, NOW) == 6
    by_count = behavior(ScalingRule(count=10, period=60))
    assert up_limit(by_count, current=100, added=added, removed=removed, now=NOW) == 106
    assert down_limit(by_count, current=100, added=added, removed=removed, now=NOW) == 86
    by_percent = behavior(ScalingRule(percent=50, period=60))
    assert up_limit(by_percent, current=101, added=added, removed=removed, now=NOW) == 146  # 145.5 upwards
    assert down_limit(by_percent, current=101, added=added, removed=removed, now=NOW) == 48  # 48.5 towards zero


@pytest.mark.parametrize(("select", "up", "down"), [("max", 20, 0), ("min", 14, 6), ("disabled", 10, 10)])
def test_the_rule_that_counts_is_selected(select: str, up: int, down: int) -> None:
    both = ScalingBehavior.parse({"stabilization": 0, "select": select, "rules": [{"count": 4}, {"percent": 100}]})
    assert up_limit(both, current=10, added=(), removed=(), now=NOW) == up
    assert down_limit(both, current=10, added=(), removed=(), now=NOW) == down


@pytest.mark.parametrize(
    ("desired", "expected", "limit"),
    [(10, 10, Limit.NONE), (13, 13, Limit.NONE), (40, 14, Limit.RATE_UP), (8, 8, Limit.NONE), (1, 6, Limit.RATE_DOWN)],
)
def test_rate_limits(desired: int, expected: int, limit: Limit) -> None:
    slow = behavior(ScalingRule(count=4))
    result = limit_change(desired, current=10, bounds=(2, 20), up=slow, down=slow, added=(), removed=(), now=NOW)
    assert (result.replicas, result.limit) == (expected, limit)


@pytest.mark.parametrize(("desired", "expected", "limit"), [(90, 12, Limit.MAX), (0, 8, Limit.MIN)])
def test_bounds_win_over_looser_rates(desired: int, expected: int, limit: Limit) -> None:
    slow = behavior(ScalingRule(count=4))
    result = limit_change(desired, current=10, bounds=(8, 12), up=slow, down=slow, added=(), removed=(), now=NOW)
    assert (result.replicas, result.limit) == (expected, limit)


def test_used_up_allowance_holds_the_size() -> None:
    slow = behavior(ScalingRule(count=4, period=60))
    kwargs = {"current": 10, "bounds": (1, 99), "up": slow, "down": slow, "now": NOW}
    grown = limit_change(50, added=(ScaleEvent(9, NOW - 5),), removed=(), **kwargs)  # type: ignore[arg-type]
    assert grown.replicas == 10
    shrunk = limit_change(1, added=(), removed=(ScaleEvent(9, NOW - 5),), **kwargs)  # type: ignore[arg-type]
    assert shrunk.replicas == 10


@pytest.mark.parametrize(
    ("current", "desired", "expected", "limit"),
    [
        (1, 50, 4, Limit.RATE_UP),
        (10, 50, 20, Limit.RATE_UP),
        (30, 99, 40, Limit.MAX),
        (30, 0, 2, Limit.MIN),
        (5, 6, 6, Limit.NONE),
    ],
)
def test_legacy_limits(current: int, desired: int, expected: int, limit: Limit) -> None:
    result = limit_legacy(desired, current=current, bounds=(2, 40))
    assert (result.replicas, result.limit) == (expected, limit)


def test_without_a_behaviour_block_the_whole_decision_uses_the_legacy_limits() -> None:
    legacy = policy(legacy=True, high=500)
    decision, memory = decide(legacy, seen(10, Total.of(5_000)), Memory(), NOW)
    assert (decision.desired, decision.limit, decision.raw) == (20, Limit.RATE_UP, 500)
    memory = committed(legacy, decision, memory, NOW)
    assert memory.added == ()
    decision, _ = decide(legacy, seen(20, Total.of(0)), memory, NOW + 299)
    assert (decision.desired, decision.stabilized) == (40, 500)


def test_events_take_the_last_outdated_slot() -> None:
    rules = (ScalingRule(count=1, period=60), ScalingRule(count=1, period=30))
    events = (ScaleEvent(1, NOW - 70), ScaleEvent(2, NOW - 40), ScaleEvent(3, NOW - 61))
    after = store_event(events, 9, rules=rules, now=NOW)
    assert after == (ScaleEvent(1, NOW - 70, outdated=True), ScaleEvent(2, NOW - 40), ScaleEvent(9, NOW))
    assert store_event((), 4, rules=rules, now=NOW) == (ScaleEvent(4, NOW),)


def test_a_committed_change_counts_and_one_that_failed_does_not() -> None:
    grow = policy(high=1000)
    decision, memory = decide(grow, seen(10, Total.of(5_000)), Memory(), NOW)
    assert (decision.desired, decision.limit) == (20, Limit.RATE_UP)
    again, _ = decide(grow, seen(10, Total.of(5_000)), memory, NOW + 5)
    assert again.desired == 20
    done = committed(grow, decision, memory, NOW)
    held, _ = decide(grow, seen(20, Total.of(5_000)), done, NOW + 5)
    assert (held.desired, held.change) == (20, 0)
    assert committed(grow, held, done, NOW + 5) == done


def test_shrinking_waits_five_minutes_by_default() -> None:
    memory = Memory()
    for turn in range(41):
        now = NOW + turn * 15
        decision, memory = decide(policy(), seen(20, Total.of(200 if turn < 20 else 50)), memory, now)
        expected = 20 if now < NOW + 19 * 15 + 300 else 5
        assert decision.desired == expected, turn
    assert decision.limit is Limit.NONE
    assert decision.raw == 5


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
