"""Rollouts and sizing: the laws of one step over any counts, and of whole rollouts over a simulated fleet."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from agentfleet.core.rollout import (
    CHANCE_SHARE,
    RolloutDecision,
    RolloutMemory,
    RolloutObserved,
    RolloutPhase,
    begin,
    decide,
)
from agentfleet.specs import RolloutPolicy
from agentfleet.units import share_of
from agentfleet.view import EXPENDABLE, Condition, Counts

UNFIT = (Condition.DEAD, Condition.SICK, Condition.PENDING, Condition.STARTING)
PROVEN = (Condition.FRESH, Condition.IDLE, Condition.BUSY)
SHARES: st.SearchStrategy[int | str] = st.sampled_from([0, 1, 3, "0%", "10%", "25%", "34%", "100%"])


@st.composite
def policies(draw: st.DrawFn) -> RolloutPolicy:
    surge, unavailable = draw(SHARES), draw(SHARES)
    if surge in (0, "0%") and unavailable in (0, "0%"):
        surge = 1
    return RolloutPolicy(
        max_surge=surge,
        max_unavailable=unavailable,
        progress_deadline=draw(st.sampled_from([0.7, 60.0, 600.0])),
        max_failed=draw(st.integers(1, 4)),
        auto_rollback=draw(st.booleans()),
    )


counts = st.builds(Counts, **{condition.value: st.integers(0, 5) for condition in EXPENDABLE})
observations = st.builds(
    RolloutObserved,
    desired=st.integers(0, 30),
    new=counts,
    old=st.just(Counts()) | counts,
    paused=st.booleans(),
    failures=st.integers(0, 4),
    fallback=st.none() | st.just(1),
)
memories = st.builds(
    RolloutMemory,
    revision=st.just(2),
    started_at=st.just(0.0),
    progressed_at=st.floats(0, 1000),
    best=st.none() | st.integers(-50, 90),
    phase=st.sampled_from(RolloutPhase),
    is_rollback=st.booleans(),
)


def through_json(memory: RolloutMemory) -> RolloutMemory:
    return RolloutMemory.from_dict(json.loads(json.dumps(memory.to_dict())))


def bounds(policy: RolloutPolicy, desired: int) -> tuple[int, int]:
    """(most that may be there, fewest that must be available)."""
    surge = share_of(policy.max_surge, desired, round_up=True)
    unavailable = share_of(policy.max_unavailable, desired, round_up=False)
    return desired + surge, desired - max(unavailable, int(surge == 0))


def unfit(side: Counts) -> int:
    return side.dead + side.sick + side.pending + side.starting


def available_after(side: Counts, removed: int, *, proven: int) -> int:
    """How many of `proven` are left when the most expendable are removed first."""
    return proven - max(0, removed - (side.total - proven))


def check_step(
    policy: RolloutPolicy, observed: RolloutObserved, memory: RolloutMemory, now: float
) -> tuple[RolloutDecision, RolloutMemory]:
    """Decide, and check every law that a single step must keep."""
    decision, after = decide(policy, observed, memory, now)
    new, old, desired = observed.new, observed.old, observed.desired
    most, floor = bounds(policy, desired)
    added, total = decision.create_new + decision.create_old, new.total + old.total
    numbers = [
        decision.create_new,
        decision.create_old,
        decision.remove_new,
        decision.remove_old_unfit,
        decision.remove_old_good,
    ]
    assert min(numbers) >= 0
    assert sum(map(bool, numbers)) <= 1, "one decision adds or removes, never both"
    assert decision.changes == sum(numbers)

    # surge: nothing is added beyond it
    assert not added or total + added <= most
    # only what is there is removed, and of the old ones nothing of unknown health
    assert decision.remove_new <= new.total
    assert decision.remove_old_unfit <= unfit(old)
    assert decision.remove_old_good <= old.good
    # size: the target is never above it, nor cut below it
    assert not decision.create_new or new.total + decision.create_new <= desired
    assert not decision.remove_new or total - decision.remove_new >= desired

    # availability: a step that removes never takes the fleet below the floor (unknown ones serve, and may be there)
    removed_old = decision.remove_old_unfit + decision.remove_old_good
    before = new.available + old.good
    left = available_after(new, decision.remove_new, proven=new.available)
    left += old.good - decision.remove_old_good
    if not old.unknown:
        assert left >= min(before, floor) or decision.remove_new
    if removed_old and not observed.paused and after.phase is not RolloutPhase.FAILED:
        assert left >= min(before, floor)

    # held: the mix does not change for its own sake
    if old.total and (observed.paused or after.phase is RolloutPhase.FAILED):
        assert added == max(0, desired - total)
        assert decision.changes <= abs(desired - total)
        assert decision.reasons

    check_phase(policy, observed, memory, (decision, after), now)
    assert not decision.changes or decision.reasons
    assert all("." in reason.code and reason.text for reason in decision.reasons)
    return decision, after


def check_phase(
    policy: RolloutPolicy,
    observed: RolloutObserved,
    memory: RolloutMemory,
    result: tuple[RolloutDecision, RolloutMemory],
    now: float,
) -> None:
    """The laws of where a rollout stands."""
    decision, after = result
    assert decision.phase is after.phase
    assert (after.revision, after.started_at, after.is_rollback) == (
        memory.revision,
        memory.started_at,
        memory.is_rollback,
    )
    failed = after.phase is RolloutPhase.FAILED
    assert decision.roll_back_to == (
        observed.fallback if failed and policy.auto_rollback and not memory.is_rollback else None
    )
    arrived = observed.old.total == 0 and observed.new.available >= observed.desired
    if memory.phase is not RolloutPhase.PROGRESSING:
        assert after.phase is memory.phase, "complete and failed are final"
    elif observed.paused or not observed.desired:
        assert after.phase is RolloutPhase.PROGRESSING
        assert after.progressed_at == now
    elif arrived:
        assert after.phase is RolloutPhase.COMPLETE
    else:
        new_total = observed.new.total
        many = observed.failures >= policy.max_failed and observed.failures >= CHANCE_SHARE * new_total
        assert failed is (many or now >= after.progressed_at + policy.progress_deadline)
    assert not failed or decision.reasons[0].code.startswith("rollout.failed")
    if decision.wake is not None:
        assert decision.wake > now


# ---------------------------------------------------------------------------------------------- one step, any counts


@given(policies(), observations, memories, st.floats(0, 2000))
def test_a_decision_is_a_function_of_its_arguments(
    policy: RolloutPolicy, observed: RolloutObserved, memory: RolloutMemory, now: float
) -> None:
    """The same input gives the same output, leaves the input as it was, and the memory survives JSON unchanged."""
    kept = copy.deepcopy((observed, memory))
    first = decide(policy, observed, memory, now)
    assert decide(policy, observed, memory, now) == first
    assert (observed, memory) == kept
    assert through_json(memory) == memory
    assert through_json(first[1]) == first[1]


@given(policies(), observations, memories, st.floats(0, 2000))
def test_the_laws_hold_for_any_counts(
    policy: RolloutPolicy, observed: RolloutObserved, memory: RolloutMemory, now: float
) -> None:
    """Surge, availability, the pause and the phases hold for any fleet, even one that no rollout could produce."""
    check_step(policy, observed, memory, now)


@given(policies(), observations, memories, st.floats(0, 2000))
def test_the_deadline_is_met_when_waking(
    policy: RolloutPolicy, observed: RolloutObserved, memory: RolloutMemory, now: float
) -> None:
    """The wake-up lies ahead, and if nothing changes until then the rollout has failed at that very instant."""
    decision, after = decide(policy, observed, memory, now)
    if decision.wake is not None:
        assert decision.wake > now
        assert decide(policy, observed, after, decision.wake)[0].phase is RolloutPhase.FAILED


@given(policies(), st.integers(0, 10**6), counts)
def test_one_revision_is_sized_in_one_step(policy: RolloutPolicy, desired: int, new: Counts) -> None:
    """Without old instances the step is the whole difference, paused or not."""
    for paused in (False, True):
        observed = RolloutObserved(desired, new, Counts(), paused)
        decision, _ = decide(policy, observed, begin(1, 0.0), 0.0)
        assert decision.create_new == max(0, desired - new.total)
        assert decision.remove_new == max(0, new.total - desired)


# ---------------------------------------------------------------------------------------------- a simulated fleet


@dataclass
class Agent:
    """One simulated instance."""

    revision: int
    condition: Condition = Condition.PENDING


class RollingFleet(RuleBasedStateMachine):
    """A small fleet that carries every step out at once, while its instances come up, crash and heal as they please."""

    @initialize(policy=policies(), desired=st.integers(0, 12), min_ready=st.booleans())
    def start(self, policy: RolloutPolicy, desired: int, min_ready: bool) -> None:
        self.policy, self.desired, self.min_ready = policy, desired, min_ready
        self.now, self.paused = 0.0, False
        self.kinds = {1: "good"}
        self.proven: list[int] = [1]
        self.fleet = [Agent(1, Condition.IDLE) for _ in range(desired)]
        self.newest = 1
        self._begin(1)

    def _begin(self, revision: int, *, is_rollback: bool = False) -> None:
        self.memory = begin(revision, self.now, is_rollback=is_rollback)
        self.failures = 0

    # ---- the world

    @rule(seconds=st.sampled_from([0.1, 0.7, 20.0, 59.0, 601.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        """Some instances come a step further."""
        if self.fleet:
            for place in data.draw(st.sets(st.integers(0, len(self.fleet) - 1))):
                self._advance(self.fleet[place])

    def _advance(self, agent: Agent) -> None:
        kind = self.kinds[agent.revision]
        if agent.condition is Condition.PENDING:
            if kind != "stuck":
                agent.condition = Condition.STARTING
        elif agent.condition in (Condition.SICK, Condition.DEAD):
            agent.condition = Condition.STARTING
        elif agent.condition is Condition.STARTING and kind == "bad":
            self._fail(agent, Condition.SICK)
        elif agent.condition in (Condition.STARTING, Condition.UNKNOWN):
            agent.condition = Condition.FRESH if self.min_ready else Condition.IDLE
        elif agent.condition is Condition.FRESH:
            agent.condition = Condition.IDLE

    def _fail(self, agent: Agent, condition: Condition) -> None:
        ailing = (Condition.SICK, Condition.DEAD)
        progressing = self.memory.phase is RolloutPhase.PROGRESSING
        if progressing and agent.revision == self.memory.revision and agent.condition not in ailing:
            self.failures += 1
        agent.condition = condition

    @rule(
        data=st.data(), condition=st.sampled_from([Condition.SICK, Condition.DEAD, Condition.BUSY, Condition.UNKNOWN])
    )
    def fate(self, data: st.DataObject, condition: Condition) -> None:
        """One instance crashes, falls sick, is given work, or is not heard of."""
        if self.fleet:
            agent = data.draw(st.sampled_from(self.fleet))
            if condition in (Condition.SICK, Condition.DEAD):
                self._fail(agent, condition)
            elif condition is Condition.UNKNOWN or agent.condition is Condition.IDLE:
                agent.condition = condition

    @rule(desired=st.integers(0, 12))
    def resize(self, desired: int) -> None:
        self.desired = desired

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.paused = paused

    @rule(kind=st.sampled_from(["good", "good", "bad", "stuck"]))
    def upgrade(self, kind: str) -> None:
        """A new revision, also in the middle of an unfinished rollout."""
        self.newest += 1
        self.kinds[self.newest] = kind
        self._begin(self.newest)

    # ---- one turn

    def _counts(self, *, target: bool) -> Counts:
        tally = Counter(agent.condition for agent in self.fleet if (agent.revision == self.memory.revision) is target)
        return Counts(*(tally[condition] for condition in EXPENDABLE))

    @rule(json_between=st.booleans())
    def turn(self, json_between: bool = False) -> None:
        """Decide, check the laws, carry the step out, and follow a rollback."""
        if json_between:
            self.memory = through_json(self.memory)
        target = self.memory.revision
        fallback = next((each for each in reversed(self.proven) if each != target), None)
        observed = RolloutObserved(
            self.desired, self._counts(target=True), self._counts(target=False), self.paused, self.failures, fallback
        )
        before = self.memory.phase
        decision, self.memory = check_step(self.policy, observed, self.memory, self.now)
        if decision.phase is RolloutPhase.COMPLETE and before is not RolloutPhase.COMPLETE:
            self.proven.append(target)
            event("completed" if not self.memory.is_rollback else "rolled back")
        if decision.roll_back_to is not None:
            self._begin(decision.roll_back_to, is_rollback=True)
            return
        self._carry_out(decision)

    def _carry_out(self, decision: RolloutDecision) -> None:
        target = self.memory.revision
        old = Counter(agent.revision for agent in self.fleet if agent.revision != target)
        self.fleet += [Agent(target) for _ in range(decision.create_new)]
        if decision.create_old:
            self.fleet += [Agent(old.most_common(1)[0][0]) for _ in range(decision.create_old)]
        self._remove(decision.remove_new, EXPENDABLE, target=True)
        self._remove(decision.remove_old_unfit, UNFIT, target=False)
        self._remove(decision.remove_old_good, PROVEN, target=False)

    def _remove(self, count: int, only: tuple[Condition, ...], *, target: bool) -> None:
        candidates = [
            agent
            for condition in only
            for agent in self.fleet
            if agent.condition is condition and (agent.revision == self.memory.revision) is target
        ]
        gone = {id(agent) for agent in candidates[:count]}
        assert len(gone) == count, "a step only removes what is there"
        self.fleet = [agent for agent in self.fleet if id(agent) not in gone]

    # ---- the end of all faults

    @rule()
    def faults_stop(self) -> None:
        """A good target is reached exactly; a bad one fails and, where that is wanted, the last good one comes back."""
        self.paused = False
        self.failures = 0
        for _ in range(120):
            if self.memory.phase is RolloutPhase.FAILED and self.kinds[self.memory.revision] == "good":
                self._begin(self.memory.revision)  # it failed before the faults stopped: the operator tries again
            self.turn()
            for agent in self.fleet:
                self._advance(agent)
                self._advance(agent)
            self.now += self.policy.progress_deadline / 10
            if self._at_rest():
                break
        else:
            raise AssertionError(f"no convergence: {self.memory} {self.fleet}")
        kind = self.kinds[self.memory.revision]
        if self.desired == 0:
            assert not self.fleet
        elif kind == "good":
            assert self.memory.phase is not RolloutPhase.PROGRESSING
            assert len(self.fleet) == self.desired
            complete = self.memory.phase is RolloutPhase.COMPLETE
            assert not complete or all(agent.revision == self.memory.revision for agent in self.fleet)
        else:
            assert self.memory.phase is not RolloutPhase.PROGRESSING
            assert not self.policy.auto_rollback or self.memory.phase is RolloutPhase.COMPLETE
            assert len(self.fleet) == self.desired or self.memory.phase is RolloutPhase.COMPLETE

    def _at_rest(self) -> bool:
        if self.desired == 0:
            return not self.fleet
        good = all(a.revision == self.memory.revision and a.condition in PROVEN for a in self.fleet)
        complete = self.memory.phase is RolloutPhase.COMPLETE and len(self.fleet) == self.desired
        if complete and (good or self.kinds[self.memory.revision] != "good"):
            return True
        return self.memory.phase is RolloutPhase.FAILED and len(self.fleet) == self.desired


RollingFleet.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRollingFleet = RollingFleet.TestCase


# ---------------------------------------------------------------------------------------------- one by one

POLICY = RolloutPolicy(max_surge="25%", max_unavailable="25%", progress_deadline=600.0, max_failed=3)


def step(
    *,
    desired: int = 10,
    new: Counts = Counts(),  # noqa: B008 frozen
    old: Counts = Counts(),  # noqa: B008 frozen
    memory: RolloutMemory | None = None,
    policy: RolloutPolicy = POLICY,
    paused: bool = False,
    failures: int = 0,
    fallback: int | None = 1,
    now: float = 0.0,
) -> tuple[RolloutDecision, RolloutMemory]:
    observed = RolloutObserved(desired, new, old, paused, failures, fallback)
    return decide(policy, observed, memory or begin(2, 0.0), now)


def shape(decision: RolloutDecision) -> dict[str, int]:
    """The numbers of a step that are not zero."""
    names = ("create_new", "create_old", "remove_new", "remove_old_unfit", "remove_old_good")
    return {name: asdict(decision)[name] for name in names if asdict(decision)[name]}


def test_a_rolling_update_goes_as_kubernetes_does_it() -> None:
    """Ten instances, a quarter each way: three more, then old ones down to eight available, and so on."""
    assert shape(step(old=Counts(idle=10))[0]) == {"create_new": 3}
    assert shape(step(new=Counts(starting=3), old=Counts(idle=10))[0]) == {"remove_old_good": 2}
    assert shape(step(new=Counts(starting=3), old=Counts(idle=8))[0]) == {"create_new": 2}
    assert shape(step(new=Counts(idle=3, starting=2), old=Counts(idle=8))[0]) == {"remove_old_good": 3}


def test_sick_old_ones_go_first_and_cost_nothing() -> None:
    """Old instances that serve nobody are cleaned away before any that serve."""
    assert shape(step(new=Counts(starting=3), old=Counts(idle=8, sick=2))[0]) == {"remove_old_unfit": 2}


def test_unknown_old_ones_are_left_alone() -> None:
    """After a restart of the manager nothing is known: nothing is retired on a guess, and the step says it waits."""
    decision, _ = step(new=Counts(idle=3), old=Counts(unknown=10))
    assert not decision.changes
    assert decision.reasons[0].code == "rollout.wait"


def test_two_shares_that_round_to_nothing_still_move() -> None:
    """One of three: 10 % unavailable is none, no surge is none, so one at a time."""
    policy = RolloutPolicy(max_surge=0, max_unavailable="10%")
    assert shape(step(policy=policy, desired=3, old=Counts(idle=3))[0]) == {"remove_old_good": 1}


def test_a_fleet_of_nothing_is_rolled_by_removing() -> None:
    """With nothing wanted the old ones go and none is created; nothing is proved, so the rollout waits."""
    assert shape(step(desired=0, old=Counts(idle=4))[0]) == {"remove_old_good": 4}
    decision, _ = step(desired=0)
    assert decision.phase is RolloutPhase.PROGRESSING
    assert decision.wake is None
    assert not decision.changes


@pytest.mark.parametrize(("failures", "failed"), [(2, False), (3, True)])
def test_failures_stop_a_rollout(failures: int, failed: bool) -> None:
    """At max_failed the rollout stands still and says where to go back to, for as long as it stands failed."""
    decision, memory = step(new=Counts(sick=failures), old=Counts(idle=8), failures=failures)
    assert (decision.phase is RolloutPhase.FAILED) is failed
    assert (decision.roll_back_to == 1) is failed
    assert (step(new=Counts(sick=failures), old=Counts(idle=8), memory=memory)[0].roll_back_to == 1) is failed


def test_a_few_failures_of_many_are_chance() -> None:
    """In a rollout of a thousand three crashes are no verdict on the revision; a tenth of the new ones is."""
    new = Counts(idle=500)
    assert step(desired=1000, new=new, old=Counts(idle=600), failures=49)[0].phase is RolloutPhase.PROGRESSING
    assert step(desired=1000, new=new, old=Counts(idle=600), failures=50)[0].phase is RolloutPhase.FAILED


def test_a_fleet_of_one_fails_by_its_failures_too() -> None:
    """A single instance that falls sick again and again stops the rollout as three would."""
    bad, old = Counts(sick=1), Counts(idle=1)
    assert step(desired=1, new=bad, old=old, failures=2)[0].phase is RolloutPhase.PROGRESSING
    assert step(desired=1, new=bad, old=old, failures=3)[0].phase is RolloutPhase.FAILED


def test_a_rollback_is_not_rolled_back() -> None:
    """Two bad revisions do not take turns."""
    decision, _ = step(new=Counts(sick=3), old=Counts(idle=8), failures=3, memory=begin(1, 0.0, is_rollback=True))
    assert decision.phase is RolloutPhase.FAILED
    assert decision.roll_back_to is None


def test_a_failed_revision_gets_no_more_instances() -> None:
    """What is missing is filled with the old revision; while paused with the one that most instances have."""
    failed = replace(begin(2, 0.0), phase=RolloutPhase.FAILED)
    assert shape(step(new=Counts(sick=6), old=Counts(idle=2), memory=failed)[0]) == {"create_old": 2}
    assert shape(step(new=Counts(idle=6), old=Counts(idle=2), paused=True)[0]) == {"create_new": 2}
    assert shape(step(new=Counts(idle=2), old=Counts(idle=6), paused=True)[0]) == {"create_old": 2}


def test_shrinking_a_failed_rollout_keeps_what_works() -> None:
    """Half as many are wanted: first the sick new ones go, then the sick old ones, and good ones last."""
    failed = replace(begin(2, 0.0), phase=RolloutPhase.FAILED)
    assert shape(step(desired=5, new=Counts(sick=2), old=Counts(idle=10), memory=failed)[0]) == {"remove_new": 2}
    assert shape(step(desired=5, new=Counts(idle=1), old=Counts(idle=8, sick=1), memory=failed)[0]) == {
        "remove_old_unfit": 1
    }
    assert shape(step(desired=5, old=Counts(idle=10), memory=failed)[0]) == {"remove_old_good": 5}
    assert shape(step(desired=3, new=Counts(idle=6), old=Counts(idle=6), memory=failed)[0]) == {"remove_new": 6}


def test_no_progress_fails_at_the_deadline() -> None:
    """Instances that never come up fail the rollout 600 s after the last progress."""
    stuck, old = Counts(pending=3), Counts(idle=8)
    decision, memory = step(new=stuck, old=old, now=5.0)
    assert decision.wake == 605.0
    assert step(new=stuck, old=old, memory=memory, now=604.9)[0].phase is RolloutPhase.PROGRESSING
    assert step(new=stuck, old=old, memory=memory, now=605.0)[0].phase is RolloutPhase.FAILED


def test_flapping_is_no_progress() -> None:
    """An instance that comes and goes does not move the deadline: only the furthest point counts."""
    old = Counts(idle=8)
    _, memory = step(new=Counts(idle=1, starting=2), old=old, now=0.0)
    _, memory = step(new=Counts(sick=1, starting=2), old=old, memory=memory, now=300.0)
    _, memory = step(new=Counts(idle=1, starting=2), old=old, memory=memory, now=599.0)
    assert memory.progressed_at == 0.0


def test_a_pause_stops_the_clock() -> None:
    """However long a pause lasts, the deadline counts from its end."""
    new, old = Counts(pending=3), Counts(idle=8)
    _, memory = step(new=new, old=old)
    decision, memory = step(new=new, old=old, memory=memory, paused=True, now=5000.0)
    assert decision.wake is None
    decision, memory = step(new=new, old=old, memory=memory, now=5100.0)
    assert decision.phase is RolloutPhase.PROGRESSING


def test_a_shrunk_fleet_is_measured_by_what_is_left_of_it() -> None:
    """Half-way through a thousand the fleet becomes a hundred: each further step is progress, not a stand-still."""
    old = Counts(idle=500)
    _, memory = step(desired=1000, new=Counts(idle=500), old=old)
    decision, memory = step(desired=100, new=Counts(idle=500), old=old, memory=memory, now=10.0)
    assert shape(decision) == {"remove_new": 400}
    for minute, left in enumerate((400, 300, 200, 100), start=1):
        decision, memory = step(
            desired=100, new=Counts(idle=100), old=Counts(idle=left), memory=memory, now=500.0 * minute
        )
        assert decision.phase is RolloutPhase.PROGRESSING


def test_a_failed_first_deployment_stays_failed() -> None:
    """Nothing to go back to: the fleet keeps its size, and a moment of health does not make the revision good."""
    decision, memory = step(new=Counts(sick=10), failures=3, fallback=None)
    assert decision.phase is RolloutPhase.FAILED
    assert decision.roll_back_to is None
    assert step(new=Counts(idle=10), failures=3, fallback=None, memory=memory)[0].phase is RolloutPhase.FAILED
