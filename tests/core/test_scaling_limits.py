"""One concrete case for each limit on how fast a fleet may change."""

from __future__ import annotations

import pytest

from agentfleet.core.scaling import (
    Limit,
    Memory,
    Observed,
    Total,
    committed,
    decide,
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
from agentfleet.core.scaling_samples import (
    Reading,
)
from agentfleet.specs import (
    QueueTarget,
    ScalingBehavior,
    ScalingPolicy,
    ScalingRule,
    Target,
)

NOW = 50_000.0


def policy(*targets: Target, low: int = 1, high: int = 100, legacy: bool = False) -> ScalingPolicy:
    return ScalingPolicy(
        min_replicas=low, max_replicas=high, targets=targets or (QueueTarget(length=10),), legacy_limits=legacy
    )


def seen(size: int, *readings: Reading, ready: int | None = None) -> Observed:
    return Observed(size, size, readings, ready=ready)


def behavior(*rules: ScalingRule, stabilization: float = 0.0) -> ScalingBehavior:
    return ScalingBehavior(stabilization=stabilization, rules=rules)


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
