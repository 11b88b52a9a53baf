"""Laws of the scaling decision that hold for every policy, load and history."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Literal, cast

from hypothesis import given
from hypothesis import strategies as st

from agentfleet.core.scaling import (
    Decision,
    Memory,
    MetricFailed,
    Observed,
    ResourceAggregate,
    Total,
    committed,
    decide,
)
from agentfleet.core.scaling_samples import Reading
from agentfleet.specs import (
    CpuTarget,
    MetricTarget,
    QueueTarget,
    ScalingBehavior,
    ScalingPolicy,
    ScalingRule,
    Target,
)

PERIOD = 15.0
RULES = st.builds(ScalingRule, count=st.integers(1, 10), period=st.sampled_from([15.0, 60.0])) | st.builds(
    ScalingRule, percent=st.integers(1, 200), period=st.sampled_from([15.0, 60.0])
)
TARGETS: st.SearchStrategy[Target] = st.sampled_from(
    [
        CpuTarget(utilization=70),
        QueueTarget(length=5),
        MetricTarget(metric="a", value=10),
        MetricTarget(metric="b", per_instance=3),
    ]
)


@st.composite
def behaviors(draw: st.DrawFn) -> ScalingBehavior:
    select = draw(st.sampled_from(["max", "max", "min", "disabled"]))
    return ScalingBehavior(
        stabilization=draw(st.sampled_from([0.0, 30.0, 120.0])),
        select=cast("Literal['max', 'min', 'disabled']", select),
        rules=tuple(draw(st.lists(RULES, min_size=1, max_size=3))),
        tolerance=draw(st.sampled_from([0.0, 0.1, 0.5])),
    )


@st.composite
def policies(draw: st.DrawFn, *, targets: Sequence[Target] | None = None, low: int = 0) -> ScalingPolicy:
    least = draw(st.integers(low, 5))
    return ScalingPolicy(
        min_replicas=least,
        max_replicas=draw(st.integers(max(least, 1), 60)),
        targets=tuple(draw(st.lists(TARGETS, min_size=1, max_size=3)) if targets is None else targets),
        up=draw(behaviors()),
        down=draw(behaviors()),
        legacy_limits=draw(st.booleans()),
    )


def reading(target: Target, load: int, status: int) -> Reading:
    """The same load, as the target wants to read it."""
    if isinstance(target, CpuTarget):
        return ResourceAggregate.uniform(usage=load * 100, request=1000, ready=status)
    if isinstance(target, MetricTarget) and target.per_instance is not None:
        return ResourceAggregate(ready=status, usage=load * 1000)
    return Total(load * 1000)


def observe(policy: ScalingPolicy, size: int, load: int, failed: frozenset[int] = frozenset()) -> Observed:
    return Observed(
        spec=size,
        status=size,
        ready=size,
        readings=tuple(
            MetricFailed("gone") if index in failed else reading(target, load, size)
            for index, target in enumerate(policy.targets)
        ),
    )


def simulate(
    policy: ScalingPolicy, size: int, loads: Sequence[int], *, through_json: bool = False
) -> list[tuple[float, Decision]]:
    """Turn after turn, each change carried out at once."""
    memory, turns = Memory(), []
    for turn, load in enumerate(loads):
        now = 1_000.0 + turn * PERIOD
        decision, memory = decide(policy, observe(policy, size, load), memory, now)
        memory = committed(policy, decision, memory, now)
        size = decision.desired
        turns.append((now, decision))
        if through_json:
            memory = Memory.from_dict(json.loads(json.dumps(memory.to_dict())))
    return turns


LOADS = st.lists(st.integers(0, 400), min_size=1, max_size=25)
SIZES = st.integers(0, 70)


@given(policies(), SIZES, LOADS)
def test_the_same_input_gives_the_same_decisions_and_is_left_alone(
    policy: ScalingPolicy, size: int, loads: list[int]
) -> None:
    before = copy.deepcopy(policy)
    assert simulate(policy, size, loads) == simulate(policy, size, loads)
    assert policy == before
    memory = Memory()
    decide(policy, observe(policy, size, loads[0]), memory, 5.0)
    assert memory == Memory()


@given(policies(), SIZES, LOADS)
def test_a_memory_that_went_through_json_decides_the_same(policy: ScalingPolicy, size: int, loads: list[int]) -> None:
    assert simulate(policy, size, loads) == simulate(policy, size, loads, through_json=True)


@given(policies(), st.integers(1, 70), LOADS)
def test_the_bounds_hold(policy: ScalingPolicy, size: int, loads: list[int]) -> None:
    for _, decision in simulate(policy, size, loads):
        if decision.current == 0 and decision.desired == 0:
            continue  # asleep: a minimum that is raised meanwhile holds from the next waking on
        assert policy.min_replicas <= decision.desired <= policy.max_replicas


@given(
    policies(targets=[QueueTarget(length=5), CpuTarget(utilization=70)], low=1),
    SIZES,
    LOADS,
    st.integers(0, 400),
    st.integers(0, 400),
)
def test_more_load_never_means_fewer_instances(
    policy: ScalingPolicy, size: int, loads: list[int], one: int, other: int
) -> None:
    memory = Memory()
    for turn, load in enumerate(loads):
        decision, memory = decide(policy, observe(policy, size, load), memory, turn * PERIOD)
        memory = committed(policy, decision, memory, turn * PERIOD)
        size = decision.desired
    now = len(loads) * PERIOD
    less, _ = decide(policy, observe(policy, size, min(one, other)), memory, now)
    more, _ = decide(policy, observe(policy, size, max(one, other)), memory, now)
    assert less.desired <= more.desired


@given(policies(), st.integers(1, 70), LOADS, st.data())
def test_a_failed_metric_never_shrinks_the_fleet(
    policy: ScalingPolicy, size: int, loads: list[int], data: st.DataObject
) -> None:
    indices = range(len(policy.targets))
    failed = frozenset(data.draw(st.sets(st.sampled_from(list(indices)), min_size=1)))
    memory = Memory()
    for turn, load in enumerate(loads):
        observed = observe(policy, size, load, failed)
        decision, memory = decide(policy, observed, memory, turn * PERIOD)
        assert decision.desired >= min(size, policy.max_replicas)
        memory = committed(policy, decision, memory, turn * PERIOD)
        size = decision.desired


@given(policies(), st.integers(1, 60), LOADS)
def test_shrinking_waits_for_the_window(policy: ScalingPolicy, size: int, loads: list[int]) -> None:
    turns = simulate(policy, size, loads)
    for index, (now, decision) in enumerate(turns):
        asked = [
            past.raw
            for at, past in turns[: index + 1]
            if past.raw is not None and past.stabilized is not None and at > now - policy.down.stabilization
        ]
        if asked and decision.stabilized is not None:
            assert decision.desired >= min(decision.current, max(asked), policy.max_replicas)


@given(policies(), st.integers(1, 60), LOADS)
def test_growing_waits_for_the_window(policy: ScalingPolicy, size: int, loads: list[int]) -> None:
    policy = policy.replace(legacy_limits=False)  # without a behaviour block only shrinking waits
    turns = simulate(policy, size, loads)
    for index, (now, decision) in enumerate(turns):
        asked = [
            past.raw
            for at, past in turns[: index + 1]
            if past.raw is not None and past.stabilized is not None and at > now - policy.up.stabilization
        ]
        if asked and decision.stabilized is not None and decision.current > 0:
            assert decision.desired <= max(decision.current, min(asked), policy.min_replicas)


def size_at(turns: Sequence[tuple[float, Decision]], time: float) -> int:
    """The size after everything that was carried out at `time` or earlier."""
    size = turns[0][1].current
    for at, decision in turns:
        if at <= time:
            size = decision.desired
    return size


@given(
    st.integers(1, 60),
    LOADS,
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from([15.0, 30.0, 60.0]),
)
def test_rate_limits_hold_over_every_period(size: int, loads: list[int], up: int, down: int, period: float) -> None:
    policy = ScalingPolicy(
        max_replicas=200,
        targets=(QueueTarget(length=5),),
        up=ScalingBehavior(stabilization=0, rules=(ScalingRule(count=up, period=period),)),
        down=ScalingBehavior(stabilization=0, rules=(ScalingRule(count=down, period=period),)),
    )
    turns = simulate(policy, size, loads)
    for now, decision in turns:
        base = size_at(turns, now - period)
        if decision.change > 0:
            assert decision.desired <= base + up
        if decision.change < 0:
            assert decision.desired >= base - down


@given(policies(), SIZES, LOADS)
def test_every_decision_explains_itself(policy: ScalingPolicy, size: int, loads: list[int]) -> None:
    for _, decision in simulate(policy, size, loads):
        assert decision.reasons
        assert json.dumps([reason.to_dict() for reason in decision.reasons])
        assert json.dumps(decision.to_dict())
        assert decision._repr_html_().startswith("<table>")
