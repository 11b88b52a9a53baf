"""The aggregate path against a naive one that keeps every instance apart, as the rules are written down."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from agentfleet.core.scaling_proposals import Estimate, Tolerance, average_usage, utilization
from agentfleet.core.scaling_samples import (
    Group,
    InstanceSamples,
    Member,
    MemberPhase,
    MetricFailed,
    Sample,
    Startup,
    aggregate,
    classify,
)

NOW = 10_000.0
TIMES = st.sampled_from([0.0, 9_000.0, 9_700.0, 9_880.0, 9_881.0, 9_940.0, 9_970.0, 9_990.0, 10_000.0])
STARTUP = Startup(cpu_initialization=120, readiness_delay=10)


@dataclass(frozen=True)
class Fleet:
    """One drawn case: instances, what they were measured at, and the target."""

    members: tuple[Member, ...]
    samples: dict[str, Sample]
    requests: dict[str, int]
    current: int
    target: int
    tolerance: Tolerance
    cpu: bool


@st.composite
def fleets(draw: st.DrawFn, *, uniform: bool = False) -> Fleet:
    members, samples, requests = [], {}, {}
    one = draw(st.integers(1, 2_000))
    for number in range(draw(st.integers(0, 8))):
        id = f"i{number}"
        members.append(
            Member(
                id,
                phase=draw(st.sampled_from([*[MemberPhase.RUNNING] * 5, MemberPhase.PENDING, MemberPhase.ENDED])),
                deleting=draw(st.integers(0, 7)) == 0,
                ready=draw(st.sampled_from([True, True, True, False, None])),
                ready_changed_at=draw(st.none() | TIMES),
                started_at=draw(st.none() | TIMES),
            )
        )
        requests[id] = one if uniform else draw(st.integers(1, 2_000))
        if draw(st.integers(0, 4)):
            samples[id] = Sample(draw(st.integers(0, 4_000)), at=draw(TIMES), window=draw(st.sampled_from([0.0, 60.0])))
    for number in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        samples[f"gone{number}"] = Sample(draw(st.integers(0, 4_000)))
    return Fleet(
        tuple(members),
        samples,
        requests,
        current=draw(st.integers(0, 12)),
        target=draw(st.sampled_from([1, 30, 50, 80, 100, 101, 150, 333])),
        tolerance=Tolerance(up=draw(st.sampled_from([0.0, 0.1, 2.0])), down=draw(st.sampled_from([0.0, 0.1, 0.36]))),
        cpu=draw(st.booleans()),
    )


def naive_group(fleet: Fleet, member: Member) -> Group:
    """One instance, rule by rule."""
    if member.deleting or member.phase == "ended":
        return Group.IGNORED
    if member.phase == "pending":
        return Group.UNREADY
    if member.id not in fleet.samples:
        return Group.MISSING
    if not fleet.cpu:
        return Group.READY
    if member.ready_changed_at is None or member.started_at is None:
        return Group.UNREADY
    sample = fleet.samples[member.id]
    young = NOW - member.started_at < STARTUP.cpu_initialization
    if young and (member.ready is False or sample.at - sample.window < member.ready_changed_at):
        return Group.UNREADY
    never_ready = member.ready_changed_at - member.started_at < STARTUP.readiness_delay
    if not young and member.ready is False and never_ready:
        return Group.UNREADY
    return Group.READY


def naive(fleet: Fleet, *, percent: bool) -> int | None:
    """How many instances, with one dictionary entry an instance; None where there is no answer."""
    groups = {member.id: naive_group(fleet, member) for member in fleet.members}
    measured = {
        id: sample.milli for id, sample in fleet.samples.items() if groups.get(id) not in (Group.IGNORED, Group.UNREADY)
    }
    unready = [id for id, group in groups.items() if group is Group.UNREADY]
    missing = [id for id, group in groups.items() if group is Group.MISSING]

    def ratio_of(values: dict[str, int]) -> float | None:
        if not percent:
            return (sum(values.values()) // len(values)) / fleet.target
        known = [id for id in values if id in fleet.requests]
        total = sum(fleet.requests[id] for id in known)
        return None if total == 0 else (100 * sum(values[id] for id in known) // total) / fleet.target

    if not measured:
        return None
    first = ratio_of(measured)
    if first is None:
        return None
    if not missing and not (unready and first > 1):
        if 1 - fleet.tolerance.down <= first <= 1 + fleet.tolerance.up:
            return fleet.current
        return math.ceil(first * sum(group is Group.READY for group in groups.values()))
    for id in missing:
        if first < 1:
            measured[id] = fleet.requests[id] * max(100, fleet.target) // 100 if percent else fleet.target
        elif first > 1:
            measured[id] = 0
    if first > 1:
        measured |= dict.fromkeys(unready, 0)
    second = ratio_of(measured)
    assert second is not None
    if 1 - fleet.tolerance.down <= second <= 1 + fleet.tolerance.up or (first - 1) * (second - 1) < 0:
        return fleet.current
    replicas = math.ceil(second * len(measured))
    wrong_way = (second < 1 and replicas > fleet.current) or (second > 1 and replicas < fleet.current)
    return fleet.current if wrong_way else replicas


def answer(outcome: Estimate | MetricFailed) -> int | None:
    return outcome.replicas if isinstance(outcome, Estimate) else None


@given(fleets())
def test_the_groups_are_those_of_the_rules(fleet: Fleet) -> None:
    startup = STARTUP if fleet.cpu else None
    for member in fleet.members:
        found = classify(member, fleet.samples.get(member.id), startup=startup, now=NOW)
        assert found is naive_group(fleet, member)


@given(fleets())
def test_the_one_pass_counts_what_one_by_one_classification_counts(fleet: Fleet) -> None:
    sums = aggregate(
        InstanceSamples(fleet.members, fleet.samples, fleet.requests), startup=STARTUP if fleet.cpu else None, now=NOW
    )
    groups = [naive_group(fleet, member) for member in fleet.members]
    assert (sums.ready, sums.unready, sums.missing, sums.ignored) == (
        groups.count(Group.READY),
        groups.count(Group.UNREADY),
        groups.count(Group.MISSING),
        groups.count(Group.IGNORED),
    )
    assert sums.unrequested == 0
    known = {member.id for member in fleet.members}
    assert sums.stray == len(fleet.samples.keys() - known)


@given(fleets())
def test_utilization_over_aggregates_equals_the_naive_one(fleet: Fleet) -> None:
    sums = aggregate(
        InstanceSamples(fleet.members, fleet.samples, fleet.requests), startup=STARTUP if fleet.cpu else None, now=NOW
    )
    outcome = utilization(sums, target=fleet.target, current=fleet.current, tolerance=fleet.tolerance)
    assert answer(outcome) == naive(fleet, percent=True)


@given(fleets(uniform=True))
def test_one_request_for_all_equals_a_request_each(fleet: Fleet) -> None:
    startup = STARTUP if fleet.cpu else None
    each = aggregate(InstanceSamples(fleet.members, fleet.samples, fleet.requests), startup=startup, now=NOW)
    one = next(iter(fleet.requests.values()), 1)
    assert aggregate(InstanceSamples(fleet.members, fleet.samples, one), startup=startup, now=NOW) == each


@given(fleets())
def test_averages_over_aggregates_equal_the_naive_ones(fleet: Fleet) -> None:
    sums = aggregate(InstanceSamples(fleet.members, fleet.samples), startup=STARTUP if fleet.cpu else None, now=NOW)
    outcome = average_usage(sums, target=fleet.target, current=fleet.current, tolerance=fleet.tolerance)
    assert answer(outcome) == naive(fleet, percent=False)
